//! One case in a process of its own, and what has to be cleaned up after it.
//!
//! The harness makes itself the reaper of orphans, so that whatever a case started (a daemon that
//! left its process group included) is a child of the harness once the case is dead, and can be
//! found, killed and named.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::report::Verdict;
use crate::{Case, Interrupt, Way, mounts, ring};

/// The limit of a case: it takes seconds on a host; the guest's processor is emulated, and the limit must
/// be shorter than the silence after which the whole guest is given up.
pub(crate) fn time_limit(in_guest: bool) -> Duration {
    Duration::from_secs(if in_guest { 150 } else { 120 }) + time_for_long_run(in_guest)
}

/// What a run takes longer that was asked to be long; see [`LONG_RUN`].
pub(crate) fn time_for_long_run(in_guest: bool) -> Duration {
    let asked = |name| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    let rounds = LONG_RUN.into_iter().map(|name| asked(name) / if name == "RAFSD_READS" { 1000 } else { 1 });
    Duration::from_secs(if in_guest { 20 } else { 2 }) * rounds.sum::<u32>()
}

/// Variables that ask for more rounds than the tests of every day have. The guest gets them too.
pub(crate) const LONG_RUN: [&str; 3] = ["RAFSD_KILLS", "RAFSD_MOUNTS", "RAFSD_READS"];

/// How long a process may take to end after the last that was heard of it: its sockets are closed before it has gone.
const ENDING: Duration = Duration::from_millis(500);

/// How long a killed process may take to disappear before it counts as stuck in the kernel.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);

/// Makes this process die when the thread that started it does.
pub(crate) fn die_with_parent() -> nix::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)
}

/// Runs `case` in a child process, with a directory of its own below `store`, and cleans up after it.
pub(crate) fn run(
    case: &Case,
    way: Way,
    in_guest: bool,
    store: &Path,
    limit: Duration,
    interrupt: &Interrupt,
) -> (Verdict, Option<Duration>) {
    let start = Instant::now();
    let verdict = run_inner(case, way, in_guest, store, limit, interrupt)
        .unwrap_or_else(|error| Verdict::Failed { reason: format!("{error:#}"), output: String::new() });
    (verdict, Some(start.elapsed()))
}

fn run_inner(
    case: &Case,
    way: Way,
    in_guest: bool,
    store: &Path,
    limit: Duration,
    interrupt: &Interrupt,
) -> anyhow::Result<Verdict> {
    prctl::set_child_subreaper(true).context("become the reaper of orphans")?;
    let scratch = Scratch::new(store).context("make a scratch directory")?;
    let log = scratch.dir.join("log");
    let mut child = start(case, way, in_guest, &scratch.dir.join("dir"), &log).context("start the case")?;
    let mut problem = match wait(&mut child, limit, interrupt)? {
        Ended::By(status) => complaint(status),
        Ended::Timeout => Some(format!("timed out after {} s", limit.as_secs())),
        Ended::Interrupt => Some("interrupted".into()),
    };
    let cleaned = kill_children().context("kill what the case left running").and_then(|processes| {
        let left = scratch.detach().context("unmount what the case left mounted")?;
        Ok((processes, left))
    });
    let output = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    let (processes, left) = match cleaned {
        Ok(cleaned) => cleaned,
        Err(error) => {
            let ended = problem.unwrap_or_else(|| "passed".to_owned());
            return Ok(Verdict::Failed { reason: format!("{ended}; then: {error:#}"), output });
        }
    };
    if problem.is_none() && !processes.is_empty() {
        problem = Some(format!("left processes behind: {}", processes.join(", ")));
    }
    if problem.is_none() && !left.is_empty() {
        problem = Some(format!("left mounts behind: {}", left.join(", ")));
    }
    scratch.remove().context("remove the scratch directory")?;
    Ok(problem.map_or(Verdict::Passed, |reason| Verdict::Failed { reason, output }))
}

fn start(case: &Case, way: Way, in_guest: bool, dir: &Path, log: &Path) -> io::Result<Child> {
    fs::create_dir(dir)?;
    let log = File::create(log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--run-one", case.name, "--backend", way.backend.name()]).arg("--dir").arg(dir);
    if in_guest {
        command.arg("--in-guest");
    }
    command.env("RUST_BACKTRACE", "1").process_group(0);
    if way.over_ring {
        command.env(ring::VARIABLE, "io-uring");
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()
}

enum Ended {
    By(ExitStatus),
    Timeout,
    Interrupt,
}

fn wait(child: &mut Child, limit: Duration, interrupt: &Interrupt) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Ended::By(status));
        }
        if interrupt.is_set() {
            return Ok(Ended::Interrupt);
        }
        if Instant::now() >= deadline {
            return Ok(Ended::Timeout);
        }
        std::thread::sleep(POLL);
    }
}

