//! The bootstrap of RAFS v5, from the same tree, chunks and blobs as that of v6 (`rafs-v5.md`).
//!
//! Version 5 names inodes in their own records, and lists every chunk in every file that has it: there
//! are no directory entries and no chunk table. Inodes have digests, each directory's over those of
//! its children. `layout` numbers and places the records, `digest` makes that tree of digests,
//! `emit` writes the bytes, `verify` reads them again.
//!
//! Only regular files have hard links here. Another kind of node with several names becomes as many
//! inodes, which differ in nothing but their numbers.

mod digest;
mod emit;
mod layout;
mod verify;

pub(super) use emit::name_blob;

pub(super) use verify::image;

use super::chunk::{Chunk, Content};
use super::emit::Facts;
use super::prefetch::PrefetchHints;
use super::tree::{NodeId, Tree};
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
