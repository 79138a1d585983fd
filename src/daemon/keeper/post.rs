//! The keeper process.
//!
//! It holds descriptors for a daemon, gives them to a successor, and does for readers what nobody
//! else does while there is no daemon: after `patience` it lets their reads fail. From its first word on it
//! allocates nothing, whatever it does: it is needed most when there is no memory. All that it will ever use is
//! laid out before, and what it logs is put together on the stack.
//!
//! There are two of them. The one of rank 1 does the same as the one of rank 0, except that it
//! starts no daemon and denies no reader while the other lives. So any one of the three processes
//! may die, or any two one shortly after the other, and the third puts the rest back.
//!
//! A keeper is nobody until it has been given everything and told to take its post. The one that had
//! the post before leaves then, told by the daemon; without a daemon, when it sees that the one it was
//! told of can be reached.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::WaitStatus;

use super::absence::Absence;
use super::choice::{Candidate, Choice};
use super::denial::Denial;
use super::door::Door;
use super::hands::Hands;
use super::wire::{Kind, Name, Op, Word};
use super::{DENYING, ORPHANED, STUCK, socket_name};
use crate::sys::inotify::each_watch;
use crate::sys::journal::Journal;
use crate::sys::spawn::Prepared;
use crate::sys::{fdpass, process, sandbox};
use crate::telemetry::logging::Format;
use crate::telemetry::memoryless::MemorylessLog;

/// Most descriptors that are held: far more than a host has blobs in use.
const MOST_HELD: usize = 32 << 10;
/// How often an orphan looks around.
const TICK: Duration = Duration::from_millis(100);
/// How long another process may take to say or hear a word.
const WORD: Duration = Duration::from_secs(5);

/// For how long the other keeper is not asked again after it did not answer.
const PASSED_OVER: Duration = Duration::from_secs(10);

/// What a keeper is told when it is started.
#[derive(Debug)]
pub struct Orders {
    /// Directory of sockets.
    pub run: PathBuf,
    /// 0, or 1 for the one that steps back while the other lives.
    pub rank: usize,
    /// How long readers wait for a successor before they are denied.
    pub patience: Duration,
    /// The command line of a daemon to start when one vanishes; `None` if somebody else does that.
    pub successor: Option<Prepared>,
    /// Whether the thread that holds and hears confines itself.
    pub sandbox: bool,
    /// How the log looks that was started before.
    pub log_format: Format,
}

/// Runs until it may let go. `daemon` is the connection of the daemon that started it.
///
/// # Errors
/// If it cannot begin. Once it has said that it runs, it ends well.
pub fn keep(daemon: OwnedFd, mut orders: Orders) -> io::Result<()> {
    // In this order: from here on only SIGKILL or a reason to stop ends this process.
    process::ignore_stop_signals()?;
    let _ = process::leave_session();
    let _ = process::raise_descriptor_limit();
    process::protect_from_oom();
    process::set_name(if orders.rank == 0 { c"rafsd-keeper" } else { c"rafsd-spare" });
    let starts_daemons = orders.successor.is_some();
    let choice = Choice::new();
    let hands = Hands::start(orders.successor.take())?;
    if orders.sandbox {
        sandbox::confine_keeper(&orders.run).map_err(io::Error::other)?;
    }
    let mut post = Post::new(daemon, orders, (hands, choice), starts_daemons);
    // The last thing that takes memory is done.
    post.say_hello()?;
    post.stand();
    post.door.close();
    Ok(())
}

/// Everything the keeper process has.
struct Post {
    orders: Orders,
    hands: Hands,
    sibling: PathBuf,
    /// Open while this is the keeper of its rank.
    door: Door,
    /// The process that was to take this post, if any was.
    relief: Option<u32>,
    /// The daemon's connection; `None` while there is no daemon.
    daemon: Option<OwnedFd>,
    /// Sorted by name; never grows beyond what was reserved.
    held: Vec<(Name, OwnedFd)>,
    journal: Option<Journal>,
    absence: Absence,
    denying: bool,
    denial: Denial,
    log: MemorylessLog,
    choice: Choice,
    /// Until when the other keeper is not asked, because it did not answer.
    passed_over: Option<Instant>,
}

