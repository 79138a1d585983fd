//! The process that serves many images: it owns the pools, the store, the backends and the
//! mounts, and composes them. Nothing below it spawns a thread of its own accord.
//!
//! * [`Daemon`] mounts, unmounts and lists; its methods may block and are called from blocking
//!   threads.
//! * [`control`] puts it behind a Unix socket, [`client`] is the other end.
//! * [`keeper`] is the process that holds the kernel descriptors, so that a killed daemon leaves
//!   readers waiting instead of showing them zeros.

pub mod api;
mod attribution;
pub mod client;
pub mod control;
mod error;
pub mod keeper;
mod mounts;
mod objects;
mod order;
mod prefetch;
mod prepare;
mod served;
mod serving;
mod trace;

pub use error::DaemonError;
pub use mounts::{Daemon, Options};
