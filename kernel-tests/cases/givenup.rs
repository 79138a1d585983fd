//! What nobody waits for any more: mounts whose client has gone, or whose daemon ends.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::net::server::Fault;

use super::fixture::{FILE, Fixture, content};
use super::lifecycle::left_behind;
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Both, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_mount_whose_client_is_interrupted_leaves_nothing", a_mount_whose_client_is_interrupted),
    case("a_client_that_hangs_up_at_any_moment_leaves_no_mount", a_client_that_hangs_up_at_any_moment),
    case("a_stop_does_not_wait_for_a_mount_whose_source_is_dead", a_stop_and_a_dead_source),
    case("an_upgrade_does_not_wait_long_for_a_mount_whose_source_is_dead", an_upgrade_and_a_dead_source),
];

/// Begins a mount at a new directory `name` whose blobs never come, and waits until they are asked for.
fn begin_mount(fixture: &Fixture<'_>, name: &str) -> anyhow::Result<(PathBuf, Child)> {
    let dir = fixture.ctx.dir.join(name);
    fs::create_dir_all(&dir)?;
    fixture.server.set_fault(Fault::StallHead);
    let before = fixture.server.stats().requests;
    let mut command = Command::new(&fixture.ctx.rafsd);
    command.arg("mount").arg(fixture.bootstrap()).arg(&dir).args(["--blobs", &fixture.server.url()]);
    command.args(["--backend", fixture.ctx.backend.name(), "--run"]).arg(fixture.run());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    wait_until("the source is asked", || fixture.server.stats().requests > before)?;
    Ok((dir, child))
}

fn wait_until(what: &str, done: impl Fn() -> bool) -> Outcome {
    wait_within(Duration::from_secs(10), what, done)
}

fn wait_within(limit: Duration, what: &str, done: impl Fn() -> bool) -> Outcome {
    let until = Instant::now() + limit;
    while !done() {
        ensure!(Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What the command says that cannot mount.
fn refusal(mount: Child) -> anyhow::Result<String> {
    let output = mount.wait_with_output()?;
    ensure!(!output.status.success(), "mounted: {}", String::from_utf8_lossy(&output.stdout));
    Ok(String::from_utf8(output.stderr)?)
}

fn ensure_nothing_left(fixture: &Fixture<'_>) -> Outcome {
    let left = left_behind(fixture)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    ensure!(crate::mounts::below(&fixture.ctx.dir)?.is_empty(), "mounted");
    Ok(())
}

fn a_mount_whose_client_is_interrupted(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let (_, mut mount) = begin_mount(&fixture, "mnt")?;

    kill(Pid::from_raw(i32::try_from(mount.id())?), Signal::SIGINT)?;
    mount.wait()?;

    wait_until("it is given up", || fixture.log().contains("what it asked for was given up"))?;
    ensure_nothing_left(&fixture)?;
    fixture.server.set_fault(Fault::None);
    let dir = fixture.mount("mnt").context("the place is free")?;
    ensure!(fs::read(dir.join("0"))? == content(0, FILE), "afterwards");
    fixture.umount(&dir)?;
    fixture.finish()
}

/// Asks for a mount of the fixture's image at `dir`, as a client that hangs up when this is dropped.
fn ask(fixture: &Fixture<'_>, dir: &Path) -> anyhow::Result<UnixStream> {
    let body = serde_json::json!({
        "image": {"bootstrap": fixture.bootstrap(), "blobs": fixture.server.url()},
        "dir": dir,
        "backend": fixture.ctx.backend.name(),
    });
    let body = body.to_string();
    let mut client = UnixStream::connect(fixture.run().join("rafsd.sock"))?;
    let len = body.len();
    let head = "POST /v1/mounts HTTP/1.1\r\nHost: rafsd\r\nContent-Type: application/json\r\n";
    client.write_all(format!("{head}Content-Length: {len}\r\n\r\n{body}").as_bytes())?;
    Ok(client)
}

fn a_client_that_hangs_up_at_any_moment(ctx: &Ctx) -> Outcome {
    const STEPS: usize = 24;
    let fixture = Fixture::files(ctx, 1)?;
    let dir = fixture.mount("mnt")?;
    fixture.umount(&dir)?;
    // How long it takes once everything is known.
    let clock = Instant::now();
    ensure!(ask(&fixture, &dir)?.read(&mut [0; 12])? == 12, "an answer");
    let whole = clock.elapsed();
    fixture.umount(&dir)?;

    let notice = Duration::from_secs(if ctx.in_guest { 10 } else { 2 });
    let (mut answered, mut missed, mut unheard) = (0, 0, 0);
    for step in 0..STEPS {
        let client = ask(&fixture, &dir)?;
        std::thread::sleep(whole * u32::try_from(step)? / u32::try_from(STEPS)?);
        client.set_nonblocking(true)?;
        let is_answered = (&client).read(&mut [0; 12]).is_ok();
        drop(client);
        let heard = || fixture.log().matches("a client has hung up").count();
        if is_answered {
            answered += 1;
        } else if wait_within(notice, "it is noticed", || heard() + answered + missed + unheard > step).is_err() {
            if fixture.list()?.is_empty() {
                // It was gone before anybody began.
                unheard += 1;
                continue;
            }
            // The answer was on its way: then it is as if it had come.
            missed += 1;
        } else {
            wait_until("the mount is gone", || fixture.list().is_ok_and(|list| list.is_empty()))?;
            continue;
        }
        fixture.umount(&dir)?;
        ensure!(missed <= STEPS / 8, "mounts are left, at step {step} of {STEPS} in {whole:?}:\n{}", fixture.log());
    }
    let undone = fixture.log().matches("what it asked for is undone").count();
    println!(
        "{STEPS} in up to {whole:?}: {answered} answered, {undone} undone, {missed} answered too late, {unheard} unheard"
    );
    fixture.finish()
}

fn a_stop_and_a_dead_source(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let (_, mount) = begin_mount(&fixture, "mnt")?;
    let clock = Instant::now();

    fixture.must(&["stop"])?;

    let took = clock.elapsed();
    let said = refusal(mount)?;
    ensure!(took < Duration::from_secs(if ctx.in_guest { 15 } else { 4 }), "stopped after {took:?}");
    ensure!(said.contains("the daemon is stopping"), "{said}");
    fixture.forget_daemon()?;
    ensure_nothing_left(&fixture)?;
    fixture.start(&[])?;
    fixture.finish()
}

fn an_upgrade_and_a_dead_source(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    fixture.restart(&["--restart", "keepers"])?;
    let (dir, mount) = begin_mount(&fixture, "other")?;
    let clock = Instant::now();

    fixture.must(&["upgrade"])?;

    let took = clock.elapsed();
    let said = refusal(mount)?;
    println!("{took:?}: {said}");
    ensure!(took < Duration::from_secs(if ctx.in_guest { 20 } else { 10 }), "upgraded after {took:?}");
    ensure!(said.contains("the daemon is stopping"), "{said}");
    fixture.forget_daemon()?;
    ensure_nothing_left(&fixture)?;
    fixture.server.set_fault(Fault::None);
    let mounted = fixture.mount("other").context("by the next daemon")?;
    ensure!(mounted == dir && fs::read(dir.join("0"))? == content(0, FILE), "by the next daemon");
    fixture.umount(&dir)?;
    fixture.must(&["stop"])?;
    wait_until("the keepers leave", || fixture.keepers().is_empty())
}
