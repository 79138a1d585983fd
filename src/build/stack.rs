//! Several sources of one image, each a layer over those before it: which of them share a blob,
//! and how they are read.
//!
//! Sources that share a blob go through one pipeline, one after the other. A blob is complete
//! before the next is begun, so that what it holds is not stored again. None of them has a name
//! before all of them are known to be sound.

use std::path::Path;

use super::base::{Based, Upper};
use super::blobwriter::{BlobWriter, FinishedBlob, Shape};
use super::chunk::{self, Cutter, Stored};
use super::error::BuildError;
use super::report::{self, BuildReport};
use super::spec::{BuildSpec, Progress, Source};
use super::{input, settings};

/// The sources, by the blob that they share.
pub(super) fn by_blob(sources: Vec<Source>, one_blob: bool) -> Vec<Vec<Source>> {
    if one_blob { vec![sources] } else { sources.into_iter().map(|source| vec![source]).collect() }
}

/// How sources are read.
pub(super) struct Reading<'a> {
    pub spec: &'a BuildSpec,
    /// Directory for blobs.
    pub blobs: &'a Path,
    pub progress: &'a dyn Progress,
}

/// Sources that were read, and their blob, which is not complete.
pub(super) struct Stratum {
    pub layers: Vec<Upper>,
    pub stored: Stored,
    /// Of the blob.
    pub shape: Shape,
}

impl Reading<'_> {
    /// Reads sources that share a blob. What `based` has is not stored again.
    pub(super) fn read(
        &self,
        sources: Vec<Source>,
        based: &Based,
        report: &mut BuildReport,
    ) -> Result<Stratum, BuildError> {
        let (settings, shape) = settings(self.spec)?;
        let known = based.stock.known(self.spec.digest);
        let blob = BlobWriter::new(self.blobs.to_owned(), shape.clone());
        let (layers, stored) = chunk::run(&settings, &known, blob, self.progress, |cutter| {
            sources.into_iter().map(|source| self.source(source, cutter, report)).collect::<Result<Vec<_>, _>>()
        })?;
        for layer in &layers {
            report.hole_bytes += report::holes(&layer.tree, shape.chunk_size);
            let chunks = &stored.chunk_of_cut;
            report.deduplicated_bytes += report::deduplicated(&layer.tree, shape.chunk_size, chunks, stored.known);
        }
        Ok(Stratum { layers, stored, shape })
    }

    /// Reads sources as [`Self::read`] does, completes their blob and puts them over `based`.
    pub(super) fn add(
        &self,
        sources: Vec<Source>,
        based: &mut Based,
        report: &mut BuildReport,
    ) -> Result<Option<FinishedBlob>, BuildError> {
        let Stratum { layers, stored, .. } = self.read(sources, based, report)?;
        let Stored { blob, mut packer, chunk_of_cut, .. } = stored;
        let blob = blob.seal(&mut packer)?.map(|sealed| sealed.finish(None)).transpose()?;
        based.add(layers, blob.as_ref().and_then(FinishedBlob::contents), &chunk_of_cut)?;
        Ok(blob)
    }

    fn source(&self, source: Source, cutter: &mut Cutter<'_>, report: &mut BuildReport) -> Result<Upper, BuildError> {
        let (selection, progress) = (&self.spec.selection, self.progress);
        let name = source.name().to_owned();
        let read = match source {
            Source::Directory(path) => input::directory(&path, selection, &self.spec.prefetch, cutter, progress)?,
            Source::Archive { name, stream } => input::archive(&name, stream, selection, cutter, progress)?,
        };
        report.add(&name, &read);
        Ok(Upper { name, tree: read.tree })
    }
}

/// Who watches several sources: what there is to do in all of them is not known before the last
/// one is read.
pub(super) struct NoTotal<'a>(pub &'a dyn Progress);

impl Progress for NoTotal<'_> {
    fn advance(&self, entries: u64, bytes: u64) {
        self.0.advance(entries, bytes);
    }

    fn verifying(&self, blob: Option<&Path>) {
        self.0.verifying(blob);
    }
}
