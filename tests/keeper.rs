//! The keeper process, run as a thread: what it holds, to whom it gives it, and that it asks nobody
//! for memory while it does, nor when it lets readers fail.

#![expect(unsafe_code, reason = "an allocator cannot be written without; it only counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rafsd::daemon::keeper::{self, Orders};
use rafsd::sys::fanotify::Group;
use rafsd::sys::fdpass;
use rafsd::sys::journal::Journal;
use rafsd::sys::spawn::Prepared;
use rafsd::telemetry::logging::{self, Format, LogControl};

/// Counts what the threads allocate that say so, and those that keepers start.
struct Counting;

/// Whether the calling thread is one that a keeper has started, by its name.
fn is_hand() -> bool {
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes there, the longest name with its end.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    name.starts_with(b"hands")
}

#[global_allocator]
static COUNTING: Counting = Counting;
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Constant and without a destructor, so that touching it never allocates.
    static COUNTS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: every call is passed to the system's allocator unchanged, so its guarantees are ours;
// counting touches a constant thread-local, an atomic and the stack only and neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTS.get() || is_hand() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

const ATTACH: u32 = 0;
const HOLD: u32 = 1;
const RELEASE: u32 = 2;
const FINISH: u32 = 4;
const STATUS: u32 = 5;
const HELD: u32 = 7;
const DONE: u32 = 8;
const FAILED: u32 = 9;
const TAKE_POST: u32 = 10;
const RELIEF: u32 = 11;
const SERVING: u32 = 12;
thread_local! {
    /// What the next keeper of this thread starts when its daemon dies.
    static SUCCESSOR: RefCell<Option<Prepared>> = const { RefCell::new(None) };
}

/// Held by each test: the count is one for all threads.
static ALONE: Mutex<()> = Mutex::new(());

const RECOVER: u32 = 6;
/// The fanotify group, and the journal of its events.
const GROUP: u32 = 0;
const JOURNAL: u32 = 1;
/// The watch on superblocks.
const WATCH: u32 = 3;
/// A device's file.
const DEVICE: u32 = 6;

/// A word as it goes over the socket: what, about what kind, about which, a number.
fn word(op: u32, kind: u32, key: [u64; 2], value: u64) -> Vec<u8> {
    [&op.to_ne_bytes()[..], &kind.to_ne_bytes(), &key[0].to_ne_bytes(), &key[1].to_ne_bytes(), &value.to_ne_bytes()]
        .concat()
}

/// The next word: what, about which, a number, and what came along.
fn hear(socket: &OwnedFd) -> (u32, [u64; 2], u64, Option<OwnedFd>) {
    let mut buffer = [0; 64];
    let (len, fd) = fdpass::receive(socket.as_fd(), &mut buffer).unwrap().expect("the keeper hung up");
    assert_eq!(len, 32);
    let long = |at: usize| u64::from_ne_bytes(buffer[at..at + 8].try_into().unwrap());
    (u32::from_ne_bytes(buffer[..4].try_into().unwrap()), [long(8), long(16)], long(24), fd)
}

fn ask(socket: &OwnedFd, text: &[u8], fd: Option<&File>) -> u32 {
    fdpass::send(socket.as_fd(), text, fd.map(AsFd::as_fd)).unwrap();
    hear(socket).0
}

/// A keeper at its post, with its daemon's end.
fn start(run: &Path) -> (OwnedFd, JoinHandle<()>) {
    let (daemon, thread) = start_new(run);
    assert!(fdpass::connect(&run.join(keeper::SOCKETS[0])).is_err(), "nobody before it has everything");
    assert_eq!(ask(&daemon, &word(TAKE_POST, 0, [0; 2], 0), None), DONE);
    (daemon, thread)
}

/// A keeper that has no post yet, with its daemon's end.
fn start_new(run: &Path) -> (OwnedFd, JoinHandle<()>) {
    let (ours, theirs) = fdpass::pair().unwrap();
    let patience = Duration::from_secs(1);
    let (successor, log_format) = (SUCCESSOR.with_borrow_mut(Option::take), Format::Text);
    let orders = Orders { run: run.to_owned(), rank: 0, patience, successor, sandbox: true, log_format };
    let thread = std::thread::spawn(move || {
        COUNTS.set(true);
        keeper::keep(theirs, orders).unwrap();
        COUNTS.set(false);
    });
    assert_eq!(hear(&ours).0, DONE, "it runs");
    (ours, thread)
}

