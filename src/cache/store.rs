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
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::UNIX_EPOCH;

use tokio::runtime::Handle;

use super::bits::{self, Identity};
use super::device::{Device, Home};
use super::engine::{Engine, StoreOptions};
use super::is_needed;
use super::ledger::{DurableCopy, FlushError, Ledger};
use super::presence::{bit, set_bit, words_for};
use super::sink::FileSink;
use crate::base::{BlobId, Digest};
use crate::blob::UnitMap;
use crate::source::BlobSource;
use crate::sys::files::{inode_id, inode_id_at};
use crate::telemetry::Telemetry;

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
    engine: Arc<Engine>,
    shelves: Mutex<HashMap<String, Shelf>>,
    lock: Arc<File>,
}

/// What is alive of one device directory. A ledger outlives its device while the last jobs end;
/// whoever opens the device again must go on with the same one.
struct Shelf {
    device: Weak<Device>,
    ledger: Weak<Ledger>,
    /// What the ledger writes to.
    data: Arc<File>,
}

impl Store {
    /// Opens the store at `root`, creating it if it is not there, and starts its threads.
    /// Fetches run on `runtime`.
    pub fn open(root: &Path, options: StoreOptions, runtime: Handle) -> Result<Arc<Self>, StoreError> {
        Self::open_locked(root, options, runtime, None, Telemetry::default())
    }

