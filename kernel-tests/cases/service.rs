//! The daemon as a service on a kernel: its sandbox while it serves, and its watchdog.

use std::fmt::Write as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rafsd::net::server::Fault;
use rafsd::sys::fdpass;

use super::fixture::{FILE, Fixture, content};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_service_manager_keeps_readers_when_all_are_killed", Place::Host, a_service_manager_keeps_readers_waiting),
    case("a_link_leads_the_daemon_nowhere", Place::Both, a_link_leads_the_daemon_nowhere),
    case("a_daemon_that_may_read_little_serves_that", Place::Both, a_daemon_that_may_read_little_serves_that),
    case("the_thread_that_answers_the_kernel_is_narrowed", Place::Both, the_thread_that_answers_the_kernel_is_narrowed),
    case("a_stuck_event_thread_starves_the_watchdog", Place::Host, a_stuck_event_thread_starves_the_watchdog),
];

/// A link where the daemon writes leads out of its directory; without the sandbox it is followed.
fn a_link_leads_the_daemon_nowhere(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let (link, outside) = (fixture.cache().join("bootstraps"), ctx.dir.join("outside"));
    fs::create_dir(&outside)?;
    std::os::unix::fs::symlink(&outside, &link)?;
    let is_empty = || anyhow::Ok(fs::read_dir(&outside)?.next().is_none());

    if rafsd::sys::sandbox::landlock_version().is_some() {
        let refused = fixture.mount("mnt").err().context("the daemon followed the link")?;
        ensure!(format!("{refused:#}").contains("Permission denied"), "{refused:#}");
        ensure!(is_empty()?, "something was written outside");
    } else {
        println!("this kernel has no landlock: nothing was refused");
    }
    fixture.restart(&["--sandbox", "off"])?;
    let mount = fixture.mount("mnt")?;
    ensure!(!is_empty()?, "this proves nothing: nothing is written there");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// Two images of different directories; the daemon may read one of them.
fn a_daemon_that_may_read_little_serves_that(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let (image, hidden) = (ctx.dir.join("image"), ctx.dir.join("hidden"));
    copy(&image, &hidden)?;
    fixture.restart(&["--sandbox-read", image.to_str().context("UTF-8")?])?;

    let mount = |from: &Path, name: &str| {
        let dir = ctx.dir.join(name);
        fs::create_dir(&dir)?;
        let paths = [from.join("bootstrap"), dir, from.join("blobs")];
        let [bootstrap, dir, blobs] = paths.each_ref().map(|path| path.to_str().expect("UTF-8"));
        fixture.command(&["mount", bootstrap, dir, "--blobs", blobs, "--backend", ctx.backend.name()])
    };
    let refused = mount(&hidden, "no")?;
    let told = String::from_utf8_lossy(&refused.stderr);
    if rafsd::sys::sandbox::landlock_version().is_some() {
        ensure!(!refused.status.success() && told.contains("Permission denied"), "{told}");
    } else {
        println!("this kernel has no landlock: nothing was narrowed");
        fixture.umount(&ctx.dir.join("no"))?;
    }
    let served = mount(&image, "yes")?;
    ensure!(served.status.success(), "{}\n{}", String::from_utf8_lossy(&served.stderr), fixture.log());
    ensure!(fs::read(ctx.dir.join("yes/0"))? == content(0, FILE), "the bytes of the image");
    fixture.umount(&ctx.dir.join("yes"))?;
    fixture.finish()
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = Command::new("cp").arg("-r").arg(from).arg(to).status()?;
    ensure!(status.success(), "cp: {status}");
    Ok(())
}

fn the_thread_that_answers_the_kernel_is_narrowed(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "the bytes of the image");
    if rafsd::sys::sandbox::has_seccomp() {
        let name = match ctx.backend {
            Backend::Fanotify => "fan-0",
            Backend::Cachefiles => "cf-0",
            Backend::FuseDevice | Backend::FuseTree => "fuse-0",
        };
        let status = fs::read_to_string(format!("/proc/{}/task/{}/status", fixture.pid(), thread(&fixture, name)?))?;
        let filters = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).map(str::trim);
        let own = fs::read_to_string("/proc/self/status")?;
        let ours = own.lines().find_map(|line| line.strip_prefix("Seccomp_filters:")).map(str::trim);
        let number = |text: Option<&str>| anyhow::Ok(text.context("the kernel counts filters")?.parse::<u32>()?);
        ensure!(number(filters)? == number(ours)? + 2, "{status}");
    }
    let denied = fixture.log().lines().find(|line| line.contains("Operation not permitted")).map(str::to_owned);
    ensure!(denied.is_none(), "something that is needed was refused: {denied:?}");
    fixture.finish()
}

/// Number of the daemon's thread of this name.
fn thread(fixture: &Fixture, name: &str) -> anyhow::Result<i32> {
    for task in fs::read_dir(format!("/proc/{}/task", fixture.pid()))? {
        let task = task?;
        if fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name) {
            return Ok(task.file_name().to_str().context("a number")?.parse()?);
        }
    }
    anyhow::bail!("no thread {name}")
}

