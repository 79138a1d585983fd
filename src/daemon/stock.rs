//! The cache as the daemon sees it: what is there, which images use it, and what people may do to
//! it. What needs no daemon is functions of the shelves, for commands that work on a directory.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::api::{BlobReport, BlobUsage, CacheReport, GcReport, GcRequest, ImageUsage};
use super::served::{Live, Served};
use super::{Daemon, DaemonError};
use crate::blob::UnitMap;
use crate::cache::{LotKind, Removed, Shelves, StockError, VerifyReport, Wanted};
use crate::image::Image;

/// What is in the cache, with nobody known to use it.
pub fn report(shelves: &Shelves) -> Result<CacheReport, StockError> {
    let inventory = shelves.inventory()?;
    let bytes = inventory.bytes();
    let blob = |stock| BlobReport { stock, used_by: Vec::new() };
    Ok(CacheReport {
        dir: shelves.root().to_owned(),
        stats: None,
        blobs: inventory.blobs.into_iter().map(blob).collect(),
        bootstraps: inventory.bootstraps,
        kernel_cache_bytes: inventory.kernel_cache_bytes,
        promises_bytes: inventory.promises_bytes,
        bytes,
    })
}

/// Removes what nobody uses, as asked.
pub fn collect(shelves: &Shelves, request: &GcRequest) -> Result<GcReport, StockError> {
    let before = shelves.bytes();
    let wanted = Wanted {
        excess: if request.to == 0 { u64::MAX } else { before.saturating_sub(request.to) },
        idle_for: request.older_than.map(Duration::from_secs),
        now: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_secs()),
    };
    let removed = shelves.collect(wanted, request.dry_run)?;
    let freed_bytes = removed.iter().map(|removed| removed.bytes).sum();
    let left_bytes = if request.dry_run { before.saturating_sub(freed_bytes) } else { shelves.bytes() };
    Ok(GcReport { removed, freed_bytes, left_bytes, dry_run: request.dry_run })
}

/// Removes one blob.
pub fn drop_blob(shelves: &Shelves, blob: &str) -> Result<Removed, StockError> {
    let name = shelves.find(blob)?;
    let (bytes, _) = shelves.allocated(LotKind::Blob, &name);
    shelves.remove(&name)?;
    Ok(Removed { name, kind: LotKind::Blob, bytes })
}

/// Reads a blob, or else the copy of a bootstrap, again and checks it; `go_on` as in [`Shelves::verify`].
pub fn verify(shelves: &Shelves, name: &str, go_on: &mut dyn FnMut(u64) -> bool) -> Result<VerifyReport, StockError> {
    match shelves.find(name) {
        Err(StockError::Unknown(_)) => shelves.verify_bootstrap(&shelves.bootstraps().find(name)?, go_on),
        found => shelves.verify(&found?, go_on),
    }
}

/// Makes one blob stay, or no longer; gives its whole name.
pub fn pin(shelves: &Shelves, blob: &str, pinned: bool) -> Result<String, StockError> {
    let name = shelves.find(blob)?;
    shelves.pin(&name, pinned)?;
    Ok(name)
}

/// What the images whose bootstraps are in the cache take there. `served` are those that somebody
/// serves, with where they are mounted.
fn usage(shelves: &Shelves, served: &[(Option<PathBuf>, Served)]) -> Result<Vec<ImageUsage>, StockError> {
    let mut images: BTreeMap<String, (BTreeSet<PathBuf>, BTreeSet<Part>)> = BTreeMap::new();
    for (dir, served) in served {
        let (dirs, parts) = images.entry(served.prepared.key.to_string()).or_default();
        dirs.extend(dir.clone());
        parts.extend(parts_of(served));
    }
    for bootstrap in shelves.inventory()?.bootstraps {
        if images.contains_key(&bootstrap.name) {
            continue;
        }
        // One that cannot be read is still there, and its blobs are nobody's.
        let image = Image::open(&shelves.bootstraps().dir().join(&bootstrap.name));
        let blobs = image.iter().flat_map(|image| image.devices()).map(|device| device.blob.to_string());
        let parts = blobs.map(|name| Part { name, in_kernel_cache: None }).collect();
        images.insert(bootstrap.name, (BTreeSet::new(), parts));
    }
    let mut owners: HashMap<Part, u32> = HashMap::new();
    for part in images.values().flat_map(|(_, parts)| parts) {
        *owners.entry(part.clone()).or_default() += 1;
    }
    let describe = |(image, (dirs, parts)): (String, (BTreeSet<PathBuf>, BTreeSet<Part>))| {
        let (bootstrap_bytes, bootstrap_inodes) = shelves.allocated(LotKind::Bootstrap, &image);
        let blobs: Vec<BlobUsage> = parts.iter().map(|part| part.usage(shelves, owners[part])).collect();
        let shared = || blobs.iter().filter(|blob| blob.images > 1);
        ImageUsage {
            mounted: dirs.into_iter().collect(),
            bytes: bootstrap_bytes + blobs.iter().map(|blob| blob.bytes).sum::<u64>(),
            inodes: bootstrap_inodes + blobs.iter().map(|blob| blob.inodes).sum::<u64>(),
            shared_bytes: shared().map(|blob| blob.bytes).sum(),
            shared_inodes: shared().map(|blob| blob.inodes).sum(),
            bootstrap_bytes,
            blobs,
            image,
        }
    };
    Ok(images.into_iter().map(describe).collect())
}

