//! Batches: what several small chunks share (`blob.md` section 11.3).

use std::collections::HashMap;

use super::{MAX_UNIT, Part};
use crate::base::ByteRange;
use crate::format::blobfile::{BatchContext, ChunkInfoV2};

/// The batches of one blob, by context number.
pub(super) struct Batches<'a> {
    contexts: &'a [BatchContext],
    /// Where the batches start: a context does not say, its members do, and they must agree.
    starts: HashMap<u32, u64>,
}

/// Where a member of a batch is.
pub(super) struct Member {
    pub(super) stored: ByteRange,
    pub(super) part: Part,
}

impl<'a> Batches<'a> {
    pub(super) fn new(contexts: &'a [BatchContext]) -> Self {
        Self { contexts, starts: HashMap::new() }
    }

    /// The place of the member that `row` describes.
    pub(super) fn member(&mut self, row: &ChunkInfoV2) -> Result<Member, &'static str> {
        let (number, at) = row.place();
        let context = self.contexts.get(number as usize).ok_or("a chunk is in a batch that does not exist")?;
        let start = row.compressed_offset();
        if *self.starts.entry(number).or_insert(start) != start {
            return Err("the members of a batch disagree about where it is");
        }
        let whole = context.uncompressed_size.get();
        if u64::from(whole) > MAX_UNIT || u64::from(at) + u64::from(row.uncompressed_size()) > whole.into() {
            return Err("a chunk does not lie in its batch, or the batch is larger than 16 MiB");
        }
        let stored = ByteRange::at(start, context.compressed_size.get().into()).ok_or("a batch is out of range")?;
        Ok(Member { stored, part: Part { at, whole } })
    }
}
