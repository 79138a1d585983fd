//! Locks and atomics for code whose schedules are explored.
//!
//! The standard library's, except when the feature `shuttle` builds the tests that try many
//! interleavings: then each use of one of these is a point where another thread may go on. A file
//! imports from here exactly if a test named `schedules` is about it.

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::sync::{Mutex, MutexGuard, RwLock};
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::sync::{Mutex, MutexGuard, RwLock};

/// Atomic integers and flags.
pub(crate) mod atomic {
    #[cfg(feature = "shuttle")]
    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
    #[cfg(not(feature = "shuttle"))]
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
}
