//! The directory of one device and what is done to its files.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::bits::{self, Identity};
use super::disk::{Disk, DiskFile, FileFacts};
use super::ledger::{DurableCopy, Found, Ledger, SyncNames};
use super::presence::found;
use super::rest::Rest;
use super::sink::Sink;
use super::store::{StoreError, at};
use crate::base::ByteRange;
use crate::blob::UnitMap;

/// A data file with what is known about it.
pub(super) struct Opened {
    pub(super) ledger: Arc<Ledger>,
    pub(super) data: FileFacts,
    pub(super) file: Option<Arc<File>>,
}

/// What is known of a data file before it is used.
pub(super) struct Believed {
    facts: FileFacts,
    identity: Identity,
    /// The units that are there; `None` if nothing can be said, and `present` has to be made anew.
    pub(super) words: Option<Vec<u64>>,
}

/// The directory of one device and what is done to its files.
pub(super) struct Place {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
}

impl Place {
    pub(super) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The map saved here, if there is a sound one.
    pub(super) fn saved(&self) -> Option<UnitMap> {
        UnitMap::from_bytes(&self.disk.read(&self.dir.join("units")).ok()?).ok()
    }

    /// What tells the file of the saved map apart, if there is one.
    pub(super) fn saved_file(&self) -> Option<FileFacts> {
        self.disk.facts(&self.dir.join("units")).ok()
    }

    pub(super) fn save(&self, map: &UnitMap) -> Result<(), StoreError> {
        self.replace("units", |file| file.write_at(&map.to_bytes(), 0))
    }

    /// Whether there is a directory.
    pub(super) fn exists(&self) -> bool {
        // One that cannot be looked at is there.
        !matches!(self.disk.facts(&self.dir), Err(cause) if cause.kind() == io::ErrorKind::NotFound)
    }

    /// Makes everything for a blob that has no directory yet. Waits for the disk once, for the map: all else becomes
    /// durable with the first bits, before which nothing is lost with it.
    ///
    /// # Errors
    /// The disk fails; nothing is left then, as far as it lets us.
    pub(super) fn start(&self, map: &UnitMap) -> Result<Opened, StoreError> {
        self.try_start(map).inspect_err(|_| self.clear())
    }

    /// Removes what [`Place::start`] has made.
    fn clear(&self) {
        for name in ["units", "data", "present"] {
            for name in [name.to_owned(), format!("{name}.new")] {
                let _ = self.disk.remove(&self.dir.join(name));
            }
        }
        let _ = self.disk.remove_dir(&self.dir);
    }

    fn try_start(&self, map: &UnitMap) -> Result<Opened, StoreError> {
        self.disk.create_dir(&self.dir).map_err(at(&self.dir))?;
        self.put("units", |file| file.write_at(&map.to_bytes(), 0).and_then(|()| file.sync()))?;
        self.put("data", |file| file.set_len(map.decoded_len()))?;
        let data = self.disk.open(&self.data()).map_err(at(&self.data()))?;
        let facts = data.facts().map_err(at(&self.data()))?;
        let identity = identity(map, &facts);
        let fresh = bits::empty(&identity);
        self.put("present", |file| file.write_at(&fresh, 0))?;
        let nothing = Found { words: bits::read(&fresh, &identity), is_disturbed: false };
        self.ledger(data, facts, identity, nothing)
    }

    /// Merges `map` with the one saved and saves the outcome; `None` if they disagree.
    pub(super) fn settle_map(&self, map: &Arc<UnitMap>) -> Result<Option<Arc<UnitMap>>, StoreError> {
        if let Some(known) = self.saved() {
            let Some(merged) = known.merge(map) else { return Ok(None) };
            if merged != known {
                self.save(&merged)?;
            }
            return Ok(Some(if merged == **map { Arc::clone(map) } else { Arc::new(merged) }));
        }
        self.disk.create_dir(&self.dir).map_err(at(&self.dir))?;
        // What is present was checked against a map that is lost.
        self.forget_presence()?;
        self.save(map)?;
        Ok(Some(Arc::clone(map)))
    }

    /// Opens `data` for writing, creating or replacing what is missing or does not fit.
    pub(super) fn open_data(&self, map: &UnitMap) -> Result<Box<dyn DiskFile>, StoreError> {
        let path = self.data();
        let fits = self.disk.facts(&path).is_ok_and(|file| file.is_file && file.len == map.decoded_len());
        if !fits {
            // First, or a new file with the old one's inode number could be taken for it.
            self.forget_presence()?;
            self.replace("data", |file| file.set_len(map.decoded_len()))?;
        }
        self.disk.open(&path).map_err(at(&path))
    }

    /// What `data` is, and the units that `present` can be believed about.
    pub(super) fn believed(&self, map: &UnitMap, data: &dyn DiskFile) -> io::Result<Believed> {
        let facts = data.facts()?;
        let identity = identity(map, &facts);
        let bytes = self.disk.read(&self.dir.join("present")).unwrap_or_default();
        if !bytes.starts_with(&bits::empty(&identity)) {
            return Ok(Believed { facts, identity, words: None });
        }
        let words = bits::read(&bytes, &identity);
        let nothing = words.iter().all(|&word| word == 0);
        let sound = nothing || is_possible(map, &words, &data.data_ranges(facts.len)?);
        Ok(Believed { facts, identity, words: sound.then_some(words) })
    }

