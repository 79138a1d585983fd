//! Eviction against mount, unmount and adoption: real stores in memory, of a file system that does not say who has
//! a file open. So what keeps a blob is what the store itself knows.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use shuttle::thread;
use tempfile::TempDir;

use super::explore;
use crate::base::BLOCK;
use crate::base::sync::atomic::{AtomicU64, Ordering};
use crate::blob::{Unit, UnitIndex, UnitMap};
use crate::cache::device::Device;
use crate::cache::disk::{Disk, DiskFile, FileFacts, HostDisk};
use crate::cache::engine::{Engine, StoreOptions};
use crate::cache::shelves::StockError;
use crate::cache::store::Store;
use crate::cache::twins::Twins;
use crate::cache::victims::Wanted;
use crate::source::LocalSource;
use crate::telemetry::Telemetry;

/// One more than is ever there: what happens when a device is complete happens on threads of the engine.
const UNITS: UnitIndex = 3;

/// The files of this host, with a point before each operation at which another thread may go on.
struct Steps(AtomicU64);

impl Steps {
    fn host(&self) -> HostDisk {
        self.0.load(Ordering::SeqCst);
        HostDisk
    }
}

impl Disk for Steps {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.host().create_dir(dir)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.host().read(path)
    }

    fn facts(&self, path: &Path) -> io::Result<FileFacts> {
        self.host().facts(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.host().create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        self.host().open(path)
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.host().names(dir)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.host().rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.host().remove(path)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        self.host().remove_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.host().sync_dir(dir)
    }

    fn is_open(&self, _: &Path) -> io::Result<bool> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// One engine for all schedules: it has threads of the system, which nothing here gives work to.
fn engine() -> &'static Arc<Engine> {
    static ENGINE: OnceLock<(tokio::runtime::Runtime, Arc<Engine>)> = OnceLock::new();
    let start = || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let never = std::time::Duration::from_secs(1 << 30);
        let options = StoreOptions { decode_threads: 1, twins: 0, flush_every: never, ..StoreOptions::default() };
        let engine = Engine::over(options, runtime.handle().clone(), Arc::new(Twins::new(0)), Telemetry::default());
        (runtime, engine.unwrap())
    };
    &ENGINE.get_or_init(start).1
}

fn content(unit: UnitIndex) -> [u8; 4096] {
    [u8::try_from(unit).unwrap() + 1; 4096]
}

/// A store with one blob, unit 0 of which is there.
struct World {
    store: Arc<Store>,
    root: TempDir,
}

impl World {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let memory = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let root = tempfile::tempdir_in(memory).unwrap();
        let this = Self { store: Self::store(root.path()), root };
        land(&this.mount(), 0);
        this
    }

    fn store(root: &Path) -> Arc<Store> {
        Store::unattended(Arc::new(Steps(AtomicU64::new(0))), root, engine())
    }

    fn mount(&self) -> Arc<Device> {
        let units = (0..UNITS).map(|unit| Unit::plain(u64::from(unit) * BLOCK, &content(unit)).unwrap()).collect();
        let map = UnitMap::new("blob".parse().unwrap(), u64::from(UNITS) * BLOCK, units).unwrap();
        self.store.device(map, Arc::new(LocalSource::new(self.root.path()).unwrap())).unwrap()
    }

    /// The same directory after its daemon died.
    fn restarted(self) -> Self {
        drop(self.store);
        Self { store: Self::store(self.root.path()), root: self.root }
    }

    /// Removes all that may go. Gives how many blobs went, or `None` if uses are not known.
    fn evict(&self) -> Option<usize> {
        match self.store.shelves().collect(Wanted { excess: u64::MAX, ..Wanted::default() }, false) {
            Ok(removed) => Some(removed.len()),
            Err(StockError::UsesUnknown) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The same for whoever does not ask what went.
    fn evict_again(&self) {
        self.evict();
    }
}

fn land(device: &Device, unit: UnitIndex) {
    let block = content(unit);
    let what = Unit::plain(u64::from(unit) * BLOCK, &block).unwrap();
    device.core().ledger.land(unit, &what, &block).unwrap();
}

/// What must hold while somebody has a device: the file has its name, and what is present is in it.
fn judge(device: &Device) {
    let (file, path) = (device.data_file().unwrap(), device.data_path().unwrap());
    let (own, there) = (FileFacts::from(file.metadata().unwrap()), fs::metadata(path).map(FileFacts::from));
    assert!(there.is_ok_and(|there| there.is_same_file(&own)), "the file of a device in use has gone");
    for unit in (0..UNITS).filter(|&unit| device.core().ledger.presence.get(unit)) {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, u64::from(unit) * BLOCK).unwrap();
        assert!(bytes == content(unit), "unit {unit} is called present over other bytes");
    }
}

