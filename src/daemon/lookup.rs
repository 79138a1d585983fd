//! From what a request says to an image that is ready to be served: images of registries are looked up first, and
//! everything that their names lead to is checked.
//!
//! The chain is manifest, bootstrap layer, bootstrap, blobs. A blob is served to whoever mounts an image only if the
//! image's own manifest names it, or if it was said that blobs are kept elsewhere: a bootstrap cannot name what its
//! manifest does not.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{ImageSpec, SpecError, Whereabouts};
use super::prepare::{Layer, Named, Prepared, Wanted};
use super::references::References;
use super::turns::Queue;
use super::{Daemon, DaemonError};
use crate::base::Digest;
use crate::blob::BlobTables;
use crate::cache::StoreError;
use crate::image::Image;
use crate::oci::bootstrap::{LayerError, MAX_LAYER, unpack};
use crate::oci::{self, FetchError, Layout, OciError, Platform, Reference, Registry, Resolved, Version};

/// How long finding out what a reference means may take.
const LOOK_UP: Duration = Duration::from_secs(30);

/// How long a layer with a bootstrap may take, of up to 512 MiB.
pub(super) const FETCH_LAYER: Duration = Duration::from_secs(600);

/// What is known of an image before its bootstrap is.
#[derive(Debug)]
pub(super) enum Found {
    /// Its bootstrap is a file.
    File(PathBuf),
    /// It is an image of a registry.
    Image(Box<Resolved>),
}

impl Found {
    /// Where to wait for others who came for the same image before, for at most [`FETCH_LAYER`].
    pub(super) fn queue(&self, daemon: &Daemon) -> Option<Queue> {
        match self {
            Self::File(_) => None,
            Self::Image(resolved) => Some(daemon.turns.queue(resolved.manifest_digest)),
        }
    }
}

/// A reference as it is shown, whole.
pub(super) fn shown(text: &str) -> String {
    text.parse::<Reference>().map_or_else(|_| text.to_owned(), |reference| reference.to_string())
}

impl Daemon {
    /// Finds out what `spec` means. Asks a registry if it names an image there. Blocks.
    pub(super) fn look_up(&self, spec: &ImageSpec) -> Result<Found, DaemonError> {
        match spec.whereabouts()? {
            Whereabouts::File(path) => Ok(Found::File(path)),
            Whereabouts::Registry(reference) => {
                let platform = spec.wanted_platform()?;
                let resolved = self.resolve_now(spec, &reference, platform.as_ref())?;
                Ok(Found::Image(Box::new(resolved)))
            }
        }
    }

    /// Where a reference leads. What is pinned by its digest and known is not asked about; of a tag, whether it
    /// leads where it did.
    pub(super) fn resolve_now(
        &self,
        spec: &ImageSpec,
        reference: &Reference,
        platform: Option<&Platform>,
    ) -> Result<Resolved, DaemonError> {
        let mut kept = self.references.find(reference, platform);
        let queue = self.turns.queue(References::key(reference, platform));
        let until = Instant::now() + LOOK_UP;
        // The first who comes learns it for all.
        let _turn = if kept.is_none() { Some(queue.wait(until)?) } else { None };
        if kept.is_none() {
            kept = self.references.find(reference, platform);
        }
        if spec.offline {
            return kept.ok_or_else(|| OciError::Unknown { reference: reference.clone() }.into());
        }
        let ask = || {
            let repository = reference.repository();
            let fetch = self.origins.registry(repository.host(), spec.ca.as_deref(), until);
            let fetch = fetch.map_err(DaemonError::SourceSpec)?;
            let registry = Registry::new(&fetch, repository);
            let asking = async {
                if let (Some(kept), Version::Tag(tag)) = (&kept, reference.version())
                    && registry.head(&tag).await?.is_some_and(|head| Some(head) == kept.head())
                {
                    return Ok((kept.clone(), false));
                }
                Ok((oci::resolve(&registry, reference, platform).await?, true))
            };
            self.runtime.block_on(asking).map_err(|error: OciError| DaemonError::from(error))
        };
        match (&kept, reference.version()) {
            (Some(kept), Version::Digest(_)) => Ok(kept.clone()),
            _ => {
                let (resolved, is_news) = ask().map_err(|error| hint(error, reference, kept.is_some()))?;
                // Of another kind of image somebody may make one of ours at any time, without changing it.
                if is_news && resolved.image().is_ok() {
                    self.references.keep(&resolved, platform);
                }
                Ok(resolved)
            }
        }
    }