    /// Opens `present`, creating or replacing it if it is missing or does not fit to `data`.
    pub(super) fn open_ledger(&self, map: &UnitMap, data: Box<dyn DiskFile>) -> Result<Opened, StoreError> {
        let Believed { facts, identity, words } = self.believed(map, &*data).map_err(at(&self.data()))?;
        if facts.len != map.decoded_len() {
            return Err(StoreError::Replaced { path: self.data() });
        }
        let Some(words) = words else {
            let fresh = bits::empty(&identity);
            self.replace("present", |file| file.write_at(&fresh, 0))?;
            let nothing = Found { words: bits::read(&fresh, &identity), is_disturbed: false };
            return self.ledger(data, facts, identity, nothing);
        };
        let is_disturbed = words.iter().any(|&word| word != 0) && self.rest().is_disturbed(&facts);
        if is_disturbed {
            let path = self.data();
            tracing::warn!(path = %path.display(), "a cache file was changed while nobody used it; what is in it is checked before it is used");
        }
        self.ledger(data, facts, identity, Found { words, is_disturbed })
    }

    /// The ledger of `data`, in which `there` is.
    fn ledger(
        &self,
        data: Box<dyn DiskFile>,
        facts: FileFacts,
        identity: Identity,
        there: Found,
    ) -> Result<Opened, StoreError> {
        let present = self.dir.join("present");
        let bits = self.disk.open(&present).map_err(at(&present))?;
        let copy = DurableCopy { file: bits, identity, names: Some(self.sync_names()), rest: Some(self.rest()) };
        let file = data.host_file().cloned();
        let sink = WholeFile { file: data, len: facts.len };
        Ok(Opened { ledger: Arc::new(Ledger::new(Box::new(sink), there, Some(copy))), data: facts, file })
    }

    fn rest(&self) -> Rest {
        Rest { dir: self.dir.clone(), disk: Arc::clone(&self.disk) }
    }

    /// Removes `present`, durably.
    fn forget_presence(&self) -> Result<(), StoreError> {
        let present = self.dir.join("present");
        match self.disk.remove(&present) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(&present)(cause)),
            _ => self.disk.sync_dir(&self.dir).map_err(at(&self.dir)),
        }
    }

    /// Fails if `data` is not the file any more that it was when it was opened: what is known about
    /// that file must not be said of another.
    pub(super) fn ensure_unchanged(&self, opened: &FileFacts) -> Result<(), StoreError> {
        let path = self.data();
        match self.disk.facts(&path) {
            Ok(now) if now.is_same_file(opened) => Ok(()),
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(&path)(cause)),
            _ => Err(StoreError::Replaced { path }),
        }
    }

    /// Makes a file appear under `name` complete and durable, or not at all.
    fn replace(&self, name: &str, write: impl FnOnce(&dyn DiskFile) -> io::Result<()>) -> Result<(), StoreError> {
        self.put(name, |file| write(file).and_then(|()| file.sync()))?;
        self.disk.sync_dir(&self.dir).map_err(at(&self.dir))
    }

    /// Makes a file appear under `name` complete, as long as the machine does not go down.
    fn put(&self, name: &str, write: impl FnOnce(&dyn DiskFile) -> io::Result<()>) -> Result<(), StoreError> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!("{name}.new")));
        let file = self.disk.create(&new).map_err(at(&new))?;
        write(&*file).map_err(at(&new))?;
        self.disk.rename(&new, &path).map_err(at(&path))
    }

    /// Makes the names of the files and of their directory durable.
    pub(super) fn sync_names(&self) -> Box<SyncNames> {
        let (dir, disk) = (self.dir.clone(), Arc::clone(&self.disk));
        Box::new(move || {
            disk.sync_dir(&dir)?;
            disk.sync_dir(dir.parent().unwrap_or(&dir))
        })
    }
}

/// A data file that must stay as long as it is. Written to after somebody cut it off, it would grow
/// again, with a hole where units were present; as it is, a kernel that reads there gets an error.
struct WholeFile {
    file: Box<dyn DiskFile>,
    len: u64,
}

impl Sink for WholeFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        if self.file.facts()?.len != self.len {
            return Err(io::Error::other("somebody else changed the length of the cache file"));
        }
        self.file.write_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_at(bytes, at)
    }

    fn file(&self) -> Option<&File> {
        let whole = self.file.facts().is_ok_and(|facts| facts.len == self.len);
        self.file.file().filter(|_| whole)
    }
}

/// Whether the units in `words` can all be in a file whose data is `there`, having been checked. A
/// file of which pieces were cut out or lost is not believed about the rest either.
fn is_possible(map: &UnitMap, words: &[u64], there: &[ByteRange]) -> bool {
    words.iter().zip(found(map, there)).all(|(claimed, possible)| claimed & !possible == 0)
}

/// What presence is bound to: where units lie, without how they are checked, and the file.
pub(super) fn identity(map: &UnitMap, data: &FileFacts) -> Identity {
    Identity { layout: map.layout(), units: map.count(), inode: data.inode, born: data.born }
}