impl Post {
    fn new(daemon: OwnedFd, orders: Orders, (hands, choice): (Hands, Choice), starts_daemons: bool) -> Self {
        let sibling = socket_path(&orders.run, 1 - orders.rank.min(1));
        let door = Door::new(&orders.run, orders.rank);
        let log = MemorylessLog::new(orders.log_format);
        Self {
            orders,
            hands,
            sibling,
            door,
            relief: None,
            daemon: Some(daemon),
            held: Vec::with_capacity(MOST_HELD),
            journal: None,
            absence: Absence::new(starts_daemons),
            denying: false,
            denial: Denial::new(),
            log,
            choice,
            passed_over: None,
        }
    }

    fn say_hello(&self) -> io::Result<()> {
        self.daemon.as_ref().map_or(Ok(()), |daemon| Word::new(Op::Done).send(daemon, None))
    }

    /// Returns when nobody can be harmed by letting go: the daemon said so, or it has vanished and
    /// the last superblock is gone. Nothing that fails is a reason to leave.
    fn stand(&mut self) {
        loop {
            self.wait();
            if self.hear() || self.serve() {
                return;
            }
            if self.daemon.is_none() && self.is_over() {
                return;
            }
        }
    }

    fn wait(&self) {
        let timeout = if self.daemon.is_some() { PollTimeout::NONE } else { timeout(TICK) };
        let daemon = self.daemon.as_ref().map(AsFd::as_fd);
        // A denied reader may try again at once, and should not wait for the next tick.
        let denied = self.denying.then(|| self.get(Kind::Group)).flatten();
        let (first, second) = (self.door.listener(), daemon.or(denied));
        let Some(either) = first.or(second) else { return std::thread::sleep(TICK) };
        let mut fds = [poll_for_input(first.unwrap_or(either)), poll_for_input(second.unwrap_or(either))];
        // Interrupted or failed: the loop looks at everything anyway, and an orphan's time goes on.
        if poll(&mut fds, timeout).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Hears what the daemon says, if anything. True when it says to finish.
    fn hear(&mut self) -> bool {
        let Some(daemon) = self.daemon.take() else { return false };
        if !has_input(daemon.as_fd()) {
            self.daemon = Some(daemon);
            return false;
        }
        // Whatever breaks this talk, it means that the daemon has vanished.
        match Word::receive(&daemon) {
            Ok((word, fd)) => {
                let outcome = self.carry_out(word, fd);
                if answer(&daemon, outcome).is_ok() {
                    self.daemon = Some(daemon);
                }
                if word.op == Op::Finish {
                    return true;
                }
            }
            Err(e) if e.kind() == ErrorKind::InvalidData => {
                if answer(&daemon, Err(libc::EBADMSG)).is_ok() {
                    self.daemon = Some(daemon);
                }
            }
            Err(_) => {}
        }
        if self.daemon.is_none() {
            self.note_absence();
        }
        false
    }

    fn carry_out(&mut self, word: Word, fd: Option<OwnedFd>) -> Result<(), i32> {
        match (word.op, fd) {
            (Op::Hold, Some(fd)) => self.hold(word.name, fd),
            (Op::Release, _) => {
                if let Ok(at) = self.held.binary_search_by_key(&word.name, |(name, _)| *name) {
                    self.held.remove(at);
                }
                Ok(())
            }
            (Op::Leave, _) => {
                self.absence.expect(word.value != 0);
                Ok(())
            }
            (Op::Serving, _) => {
                self.absence.note_service();
                Ok(())
            }
            (Op::TakePost, _) => self.door.open().map_err(|e| errno(&e)),
            (Op::Relief, _) => {
                self.relief = u32::try_from(word.value).ok();
                Ok(())
            }
            (Op::Finish, _) => Ok(()),
            _ => Err(libc::EINVAL),
        }
    }

    fn hold(&mut self, name: Name, fd: OwnedFd) -> Result<(), i32> {
        if name.kind == Kind::Journal {
            let copy = fd.try_clone().map_err(|e| errno(&e))?;
            self.journal = Some(Journal::recognize(copy).map_err(|e| errno(&e))?);
        }
        match self.held.binary_search_by_key(&name, |(name, _)| *name) {
            Ok(at) => self.held[at].1 = fd,
            Err(_) if self.held.len() == MOST_HELD => return Err(libc::ENOSPC),
            Err(at) => self.held.insert(at, (name, fd)),
        }
        Ok(())
    }

    fn get(&self, kind: Kind) -> Option<BorrowedFd<'_>> {
        find(&self.held, kind)
    }

