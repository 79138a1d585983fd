//! One thing of an image as facts: the image itself, an inode, a blob or a chunk.

use std::ops::ControlFlow;

use serde::Serialize;

use crate::base::hex;
use crate::format::erofs::HOLE;
use crate::format::rafs::{Algorithm, ChunkRecord, DigestAlgorithm};
use crate::image::dump::feature_names;
use crate::image::{Image, ImageError, Inode, Kind, Nid, RecordIndex};

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Image,
    /// The inode at a path.
    Path(Vec<u8>),
    /// The inode with a number.
    Nid(Nid),
    /// The blob with an id, or with a number.
    Blob(String),
    /// A chunk by the number of its blob and its ordinal there.
    Chunk(u32, u32),
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Facts {
    Image(ImageFacts),
    Inode(InodeFacts),
    Blob(BlobFacts),
    Chunk(ChunkFacts),
}

#[derive(Clone, Debug, Serialize)]
pub struct ImageFacts {
    /// Version of the format; of RAFS v5 all else is said of what the image was lifted to.
    pub format: &'static str,
    pub bootstrap_bytes: u64,
    pub block_size: u64,
    pub chunk_size: u32,
    pub flags: u64,
    pub paths: u64,
    pub root: u64,
    /// Records of the chunk table.
    pub chunk_records: u64,
    pub prefetch: Vec<Nid>,
    pub blobs: Vec<BlobFacts>,
}

#[derive(Clone, Debug, Serialize)]
pub struct InodeFacts {
    pub nid: Nid,
    pub kind: &'static str,
    /// Permission bits in octal.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub links: u32,
    pub seconds: i64,
    pub nanoseconds: u32,
    /// Of character and block devices.
    pub device: Option<u32>,
    /// Of symbolic links; what is not printable is escaped.
    pub target: Option<String>,
    pub xattrs: Vec<XattrFacts>,
    pub chunks: Vec<PieceFacts>,
    /// Names in a directory, without the two dots.
    pub entries: Vec<EntryFacts>,
}

