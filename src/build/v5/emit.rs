//! A bootstrap as bytes: the superblock, the tables and the records, one behind the other.

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::Source;
use super::digest::digests;
use super::layout::{self, Layout, Path, align, index, xattr_bytes};
use crate::base::{BLOCK, BlobId, Digest};
use crate::build::error::{BuildError, Limit};
use crate::build::prefetch::PrefetchHints;
use crate::build::tree::{Kind, Meta};
use crate::format::erofs::MAX_DEVICES;
use crate::format::rafs::flags;
use crate::format::rafs5::{self, BlobHead, ExtendedBlob, Inode, Superblock, XattrHead, XattrPair, inode_flags};

impl Source<'_> {
    /// The whole bootstrap.
    ///
    /// # Errors
    /// If it would be larger than readers accept, or if what is written is not what was laid out.
    pub(in crate::build) fn bytes(&self) -> Result<Vec<u8>, BuildError> {
        // What is mounted through EROFS has no more.
        if self.blobs.len() > MAX_DEVICES {
            return Err(BuildError::Limit(Limit::Blobs));
        }
        let ids: Vec<&[u8]> = self.blobs.iter().map(|blob| id(&blob.id)).collect();
        let id_lens: Vec<usize> = ids.iter().map(|id| id.len()).collect();
        // Without blobs there is nothing to fetch.
        let prefetch = if self.blobs.is_empty() { &[] } else { self.prefetch };
        let layout = layout::layout(self.tree, self.facts.chunk_size, prefetch.len(), &id_lens)?;
        let head = self.head.map_or(0, |hints| self.head_bytes(&layout, hints));

        let mut out = File::of_length(layout.len);
        out.put(&self.superblock(&layout, prefetch.len()));
        out.begin(layout.tables.inodes)?;
        for path in &layout.paths {
            let row = rafs5::inode_row(path.at).ok_or(BuildError::Layout { at: path.at })?;
            out.put(&U32::from(row));
        }
        out.begin(layout.tables.prefetch)?;
        prefetch.iter().for_each(|node| out.put(&U32::from(layout.ino(*node))));
        out.begin(layout.tables.blobs)?;
        for (number, id) in ids.iter().enumerate() {
            if number > 0 {
                out.put(&0u8);
            }
            out.put(&BlobHead { prefetch_offset: 0.into(), prefetch_size: head.into() });
            out.put(*id);
        }
        out.begin(layout.tables.extended)?;
        for blob in self.blobs {
            let mut row = ExtendedBlob::new_zeroed();
            row.chunk_count = blob.chunk_count;
            row.features = blob.features;
            row.uncompressed_size = blob.uncompressed_size;
            row.compressed_size = blob.compressed_size;
            out.put(&row);
        }
        let digests = digests(self, &layout);
        for &at in &layout.order {
            self.record(&mut out, &layout, at, digests[at])?;
        }
        out.begin(layout.len)?;
        Ok(out.bytes)
    }

    fn superblock(&self, layout: &Layout<'_>, prefetch: usize) -> Superblock {
        let entries = |count: usize| u32::try_from(count).expect("a bootstrap has at most 2 GiB");
        let tables = layout.tables;
        let mut sb = Superblock::new_zeroed();
        sb.magic = rafs5::MAGIC.into();
        sb.version = rafs5::VERSION.into();
        sb.superblock_len = rafs5::SUPERBLOCK_LEN.into();
        sb.chunk_size = self.facts.chunk_size.into();
        let mut bits = self.facts.compression.flag() | self.facts.digest.flag();
        if self.facts.explicit_ids {
            bits |= flags::EXPLICIT_UID_GID;
        }
        if layout.has_xattrs || self.facts.claim_xattrs {
            bits |= flags::HAS_XATTR;
        }
        sb.flags = bits.into();
        sb.inodes = u64::from(layout.inodes).into();
        sb.inode_table_offset = tables.inodes.into();
        sb.inode_table_entries = entries(layout.paths.len()).into();
        sb.prefetch_table_offset = tables.prefetch.into();
        sb.prefetch_table_entries = entries(prefetch).into();
        sb.blob_table_offset = tables.blobs.into();
        sb.blob_table_size = u32::try_from(tables.extended - tables.blobs).expect("at most 254 rows").into();
        sb.extended_blob_table_offset = tables.extended.into();
        sb.extended_blob_table_entries = entries(self.blobs.len()).into();
        sb
    }

    /// Bytes at the head of the blob that hold the data of hinted files.
    fn head_bytes(&self, layout: &Layout<'_>, hints: &PrefetchHints) -> u32 {
        let mut end = 0;
        for path in &layout.paths {
            let Kind::Regular(content) = &self.tree.node(path.node).kind else { continue };
            if hints.position(&names(layout, path)).is_some() {
                let ends = self.chunks(content).map(|chunk| chunk.stored_offset + u64::from(chunk.stored_len));
                end = ends.fold(end, u64::max);
            }
        }
        // It is advice. What does not fit in the field is at least well begun.
        u32::try_from(end).unwrap_or(u32::MAX)
    }

    /// Appends the record of a path with everything that belongs to it.
    fn record(&self, out: &mut File, layout: &Layout<'_>, at: usize, digest: Digest) -> Result<(), BuildError> {
        let path = &layout.paths[at];
        let (node, meta) = (self.tree.node(path.node), &self.tree.node(path.node).meta);
        out.begin(path.at)?;
        let mut inode = Inode::new_zeroed();
        inode.digest = digest.0;
        inode.parent = u64::from(path.parent).into();
        inode.ino = u64::from(path.ino).into();
        (inode.uid, inode.gid) = (meta.uid.into(), meta.gid.into());
        inode.mode = (node.kind.in_images().type_bits() | u32::from(meta.permissions)).into();
        inode.nlink = path.links.into();
        inode.child_index = path.first_child.into();
        inode.child_count = path.children.into();
        let fits = |len: usize| u16::try_from(len).map_err(|_| BuildError::Layout { at: path.at });
        inode.name_size = fits(path.name.len())?.into();
        inode.mtime = meta.mtime.cast_unsigned().into();
        inode.mtime_nsec = meta.mtime_nsec.into();
        let mut bits = if meta.xattrs.is_empty() { 0 } else { inode_flags::XATTR };
        let mut size = 0;
        let mut target: &[u8] = &[];
        match &node.kind {
            Kind::Directory(_) => size = directory_size(layout, path),
            Kind::Symlink(text) => {
                target = text;
                size = text.len() as u64;
                bits |= inode_flags::SYMLINK;
            }
            Kind::Regular(content) => {
                size = content.size;
                let chunks = content.size.div_ceil(self.facts.chunk_size.into());
                inode.child_count = u32::try_from(chunks).map_err(|_| BuildError::Layout { at: path.at })?.into();
            }
            Kind::Character(device) | Kind::Block(device) => inode.rdev = (*device).into(),
            Kind::Fifo | Kind::Socket => {}
        }
        inode.symlink_size = fits(target.len())?.into();
        inode.size = size.into();
        inode.blocks = (size + align(xattr_bytes(meta))).div_ceil(SECTOR).into();
        inode.flags = bits.into();
        out.put(&inode);
        out.put_padded(path.name);
        out.put_padded(target);
        xattrs(out, meta);
        if let Kind::Regular(content) = &node.kind {
            for (number, chunk) in (0u64..).zip(self.chunks(content)) {
                out.put(&chunk.record(number * u64::from(self.facts.chunk_size)));
            }
        }
        Ok(())
    }
}

