//! A dictionary: an image of the chunks that several images have in common.
//!
//! It holds no data. Every chunk is a file of its own, named by its digest, that leads into the blob
//! of the first image that has it; the rows of these blobs are kept as they are. So a dictionary is
//! an image like any other, and whoever can read it can build upon it.

use std::collections::HashMap;
use std::path::PathBuf;

use serde::Serialize;

use super::chunk::Content;
use super::emit::Bootstrap;
use super::error::{BuildError, Unfit};
use super::load::{Layer, Stock};
use super::tree::{Kind, Meta, Node, NodeId, Tree};
use super::{Progress, layout, merge, stockblobs};
use crate::base::{Digest, hex};

/// What to make a dictionary of.
#[derive(Debug)]
pub struct DictionarySpec<'a> {
    pub images: &'a [Layer],
    /// Path of the bootstrap to write.
    pub out: PathBuf,
    /// How many of the images must have a chunk, at least 1.
    pub min_images: usize,
    /// Most chunks to take; those in most images are taken first, then the larger ones.
    pub max_chunks: Option<usize>,
}

/// What was made. The same for every run on the same images in the same order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DictionaryReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    pub images: u64,
    /// Different chunks of all images together.
    pub distinct_chunks: u64,
    /// Chunks of the dictionary.
    pub chunks: u64,
    /// Their plain bytes.
    pub plain_bytes: u64,
    /// Plain bytes that these chunks take in all images together.
    pub shared_plain_bytes: u64,
    /// Ids of the blobs that hold them.
    pub blobs: Vec<String>,
}

/// What makes two chunks the same.
type Key = (u32, Digest, u32);

/// A chunk that images have.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// Of the first image that has it.
    position: u32,
    images: usize,
    /// The last image that has it.
    last: usize,
}

/// Makes a dictionary, whole and synced or not at all.
///
/// # Errors
/// A [`BuildError`]: the images must agree in chunk size and in whether owners mean anything, and
/// have enough in common.
pub fn dictionary(spec: &DictionarySpec<'_>, progress: &dyn Progress) -> Result<DictionaryReport, BuildError> {
    let mut stock = Stock::new(None);
    let mut found: HashMap<Key, Found> = HashMap::new();
    let mut last = 0;
    for (number, layer) in spec.images.iter().enumerate() {
        let first = stock.chunks.len();
        stock.add_dictionary(&layer.image).map_err(|cause| layer.error(cause))?;
        count(&stock, first, number, &mut found);
        last = layer.image.summary().flags;
        progress.advance(1, 0);
    }
    let agreed = stock.agreed().ok_or(BuildError::NoLayers)?;
    let distinct_chunks = found.len() as u64;
    let taken = take(&stock, found, spec);
    if taken.is_empty() {
        return Err(BuildError::NothingShared { images: spec.min_images });
    }

    let Stock { mut chunks, blobs, .. } = stock;
    let out = |problem| BuildError::Entry { path: spec.out.clone(), problem };
    let tree = tree(taken.iter().map(|taken| (taken.position, &chunks[taken.position as usize]))).map_err(out)?;
    let plain = |found: &Found| u64::from(chunks[found.position as usize].plain_len);
    let plain_bytes = taken.iter().map(plain).sum();
    let shared_plain_bytes = taken.iter().map(|found| plain(found) * found.images as u64).sum();
    let cuts: Vec<u32> = (0..u32::try_from(chunks.len()).expect("checked as they came")).collect();
    let rows = blobs.into_used(&[], &tree, &mut chunks, &cuts);
    let layout = layout::layout(&tree, agreed.chunk_size)?;
    let bootstrap = Bootstrap {
        tree: &tree,
        layout: &layout,
        blobs: &rows,
        chunks: &chunks,
        chunk_of_cut: &cuts,
        prefetch: &[],
        facts: merge::facts(agreed, last),
    };
    let bytes = bootstrap.bytes()?;
    let bootstrap_bytes = bytes.len() as u64;
    merge::publish(&spec.out, bytes, &bootstrap.expected())?;
    Ok(DictionaryReport {
        bootstrap: spec.out.display().to_string(),
        bootstrap_bytes,
        images: spec.images.len() as u64,
        distinct_chunks,
        chunks: taken.len() as u64,
        plain_bytes,
        shared_plain_bytes,
        blobs: rows.iter().map(stockblobs::id_text).collect(),
    })
}

/// Counts the chunks from `first` on, which are those of image `number`. Chunks without a digest
/// are not known to be the same as any.
fn count(stock: &Stock, first: usize, number: usize, found: &mut HashMap<Key, Found>) {
    for (position, chunk) in (0u32..).zip(&stock.chunks).skip(first) {
        let digest = stock.blobs.rows()[usize::from(chunk.blob)].digest.get();
        if chunk.digest == Digest([0; 32]) {
            continue;
        }
        let entry = found.entry((digest, chunk.digest, chunk.plain_len));
        let found = entry.or_insert(Found { position, images: 0, last: number });
        if found.images == 0 || found.last != number {
            (found.images, found.last) = (found.images + 1, number);
        }
    }
}

/// The chunks that enough images have, in the order in which they were found.
fn take(stock: &Stock, found: HashMap<Key, Found>, spec: &DictionarySpec<'_>) -> Vec<Found> {
    let mut taken: Vec<Found> = found.into_values().filter(|found| found.images >= spec.min_images).collect();
    if let Some(most) = spec.max_chunks.filter(|most| *most < taken.len()) {
        let len = |found: &Found| stock.chunks[found.position as usize].plain_len;
        taken.sort_unstable_by(|a, b| {
            (b.images, len(b)).cmp(&(a.images, len(a))).then_with(|| a.position.cmp(&b.position))
        });
        taken.truncate(most);
    }
    taken.sort_unstable_by_key(|found| found.position);
    taken
}

/// A file for each chunk: `/chunks/ab/abcd...`, the digest in hexadecimal below its first byte.
fn tree<'c>(taken: impl Iterator<Item = (u32, &'c super::chunk::Chunk)>) -> Result<Tree, Unfit> {
    let directory = || Node { meta: Meta::implied_directory(), kind: Kind::empty_directory() };
    let mut tree = Tree::new(Meta::implied_directory());
    let chunks = tree.insert(NodeId::ROOT, b"chunks", directory())?;
    for (position, chunk) in taken {
        let name = hex(&chunk.digest.0);
        let parent = tree.insert(chunks, &name.as_bytes()[..2], directory())?;
        let content = Content::from_cuts(chunk.plain_len.into(), std::iter::once(Ok::<_, Unfit>(position.into())))?;
        let meta = Meta { permissions: 0o444, ..Meta::implied_directory() };
        tree.insert(parent, name.as_bytes(), Node { meta, kind: Kind::Regular(content) })?;
    }
    Ok(tree)
}