/// The same when nobody serves.
pub fn idle_usage(shelves: &Shelves) -> Result<Vec<ImageUsage>, StockError> {
    usage(shelves, &[])
}

/// One blob of an image, where it lies.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Part {
    name: String,
    /// Bytes of the units present, if it is the kernel that keeps it.
    in_kernel_cache: Option<u64>,
}

impl Part {
    fn usage(&self, shelves: &Shelves, images: u32) -> BlobUsage {
        let (bytes, inodes) = match self.in_kernel_cache {
            Some(bytes) => (bytes, 1),
            None => shelves.allocated(LotKind::Blob, &self.name),
        };
        BlobUsage { name: self.name.clone(), bytes, inodes, images, in_kernel_cache: self.in_kernel_cache.is_some() }
    }
}

/// The blobs of a served image, by their directories where they have some.
fn parts_of(served: &Served) -> Vec<Part> {
    let part = |(map, live): (&Arc<UnitMap>, &Live)| {
        let device = live.device();
        let data = device.as_ref().and_then(|device| device.data_path());
        let dir = data.and_then(|data| data.parent()?.file_name()?.to_str());
        let name = dir.map_or_else(|| map.blob().to_string(), str::to_owned);
        let in_kernel_cache = match live {
            Live::Stored(_) => None,
            Live::Object(_) => Some(device.as_ref().map_or(0, |device| device.present_bytes())),
        };
        Part { name, in_kernel_cache }
    };
    served.prepared.maps.iter().zip(&served.devices).map(part).collect()
}

impl Daemon {
    /// What is in the cache, and who uses it.
    pub fn cache_report(&self) -> Result<CacheReport, DaemonError> {
        let mut report = report(self.store().shelves())?;
        report.stats = Some(self.store().stats());
        for (dir, served) in self.all_served() {
            let options = served.registration.as_ref().map(|registration| registration.name().mount_options());
            let image = dir.map(|dir| dir.display().to_string()).or(options);
            let image =
                image.unwrap_or_else(|| format!("an unmounted tree with open files of {}", served.prepared.key));
            for part in parts_of(&served).into_iter().filter(|part| part.in_kernel_cache.is_none()) {
                let blob = report.blobs.iter_mut().find(|blob| blob.stock.name == part.name);
                blob.into_iter().for_each(|blob| blob.used_by.push(image.clone()));
            }
        }
        Ok(report)
    }

    /// What each image takes in the cache.
    pub fn cache_usage(&self) -> Result<Vec<ImageUsage>, DaemonError> {
        Ok(usage(self.store().shelves(), &self.all_served())?)
    }

    /// Removes what nobody uses, as asked. Blocks.
    pub fn collect(&self, request: &GcRequest) -> Result<GcReport, DaemonError> {
        Ok(collect(self.store().shelves(), request)?)
    }

    /// Reads a blob, or the copy of a bootstrap, again and checks it. Blocks, for as long as the disk takes; a daemon
    /// that is stopping cuts it short.
    pub fn verify(&self, blob: &str) -> Result<VerifyReport, DaemonError> {
        Ok(verify(self.store().shelves(), blob, &mut |_| !self.is_stopping())?)
    }

    /// Makes a blob stay, or no longer; gives its whole name.
    pub fn pin(&self, blob: &str, pinned: bool) -> Result<String, DaemonError> {
        Ok(pin(self.store().shelves(), blob, pinned)?)
    }

    /// Removes a blob that nobody uses. Blocks.
    pub fn drop_blob(&self, blob: &str) -> Result<Removed, DaemonError> {
        Ok(drop_blob(self.store().shelves(), blob)?)
    }
}