    /// The same with the lock of a process that has died, if there is one: it is still held.
    /// `telemetry` counts what the store and its devices do.
    ///
    /// # Errors
    /// `ForeignLock` if it is the lock of another store.
    pub fn open_locked(
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
        held: Option<File>,
        telemetry: Telemetry,
    ) -> Result<Arc<Self>, StoreError> {
        let devices_dir = root.join("v1");
        DirBuilder::new().recursive(true).mode(0o700).create(&devices_dir).map_err(at(&devices_dir))?;
        // Whoever can write to a device file can put anything into a container.
        fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at(root))?;
        let lock = match held {
            Some(held) => take_over(root, held)?,
            None => lock(root)?,
        };
        let lock = Arc::new(lock);
        let engine = Engine::counted(options, runtime, telemetry).map_err(StoreError::Threads)?;
        Ok(Arc::new(Self { devices_dir, engine, shelves: Mutex::default(), lock }))
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
        saved(&self.devices_dir.join(blob.as_str())).filter(|map| map.blob() == blob)
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
        let dir = self.devices_dir.join(name);
        let shelf = shelves.get(name);
        if let Some(device) = shelf.and_then(|shelf| shelf.device.upgrade()) {
            return Ok(device.try_learn(map, Arc::clone(source))?.then_some(device));
        }
        let opened = shelf.and_then(|shelf| Some((shelf.ledger.upgrade()?, Arc::clone(&shelf.data))));
        let Some(merged) = settle_map(&dir, map)? else { return Ok(None) };
        let (ledger, data) = match opened {
            Some(opened) => opened,
            None => {
                let data = open_data(&dir, &merged)?;
                (Arc::new(open_ledger(&dir, &merged, &data)?), data)
            }
        };
        Ok(Some(self.shelve(shelves, name, merged, source, (ledger, data))))
    }

    /// Names of the directories of all devices, whether somebody uses them or not.
    pub fn directories(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.devices_dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The file of decoded bytes of the device in directory `name`.
    pub fn data_path(&self, name: &str) -> PathBuf {
        self.devices_dir.join(name).join("data")
    }

    /// Whether everything that can be is in the device in directory `name`, durably. For a device
    /// that nobody uses.
    pub fn is_complete(&self, name: &str) -> bool {
        let dir = self.devices_dir.join(name);
        let Some(map) = saved(&dir) else { return false };
        let Ok(data) = File::open(dir.join("data")) else { return false };
        let Ok(identity) = identify(&data, &map) else { return false };
        let words = bits::read(&fs::read(dir.join("present")).unwrap_or_default(), &identity);
        (0..).zip(map.units()).all(|(index, unit)| !is_needed(unit) || bit(&words, index))
    }

    /// The device of a process that has died, in directory `name`. `data` is its file, opened by
    /// that process before the kernel was told to ask about it: opened anew, the device's own
    /// writes would wait for an answer to themselves.
    ///
    /// # Errors
    /// `Unknown` if the store has lost the map of the device.
    pub fn adopt(&self, name: &str, data: File, source: Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let mut shelves = self.shelves.lock().unwrap();
        if let Some(device) = shelves.get(name).and_then(|shelf| shelf.device.upgrade()) {
            device.try_learn(&device.map(), source)?;
            return Ok(device);
        }
        let dir = self.devices_dir.join(name);
        let map = saved(&dir).ok_or_else(|| StoreError::Unknown { dir: dir.clone() })?;
        let data = Arc::new(data);
        let ledger = Arc::new(open_ledger(&dir, &map, &data)?);
        Ok(self.shelve(&mut shelves, name, map, &source, (ledger, data)))
    }

    fn shelve(
        &self,
        shelves: &mut HashMap<String, Shelf>,
        name: &str,
        map: UnitMap,
        source: &Arc<dyn BlobSource>,
        (ledger, file): (Arc<Ledger>, Arc<File>),
    ) -> Arc<Device> {
        let dir = self.devices_dir.join(name);
        let (weak, data) = (Arc::downgrade(&ledger), Arc::clone(&file));
        let home = Home {
            data: dir.join("data"),
            file,
            save: Box::new(move |map| save(&dir, map)),
            _lock: Arc::clone(&self.lock),
        };
        let device = Device::assemble(Arc::new(map), Arc::clone(source), ledger, Some(home), Arc::clone(&self.engine));
        shelves.retain(|_, shelf| shelf.ledger.strong_count() > 0);
        shelves.insert(name.to_owned(), Shelf { device: Arc::downgrade(&device), ledger: weak, data });
        device
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

/// The map saved in `dir`, if there is a sound one.
fn saved(dir: &Path) -> Option<UnitMap> {
    UnitMap::from_bytes(&fs::read(dir.join("units")).ok()?).ok()
}

fn save(dir: &Path, map: &UnitMap) -> Result<(), StoreError> {
    replace(dir, "units", |file| file.write_all(&map.to_bytes()))
}

/// Merges `map` with the one saved in `dir` and saves the outcome; `None` if they disagree.
fn settle_map(dir: &Path, map: &UnitMap) -> Result<Option<UnitMap>, StoreError> {
    if let Some(known) = saved(dir) {
        let merged = known.merge(map);
        if let Some(merged) = &merged
            && *merged != known
        {
            save(dir, merged)?;
        }
        return Ok(merged);
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    // What is present was checked against a map that is lost.
    let present = dir.join("present");
    match fs::remove_file(&present) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(at(&present)(cause)),
        _ => sync_dir(dir)?,
    }
    save(dir, map)?;
    Ok(Some(map.clone()))
}

/// Opens `data` for writing, creating or replacing what is missing or does not fit.
fn open_data(dir: &Path, map: &UnitMap) -> Result<Arc<File>, StoreError> {
    let data_path = dir.join("data");
    let fits = fs::symlink_metadata(&data_path).is_ok_and(|meta| meta.is_file() && meta.len() == map.decoded_len());
    if !fits {
        replace(dir, "data", |file| file.set_len(map.decoded_len()))?;
    }
    Ok(Arc::new(OpenOptions::new().write(true).open(&data_path).map_err(at(&data_path))?))
}

/// Opens `present`, creating or replacing it if it is missing or does not fit to `data`.
fn open_ledger(dir: &Path, map: &UnitMap, data: &Arc<File>) -> Result<Ledger, StoreError> {
    let identity = identify(data, map).map_err(at(&dir.join("data")))?;
    let present_path = dir.join("present");
    let bytes = fs::read(&present_path).unwrap_or_default();
    let fresh = bits::empty(&identity);
    if !bytes.starts_with(&fresh) {
        replace(dir, "present", |file| file.write_all(&fresh))?;
    }
    let read = bits::read(&bytes, &identity);
    let mut words = vec![0; words_for(map.count())];
    for (index, unit) in (0..).zip(map.units()) {
        if is_needed(unit) && bit(&read, index) {
            set_bit(&mut words, index);
        }
    }
    let file = OpenOptions::new().write(true).open(&present_path).map_err(at(&present_path))?;
    let copy = DurableCopy { file: Box::new(FileSink::new(file)), identity };
    Ok(Ledger::new(Box::new(FileSink::new(Arc::clone(data))), words, Some(copy)))
}

fn identify(data: &File, map: &UnitMap) -> io::Result<Identity> {
    let meta = data.metadata()?;
    let born = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let born = born.and_then(|age| u64::try_from(age.as_nanos()).ok()).unwrap_or(0);
    Ok(Identity { layout: layout(map), units: map.count(), inode: meta.ino(), born })
}

/// Fingerprint of where units lie, without how they are checked.
fn layout(map: &UnitMap) -> Digest {
    map.without_checks().fingerprint()
}

/// Makes a file appear under `name` complete and durable, or not at all.
fn replace(dir: &Path, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), StoreError> {
    let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let mut file = open.map_err(at(&new))?;
    write(&mut file).and_then(|()| file.sync_all()).map_err(at(&new))?;
    fs::rename(&new, &path).map_err(at(&path))?;
    sync_dir(dir)
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}
