//! What programs may rely on in a file system that nobody can write to, whichever way it is mounted.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::path::Path;

use anyhow::{Context as _, ensure};
use nix::unistd::{Whence, lseek};
use rafsd::sys::handle::Handle;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;

use super::fixture::{Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::tree::Random;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("whatever_would_change_something_is_refused", Place::Both, whatever_would_change_something_is_refused),
    case("a_place_in_a_directory_stays_what_it_is", Place::Both, a_place_in_a_directory_stays_what_it_is),
    case("a_program_that_seeks_holes_finds_all_data", Place::Both, a_program_that_seeks_holes_finds_all_data),
    case("a_device_or_link_leads_to_what_can_be_written_to", Place::Both, a_device_or_link_leads_elsewhere),
    case("every_kind_of_entry_keeps_its_hard_links", Place::Both, every_kind_of_entry_keeps_its_hard_links),
    case("a_handle_opens_what_the_kernel_has_forgotten", Place::Both, a_handle_opens_what_the_kernel_has_forgotten),
];

fn errno<T>(outcome: rustix::io::Result<T>) -> Option<Errno> {
    outcome.err()
}

fn make_some(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("file"), content(1, 10_000))?;
    fs::create_dir_all(dir.join("dir/full"))?;
    fs::create_dir(dir.join("empty"))?;
    symlink("file", dir.join("link"))?;
    symlink("loop", dir.join("loop"))?;
    symlink("none", dir.join("dangling"))
}

