//! The directories of a store: what is in them, who uses it, and how one goes.
//!
//! A blob is in use while somebody of this process holds its device, while a last job holds its
//! ledger, and while anybody at all has its data file open: a kernel with the file mounted, taken
//! out of the tree or not, a mount that a dead daemon left, a reader of another process. So is one that is reserved for
//! a mount that nobody serves: not every file system tells who has a file open. Until the
//! owner of the store has said that it knows all uses, everything is in use.
//!
//! What goes is renamed under the lock that devices are opened under, so that a mount finds either
//! the whole blob or none, and unlinked afterwards. Nothing is ever shortened or punched: should
//! somebody have the file open against all expectation, it goes on reading what was there.
//!
//! After a crash in the middle there is the blob, or its rest under a name that means nothing and
//! is swept at the next start.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::SystemTime;

use super::bootstraps::Bootstraps;
use super::device::Device;
use super::disk::{Disk, FileFacts, HostDisk};
use super::kernelcache::KernelCache;
use super::ledger::Ledger;
use super::place::Place;
use super::store::{StoreError, at, lock, take_over};
use super::twins::Twins;
use super::victims::{Lot, LotKind, Wanted, victims};
use crate::base::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::base::sync::{Mutex, MutexGuard};

/// Why something in the cache stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum StockError {
    /// There is no such blob.
    #[error("no blob {0} is in the cache; `rafsd cache list` shows what is")]
    Unknown(String),
    /// There are several.
    #[error("{0} is the beginning of several names in the cache; write more of it")]
    Ambiguous(String),
    /// Somebody reads it.
    #[error("blob {0} is in use; unmount the images that need it first")]
    InUse(String),
    /// Somebody wants it to stay.
    #[error("blob {0} is pinned; `rafsd cache pin --remove {0}` ends that")]
    Pinned(String),
    /// The daemon has not yet found out what a predecessor left mounted.
    #[error(
        "it is not known which blobs are in use: a daemon has just started, or mounts are left that it cannot serve (`rafsd status`)"
    )]
    UsesUnknown,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// One thing that was removed, or would be.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Removed {
    pub name: String,
    pub kind: LotKind,
    /// Bytes that it took on disk.
    pub bytes: u64,
}

/// The directories of a store, and the one right to write there.
#[derive(Debug)]
pub struct Shelves {
    pub(super) root: PathBuf,
    pub(super) devices_dir: PathBuf,
    pub(super) lock: Arc<File>,
    disk: Arc<dyn Disk>,
    pub(super) twins: Arc<Twins>,
    open: Mutex<HashMap<String, Shelf>>,
    bootstraps: Arc<Bootstraps>,
    uses_known: AtomicBool,
    /// Directories that somebody may be using of whom nothing else is known.
    reserved: Mutex<BTreeSet<String>>,
    asking: Mutex<()>,
    trash: AtomicU64,
    kernel: OnceLock<Arc<dyn KernelCache>>,
}

/// What is alive of one device directory. A ledger outlives its device while the last jobs end;
/// whoever opens the device again must go on with the same one.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) device: Weak<Device>,
    pub(super) ledger: Weak<Ledger>,
    /// What tells the file apart that the ledger writes to.
    pub(super) data: FileFacts,
    /// The same file, which the ledger has open, if it is one of this host.
    pub(super) file: Weak<File>,
}

impl Shelf {
    pub(super) fn is_alive(&self) -> bool {
        self.device.strong_count() > 0 || self.ledger.strong_count() > 0
    }
}

/// Marks a directory that must stay.
const PINNED: &str = "pinned";
/// Its time of change is when the blob was last taken into use or let go.
const USED: &str = "used";
/// How the name of a directory begins that is being removed. No blob's name begins with a dot.
const TRASH: &str = ".trash-";

impl Shelves {
    /// Takes the store at `root`, which must be there, without serving from it.
    ///
    /// # Errors
    /// `Locked` if a daemon, or the keeper of one that has gone, has it.
    pub fn open(root: &Path) -> Result<Arc<Self>, StoreError> {
        fs::metadata(root).map_err(at(root))?;
        let shelves = Self::prepare(root, Arc::new(Twins::new(0)), Arc::new(HostDisk), None)?;
        // Nobody serves from it, and a file that a kernel still has open says so itself.
        shelves.say_uses_are_known();
        Ok(shelves)
    }

