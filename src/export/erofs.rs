//! Mounting an image by the kernel's EROFS over files, for every backend that has files to give.
//!
//! The mount is made where nobody can see it. Before it is moved into the tree, a byte that is known to be
//! missing is read through it and must reach us, a watch is put on its superblock, and it is written
//! down for a successor. Whose files they are, and how a read of them reaches us, is not known here.
//!
//! All of that is done by a thread that has the mount for itself, and no descriptor of which somebody waits for
//! the end: at each step the kernel may have to ask this very process, which may be killed then.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mount::MountAttrFlags;

use super::probe::{ColdByte, find_cold};
use super::{Announce, AttachError, Backing, LiveImage, MountWatch, WatchId};
use crate::sys::descriptors::alone_asking;
use crate::sys::mount::{DetachedMount, FsContext, MountError};
use crate::sys::sandbox::Sandbox;

/// Where a mount becomes visible, and who has to know of it before.
#[derive(Clone, Copy)]
pub(super) struct Stage<'a> {
    pub(super) target: &'a Path,
    pub(super) watch: &'a MountWatch,
    pub(super) announce: Announce<'a>,
    pub(super) sandbox: &'a Sandbox,
}

/// Mounts `bootstrap` over `devices`, in the order of the image, visible to nobody.
///
/// # Errors
/// `ENOTBLK` if EROFS takes only block devices here.
pub(super) fn mount(bootstrap: &Path, devices: &[PathBuf]) -> Result<DetachedMount, MountError> {
    let context = FsContext::open("erofs")?;
    context.set_path("source", bootstrap)?;
    for device in devices {
        context.set_path("device", device)?;
    }
    context.mount(MountAttrFlags::empty())
}

/// How an image is mounted, and tried before anybody sees it.
#[derive(Clone, Copy)]
pub(super) struct Making<'a> {
    /// Makes the mount, visible to nobody.
    pub(super) make: &'a (dyn Fn() -> Result<DetachedMount, AttachError> + Sync),
    /// What it opens by a number that this process has.
    pub(super) needs: &'a [BorrowedFd<'a>],
    /// Reads a byte that is missing and tells whether we were asked for it, unless it cannot be tried.
    pub(super) reaches_us: &'a (dyn Fn(&ColdByte, &DetachedMount) -> io::Result<bool> + Sync),
}

/// Mounts `image`, and shows it when a missing byte of each of its devices has been asked of us.
///
/// # Errors
/// Then nobody has seen it, and it is gone.
pub(super) fn publish(making: Making<'_>, image: &LiveImage, stage: Stage<'_>) -> Result<WatchId, AttachError> {
    let cold = find_cold(&image.image, &image.devices).map_err(AttachError::Image)?;
    show(making, &cold, &image.devices, stage)
}

/// The same with nothing to try but `cold`, bytes of `devices`.
pub(super) fn show(
    making: Making<'_>,
    cold: &[ColdByte],
    devices: &[Arc<dyn Backing>],
    stage: Stage<'_>,
) -> Result<WatchId, AttachError> {
    let Stage { target, watch, announce, sandbox } = stage;
    let at_target = |cause| AttachError::Target { target: target.to_owned(), cause };
    let work = |announce: &dyn Fn(WatchId) -> io::Result<()>| {
        let mount = (making.make)()?;
        for cold in cold {
            let path = devices[cold.device].path();
            let untried = |cause| AttachError::Io { path: path.to_owned(), cause };
            if !(making.reaches_us)(cold, &mount).map_err(untried)? {
                return Err(AttachError::Bypassed { path: path.to_owned() });
            }
        }
        let watched = watch.add(&mount).map_err(at_target)?;
        announce(watched).map_err(AttachError::Unkept)?;
        mount.attach(target).map_err(at_target)?;
        Ok(watched)
    };
    let keep: Vec<_> = making.needs.iter().copied().chain([watch.instance().as_fd()]).collect();
    sandbox.outside(|| alone_asking(&keep, announce, work)).map_err(at_target)?
}

/// Finds the settings of an EROFS mount that is being made: the kernel names them by a number of its own,
/// which it tells nobody.
pub(super) struct NewSettings(BTreeSet<OsString>);

const SETTINGS: &str = "/sys/class/bdi";

impl NewSettings {
    /// To be called before the mount is made.
    pub(super) fn before() -> Self {
        Self(Self::names().unwrap_or_default())
    }

    fn names() -> io::Result<BTreeSet<OsString>> {
        let names = fs::read_dir(SETTINGS)?.filter_map(|entry| Some(entry.ok()?.file_name()));
        Ok(names.filter(|name| name.as_encoded_bytes().starts_with(b"erofs-")).collect())
    }

    /// Has the kernel read `kib` ahead in the one mount that was made since. If others were made at the same
    /// time, all keep what they have: it is a matter of speed only.
    pub(super) fn set_read_ahead(&self, kib: u32) -> io::Result<()> {
        let names = Self::names()?;
        let mut new = names.difference(&self.0);
        match (new.next(), new.next()) {
            (Some(name), None) => fs::write(Path::new(SETTINGS).join(name).join("read_ahead_kb"), kib.to_string()),
            _ => Ok(()),
        }
    }
}
