//! What a reader sees when something breaks: an error or a wait, never a wrong byte.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc::EIO;
use rafsd::net::server::Fault;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte, wait_for_exit};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_flipped_bit_is_eio_and_the_log_names_it", Place::Both, a_flipped_bit_is_eio_and_the_log_names_it),
    case("a_stalled_source_is_eio_by_the_deadline", Place::Both, a_stalled_source_is_eio_by_the_deadline),
    case("a_waiting_reader_can_be_killed", Place::Both, a_waiting_reader_can_be_killed),
    case("a_kill_during_an_unmount_holds_nothing_up", Place::Fuse, a_kill_during_an_unmount_holds_nothing_up),
    case("a_source_that_comes_back_serves_again", Place::Both, a_source_that_comes_back_serves_again),
    case("a_killed_daemon_leaves_readers_waiting", Place::Host, a_killed_daemon_leaves_readers_waiting),
    case("a_busy_mount_outlives_sigterm_without_zeros", Place::Host, a_busy_mount_outlives_sigterm_without_zeros),
];

fn a_flipped_bit_is_eio_and_the_log_names_it(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 3)?;
    let mount = fixture.mount("mnt")?;
    let blob = fixture.list()?[0]["devices"][0]["blob"].as_str().context("a blob")?.to_owned();
    // File 1 starts at unit 3; its bytes are stored plain behind those of file 0.
    let offset = FILE as u64 + 1000;
    fixture.server.set_fault(Fault::FlipByte { blob: blob.clone(), offset });

    ensure!(read_byte(&mount.join("1"), 0) == Err(Some(EIO)), "the first byte of a corrupt unit");
    ensure!(read_byte(&mount.join("1"), 2 << 20) == Ok(content(1, FILE)[2 << 20]), "another unit of the same file");
    ensure!(fs::read(mount.join("2"))? == content(2, FILE), "another file");
    let log = fixture.log();
    let told =
        log.lines().any(|line| line.contains(&blob) && line.contains("unit 3") && line.contains(&format!("{FILE}+")));
    ensure!(told, "the log names no blob, unit and offset:\n{log}");

    fixture.server.set_fault(Fault::None);
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "after the fault");
    fixture.finish()
}

fn a_stalled_source_is_eio_by_the_deadline(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--deadline", "2"])?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);

    let asked = Instant::now();
    let got = read_byte(&mount.join("0"), 0);
    let waited = asked.elapsed();

    ensure!(got == Err(Some(EIO)), "{got:?}");
    // The kernel asks a second time, for the single page.
    let longest = Duration::from_millis(if ctx.in_guest { 30_000 } else { 3900 });
    ensure!(waited >= Duration::from_secs(2) && waited < longest, "after {waited:?}");
    fixture.finish()
}

fn a_waiting_reader_can_be_killed(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    kill_a_waiting_reader(ctx, &mount)?;
    fixture.finish()
}

/// A program that waits for what does not come, and dies when it is killed.
fn kill_a_waiting_reader(ctx: &Ctx, mount: &Path) -> Outcome {
    let mut reader = Reader::of(&mount.join("0"), &ctx.dir.join("copy"))?;
    ensure!(!reader.ends_within(Duration::from_millis(500))?, "the reader did not wait");
    reader.child.kill()?;
    ensure!(reader.ends_within(Duration::from_secs(10))?, "the reader cannot be killed");
    Ok(())
}

/// The kernel waits for a read that only the daemon can answer, on a thread of the daemon. If that thread held
/// the connection, nobody could end it any more once the daemon is killed.
fn a_kill_during_an_unmount_holds_nothing_up(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--deadline", "8"])?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    kill_a_waiting_reader(ctx, &mount)?;
    let mut unmounting = Command::new(&ctx.rafsd)
        .arg("umount")
        .arg(&mount)
        .arg("--run")
        .arg(fixture.run())
        .stderr(Stdio::null())
        .spawn()?;
    std::thread::sleep(Duration::from_secs(1));

    let clock = Instant::now();
    // Waits for the last thread.
    let keepers = fixture.kill()?;
    unmounting.wait()?;

    // The keepers' patience, and some more.
    ensure!(clock.elapsed() < Duration::from_secs(20), "the daemon took {:?} to end", clock.elapsed());
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "still mounted");
    fixture.start(&[])?;
    keepers.into_iter().try_for_each(wait_for_exit)?;
    fixture.finish()
}

fn a_source_that_comes_back_serves_again(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    // One byte, so that nothing is read ahead.
    ensure!(read_byte(&mount.join("0"), 0) == Ok(content(0, FILE)[0]), "before");
    fixture.server.set_fault(Fault::Status { code: 403, retry_after: None });

    ensure!(read_byte(&mount.join("1"), 2 << 20) == Err(Some(EIO)), "while the source refuses");
    drop_caches()?;
    ensure!(read_byte(&mount.join("0"), 0) == Ok(content(0, FILE)[0]), "what was readable stays readable");

    fixture.server.set_fault(Fault::None);
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "after it came back");
    fixture.finish()
}

fn a_killed_daemon_leaves_readers_waiting(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    // One event that the daemon has read when it dies, one that nobody ever reads.
    let mut before = Reader::of(&mount.join("0"), &ctx.dir.join("before"))?;
    ensure!(!before.ends_within(Duration::from_millis(500))?, "the reader did not wait");
    let keepers = fixture.kill()?;
    let mut after = Reader::of(&mount.join("1"), &ctx.dir.join("after"))?;

    for (name, reader) in [("before", &mut before), ("after", &mut after)] {
        ensure!(!reader.ends_within(Duration::from_secs(1))?, "the reader from {name} the kill went on");
    }
    fixture.must(&["recover"])?;
    for (name, reader) in [("before", before), ("after", after)] {
        reader.ensure_failed_with_nothing().with_context(|| format!("the reader from {name} the kill"))?;
    }
    keepers.into_iter().try_for_each(wait_for_exit)?;
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "still mounted");
    Ok(())
}

fn a_busy_mount_outlives_sigterm_without_zeros(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    let open = fs::File::open(mount.join("0"))?;
    let keepers = fixture.keepers();
    fixture.stop()?;

    let mut late = Reader::of(&mount.join("0"), &ctx.dir.join("late"))?;
    ensure!(!late.ends_within(Duration::from_secs(1))?, "a cold read went on without a daemon");

    fixture.must(&["recover"])?;
    late.ensure_failed_with_nothing()?;
    ensure!(
        read_byte(Path::new(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open))), 0) == Err(Some(EIO)),
        "the open file"
    );
    drop(open);
    keepers.into_iter().try_for_each(wait_for_exit)
}

/// A process that copies a file, so that what it saw can be looked at.
struct Reader {
    child: Child,
    copy: PathBuf,
}

impl Reader {
    fn of(path: &Path, copy: &Path) -> anyhow::Result<Self> {
        let child = Command::new("cat").arg(path).stdin(Stdio::null()).stdout(fs::File::create(copy)?).spawn()?;
        Ok(Self { child, copy: copy.to_owned() })
    }

    fn ends_within(&mut self, time: Duration) -> anyhow::Result<bool> {
        let until = Instant::now() + time;
        loop {
            if self.child.try_wait()?.is_some() {
                return Ok(true);
            }
            if Instant::now() > until {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn ensure_failed_with_nothing(mut self) -> Outcome {
        let status = self.child.wait()?;
        let seen = fs::metadata(&self.copy)?.len();
        ensure!(!status.success() && seen == 0, "{status}, after {seen} bytes");
        Ok(())
    }
}
