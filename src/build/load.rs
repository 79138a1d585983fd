//! Images that exist already, taken apart to become part of a new one.
//!
//! A [`Stock`] is an arena of nodes, a list of chunks and a list of blobs. Any number of images are
//! added to it; then it is put together in another way and written. No data moves: a file of the
//! new image leads to the same chunk of the same blob as before.
//!
//! Files name their chunks by position in the list, as files of a source that is read name theirs
//! by cut: the chunks of the stock are the first cuts of all.

use std::ops::ControlFlow;

use super::chunk::{Chunk, Content, Known};
use super::error::{BuildError, Limit, Unfit};
use super::hintedpaths::{HintedPaths, Hints};
use super::stockblobs::{BlobRows, Contradiction};
use super::tree::{Kind, Meta, Node, NodeId, Tree};
use super::xattr::Collector;
use crate::base::{BLOCK, BlobId};
use crate::blob::TablesError;
use crate::format::blobfile::features;
use crate::format::erofs::{ChunkIndex, INODE_SLOT, XattrEntry};
use crate::format::rafs::{BlobEntry, ChunkRecord, DigestAlgorithm, flags};
use crate::image::{self, Image, ImageError, Inode, Summary};

/// Why an image cannot become part of another.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("it is a tarfs image: its blobs are tar archives in 512-byte blocks; build its layers anew")]
    Tarfs,
    #[error("it has {what} {value}, the images before it {before}")]
    Disagrees { what: &'static str, value: u64, before: u64 },
    #[error(transparent)]
    Tables(#[from] TablesError),
    #[error(transparent)]
    Contradiction(#[from] Contradiction),
    #[error("row {row} of the chunk table is a chunk of 0 bytes, 1 is the least")]
    EmptyRecord { row: usize },
    #[error("row {row} of the chunk table has {field} {value}, {limit} is the limit")]
    Record { row: usize, field: &'static str, value: u64, limit: u64 },
    #[error("chunk {chunk} of /{path} is number {index} of blob {blob} at block {block}: not in the chunk table")]
    NoRecord { path: String, chunk: usize, index: u32, blob: u8, block: u32 },
    #[error("chunk {chunk} of /{path} has {has} bytes, the file needs {needs}")]
    ShortChunk { path: String, chunk: usize, has: u32, needs: u64 },
    #[error("chunk {chunk} of /{path} is in no blob")]
    NoBlob { path: String, chunk: usize },
    #[error("directory of /{path}: its names are not in order")]
    Order { path: String },
    #[error("two of its devices are the same blob")]
    RepeatedBlob,
    #[error("blob {blob} has {problem}")]
    Blob { blob: String, problem: &'static str },
    #[error(
        "inodes of the tree overlap or share xattrs: together they take more than the {len} bytes of the bootstrap"
    )]
    Overlap { len: u64 },
    #[error("blob {blob} has {bytes} decoded bytes, not 4096 to {MAX_DECODED}")]
    Decoded { blob: BlobId, bytes: u64 },
    #[error("the root is not a directory")]
    Root,
    #[error("/{path}: {problem}")]
    Entry { path: String, problem: Unfit },
    #[error("with it there would be more than 4294967295 chunks; use a larger chunk size")]
    TooManyChunks,
    #[error("an id can be given to a layer with one blob of its own, this one has {blobs}")]
    Blobs { blobs: usize },
}

/// End of a device, in bytes (`rafs-v6.md` section 5).
const MAX_DECODED: u64 = (1 << 44) - BLOCK;

/// An image with what it may be called in messages.
#[derive(Debug)]
pub struct Layer {
    /// Usually the path of its file.
    pub name: std::path::PathBuf,
    pub image: Image,
    /// What to call its only own blob instead of what the image says.
    pub id: Option<BlobId>,
}

impl Layer {
    pub(super) fn error(&self, cause: LoadError) -> BuildError {
        BuildError::Image { image: self.name.clone(), cause: Box::new(cause) }
    }
}

/// Parts of images that exist.
#[derive(Debug)]
pub(super) struct Stock {
    /// Starts with an empty root, to put others over.
    pub tree: Tree,
    pub chunks: Vec<Chunk>,
    pub blobs: BlobRows,
    agreed: Option<Agreed>,
}

/// What all images of a stock have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub chunk_size: u32,
    pub explicit_ids: bool,
}

impl Agreed {
    fn of(summary: &Summary) -> Self {
        Self { chunk_size: summary.chunk_size, explicit_ids: summary.flags & flags::EXPLICIT_UID_GID != 0 }
    }
}

/// What the tree of an added image is called, and what it wanted to have prefetched.
#[derive(Debug)]
pub(super) struct Added {
    pub root: NodeId,
    pub prefetch: HintedPaths,
}

impl Stock {
    /// Nothing yet. What is added must agree with `agreed`, or else with what was added first.
    pub(super) fn new(agreed: Option<Agreed>) -> Self {
        let tree = Tree::new(Meta::implied_directory());
        Self { tree, chunks: Vec::new(), blobs: BlobRows::default(), agreed }
    }

    /// What everything added so far agrees in.
    pub(super) fn agreed(&self) -> Option<Agreed> {
        self.agreed
    }

    /// Adds the chunks and blobs of an image, and its tree under a root of its own. `own_id` is
    /// what to call its only blob that `is_own`.
    pub(super) fn add(
        &mut self,
        image: &Image,
        own_id: Option<&BlobId>,
        is_own: impl Fn(&BlobId) -> bool,
    ) -> Result<Added, LoadError> {
        let chunks = self.add_chunks(image, own_id, is_own)?;
        let room = image.summary().bootstrap_len;
        Loader { image, stock: self, chunks, room }.tree()
    }

    /// Adds only the chunks and blobs of an image.
    pub(super) fn add_dictionary(&mut self, image: &Image) -> Result<(), LoadError> {
        self.add_chunks(image, None, |_| false).map(|_| ())
    }

    fn add_chunks(
        &mut self,
        image: &Image,
        own_id: Option<&BlobId>,
        is_own: impl Fn(&BlobId) -> bool,
    ) -> Result<Positions, LoadError> {
        self.agree(image.summary())?;
        let own = image.devices().iter().filter(|device| is_own(&device.blob)).count();
        if own_id.is_some() && own > 1 {
            return Err(LoadError::Blobs { blobs: own });
        }
        let mut rows = Vec::with_capacity(image.devices().len());
        for device in image.devices() {
            let mut entry = device.entry;
            let bytes = entry.uncompressed_size.get();
            if !(BLOCK..=MAX_DECODED).contains(&bytes) {
                return Err(LoadError::Decoded { blob: device.blob.clone(), bytes });
            }
            // Whatever is made of it is no longer the bootstrap inside that blob.
            entry.features = (entry.features.get() & !features::INLINED_FS_META).into();
            if let Some(id) = own_id.filter(|_| is_own(&device.blob)) {
                entry.id = id.to_padded();
            }
            rows.push(self.blobs.add(&entry)?);
        }
        Positions::new(image, &rows, &mut self.chunks)
    }

    fn agree(&mut self, summary: &Summary) -> Result<(), LoadError> {
        if summary.flags & flags::TARFS_MODE != 0 {
            return Err(LoadError::Tarfs);
        }
        let this = Agreed::of(summary);
        let before = *self.agreed.get_or_insert(this);
        let same = |what, value: u64, before: u64| {
            if value == before { Ok(()) } else { Err(LoadError::Disagrees { what, value, before }) }
        };
        same("chunk size", this.chunk_size.into(), before.chunk_size.into())?;
        same("the explicit owners flag", this.explicit_ids.into(), before.explicit_ids.into())
    }

    /// The chunks that new data may turn out to be equal to: those in blobs with the same digest.
    pub(super) fn known(&self, digest: DigestAlgorithm) -> Known {
        let comparable = |chunk: &&Chunk| self.blobs.rows()[usize::from(chunk.blob)].digest.get() == digest.number();
        let by_content = (0..).zip(&self.chunks).filter(|(_, chunk)| comparable(chunk));
        let by_content = by_content.map(|(position, chunk)| (chunk.digest, chunk.plain_len, position)).collect();
        Known { count: self.count(), by_content }
    }

    fn count(&self) -> u32 {
        u32::try_from(self.chunks.len()).expect("checked as they came")
    }

    /// Adds the chunks of a blob that was just written behind all others, and says which row the
    /// blob has.
    pub(super) fn add_blob(&mut self, entry: &BlobEntry, chunks: &[Chunk]) -> Result<u16, BuildError> {
        // The same data in the same order makes the same blob, so it may be there already.
        let row = self.blobs.add(entry).map_err(BuildError::NewBlob)?;
        // Other images' bootstraps are no longer in their blobs; this one's may be.
        self.blobs.rows_mut()[usize::from(row)].features = entry.features;
        self.chunks.extend(chunks.iter().map(|chunk| Chunk { blob: row, ..*chunk }));
        u32::try_from(self.chunks.len()).map(|_| row).map_err(|_| BuildError::Limit(Limit::Chunks))
    }
}

/// Positions of one image's chunks in the list of a [`Stock`], by what chunk indexes say of them.
#[derive(Debug)]
struct Positions {
    /// Sorted; the position in the list is `first` and the position here.
    keys: Vec<Key>,
    first: u32,
}

/// Blob, number in the blob and block in the device (`rafs-v6.md` section 13).
type Key = (u8, u32, u32);

impl Positions {
    /// Appends the chunks of `image` to `chunks`, blob by blob, each in the order of its numbers:
    /// that of the table is by digest, and chunks of a file would be far from one another.
    fn new(image: &Image, rows: &[u16], chunks: &mut Vec<Chunk>) -> Result<Self, LoadError> {
        let records = image.chunk_records();
        let mut order = Vec::with_capacity(records.len());
        for (row, record) in records.iter().enumerate() {
            order.push((key(row, record, image)?, row));
        }
        order.sort_unstable();
        let first = u32::try_from(chunks.len()).map_err(|_| LoadError::TooManyChunks)?;
        u32::try_from(chunks.len() + records.len()).map_err(|_| LoadError::TooManyChunks)?;
        chunks.extend(order.iter().map(|((blob, ..), row)| Chunk::of_record(&records[*row], rows[usize::from(*blob)])));
        Ok(Self { keys: order.into_iter().map(|(key, _)| key).collect(), first })
    }

    /// Where the chunk of this key is here. Chunks of a file mostly follow each other, so the one
    /// at `guess` is looked at first.
    fn find(&self, key: Key, guess: usize) -> Option<usize> {
        if self.keys.get(guess) == Some(&key) {
            return Some(guess);
        }
        self.keys.binary_search(&key).ok()
    }
}

/// The key of a record, with everything checked that a chunk index of ours will say again.
fn key(row: usize, record: &ChunkRecord, image: &Image) -> Result<Key, LoadError> {
    let limited = |field, value: u64, limit: u64| {
        if value > limit { Err(LoadError::Record { row, field, value, limit }) } else { Ok(()) }
    };
    let (blob, index) = (record.blob_index.get(), record.index.get());
    let device = usize::try_from(blob).ok().and_then(|blob| image.devices().get(blob));
    let missing = LoadError::Record { row, field: "blob", value: blob.into(), limit: image.devices().len() as u64 };
    let decoded_len = device.ok_or(missing)?.entry.uncompressed_size.get() / BLOCK * BLOCK;
    limited("number", index.into(), 0xff_ffff)?;
    if record.uncompressed_size.get() == 0 {
        return Err(LoadError::EmptyRecord { row });
    }
    limited("length", record.uncompressed_size.get().into(), image.summary().chunk_size.into())?;
    let at = record.uncompressed_offset.get();
    limited("bytes behind a block boundary", at % BLOCK, 0)?;
    limited("end", at.saturating_add(record.uncompressed_size.get().into()), decoded_len)?;
    let block = u32::try_from(at / BLOCK).expect("devices are smaller");
    Ok((u8::try_from(blob).expect("at most 254 blobs"), index, block))
}

/// Reads the tree of one image into a stock.
struct Loader<'a> {
    image: &'a Image,
    stock: &'a mut Stock,
    chunks: Positions,
    /// Bytes that inodes may still take with what belongs to them.
    room: u64,
}

