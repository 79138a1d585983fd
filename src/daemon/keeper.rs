//! The process that does nothing, so that nothing goes wrong.
//!
//! A fanotify group answers for its readers only while somebody holds its descriptor: when the
//! last holder closes it, waiting readers are let through and see holes as zeros. So a second
//! process, the keeper, is given the group before the first mark is made. Killing the daemon then
//! leaves readers waiting.
//!
//! When the daemon finishes in order it says so and the keeper exits. When the daemon vanishes,
//! the keeper stays, holding what it was given, until its mounts are gone or somebody asks it to
//! [`recover`]: take the mounts out of the tree and deny whoever still reads. It stays for as long
//! as a superblock lives, denying, and exits with the last one.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::export::{MountWatch, WatchId};
use crate::sys::fanotify::{Answer, EVENT_BUFFER, Group};
use crate::sys::mount::DetachedMount;
use crate::sys::{fdpass, mount, process};

/// Name of the keeper's socket in the run directory.
pub const SOCKET: &str = "keeper.sock";

/// The keeper's answer to a word that it has carried out; any other is an error for people.
const DONE: &[u8] = b"done";

/// What the daemon tells its keeper, over the socket they share.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// Keep the descriptor that comes with this.
    Hold { name: String },
    /// The mount that comes with this is about to become visible here.
    Mounting { dir: PathBuf },
    /// All is unmounted: let go and exit.
    Finish,
}

/// What a keeper says about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub pid: u32,
    /// Whether the daemon has vanished.
    pub orphaned: bool,
    /// Whether readers are being denied, after a request to recover.
    pub denying: bool,
    /// Mount points it was told of.
    pub mounts: Vec<PathBuf>,
    /// Superblocks of those that still exist.
    pub alive: usize,
}

/// The daemon's end.
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    child: Mutex<Child>,
}

impl Keeper {
    /// Fails with `AddrInUse` if a keeper is below `run` already: its daemon has vanished, and its
    /// mounts must be ended before another daemon touches the same files.
    pub fn ensure_none(run: &Path) -> io::Result<()> {
        let Ok(status) = ask(run, "status") else { return Ok(()) };
        let (mounts, pid) = (status.mounts.len(), status.pid);
        if status.denying {
            let text = format!(
                "{} mount(s) of a daemon that was killed are out of the tree but have open files; close them first",
                status.alive
            );
            return Err(io::Error::new(io::ErrorKind::AddrInUse, text));
        }
        let text = format!(
            "a daemon that was killed left {mounts} mount(s), held by process {pid}; `rafsd recover` ends them"
        );
        Err(io::Error::new(io::ErrorKind::AddrInUse, text))
    }

    /// Starts `program` as a keeper.
    pub fn start(program: &Path, run: &Path) -> io::Result<Self> {
        let socket_path = run.join(SOCKET);
        let (ours, theirs) = fdpass::pair()?;
        let mut command = Command::new(program);
        command.arg("keeper").arg("--socket").arg(&socket_path);
        let child = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).spawn()?;
        // It holds the keeper's end too; a keeper that fails to start must be heard to hang up.
        drop(command);
        let keeper = Self { socket: ours, child: Mutex::new(child) };
        // The first answer tells that it runs.
        fdpass::receive(keeper.socket.as_fd())?.ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(keeper)
    }

    fn tell(&self, word: &Word, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let message = serde_json::to_vec(word)?;
        if message.len() > fdpass::MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is too long"));
        }
        // One question and its answer at a time.
        let _alone = self.child.lock().unwrap();
        fdpass::send(self.socket.as_fd(), &message, fd)?;
        let (answer, _) = fdpass::receive(self.socket.as_fd())?.ok_or(io::ErrorKind::BrokenPipe)?;
        if answer == DONE { Ok(()) } else { Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned())) }
    }

    /// Whether it still runs. Without it, readers of incomplete images would see zeros as soon as
    /// this process ends.
    pub fn is_alive(&self) -> bool {
        matches!(self.child.lock().unwrap().try_wait(), Ok(None))
    }

    /// Gives it a descriptor to hold. Returns when it has it.
    pub fn hold(&self, name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(&Word::Hold { name: name.to_owned() }, Some(fd))
    }

    /// Tells it of a mount, before anybody can see it.
    pub fn mounting(&self, dir: &Path, mount: &DetachedMount) -> io::Result<()> {
        self.tell(&Word::Mounting { dir: dir.to_owned() }, Some(mount.as_fd()))
    }

    /// Lets it go, and waits until it has.
    pub fn finish(&self) {
        if self.tell(&Word::Finish, None).is_ok() {
            let _ = self.child.lock().unwrap().wait();
        }
    }
}

