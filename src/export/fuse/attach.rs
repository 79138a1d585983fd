//! From a tree to a mount: by the calls of the kernel for who may, by `fusermount3` for who may not.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use super::negotiation::MAX_READ;
use super::tree::{ImageTree, first_file};
use super::{AnnounceLasting, Connected, Connection, Fuse, Keep, Lasting, Legacy, Transport};
use crate::export::{AttachError, Backing, LiveImage, MountWatch, WatchId};
use crate::image::Image;
use crate::sys::descriptors::alone;
use crate::sys::files::file_system_of;
use crate::sys::fuse::{FusermountError, Options, find_fusermount, mount_by, unmount_by};
use crate::sys::mount::{DetachedMount, MountError};
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Backend;

/// How long the kernel may take to shake hands, in which it waits for nobody but us.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(20);

/// Read-ahead of a mount, in KiB. The kernel's 128 would also limit each request of a sequential reader: 961
/// requests for 120 MiB instead of 121 (seen on 6.18).
pub(super) const READ_AHEAD_KIB: u32 = 1024;

/// A mounted tree. Keeps its connection read until it is released.
pub struct Attachment {
    /// Reports the end of the superblock.
    pub watch: WatchId,
    /// `None` if the kernel reads everything without us.
    pub(super) connected: Option<Connected>,
    /// Alive as long as the mount, whether it is read through us or not.
    pub(super) _devices: Vec<Arc<dyn Backing>>,
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment")
            .field("watch", &self.watch)
            .field("connected", &self.connected)
            .finish_non_exhaustive()
    }
}

impl Attachment {
    /// The connection through which it is read, if there is one.
    pub fn connection(&self) -> Option<&Arc<Connection>> {
        self.connected.as_ref().map(Connected::connection)
    }

    /// How requests come, and why this way, where that needs saying; `None` if there are none.
    pub fn transport(&self) -> Option<(Transport, Option<&'static str>)> {
        self.connected.as_ref().map(Connected::transport)
    }