fn a_stuck_event_thread_starves_the_watchdog(ctx: &Ctx) -> Outcome {
    const PERIOD: Duration = Duration::from_secs(2);
    let mut fixture = Fixture::files(ctx, 1)?;
    let path = ctx.dir.join("notify");
    let socket = UnixDatagram::bind(&path)?;
    socket.set_read_timeout(Some(2 * PERIOD))?;
    let hear = || {
        let mut buffer = [0; 256];
        loop {
            let text = socket.recv(&mut buffer).map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned())?;
            // What it gives to hold is another matter.
            if !text.starts_with("FDSTORE") {
                return io::Result::Ok(text);
            }
        }
    };
    let is_fed = || hear().is_ok_and(|text| text == "WATCHDOG=1");
    fixture.stop()?;
    let period = PERIOD.as_micros().to_string();
    fixture.set_environment("NOTIFY_SOCKET", path.display().to_string());
    fixture.set_environment("WATCHDOG_USEC", period);
    fixture.start(&[])?;
    let mount = fixture.mount("mnt")?;
    ensure!(hear()?.starts_with("READY=1"), "ready");
    ensure!(is_fed() && is_fed(), "a daemon that is well feeds it");

    // One thread is stopped; all others, the timers among them, go on.
    let stuck = Pid::from_raw(thread(&fixture, "fan-0")?);
    ptrace::attach(stuck).context("stop the thread")?;
    waitpid(stuck, Some(WaitPidFlag::__WALL))?;
    // What was on its way.
    let late = (0..2).take_while(|_| is_fed()).count();
    ensure!(late < 2 && !is_fed(), "a daemon whose event thread is stuck feeds the watchdog");
    ensure!(fixture.log().contains("fan-0 did not answer"), "the log names the thread:\n{}", fixture.log());

    ptrace::detach(stuck, None).context("let the thread go")?;
    ensure!(is_fed() && is_fed(), "it is well again");
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "the bytes of the image");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// The store of descriptors of a service manager.
#[derive(Default)]
struct Manager {
    held: Mutex<Vec<(String, OwnedFd)>>,
}

impl Manager {
    /// Takes in what a daemon says, until the socket falls silent.
    fn hear(&self, socket: &UnixDatagram) -> Outcome {
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        let mut buffer = [0; 4096];
        loop {
            let (len, fd) = match fdpass::receive(socket.as_fd(), &mut buffer) {
                Ok(message) => message.context("a message")?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            let text = String::from_utf8_lossy(&buffer[..len]).into_owned();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or_default().to_owned();
            let mut held = self.held.lock().unwrap();
            match fd {
                Some(fd) if text.contains("FDSTORE=1") => held.push((name, fd)),
                _ if text.contains("FDSTOREREMOVE=1") => held.retain(|(known, _)| *known != name),
                _ => {}
            }
        }
    }

    /// A command line before that of a daemon, which hands everything over as systemd does.
    fn hand_over(&self) -> anyhow::Result<Vec<String>> {
        let held = self.held.lock().unwrap();
        let mut redirections = String::new();
        for ((_, fd), number) in held.iter().zip(3..) {
            // For the child; this process ends soon enough.
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
            write!(redirections, " {number}<&{}", fd.as_raw_fd())?;
        }
        let names: Vec<_> = held.iter().map(|(name, _)| name.as_str()).collect();
        let script = format!(
            "export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}; exec \"$0\" \"$@\"{redirections}",
            held.len(),
            names.join(":")
        );
        Ok(["bash".to_owned(), "-c".to_owned(), script].into())
    }
}

fn a_service_manager_keeps_readers_waiting(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    fixture.stop()?;
    let path = ctx.dir.join("manager");
    let socket = UnixDatagram::bind(&path)?;
    let manager = Manager::default();
    fixture.set_environment("NOTIFY_SOCKET", path.display().to_string());
    fixture.start(&[])?;
    let mount = fixture.mount("mnt")?;
    manager.hear(&socket)?;
    let kinds = ["group", "journal", "lock", "watch", "device"];
    for kind in kinds {
        let held = manager.held.lock().unwrap();
        ensure!(held.iter().any(|(name, _)| name.split('-').next() == Some(kind)), "no {kind}: {held:?}");
    }
    fixture.server.set_fault(Fault::StallHead);
    let cold = mount.join("0");
    // One event that the daemon has taken when all are killed, and one that nobody has.
    let taken = std::thread::spawn({
        let cold = cold.clone();
        move || fs::read(cold)
    });
    std::thread::sleep(Duration::from_millis(500));
    fixture.kill_all()?;
    let waiting = std::thread::spawn(move || fs::read(cold));
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!taken.is_finished() && !waiting.is_finished(), "a reader went on with nobody left");

    fixture.server.set_fault(Fault::None);
    fixture.start_below(manager.hand_over()?, &[])?;

    for reader in [taken, waiting] {
        let got = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
        ensure!(got == content(0, FILE), "a reader got something else");
    }
    // The keepers live this time, and go by the settings of the next daemon when it has everything.
    // A manager that does not listen would have daemons wait: few messages fit into its socket.
    manager.hear(&socket)?;
    let keepers = fixture.kill()?;
    fixture.start_below(manager.hand_over()?, &["--deadline", "100s"])?;
    manager.hear(&socket)?;
    let until = Instant::now() + Duration::from_secs(20);
    while fixture.keepers().len() != 2 || fixture.keepers().iter().any(|pid| keepers.contains(pid)) {
        ensure!(Instant::now() < until, "{keepers:?} were not replaced: {}", fixture.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "the other file");
    fixture.umount(&mount)?;
    fixture.finish()?;
    manager.hear(&socket)?;
    let left = manager.held.lock().unwrap();
    ensure!(left.is_empty(), "the manager is left with {left:?}");
    Ok(())
}
