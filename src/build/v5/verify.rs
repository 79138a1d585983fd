//! A finished image, read again before anybody is told of it.
//!
//! The bootstrap is opened as a reader opens it, and every path in it compared with the tree that it was
//! made from. Digests of inodes are made anew from what was read. Then it is lifted, as it will be
//! when it is mounted, and every chunk of its new blobs is decoded and digested.

use std::num::NonZeroUsize;

use super::Source;
use crate::base::{BLOCK, ByteRange, Digest};
use crate::blob::{Check, Recipe, TablesError, Unit, UnitMap, digest_of};
use crate::build::blobwriter::FinishedBlob;
use crate::build::chunk::{Chunk, Content};
use crate::build::error::BuildError;
use crate::build::lift;
use crate::build::tree::{Kind, NodeId};
use crate::build::verify::{self, VerifyError};
use crate::format::rafs::{Algorithm, DigestAlgorithm, chunk_flags};
use crate::format::rafs5::ROOT;
use crate::image;
use crate::image::v5::{Bootstrap, BootstrapError, Inode};
use zerocopy::IntoBytes;

/// Checks the complete image: its bootstrap, as readers see it, and the blobs that were made with it.
pub(in crate::build) fn image(
    bootstrap: &[u8],
    source: &Source<'_>,
    blobs: &[FinishedBlob],
    threads: NonZeroUsize,
) -> Result<(), BuildError> {
    let image = Bootstrap::parse(bootstrap).map_err(VerifyError::from)?;
    metadata(&image, source)?;
    let lifted = lift(&image).map_err(VerifyError::from)?;
    image::Image::parse(lifted).map_err(VerifyError::from)?;
    for blob in blobs.iter().filter(|blob| !blob.chunks.is_empty()) {
        let facts = source.facts;
        verify::data(&map(blob, facts.compression, facts.digest)?, &blob.file, threads)?;
    }
    Ok(())
}

/// Compares every path of the image with the tree.
fn metadata(image: &Bootstrap<'_>, source: &Source<'_>) -> Result<(), VerifyError> {
    let mut names = vec![0u32; source.tree.len()];
    let mut want = 0u64;
    let walked = source.tree.walk(|node| {
        names[node.index()] += 1;
        want += 1;
        Ok::<(), std::convert::Infallible>(())
    });
    let Ok(()) = walked;
    let mut reading = Reading { image, source, names, inos: vec![None; source.tree.len()] };
    let mut got = 1;
    let root = image.inode(ROOT)?;
    reading.compare(&root, NodeId::ROOT)?;
    let mut todo = vec![(root, NodeId::ROOT)];
    while let Some((directory, dir)) = todo.pop() {
        for child in image.children(&directory) {
            let child = child?;
            got += 1;
            let node = source.tree.child(dir, child.name);
            let node = node.ok_or_else(|| wrong(&child, "the name"))?;
            reading.compare(&child, node)?;
            if child.kind == image::Kind::Directory {
                todo.push((child, node));
            }
        }
    }
    if got == want && u64::from(image.paths()) == want { Ok(()) } else { Err(VerifyError::Names { got, want }) }
}

fn wrong(inode: &Inode<'_>, what: &'static str) -> VerifyError {
    VerifyError::Node { path: format!("{} (inode {})", inode.name.escape_ascii(), inode.number), what }
}

struct Reading<'a> {
    image: &'a Bootstrap<'a>,
    source: &'a Source<'a>,
    /// How many names each node has.
    names: Vec<u32>,
    /// What each node was called by its first path that was met.
    inos: Vec<Option<u32>>,
}

