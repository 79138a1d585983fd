//! The operating system, and the only home of `unsafe`.
//!
//! Thin, typed wrappers around system calls that no well-kept crate offers. Descriptors go in as
//! `BorrowedFd` and come out as `OwnedFd`; numbers that the kernel hands us inside messages are
//! turned into owned descriptors here and nowhere else. No policy: callers decide what to do.

#![expect(unsafe_code, reason = "the one layer that talks to the kernel directly")]

pub mod beneath;
pub mod cachefiles;
pub mod descriptors;
pub mod fanotify;
pub mod faultpoint;
pub mod fdpass;
pub mod files;
pub mod fuse;
pub mod fusering;
pub mod fuseslots;
pub mod handle;
pub mod inotify;
pub mod journal;
pub mod loopdev;
pub mod memory;
pub mod mmap;
pub mod mount;
pub mod newdirs;
pub mod process;
pub mod programs;
pub mod requestlog;
pub mod sandbox;
pub mod service;
mod sharedmemory;
pub mod spawn;
