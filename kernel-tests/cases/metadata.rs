//! Names and attributes in detail, and bytes at random places.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt as _, FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc;
use rafsd::sys::mmap::ReadMap;

use super::fixture::{Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::listing;
use crate::support::tree::{self, Random};
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_wide_directory_lists_every_name_once", Place::Both, a_wide_directory_lists_every_name_once),
    case("random_reads_and_maps_show_the_bytes", Place::Here, random_reads_and_maps_show_the_bytes),
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

/// A file of data and holes with an odd end.
fn sparse(len: usize) -> Vec<u8> {
    let mut bytes = content(77, len);
    for (number, piece) in bytes.chunks_mut(150_000).enumerate() {
        if number % 3 == 1 {
            piece.fill(0);
        }
    }
    bytes
}

/// `RAFSD_READS` makes it longer.
fn random_reads_and_maps_show_the_bytes(ctx: &Ctx) -> Outcome {
    let reads: usize = std::env::var("RAFSD_READS").ok().and_then(|text| text.parse().ok()).unwrap_or(20_000);
    let contents = [content(1, 5 << 20), sparse((3 << 20) + 4321), content(2, 4097), content(3, 100), Vec::new()];
    let fixture = Fixture::with(ctx, &["--chunk-size", "65536"], Default::default(), &[], |dir| {
        contents.iter().enumerate().try_for_each(|(at, bytes)| fs::write(dir.join(at.to_string()), bytes))
    })?;
    let mount = fixture.mount("mnt")?;
    let files = (0..contents.len()).map(|at| File::open(mount.join(at.to_string()))).collect::<Result<Vec<_>, _>>()?;

    std::thread::scope(|scope| {
        let (files, contents) = (&files, &contents);
        let readers: Vec<_> = (0..4)
            .map(|seed| scope.spawn(move || read_at_random(files, contents, Random::new(seed), reads / 4)))
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })?;

    drop(files);
    fixture.finish()
}

fn read_at_random(files: &[File], contents: &[Vec<u8>], mut random: Random, reads: usize) -> Outcome {
    let maps = files.iter().map(ReadMap::new).collect::<Result<Vec<_>, _>>()?;
    let mut buffer = vec![0; 300_000];
    for turn in 0..reads {
        let which = usize::try_from(random.below(files.len() as u64))?;
        let want = &contents[which];
        let at = usize::try_from(random.below(want.len() as u64 + 5000))?;
        let most = [100, 5000, buffer.len()][usize::try_from(random.below(3))?];
        let len = usize::try_from(random.below(most as u64))?;
        let expected = want.get(at..).unwrap_or_default();
        let expected = &expected[..expected.len().min(len)];
        if turn % 100 == 0 {
            // What the kernel remembers of it is forgotten now and then.
            posix_fadvise(&files[which], 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        }
        if turn % 3 == 0 {
            let mapped = maps[which].get(at..at + expected.len()).unwrap_or_default();
            ensure!(mapped == expected, "{len} bytes at {at} of file {which}, mapped");
        } else {
            buffer[..len].fill(0xee);
            let got = files[which].read_at(&mut buffer[..len], at as u64).context("read")?;
            ensure!(buffer[..got] == *expected, "{len} bytes at {at} of file {which}: {got} of {}", expected.len());
        }
    }
    Ok(())
}
