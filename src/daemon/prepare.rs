//! From a bootstrap and a source to maps and a mountable copy.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::DaemonError;
use super::known::{Known, KnownImages, Origin};
use crate::base::{BLOCK, BlobId, Digest};
use crate::blob::{BlobKind, BlobTables, TablesError, Unit, UnitMap};
use crate::cache::{Bootstraps, ImageKey, KeptBootstrap};
use crate::export::{Backing, LiveImage};
use crate::image::{Device, Image};
use crate::reader::bootstrap::{Found, layer_key};
use crate::reader::{self, ensure_checkable, maps, tarfile};
use crate::source::{BlobSource, LocalSource};

/// An image that is ready to be attached to a backend.
pub(super) struct Prepared {
    pub(super) image: Arc<Image>,
    /// SHA-256 of the bootstrap.
    pub(super) key: Digest,
    /// Our own copy of the bootstrap: complete, synced, and never written again.
    pub(super) bootstrap: PathBuf,
    /// One map per device, with the digests this image names.
    pub(super) maps: Vec<Arc<UnitMap>>,
    pub(super) source: Arc<dyn BlobSource>,
    /// The file it was read from; `None` if it was known already, or changed while it was read.
    pub(super) origin: Option<Origin>,
    /// What it is called in a registry, if it comes from one.
    pub(super) named: Option<Named>,
    /// The copy stays while the image is served.
    kept: KeptBootstrap,
}

/// What an image is called in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// As it was asked for.
    pub(super) reference: String,
    /// What that led to.
    pub(super) manifest: Digest,
    /// Why the registry could not be asked whether it still does.
    pub(super) unconfirmed: Option<String>,
}

/// A bootstrap that is wanted.
pub(super) enum Wanted<'a> {
    /// In this file.
    File(&'a Path),
    /// In a layer of an image in a registry.
    Layer(&'a Layer<'a>),
}

/// A layer with a bootstrap in it.
pub(super) struct Layer<'a> {
    /// Of the layer.
    pub(super) digest: Digest,
    /// What to call the bootstrap in messages.
    pub(super) shown: &'a Path,
    /// Gives the bootstrap; not asked if what it would give is kept already.
    pub(super) fetch: &'a dyn Fn() -> Result<Vec<u8>, DaemonError>,
    /// Whether whoever named the layer may have the bytes that the image leads to.
    pub(super) admit: &'a dyn Fn(&Image) -> Result<(), DaemonError>,
}

impl Wanted<'_> {
    fn origin(&self) -> Option<Origin> {
        match self {
            Self::File(path) => Origin::of(path).ok(),
            Self::Layer(layer) => Some(Origin::Layer(layer.digest)),
        }
    }

    fn shown(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Layer(layer) => layer.shown,
        }
    }

    fn admit(&self, image: &Image) -> Result<(), DaemonError> {
        match self {
            Self::File(_) => Ok(()),
            Self::Layer(layer) => (layer.admit)(image),
        }
    }

    fn keep(&self, bootstraps: &Arc<Bootstraps>) -> Result<KeptBootstrap, DaemonError> {
        let load = |found: Found| found.load().map(|loaded| loaded.bytes).map_err(DaemonError::Load);
        match self {
            Self::File(path) => {
                let found = reader::bootstrap::find(path, None).map_err(DaemonError::Load)?;
                match (found.file(), found.to_be_lifted()) {
                    (Some(file), _) => Ok(bootstraps.keep_file(file, path)?),
                    // Lifting takes time that a further mount need not spend.
                    (None, Some(digest)) => bootstraps.keep_made(digest, || load(found)),
                    (None, None) => Ok(bootstraps.keep(&load(found)?)?),
                }
            }
            Self::Layer(layer) => bootstraps.keep_made(layer_key(layer.digest), || {
                load(reader::bootstrap::of_bytes((layer.fetch)()?, layer.shown).map_err(DaemonError::Load)?)
            }),
        }
    }
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Prepared {
    /// The same image once more.
    pub(super) fn again(kept: KeptBootstrap, image: Arc<Image>, source: Arc<dyn BlobSource>) -> Self {
        let (bootstrap, key) = (kept.path().to_owned(), kept.digest());
        Self { image, key, bootstrap, maps: Vec::new(), source, origin: None, named: None, kept }
    }

    /// Serves it by `serve`. If that fails, the copy of the bootstrap goes again that was made for it.
    pub(super) fn or_undone<T>(self, serve: impl FnOnce(Self) -> Result<T, DaemonError>) -> Result<T, DaemonError> {
        let kept = self.kept.again();
        let served = serve(self);
        match &served {
            Ok(_) => kept.settle(),
            Err(_) => kept.give_up(),
        }
        served
    }

    /// The copy of the bootstrap.
    pub(super) fn kept(&self) -> &KeptBootstrap {
        &self.kept
    }

    /// Under whose limits its readers are.
    pub(super) fn limits_key(&self) -> ImageKey {
        let (first, _) = self.key.0.split_first_chunk().expect("a digest has more bytes");
        ImageKey(u64::from_le_bytes(*first))
    }

    /// What is worth knowing when the same image is mounted again. `maps` are its own, shared with whoever
    /// has the same.
    pub(super) fn known(&self, maps: Vec<Arc<UnitMap>>) -> std::io::Result<Known> {
        Ok(Known { stamp: self.kept.stamp()?, maps })
    }

    /// The image over these devices, as a backend mounts it.
    pub(super) fn live(&self, devices: &[Arc<crate::cache::Device>]) -> LiveImage {
        LiveImage {
            image: self.image.clone(),
            bootstrap: self.bootstrap.clone(),
            devices: devices.iter().map(|device| device.clone() as Arc<dyn Backing>).collect(),
        }
    }
}

