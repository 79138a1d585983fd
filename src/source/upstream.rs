//! A place that is asked once and does not try again.

use std::time::{Duration, Instant};

use bytes::Bytes;

use super::{BoxFuture, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange};

/// One place that has stored bytes: a server, a bucket. [`super::Tiers`] makes a source of one or more of
/// them, with repetition, failover and patience; here is only what one of them does when it is asked.
pub trait Upstream: Send + Sync + 'static {
    /// Length of the stored blob in bytes.
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>>;

    /// Hands the bytes of `stored`, which is not empty, to `take`, in order and as they arrive; exactly
    /// `stored.len()` of them, or an error, and never more. What was taken before an error is as good as the
    /// rest. The caller sees to the deadline; dropping the future ends the transfer.
    fn pour<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), Failure>>;

    /// Until when its host wants to be left alone by everybody, if it does.
    fn rests(&self) -> Option<Instant> {
        None
    }

    /// Whether answers may be slow because of limits that we keep, and not by its fault.
    fn is_limited(&self) -> bool {
        false
    }

    /// What to call it in messages: an URL, without secrets.
    fn describe(&self) -> String;
}

/// A failed attempt.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What is told if nobody tries again.
    pub error: SourceError,
    /// Pause the server asked for before another one.
    pub retry_after: Option<Duration>,
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self { error, retry_after: None }
    }
}
