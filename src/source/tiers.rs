//! One source out of several places, asked in order.
//!
//! A read asks the first place that is in good standing, and the next at once if that one fails, whatever
//! the fault: a wrong answer of a mirror is no reason not to ask the registry. When all have failed and some
//! may do better later, the read pauses as the policy says and asks those again, until its deadline. A place
//! that failed repeatedly goes behind the others until a probe, for which no reader waits, finds it back.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::select;

use super::counted::outcome_of;
use super::hedges::HedgeBudget;
use super::http::FIRST_BYTE;
use super::patience::{Patience, Round};
use super::relay::Relay;
use super::trail::Trail;
use super::{BlobSource, BoxFuture, Failure, ReadCtx, SourceError, Upstream, Verdict};
use crate::base::{BlobId, ByteRange, Chain, Class};
use crate::net::{Clock, Health, RetryPolicy, Standing};
use crate::telemetry::{Outcome, Place};

/// Memory taken for a body before its first byte has come. Larger bodies grow into theirs.
const FIRST_BUFFER: u64 = 4 << 20;

/// Who brings so much, or a quarter of what is missing, did not fail for nothing. With less, a server that breaks off again and
/// again would be asked without end.
const MUCH: u64 = 256 << 10;

/// A second request is not worth it before this time.
const SOONEST_HEDGE: Duration = Duration::from_millis(20);

/// A place brings next to nothing if it is slower than this, in bytes a second, for [`WATCHED`].
const TRICKLE: u64 = 16 << 10;

/// How long a place is watched before another one is asked because it trickles.
const WATCHED: Duration = Duration::from_secs(3);

/// How long a place is asked last that trickled while another one was quick.
const BARRED: Duration = Duration::from_secs(60);

/// How long a place is asked last that brought wrong bytes where another one brought right ones.
const DISTRUSTED: Duration = Duration::from_secs(300);

/// How long a probe may take.
const PROBE: Duration = Duration::from_secs(10);

/// One place in the order.
#[derive(Clone)]
pub struct Tier {
    /// Whom to ask.
    pub upstream: Arc<dyn Upstream>,
    /// How it has been doing; shared with everybody who asks the same server.
    pub health: Arc<Health>,
    /// Where attempts are counted, if they are to be told apart from the reads of the whole source.
    pub counts: Option<Arc<Place>>,
}

impl std::fmt::Debug for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tier").field("place", &self.upstream.describe()).finish_non_exhaustive()
    }
}

impl Tier {
    /// A place nobody else asks.
    pub fn new(upstream: impl Upstream) -> Self {
        Self { upstream: Arc::new(upstream), health: Arc::default(), counts: None }
    }
}

/// Blobs that are in all of several places, the best first. Needs a tokio runtime.
pub struct Tiers {
    pub(super) tiers: Vec<Tier>,
    pub(super) policy: RetryPolicy,
    pub(super) clock: Clock,
    pub(super) counts: Arc<Place>,
    hedges: HedgeBudget,
    trail: Trail,
}

impl Tiers {
    /// A source out of `tiers`, of which there is at least one, asked again as `policy` says.
    pub fn new(tiers: Vec<Tier>, policy: RetryPolicy, clock: Clock) -> Self {
        assert!(!tiers.is_empty(), "a source is at least one place");
        Self { tiers, policy, clock, counts: Arc::default(), hedges: HedgeBudget::new(), trail: Trail::default() }
    }

    /// The same source, with its retries counted there.
    #[must_use]
    pub fn counting(self, counts: Arc<Place>) -> Self {
        Self { counts, ..self }
    }

    /// The order in which to ask now: those in good standing first. Starts a probe where one is due.
    fn order(&self, blob: &BlobId, ctx: ReadCtx) -> Vec<usize> {
        let now = self.clock.now();
        let mut order = Vec::with_capacity(self.tiers.len());
        let mut bad = Vec::new();
        for (at, tier) in self.tiers.iter().enumerate() {
            if tier.upstream.rests().is_some() {
                // Not to be asked now, and not to be probed.
                bad.push(at);
                continue;
            }
            match tier.health.standing(now) {
                Standing::Good => order.push(at),
                Standing::Bad => bad.push(at),
                // Where nobody else can be asked, every read is a probe.
                Standing::Probe if self.tiers.len() == 1 => {
                    tier.health.probed();
                    bad.push(at);
                }
                Standing::Probe => {
                    self.probe(tier, blob, ctx);
                    bad.push(at);
                }
            }
        }
        order.append(&mut bad);
        order
    }

