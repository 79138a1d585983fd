//! What was fetched once stays fetched: across mounts, restarts and the end of the daemon.

use std::fs;

use anyhow::ensure;

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify, wait_for_exit};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

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

fn a_complete_image_needs_no_daemon(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    let mount = fixture.mount_with("mnt", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| {
        let devices = images.iter().flat_map(|image| image["devices"].as_array().into_iter().flatten());
        let mut stats = devices.map(|device| &device["stats"]["complete"]).peekable();
        stats.peek().is_some() && stats.all(|complete| complete == true)
    })?;
    fixture.server.set_fault(rafsd::net::server::Fault::StallHead);
    let keepers = fixture.kill()?;
    drop_caches()?;

    for number in 0..3 {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number}");
    }
    let recovered = fixture.must(&["recover"])?;
    ensure!(recovered.contains("all mounts of the dead daemon have ended"), "{recovered}");
    keepers.into_iter().try_for_each(wait_for_exit)
}