#[derive(Clone, Debug, Serialize)]
pub struct XattrFacts {
    /// What is not printable is escaped, here and in the value.
    pub name: String,
    pub value: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct EntryFacts {
    pub name: String,
    pub nid: Nid,
}

/// A piece of a file.
#[derive(Clone, Debug, Serialize)]
pub struct PieceFacts {
    /// Position in the file.
    pub at: u64,
    pub bytes: u64,
    /// `None` for a hole.
    pub blob: Option<u32>,
    pub chunk: u32,
    /// Position in the device.
    pub decoded_at: u64,
    /// Digest in the chunk table, if it is there.
    pub digest: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct BlobFacts {
    pub index: u64,
    pub id: String,
    pub compression: String,
    pub digest: String,
    pub features: String,
    pub chunks: u32,
    pub stored_bytes: u64,
    pub decoded_bytes: u64,
    pub tables_at: u64,
    pub tables_stored_bytes: u64,
    pub tables_plain_bytes: u64,
    pub is_encrypted: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct ChunkFacts {
    pub blob: u32,
    pub chunk: u32,
    pub digest: String,
    pub flags: u32,
    pub crc32c: u32,
    pub stored_at: u64,
    pub stored_bytes: u32,
    pub decoded_at: u64,
    pub decoded_bytes: u32,
    /// Files that use it, the first [`MAX_USERS`].
    pub users: Vec<String>,
}

/// Files that are named as users of a chunk.
pub const MAX_USERS: usize = 100;

/// Why there is nothing to show.
#[derive(Clone, Debug, thiserror::Error)]
pub enum InspectError {
    #[error("the image has no {0}")]
    Missing(String),
    #[error("the image is damaged there")]
    Image(#[from] ImageError),
}

/// Finds what is known of `subject`.
pub fn inspect(image: &Image, subject: &Subject) -> Result<Facts, InspectError> {
    let missing = |what: String| InspectError::Missing(what);
    Ok(match subject {
        Subject::Image => Facts::Image(image_facts(image)),
        Subject::Nid(nid) => Facts::Inode(inode_facts(image, &image.inode(*nid)?)?),
        Subject::Path(path) => {
            let inode = image.lookup(path)?.ok_or_else(|| missing(format!("path {}", path.escape_ascii())))?;
            Facts::Inode(inode_facts(image, &inode)?)
        }
        Subject::Blob(name) => {
            let blobs = (0..image.devices().len()).map(|index| blob_facts(image, index));
            let mut named = blobs.filter(|blob| blob.id == *name || blob.index.to_string() == *name);
            Facts::Blob(named.next().ok_or_else(|| missing(format!("blob {name}")))?)
        }
        Subject::Chunk(blob, chunk) => {
            let is_it = |row: &&ChunkRecord| row.blob_index.get() == *blob && row.index.get() == *chunk;
            let row = image.chunk_records().iter().find(is_it);
            let row = row.ok_or_else(|| missing(format!("record of chunk {chunk} of blob {blob}")))?;
            Facts::Chunk(chunk_facts(image, row)?)
        }
    })
}

fn image_facts(image: &Image) -> ImageFacts {
    let summary = image.summary();
    ImageFacts {
        format: summary.origin.name(),
        bootstrap_bytes: summary.bootstrap_len,
        block_size: summary.block_size,
        chunk_size: summary.chunk_size,
        flags: summary.flags,
        paths: summary.paths,
        root: summary.root,
        chunk_records: image.chunk_records().len() as u64,
        prefetch: image.prefetch().collect(),
        blobs: (0..image.devices().len()).map(|index| blob_facts(image, index)).collect(),
    }
}

fn blob_facts(image: &Image, index: usize) -> BlobFacts {
    let device = &image.devices()[index];
    let entry = &device.entry;
    let number = |name: Option<&'static str>, number: u32| name.map_or_else(|| number.to_string(), str::to_owned);
    let (compression, digest) = (entry.compression.get(), entry.digest.get());
    BlobFacts {
        index: index as u64,
        id: device.blob.to_string(),
        compression: number(Algorithm::from_number(compression).map(Algorithm::name), compression),
        digest: number(DigestAlgorithm::from_number(digest).map(DigestAlgorithm::name), digest),
        features: feature_names(entry.features.get()),
        chunks: entry.chunk_count.get(),
        stored_bytes: entry.compressed_size.get(),
        decoded_bytes: entry.uncompressed_size.get(),
        tables_at: entry.ci_offset.get(),
        tables_stored_bytes: entry.ci_compressed_size.get(),
        tables_plain_bytes: entry.ci_uncompressed_size.get(),
        is_encrypted: entry.cipher.get() != 0,
    }
}

fn inode_facts(image: &Image, inode: &Inode) -> Result<InodeFacts, ImageError> {
    let mut xattrs = Vec::new();
    image.xattrs(inode, &mut |xattr| {
        let text = |bytes: &[u8]| bytes.escape_ascii().to_string();
        xattrs.push(XattrFacts { name: text(&xattr.name()), value: text(xattr.value) });
        ControlFlow::Continue(())
    })?;
    let mut entries = Vec::new();
    if inode.kind == Kind::Directory {
        image.list(inode, &mut |entry| {
            if !entry.is_dot() {
                entries.push(EntryFacts { name: entry.name.escape_ascii().to_string(), nid: entry.nid });
            }
            ControlFlow::Continue(())
        })?;
    }
    let is_link = inode.kind == Kind::Symlink;
    Ok(InodeFacts {
        nid: inode.nid,
        kind: inode.kind.name(),
        mode: format!("{:04o}", inode.permissions),
        uid: inode.uid,
        gid: inode.gid,
        size: inode.size,
        links: inode.nlink,
        seconds: inode.mtime.0,
        nanoseconds: inode.mtime.1,
        device: matches!(inode.kind, Kind::Character | Kind::Block).then_some(inode.rdev),
        target: is_link.then(|| image.symlink(inode)).transpose()?.map(|target| target.escape_ascii().to_string()),
        xattrs,
        chunks: pieces(image, inode)?,
        entries,
    })
}

fn pieces(image: &Image, inode: &Inode) -> Result<Vec<PieceFacts>, ImageError> {
    let records = RecordIndex::new(image);
    let size = u64::from(image.summary().chunk_size);
    let rows = (0u64..).zip(image.chunk_indexes(inode)?);
    let facts = rows.map(|(number, row)| PieceFacts {
        at: number * size,
        bytes: size.min(inode.size - number * size),
        blob: row.blob().filter(|_| row.blkaddr.get() != HOLE).map(u32::from),
        chunk: row.index(),
        decoded_at: u64::from(row.blkaddr.get()) * image.summary().block_size,
        digest: records.find(row).map(|found| hex(&image.chunk_records()[found].digest)),
    });
    Ok(facts.collect())
}

fn chunk_facts(image: &Image, row: &ChunkRecord) -> Result<ChunkFacts, ImageError> {
    let (blob, chunk) = (row.blob_index.get(), row.index.get());
    let mut users = Vec::new();
    // Chunk arrays that lie over each other would be searched without end.
    let mut budget = image.summary().bootstrap_len / 8;
    for entry in image.walk() {
        let entry = entry?;
        let rows = image.chunk_indexes(&entry.inode)?;
        budget = budget
            .checked_sub(rows.len() as u64)
            .ok_or(ImageError::Tree("has more chunks than the bootstrap can hold"))?;
        if rows.iter().any(|row| row.blob().map(u32::from) == Some(blob) && row.index() == chunk) {
            users.push(format!("/{}", entry.path.escape_ascii()));
        }
        if users.len() == MAX_USERS {
            break;
        }
    }
    Ok(ChunkFacts {
        blob,
        chunk,
        digest: hex(&row.digest),
        flags: row.flags.get(),
        crc32c: row.crc32.get(),
        stored_at: row.compressed_offset.get(),
        stored_bytes: row.compressed_size.get(),
        decoded_at: row.uncompressed_offset.get(),
        decoded_bytes: row.uncompressed_size.get(),
        users,
    })
}
