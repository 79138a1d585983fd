//! Names and attributes in detail, and bytes at random places.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use nix::libc;

use super::fixture::{Fixture, drop_caches};
use crate::host::Need;
use crate::support::listing;
use crate::support::tree;
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_wide_directory_lists_every_name_once", Place::Both, a_wide_directory_lists_every_name_once),
    case(
        "fuse_shows_what_the_kernels_own_driver_shows",
        Place::Only(Backend::FuseTree),
        fuse_shows_what_the_kernels_own_driver_shows,
    ),
    case("a_file_system_is_full_and_says_how_large_it_is", Place::Here, a_file_system_is_full_and_says_how_large_it_is),
];

/// All that `stat` and a listing tell of one path.
type Facts = BTreeMap<PathBuf, String>;

/// Facts of everything below `root`, with numbers of inodes, blocks and sizes of directories, which other file
/// systems than those of the same image have no reason to share.
fn facts(root: &Path) -> anyhow::Result<Facts> {
    let (mut all, mut todo) = (Facts::new(), vec![PathBuf::new()]);
    while let Some(below) = todo.pop() {
        let path = root.join(&below);
        let meta = fs::symlink_metadata(&path)?;
        let mut told = describe(&meta);
        if meta.is_symlink() {
            told += &format!(" -> {}", fs::read_link(&path)?.display());
        }
        if meta.is_dir() {
            let mut entries = fs::read_dir(&path)?
                .map(|entry| {
                    let entry = entry?;
                    todo.push(below.join(entry.file_name()));
                    // The number and the type that the listing gives, which need not be asked for then.
                    anyhow::Ok((entry.file_name(), entry.ino(), format!("{:?}", entry.file_type()?)))
                })
                .collect::<anyhow::Result<Vec<(OsString, u64, String)>>>()?;
            entries.sort();
            told += &format!(" {entries:?}");
        }
        all.insert(below, told);
    }
    Ok(all)
}

fn describe(meta: &Metadata) -> String {
    format!(
        "ino {} mode {:o} links {} owner {}:{} rdev {} size {} blocks {} of {} times {}.{} {}.{} {}.{}",
        meta.ino(),
        meta.mode(),
        meta.nlink(),
        meta.uid(),
        meta.gid(),
        meta.rdev(),
        meta.size(),
        meta.blocks(),
        meta.blksize(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
        meta.atime(),
        meta.atime_nsec()
    )
}

/// EROFS is the oracle: both mounts are of one image.
fn fuse_shows_what_the_kernels_own_driver_shows(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::new(ctx, |dir| {
        tree::make(dir, 11)?;
        fs::create_dir(dir.join("many-names"))?;
        (0..3000).try_for_each(|number| fs::write(dir.join(format!("many-names/{number:05}")), b""))?;
        for number in 0..5 {
            fs::hard_link(dir.join("many-names/00007"), dir.join(format!("many-linked-{number}")))?;
        }
        Ok(())
    })?;
    let mount = fixture.mount("mnt")?;
    if crate::host::cannot_fanotify().is_some() {
        println!("no other path into the kernel to compare with");
        return fixture.finish();
    }
    let native = fixture.mount_by("native", "fanotify")?;

    let (want, got) = (facts(&native)?, facts(&mount)?);

    ensure!(want.len() > 3500, "only {} paths", want.len());
    ensure!(want.keys().eq(got.keys()), "other paths");
    let differing = want.iter().find(|(path, facts)| got[*path] != **facts);
    if let Some((path, facts)) = differing {
        anyhow::bail!("{}:\n  EROFS: {facts}\n  FUSE:  {}", path.display(), got[path]);
    }
    let differences = listing::diff(&listing::of(&native)?, &listing::of(&mount)?);
    ensure!(differences.is_empty(), "- EROFS, + FUSE:\n{differences}");
    // Once more, from what the kernel remembers, and once when it has forgotten.
    ensure!(facts(&mount)? == got, "asked again");
    drop_caches()?;
    ensure!(facts(&mount)? == got, "asked again, forgotten");
    ensure_missing(&mount)?;
    fixture.umount(&native)?;
    fixture.finish()
}

/// A name that is not there stays so, also when the kernel remembers that it is not.
fn ensure_missing(mount: &Path) -> Outcome {
    for _ in 0..2 {
        for name in ["none", "many-names/none", "many-names/00007/none"] {
            let errno = fs::symlink_metadata(mount.join(name)).err().and_then(|error| error.raw_os_error());
            let expected = if name == "many-names/00007/none" { libc::ENOTDIR } else { libc::ENOENT };
            ensure!(errno == Some(expected), "{name}: {errno:?}");
        }
        let long = "x".repeat(256);
        let errno = fs::symlink_metadata(mount.join(long)).err().and_then(|error| error.raw_os_error());
        ensure!(errno == Some(libc::ENAMETOOLONG), "{errno:?}");
        let written = File::create(mount.join("new")).err().and_then(|error| error.raw_os_error());
        ensure!(written == Some(libc::EROFS), "{written:?}");
    }
    Ok(())
}

fn a_wide_directory_lists_every_name_once(ctx: &Ctx) -> Outcome {
    const NAMES: usize = 20_000;
    let name = |number: usize| format!("{number:06}-{}", "n".repeat(number % 40));
    let fixture = Fixture::new(ctx, |dir| (0..NAMES).try_for_each(|number| fs::write(dir.join(name(number)), b"")))?;
    let mount = fixture.mount("mnt")?;

    let list = || fs::read_dir(&mount)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>();
    for turn in ["cold", "remembered"] {
        let mut got = list()?;
        got.sort();
        ensure!(got.len() == NAMES, "{} names, {turn}", got.len());
        ensure!(got.iter().enumerate().all(|(at, found)| found.as_bytes() == name(at).as_bytes()), "others, {turn}");
    }
    // With attributes, as `ls -l` asks.
    for entry in fs::read_dir(&mount)? {
        ensure!(entry?.metadata()?.is_file(), "a file");
    }
    fixture.finish()
}

fn a_file_system_is_full_and_says_how_large_it_is(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    let stat = nix::sys::statvfs::statvfs(&mount)?;
    let len = stat.blocks() as u64 * stat.fragment_size() as u64;
    ensure!(len >= 2 * super::fixture::FILE as u64 && len < 16 << 20, "{len} bytes");
    ensure!(stat.blocks_available() == 0 && stat.blocks_free() == 0, "room: {stat:?}");
    ensure!(stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY), "writable: {stat:?}");
    ensure!(stat.name_max() == 255, "{stat:?}");
    fixture.finish()
}
