//! The processes that do nothing, so that nothing goes wrong.
//!
//! A fanotify group answers for its readers only while somebody holds its descriptor: when the
//! last holder closes it, waiting readers are let through and see holes as zeros. So two more
//! processes, the keepers, are given the group before the first mark is made, and with it all that
//! a successor needs to go on: the journal of events, the files of devices, the watch on
//! superblocks, the lock of the cache, `/dev/cachefiles`, the connections of FUSE mounts.
//!
//! When the daemon finishes in order it says so and the keepers exit. When it vanishes, the first
//! keeper starts another one (unless a service manager does), which takes everything over by
//! [`inherit`] and goes on where the dead one was stopped. When a keeper vanishes, the daemon starts
//! another one. What is left open is the death of all three at once; under a service manager that
//! holds descriptors (systemd's store), which is given the same, not even that.
//!
//! Keepers outlive daemons. When a successor has everything, it replaces those that would start
//! another daemon than it is, or deny readers at another time: `renewal`.
//!
//! * `post` is the keeper process, `choice` which program it starts, `denial` what it does to readers and mounts, `hands` what it does outside of its sandbox, `door` where it is reached, `wire` what is said, this file the daemon's
//!   end, `inherit` that of a successor.

mod absence;
mod choice;
mod denial;
mod door;
mod hands;
mod inherit;
mod post;
mod renewal;
mod wire;

pub use inherit::{Inheritance, inherit};
pub use post::{Orders, keep};
pub use wire::{Kind, Name};

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use self::post::socket_path;
use self::renewal::Renewal;
use self::wire::{Op, Word};
use crate::sys::service::Supervisor;
use crate::sys::{fdpass, service};

/// Names of the keepers' sockets in the run directory, by rank.
pub const SOCKETS: [&str; RANKS] = ["keeper.sock", "keeper-spare.sock"];
const RANKS: usize = 2;

fn socket_name(rank: usize) -> &'static str {
    SOCKETS[rank.min(RANKS - 1)]
}

/// Bits of a status word.
const ORPHANED: u64 = 1;
const DENYING: u64 = 2;

/// How long a keeper may take to start and to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// From when on a keeper that should answer is taken for one that will not. Readers wait meanwhile.
const STUCK: Duration = Duration::from_secs(8);

/// What a keeper says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Status {
    pub pid: u32,
    /// Whether the daemon has vanished.
    pub orphaned: bool,
    /// Whether readers are being denied: nobody has taken over in time, or somebody asked to recover.
    pub denying: bool,
    /// Superblocks that the daemon mounted and that still exist.
    pub alive: u64,
}

/// Asks a keeper below `run`, the first that answers.
pub fn status(run: &Path) -> io::Result<Status> {
    ask(run, Op::Status)
}

/// What each keeper below `run` says that answers.
pub fn statuses(run: &Path) -> Vec<Status> {
    (0..RANKS).filter_map(|rank| ask_one(run, rank, Op::Status).ok()).collect()
}

/// Takes the mounts of a vanished daemon out of the tree and denies their readers with `EIO`.
pub fn recover(run: &Path) -> io::Result<Status> {
    // Each has to let go of what it holds.
    let outcomes: Vec<_> = (0..RANKS).map(|rank| ask_one(run, rank, Op::Recover)).collect();
    let first = outcomes.iter().position(Result::is_ok).unwrap_or(RANKS - 1);
    outcomes.into_iter().nth(first).expect("one for each rank")
}

fn ask(run: &Path, op: Op) -> io::Result<Status> {
    let mut outcome = Err(ErrorKind::NotFound.into());
    for rank in 0..RANKS {
        outcome = ask_one(run, rank, op);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}

fn ask_one(run: &Path, rank: usize, op: Op) -> io::Result<Status> {
    let socket = fdpass::connect(&socket_path(run, rank))?;
    fdpass::set_timeout(socket.as_fd(), Some(Duration::from_secs(30)))?;
    Word::new(op).send(&socket, None)?;
    let (word, _) = Word::receive(&socket)?;
    let [pid, alive] = word.name.key;
    Ok(Status {
        pid: u32::try_from(pid).unwrap_or_default(),
        orphaned: word.value & ORPHANED != 0,
        denying: word.value & DENYING != 0,
        alive,
    })
}

/// How keepers are started.
#[derive(Clone, Debug)]
pub struct Plan {
    /// This program.
    pub program: PathBuf,
    /// Directory of sockets.
    pub run: PathBuf,
    /// How long readers wait for a successor of a daemon that vanished before they are denied.
    pub patience: Duration,
    /// The command line of a successor, if a keeper is to start one.
    pub successor: Option<Vec<OsString>>,
    /// Whether keepers confine themselves.
    pub sandbox: bool,
    /// The service manager, which is given the same descriptors.
    pub supervisor: Supervisor,
}

/// Something that keepers hold. Shared with whoever uses it in this process.
pub type Held = Arc<dyn AsFd + Send + Sync>;

/// The daemon's end of both keepers.
pub struct Keepers {
    plan: Plan,
    state: Mutex<State>,
    /// Wakes the thread that looks after them.
    wake: EventFd,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

struct State {
    ends: [Option<End>; RANKS],
    /// Everything they hold, for one that has to be started again.
    held: BTreeMap<Name, Held>,
    /// When those of a predecessor have to be looked at, if they have.
    renewal: Option<Renewal>,
    finished: bool,
}

/// One keeper.
struct End {
    socket: OwnedFd,
    pid: u32,
    /// If this process started it.
    child: Option<Child>,
}

impl fmt::Debug for Keepers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keepers").field("run", &self.plan.run).finish_non_exhaustive()
    }
}

