//! A bootstrap as bytes, from a tree that has a layout (`rafs-v6.md` sections 1 to 13).

use std::collections::HashMap;

use zerocopy::{FromZeros, Immutable, IntoBytes};

use super::blobwriter::{Chunk, FEATURES, FinishedBlob};
use super::chunk::{Content, Settings};
use super::error::{BuildError, Limit};
use super::layout::{self, Layout, MAX_METADATA, Place};
use super::tree::{Kind, Meta, NodeId, Tree};
use super::xattr;
use crate::base::{BLOCK, BlobId};
use crate::format::erofs::{self, ChunkIndex, DeviceSlot, Dirent, InodeExtended, Superblock, XattrEntry, XattrHead};
use crate::format::rafs::{self, BlobEntry, ChunkRecord, ExtSuperblock, chunk_flags, flags};

/// The blob's number: a build makes at most one.
const BLOB: u8 = 0;
/// Where the reference builder starts each device in the flat address space: on 512 KiB.
const FLAT_ALIGNMENT: u64 = 0x8_0000;

/// Everything a bootstrap is made of.
#[derive(Debug)]
pub(super) struct Bootstrap<'a> {
    pub tree: &'a Tree,
    pub layout: &'a Layout,
    pub blob: Option<&'a FinishedBlob>,
    /// The chunk of the blob that each cut became.
    pub chunk_of_cut: &'a [u32],
    pub settings: Settings,
}

impl Bootstrap<'_> {
    /// The whole file.
    ///
    /// # Errors
    /// If it would be larger than readers accept, or if what is written is not what was laid out.
    pub(super) fn bytes(&self) -> Result<Vec<u8>, BuildError> {
        let blobs = u64::from(self.blob.is_some());
        let blob_table = (rafs::DEVICE_TABLE_OFFSET + size_of::<DeviceSlot>() as u64 * blobs).next_multiple_of(BLOCK);
        let meta = match self.blob {
            Some(_) => (blob_table + size_of::<BlobEntry>() as u64).next_multiple_of(BLOCK),
            None => 0,
        };
        let records = self.chunk_records();
        let chunk_table = meta + self.layout.len;
        let len = (chunk_table + records.as_bytes().len() as u64).next_multiple_of(BLOCK);
        if len > MAX_METADATA {
            return Err(BuildError::Limit(Limit::Metadata));
        }
        let mut out = Pages::new(len, meta);
        out.put(erofs::SUPERBLOCK_OFFSET, &self.superblock(meta))?;
        let mut ext = ExtSuperblock::new_zeroed();
        ext.flags = self.flags().into();
        ext.blob_table_offset = blob_table.into();
        ext.blob_table_size = (u32::from(self.blob.is_some()) * 256).into();
        ext.chunk_size = self.settings.chunk_size.into();
        ext.chunk_table_offset = chunk_table.into();
        ext.chunk_table_size = (records.as_bytes().len() as u64).into();
        out.put(rafs::EXT_SUPERBLOCK_OFFSET, &ext)?;
        if let Some(blob) = self.blob {
            out.put(rafs::DEVICE_TABLE_OFFSET, &device_slot(blob, len))?;
            out.put(blob_table, &self.blob_entry(blob))?;
        }
        self.nodes(&mut out)?;
        out.put(chunk_table, records.as_slice())?;
        Ok(out.bytes)
    }

    fn superblock(&self, meta: u64) -> Superblock {
        let mut sb = Superblock::new_zeroed();
        sb.magic = erofs::MAGIC.into();
        sb.feature_compat = erofs::COMPAT_RAFS_V6.into();
        sb.blkszbits = 12;
        sb.root_nid = u16::try_from(self.layout.place(NodeId::ROOT).nid()).expect("the root is placed first").into();
        sb.inos = u64::from(self.layout.names).into();
        sb.blocks = block_number(self.blob.map_or(0, |blob| blob.decoded_bytes)).into();
        sb.meta_blkaddr = block_number(meta).into();
        sb.feature_incompat = (erofs::INCOMPAT_CHUNKED_FILE | erofs::INCOMPAT_DEVICE_TABLE).into();
        sb.extra_devices = u16::from(self.blob.is_some()).into();
        sb.devt_slotoff = erofs::DEVICE_TABLE_SLOT.into();
        sb
    }

    fn flags(&self) -> u64 {
        let mut bits = self.settings.compression.algorithm().flag() | self.settings.digest.flag();
        bits |= flags::EXPLICIT_UID_GID | flags::ENCRYPTION_NONE;
        if self.layout.has_xattrs {
            bits |= flags::HAS_XATTR;
        }
        // True of every blob when there is none.
        if self.blob.is_none() {
            bits |= flags::INLINED_CHUNK_DIGEST;
        }
        bits
    }

    fn blob_entry(&self, blob: &FinishedBlob) -> BlobEntry {
        let mut entry = BlobEntry::new_zeroed();
        entry.id = tag(&blob.id);
        entry.index = u32::from(BLOB).into();
        entry.chunk_size = self.settings.chunk_size.into();
        entry.chunk_count = u32::try_from(blob.chunks.len()).expect("24 bits").into();
        entry.compression = self.settings.compression.algorithm().number().into();
        entry.digest = self.settings.digest.number().into();
        entry.features = FEATURES.into();
        entry.compressed_size = blob.stored_bytes.into();
        entry.uncompressed_size = blob.decoded_bytes.into();
        entry.ci_compression = blob.table.algorithm.number().into();
        entry.ci_offset = blob.table.offset.into();
        entry.ci_compressed_size = blob.table.stored_len.into();
        entry.ci_uncompressed_size = blob.table.plain_len.into();
        entry
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
                let indexes: Vec<ChunkIndex> = self.chunks(content).map(|(n, chunk)| chunk_index(n, chunk)).collect();
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

    /// The chunks of a file with their numbers, in file order.
    fn chunks(&self, content: &Content) -> impl Iterator<Item = (u32, &Chunk)> {
        content.cuts().map(|cut| {
            let number = self.chunk_of_cut[usize::try_from(cut).expect("cuts are counted in memory")];
            (number, &self.blob.expect("a chunk lies in a blob").chunks[number as usize])
        })
    }

    /// `i_u` of a regular file: indexes, and the chunk size in blocks as a power of two. A file
    /// whose chunks lie one after the other is declared as one large chunk, which lets the kernel
    /// map it in one step (`rafs-v6.md` section 12).
    fn chunk_format(&self, content: &Content) -> u32 {
        let chunk_size = u64::from(self.settings.chunk_size);
        let mut expected = None;
        let contiguous = self.chunks(content).all(|(_, chunk)| {
            let follows = expected.is_none_or(|at| at == chunk.decoded_offset);
            expected = Some(chunk.decoded_offset + chunk_size);
            follows
        });
        let mut bytes = chunk_size;
        if contiguous && content.size > chunk_size {
            bytes = content.size.next_power_of_two();
        }
        let exponent = bytes.ilog2() - BLOCK.ilog2();
        erofs::CHUNK_FORMAT_INDEXES | exponent
    }

    /// One record for each chunk that a file of the tree uses, sorted by digest.
    fn chunk_records(&self) -> Vec<ChunkRecord> {
        let Some(blob) = self.blob else { return Vec::new() };
        let mut file_offsets = vec![None; blob.chunks.len()];
        let walked = self.tree.walk(|id| {
            if let Kind::Regular(content) = &self.tree.node(id).kind {
                for (position, (number, _)) in self.chunks(content).enumerate() {
                    file_offsets[number as usize] = Some(position as u64 * u64::from(self.settings.chunk_size));
                }
            }
            Ok::<(), std::convert::Infallible>(())
        });
        let Ok(()) = walked;
        let used = blob.chunks.iter().zip(file_offsets).enumerate();
        let mut records: Vec<ChunkRecord> = used
            .filter_map(|(number, (chunk, file_offset))| {
                let number = u32::try_from(number).expect("24 bits");
                file_offset.map(|file_offset| chunk_record(number, chunk, file_offset))
            })
            .collect();
        // Chunks of one blob differ in digest or length, and equal digests mean equal bytes.
        records.sort_unstable_by_key(|record| record.digest);
        records
    }
}

