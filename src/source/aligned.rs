//! A place that is asked in whole pieces only.
//!
//! A peer-to-peer proxy keeps what it was asked for, range by range. It has what another host asked for only if both
//! ask for the same ranges, so requests begin and end at multiples of a size, and what was not wanted is left out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;

use super::{BoxFuture, Failure, ReadCtx, SourceError, Upstream};
use crate::base::{BlobId, ByteRange};

/// Blobs whose lengths are remembered; a few hundred images have no more.
const MOST_LENGTHS: usize = 4096;

/// Another place, asked at multiples of so many bytes.
pub(super) struct Aligned {
    inner: Arc<dyn Upstream>,
    bytes: u64,
    /// Where the last piece ends is not known without.
    lengths: Mutex<HashMap<BlobId, u64>>,
}

impl Aligned {
    /// `inner`, asked in pieces of `bytes`, which is a power of two.
    pub(super) fn new(inner: Arc<dyn Upstream>, bytes: u64) -> Self {
        Self { inner, bytes, lengths: Mutex::default() }
    }

    async fn length(&self, blob: &BlobId, ctx: ReadCtx) -> Result<u64, Failure> {
        if let Some(known) = self.lengths.lock().unwrap().get(blob) {
            return Ok(*known);
        }
        let len = self.inner.len(blob, ctx).await?;
        let mut known = self.lengths.lock().unwrap();
        if known.len() >= MOST_LENGTHS {
            known.clear();
        }
        known.insert(blob.clone(), len);
        Ok(len)
    }

    async fn pour_pieces(
        &self,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let len = self.length(blob, ctx).await?;
        if len < stored.end() {
            let (blob, place) = (blob.clone(), self.describe());
            return Err(SourceError::OutOfRange { blob, place, range: stored, len }.into());
        }
        let start = stored.start() - stored.start() % self.bytes;
        let end = stored.end().checked_next_multiple_of(self.bytes).map_or(len, |end| end.min(len));
        // Never fails: it begins no later and ends no earlier than what is wanted.
        let whole = ByteRange::new(start, end).unwrap_or(stored);
        let mut at = start;
        let mut trim = |piece: Bytes| {
            let behind = at + piece.len() as u64;
            let cut = |edge: u64| usize::try_from(edge.clamp(at, behind) - at).unwrap_or(piece.len());
            let wanted = piece.slice(cut(stored.start())..cut(stored.end()));
            at = behind;
            if !wanted.is_empty() {
                take(wanted);
            }
        };
        self.inner.pour(blob, whole, ctx, &mut trim).await
    }
}

impl Upstream for Aligned {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>> {
        Box::pin(self.length(blob, ctx))
    }

    fn pour<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(self.pour_pieces(blob, stored, ctx, take))
    }

    fn rests(&self) -> Option<Instant> {
        self.inner.rests()
    }

    fn is_limited(&self) -> bool {
        self.inner.is_limited()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::base::Class;

    /// Has 100 bytes that count from 0, gives them in pieces of 7, and notes what it is asked.
    #[derive(Default)]
    struct Counting {
        asked: Mutex<Vec<ByteRange>>,
    }

    impl Upstream for Counting {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>> {
            Box::pin(std::future::ready(Ok(100)))
        }

        fn pour<'a>(
            &'a self,
            _: &'a BlobId,
            stored: ByteRange,
            _: ReadCtx,
            take: &'a mut (dyn FnMut(Bytes) + Send),
        ) -> BoxFuture<'a, Result<(), Failure>> {
            self.asked.lock().unwrap().push(stored);
            let bytes: Vec<u8> = (0..100).collect();
            let (start, end) = (usize::try_from(stored.start()).unwrap(), usize::try_from(stored.end()).unwrap());
            bytes[start..end].chunks(7).for_each(|piece| take(Bytes::copy_from_slice(piece)));
            Box::pin(std::future::ready(Ok(())))
        }

        fn describe(&self) -> String {
            "counting".to_owned()
        }
    }

    #[tokio::test]
    async fn whole_pieces_are_asked_for_and_only_what_is_wanted_is_given() {
        let inner = Arc::new(Counting::default());
        let aligned = Aligned::new(inner.clone(), 32);
        let (blob, ctx) =
            ("ab".parse().unwrap(), ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(9)));
        for start in 0..100 {
            for end in start + 1..=100 {
                let mut got = Vec::new();
                let range = ByteRange::new(start, end).unwrap();
                aligned.pour(&blob, range, ctx, &mut |piece| got.extend_from_slice(&piece)).await.unwrap();
                let want: Vec<u8> = (start..end).map(|byte| u8::try_from(byte).unwrap()).collect();
                assert_eq!(got, want, "{range}");
                let asked = inner.asked.lock().unwrap().pop().unwrap();
                assert_eq!((asked.start() % 32, asked.end() % 32 * (100 - asked.end())), (0, 0), "{asked}");
            }
        }
        let beyond = ByteRange::new(90, 101).unwrap();
        let error = aligned.pour(&blob, beyond, ctx, &mut |_| {}).await.unwrap_err().error;
        assert!(matches!(error, SourceError::OutOfRange { len: 100, .. }), "{error}");
    }
}
