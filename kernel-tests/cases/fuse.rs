//! What holds for the two ways over FUSE beyond what holds for all backends.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rafsd::net::server::Fault;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte, wait_for_exit};
use crate::host::Need;
use crate::support::{listing, tree};
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("an_abort_frees_who_waits", Place::Fuse, an_abort_frees_who_waits),
    case("a_stalled_read_holds_up_nobody_else", Place::Fuse, a_stalled_read_holds_up_nobody_else),
    case("signals_other_than_sigkill_interrupt_no_read", Place::Fuse, signals_other_than_sigkill_interrupt_no_read),
    case("what_nobody_kept_fails_and_is_ended", Place::Fuse, what_nobody_kept_fails_and_is_ended),
    case("recovered_readers_get_errors", Place::Fuse, recovered_readers_get_errors),
    case(
        "what_is_complete_at_the_mount_needs_nobody",
        Place::Only(Backend::FuseDevice),
        what_is_complete_at_the_mount_needs_nobody,
    ),
    case("devices_are_read_through_loops", Place::Only(Backend::FuseDevice), devices_are_read_through_loops),
];

/// A process that reads a file and waits.
fn cat(path: &Path) -> anyhow::Result<Child> {
    Ok(Command::new("cat").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// Waits until the daemon knows of somebody who waits.
fn wait_for_a_waiting_reader(fixture: &Fixture<'_>) -> Outcome {
    fixture.wait_for_list("waiting", |images| {
        let devices = images.iter().flat_map(|image| image["devices"].as_array().into_iter().flatten());
        devices.into_iter().any(|device| device["health"]["waiting"].as_u64().is_some_and(|count| count > 0))
    })
}

fn ends_within(child: &mut Child, time: Duration) -> anyhow::Result<bool> {
    let until = Instant::now() + time;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// `/sys/fs/fuse/connections`, mounted for the life of this.
struct Connections(PathBuf);

impl Connections {
    fn mount(ctx: &Ctx) -> anyhow::Result<Self> {
        let dir = ctx.dir.join("connections");
        fs::create_dir_all(&dir)?;
        nix::mount::mount(Some("none"), &dir, Some("fusectl"), nix::mount::MsFlags::empty(), None::<&str>)?;
        Ok(Self(dir))
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0);
    }
}

/// The number of the only connection of the fixture's daemon, as a successor would find it.
fn connection_number(fixture: &Fixture<'_>) -> anyhow::Result<u64> {
    let record = fs::read_dir(fixture.run().join("served"))?.next().context("a record")??;
    let record: serde_json::Value = serde_json::from_slice(&fs::read(record.path())?)?;
    record["record"]["fuse"]["device"][1].as_u64().with_context(|| format!("no connection in {record}"))
}

fn an_abort_frees_who_waits(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    let mut reader = cat(&mount.join("0"))?;
    wait_for_a_waiting_reader(&fixture)?;
    let connections = Connections::mount(ctx)?;

    fs::write(connections.0.join(connection_number(&fixture)?.to_string()).join("abort"), "1")?;

    ensure!(ends_within(&mut reader, Duration::from_secs(5))?, "it waits on");
    ensure!(!reader.wait()?.success(), "a read without data has succeeded");
    ensure!(read_byte(&mount.join("0"), 2 << 20).is_err(), "of a connection that has ended");
    drop(connections);
    fixture.umount(&mount)?;
    fixture.finish()
}

fn a_stalled_read_holds_up_nobody_else(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 3)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "before");
    fixture.server.set_fault(Fault::StallHead);
    let mut reader = cat(&mount.join("2"))?;
    wait_for_a_waiting_reader(&fixture)?;
    drop_caches()?;
    let clock = Instant::now();

    for _ in 0..100 {
        File::open(mount.join("2"))?;
        fs::metadata(mount.join("0"))?;
    }
    ensure!(fs::read_dir(&mount)?.count() == 3, "the directory");
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "what is here is read meanwhile");

    ensure!(clock.elapsed() < Duration::from_secs(3), "held up for {:?}", clock.elapsed());
    ensure!(reader.try_wait()?.is_none(), "the reader did not wait at all");
    fixture.server.set_fault(Fault::None);
    reader.kill()?;
    reader.wait()?;
    fixture.umount(&mount)?;
    fixture.finish()
}

fn signals_other_than_sigkill_interrupt_no_read(ctx: &Ctx) -> Outcome {
    let options = rafsd::net::server::ServerOptions { delay: Duration::from_millis(300), ..Default::default() };
    let fixture = Fixture::with(ctx, &[], options, &[], |dir| fs::write(dir.join("0"), content(0, FILE)))?;
    let mount = fixture.mount("mnt")?;
    // Which retries nothing that fails.
    let script = format!("exec dd if={} bs=4096 of=/dev/null 2>/dev/null", mount.join("0").display());
    // Signals for a whole group must reach only this one.
    let mut reader = Command::new("sh").arg("-c").arg(&script).process_group(0).spawn()?;
    let group = nix::unistd::Pid::from_raw(i32::try_from(reader.id())?);
    let until = Instant::now() + Duration::from_secs(60);
    while reader.try_wait()?.is_none() {
        ensure!(Instant::now() < until, "it never ends");
        // Signals that stop and go on interrupt waits as well, and end nobody.
        for signal in [nix::sys::signal::Signal::SIGSTOP, nix::sys::signal::Signal::SIGCONT] {
            let _ = nix::sys::signal::killpg(group, signal);
            std::thread::sleep(Duration::from_millis(3));
        }
    }
    ensure!(reader.wait()?.success(), "a read was interrupted");
    fixture.umount(&mount)?;
    fixture.finish()
}

