//! The thread that was started before the sandbox, and what it does for those inside.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Sender, channel};
use std::thread;

type Job = Box<dyn FnOnce() + Send + 'static>;

/// Starts a thread outside for each piece of work: none waits behind a mount that waits for a
/// server.
pub(super) struct Outside(Sender<Job>);

impl Outside {
    /// Starts the thread, which ends when the last sender has gone.
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, queue) = channel::<Job>();
        thread::Builder::new().name("outside".into()).spawn(move || {
            for job in queue {
                // A thread that is started here inherits the freedom of this one.
                let spawned = thread::Builder::new().name("outside-job".into()).spawn(job);
                // The job is dropped with the error: its caller hears that nobody answers.
                if let Err(error) = spawned {
                    tracing::error!(%error, "no thread can be started outside of the sandbox");
                }
            }
        })?;
        Ok(Self(jobs))
    }

    /// Runs `work` outside and returns when it is over. A panic of `work` goes on here.
    ///
    /// # Errors
    /// If there is no thread to be had for it.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let (tell, told) = channel::<Result<T, Box<dyn Any + Send>>>();
        let job: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
            // The caller waits for this very message.
            let _ = tell.send(catch_unwind(AssertUnwindSafe(work)));
        });
        // SAFETY: only the lifetime changes. What `work` borrows outlives this call, and this call
        // does not return, normally or by a panic, before `told.recv()` has: either the message
        // has come, which is sent after `work` was consumed, or `tell` was dropped, which happens
        // when the job, `work` included, has been dropped unrun. What is left of the job after
        // the message is the sending half of an empty channel, which borrows nothing.
        let job: Job = unsafe { std::mem::transmute(job) };
        // A failure hands the job back and drops it here; then nobody answers below.
        let _ = self.0.send(job);
        match told.recv() {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(panic)) => resume_unwind(panic),
            Err(_) => Err(io::Error::other("no thread could be started outside of the sandbox")),
        }
    }
}
