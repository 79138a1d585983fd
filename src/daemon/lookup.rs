//! From what a request says to an image that is ready to be served: images of registries are looked up first, and
//! everything that their names lead to is checked.
//!
//! The chain is manifest, bootstrap layer, bootstrap, blobs. A blob is served to whoever mounts an image only if the
//! image's own manifest names it, or if it was said that blobs are kept elsewhere: a bootstrap cannot name what its
//! manifest does not.

use std::cell::Cell;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::time::Instant;

use super::api::{ImageSpec, SpecError, Whereabouts};
use super::asker::Asker;
use super::prepare::{Layer, Named, Prepared, Wanted};
use super::references::References;
use super::remote::{CONFIRM, FETCH_LAYER, LOOK_UP};
use super::turns::Queue;
use super::{Daemon, DaemonError, remote};
use crate::base::{Chain, Fault};
use crate::cache::StoreError;
use crate::oci::{self, FetchError, OciError, Platform, Reference, Registry, Resolved, Version};

/// What is known of an image before its bootstrap is.
#[derive(Debug)]
pub(super) enum Found {
    /// Its bootstrap is a file.
    File(PathBuf),
    /// It is an image of a registry.
    Image {
        resolved: Box<Resolved>,
        /// Why it could not be asked whether the reference still leads there.
        unconfirmed: Option<Box<OciError>>,
    },
}

impl Found {
    /// Where to wait for others who came for the same image before, for at most [`FETCH_LAYER`].
    pub(super) fn queue(&self, daemon: &Daemon) -> Option<Queue> {
        match self {
            Self::File(_) => None,
            Self::Image { resolved, .. } => Some(daemon.turns.queue(resolved.manifest_digest)),
        }
    }
}

/// A reference as it is shown, whole.
pub(super) fn shown(text: &str) -> String {
    text.parse::<Reference>().map_or_else(|_| text.to_owned(), |reference| reference.to_string())
}

impl Daemon {
    /// Finds out what `spec` means. Asks a registry if it names an image there. Blocks.
    pub(super) fn look_up(&self, spec: &ImageSpec, asker: &Asker) -> Result<Found, DaemonError> {
        match spec.whereabouts()? {
            Whereabouts::File(path) => Ok(Found::File(path)),
            Whereabouts::Registry(reference) => {
                let platform = spec.wanted_platform()?;
                let resolved = self.resolve_now(spec, &reference, platform.as_ref(), asker)?;
                Ok(Found::Image { resolved: Box::new(resolved), unconfirmed: None })
            }
        }
    }

    /// The same to mount it: what a reference led to the last time is good enough while its registry does not answer. Not
    /// so if it refuses, or cannot be trusted.
    pub(super) fn look_up_to_mount(&self, spec: &ImageSpec, asker: &Asker) -> Result<Found, DaemonError> {
        match self.look_up(spec, asker) {
            Err(DaemonError::Unresolved { reference, cause }) if is_absence(&cause) => {
                let known = self.look_up(&ImageSpec { offline: true, ..spec.clone() }, asker);
                let Ok(Found::Image { resolved, .. }) = known else {
                    return Err(DaemonError::Unresolved { reference, cause });
                };
                Ok(Found::Image { resolved, unconfirmed: Some(cause) })
            }
            found => found,
        }
    }

    /// Where a reference leads. What is pinned by its digest and known is not asked about; of a tag, whether it
    /// leads where it did.
    pub(super) fn resolve_now(
        &self,
        spec: &ImageSpec,
        reference: &Reference,
        platform: Option<&Platform>,
        asker: &Asker,
    ) -> Result<Resolved, DaemonError> {
        let mut kept = self.references.find(reference, platform);
        let queue = self.turns.queue(References::key(reference, platform));
        let until = Instant::now() + LOOK_UP;
        // The first who comes learns it for all.
        let _turn = if kept.is_none() { Some(queue.wait(until, asker)?) } else { None };
        if kept.is_none() {
            kept = self.references.find(reference, platform);
        }
        if spec.offline {
            return kept.ok_or_else(|| OciError::Unknown { reference: reference.clone() }.into());
        }
        // Then what it led to before is no answer, whatever happens.
        let has_moved = Cell::new(false);
        let ask = || {
            let repository = reference.repository();
            let fetch = |until| {
                let fetch = self.origins.registry(repository.host(), spec.ca.as_deref(), until);
                fetch.map_err(DaemonError::SourceSpec)
            };
            let (soon, later) = (fetch(until.min(Instant::now() + CONFIRM))?, fetch(until)?);
            let asking = async {
                if let (Some(kept), Version::Tag(tag)) = (&kept, reference.version()) {
                    let head = Registry::new(&soon, repository).head(&tag).await?;
                    if head.is_some() && head == kept.head() {
                        return Ok((kept.clone(), false));
                    }
                    has_moved.set(head.is_some());
                }
                Ok((oci::resolve(&Registry::new(&later, repository), reference, platform).await?, true))
            };
            asker.block_on(&self.runtime, asking)?.map_err(|error: OciError| DaemonError::from(error))
        };
        match (&kept, reference.version()) {
            (Some(kept), Version::Digest(_)) => Ok(kept.clone()),
            _ => {
                let (resolved, is_news) =
                    ask().map_err(|error| hint(error, reference, kept.is_some() && !has_moved.get()))?;
                // Of another kind of image somebody may make one of ours at any time, without changing it.
                if is_news && resolved.image().is_ok() {
                    self.references.keep(&resolved, platform);
                }
                Ok(resolved)
            }
        }
    }