    /// Reads everything that is needed to serve an image. Blocks.
    pub(super) fn prepare(&self, spec: &ImageSpec, found: &Found) -> Result<Prepared, DaemonError> {
        let source = self.origins.open(spec).map_err(DaemonError::SourceSpec)?;
        let resolved = match found {
            Found::File(path) => return self.prepare_from(&Wanted::File(path), &source),
            Found::Image(resolved) => resolved,
        };
        let image = servable(resolved)?;
        let digest = image.bootstrap.sha256().map_err(|cause| OciError::Document {
            repository: resolved.reference.repository().to_string(),
            what: "the manifest".to_owned(),
            cause,
        })?;
        let shown = PathBuf::from(resolved.reference.to_string());
        let layer = Layer {
            digest,
            shown: &shown,
            fetch: &|| self.fetch_bootstrap(spec, resolved),
            admit: &|image| if spec.blobs.is_empty() { ensure_named(resolved, image) } else { Ok(()) },
        };
        let mut prepared = self.prepare_from(&Wanted::Layer(&layer), &source)?;
        let (reference, manifest) = (resolved.reference.to_string(), resolved.manifest_digest);
        prepared.named = Some(Named { reference, manifest });
        Ok(prepared)
    }

    /// The bootstrap of an image, out of its layer, which is checked before anything looks into it.
    fn fetch_bootstrap(&self, spec: &ImageSpec, resolved: &Resolved) -> Result<Vec<u8>, DaemonError> {
        let reference = &resolved.reference;
        let unusable = |cause| OciError::Bootstrap { reference: reference.clone(), cause: Arc::new(cause) };
        if spec.offline {
            return Err(OciError::Unknown { reference: reference.clone() }.into());
        }
        let layer = &resolved.image()?.bootstrap;
        if layer.size > MAX_LAYER {
            return Err(unusable(LayerError::TooLong { size: layer.size }).into());
        }
        let mut scratch = self.scratch().map_err(|cause| self.unwritten(&cause))?;
        let repository = reference.repository();
        let fetch = self.origins.registry(repository.host(), spec.ca.as_deref(), Instant::now() + FETCH_LAYER);
        let fetch = fetch.map_err(DaemonError::SourceSpec)?;
        let mut take = |piece: &[u8]| scratch.write_all(piece);
        let registry = Registry::new(&fetch, repository);
        self.runtime.block_on(registry.blob(layer, "the bootstrap layer", &mut take)).map_err(|error| match error {
            // Our own disk is nobody else's fault, and there may be room to be made.
            OciError::Fetch(FetchError::Taking { cause, .. }) => self.unwritten(&cause),
            other => other.into(),
        })?;
        scratch.seek(SeekFrom::Start(0)).map_err(|cause| unusable(LayerError::Scratch(cause)))?;
        Ok(unpack(scratch).map_err(unusable)?)
    }

    fn unwritten(&self, cause: &std::io::Error) -> DaemonError {
        let cause = cause.raw_os_error().map_or_else(|| cause.kind().into(), std::io::Error::from_raw_os_error);
        let path = self.store.shelves().bootstraps().dir().to_owned();
        DaemonError::Store(StoreError::Io { path, cause })
    }

    /// A file in the cache that nobody else sees.
    fn scratch(&self) -> std::io::Result<File> {
        let dir = self.store.shelves().bootstraps().dir();
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)
    }
}

/// The image, if its manifest has nothing that this version cannot serve.
pub(super) fn servable(resolved: &Resolved) -> Result<&oci::Image, OciError> {
    let image = resolved.image()?;
    if image.layout == Layout::Zran {
        let why = "its data is in gzip layers of an ordinary image, which this version cannot serve".to_owned();
        return Err(OciError::Unsupported { reference: resolved.reference.clone(), why });
    }
    Ok(image)
}

/// Tells of `--offline` where it would help.
fn hint(error: DaemonError, reference: &Reference, is_known: bool) -> DaemonError {
    match error {
        DaemonError::Oci(cause) if is_known && matches!(*cause, OciError::Fetch(_) | OciError::Failed { .. }) => {
            DaemonError::Unresolved { reference: reference.to_string(), cause }
        }
        error => error,
    }
}

/// Every blob that `image` leads to is one that its manifest names.
fn ensure_named(resolved: &Resolved, image: &Image) -> Result<(), DaemonError> {
    let named = &resolved.image()?.named;
    let is_named = |id: &str| Digest::from_hex(id).is_some_and(|digest| named.contains(&digest));
    for device in image.devices() {
        let tables = BlobTables::new(&device.entry).map_err(DaemonError::Tables)?;
        let own = device.blob.as_str();
        let wanted = [own, tables.home().as_str()];
        // Of a blob without tables of its own there is nothing to fetch from anywhere else.
        let stranger = wanted.into_iter().take(if tables.stored().is_empty() { 1 } else { 2 }).find(|id| !is_named(id));
        if let Some(blob) = stranger {
            return Err(OciError::Stranger { reference: resolved.reference.clone(), blob: blob.to_owned() }.into());
        }
    }
    Ok(())
}

/// The reference of `spec`, which must be an image of a registry.
pub(super) fn reference_of(spec: &ImageSpec) -> Result<Reference, DaemonError> {
    match spec.whereabouts()? {
        Whereabouts::Registry(reference) => Ok(reference),
        Whereabouts::File(_) => Err(SpecError::OneOfTwo.into()),
    }
}