    /// The same for a store that is about to serve, with its devices on `disk`, and with the lock of
    /// a process that has died, if there is one. Creates what is not there.
    pub(super) fn prepare(
        root: &Path,
        twins: Arc<Twins>,
        disk: Arc<dyn Disk>,
        held: Option<File>,
    ) -> Result<Arc<Self>, StoreError> {
        let devices_dir = root.join("v1");
        DirBuilder::new().recursive(true).mode(0o700).create(root).map_err(at(root))?;
        // Whoever can write to a device file can put anything into a container.
        fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(at(root))?;
        let lock = match held {
            Some(held) => take_over(root, held)?,
            None => lock(root)?,
        };
        disk.create_dir(&devices_dir).map_err(at(&devices_dir))?;
        disk.sync_dir(root).map_err(at(root))?;
        Ok(Arc::new(Self {
            lock: Arc::new(lock),
            disk,
            bootstraps: Bootstraps::new(root.join("bootstraps")),
            root: root.to_owned(),
            devices_dir,
            twins,
            open: Mutex::default(),
            uses_known: AtomicBool::new(false),
            reserved: Mutex::default(),
            asking: Mutex::default(),
            trash: AtomicU64::new(0),
            kernel: OnceLock::new(),
        }))
    }

    /// The directory of the store.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.disk)
    }

    /// The copies of bootstraps.
    pub fn bootstraps(&self) -> &Arc<Bootstraps> {
        &self.bootstraps
    }

    /// From now on a blob that nobody is known to use may go.
    pub(super) fn say_uses_are_known(&self) {
        self.uses_known.store(true, Ordering::Release);
    }

    /// As [`super::Store::reserve`].
    pub(super) fn reserve(&self, names: BTreeSet<String>) {
        *self.reserved.lock().unwrap() = names;
    }

    pub(super) fn are_uses_known(&self) -> bool {
        self.uses_known.load(Ordering::Acquire)
    }

    /// What is alive, by directory. Devices are opened, and blobs go, under this lock.
    pub(super) fn alive(&self) -> MutexGuard<'_, HashMap<String, Shelf>> {
        self.open.lock().unwrap()
    }

    pub(super) fn dir(&self, name: &str) -> PathBuf {
        self.devices_dir.join(name)
    }

    /// The files in the directory `name`.
    pub(super) fn place(&self, name: &str) -> Place {
        Place { dir: self.dir(name), disk: Arc::clone(&self.disk) }
    }

    /// The names of all blobs' directories, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, StoreError> {
        let entries = self.disk.names(&self.devices_dir).map_err(at(&self.devices_dir))?;
        let is_blob =
            |name: &String| !name.starts_with('.') && self.disk.facts(&self.dir(name)).is_ok_and(|facts| facts.is_dir);
        let mut names: Vec<_> =
            entries.into_iter().filter_map(|name| name.into_string().ok()).filter(is_blob).collect();
        names.sort();
        Ok(names)
    }

    /// The name that is `text`, or the only one that begins with it.
    pub fn find(&self, text: &str) -> Result<String, StockError> {
        let names = self.names()?;
        if names.iter().any(|name| name == text) {
            return Ok(text.to_owned());
        }
        let mut begin = names.into_iter().filter(|name| !text.is_empty() && name.starts_with(text));
        match (begin.next(), begin.next()) {
            (Some(name), None) => Ok(name),
            (None, _) => Err(StockError::Unknown(text.to_owned())),
            (Some(_), Some(_)) => Err(StockError::Ambiguous(text.to_owned())),
        }
    }

    /// Whether anybody may be using the blob in directory `name`.
    pub(super) fn is_used(&self, alive: &HashMap<String, Shelf>, name: &str) -> bool {
        !self.are_uses_known()
            || self.reserved.lock().unwrap().contains(name)
            || alive.get(name).is_some_and(Shelf::is_alive)
            || is_open(&self.asking, || self.disk.is_open(&self.dir(name).join("data")))
    }

    pub(super) fn is_pinned(&self, name: &str) -> bool {
        // What cannot be looked at stays.
        !matches!(self.disk.facts(&self.dir(name).join(PINNED)), Err(e) if e.kind() == io::ErrorKind::NotFound)
    }

    /// When it was last taken into use or let go, in seconds since 1970.
    pub(super) fn last_used(&self, name: &str) -> u64 {
        let dir = self.dir(name);
        // A cache of an earlier version has no such note.
        let meta = fs::metadata(dir.join(USED)).or_else(|_| fs::metadata(dir.join("present")));
        meta.map_or(0, |meta| u64::try_from(meta.mtime()).unwrap_or(0))
    }

    /// Everything that takes room and could go.
    pub(super) fn lots(&self) -> Result<Vec<Lot>, StoreError> {
        let blob = |name: String| {
            let held = self.is_pinned(&name) || self.is_used(&self.alive(), &name);
            let (bytes, last_used) = (allocated(&self.dir(&name)).0, self.last_used(&name));
            Lot { name, kind: LotKind::Blob, bytes, last_used, held }
        };
        let mut lots: Vec<Lot> = self.names()?.into_iter().map(blob).collect();
        lots.extend(self.bootstraps.lots());
        lots.extend(self.kernel_lots());
        if !self.are_uses_known() {
            lots.iter_mut().for_each(|lot| lot.held = true);
        }
        Ok(lots)
    }

    /// What the kernel keeps, if somebody can ask it. Not more than logged if it does not say.
    fn kernel_lots(&self) -> Vec<Lot> {
        let objects = self.kernel.get().map_or(Ok(Vec::new()), |kernel| kernel.objects());
        let objects =
            objects.inspect_err(|error| tracing::warn!(%error, "the kernel does not say what its cache holds"));
        objects.unwrap_or_default().into_iter().map(Lot::from).collect()
    }

    /// Somebody has bound the kernel's cache below this directory.
    pub(super) fn attend_kernel(&self, cache: Arc<dyn KernelCache>) {
        // Bound once, it stays so as long as this lives.
        let _ = self.kernel.set(cache);
    }

    pub(super) fn attends_kernel(&self) -> bool {
        self.kernel.get().is_some()
    }

    /// Bytes on disk of the kernel's own cache, and of what was promised about it.
    pub(super) fn other_bytes(&self) -> (u64, u64) {
        (allocated(&self.root.join("cachefiles")).0, allocated(&self.root.join("cachefiles-maps")).0)
    }

    /// Removes what is wanted, least recently used first, and tells what it was. With `dry`,
    /// nothing is removed. What cannot be removed is logged and left.
    pub fn collect(&self, wanted: Wanted, dry: bool) -> Result<Vec<Removed>, StockError> {
        if !self.are_uses_known() {
            return Err(StockError::UsesUnknown);
        }
        let lots = self.lots()?;
        let mut removed = Vec::new();
        for lot in victims(&lots, wanted) {
            let gone = match lot.kind {
                _ if dry => Ok(true),
                LotKind::Bootstrap => self.bootstraps.remove(&lot.name).map_err(StockError::from),
                LotKind::Kernel => self.remove_from_kernel(&lot.name).map_err(StockError::from),
                LotKind::Blob => self.remove(&lot.name).map(|()| true),
            };
            match gone {
                Ok(true) => {
                    removed.push(Removed { name: lot.name.clone(), kind: lot.kind, bytes: lot.bytes });
                }
                // Somebody came in between.
                Ok(false) | Err(StockError::InUse(_) | StockError::Pinned(_) | StockError::Unknown(_)) => {}
                Err(error) => tracing::warn!(name = lot.name, error = %crate::base::Chain(&error), "cannot remove it"),
            }
        }
        Ok(removed)
    }

    /// Removes the blob in directory `name`, a whole name. Waits for the disk; readers of other
    /// blobs wait for nothing of it, and a mount for the renaming at most.
    pub fn remove(&self, name: &str) -> Result<(), StockError> {
        let dir = self.dir(
            &self.find(name).ok().filter(|found| found == name).ok_or_else(|| StockError::Unknown(name.to_owned()))?,
        );
        if !self.are_uses_known() {
            return Err(StockError::UsesUnknown);
        }
        let mut alive = self.alive();
        if self.is_used(&alive, name) {
            return Err(StockError::InUse(name.to_owned()));
        }
        if self.is_pinned(name) {
            return Err(StockError::Pinned(name.to_owned()));
        }
        self.twins.forget(&dir.join("data"));
        let trash = self.put_aside(&dir)?;
        alive.remove(name);
        drop(alive);
        // Durable before anything in it is gone: a rest must never have the blob's name.
        self.disk.sync_dir(&self.devices_dir).map_err(at(&self.devices_dir))?;
        self.discard(&trash)?;
        Ok(())
    }

    fn remove_from_kernel(&self, name: &str) -> Result<bool, StoreError> {
        let path = || self.root.join("cachefiles/cache").join(name);
        self.kernel.get().map_or(Ok(false), |kernel| kernel.remove(name).map_err(|cause| at(&path())(cause)))
    }

    fn put_aside(&self, dir: &Path) -> Result<PathBuf, StoreError> {
        loop {
            let number = self.trash.fetch_add(1, Ordering::Relaxed);
            let trash = self.devices_dir.join(format!("{TRASH}{number}"));
            match self.disk.rename(dir, &trash) {
                Ok(()) => return Ok(trash),
                // Left by a process that ended in the middle.
                Err(e) if matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {}
                Err(cause) => return Err(at(dir)(cause)),
            }
        }
    }

    /// Removes what a crash left half removed. Waits for the disk.
    pub(super) fn sweep(&self) {
        for name in self.disk.names(&self.devices_dir).unwrap_or_default() {
            if name.as_encoded_bytes().starts_with(TRASH.as_bytes())
                && let Err(error) = self.discard(&self.devices_dir.join(name))
            {
                tracing::warn!(error = %crate::base::Chain(&error), "cannot remove what a crash left");
            }
        }
    }

    /// Removes a directory with everything in it.
    fn discard(&self, dir: &Path) -> Result<(), StoreError> {
        match self.discard_all(dir) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(at(dir)(cause)),
            _ => Ok(()),
        }
    }

    fn discard_all(&self, dir: &Path) -> io::Result<()> {
        for name in self.disk.names(dir)? {
            let path = dir.join(name);
            // A daemon makes no directories in there; somebody else may have.
            if self.disk.facts(&path)?.is_dir { self.discard_all(&path)? } else { self.disk.remove(&path)? }
        }
        self.disk.remove_dir(dir)
    }

    /// Makes the blob in directory `name` stay, or no longer. Survives restarts. Waits for the disk.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<(), StockError> {
        // Under the lock that it would go under.
        let _alive = self.alive();
        let dir = self.dir(&self.find(name)?);
        let path = dir.join(PINNED);
        let outcome = if pinned {
            self.disk.create(&path).map(drop)
        } else {
            self.disk.remove(&path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
        };
        outcome.map_err(at(&path))?;
        Ok(self.disk.sync_dir(&dir).map_err(at(&dir))?)
    }
}

