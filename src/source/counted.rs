//! Counts what a source is asked and how it went, whatever kind of source it is.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::{BlobSource, BoxFuture, ReadCtx, SourceError, Verdict};
use crate::base::{BlobId, ByteRange, Chain};
use crate::telemetry::{Outcome, Place};

/// A source whose reads are counted.
pub(super) struct Counted<S> {
    pub(super) inner: S,
    pub(super) place: Arc<Place>,
}

impl<S: BlobSource> BlobSource for Counted<S> {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        self.inner.len(blob, ctx)
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            let asked = Asked { place: &self.place, blob, stored, ctx, since: Instant::now(), ended: None };
            let outcome = self.inner.read(blob, stored, ctx).await;
            asked.end(outcome.as_ref().map(|bytes| bytes.len() as u64));
            outcome
        })
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move {
            let asked = Asked { place: &self.place, blob, stored, ctx, since: Instant::now(), ended: None };
            // As they arrive: what has come is used even if the rest does not.
            let mut counting = |piece: Bytes| {
                self.place.bytes.at(ctx.class).add(piece.len() as u64);
                take(piece);
            };
            let outcome = self.inner.stream(blob, stored, ctx, &mut counting).await;
            asked.end(outcome.as_ref().map(|()| 0));
            outcome
        })
    }

    fn judged(&self, blob: &BlobId, stored: ByteRange, verdict: Verdict) {
        self.inner.judged(blob, stored, verdict);
    }

    fn places(&self) -> usize {
        self.inner.places()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

/// One read. Dropped before its end, it was cut off: by its deadline, or because nobody wanted it.
struct Asked<'a> {
    place: &'a Place,
    blob: &'a BlobId,
    stored: ByteRange,
    ctx: ReadCtx,
    since: Instant,
    ended: Option<Outcome>,
}

impl Asked<'_> {
    /// `outcome` is how many bytes came that were not counted yet.
    fn end(mut self, outcome: Result<u64, &SourceError>) {
        self.ended = Some(match outcome {
            Ok(bytes) => {
                let (request, ms) = (self.ctx.request.number(), self.millis());
                tracing::debug!(request, blob = %self.blob, stored = %self.stored, ms, "fetched");
                self.place.bytes.at(self.ctx.class).add(bytes);
                self.place.worked();
                Outcome::Ok
            }
            Err(error) => {
                self.fail(Chain(error).to_string());
                outcome_of(error)
            }
        });
    }

    fn fail(&self, error: String) {
        let (request, ms) = (self.ctx.request.number(), self.millis());
        tracing::debug!(request, blob = %self.blob, stored = %self.stored, ms, error, "not fetched");
        self.place.failed(error);
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        let outcome = self.ended.unwrap_or_else(|| {
            if Instant::now() < self.ctx.deadline {
                return Outcome::Cancelled;
            }
            self.fail("no answer in time".to_owned());
            Outcome::Late
        });
        self.place.reads.at(self.ctx.class).at(outcome).inc();
    }
}