/// Pieces in which a bootstrap is served by the cachefiles backend.
const BOOTSTRAP_UNIT: usize = 1 << 20;

/// Reads everything a mount needs, with a copy of the bootstrap in `bootstraps`. `saved` knows maps
/// from before, which spare fetching a blob's tables; an image among `images` is not even read. What is fetched for that
/// comes from the second source, which may end it. Blocks; runs its fetches on `runtime`.
pub(super) fn prepare(
    wanted: &Wanted<'_>,
    (source, asked): (Arc<dyn BlobSource>, &dyn BlobSource),
    bootstraps: &Arc<Bootstraps>,
    images: &KnownImages,
    saved: &dyn Fn(&BlobId) -> Option<UnitMap>,
    runtime: &tokio::runtime::Handle,
) -> Result<Prepared, DaemonError> {
    let before = wanted.origin();
    if let Some((kept, known)) = before.as_ref().and_then(|origin| images.find(origin, bootstraps))
        && let Ok(image) = Image::open(kept.path())
    {
        wanted.admit(&image)?;
        return Ok(Prepared { maps: known.maps, ..Prepared::again(kept, Arc::new(image), source) });
    }
    let kept = wanted.keep(bootstraps)?;
    let held = kept.again();
    prepare_kept(wanted, (kept, before), (source, asked), saved, runtime).inspect_err(|_| held.give_up())
}

/// Everything else that a mount needs. `before` is where the bootstrap came from, as seen before it was read.
fn prepare_kept(
    wanted: &Wanted<'_>,
    (kept, before): (KeptBootstrap, Option<Origin>),
    (source, asked): (Arc<dyn BlobSource>, &dyn BlobSource),
    saved: &dyn Fn(&BlobId) -> Option<UnitMap>,
    runtime: &tokio::runtime::Handle,
) -> Result<Prepared, DaemonError> {
    let origin = before.filter(|before| wanted.origin().is_some_and(|after| after == *before));
    let (bootstrap, key) = (kept.path().to_owned(), kept.digest());
    let image = Image::open(&bootstrap).map_err(|e| DaemonError::Bootstrap(renamed(e, wanted.shown())))?;
    wanted.admit(&image)?;
    let maps = maps_of(&image, saved, asked, runtime)?;
    ensure_checkable(&image, &maps)?;
    kept.sync()?;
    let maps = maps.into_iter().map(Arc::new).collect();
    Ok(Prepared { image: Arc::new(image), key, bootstrap, maps, source, origin, named: None, kept })
}

/// An image that a dead daemon had prepared, from our copy of its bootstrap. It was checked then, and
/// the kernel has it mounted: what matters now is not to keep its readers waiting.
pub(super) fn resume(kept: KeptBootstrap, source: Arc<dyn BlobSource>) -> Result<Prepared, DaemonError> {
    let image = Arc::new(Image::open(kept.path()).map_err(DaemonError::Bootstrap)?);
    Ok(Prepared::again(kept, image, source))
}

