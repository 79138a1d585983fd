//! Prefetch: what is fetched before anybody asks, in which order, and what ends it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::net::server::Fault;
use rafsd::tools::hotlist;
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify, read_byte, wait_for_exit};
use super::images::{SmallDisk, fill_up};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case(
        "what_was_prefetched_needs_no_source_and_no_daemon",
        Place::Both,
        what_was_prefetched_needs_no_source_and_no_daemon,
    ),
    case(
        "a_list_is_fetched_in_its_order_and_nothing_else_is",
        Place::Both,
        a_list_is_fetched_in_its_order_and_nothing_else_is,
    ),
    case("a_mount_fetches_what_its_image_hints_at", Place::Both, a_mount_fetches_what_its_image_hints_at),
    case("a_mount_fetches_the_hot_blob_of_its_image", Place::Both, a_mount_fetches_the_hot_blob_of_its_image),
    case("a_prefetch_waits_for_a_source_that_went_away", Place::Both, a_prefetch_waits_for_a_source_that_went_away),
    case(
        "a_trace_says_what_was_read_first_and_is_taken_as_it_is",
        Place::Both,
        a_trace_says_what_was_read_first_and_is_taken_as_it_is,
    ),
    case("a_mount_that_traces_sees_complete_blobs_too", Place::Host, a_mount_that_traces_sees_complete_blobs_too),
    case("a_full_disk_ends_a_prefetch_and_is_named", Place::Host, a_full_disk_ends_a_prefetch_and_is_named),
    case("unmounting_and_stopping_end_a_prefetch_at_once", Place::Both, unmounting_and_stopping_end_a_prefetch_at_once),
];

/// Runs `rafsd prefetch` on what is mounted at `dir`; whether it succeeded, and what it printed.
fn prefetch(fixture: &Fixture<'_>, dir: &Path, options: &[&str]) -> anyhow::Result<(bool, Value)> {
    let fixed = ["prefetch", dir.to_str().context("UTF-8")?, "--json"];
    let output = fixture.command(&[&fixed[..], options].concat())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let report = serde_json::from_slice(&output.stdout).with_context(|| said)?;
    Ok((output.status.success(), report))
}

fn what_was_prefetched_needs_no_source_and_no_daemon(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    let dir = fixture.mount("mnt")?;

    let (done, report) = prefetch(&fixture, &dir, &["--all", "--wait"])?;

    ensure!(done && report["state"] == "done" && report["bytes"] == report["bytes_present"], "{report}");
    fixture.ensure_fetched_once()?;
    fixture.server.set_fault(Fault::Status { code: 503, retry_after: None });
    for file in 0..3 {
        ensure!(fs::read(dir.join(file.to_string()))? == content(file, FILE), "file {file}, without a source");
    }
    if is_fanotify(ctx) {
        let info = fixture.info()?;
        ensure!((info.events_hit, info.events_missed) == (0, 0), "the mark is gone, so nothing is asked: {info:?}");
        let keepers = fixture.kill()?;
        for keeper in keepers {
            kill(Pid::from_raw(i32::try_from(keeper)?), Signal::SIGKILL)?;
            wait_for_exit(keeper)?;
        }
        drop_caches()?;
        for file in 0..3 {
            ensure!(fs::read(dir.join(file.to_string()))? == content(file, FILE), "file {file}, with nobody left");
        }
        nix::mount::umount(&dir)?;
        fs::remove_file(fixture.run().join("rafsd.sock"))?;
        fs::remove_file(fixture.run().join("keeper.sock"))?;
        fixture.start(&[])?;
    }
    fixture.finish()
}

/// Stored bytes of the fixture's files begin at these multiples: they do not compress.
fn is_of(file: u64, at: u64) -> bool {
    let len = FILE as u64;
    // A few bytes of overhead for each chunk that is stored as it is.
    at + 4096 >= file * len && at < (file + 1) * len
}

