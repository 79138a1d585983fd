//! What images are made of, and what several of them have in common.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Serialize;

use crate::format::erofs::HOLE;
use crate::image::{Image, ImageError, Kind, RecordIndex};

/// What is in a list of images.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub images: Vec<ImageStat>,
    /// Of every two images; empty for a single one.
    pub pairs: Vec<Shared>,
    /// Of all images together; `None` for a single one.
    pub total: Option<Total>,
}

/// Numbers of one image.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageStat {
    pub name: String,
    /// Version of the format; of RAFS v5 metadata is counted as what the image was lifted to.
    pub format: &'static str,
    pub bootstrap_bytes: u64,
    /// Number of inodes by kind.
    pub inodes: BTreeMap<&'static str, u64>,
    pub paths: u64,
    /// Bytes of all files, each inode once, holes included.
    pub file_bytes: u64,
    pub hole_bytes: u64,
    /// Bytes of directories and link targets, as their inodes have it. Such sums stop at 2^64 - 1.
    pub directory_bytes: u64,
    pub symlink_bytes: u64,
    /// Bytes of xattr areas.
    pub xattr_bytes: u64,
    /// Bytes of the records of the chunk table.
    pub chunk_table_bytes: u64,
    /// Chunk indexes of files.
    pub chunk_uses: u64,
    /// Different chunks that files use.
    pub chunks: u64,
    /// Plain bytes of the different chunks.
    pub chunk_bytes: u64,
    /// Bytes of files for each byte of different chunks.
    pub dedup_ratio: f64,
    /// Different chunks by size: the smallest power of two that is not below it.
    pub chunk_sizes: BTreeMap<u64, u64>,
    pub blobs: Vec<BlobStat>,
}

/// Numbers of one blob.
#[derive(Clone, Debug, Serialize)]
pub struct BlobStat {
    pub id: String,
    pub chunks: u64,
    /// Different chunks that files of this image use.
    pub used_chunks: u64,
    /// Length of the blob file, as the image has it.
    pub stored_bytes: u64,
    /// Length of the device.
    pub decoded_bytes: u64,
    /// Decoded bytes for each stored byte.
    pub compression_ratio: f64,
}

/// What two images have in common.
#[derive(Clone, Debug, Serialize)]
pub struct Shared {
    pub images: [String; 2],
    /// Blobs that both name.
    pub blobs: Vec<String>,
    /// Chunks with the same digest and size that files of both use, in whichever blobs.
    pub chunks: u64,
    /// Plain bytes of those chunks.
    pub chunk_bytes: u64,
}

/// All images as one heap of chunks.
#[derive(Clone, Debug, Serialize)]
pub struct Total {
    pub blobs: u64,
    /// Blobs that more than one image names.
    pub shared_blobs: u64,
    /// Different chunks of all images.
    pub chunks: u64,
    pub chunk_bytes: u64,
    /// Different chunks that files of more than one image use.
    pub shared_chunks: u64,
    pub shared_chunk_bytes: u64,
}

/// What makes two chunks the same wherever they are stored. Algorithms of different digests never
/// agree, so one image of each kind has nothing in common with the other.
type Chunk = ([u8; 32], u32);

/// Counts what is in `images`, which have names for the report.
///
/// # Errors
/// If an inode or a chunk array of one of them makes no sense.
pub fn stat(images: &[(String, Image)]) -> Result<Report, ImageError> {
    let mut stats = Vec::new();
    let mut used = Vec::new();
    for (name, image) in images {
        let (stat, chunks) = one(name, image)?;
        stats.push(stat);
        used.push(chunks);
    }
    let mut pairs = Vec::new();
    for (first, one) in used.iter().enumerate() {
        for (second, other) in used.iter().enumerate().skip(first + 1) {
            let chunks = one.intersection(other);
            let (count, bytes) = chunks.fold((0, 0), |(count, bytes), chunk| (count + 1, bytes + u64::from(chunk.1)));
            let ids = |index: usize| stats[index].blobs.iter().map(|blob| blob.id.clone()).collect::<HashSet<_>>();
            let mut blobs: Vec<_> = ids(first).intersection(&ids(second)).cloned().collect();
            blobs.sort_unstable();
            let images = [stats[first].name.clone(), stats[second].name.clone()];
            pairs.push(Shared { images, blobs, chunks: count, chunk_bytes: bytes });
        }
    }
    let total = (images.len() > 1).then(|| total(&stats, &used));
    Ok(Report { images: stats, pairs, total })
}

