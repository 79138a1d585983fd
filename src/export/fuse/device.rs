//! The devices of an image as files, one for each, for the kernel's EROFS to read.
//!
//! Names, attributes and everything else that people see is the kernel's own; only bytes of files come this
//! way. The file system of the files is mounted where no path leads to, lives in the hands of EROFS alone, and
//! ends with it.
//!
//! EROFS reads the files through the page cache, so what comes this way is in memory twice for a while. Past it
//! (option `directio`) it is not, and whoever reads many small files waits more than twice as long; a page
//! whose reader was killed also stays locked until its request is answered, and with it whoever unmounts and
//! whoever calls `sync` (all seen on 6.18). How far the kernel reads ahead in the files is left as it is: it goes
//! on behind the end of what is read, into what nobody may ever want.
//!
//! What is there whole when the image is mounted does not come this way: EROFS is given the file in the cache
//! itself, for as long as the mount lives. Passing reads on to a file that became complete later is not to be
//! had: EROFS refuses files of a FUSE file system that does so (seen on 6.18).

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attach::READ_AHEAD_KIB;
use super::lasting::{AnnounceLasting, Keep, Lasting, Legacy, Part};
use super::negotiation::MAX_READ;
use super::reply::{Listed, Node, Statistics};
use super::wire::{NodeId, ROOT};
use super::{Anchor, Attachment, Connected, Fuse, Piece, Tree, TreeError, Visit, Wishes};
use crate::base::{BLOCK, ByteRange};
use crate::export::erofs::{self, Making, NewSettings, Stage};
use crate::export::probe::ColdByte;
use crate::export::{AttachError, Backing, LiveImage, MountWatch, WatchId};
use crate::sys::descriptors::alone;
use crate::sys::faultpoint;
use crate::sys::fuse::Options;
use crate::sys::loopdev::LoopDevice;
use crate::sys::mount::{DetachedMount, MountError};
use crate::sys::sandbox::Sandbox;
use crate::telemetry::{Backend, Telemetry};

/// The number of the first device.
const FIRST: NodeId = ROOT + 1;

/// Which way the reads of devices take: for each, whether EROFS reads its file in the cache without us.
#[derive(Clone, Copy, Debug)]
pub struct Over<'a> {
    pub image: &'a LiveImage,
    pub straight: &'a [bool],
}

