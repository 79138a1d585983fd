//! Cases that run the daemon, and the facts it rests on.

pub(crate) mod baddays;
pub(crate) mod blobfs;
mod dockerregistry;
pub(crate) mod events;
pub(crate) mod faults;
mod fixture;
pub(crate) mod fuse;
pub(crate) mod idmap;
pub(crate) mod images;
pub(crate) mod interop;
pub(crate) mod lifecycle;
pub(crate) mod many;
pub(crate) mod meddling;
pub(crate) mod metadata;
pub(crate) mod observing;
pub(crate) mod posix;
pub(crate) mod prefetch;
pub(crate) mod random;
pub(crate) mod reading;
pub(crate) mod registry;
pub(crate) mod ring;
pub(crate) mod service;
pub(crate) mod sharing;
pub(crate) mod space;
pub(crate) mod takeover;
pub(crate) mod unprivileged;
pub(crate) mod v5;