    /// Lets go of the connection. When the superblock is gone, or to end it for its users.
    pub fn release(self) {
        if let Some(connected) = self.connected {
            connected.close();
        }
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
        (watch, announce): (&MountWatch, AnnounceLasting<'_>),
        keep: &dyn Keep,
        sandbox: &Sandbox,
    ) -> Result<Attachment, AttachError> {
        let tree = Arc::new(ImageTree::new(image));
        let root_mode = tree.root_mode().map_err(AttachError::Tree)?;
        let options = Options { root_mode, allow_other: true, max_read: MAX_READ, is_foreign: false };
        let mounted = self.mount_lasting(tree.clone(), Backend::FuseTree, options, keep, sandbox);
        let (mount, connected, lasting) = match mounted {
            Ok(mounted) => mounted,
            Err(error) => {
                return match find_fusermount().filter(|_| is_forbidden(&error)) {
                    Some(program) => {
                        self.attach_by(&program, image, (options, target), (watch, announce), (keep, sandbox))
                    }
                    None => Err(error),
                };
            }
        };
        widen_read_ahead(&mount, sandbox);
        open_once(&image.image, &mount, sandbox);
        show((mount, connected, lasting), target, image.devices.clone(), (watch, announce), sandbox)
    }

    /// Goes on with a tree that a dead process had mounted, and with whoever waits there. `watch` reports the
    /// end of the superblock.
    pub fn adopt(self: &Arc<Self>, image: &LiveImage, watch: WatchId, legacy: Legacy) -> io::Result<Attachment> {
        let connected = self.go_on(legacy, Arc::new(ImageTree::new(image)), Backend::FuseTree)?;
        Ok(Attachment { watch, connected: Some(connected), _devices: image.devices.clone() })
    }

    /// Mounts for who may not: `program` does it, at `target` at once.
    fn attach_by(
        self: &Arc<Self>,
        program: &Path,
        image: &LiveImage,
        (options, target): (Options, &Path),
        (watch, announce): (&MountWatch, AnnounceLasting<'_>),
        (keep, sandbox): (&dyn Keep, &Sandbox),
    ) -> Result<Attachment, AttachError> {
        // That others may look in is for the host's administrator to allow, in a file of the program's.
        let options = Options { allow_other: false, ..options };
        let refused = AttachError::Fusermount;
        let device = sandbox.outside(|| mount_by(program, target, options)).map_err(refused)?;
        let undo = || sandbox.outside(|| unmount_by(program, target, true));
        let tree = Arc::new(ImageTree::new(image));
        let connect = || self.connect(device, tree, Backend::FuseTree).map_err(at(target));
        let connected = connect().inspect_err(|_| drop(undo()))?;
        let finish = || {
            let root = sandbox.outside(|| open_root(target)).map_err(at(target))?;
            let lasting = connected.make_lasting(&root, keep)?;
            widen_read_ahead(&root, sandbox);
            open_once(&image.image, &root, sandbox);
            let watched = watch.add(&root).map_err(at(target))?;
            announce(watched, Some(&lasting)).map_err(AttachError::Unkept)?;
            Ok(watched)
        };
        match finish() {
            Ok(watch) => Ok(Attachment { watch, connected: Some(connected), _devices: image.devices.clone() }),
            Err(error) => {
                let _ = undo();
                connected.close();
                Err(error)
            }
        }
    }
}

/// Puts a mount where a path leads to, once it is watched and announced. On failure its connection has ended.
pub(super) fn show(
    (mount, connected, lasting): (DetachedMount, Connected, Lasting),
    target: &Path,
    devices: Vec<Arc<dyn Backing>>,
    (watch, announce): (&MountWatch, AnnounceLasting<'_>),
    sandbox: &Sandbox,
) -> Result<Attachment, AttachError> {
    let finish = || {
        let watched = watch.add(&mount).map_err(at(target))?;
        announce(watched, Some(&lasting)).map_err(AttachError::Unkept)?;
        let root = [mount.as_fd()];
        sandbox.outside(|| alone(&root, || mount.attach(target))?).map_err(at(target))?;
        Ok(watched)
    };
    match finish() {
        Ok(watch) => Ok(Attachment { watch, connected: Some(connected), _devices: devices }),
        Err(error) => {
            connected.close();
            Err(error)
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
fn is_forbidden(error: &AttachError) -> bool {
    let AttachError::Mount(MountError { cause, .. }) = error else { return false };
    matches!(cause.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

/// Opens and closes a file of the mount whose root is `root`, so that the kernel learns that we need not be
/// asked about either; and has it ask about the root, on which a watch is put.
///
/// Else the first process that closes a file waits for us, and that may be a copy of one which is about to
/// become our successor (seen on 6.18). Where no file can be opened the kernel learns it later.
fn open_once(image: &Image, root: &impl AsFd, sandbox: &Sandbox) {
    ask_ahead(root, first_file(image).map(|(_, path)| path), sandbox);
}

/// Has the kernel ask for all that it wants to know of the root before a process may use it, and of the opening of the
/// regular file `path`, on a thread that may wait for an answer for ever.
pub(super) fn ask_ahead(root: &impl AsFd, path: Option<Vec<u8>>, sandbox: &Sandbox) {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = root.as_fd();
    let ask = || -> nix::Result<()> {
        fstat(root)?;
        path.map_or(Ok(()), |path| openat(root, OsStr::from_bytes(&path), flags, Mode::empty()).map(drop))
    };
    match sandbox.outside(|| alone(&[root], ask)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "nothing was asked ahead"),
        Err(error) => tracing::debug!(%error, "nothing was asked ahead"),
    }
}

/// Opens the root of what was mounted at `target`, once the kernel has asked all that it wants to know for that.
fn open_root(target: &Path) -> io::Result<File> {
    alone(&[], || File::open(target).map(drop))??;
    File::open(target)
}

/// Has the kernel read further ahead. Where that is forbidden, sequential reads are slower.
fn widen_read_ahead(mount: &impl AsFd, sandbox: &Sandbox) {
    let widen = || {
        let (major, minor) = file_system_of(mount)?;
        let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
        sandbox.outside(|| std::fs::write(path, READ_AHEAD_KIB.to_string()))
    };
    if let Err(error) = widen() {
        tracing::debug!(%error, "the read-ahead of a mount stays as it is");
    }
}
