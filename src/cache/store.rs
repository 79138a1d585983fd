//! A directory of device files, and who may write to it.
//!
//! ```text
//! root/                            mode 0700
//!   lock                           one writer per store; holds its process id
//!   v1/<blob id>/units             the unit map with all checks known so far
//!                data              decoded bytes, sparse, as long as the device
//!                present           which units of `data` can be trusted
//!                used, verified    empty; when they were changed is when that last happened
//!                pinned            empty; there if the blob must stay
//!   v1/<blob id>.<16 hex digits>/  the same for images that disagree about the blob
//!   v1/.trash-<number>/            a blob on its way out
//!   bootstraps/<SHA-256>           copies of bootstraps
//! ```
//!
//! Files appear under their names complete or not at all. `data` is never punched, shortened or
//! preallocated: a kernel may have it mounted.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use tokio::runtime::Handle;

use super::bits::{self, Identity};
use super::device::{Device, Home};
use super::engine::{Engine, StoreOptions};
use super::evictor::Evictor;
use super::is_needed;
use super::ledger::{DurableCopy, FlushError, Ledger};
use super::pool::Job;
use super::presence::{bit, set_bit, words_for};
use super::scrub::Scrub;
use super::shelves::{Shelf, Shelves, note_use};
use super::sink::FileSink;
use super::stats::StoreStats;
use super::twins::Twins;
use crate::base::{BlobId, Class, Digest};
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

impl StoreError {
    /// Whether the file system had no room.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { cause, .. } if is_full(cause))
    }
}

