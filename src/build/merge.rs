//! Layers that were built one by one become one image, without touching their data.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::blobwriter::TemporaryName;
use super::chunk::Chunk;
use super::emit::{Bootstrap, Facts};
use super::error::BuildError;
use super::hintedpaths::HintedPaths;
use super::layout;
use super::load::{Agreed, Layer, LoadError, Stock};
use super::overlay::{self, Whiteouts};
use super::report::count;
use super::tree::{Kind, NodeId, Tree};
use super::v5::{self, Packed};
use super::verify::Expected;
use super::{Progress, recheck, stockblobs};
use crate::base::{BlobId, Digest};
use crate::format::blobfile::features;
use crate::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm, flags};

/// What to merge, and how.
#[derive(Debug)]
pub struct MergeSpec {
    /// The lowest first.
    pub layers: Vec<Layer>,
    /// An image below all layers.
    pub parent: Option<Layer>,
    /// An image whose blobs are not a layer's own, in whichever layers they occur.
    pub dictionary: Option<Layer>,
    pub whiteouts: Whiteouts,
    /// Paths to prefetch, instead of what the layers ask for.
    pub prefetch: Option<Vec<Vec<u8>>>,
    /// What bootstraps inside of their blobs could not know about them.
    pub facts: Vec<BlobFacts>,
    pub version: MergeVersion,
    /// Path of the bootstrap to write.
    pub out: PathBuf,
}

/// Version of the format that layers are merged into.
#[derive(Debug, Default)]
pub enum MergeVersion {
    #[default]
    V6,
    /// With what the layers of that version say about their blobs. All blobs must have one compression and
    /// one kind of digest, and be made of chunks that are stored alone.
    V5(Packed),
}

/// What a registry knows about a blob. What is not told stays as the layer says.
#[derive(Clone, Debug)]
pub struct BlobFacts {
    pub blob: BlobId,
    /// Bytes of the blob file in front of a bootstrap in it.
    pub size: Option<u64>,
    /// Bytes of the table of contents with its tar header.
    pub toc_size: Option<u32>,
    /// SHA-256 of the same bytes.
    pub toc_digest: Option<Digest>,
    /// SHA-256 of the file that holds the tables of a blob that cannot hold them itself.
    pub meta_digest: Option<Digest>,
    /// Length of that file.
    pub meta_size: Option<u64>,
}

impl BlobFacts {
    /// Nothing but the name.
    pub fn about(blob: BlobId) -> Self {
        Self { blob, size: None, toc_size: None, toc_digest: None, meta_digest: None, meta_size: None }
    }

    fn tells_of_tables(&self) -> bool {
        let Self { toc_size, toc_digest, meta_digest, meta_size, .. } = self;
        toc_size.is_some() || toc_digest.is_some() || meta_digest.is_some() || meta_size.is_some()
    }
}

/// What was made. The same for every merge of the same layers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MergeReport {
    /// Path of the bootstrap.
    pub bootstrap: String,
    pub bootstrap_bytes: u64,
    /// Ids of the blobs that files of the image need, in the order of its devices.
    pub blobs: Vec<String>,
    /// Blobs of layers that no file needs any more.
    pub dropped_blobs: Vec<String>,
    pub directories: u64,
    /// Regular files by content: a file with several names counts once.
    pub files: u64,
    pub symlinks: u64,
    /// Devices, FIFOs and sockets.
    pub specials: u64,
    /// Names beyond the first of their files.
    pub hard_links: u64,
    /// Bytes of all regular files, each counted once.
    pub file_bytes: u64,
    /// Entries of the prefetch table.
    pub prefetched_paths: u64,
}