fn total(stats: &[ImageStat], used: &[HashSet<Chunk>]) -> Total {
    let mut blobs: HashMap<&str, u64> = HashMap::new();
    for blob in stats.iter().flat_map(|stat| &stat.blobs) {
        *blobs.entry(&blob.id).or_default() += 1;
    }
    let mut chunks: HashMap<Chunk, u64> = HashMap::new();
    for chunk in used.iter().flatten() {
        *chunks.entry(*chunk).or_default() += 1;
    }
    let shared = || chunks.iter().filter(|(_, images)| **images > 1);
    Total {
        blobs: blobs.len() as u64,
        shared_blobs: blobs.values().filter(|images| **images > 1).count() as u64,
        chunks: chunks.len() as u64,
        chunk_bytes: chunks.keys().map(|chunk| u64::from(chunk.1)).sum(),
        shared_chunks: shared().count() as u64,
        shared_chunk_bytes: shared().map(|(chunk, _)| u64::from(chunk.1)).sum(),
    }
}

/// The numbers of one image, and the chunks that its files use.
fn one(name: &str, image: &Image) -> Result<(ImageStat, HashSet<Chunk>), ImageError> {
    let mut stat = ImageStat {
        name: name.to_owned(),
        format: image.summary().origin.name(),
        bootstrap_bytes: image.summary().bootstrap_len,
        chunk_table_bytes: size_of_val(image.chunk_records()) as u64,
        ..ImageStat::default()
    };
    let records = RecordIndex::new(image);
    let mut seen = HashSet::new();
    let mut used_records = vec![false; image.chunk_records().len()];
    // Chunk arrays that lie over each other would count without end.
    let mut budget = image.summary().bootstrap_len / 8;
    let mut walk = image.walk();
    while let Some(step) = walk.next_visit() {
        let inode = step?.inode;
        stat.paths += 1;
        if !seen.insert(inode.nid) {
            continue;
        }
        *stat.inodes.entry(inode.kind.name()).or_default() += 1;
        stat.xattr_bytes += inode.xattrs.len();
        match inode.kind {
            Kind::Regular => stat.file_bytes = stat.file_bytes.saturating_add(inode.size),
            Kind::Directory => stat.directory_bytes = stat.directory_bytes.saturating_add(inode.size),
            Kind::Symlink => stat.symlink_bytes = stat.symlink_bytes.saturating_add(inode.size),
            _ => {}
        }
        let mut at = 0;
        for row in image.chunk_indexes(&inode)? {
            let len = u64::from(image.summary().chunk_size).min(inode.size - at);
            at += len;
            budget = budget.checked_sub(1).ok_or(ImageError::Tree("has more chunks than the bootstrap can hold"))?;
            if row.blkaddr.get() == HOLE {
                stat.hole_bytes += len;
                continue;
            }
            stat.chunk_uses += 1;
            if let Some(record) = records.find(row) {
                used_records[record] = true;
            }
        }
    }
    let mut used_of_blob = vec![0; image.devices().len()];
    let mut chunks = HashSet::new();
    for (record, _) in image.chunk_records().iter().zip(&used_records).filter(|(_, used)| **used) {
        let size = record.uncompressed_size.get();
        stat.chunks += 1;
        stat.chunk_bytes += u64::from(size);
        *stat.chunk_sizes.entry(u64::from(size).next_power_of_two()).or_default() += 1;
        if let Some(count) = used_of_blob.get_mut(record.blob_index.get() as usize) {
            *count += 1;
        }
        // Without a digest, nobody knows what is in it.
        if record.digest != [0; 32] {
            chunks.insert((record.digest, size));
        }
    }
    stat.dedup_ratio = ratio(stat.file_bytes - stat.hole_bytes.min(stat.file_bytes), stat.chunk_bytes);
    stat.blobs = image.devices().iter().zip(used_of_blob).map(|(device, used)| blob(device, used)).collect();
    Ok((stat, chunks))
}

fn blob(device: &crate::image::Device, used_chunks: u64) -> BlobStat {
    let (stored, decoded) = (device.entry.compressed_size.get(), device.entry.uncompressed_size.get());
    BlobStat {
        id: device.blob.to_string(),
        chunks: device.entry.chunk_count.get().into(),
        used_chunks,
        stored_bytes: stored,
        decoded_bytes: decoded,
        compression_ratio: ratio(decoded, stored),
    }
}

/// One if there is nothing to compare.
#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
fn ratio(many: u64, few: u64) -> f64 {
    if few == 0 { 1.0 } else { many as f64 / few as f64 }
}
