//! A directory of device files, and who may write to it.
//!
//! ```text
//! root/                            mode 0700
//!   lock                           one writer per store; holds its process id
//!   v1/<blob id>/units             the unit map with all checks known so far
//!                data              decoded bytes, sparse, as long as the device
//!                present           which units of `data` can be trusted
//!   v1/<blob id>.<16 hex digits>/  the same for images that disagree about the blob
//! ```
//!
//! Files appear under their names complete or not at all. `data` is never punched, shortened or
//! preallocated: a kernel may have it mounted.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use tokio::runtime::Handle;

use super::bits::{self, Identity};
use super::device::{Device, Home};
use super::disk::{Disk, DiskFile, FileFacts, FileSink, HostDisk};
use super::engine::{Engine, StoreOptions};
use super::is_needed;
use super::ledger::{DurableCopy, FlushError, Ledger, SyncNames};
use super::presence::{bit, found};
use super::sink::Sink;
use crate::base::{BlobId, ByteRange, Digest};
use crate::blob::UnitMap;
use crate::source::BlobSource;
use crate::sys::files::{inode_id, inode_id_at};

/// Why a store or a device in it could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process writes to the store.
    #[error("the cache at {} is in use{}", .root.display(), .pid.map(|pid| format!(" by process {pid}")).unwrap_or_default())]
    Locked { root: PathBuf, pid: Option<u32> },
    /// The file system failed.
    #[error("cannot use {}", .path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// A lock was handed over, of another store.
    #[error("what a daemon left behind belongs to another cache than {}", root.display())]
    ForeignLock { root: PathBuf },
    /// Nothing is known of a device that a process used before it died.
    #[error("{} has no unit map that can be read", dir.display())]
    Unknown { dir: PathBuf },
    /// Two maps with the same fingerprint prefix disagree: one of them was made to.
    #[error("the cache holds another blob {blob} that contradicts this one")]
    Contradiction { blob: BlobId },
    /// Somebody else than the store changed a file that is in use.
    #[error("{} was replaced or changed from outside while it is in use; unmount what uses it, then mount again", .path.display())]
    Replaced { path: PathBuf },
    /// The threads could not be started.
    #[error("cannot start the threads of the cache")]
    Threads(#[source] io::Error),
    /// Presence could not be made durable.
    #[error("cannot make blob {blob} durable")]
    Flush {
        blob: BlobId,
        #[source]
        cause: FlushError,
    },
}

/// Devices by name in one directory, with the one right to write there.
pub struct Store {
    devices_dir: PathBuf,
    disk: Arc<dyn Disk>,
    engine: Arc<Engine>,
    shelves: Mutex<HashMap<String, Shelf>>,
    lock: Arc<File>,
}

/// What is alive of one device directory. A ledger outlives its device while the last jobs end;
/// whoever opens the device again must go on with the same one.
struct Shelf {
    device: Weak<Device>,
    ledger: Weak<Ledger>,
    /// What tells the file apart that the ledger writes to.
    data: FileFacts,
    /// The same file, open for writing; `None` if it is not one of this host.
    file: Option<Arc<File>>,
}

/// A data file with what is known about it.
struct Opened {
    ledger: Arc<Ledger>,
    data: FileFacts,
    file: Option<Arc<File>>,
}

impl Store {
    /// Opens the store at `root`, creating it if it is not there, and starts its threads.
    /// Fetches run on `runtime`.
    pub fn open(root: &Path, options: StoreOptions, runtime: Handle) -> Result<Arc<Self>, StoreError> {
        Self::open_locked(root, options, runtime, None)
    }

    /// The same with the lock of a process that has died, if there is one: it is still held.
    ///
    /// # Errors
    /// `ForeignLock` if it is the lock of another store.
    pub fn open_locked(
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
        held: Option<File>,
    ) -> Result<Arc<Self>, StoreError> {
        Self::assemble(Arc::new(HostDisk), root, options, runtime, held)
    }