/// The errors of `pjdfstest` that a file system which nobody can write to gives. Of a path that leads nowhere and of a
/// name that is taken Linux tells first; whether what is to be removed is there it does not look.
fn whatever_would_change_something_is_refused(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::new(ctx, make_some)?;
    let mount = fixture.mount("mnt")?;
    let root = File::open(&mount)?;
    let at = root.as_fd();
    let long = "x".repeat(256);
    let (rw, all) = (Mode::from_raw_mode(0o644), Mode::from_raw_mode(0o755));
    let fifo = |path: &str| errno(rustix::fs::mknodat(at, path, FileType::Fifo, rw, 0));
    let open = |path: &str, flags: OFlags| errno(rustix::fs::openat(at, path, flags | OFlags::CLOEXEC, rw));
    let rename = |from: &str, to: &str| errno(rustix::fs::renameat(at, from, at, to));
    let unlink = |path: &str, flags: AtFlags| errno(rustix::fs::unlinkat(at, path, flags));
    let now = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 1, tv_nsec: 0 },
    };
    let none = AtFlags::empty();
    let chown = |path: &str, flags| {
        let (uid, gid) = (rustix::fs::Uid::from_raw(1), rustix::fs::Gid::from_raw(1));
        errno(rustix::fs::chownat(at, path, Some(uid), Some(gid), flags))
    };
    let swap = RenameFlags::EXCHANGE;
    let told = [
        ("mkdir new", errno(rustix::fs::mkdirat(at, "new", all)), Errno::ROFS),
        ("mkdir dir", errno(rustix::fs::mkdirat(at, "dir", all)), Errno::EXIST),
        ("mkdir file/new", errno(rustix::fs::mkdirat(at, "file/new", all)), Errno::NOTDIR),
        ("mkdir none/new", errno(rustix::fs::mkdirat(at, "none/new", all)), Errno::NOENT),
        ("mkdir loop/new", errno(rustix::fs::mkdirat(at, "loop/new", all)), Errno::LOOP),
        ("mkdir of a long name", errno(rustix::fs::mkdirat(at, &*long, all)), Errno::NAMETOOLONG),
        ("mkfifo new", fifo("new"), Errno::ROFS),
        ("mkfifo file", fifo("file"), Errno::EXIST),
        ("symlink new", errno(rustix::fs::symlinkat("file", at, "new")), Errno::ROFS),
        ("symlink link", errno(rustix::fs::symlinkat("file", at, "link")), Errno::EXIST),
        ("link new", errno(rustix::fs::linkat(at, "file", at, "new", none)), Errno::ROFS),
        ("link of none", errno(rustix::fs::linkat(at, "none", at, "new", none)), Errno::NOENT),
        ("link over link", errno(rustix::fs::linkat(at, "file", at, "link", none)), Errno::EXIST),
        ("open to write", open("file", OFlags::WRONLY), Errno::ROFS),
        ("open to read and write", open("link", OFlags::RDWR), Errno::ROFS),
        ("open to cut", open("file", OFlags::RDONLY | OFlags::TRUNC), Errno::ROFS),
        ("create", open("new", OFlags::CREATE | OFlags::RDONLY), Errno::ROFS),
        ("create through a link", open("dangling", OFlags::CREATE | OFlags::WRONLY), Errno::ROFS),
        ("create what is there", open("file", OFlags::CREATE | OFlags::EXCL | OFlags::RDONLY), Errno::EXIST),
        ("open a directory to write", open("dir", OFlags::WRONLY), Errno::ISDIR),
        ("open a file as directory", open("file", OFlags::RDONLY | OFlags::DIRECTORY), Errno::NOTDIR),
        ("open no link", open("link", OFlags::RDONLY | OFlags::NOFOLLOW), Errno::LOOP),
        ("open below a file", open("file/x", OFlags::RDONLY), Errno::NOTDIR),
        ("open a circle", open("loop", OFlags::RDONLY), Errno::LOOP),
        ("open a long name", open(&long, OFlags::RDONLY), Errno::NAMETOOLONG),
        ("open without a name", open(".", OFlags::WRONLY | OFlags::TMPFILE), Errno::ROFS),
        ("unlink", unlink("file", none), Errno::ROFS),
        ("unlink none", unlink("none", none), Errno::ROFS),
        ("unlink below a file", unlink("file/x", none), Errno::NOTDIR),
        ("rmdir", unlink("empty", AtFlags::REMOVEDIR), Errno::ROFS),
        ("rename", rename("file", "new"), Errno::ROFS),
        ("rename over a file", rename("link", "file"), Errno::ROFS),
        ("rename below none", rename("file", "none/new"), Errno::NOENT),
        ("swap", errno(rustix::fs::renameat_with(at, "file", at, "link", swap)), Errno::ROFS),
        ("chmod", errno(rustix::fs::chmodat(at, "file", rw, none)), Errno::ROFS),
        ("chmod none", errno(rustix::fs::chmodat(at, "none", rw, none)), Errno::NOENT),
        ("chown", chown("file", none), Errno::ROFS),
        ("chown of a link", chown("link", AtFlags::SYMLINK_NOFOLLOW), Errno::ROFS),
        ("utimens", errno(rustix::fs::utimensat(at, "file", &now, none)), Errno::ROFS),
        ("access to write", errno(rustix::fs::accessat(at, "file", rustix::fs::Access::WRITE_OK, none)), Errno::ROFS),
        ("setxattr", set_xattr(&mount.join("file"), "user.new"), Errno::ROFS),
        ("removexattr", errno(rustix::fs::lremovexattr(mount.join("file"), "user.new")), Errno::ROFS),
        ("fchmod", errno(rustix::fs::fchmod(File::open(mount.join("file"))?, rw)), Errno::ROFS),
        ("ftruncate", errno(rustix::fs::ftruncate(File::open(mount.join("file"))?, 0)), Errno::INVAL),
        ("write", errno(rustix::io::write(File::open(mount.join("file"))?, b"x")), Errno::BADF),
        ("truncate", truncate(&mount.join("file")), Errno::ROFS),
        ("truncate a directory", truncate(&mount.join("dir")), Errno::ISDIR),
    ];
    let wrong: Vec<_> = told.iter().filter(|(_, got, want)| *got != Some(*want)).collect();
    ensure!(wrong.is_empty(), "what was done, what was told, what is right: {wrong:?}");
    let names = fs::read_dir(&mount)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<HashSet<_>>>()?;
    ensure!(names.len() == 6, "something has changed: {names:?}");
    ensure!(fs::read(mount.join("link"))? == content(1, 10_000), "something has been written");
    let listed = rustix::fs::llistxattr(mount.join("file"), &mut [0u8; 100]);
    ensure!(listed == Ok(0), "an image without extended attributes lists none: {listed:?}");
    drop(root);
    fixture.finish()
}

fn set_xattr(path: &Path, name: &str) -> Option<Errno> {
    errno(rustix::fs::lsetxattr(path, name, b"x", XattrFlags::empty()))
}

fn truncate(path: &Path) -> Option<Errno> {
    nix::unistd::truncate(path, 0).err().map(|error| Errno::from_raw_os_error(error as i32))
}

/// Where an entry begins and what it is: what `telldir` and `readdir` tell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Placed {
    place: u64,
    name: Vec<u8>,
    ino: u64,
    kind: FileType,
}

