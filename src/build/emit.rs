//! A bootstrap as bytes, from a tree that has a layout (`rafs-v6.md` sections 1 to 13).

use std::collections::HashMap;

use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::chunk::{Chunk, Content};
use super::error::{BuildError, Limit};
use super::layout::{self, Layout, MAX_METADATA, Place};
use super::tree::{Kind, Meta, NodeId, Tree};
use super::verify::Expected;
use super::xattr;
use crate::base::BLOCK;
use crate::format::blobfile::features;
use crate::format::erofs::{
    self, ChunkIndex, DeviceSlot, Dirent, InodeExtended, MAX_DEVICES, Superblock, XattrEntry, XattrHead,
};
use crate::format::rafs::{self, Algorithm, BlobEntry, ChunkRecord, DigestAlgorithm, ExtSuperblock, flags};

/// Where the reference builder starts each device in the flat address space: on 512 KiB.
const FLAT_ALIGNMENT: u64 = 0x8_0000;
/// End of the flat address space in bytes: block numbers have 32 bits, and all ones means a hole.
const MAX_FLAT: u64 = (u32::MAX as u64) * BLOCK;

/// Everything a bootstrap is made of.
#[derive(Debug)]
pub(super) struct Bootstrap<'a> {
    pub tree: &'a Tree,
    pub layout: &'a Layout,
    /// Rows of the blob table; their indexes are set here.
    pub blobs: &'a [BlobEntry],
    /// Every chunk that a file of the tree uses, and maybe more.
    pub chunks: &'a [Chunk],
    /// Position in `chunks` of what each cut became.
    pub chunk_of_cut: &'a [u32],
    /// Nodes whose files should be fetched first, in this order; a directory means all below it.
    pub prefetch: &'a [NodeId],
    pub facts: Facts,
}

/// What the superblock says of an image as a whole.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub compression: Algorithm,
    pub digest: DigestAlgorithm,
    /// Bytes; a power of two.
    pub chunk_size: u32,
    /// Whether owners mean anything.
    pub explicit_ids: bool,
    /// Whether to say that there are xattrs even if no inode has one.
    pub claim_xattrs: bool,
}

/// Where the tables lie, in bytes (`rafs-v6.md` section 1).
struct Tables {
    blobs: u64,
    /// 0 if there is none.
    prefetch: u64,
    /// Start of the metadata area.
    meta: u64,
}

impl Tables {
    fn new(blobs: usize, prefetch: usize) -> Self {
        let (blobs, prefetch) = (blobs as u64, prefetch as u64);
        let table = (rafs::DEVICE_TABLE_OFFSET + size_of::<DeviceSlot>() as u64 * blobs).next_multiple_of(BLOCK);
        if blobs == 0 {
            return Self { blobs: table, prefetch: 0, meta: 0 };
        }
        let end = table + size_of::<BlobEntry>() as u64 * blobs;
        let meta = (end + PREFETCH_ENTRY * prefetch).next_multiple_of(BLOCK);
        Self { blobs: table, prefetch: if prefetch == 0 { 0 } else { end }, meta }
    }
}

/// Bytes of an entry of the prefetch table.
const PREFETCH_ENTRY: u64 = 4;