    /// The same for `rest`, without those that will not do better during this read, have asked for a pause, or brought
    /// wrong bytes of it, unless all of them did.
    fn hopeful(&self, patience: &Patience<'_>, blob: &BlobId, rest: ByteRange, ctx: ReadCtx) -> Vec<(usize, &Tier)> {
        let now = self.clock.now();
        let mut distrusted = self.trail.distrusted(blob, rest);
        if distrusted.len() >= self.tiers.len() {
            distrusted.clear();
        }
        let order = self.order(blob, ctx).into_iter().filter(|at| !distrusted.contains(at));
        let hopeful = order.filter(|at| patience.wait(*at, now).is_zero());
        hopeful.filter_map(|at| Some((at, self.tiers.get(at)?))).collect()
    }

    /// Finds out, beside the read, whether a place is back.
    fn probe(&self, tier: &Tier, blob: &BlobId, ctx: ReadCtx) {
        let (tier, blob, clock) = (tier.clone(), blob.clone(), self.clock.clone());
        tokio::spawn(async move {
            let deadline = clock.now() + PROBE;
            let asked = tier.upstream.len(&blob, ReadCtx { deadline, class: Class::Prefetch, ..ctx });
            match clock.timeout_at(deadline, asked).await {
                Ok(Ok(_)) => tier.health.worked(),
                // It works and has not this one.
                Ok(Err(failure)) if !blames_the_place(&failure.error) => tier.health.worked(),
                _ => tier.health.failed(clock.now()),
            }
            tier.health.probed();
        });
    }

    /// One attempt at one place, noted for its standing.
    async fn attempt(
        &self,
        tier: &Tier,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let (begun, mut came) = (self.clock.now(), 0);
        let mut first = |piece: Bytes| {
            if came == 0 {
                tier.health.took(self.clock.now().saturating_duration_since(begun));
            }
            came += piece.len() as u64;
            if let Some(counts) = &tier.counts {
                counts.bytes.at(ctx.class).add(piece.len() as u64);
            }
            take(piece);
        };
        let asked = self.clock.timeout_at(ctx.deadline, tier.upstream.pour(blob, stored, ctx, &mut first)).await;
        let late = || SourceError::Deadline { blob: blob.clone(), place: tier.upstream.describe(), range: stored };
        let asked = asked.unwrap_or_else(|_| Err(late().into()));
        let took = self.clock.now().saturating_duration_since(begun);
        self.note(tier, ctx, asked.as_ref().map(|_| ()).map_err(|failure| &failure.error), is_slow(came, took));
        asked
    }

    /// Notes how an attempt went. Who had no time, or used it well, is not to blame that it was over.
    fn note(&self, tier: &Tier, ctx: ReadCtx, asked: Result<(), &SourceError>, was_slow: bool) {
        let blames_the_place = |error: &SourceError| {
            blames_the_place(error) && (was_slow || !matches!(error, SourceError::Deadline { .. }))
        };
        match asked {
            Ok(()) => tier.health.worked(),
            Err(error) if blames_the_place(error) => tier.health.failed(self.clock.now()),
            Err(_) => {}
        }
        let Some(counts) = &tier.counts else { return };
        match asked {
            Ok(()) => {
                counts.worked();
                counts.reads.at(ctx.class).at(Outcome::Ok).inc();
            }
            Err(error) => {
                // A directory in front of a registry has not everything, and is well.
                if blames_the_place(error) {
                    counts.failed(Chain(error).to_string());
                }
                counts.reads.at(ctx.class).at(outcome_of(error)).inc();
            }
        }
    }

