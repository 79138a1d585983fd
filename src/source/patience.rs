//! How often the places of a read are asked, and when again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use super::tiers::Tiers;
use super::{BlobSource, Failure, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange, Fault};
use crate::net::Attempt;

/// What all places said, each asked once.
#[derive(Default)]
pub(super) struct Round {
    /// The last failure that may go away, else the last of all: the places that come last are those that
    /// know best.
    pub(super) failure: Option<SourceError>,
}

impl Round {
    /// The place at `at` failed.
    pub(super) fn failed(&mut self, patience: &mut Patience<'_>, at: usize, failure: Failure) {
        let is_transient = failure.error.fault() == Fault::Transient;
        let now = patience.source.clock.now();
        match failure.retry_after {
            _ if !is_transient => patience.absent.push((at, None)),
            // What is too long to be a moment is for ever.
            Some(pause) => patience.absent.push((at, now.checked_add(pause))),
            None => {}
        }
        let known = self.failure.as_ref().is_some_and(|known| known.fault() == Fault::Transient);
        if is_transient || !known {
            self.failure = Some(failure.error);
        }
    }
}

/// How often has been asked, and how often still may be.
pub(super) struct Patience<'a> {
    source: &'a Tiers,
    blob: &'a BlobId,
    seed: u64,
    /// Failures in a row.
    failed: u32,
    /// Places that are not to be asked before a moment, or not again during this read.
    absent: Vec<(usize, Option<Instant>)>,
    ctx: ReadCtx,
}

impl<'a> Patience<'a> {
    pub(super) fn new(source: &'a Tiers, blob: &'a BlobId, range: ByteRange, ctx: ReadCtx) -> Self {
        Self { source, blob, seed: seed(blob, range), failed: 0, absent: Vec::new(), ctx }
    }

    /// What was tried brought something: counts from the beginning.
    pub(super) fn renew(&mut self) {
        self.failed = 0;
    }

    /// How long the place at `at` is not to be asked; for ever if it will not do better during this read.
    pub(super) fn wait(&self, at: usize, now: Instant) -> Duration {
        let absent = self.absent.iter().filter(|(absent, _)| *absent == at).map(|(_, until)| *until);
        // What another read was told holds for this one too.
        let rests = self.source.tiers.get(at).and_then(|tier| tier.upstream.rests()).map(Some);
        let wait = |until: Option<Instant>| until.map_or(Duration::MAX, |until| until.saturating_duration_since(now));
        absent.chain(rests).map(wait).max().unwrap_or_default()
    }

    /// Waits until it makes sense to ask again.
    ///
    /// # Errors
    /// The failure, if it does not.
    pub(super) async fn pause(&mut self, round: Round) -> Result<(), SourceError> {
        let (clock, deadline, now) = (&self.source.clock, self.ctx.deadline, self.source.clock.now());
        let earliest = (0..self.source.tiers.len()).map(|at| self.wait(at, now)).min();
        let retry_after = earliest.filter(|wait| !wait.is_zero() && *wait < Duration::MAX);
        let Some(error) = round.failure else {
            // Nobody could be asked yet.
            let pause = retry_after.unwrap_or(self.source.policy.first_delay);
            if pause >= deadline.saturating_duration_since(now) {
                let (blob, place) = (self.blob.clone(), self.source.describe());
                let detail = format!("it asked to be left alone for {} s more", pause.as_secs_f32().ceil());
                return Err(SourceError::Unavailable { blob, place, detail });
            }
            clock.sleep(pause).await;
            return Ok(());
        };
        self.failed += 1;
        let attempt = Attempt { failed: self.failed, seed: self.seed, retry_after };
        match self.source.policy.next(attempt, error.fault(), now, deadline) {
            Some(pause) => {
                let (request, failed) = (self.ctx.request.number(), self.failed);
                tracing::debug!(request, %error, failed, ?pause, "asking again");
                self.source.counts.retries.inc();
                clock.sleep(pause).await;
                Ok(())
            }
            None => Err(error),
        }
    }
}

/// Keeps requests that fail together from being repeated together.
fn seed(blob: &BlobId, range: ByteRange) -> u64 {
    let mut hasher = DefaultHasher::new();
    (blob, range).hash(&mut hasher);
    hasher.finish()
}
