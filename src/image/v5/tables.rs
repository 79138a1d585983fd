//! Superblock, inode, prefetch and blob tables.

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::error::Table;
use super::{Bootstrap, BootstrapError, Summary};
use crate::base::{BlobId, ByteRange};
use crate::format::blobfile::features;
use crate::format::rafs::flags;
use crate::format::rafs5::{self, BlobHead, ExtendedBlob, Superblock};
use crate::format::{array_at, record_at};

/// One blob as a bootstrap describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    pub id: BlobId,
    /// Bytes at the head of the blob that are wanted first.
    pub prefetch_size: u32,
    /// `None` if the image is too old to tell.
    pub extent: Option<Extent>,
    /// [`features`], those with a meaning.
    pub features: u32,
}

/// How much there is of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Chunks, whether a file uses them or not.
    pub chunks: u32,
    /// Plain bytes.
    pub decoded_len: u64,
    /// As the image says it.
    pub stored_len: u64,
    /// Stored chunks lie below this byte of the blob file.
    pub data_end: u64,
}

/// What stands for the name of a blob that did not exist yet.
const UNNAMED: [u8; BlobId::MAX_LEN] = [b'x'; BlobId::MAX_LEN];
/// Largest stored blob, and longest decoded one, in bytes (`build-rules.md` section 9).
const MAX_STORED: u64 = 1 << 40;
const MAX_DECODED: u64 = 1 << 44;
/// Most chunks of a blob.
const MAX_CHUNKS: u32 = 0xff_ffff;
/// Bytes of a tar header behind the data of a blob.
const TAR_HEADER: u64 = 512;

impl Blob {
    /// Whether it is still called what a blob is called before it exists.
    pub fn is_unnamed(&self) -> bool {
        self.id.as_str().as_bytes() == UNNAMED
    }

    /// Whether its builder was new enough to leave the name to be filled in.
    pub(super) fn names_itself(&self) -> bool {
        self.features & features::CAP_TAR_TOC != 0
    }
}

pub(super) fn parse(bytes: &[u8]) -> Result<Bootstrap<'_>, BootstrapError> {
    let field = |field, value: u64| BootstrapError::Field { field, value };
    if !super::is_bootstrap(bytes) {
        return Err(BootstrapError::Magic);
    }
    let version = record_at::<U32>(bytes, 4, "version")?.get();
    if version != rafs5::VERSION {
        return Err(BootstrapError::Version(version));
    }
    let sb: &Superblock = record_at(bytes, 0, "superblock")?;
    let len = bytes.len() as u64;
    if sb.superblock_len.get() != rafs5::SUPERBLOCK_LEN {
        return Err(field("superblock size", sb.superblock_len.get().into()));
    }
    if len > rafs5::MAX_LEN || !len.is_multiple_of(rafs5::ALIGN) {
        return Err(field("bootstrap length", len));
    }
    let chunk_size = sb.chunk_size.get();
    if !chunk_size.is_power_of_two() || !(0x1000..=0x100_0000).contains(&chunk_size) {
        return Err(field("chunk size", chunk_size.into()));
    }
    let set = sb.flags.get();
    if set & !rafs5::FLAGS_KNOWN != 0 {
        return Err(field("flags", set));
    }
    let entries = sb.inode_table_entries.get();
    if entries == 0 {
        return Err(field("number of inode table entries", 0));
    }
    if sb.inodes.get() > entries.into() {
        return Err(field("number of inodes", sb.inodes.get()));
    }
    check_places(sb, len)?;
    let (compression, digest) = Summary::algorithms(set);
    let summary = Summary {
        chunk_size,
        compression,
        digest,
        explicit_ids: set & flags::EXPLICIT_UID_GID != 0,
        has_xattrs: set & flags::HAS_XATTR != 0,
        inodes: sb.inodes.get(),
    };
    let prefetch_entries = sb.prefetch_table_entries.get();
    // The place of an empty table means nothing.
    let prefetch_at = if prefetch_entries == 0 { 0 } else { sb.prefetch_table_offset.get() };
    Ok(Bootstrap {
        bytes,
        summary,
        inode_table: array_at(bytes, sb.inode_table_offset.get(), entries.into(), "inode table")?,
        prefetch_table: array_at(bytes, prefetch_at, prefetch_entries.into(), "prefetch table")?,
        blobs: blobs(bytes, sb)?,
    })
}

