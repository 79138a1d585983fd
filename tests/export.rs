//! Images as one disk: the kernel mounts it alone, and dm-verity trusts it.

mod support;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rafsd::reader::Files;
use rafsd::source::LocalSource;
use rafsd::sys::files::data_ranges;
use rafsd::tools::export::{ExportError, Verity, export};
use support::image::Mounted;
use support::{building, listing, skip, tree, unable_to_mount};
use tokio::runtime::Runtime;

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn open(image: &Path, runtime: &Runtime) -> Files {
    let source = Arc::new(LocalSource::new(image.join("blobs")).unwrap());
    Files::open(&image.join("bootstrap"), source, runtime.handle().clone()).unwrap()
}

/// What the kernel shows of a disk without any device beside it.
fn mounted(disk: &Path, at: &Path) -> Vec<listing::Line> {
    fs::create_dir_all(at).unwrap();
    let mounted = Mounted::new(disk, &[], at).unwrap();
    listing::of(mounted.path()).unwrap()
}

#[test]
fn the_kernel_mounts_the_disk_alone_and_shows_the_same_tree() {
    if let Some(why) = unable_to_mount() {
        return skip("the_kernel_mounts_the_disk_alone_and_shows_the_same_tree", why);
    }
    let (dir, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::make(&source, 1).unwrap();
    building::build(&source, &dir.path().join("image")).unwrap();
    let files = open(&dir.path().join("image"), &runtime);
    let disk = dir.path().join("disk");

    for verity in [Verity::None, Verity::Append] {
        let report = export(&files, &disk, &verity, &()).unwrap();

        assert!(!report.is_placed_anew);
        assert_eq!(fs::metadata(&disk).unwrap().len(), report.disk_bytes);
        listing::assert_same(&listing::of(&source).unwrap(), &mounted(&disk, &dir.path().join("mnt")));
    }
}

#[test]
fn images_that_do_not_say_where_devices_belong_are_placed_anew() {
    if let Some(why) = unable_to_mount() {
        return skip("images_that_do_not_say_where_devices_belong_are_placed_anew", why);
    }
    let (dir, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::make(&source, 2).unwrap();
    let image = dir.path().join("image");
    building::build(&source, &image).unwrap();
    export(&open(&image, &runtime), &dir.path().join("placed"), &Verity::None, &()).unwrap();
    let bootstrap = File::options().write(true).open(image.join("bootstrap")).unwrap();
    bootstrap.write_all_at(&[0; 4], 1408 + 68).unwrap();
    let disk = dir.path().join("disk");

    let report = export(&open(&image, &runtime), &disk, &Verity::None, &()).unwrap();

    assert!(report.is_placed_anew);
    assert!(fs::read(dir.path().join("placed")).unwrap() == fs::read(&disk).unwrap(), "placed as the builder would");
    listing::assert_same(&listing::of(&source).unwrap(), &mounted(&disk, &dir.path().join("mnt")));
}

#[test]
fn zeros_and_gaps_are_holes() {
    let (dir, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("zeros"), vec![0; 8 << 20]).unwrap();
    let mut island = vec![0; 3 << 20];
    island[(1 << 20) + 8192] = 1;
    fs::write(source.join("island"), island).unwrap();
    building::build(&source, &dir.path().join("image")).unwrap();
    let files = open(&dir.path().join("image"), &runtime);
    let disk = dir.path().join("disk");

    export(&files, &disk, &Verity::None, &()).unwrap();

    let bootstrap = files.image().summary().bootstrap_len;
    let file = File::open(&disk).unwrap();
    let data: u64 =
        data_ranges(file.as_fd(), file.metadata().unwrap().len()).unwrap().iter().map(|range| range.len()).sum();
    assert!(data <= bootstrap.next_multiple_of(4096) + 4096, "{data} bytes of data, the bootstrap has {bootstrap}");
}

#[test]
fn the_root_hash_covers_every_block_of_the_disk() {
    let (dir, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::big_file(&source.join("file"), 3, 1).unwrap();
    building::build(&source, &dir.path().join("image")).unwrap();
    let files = open(&dir.path().join("image"), &runtime);
    let (disk, hashes) = (dir.path().join("disk"), dir.path().join("hashes"));

    let appended = export(&files, &disk, &Verity::Append, &()).unwrap().verity.unwrap();
    let content = fs::read(&disk).unwrap();
    let beside = export(&files, &disk, &Verity::File(hashes.clone()), &()).unwrap().verity.unwrap();

    // Recomputed with another SHA-256, from the disk alone.
    let data = &content[..usize::try_from(appended.hash_offset).unwrap()];
    assert_eq!(data.len() as u64, appended.data_blocks * 4096);
    let mut levels = vec![data.to_vec()];
    while levels.last().unwrap().len() > 4096 {
        let mut level: Vec<u8> = Vec::new();
        for block in levels.last().unwrap().chunks(4096) {
            level.extend(ring::digest::digest(&ring::digest::SHA256, block).as_ref());
        }
        level.resize(level.len().next_multiple_of(4096), 0);
        levels.push(level);
    }
    let root = ring::digest::digest(&ring::digest::SHA256, levels.last().unwrap());
    let root: String = root.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    levels.remove(0);
    levels.reverse();
    assert!(levels.concat() == content[data.len()..], "the tree");
    assert_eq!(appended.root_hash, root);
    assert_eq!((beside.root_hash.as_str(), beside.hash_offset), (root.as_str(), 0));
    assert!(fs::read(&disk).unwrap() == data && fs::read(&hashes).unwrap() == levels.concat());
    veritysetup_agrees(&disk, &hashes, &beside.root_hash, beside.data_blocks);
}

fn veritysetup_agrees(disk: &Path, hashes: &Path, root: &str, data_blocks: u64) {
    let options = ["--no-superblock", "--salt=-", "--format=1", "--hash=sha256"];
    let mut command = Command::new("veritysetup");
    command.arg("verify").args(options).arg(format!("--data-blocks={data_blocks}")).arg(disk).arg(hashes).arg(root);
    match command.output() {
        Err(_) => skip("veritysetup_agrees", "no veritysetup"),
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr)),
    }
}

#[test]
fn damaged_blobs_leave_what_was_there() {
    let (dir, runtime) = (tempfile::tempdir().unwrap(), runtime());
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::big_file(&source.join("file"), 3, 1).unwrap();
    let report = building::build(&source, &dir.path().join("image")).unwrap();
    let files = open(&dir.path().join("image"), &runtime);
    let blob = File::options().write(true).open(&report.blobs[0].path).unwrap();
    blob.write_all_at(b"damaged", blob.metadata().unwrap().size() / 3).unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, "before").unwrap();

    let error = export(&files, &disk, &Verity::Append, &()).unwrap_err();

    assert!(matches!(error, ExportError::Read(_)), "{error:?}");
    assert!(error.to_string().contains(&report.blobs[0].id), "{error}");
    assert_eq!(fs::read(&disk).unwrap(), b"before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing unfinished is left");
}

