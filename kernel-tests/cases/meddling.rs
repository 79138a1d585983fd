//! Somebody changes the files of a cache: what can be noticed is fetched again or refused, and missing
//! data never reads as zeros.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc::EIO;

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Here, run }
}

pub(crate) const CASES: &[Case] = &[
    case(
        "a_cache_file_meddled_with_while_stopped_is_fetched_again",
        a_cache_file_meddled_with_while_stopped_is_fetched_again,
    ),
    case(
        "a_cache_file_meddled_with_while_in_use_never_reads_as_zeros",
        a_cache_file_meddled_with_while_in_use_never_reads_as_zeros,
    ),
];

/// The data file of the only blob.
fn data_file(fixture: &Fixture<'_>) -> anyhow::Result<PathBuf> {
    let dirs = fs::read_dir(fixture.cache().join("v1"))?.collect::<Result<Vec<_>, _>>()?;
    ensure!(dirs.len() == 1, "one blob: {dirs:?}");
    Ok(dirs[0].path().join("data"))
}

/// A way to spoil a file of `len` bytes of which the first [`FILE`] are present.
type Meddle = fn(&File, u64) -> nix::Result<()>;

fn cut_off(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, i64::try_from(len / 4).expect("small"))
}

fn cut_off_and_stretched(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, 4096)?;
    nix::unistd::ftruncate(file, i64::try_from(len).expect("small"))
}

/// At places that are at the edge of no block.
fn cut_off_anywhere(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, i64::try_from(len / 4 + 1).expect("small"))
}

fn cut_off_anywhere_and_stretched(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, 8191)?;
    nix::unistd::ftruncate(file, i64::try_from(len).expect("small"))
}

fn a_byte_longer(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, i64::try_from(len + 1).expect("small"))
}

fn longer(file: &File, len: u64) -> nix::Result<()> {
    nix::unistd::ftruncate(file, i64::try_from(len + 4096).expect("small"))
}

fn punched(file: &File, _: u64) -> nix::Result<()> {
    fallocate(file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 4096, 1 << 20)
}

fn scribbled_in_a_hole(file: &File, len: u64) -> nix::Result<()> {
    nix::sys::uio::pwrite(file, &[0xaa; 4096], i64::try_from(len - 8192).expect("small")).map(drop)
}

fn changed_in_place(file: &File, _: u64) -> nix::Result<()> {
    nix::sys::uio::pwrite(file, &[0xaa; 7], 4096 + 77).map(drop)
}

fn a_cache_file_meddled_with_while_stopped_is_fetched_again(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let meddles: &[(&str, Meddle)] = &[
        ("cut off", cut_off),
        ("cut off anywhere", cut_off_anywhere),
        ("cut off and stretched again", cut_off_and_stretched),
        ("cut off anywhere and stretched again", cut_off_anywhere_and_stretched),
        ("longer", longer),
        ("a byte longer", a_byte_longer),
        ("punched", punched),
        ("changed in place", changed_in_place),
        ("scribbled in a hole", scribbled_in_a_hole),
    ];
    let read_and_stop = |fixture: &mut Fixture<'_>, what: &str, files: &[usize]| -> Outcome {
        let mount = fixture.mount("mnt").with_context(|| format!("mount: {what}"))?;
        for &number in files {
            let got = fs::read(mount.join(number.to_string())).with_context(|| format!("file {number}: {what}"))?;
            ensure!(got == content(number, FILE), "file {number} has wrong bytes: {what}");
        }
        fixture.umount(&mount)?;
        fixture.stop()?;
        drop_caches()
    };
    read_and_stop(&mut fixture, "sound", &[0])?;
    for (what, meddle) in meddles {
        let data = data_file(&fixture)?;
        let file = File::options().write(true).open(&data)?;
        meddle(&file, file.metadata()?.len()).with_context(|| format!("make it {what}"))?;
        file.sync_all()?;
        drop(file);
        fixture.start(&[])?;
        read_and_stop(&mut fixture, what, &[0, 1])?;
        fs::remove_dir_all(fixture.cache().join("v1"))?;
        fixture.start(&[])?;
        read_and_stop(&mut fixture, "anew", &[0])?;
    }
    fs::remove_file(data_file(&fixture)?)?;
    fixture.start(&[])?;
    read_and_stop(&mut fixture, "removed", &[0, 1])?;
    let data = data_file(&fixture)?;
    fs::copy(&data, data.with_extension("copy"))?;
    fs::rename(data.with_extension("copy"), &data)?;
    fixture.start(&[])?;
    fixture.server.reset_stats();
    read_and_stop(&mut fixture, "copied", &[0, 1])?;
    ensure!(!fixture.fetched().is_empty(), "a copy of unknown origin was trusted");
    fixture.start(&[])?;
    fixture.finish()
}

