//! Images that a tool reads: found, opened, and read on a runtime of their own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::image::Image;
use crate::net::{ClientOptions, RetryPolicy};
use crate::reader::Files;
use crate::source::{self, BlobSource};
use crate::sys;

/// Where the blobs of an image are.
#[derive(Debug, clap::Args)]
pub(super) struct BlobsArgs {
    /// Where the blobs are: a directory, or the http(s) URL below which each has its id as name;
    /// if not given, blobs/ beside the image, or else the directory that the image is in
    ///
    /// Secrets in a URL, such as a password or a signature, can be seen in the process list by
    /// every user of this host while this command runs.
    #[arg(long, value_name = "DIR|URL")]
    blobs: Option<String>,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// An image with its blobs. Not for use inside a runtime: its reads block.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) files: Files,
    /// Outlives the files, which fetch on it.
    _runtime: tokio::runtime::Runtime,
}

impl BlobsArgs {
    /// Opens the image at `bootstrap` and the tables of its blobs.
    pub(super) fn open(&self, bootstrap: &Path) -> anyhow::Result<Opened> {
        let runtime = runtime()?;
        let files = Files::open(bootstrap, self.source(bootstrap)?, runtime.handle().clone())?;
        Ok(Opened { files, _runtime: runtime })
    }

    /// Fails if a file that is about to be written is one that is about to be read.
    pub(super) fn refuse_input(&self, place: &Path, bootstrap: &Path, image: &Image) -> anyhow::Result<()> {
        let Ok(place_id) = sys::files::inode_id_at(place) else { return Ok(()) };
        let blobs = match &self.blobs {
            Some(spec) if spec.contains("://") => None,
            Some(spec) => Some(PathBuf::from(spec)),
            None => Some(beside(bootstrap)),
        };
        let blobs = blobs.iter().flat_map(|dir| image.devices().iter().map(|device| dir.join(device.blob.as_str())));
        for input in blobs.chain([bootstrap.to_owned()]) {
            if sys::files::inode_id_at(&input).is_ok_and(|id| id == place_id) {
                anyhow::bail!("{} is a part of the image that is read; write somewhere else", place.display());
            }
        }
        Ok(())
    }

    /// Where the blobs of the image at `bootstrap` are.
    pub(super) fn source(&self, bootstrap: &Path) -> Result<Arc<dyn BlobSource>, source::OpenError> {
        let mut options = ClientOptions::default();
        options.extra_ca_pem.extend(self.ca.clone());
        match &self.blobs {
            Some(spec) => source::open(spec, &options, RetryPolicy::default()),
            None => Ok(Arc::new(source::LocalSource::new(beside(bootstrap))?)),
        }
    }
}

/// What reads of blobs run on.
pub(super) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// Where the blobs of an image are if nobody says otherwise.
fn beside(bootstrap: &Path) -> PathBuf {
    let directory = bootstrap.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let blobs = directory.join("blobs");
    if blobs.is_dir() { blobs } else { directory.to_owned() }
}
