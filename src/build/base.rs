//! An image built upon others: a parent whose tree lies below, a dictionary that only has chunks.
//!
//! Both are loaded before a source is read, so that their chunks take part in deduplication and
//! no number has to be changed afterwards. Sources with blobs of their own are added one after the
//! other, and are to the next what the parent is to the first.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::chunk::Chunk;
use super::error::BuildError;
use super::hintedpaths::HintedPaths;
use super::load::{Agreed, Layer, Stock};
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

/// A base that was loaded, and maybe layers over it.
#[derive(Debug)]
pub(super) struct Based {
    pub stock: Stock,
    whiteouts: Whiteouts,
    /// What the parent wanted to have prefetched.
    prefetch: Option<HintedPaths>,
    /// Blobs of the parent.
    kept: u16,
    has_parent: bool,
    has_layers: bool,
}

/// A source that was read.
#[derive(Debug)]
pub(super) struct Upper {
    /// For errors.
    pub name: PathBuf,
    pub tree: Tree,
}

/// A blob that was just written: its row of the blob table, and its chunks.
pub(super) type NewBlob<'a> = (&'a BlobEntry, &'a [Chunk]);

/// All that a base and sources make together.
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
        let mut prefetch = None;
        if let Some(layer) = &base.parent {
            let added = stock.add(&layer.image, None, |_| false).map_err(|cause| layer.error(cause))?;
            overlay::put_over(&mut stock.tree, NodeId::ROOT, added.root, base.whiteouts);
            prefetch = Some(added.prefetch);
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
        let has_parent = base.parent.is_some();
        Ok(Self { stock, whiteouts: base.whiteouts, prefetch, kept, has_parent, has_layers: false })
    }

    /// Puts sources over what is there, and the chunks of the blob written for them behind all
    /// others: from now on they are chunks to be found again.
    pub(super) fn add(
        &mut self,
        layers: Vec<Upper>,
        new: Option<NewBlob<'_>>,
        chunk_of_cut: &[u32],
    ) -> Result<(), BuildError> {
        if let Some((entry, chunks)) = new {
            self.stock.add_blob(entry, chunks)?;
        }
        for mut layer in layers {
            layer.tree.settle(chunk_of_cut);
            self.put_over(layer)?;
        }
        self.has_layers = true;
        Ok(())
    }

    /// Puts the last sources over what is there. The blob written for them comes first in the blob
    /// table behind those of the parent, unless there are layers with blobs of their own: then
    /// blobs come by first use, and those that no file uses are left out.
    pub(super) fn join(
        mut self,
        layers: Vec<Upper>,
        new: Option<NewBlob<'_>>,
        chunk_of_cut: &[u32],
    ) -> Result<Joined, BuildError> {
        let mut first: Vec<u16> = (0..self.kept).collect();
        if let Some((entry, chunks)) = new {
            let row = self.stock.add_blob(entry, chunks)?;
            if row >= self.kept && !self.has_layers {
                first.push(row);
            }
        }
        let is_alone = !self.has_parent && !self.has_layers && layers.len() == 1;
        for layer in layers {
            if is_alone {
                // Something may go below it later, so its whiteouts stay what they are.
                self.stock.tree = layer.tree;
            } else {
                self.put_over(layer)?;
            }
        }
        let Stock { tree, mut chunks, blobs, .. } = self.stock;
        let prefetch = self.prefetch.map_or_else(Vec::new, |wanted| prefetch_nodes(&tree, wanted.nodes(&tree)));
        let rows = blobs.into_used(&first, &tree, &mut chunks, chunk_of_cut);
        Ok(Joined { tree, chunks, rows, prefetch })
    }

    fn put_over(&mut self, layer: Upper) -> Result<(), BuildError> {
        let Upper { name, tree: read } = layer;
        let tree = &mut self.stock.tree;
        let upper = tree.adopt(read).map_err(|problem| BuildError::Entry { path: name.clone(), problem })?;
        if let Some((node, problem)) = self.whiteouts.unresolvable(tree, upper) {
            let path = tree.path_of(upper, node).unwrap_or_default();
            return Err(BuildError::Entry { path: name.join(OsStr::from_bytes(&path)), problem });
        }
        overlay::put_over(tree, NodeId::ROOT, upper, self.whiteouts);
        Ok(())
    }
}