/// What `i_blocks` counts, in bytes.
const SECTOR: u64 = 512;
/// What other builders take an entry of a directory for, without its name.
const ENTRY: u64 = 8;

/// A size for a directory, which has none: a function of its names, so that it is the same everywhere.
fn directory_size(layout: &Layout<'_>, path: &Path<'_>) -> u64 {
    let first = index(path.first_child - 1);
    let children = &layout.paths[first..first + index(path.children)];
    let bytes: u64 = children.iter().map(|child| child.name.len() as u64 + ENTRY).sum();
    bytes.next_multiple_of(BLOCK).max(BLOCK)
}

/// The names from the root to a path.
fn names<'t>(layout: &Layout<'t>, path: &Path<'t>) -> Vec<&'t [u8]> {
    let mut names = Vec::new();
    let mut path = path;
    while path.parent != 0 {
        names.push(path.name);
        path = &layout.paths[index(path.parent - 1)];
    }
    names.reverse();
    names
}

/// The xattrs of an inode; nothing if it has none.
fn xattrs(out: &mut File, meta: &Meta) {
    if meta.xattrs.is_empty() {
        return;
    }
    out.put(&XattrHead { content_size: xattr_bytes(meta).into() });
    for (name, value) in &meta.xattrs {
        let size = u32::try_from(name.len() + 1 + value.len()).expect("checked when it was collected");
        out.put(&XattrPair { size: size.into() });
        out.put(&**name);
        out.put(&0u8);
        out.put(&**value);
    }
    out.pad();
}

/// Writes the id of the blob that had none, and holds the bootstrap, into its row of the blob table.
pub(in crate::build) fn name_blob(bootstrap: &mut [u8], unnamed: &[u8], id: &BlobId) {
    let Ok((sb, _)) = Superblock::ref_from_prefix(bootstrap) else { return };
    let (start, size) = (sb.blob_table_offset.get(), index(sb.blob_table_size.get()));
    let table = &mut bootstrap[usize::try_from(start).expect("at most 2 GiB")..][..size];
    if let Some(at) = table.windows(unnamed.len()).position(|field| field == unnamed) {
        table[at..at + unnamed.len()].copy_from_slice(&id.to_padded()[..unnamed.len()]);
    }
}

/// A blob id without the padding of its field.
fn id(field: &[u8; BlobId::MAX_LEN]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The file as far as it is written.
struct File {
    bytes: Vec<u8>,
}

impl File {
    fn of_length(len: u64) -> Self {
        Self { bytes: Vec::with_capacity(usize::try_from(len).expect("at most 2 GiB")) }
    }

    fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, value: &T) {
        self.bytes.extend_from_slice(value.as_bytes());
    }

    /// Zeros up to the next place where something may start.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }

    fn put_padded(&mut self, bytes: &[u8]) {
        self.put(bytes);
        self.pad();
    }

    /// Ends what came before, if what comes now was laid out at byte `at`.
    fn begin(&mut self, at: u64) -> Result<(), BuildError> {
        self.pad();
        if self.bytes.len() as u64 == at { Ok(()) } else { Err(BuildError::Layout { at }) }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "it is 8")]
const ALIGN: usize = rafs5::ALIGN as usize;
