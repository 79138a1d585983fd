//! A directory of device files, and who may write to it.
//!
//! ```text
//! root/                            mode 0700
//!   lock                           one writer per store; holds its process id
//!   v1/<blob id>/units             the unit map with all checks known so far
//!                data              decoded bytes, sparse, as long as the device
//!                present           which units of `data` can be trusted
//!                rest              the change time of `data`, while nobody of this process has it
//!                used, verified    empty; when they were changed is when that last happened
//!                pinned            empty; there if the blob must stay
//!   v1/<blob id>.<16 hex digits>/  the same for images that disagree about the blob
//!   v1/.trash-<number>/            a blob on its way out
//!   bootstraps/<SHA-256>           copies of bootstraps
//! ```
//!
//! Files appear under their names complete or not at all. `data` is never punched, shortened or
//! preallocated: a kernel may have it mounted.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use tokio::runtime::Handle;

use super::core::Core;
use super::device::{Device, Home};
use super::disk::{Disk, DiskFile, FileSink, HostDisk};
use super::engine::{Engine, StoreOptions};
use super::evictor::Evictor;
use super::is_needed;
use super::kernelcache::KernelCache;
use super::ledger::FlushError;
use super::place::{Believed, Opened, Place};
use super::pool::Job;
use super::presence::bit;
use super::scrub::Scrub;
use super::settled::Settled;
use super::shelves::{Shelf, Shelves, note_use};
use super::stats::StoreStats;
use super::twins::Twins;
use crate::base::{BlobId, Class};
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
    settled: Settled,
    _evictor: Option<Evictor>,
    _scrub: Option<Scrub>,
}