    fn note_absence(&mut self) {
        let gone = self.absence.begin();
        if gone.had_stayed {
            self.choice.note_service();
        }
        if gone.is_unexpected && self.orders.rank == 0 && self.door.listener().is_some() {
            let successor = self.absence.wants_successor();
            self.log.error(format_args!("the daemon vanished; readers of its mounts wait successor={successor}"));
        }
    }

    /// Answers one connection, if somebody waits for that. Who says nothing is dropped. True when the
    /// daemon has said to finish meanwhile.
    fn serve(&mut self) -> bool {
        let Some(listener) = self.door.listener().filter(|it| has_input(*it)) else { return false };
        let Ok(client) = fdpass::accept(listener) else { return false };
        let own = nix::unistd::geteuid().as_raw();
        let is_ours = fdpass::peer(client.as_fd()).is_ok_and(|(_, uid)| uid == own || uid == 0);
        if !is_ours || fdpass::set_timeout(client.as_fd(), Some(WORD)).is_err() {
            return false;
        }
        let Ok((word, _)) = Word::receive(&client) else { return false };
        match word.op {
            Op::Attach => return self.attach(client),
            Op::Status => drop(self.status().send(&client, None)),
            Op::Recover => {
                if self.daemon.is_none() {
                    self.recover();
                }
                // Whoever asked may have gone.
                let _ = self.status().send(&client, None);
            }
            _ => drop(answer(&client, Err(libc::EINVAL))),
        }
        false
    }

    /// Makes `client` the daemon and gives it everything, unless there is one. True when that one
    /// has said to finish.
    fn attach(&mut self, client: OwnedFd) -> bool {
        // The last one may have hung up a moment ago.
        while self.daemon.as_ref().is_some_and(|daemon| has_input(daemon.as_fd())) {
            if self.hear() {
                return true;
            }
        }
        if self.daemon.is_some() {
            let _ = answer(&client, Err(libc::EBUSY));
            return false;
        }
        let all =
            self.held.iter().try_for_each(|(name, fd)| Word::about(Op::Held, *name).send(&client, Some(fd.as_fd())));
        let told = all.and_then(|()| Word::new(Op::Done).send(&client, None));
        if told.and_then(|()| fdpass::set_timeout(client.as_fd(), None)).is_err() {
            return false;
        }
        self.daemon = Some(client);
        self.absence.end();
        self.denying = false;
        self.denial.begin_anew();
        false
    }

    fn status(&self) -> Word {
        let orphaned = if self.daemon.is_none() { ORPHANED } else { 0 };
        let denying = if self.denying { DENYING } else { 0 };
        let mut word = Word::new(Op::Done).with(orphaned | denying);
        word.name.key = [u64::from(std::process::id()), self.alive()];
        word
    }

    /// Superblocks that live, as the kernel knows.
    fn alive(&self) -> u64 {
        let mut count = 0;
        match self.get(Kind::Watch).map(|watch| each_watch(watch, &mut |_| count += 1)) {
            // Unknown means in use.
            Some(Err(_)) => 1,
            _ => count,
        }
    }

    /// Whether this orphan keeps nothing that another one does not keep in its place.
    ///
    /// One that was starting when its daemon died holds perhaps a part only: the one that has the post
    /// has all. With nobody there a part is better than nothing.
    fn is_replaced(&mut self) -> bool {
        if self.door.is_ours() {
            return false;
        }
        let owner = self.door.owner();
        if owner.is_some() && (self.door.listener().is_none() || owner == self.relief) {
            return true;
        }
        if owner.is_none() && self.door.open().is_ok() {
            let rank = self.orders.rank;
            self.log.warn(format_args!("nobody had this keeper's name; it has it again rank={rank}"));
        }
        false
    }

