//! Prefetch: what is fetched before anybody asks, in which order, and what ends it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::net::server::Fault;
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify, read_byte, wait_for_exit};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("what_was_prefetched_needs_no_source_and_no_daemon", Place::Both, what_was_prefetched_needs_no_source_and_no_daemon),
    case("a_list_is_fetched_in_its_order_and_nothing_else_is", Place::Both, a_list_is_fetched_in_its_order_and_nothing_else_is),
    case("a_mount_fetches_what_its_image_hints_at", Place::Both, a_mount_fetches_what_its_image_hints_at),
    case("a_prefetch_waits_for_a_source_that_went_away", Place::Both, a_prefetch_waits_for_a_source_that_went_away),
    case("unmounting_and_stopping_end_a_prefetch_at_once", Place::Both, unmounting_and_stopping_end_a_prefetch_at_once),
];

/// Runs `rafsd prefetch` on what is mounted at `dir`; whether it succeeded, and what it printed.
fn prefetch(fixture: &Fixture<'_>, dir: &std::path::Path, options: &[&str]) -> anyhow::Result<(bool, Value)> {
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
        let keeper = fixture.kill()?;
        kill(Pid::from_raw(i32::try_from(keeper)?), Signal::SIGKILL)?;
        wait_for_exit(keeper)?;
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
    fixture.restart(&["--prefetch-reads", "1"])?;
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