    /// As [`Store::open`] with the devices on `disk`. Only the lock is a file of this host in any case.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
    ) -> Result<Arc<Self>, StoreError> {
        Self::assemble(disk, root, options, runtime, None)
    }

    fn assemble(
        disk: Arc<dyn Disk>,
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
        held: Option<File>,
    ) -> Result<Arc<Self>, StoreError> {
        let devices_dir = root.join("v1");
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(at(root))?;
        // Whoever can write to a device file can put anything into a container.
        fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at(root))?;
        let lock = Arc::new(match held {
            Some(held) => take_over(root, held)?,
            None => lock(root)?,
        });
        disk.create_dir(&devices_dir).map_err(at(&devices_dir))?;
        disk.sync_dir(root).map_err(at(root))?;
        let engine = Engine::new(options, runtime).map_err(StoreError::Threads)?;
        Ok(Arc::new(Self { devices_dir, disk, engine, shelves: Mutex::default(), lock }))
    }

    /// The open lock. Whoever keeps a copy of it keeps every other process out of the store, even
    /// when this one has died.
    pub fn lock_file(&self) -> &Arc<File> {
        &self.lock
    }

    /// The threads and limits, for devices over foreign sinks.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The unit map kept for `blob`, with all checks learnt so far; spares fetching its tables.
    pub fn saved_map(&self, blob: &BlobId) -> Option<UnitMap> {
        self.place(blob.as_str()).saved().filter(|map| map.blob() == blob)
    }

    /// The device for `map`'s blob, shared with everyone whose map agrees.
    ///
    /// `source` is asked before those the device had, which stay for when it fails. A map that disagrees with what is known gets a
    /// directory of its own: an image with false digests must not poison another one's cache.
    /// Waits for the disk.
    pub fn device(&self, map: UnitMap, source: Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let mut shelves = self.shelves.lock().unwrap();
        let common = map.blob().to_string();
        let own = format!("{common}.{}", &map.fingerprint().to_string()[..16]);
        for name in [common, own] {
            if let Some(device) = self.shared(&mut shelves, &name, &map, &source)? {
                return Ok(device);
            }
        }
        Err(StoreError::Contradiction { blob: map.blob().clone() })
    }

    /// The device in directory `name`, or `None` if what is there disagrees with `map`.
    fn shared(
        &self,
        shelves: &mut HashMap<String, Shelf>,
        name: &str,
        map: &UnitMap,
        source: &Arc<dyn BlobSource>,
    ) -> Result<Option<Arc<Device>>, StoreError> {
        let place = self.place(name);
        let shelf = shelves.get(name);
        if let Some(shelf) = shelf.filter(|shelf| shelf.ledger.strong_count() > 0) {
            place.ensure_unchanged(&shelf.data)?;
        }
        if let Some(device) = shelf.and_then(|shelf| shelf.device.upgrade()) {
            return Ok(device.try_learn(map, Arc::clone(source))?.then_some(device));
        }
        let opened = shelf.and_then(|shelf| {
            Some(Opened { ledger: shelf.ledger.upgrade()?, data: shelf.data, file: shelf.file.clone() })
        });
        let Some(merged) = place.settle_map(map)? else { return Ok(None) };
        let opened = match opened {
            Some(opened) => opened,
            None => place.open_ledger(&merged, place.open_data(&merged)?)?,
        };
        Ok(Some(self.shelve(shelves, name, merged, source, opened)))
    }

    /// Names of the directories of all devices, whether somebody uses them or not.
    pub fn directories(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.devices_dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The file of decoded bytes of the device in directory `name`.
    pub fn data_path(&self, name: &str) -> PathBuf {
        self.place(name).data()
    }

    /// Whether everything that can be is in the device in directory `name`, durably. For a device
    /// that nobody uses.
    pub fn is_complete(&self, name: &str) -> bool {
        let place = self.place(name);
        let Some(map) = place.saved() else { return false };
        let Ok(data) = self.disk.open(&place.data()) else { return false };
        let Ok((_, Some(words))) = place.believed(&map, &*data) else { return false };
        (0..).zip(map.units()).all(|(index, unit)| !is_needed(unit) || bit(&words, index))
    }

    /// The device of a process that has died, in directory `name`. `data` is its file, opened by
    /// that process before the kernel was told to ask about it: opened anew, the device's own
    /// writes would wait for an answer to themselves.
    ///
    /// # Errors
    /// `Unknown` if the store has lost the map of the device, `Replaced` if `data` is not the file
    /// any more that the store has there, or has another length than the device.
    pub fn adopt(&self, name: &str, data: File, source: Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let mut shelves = self.shelves.lock().unwrap();
        let place = self.place(name);
        let data = FileSink::new(data);
        place.ensure_unchanged(&data.facts().map_err(at(&place.data()))?)?;
        if let Some(device) = shelves.get(name).and_then(|shelf| shelf.device.upgrade()) {
            device.try_learn(&device.map(), source)?;
            return Ok(device);
        }
        let map = place.saved().ok_or_else(|| StoreError::Unknown { dir: place.dir.clone() })?;
        let opened = place.open_ledger(&map, Box::new(data))?;
        Ok(self.shelve(&mut shelves, name, map, &source, opened))
    }

    fn shelve(
        &self,
        shelves: &mut HashMap<String, Shelf>,
        name: &str,
        map: UnitMap,
        source: &Arc<dyn BlobSource>,
        Opened { ledger, data, file }: Opened,
    ) -> Arc<Device> {
        let place = self.place(name);
        let weak = Arc::downgrade(&ledger);
        let home = Home {
            data: place.data(),
            file: file.clone(),
            save: Box::new(move |map| place.save(map)),
            _lock: Arc::clone(&self.lock),
        };
        let device = Device::assemble(Arc::new(map), Arc::clone(source), ledger, Some(home), Arc::clone(&self.engine));
        shelves.retain(|_, shelf| shelf.ledger.strong_count() > 0);
        shelves.insert(name.to_owned(), Shelf { device: Arc::downgrade(&device), ledger: weak, data, file });
        device
    }

    fn place(&self, name: &str) -> Place {
        Place { dir: self.devices_dir.join(name), disk: Arc::clone(&self.disk) }
    }

    /// Makes everything present in all devices durable. Waits for the disk. Devices stay usable.
    ///
    /// # Errors
    /// The first failure; the other devices are flushed all the same.
    pub fn close(&self) -> Result<(), StoreError> {
        let devices: Vec<_> = self.shelves.lock().unwrap().values().filter_map(|s| s.device.upgrade()).collect();
        let mut outcome = Ok(());
        for device in devices {
            let flushed = device.flush().map_err(|cause| StoreError::Flush { blob: device.blob().clone(), cause });
            outcome = outcome.and(flushed);
        }
        outcome
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("devices_dir", &self.devices_dir).finish_non_exhaustive()
    }
}

