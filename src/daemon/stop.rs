//! The end of a daemon: for good, or to make room for a successor.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::keeper::{Kind, Name};
use super::successor::try_out;
use super::{Daemon, DaemonError};
use crate::base::Chain;

/// How long reads that wait for data may hold up a successor, who would have to fetch it again.
const DRAIN: Duration = Duration::from_millis(500);

/// How a daemon was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// For good.
    Stop,
    /// For a successor, which the keepers start at once.
    Upgrade,
}

impl Daemon {
    /// Notes how to end, once. What was asked first holds. Mounts that are being made are given up for good.
    pub fn ask_to(&self, ending: Ending) {
        if self.ending.set(ending).is_ok() && ending == Ending::Stop {
            // It would be unmounted at once.
            self.give_up();
        }
    }

    /// How it was asked to end, if it was.
    pub fn asked_to(&self) -> Option<Ending> {
        self.ending.get().copied()
    }

    /// Makes `program` the one that the keepers start as a successor.
    ///
    /// # Errors
    /// If it could not go on, or nobody would start a successor; if this daemon is about to end already.
    pub fn set_successor(&self, program: &Path) -> Result<(), DaemonError> {
        let Some(command) = &self.options.keepers.successor else { return Err(DaemonError::NoSuccessor) };
        if self.asked_to().is_some() {
            return Err(DaemonError::Stopping);
        }
        let unusable = |cause| DaemonError::Io { path: program.to_owned(), cause };
        if !self.keepers.is_alive() {
            let cause = io::Error::other("the keepers have died and are being started again");
            return Err(DaemonError::Start { what: "a successor", cause });
        }
        if !program.is_absolute() {
            return Err(DaemonError::Relative(program.to_owned()));
        }
        let file = std::fs::File::open(program).map_err(unusable)?;
        let arguments = command.get(1..).unwrap_or_default();
        self.options.sandbox.outside(|| try_out(program, arguments))?;
        let name = Name::only(Kind::Program);
        self.keepers.hold(name, Arc::new(file)).map_err(|cause| DaemonError::Start { what: "a successor", cause })
    }

    /// Unmounts everything that can be unmounted, makes the cache durable and ends the threads.
    /// What is busy and incomplete is left to the keepers: its readers wait and never see zeros.
    /// Blocks.
    pub fn stop(&self) {
        self.state.lock().unwrap().stopping = true;
        self.prefetches.cancel(None);
        self.pulls.close();
        self.give_up();
        self.wait_for_reservations();
        let dirs: Vec<_> = self.state.lock().unwrap().mounts.keys().cloned().collect();
        for dir in dirs {
            if let Err(error) = self.unmount(&dir, false) {
                tracing::warn!(error = %Chain(&error), "stays mounted");
            }
        }
        let registered = std::mem::take(&mut self.state.lock().unwrap().registered);
        registered.into_values().for_each(|(_, record)| self.records.remove(record));
        self.bury();
        self.outlive_the_unkept();
        let in_use = self.is_in_use();
        self.backends.pause();
        self.keep_slots();
        if in_use {
            self.backends.freeze();
        }
        self.flush();
        if !in_use {
            self.keepers.finish();
        } else {
            tracing::warn!("incomplete images are still in use; their readers wait for the next daemon");
            self.keepers.leave(false);
        }
        self.end_watch();
    }

    /// Leaves everything as it is to a successor: one that the keepers start at once if
    /// `start_another`, else one that somebody else starts. Readers wait meanwhile. Blocks.
    pub fn hand_over(&self, start_another: bool) {
        self.state.lock().unwrap().stopping = true;
        self.prefetches.cancel(None);
        self.pulls.close();
        self.give_up();
        self.wait_for_reservations();
        self.outlive_the_unkept();
        // While readers are still served: afterwards there is little left to make durable.
        self.flush();
        self.backends.pause();
        self.keep_slots();
        let until = Instant::now() + DRAIN;
        while self.backends.waiting() > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.backends.freeze();
        self.flush();
        self.end_watch();
        if self.is_idle() && !start_another {
            self.keepers.finish();
        } else {
            self.keepers.leave(start_another);
        }
    }

    fn flush(&self) {
        if let Err(error) = self.store.close() {
            tracing::error!(error = %Chain(&error), "what was fetched last may have to be fetched again");
        }
    }

    fn end_watch(&self) {
        self.watch.stop();
        if let Some(thread) = self.watcher.lock().unwrap().take() {
            let _ = thread.join();
        }
    }

    /// Waits, for a while, for mounts that are being made: they have been given up, but the kernel may be at it.
    fn wait_for_reservations(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.state.lock().unwrap().mounts.values().any(Option::is_none) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether somebody may still ask for data that is missing.
    fn is_in_use(&self) -> bool {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.values().flatten().any(|mounted| mounted.served.needs_us());
        let being_made = state.mounts.values().any(Option::is_none);
        mounted || being_made || !state.lingering.is_empty() || !state.unserved.is_empty()
    }

    /// The keepers were killed: this process is then the last that holds the group, and must not
    /// end before the last mount does.
    fn outlive_the_unkept(&self) {
        while self.is_in_use() && !self.keepers.is_alive() {
            tracing::error!("the keepers have died and incomplete images are in use; waiting for them to be unmounted");
            std::thread::sleep(Duration::from_secs(5));
            self.bury();
        }
    }
}
