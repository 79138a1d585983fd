//! Kernels: how a cold read reaches us and how the answer goes back.
//!
//! A backend holds one kernel descriptor and serves many images through it. It knows devices only
//! as [`Fill`]: no compression, no digest, no network. Four backends exist:
//!
//! * [`fanotify`]: the device files themselves are what EROFS reads; pre-content events tell us
//!   before a range is read (Linux 6.14 and later).
//! * [`cachefiles`]: the kernel keeps the cache and asks for what it misses (Linux 5.19 to 7.1).
//! * [`fuse`]: files of devices, which EROFS reads through us (Linux 6.12 and later); or we answer every question about the tree ourselves (Linux 5.4 and later, and users who may not
//!   mount).
//!
//! [`host`] finds out by trying which of them this machine can do.

pub mod cachefiles;
mod erofs;
pub mod fanotify;
pub mod fuse;
pub mod host;
mod limiter;
mod probe;
mod pulse;
mod selftest;
mod watch;

pub use watch::{MountWatch, WatchId};

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::cache::{Device, DeviceOfImage, Fill};
use crate::image::Image;
use crate::sys::files::InodeId;
use crate::sys::fuse::FusermountError;
use crate::sys::mount::MountError;

/// Which way cold reads take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// Pre-content events over file-backed EROFS.
    Fanotify,
    /// EROFS over the kernel's own cache, in on-demand mode.
    Cachefiles,
    /// EROFS over files of a FUSE file system that only EROFS sees.
    FuseDevice,
    /// A FUSE file system that shows the image's tree.
    FuseTree,
    /// A FUSE file system that shows a directory of the host with the image's blobs in it, for others to mount.
    Blobfs,
}

impl BackendKind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fanotify, Self::Cachefiles, Self::FuseDevice, Self::FuseTree, Self::Blobfs];
}

impl std::fmt::Display for BackendKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fanotify => "fanotify",
            Self::Cachefiles => "cachefiles",
            Self::FuseDevice => "fuse-device",
            Self::FuseTree => "fuse-tree",
            Self::Blobfs => "blobfs",
        })
    }
}

/// A device whose decoded bytes live in a file that the kernel reads.
pub trait Backing: Fill {
    /// The file. Its length is the device's length from the start; missing parts are holes.
    fn path(&self) -> &Path;

    /// The same, open since before anybody could mark it, so that nothing done through it raises an
    /// event.
    fn file(&self) -> Arc<File>;

    /// Whether every byte an image can ask for is in the file and synced, and nobody wants to know what
    /// is read: the kernel can read it without us from now on.
    fn is_settled(&self) -> bool;

    /// Calls `then` once when [`Backing::is_settled`] becomes true, or at once if it is.
    fn when_settled(&self, then: Box<dyn FnOnce() + Send>);
}

impl Backing for Device {
    fn path(&self) -> &Path {
        self.data_path().expect("a device of a store has a file of its own")
    }

    fn file(&self) -> Arc<File> {
        self.data_file().expect("a device of a store has a file of its own").clone()
    }

    fn is_settled(&self) -> bool {
        self.is_settled()
    }

    fn when_settled(&self, then: Box<dyn FnOnce() + Send>) {
        self.on_complete(then);
    }
}

impl Backing for DeviceOfImage {
    fn path(&self) -> &Path {
        Backing::path(&**self.device())
    }

    fn file(&self) -> Arc<File> {
        Backing::file(&**self.device())
    }

    fn is_settled(&self) -> bool {
        self.device().is_settled()
    }

    fn when_settled(&self, then: Box<dyn FnOnce() + Send>) {
        self.device().on_complete(then);
    }
}

/// Told of a mount before anybody can see it, so that no mount lives that a successor would not
/// know of. An error undoes the mount.
pub type Announce<'a> = &'a (dyn Fn(WatchId) -> io::Result<()> + Sync);

/// Who keeps the files of marked devices for a successor.
pub trait Custody: Send + Sync {
    /// A file is about to be marked.
    fn hold(&self, id: InodeId, file: &Arc<File>) -> io::Result<()>;

    /// It is not marked any more, and no mount reads it.
    fn release(&self, id: InodeId);
}

/// An image whose devices are ready to be served.
pub struct LiveImage {
    /// The parsed bootstrap.
    pub image: Arc<Image>,
    /// The bootstrap as a complete, synced, unmarked file that nobody writes any more.
    pub bootstrap: PathBuf,
    /// One device per entry of [`Image::devices`], in the same order.
    pub devices: Vec<Arc<dyn Backing>>,
}

impl std::fmt::Debug for LiveImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LiveImage").field("bootstrap", &self.bootstrap).finish_non_exhaustive()
    }
}

/// Why an image could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The kernel would not ask us before reading this file.
    #[error("cannot mark {}{}", path.display(), remedy_for_mark(cause))]
    Mark {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The kernel refused the file system.
    #[error("the kernel refused the image")]
    Mount(#[source] MountError),
    /// The mount point is not usable.
    #[error("cannot mount at {}", target.display())]
    Target {
        target: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// A device file or the mount could not be used.
    #[error("cannot use {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// The image turned out damaged while a cold byte was looked for.
    #[error("the image is damaged")]
    Image(#[source] crate::image::ImageError),
    /// The mount reads its device behind our back: holes would be read as zeros.
    #[error("reads of {} raise no events, so missing data would be read as zeros; the mount was undone", path.display())]
    Bypassed { path: PathBuf },
    /// The root of the tree makes no sense.
    #[error("the tree cannot be served")]
    Tree(#[source] fuse::TreeError),
    /// The kernel did not take up the connection.
    #[error("the kernel and this program found no common FUSE protocol")]
    Handshake(#[source] io::Error),
    /// The program that mounts for users did not.
    #[error("a mount without privilege failed")]
    Fusermount(#[source] FusermountError),
    /// Nobody would look after the readers if this process died.
    #[error("the mount cannot be written down for a successor")]
    Unkept(#[source] io::Error),
    /// A name that the kernel would mishandle.
    #[error("{name:?} cannot name an image: {rule}")]
    Name { name: String, rule: &'static str },
    /// The name is taken by another image.
    #[error("the name {0:?} is in use by another image")]
    Taken(String),
}

fn remedy_for_mark(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EOPNOTSUPP) => " (put the cache on ext4, XFS or btrfs)",
        Some(libc::EINVAL) => " (pre-content events need Linux 6.14 or later)",
        _ => "",
    }
}
