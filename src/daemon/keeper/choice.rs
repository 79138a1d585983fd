//! Which program a keeper starts in the place of a daemon that has gone.
//!
//! One that an upgrade asks for goes first, once. Then the one with the name that the keeper was told. Another file may
//! have that name since the keeper was started, as after a package was replaced: if it dies of its start, it takes turns
//! with the program that the keeper runs itself.

use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A program that was or is to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Candidate {
    /// What an upgrade has asked for.
    Given,
    /// What has the name that this keeper was told.
    Named,
    /// What this keeper runs itself.
    Own,
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "the program of the upgrade",
            Self::Named => "the usual program",
            Self::Own => "the program that the keepers run",
        })
    }
}

/// What was tried, and what is to be tried next.
#[derive(Debug)]
pub(super) struct Choice {
    own: Option<OwnedFd>,
    /// What was started last, if it has not served yet.
    started: Option<Candidate>,
    prefers_own: bool,
}

impl Choice {
    /// To be called before this process is confined.
    pub(super) fn new() -> Self {
        // Without it there is one candidate less.
        let own = File::open("/proc/self/exe").ok().map(OwnedFd::from);
        Self { own, started: None, prefers_own: false }
    }

    /// What to start now, where an upgrade asks for `given`. Without a descriptor it is the one that was named.
    pub(super) fn next<'a>(&'a self, given: Option<BorrowedFd<'a>>) -> (Candidate, Option<BorrowedFd<'a>>) {
        let own = self.own.as_ref().map(AsFd::as_fd).filter(|_| self.prefers_own);
        match (given, own) {
            (Some(given), _) => (Candidate::Given, Some(given)),
            (None, Some(own)) => (Candidate::Own, Some(own)),
            (None, None) => (Candidate::Named, None),
        }
    }

    /// This one was started.
    pub(super) fn note_start(&mut self, candidate: Candidate) {
        self.started = Some(candidate);
    }

    /// What was started has served for a while, so that it did not die of its start.
    pub(super) fn note_service(&mut self) {
        self.started = None;
    }

    /// What was started has ended. Gives it if it never served.
    pub(super) fn note_end(&mut self) -> Option<Candidate> {
        self.started.take()
    }

    /// This one cannot go on. One that was given is not to be given again.
    pub(super) fn note_failure(&mut self, candidate: Candidate) {
        match candidate {
            Candidate::Given => {}
            Candidate::Named => self.prefers_own = true,
            Candidate::Own => self.prefers_own = false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dies_of_its_start_makes_way_for_what_ran_before() {
        let mut choice = Choice::new();
        let given = File::open("/dev/null").unwrap();
        let mut next = |given: Option<&File>, serves: bool| {
            let (candidate, program) = choice.next(given.map(AsFd::as_fd));
            assert_eq!(program.is_none(), candidate == Candidate::Named);
            choice.note_start(candidate);
            if serves {
                choice.note_service();
            }
            if let Some(failed) = choice.note_end() {
                choice.note_failure(failed);
            }
            candidate
        };

        assert_eq!(next(None, true), Candidate::Named);
        assert_eq!(next(Some(&given), false), Candidate::Given);
        for _ in 0..2 {
            assert_eq!(next(None, false), Candidate::Named);
            assert_eq!(next(None, false), Candidate::Own);
        }
        assert_eq!(next(None, false), Candidate::Named);
        assert_eq!(next(None, true), Candidate::Own);
        assert_eq!(next(None, true), Candidate::Own, "what has served is what is started again");
        assert_eq!(next(Some(&given), true), Candidate::Given);
    }
}
