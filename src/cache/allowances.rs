//! What one image may have of the readers' share of the line, so that one that reads a lot leaves something to others.
//!
//! A read is charged to the image through whose mount it came, where the backend knows that; several who wait for
//! the same bytes may be of several images. Where nobody knows, and for what is fetched ahead, any of the images may
//! pay that have the blob open at that moment ([`Users`]). Of all who may, the one pays that has most left: a reader
//! never waits for what another image has used up.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::engine::StoreOptions;
use super::users::ImageKey;
use crate::base::{ByteRate, Paid};

/// How much an image that has paused may fetch at once: the first reads of a program must not be slowed down.
const BURST: Duration = Duration::from_millis(250);

/// Limits of each image, and what it has used of them.
#[derive(Debug)]
pub(super) struct Allowances {
    /// Reads for its readers that run at once; 0 for as many as there may be.
    fetches: usize,
    /// Stored bytes per second for its readers.
    rate: Option<ByteRate>,
    /// What was fetched for an image.
    paid: HashMap<ImageKey, Paid>,
}

/// Why an image must wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For one of its reads to end.
    ForItself,
    /// For this moment.
    Until(Instant),
}

impl Wait {
    /// The setting that has it wait.
    pub(super) fn limit(self) -> &'static str {
        match self {
            Self::ForItself => "image_fetches",
            Self::Until(_) => "image_rate",
        }
    }

    /// Whichever is over first, as far as is known.
    fn sooner(self, other: Self) -> Self {
        match (self, other) {
            (Self::Until(one), Self::Until(other)) => Self::Until(one.min(other)),
            (Self::ForItself, other) => other,
            (one, Self::ForItself) => one,
        }
    }
}

impl Allowances {
    pub(super) fn new(options: &StoreOptions) -> Self {
        let rate = options.image_rate.map(|rate| ByteRate::new(rate).with_burst(BURST));
        Self { fetches: options.image_fetches, rate, paid: HashMap::new() }
    }

    /// Whether there is no limit at all.
    pub(super) fn are_endless(&self) -> bool {
        self.fetches == 0 && self.rate.is_none()
    }

    /// Which of `images` pays for another read for their readers, if one may begin: the one that has most left. So many
    /// reads are `running` of an image. Where there are no images, nobody pays.
    ///
    /// # Errors
    /// All of them must wait.
    pub(super) fn payer(
        &self,
        images: &[ImageKey],
        running: impl Fn(ImageKey) -> usize,
        now: Instant,
    ) -> Result<Option<ImageKey>, Wait> {
        let mut wait: Option<Wait> = None;
        let mut best = None;
        for &image in images {
            let (runs, paid) = (running(image), self.paid.get(&image));
            let must = match paid.and_then(|paid| paid.owes(now)) {
                _ if self.fetches > 0 && runs >= self.fetches => Some(Wait::ForItself),
                owes => owes.map(Wait::Until),
            };
            match must {
                Some(must) => wait = Some(wait.map_or(must, |known| known.sooner(must))),
                None => {
                    // Since when nothing is owed: the longer ago, the more is left.
                    let left = (paid.and_then(Paid::until), runs);
                    if best.is_none_or(|(known, _)| left < known) {
                        best = Some((left, image));
                    }
                }
            }
        }
        match (best, wait) {
            (Some((_, image)), _) => Ok(Some(image)),
            (None, Some(wait)) => Err(wait),
            (None, None) => Ok(None),
        }
    }

    /// A read of so many stored bytes for readers of `image` begins.
    pub(super) fn charge(&mut self, image: ImageKey, bytes: u64, now: Instant) {
        let Some(rate) = self.rate else { return };
        // Whoever has nothing to pay for any more needs no memory.
        self.paid.retain(|_, paid| !paid.is_forgotten(rate, now));
        self.paid.entry(image).or_default().charge(rate, bytes, now);
    }

    /// A read that was charged to `image` did not begin after all.
    pub(super) fn refund(&mut self, image: ImageKey, bytes: u64) {
        if let (Some(rate), Some(paid)) = (self.rate, self.paid.get_mut(&image)) {
            paid.refund(rate, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: ImageKey = ImageKey(1);
    const OTHER: ImageKey = ImageKey(2);

    fn allowances(fetches: usize, rate: Option<u64>) -> Allowances {
        Allowances::new(&StoreOptions { image_fetches: fetches, image_rate: rate, ..StoreOptions::default() })
    }

    /// A moment with a past.
    fn start() -> Instant {
        Instant::now() + Duration::from_secs(9)
    }

    #[test]
    fn an_image_waits_for_its_own_reads_only() {
        let (now, allowances) = (Instant::now(), allowances(2, None));
        assert_eq!(allowances.payer(&[ONE], |_| 1, now), Ok(Some(ONE)));
        assert_eq!(allowances.payer(&[ONE], |_| 2, now), Err(Wait::ForItself));
        assert_eq!(allowances.payer(&[], |_| 2, now), Ok(None), "nobody is there to be limited");
    }

    #[test]
    fn bytes_come_at_the_rate_of_their_image_after_one_burst() {
        let (start, mut allowances) = (start(), allowances(0, Some(1000)));
        allowances.charge(ONE, 250, start);
        assert_eq!(allowances.payer(&[ONE], |_| 99, start), Ok(Some(ONE)), "a burst");

        allowances.charge(ONE, 1000, start);

        let later = start + Duration::from_secs(1);
        assert_eq!(allowances.payer(&[ONE], |_| 0, start), Err(Wait::Until(later)));
        assert_eq!(allowances.payer(&[OTHER], |_| 0, start), Ok(Some(OTHER)));
        assert_eq!(allowances.payer(&[ONE], |_| 0, later), Ok(Some(ONE)));
        allowances.refund(ONE, 1000);
        allowances.refund(OTHER, 1000);
        assert_eq!(allowances.payer(&[ONE], |_| 0, start), Ok(Some(ONE)), "as if it had not begun");
        allowances.charge(OTHER, 1, later + BURST);
        assert_eq!(allowances.paid.len(), 1, "who has paid is forgotten");
    }

    #[test]
    fn of_several_images_the_one_pays_that_has_most_left() {
        let (start, mut allowances) = (start(), allowances(2, Some(1000)));
        let both = [ONE, OTHER];
        allowances.charge(ONE, 100, start);
        assert_eq!(allowances.payer(&both, |_| 0, start), Ok(Some(OTHER)), "it has used nothing");
        allowances.charge(OTHER, 200, start);
        assert_eq!(allowances.payer(&both, |_| 0, start), Ok(Some(ONE)));
        let busy = |image| if image == ONE { 2 } else { 0 };
        assert_eq!(allowances.payer(&both, busy, start), Ok(Some(OTHER)));

        allowances.charge(ONE, 650, start);
        allowances.charge(OTHER, 850, start);

        let sooner = Wait::Until(start + Duration::from_millis(500));
        assert_eq!(allowances.payer(&both, |_| 0, start), Err(sooner));
        let later = Wait::Until(start + Duration::from_millis(800));
        assert_eq!(allowances.payer(&both, busy, start), Err(later), "the other one waits for itself");
        assert_eq!(allowances.payer(&both, |_| 2, start), Err(Wait::ForItself));
        assert_eq!((later.limit(), Wait::ForItself.limit()), ("image_rate", "image_fetches"));
    }
}
