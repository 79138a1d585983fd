use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rafsd::reader::{Files, OpenError};
use rafsd::source::LocalSource;
use tempfile::TempDir;
use tokio::runtime::{Handle, Runtime};

use crate::support::{building, tree};

/// A directory for one test, and a runtime to read images on.
pub(crate) struct Fixture {
    pub dir: TempDir,
    runtime: Runtime,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        Self { dir: tempfile::tempdir().unwrap(), runtime }
    }

    pub(crate) fn runtime(&self) -> &Handle {
        self.runtime.handle()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The awkward tree, at `source`.
    pub(crate) fn tree(&self) -> PathBuf {
        let source = self.path("source");
        fs::create_dir(&source).unwrap();
        tree::make(&source, 1).unwrap();
        source
    }

    /// Builds `source` as the image `name` and opens it.
    pub(crate) fn image(&self, source: &Path, name: &str) -> Files {
        building::build(source, &self.path(name)).unwrap();
        self.open(&self.path(name)).unwrap()
    }

    /// Opens the image in the directory `image`, laid out as builds do.
    pub(crate) fn open(&self, image: &Path) -> Result<Files, OpenError> {
        let source = Arc::new(LocalSource::new(image.join("blobs")).unwrap());
        Files::open(&image.join("bootstrap"), source, self.runtime.handle().clone())
    }
}

/// Why a test that sets owners and makes devices cannot run here.
pub(crate) fn unable_to_own() -> Option<&'static str> {
    if rustix::process::geteuid().is_root() { None } else { Some("not root") }
}

/// Names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
