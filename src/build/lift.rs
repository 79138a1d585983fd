//! A RAFS v5 image as one that the kernel's EROFS reads.
//!
//! RAFS v5 was made for FUSE servers: its plain bytes are packed, and its inodes are no EROFS. But the
//! decoded space of a blob is nobody's but ours, so the same tree is laid out as an EROFS bootstrap
//! over devices in which every chunk starts on a block ([`v5::Chunk::decoded_offset`]). Blobs stay as they
//! are. They have no tables, so each row of the blob table is one of a blob whose chunks are listed,
//! and the chunk table lists every chunk that a file uses.
//!
//! The volume name says what the image was. The bytes are the same for the same image, and the same
//! version of this code.

use std::collections::HashMap;
use std::mem::offset_of;

use zerocopy::FromZeros;

use super::chunk::{Chunk, Content};
use super::emit::{Bootstrap, Facts};
use super::error::{BuildError, Limit, Unfit};
use super::input::check_target;
use super::layout;
use super::merge::prefetch_nodes;
use super::tree::{Kind, Meta, Node, NodeId, Tree};
use super::xattr::{self, Collector};
use crate::base::{BLOCK, Digest};
use crate::format::array_at_mut;
use crate::format::blobfile::features;
use crate::format::erofs::{MAX_DEVICES, SUPERBLOCK_OFFSET, Superblock};
use crate::format::rafs::{BlobEntry, chunk_flags};
use crate::format::rafs5::ROOT;
use crate::image::v5::{self, BootstrapError, Inode, Number};
use crate::image::{self, VOLUME_OF_V5};

/// Changes whenever the same image would become other bytes, so that what was lifted before can be
/// told from what is lifted now.
pub const LIFT_VERSION: u32 = 1;

