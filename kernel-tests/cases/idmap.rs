//! Mounts of mounts through which everything has other owners, as runtimes of containers make them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc;
use nix::mount::{MntFlags, umount2};
use rafsd::export::fuse::negotiation::flag;
use rafsd::sys::mount::DetachedMount;
use rustix::fs::XattrFlags;

use super::fixture::{Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::tree;
use crate::{Backend, Case, Ctx, Outcome, Place};

pub(crate) const CASES: &[Case] = &[Case {
    name: "an_id_mapped_mount_shows_other_owners",
    needs: &[
        Need::Root,
        Need::Erofs,
        Need::DiskStore,
        Need::Backend,
        Need::Program("unshare"),
        Need::Program("sleep"),
        Need::Program("setpriv"),
        Need::Program("cat"),
    ],
    place: Place::Here,
    run: an_id_mapped_mount_shows_other_owners,
}];

/// Whom the file system calls 0, and how many behind him are called otherwise too.
const FIRST: u32 = 100_000;
const COUNT: u32 = 65_536;
/// Who is shown where a number has no other.
const NOBODY: u32 = 65_534;

fn shifted(id: u32) -> u32 {
    if id < COUNT { FIRST + id } else { NOBODY }
}

const LIST: &str = "system.posix_acl_access";

/// An access control list: root may do all, user `user` and group `group` may read, others nothing.
fn list(user: u32, group: u32) -> Vec<u8> {
    const NONE: u32 = u32::MAX;
    let rows = [(0x01, 7, NONE), (0x02, 4, user), (0x04, 0, NONE), (0x08, 4, group), (0x10, 4, NONE), (0x20, 0, NONE)];
    let row =
        |(tag, may, id): (u16, u16, u32)| [&tag.to_le_bytes()[..], &may.to_le_bytes(), &id.to_le_bytes()].concat();
    2u32.to_le_bytes().into_iter().chain(rows.into_iter().flat_map(row)).collect()
}

fn fill(dir: &Path) -> io::Result<()> {
    let owners = [("of-root", 0, 0), ("of-a-user", 1000, 1001), ("of-the-last", COUNT - 1, COUNT - 1)];
    for (name, uid, gid) in owners.into_iter().chain([("of-one-behind", COUNT, COUNT + 4464), ("listed", 0, 0)]) {
        fs::write(dir.join(name), content(uid as usize, 70_001))?;
        std::os::unix::fs::chown(dir.join(name), Some(uid), Some(gid))?;
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o600))?;
    }
    rustix::fs::lsetxattr(dir.join("listed"), LIST, &list(1000, 1001), XattrFlags::empty())?;
    fs::create_dir(dir.join("tree"))?;
    tree::make(&dir.join("tree"), 5)?;
    let mut todo = vec![dir.join("tree")];
    while let Some(dir) = todo.pop() {
        // Those without an owner that is known cannot be looked into.
        std::os::unix::fs::chown(&dir, Some(1234), Some(1235))?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            todo.extend(entry.file_type()?.is_dir().then(|| entry.path()));
        }
    }
    Ok(())
}

/// A user namespace in which the first [`COUNT`] numbers mean those from [`FIRST`] on.
fn users() -> anyhow::Result<File> {
    let mut child = Command::new("unshare").args(["--user", "sleep", "60"]).stdin(Stdio::null()).spawn()?;
    let of = |process: &str| PathBuf::from(format!("/proc/{process}/ns/user"));
    let (ours, pid) = (fs::read_link(of("self"))?, child.id().to_string());
    let until = Instant::now() + Duration::from_secs(20);
    let make = || {
        while fs::read_link(of(&pid))? == ours {
            ensure!(Instant::now() < until, "no user namespace");
            std::thread::sleep(Duration::from_millis(5));
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{pid}/{map}"), format!("0 {FIRST} {COUNT}"))?;
        }
        Ok(File::open(of(&pid))?)
    };
    let made = make();
    child.kill()?;
    child.wait()?;
    made
}

