//! When prefetch of whole files and blobs may begin another read.
//!
//! It runs behind everybody who waits: never while a read for a reader is queued or under way, and
//! not until readers have been quiet for a moment, because one that walks asks again as soon as it
//! has its answer. What a list names runs beside readers who follow the same list ([`super::guides`]). All of it may
//! be held to a rate. Pure: times are passed in.

use std::time::{Duration, Instant};

use super::guides::ListId;
use crate::base::{ByteRate, Paid};

/// A read that has gone on for this long is in trouble rather than in a hurry: its server does not
/// answer, and it no longer holds up what comes from others.
pub(super) const STUCK: Duration = Duration::from_secs(5);

/// The rule, and what it has to remember.
#[derive(Debug)]
pub(super) struct Admission {
    /// How long readers must have been quiet.
    calm: Duration,
    /// Stored bytes per second; `None` for as many as come.
    rate: Option<ByteRate>,
    /// When a reader was last seen to wait, and which list it follows.
    latest: Option<(Instant, Option<ListId>)>,
    /// When one was that did not follow that one.
    other: Option<Instant>,
    /// What was admitted so far, at `rate`: one read may be owed. What was not used earlier is not saved up.
    paid: Paid,
}

impl Admission {
    pub(super) fn new(calm: Duration, rate: Option<u64>) -> Self {
        Self { calm, rate: rate.map(ByteRate::new), latest: None, other: None, paid: Paid::default() }
    }

    /// A reader waits, or has just stopped waiting, who follows a list or does not.
    pub(super) fn disturb(&mut self, now: Instant, follows: Option<ListId>) {
        match self.latest {
            Some((at, list)) if list == follows => self.latest = Some((at.max(now), list)),
            // All before the latest one are older.
            latest => {
                self.other = latest.map(|(at, _)| at).max(self.other);
                self.latest = Some((now.max(latest.map_or(now, |(at, _)| at)), follows));
            }
        }
    }

    /// Admits a read of `bytes` of what is on a list or on none, or says when to ask again. Not to be called while readers
    /// wait whom it would disturb.
    pub(super) fn admit(&mut self, bytes: u64, list: Option<ListId>, now: Instant) -> Result<(), Instant> {
        let disturbed = match self.latest {
            Some((_, latest)) if list.is_some() && latest == list => self.other,
            latest => latest.map(|(at, _)| at),
        };
        let calm = disturbed.map(|disturbed| disturbed + self.calm);
        if let Some(later) = calm.filter(|&later| later > now).max(self.paid.owes(now)) {
            return Err(later);
        }
        if let Some(rate) = self.rate {
            self.paid.charge(rate, bytes, now);
        }
        Ok(())
    }

    /// Takes back that `bytes` of what was admitted would come.
    pub(super) fn refund(&mut self, bytes: u64) {
        if let Some(rate) = self.rate {
            self.paid.refund(rate, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn nothing_begins_until_readers_have_been_quiet() {
        let (start, mut admission) = (Instant::now(), Admission::new(20 * MS, None));
        assert_eq!(admission.admit(1 << 20, None, start), Ok(()), "nobody was ever there");

        admission.disturb(start + 5 * MS, None);
        admission.disturb(start + 3 * MS, None);

        assert_eq!(admission.admit(1, None, start + 6 * MS), Err(start + 25 * MS));
        admission.disturb(start + 24 * MS, None);
        assert_eq!(admission.admit(1, None, start + 25 * MS), Err(start + 44 * MS), "another one came");
        assert_eq!(admission.admit(1, None, start + 44 * MS), Ok(()));
        assert_eq!(admission.admit(1, None, start + 44 * MS), Ok(()), "no rate, no limit");
    }

    #[test]
    fn who_follows_a_list_holds_up_only_what_is_not_on_it() {
        let (start, mut admission) = (Instant::now(), Admission::new(20 * MS, None));
        let (own, foreign) = (Some(ListId::next()), Some(ListId::next()));

        admission.disturb(start, own);
        assert_eq!(admission.admit(1, own, start), Ok(()));
        assert_eq!(admission.admit(1, foreign, start), Err(start + 20 * MS));
        assert_eq!(admission.admit(1, None, start), Err(start + 20 * MS));

        admission.disturb(start + 5 * MS, foreign);
        admission.disturb(start + 9 * MS, own);
        assert_eq!(admission.admit(1, own, start + 10 * MS), Err(start + 25 * MS));
        assert_eq!(admission.admit(1, foreign, start + 10 * MS), Err(start + 29 * MS));
        admission.disturb(start + 30 * MS, None);
        admission.disturb(start + 31 * MS, None);
        assert_eq!(admission.admit(1, own, start + 32 * MS), Err(start + 51 * MS));
        assert_eq!(admission.admit(1, None, start + 32 * MS), Err(start + 51 * MS));
    }

    #[test]
    fn the_rate_is_kept_whatever_the_size_of_reads() {
        let (start, mut admission) = (Instant::now(), Admission::new(20 * MS, Some(1000)));
        let (mut now, mut admitted) = (start, 0);
        for bytes in [500, 1, 2000, 250, 250].into_iter().cycle().take(500) {
            while let Err(later) = admission.admit(bytes, None, now) {
                assert!(later > now, "asking again at the same moment would never end");
                now = later;
            }
            admitted += bytes;
        }
        let took = now.duration_since(start).as_secs_f64();
        let owed = 2000.0;
        assert!((admitted as f64 - owed..=admitted as f64).contains(&(took * 1000.0)), "{admitted} bytes in {took} s");
    }

    #[test]
    fn an_idle_link_saves_up_nothing_and_what_did_not_come_is_not_paid_for() {
        let (start, mut admission) = (Instant::now(), Admission::new(20 * MS, Some(1000)));
        assert_eq!(admission.admit(1000, None, start), Ok(()));

        let later = start + 9000 * MS;
        assert_eq!(admission.admit(1000, None, later), Ok(()));
        assert_eq!(admission.admit(1000, None, later), Err(later + 1000 * MS));
        admission.refund(750);
        assert_eq!(admission.admit(1000, None, later), Err(later + 250 * MS));
    }

    #[test]
    fn a_rate_of_nothing_and_reads_of_everything_do_not_overflow() {
        let (start, mut admission) = (Instant::now(), Admission::new(20 * MS, Some(0)));
        assert_eq!(admission.admit(u64::MAX, None, start), Ok(()));
        assert!(admission.admit(u64::MAX, None, start).is_err());
        admission.refund(u64::MAX);
    }
}
