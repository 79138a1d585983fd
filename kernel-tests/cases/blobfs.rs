//! A directory of the host with the blobs of images in it: what is the host's is as the host has it, what is a
//! blob's is fetched when it is read, and the kernel mounts images from there.
//!
//! `RAFSD_KILLS=500 cargo test --test kernel -- --backend fuse-device a_shown_directory_survives_kills` is the long
//! run.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::libc;
use nix::mount::MsFlags;
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, XattrFlags};
use serde_json::Value;

use super::fixture::{FILE, Fixture, content, drop_caches};
use crate::host::Need;
use crate::support::{listing, tree};
use crate::{Backend, Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place: Place::Only(Backend::FuseDevice), run }
}

pub(crate) const CASES: &[Case] = &[
    case("a_shown_directory_is_as_the_host_has_it", is_as_the_host_has_it),
    case("changes_of_the_host_are_seen_within_a_second", changes_are_seen),
    case("a_blob_is_whole_and_only_what_is_read_of_it_is_fetched", only_what_is_read_is_fetched),
    case("images_are_mounted_from_a_shown_directory", images_are_mounted_from_it),
    case("nothing_outside_of_a_shown_directory_is_read", nothing_outside_is_read),
    case("a_shown_directory_cannot_be_written_to", cannot_be_written_to),
    case("a_shown_directory_survives_kills", survives_kills),
    case("a_shown_directory_survives_kills_where_nothing_is_sent_again", survives_kills_without_resend),
    case("a_shown_directory_that_nobody_kept_fails_and_is_ended", what_nobody_kept_is_ended),
    case("a_shown_directory_that_cannot_be_taken_over_fails_at_once", what_cannot_be_taken_over_fails),
    case("directories_that_cannot_be_shown_are_refused", what_cannot_be_shown_is_refused),
];

/// How long the kernel may believe what it was told, and some time for a busy host.
const SEEN_WITHIN: Duration = Duration::from_millis(1500);

/// A directory of the host that is shown at `at`.
struct Shown {
    host: PathBuf,
    at: PathBuf,
    /// What was said about the images in it.
    images: Vec<Value>,
}

impl Shown {
    /// Shows a new directory `name`, with the image of the fixture and those whose bootstraps are `further`.
    fn new(fixture: &Fixture<'_>, name: &str, further: &[&Path]) -> anyhow::Result<Self> {
        let (host, at) = (fixture.ctx.dir.join(name), fixture.ctx.dir.join(format!("{name}-shown")));
        fs::create_dir(&host)?;
        Self::at(fixture, host, at, further)
    }

    fn at(fixture: &Fixture<'_>, host: PathBuf, at: PathBuf, further: &[&Path]) -> anyhow::Result<Self> {
        fs::create_dir_all(&at)?;
        let (bootstrap, url) = (fixture.bootstrap(), fixture.server.url());
        let mut words =
            vec!["blobfs", text(&host)?, text(&at)?, "--json", "--blobs", &url, "--image", text(&bootstrap)?];
        let local = fixture.ctx.dir.join("other-image/blobs");
        for image in further {
            words.extend(["--image", text(image)?, "--blobs", text(&local)?]);
        }
        let images = serde_json::from_str(&fixture.must(&words)?)?;
        Ok(Self { host, at, images })
    }

    /// The blobs of an image, in its order.
    fn blobs(&self, image: usize) -> Vec<PathBuf> {
        let devices = self.images[image]["devices"].as_array().into_iter().flatten();
        devices.map(|device| self.at.join("blobs").join(device["blob"].as_str().unwrap_or_default())).collect()
    }

    fn bootstrap(&self, image: usize) -> PathBuf {
        let name = self.images[image]["image"].as_str().unwrap_or_default();
        self.at.join("blobs").join(format!("{name}.bootstrap"))
    }

