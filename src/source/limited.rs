use std::sync::Arc;

use bytes::Bytes;

use super::{BlobSource, BoxFuture, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange, Class};
use crate::net::{Clock, Rate, Slots};

/// A source of one image, whose readers may take only so much of it: a noisy container slows itself down and not its
/// neighbours. Prefetch has limits of its own.
pub struct Limited {
    inner: Arc<dyn BlobSource>,
    clock: Clock,
    slots: Option<Slots>,
    rate: Option<Rate>,
}

impl Limited {
    /// `inner` with at most `reads` of readers at once, and `bytes_per_second` for them.
    pub fn new(inner: Arc<dyn BlobSource>, reads: Option<usize>, bytes_per_second: Option<u64>, clock: Clock) -> Self {
        let rate = bytes_per_second.map(|bytes| Rate::new(bytes, clock.clone()));
        Self { inner, slots: reads.map(Slots::new), rate, clock }
    }

    async fn in_turn(&self, blob: &BlobId, stored: ByteRange, ctx: ReadCtx) -> Result<Bytes, SourceError> {
        let turn = async {
            let slot = match &self.slots {
                Some(slots) => Some(slots.take(ctx.class).await),
                None => None,
            };
            if let Some(rate) = &self.rate {
                rate.pay(stored.len(), ctx.class).await;
            }
            slot
        };
        let late = |_| SourceError::Deadline { blob: blob.clone(), place: self.describe(), range: stored };
        let _slot = self.clock.timeout_at(ctx.deadline, turn).await.map_err(late)?;
        self.inner.read(blob, stored, ctx).await
    }
}

impl BlobSource for Limited {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        self.inner.len(blob, ctx)
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        match ctx.class {
            Class::OnDemand => Box::pin(self.in_turn(blob, stored, ctx)),
            Class::Prefetch => self.inner.read(blob, stored, ctx),
        }
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        match ctx.class {
            Class::OnDemand => Box::pin(async move { self.in_turn(blob, stored, ctx).await.map(take) }),
            Class::Prefetch => self.inner.stream(blob, stored, ctx, take),
        }
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

impl std::fmt::Debug for Limited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limited").field("slots", &self.slots).field("rate", &self.rate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::LocalSource;
    use super::*;

    #[tokio::test]
    async fn readers_wait_for_their_turn_until_their_deadline_and_prefetch_does_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "0123456789").unwrap();
        let limited = Limited::new(Arc::new(LocalSource::new(dir.path()).unwrap()), None, Some(1), Clock::default());
        let (blob, all) = ("a".parse().unwrap(), ByteRange::new(0, 10).unwrap());
        let ctx = |class, ms| ReadCtx::new(class, Instant::now() + Duration::from_millis(ms));

        let late = limited.read(&blob, all, ctx(Class::OnDemand, 20)).await.unwrap_err();
        assert!(matches!(late, SourceError::Deadline { .. }), "{late:?}");
        assert_eq!(limited.read(&blob, all, ctx(Class::Prefetch, 60_000)).await.unwrap(), "0123456789");
    }

    #[tokio::test]
    async fn only_so_many_readers_at_once_and_a_late_one_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), "0123456789").unwrap();
        let limited = Limited::new(Arc::new(LocalSource::new(dir.path()).unwrap()), Some(1), None, Clock::default());
        let (blob, all) = ("a".parse().unwrap(), ByteRange::new(0, 10).unwrap());
        let ctx = |ms| ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_millis(ms));
        let held = limited.slots.as_ref().unwrap().take(Class::OnDemand).await;

        assert!(limited.read(&blob, all, ctx(20)).await.is_err());
        drop(held);
        assert_eq!(limited.read(&blob, all, ctx(60_000)).await.unwrap(), "0123456789");
    }
}
