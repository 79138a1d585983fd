//! So many bytes a second: what they take, and until when those that have come are paid for.
//!
//! Arithmetic on times that are passed in. Whoever has to wait, waits elsewhere.

use std::time::{Duration, Instant};

/// More than a day of debt is a day: times can be added then, whatever sizes are told.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// So many bytes a second, and how much of it may be saved up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteRate {
    per_second: u64,
    burst: Duration,
}

impl ByteRate {
    /// So many bytes a second, of which nothing is saved up; 0 means the same as 1.
    pub fn new(per_second: u64) -> Self {
        Self { per_second: per_second.max(1), burst: Duration::ZERO }
    }

    /// The same rate, where a pause is made up for by what `burst` brings.
    #[must_use]
    pub fn with_burst(self, burst: Duration) -> Self {
        Self { burst, ..self }
    }

    /// How long `bytes` take; a day at most.
    pub fn takes(self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.per_second);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(LONGEST)
    }

    /// What was paid for until then is as good as never taken.
    fn earliest(self, now: Instant) -> Instant {
        now.checked_sub(self.burst).unwrap_or(now)
    }
}

/// Until when the bytes that were taken at a rate are paid for. The default has taken none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Paid(Option<Instant>);

impl Paid {
    /// Takes `bytes`, and gives the moment at which they are paid for, which may be over.
    pub fn charge(&mut self, rate: ByteRate, bytes: u64, now: Instant) -> Instant {
        let earliest = rate.earliest(now);
        let paid = self.0.map_or(earliest, |paid| paid.max(earliest)) + rate.takes(bytes);
        self.0 = Some(paid);
        paid
    }

    /// Gives `bytes` back that were taken and did not come.
    pub fn refund(&mut self, rate: ByteRate, bytes: u64) {
        self.0 = self.0.and_then(|paid| paid.checked_sub(rate.takes(bytes)));
    }

    /// The moment at which all is paid for, if it is not by `now`.
    pub fn owes(&self, now: Instant) -> Option<Instant> {
        self.0.filter(|paid| *paid > now)
    }

    /// The moment at which all is paid for, over or not; `None` if nothing was ever taken.
    pub fn until(&self) -> Option<Instant> {
        self.0
    }

    /// Whether it is at `now` as if nothing had ever been taken.
    pub fn is_forgotten(&self, rate: ByteRate, now: Instant) -> bool {
        self.owes(rate.earliest(now)).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A moment with a past.
    fn start() -> Instant {
        Instant::now() + LONGEST
    }

    #[test]
    fn bytes_are_paid_for_one_after_the_other() {
        let (rate, now, mut paid) = (ByteRate::new(1000), start(), Paid::default());
        assert_eq!(paid.owes(now), None);

        assert_eq!(paid.charge(rate, 500, now), now + 500 * MS);
        assert_eq!(paid.charge(rate, 500, now + 100 * MS), now + 1000 * MS);

        assert_eq!(paid.owes(now + 999 * MS), Some(now + 1000 * MS));
        assert_eq!(paid.owes(now + 1000 * MS), None);
    }

    #[test]
    fn no_more_than_a_burst_is_saved_up() {
        for (burst, due) in [(Duration::ZERO, 1000), (250 * MS, 750)] {
            let (rate, now) = (ByteRate::new(1000).with_burst(burst), start());
            let (mut fresh, mut idle) = (Paid::default(), Paid::default());
            idle.charge(rate, 1, now - 10_000 * MS);
            assert!(idle.is_forgotten(rate, now));

            assert_eq!(fresh.charge(rate, 1000, now), now + due * MS);
            assert_eq!(idle.charge(rate, 1000, now), now + due * MS);

            assert!(!idle.is_forgotten(rate, now + due * MS + burst - MS));
            assert!(idle.is_forgotten(rate, now + due * MS + burst));
        }
    }

    #[test]
    fn what_is_given_back_is_not_owed() {
        let (rate, now, mut paid) = (ByteRate::new(1000), start(), Paid::default());
        paid.charge(rate, 1000, now);
        paid.refund(rate, 750);
        assert_eq!(paid.owes(now), Some(now + 250 * MS));
        paid.refund(rate, u64::MAX);
        assert_eq!(paid.owes(now), None);
    }

    #[test]
    fn a_rate_of_nothing_and_sizes_without_end_do_not_overflow() {
        let (rate, now, mut paid) = (ByteRate::new(0).with_burst(Duration::MAX), Instant::now(), Paid::default());
        assert_eq!(rate.takes(2), Duration::from_secs(2));
        assert_eq!(ByteRate::new(u64::MAX).takes(u64::MAX), Duration::from_secs(1));

        assert_eq!(paid.charge(rate, u64::MAX, now), now + LONGEST);
        assert_eq!(paid.charge(rate, u64::MAX, now), now + 2 * LONGEST);
    }

    #[test]
    fn the_rate_holds_whatever_the_pieces_are() {
        let (rate, now) = (ByteRate::new(3000), start());
        for piece in [1, 7, 1000, 299_999] {
            let (mut paid, mut bytes) = (Paid::default(), 0);
            while bytes < 600_000 {
                paid.charge(rate, piece, now);
                bytes += piece;
            }
            // A piece is rounded down to a nanosecond.
            let exact = bytes as f64 / 3000.0;
            let took = paid.owes(now).expect("it owes").duration_since(now).as_secs_f64();
            assert!((took - exact).abs() < 0.001, "{piece}: {took} s for {bytes} bytes");
        }
    }
}