fn meddled_with_while_incomplete(fixture: &mut Fixture<'_>, what: &str, meddle: Meddle) -> Outcome {
    let (mount, file) = mount_with_old_descriptor(fixture)?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before it is {what}");
    let denied = meddle(&file, file.metadata()?.len());
    // While a mark is on it, nobody may change its length.
    let expected = if is_fanotify(fixture.ctx) { Err(nix::errno::Errno::EIO) } else { Ok(()) };
    ensure!(denied == expected, "{what}: {denied:?}");
    ensure_data_or_error(&mount, what)?;
    ensure_second_mount(fixture, what, denied.is_ok())?;
    fixture.umount(&mount)?;
    start_anew(fixture)
}

fn a_cache_file_meddled_with_while_in_use_never_reads_as_zeros(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    // At the edge of a page or not: the kernel rounds what it tells, and what is cut off at the edge of none looks
    // like a read.
    let meddles: [(&str, bool, Meddle); 4] = [
        ("cut off", true, cut_off),
        ("cut off anywhere", false, cut_off_anywhere),
        ("longer", true, longer),
        ("a byte longer", false, a_byte_longer),
    ];
    for (what, is_told, meddle) in meddles {
        if is_told || !is_fanotify(ctx) {
            meddled_with_while_incomplete(&mut fixture, what, meddle)?;
        }
        // Complete, it has no mark.
        let mount = fixture.mount_with("mnt", &["--prefetch"])?;
        fixture.wait_for_list("complete", |images| images[0]["devices"][0]["stats"]["complete"] == true)?;
        let file = File::options().write(true).open(data_file(&fixture)?)?;
        meddle(&file, file.metadata()?.len()).with_context(|| format!("make a complete file {what}"))?;
        ensure_data_or_error(&mount, what)?;
        ensure_second_mount(&fixture, what, true)?;
        fixture.umount(&mount)?;
        start_anew(&mut fixture)?;
    }
    let (mount, file) = mount_with_old_descriptor(&fixture)?;
    scribbled_in_a_hole(&file, file.metadata()?.len())?;
    ensure_data_or_error(&mount, "scribbled in a hole")?;
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "what was scribbled was overwritten");
    fixture.umount(&mount)?;
    start_anew(&mut fixture)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "before it is removed");
    fs::remove_file(data_file(&fixture)?)?;
    drop_caches()?;
    for number in [0, 1] {
        ensure!(fs::read(mount.join(number.to_string()))? == content(number, FILE), "file {number} of a removed file");
    }
    ensure_second_mount(&fixture, "removed", true)?;
    fixture.umount(&mount)?;
    start_anew(&mut fixture)?;
    let mount = fixture.mount("mnt")?;
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "after everything");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// A mount, and a descriptor that was opened before the file was marked: what is written through it
/// raises no event.
fn mount_with_old_descriptor(fixture: &Fixture<'_>) -> anyhow::Result<(PathBuf, File)> {
    let empty = fixture.mount("mnt")?;
    fixture.umount(&empty)?;
    let file = File::options().write(true).open(data_file(fixture)?)?;
    Ok((fixture.mount("mnt")?, file))
}

/// Reads both files, cold, twice: what was missing at first may have come in between.
fn ensure_data_or_error(mount: &Path, what: &str) -> Outcome {
    for number in [0, 1, 0, 1] {
        drop_caches()?;
        match fs::read(mount.join(number.to_string())) {
            Ok(bytes) => ensure!(bytes == content(number, FILE), "file {number} has wrong bytes: {what}"),
            Err(error) => ensure!(error.raw_os_error() == Some(EIO), "file {number}: {what}: {error}"),
        }
    }
    Ok(())
}

/// What is known about the file that is in use must not be said of what has its name now.
fn ensure_second_mount(fixture: &Fixture<'_>, what: &str, is_refused: bool) -> Outcome {
    match (fixture.mount("second"), is_refused) {
        (Err(error), true) => {
            let said = error.to_string();
            ensure!(said.contains("changed from outside") && said.contains("/data"), "{what}: {said}");
        }
        (Ok(_), true) => bail!("a second mount was not refused: {what}"),
        (Ok(mount), false) => fixture.umount(&mount)?,
        (Err(error), false) => return Err(error.context(format!("second mount: {what}"))),
    }
    Ok(())
}

/// Restarts with an empty cache.
fn start_anew(fixture: &mut Fixture<'_>) -> Outcome {
    fixture.stop()?;
    fs::remove_dir_all(fixture.cache().join("v1"))?;
    fixture.start(&[])
}