/// Whether a failure is one of room.
pub(super) fn is_full(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Devices by name in one directory, with the one right to write there.
pub struct Store {
    shelves: Arc<Shelves>,
    engine: Arc<Engine>,
    wants_twins: Arc<AtomicBool>,
    _evictor: Evictor,
    _scrub: Option<Scrub>,
}

impl Store {
    /// Opens the store at `root`, creating it if it is not there, and starts its threads.
    /// Fetches run on `runtime`.
    ///
    /// Nothing goes to make room before [`Store::say_uses_are_known`].
    pub fn open(root: &Path, options: StoreOptions, runtime: Handle) -> Result<Arc<Self>, StoreError> {
        let shelves = Shelves::prepare(root, Arc::new(Twins::new(options.twins)))?;
        let engine = Engine::over(options, runtime, Arc::clone(&shelves.twins)).map_err(StoreError::Threads)?;
        let wants_twins = Arc::default();
        let evictor = Evictor::start(&shelves, &engine, &wants_twins).map_err(StoreError::Threads)?;
        let scrub = Scrub::start(&shelves, &engine).map_err(StoreError::Threads)?;
        Ok(Arc::new(Self { shelves, engine, wants_twins, _evictor: evictor, _scrub: scrub }))
    }

    /// From now on a blob that nobody is known to use may go, and bytes may be copied from one blob
    /// to another. Whoever adopts mounts of a predecessor says this when it holds their devices
    /// and answers the events of their files, and not before: a file that is still marked may be
    /// read by the threads that fill.
    pub fn say_uses_are_known(&self) {
        self.engine.twins.open();
        self.shelves.say_uses_are_known();
        self.engine.space.kick();
    }

    /// What is in the store, who uses it, and how it goes.
    pub fn shelves(&self) -> &Arc<Shelves> {
        &self.shelves
    }

    /// What the store has done so far.
    pub fn stats(&self) -> StoreStats {
        let limit = self.engine.space.limit;
        StoreStats {
            used_bytes: self.engine.space.used(),
            limit_bytes: (limit < u64::MAX).then_some(limit),
            known_units: self.engine.twins.known() as u64,
            ..self.engine.counters.snapshot()
        }
    }

    /// Waits until what nobody uses has gone to make room for `bytes` that the file system
    /// refused; whether there was anything, so that another attempt makes sense.
    pub fn make_room(&self, bytes: u64) -> bool {
        self.engine.space.make_room(bytes)
    }

    /// The open lock. Whoever keeps a copy of it keeps every other process out of the store, even
    /// when this one has died.
    pub fn lock_file(&self) -> BorrowedFd<'_> {
        self.shelves.lock.as_fd()
    }

    /// The threads and limits, for devices over foreign sinks.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The unit map kept for `blob`, with all checks learnt so far; spares fetching its tables.
    pub fn saved_map(&self, blob: &BlobId) -> Option<UnitMap> {
        saved(&self.shelves.dir(blob.as_str())).filter(|map| map.blob() == blob)
    }

    /// The device for `map`'s blob, shared with everyone whose map agrees.
    ///
    /// `source` is asked before those the device had, which stay for when it fails. A map that disagrees with what is known gets a
    /// directory of its own: an image with false digests must not poison another one's cache.
    /// Waits for the disk; on a full one, until what nobody uses has gone.
    pub fn device(&self, map: UnitMap, source: Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        match self.find_or_open(&map, &source) {
            Err(error) if error.is_full() && self.make_room(1) => self.find_or_open(&map, &source),
            outcome => outcome,
        }
    }

    fn find_or_open(&self, map: &UnitMap, source: &Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let mut shelves = self.shelves.alive();
        let common = map.blob().to_string();
        let own = format!("{common}.{}", &map.fingerprint().to_string()[..16]);
        for name in [common, own] {
            if let Some(device) = self.shared(&mut shelves, &name, map, source)? {
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
        let dir = self.shelves.dir(name);
        let shelf = shelves.get(name);
        if let Some(device) = shelf.and_then(|shelf| shelf.device.upgrade()) {
            let agrees = device.try_learn(map, Arc::clone(source))?;
            // What it is missing now must not be copied from it.
            if !device.is_complete_durable() && self.engine.twins.forget(&dir.join("data")) {
                self.offer_when_complete(&device);
            }
            return Ok(agrees.then_some(device));
        }
        let ledger = shelf.and_then(|shelf| shelf.ledger.upgrade());
        let Some(merged) = settle_map(&dir, map)? else { return Ok(None) };
        let ledger = match ledger {
            Some(ledger) => ledger,
            None => Arc::new(open_ledger(&dir, &merged)?),
        };
        let weak = Arc::downgrade(&ledger);
        note_use(&dir);
        let lock = Arc::clone(&self.shelves.lock);
        let home = Home { data: dir.join("data"), save: Box::new(move |map| save(&dir, map)), _lock: lock };
        let device =
            Device::assemble(Arc::new(merged), Arc::clone(source), ledger, Some(home), Arc::clone(&self.engine));
        shelves.retain(|_, shelf| shelf.is_alive());
        shelves.insert(name.to_owned(), Shelf { device: Arc::downgrade(&device), ledger: weak });
        if !device.is_complete_durable() {
            self.engine.twins.forget(&self.shelves.dir(name).join("data"));
            if self.engine.twins.is_wanted() && !self.wants_twins.swap(true, Ordering::AcqRel) {
                self.engine.space.kick();
            }
        }
        self.offer_when_complete(&device);
        Ok(Some(device))
    }

    /// Lets other devices copy from this one as soon as nothing is missing of it.
    fn offer_when_complete(&self, device: &Arc<Device>) {
        let (weak, engine) = (Arc::downgrade(device), Arc::downgrade(&self.engine));
        let offer = move || {
            let Some(engine) = engine.upgrade() else { return };
            // A job, because whoever calls must not be held up.
            let job = Job::new(Class::Prefetch, move |_| {
                if let Some(device) = weak.upgrade() {
                    device.offer();
                }
            });
            engine.jobs().push(job);
        };
        device.on_complete(Box::new(offer));
    }

    /// Makes everything present in all devices durable. Waits for the disk. Devices stay usable.
    ///
    /// # Errors
    /// The first failure; the other devices are flushed all the same.
    pub fn close(&self) -> Result<(), StoreError> {
        let devices: Vec<_> = self.shelves.alive().values().filter_map(|s| s.device.upgrade()).collect();
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
        f.debug_struct("Store").field("shelves", &self.shelves).finish_non_exhaustive()
    }
}

/// Adds the path to an error of the system.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |cause| StoreError::Io { path, cause }
}

/// Takes the right to write, which lasts until the file is closed.
pub(super) fn lock(root: &Path) -> Result<File, StoreError> {
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

/// The map saved in `dir`, if there is a sound one.
pub(super) fn saved(dir: &Path) -> Option<UnitMap> {
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

/// Opens `data` and `present`, creating or replacing what is missing or does not fit.
fn open_ledger(dir: &Path, map: &UnitMap) -> Result<Ledger, StoreError> {
    let data_path = dir.join("data");
    let fits = fs::symlink_metadata(&data_path).is_ok_and(|meta| meta.is_file() && meta.len() == map.decoded_len());
    if !fits {
        replace(dir, "data", |file| file.set_len(map.decoded_len()))?;
    }
    let data = OpenOptions::new().read(true).write(true).open(&data_path).map_err(at(&data_path))?;
    let identity = identify(&data.metadata().map_err(at(&data_path))?, map);

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
    Ok(Ledger::new(Box::new(FileSink::new(data)), words, Some(copy)))
}

pub(super) fn identify(meta: &fs::Metadata, map: &UnitMap) -> Identity {
    let born = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let born = born.and_then(|age| u64::try_from(age.as_nanos()).ok()).unwrap_or(0);
    Identity { layout: layout(map), units: map.count(), inode: meta.ino(), born }
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

pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(at(dir))
}
