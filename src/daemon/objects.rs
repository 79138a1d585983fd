//! What is known about the blobs in the kernel's own cache.
//!
//! The kernel keeps one object for each blob of a domain, for every image that names it and across
//! daemons, and keeps no digests. So it must not happen that two images of one domain promise
//! different bytes for one blob: what was fetched for the first would be shown to the other. This
//! remembers, on disk, what has been promised so far, refuses contradictions, and lets an object
//! that is open learn what another image adds.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use super::DaemonError;
use crate::base::BlobId;
use crate::blob::UnitMap;
use crate::cache::{Device, Users};
use crate::source::BlobSource;

/// All blobs of all domains.
#[derive(Debug)]
pub(super) struct Objects {
    dir: PathBuf,
    known: Mutex<HashMap<(String, BlobId), Arc<Object>>>,
}

/// One blob of one domain.
pub(super) struct Object {
    /// All promises so far, and the source of the image that came last.
    known: Mutex<(Arc<UnitMap>, Arc<dyn BlobSource>)>,
    /// The device, while the kernel has the object open.
    device: Mutex<Weak<Device>>,
    /// The images that have entered it, for the limits of their readers.
    users: Arc<Users>,
}

impl std::fmt::Debug for Object {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object").finish_non_exhaustive()
    }
}

impl Objects {
    /// Promises are kept below `dir`, which is made when there is the first to keep.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, known: Mutex::default() }
    }

    fn path(&self, domain: &str, blob: &BlobId) -> PathBuf {
        self.dir.join(domain).join(blob.as_str())
    }

    /// What was promised about `blob` in `domain`, if anything.
    pub(super) fn saved(&self, domain: &str, blob: &BlobId) -> Option<UnitMap> {
        let map = UnitMap::from_bytes(&fs::read(self.path(domain, blob)).ok()?).ok()?;
        (map.blob() == blob).then_some(map)
    }

    /// Adds the promises of an image: one object for each of `maps`.
    ///
    /// # Errors
    /// `Contradiction` if one of them disagrees with an earlier one; nothing is changed then.
    pub(super) fn enter(
        &self,
        domain: &str,
        maps: &[Arc<UnitMap>],
        source: &Arc<dyn BlobSource>,
    ) -> Result<Vec<Arc<Object>>, DaemonError> {
        let mut known = self.known.lock().unwrap();
        let mut news = Vec::new();
        for map in maps {
            let before = known.get(&(domain.to_owned(), map.blob().clone())).map(|object| object.map());
            let before = before.or_else(|| self.saved(domain, map.blob()).map(Arc::new));
            let contradiction = || DaemonError::Contradiction { blob: map.blob().clone(), domain: domain.to_owned() };
            let merged = match &before {
                Some(before) if !Arc::ptr_eq(before, map) => Arc::new(before.merge(map).ok_or_else(contradiction)?),
                _ => Arc::clone(map),
            };
            // One copy for all images that promise the same.
            match before.filter(|before| *before == merged) {
                Some(before) => news.push((before, false)),
                None => news.push((merged, true)),
            }
        }
        for (map, _) in news.iter().filter(|(_, is_new)| *is_new) {
            let path = self.path(domain, map.blob());
            save(&path, map).map_err(|cause| DaemonError::Io { path, cause })?;
        }
        let mut objects = Vec::new();
        for (map, _) in news {
            let key = (domain.to_owned(), map.blob().clone());
            let entry = known.entry(key).or_insert_with(|| Arc::new(Object::new(map.clone(), source.clone())));
            entry.learn(map, source);
            objects.push(entry.clone());
        }
        Ok(objects)
    }

    /// Has the kernel remove what it has of a blob, by `cull`, and forgets what was promised about it. Nothing of it
    /// while somebody has entered the blob, and nobody can meanwhile: the bytes of one promise must never be
    /// found under another. Tells whether it went.
    ///
    /// # Errors
    /// What `cull` says; a promise that cannot be removed stays and is told in the log.
    pub(super) fn let_go(
        &self,
        domain: &str,
        blob: &str,
        cull: &mut dyn FnMut() -> io::Result<bool>,
    ) -> io::Result<bool> {
        let Ok(blob) = blob.parse::<BlobId>() else { return cull() };
        let mut known = self.known.lock().unwrap();
        let key = (domain.to_owned(), blob);
        // Nobody can come by another copy without the lock.
        if known.get(&key).is_some_and(|object| Arc::strong_count(object) > 1) || !cull()? {
            return Ok(false);
        }
        known.remove(&key);
        let path = self.path(domain, &key.1);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a promise stays, and nothing is there that it is about");
            }
            _ => {}
        }
        Ok(true)
    }
}

impl Object {
    pub(super) fn new(map: Arc<UnitMap>, source: Arc<dyn BlobSource>) -> Self {
        Self { known: Mutex::new((map, source)), device: Mutex::default(), users: Arc::default() }
    }

    fn map(&self) -> Arc<UnitMap> {
        self.known.lock().unwrap().0.clone()
    }