impl Reading<'_> {
    /// Fails unless an inode is what the tree says.
    fn compare(&mut self, inode: &Inode<'_>, id: NodeId) -> Result<(), VerifyError> {
        let node = self.source.tree.node(id);
        let meta = &node.meta;
        let (same_number, links) = match node.kind {
            Kind::Regular(_) => {
                let ino = *self.inos[id.index()].get_or_insert(inode.ino);
                (inode.ino == ino, self.names[id.index()])
            }
            Kind::Directory(_) => {
                let below = self.source.tree.children(id);
                let below = below.filter(|(_, child)| self.source.tree.node(*child).kind.is_directory()).count();
                (inode.ino == inode.number, u32::try_from(below + 2).unwrap_or(u32::MAX))
            }
            _ => (inode.ino == inode.number, 1),
        };
        let content = match &node.kind {
            Kind::Symlink(target) => *inode.target == **target,
            Kind::Character(device) | Kind::Block(device) => inode.rdev == *device,
            Kind::Regular(content) => inode.size == content.size && self.same_chunks(inode, content)?,
            Kind::Directory(_) | Kind::Fifo | Kind::Socket => true,
        };
        let checks = [
            (inode.kind == node.kind.in_images(), "the kind"),
            (same_number, "the number"),
            (inode.permissions == meta.permissions, "the mode"),
            ((inode.uid, inode.gid) == (meta.uid, meta.gid), "the owner"),
            (inode.mtime == (meta.mtime, meta.mtime_nsec), "the time"),
            (inode.nlink == links, "the link count"),
            (same_xattrs(inode, &meta.xattrs)?, "an xattr"),
            (content, "the content"),
            (inode.digest == self.digest(inode)?.0, "the digest"),
        ];
        match checks.into_iter().find(|(same, _)| !same) {
            Some((_, what)) => Err(wrong(inode, what)),
            None => Ok(()),
        }
    }

    /// Whether the records of a file are those of its chunks, and readers take them.
    fn same_chunks(&self, inode: &Inode<'_>, content: &Content) -> Result<bool, BootstrapError> {
        let chunk_size = u64::from(self.source.facts.chunk_size);
        let mut records = inode.chunks.iter();
        for (position, chunk) in (0u32..).zip(self.source.chunks(content)) {
            let want = chunk.record(u64::from(position) * chunk_size);
            let read = self.image.chunk(inode, position).transpose()?;
            if read.is_none() || records.next().is_none_or(|got| got.as_bytes() != want.as_bytes()) {
                return Ok(false);
            }
        }
        Ok(records.next().is_none())
    }

    /// The digest that an inode should have by what the image says is in it.
    fn digest(&self, inode: &Inode<'_>) -> Result<Digest, BootstrapError> {
        let mut text = Vec::new();
        match inode.kind {
            image::Kind::Directory => {
                for child in self.image.children(inode) {
                    text.extend_from_slice(&child?.digest);
                }
            }
            image::Kind::Symlink => text.extend_from_slice(inode.target),
            _ => inode.chunks.iter().for_each(|chunk| text.extend_from_slice(&chunk.digest)),
        }
        Ok(digest_of(self.source.facts.digest, &text))
    }
}

fn same_xattrs(inode: &Inode<'_>, xattrs: &[crate::build::tree::Xattr]) -> Result<bool, BootstrapError> {
    let mut want = xattrs.iter();
    for pair in inode.xattrs() {
        let (name, value) = pair?;
        if want.next().is_none_or(|(n, v)| **n != *name || **v != *value) {
            return Ok(false);
        }
    }
    Ok(want.next().is_none())
}

/// The units of a blob: every chunk that was stored, also those that no file uses any more. Where they
/// are decoded to does not matter here.
fn map(blob: &FinishedBlob, compression: Algorithm, digest: DigestAlgorithm) -> Result<UnitMap, VerifyError> {
    let recipe = |chunk: &Chunk| match compression {
        _ if chunk.flags & chunk_flags::COMPRESSED == 0 => Recipe::Plain,
        Algorithm::None => Recipe::Plain,
        Algorithm::Lz4Block => Recipe::Lz4Block,
        Algorithm::Gzip => Recipe::Gzip,
        Algorithm::Zstd => Recipe::Zstd,
    };
    let mut end = 0;
    let mut units = Vec::with_capacity(blob.chunks.len());
    for (number, chunk) in blob.chunks.iter().enumerate() {
        let place = VerifyError::Place { chunk: number };
        let (Some(decoded), Some(stored)) =
            (ByteRange::at(end, chunk.plain_len.into()), ByteRange::at(chunk.stored_offset, chunk.stored_len.into()))
        else {
            return Err(place);
        };
        end = decoded.end().next_multiple_of(BLOCK);
        let check = Check::of(digest, chunk.digest.0);
        units.push(Unit { decoded, stored, recipe: recipe(chunk), check, part: None, encrypted: false });
    }
    UnitMap::new(blob.id.clone(), end, units).map_err(|cause| TablesError::Map { blob: blob.id.clone(), cause }.into())
}
