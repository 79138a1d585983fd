//! What the threads of this process may do.
//!
//! [`Sandbox::enter`] confines the calling thread, and with it every thread that it starts from
//! then on, by landlock (which files) and by seccomp (which system calls). A program that calls it
//! before it starts any thread cannot forget one.
//!
//! A confined thread can neither mount nor start programs; landlock alone takes mounting away
//! from it (`EPERM` from `move_mount` and `umount2`, seen on 6.18). So one thread is started
//! *before*, and work that needs more is handed to it: [`Sandbox::outside`].
//!
//! Threads that take bytes apart, or answer the kernel, give up still more: [`Sandbox::narrow`].
//!
//! The keepers confine themselves their own way: [`confine_keeper`].
//!
//! All threads share one memory, so this does not hold whoever can already run code of their own
//! in it. It holds what goes wrong before that: a path that leads elsewhere, a file written in the
//! wrong place, a program started.

mod calls;
mod files;
mod outside;

pub use files::{Policy, landlock_version};

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::outside::Outside;

/// The way out of the sandbox, and the way further in. Cheap to clone.
#[derive(Clone, Default)]
pub struct Sandbox(Option<Arc<Entered>>);

struct Entered {
    outside: Outside,
    narrow: Option<calls::Filter>,
    /// One complaint is enough.
    complained: AtomicBool,
}

/// What is in force after [`Sandbox::enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strength {
    /// Version of landlock's interface by which files are confined; `None` if the kernel has none.
    pub landlock: Option<i32>,
    /// Whether system calls are filtered.
    pub seccomp: bool,
}

/// Why a thread could not be confined although the kernel can do it.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("cannot start the thread that stays outside")]
    Thread(#[source] io::Error),
    #[error("landlock refuses its rules")]
    Files(#[source] landlock::RulesetError),
    #[error("cannot compile the filter of system calls")]
    Calls(#[source] seccompiler::BackendError),
}

impl Sandbox {
    /// No sandbox: work outside runs in place, and nothing is narrowed.
    pub fn off() -> Self {
        Self(None)
    }

    /// Confines the calling thread and all that it starts from now on. Other threads stay as they
    /// are. There is no way back.
    ///
    /// What the kernel does not have is left out and told in [`Strength`].
    pub fn enter(policy: &Policy) -> Result<(Self, Strength), SandboxError> {
        // Compiled first: nothing is confined by halves because of an error.
        let (wide, narrow) = (calls::wide()?, calls::narrow()?);
        let outside = Outside::start().map_err(SandboxError::Thread)?;
        let landlock = files::restrict(policy)?;
        let seccomp = wide.apply();
        let entered = Entered { outside, narrow: seccomp.then_some(narrow), complained: AtomicBool::new(false) };
        Ok((Self(Some(Arc::new(entered))), Strength { landlock, seccomp }))
    }

    /// Runs `work` on a thread outside of the sandbox and waits for it: for mounting, unmounting
    /// and starting programs. A panic of `work` goes on in the caller.
    pub fn outside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        match &self.0 {
            Some(entered) => entered.outside.run(work).expect("a thread can be started"),
            None => work(),
        }
    }

    /// The same for who can go on without.
    ///
    /// # Errors
    /// If there is no thread to be had for it; and what `work` says.
    pub fn try_outside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        match &self.0 {
            Some(entered) => entered.outside.run(work)?,
            None => work(),
        }
    }

    /// Leaves the calling thread only what decoding and answering events take: files that the
    /// sandbox allows, memory, time. No sockets, no threads, no memory that can be executed.
    pub fn narrow(&self) {
        let Some(entered) = &self.0 else { return };
        let Some(filter) = &entered.narrow else { return };
        if !filter.apply() && !entered.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!("a thread could not give up the system calls that it does not need");
        }
    }
}

/// Confines the calling thread to what holding descriptors takes: sockets and files beneath `run`,
/// answers to the kernel, memory, time. It starts neither threads nor programs and mounts nothing. There
/// is no way back, and none out: what needs more is done by a thread that was started before.
///
/// What the kernel does not have is left out and told.
///
/// # Errors
/// If the kernel refuses what it has.
pub fn confine_keeper(run: &Path) -> Result<Strength, SandboxError> {
    let calls = calls::keeper()?;
    let policy = Policy { write: vec![run.to_owned()], ..Policy::default() };
    let landlock = files::restrict(&policy)?;
    Ok(Strength { landlock, seccomp: calls.apply() })
}

impl PartialEq for Sandbox {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        }
    }
}

impl Eq for Sandbox {}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sandbox").field(&self.0.is_some()).finish()
    }
}

/// Whether this kernel filters system calls. Changes nothing.
pub fn has_seccomp() -> bool {
    calls::is_available()
}

#[cfg(test)]
mod tests;