impl Bootstrap<'_> {
    /// The whole file.
    ///
    /// # Errors
    /// If it would be larger than readers accept, or if what is written is not what was laid out.
    pub(super) fn bytes(&self) -> Result<Vec<u8>, BuildError> {
        if self.blobs.len() > MAX_DEVICES {
            return Err(BuildError::Limit(Limit::Blobs));
        }
        let prefetch = self.prefetch_table();
        let tables = Tables::new(self.blobs.len(), prefetch.len());
        let records = self.chunk_records();
        let chunk_table = tables.meta + self.layout.len;
        let len = (chunk_table + records.as_bytes().len() as u64).next_multiple_of(BLOCK);
        if len > MAX_METADATA {
            return Err(BuildError::Limit(Limit::Metadata));
        }
        // First of all: it bounds the number of blocks, which others rely on.
        let mut flat_end = len;
        let (mut slots, mut entries) = (Vec::new(), Vec::new());
        for (index, blob) in (0u32..).zip(self.blobs) {
            slots.push(device_slot(blob, &mut flat_end)?);
            entries.push(BlobEntry { index: index.into(), ..*blob });
        }
        let mut out = Pages::new(len, tables.meta);
        out.put(erofs::SUPERBLOCK_OFFSET, &self.superblock(tables.meta))?;
        let mut ext = ExtSuperblock::new_zeroed();
        ext.flags = self.flags().into();
        ext.blob_table_offset = tables.blobs.into();
        ext.blob_table_size = u32::try_from(size_of_val(self.blobs)).expect("at most 254 rows").into();
        ext.chunk_size = self.facts.chunk_size.into();
        ext.chunk_table_offset = chunk_table.into();
        ext.chunk_table_size = (records.as_bytes().len() as u64).into();
        ext.prefetch_table_offset = tables.prefetch.into();
        ext.prefetch_table_size =
            u32::try_from(prefetch.as_bytes().len()).map_err(|_| BuildError::Limit(Limit::Metadata))?.into();
        out.put(rafs::EXT_SUPERBLOCK_OFFSET, &ext)?;
        out.put(rafs::DEVICE_TABLE_OFFSET, slots.as_slice())?;
        out.put(tables.blobs, entries.as_slice())?;
        out.put(tables.prefetch, prefetch.as_slice())?;
        self.nodes(&mut out)?;
        out.put(chunk_table, records.as_slice())?;
        Ok(out.bytes)
    }

    /// What it must say when it is read again.
    pub(super) fn expected(&self) -> Expected<'_> {
        Expected {
            tree: self.tree,
            layout: self.layout,
            chunks: self.chunks,
            chunk_of_cut: self.chunk_of_cut,
            digest: self.facts.digest,
        }
    }

    /// Numbers of the prefetched inodes. Without blobs there is nothing to fetch, and no table.
    fn prefetch_table(&self) -> Vec<U32> {
        let nodes = if self.blobs.is_empty() { &[] } else { self.prefetch };
        let nid = |node: &NodeId| u32::try_from(self.layout.place(*node).nid()).expect("2 GiB have fewer slots");
        nodes.iter().map(|node| nid(node).into()).collect()
    }

    fn superblock(&self, meta: u64) -> Superblock {
        let mut sb = Superblock::new_zeroed();
        sb.magic = erofs::MAGIC.into();
        sb.feature_compat = erofs::COMPAT_RAFS_V6.into();
        sb.blkszbits = 12;
        sb.root_nid = u16::try_from(self.layout.place(NodeId::ROOT).nid()).expect("the root is placed first").into();
        sb.inos = u64::from(self.layout.names).into();
        sb.blocks = self.blobs.iter().map(blocks).sum::<u32>().into();
        sb.meta_blkaddr = block_number(meta).into();
        sb.feature_incompat = (erofs::INCOMPAT_CHUNKED_FILE | erofs::INCOMPAT_DEVICE_TABLE).into();
        sb.extra_devices = u16::try_from(self.blobs.len()).expect("at most 254").into();
        sb.devt_slotoff = erofs::DEVICE_TABLE_SLOT.into();
        sb
    }

    fn flags(&self) -> u64 {
        let mut bits = self.facts.compression.flag() | self.facts.digest.flag();
        if self.facts.explicit_ids {
            bits |= flags::EXPLICIT_UID_GID;
        }
        if self.layout.has_xattrs || self.facts.claim_xattrs {
            bits |= flags::HAS_XATTR;
        }
        let has = |entry: &BlobEntry, feature| entry.features.get() & feature != 0;
        let encrypted = self.blobs.iter().any(|blob| has(blob, features::ENCRYPTED));
        bits |= if encrypted { flags::ENCRYPTION_AES_128_XTS } else { flags::ENCRYPTION_NONE };
        // True of every blob when there is none.
        if self.blobs.iter().all(|blob| has(blob, features::INLINED_CHUNK_DIGEST)) {
            bits |= flags::INLINED_CHUNK_DIGEST;
        }
        bits
    }

    /// Inodes with everything that belongs to them, once each, however many names they have.
    fn nodes(&self, out: &mut Pages) -> Result<(), BuildError> {
        let mut parents = HashMap::from([(NodeId::ROOT, NodeId::ROOT)]);
        let mut written = vec![false; self.tree.len()];
        let mut names = Vec::new();
        self.tree.walk(|id| {
            if !std::mem::replace(&mut written[id.index()], true) {
                self.node(out, id, &mut names, &mut parents)?;
            }
            Ok(())
        })
    }

    fn node(
        &self,
        out: &mut Pages,
        id: NodeId,
        block: &mut Vec<u8>,
        parents: &mut HashMap<NodeId, NodeId>,
    ) -> Result<(), BuildError> {
        let (node, place) = (self.tree.node(id), self.layout.place(id));
        let at = out.meta + place.inode;
        let mut inode = InodeExtended::new_zeroed();
        let area = xattr_area(&node.meta);
        inode.xattr_icount = xattr_count(area.len()).into();
        inode.size = place.data_len.into();
        inode.ino = place.ino.into();
        inode.uid = node.meta.uid.into();
        inode.gid = node.meta.gid.into();
        inode.mtime = node.meta.mtime.cast_unsigned().into();
        inode.mtime_nsec = node.meta.mtime_nsec.into();
        inode.nlink = place.links.into();
        let (kind, layout) = match &node.kind {
            Kind::Directory(_) => {
                let parent = parents.remove(&id).expect("parents are visited first");
                parents.extend(
                    self.tree
                        .children(id)
                        .filter(|(_, child)| self.tree.node(*child).kind.is_directory())
                        .map(|(_, child)| (child, id)),
                );
                self.directory(block, id, parent);
                (libc::S_IFDIR, self.data(out, place, block)?)
            }
            Kind::Symlink(target) => (libc::S_IFLNK, self.data(out, place, target)?),
            Kind::Regular(content) => {
                inode.size = content.size.into();
                inode.u = self.chunk_format(content).into();
                let array = (at + place.head).next_multiple_of(8);
                let indexes: Vec<ChunkIndex> = self.chunks(content).map(|(_, chunk)| chunk_index(chunk)).collect();
                out.put(array, indexes.as_slice())?;
                (libc::S_IFREG, erofs::layout::CHUNK_BASED)
            }
            Kind::Character(device) => {
                inode.u = (*device).into();
                (libc::S_IFCHR, erofs::layout::FLAT_PLAIN)
            }
            Kind::Block(device) => {
                inode.u = (*device).into();
                (libc::S_IFBLK, erofs::layout::FLAT_PLAIN)
            }
            Kind::Fifo => (libc::S_IFIFO, erofs::layout::FLAT_PLAIN),
            Kind::Socket => (libc::S_IFSOCK, erofs::layout::FLAT_PLAIN),
        };
        if matches!(node.kind, Kind::Directory(_) | Kind::Symlink(_)) {
            inode.u = block_number(out.meta + place.data).into();
        }
        inode.mode = (u16::try_from(kind).expect("the type has 4 of 16 bits") | node.meta.permissions).into();
        inode.format = (1 | layout << 1).into();
        out.put(at, &inode)?;
        out.put(at + size_of::<InodeExtended>() as u64, area.as_slice())
    }

    /// Writes the content of a directory or the target of a link, and says in which layout.
    fn data(&self, out: &mut Pages, place: &Place, data: &[u8]) -> Result<u16, BuildError> {
        if data.len() as u64 != place.data_len {
            return Err(BuildError::Layout { at: place.inode });
        }
        let whole = if place.inline { data.len() - data.len() % BLOCK_LEN } else { data.len() };
        let (blocks, tail) = data.split_at(whole);
        out.put(out.meta + place.data, blocks)?;
        out.put(out.meta + place.inode + place.head, tail)?;
        Ok(if place.inline { erofs::layout::FLAT_INLINE } else { erofs::layout::FLAT_PLAIN })
    }

    /// Replaces `out` with the content of a directory.
    fn directory(&self, out: &mut Vec<u8>, dir: NodeId, parent: NodeId) {
        out.clear();
        let mut entries = Vec::new();
        let mut used = 0;
        for (name, node) in layout::entries(self.tree, dir, parent) {
            let len = size_of::<Dirent>() + name.len();
            if used + len > BLOCK_LEN {
                self.directory_block(out, &entries);
                out.resize(out.len().next_multiple_of(BLOCK_LEN), 0);
                entries.clear();
                used = 0;
            }
            used += len;
            entries.push((name, node));
        }
        self.directory_block(out, &entries);
    }

    fn directory_block(&self, out: &mut Vec<u8>, entries: &[(&[u8], NodeId)]) {
        let mut nameoff = entries.len() * size_of::<Dirent>();
        for (name, node) in entries {
            let dirent = Dirent {
                nid: self.layout.place(*node).nid().into(),
                nameoff: u16::try_from(nameoff).expect("inside a block").into(),
                file_type: file_type(&self.tree.node(*node).kind),
                reserved: 0,
            };
            out.extend_from_slice(dirent.as_bytes());
            nameoff += name.len();
        }
        for (name, _) in entries {
            out.extend_from_slice(name);
        }
    }

    /// The chunks of a file with their positions in `chunks`, in file order.
    fn chunks(&self, content: &Content) -> impl Iterator<Item = (usize, &Chunk)> {
        content.cuts().map(|cut| {
            let at = self.chunk_of_cut[usize::try_from(cut).expect("cuts are counted in memory")] as usize;
            (at, &self.chunks[at])
        })
    }

    /// `i_u` of a regular file: indexes, and the chunk size in blocks as a power of two. A file
    /// whose chunks lie one after the other is declared as one large chunk, which lets the kernel
    /// map it in one step (`rafs-v6.md` section 12).
    fn chunk_format(&self, content: &Content) -> u32 {
        let chunk_size = u64::from(self.facts.chunk_size);
        let mut expected = None;
        let contiguous = self.chunks(content).all(|(_, chunk)| {
            let follows = expected.is_none_or(|at| at == (chunk.blob, chunk.decoded_offset));
            expected = Some((chunk.blob, chunk.decoded_offset + chunk_size));
            follows
        });
        let mut bytes = chunk_size;
        if contiguous && content.size > chunk_size {
            bytes = content.size.next_power_of_two();
        }
        let exponent = bytes.ilog2() - BLOCK.ilog2();
        erofs::CHUNK_FORMAT_INDEXES | exponent
    }

    /// One record for each chunk that a file of the tree uses, sorted by digest, then blob.
    fn chunk_records(&self) -> Vec<ChunkRecord> {
        // When a chunk was met last, and where in that file.
        let mut met = vec![None; self.chunks.len()];
        let mut clock = 0u64;
        let walked = self.tree.walk(|id| {
            if let Kind::Regular(content) = &self.tree.node(id).kind {
                for (position, (at, _)) in self.chunks(content).enumerate() {
                    clock += 1;
                    met[at] = Some((clock, position as u64 * u64::from(self.facts.chunk_size)));
                }
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = walked;
        // The first bytes of a digest settle nearly every comparison, and are at hand.
        let start = |chunk: &Chunk| u64::from_be_bytes(*chunk.digest.0.first_chunk().expect("32 bytes"));
        let identity = |at: usize| (&self.chunks[at].digest.0, self.chunks[at].blob, self.chunks[at].number);
        let used = self.chunks.iter().zip(met).enumerate();
        let mut used: Vec<_> = used.filter_map(|(at, (chunk, met))| met.map(|met| (start(chunk), at, met))).collect();
        used.sort_unstable_by(|(start_a, a, met_a), (start_b, b, met_b)| {
            start_a.cmp(start_b).then_with(|| identity(*a).cmp(&identity(*b))).then(met_b.cmp(met_a))
        });
        // Layers that share a blob bring its chunks several times; the one met last stays.
        used.dedup_by(|(_, a, _), (_, b, _)| identity(*a) == identity(*b));
        used.into_iter().map(|(_, at, (_, offset))| self.chunks[at].record(offset)).collect()
    }
}

const BLOCK_LEN: usize = 4096;

fn chunk_index(chunk: &Chunk) -> ChunkIndex {
    let blob = u8::try_from(chunk.blob).expect("chunks lie in the rows of the blob table");
    ChunkIndex::new(blob, chunk.number, block_number(chunk.decoded_offset))
}

/// Places a blob in the flat address space behind `end`, which moves to the blob's end.
fn device_slot(blob: &BlobEntry, end: &mut u64) -> Result<DeviceSlot, BuildError> {
    let mut slot = DeviceSlot::new_zeroed();
    slot.tag = blob.id;
    let start = end.next_multiple_of(FLAT_ALIGNMENT);
    *end = start.saturating_add(blob.uncompressed_size.get() / BLOCK * BLOCK);
    if *end > MAX_FLAT {
        return Err(BuildError::Limit(Limit::Decoded));
    }
    slot.blocks = blocks(blob).into();
    slot.mapped_blkaddr = block_number(start).into();
    Ok(slot)
}

/// Length of a blob's device in blocks.
fn blocks(blob: &BlobEntry) -> u32 {
    block_number(blob.uncompressed_size.get())
}

fn block_number(bytes: u64) -> u32 {
    u32::try_from(bytes / BLOCK).expect("address spaces end below 2^44 bytes")
}

fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::Regular(_) => erofs::file_type::REGULAR,
        Kind::Directory(_) => erofs::file_type::DIRECTORY,
        Kind::Character(_) => erofs::file_type::CHARACTER,
        Kind::Block(_) => erofs::file_type::BLOCK,
        Kind::Fifo => erofs::file_type::FIFO,
        Kind::Socket => erofs::file_type::SOCKET,
        Kind::Symlink(_) => erofs::file_type::SYMLINK,
    }
}