impl Keepers {
    /// Starts what is missing of both keepers, and a thread that starts each again that dies.
    pub fn start(plan: Plan, inherited: Option<Inheritance>) -> io::Result<Arc<Self>> {
        let (ends, held) = inherited.map_or_else(Default::default, |all| (all.ends, all.held));
        let held = held.into_iter().map(|(name, fd)| (name, Arc::new(fd) as Held)).collect();
        let state = Mutex::new(State { ends, held, renewal: None, finished: false });
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let this = Arc::new(Self { plan, state, wake, watcher: Mutex::default() });
        this.complete()?;
        let weak = Arc::downgrade(&this);
        let watcher = std::thread::Builder::new().name("keep-0".to_owned()).spawn(move || {
            while let Some(this) = weak.upgrade() {
                if !this.watch() {
                    return;
                }
            }
        })?;
        *this.watcher.lock().unwrap() = Some(watcher);
        Ok(this)
    }

    /// Gives both a descriptor to hold. Returns when they have it; one of them is enough, for the
    /// other is being started again.
    pub fn hold(&self, name: Name, fd: Held) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.held.insert(name, fd.clone()).is_some() && name.kind == Kind::Device {
            // Held as long as the name is, the inode cannot have become another one.
            return Ok(());
        }
        // What fails closed must be free to do so when nobody serves it in time.
        if !name.kind.fails_closed()
            && let Err(error) = self.plan.supervisor.store(&name.label(), fd.as_fd())
        {
            tracing::warn!(%error, "the service manager does not hold a descriptor");
        }
        self.tell_all(&mut state, Word::about(Op::Hold, name), Some(&fd)).inspect_err(|_| {
            state.held.remove(&name);
        })
    }

    fn forget_at_the_supervisor(&self, name: Name) {
        // Told too late or not at all, it holds a descriptor for nothing.
        let _ = self.plan.supervisor.remove(&name.label());
    }

    /// Makes them forget what has this name.
    pub fn release(&self, name: Name) {
        let mut state = self.state.lock().unwrap();
        if state.held.remove(&name).is_some() {
            // A keeper that does not hear this is dead and takes what it holds along.
            let _ = self.tell_all(&mut state, Word::about(Op::Release, name), None);
            self.forget_at_the_supervisor(name);
        }
    }

    /// Whether one of them is there. Without any, readers of incomplete images would see zeros as
    /// soon as this process ends.
    pub fn is_alive(&self) -> bool {
        self.state.lock().unwrap().ends.iter().flatten().any(|end| !has_hung_up(end.socket.as_fd()))
    }

    /// Tells them that whoever waits is being answered, after everything was taken over: from then on the
    /// time that readers wait counts anew. And has those replaced that go by other settings, once this daemon has
    /// served for a while: if it dies of its start, they go on as before.
    pub fn note_takeover(&self) {
        let mut state = self.state.lock().unwrap();
        // One that does not hear it denies readers early.
        let _ = self.tell_all(&mut state, Word::new(Op::Serving), None);
        state.renewal = Some(Renewal::of(&state.held));
    }

    /// Leaves the mounts to them, and to a successor: at once if `successor`, else whenever one comes.
    pub fn leave(&self, successor: bool) {
        let mut state = self.state.lock().unwrap();
        state.finished = true;
        let _ = self.tell_all(&mut state, Word::new(Op::Leave).with(u64::from(successor)), None);
        // The end of the talk is what they wait for.
        state.ends = [None, None];
        drop(state);
        self.stop_watching();
    }

    /// Lets them go, and waits until they have.
    pub fn finish(&self) {
        let mut state = self.state.lock().unwrap();
        state.finished = true;
        state.held.keys().for_each(|name| self.forget_at_the_supervisor(*name));
        state.ends.iter_mut().filter_map(Option::take).for_each(dismiss);
        drop(state);
        self.stop_watching();
    }

    fn stop_watching(&self) {
        // The counter cannot overflow from a handful of writes, and a full one wakes as well.
        let _ = self.wake.write(1);
        if let Some(thread) = self.watcher.lock().unwrap().take() {
            let _ = thread.join();
        }
    }

    fn tell_all(&self, state: &mut State, word: Word, fd: Option<&Held>) -> io::Result<()> {
        let mut outcome = Err(ErrorKind::BrokenPipe.into());
        for end in &mut state.ends {
            match end.as_ref().map(|it| it.tell(word, fd.map(|fd| &**fd))) {
                Some(Ok(())) => outcome = Ok(()),
                // Its word is no: it lives and does not want this.
                Some(Err(error)) if error.raw_os_error() == Some(libc::ENOSPC) => return Err(error),
                // Of another release: it lives and does not know the word.
                Some(Err(error)) if error.raw_os_error() == Some(libc::EBADMSG) => {}
                Some(Err(_)) => bury(end.take()),
                None => {}
            }
        }
        outcome
    }

    /// Starts the keepers that are not there and tells them everything.
    fn complete(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        if state.finished {
            return Ok(());
        }
        for rank in 0..RANKS {
            if state.ends[rank].as_ref().is_some_and(|end| !has_hung_up(end.socket.as_fd())) {
                continue;
            }
            bury(state.ends[rank].take());
            state.ends[rank] = Some(self.fill_post(rank, &state.held, |_| ())?);
        }
        Ok(())
    }

    /// Starts a keeper, gives it everything, and then the post of `rank`; before that, `meanwhile`.
    fn fill_post(&self, rank: usize, held: &BTreeMap<Name, Held>, meanwhile: impl FnOnce(&End)) -> io::Result<End> {
        let end = self.spawn(rank)?;
        let told = held.iter().try_for_each(|(name, fd)| end.tell(Word::about(Op::Hold, *name), Some(&**fd)));
        let is_ready = || {
            meanwhile(&end);
            end.tell(Word::new(Op::TakePost), None)
        };
        match told.and_then(|()| is_ready()) {
            Ok(()) => Ok(end),
            Err(error) => {
                // Left alone it would take that for the death of the daemon.
                bury(Some(end));
                Err(error)
            }
        }
    }

    fn spawn(&self, rank: usize) -> io::Result<End> {
        let (ours, theirs) = fdpass::pair()?;
        let mut command = Command::new(&self.plan.program);
        command.args(self.plan.arguments(rank));
        // A successor must not take itself for the process that a service manager started.
        for name in service::VARIABLES {
            command.env_remove(name);
        }
        let child = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).spawn()?;
        // It holds the keeper's end too; a keeper that fails to start must be heard to hang up.
        drop(command);
        fdpass::set_timeout(ours.as_fd(), Some(PATIENCE))?;
        let end = End { socket: ours, pid: child.id(), child: Some(child) };
        // The first answer tells that it runs.
        end.hear()?;
        Ok(end)
    }

    /// Waits until a keeper dies and starts another one. False when it is time to stop.
    fn watch(&self) -> bool {
        let sockets: Vec<_> = {
            let state = self.state.lock().unwrap();
            state.ends.iter().flatten().filter_map(|end| end.socket.try_clone().ok()).collect()
        };
        let mut fds: Vec<_> = sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::empty())).collect();
        fds.push(PollFd::new(self.wake.as_fd(), PollFlags::POLLIN));
        let timeout = PollTimeout::from(1000u16);
        if poll(&mut fds, timeout).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.wake.read();
        if self.state.lock().unwrap().finished {
            return false;
        }
        if let Err(error) = self.complete() {
            tracing::error!(%error, "a keeper has died and cannot be started again; trying on");
            std::thread::sleep(Duration::from_secs(1));
        } else if let Err(error) = self.replace_foreign() {
            tracing::error!(%error, "keepers of the last daemon stay: if this one dies, they go by the settings of that one");
        }
        true
    }
}