    /// Hands on all of `stored`: each attempt goes on where the one before broke off, and what brought
    /// a good part of it starts the count of failures anew.
    async fn pour(
        &self,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), SourceError> {
        let relay = Relay::new(stored, take);
        let mut patience = self.patience(blob, stored, ctx);
        while !relay.rest().is_empty() {
            let from = relay.rest();
            let mut round = Round::default();
            let mut tiers = self.hopeful(&patience, blob, from, ctx).into_iter();
            while let Some((at, tier)) = tiers.next() {
                let left = ctx.deadline.saturating_duration_since(self.clock.now());
                if left.is_zero() {
                    // Whoever is asked now cannot answer.
                    let late = || SourceError::Deadline { blob: blob.clone(), place: self.describe(), range: stored };
                    return Err(round.failure.unwrap_or_else(late));
                }
                let second = tiers.as_slice().first();
                // Who is slow must leave time to others.
                let deadline = if second.is_some() { ctx.deadline - left / 2 } else { ctx.deadline };
                match self.hedged((at, tier), second, blob, ReadCtx { deadline, ..ctx }, &relay).await {
                    Ok(()) => return Ok(()),
                    // It failed behind the last byte: nobody is asked for nothing.
                    Err(_) if relay.rest().is_empty() => return Ok(()),
                    Err(failure) => round.failed(&mut patience, at, failure),
                }
            }
            if relay.rest().start() - from.start() >= (from.len() / 4).clamp(1, MUCH) {
                patience.renew();
            }
            patience.pause(round).await?;
        }
        Ok(())
    }

    /// One attempt at the first, and another one beside it at the second, if there is one and the first takes longer
    /// to begin than is usual, or brings next to nothing. Both bring bytes; the first that has brought the last one counts.
    async fn hedged(
        &self,
        first: (usize, &Tier),
        second: Option<&(usize, &Tier)>,
        blob: &BlobId,
        ctx: ReadCtx,
        relay: &Relay<'_>,
    ) -> Result<(), Failure> {
        self.hedges.earn();
        let mut one = std::pin::pin!(self.to_the_end(first, blob, ctx, relay));
        let Some(&second) = second else { return one.await };
        let trickles = select! {
            biased;
            done = &mut one => return done,
            trickles = self.slowness(first.1, ctx, relay) => trickles,
        };
        self.counts.hedges.inc();
        let mut other = std::pin::pin!(self.to_the_end(second, blob, ctx, relay));
        select! {
            done = &mut one => match done {
                Err(failure) => other.await.map_err(|_| failure),
                done => done,
            },
            done = &mut other => match done {
                Err(_) => one.await,
                Ok(()) => {
                    if trickles {
                        first.1.health.bar(self.clock.now(), BARRED);
                    }
                    Ok(())
                }
            },
        }
    }

    /// Ends when a read that has just begun is so slow that another place is worth asking as well. Tells whether it is
    /// worse than late: readers who wait for one that trickles would wait for ever.
    async fn slowness(&self, tier: &Tier, ctx: ReadCtx, relay: &Relay<'_>) -> bool {
        let mut before = relay.rest().len();
        if let Some(usual) = tier.health.usual().filter(|_| ctx.class == Class::OnDemand) {
            self.clock.sleep(usual.max(SOONEST_HEDGE)).await;
            if relay.rest().len() == before && self.hedges.spend() {
                return false;
            }
        }
        if tier.upstream.is_limited() {
            // It may be we who are slow.
            return std::future::pending().await;
        }
        loop {
            self.clock.sleep(WATCHED).await;
            let rest = relay.rest().len();
            if is_slow(before.saturating_sub(rest), WATCHED) {
                return true;
            }
            before = rest;
        }
    }

    /// One attempt to have a place bring all that `relay` lacks.
    async fn to_the_end(
        &self,
        (number, tier): (usize, &Tier),
        blob: &BlobId,
        ctx: ReadCtx,
        relay: &Relay<'_>,
    ) -> Result<(), Failure> {
        let rest = relay.rest();
        let mut at = rest.start();
        let mut brought = |new| {
            // Of one place there is nothing to find out.
            if self.tiers.len() > 1 {
                self.trail.brought(number, blob, new);
            }
        };
        let mut gather = |piece: Bytes| at = relay.hand_on(at, piece, &mut brought);
        self.attempt(tier, blob, rest, ctx, &mut gather).await?;
        if at == rest.end() {
            return Ok(());
        }
        let detail = format!("it sent {} of {} bytes", at.saturating_sub(rest.start()), rest.len());
        Err(SourceError::Unavailable { blob: blob.clone(), place: tier.upstream.describe(), detail }.into())
    }