    /// Reads everything that is needed to serve an image. Blocks.
    pub(super) fn prepare(&self, spec: &ImageSpec, found: &Found, asker: &Asker) -> Result<Prepared, DaemonError> {
        let source = self.origins.open(spec).map_err(DaemonError::SourceSpec)?;
        let (resolved, unconfirmed) = match found {
            Found::File(path) => return self.prepare_from(&Wanted::File(path), &source, asker),
            Found::Image { resolved, unconfirmed } => (resolved, unconfirmed),
        };
        let image = resolved.image()?;
        let digest = image.bootstrap.sha256().map_err(|cause| OciError::Document {
            repository: resolved.reference.repository().to_string(),
            what: "the manifest".to_owned(),
            cause,
        })?;
        let shown = PathBuf::from(resolved.reference.to_string());
        let layer = Layer {
            digest,
            shown: &shown,
            fetch: &|| match unconfirmed {
                // Who does not answer is not asked once more, and for longer.
                Some(cause) => Err(DaemonError::Oci(cause.clone())),
                None => self.fetch_bootstrap(spec, resolved, asker),
            },
            admit: &|image| if spec.blobs.is_empty() { remote::ensure_named(resolved, image) } else { Ok(()) },
        };
        let mut prepared = self.prepare_from(&Wanted::Layer(&layer), &source, asker)?;
        let (reference, manifest) = (resolved.reference.to_string(), resolved.manifest_digest);
        let unconfirmed = unconfirmed.as_ref().map(|cause| Chain(cause).to_string());
        if let Some(error) = &unconfirmed {
            tracing::warn!(reference, error, "the registry does not answer; this is what it led to the last time");
        }
        prepared.named = Some(Named { reference, manifest, unconfirmed });
        Ok(prepared)
    }

    /// The bootstrap of an image, out of its layer, which is checked before anything looks into it.
    fn fetch_bootstrap(&self, spec: &ImageSpec, resolved: &Resolved, asker: &Asker) -> Result<Vec<u8>, DaemonError> {
        let reference = &resolved.reference;
        if spec.offline {
            return Err(OciError::Unknown { reference: reference.clone() }.into());
        }
        let dir = self.store.shelves().bootstraps().dir();
        let scratch = DirBuilder::new().recursive(true).mode(0o700).create(dir).and_then(|()| remote::scratch(dir));
        let scratch = scratch.map_err(|cause| self.unwritten(&cause))?;
        let fetch =
            self.origins.registry(reference.repository().host(), spec.ca.as_deref(), Instant::now() + FETCH_LAYER);
        let fetch = fetch.map_err(DaemonError::SourceSpec)?;
        asker.block_on(&self.runtime, remote::bootstrap(&fetch, resolved, scratch))?.map_err(|error| match error {
            // Our own disk is nobody else's fault, and there may be room to be made.
            OciError::Fetch(FetchError::Taking { cause, .. }) => self.unwritten(&cause),
            other => other.into(),
        })
    }

    fn unwritten(&self, cause: &std::io::Error) -> DaemonError {
        let cause = cause.raw_os_error().map_or_else(|| cause.kind().into(), std::io::Error::from_raw_os_error);
        let path = self.store.shelves().bootstraps().dir().to_owned();
        DaemonError::Store(StoreError::Io { path, cause })
    }
}

/// Whether a registry is only not there, or not able to answer.
fn is_absence(error: &OciError) -> bool {
    match error {
        // Who tells who we are, such as a server of tokens, may be as absent.
        OciError::Fetch(error) => error.fault() == Fault::Transient,
        OciError::Failed { status, .. } => *status >= 500,
        _ => false,
    }
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

/// The reference of `spec`, which must be an image of a registry.
pub(super) fn reference_of(spec: &ImageSpec) -> Result<Reference, DaemonError> {
    match spec.whereabouts()? {
        Whereabouts::Registry(reference) => Ok(reference),
        Whereabouts::File(_) => Err(SpecError::OneOfTwo.into()),
    }
}