impl<'a> Loader<'a> {
    fn tree(mut self) -> Result<Added, LoadError> {
        let image = self.image;
        // Which node each inode became, plus one: an eighth of the bootstrap's length, which is
        // cheaper than a map, and left untouched by the kernel where there are no inodes.
        let slots = usize::try_from(image.summary().bootstrap_len / INODE_SLOT).expect("at most 2 GiB");
        let mut nodes: Vec<Option<NodeId>> = vec![None; slots];
        let mut hints = Hints::new(image);
        // Directory and name met last on each level of the path.
        let mut levels: Vec<(NodeId, &[u8])> = Vec::new();
        let mut root = None;
        let mut walk = image.walk();
        while let Some(visit) = walk.next_visit() {
            let visit = visit?;
            let (path, inode) = (visit.path, visit.inode);
            let unfit = |problem| LoadError::Entry { path: text(path), problem };
            hints.met(inode.nid, path);
            let Some((name, _)) = path.split_last() else {
                let node = self.node(&inode, path)?;
                if !node.kind.is_directory() {
                    return Err(LoadError::Root);
                }
                let id = self.stock.tree.add(node).map_err(unfit)?;
                root = Some(id);
                levels.push((id, b""));
                continue;
            };
            let depth = path.len();
            // The level of the parent remembers the name before this one.
            levels.truncate(depth);
            let (dir, before) = levels.last_mut().expect("parents are visited first");
            if *before >= *name {
                return Err(LoadError::Order { path: text(path) });
            }
            *before = name;
            let dir = *dir;
            let slot = usize::try_from(inode.nid).ok().and_then(|nid| nodes.get_mut(nid));
            let known = slot.as_deref().copied().flatten();
            let id = match known {
                Some(id) => id,
                None => {
                    let node = self.node(&inode, path)?;
                    self.stock.tree.add(node).map_err(unfit)?
                }
            };
            if let Some(slot) = slot {
                *slot = Some(id);
            }
            self.stock.tree.link(dir, name, id).map_err(unfit)?;
            if inode.kind == image::Kind::Directory {
                levels.push((id, b""));
            }
        }
        Ok(Added { root: root.ok_or(LoadError::Root)?, prefetch: hints.paths() })
    }