/// Fails unless all tables lie in the file, behind the superblock and apart from each other.
fn check_places(sb: &Superblock, len: u64) -> Result<(), BootstrapError> {
    let tables = [
        (Table::Inodes, sb.inode_table_offset.get(), u64::from(sb.inode_table_entries.get()) * 4),
        (Table::Prefetch, sb.prefetch_table_offset.get(), u64::from(sb.prefetch_table_entries.get()) * 4),
        (Table::Blobs, sb.blob_table_offset.get(), sb.blob_table_size.get().into()),
        (
            Table::ExtendedBlobs,
            sb.extended_blob_table_offset.get(),
            u64::from(sb.extended_blob_table_entries.get()) * size_of::<ExtendedBlob>() as u64,
        ),
    ];
    let mut before: Vec<(Table, ByteRange)> = Vec::new();
    for (table, at, size) in tables.into_iter().filter(|(.., size)| *size > 0) {
        let wrong = |rule| BootstrapError::Place { table, at, len: size, rule };
        if !at.is_multiple_of(rafs5::ALIGN) {
            return Err(wrong("does not start at a multiple of 8"));
        }
        let range = ByteRange::at(at, size).filter(|range| range.end() <= len);
        let range = range.ok_or(wrong("does not lie in the file"))?;
        if at < rafs5::SUPERBLOCK_LEN.into() {
            return Err(wrong("lies in the superblock"));
        }
        if let Some((first, _)) = before.iter().find(|(_, other)| other.overlaps(range)) {
            return Err(BootstrapError::Overlap { first: *first, second: table });
        }
        before.push((table, range));
    }
    Ok(())
}

fn blobs(bytes: &[u8], sb: &Superblock) -> Result<Vec<Blob>, BootstrapError> {
    let size = u64::from(sb.blob_table_size.get());
    let at = if size == 0 { 0 } else { sb.blob_table_offset.get() };
    let mut rest: &[u8] = array_at(bytes, at, size, "blob table")?;
    let count = sb.extended_blob_table_entries.get();
    let at = if count == 0 { 0 } else { sb.extended_blob_table_offset.get() };
    let extended: &[ExtendedBlob] = array_at(bytes, at, count.into(), "extended blob table")?;
    let mut blobs = Vec::new();
    // What is shorter than a head and an id is padding.
    while rest.len() > size_of::<BlobHead>() {
        let index = blobs.len();
        let (head, tail) = BlobHead::ref_from_prefix(rest).expect("longer than a head");
        let id_len = tail.iter().position(|&byte| byte == 0).unwrap_or(tail.len());
        let id = String::from_utf8_lossy(&tail[..id_len]).parse();
        let id = id.map_err(|cause| BootstrapError::BlobId { index, cause })?;
        rest = &tail[(id_len + 1).min(tail.len())..];
        let mut blob = Blob { id, prefetch_size: head.prefetch_size.get(), extent: None, features: 0 };
        if count > 0 {
            let row = extended.get(index);
            let few = BootstrapError::Field { field: "number of extended blob table entries", value: count.into() };
            describe(&mut blob, index, row.ok_or(few)?)?;
        }
        blobs.push(blob);
    }
    Ok(blobs)
}

/// Adds what the extended table says of a blob.
fn describe(blob: &mut Blob, index: usize, row: &ExtendedBlob) -> Result<(), BootstrapError> {
    let impossible = |field, value| BootstrapError::Blob { index, field, value };
    let set = row.features.get();
    let kinds = [
        (features::EXTERNAL, "an external object"),
        (features::ENCRYPTED, "encrypted"),
        (features::BATCH, "a blob with batches"),
        (features::ZRAN | features::SEPARATE, "an index into a foreign layer"),
        (features::TARFS, "a plain tar layer"),
    ];
    if let Some((_, kind)) = kinds.into_iter().find(|(bits, _)| set & bits != 0) {
        return Err(BootstrapError::Unsupported { index, kind });
    }
    let (chunks, decoded_len, stored_len) =
        (row.chunk_count.get(), row.uncompressed_size.get(), row.compressed_size.get());
    if chunks > MAX_CHUNKS {
        return Err(impossible("number of chunks", chunks.into()));
    }
    if decoded_len > MAX_DECODED {
        return Err(impossible("decoded size", decoded_len));
    }
    if stored_len > MAX_STORED || stored_len == 0 && chunks > 0 {
        return Err(impossible("stored size", stored_len));
    }
    let is_framed = set & features::CAP_TAR_TOC != 0 && set & features::HAS_TAR_HEADER != 0;
    let data_end = stored_len.checked_sub(if is_framed { TAR_HEADER } else { 0 });
    let data_end = data_end.ok_or(impossible("stored size", stored_len))?;
    blob.extent = Some(Extent { chunks, decoded_len, stored_len, data_end });
    // Unknown bits mean nothing (`rafs-v5.md` section 5).
    blob.features = set & features::KNOWN;
    Ok(())
}
