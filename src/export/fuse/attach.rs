//! From a tree to a mount: by the calls of the kernel for who may, by `fusermount3` for who may not.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::negotiation::MAX_READ;
use super::tree::ImageTree;
use super::{Connected, Fuse, Tree};
use crate::export::{Announce, AttachError, LiveImage, MountWatch, WatchId};
use crate::sys::fuse::{Device, FusermountError, Options, find_fusermount, mount_by, unmount_by};
use crate::sys::mount::{DetachedMount, MountError};
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Backend;

/// How long the kernel may take to shake hands, in which it waits for nobody but us.
const HANDSHAKE: Duration = Duration::from_secs(20);

/// Read-ahead of a mount, in KiB. The kernel's 128 would also limit each request of a sequential reader: 961
/// requests for 120 MiB instead of 121 (seen on 6.18).
const READ_AHEAD_KIB: u32 = 1024;

/// A mounted tree. Keeps its connection read until it is released.
#[derive(Debug)]
pub struct Attachment {
    /// Reports the end of the superblock.
    pub watch: WatchId,
    connected: Connected,
}

impl Attachment {
    /// Lets go of the connection. When the superblock is gone, or to end it for its users.
    pub fn release(self) {
        self.connected.close();
    }

    /// The connection.
    pub fn connected(&self) -> &Connected {
        &self.connected
    }
}

impl Fuse {
    /// Mounts the tree of `image` at `target` and starts answering.
    ///
    /// Blocks while the kernel mounts; [`Fuse::run`] must be running on other threads. Whoever may not mount
    /// does so by `fusermount3`. On failure nothing stays behind.
    pub fn attach(
        self: &Arc<Self>,
        image: &LiveImage,
        target: &Path,
        watch: &MountWatch,
        announce: Announce<'_>,
        sandbox: &Sandbox,
    ) -> Result<Attachment, AttachError> {
        let tree = Arc::new(ImageTree::new(image));
        let root_mode = tree.root_mode().map_err(AttachError::Tree)?;
        let options = Options { root_mode, allow_other: true, max_read: MAX_READ };
        let (mount, connected) = match self.mount(tree.clone(), Backend::FuseTree, options, sandbox) {
            Ok(mounted) => mounted,
            Err(AttachError::Mount(error)) if is_forbidden(&error) => {
                return match find_fusermount() {
                    Some(program) => self.attach_by(&program, tree, options, target, (watch, announce, sandbox)),
                    None => Err(AttachError::Mount(error)),
                };
            }
            Err(error) => return Err(error),
        };
        let finish = || {
            let watched = watch.add(&mount).map_err(at(target))?;
            announce(watched).map_err(AttachError::Unkept)?;
            sandbox.outside(|| mount.attach(target)).map_err(at(target))?;
            Ok(watched)
        };
        match finish() {
            Ok(watch) => Ok(Attachment { watch, connected }),
            Err(error) => {
                connected.close();
                Err(error)
            }
        }
    }

    /// Mounts `tree` where no path leads to yet, and starts answering. Returns when the kernel and we have
    /// shaken hands.
    pub(crate) fn mount(
        self: &Arc<Self>,
        tree: Arc<dyn Tree>,
        backend: Backend,
        options: Options,
        sandbox: &Sandbox,
    ) -> Result<(DetachedMount, Connected), AttachError> {
        let device = |cause| AttachError::Io { path: crate::sys::fuse::DEVICE.into(), cause };
        let (opened, mount) = sandbox.outside(|| {
            let opened = Device::open().map_err(device)?;
            let mount = opened.mount(options).map_err(AttachError::Mount)?;
            Ok((opened, mount))
        })?;
        let connected = self.connect(opened, tree, backend, None).map_err(device)?;
        // Dropping the mount ends the connection.
        connected.connection().negotiated(HANDSHAKE).map_err(AttachError::Handshake)?;
        widen_read_ahead(&mount, sandbox);
        Ok((mount, connected))
    }

    /// The same for who may not mount: `program` does it at `target` at once.
    fn attach_by(
        self: &Arc<Self>,
        program: &Path,
        tree: Arc<ImageTree>,
        options: Options,
        target: &Path,
        (watch, announce, sandbox): (&MountWatch, Announce<'_>, &Sandbox),
    ) -> Result<Attachment, AttachError> {
        // That others may look in is for the host's administrator to allow, in a file of the program's.
        let options = Options { allow_other: false, ..options };
        let refused = AttachError::Fusermount;
        let device = sandbox.outside(|| mount_by(program, target, options)).map_err(refused)?;
        let undo = || sandbox.outside(|| unmount_by(program, target, true));
        let connect = || self.connect(device, tree, Backend::FuseTree, None).map_err(at(target));
        let connected = connect().inspect_err(|_| drop(undo()))?;
        let finish = || {
            connected.connection().negotiated(HANDSHAKE).map_err(AttachError::Handshake)?;
            let root = File::open(target).map_err(at(target))?;
            widen_read_ahead(&root, sandbox);
            let watched = watch.add(&root).map_err(at(target))?;
            announce(watched).map_err(AttachError::Unkept)?;
            Ok(watched)
        };
        match finish() {
            Ok(watch) => Ok(Attachment { watch, connected }),
            Err(error) => {
                let _ = undo();
                connected.close();
                Err(error)
            }
        }
    }
}

/// Unmounts what is at `target` for who may not: by the program that mounted it.
///
/// # Errors
/// `None` if there is no such program.
pub fn unmount_unprivileged(target: &Path, lazy: bool) -> Option<Result<(), FusermountError>> {
    find_fusermount().map(|program: PathBuf| unmount_by(&program, target, lazy))
}

fn at(target: &Path) -> impl Fn(io::Error) -> AttachError + Copy {
    move |cause| AttachError::Target { target: target.to_owned(), cause }
}

/// Whether it is the caller who may not mount.
fn is_forbidden(error: &MountError) -> bool {
    matches!(error.cause.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

/// Has the kernel read further ahead. Where that is forbidden, sequential reads are slower.
fn widen_read_ahead(mount: &impl AsFd, sandbox: &Sandbox) {
    let widen = || {
        let device = nix::sys::stat::fstat(mount)?.st_dev;
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        sandbox.outside(|| std::fs::write(path, READ_AHEAD_KIB.to_string()))
    };
    if let Err(error) = widen() {
        tracing::debug!(%error, "the read-ahead of a mount stays as it is");
    }
}
