//! An image built upon others: a parent whose tree lies below, a dictionary that only has chunks.
//!
//! Both are loaded before the source is read, so that their chunks take part in deduplication and
//! no number has to be changed afterwards.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::chunk::Chunk;
use super::error::BuildError;
use super::load::{Added, Agreed, Layer, Stock};
use super::merge::prefetch_nodes;
use super::overlay::{self, Whiteouts};
use super::tree::{NodeId, Tree};
use crate::format::rafs::{BlobEntry, DigestAlgorithm};

/// What an image is built upon.
#[derive(Debug, Default)]
pub struct Base {
    /// An image whose tree lies below that of the source. Its blobs stay the first of the new
    /// image, used or not, and its chunks are not stored again.
    pub parent: Option<Layer>,
    /// How the source says that something of the parent is gone. Means nothing without a parent.
    pub whiteouts: Whiteouts,
    /// An image whose chunks are not stored again. Its blobs follow the new one, if they are used.
    pub dictionary: Option<Layer>,
}

/// A base that was loaded.
#[derive(Debug)]
pub(super) struct Based {
    pub stock: Stock,
    parent: Option<Added>,
    /// Blobs of the parent.
    kept: u16,
}

/// All that a base and a source make together.
#[derive(Debug)]
pub(super) struct Joined {
    pub tree: Tree,
    pub chunks: Vec<Chunk>,
    /// The blob table.
    pub rows: Vec<BlobEntry>,
    pub prefetch: Vec<NodeId>,
}

impl Based {
    /// Loads a base for an image that agrees with it in what `agreed` says, and has this digest.
    pub(super) fn on(base: &Base, agreed: Agreed, digest: DigestAlgorithm) -> Result<Self, BuildError> {
        let mut stock = Stock::new(Some(agreed));
        let mut parent = None;
        if let Some(layer) = &base.parent {
            let added = stock.add(&layer.image, None, |_| false).map_err(|cause| layer.error(cause))?;
            parent = Some(added);
        }
        let kept = u16::try_from(stock.blobs.rows().len()).expect("an image has at most 254 blobs");
        if let Some(layer) = &base.dictionary {
            stock.add_dictionary(&layer.image).map_err(|cause| layer.error(cause))?;
            let devices = layer.image.devices();
            if !devices.is_empty() && devices.iter().all(|device| device.entry.digest.get() != digest.number()) {
                let digest = match digest {
                    DigestAlgorithm::Blake3 => "blake3",
                    DigestAlgorithm::Sha256 => "sha256",
                };
                return Err(BuildError::UselessDictionary { dictionary: layer.name.clone(), digest });
            }
        }
        Ok(Self { stock, parent, kept })
    }

    /// Puts the tree of a source over the parent's, and the blob written for it behind the
    /// parent's. `source` is for errors.
    pub(super) fn join(
        mut self,
        read: Tree,
        whiteouts: Whiteouts,
        new: Option<(&BlobEntry, &[Chunk])>,
        chunk_of_cut: &[u32],
        source: PathBuf,
    ) -> Result<Joined, BuildError> {
        let mut first: Vec<u16> = (0..self.kept).collect();
        if let Some((entry, chunks)) = new {
            let row = self.stock.add_blob(entry, chunks)?;
            if row >= self.kept {
                first.push(row);
            }
        }
        let Stock { mut tree, mut chunks, blobs, .. } = self.stock;
        let mut prefetch = Vec::new();
        match self.parent {
            None => tree = read,
            Some(Added { root: lower, prefetch: wanted }) => {
                let unfit = |problem| BuildError::Entry { path: source.clone(), problem };
                let upper = tree.adopt(read).map_err(unfit)?;
                if let Some((node, problem)) = whiteouts.unresolvable(&tree, upper) {
                    let path = tree.path_of(upper, node).unwrap_or_default();
                    let path = source.join(OsStr::from_bytes(&path));
                    return Err(BuildError::Entry { path, problem });
                }
                overlay::put_over(&mut tree, NodeId::ROOT, lower, whiteouts);
                overlay::put_over(&mut tree, NodeId::ROOT, upper, whiteouts);
                prefetch = prefetch_nodes(&tree, wanted.nodes(&tree));
            }
        }
        let rows = blobs.into_used(&first, &tree, &mut chunks, chunk_of_cut);
        Ok(Joined { tree, chunks, rows, prefetch })
    }
}