fn a_list_is_fetched_in_its_order_and_nothing_else_is(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 4)?;
    // One at a time, so that the server sees them in their order.
    fixture.restart(&["--prefetch-fetches", "1"])?;
    let dir = fixture.mount("mnt")?;
    fixture.server.reset_stats();
    let list = ctx.dir.join("list");
    fs::write(&list, "/3\n/not-there\n/1:0+1\n")?;

    let (done, report) = prefetch(&fixture, &dir, &["--wait", "--paths", list.to_str().context("UTF-8")?])?;

    ensure!(done && report["state"] == "done", "{report}");
    ensure!(report["remarks"].to_string().contains("/not-there is not in the image"), "{report}");
    let log = fixture.server.stats().log;
    let starts: Vec<u64> = log.iter().filter_map(|served| Some(served.range?.start())).collect();
    ensure!(starts.first().is_some_and(|&at| is_of(3, at)), "file 3 comes first: {starts:?}");
    ensure!(starts.last().is_some_and(|&at| is_of(1, at)), "then file 1: {starts:?}");
    ensure!(starts.iter().all(|&at| is_of(3, at) || is_of(1, at)), "and nothing else: {starts:?}");
    let sent = fixture.server.stats().bytes_sent;
    fixture.server.set_fault(Fault::Status { code: 404, retry_after: None });
    ensure!(fs::read(dir.join("3"))? == content(3, FILE), "what was prefetched");
    ensure!(read_byte(&dir.join("1"), 0) == Ok(content(1, FILE)[0]), "the part that was prefetched");
    ensure!(read_byte(&dir.join("0"), 0).is_err(), "what was not");
    ensure!(sent < 2 * FILE as u64, "{sent} bytes for one file and one chunk");
    fixture.finish()
}

fn a_mount_fetches_what_its_image_hints_at(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    let list = ctx.dir.join("list");
    fs::write(&list, "/2\n")?;
    fixture.rebuild(&["--prefetch-files", list.to_str().context("UTF-8")?])?;
    // A cache that has nothing: only the default mount fetches anything.
    for (options, wanted) in [(&["--prefetch=none"][..], false), (&[], true)] {
        fixture.stop()?;
        fixture.use_cache(&ctx.dir.join(if wanted { "cache-hints" } else { "cache-none" }));
        fixture.start(&[])?;
        let dir = fixture.mount_with("cold", options)?;
        let until = Instant::now() + Duration::from_secs(if wanted { 30 } else { 1 });
        let present = || anyhow::Ok(fixture.list()?[0]["devices"][0]["stats"]["units_present"].as_u64().unwrap_or(0));
        while Instant::now() < until && present()? < 3 {
            std::thread::sleep(Duration::from_millis(20));
        }
        ensure!((present()? >= 3) == wanted, "{options:?}: {} units", present()?);
        if wanted {
            fixture.server.set_fault(Fault::Status { code: 404, retry_after: None });
            ensure!(fs::read(dir.join("2"))? == content(2, FILE), "what is hinted at");
            ensure!(read_byte(&dir.join("0"), 0).is_err(), "what is not");
        }
        fixture.umount(&dir)?;
    }
    fixture.finish()
}

/// The list names a part of a file. The prefetch table of the image can only name the file.
fn a_mount_fetches_the_hot_blob_of_its_image(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 3)?;
    let (list, out, blobs) = (ctx.dir.join("list"), ctx.dir.join("hot"), ctx.dir.join("image/blobs"));
    fs::write(&list, "/2:0+1\n")?;
    let mut optimize = Command::new(&ctx.rafsd);
    optimize.arg("optimize").arg(fixture.bootstrap()).arg("--paths").arg(&list).arg("-o").arg(&out);
    let made = optimize.output()?;
    ensure!(made.status.success(), "optimize: {}", String::from_utf8_lossy(&made.stderr));
    for blob in fs::read_dir(out.join("blobs"))? {
        let blob = blob?;
        fs::copy(blob.path(), blobs.join(blob.file_name()))?;
    }
    fs::rename(out.join("bootstrap"), fixture.bootstrap())?;

    let dir = fixture.mount_with("mnt", &[])?;

    let is_complete = |device: &&Value| device["stats"]["complete"] == true;
    let count = |devices: &Value| devices.as_array().map_or(0, |all| all.iter().filter(is_complete).count());
    fixture.wait_for_list("the hot blob is complete", |images| count(&images[0]["devices"]) == 1)?;
    fixture.server.set_fault(Fault::Status { code: 404, retry_after: None });
    ensure!(read_byte(&dir.join("2"), 0) == Ok(content(2, FILE)[0]), "what was listed");
    let end = FILE as u64 - 1;
    ensure!(read_byte(&dir.join("2"), end).is_err(), "the rest of the file is not hot");
    ensure!(read_byte(&dir.join("0"), 0).is_err(), "nor is another one");
    fixture.finish()
}