/// A watch on superblocks of which one lives.
fn living(dir: &Path) -> File {
    let watch = rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC).unwrap();
    rustix::fs::inotify::add_watch(&watch, dir, rustix::fs::inotify::WatchFlags::ATTRIB).unwrap();
    watch.into()
}

fn attach(run: &Path) -> OwnedFd {
    let socket = fdpass::connect(&run.join(keeper::SOCKETS[0])).unwrap();
    fdpass::send(socket.as_fd(), &word(ATTACH, 0, [0; 2], 0), None).unwrap();
    socket
}

#[test]
fn a_keeper_gives_a_successor_what_it_holds_and_allocates_nothing_meanwhile() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path();
    let (daemon, thread) = start(run);
    // Something lives, so that it stays.
    let watch = living(run);
    let files: Vec<File> = (0..100).map(|_| tempfile::tempfile().unwrap()).collect();
    let before = ALLOCATIONS.load(Ordering::Relaxed);

    assert_eq!(ask(&daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&watch)), DONE);
    for (number, file) in (0..).zip(&files) {
        assert_eq!(ask(&daemon, &word(HOLD, DEVICE, [1, number], 0), Some(file)), DONE);
    }
    assert_eq!(ask(&daemon, &word(HOLD, DEVICE, [1, 5], 0), Some(&files[6])), DONE, "in place of an older one");
    assert_eq!(ask(&daemon, &word(RELEASE, DEVICE, [1, 7], 0), None), DONE);
    // What makes no sense is answered and survived.
    for bad in [&b"nonsense"[..], &[0xff; 32], &word(HOLD, DEVICE, [9, 9], 0), &word(STATUS, 0, [0; 2], 0)] {
        assert_eq!(ask(&daemon, bad, None), FAILED, "{bad:?}");
    }
    assert_eq!(ask(&daemon, &word(HOLD, JOURNAL, [0; 2], 0), Some(&files[0])), FAILED, "no journal");
    let status = fdpass::connect(&run.join(keeper::SOCKETS[0])).unwrap();
    assert_eq!(ask(&status, &word(STATUS, 0, [0; 2], 0), None), DONE);
    let second = attach(run);
    let (op, _, errno, _) = hear(&second);
    assert_eq!((op, errno), (FAILED, 16), "one daemon at a time");

    // It vanishes, and another one comes.
    drop(daemon);
    let successor = attach(run);
    let mut inherited = Vec::new();
    assert_eq!(hear(&successor).0, HELD, "the watch comes first");
    loop {
        match hear(&successor) {
            (HELD, key, _, fd) => inherited.push((key[1], File::from(fd.unwrap()).metadata().unwrap().ino())),
            (DONE, ..) => break,
            other => panic!("{other:?}"),
        }
    }
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;

    let inode = |number: usize| files[number].metadata().unwrap().ino();
    let expected = (0..100).filter(|number| *number != 7).map(|number| (number, if number == 5 { 6 } else { number }));
    assert_eq!(inherited, expected.map(|(name, file)| (name as u64, inode(file))).collect::<Vec<_>>());
    assert_eq!(allocated, 0, "allocations while it held, heard and gave");
    assert_eq!(ask(&successor, &word(FINISH, 0, [0; 2], 0), None), DONE);
    thread.join().unwrap();
    assert!(!run.join(keeper::SOCKETS[0]).exists());
}

#[test]
fn a_successor_waits_a_while_for_a_daemon_to_be_gone() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let (daemon, thread) = start(dir.path());
    assert_eq!(ask(&daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&living(dir.path()))), DONE);

    let refused = keeper::inherit(dir.path(), Vec::new()).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::AddrInUse, "it lives: {refused}");
    let end = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(daemon);
    });
    let inherited = keeper::inherit(dir.path(), Vec::new()).unwrap();
    end.join().unwrap();
    assert!(inherited.is_some(), "a keeper is there");
    drop(inherited);

    let successor = attach(dir.path());
    assert_eq!((hear(&successor).0, hear(&successor).0), (HELD, DONE));
    assert_eq!(ask(&successor, &word(FINISH, 0, [0; 2], 0), None), DONE);
    thread.join().unwrap();
}

#[test]
fn an_orphan_with_nothing_to_hold_leaves_at_once() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let (daemon, thread) = start(dir.path());
    let asked = Instant::now();

    drop(daemon);

    thread.join().unwrap();
    assert!(asked.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_a_daemon_said_before_it_died_is_in_force() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let (daemon, thread) = start(dir.path());
    let watch = living(dir.path());
    fdpass::send(daemon.as_fd(), &word(HOLD, WATCH, [0; 2], 0), Some(watch.as_fd())).unwrap();
    drop(daemon);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!thread.is_finished(), "it left although a superblock lives");
    assert_eq!(keeper::status(dir.path()).unwrap().alive, 1);

    let successor = attach(dir.path());
    assert_eq!((hear(&successor).0, hear(&successor).0), (HELD, DONE));
    assert_eq!(ask(&successor, &word(FINISH, 0, [0; 2], 0), None), DONE);
    thread.join().unwrap();
}