pub(super) fn outcome_of(error: &SourceError) -> Outcome {
    match error {
        SourceError::NotFound { .. } | SourceError::Refused { .. } | SourceError::Unauthorized { .. } => {
            Outcome::Refused
        }
        SourceError::OutOfRange { .. } | SourceError::NoRanges { .. } | SourceError::Untrusted { .. } => {
            Outcome::Improper
        }
        SourceError::Unavailable { .. } => Outcome::Unavailable,
        SourceError::Deadline { .. } => Outcome::Late,
        SourceError::Io { .. } => Outcome::Io,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::base::{Class, RequestId};
    use crate::telemetry::{Label, Telemetry};

    /// Answers a range that begins at 0, fails one at 1, and never answers any other.
    struct Scripted;

    impl BlobSource for Scripted {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            unreachable!("nobody asks")
        }

        fn read<'a>(
            &'a self,
            blob: &'a BlobId,
            stored: ByteRange,
            _: ReadCtx,
        ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            Box::pin(async move {
                match stored.start() {
                    0 => Ok(Bytes::from_static(b"four")),
                    1 => Err(SourceError::Refused { blob: blob.clone(), place: "p".to_owned(), status: 403 }),
                    _ => std::future::pending().await,
                }
            })
        }

        fn describe(&self) -> String {
            "p".to_owned()
        }
    }

    #[tokio::test]
    async fn every_read_is_counted_once_by_how_it_ended() {
        let place = Telemetry::default().place("p");
        let source = Counted { inner: Scripted, place: place.clone() };
        let blob: BlobId = "b".parse().unwrap();
        let ctx = |class, time| ReadCtx { class, deadline: Instant::now() + time, request: RequestId::new(7) };
        let range = |start| ByteRange::new(start, start + 4).unwrap();
        let (class, long) = (Class::Prefetch, Duration::from_secs(60));

        source.read(&blob, range(0), ctx(class, long)).await.unwrap();
        assert!(!place.is_failing());
        source.read(&blob, range(1), ctx(class, long)).await.unwrap_err();
        assert!(place.is_failing());
        for time in [Duration::ZERO, long] {
            let mut read = source.read(&blob, range(2), ctx(class, time));
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(read.as_mut().poll(cx).is_pending()));
            assert!(polled.await);
        }

        let counts: Vec<_> = place.reads.at(class).iter().map(|(label, count)| (label.text(), count.get())).collect();
        let expected = [("ok", 1), ("refused", 1), ("unavailable", 0), ("late", 1), ("improper", 0), ("io", 0)];
        assert_eq!(counts, [&expected[..], &[("cancelled", 1)]].concat());
        assert_eq!((place.bytes.at(class).get(), place.bytes.at(Class::OnDemand).get()), (4, 0));
        assert_eq!(place.last_failure().unwrap().text, "no answer in time");
    }

    /// Hands on a part, and then fails or never ends.
    struct Breaking;

    impl BlobSource for Breaking {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            unreachable!("nobody asks")
        }

        fn read<'a>(&'a self, _: &'a BlobId, _: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            unreachable!("it is streamed")
        }

        fn stream<'a>(
            &'a self,
            blob: &'a BlobId,
            stored: ByteRange,
            _: ReadCtx,
            take: &'a mut (dyn FnMut(Bytes) + Send),
        ) -> BoxFuture<'a, Result<(), SourceError>> {
            Box::pin(async move {
                take(Bytes::from_static(b"abc"));
                match stored.start() {
                    0 => Err(SourceError::NotFound { blob: blob.clone(), place: "p".to_owned() }),
                    _ => std::future::pending().await,
                }
            })
        }

        fn describe(&self) -> String {
            "p".to_owned()
        }
    }

    #[tokio::test]
    async fn what_a_stream_brought_is_counted_even_if_it_breaks() {
        let place = Telemetry::default().place("p");
        let source = Counted { inner: Breaking, place: place.clone() };
        let blob: BlobId = "b".parse().unwrap();
        let ctx = ReadCtx::new(Class::Prefetch, Instant::now() + Duration::from_secs(60));
        let range = |start| ByteRange::new(start, start + 4).unwrap();
        let mut came = Vec::new();
        let mut take = |piece: Bytes| came.extend_from_slice(&piece);

        source.stream(&blob, range(0), ctx, &mut take).await.unwrap_err();
        let mut given_up = source.stream(&blob, range(1), ctx, &mut take);
        let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(given_up.as_mut().poll(cx).is_pending()));
        assert!(polled.await);
        drop(given_up);

        let outcomes = place.reads.at(Class::Prefetch);
        assert_eq!((outcomes.at(Outcome::Refused).get(), outcomes.at(Outcome::Cancelled).get()), (1, 1));
        assert_eq!((place.bytes.at(Class::Prefetch).get(), came.as_slice()), (6, &b"abcabc"[..]));
    }
}