    async fn measure(&self, blob: &BlobId, ctx: ReadCtx) -> Result<u64, SourceError> {
        let mut patience = self.patience(blob, FIRST_BYTE, ctx);
        loop {
            let mut round = Round::default();
            for (at, tier) in self.hopeful(&patience, blob, FIRST_BYTE, ctx) {
                let asked = tier.upstream.len(blob, ctx).await;
                if let Err(failure) = &asked
                    && blames_the_place(&failure.error)
                {
                    tier.health.failed(self.clock.now());
                }
                match asked {
                    Ok(len) => return Ok(len),
                    Err(failure) => round.failed(&mut patience, at, failure),
                }
            }
            patience.pause(round).await?;
        }
    }

    async fn in_time<T>(
        &self,
        blob: &BlobId,
        range: ByteRange,
        ctx: ReadCtx,
        attempts: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<T, SourceError> {
        let ended = self.clock.timeout_at(ctx.deadline, attempts).await;
        ended.unwrap_or_else(|_| Err(SourceError::Deadline { blob: blob.clone(), place: self.describe(), range }))
    }

    fn patience<'a>(&'a self, blob: &'a BlobId, range: ByteRange, ctx: ReadCtx) -> Patience<'a> {
        Patience::new(self, blob, range, ctx)
    }
}

impl BlobSource for Tiers {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(self.in_time(blob, FIRST_BYTE, ctx, self.measure(blob, ctx)))
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            if stored.is_empty() {
                // No range header can say this, and there is nothing to fetch.
                return Ok(Bytes::new());
            }
            let mut body = BytesMut::with_capacity(usize::try_from(stored.len().min(FIRST_BUFFER)).unwrap_or(0));
            self.stream(blob, stored, ctx, &mut |piece| body.extend_from_slice(&piece)).await?;
            Ok(body.freeze())
        })
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.in_time(blob, stored, ctx, self.pour(blob, stored, ctx, take)))
    }

    fn judged(&self, blob: &BlobId, stored: ByteRange, verdict: Verdict) {
        if verdict == Verdict::Wrong {
            return self.trail.was_wrong(blob, stored);
        }
        for tier in self.trail.was_right(blob, stored).into_iter().filter_map(|at| self.tiers.get(at)) {
            tier.health.bar(self.clock.now(), DISTRUSTED);
            let text = format!("{} sent wrong bytes of blob {blob} at {stored}", tier.upstream.describe());
            tracing::warn!(error = %text, "a place is asked last for a while");
            if let Some(counts) = &tier.counts {
                counts.wrong.inc();
                counts.failed(text);
            }
        }
    }

    fn places(&self) -> usize {
        self.tiers.len()
    }

    fn describe(&self) -> String {
        let mut names: Vec<_> = self.tiers.iter().map(|tier| tier.upstream.describe()).collect();
        names.dedup();
        names.join(", ")
    }
}

impl std::fmt::Debug for Tiers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tiers").field("places", &self.describe()).field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// Whether a failure speaks against the place rather than against what was asked of it.
fn blames_the_place(error: &SourceError) -> bool {
    match error {
        SourceError::Unavailable { .. }
        | SourceError::Deadline { .. }
        | SourceError::NoRanges { .. }
        | SourceError::Untrusted { .. }
        | SourceError::Unauthorized { .. }
        | SourceError::Io { .. } => true,
        SourceError::NotFound { .. } | SourceError::Refused { .. } | SourceError::OutOfRange { .. } => false,
    }
}

/// Whether so many bytes in so long a time are next to nothing. A moment is too short to tell.
fn is_slow(came: u64, took: Duration) -> bool {
    took >= Duration::from_secs(1) && came < TRICKLE.saturating_mul(took.as_secs())
}

#[cfg(test)]
mod tests;