#[test]
fn only_a_daemon_that_served_has_answered_those_who_waited() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // Readers are denied after a second without anybody. Each of the others lives longer than that.
    for (serves, denies_at_once) in [(true, false), (false, true)] {
        let dir = tempfile::tempdir().unwrap();
        let (daemon, thread) = start(dir.path());
        let watch = living(dir.path());
        assert_eq!(ask(&daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&watch)), DONE);
        drop(daemon);
        let successor = attach(dir.path());
        assert_eq!((hear(&successor).0, hear(&successor).0), (HELD, DONE));
        if serves {
            assert_eq!(ask(&successor, &word(SERVING, 0, [0; 2], 0), None), DONE);
        }
        std::thread::sleep(Duration::from_millis(2300));

        drop(successor);

        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(keeper::status(dir.path()).unwrap().denying, denies_at_once, "serves: {serves}");
        std::thread::sleep(Duration::from_millis(1500));
        assert!(keeper::status(dir.path()).unwrap().denying, "in time all the same");
        let last = attach(dir.path());
        assert_eq!((hear(&last).0, hear(&last).0), (HELD, DONE));
        assert_eq!(ask(&last, &word(FINISH, 0, [0; 2], 0), None), DONE);
        left(thread);
    }
}

/// Waits until a keeper's thread has ended.
fn left(thread: JoinHandle<()>) {
    let until = Instant::now() + Duration::from_secs(10);
    while !thread.is_finished() {
        assert!(Instant::now() < until, "it stays");
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.join().unwrap();
}

#[test]
fn one_that_is_replaced_leaves_its_post_to_the_other() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let watch = living(dir.path());
    let hold = |daemon: &OwnedFd| assert_eq!(ask(daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&watch)), DONE);
    // Told to finish, or left alone after it has heard who takes its post; these are threads of one process.
    for told in [true, false] {
        let (old_daemon, old) = start(dir.path());
        hold(&old_daemon);
        let (daemon, new) = start_new(dir.path());
        hold(&daemon);
        assert_eq!(ask(&old_daemon, &word(RELIEF, 0, [0; 2], std::process::id().into()), None), DONE);
        assert_eq!(ask(&daemon, &word(TAKE_POST, 0, [0; 2], 0), None), DONE);
        if told {
            assert_eq!(ask(&old_daemon, &word(FINISH, 0, [0; 2], 0), None), DONE);
        }
        drop(old_daemon);

        left(old);

        assert!(!keeper::status(dir.path()).unwrap().orphaned, "the new one is reached, and has a daemon");
        assert_eq!(ask(&daemon, &word(FINISH, 0, [0; 2], 0), None), DONE);
        left(new);
    }
}

#[test]
fn one_that_nobody_replaced_stays_and_is_reached_again() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let (daemon, thread) = start(dir.path());
    let watch = living(dir.path());
    assert_eq!(ask(&daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&watch)), DONE);
    let path = dir.path().join(keeper::SOCKETS[0]);
    // Somebody else has its name, of whom it has heard nothing, and dies.
    std::fs::remove_file(&path).unwrap();
    let stranger = fdpass::listen(&path).unwrap();
    drop(daemon);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!thread.is_finished(), "it left what it holds to a stranger");

    drop(stranger);

    let until = Instant::now() + Duration::from_secs(10);
    while keeper::status(dir.path()).is_err() {
        assert!(Instant::now() < until, "nobody reaches it");
        std::thread::sleep(Duration::from_millis(5));
    }
    let successor = attach(dir.path());
    assert_eq!((hear(&successor).0, hear(&successor).0), (HELD, DONE));
    assert_eq!(ask(&successor, &word(FINISH, 0, [0; 2], 0), None), DONE);
    left(thread);
}

