//! What was fetched once stays fetched: across mounts, restarts and the end of the daemon.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rafsd::net::server::{Fault, ServerOptions};

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify, read_byte, wait_for_exit};
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "a_second_mount_shares_the_cache",
        needs: NEEDS,
        place: Place::Both,
        run: a_second_mount_shares_the_cache,
    },
    Case {
        name: "a_restarted_daemon_fetches_nothing_again",
        needs: NEEDS,
        place: Place::Both,
        run: a_restarted_daemon_fetches_nothing_again,
    },
    Case {
        name: "a_mount_fetches_nothing_that_was_pulled",
        needs: NEEDS,
        place: Place::Both,
        run: a_mount_fetches_nothing_that_was_pulled,
    },
    Case {
        name: "a_shared_blob_counts_for_the_image_it_is_read_through",
        needs: NEEDS,
        place: Place::Here,
        run: a_shared_blob_counts_for_the_image_it_is_read_through,
    },
    Case {
        name: "a_complete_image_needs_no_daemon",
        needs: NEEDS,
        place: Place::Host,
        run: a_complete_image_needs_no_daemon,
    },
];

fn a_second_mount_shares_the_cache(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let first = fixture.mount("first")?;
    let second = fixture.mount("second")?;
    ensure!(fs::read(first.join("0"))? == content(0, FILE), "first mount");
    ensure!(fs::read(second.join("0"))? == content(0, FILE), "second mount");
    fixture.umount(&first)?;
    ensure!(fs::read(second.join("1"))? == content(1, FILE), "second mount after the first is gone");

    fixture.ensure_fetched_once()?;
    fixture.finish()
}

fn a_restarted_daemon_fetches_nothing_again(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    for number in 0..2 {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}, cold");
    }
    fixture.restart(&[])?;
    fixture.server.reset_stats();
    drop_caches()?;

    let mount = fixture.mount("mnt")?;
    for number in 0..2 {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}, warm");
    }
    let fetched = fixture.fetched();
    // The kernel's own cache holds no tables, so cachefiles may ask for those once more.
    let data = fetched.iter().filter(|(range, _)| range.len() >= FILE as u64 / 8).count();
    ensure!(data == 0 && (fetched.is_empty() || !is_fanotify(ctx)), "fetched again: {fetched:?}");
    fixture.finish()
}

/// A pull brings data into the cache in files, whatever the backend; the kernel's own cache must not fetch it again.
fn a_mount_fetches_nothing_that_was_pulled(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let (bootstrap, url) = (fixture.bootstrap(), fixture.server.url());
    for restarts in [false, true] {
        fixture.stop()?;
        fixture.use_cache(&ctx.dir.join(format!("cache-{restarts}")));
        fixture.start(&[])?;
        fixture.must(&["pull", bootstrap.to_str().context("UTF-8")?, "--blobs", &url])?;
        if restarts {
            fixture.restart(&[])?;
        }
        fixture.server.reset_stats();

        let mount = fixture.mount("mnt")?;
        for number in 0..2 {
            ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}");
        }

        let fetched = fixture.fetched();
        ensure!(fetched.is_empty(), "restarted: {restarts}, fetched again: {fetched:?}\n{}", fixture.log());
        fixture.umount(&mount)?;
    }
    fixture.finish()
}

/// Each of two images with one blob may have one read under way, and that of the first hangs.
fn a_shared_blob_counts_for_the_image_it_is_read_through(ctx: &Ctx) -> Outcome {
    let fill = |dir: &Path| (0..3).try_for_each(|i| fs::write(dir.join(i.to_string()), content(i, FILE)));
    let limits = ["--image-fetches", "1", "--deadline", "6s", "--readahead-first", "0"];
    let fixture = Fixture::with(ctx, &[], ServerOptions::default(), &limits, fill)?;
    let other = ctx.dir.join("other-bootstrap");
    fs::rename(fixture.bootstrap(), &other)?;
    fs::copy(&other, fixture.bootstrap())?;
    // Another mode, and the same data.
    fs::set_permissions(fixture.source().join("0"), fs::Permissions::from_mode(0o640))?;
    fixture.rebuild(&[])?;
    ensure!(fs::read(&other)? != fs::read(fixture.bootstrap())?, "they are two images");
    ensure!(fs::read_dir(ctx.dir.join("image/blobs"))?.count() == 1, "with one blob");
    let first = fixture.mount_with("first", &["--prefetch=none"])?;
    let second = fixture.mount_image(&other, "second", &["--prefetch=none"])?;

    let before = fixture.server.stats().requests;
    fixture.server.set_fault(Fault::StallHead);
    let hanging = thread::spawn({
        let file = first.join("0");
        move || read_byte(&file, 0)
    });
    let until = Instant::now() + Duration::from_secs(5);
    while fixture.server.stats().requests == before {
        ensure!(Instant::now() < until, "nobody asks");
        thread::sleep(Duration::from_millis(5));
    }
    fixture.server.set_fault(Fault::None);
    let began = Instant::now();

    ensure!(read_byte(&second.join("1"), 0) == Ok(content(1, FILE)[0]), "the second image");
    ensure!(began.elapsed() < Duration::from_secs(3), "it waited {:?} for the first one", began.elapsed());
    if matches!(ctx.backend, Backend::FuseDevice | Backend::FuseTree) {
        // So that it may still wait when its turn comes.
        thread::sleep(Duration::from_secs(2));
        ensure!(read_byte(&first.join("2"), 0) == Ok(content(2, FILE)[0]), "the first image");
        ensure!(began.elapsed() > Duration::from_secs(3), "the first one read by the limit of the second");
    }
    // A kernel whose read-ahead failed may have asked once more by then.
    let ended = hanging.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
    ensure!(ended == Err(Some(libc::EIO)) || ended == Ok(content(0, FILE)[0]), "what hung: {ended:?}");
    fixture.umount(&second)?;
    fixture.umount(&first)?;
    fixture.finish()
}

fn a_complete_image_needs_no_daemon(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    let mount = fixture.mount_with("mnt", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| {
        let devices = images.iter().flat_map(|image| image["devices"].as_array().into_iter().flatten());
        let mut stats = devices.map(|device| &device["stats"]["complete"]).peekable();
        stats.peek().is_some() && stats.all(|complete| complete == true)
    })?;
    fixture.server.set_fault(Fault::StallHead);
    let keepers = fixture.kill()?;
    drop_caches()?;

    for number in 0..3 {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}");
    }
    let recovered = fixture.must(&["recover"])?;
    ensure!(recovered.contains("all mounts of the dead daemon have ended"), "{recovered}");
    keepers.into_iter().try_for_each(wait_for_exit)
}