    /// Has the kernel mount an image from the files in it.
    fn mount_image(&self, image: usize, at: &Path) -> Outcome {
        fs::create_dir_all(at)?;
        let devices = self.blobs(image);
        let options = devices.iter().map(|blob| Ok(format!("device={}", text(blob)?)));
        let options = options.collect::<anyhow::Result<Vec<_>>>()?.join(",");
        let source = self.bootstrap(image);
        nix::mount::mount(Some(&source), at, Some("erofs"), MsFlags::MS_RDONLY, Some(options.as_str()))
            .with_context(|| format!("mount {} with {options}", source.display()))
    }
}

fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("UTF-8")
}

fn fetched(fixture: &Fixture<'_>) -> u64 {
    fixture.fetched().iter().map(|(range, count)| range.len() * *count as u64).sum()
}

/// An image of small chunks, so that little is read beside what is asked for.
fn in_small_chunks(ctx: &Ctx) -> anyhow::Result<Fixture<'_>> {
    let build = ["--chunk-size", "4096"];
    Fixture::with(ctx, &build, Default::default(), &[], |dir| fs::write(dir.join("big"), content(9, FILE)))
}

fn what_cannot_be_taken_over_fails(ctx: &Ctx) -> Outcome {
    let mut fixture = in_small_chunks(ctx)?;
    let shown = Shown::new(&fixture, "vm", &[])?;
    let blob = shown.blobs(0).remove(0);
    fixture.kill()?;
    fs::remove_dir_all(fixture.cache().join("bootstraps"))?;
    fixture.start(&[])?;

    // A reader that waits would keep the case from ending.
    ensure!(fs::read(&blob).is_err(), "read without an image");
    let list = fixture.must(&["list"])?;
    ensure!(list.contains(&format!("{}: not served", text(&shown.at)?)), "{list}");
    fixture.umount(&shown.at)?;
    fixture.finish()
}

/// Number, links, time of change, mode and blocks.
type Inode = (u64, u64, i64, u32, u64);

/// Everything of a tree that listings leave out, by path.
fn inodes(root: &Path) -> anyhow::Result<BTreeMap<Vec<u8>, Inode>> {
    let (mut all, mut todo) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                let entry = entry?;
                let listed = rustix::fs::statat(CWD, entry.path(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
                ensure!(
                    std::os::unix::fs::DirEntryExt::ino(&entry) == listed.st_ino,
                    "{} is listed as another inode",
                    entry.path().display()
                );
                todo.push(entry.path());
            }
        }
        let facts = (meta.ino(), meta.nlink(), meta.ctime(), meta.mode(), meta.blocks());
        all.insert(path.strip_prefix(root)?.as_os_str().as_bytes().to_vec(), facts);
    }
    Ok(all)
}