/// Asks the keeper below `run` something: `status` or `recover`.
pub fn ask(run: &Path, what: &str) -> io::Result<Status> {
    let mut stream = UnixStream::connect(run.join(SOCKET))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    // In one piece: what the keeper has not read when it hangs up would reset the connection.
    stream.write_all(what.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(serde_json::from_str(&answer)?)
}

/// Takes the mounts of a vanished daemon out of the tree and denies their readers with `EIO`.
pub fn recover(run: &Path) -> io::Result<Status> {
    ask(run, "recover")
}

/// The keeper process: runs until it may let go. `socket` is the daemon's end of the talk.
pub fn keep(socket: OwnedFd, control: &Path) -> io::Result<()> {
    // In this order: from here on only SIGKILL or a reason to stop ends this process.
    process::ignore_stop_signals()?;
    let _ = process::leave_session();
    process::protect_from_oom();
    process::set_name(c"rafsd-keeper");
    match std::fs::remove_file(control) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(control)?;
    fdpass::send(socket.as_fd(), DONE, None)?;
    let mut post = Post {
        socket: Some(socket),
        listener,
        held: BTreeMap::new(),
        mounts: Vec::new(),
        watch: MountWatch::new()?,
        denying: false,
    };
    post.stand();
    let _ = std::fs::remove_file(control);
    Ok(())
}

/// A mount that the keeper was told of.
struct Kept {
    dir: PathBuf,
    /// `st_dev`, which tells it from whatever else may be mounted there later.
    device: u64,
    watch: WatchId,
}

/// Everything the keeper process has.
struct Post {
    /// `None` once the daemon has vanished.
    socket: Option<OwnedFd>,
    listener: UnixListener,
    held: BTreeMap<String, OwnedFd>,
    mounts: Vec<Kept>,
    watch: MountWatch,
    denying: bool,
}

impl Post {
    /// Returns when nobody can be harmed by letting go: the daemon said so, or it has vanished and
    /// the last superblock is gone. Nothing that fails is a reason to leave.
    fn stand(&mut self) {
        loop {
            if let Err(error) = self.wait().and_then(|()| self.bury()) {
                tracing::error!(%error, "the keeper cannot wait for what happens; it tries again");
                std::thread::sleep(Duration::from_secs(1));
            }
            if self.denying {
                self.deny_waiting();
            }
            if self.hear() {
                return;
            }
            self.serve_control();
            // Last, because each of the above may be what ends the last superblock.
            if self.socket.is_none() && self.watch.alive() == 0 {
                return;
            }
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.watch.as_poll(), PollFlags::POLLIN),
        ];
        fds.extend(self.socket.as_ref().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        let group = self.held.get("group").filter(|_| self.denying);
        fds.extend(group.map(|group| PollFd::new(group.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Hears what the daemon says, if anything. True when it says to finish.
    fn hear(&mut self) -> bool {
        let Some(socket) = self.socket.take() else { return false };
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO) == Ok(0) {
            self.socket = Some(socket);
            return false;
        }
        // Whatever breaks this talk, it means that the daemon has vanished.
        if let Ok(Some((bytes, fd))) = fdpass::receive(socket.as_fd()) {
            let outcome = self.carry_out(&bytes, fd);
            let answer = outcome.as_ref().map_or_else(|error| error.to_string().into_bytes(), |_| DONE.to_vec());
            if fdpass::send(socket.as_fd(), &answer, None).is_ok() {
                self.socket = Some(socket);
            }
            if outcome.is_ok_and(|finish| finish) {
                return true;
            }
        }
        if self.socket.is_none() {
            tracing::error!("the daemon vanished; readers of its mounts wait, see `rafsd recover`");
        }
        false
    }

    /// True when the word is to finish.
    fn carry_out(&mut self, bytes: &[u8], fd: Option<OwnedFd>) -> io::Result<bool> {
        let word = serde_json::from_slice(bytes)?;
        match word {
            Word::Finish => return Ok(true),
            Word::Hold { name } => self.held.extend([(name, fd.ok_or(io::ErrorKind::InvalidInput)?)]),
            Word::Mounting { dir } => self.take(&dir, fd)?,
        }
        Ok(false)
    }

    /// Answers one question on the control socket, if somebody waits there. Questions are short
    /// and come from root on this host; one that says nothing is dropped.
    fn serve_control(&mut self) {
        let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO) != Ok(1) {
            return;
        }
        let Ok((mut stream, _)) = self.listener.accept() else { return };
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            let _ = set(&stream, Some(Duration::from_secs(1)));
        }
        let mut question = [0; 64];
        let Ok(len) = stream.read(&mut question) else { return };
        let mounts = self.mounts.iter().map(|kept| kept.dir.clone()).collect();
        if question[..len].trim_ascii() == b"recover" && self.socket.is_none() {
            self.start_denying();
        }
        let status = Status {
            pid: std::process::id(),
            orphaned: self.socket.is_none(),
            denying: self.denying,
            mounts,
            alive: self.watch.alive(),
        };
        // Whoever asked may have gone.
        let _ = serde_json::to_writer(&mut stream, &status);
    }

    fn start_denying(&mut self) {
        self.denying = true;
        for kept in &self.mounts {
            // Asking for attributes reads nothing of the image; the topmost mount answers.
            let ours = std::fs::symlink_metadata(&kept.dir).is_ok_and(|meta| meta.dev() == kept.device);
            if ours && let Err(error) = mount::detach(&kept.dir) {
                tracing::error!(dir = %kept.dir.display(), %error, "cannot take a mount out of the tree");
            }
        }
        // Events that the daemon had read are known only by the numbers their descriptors had in
        // its table. Denying every possible number reaches them all.
        if let Some(group) = self.group() {
            let limit = process::raise_descriptor_limit().unwrap_or(1 << 20).min(1 << 20);
            for number in 0..i32::try_from(limit).unwrap_or(i32::MAX) {
                // ENOENT for the numbers that name nothing.
                let _ = group.answer_number(number, Answer::Deny(libc::EIO));
            }
        }
        self.deny_waiting();
        if let Err(error) = self.bury() {
            tracing::error!(%error, "cannot learn which mounts have gone");
        }
    }

    /// Notes a mount that no path leads to yet, without keeping it alive.
    fn take(&mut self, dir: &Path, mount: Option<OwnedFd>) -> io::Result<()> {
        let mount = std::fs::File::from(mount.ok_or(io::ErrorKind::InvalidInput)?);
        let device = mount.metadata()?.dev();
        let watch = self.watch.add_path(Path::new(&format!("/proc/self/fd/{}", mount.as_raw_fd())))?;
        self.mounts.push(Kept { dir: dir.to_owned(), device, watch });
        Ok(())
    }

    /// Forgets mounts whose superblocks are gone.
    fn bury(&mut self) -> io::Result<()> {
        self.watch.gone()?;
        let watch = &self.watch;
        self.mounts.retain(|kept| watch.is_alive(kept.watch));
        Ok(())
    }

    fn deny_waiting(&self) {
        let Some(group) = self.group() else { return };
        let mut buffer = vec![0; EVENT_BUFFER];
        while let Ok(events) = group.read(&mut buffer) {
            if events.is_empty() {
                break;
            }
            for event in events {
                if let Ok(file) = event.file {
                    let _ = group.answer(file.as_fd(), Answer::Deny(libc::EIO));
                }
            }
        }
    }

    fn group(&self) -> Option<Group> {
        self.held.get("group").and_then(|fd| fd.try_clone().ok()).map(Group::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn post(socket: OwnedFd, dir: &Path) -> Post {
        Post {
            socket: Some(socket),
            listener: UnixListener::bind(dir.join(SOCKET)).unwrap(),
            held: BTreeMap::new(),
            mounts: Vec::new(),
            watch: MountWatch::new().unwrap(),
            denying: false,
        }
    }

    #[test]
    fn a_daemon_that_dies_before_the_answer_leaves_what_it_said_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = fdpass::pair().unwrap();
        let mut post = post(theirs, dir.path());
        let word = serde_json::to_vec(&Word::Mounting { dir: dir.path().to_owned() }).unwrap();
        let mount = std::fs::File::open(dir.path()).unwrap();
        fdpass::send(ours.as_fd(), &word, Some(mount.as_fd())).unwrap();
        drop(ours);

        assert!(!post.hear(), "it goes on");

        assert!(post.socket.is_none(), "it knows that the daemon has vanished");
        assert_eq!(post.watch.alive(), 1, "it watches the mount");
    }

    #[test]
    fn an_unknown_word_is_answered_with_an_error_and_survived() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = fdpass::pair().unwrap();
        let mut post = post(theirs, dir.path());
        for word in [&b"{}"[..], b"nonsense", b"{\"Hold\":{\"name\":\"group\"}}"] {
            fdpass::send(ours.as_fd(), word, None).unwrap();
            assert!(!post.hear());
            let (answer, _) = fdpass::receive(ours.as_fd()).unwrap().unwrap();
            assert_ne!(answer, DONE, "{}", String::from_utf8_lossy(word));
        }
        fdpass::send(ours.as_fd(), b"\"Finish\"", None).unwrap();
        assert!(post.hear());
    }

    #[test]
    fn an_orphan_without_mounts_leaves_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = fdpass::pair().unwrap();
        let mut post = post(theirs, dir.path());
        drop(ours);
        let asked = Instant::now();
        post.stand();
        assert!(asked.elapsed() < Duration::from_secs(5));
    }
}
