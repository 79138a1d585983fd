use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafsd::build::{
    self, BuildError, BuildReport, BuildSpec, CompactReport, CompactSpec, Existing, HotPath, Layer, MergeSpec,
    MergeVersion, OptimizeReport, OptimizeSpec, Source, Whiteouts,
};
use rafsd::image::{Extent, Image, Inode, Kind};
use rafsd::reader::Files;
use rafsd::source::LocalSource;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::image::{Mounted, expand};
use crate::support::{building, listing, tree::Random};

/// A directory for one test, a place where all blobs are, and a runtime to read images on.
pub(crate) struct Fixture {
    pub dir: TempDir,
    runtime: Runtime,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("all")).unwrap();
        Self { dir, runtime }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A directory with these files.
    pub(crate) fn source(&self, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
        let root = self.path(name);
        fs::create_dir(&root).unwrap();
        for (path, content) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    /// Builds `source` with chunks of 64 KiB, in small images more than one, and puts its blob where
    /// all are. Returns the bootstrap.
    pub(crate) fn build(&self, source: &Path, change: impl FnOnce(&mut BuildSpec)) -> (PathBuf, BuildReport) {
        let out = source.with_extension("image");
        let mut spec = building::spec(Source::open(source).unwrap(), &out);
        spec.chunk_size = 1 << 16;
        change(&mut spec);
        let report = build::build(spec, &()).unwrap();
        self.collect(&out);
        (out.join("bootstrap"), report)
    }

    /// An image of these files.
    pub(crate) fn image(&self, name: &str, files: &[(&str, &[u8])]) -> PathBuf {
        self.build(&self.source(name, files), |_| {}).0
    }

    /// Copies the blobs in the output directory `out` to where all are.
    pub(crate) fn collect(&self, out: &Path) {
        let Ok(blobs) = fs::read_dir(out.join("blobs")) else { return };
        for blob in blobs {
            let blob = blob.unwrap();
            fs::copy(blob.path(), self.path("all").join(blob.file_name())).unwrap();
        }
    }

    pub(crate) fn merge(&self, layers: &[&Path], name: &str) -> PathBuf {
        let out = self.path(name);
        let spec = MergeSpec {
            layers: layers.iter().map(|path| layer(path)).collect(),
            parent: None,
            dictionary: None,
            whiteouts: Whiteouts::Oci,
            prefetch: None,
            facts: Vec::new(),
            version: MergeVersion::V6,
            out: out.clone(),
        };
        build::merge(spec, &()).unwrap();
        out
    }

    pub(crate) fn open(&self, bootstrap: &Path) -> Files {
        self.open_with(bootstrap, &self.path("all"))
    }

    /// Opens an image with the blobs in another directory.
    pub(crate) fn open_with(&self, bootstrap: &Path, blobs: &Path) -> Files {
        let source = Arc::new(LocalSource::new(blobs.to_owned()).unwrap());
        Files::open(bootstrap, source, self.runtime.handle().clone()).unwrap()
    }

    pub(crate) fn try_optimize(
        &self,
        bootstrap: &Path,
        hot: &[HotPath],
        out: &Path,
    ) -> Result<OptimizeReport, BuildError> {
        let files = self.open(bootstrap);
        let existing = Existing { name: bootstrap, image: files.image(), chunks: &files };
        build::optimize(&OptimizeSpec { existing, hot, out_dir: out, decrypt: false }, &())
    }

    /// Rewrites an image with a hot blob and puts that where all blobs are.
    pub(crate) fn optimize(&self, bootstrap: &Path, hot: &[HotPath], name: &str) -> (PathBuf, OptimizeReport) {
        let out = self.path(name);
        let report = self.try_optimize(bootstrap, hot, &out).unwrap();
        self.collect(&out);
        assert_sound(&out.join("bootstrap"));
        (out.join("bootstrap"), report)
    }

    pub(crate) fn try_compact(
        &self,
        bootstrap: &Path,
        out: &Path,
        change: impl FnOnce(&mut CompactSpec<'_>),
    ) -> Result<CompactReport, BuildError> {
        let files = self.open(bootstrap);
        let existing = Existing { name: bootstrap, image: files.image(), chunks: &files };
        let mut spec = CompactSpec {
            existing,
            out_dir: out,
            min_used: CompactSpec::DEFAULT_MIN_USED,
            small: CompactSpec::DEFAULT_SMALL,
            target: CompactSpec::DEFAULT_TARGET,
            dictionary: None,
            decrypt: false,
        };
        change(&mut spec);
        build::compact(&spec, &())
    }

    /// Compacts an image and puts the new blobs where all are.
    pub(crate) fn compact(
        &self,
        bootstrap: &Path,
        name: &str,
        change: impl FnOnce(&mut CompactSpec<'_>),
    ) -> (PathBuf, CompactReport) {
        let out = self.path(name);
        let report = self.try_compact(bootstrap, &out, change).unwrap();
        self.collect(&out);
        assert_sound(&out.join("bootstrap"));
        (out.join("bootstrap"), report)
    }

    /// What the kernel shows of an image.
    pub(crate) fn kernel_shows(&self, bootstrap: &Path) -> Vec<listing::Line> {
        let scratch = tempfile::tempdir().unwrap();
        let image = Image::open(bootstrap).unwrap();
        let devices: Vec<PathBuf> = image
            .devices()
            .iter()
            .map(|device| {
                let to = scratch.path().join(device.blob.as_str());
                expand(&self.path("all").join(device.blob.as_str()), &to).unwrap();
                to
            })
            .collect();
        let at = scratch.path().join("mnt");
        fs::create_dir(&at).unwrap();
        let mounted = Mounted::new(bootstrap, &devices, &at).unwrap();
        listing::of(mounted.path()).unwrap()
    }
}

/// Nothing is wrong with a bootstrap, nor odd about it.
#[track_caller]
pub(crate) fn assert_sound(bootstrap: &Path) {
    let report = rafsd::image::check::check(&Image::open(bootstrap).unwrap());
    assert_eq!(report.findings.iter().map(ToString::to_string).collect::<Vec<_>>(), [] as [String; 0]);
}

pub(crate) fn layer(path: &Path) -> Layer {
    Layer { name: path.to_owned(), image: Image::open(path).unwrap(), id: None }
}

/// Whole files or directories.
pub(crate) fn hot(paths: &[&str]) -> Vec<HotPath> {
    paths.iter().map(|path| HotPath { path: path.as_bytes().to_vec(), ranges: Vec::new() }).collect()
}

/// One line for each name of an image, with everything an image keeps of it.
pub(crate) fn shown(files: &Files) -> Vec<String> {
    let image = files.image();
    let mut walk = image.walk();
    let mut lines = Vec::new();
    while let Some(visit) = walk.next_visit() {
        let visit = visit.unwrap();
        let inode = visit.inode;
        let mut xattrs = Vec::new();
        image
            .xattrs(&inode, &mut |xattr| {
                xattrs.push((xattr.name().to_vec(), xattr.value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        // Their order means nothing; other builders have one of their own.
        xattrs.sort();
        let content = match inode.kind {
            Kind::Regular => rafsd::codec::blake3(&content(files, &inode)).to_string(),
            Kind::Symlink => image.symlink(&inode).unwrap().escape_ascii().to_string(),
            _ => String::new(),
        };
        let size = if inode.kind == Kind::Directory { 0 } else { inode.size };
        lines.push(format!(
            "{} {:?} {:o} {}:{} {size} {:?} {} {:?} {xattrs:?} {content}",
            visit.path.join(&b'/').escape_ascii(),
            inode.kind,
            inode.permissions,
            inode.uid,
            inode.gid,
            inode.mtime,
            inode.rdev,
            inode.nlink,
        ));
    }
    lines
}

pub(crate) fn content(files: &Files, inode: &Inode) -> Vec<u8> {
    let mut bytes = Vec::new();
    files.read_into(inode, &mut bytes).unwrap_or_else(|e| panic!("{e}: {:?}", e.get_ref()));
    bytes
}

/// The inode at a path.
pub(crate) fn inode(files: &Files, path: &str) -> Inode {
    let mut walk = files.image().walk();
    while let Some(visit) = walk.next_visit() {
        let visit = visit.unwrap();
        if visit.path.join(&b'/') == path.as_bytes() {
            return visit.inode;
        }
    }
    panic!("no {path}");
}

/// Blob and decoded offset of each chunk of a file.
pub(crate) fn places(files: &Files, path: &str) -> Vec<(String, u64)> {
    let mut places = Vec::new();
    files
        .image()
        .extents(&inode(files, path), &mut |extent| {
            let Extent::Device { device, decoded, .. } = extent else { panic!("{extent:?}") };
            places.push((files.image().devices()[device].blob.to_string(), decoded.start()));
            ControlFlow::Continue(())
        })
        .unwrap();
    places
}

/// Names of files anywhere below a directory.
pub(crate) fn files_below(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_dir() {
            names.extend(files_below(&entry.path()));
        } else {
            names.push(entry.file_name().into_string().unwrap());
        }
    }
    names.sort();
    names
}

/// Bytes that compress to about a third, different for every seed.
pub(crate) fn text(seed: u64, len: usize) -> Vec<u8> {
    Random::new(seed).text(len)
}

/// Overwrites the stored chunks of a blob, and not its tables.
pub(crate) fn destroy_data(blob: &Path, ci_offset: u64) {
    let mut bytes = fs::read(blob).unwrap();
    bytes[..usize::try_from(ci_offset).unwrap()].fill(0x5a);
    fs::write(blob, bytes).unwrap();
}
