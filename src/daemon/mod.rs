//! The process that serves many images: it owns the pools, the store, the backends and the
//! mounts, and composes them. Nothing below it spawns a thread of its own accord.
//!
//! * [`Daemon`] mounts, unmounts and lists; its methods may block and are called from blocking
//!   threads.
//! * [`stock`] is the cache as people see it: what is there, which images use it, what may go.
//! * [`control`] puts it behind a Unix socket, [`client`] is the other end.
//! * [`keeper`] is the process that holds the kernel descriptors, so that a killed daemon leaves
//!   readers waiting instead of showing them zeros.

pub mod api;
pub mod client;
pub mod control;
mod error;
pub mod keeper;
mod mounts;
mod objects;
mod prepare;
mod served;
mod serving;
pub mod stock;
mod stockclient;

pub use error::DaemonError;
pub use mounts::{Daemon, Options};