/// The unit map of each device: from the cache if it is there and agrees, else from the blob. A plain tar layer has
/// no tables and is read as a whole.
fn maps_of(
    image: &Image,
    saved: &dyn Fn(&BlobId) -> Option<UnitMap>,
    source: &dyn BlobSource,
    runtime: &tokio::runtime::Handle,
) -> Result<Vec<UnitMap>, DaemonError> {
    let known = |device: &Device| {
        let tables = BlobTables::new(&device.entry)?;
        tables.ensure_servable()?;
        // A saved map does not tell who named the digests of a plain tar layer. Nobody but the layer's own name may.
        let saved = if tables.kind() == BlobKind::Tarfs { None } else { saved(&device.blob) };
        Ok((tables, saved.and_then(|saved| maps::renew(&saved, device, image))))
    };
    let known = image.devices().iter().map(known).collect::<Result<Vec<_>, TablesError>>();
    let known = known.map_err(DaemonError::Tables)?;
    let (tables, known): (Vec<_>, Vec<_>) = known.into_iter().unzip();
    let missing: Vec<_> = tables.iter().zip(&known).filter(|(_, map)| map.is_none()).map(|(one, _)| one).collect();
    let mut fetched = maps::fetch(missing, source, runtime);
    let mut maps = Vec::with_capacity(known.len());
    for (tables, known) in tables.iter().zip(known) {
        if let Some(map) = known {
            maps.push(map);
            continue;
        }
        // One comes for each that is missing.
        let stored = fetched.next().transpose().map_err(DaemonError::Map)?.unwrap_or_default();
        let made = maps::mapped(tables, &stored, image, source, runtime).map_err(DaemonError::Map)?;
        maps.push(match made.kind {
            BlobKind::Tarfs => tarfile::digested(&made.map, source, runtime, &|_| ())?,
            _ => made.map,
        });
    }
    Ok(maps)
}

/// People know the file they named, not our copy.
fn renamed(error: crate::image::OpenError, asked: &Path) -> crate::image::OpenError {
    use crate::image::OpenError;
    match error {
        OpenError::Io { cause, .. } => OpenError::Io { path: asked.to_owned(), cause },
        OpenError::Image { cause, .. } => OpenError::Image { path: asked.to_owned(), cause },
    }
}

/// The bootstrap as a blob of plain units with digests, and the source that has it: the
/// cachefiles backend serves it like any other object.
pub(super) fn bootstrap_as_blob(prepared: &Prepared) -> Result<(UnitMap, Arc<dyn BlobSource>), DaemonError> {
    let io = |cause| DaemonError::Io { path: prepared.bootstrap.clone(), cause };
    let blob: BlobId = prepared.key.to_string().parse().expect("hexadecimal digits make an id");
    let mut file = File::open(&prepared.bootstrap).map_err(io)?;
    let (mut units, mut at, mut buffer) = (Vec::new(), 0u64, Vec::new());
    loop {
        buffer.clear();
        (&mut file).take(BOOTSTRAP_UNIT as u64).read_to_end(&mut buffer).map_err(io)?;
        if buffer.is_empty() {
            break;
        }
        units.push(Unit::plain(at, &buffer).expect("a bootstrap has at most 2 GiB"));
        at += buffer.len() as u64;
    }
    let map = UnitMap::new(blob.clone(), at.next_multiple_of(BLOCK), units)
        .map_err(|cause| DaemonError::Tables(TablesError::Map { blob, cause }))?;
    let dir = prepared.bootstrap.parent().expect("a file in the cache has a directory");
    let source = LocalSource::new(dir).map_err(DaemonError::SourceSpec)?;
    Ok((map, Arc::new(source)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::{Store, StoreOptions};
    use crate::reader::LoadError;

    #[test]
    fn what_is_no_regular_file_is_no_bootstrap_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, bootstraps) = (dir.path().join("fifo"), dir.path().join("bootstraps"));
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();

        for path in [fifo.as_path(), Path::new("/dev/zero"), dir.path()] {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let source = Arc::new(LocalSource::new(dir.path()).unwrap());
            let source = (source.clone() as Arc<dyn BlobSource>, source.as_ref() as &dyn BlobSource);
            let store = Store::open(dir.path(), StoreOptions::default(), runtime.handle().clone()).unwrap();
            let bootstraps = store.shelves().bootstraps();
            let error =
                prepare(&Wanted::File(path), source, bootstraps, &KnownImages::default(), &|_| None, runtime.handle())
                    .unwrap_err();
            assert!(matches!(&error, DaemonError::Load(LoadError::Io { path: at, .. }) if at == path), "{error:?}");
        }
        assert!(!bootstraps.exists() || std::fs::read_dir(&bootstraps).unwrap().next().is_none());
    }
}
