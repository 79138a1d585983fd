//! Mounts that a daemon could not take over: what is still read of them, and what stays in the cache for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use nix::libc::EIO;
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use super::space::visit;
use crate::host::Need;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case(
        "what_is_present_is_read_of_a_mount_that_is_not_served",
        Place::Only(Backend::Fanotify),
        what_is_present_is_read_of_a_mount_that_is_not_served,
    ),
    case(
        "what_is_present_is_read_of_a_mount_without_a_record",
        Place::Only(Backend::Fanotify),
        what_is_present_is_read_of_a_mount_without_a_record,
    ),
    case(
        "a_mount_that_is_not_served_sees_no_zeros_when_others_go",
        Place::Only(Backend::Fanotify),
        a_mount_that_is_not_served_sees_no_zeros_when_others_go,
    ),
    case("a_mount_that_is_not_served_keeps_its_blobs_and_no_others", Place::Here, only_its_blobs_stay),
    case("nothing_goes_while_nobody_knows_what_a_mount_reads", Place::Here, nothing_goes_while_nobody_knows),
];

/// Nothing comes that was not asked for.
const ALONE: &[&str] = &["--readahead-first", "0", "--readahead-most", "0"];

/// How a mount becomes one that nobody can serve.
type Spoil = fn(&Fixture<'_>) -> anyhow::Result<()>;

fn lose_the_bootstrap(fixture: &Fixture<'_>) -> anyhow::Result<()> {
    Ok(fs::remove_dir_all(fixture.cache().join("bootstraps"))?)
}

fn damage_the_record(fixture: &Fixture<'_>) -> anyhow::Result<()> {
    for entry in fs::read_dir(fixture.run().join("served"))? {
        fs::write(entry?.path(), "{")?;
    }
    Ok(())
}

/// A mount with file 0 in the cache, durably, and nothing else, whose daemon has died and has a successor that cannot
/// serve it.
fn leave(fixture: &mut Fixture<'_>, spoil: Spoil) -> anyhow::Result<PathBuf> {
    fixture.restart(ALONE)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before");
    std::thread::sleep(Duration::from_secs(3));
    fixture.kill()?;
    spoil(fixture)?;
    fixture.start(ALONE)?;
    let unserved = fixture.info()?.unserved;
    ensure!(unserved.len() == 1 && unserved[0].dir.as_ref() == Some(&mount), "{unserved:?}");
    Ok(mount)
}

fn what_is_present_is_read_of_a_mount_that_is_not_served(ctx: &Ctx) -> Outcome {
    what_is_present_is_read(ctx, lose_the_bootstrap)
}

fn what_is_present_is_read_of_a_mount_without_a_record(ctx: &Ctx) -> Outcome {
    what_is_present_is_read(ctx, damage_the_record)
}

fn what_is_present_is_read(ctx: &Ctx, spoil: Spoil) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    let mount = leave(&mut fixture, spoil)?;
    let fetched = fixture.fetched().len();
    drop_caches()?;

    let read = fs::read(mount.join("0"));
    ensure!(read.is_ok_and(|bytes| bytes == content(0, FILE)), "what is present: {}", fixture.log());
    ensure!(fixture.fetched().len() == fetched, "nothing was fetched for it");
    ensure!(read_byte(&mount.join("2"), 2 << 20) == Err(Some(EIO)), "what is missing is denied");
    // A reader has its answer before the line about it is written.
    let told = |fixture: &Fixture<'_>| fixture.log().contains("is not served; unmount it and mount it again");
    fixture.wait_for_list("told", |_| told(&fixture))?;

    // Another mount brings more of the same blob.
    let again = fixture.mount("again")?;
    ensure!(fs::read(again.join("2"))? == content(2, FILE), "another mount");
    drop_caches()?;
    ensure!(fs::read(mount.join("2"))? == content(2, FILE), "what another mount brought");
    fixture.ensure_fetched_once()?;

    fixture.umount(&mount)?;
    fixture.wait_for_list("buried", |_| fixture.info().is_ok_and(|info| info.unserved.is_empty()))?;
    ensure!(fs::read(again.join("1"))? == content(1, FILE), "the other mount goes on");
    fixture.umount(&again)?;
    fixture.finish()
}