/// Adds the path to an error of the system.
fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |cause| StoreError::Io { path, cause }
}

/// Takes the right to write, which lasts until the file is closed.
fn lock(root: &Path) -> Result<File, StoreError> {
    let path = root.join("lock");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = open.map_err(at(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let pid = file.take(20).read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(StoreError::Locked { root: root.to_owned(), pid });
        }
        Err(TryLockError::Error(cause)) => return Err(at(&path)(cause)),
    }
    // Only for the message above, so a failure to write it is no failure.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

/// Goes on with a lock that is held already, if it is the one of `root`.
fn take_over(root: &Path, mut held: File) -> Result<File, StoreError> {
    let path = root.join("lock");
    let same = inode_id_at(&path).and_then(|there| Ok(there == inode_id(&held)?)).unwrap_or(false);
    if !same {
        return Err(StoreError::ForeignLock { root: root.to_owned() });
    }
    // Only for people, so a failure to write it is no failure.
    let _ = held.set_len(0).and_then(|()| held.rewind()).and_then(|()| writeln!(held, "{}", std::process::id()));
    Ok(held)
}

/// The directory of one device and what is done to its files.
struct Place {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
}

impl Place {
    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// The map saved here, if there is a sound one.
    fn saved(&self) -> Option<UnitMap> {
        UnitMap::from_bytes(&self.disk.read(&self.dir.join("units")).ok()?).ok()
    }

    fn save(&self, map: &UnitMap) -> Result<(), StoreError> {
        self.replace("units", |file| file.write_at(&map.to_bytes(), 0))
    }

    /// Merges `map` with the one saved and saves the outcome; `None` if they disagree.
    fn settle_map(&self, map: &UnitMap) -> Result<Option<UnitMap>, StoreError> {
        if let Some(known) = self.saved() {
            let merged = known.merge(map);
            if let Some(merged) = &merged
                && *merged != known
            {
                self.save(merged)?;
            }
            return Ok(merged);
        }
        self.disk.create_dir(&self.dir).map_err(at(&self.dir))?;
        // What is present was checked against a map that is lost.
        self.forget_presence()?;
        self.save(map)?;
        Ok(Some(map.clone()))
    }

    /// Opens `data` for writing, creating or replacing what is missing or does not fit.
    fn open_data(&self, map: &UnitMap) -> Result<Box<dyn DiskFile>, StoreError> {
        let path = self.data();
        let fits = self.disk.facts(&path).is_ok_and(|file| file.is_file && file.len == map.decoded_len());
        if !fits {
            // First, or a new file with the old one's inode number could be taken for it.
            self.forget_presence()?;
            self.replace("data", |file| file.set_len(map.decoded_len()))?;
        }
        self.disk.open(&path).map_err(at(&path))
    }

    /// What `data` is, and the units that `present` can be believed about; `None` if about nothing,
    /// and it has to be made anew.
    fn believed(&self, map: &UnitMap, data: &dyn DiskFile) -> io::Result<(FileFacts, Option<Vec<u64>>)> {
        let facts = data.facts()?;
        let identity = identity(map, &facts);
        let bytes = self.disk.read(&self.dir.join("present")).unwrap_or_default();
        if !bytes.starts_with(&bits::empty(&identity)) {
            return Ok((facts, None));
        }
        let words = bits::read(&bytes, &identity);
        let nothing = words.iter().all(|&word| word == 0);
        let sound = nothing || is_possible(map, &words, &data.data_ranges(facts.len)?);
        Ok((facts, sound.then_some(words)))
    }

    /// Opens `present`, creating or replacing it if it is missing or does not fit to `data`.
    fn open_ledger(&self, map: &UnitMap, data: Box<dyn DiskFile>) -> Result<Opened, StoreError> {
        let (facts, believed) = self.believed(map, &*data).map_err(at(&self.data()))?;
        if facts.len != map.decoded_len() {
            return Err(StoreError::Replaced { path: self.data() });
        }
        let identity = identity(map, &facts);
        let words = match believed {
            Some(words) => words,
            None => {
                let fresh = bits::empty(&identity);
                self.replace("present", |file| file.write_at(&fresh, 0))?;
                bits::read(&fresh, &identity)
            }
        };
        let present = self.dir.join("present");
        let bits = self.disk.open(&present).map_err(at(&present))?;
        let copy = DurableCopy { file: bits, identity, names: Some(self.sync_names()) };
        let file = data.host_file();
        let sink = WholeFile { file: data, len: facts.len };
        Ok(Opened { ledger: Arc::new(Ledger::new(Box::new(sink), words, Some(copy))), data: facts, file })
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
    fn ensure_unchanged(&self, opened: &FileFacts) -> Result<(), StoreError> {
        let path = self.data();
        match self.disk.facts(&path) {
            Ok(now) if now == *opened => Ok(()),
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(&path)(cause)),
            _ => Err(StoreError::Replaced { path }),
        }
    }

    /// Makes a file appear under `name` complete and durable, or not at all.
    fn replace(&self, name: &str, write: impl FnOnce(&dyn DiskFile) -> io::Result<()>) -> Result<(), StoreError> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!("{name}.new")));
        let file = self.disk.create(&new).map_err(at(&new))?;
        write(&*file).and_then(|()| file.sync()).map_err(at(&new))?;
        self.disk.rename(&new, &path).map_err(at(&path))?;
        self.disk.sync_dir(&self.dir).map_err(at(&self.dir))
    }

    /// Makes the names of the files and of their directory durable.
    fn sync_names(&self) -> Box<SyncNames> {
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
}

/// Whether the units in `words` can all be in a file whose data is `there`, having been checked. A
/// file of which pieces were cut out or lost is not believed about the rest either.
fn is_possible(map: &UnitMap, words: &[u64], there: &[ByteRange]) -> bool {
    words.iter().zip(found(map, there)).all(|(claimed, possible)| claimed & !possible == 0)
}

/// What presence is bound to: where units lie, without how they are checked, and the file.
fn identity(map: &UnitMap, data: &FileFacts) -> Identity {
    Identity { layout: layout(map), units: map.count(), inode: data.inode, born: data.born }
}

/// Fingerprint of where units lie, without how they are checked.
fn layout(map: &UnitMap) -> Digest {
    map.without_checks().fingerprint()
}