/// Lets a keeper go, and waits until it has.
fn dismiss(end: End) {
    match end.tell(Word::new(Op::Finish), None) {
        // Hanging up last: a keeper whose daemon vanishes takes that for something else.
        Ok(()) => {
            // The end of the talk is the last thing that it does.
            let _ = end.hear();
            if let Some(mut child) = end.child {
                let _ = child.wait();
            }
        }
        Err(_) => bury(Some(end)),
    }
}

/// Reaps a keeper that is gone. One that lives and does not answer is ended: it would take the end
/// of the talk for the death of the daemon, and deny readers in between.
fn bury(end: Option<End>) {
    let Some(End { socket, pid, child }) = end else { return };
    if !has_hung_up(socket.as_fd())
        && let Ok(pid) = i32::try_from(pid)
    {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    if let Some(mut child) = child {
        let _ = child.wait();
    }
}

/// Whether the other end is closed, which poll tells without being asked (`POLLHUP`).
fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

impl End {
    fn tell(&self, word: Word, fd: Option<&(dyn AsFd + Send + Sync)>) -> io::Result<()> {
        word.send(&self.socket, fd.map(AsFd::as_fd))?;
        self.hear()
    }

    fn hear(&self) -> io::Result<()> {
        match Word::receive(&self.socket)?.0 {
            Word { op: Op::Done, .. } => Ok(()),
            Word { value, .. } => Err(io::Error::from_raw_os_error(i32::try_from(value).unwrap_or(libc::EIO))),
        }
    }
}
