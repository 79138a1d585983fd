//! What one image may have of the readers' share of the line, so that one that reads a lot leaves something to others.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::engine::StoreOptions;

/// An image, as far as limits are concerned: a number that its daemon gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKey(pub u64);

/// How much an image that has paused may fetch at once: the first reads of a program must not be slowed down.
const BURST: Duration = Duration::from_millis(250);

/// Limits of each image, and what it has used of them.
#[derive(Debug)]
pub(super) struct Allowances {
    /// Reads for its readers that run at once; 0 for as many as there may be.
    fetches: usize,
    /// Stored bytes per second for its readers.
    rate: Option<u64>,
    /// Until when what was fetched for an image is paid for.
    paid: HashMap<ImageKey, Instant>,
}

/// Why an image must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For one of its reads to end.
    ForItself,
    /// For this moment.
    Until(Instant),
}

impl Allowances {
    pub(super) fn new(options: &StoreOptions) -> Self {
        Self { fetches: options.image_fetches, rate: options.image_rate, paid: HashMap::new() }
    }

    /// Whether another read for readers of `image` may begin, of which so many run.
    pub(super) fn may(&self, image: ImageKey, running: impl FnOnce() -> usize, now: Instant) -> Result<(), Wait> {
        if self.fetches > 0 && running() >= self.fetches {
            return Err(Wait::ForItself);
        }
        match self.paid.get(&image) {
            Some(&paid) if paid > now => Err(Wait::Until(paid)),
            _ => Ok(()),
        }
    }

    /// A read of so many stored bytes for readers of `image` begins.
    pub(super) fn charge(&mut self, image: ImageKey, bytes: u64, now: Instant) {
        let Some(rate) = self.rate else { return };
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        // Whoever has nothing to pay for any more needs no memory.
        self.paid.retain(|_, paid| *paid > earliest);
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)).min(Duration::from_secs(3600));
        let paid = self.paid.entry(image).or_insert(earliest);
        *paid = (*paid).max(earliest) + cost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowances(fetches: usize, rate: Option<u64>) -> Allowances {
        Allowances::new(&StoreOptions { image_fetches: fetches, image_rate: rate, ..StoreOptions::default() })
    }

    #[test]
    fn an_image_waits_for_its_own_reads_only() {
        let (one, now) = (ImageKey(1), Instant::now());
        let allowances = allowances(2, None);
        assert_eq!(allowances.may(one, || 1, now), Ok(()));
        assert_eq!(allowances.may(one, || 2, now), Err(Wait::ForItself));
    }

    #[test]
    fn bytes_come_at_the_rate_of_their_image_after_one_burst() {
        let (one, other, start) = (ImageKey(1), ImageKey(2), Instant::now() + Duration::from_secs(9));
        let mut allowances = allowances(0, Some(1000));
        allowances.charge(one, 250, start);
        assert_eq!(allowances.may(one, || 99, start), Ok(()), "a burst");

        allowances.charge(one, 1000, start);

        let later = start + Duration::from_secs(1);
        assert_eq!(allowances.may(one, || 0, start), Err(Wait::Until(later)));
        assert_eq!(allowances.may(other, || 0, start), Ok(()));
        assert_eq!(allowances.may(one, || 0, later), Ok(()));
        allowances.charge(other, 1, later + BURST);
        assert_eq!(allowances.paid.len(), 1, "who has paid is forgotten");
    }
}