impl Fuse {
    /// Mounts an image at `target` by EROFS over its devices and starts answering reads of them.
    ///
    /// Blocks while the kernel mounts; [`Fuse::run`] must be running on other threads. On failure nothing stays
    /// behind, but `keep` may have been given something.
    pub fn attach_devices(
        self: &Arc<Self>,
        over: Over<'_>,
        target: &Path,
        (watch, announce): (&MountWatch, AnnounceLasting<'_>),
        keep: &dyn Keep,
        sandbox: &Sandbox,
    ) -> Result<Attachment, AttachError> {
        let Over { image, straight } = over;
        let tree = Arc::new(DeviceTree::new(&image.devices));
        let needs_us = straight.contains(&false);
        let mounted = needs_us.then(|| self.mount_devices(&tree, keep, sandbox)).transpose()?;
        let (files, connected, lasting) = match mounted {
            Some((files, connected, lasting)) => (Some(files), Some(connected), Some(lasting)),
            None => (None, None, None),
        };
        let announce = |watched| announce(watched, lasting.as_ref());
        let stage = Stage { target, watch, announce: &announce, sandbox };
        let paths = paths(&image.devices, straight, files.as_ref());
        let make = || mount_over(&image.bootstrap, &paths);
        let reaches_us = |cold: &ColdByte, mount: &DetachedMount| {
            let seen = cold.reaches_us(mount, |read| tree.expect_read(cold.device, read));
            forget_pages(&paths[cold.device]);
            seen
        };
        let needs: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        match erofs::publish(Making { make: &make, needs: &needs, reaches_us: &reaches_us }, image, stage) {
            Ok(watch) => Ok(Attachment { watch, connected, _devices: image.devices.clone() }),
            Err(error) => {
                connected.into_iter().for_each(Connected::close);
                Err(error)
            }
        }
    }

    /// Mounts the files of devices where no path leads to.
    pub(super) fn mount_devices(
        self: &Arc<Self>,
        tree: &Arc<DeviceTree>,
        keep: &dyn Keep,
        sandbox: &Sandbox,
    ) -> Result<(DetachedMount, Connected, Lasting), AttachError> {
        let options =
            Options { root_mode: libc::S_IFDIR | 0o500, allow_other: false, max_read: MAX_READ, is_foreign: false };
        self.mount_lasting(tree.clone(), Backend::FuseDevice, options, keep, sandbox)
    }

    /// Goes on with an image that a dead process had mounted, and with its readers. `watch` reports the end of
    /// the superblock. Without a `legacy` nobody has to ask us.
    pub fn adopt_devices(
        self: &Arc<Self>,
        image: &LiveImage,
        watch: WatchId,
        legacy: Option<Legacy>,
    ) -> io::Result<Attachment> {
        let tree = || Arc::new(DeviceTree::new(&image.devices));
        let connected = legacy.map(|legacy| self.go_on(legacy, tree(), Backend::FuseDevice)).transpose()?;
        Ok(Attachment { watch, connected, _devices: image.devices.clone() })
    }
}

/// What EROFS is to read: files of the file system `files`, or those of the cache where they are read
/// `straight`. For a thread that has the former open.
pub(super) fn paths(devices: &[Arc<dyn Backing>], straight: &[bool], files: Option<&DetachedMount>) -> Vec<PathBuf> {
    let served = |files: &DetachedMount, number: usize| {
        PathBuf::from(format!("/proc/thread-self/fd/{}/{number}", files.as_fd().as_raw_fd()))
    };
    let path = |(number, (device, straight)): (usize, (&Arc<dyn Backing>, &bool))| match files {
        Some(files) if !straight => served(files, number),
        _ => device.path().to_owned(),
    };
    devices.iter().zip(straight).enumerate().map(path).collect()
}

/// Mounts EROFS over files, or over loop devices where it takes nothing else.
pub(super) fn mount_over(bootstrap: &Path, paths: &[PathBuf]) -> Result<DetachedMount, AttachError> {
    let settings = NewSettings::before();
    let mounted = match erofs::mount(bootstrap, paths) {
        Ok(mount) if !faultpoint::pretends("no-file-backed") => Ok(mount),
        Err(error) if error.cause.raw_os_error() != Some(libc::ENOTBLK) => Err(AttachError::Mount(error)),
        _ => mount_by_loop(bootstrap, paths),
    };
    if let Err(error) = settings.set_read_ahead(READ_AHEAD_KIB) {
        tracing::debug!(%error, "the read-ahead of a mount stays as it is");
    }
    mounted
}

/// Drops what the trial has left: see [`ColdByte::read`].
fn forget_pages(path: &Path) {
    let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
    let forgotten = File::open(path).and_then(|file| Ok(nix::fcntl::posix_fadvise(&file, 0, 0, advice)?));
    if let Err(error) = forgotten {
        tracing::debug!(path = %path.display(), %error, "pages of a trial stay");
    }
}

/// For kernels whose EROFS takes only block devices.
fn mount_by_loop(bootstrap: &Path, paths: &[PathBuf]) -> Result<DetachedMount, AttachError> {
    let over = |path: &Path| {
        File::open(path).and_then(LoopDevice::over).map_err(|cause| {
            let step = format!("a loop device over {}", path.display());
            AttachError::Mount(MountError { step, log: Vec::new(), cause })
        })
    };
    // They go with the mount: each takes itself away when nobody has it open any more.
    let first = over(bootstrap)?;
    let others = paths.iter().map(|path| over(path)).collect::<Result<Vec<_>, _>>()?;
    let paths: Vec<_> = others.iter().map(|device| device.path().to_owned()).collect();
    erofs::mount(first.path(), &paths).map_err(AttachError::Mount)
}

/// Why a device could not be served for a trial.
#[derive(Debug)]
pub(in crate::export) enum TryError {
    Serve(io::Error),
    Attach(AttachError),
}

/// Nobody goes on with the connection of a trial.
struct Nobody;

impl Keep for Nobody {
    fn keep(&self, _: Part, _: Arc<OwnedFd>) -> io::Result<()> {
        Ok(())
    }
}

/// Serves `device` for a moment and mounts EROFS over it where nobody sees it. Tells what `read` finds, and
/// whether `fail` fails while reads are refused.
pub(in crate::export) fn try_device<T: Send>(
    bootstrap: &Path,
    device: Arc<dyn Backing>,
    read: &(dyn Fn(&DetachedMount) -> T + Sync),
    fail: &(dyn Fn(&DetachedMount) -> io::Result<()> + Sync),
) -> Result<(T, bool), TryError> {
    let server = Fuse::new(Telemetry::default()).map_err(TryError::Serve)?;
    let serving = server.clone();
    let thread = std::thread::Builder::new().name("fuse-try".to_owned()).spawn(move || serving.run());
    let thread = thread.map_err(TryError::Serve)?;
    let devices = [device];
    let tree = Arc::new(DeviceTree::new(&devices));
    let outcome = server.mount_devices(&tree, &Nobody, &Sandbox::off()).and_then(|(files, connected, _)| {
        let paths = paths(&devices, &[false], Some(&files));
        let tried = || {
            let mount = mount_over(bootstrap, &paths)?;
            Ok((read(&mount), tree.expect_read(0, || fail(&mount))))
        };
        let unusable = |cause| AttachError::Io { path: bootstrap.to_owned(), cause };
        // As images are mounted, and for the same reason.
        let outcome = alone(&[files.as_fd()], tried).map_err(unusable);
        connected.close();
        outcome?
    });
    server.stop();
    // A thread that fails is heard of by the reads that it did not answer.
    let _ = thread.join();
    outcome.map_err(TryError::Attach)
}

/// A directory with one file for each device, called by its place in the image.
pub(super) struct DeviceTree {
    devices: Vec<Exported>,
}

struct Exported {
    backing: Arc<dyn Backing>,
    /// Set while this process itself reads a cold byte to see whether it is asked for it.
    probing: AtomicBool,
    probe_seen: AtomicBool,
}

impl DeviceTree {
    pub(super) fn new(devices: &[Arc<dyn Backing>]) -> Self {
        let exported = |backing: &Arc<dyn Backing>| Exported {
            backing: backing.clone(),
            probing: AtomicBool::new(false),
            probe_seen: AtomicBool::new(false),
        };
        Self { devices: devices.iter().map(exported).collect() }
    }