    fn node(&mut self, inode: &Inode, path: &[&[u8]]) -> Result<Node, LoadError> {
        self.account(inode)?;
        let kind = match inode.kind {
            image::Kind::Directory => Kind::empty_directory(),
            image::Kind::Regular => Kind::Regular(self.content(inode, path)?),
            image::Kind::Symlink => Kind::Symlink(self.image.symlink(inode)?.into()),
            image::Kind::Character => Kind::Character(inode.rdev),
            image::Kind::Block => Kind::Block(inode.rdev),
            image::Kind::Fifo => Kind::Fifo,
            image::Kind::Socket => Kind::Socket,
        };
        let mut meta = Meta {
            permissions: inode.permissions,
            uid: inode.uid,
            gid: inode.gid,
            mtime: inode.mtime.0,
            mtime_nsec: inode.mtime.1,
            xattrs: Vec::new(),
        };
        if !inode.xattrs.is_empty() {
            let unfit = |problem| LoadError::Entry { path: text(path), problem };
            let (mut xattrs, mut added) = (Collector::default(), Ok(()));
            // The inode's own are counted with its area; it names shared ones in four bytes each.
            let (mut counted, len) = (inode.xattrs.len(), self.image.summary().bootstrap_len);
            self.image.xattrs(inode, &mut |xattr| {
                let entry = (size_of::<XattrEntry>() + xattr.suffix.len() + xattr.value.len()) as u64;
                let own = counted.min(entry);
                counted -= own;
                added = match self.room.checked_sub(entry - own) {
                    Some(room) => {
                        self.room = room;
                        xattrs.add(&xattr.name(), xattr.value).map_err(unfit)
                    }
                    None => Err(LoadError::Overlap { len }),
                };
                if added.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })?;
            added.and_then(|()| xattrs.store(&mut meta).map_err(unfit))?;
        }
        Ok(Node { meta, kind })
    }