fn a_prefetch_waits_for_a_source_that_went_away(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let dir = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::Status { code: 503, retry_after: None });

    let (done, report) = prefetch(&fixture, &dir, &["--wait", "--timeout", "8"])?;

    ensure!(!done && report["state"] == "retrying", "{report}");
    ensure!(report["trouble"].as_str().is_some_and(|text| text.contains("503")), "{report}");
    fixture.server.set_fault(Fault::None);
    fixture.wait_for_list("complete", |images| images[0]["devices"][0]["stats"]["complete"] == true)?;
    let (done, report) = prefetch(&fixture, &dir, &["--wait"])?;
    ensure!(done && report["trouble"].is_null(), "{report}");
    fixture.finish()
}

fn unmounting_and_stopping_end_a_prefetch_at_once(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let dir = fixture.mount("mnt")?;
    let moment = Duration::from_secs(if ctx.in_guest { 20 } else { 4 });
    fixture.server.set_fault(Fault::StallHead);
    let ends = |what: &str, end: &mut dyn FnMut() -> Outcome| {
        let clock = Instant::now();
        end()?;
        ensure!(clock.elapsed() < moment, "{what} took {:?}", clock.elapsed());
        anyhow::Ok(())
    };

    prefetch(&fixture, &dir, &["--all"])?;
    ends("umount", &mut || fixture.umount(&dir))?;
    ensure!(fixture.list()?.is_empty(), "unmounted");

    let dir = fixture.mount("mnt")?;
    prefetch(&fixture, &dir, &["--all"])?;
    let (_, stopped) = prefetch(&fixture, &dir, &["--cancel"])?;
    ensure!(stopped[0]["state"] == "cancelled" && stopped[1].is_null(), "{stopped}");
    prefetch(&fixture, &dir, &["--all"])?;
    ends("stop", &mut || fixture.stop())?;
    fixture.start(&[])?;
    fixture.finish()
}

/// Offset and length.
type Parts = Vec<(u64, u64)>;

/// The entries of a trace.
fn entries(trace: &Path) -> anyhow::Result<Vec<(String, Parts)>> {
    let hot = hotlist::parse(&fs::read(trace)?)?;
    hot.into_iter().map(|hot| Ok((String::from_utf8(hot.path)?, hot.ranges))).collect()
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("UTF-8")
}

