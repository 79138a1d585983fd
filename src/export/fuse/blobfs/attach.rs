//! From a directory and images to a mount, and on from there in another process.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use super::names::Names;
use super::tree::BlobTree;
use crate::export::fuse::attach::{ask_ahead, show};
use crate::export::fuse::negotiation::MAX_READ;
use crate::export::fuse::{AnnounceLasting, Attachment, Fuse, Keep, Legacy, Part};
use crate::export::{AttachError, LiveImage, MountWatch, WatchId};
use crate::sys::beneath::Beneath;
use crate::sys::files::file_system;
use crate::sys::fuse::Options;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Backend;

/// What is shown.
#[derive(Clone, Debug)]
pub struct Blobfs<'a> {
    pub images: &'a [LiveImage],
    /// Where in the tree their blobs are: a name in its root; the root itself if `None`.
    pub blob_dir: Option<&'a str>,
}

/// Why a directory cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum BlobfsError {
    #[error("it cannot be used{}", remedy(cause))]
    Open {
        #[source]
        cause: io::Error,
    },
    #[error("it lies on {file_system}, which may need this very daemon to be read; show a directory on a disk")]
    NeedsUs { file_system: String },
    #[error("{name:?} is no name of a directory in it")]
    Name { name: String },
    #[error("{name:?} in it is something else than a directory")]
    NotADirectory { name: String },
}

fn remedy(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EACCES) => " (with `sandbox_read`, it must lie in one of those directories)",
        Some(libc::ENOSYS) => " (this needs Linux 5.6)",
        _ => "",
    }
}

/// The directory of the host, once it is clear that it can be shown.
#[derive(Clone, Debug)]
pub struct Place(Beneath);

impl Place {
    /// The directory `dir`, to be shown with blobs in `blob_dir`.
    ///
    /// # Errors
    /// If it cannot be read, or would have to be read through this daemon.
    pub fn open(dir: &Path, blob_dir: Option<&str>) -> Result<Self, BlobfsError> {
        let unusable = |cause: rustix::io::Errno| BlobfsError::Open { cause: cause.into() };
        let host = Beneath::open(dir).map_err(unusable)?;
        let root = host.itself().map_err(unusable)?;
        // As it will have to be, by threads that may do less than this one.
        root.list(0, &mut |_| std::ops::ControlFlow::Break(())).map_err(unusable)?;
        let file_system = file_system(host.held()).map_err(|cause| BlobfsError::Open { cause })?;
        if file_system == "fuse" || file_system == "erofs" {
            return Err(BlobfsError::NeedsUs { file_system });
        }
        if let Some(name) = blob_dir {
            let is_name = !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']) && name.len() <= 255;
            if !is_name {
                return Err(BlobfsError::Name { name: name.to_owned() });
            }
            if root.child(name.as_bytes()).is_ok_and(|found| !found.facts().is(libc::S_IFDIR)) {
                return Err(BlobfsError::NotADirectory { name: name.to_owned() });
            }
        }
        Ok(Self(host))
    }
}

impl Fuse {
    /// Mounts `place` at `target`, with blobs in it, and starts answering.
    ///
    /// Blocks while the kernel mounts; [`Fuse::run`] must be running on other threads. On failure nothing stays
    /// behind, but `keep` may have been given something.
    pub fn attach_blobfs(
        self: &Arc<Self>,
        (place, what): (&Place, &Blobfs<'_>),
        target: &Path,
        (watch, announce): (&MountWatch, AnnounceLasting<'_>),
        keep: &dyn Keep,
        sandbox: &Sandbox,
    ) -> Result<Attachment, AttachError> {
        let names = Names::create().map_err(AttachError::Unkept)?;
        let held = names.held().map_err(AttachError::Unkept)?;
        keep.keep(Part::Names, Arc::new(held)).map_err(AttachError::Unkept)?;
        keep.keep(Part::Directory, place.0.held()).map_err(AttachError::Unkept)?;
        let tree = BlobTree::new(place.0.clone(), names, what.images, what.blob_dir);
        let tree = Arc::new(tree.map_err(|cause| AttachError::Io { path: target.to_owned(), cause })?);
        let root_mode = tree.root_mode().map_err(AttachError::Tree)?;
        let options = Options { root_mode, allow_other: true, max_read: MAX_READ, is_foreign: true };
        let mounted = self.mount_lasting(tree.clone(), Backend::Blobfs, options, keep, sandbox)?;
        open_once(&tree, &mounted.0, sandbox);
        show(mounted, target, devices(what.images), (watch, announce), sandbox)
    }

    /// Goes on with a tree that a dead process had mounted, and with whoever waits there. `watch` reports the
    /// end of the superblock.
    ///
    /// # Errors
    /// `InvalidData` if what that process has left is not enough.
    pub fn adopt_blobfs(
        self: &Arc<Self>,
        what: &Blobfs<'_>,
        watch: WatchId,
        mut legacy: Legacy,
    ) -> io::Result<Attachment> {
        let lost = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("the keepers do not have {what}"));
        let names = legacy.names.take().ok_or_else(|| lost("the names that the kernel knows"))?;
        let host = legacy.directory.take().ok_or_else(|| lost("the directory"))?;
        let tree = BlobTree::new(Beneath::from_fd(host), Names::take_over(names)?, what.images, what.blob_dir)?;
        let connected = self.go_on(legacy, Arc::new(tree), Backend::Blobfs)?;
        Ok(Attachment { watch, connected: Some(connected), _devices: devices(what.images) })
    }
}

fn devices(images: &[LiveImage]) -> Vec<Arc<dyn crate::export::Backing>> {
    images.iter().flat_map(|image| image.devices.iter().cloned()).collect()
}

/// Opens and closes a file of ours, so that the kernel learns that closings need no asking. Else the first process
/// that closes one waits for us, and that may be a copy of one which is about to become our successor.
fn open_once(tree: &BlobTree, root: &impl AsFd, sandbox: &Sandbox) {
    ask_ahead(root, tree.some_blob(), sandbox);
}