/// Merges layers and writes the bootstrap, whole and synced or not at all.
///
/// The superblock names compression and digest of the last layer; each blob keeps its own.
///
/// # Errors
/// A [`BuildError`] that names the layer at fault: they must agree in chunk size and in whether
/// owners mean anything, and may not contradict each other about a blob.
pub fn merge(spec: MergeSpec, progress: &dyn Progress) -> Result<MergeReport, BuildError> {
    let mut stock = Stock::new(None);
    let mut wishes = Wishes::default();
    if let Some(dictionary) = &spec.dictionary {
        stock.add_dictionary(&dictionary.image).map_err(|cause| dictionary.error(cause))?;
    }
    let borrowed: Vec<&BlobId> = spec.dictionary.iter().chain(&spec.parent).flat_map(blob_ids).collect();
    let layers: Vec<&Layer> = spec.parent.iter().chain(&spec.layers).collect();
    let mut renamed = HashMap::new();
    for layer in &layers {
        let is_own = |id: &BlobId| !borrowed.contains(&id);
        let added = stock.add(&layer.image, layer.id.as_ref(), is_own).map_err(|cause| layer.error(cause))?;
        if let Some(id) = &layer.id {
            renamed.extend(blob_ids(layer).filter(|own| is_own(own)).map(|own| (id.clone(), own.clone())));
        }
        if let Some((node, problem)) = spec.whiteouts.unresolvable(&stock.tree, added.root) {
            let path = stock.tree.path_of(added.root, node).unwrap_or_default().escape_ascii().to_string();
            return Err(layer.error(LoadError::Entry { path, problem }));
        }
        wishes.add(added.prefetch, !layer.image.devices().is_empty());
        // The first goes over nothing, which consumes the whiteouts in it as well.
        overlay::put_over(&mut stock.tree, NodeId::ROOT, added.root, spec.whiteouts);
        progress.advance(layer.image.summary().paths, 0);
    }
    let last = layers.last().map(|layer| layer.image.summary().flags).unwrap_or(flags::COMPRESSION_NONE);
    let agreed = stock.agreed().ok_or(BuildError::NoLayers)?;
    let Stock { tree, mut chunks, mut blobs, .. } = stock;
    supply(blobs.rows_mut(), &spec.facts)?;

    let known: Vec<BlobEntry> = blobs.rows().to_vec();
    let cuts: Vec<u32> = (0..u32::try_from(chunks.len()).expect("checked as they came")).collect();
    let rows = blobs.into_used(&[], &tree, &mut chunks, &cuts);
    let prefetch = match &spec.prefetch {
        Some(paths) => prefetch_nodes(&tree, paths.iter().filter_map(|path| tree.find(split(path)))),
        None => prefetch_nodes(&tree, wishes.nodes(&tree)),
    };
    let dropped = known.iter().filter(|entry| !rows.iter().any(|row| row.id == entry.id));
    let dropped_blobs = dropped.map(stockblobs::id_text).collect();
    let blobs = rows.iter().map(stockblobs::id_text).collect::<Vec<_>>();
    let facts = Facts { claim_xattrs: true, ..facts(agreed, last) };
    let merged = Merged { tree: &tree, rows, chunks, cuts: &cuts, prefetch: &prefetch, facts };
    let bootstrap_bytes = match &spec.version {
        MergeVersion::V6 => merged.publish(&spec.out)?,
        MergeVersion::V5(packed) => merged.publish_v5(packed, &renamed, &spec.facts, &spec.out)?,
    };

    let counted = count(&tree);
    Ok(MergeReport {
        bootstrap: spec.out.display().to_string(),
        bootstrap_bytes,
        prefetched_paths: if blobs.is_empty() { 0 } else { prefetch.len() as u64 },
        blobs,
        dropped_blobs,
        directories: counted.directories,
        files: counted.files,
        symlinks: counted.symlinks,
        specials: counted.specials,
        hard_links: counted.hard_links,
        file_bytes: counted.source_bytes,
    })
}

/// All of an image before it has a version.
struct Merged<'a> {
    tree: &'a Tree,
    rows: Vec<BlobEntry>,
    chunks: Vec<Chunk>,
    cuts: &'a [u32],
    prefetch: &'a [NodeId],
    facts: Facts,
}

