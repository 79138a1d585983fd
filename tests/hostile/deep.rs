//! Small bootstraps that describe very long paths.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rafsd::image::dump::{Detail, dump};
use rafsd::reader::Files;
use rafsd::source::LocalSource;
use rafsd::tools::unpack::{UnpackOptions, to_directory, to_stream};
use rustix::fs::{AtFlags, Mode, OFlags};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::allocations::peak_of;
use super::support::building;

const DEPTH: usize = 1000;
const NAME: [u8; 255] = [b'd'; 255];

/// Most memory that may be held for an image with paths of 256,000 bytes. A path for each of 300
/// files would take 77 MB.
const MEMORY: usize = 16 << 20;

/// An image of files with two names each, far below the root.
struct Deep {
    dir: TempDir,
    files: Files,
    _runtime: Runtime,
}

impl Deep {
    fn new(files: usize) -> Self {
        // In memory if possible: many small files.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        fill(&source, files);
        let built = building::build(&source, &dir.path().join("image"));
        remove(&source);
        let report = built.unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let blobs = Arc::new(LocalSource::new(dir.path().join("image/blobs")).unwrap());
        let files = Files::open(&PathBuf::from(report.bootstrap), blobs, runtime.handle().clone()).unwrap();
        Self { dir, files, _runtime: runtime }
    }
}

fn fill(source: &Path, files: usize) {
    let (mode, flags) = (Mode::from_raw_mode(0o755), OFlags::RDONLY | OFlags::DIRECTORY);
    let mut here = rustix::fs::open(source, flags, mode).unwrap();
    for _ in 0..DEPTH {
        rustix::fs::mkdirat(&here, &NAME[..], mode).unwrap();
        here = rustix::fs::openat(&here, &NAME[..], flags, mode).unwrap();
    }
    for number in 0..files {
        let (first, second) = (format!("first-{number}"), format!("second-{number}"));
        rustix::fs::openat(&here, &first, OFlags::CREATE | OFlags::WRONLY, mode).unwrap();
        rustix::fs::linkat(&here, &first, &here, &second, AtFlags::empty()).unwrap();
    }
}

/// The standard library removes trees with a descriptor for every level.
fn remove(tree: &Path) {
    assert!(Command::new("rm").arg("-rf").arg(tree).status().unwrap().success());
}

#[test]
fn linked_files_far_down_are_unpacked_without_a_path_for_each() {
    let deep = Deep::new(300);
    let target = deep.dir.path().join("new");
    let options = UnpackOptions { no_same_owner: true, ..UnpackOptions::default() };

    let (directory, peak) = peak_of(|| to_directory(&deep.files, &target, options, &()));
    let (archive, peak_of_archive) = peak_of(|| to_stream(&deep.files, &mut io::sink(), &()));

    remove(&target);
    for (report, peak) in [(directory, peak), (archive, peak_of_archive)] {
        let report = report.unwrap();
        assert_eq!((report.directories, report.files, report.hard_links), (DEPTH as u64 + 1, 300, 300));
        assert!(peak < MEMORY, "{peak} bytes of memory");
    }
}

#[test]
fn linked_files_far_down_are_dumped_without_a_path_for_each() {
    let deep = Deep::new(200);

    let (dumped, peak) = peak_of(|| dump(deep.files.image(), Detail::Meaning, &mut io::sink()));

    dumped.unwrap();
    assert!(peak < MEMORY, "{peak} bytes of memory");
}