/// Notes that the device in `dir` is taken into use or let go. Only an order depends on it, so
/// that failing is no failure.
pub(super) fn note_use(dir: &Path) {
    stamp(&dir.join(USED));
}

/// Makes `path` a file that was changed now.
pub(super) fn stamp(path: &Path) {
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let _ = open.and_then(|file| file.set_modified(SystemTime::now()));
}

/// Whether anybody has the file open that `ask` asks about, or that cannot be told. Where the file system does
/// not say, what this process knows must do. Two who ask at once would be told of each other, so
/// they take turns by `asking`.
pub(super) fn is_open(asking: &Mutex<()>, ask: impl FnOnce() -> io::Result<bool>) -> bool {
    let _alone = asking.lock().unwrap();
    match ask() {
        Ok(open) => open,
        Err(e) => !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::Unsupported),
    }
}

/// Bytes on disk and number of inodes of `path` and everything below it.
pub(super) fn allocated(path: &Path) -> (u64, u64) {
    let Ok(meta) = fs::symlink_metadata(path) else { return (0, 0) };
    let own = (meta.blocks() * 512, 1);
    if !meta.is_dir() {
        return own;
    }
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| allocated(&entry.path()));
    below.fold(own, |sum, more| (sum.0 + more.0, sum.1 + more.1))
}
