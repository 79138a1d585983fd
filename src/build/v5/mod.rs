//! The bootstrap of RAFS v5, from the same tree, chunks and blobs as that of v6 (`rafs-v5.md`).
//!
//! Version 5 names inodes in their own records, and lists every chunk in every file that has it: there
//! are no directory entries and no chunk table. Inodes have digests, each directory's over those of
//! its children. `layout` numbers and places the records, `digest` makes that tree of digests,
//! `emit` writes the bytes, `verify` reads them again. `packed` tells what becomes of blobs that
//! exist already.
//!
//! Only regular files have hard links here. Another kind of node with several names becomes as many
//! inodes, which differ in nothing but their numbers.

mod digest;
mod emit;
mod layout;
mod packed;
mod verify;

pub(super) use emit::name_blob;
pub use packed::{NotInVersion5, Packed};
pub(super) use verify::image;

use super::chunk::{Chunk, Content};
use super::emit::Facts;
use super::prefetch::PrefetchHints;
use super::stockblobs;
use super::tree::{Kind, NodeId, Tree};
use crate::format::rafs::BlobEntry;

/// Everything a bootstrap is made of.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub tree: &'a Tree,
    /// The blobs; all have the compression and the digest of `facts`.
    pub blobs: &'a [BlobEntry],
    /// Every chunk that a file of the tree uses, and maybe more.
    pub chunks: &'a [Chunk],
    /// Position in `chunks` of what each cut became.
    pub chunk_of_cut: &'a [u32],
    /// Nodes whose files should be fetched first, in this order; a directory means all below it.
    pub prefetch: &'a [NodeId],
    /// Files whose data is the head of the only blob, if that is to be told.
    pub head: Option<&'a PrefetchHints>,
    pub facts: Facts,
}

impl Source<'_> {
    /// The chunks of a file, in file order.
    fn chunks(&self, content: &Content) -> impl Iterator<Item = &Chunk> {
        content.cuts().map(|cut| {
            let at = self.chunk_of_cut[usize::try_from(cut).expect("cuts are counted in memory")];
            &self.chunks[at as usize]
        })
    }
}

/// Fails if a chunk of a file does not have exactly the bytes that the file needs of it: version 6 may
/// leave the rest of one unused, this one not.
pub(super) fn ensure_lengths(source: &Source<'_>) -> Result<(), NotInVersion5> {
    source.tree.walk(|id| {
        let Kind::Regular(content) = &source.tree.node(id).kind else { return Ok(()) };
        let mut left = content.size;
        for chunk in source.chunks(content) {
            let needs = left.min(source.facts.chunk_size.into());
            if u64::from(chunk.plain_len) != needs {
                let blob = stockblobs::id_text(&source.blobs[usize::from(chunk.blob)]);
                return Err(NotInVersion5::Length { blob, chunk: chunk.number, has: chunk.plain_len, needs });
            }
            left -= needs;
        }
        Ok(())
    })
}