fn is_as_the_host_has_it(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    let (host, at) = (shown.host.join("tree"), shown.at.join("tree"));
    fs::create_dir(&host)?;
    tree::make(&host, 7)?;
    // A directory of several listings, and its own names among those of blobs.
    fs::create_dir(host.join("many-names"))?;
    (0..3000).try_for_each(|n| fs::write(host.join("many-names").join(format!("a-name-of-some-length-{n}")), "x"))?;
    rustix::fs::mknodat(CWD, host.join("another-fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0)?;
    rustix::fs::lsetxattr(host.join("many-names"), "user.long", &[7; 3000], XattrFlags::empty())?;
    rustix::fs::lsetxattr(host.join("many-names"), "trusted.secret", b"t", XattrFlags::empty())?;
    fs::create_dir(shown.host.join("blobs"))?;
    fs::write(shown.host.join("blobs/of-the-host"), "mine")?;

    let differences = listing::diff(&listing::of(&host)?, &listing::of(&at)?);
    ensure!(differences.is_empty(), "- host, + shown:\n{differences}");
    ensure!(inodes(&host)? == inodes(&at)?, "inodes, links, times of change, blocks");

    // The host's own directory of blobs shows both.
    std::thread::sleep(SEEN_WITHIN);
    let mut names: Vec<_> =
        fs::read_dir(shown.at.join("blobs"))?.map(|entry| Ok(entry?.path())).collect::<anyhow::Result<_>>()?;
    let mut wanted = vec![shown.at.join("blobs/of-the-host"), shown.bootstrap(0)];
    wanted.extend(shown.blobs(0));
    names.sort();
    wanted.sort();
    ensure!(names == wanted, "{names:?}");
    ensure!(fs::read(shown.at.join("blobs/of-the-host"))? == b"mine", "the host's own file among the blobs");
    let meta = fs::metadata(&shown.blobs(0)[0])?;
    ensure!((meta.mode() & 0o7777, meta.uid(), meta.nlink()) == (0o400, 0, 1), "{meta:?}");
    let told = &fixture.list()?[0];
    ensure!(told["backend"] == "blobfs" && told["shows"] == text(&shown.host)?, "{told}");

    // As others see them: not what is for the trusted alone.
    let script = format!("getfattr -d -m - {} 2>/dev/null", at.join("many-names").display());
    if let Ok(seen) =
        std::process::Command::new("setpriv").args(["--reuid=65534", "--clear-groups", "sh", "-c", &script]).output()
        && !seen.stdout.is_empty()
    {
        ensure!(!String::from_utf8_lossy(&seen.stdout).contains("trusted"), "{seen:?}");
    }
    fixture.umount(&shown.at)?;
    fixture.finish()
}

/// Waits until `holds`, and fails if that takes longer than is promised.
fn soon(what: &str, holds: impl Fn() -> bool) -> Outcome {
    let clock = Instant::now();
    while !holds() {
        ensure!(clock.elapsed() < SEEN_WITHIN, "{what} is not seen after {:?}", clock.elapsed());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn changes_are_seen(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    let (host, at) = (|name: &str| shown.host.join(name), |name: &str| shown.at.join(name));
    ensure!(fs::metadata(at("new")).is_err(), "there is nothing yet, and the kernel knows");
    fs::write(host("new"), "one")?;
    soon("a new file", || fs::read(at("new")).is_ok_and(|bytes| bytes == b"one"))?;

    // At once for whoever opens it, even of the same length and with the times that it had.
    let mut open = File::open(at("new"))?;
    let time = fs::metadata(host("new"))?.modified()?;
    fs::write(host("new"), "two")?;
    File::options().write(true).open(host("new"))?.set_modified(time)?;
    ensure!(fs::read(at("new"))? == b"two", "who opens it sees what is there");
    let mut bytes = [0; 3];
    open.read_exact(&mut bytes)?;

    // Within a second for who has it open, once the time tells.
    fs::write(host("new"), "three and more")?;
    soon("a longer file", || {
        let mut text = Vec::new();
        let mut file = &open;
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut text)).is_ok() && text == b"three and more"
    })?;
    fs::set_permissions(host("new"), Permissions::from_mode(0o604))?;
    soon("a mode", || fs::metadata(at("new")).is_ok_and(|meta| meta.mode() & 0o7777 == 0o604))?;

    // Replaced: the old one for who has it open, the new one for all others.
    fs::write(host("other"), "another one")?;
    fs::rename(host("other"), host("new"))?;
    soon("another file in its place", || fs::read(at("new")).is_ok_and(|bytes| bytes == b"another one"))?;
    let mut text = String::new();
    (&open).seek(SeekFrom::Start(0))?;
    (&open).read_to_string(&mut text).context("the old one, open")?;
    ensure!(text == "three and more", "the old one: {text:?}");

    fs::create_dir_all(host("dir/below"))?;
    fs::write(host("dir/below/file"), "deep")?;
    soon("a directory", || fs::read(at("dir/below/file")).is_ok())?;
    fs::rename(host("dir"), host("moved"))?;
    soon("a move", || fs::metadata(at("dir")).is_err() && fs::read(at("moved/below/file")).is_ok())?;
    fs::remove_dir_all(host("moved"))?;
    fs::write(host("moved"), "a file now")?;
    soon("a file for a directory", || fs::read(at("moved")).is_ok_and(|bytes| bytes == b"a file now"))?;
    fs::remove_file(host("moved"))?;
    soon("a removal", || fs::metadata(at("moved")).is_err())?;
    let listed = || fs::read_dir(&shown.at).map(|all| all.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>());
    drop(open);
    ensure!(!listed()?.contains(&OsStr::new("moved").to_owned()) && listed()?.len() == 2, "{:?}", listed()?);
    fixture.umount(&shown.at)?;
    fixture.finish()
}

fn only_what_is_read_is_fetched(ctx: &Ctx) -> Outcome {
    let fixture = in_small_chunks(ctx)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    let blob = shown.blobs(0).remove(0);
    let before = fetched(&fixture);
    let len = fs::metadata(&blob)?.len();
    ensure!(len >= FILE as u64, "{len} bytes of a blob that is not here");
    ensure!(fetched(&fixture) == before, "to look at it is not to read it");

    let (file, at) = (File::open(&blob)?, (FILE / 2) as u64);
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, at)?;

    let more = fetched(&fixture) - before;
    ensure!((1..FILE as u64 / 4).contains(&more), "{more} bytes for one page");
    drop(file);
    let whole = fs::read(&blob)?;
    ensure!(whole.len() as u64 == len && whole[FILE / 2..][..4096] == page, "the page in the whole");
    let wanted = content(9, FILE);
    let found = whole.chunks(4096).position(|chunk| chunk == &wanted[..4096]).context("the file in the blob")?;
    ensure!(whole[found * 4096..][..FILE] == wanted[..], "the decoded bytes");
    let all = fetched(&fixture) - before;
    ensure!(all < len + (1 << 20), "{all} bytes for {len}");
    ensure!(fs::read(shown.bootstrap(0))?[1024..1028] == 0xe0f5_e1e2_u32.to_le_bytes(), "a bootstrap");
    fixture.umount(&shown.at)?;
    fixture.finish()
}

fn images_are_mounted_from_it(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    let other = fixture.build_other("other", |dir| tree::make(dir, 8))?;
    let shown = Shown::new(&fixture, "host", &[&other.join("bootstrap")])?;
    ensure!(shown.images.len() == 2, "{:?}", shown.images);
    let mounts = [ctx.dir.join("first"), ctx.dir.join("second")];
    for (image, (mount, source)) in mounts.iter().zip([fixture.source(), ctx.dir.join("other")]).enumerate() {
        shown.mount_image(image, mount)?;
        let differences = listing::diff(&listing::of(&source)?, &listing::of(mount)?);
        ensure!(differences.is_empty(), "image {image}: - source, + mount:\n{differences}");
    }

    // Two images in one place are prefetched by name.
    let refused = fixture.command(&["prefetch", text(&shown.at)?])?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("name one by its digest"), "{refused:?}");
    let name = shown.images[0]["image"].as_str().context("a name")?;
    fixture.must(&["prefetch", name, "--wait"])?;

    // The same again through another daemon, from cold caches.
    fixture.kill()?;
    fixture.start(&[])?;
    drop_caches()?;
    ensure!(fixture.list()?.len() == 2, "{:?}", fixture.list()?);
    for (mount, source) in mounts.iter().zip([fixture.source(), ctx.dir.join("other")]) {
        let differences = listing::diff(&listing::of(&source)?, &listing::of(mount)?);
        ensure!(differences.is_empty(), "after a takeover: - source, + mount:\n{differences}");
        nix::mount::umount(mount)?;
    }
    fixture.umount(&shown.at)?;
    fixture.finish()
}