    /// What an orphan does from time to time. True when it may let go.
    fn is_over(&mut self) -> bool {
        if self.is_replaced() {
            return true;
        }
        if let Some(status) = self.absence.reap()
            && let Some(candidate) = self.choice.note_end()
        {
            let (how, number) = match status {
                WaitStatus::Exited(_, code) => ("exit status", code),
                WaitStatus::Signaled(_, signal, _) => ("signal", signal as i32),
                _ => ("end", 0),
            };
            self.log.error(format_args!("{candidate} has died of its start ({how} {number}); another one is tried"));
            self.note_failure(candidate);
        }
        let late = self.absence.has_lasted(self.orders.patience);
        let is_needed = self.alive() > 0;
        if !is_needed && (late || !self.absence.wants_successor() && self.get(Kind::Cachefiles).is_none()) {
            return true;
        }
        if late {
            // The kernel fails whoever waits there once nobody holds it, neither this one nor the other.
            self.held.retain(|(name, _)| !name.kind.fails_closed());
        }
        if self.steps_back() {
            return false;
        }
        self.start_successor();
        if late && !self.denying {
            self.log.error(format_args!("no daemon has come back in time; cold reads fail until one does"));
            self.denying = true;
        }
        if self.denying {
            self.deny();
        }
        false
    }

    /// Whether the other keeper lives and answers, and has precedence.
    fn steps_back(&mut self) -> bool {
        if self.orders.rank == 0 || self.passed_over.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        let asked = fdpass::connect(&self.sibling).and_then(|socket| {
            fdpass::set_timeout(socket.as_fd(), Some(STUCK))?;
            Word::new(Op::Status).send(&socket, None)?;
            Word::receive(&socket)
        });
        if asked.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock) {
            self.log.error(format_args!("the keeper that has precedence does not answer and is passed over"));
            self.passed_over = Instant::now().checked_add(PASSED_OVER);
        }
        asked.is_ok()
    }

    fn start_successor(&mut self) {
        if !self.absence.is_time_to_start() {
            return;
        }
        let (candidate, program) = self.choice.next(self.get(Kind::Program));
        let started = self.hands.start_daemon(program);
        match &started {
            Ok(_) => self.choice.note_start(candidate),
            Err(error) => {
                let why = failure(error);
                self.log.error(format_args!(
                    "{candidate} cannot be started in place of a daemon that has gone error={why}"
                ));
                self.note_failure(candidate);
            }
        }
        self.absence.note_start(started.ok());
    }

    /// Has something else started next than this, which could not go on.
    fn note_failure(&mut self, candidate: Candidate) {
        self.choice.note_failure(candidate);
        if candidate == Candidate::Given {
            self.held.retain(|(name, _)| name.kind != Kind::Program);
        }
    }

    /// Takes the mounts out of the tree and denies their readers.
    fn recover(&mut self) {
        self.absence.give_up();
        self.held.retain(|(name, _)| name.kind != Kind::Fuse);
        if self.steps_back() {
            return;
        }
        self.denying = true;
        if let Some(watch) = find(&self.held, Kind::Watch) {
            self.denial.take_down(watch, &self.hands, self.log);
        }
        self.deny();
    }

    fn deny(&mut self) {
        if let (Some(group), Some(journal)) = (find(&self.held, Kind::Group), &self.journal) {
            self.denial.deny(group, journal);
        }
    }
}

fn answer(to: &OwnedFd, outcome: Result<(), i32>) -> io::Result<()> {
    match outcome {
        Ok(()) => Word::new(Op::Done).send(to, None),
        Err(errno) => Word::new(Op::Failed).with(u64::from(errno.unsigned_abs())).send(to, None),
    }
}

/// What there is only one of, among what is held.
fn find(held: &[(Name, OwnedFd)], kind: Kind) -> Option<BorrowedFd<'_>> {
    let at = held.binary_search_by_key(&Name::only(kind), |(name, _)| *name).ok()?;
    Some(held[at].1.as_fd())
}

/// Why something failed, in words for which no memory is asked.
pub(super) fn failure(error: &io::Error) -> Errno {
    Errno::from_raw(errno(error))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn poll_for_input(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

fn timeout(of: Duration) -> PollTimeout {
    PollTimeout::try_from(of).unwrap_or(PollTimeout::MAX)
}

/// Whether reading would not wait: there is something, or the other end has gone.
fn has_input(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [poll_for_input(fd)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Where the keeper of `rank` listens.
pub(super) fn socket_path(run: &Path, rank: usize) -> PathBuf {
    run.join(socket_name(rank))
}