/// The entries of a directory from a place on, at most `most`, read with a buffer of `room` bytes.
fn entries(dir: &File, from: u64, room: usize, most: usize) -> anyhow::Result<Vec<Placed>> {
    rustix::fs::seek(dir, SeekFrom::Start(from)).context("seek")?;
    let mut buffer = vec![std::mem::MaybeUninit::uninit(); room];
    let (mut raw, mut place, mut all) = (RawDir::new(dir, &mut buffer), from, Vec::new());
    while let Some(entry) = raw.next() {
        let entry = entry.context("getdents")?;
        let name = CStr::to_bytes(entry.file_name()).to_vec();
        all.push(Placed { place, name, ino: entry.ino(), kind: entry.file_type() });
        place = entry.next_entry_cookie();
        if all.len() == most {
            break;
        }
    }
    Ok(all)
}

/// As xfstests' `t_dir_offset2` and `t_readdir_3` look at it.
fn a_place_in_a_directory_stays_what_it_is(ctx: &Ctx) -> Outcome {
    const NAMES: usize = 3000;
    let mut fixture = Fixture::new(ctx, |dir| {
        (0..NAMES).try_for_each(|number| fs::write(dir.join(format!("{number}-{}", "n".repeat(number % 70))), b""))
    })?;
    let mount = fixture.mount("mnt")?;
    let dir = File::open(&mount)?;
    let all = entries(&dir, 0, 32 << 10, usize::MAX)?;
    ensure!(all.len() == NAMES + 2, "{} entries", all.len());
    ensure!(all[..2].iter().all(|dot| dot.name.starts_with(b".")), "{:?} are first", &all[..2]);
    let places: HashSet<_> = all.iter().map(|entry| entry.place).collect();
    ensure!(places.len() == all.len(), "entries share a place");

    let mut random = Random::new(3);
    let mut pick = || usize::try_from(random.below(all.len() as u64)).expect("it was a usize");
    let mut look = |dir: &File, how: &str| {
        for _ in 0..500 {
            let number = pick();
            let found = entries(dir, all[number].place, 400, 1)?;
            ensure!(found == all[number..=number], "{how}: {found:?} where {:?} was", all[number]);
        }
        // With a small buffer too, and from the start once more.
        ensure!(entries(dir, 0, 300, usize::MAX)? == all, "{how}: another listing");
        anyhow::Ok(())
    };
    look(&dir, "one descriptor")?;
    look(&File::open(&mount)?, "another descriptor")?;
    drop_caches()?;
    look(&dir, "forgotten by the kernel")?;
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    look(&dir, "after a takeover")?;
    let behind = all.iter().map(|entry| entry.place).max().context("entries")? + (1 << 40);
    ensure!(entries(&dir, behind, 400, usize::MAX)?.is_empty(), "something is behind the end");
    drop(dir);
    fixture.umount(&mount)?;
    fixture.finish()
}

/// An image has no holes, only chunks of zeros. A program that looks for holes must get everything all the same.
fn a_program_that_seeks_holes_finds_all_data(ctx: &Ctx) -> Outcome {
    let bytes = content(9, 12_288);
    let build = ["--chunk-size", "4096"];
    let fixture = Fixture::with(ctx, &build, Default::default(), &[], |dir| {
        let file = File::create(dir.join("sparse"))?;
        file.write_all_at(&bytes, 16_384)?;
        file.set_len(50_001)?;
        fs::write(dir.join("dense"), &bytes[..5000])?;
        File::create(dir.join("empty")).map(drop)
    })?;
    let mount = fixture.mount("mnt")?;
    for name in ["sparse", "dense", "empty"] {
        let file = File::open(mount.join(name))?;
        let len = file.metadata()?.len();
        let seek = |from: u64, whence| Ok::<_, anyhow::Error>(lseek(&file, i64::try_from(from)?, whence));
        for from in [0, 1, 4095, 4096, 20_000, 50_000].into_iter().filter(|from| *from < len) {
            ensure!(seek(from, Whence::SeekData)? == Ok(i64::try_from(from)?), "data of {name} from {from}");
            ensure!(seek(from, Whence::SeekHole)? == Ok(i64::try_from(len)?), "the end of {name} from {from}");
        }
        for (from, whence) in [(len, Whence::SeekData), (len, Whence::SeekHole), (len + 9, Whence::SeekHole)] {
            ensure!(seek(from, whence)? == Err(nix::errno::Errno::ENXIO), "{name} goes on behind its end");
        }
        ensure!(fs::read(mount.join(name))? == fs::read(fixture.source().join(name))?, "bytes of {name}");
    }
    fixture.finish()
}