impl Merged<'_> {
    /// Writes the bootstrap and returns its length in bytes.
    fn publish(&self, out: &Path) -> Result<u64, BuildError> {
        let layout = layout::layout(self.tree, self.facts.chunk_size)?;
        let bootstrap = Bootstrap {
            tree: self.tree,
            layout: &layout,
            blobs: &self.rows,
            chunks: &self.chunks,
            chunk_of_cut: self.cuts,
            prefetch: self.prefetch,
            facts: self.facts,
        };
        let bytes = bootstrap.bytes()?;
        let len = bytes.len() as u64;
        publish(out, bytes, &bootstrap.expected())?;
        Ok(len)
    }

    /// The same in version 5. `renamed` is from what blobs are called to what their layers call them.
    fn publish_v5(
        mut self,
        packed: &Packed,
        renamed: &HashMap<BlobId, BlobId>,
        told: &[BlobFacts],
        out: &Path,
    ) -> Result<u64, BuildError> {
        // Nobody relies on the claim here, and the reference builder makes none.
        let facts = Facts { claim_xattrs: false, ..self.facts };
        let facts = packed.pack(&mut self.rows, &mut self.chunks, renamed, facts)?;
        for fact in told {
            if fact.tells_of_tables() {
                return Err(BuildError::NotInVersion5("place for tables or contents of a blob (--blob ID,toc-...)"));
            }
            let id = fact.blob.to_padded();
            if let Some((row, size)) = self.rows.iter_mut().find(|row| row.id == id).zip(fact.size) {
                row.compressed_size = size.into();
            }
        }
        let source = v5::Source {
            tree: self.tree,
            blobs: &self.rows,
            chunks: &self.chunks,
            chunk_of_cut: self.cuts,
            prefetch: self.prefetch,
            head: None,
            facts,
        };
        v5::ensure_lengths(&source)?;
        let bytes = source.bytes()?;
        v5::image(&bytes, &source, &[], NonZeroUsize::MIN)?;
        name(out, &bytes)?;
        Ok(bytes.len() as u64)
    }
}

pub(super) fn blob_ids(layer: &Layer) -> impl Iterator<Item = &BlobId> {
    layer.image.devices().iter().map(|device| &device.blob)
}

/// Writes facts into the rows of the blobs they are about.
fn supply(rows: &mut [BlobEntry], facts: &[BlobFacts]) -> Result<(), BuildError> {
    for fact in facts {
        let id = fact.blob.to_padded();
        let row = rows.iter_mut().find(|row| row.id == id).ok_or_else(|| BuildError::UnknownBlob(fact.blob.clone()))?;
        if let Some(size) = fact.size {
            row.compressed_size = size.into();
        }
        if let Some(size) = fact.toc_size {
            row.toc_size = size.into();
        }
        if let Some(Digest(digest)) = fact.toc_digest {
            row.toc_digest = digest;
        }
        if row.features.get() & features::ENCRYPTED != 0 && (fact.meta_digest.is_some() || fact.meta_size.is_some()) {
            return Err(BuildError::MetaOfEncrypted(fact.blob.clone()));
        }
        if let Some(Digest(digest)) = fact.meta_digest {
            row.meta_digest = digest;
        }
        if let Some(size) = fact.meta_size {
            row.meta_size = size.into();
        }
    }
    Ok(())
}

/// What a superblock says of an image whose flags are `bits`, when it is written anew.
pub(super) fn facts(agreed: Agreed, bits: u64) -> Facts {
    Facts {
        compression: compression(bits),
        digest: digest(bits),
        chunk_size: agreed.chunk_size,
        explicit_ids: agreed.explicit_ids,
        claim_xattrs: bits & flags::HAS_XATTR != 0,
    }
}

fn compression(bits: u64) -> Algorithm {
    let all = [Algorithm::None, Algorithm::Lz4Block, Algorithm::Gzip, Algorithm::Zstd];
    all.into_iter().find(|algorithm| bits & algorithm.flag() != 0).unwrap_or(Algorithm::None)
}

fn digest(bits: u64) -> DigestAlgorithm {
    if bits & flags::HASH_SHA256 != 0 { DigestAlgorithm::Sha256 } else { DigestAlgorithm::Blake3 }
}

/// What layers want to have prefetched.
#[derive(Debug, Default)]
struct Wishes {
    /// Those of the lowest layer first.
    paths: Vec<HintedPaths>,
    layers_with_data: usize,
    layers_that_want_all: usize,
}

impl Wishes {
    fn add(&mut self, paths: HintedPaths, has_data: bool) {
        self.layers_with_data += usize::from(has_data);
        self.layers_that_want_all += usize::from(has_data && paths.has_root());
        self.paths.push(paths);
    }

