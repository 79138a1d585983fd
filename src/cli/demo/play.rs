//! Running the program from the mount.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::say;
use super::stop::Stop;
use super::subject::{Program, Subject};

/// How often a running program is looked at, and with it how exact its time is.
const TICK: Duration = Duration::from_millis(1);

/// How long it took.
pub(super) struct Played {
    pub(super) first_byte: Duration,
    pub(super) end: Duration,
}

/// Reads the first byte of the program, cold, then runs it to its end, with its output in `out`.
pub(super) fn play(subject: &Subject, mount: &Path, out: &Path, stop: &Stop) -> anyhow::Result<Played> {
    let Program { path, args, .. } = &subject.program;
    let program = mount.join(path);
    let clock = Instant::now();
    let mut byte = [0];
    File::open(&program)?.read_exact(&mut byte).with_context(|| format!("cannot read {}", program.display()))?;
    let first_byte = clock.elapsed();
    stop.check()?;

    // Files, not pipes: a process that the program leaves behind would keep a pipe open.
    let (stdout, stderr) = (out.join("stdout"), out.join("stderr"));
    let mut command = Command::new(&program);
    command.args(args).env("LD_LIBRARY_PATH", subject.library_path(mount)).process_group(0);
    command.stdin(Stdio::null()).stdout(File::create(&stdout)?).stderr(File::create(&stderr)?);
    let child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let status = run_to_end(child, stop)?;
    let end = clock.elapsed();
    stop.check()?;

    let said = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if !status.success() {
        bail!("{} ended with {status}: {}", program.display(), said(&stderr)?.trim());
    }
    say(format_args!("it says: {}", said(&stdout)?.lines().next().unwrap_or_default()))?;
    Ok(Played { first_byte, end })
}

/// Waits for a child that leads a process group of its own, or kills it when there is a wish to
/// stop. Nothing of its group is left then: it would keep the mount busy.
fn run_to_end(mut child: Child, stop: &Stop) -> io::Result<ExitStatus> {
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    // Without reaping it, so that the number still means this group when it is killed.
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    while !stop.is_set() && waitid(Id::Pid(pid), flags)? == WaitStatus::StillAlive {
        std::thread::sleep(TICK);
    }
    // ESRCH cannot be: the leader is there at least as a zombie.
    killpg(pid, Signal::SIGKILL)?;
    child.wait()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    fn shell(script: &str) -> Child {
        Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).process_group(0).spawn().unwrap()
    }

    #[test]
    fn a_program_that_ends_keeps_its_status() {
        assert_eq!(run_to_end(shell("exit 7"), &Stop::new()).unwrap().code(), Some(7));
    }

    #[test]
    fn a_wish_to_stop_kills_the_program_and_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let note = dir.path().join("pid");
        let child = shell(&format!("sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait", note.display()));
        let stop = Stop::new();

        let status = std::thread::scope(|scope| {
            let ended = scope.spawn(|| run_to_end(child, &stop).unwrap());
            let until = Instant::now() + Duration::from_secs(20);
            while !note.exists() && Instant::now() < until {
                std::thread::sleep(TICK);
            }
            stop.set();
            ended.join().unwrap()
        });

        assert_eq!(status.signal(), Some(libc::SIGKILL));
        let stat = format!("/proc/{}/stat", fs::read_to_string(&note).unwrap().trim());
        let until = Instant::now() + Duration::from_secs(20);
        // Killed with the group, reaped by whoever adopted it.
        while fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < until, "the program's child lives");
            std::thread::sleep(TICK);
        }
    }
}
