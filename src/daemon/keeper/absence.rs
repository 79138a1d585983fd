//! How long a keeper has been without a daemon, and when it starts another one.
//!
//! Readers wait from the moment at which a daemon vanished that had served. A daemon that dies of its start has
//! served nobody, so the clock runs on through it, and the pause before the next start grows.

use std::time::{Duration, Instant};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Pauses before a daemon is started again: the first at once, then doubling with each start.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A daemon that served this long did not die of its start.
const SETTLED: Duration = Duration::from_secs(30);
/// One that served this long after it had taken everything over has answered those who waited before.
pub(super) const SERVED: Duration = Duration::from_secs(2);

/// The daemon that is there or missing, and the attempts to start another one.
#[derive(Debug)]
pub(super) struct Absence {
    /// Whether a daemon can be started from here.
    starts_daemons: bool,
    /// When the daemon came that is there, or was last.
    attached: Instant,
    /// Since when it serves, if it took over and said so.
    serving: Option<Instant>,
    /// What it said about its leaving, if it did: whether it wants a successor.
    parting: Option<bool>,
    since: Instant,
    wants_successor: bool,
    next_attempt: Instant,
    pause: Duration,
    child: Option<Pid>,
    /// Whether a daemon was missed before, since one last served for a while.
    is_known: bool,
}

/// How a daemon has gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gone {
    /// It did not say so beforehand.
    pub(super) is_unexpected: bool,
    /// It did not die of its start.
    pub(super) had_stayed: bool,
}

impl Absence {
    /// A daemon is there.
    pub(super) fn new(starts_daemons: bool) -> Self {
        let now = Instant::now();
        Self {
            starts_daemons,
            attached: now,
            serving: None,
            parting: None,
            since: now,
            wants_successor: false,
            next_attempt: now,
            pause: Duration::ZERO,
            child: None,
            is_known: false,
        }
    }

    /// The daemon is about to leave, and wants a successor to be started or not.
    pub(super) fn expect(&mut self, wants_successor: bool) {
        self.parting = Some(wants_successor);
    }

    /// The daemon has taken over everything and serves.
    pub(super) fn note_service(&mut self) {
        self.serving = Some(Instant::now());
    }

    /// The daemon has gone.
    pub(super) fn begin(&mut self) -> Gone {
        let now = Instant::now();
        let parting = self.parting.take();
        let is_settled = self.attached.elapsed() >= SETTLED;
        self.pause = match parting {
            Some(_) => Duration::ZERO,
            None if is_settled => FIRST_PAUSE,
            None => self.pause.max(FIRST_PAUSE),
        };
        // One that died of its start has served nobody: the readers who waited for it wait on.
        let has_served = self.serving.take().is_some_and(|since| since.elapsed() >= SERVED);
        let had_stayed = parting.is_some() || has_served || is_settled;
        if had_stayed || !self.is_known {
            self.since = now;
        }
        self.is_known = true;
        self.next_attempt = now + self.pause;
        self.wants_successor = parting.unwrap_or(true) && self.starts_daemons;
        Gone { is_unexpected: parting.is_none(), had_stayed }
    }

    /// Another daemon has come.
    pub(super) fn end(&mut self) {
        (self.attached, self.serving) = (Instant::now(), None);
    }

    /// Whether nobody has served for `patience`.
    pub(super) fn has_lasted(&self, patience: Duration) -> bool {
        self.since.elapsed() >= patience
    }

    /// Whether another daemon is to be started from here.
    pub(super) fn wants_successor(&self) -> bool {
        self.wants_successor
    }

    /// No other daemon is to be started.
    pub(super) fn give_up(&mut self) {
        self.wants_successor = false;
    }

    /// Forgets the one that was started last, if it has died, and tells how.
    pub(super) fn reap(&mut self) -> Option<WaitStatus> {
        let status = waitpid(self.child?, Some(WaitPidFlag::WNOHANG)).ok().filter(|status| status.pid().is_some())?;
        self.child = None;
        Some(status)
    }

    /// Whether to start one now.
    pub(super) fn is_time_to_start(&self) -> bool {
        self.wants_successor && self.child.is_none() && Instant::now() >= self.next_attempt
    }

    /// One was started now, as `child`, or could not be.
    pub(super) fn note_start(&mut self, child: Option<Pid>) {
        self.child = child.or(self.child);
        self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.next_attempt = Instant::now() + self.pause;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_doubles_once_for_each_start_and_a_farewell_needs_none() {
        let mut absence = Absence::new(true);
        for pause in [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000] {
            assert!(absence.begin().is_unexpected);
            assert_eq!(absence.pause, Duration::from_millis(pause));
            absence.note_start(None);
            absence.end();
        }
        absence.expect(true);
        assert!(!absence.begin().is_unexpected && absence.wants_successor() && absence.is_time_to_start());
        absence.end();
        absence.expect(false);
        assert!(!absence.begin().is_unexpected && !absence.wants_successor() && !absence.is_time_to_start());
    }

    #[test]
    fn who_dies_of_its_start_does_not_reset_the_clock() {
        let mut absence = Absence::new(true);
        absence.begin();
        let since = absence.since;
        absence.end();
        absence.note_service();
        assert!(!absence.begin().had_stayed);
        assert_eq!(absence.since, since, "it served too short");
        absence.end();
        absence.serving = Instant::now().checked_sub(SERVED);
        assert!(absence.begin().had_stayed);
        assert_ne!(absence.since, since);
    }

    #[test]
    fn a_keeper_that_starts_nobody_never_wants_to() {
        let mut absence = Absence::new(false);
        assert!(absence.begin().is_unexpected && !absence.wants_successor() && !absence.is_time_to_start());
    }
}
