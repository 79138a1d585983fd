//! Building an image in a test, and asking the kernel what it shows.

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafsd::build::{self, BuildError, BuildReport, BuildSpec, Progress, Source};
use rafsd::reader::Files;
use rafsd::source::LocalSource;
use rafsd::tools::unpack::{UnpackOptions, to_directory};
use tokio::runtime::Runtime;

use super::{image, listing};

/// The defaults of the command line, with two threads.
pub fn spec(source: Source, out: &Path) -> BuildSpec {
    let mut spec = BuildSpec::new(source, out);
    spec.threads = NonZeroUsize::new(2).unwrap();
    spec
}

/// Builds `source` with the defaults.
pub fn build(source: &Path, out: &Path) -> Result<BuildReport, BuildError> {
    build_watched(source, out, &())
}

pub fn build_watched(source: &Path, out: &Path, progress: &dyn Progress) -> Result<BuildReport, BuildError> {
    build::build(spec(Source::open(source)?, out), progress)
}

/// Mounts a finished image, with its blob written out below `scratch`, and compares everything
/// in it with `want`.
#[track_caller]
pub fn assert_mounts_as(want: &[listing::Line], report: &BuildReport, scratch: &Path) {
    let mounted = mount(report, scratch);
    listing::assert_same(want, &listing::of(mounted.path()).unwrap());
}

/// Mounts a finished image at `scratch/mnt`.
pub fn mount(report: &BuildReport, scratch: &Path) -> image::Mounted {
    let mut devices: Vec<PathBuf> = Vec::new();
    for blob in &report.blobs {
        let device = scratch.join("device");
        image::expand(Path::new(&blob.path), &device).unwrap();
        assert_eq!(device.metadata().unwrap().len(), blob.decoded_bytes);
        devices.push(device);
    }
    let at = scratch.join("mnt");
    fs::create_dir_all(&at).unwrap();
    image::Mounted::new(Path::new(&report.bootstrap), &devices, &at).unwrap()
}

/// What is in the image of `bootstrap` with its blobs in the directory `blobs`: unpacked to `to`, which is made and
/// removed.
#[track_caller]
pub fn unpacked(bootstrap: &Path, blobs: &Path, to: &Path, runtime: &Runtime) -> Vec<listing::Line> {
    let source = Arc::new(LocalSource::new(blobs).unwrap());
    let files = Files::open(bootstrap, source, runtime.handle().clone()).unwrap_or_else(|e| panic!("{e:?}"));
    to_directory(&files, to, UnpackOptions::default(), &()).unwrap_or_else(|e| panic!("{e:?}"));
    let lines = listing::of(to).unwrap();
    fs::remove_dir_all(to).unwrap();
    lines
}

/// Names and content of everything in an output directory, sorted.
pub fn output(out: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for dir in [out.to_owned(), out.join("blobs")] {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                files.push((entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
            }
        }
    }
    files.sort();
    files
}
