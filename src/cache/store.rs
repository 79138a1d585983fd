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
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use tokio::runtime::Handle;

use super::bits::{self, Identity};
use super::device::{Device, Home};
use super::disk::{Disk, DiskFile, FileFacts, HostDisk};
use super::engine::{Engine, StoreOptions};
use super::ledger::{DurableCopy, FlushError, Ledger, SyncNames};
use super::presence::found;
use super::sink::Sink;
use crate::base::{BlobId, ByteRange, Digest};
use crate::blob::UnitMap;
use crate::source::BlobSource;

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
    /// The file that the ledger is about.
    data: FileFacts,
}

impl Store {
    /// Opens the store at `root`, creating it if it is not there, and starts its threads.
    /// Fetches run on `runtime`.
    pub fn open(root: &Path, options: StoreOptions, runtime: Handle) -> Result<Arc<Self>, StoreError> {
        Self::open_on(Arc::new(HostDisk), root, options, runtime)
    }

    /// The same with its devices on `disk`. Only the lock is a file of this host in any case.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
    ) -> Result<Arc<Self>, StoreError> {
        let devices_dir = root.join("v1");
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(at(root))?;
        // Whoever can write to a device file can put anything into a container.
        fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at(root))?;
        let lock = Arc::new(lock(root)?);
        disk.create_dir(&devices_dir).map_err(at(&devices_dir))?;
        disk.sync_dir(root).map_err(at(root))?;
        let engine = Engine::new(options, runtime).map_err(StoreError::Threads)?;
        Ok(Arc::new(Self { devices_dir, disk, engine, shelves: Mutex::default(), lock }))
    }

    /// The open lock. Whoever keeps a copy of it keeps every other process out of the store, even
    /// when this one has died.
    pub fn lock_file(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
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
        let ledger = shelf.and_then(|shelf| Some((shelf.ledger.upgrade()?, shelf.data)));
        let Some(merged) = place.settle_map(map)? else { return Ok(None) };
        let (ledger, data) = match ledger {
            Some(known) => known,
            None => place.open_ledger(&merged).map(|(ledger, data)| (Arc::new(ledger), data))?,
        };
        let weak = Arc::downgrade(&ledger);
        let data_path = place.data();
        let home = Home { data: data_path, save: Box::new(move |map| place.save(map)), _lock: Arc::clone(&self.lock) };
        let device =
            Device::assemble(Arc::new(merged), Arc::clone(source), ledger, Some(home), Arc::clone(&self.engine));
        shelves.retain(|_, shelf| shelf.ledger.strong_count() > 0);
        shelves.insert(name.to_owned(), Shelf { device: Arc::downgrade(&device), ledger: weak, data });
        Ok(Some(device))
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

    /// Opens `data` and `present`, creating or replacing what is missing or does not fit.
    fn open_ledger(&self, map: &UnitMap) -> Result<(Ledger, FileFacts), StoreError> {
        let data_path = self.data();
        let fits = self.disk.facts(&data_path).is_ok_and(|file| file.is_file && file.len == map.decoded_len());
        if !fits {
            // First, or a new file with the old one's inode number could be taken for it.
            self.forget_presence()?;
            self.replace("data", |file| file.set_len(map.decoded_len()))?;
        }
        let data = self.disk.open(&data_path).map_err(at(&data_path))?;
        let facts = data.facts().map_err(at(&data_path))?;
        let identity = Identity { layout: layout(map), units: map.count(), inode: facts.inode, born: facts.born };

        let present_path = self.dir.join("present");
        let bytes = self.disk.read(&present_path).unwrap_or_default();
        let fresh = bits::empty(&identity);
        let mut words = bits::read(&bytes, &identity);
        let nothing = words.iter().all(|&word| word == 0);
        let there = if nothing { Vec::new() } else { data.data_ranges(facts.len).map_err(at(&data_path))? };
        if !bytes.starts_with(&fresh) || !is_possible(map, &words, &there) {
            self.replace("present", |file| file.write_at(&fresh, 0))?;
            words.fill(0);
        }
        let file = self.disk.open(&present_path).map_err(at(&present_path))?;
        let copy = DurableCopy { file, identity, names: Some(self.sync_names()) };
        let sink = WholeFile { file: data, len: facts.len };
        Ok((Ledger::new(Box::new(sink), words, Some(copy)), facts))
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

/// Fingerprint of where units lie, without how they are checked.
fn layout(map: &UnitMap) -> Digest {
    map.without_checks().fingerprint()
}