    fn device(&self, id: NodeId) -> Result<&Exported, TreeError> {
        let number = id.checked_sub(FIRST).and_then(|number| usize::try_from(number).ok());
        number.and_then(|number| self.devices.get(number)).ok_or(match id {
            ROOT => TreeError::IsADirectory,
            _ => TreeError::NoNode,
        })
    }

    fn ensure_directory(&self, id: NodeId) -> Result<(), TreeError> {
        if id == ROOT { Ok(()) } else { self.device(id).and(Err(TreeError::NotADirectory)) }
    }

    /// Runs `read`, a read of a cold byte of a device by this very process, and tells whether we were asked for
    /// it. It is refused, so nothing is fetched.
    fn expect_read(&self, device: usize, read: impl FnOnce() -> io::Result<()>) -> bool {
        let Exported { backing, probing, probe_seen } = &self.devices[device];
        probe_seen.store(false, Ordering::Release);
        probing.store(true, Ordering::Release);
        let result = read();
        probing.store(false, Ordering::Release);
        let seen = probe_seen.load(Ordering::Acquire) && result.is_err();
        // Settled in between: what is read straight is no cold byte.
        seen || backing.is_settled()
    }
}

impl Tree for DeviceTree {
    fn wishes(&self) -> Wishes {
        Wishes::default()
    }

    fn find(&self, parent: NodeId, name: &[u8]) -> Result<Option<Node>, TreeError> {
        self.ensure_directory(parent)?;
        let number = std::str::from_utf8(name).ok().and_then(|name| name.parse::<u64>().ok());
        // One name each: "07" and "+7" are none.
        let number = number.filter(|number| number.to_string().as_bytes() == name);
        let id = number.and_then(|number| number.checked_add(FIRST));
        Ok(id.and_then(|id| self.node(id).ok()))
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        let (mode, nlink, size) = match id {
            ROOT => (libc::S_IFDIR | 0o500, 2, 0),
            _ => (libc::S_IFREG | 0o400, 1, self.device(id)?.backing.decoded_len()),
        };
        Ok(Node::ours(id, id, (mode, nlink), size))
    }

    fn link(&self, id: NodeId) -> Result<Cow<'_, [u8]>, TreeError> {
        Err(self.node(id).err().unwrap_or(TreeError::OtherKind))
    }

    fn list(&self, id: NodeId, from: u64, with_nodes: bool, visit: &mut Visit<'_>) -> Result<(), TreeError> {
        self.ensure_directory(id)?;
        let names = (FIRST..).zip(0..self.devices.len()).map(|(id, number)| (id, number.to_string()));
        let all = [(ROOT, ".".to_owned()), (ROOT, "..".to_owned())].into_iter().chain(names);
        for ((ino, name), place) in all.zip(1..).skip(usize::try_from(from).unwrap_or(usize::MAX)) {
            let kind = if ino == ROOT { libc::DT_DIR } else { libc::DT_REG };
            let node = (with_nodes && ino != ROOT).then(|| self.node(ino)).transpose()?;
            let listed = Listed { ino, kind, name: name.as_bytes(), next: place };
            if visit(&listed, node.as_ref()) == ControlFlow::Break(()) {
                break;
            }
        }
        Ok(())
    }

    fn pieces(&self, id: NodeId, range: ByteRange, visit: &mut dyn FnMut(Piece<'_>)) -> Result<(), TreeError> {
        let Exported { backing, probing, probe_seen } = self.device(id)?;
        if probing.load(Ordering::Acquire) {
            probe_seen.store(true, Ordering::Release);
            return Err(TreeError::Probed);
        }
        let end = range.end().min(backing.decoded_len());
        if let Some(inside) = ByteRange::new(range.start(), end).filter(|inside| !inside.is_empty()) {
            visit(Piece::Device(backing, inside));
        }
        Ok(())
    }

    fn xattr(&self, _: NodeId, _: &[u8]) -> Result<Cow<'_, [u8]>, TreeError> {
        Err(TreeError::NoXattrs)
    }

    fn xattrs(&self, _: NodeId, _: bool) -> Result<Vec<u8>, TreeError> {
        Err(TreeError::NoXattrs)
    }

    fn anchor(&self) -> Option<Anchor> {
        // EROFS has those open that it reads through us.
        Some(Anchor::Open(FIRST..FIRST + self.devices.len() as u64))
    }

    fn statistics(&self) -> Statistics {
        let bytes = self.devices.iter().map(|device| device.backing.decoded_len()).sum::<u64>();
        Statistics {
            block_size: u32::try_from(BLOCK).expect("4096"),
            blocks: bytes.div_ceil(BLOCK),
            files: self.devices.len() as u64,
        }
    }
}