/// A mount of some time. A unit comes meanwhile, and is made durable when the device is let go.
fn use_for_a_while(device: Arc<Device>, unit: UnitIndex) {
    judge(&device);
    land(&device, unit);
    judge(&device);
    drop(device);
}

/// What must hold when nobody does anything: no rest of a blob, and what is durable is true.
fn judge_rest(world: World) {
    let names = fs::read_dir(world.root.path().join("v1")).unwrap().map(|entry| entry.unwrap().file_name());
    let names: Vec<_> = names.collect();
    assert!(names.iter().all(|name| name == "blob"), "left: {names:?}");
    let world = world.restarted();
    judge(&world.mount());
}

fn spawn(world: &Arc<World>, work: impl FnOnce(&World) + Send + 'static) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || work(&world))
}

fn end(world: Arc<World>, threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    judge_rest(Arc::into_inner(world).unwrap());
}

/// How often an eviction found something to remove, and nothing.
static EVICTED: [std::sync::atomic::AtomicU64; 2] =
    [std::sync::atomic::AtomicU64::new(0), std::sync::atomic::AtomicU64::new(0)];

fn note(gone: usize) {
    EVICTED[usize::from(gone == 0)].fetch_add(1, Ordering::SeqCst);
}

#[test]
fn a_mount_finds_the_whole_blob_or_none_and_keeps_it() {
    explore(|| {
        let world = Arc::new(World::new());
        world.store.say_uses_are_known();
        let threads = [
            spawn(&world, |world| use_for_a_while(world.mount(), 0)),
            spawn(&world, |world| use_for_a_while(world.mount(), 1)),
            spawn(&world, |world| note(world.evict().expect("uses are known"))),
        ];
        end(world, threads);
    });
    let [something, nothing] = EVICTED.each_ref().map(|count| count.load(Ordering::SeqCst));
    assert!(something > 0 && nothing > 0, "evicted in {something} schedules, and not in {nothing}");
}

#[test]
fn what_is_let_go_and_taken_again_is_not_written_by_who_had_it() {
    explore(|| {
        let world = Arc::new(World::new());
        world.store.say_uses_are_known();
        let device = world.mount();
        land(&device, 1);
        let threads = [
            spawn(&world, move |_| drop(device)),
            spawn(&world, |world| {
                world.evict_again();
                use_for_a_while(world.mount(), 0);
            }),
            spawn(&world, |world| world.evict_again()),
        ];
        end(world, threads);
    });
}

#[test]
fn what_a_dead_daemon_had_mounted_stays_until_it_is_adopted_and_let_go() {
    explore(|| {
        let world = Arc::new(World::new().restarted());
        let data = world.store.data_path("blob");
        let held = File::options().read(true).write(true).open(data).unwrap();
        let threads = [
            spawn(&world, move |world| {
                let source = Arc::new(LocalSource::new(world.root.path()).unwrap());
                let device = world.store.adopt("blob", held, source).unwrap();
                world.store.say_uses_are_known();
                use_for_a_while(device, 1);
            }),
            spawn(&world, |world| world.evict_again()),
            spawn(&world, |world| world.evict_again()),
        ];
        end(world, threads);
    });
}
