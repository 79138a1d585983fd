//! Mounts that a daemon could not take over: what is still read of them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use nix::libc::EIO;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
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