    /// What is at the paths now, the most urgent of the lowest layer first. A layer that wants the
    /// whole image means itself: only if all of them do is that carried over.
    fn nodes<'a>(&'a self, tree: &'a Tree) -> impl Iterator<Item = NodeId> {
        let all = self.layers_with_data == self.layers_that_want_all;
        let nodes = self.paths.iter().flat_map(|paths| paths.nodes(tree));
        nodes.filter(move |node| all || *node != NodeId::ROOT)
    }
}

/// The components of a path.
pub(super) fn split(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).collect()
}

/// Each of these nodes once, as far as there is something to fetch.
pub(super) fn prefetch_nodes(tree: &Tree, wanted: impl Iterator<Item = NodeId>) -> Vec<NodeId> {
    let mut met = vec![false; tree.len()];
    let mut nodes = Vec::new();
    for node in wanted {
        let fetches = match &tree.node(node).kind {
            Kind::Directory(_) => true,
            Kind::Regular(content) => content.size > 0,
            _ => false,
        };
        if fetches && !std::mem::replace(&mut met[node.index()], true) {
            nodes.push(node);
        }
    }
    nodes
}

/// Writes a bootstrap that has its name only when it was read again, and is complete and synced.
pub(super) fn publish(path: &Path, bytes: Vec<u8>, expected: &Expected<'_>) -> Result<(), BuildError> {
    name(path, recheck::bootstrap(bytes, expected).map_err(BuildError::Recheck)?.bytes())
}

/// Writes a file that has its name only when it is complete and synced.
fn name(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let failed = |source| BuildError::Write { path: path.to_owned(), source };
    let missing = || failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not the name of a file"));
    let file_name: &OsStr = path.file_name().ok_or_else(missing)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (mut file, mut name) = TemporaryName::create(directory)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(failed)?;
    name.rename(file_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::recheck::RecheckError;
    use crate::build::tree::{Meta, Node};

    /// What publishing makes of the bootstrap of a small tree when `spoil` has been at it, and how
    /// many files there are then.
    fn published(spoil: impl FnOnce(&mut [u8])) -> (Result<(), BuildError>, usize) {
        let mut tree = Tree::new(Meta::implied_directory());
        for name in [b"first", b"other"] {
            let node = Node { meta: Meta::implied_directory(), kind: Kind::Symlink(b"target".as_slice().into()) };
            tree.insert(NodeId::ROOT, name, node).unwrap();
        }
        let layout = layout::layout(&tree, 4096).unwrap();
        let facts = Facts {
            compression: Algorithm::None,
            digest: DigestAlgorithm::Blake3,
            chunk_size: 4096,
            explicit_ids: true,
            claim_xattrs: false,
        };
        let (blobs, chunks, chunk_of_cut, prefetch) = (&[], &[], &[], &[]);
        let bootstrap = Bootstrap { tree: &tree, layout: &layout, blobs, chunks, chunk_of_cut, prefetch, facts };
        let mut bytes = bootstrap.bytes().unwrap();
        spoil(&mut bytes);
        let dir = tempfile::tempdir().unwrap();
        let result = publish(&dir.path().join("merged"), bytes, &bootstrap.expected());
        (result, std::fs::read_dir(dir.path()).unwrap().count())
    }

    fn find(bytes: &[u8], text: &[u8]) -> usize {
        bytes.windows(text.len()).position(|window| window == text).unwrap()
    }

    #[test]
    fn a_bootstrap_that_is_not_what_was_meant_gets_no_name() {
        let (result, files) = published(|_| ());
        assert!(result.is_ok() && files == 1, "{result:?}");
        for text in [b"first", b"other", b"targe"] {
            let (result, files) = published(|bytes| {
                let at = find(bytes, text);
                bytes[at] ^= 1;
            });
            assert!(matches!(result, Err(BuildError::Recheck(RecheckError::Metadata(_)))), "{result:?}");
            assert_eq!(files, 0);
        }
        let (result, files) = published(|bytes| bytes[1024] ^= 1);
        assert!(matches!(result, Err(BuildError::Recheck(RecheckError::Image(_)))), "{result:?}");
        assert_eq!(files, 0);
    }
}