fn what_nobody_kept_fails_and_is_ended(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    ensure!(read_byte(&mount.join("1"), 0) == Ok(content(1, FILE)[0]), "before");
    // All three at once, as `kill -9 -1` would.
    fixture.kill_all()?;
    for at in [0, 1 << 20, 2 << 20] {
        let got = read_byte(&mount.join("0"), at);
        ensure!(got.is_err(), "with nobody left, at {at}: {got:?}");
    }

    fixture.start(&[])?;

    let left = crate::mounts::below(&ctx.dir)?;
    ensure!(left.is_empty(), "still mounted: {left:?}");
    ensure!(!fixture.log().contains("may have read zeros"), "{}", fixture.log());
    let again = fixture.mount("again")?;
    for file in 0..2 {
        ensure!(fs::read(again.join(file.to_string()))? == content(file, FILE), "file {file}, mounted again");
    }
    fixture.umount(&again)?;
    fixture.finish()
}

fn recovered_readers_get_errors(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    let mut reader = cat(&mount.join("0"))?;
    wait_for_a_waiting_reader(&fixture)?;
    let keepers = fixture.kill()?;
    ensure!(!ends_within(&mut reader, Duration::from_millis(500))?, "it did not wait for a successor");

    fixture.must(&["recover"])?;

    ensure!(ends_within(&mut reader, Duration::from_secs(5))?, "it waits on");
    ensure!(!reader.wait()?.success(), "a read without data has succeeded");
    ensure!(crate::mounts::below(&ctx.dir)?.is_empty(), "still in the tree");
    keepers.into_iter().try_for_each(wait_for_exit)
}

fn what_is_complete_at_the_mount_needs_nobody(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let first = fixture.mount_with("first", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| images[0]["devices"][0]["stats"]["complete"] == true)?;
    // Durable, which takes up to two seconds, and only then read straight.
    std::thread::sleep(Duration::from_secs(3));
    let second = fixture.mount("second")?;
    ensure!(fs::read(first.join("0"))? == content(0, FILE), "over FUSE");
    fixture.umount(&first)?;
    ensure!(fixture.list()?[0]["state"] == "complete", "{:?}", fixture.list()?);
    fixture.kill_all()?;
    drop_caches()?;

    for file in 0..2 {
        ensure!(fs::read(second.join(file.to_string()))? == content(file, FILE), "file {file}, with nobody left");
    }

    fixture.start(&[])?;
    ensure!(fixture.log().contains("is complete and stays as it is"), "{}", fixture.log());
    ensure!(fs::read(second.join("1"))? == content(1, FILE), "and after a daemon came");
    nix::mount::umount(&second)?;
    fixture.finish()
}

/// The files of all loop devices, as the kernel shows them.
fn loops() -> anyhow::Result<Vec<PathBuf>> {
    let block = fs::read_dir("/sys/block")?.filter_map(|entry| Some(entry.ok()?.path()));
    let file = |path: PathBuf| fs::read_to_string(path.join("loop/backing_file")).ok();
    Ok(block.filter_map(file).map(|file| file.trim_end().into()).collect())
}

fn devices_are_read_through_loops(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    fixture.stop()?;
    fixture.set_environment("RAFSD_PRETEND", "no-file-backed".to_owned());
    fixture.start(&[])?;
    let mount = fixture.mount("mnt")?;
    // Those of others on this host do not count. The FUSE mount of a device is in no tree, so that the kernel shows
    // a path of its file that does not say whose it is.
    let own = || anyhow::Ok(loops()?.iter().filter(|file| file.starts_with(&ctx.dir)).count());
    ensure!(
        own()? == 1 && loops()?.len() >= 2,
        "bootstrap or device is not read through a loop device: {:?}",
        loops()?
    );
    let (want, got) = (listing::of(&fixture.source())?, listing::of(&mount)?);
    let differences = listing::diff(&want, &got);
    ensure!(differences.is_empty(), "- source, + mount:\n{differences}");
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    let again = listing::diff(&want, &listing::of(&mount)?);
    ensure!(again.is_empty(), "after a takeover: - source, + mount:\n{again}");
    fixture.umount(&mount)?;
    fixture.finish()?;
    let until = Instant::now() + Duration::from_secs(10);
    while own()? > 0 {
        ensure!(Instant::now() < until, "loop devices are left");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