    /// Counts what an inode takes, but for xattrs outside of it. In a sound image no byte belongs
    /// to two inodes; where they share them, a small file could become very much memory.
    fn account(&mut self, inode: &Inode) -> Result<(), LoadError> {
        let data = match inode.kind {
            image::Kind::Regular => size_of_val(self.image.chunk_array(inode)?) as u64,
            image::Kind::Symlink => inode.size,
            _ => 0,
        };
        let taken = inode.xattrs.len().saturating_add(data);
        let len = self.image.summary().bootstrap_len;
        self.room = self.room.checked_sub(taken).ok_or(LoadError::Overlap { len })?;
        Ok(())
    }

    fn content(&self, inode: &Inode, path: &[&[u8]]) -> Result<Content, LoadError> {
        let rows = self.image.chunk_array(inode)?;
        let chunk_size = u64::from(self.image.summary().chunk_size);
        let mut left = inode.size;
        let mut guess = 0;
        let cuts = rows.iter().enumerate().map(|(chunk, row)| {
            let at = self.position(row, chunk, guess, path)?;
            guess = at + 1;
            let position = self.chunks.first + u32::try_from(at).expect("checked with the table");
            let has = self.stock.chunks[position as usize].plain_len;
            let needs = left.min(chunk_size);
            if u64::from(has) < needs {
                return Err(LoadError::ShortChunk { path: text(path), chunk, has, needs });
            }
            left -= needs;
            Ok(u64::from(position))
        });
        Content::from_cuts(inode.size, cuts)
    }

    fn position(&self, row: &ChunkIndex, chunk: usize, guess: usize, path: &[&[u8]]) -> Result<usize, LoadError> {
        let Some(blob) = row.blob() else { return Err(LoadError::NoBlob { path: text(path), chunk }) };
        let (index, block) = (row.index(), row.blkaddr.get());
        let found = self.chunks.find((blob, index, block), guess);
        found.ok_or_else(|| LoadError::NoRecord { path: text(path), chunk, index, blob, block })
    }
}

fn text(path: &[&[u8]]) -> String {
    path.join(&b'/').escape_ascii().to_string()
}
