//! From a bootstrap file and a source to maps and a mountable copy.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ring::digest;

use super::DaemonError;
use super::api::ImageSpec;
use crate::base::{BLOCK, BlobId, Digest};
use crate::blob::{BlobTables, TablesError, Unit, UnitMap};
use crate::export::{Backing, LiveImage};
use crate::image::{Device, Image};
use crate::reader::{self, ensure_block_size, ensure_checkable, maps};
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
}

impl std::fmt::Debug for Prepared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("key", &self.key).finish_non_exhaustive()
    }
}

impl Prepared {
    /// The same image once more.
    pub(super) fn known(cache: &Path, key: Digest, image: Arc<Image>, source: Arc<dyn BlobSource>) -> Self {
        let bootstrap = cache.join("bootstraps").join(key.to_string());
        Self { image, key, bootstrap, maps: Vec::new(), source }
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

/// Reads everything a mount needs. `saved` knows maps from before, which spare fetching a blob's
/// tables. Blocks; runs its fetches on `runtime`.
pub(super) fn prepare(
    spec: &ImageSpec,
    source: Arc<dyn BlobSource>,
    cache: &Path,
    saved: &dyn Fn(&BlobId) -> Option<UnitMap>,
    runtime: &tokio::runtime::Handle,
) -> Result<Prepared, DaemonError> {
    let loaded = reader::bootstrap::load(&spec.bootstrap).map_err(DaemonError::Load)?;
    let (bootstrap, key) = adopt(&loaded.bytes, &cache.join("bootstraps"))?;
    drop(loaded);
    let image = Image::open(&bootstrap).map_err(|e| DaemonError::Bootstrap(renamed(e, &spec.bootstrap)))?;
    ensure_block_size(&image)?;
    let maps = image
        .devices()
        .iter()
        .map(|device| map(device, &image, saved, source.as_ref(), runtime))
        .collect::<Result<Vec<_>, _>>()?;
    ensure_checkable(&image, &maps)?;
    let maps = maps.into_iter().map(Arc::new).collect();
    Ok(Prepared { image: Arc::new(image), key, bootstrap, maps, source })
}

/// An image that a dead daemon had prepared, from our copy of its bootstrap. It was checked then, and
/// the kernel has it mounted: what matters now is not to keep its readers waiting.
pub(super) fn resume(cache: &Path, key: Digest, source: Arc<dyn BlobSource>) -> Result<Prepared, DaemonError> {
    let bootstrap = cache.join("bootstraps").join(key.to_string());
    let image = Arc::new(Image::open(&bootstrap).map_err(DaemonError::Bootstrap)?);
    Ok(Prepared { image, key, bootstrap, maps: Vec::new(), source })
}

/// The unit map of one device: from the cache if it is there and agrees, else from the blob.
fn map(
    device: &Device,
    image: &Image,
    saved: &dyn Fn(&BlobId) -> Option<UnitMap>,
    source: &dyn BlobSource,
    runtime: &tokio::runtime::Handle,
) -> Result<UnitMap, DaemonError> {
    BlobTables::new(&device.entry).and_then(|tables| tables.ensure_servable()).map_err(DaemonError::Tables)?;
    let saved = saved(&device.blob).and_then(|saved| maps::renew(&saved, device, image));
    let fetched = || maps::map(device, image, source, runtime).map(|mapped| mapped.map);
    saved.map_or_else(|| fetched().map_err(DaemonError::Map), Ok)
}

/// Keeps the bootstrap in the cache under its digest, so that nobody can change it while the
/// kernel has it mounted, and so that it lies on a file system that EROFS accepts.
fn adopt(bytes: &[u8], dir: &Path) -> Result<(PathBuf, Digest), DaemonError> {
    let write = |cause| DaemonError::Io { path: dir.to_owned(), cause };
    let mut hasher = digest::Context::new(&digest::SHA256);
    hasher.update(bytes);
    let key = finish(hasher);
    let path = dir.join(key.to_string());
    // A copy from before is used only if it is still what its name says.
    if File::open(&path).and_then(sha256_of).is_ok_and(|there| there == key) {
        return Ok((path, key));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(write)?;
    let scratch = dir.join(format!(".new-{}-{:?}", std::process::id(), std::thread::current().id()));
    let mut to =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&scratch).map_err(write)?;
    let _remove = RemoveOnDrop(&scratch);
    to.write_all(bytes).and_then(|()| to.sync_all()).map_err(write)?;
    fs::rename(&scratch, &path).map_err(write)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(write)?;
    Ok((path, key))
}

fn sha256_of(mut file: File) -> io::Result<Digest> {
    let (mut hasher, mut buffer) = (digest::Context::new(&digest::SHA256), vec![0; BOOTSTRAP_UNIT]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(finish(hasher)),
            len => hasher.update(&buffer[..len]),
        }
    }
}

fn finish(hasher: digest::Context) -> Digest {
    Digest(hasher.finish().as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

struct RemoveOnDrop<'a>(&'a Path);

impl Drop for RemoveOnDrop<'_> {
    fn drop(&mut self) {
        // Gone already when it was renamed.
        let _ = fs::remove_file(self.0);
    }
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
    use crate::daemon::api::PrefetchOrder;
    use crate::reader::LoadError;

    #[test]
    fn what_is_no_regular_file_is_no_bootstrap_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (fifo, bootstraps) = (dir.path().join("fifo"), dir.path().join("bootstraps"));
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();

        for path in [fifo.as_path(), Path::new("/dev/zero"), dir.path()] {
            let blobs = dir.path().to_str().unwrap().to_owned();
            let spec = ImageSpec { bootstrap: path.to_owned(), blobs, ca: None, prefetch: PrefetchOrder::None };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let source = Arc::new(LocalSource::new(dir.path()).unwrap());
            let error = prepare(&spec, source, dir.path(), &|_| None, runtime.handle()).unwrap_err();
            assert!(matches!(&error, DaemonError::Load(LoadError::Io { path: at, .. }) if at == path), "{error:?}");
        }
        assert!(!bootstraps.exists() || fs::read_dir(&bootstraps).unwrap().next().is_none());
    }
}