    fn learn(&self, map: Arc<UnitMap>, source: &Arc<dyn BlobSource>) {
        if let Some(device) = self.device() {
            // Merged from what the device knows, so it agrees.
            device.learn(map.clone(), source.clone());
        }
        *self.known.lock().unwrap() = (map, source.clone());
    }

    /// All promises so far, and where to fetch from.
    pub(super) fn known(&self) -> (Arc<UnitMap>, Arc<dyn BlobSource>) {
        self.known.lock().unwrap().clone()
    }

    /// The images under whose limits its readers are.
    pub(super) fn users(&self) -> &Arc<Users> {
        &self.users
    }

    /// The kernel has opened the object.
    pub(super) fn opened(&self, device: &Arc<Device>) {
        *self.device.lock().unwrap() = Arc::downgrade(device);
    }

    /// The device, while the kernel has the object open.
    pub(super) fn device(&self) -> Option<Arc<Device>> {
        self.device.lock().unwrap().upgrade()
    }
}

/// Durable before anything is fetched on the strength of it.
fn save(path: &Path, map: &UnitMap) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(&map.to_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::{Check, Unit};
    use crate::source::LocalSource;

    fn map(checks: [bool; 2], lie: bool) -> UnitMap {
        let places: [(u64, &[u8]); 2] = [(0, b"one"), (4096, b"two")];
        let units = places.into_iter().zip(checks).map(|((at, bytes), known)| {
            let mut unit = Unit::plain(at, if lie { b"lie" } else { bytes }).unwrap();
            if !known {
                unit.check = Check::Unknown;
            }
            unit
        });
        UnitMap::new("blob".parse().unwrap(), 8192, units.collect()).unwrap()
    }

    #[test]
    fn what_images_list_of_a_blob_is_added_up_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(dir.path()).unwrap());
        let objects = || Objects::new(dir.path().join("maps"));
        let units = [(0, 0, b"one"), (2, 8192, b"two"), (3, 16384, b"six")];
        let units = units.map(|(index, at, bytes)| (index, Unit::plain(at, bytes).unwrap()));
        let listed = |which: &[usize]| {
            let known = which.iter().map(|at| units[*at]);
            UnitMap::listed("blob".parse().unwrap(), 1 << 20, 4, known).unwrap()
        };
        let first = objects();
        first.enter("d", &[listed(&[0, 1]).into()], &source).unwrap();
        for objects in [first, objects()] {
            let entered = objects.enter("d", &[listed(&[1, 2]).into()], &source).unwrap();
            assert_eq!(*entered[0].known().0, listed(&[0, 1, 2]));
            assert_eq!(objects.saved("d", &"blob".parse().unwrap()), Some(listed(&[0, 1, 2])));
        }
    }

    #[test]
    fn what_goes_is_forgotten_and_stays_while_somebody_has_entered_it() {
        let dir = tempfile::tempdir().unwrap();
        let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(dir.path()).unwrap());
        let objects = Objects::new(dir.path().join("maps"));
        let blob = "blob".parse().unwrap();
        let mut asked = 0;
        let mut let_go = |domain: &str, name: &str, goes: bool| {
            objects.let_go(domain, name, &mut || {
                asked += 1;
                Ok(goes)
            })
        };
        let entered = objects.enter("d", &[map([true, true], false).into()], &source).unwrap();
        assert!(!let_go("d", "blob", true).unwrap(), "somebody has it");
        drop(entered);
        assert!(!let_go("d", "blob", false).unwrap(), "the kernel has it open");
        assert!(let_go("another", "blob", true).unwrap() && let_go("d", "../lock", true).unwrap());
        assert!(objects.saved("d", &blob).is_some());

        assert!(let_go("d", "blob", true).unwrap() && let_go("d", "blob", true).unwrap());

        assert_eq!(asked, 5, "not about what somebody has");
        assert!(objects.saved("d", &blob).is_none());
        assert!(objects.enter("d", &[map([true, true], true).into()], &source).is_ok(), "it is told anew");
    }

    #[test]
    fn contradictions_are_refused_also_after_a_restart_and_additions_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let source: Arc<dyn BlobSource> = Arc::new(LocalSource::new(dir.path()).unwrap());
        let objects = || Objects::new(dir.path().join("maps"));
        let first = objects();
        first.enter("d", &[map([true, false], false).into()], &source).unwrap();
        let both = first.enter("d", &[map([false, true], false).into()], &source).unwrap();
        assert_eq!(*both[0].known().0, map([true, true], false), "what two images know is added up");

        for objects in [first, objects()] {
            let lie = objects.enter("d", &[map([true, true], true).into()], &source);
            assert!(matches!(lie, Err(DaemonError::Contradiction { .. })));
            assert_eq!(objects.saved("d", &"blob".parse().unwrap()), Some(map([true, true], false)));
            assert!(objects.enter("another", &[map([true, true], true).into()], &source).is_ok());
            assert!(objects.enter("d", &[map([true, true], false).into()], &source).is_ok());
            fs::remove_dir_all(dir.path().join("maps/another")).unwrap();
        }
    }
}