/// What is in the file `path` of the directory `dir`, reached without any link.
fn read_beneath(dir: &File, path: &str) -> rustix::io::Result<String> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = rustix::fs::openat2(dir, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), resolve)?;
    let mut text = String::new();
    File::from(file)
        .read_to_string(&mut text)
        .map_err(|e| rustix::io::Errno::from_io_error(&e).unwrap_or(rustix::io::Errno::IO))?;
    Ok(text)
}

fn nothing_outside_is_read(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    let outside = ctx.dir.join("outside");
    fs::create_dir_all(outside.join("sub"))?;
    fs::write(outside.join("sub/file"), "outside")?;
    fs::create_dir_all(shown.host.join("in/sub"))?;
    fs::write(shown.host.join("in/sub/file"), "inside")?;
    symlink(&outside, shown.host.join("link"))?;
    symlink("../../outside", shown.host.join("in/up"))?;
    let root = File::open(&shown.at)?;
    ensure!(fs::read_link(shown.at.join("link"))? == outside, "a link is a link");
    ensure!(fs::read_link(shown.at.join("in/up"))? == Path::new("../../outside"), "a link is a link");

    // What is mounted in it stays hidden.
    let mounted = shown.host.join("mounted");
    fs::create_dir(&mounted)?;
    nix::mount::mount(Some(&outside), &mounted, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let seen = fs::read(shown.at.join("mounted/sub/file")).map_err(|e| e.raw_os_error());
    nix::mount::umount(&mounted)?;
    ensure!(seen == Err(Some(libc::EXDEV)), "{seen:?}");

    // Whoever looks at a directory while it is swapped for a link to outside, or for one that came from there,
    // finds what was inside, or nothing.
    let stop = Arc::new(AtomicBool::new(false));
    let swapping = {
        let (stop, host, outside) = (stop.clone(), shown.host.clone(), outside.clone());
        std::thread::spawn(move || -> Outcome {
            while !stop.load(Ordering::Relaxed) {
                let swap = |one: PathBuf, other: PathBuf| {
                    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
                };
                swap(host.join("in"), host.join("link"))?;
                swap(host.join("in"), host.join("link"))?;
                // Out of the tree and back, with a reader in it.
                fs::rename(host.join("in/sub"), outside.join("moved"))?;
                fs::rename(outside.join("moved"), host.join("in/sub"))?;
            }
            Ok(())
        })
    };
    let (mut inside, mut nothing) = (0, 0);
    let until = Instant::now() + Duration::from_secs(5);
    let mut dropped = Instant::now();
    while Instant::now() < until {
        match read_beneath(&root, "in/sub/file") {
            Ok(text) => {
                ensure!(text == "inside", "{text:?} was read");
                inside += 1;
            }
            Err(_) => nothing += 1,
        }
        // The kernel is to ask again.
        let _ = fs::metadata(shown.at.join("link"));
        if dropped.elapsed() > Duration::from_millis(300) {
            let _ = fs::write("/proc/sys/vm/drop_caches", "2");
            dropped = Instant::now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    swapping.join().map_err(|_| anyhow::anyhow!("panicked"))??;
    println!("{inside} times what was inside, {nothing} times nothing");
    ensure!(inside > 0, "never was anything read");
    soon("what is inside", || read_beneath(&root, "in/sub/file").is_ok_and(|text| text == "inside"))?;
    drop(root);
    fixture.umount(&shown.at)?;
    fixture.finish()
}

fn cannot_be_written_to(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    fs::write(shown.host.join("file"), "text")?;
    let blob = shown.blobs(0).remove(0);
    let at = |name: &str| shown.at.join(name);
    let tried = [
        ("write", File::options().write(true).open(at("file")).map(drop)),
        ("create", File::create(at("new")).map(drop)),
        ("a blob", File::options().append(true).open(&blob).map(drop)),
        ("unlink", fs::remove_file(at("file"))),
        ("rename", fs::rename(at("file"), at("other"))),
        ("link", fs::hard_link(at("file"), at("other"))),
        ("symlink", symlink("x", at("other"))),
        ("mkdir", fs::create_dir(at("dir"))),
        ("rmdir", fs::remove_dir(at("blobs"))),
        ("chmod", fs::set_permissions(at("file"), Permissions::from_mode(0o777))),
        ("truncate", rustix::fs::chown(at("file"), Some(rustix::fs::Uid::from_raw(1)), None).map_err(Into::into)),
        ("xattr", rustix::fs::setxattr(at("file"), "user.a", b"b", XattrFlags::empty()).map_err(Into::into)),
    ];
    for (what, outcome) in tried {
        let errno = outcome.err().and_then(|e| e.raw_os_error());
        ensure!(errno == Some(libc::EROFS), "{what}: {errno:?}");
    }
    ensure!(fs::read_dir(&shown.host)?.count() == 1 && fs::read(shown.host.join("file"))? == b"text", "it was changed");
    fixture.umount(&shown.at)?;
    fixture.finish()
}

fn survives_kills(ctx: &Ctx) -> Outcome {
    survive(ctx, None)
}

/// As before Linux 6.9.
fn survives_kills_without_resend(ctx: &Ctx) -> Outcome {
    survive(ctx, Some("no-resend"))
}

/// What readers have seen, and when to end.
#[derive(Default)]
struct Watch {
    stop: AtomicBool,
    rounds: AtomicU64,
}

/// Walks the tree and compares it, again and again.
fn walk(watch: &Watch, at: &Path, wanted: &[listing::Line]) -> Outcome {
    while !watch.stop.load(Ordering::Relaxed) {
        let got = listing::of(at)?;
        let differences = listing::diff(wanted, &got);
        ensure!(differences.is_empty(), "- host, + shown:\n{differences}");
        watch.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Reads pages of a file that it has open, past the page cache or not.
fn read_open(watch: &Watch, file: &File, wanted: &[u8]) -> Outcome {
    let mut random = tree::Random::new(5);
    let mut page = vec![0; 4096];
    while !watch.stop.load(Ordering::Relaxed) {
        let at = usize::try_from(random.below(wanted.len() as u64 / 4096))? * 4096;
        nix::fcntl::posix_fadvise(file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
        file.read_exact_at(&mut page, at as u64).with_context(|| format!("a page at {at}"))?;
        ensure!(page == wanted[at..at + 4096], "a wrong page at {at}");
        watch.rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn survive(ctx: &Ctx, pretended: Option<&str>) -> Outcome {
    let mut fixture = in_small_chunks(ctx)?;
    if let Some(name) = pretended {
        fixture.set_environment("RAFSD_PRETEND", name.to_owned());
        fixture.restart(&["--deadline", "30m"])?;
    } else {
        fixture.restart(&["--deadline", "30m"])?;
    }
    let shown = Shown::new(&fixture, "host", &[])?;
    fs::create_dir(shown.host.join("tree"))?;
    tree::make(&shown.host.join("tree"), 7)?;
    let plain = content(3, 1 << 20);
    fs::write(shown.host.join("open"), &plain)?;
    let wanted = listing::of(&shown.host.join("tree"))?;
    let image = ctx.dir.join("image-mount");
    shown.mount_image(0, &image)?;

    let watch = Watch::default();
    let (open, big) = (File::open(shown.at.join("open"))?, File::open(image.join("big"))?);
    let kills = std::env::var("RAFSD_KILLS").ok().and_then(|text| text.parse::<u64>().ok()).unwrap_or(25);
    let outcome = std::thread::scope(|scope| -> Outcome {
        let readers = [
            scope.spawn(|| walk(&watch, &shown.at.join("tree"), &wanted)),
            scope.spawn(|| read_open(&watch, &open, &plain)),
            scope.spawn(|| read_open(&watch, &big, &content(9, FILE))),
        ];
        let mut kill_all = || -> Outcome {
            for round in 0..kills {
                std::thread::sleep(Duration::from_micros((round * 7919) % 30_000));
                fixture.kill()?;
                fixture.start(&["--deadline", "30m"])?;
                let before = watch.rounds.load(Ordering::Relaxed);
                let until = Instant::now() + Duration::from_secs(30);
                while watch.rounds.load(Ordering::Relaxed) < before + 3 && !readers.iter().any(|it| it.is_finished()) {
                    ensure!(Instant::now() < until, "readers do not get on");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Ok(())
        };
        let killed = kill_all();
        watch.stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?.with_context(|| fixture.log())?;
        }
        killed
    });
    outcome?;
    println!("{kills} kills, {} rounds of readers", watch.rounds.load(Ordering::Relaxed));

    // What the kernel forgets is forgotten, by whoever told it.
    drop((open, big));
    nix::mount::umount(&image)?;
    drop_caches()?;
    let differences = listing::diff(&wanted, &listing::of(&shown.at.join("tree"))?);
    ensure!(differences.is_empty(), "at the end: - host, + shown:\n{differences}");
    fixture.umount(&shown.at)?;
    fixture.finish()
}

fn what_nobody_kept_is_ended(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let shown = Shown::new(&fixture, "host", &[])?;
    fs::write(shown.host.join("file"), "text")?;
    fixture.kill_all()?;
    let seen =
        [fs::read(shown.at.join("file")), fs::read(&shown.blobs(0)[0])].map(|read| read.map_err(|e| e.raw_os_error()));
    ensure!(seen.iter().all(|read| *read == Err(Some(libc::ENOTCONN))), "with nobody left: {seen:?}");

    fixture.start(&[])?;

    let left = crate::mounts::below(&ctx.dir)?;
    ensure!(left.is_empty(), "still mounted: {left:?}");
    let again = Shown::at(&fixture, shown.host, shown.at, &[])?;
    ensure!(fs::read(again.at.join("file"))? == b"text", "shown again");
    fixture.umount(&again.at)?;
    fixture.finish()
}

fn what_cannot_be_shown_is_refused(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 1)?;
    let (host, bootstrap, url) = (ctx.dir.join("host"), fixture.bootstrap(), fixture.server.url());
    fs::create_dir(&host)?;
    fs::write(host.join("blobs"), "no directory")?;
    let mount = fixture.mount("mnt")?;
    let refused = |fixture: &Fixture<'_>, source: &Path, more: &[&str], why: &str| -> Outcome {
        let fixed = ["blobfs", text(source)?, text(&host)?, "--blobs", &url, "--image", text(&bootstrap)?];
        let refused = fixture.command(&[&fixed[..], more].concat())?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        ensure!(!refused.status.success() && said.contains(why), "{why:?}: {said:?}");
        Ok(())
    };
    refused(&fixture, &host, &[], "something else than a directory")?;
    refused(&fixture, &host, &["--blob-dir", "a/b"], "no name of a directory")?;
    refused(&fixture, &host, &["--blob-dir", ".."], "no name of a directory")?;
    refused(&fixture, &mount, &[], "lies on erofs")?;
    ensure!(crate::mounts::below(&ctx.dir)?.len() == 1, "something was mounted");

    // In the place of the directory itself, the blobs in its root.
    fs::write(host.join("file"), "text")?;
    let words =
        ["blobfs", text(&host)?, text(&host)?, "--blobs", &url, "--image", text(&bootstrap)?, "--blob-dir", "."];
    fixture.must(&words)?;
    ensure!(fs::read(host.join("file"))? == b"text" && fs::read(host.join("blobs"))? == b"no directory", "the host's");
    ensure!(fs::read_dir(&host)?.count() == 4, "and a blob and a bootstrap");
    refused(&fixture, &host, &[], "lies on fuse")?;
    fixture.umount(&host)?;
    fixture.umount(&mount)?;

    // Only what the daemon may read at all.
    let allowed = ctx.dir.join("image");
    fixture.restart(&["--sandbox-read", text(&allowed)?])?;
    fs::remove_file(host.join("blobs"))?;
    let refused = fixture.command(&words)?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("sandbox_read"), "{refused:?}");
    fs::create_dir(allowed.join("in"))?;
    fs::write(allowed.join("in/file"), "text")?;
    let shown = Shown::at(&fixture, allowed.join("in"), allowed.join("in"), &[])?;
    ensure!(fs::read(shown.at.join("file"))? == b"text" && fs::read_dir(&shown.at)?.count() == 2, "where it may");
    fixture.umount(&shown.at)?;
    fixture.finish()
}