/// The xattr area of an inode; empty if it has none, since the kernel refuses a lone head.
fn xattr_area(meta: &Meta) -> Vec<u8> {
    let mut area = Vec::with_capacity(xattr::area_bytes(meta));
    for (name, value) in &meta.xattrs {
        let Some((name_index, suffix)) = xattr::split(name) else { continue };
        if area.is_empty() {
            area.extend_from_slice(XattrHead::new_zeroed().as_bytes());
        }
        let entry = XattrEntry {
            name_len: u8::try_from(suffix.len()).expect("a full name has at most 255 bytes"),
            name_index,
            value_size: u16::try_from(value.len()).expect("checked when it was collected").into(),
        };
        area.extend_from_slice(entry.as_bytes());
        area.extend_from_slice(suffix);
        area.extend_from_slice(value);
        area.resize(area.len().next_multiple_of(4), 0);
    }
    area
}

fn xattr_count(area: usize) -> u16 {
    match area.checked_sub(size_of::<XattrHead>()) {
        None => 0,
        Some(entries) => u16::try_from(entries / 4 + 1).expect("checked when they were collected"),
    }
}

/// The file being filled. Nothing may be written outside it or over what was written before.
struct Pages {
    bytes: Vec<u8>,
    /// Start of the metadata area.
    meta: u64,
    /// Which bytes were written, to find a layout that overlaps itself while tests run.
    #[cfg(debug_assertions)]
    written: Vec<bool>,
}

impl Pages {
    fn new(len: u64, meta: u64) -> Self {
        let len = usize::try_from(len).expect("at most 2 GiB");
        Self {
            bytes: vec![0; len],
            meta,
            #[cfg(debug_assertions)]
            written: vec![false; len],
        }
    }

    fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, at: u64, value: &T) -> Result<(), BuildError> {
        let value = value.as_bytes();
        let range = usize::try_from(at).ok().and_then(|from| Some(from..from.checked_add(value.len())?));
        let range = range.filter(|range| range.end <= self.bytes.len()).ok_or(BuildError::Layout { at })?;
        #[cfg(debug_assertions)]
        {
            let before = &mut self.written[range.clone()];
            assert!(before.iter().all(|written| !written), "bytes at {at} are written twice");
            before.fill(true);
        }
        self.bytes[range].copy_from_slice(value);
        Ok(())
    }
}
