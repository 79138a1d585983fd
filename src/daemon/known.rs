//! Images that were mounted before and have not changed since, so that mounting one again costs no
//! more than the kernel's part: its bootstrap is not read, hashed or walked again, and its maps
//! are the ones from before.
//!
//! An image is recognised by where its bootstrap lies and by what the file system says of the
//! file. Should a file be changed without that showing, the image of before is mounted, which
//! is as whole as it was.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::base::Digest;
use crate::blob::UnitMap;
use crate::cache::{BootstrapStamp, Bootstraps, KeptBootstrap};

/// Most images remembered at once.
const MOST_IMAGES: usize = 256;
/// Most units that all their maps may have together: about 64 MiB.
const MOST_UNITS: usize = 1 << 19;
/// A file that changed later than this before it was read may change again and look the same.
const UNCERTAIN: Duration = Duration::from_secs(2);

/// Where a bootstrap comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    File(OriginFile),
    /// A layer with this digest, which is never another one.
    Layer(Digest),
}

/// A bootstrap file at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OriginFile {
    path: PathBuf,
    device: u64,
    inode: u64,
    len: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Origin {
    /// The file at `path` as it is now.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        Ok(Self::File(OriginFile {
            path: path.to_owned(),
            device: meta.dev(),
            inode: meta.ino(),
            len: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }))
    }

    /// Whether `other` is about the same file, or the same layer.
    fn is_same_place(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(this), Self::File(other)) => this.path == other.path,
            (this, other) => this == other,
        }
    }

    /// Whether every later change would show. `now` is when the file was looked at.
    fn is_certain(&self, now: SystemTime) -> bool {
        let Self::File(file) = self else { return true };
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_secs(u64::try_from(file.changed.0).unwrap_or(u64::MAX));
        changed.checked_add(UNCERTAIN).is_some_and(|until| until < since)
    }
}

/// What was found out about an image.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) stamp: BootstrapStamp,
    /// One per device, checked against every file of the image.
    pub(super) maps: Vec<Arc<UnitMap>>,
}

/// Images that were mounted, the one used last at the end.
#[derive(Debug, Default)]
pub(super) struct KnownImages(Mutex<Vec<(Origin, Known)>>);

impl KnownImages {
    /// The image from `origin` with a copy of its bootstrap, if both are as they were.
    pub(super) fn find(&self, origin: &Origin, bootstraps: &Arc<Bootstraps>) -> Option<(KeptBootstrap, Known)> {
        let mut images = self.0.lock().unwrap();
        let at = images.iter().position(|(known, _)| known == origin)?;
        let entry = images.remove(at);
        let known = entry.1.clone();
        let kept = bootstraps.keep_unchanged(&known.stamp)?;
        images.push(entry);
        Some((kept, known))
    }

    /// Remembers an image that was mounted from `origin`, which was looked at before and after it was
    /// read, the last time at `now`.
    pub(super) fn remember(&self, origin: Origin, known: Known, now: SystemTime) {
        if !origin.is_certain(now) || units(&known) > MOST_UNITS {
            return;
        }
        let mut images = self.0.lock().unwrap();
        images.retain(|(other, _)| !other.is_same_place(&origin));
        images.push((origin, known));
        while images.len() > MOST_IMAGES || images.iter().map(|(_, known)| units(known)).sum::<usize>() > MOST_UNITS {
            images.remove(0);
        }
    }
}

fn units(known: &Known) -> usize {
    known.maps.iter().map(|map| map.units().len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::Unit;
    use crate::cache::{Store, StoreOptions};

    fn map(units: usize) -> Arc<UnitMap> {
        let unit = |at: usize| Unit::plain(at as u64 * 4096, b"content").unwrap();
        let units: Vec<_> = (0..units).map(unit).collect();
        Arc::new(UnitMap::new("blob".parse().unwrap(), units.len() as u64 * 4096, units).unwrap())
    }

    fn later() -> SystemTime {
        SystemTime::now() + UNCERTAIN + Duration::from_secs(2)
    }

    #[test]
    fn an_image_is_known_as_long_as_its_file_and_our_copy_are_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let store = Store::open(&dir.path().join("cache"), StoreOptions::default(), runtime.handle().clone()).unwrap();
        let (bootstraps, path) = (store.shelves().bootstraps(), dir.path().join("bootstrap"));
        std::fs::write(&path, b"an image").unwrap();
        let (images, origin) = (KnownImages::default(), Origin::of(&path).unwrap());
        let kept = bootstraps.keep(b"an image").unwrap();
        let known = Known { stamp: kept.stamp().unwrap(), maps: vec![map(3)] };
        drop(kept);

        images.remember(origin.clone(), known.clone(), SystemTime::now());
        assert!(images.find(&origin, bootstraps).is_none(), "it could change within the same tick");
        images.remember(origin.clone(), known.clone(), later());
        let (kept, found) = images.find(&Origin::of(&path).unwrap(), bootstraps).unwrap();
        assert!(Arc::ptr_eq(&found.maps[0], &known.maps[0]) && kept.path().exists());
        let copy = kept.path().to_owned();
        drop(kept);

        std::fs::write(&path, b"an image of another length").unwrap();
        assert!(images.find(&Origin::of(&path).unwrap(), bootstraps).is_none());
        std::fs::write(&copy, b"AN IMAGE").unwrap();
        assert!(images.find(&origin, bootstraps).is_none(), "our copy was changed");
        assert!(images.find(&origin, bootstraps).is_none(), "and is not asked about again");
    }

    #[test]
    fn what_is_remembered_is_bounded_and_the_oldest_goes_first() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let store = Store::open(&dir.path().join("cache"), StoreOptions::default(), runtime.handle().clone()).unwrap();
        let (bootstraps, images) = (store.shelves().bootstraps(), KnownImages::default());
        let stamp = bootstraps.keep(b"an image").unwrap().stamp().unwrap();
        let add = |name: &str, map: &Arc<UnitMap>| {
            let path = dir.path().join(name);
            std::fs::write(&path, b"an image").unwrap();
            let origin = Origin::of(&path).unwrap();
            images.remember(origin.clone(), Known { stamp: stamp.clone(), maps: vec![map.clone()] }, later());
            origin
        };

        let half = map(MOST_UNITS / 2);
        let (first, second) = (add("first", &half), add("second", &half));
        assert!(images.find(&first, bootstraps).is_some(), "which makes it the newest");
        let third = add("third", &half);
        let kept = [&first, &second, &third].map(|origin| images.find(origin, bootstraps).is_some());
        assert_eq!(kept, [true, false, true]);

        let small = map(1);
        (0..2 * MOST_IMAGES).for_each(|number| drop(add(&format!("small-{number}"), &small)));
        assert!(images.0.lock().unwrap().len() <= MOST_IMAGES);
    }
}