/// Whether the kernel has told the daemon that mounts of FUSE may be so. EROFS lets them be since before any kernel
/// that cases run on.
fn is_offered(fixture: &Fixture<'_>) -> anyhow::Result<bool> {
    if fixture.ctx.backend != Backend::FuseTree {
        return Ok(true);
    }
    let record = fs::read_dir(fixture.run().join("served"))?.next().context("a record")??;
    let record: serde_json::Value = serde_json::from_slice(&fs::read(record.path())?)?;
    let offered = record["record"]["fuse"]["agreed"]["offered"].as_u64();
    Ok(offered.with_context(|| format!("nothing agreed in {record}"))? & flag::ALLOW_IDMAP != 0)
}

fn an_id_mapped_mount_shows_other_owners(ctx: &Ctx) -> Outcome {
    // Other users are to come to it.
    for dir in [ctx.dir.parent().context("a parent")?, &ctx.dir] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    let mut fixture = Fixture::new(ctx, fill)?;
    let mount = fixture.mount("mnt")?;
    let mapped = ctx.dir.join("mapped");
    fs::create_dir(&mapped)?;

    let clone = DetachedMount::clone_of(&mount).context("open_tree")?;
    let outcome = clone.map_owners(users()?.as_fd());

    if !is_offered(&fixture)? {
        ensure!(outcome.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)), "mapped, and not offered");
        println!("this kernel's FUSE has no mounts with other owners (6.12)");
        drop(clone);
        return fixture.finish();
    }
    outcome.context("mount_setattr")?;
    clone.attach(&mapped)?;
    drop(clone);
    ensure_shifted(&fixture.source(), &mount, &mapped)?;
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    ensure_shifted(&fixture.source(), &mount, &mapped).context("after a takeover")?;
    umount2(&mapped, MntFlags::UMOUNT_NOFOLLOW)?;
    ensure_who_may_read(&mount.join("of-a-user"), 1000, true)?;
    fixture.umount(&mount)?;
    fixture.finish()
}

fn ensure_shifted(source: &Path, mount: &Path, mapped: &Path) -> Outcome {
    let (mut todo, mut count, mut unknown) = (vec![PathBuf::new()], 0, 0);
    while let Some(below) = todo.pop() {
        let (want, got) = (fs::symlink_metadata(mount.join(&below))?, fs::symlink_metadata(mapped.join(&below))?);
        let shown = (got.uid(), got.gid());
        let facts =
            |meta: &fs::Metadata| (meta.ino(), meta.mode(), meta.nlink(), meta.size(), meta.rdev(), meta.mtime());
        ensure!(shown == (shifted(want.uid()), shifted(want.gid())), "{} belongs to {shown:?}", below.display());
        ensure!(facts(&want) == facts(&got), "{} is another one", below.display());
        // Root himself has no right to what has no owner that he knows.
        if shown.0 == NOBODY || shown.1 == NOBODY {
            unknown += 1;
            continue;
        }
        if want.is_file() {
            ensure!(fs::read(mapped.join(&below))? == fs::read(source.join(&below))?, "bytes of {}", below.display());
        }
        if want.is_dir() {
            for entry in fs::read_dir(mapped.join(&below))? {
                todo.push(below.join(entry?.file_name()));
            }
        }
        count += 1;
    }
    ensure!(count > 50 && unknown > 0, "only {count} paths, and {unknown} of nobody");
    for (dir, by) in [(mount, 0), (mapped, FIRST)] {
        let mut value = [0; 100];
        let len = rustix::fs::lgetxattr(dir.join("listed"), LIST, &mut value)?;
        ensure!(value[..len] == list(by + 1000, by + 1001), "the list names {:?}", &value[..len]);
        for (name, user, may) in [
            ("of-a-user", by + 1000, true),
            ("of-a-user", FIRST - by + 1000, false),
            ("of-root", by, true),
            ("of-root", by + 1000, false),
            ("listed", by + 1000, true),
            ("listed", FIRST - by + 1000, false),
            // As the group of the same number.
            ("listed", by + 1001, true),
            ("listed", by + 1002, false),
        ] {
            ensure_who_may_read(&dir.join(name), user, may)?;
        }
    }
    Ok(())
}

/// Whether user and group `id` can read it.
fn ensure_who_may_read(path: &Path, id: u32, may: bool) -> Outcome {
    let id = id.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--", "cat"]).arg(path);
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() == may, "{} and user {id}: {may} was expected; {said}", path.display());
    ensure!(may || said.contains("Permission denied"), "{} and user {id}: {said}", path.display());
    Ok(())
}
