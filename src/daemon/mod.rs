//! The process that serves many images: it owns the pools, the store, the backends and the
//! mounts, and composes them. Nothing below it spawns a thread of its own accord.
//!
//! * [`Daemon`] mounts, unmounts and lists; its methods may block and are called from blocking
//!   threads.
//! * [`stock`] is the cache as people see it: what is there, which images use it, what may go.
//! * [`control`] puts it behind a Unix socket, [`client`] is the other end.
//! * [`remote`] is the way from a reference to an image, also for tools that need no daemon.
//! * [`keeper`] are the processes that hold the kernel descriptors, so that a killed daemon leaves
//!   readers waiting, for the next daemon, instead of showing them zeros. `records` tells it what was
//!   mounted, `adopt` takes it over.

mod adopt;
mod alive;
pub mod api;
mod asker;
mod attribution;
mod blobfs;
pub mod client;
mod connections;
pub mod control;
mod credentials;
mod credentialsclient;
mod error;
pub mod keeper;
mod known;
mod lookup;
mod mounts;
mod objects;
mod observe;
mod order;
mod origins;
mod prefetch;
mod prepare;
mod pulls;
mod records;
mod references;
mod registered;
mod registry;
pub mod remote;
mod served;
mod serving;
pub mod settings;
pub mod stock;
mod stockclient;
mod stop;
mod stored;
mod successor;
mod trace;
mod turns;
mod unkept;
mod unmounts;
mod unserved;

pub use alive::Stuck;
pub use asker::Asker;
pub use error::DaemonError;
pub use mounts::{Daemon, Options};
pub use stop::Ending;
pub use successor::ONLY_CHECK;