/// Has the record of the mount at `dir` name a device twice, so that it does not fit its image.
fn confuse_the_record(fixture: &Fixture<'_>, dir: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(fixture.run().join("served"))? {
        let path = entry?.path();
        let mut record: Value = serde_json::from_slice(&fs::read(&path)?)?;
        if record["record"]["dir"].as_str() == dir.to_str() {
            let devices = record["record"]["devices"].as_array_mut().context("devices")?;
            devices.push(devices[0].clone());
            return Ok(fs::write(&path, record.to_string())?);
        }
    }
    bail!("{} has no record", dir.display())
}

fn a_mount_that_is_not_served_sees_no_zeros_when_others_go(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 3)?;
    fixture.restart(ALONE)?;
    let (mount, other) = (fixture.mount("mnt")?, fixture.mount("other")?);
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before");
    std::thread::sleep(Duration::from_secs(3));
    fixture.kill()?;
    confuse_the_record(&fixture, &mount)?;
    fixture.start(ALONE)?;
    let unserved = fixture.info()?.unserved;
    ensure!(unserved.len() == 1 && unserved[0].dir.as_ref() == Some(&mount), "{unserved:?}");
    ensure!(fs::read(other.join("1"))? == content(1, FILE), "the other mount is served");

    fixture.umount(&other)?;
    fixture.wait_for_list("unmounted", <[_]>::is_empty)?;
    drop_caches()?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "what was present before");
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "what the other mount brought");
    let missing = fs::read(mount.join("2"));
    ensure!(missing.as_ref().is_ok_and(|bytes| *bytes == content(2, FILE)) || missing.is_err(), "zeros");

    fixture.umount(&mount)?;
    fixture.wait_for_list("buried", |_| fixture.info().is_ok_and(|info| info.unserved.is_empty()))?;
    collect(&fixture, 0)?;
    fixture.finish()
}

/// Removes what nobody uses until so many blobs are left.
fn collect(fixture: &Fixture<'_>, left: usize) -> anyhow::Result<()> {
    fixture.must(&["cache", "gc"])?;
    // The last job of a device may hold its file for a moment longer.
    fixture.wait_for_list("collected", |_| {
        fixture.must(&["cache", "gc"]).is_ok() && blobs(fixture).is_ok_and(|blobs| blobs.len() == left)
    })
}

fn blobs(fixture: &Fixture<'_>) -> anyhow::Result<Vec<Value>> {
    let report: Value = serde_json::from_str(&fixture.must(&["cache", "list", "--json"])?)?;
    Ok(report["blobs"].as_array().context("blobs")?.clone())
}

fn only_its_blobs_stay(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    visit(&fixture, 0)?;
    let mount = leave(&mut fixture, lose_the_bootstrap)?;
    visit(&fixture, 1)?;

    collect(&fixture, 1)?;
    for _ in 0..3 {
        fixture.must(&["cache", "gc"])?;
    }
    let left = blobs(&fixture)?;
    ensure!(left.len() == 1 && left[0]["in_use"] == true, "{left:?}");
    if ctx.backend == Backend::Fanotify {
        drop_caches()?;
        ensure!(fs::read(mount.join("0"))? == content(0, FILE), "after the collection");
    }

    fixture.umount(&mount)?;
    fixture.wait_for_list("buried", |_| fixture.info().is_ok_and(|info| info.unserved.is_empty()))?;
    collect(&fixture, 0)?;
    fixture.finish()
}

fn nothing_goes_while_nobody_knows(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    visit(&fixture, 0)?;
    let mount = leave(&mut fixture, damage_the_record)?;
    visit(&fixture, 1)?;

    ensure!(!fixture.command(&["cache", "gc"])?.status.success(), "it may be anything");
    let left = blobs(&fixture)?;
    ensure!(left.len() == 3 && left.iter().all(|blob| blob["in_use"] == true), "{left:?}");

    fixture.umount(&mount)?;
    fixture.wait_for_list("buried", |_| fixture.info().is_ok_and(|info| info.unserved.is_empty()))?;
    collect(&fixture, 0)?;
    fixture.finish()
}