fn a_trace_says_what_was_read_first_and_is_taken_as_it_is(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 4)?;
    let dir = fixture.mount("mnt")?;
    let (trace, hot) = (ctx.dir.join("start.trace"), ctx.dir.join("hot"));
    fixture.must(&["trace", "start", text(&dir)?, "-o", text(&trace)?])?;
    let again = fixture.command(&["trace", "start", text(&dir)?])?;
    ensure!(String::from_utf8_lossy(&again.stderr).contains("recorded already"), "{again:?}");

    ensure!(fs::read(dir.join("2"))? == content(2, FILE), "file 2");
    let mut some = [0; 8192];
    File::open(dir.join("0"))?.read_exact_at(&mut some, 2 << 20)?;
    ensure!(some[..] == content(0, FILE)[2 << 20..][..8192], "a part of file 0");
    fixture.must(&["trace", "stop", text(&dir)?])?;
    fs::read(dir.join("1"))?;

    let found = entries(&trace)?;
    let parts =
        |name: &'static str| found.iter().filter(move |(path, _)| path == name).flat_map(|(_, ranges)| ranges.clone());
    // The kernel's own cache asks for what it misses, and a piece is brought whole.
    let least = if is_fanotify(ctx) { FILE as u64 } else { 3 * 4096 };
    ensure!(found[0].0 == "/2" && parts("/2").map(|(_, len)| len).sum::<u64>() >= least, "{found:?}");
    ensure!(parts("/0").any(|(at, len)| at <= 2 << 20 && at + len >= (2 << 20) + 8192), "{found:?}");
    ensure!(parts("/0").all(|(at, _)| at >= 1 << 20) && parts("/1").next().is_none(), "{found:?}");

    let blobs = ctx.dir.join("image/blobs");
    let optimize =
        ["optimize", text(&fixture.bootstrap())?, "--paths", text(&trace)?, "-o", text(&hot)?].map(str::to_owned);
    let made = std::process::Command::new(&ctx.rafsd).args(&optimize).arg("--blobs").arg(&blobs).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    fixture.umount(&dir)?;
    fixture.stop()?;
    fixture.use_cache(&ctx.dir.join("another-cache"));
    fixture.start(&[])?;
    let dir = fixture.mount_with("again", &[&format!("--prefetch={}", text(&trace)?)])?;
    // Over FUSE files the kernel has read ahead behind the end of file 2, which stands in the trace as well.
    let most = if ctx.backend == Backend::FuseDevice { 5 } else { 4 };
    let present = |images: &[Value]| images[0]["devices"][0]["stats"]["units_present"].as_u64();
    fixture.wait_for_list("prefetched", |images| present(images).is_some_and(|count| (4..=most).contains(&count)))?;
    fixture.server.set_fault(Fault::Status { code: 404, retry_after: None });
    ensure!(fs::read(dir.join("2"))? == content(2, FILE), "file 2, prefetched");
    ensure!(read_byte(&dir.join("0"), 2 << 20) == Ok(content(0, FILE)[2 << 20]), "the part of file 0");
    fixture.umount(&dir)?;
    fixture.finish()
}

fn a_mount_that_traces_sees_complete_blobs_too(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 3)?;
    let dir = fixture.mount("mnt")?;
    let (done, report) = prefetch(&fixture, &dir, &["--all", "--wait"])?;
    ensure!(done, "{report}");
    let blind = fixture.command(&["trace", "start", text(&dir)?])?;
    ensure!(String::from_utf8_lossy(&blind.stderr).contains("mount with --trace"), "{blind:?}");
    fixture.must(&["trace", "stop", text(&dir)?])?;

    let trace = ctx.dir.join("start.trace");
    let traced = fixture.mount_with("traced", &["--trace", text(&trace)?])?;
    drop_caches()?;
    ensure!(fs::read(traced.join("1"))? == content(1, FILE), "file 1");
    ensure!(fs::read(traced.join("0"))? == content(0, FILE), "file 0");
    fixture.umount(&traced)?;

    let found = entries(&trace)?;
    ensure!(found.iter().map(|(path, _)| path.as_str()).collect::<Vec<_>>() == ["/1", "/0"], "{found:?}");
    // The other mount is as it was: the kernel reads it alone.
    drop_caches()?;
    let before = fixture.info()?;
    ensure!(fs::read(dir.join("2"))? == content(2, FILE), "file 2");
    let after = fixture.info()?;
    ensure!((before.events_hit, before.events_missed) == (after.events_hit, after.events_missed), "{after:?}");
    fixture.finish()
}

fn a_full_disk_ends_a_prefetch_and_is_named(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 4)?;
    fixture.stop()?;
    let disk = SmallDisk::new(ctx, 32)?;
    fixture.use_cache(&disk.0.join("cache"));
    fixture.start(&[])?;
    let dir = fixture.mount("mnt")?;
    let ballast = disk.0.join("ballast");
    fill_up(&ballast)?;

    let (done, report) = prefetch(&fixture, &dir, &["--all", "--wait"])?;

    ensure!(!done && report["state"] == "failed", "{report}");
    ensure!(report["failures"].to_string().contains("no room left"), "{report}");
    fs::remove_file(&ballast)?;
    let (done, report) = prefetch(&fixture, &dir, &["--all", "--wait"])?;
    ensure!(done, "after there is room again: {report}");
    fixture.stop()?;
    drop(disk);
    Ok(())
}