const BLOCK_LEN: usize = 4096;

fn chunk_index(number: u32, chunk: &Chunk) -> ChunkIndex {
    ChunkIndex::new(BLOB, number, block_number(chunk.decoded_offset))
}

fn chunk_record(number: u32, chunk: &Chunk, file_offset: u64) -> ChunkRecord {
    let mut record = ChunkRecord::new_zeroed();
    record.digest = chunk.digest.0;
    record.blob_index = u32::from(BLOB).into();
    let mut bits = 0;
    if chunk.stored_len < chunk.plain_len {
        bits |= chunk_flags::COMPRESSED;
    }
    // Readers take a flagged checksum of 0 for damage.
    if chunk.crc32c != 0 {
        bits |= chunk_flags::HAS_CRC32;
    }
    record.flags = bits.into();
    record.compressed_size = chunk.stored_len.into();
    record.uncompressed_size = chunk.plain_len.into();
    record.compressed_offset = chunk.stored_offset.into();
    record.uncompressed_offset = chunk.decoded_offset.into();
    record.file_offset = file_offset.into();
    record.index = number.into();
    record.crc32 = chunk.crc32c.into();
    record
}

fn device_slot(blob: &FinishedBlob, bootstrap_len: u64) -> DeviceSlot {
    let mut slot = DeviceSlot::new_zeroed();
    slot.tag = tag(&blob.id);
    slot.blocks = block_number(blob.decoded_bytes).into();
    slot.mapped_blkaddr = block_number(bootstrap_len.next_multiple_of(FLAT_ALIGNMENT)).into();
    slot
}

fn tag(id: &BlobId) -> [u8; 64] {
    let mut tag = [0; 64];
    tag[..id.as_str().len()].copy_from_slice(id.as_str().as_bytes());
    tag
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