/// Why a RAFS v5 image has no place in EROFS.
#[derive(Debug, thiserror::Error)]
pub enum LiftError {
    /// The image is damaged.
    #[error(transparent)]
    Image(#[from] BootstrapError),
    /// A blob is still without the name that is not known inside of it.
    #[error("the bootstrap was taken out of a blob and does not name it; give it the name of the blob")]
    Unnamed,
    /// The root is no directory.
    #[error("the root is not a directory")]
    Root,
    /// Two directories, or one of them twice, have a path as their child.
    #[error("inode {number} is in directory {directory}, and in another one before")]
    Twice { number: Number, directory: Number },
    /// Inode records lie over each other.
    #[error("inode {number}: the inodes up to it take more than the {len} bytes of the bootstrap, so some overlap")]
    Overlap { number: Number, len: u64 },
    /// A further name of a file tells something else about it than its first name.
    #[error("{field} of inode {number} is not that of inode {first}, of which it is a further name")]
    Link { number: Number, first: Number, field: &'static str },
    /// Two records place one chunk differently.
    #[error("chunk {chunk} of inode {number} is chunk {index} of blob {blob}, of which another record tells otherwise")]
    Chunk { number: Number, chunk: u32, blob: usize, index: u32 },
    /// More chunks of an old blob than there are numbers.
    #[error("blob {blob} has more than 16777215 chunks")]
    Chunks { blob: usize },
    /// Something that EROFS cannot hold.
    #[error("inode {number}: {problem}")]
    Unfit { number: Number, problem: Unfit },
    /// The whole is too large.
    #[error(transparent)]
    Build(Box<BuildError>),
}

impl LiftError {
    /// Whether the image is not damaged but of a version that nobody can read.
    pub fn is_of_another_version(&self) -> bool {
        matches!(self, Self::Image(BootstrapError::Version(_) | BootstrapError::Unsupported { .. }))
    }
}

impl From<BuildError> for LiftError {
    fn from(cause: BuildError) -> Self {
        Self::Build(Box::new(cause))
    }
}

/// The EROFS bootstrap of `image`.
///
/// Memory and time are bounded by the length of the image. Xattrs in namespaces that EROFS has no
/// number for are left out, as they are when an image is built.
pub fn lift(image: &v5::Bootstrap<'_>) -> Result<Vec<u8>, LiftError> {
    if image.blobs().iter().any(v5::Blob::is_unnamed) {
        return Err(LiftError::Unnamed);
    }
    let mut lift = Lift::new(image)?;
    lift.tree()?;
    lift.number()?;
    let (rows, chunks) = lift.blobs()?;
    let Lift { tree, nodes, .. } = &lift;
    let facts = image.summary();
    let hinted = image.prefetch().filter_map(|number| *nodes.get(number as usize)?);
    let prefetch = prefetch_nodes(tree, hinted);
    let layout = layout::layout(tree, facts.chunk_size)?;
    let chunk_of_cut: Vec<u32> = (0..u32::try_from(chunks.len()).expect("checked as they came")).collect();
    let bootstrap = Bootstrap {
        tree,
        layout: &layout,
        blobs: &rows,
        chunks: &chunks,
        chunk_of_cut: &chunk_of_cut,
        prefetch: &prefetch,
        facts: Facts {
            compression: facts.compression,
            digest: facts.digest,
            chunk_size: facts.chunk_size,
            explicit_ids: facts.explicit_ids,
            claim_xattrs: facts.has_xattrs,
        },
    };
    let mut bytes = bootstrap.bytes()?;
    let at = SUPERBLOCK_OFFSET + offset_of!(Superblock, volume_name) as u64;
    let name = array_at_mut(&mut bytes, at, VOLUME_OF_V5.len() as u64, "volume name");
    name.expect("a bootstrap has a superblock").copy_from_slice(&VOLUME_OF_V5);
    Ok(bytes)
}

/// Whether the kernel's EROFS can show an xattr of this name; [`lift`] leaves out what it cannot.
pub fn is_showable_xattr(name: &[u8]) -> bool {
    xattr::split(name).is_some()
}

struct Lift<'a, 'b> {
    image: &'a v5::Bootstrap<'b>,
    tree: Tree,
    /// The node of each path that was met, by its number.
    nodes: Vec<Option<NodeId>>,
    chunks: Vec<Chunk>,
    /// Position in `chunks` by blob and index, or place among the plain bytes of an old one.
    by_place: HashMap<(u16, u64), u32>,
    /// Bytes that inodes may still take.
    room: u64,
}

impl<'a, 'b> Lift<'a, 'b> {
    fn new(image: &'a v5::Bootstrap<'b>) -> Result<Self, LiftError> {
        let root = image.inode(ROOT)?;
        if root.kind != image::Kind::Directory {
            return Err(LiftError::Root);
        }
        let mut nodes = vec![None; image.paths() as usize + 1];
        nodes[ROOT as usize] = Some(NodeId::ROOT);
        let mut lift = Self {
            image,
            tree: Tree::new(Meta::implied_directory()),
            nodes,
            chunks: Vec::new(),
            by_place: HashMap::new(),
            room: image.bytes().len() as u64,
        };
        lift.tree.node_mut(NodeId::ROOT).meta = lift.meta(&root)?;
        lift.account(&root)?;
        Ok(lift)
    }

    /// Every path below the root. Directories come before what is in them, however they are met.
    fn tree(&mut self) -> Result<(), LiftError> {
        let image = self.image;
        let mut todo = vec![(image.inode(ROOT)?, NodeId::ROOT)];
        // Further names are linked when all first ones are there: those have smaller numbers, and
        // may all the same be met later.
        let mut links = Vec::new();
        while let Some((directory, dir)) = todo.pop() {
            for child in image.children(&directory) {
                let child = child?;
                let number = child.number;
                if self.nodes[number as usize].is_some() {
                    return Err(LiftError::Twice { number, directory: directory.number });
                }
                self.account(&child)?;
                if child.ino != number {
                    // A place in the table, so that nobody else has it as a child.
                    self.nodes[number as usize] = Some(NodeId::ROOT);
                    links.push((dir, child));
                    continue;
                }
                let node = self.node(&child)?;
                let unfit = |problem| LiftError::Unfit { number, problem };
                let id = self.tree.add(node).map_err(unfit)?;
                self.tree.link(dir, child.name, id).map_err(unfit)?;
                self.nodes[number as usize] = Some(id);
                if child.kind == image::Kind::Directory {
                    todo.push((child, id));
                }
            }
        }
        links.into_iter().try_for_each(|(dir, link)| self.link(dir, &link))
    }

    /// Gives a file a further name.
    fn link(&mut self, dir: NodeId, link: &Inode<'_>) -> Result<(), LiftError> {
        let (number, first) = (link.number, link.ino);
        let differs = |field| LiftError::Link { number, first, field };
        let other = self.image.inode(first)?;
        let node = self.nodes[first as usize].filter(|_| other.ino == first).ok_or(differs("inode number"))?;
        let bytes = |inode: &Inode<'_>| (inode.kind, inode.size, inode.rdev);
        if bytes(&other) != bytes(link) {
            return Err(differs("kind or size"));
        }
        if other.target != link.target {
            return Err(differs("target"));
        }
        if other.digest != link.digest {
            return Err(differs("digest"));
        }
        if other.chunks.iter().zip(link.chunks).any(|(one, another)| one.digest != another.digest) {
            return Err(differs("chunks"));
        }
        let unfit = |problem| LiftError::Unfit { number, problem };
        self.tree.link(dir, link.name, node).map_err(unfit)?;
        self.nodes[number as usize] = Some(node);
        Ok(())
    }

    /// Counts what an inode takes. In a sound image no byte belongs to two inodes; where they share
    /// them, a small file could become very much memory.
    fn account(&mut self, inode: &Inode<'_>) -> Result<(), LiftError> {
        let len = self.image.bytes().len() as u64;
        let overlap = LiftError::Overlap { number: inode.number, len };
        self.room = self.room.checked_sub(inode.len).ok_or(overlap)?;
        Ok(())
    }

    fn node(&mut self, inode: &Inode<'_>) -> Result<Node, LiftError> {
        let kind = match inode.kind {
            image::Kind::Directory => Kind::empty_directory(),
            image::Kind::Regular => Kind::Regular(self.content(inode)?),
            image::Kind::Symlink => {
                check_target(inode.target).map_err(|problem| LiftError::Unfit { number: inode.number, problem })?;
                Kind::Symlink(inode.target.into())
            }
            image::Kind::Character => Kind::Character(inode.rdev),
            image::Kind::Block => Kind::Block(inode.rdev),
            image::Kind::Fifo => Kind::Fifo,
            image::Kind::Socket => Kind::Socket,
        };
        Ok(Node { meta: self.meta(inode)?, kind })
    }

    fn meta(&self, inode: &Inode<'_>) -> Result<Meta, LiftError> {
        let mut meta = Meta {
            permissions: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime.0,
            mtime_nsec: inode.mtime.1,
            xattrs: Vec::new(),
        };
        let unfit = |problem| LiftError::Unfit { number: inode.number, problem };
        let mut xattrs = Collector::default();
        for pair in inode.xattrs() {
            let (name, value) = pair?;
            xattrs.add(name, value).map_err(unfit)?;
        }
        xattrs.store(&mut meta).map_err(unfit)?;
        Ok(meta)
    }

    fn content(&mut self, inode: &Inode<'_>) -> Result<Content, LiftError> {
        let positions = (0..).map_while(|position| {
            let chunk = self.image.chunk(inode, position)?;
            Some(chunk.map_err(LiftError::from).and_then(|chunk| self.chunk(inode, position, &chunk)))
        });
        Content::from_cuts(inode.size, positions)
    }

    /// Position of a chunk in the list of all.
    fn chunk(&mut self, inode: &Inode<'_>, position: u32, chunk: &v5::Chunk) -> Result<u64, LiftError> {
        let record = &inode.chunks[position as usize];
        // More blobs than EROFS has devices are refused when all are known.
        let blob = u16::try_from(chunk.blob).map_err(|_| BuildError::Limit(Limit::Blobs))?;
        let short = |len: u64| u32::try_from(len).expect("a chunk has at most 16 MiB, and a member a little more");
        let crc = record.flags.get() & chunk_flags::HAS_CRC32 != 0;
        let packed = chunk.packed.start();
        let new = Chunk {
            digest: Digest(record.digest),
            crc32c: if crc { record.crc32.get() } else { 0 },
            plain_len: short(chunk.packed.len()),
            blob,
            number: chunk.index.unwrap_or(UNNUMBERED),
            flags: if chunk.is_compressed { chunk_flags::COMPRESSED } else { 0 },
            stored_len: short(chunk.stored.len()),
            stored_offset: chunk.stored.start(),
            // Of what has no number yet the place follows with it.
            decoded_offset: chunk.index.map_or(packed, |index| v5::Chunk::decoded_offset(packed, index)),
        };
        let next = u32::try_from(self.chunks.len()).map_err(|_| BuildError::Limit(Limit::Chunks))?;
        let key = chunk.index.map_or(packed, u64::from);
        let at = *self.by_place.entry((blob, key)).or_insert(next);
        if at == next {
            self.chunks.push(new);
        } else if self.chunks[at as usize] != new {
            let (number, blob, index) = (inode.number, chunk.blob, record.index.get());
            return Err(LiftError::Chunk { number, chunk: position, blob, index });
        }
        Ok(at.into())
    }

    /// Numbers the chunks of blobs too old to have them numbered, in the order of their plain bytes.
    fn number(&mut self) -> Result<(), LiftError> {
        let unnumbered = |at: &usize| self.chunks[*at].number == UNNUMBERED;
        let mut old: Vec<usize> = (0..self.chunks.len()).filter(unnumbered).collect();
        old.sort_unstable_by_key(|at| (self.chunks[*at].blob, self.chunks[*at].decoded_offset));
        let (mut blob, mut next) = (None, 0);
        for at in old {
            let chunk = &mut self.chunks[at];
            if blob.replace(chunk.blob) != Some(chunk.blob) {
                next = 0;
            }
            if next == MAX_CHUNKS {
                return Err(LiftError::Chunks { blob: chunk.blob.into() });
            }
            chunk.number = next;
            chunk.decoded_offset = v5::Chunk::decoded_offset(chunk.decoded_offset, next);
            next += 1;
        }
        Ok(())
    }

    /// Rows for the blobs that files use, and all chunks with the numbers of these rows.
    fn blobs(&self) -> Result<(Vec<BlobEntry>, Vec<Chunk>), LiftError> {
        let mut known: Vec<Option<Known>> = vec![None; self.image.blobs().len()];
        for chunk in &self.chunks {
            known[usize::from(chunk.blob)].get_or_insert_default().add(chunk);
        }
        let used = known.iter().flatten().count();
        if used > MAX_DEVICES {
            return Err(BuildError::Limit(Limit::Blobs).into());
        }
        let (mut rows, mut row_of) = (Vec::with_capacity(used), vec![0; known.len()]);
        for ((blob, known), row) in self.image.blobs().iter().zip(&known).zip(&mut row_of) {
            if let Some(known) = known {
                *row = u16::try_from(rows.len()).expect("at most 254");
                rows.push(self.row(blob, known));
            }
        }
        let chunks = self.chunks.iter().map(|chunk| Chunk { blob: row_of[usize::from(chunk.blob)], ..*chunk });
        Ok((rows, chunks.collect()))
    }

    fn row(&self, blob: &v5::Blob, known: &Known) -> BlobEntry {
        let facts = self.image.summary();
        let mut row = BlobEntry::new_zeroed();
        row.id = blob.id.to_padded();
        row.chunk_size = facts.chunk_size.into();
        row.compression = facts.compression.number().into();
        row.digest = facts.digest.number().into();
        row.features = features::ALIGNED.into();
        // An image too old to tell how much there is of a blob tells it of what it uses.
        let chunks = blob.extent.map_or(known.chunks, |extent| extent.chunks);
        row.chunk_count = chunks.into();
        row.compressed_size = blob.extent.map_or(known.stored_end, |extent| extent.data_end).into();
        let device_len = blob.extent.map_or(known.decoded_end, |extent| extent.device_len());
        row.uncompressed_size = device_len.next_multiple_of(BLOCK).into();
        row
    }
}

/// Most chunks of a blob.
const MAX_CHUNKS: u32 = 0xff_ffff;
/// Number of a chunk that has none yet.
const UNNUMBERED: u32 = u32::MAX;

/// How much of a blob its chunks show.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    chunks: u32,
    stored_end: u64,
    decoded_end: u64,
}

impl Known {
    fn add(&mut self, chunk: &Chunk) {
        self.chunks = self.chunks.max(chunk.number + 1);
        self.stored_end = self.stored_end.max(chunk.stored_offset + u64::from(chunk.stored_len));
        self.decoded_end = self.decoded_end.max(chunk.decoded_offset + u64::from(chunk.plain_len));
    }
}
