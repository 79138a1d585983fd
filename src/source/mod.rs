//! Where stored bytes come from.
//!
//! A [`BlobSource`] answers ranged reads of whole blobs by id and knows nothing of what they mean.
//! Retries, time-outs and connection reuse live below, in `net`, once for every remote kind.

mod http;
mod local;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use crate::base::{BlobId, ByteRange, Class, Fault};

/// An owned future, so that the trait below can be made into an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who asks, how urgently, and until when an answer is of use.
#[derive(Clone, Copy, Debug)]
pub struct ReadCtx {
    /// Readers before prefetch.
    pub class: Class,
    /// Give up at this moment, retries included.
    pub deadline: Instant,
}

/// Answers ranged reads of blobs.
pub trait BlobSource: Send + Sync + 'static {
    /// Length of the stored blob in bytes.
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>>;

    /// Exactly `stored.len()` bytes, or an error. A short answer is an error.
    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>>;

    /// What to call this source in messages: a directory or an URL, without secrets.
    fn describe(&self) -> String;
}

/// Why a source could not answer. Cheap to clone: one failed read may answer many readers.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// The source has no such blob.
    #[error("blob {blob} is not at {place}")]
    NotFound { blob: BlobId, place: String },
    /// The source knows the blob and refuses to hand it out.
    #[error("{place} refused blob {blob} (status {status})")]
    Refused { blob: BlobId, place: String, status: u16 },
    /// The blob ends before the range does.
    #[error("blob {blob} at {place} has {len} bytes, too few for {range}")]
    OutOfRange { blob: BlobId, place: String, range: ByteRange, len: u64 },
    /// The server answered a ranged request with something else.
    #[error("{place} does not answer ranged requests properly: {detail}")]
    NoRanges { place: String, detail: String },
    /// The other side failed or went away; worth another try.
    #[error("{place} failed to serve blob {blob}: {detail}")]
    Unavailable { blob: BlobId, place: String, detail: String },
    /// No answer within the time the reader may wait.
    #[error("{place} did not deliver {range} of blob {blob} in time")]
    Deadline { blob: BlobId, place: String, range: ByteRange },
    /// The local disk or network stack failed.
    #[error("cannot read blob {blob} at {place}")]
    Io {
        blob: BlobId,
        place: String,
        #[source]
        cause: Arc<std::io::Error>,
    },
}

impl SourceError {
    /// What a caller may do about it.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Unavailable { .. } | Self::Deadline { .. } => Fault::Transient,
            Self::NotFound { .. }
            | Self::Refused { .. }
            | Self::OutOfRange { .. }
            | Self::NoRanges { .. }
            | Self::Io { .. } => Fault::Permanent,
        }
    }
}