/// A small image and the directory it is in.
fn small(runtime: &Runtime) -> (tempfile::TempDir, Files) {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), "content").unwrap();
    building::build(&source, &dir.path().join("image")).unwrap();
    let files = open(&dir.path().join("image"), runtime);
    (dir, files)
}

#[test]
fn the_disk_cannot_be_its_own_hash_file() {
    let runtime = runtime();
    let (dir, files) = small(&runtime);
    let disk = dir.path().join("disk");
    fs::write(&disk, "before").unwrap();

    for spelled in ["disk", "./disk", "image/../disk"] {
        let hashes = PathBuf::from(format!("{}/{spelled}", dir.path().display()));

        let error = export(&files, &disk, &Verity::File(hashes.clone()), &()).unwrap_err();

        assert!(matches!(&error, ExportError::SameFile { path } if *path == hashes), "{error:?}");
        assert!(error.to_string().contains(hashes.to_str().unwrap()), "{error}");
        assert_eq!(fs::read(&disk).unwrap(), b"before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3, "nothing unfinished is left");
    }
}

#[test]
fn a_disk_that_cannot_be_put_in_its_place_leaves_the_old_hash_file() {
    let runtime = runtime();
    let (dir, files) = small(&runtime);
    let (disk, hashes) = (dir.path().join("disk"), dir.path().join("hashes"));
    fs::create_dir(&disk).unwrap();
    fs::write(&hashes, "before").unwrap();

    let error = export(&files, &disk, &Verity::File(hashes.clone()), &()).unwrap_err();

    assert!(matches!(&error, ExportError::Write { path, .. } if *path == disk), "{error:?}");
    assert_eq!(fs::read(&hashes).unwrap(), b"before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "nothing unfinished is left");
}

#[test]
fn a_hash_tree_that_cannot_be_put_in_its_place_leaves_the_old_disk() {
    let runtime = runtime();
    let (dir, files) = small(&runtime);
    let (disk, hashes) = (dir.path().join("disk"), dir.path().join("hashes"));
    fs::write(&disk, "before").unwrap();
    fs::create_dir(&hashes).unwrap();

    let error = export(&files, &disk, &Verity::File(hashes.clone()), &()).unwrap_err();

    assert!(matches!(&error, ExportError::Write { path, .. } if *path == hashes), "{error:?}");
    assert_eq!(fs::read(&disk).unwrap(), b"before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "nothing unfinished is left");
}