/// xfstests' generic/306.
fn a_device_or_link_leads_elsewhere(ctx: &Ctx) -> Outcome {
    let outside = ctx.dir.join("outside");
    fs::write(&outside, b"before")?;
    let fixture = Fixture::new(ctx, |dir| {
        for (name, minor) in [("null", 3), ("zero", 5)] {
            let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
            rustix::fs::mknodat(CWD, dir.join(name), kind, mode, rustix::fs::makedev(1, minor))?;
        }
        symlink(&outside, dir.join("out"))?;
        fs::write(dir.join("file"), b"inside")
    })?;
    let mount = fixture.mount("mnt")?;

    fs::write(mount.join("null"), b"gone").context("a device cannot be written to")?;
    let mut bytes = [1; 512];
    File::open(mount.join("zero"))?.read_exact_at(&mut bytes, 0)?;
    ensure!(bytes == [0; 512], "another device");
    fs::write(mount.join("out"), b"through a link")?;
    ensure!(fs::read(&outside)? == b"through a link", "written elsewhere");

    let flags = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some(&outside), &mount.join("file"), None::<&str>, flags, None::<&str>)?;
    let over = crate::mounts::Mounted(mount.join("file"));
    fs::write(&over.0, b"through a mount").context("a file that is mounted over one of ours")?;
    drop(over);
    ensure!(fs::read(&outside)? == b"through a mount" && fs::read(mount.join("file"))? == b"inside", "mixed up");
    fixture.finish()
}

/// `pjdfstest`'s link/00: each kind, not only files.
fn every_kind_of_entry_keeps_its_hard_links(ctx: &Ctx) -> Outcome {
    let kinds = [FileType::Fifo, FileType::Socket, FileType::CharacterDevice, FileType::BlockDevice];
    let fixture = Fixture::new(ctx, |dir| {
        fs::create_dir(dir.join("dir"))?;
        for (number, kind) in kinds.into_iter().enumerate() {
            let mode = Mode::from_raw_mode(0o640);
            rustix::fs::mknodat(CWD, dir.join(number.to_string()), kind, mode, rustix::fs::makedev(7, 200))?;
        }
        symlink("to", dir.join("4"))?;
        fs::write(dir.join("5"), b"file")?;
        for number in 0..6 {
            fs::hard_link(dir.join(number.to_string()), dir.join(format!("dir/{number}-again")))?;
            fs::hard_link(dir.join(number.to_string()), dir.join(format!("dir/{number}-once-more")))?;
        }
        Ok(())
    })?;
    let mount = fixture.mount("mnt")?;
    for number in 0..6 {
        let facts = |name: &str| {
            let meta = fs::symlink_metadata(mount.join(name))?;
            Ok::<_, io::Error>((meta.ino(), meta.nlink(), meta.mode(), meta.rdev()))
        };
        let first = facts(&number.to_string())?;
        ensure!(first.1 == 3, "{number}: {first:?}");
        for name in ["again", "once-more"] {
            ensure!(facts(&format!("dir/{number}-{name}"))? == first, "{number}-{name} is another one than {first:?}");
        }
    }
    fixture.finish()
}

/// xfstests' `open_by_handle`. Exported to other machines, a mount is known by nothing else.
fn a_handle_opens_what_the_kernel_has_forgotten(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::new(ctx, make_some)?;
    let mount = fixture.mount("mnt")?;
    let paths = ["file", "dir", "dir/full", "link", "."];
    let handles = paths.map(|path| Handle::of(&mount.join(path)));
    let inos = |mount: &Path| paths.map(|path| fs::symlink_metadata(mount.join(path)).map(|meta| meta.ino()).ok());
    if handles[0].as_ref().is_err_and(|error| error.raw_os_error() == Some(nix::libc::ENOSYS)) {
        println!("this kernel was built without handles of files");
        return fixture.finish();
    }
    let known = inos(&mount);
    let look = || {
        let root = File::open(&mount)?;
        for ((path, handle), ino) in paths.iter().zip(&handles).zip(known) {
            let handle = handle.as_ref().map_err(|error| anyhow::anyhow!("{path}: {error}"))?;
            let opened = handle.open(root.as_fd()).with_context(|| format!("{path} by its handle"))?;
            ensure!(rustix::fs::fstat(&opened)?.st_ino == ino.context("a number")?, "{path} is another one");
        }
        // A directory that is found so is found its way up.
        let below = handles[2].as_ref().expect("looked at").open(root.as_fd())?;
        let up = rustix::fs::statat(&below, "../..", AtFlags::empty())?;
        ensure!(Some(up.st_ino) == known[4], "two directories up is another one than the root");
        anyhow::Ok(())
    };
    look().context("known")?;
    drop_caches()?;
    look().context("forgotten")?;
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    look().context("after a takeover")?;
    fixture.umount(&mount)?;
    fixture.finish()
}