impl Store {
    /// Opens the store at `root`, creating it if it is not there, and starts its threads.
    /// Fetches run on `runtime`.
    ///
    /// Nothing goes to make room before [`Store::say_uses_are_known`].
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
        Self::assemble(Arc::new(HostDisk), root, options, runtime, held, telemetry)
    }

    /// As [`Store::open`] with the devices on `disk`. Only the lock is a file of this host in any case.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
    ) -> Result<Arc<Self>, StoreError> {
        Self::assemble(disk, root, options, runtime, None, Telemetry::default())
    }

    fn assemble(
        disk: Arc<dyn Disk>,
        root: &Path,
        options: StoreOptions,
        runtime: Handle,
        held: Option<File>,
        telemetry: Telemetry,
    ) -> Result<Arc<Self>, StoreError> {
        let shelves = Shelves::prepare(root, Arc::new(Twins::new(options.twins)), disk, held)?;
        let engine =
            Engine::over(options, runtime, Arc::clone(&shelves.twins), telemetry).map_err(StoreError::Threads)?;
        engine.space.room.ask(Box::new((shelves.disk(), shelves.devices_dir.clone())));
        let wants_twins = Arc::default();
        let evictor = Evictor::start(&shelves, &engine, &wants_twins).map_err(StoreError::Threads)?;
        let scrub = Scrub::start(&shelves, &engine).map_err(StoreError::Threads)?;
        Ok(Arc::new(Self {
            shelves,
            engine,
            wants_twins,
            settled: Settled::default(),
            _evictor: Some(evictor),
            _scrub: scrub,
        }))
    }

    /// A store on `engine` in which only those remove who are told to: without threads of its own.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn unattended(disk: Arc<dyn Disk>, root: &Path, engine: &Arc<Engine>) -> Arc<Self> {
        Arc::new(Self {
            shelves: Shelves::prepare(root, Arc::clone(&engine.twins), disk, None).unwrap(),
            engine: Arc::clone(engine),
            wants_twins: Arc::default(),
            settled: Settled::default(),
            _evictor: None,
            _scrub: None,
        })
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

    /// The blobs in these directories count as used whatever else is known, and none that were named before: somebody
    /// may read them of whom nothing else tells.
    pub fn reserve(&self, names: BTreeSet<String>) {
        self.shelves.reserve(names);
    }

    /// Has devices that lie elsewhere, such as in the kernel's cache, copy what is here whole already: first of all of
    /// these blobs, which is to be said before anybody reads such a device. Reads the saved maps of those that are whole.
    pub fn offer_to_others<'a>(&self, blobs: impl IntoIterator<Item = &'a BlobId>) {
        if !self.engine.twins.is_wanted() {
            return;
        }
        if self.shelves.are_uses_known() {
            blobs.into_iter().for_each(|blob| self.shelves.tell_twins_of(blob.as_str()));
        }
        self.want_twins();
    }

    /// Has the index of twins be filled with what is here, if it was not yet.
    fn want_twins(&self) {
        if self.engine.twins.is_wanted() && !self.wants_twins.swap(true, Ordering::AcqRel) {
            self.engine.space.kick();
        }
    }

    /// Somebody has bound the kernel's cache below the store's directory: from now on it is within the limit, and what
    /// nobody uses of it may go.
    pub fn attend_kernel(&self, cache: impl FnOnce() -> Arc<dyn KernelCache>) {
        if !self.shelves.attends_kernel() {
            self.shelves.attend_kernel(cache());
            self.engine.space.kick();
        }
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
    pub fn lock_file(&self) -> &Arc<File> {
        &self.shelves.lock
    }

    /// The threads and limits, for devices over foreign sinks.
    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The unit map kept for `blob`, with all checks learnt so far; spares fetching its tables.
    pub fn saved_map(&self, blob: &BlobId) -> Option<UnitMap> {
        self.shelves.place(blob.as_str()).saved().filter(|map| map.blob() == blob)
    }

    /// The device for `map`'s blob, shared with everyone whose map agrees.
    ///
    /// `source` is asked before those the device had, which stay for when it fails. A map that disagrees with what is known gets a
    /// directory of its own: an image with false digests must not poison another one's cache.
    /// Waits for the disk; on a full one, until what nobody uses has gone.
    pub fn device(&self, map: impl Into<Arc<UnitMap>>, source: Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let map = map.into();
        match self.find_or_open(&map, &source) {
            Err(error) if error.is_full() => {
                // What is there of the blob itself must not go for it: what is open is in use.
                let _held = File::open(self.data_path(map.blob().as_str()));
                if self.make_room(1) { self.find_or_open(&map, &source) } else { Err(error) }
            }
            outcome => outcome,
        }
    }

    fn find_or_open(&self, map: &Arc<UnitMap>, source: &Arc<dyn BlobSource>) -> Result<Arc<Device>, StoreError> {
        let mut shelves = self.shelves.alive();
        let common = map.blob().to_string();
        if let Some(device) = self.shared(&mut shelves, &common, map, source)? {
            return Ok(device);
        }
        // Who has the common directory keeps it, also after a power cut: what is in ours would not be found again.
        let common = self.shelves.place(&common);
        common.sync_names()().map_err(at(&common.dir))?;
        let own = format!("{}.{}", map.blob(), &map.fingerprint().to_string()[..16]);
        if let Some(device) = self.shared(&mut shelves, &own, map, source)? {
            return Ok(device);
        }
        Err(StoreError::Contradiction { blob: map.blob().clone() })
    }

    /// The device in directory `name`, or `None` if what is there disagrees with `map`.
    fn shared(
        &self,
        shelves: &mut HashMap<String, Shelf>,
        name: &str,
        map: &Arc<UnitMap>,
        source: &Arc<dyn BlobSource>,
    ) -> Result<Option<Arc<Device>>, StoreError> {
        let place = self.shelves.place(name);
        let shelf = shelves.get(name);
        if let Some(shelf) = shelf.filter(|shelf| shelf.ledger.strong_count() > 0) {
            place.ensure_unchanged(&shelf.data)?;
        }
        if let Some(device) = shelf.and_then(|shelf| shelf.device.upgrade()) {
            let agrees = device.try_learn(map, Arc::clone(source))?;
            // What it is missing now must not be copied from it.
            if !device.is_complete_durable() && self.engine.twins.forget(&place.data()) {
                self.offer_when_complete(&device);
            }
            return Ok(agrees.then_some(device));
        }
        let opened = shelf.and_then(|shelf| {
            Some(Opened { ledger: shelf.ledger.upgrade()?, data: shelf.data, file: shelf.file.upgrade() })
        });
        if opened.is_none() && !place.exists() {
            let opened = place.start(map)?;
            self.settled.note(name, place.saved_file(), map);
            return Ok(Some(self.shelve(shelves, name, Arc::clone(map), source, opened)));
        }
        let Some(merged) = self.settle(name, &place, map)? else { return Ok(None) };
        let opened = match opened {
            Some(opened) => opened,
            None => place.open_ledger(&merged, place.open_data(&merged)?)?,
        };
        Ok(Some(self.shelve(shelves, name, merged, source, opened)))
    }

    /// `map` and the one saved in the directory `name` together, saved; `None` if they disagree.
    fn settle(&self, name: &str, place: &Place, map: &Arc<UnitMap>) -> Result<Option<Arc<UnitMap>>, StoreError> {
        if self.settled.holds(name, place.saved_file(), map) {
            return Ok(Some(Arc::clone(map)));
        }
        let Some(merged) = place.settle_map(map)? else { return Ok(None) };
        self.settled.note(name, place.saved_file(), &merged);
        Ok(Some(merged))
    }

    /// Names of the directories of all devices, whether somebody uses them or not.
    pub fn directories(&self) -> Vec<String> {
        self.shelves.names().unwrap_or_default()
    }

    /// The file of decoded bytes of the device in directory `name`.
    pub fn data_path(&self, name: &str) -> PathBuf {
        self.shelves.place(name).data()
    }

    /// Whether everything that can be is in the device in directory `name`, durably. For a device
    /// that nobody uses.
    pub fn is_complete(&self, name: &str) -> bool {
        let place = self.shelves.place(name);
        let Some(map) = place.saved() else { return false };
        let Ok(data) = place.disk.open(&place.data()) else { return false };
        let Ok(Believed { words: Some(words), .. }) = place.believed(&map, &*data) else { return false };
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
        let mut shelves = self.shelves.alive();
        let place = self.shelves.place(name);
        let data = FileSink::new(data);
        place.ensure_unchanged(&data.facts().map_err(at(&place.data()))?)?;
        if let Some(device) = shelves.get(name).and_then(|shelf| shelf.device.upgrade()) {
            device.try_learn(&device.map(), source)?;
            return Ok(device);
        }
        let map = Arc::new(place.saved().ok_or_else(|| StoreError::Unknown { dir: place.dir.clone() })?);
        let opened = place.open_ledger(&map, Box::new(data))?;
        Ok(self.shelve(&mut shelves, name, map, &source, opened))
    }

    fn shelve(
        &self,
        shelves: &mut HashMap<String, Shelf>,
        name: &str,
        map: Arc<UnitMap>,
        source: &Arc<dyn BlobSource>,
        Opened { ledger, data, file }: Opened,
    ) -> Arc<Device> {
        let place = self.shelves.place(name);
        let (weak, data_path) = (Arc::downgrade(&ledger), place.data());
        note_use(&place.dir);
        let home = Home {
            data: data_path.clone(),
            file: file.clone(),
            save: Box::new(move |map| place.save(map)),
            _lock: Arc::clone(&self.shelves.lock),
        };
        let device = Device::assemble(map, Arc::clone(source), ledger, Some(home), Arc::clone(&self.engine));
        shelves.retain(|_, shelf| shelf.is_alive());
        let file = file.as_ref().map_or_else(Weak::new, Arc::downgrade);
        shelves.insert(name.to_owned(), Shelf { device: Arc::downgrade(&device), ledger: weak, data, file });
        if !device.is_complete_durable() {
            self.engine.twins.forget(&data_path);
            self.want_twins();
        }
        self.offer_when_complete(&device);
        device
    }

    /// Lets other devices copy from this one as soon as nothing is missing of it.
    fn offer_when_complete(&self, device: &Arc<Device>) {
        let (weak, engine) = (Arc::downgrade(device.core()), Arc::downgrade(&self.engine));
        let offer = move || {
            let Some(engine) = engine.upgrade() else { return };
            let twins = Arc::clone(&engine.twins);
            // A job, because whoever calls must not be held up.
            engine.jobs().push(Job::new(Class::Prefetch, move |_| Core::offer(&weak, &twins)));
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

/// Goes on with a lock that is held already, if it is the one of `root`.
pub(super) fn take_over(root: &Path, mut held: File) -> Result<File, StoreError> {
    let path = root.join("lock");
    let same = inode_id_at(&path).and_then(|there| Ok(there == inode_id(&held)?)).unwrap_or(false);
    if !same {
        return Err(StoreError::ForeignLock { root: root.to_owned() });
    }
    // Only for people, so a failure to write it is no failure.
    let _ = held.set_len(0).and_then(|()| held.rewind()).and_then(|()| writeln!(held, "{}", std::process::id()));
    Ok(held)
}