/// What is wrong with a case that ended so; `None` when it passed.
fn complaint(status: ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(1), _) => Some("returned an error".into()),
        (Some(101), _) => Some("panicked".into()),
        (Some(code), _) => Some(format!("ended with status {code}")),
        (None, signal) => Some(format!("killed by signal {}", signal.unwrap_or_default())),
    }
}

/// Kills and reaps every child of this process, and the orphans that become its children by that;
/// returns those that were alive, and not about to end, as `name (pid)`.
fn kill_children() -> anyhow::Result<Vec<String>> {
    let until = Instant::now() + ENDING;
    while Instant::now() < until && !children()?.is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let deadline = Instant::now() + KILL_PATIENCE;
    let mut killed = Vec::new();
    let mut last = 0;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return Ok(killed),
            Ok(WaitStatus::StillAlive) => {}
            Ok(_) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let children = children()?;
        for (pid, name) in &children {
            let known = format!("{name} ({pid})");
            if !killed.contains(&known) {
                killed.push(known);
            }
            match kill(Pid::from_raw(*pid), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        anyhow::ensure!(Instant::now() < deadline, "{} do not die: {}", children.len(), killed.join(", "));
        if last == killed.len() {
            std::thread::sleep(POLL);
        }
        last = killed.len();
    }
}

/// Living children of this process as pid and name, by `/proc` (small kernels have no `children` file).
fn children() -> io::Result<Vec<(i32, String)>> {
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while we look.
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // "pid (name) state ppid …"; the name may hold anything, parentheses too.
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let mut fields = stat[close + 1..].split_whitespace();
        if fields.next() != Some("Z") && fields.next() == Some(&own) {
            found.push((pid, stat[open + 1..close].to_owned()));
        }
    }
    Ok(found)
}

/// What the names of directories of cases begin with.
const PREFIX: &str = "rafsd-case.";

/// The file in such a directory that its harness holds a lock on. A killed one lets go of it.
const OWNER: &str = "owner";

/// A directory for one case. Dropping it unmounts and removes what is below.
struct Scratch {
    dir: PathBuf,
    /// Closed in children, so that only the harness holds the lock.
    _owner: Flock<File>,
}

/// Takes away what a harness that was killed left in `store`: mounts, files, and by that its keepers' work.
pub(crate) fn sweep(store: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(store).context("look for what is left")? {
        let dir = entry?.path();
        let is_ours = dir.file_name().is_some_and(|name| name.as_bytes().starts_with(PREFIX.as_bytes()));
        let owner = is_ours.then(|| File::open(dir.join(OWNER)));
        let Some(Ok(owner)) = owner else { continue };
        if let Ok(owner) = Flock::lock(owner, FlockArg::LockExclusiveNonblock) {
            eprintln!("taking away what a killed run left in {}", dir.display());
            let deadline = Instant::now() + KILL_PATIENCE;
            // Keepers start another daemon; all of them have the directory among their arguments.
            while kill_users(&dir)? && Instant::now() < deadline {
                std::thread::sleep(POLL);
            }
            drop(Scratch { dir, _owner: owner });
        }
    }
    Ok(())
}

/// Kills every process that names something in `dir` on its command line. Whether there was one.
fn kill_users(dir: &Path) -> io::Result<bool> {
    let name = [dir.as_os_str().as_bytes(), b"/"].concat();
    let mut was_there = false;
    for entry in fs::read_dir("/proc")? {
        let pid = entry?.file_name().to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
        let Some(pid) = pid.filter(|pid| *pid != Pid::this()) else { continue };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.split(|byte| *byte == 0).any(|argument| argument.starts_with(&name)) {
            was_there = true;
            // It may have gone by itself.
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    Ok(was_there)
}

impl Scratch {
    fn new(store: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(store)?;
        let owner = Flock::lock(File::create(dir.path().join(OWNER))?, FlockArg::LockExclusiveNonblock);
        let owner = owner.map_err(|(_, errno)| errno)?;
        // Cleaned up by our own drop: a recursive removal must not run into something mounted.
        Ok(Self { dir: dir.keep(), _owner: owner })
    }

    fn detach(&self) -> io::Result<Vec<String>> {
        let rows = mounts::detach_below(&self.dir)?;
        Ok(rows.iter().map(|row| format!("{} on {}", row.kind, row.mountpoint.display())).collect())
    }

    fn remove(self) -> io::Result<()> {
        let dir = self.dir.clone();
        drop(self);
        if dir.exists() { Err(io::Error::other(format!("{} is still there", dir.display()))) } else { Ok(()) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = self.detach().and_then(|_| fs::remove_dir_all(&self.dir)) {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}