#[test]
fn a_new_one_whose_daemon_dies_leaves_unless_nobody_else_is_there() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let watch = living(dir.path());
    let hold = |daemon: &OwnedFd| assert_eq!(ask(daemon, &word(HOLD, WATCH, [0; 2], 0), Some(&watch)), DONE);
    let (old_daemon, old) = start(dir.path());
    hold(&old_daemon);
    let (daemon, new) = start_new(dir.path());
    hold(&daemon);
    drop(daemon);
    left(new);
    assert!(!keeper::status(dir.path()).unwrap().orphaned, "the old one is where it was");

    let (daemon, new) = start_new(dir.path());
    hold(&daemon);
    assert_eq!(ask(&old_daemon, &word(FINISH, 0, [0; 2], 0), None), DONE);
    left(old);
    drop(daemon);
    let until = Instant::now() + Duration::from_secs(10);
    while !keeper::status(dir.path()).is_ok_and(|status| status.orphaned && status.alive == 1) {
        assert!(Instant::now() < until, "nobody has the post");
        std::thread::sleep(Duration::from_millis(5));
    }
    let successor = attach(dir.path());
    assert_eq!((hear(&successor).0, hear(&successor).0), (HELD, DONE));
    assert_eq!(ask(&successor, &word(FINISH, 0, [0; 2], 0), None), DONE);
    left(new);
}

/// A tmpfs at a directory of its own, with a watch on it. Goes with its value.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` for who may not mount.
    fn at(dir: PathBuf) -> Option<Self> {
        std::fs::create_dir(&dir).unwrap();
        nix::mount::mount(Some("none"), &dir, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).ok()?;
        Some(Self(dir))
    }

    fn is_mounted(&self) -> bool {
        let shown = self.0.display().to_string().replace(' ', "\\040");
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(&shown)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Reads a byte of `path` on a thread of its own, which may wait.
fn reader(path: PathBuf) -> JoinHandle<Result<(), Option<i32>>> {
    std::thread::spawn(move || {
        let read = || std::os::unix::fs::FileExt::read_exact_at(&File::open(&path)?, &mut [0], 0);
        read().map_err(|e: std::io::Error| e.raw_os_error())
    })
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A file on a disk, marked in a group with a journal; `None` where that cannot be had.
fn marked(dir: &Path) -> Option<(Group, Journal, PathBuf)> {
    let path = dir.join("file");
    std::fs::write(&path, [7; 4096]).unwrap();
    let group = Group::new().ok()?;
    group.mark(File::open(&path).unwrap().as_fd()).ok()?;
    Some((group, Journal::create().unwrap(), path))
}

#[test]
fn readers_are_denied_and_mounts_taken_down_without_memory() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // It logs what it does, as in life.
    let _ = LogControl::start(logging::parse("info").unwrap(), Format::Text);
    let dir = tempfile::Builder::new().prefix("keeper").tempdir_in("/var/tmp").unwrap();
    let Some((group, journal, path)) = marked(dir.path()) else {
        return eprintln!("SKIPPED: no pre-content events here");
    };
    let Some(tmpfs) = Tmpfs::at(dir.path().join("a mount")) else { return eprintln!("SKIPPED: may not mount") };
    let watch = living(&tmpfs.0);
    // Of which only the first is what it is told to start; that one dies at once.
    let words = ["/bin/sh", "-c", "exit 1"].map(std::ffi::OsString::from);
    SUCCESSOR.set(Some(Prepared::new(words.into()).unwrap()));
    let (daemon, thread) = start(dir.path());
    let journal_file = File::from(journal.as_fd().try_clone_to_owned().unwrap());
    let group_file = File::from(group.as_fd().try_clone_to_owned().unwrap());
    for (kind, file) in [(GROUP, &group_file), (JOURNAL, &journal_file), (WATCH, &watch)] {
        assert_eq!(ask(&daemon, &word(HOLD, kind, [0; 2], 0), Some(file)), DONE);
    }
    // One that a daemon took, which then died.
    let taken = reader(path.clone());
    wait_until("an event comes", || {
        group.take(&journal, usize::MAX).is_ok_and(|events| {
            events.into_iter().for_each(std::mem::forget);
            true
        })
    });
    let before = ALLOCATIONS.load(Ordering::Relaxed);

    drop((daemon, group, group_file));

    assert_eq!(taken.join().unwrap(), Err(Some(5)), "whom the daemon knew");
    wait_until("it denies", || keeper::status(dir.path()).is_ok_and(|status| status.denying));
    for _ in 0..3 {
        assert_eq!(reader(path.clone()).join().unwrap(), Err(Some(5)), "who came later");
    }
    let recovery = fdpass::connect(&dir.path().join(keeper::SOCKETS[0])).unwrap();
    assert_eq!(ask(&recovery, &word(RECOVER, 0, [0; 2], 0), None), DONE);
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;

    assert!(!tmpfs.is_mounted());
    assert_eq!(allocated, 0, "allocations while it missed its daemon, started another, denied and recovered");
    drop(watch);
    left(thread);
}
