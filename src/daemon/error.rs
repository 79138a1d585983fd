use std::io;
use std::path::PathBuf;

use super::api::SpecError;
use crate::base::BlobId;
use crate::blob::TablesError;
use crate::cache::{StockError, StoreError};
use crate::export::AttachError;
use crate::export::fuse::BlobfsError;
use crate::image::{ImageError, OpenError as ImageOpenError};
use crate::oci::OciError;
use crate::reader::tarfile::TarFileError;
use crate::reader::{LoadError, MapError, ReachError};
use crate::source::OpenError;

/// Why a request could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("cannot start {what}")]
    Start {
        what: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Bootstrap(ImageOpenError),
    #[error(transparent)]
    Load(LoadError),
    #[error(transparent)]
    Tables(TablesError),
    #[error(transparent)]
    Map(MapError),
    #[error(transparent)]
    TarFile(#[from] TarFileError),
    #[error(transparent)]
    Reach(#[from] ReachError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Oci(Box<OciError>),
    #[error("cannot learn where {reference} leads now; --offline mounts what it led to the last time")]
    Unresolved {
        reference: String,
        #[source]
        cause: Box<OciError>,
    },
    #[error("others have been waiting for the same image for too long; its registry does not answer them")]
    Crowded,
    #[error(transparent)]
    SourceSpec(OpenError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Stock(#[from] StockError),
    #[error(transparent)]
    Attach(#[from] AttachError),
    #[error("no backend can serve on this host: {reasons}; `rafsd doctor` tells more")]
    NoBackend { reasons: String },
    #[error("{} is not an existing directory named by an absolute path", .0.display())]
    NotADirectory(PathBuf),
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    #[error("no credentials were given for {0}; `rafsd credentials list` lists those that were")]
    NoCredentials(String),
    #[error("a registry is named HOST[:PORT], and repositories by the beginning of their names")]
    NotARegistry,
    #[error("this cannot be a login: {0}")]
    BadLogin(&'static str),
    #[error("there is no pull {0}, or it ended a while ago")]
    NoPull(u64),
    #[error("there are too many pulls under way; wait for one")]
    TooManyPulls,
    #[error("an image is mounted at {} already", .0.display())]
    Mounted(PathBuf),
    #[error("something else is mounted over the image at {}; unmount that first", .0.display())]
    Covered(PathBuf),
    #[error("{} is where this daemon keeps its own files, or leads there; mount at another place", .0.display())]
    OwnPlace(PathBuf),
    #[error("another daemon could not use the settings: {0}")]
    Settings(String),
    #[error("no image of this daemon is mounted at {}", .0.display())]
    NotMounted(PathBuf),
    #[error("another image in domain {domain} promises other bytes for blob {blob}; use another domain")]
    Contradiction { blob: BlobId, domain: String },
    #[error("{0:?} names no mounted image; `rafsd list` shows them")]
    NoImage(String),
    #[error("{0:?} begins the names of several mounted images; give more digits, or the mount point")]
    SeveralImages(String),
    #[error("an image is named either by its mount point or by its digest")]
    NoTarget,
    #[error("several images are served at {}; name one by its digest", .0.display())]
    SeveralAt(PathBuf),
    #[error("it must be said whose blobs are to be shown")]
    NoImages,
    #[error("{} cannot be shown with blobs in it", source_dir.display())]
    Blobfs {
        source_dir: PathBuf,
        #[source]
        cause: BlobfsError,
    },
    #[error("the images promise different bytes for blob {0}; mount them apart")]
    BlobTwice(BlobId),
    #[error("the kernel does not have blob {0} open")]
    NotOpen(BlobId),
    #[error("there are too many prefetches for {} under way; cancel them, or wait", .0.display())]
    TooManyPrefetches(PathBuf),
    #[error("reads of {} are being recorded already; `rafsd trace stop` ends that", .0.display())]
    Traced(PathBuf),
    #[error("no reads of {} are being recorded", .0.display())]
    NotTraced(PathBuf),
    #[error("there are too many traces; stop one first")]
    TooManyTraces,
    #[error("the image is damaged")]
    Image(#[source] ImageError),
    #[error("there is no prefetch {0}, or it ended a while ago")]
    NoPrefetch(u64),
    #[error("no image is registered as {0}")]
    NotRegistered(String),
    #[error("cannot unmount {}{}", dir.display(), busy(cause))]
    Unmount {
        dir: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the record of an image that the last daemon left is unusable: {what}")]
    Record { what: String },
    #[error(
        "this daemon's keepers start no successor: who started it has to restart it, as by `systemctl restart rafsd`; with keep_mounts readers do not notice"
    )]
    NoSuccessor,
    #[error("the daemon is stopping")]
    Stopping,
    #[error("whoever asked for it has gone")]
    Abandoned,
}

impl From<OciError> for DaemonError {
    fn from(error: OciError) -> Self {
        Self::Oci(Box::new(error))
    }
}

fn busy(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EBUSY) => ": files on it are open; stop what uses them, or take it out of the tree with --lazy",
        _ => "",
    }
}
