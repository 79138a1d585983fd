//! In the place of a source that cannot be used.

use bytes::Bytes;

use super::{BlobSource, BoxFuture, OpenError, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange};

/// Answers every read with the reason why there is no source.
#[derive(Debug)]
pub struct AbsentSource {
    why: String,
}

impl AbsentSource {
    /// For a source that could not be opened.
    pub fn new(why: OpenError) -> Self {
        Self::because(&crate::base::Chain(&why).to_string())
    }

    /// For one that there is none of, for this reason.
    pub fn because(why: &str) -> Self {
        Self { why: why.to_owned() }
    }

    fn error(&self, blob: &BlobId) -> SourceError {
        let (blob, detail) = (blob.clone(), self.why.clone());
        SourceError::Unavailable { blob, place: "a source that cannot be used".to_owned(), detail }
    }
}

impl BlobSource for AbsentSource {
    fn len<'a>(&'a self, blob: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(std::future::ready(Err(self.error(blob))))
    }

    fn read<'a>(&'a self, blob: &'a BlobId, _: ByteRange, _: ReadCtx) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(std::future::ready(Err(self.error(blob))))
    }

    fn describe(&self) -> String {
        format!("nothing ({})", self.why)
    }
}
