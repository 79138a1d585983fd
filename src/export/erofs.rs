//! Mounting an image by the kernel's EROFS over files, for every backend that has files to give.
//!
//! The mount is made where nobody can see it. Before it is moved into the tree, a byte that is known to be
//! missing is read through it and must reach us, a watch is put on its superblock, and it is written
//! down for a successor. Whose files they are, and how a read of them reaches us, is not known here.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use super::probe::{ColdByte, find_cold};
use super::{Announce, AttachError, LiveImage, MountWatch, WatchId};
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

/// Makes `mount` visible. `reaches_us` reads a byte that is missing and tells whether we were asked for it.
///
/// # Errors
/// Then nobody has seen it, and it goes when it is dropped.
pub(super) fn publish(
    mount: DetachedMount,
    image: &LiveImage,
    stage: Stage<'_>,
    reaches_us: &dyn Fn(&ColdByte, &DetachedMount) -> bool,
) -> Result<WatchId, AttachError> {
    for cold in find_cold(&image.image, &image.devices).map_err(AttachError::Image)? {
        if !reaches_us(&cold, &mount) {
            return Err(AttachError::Bypassed { path: image.devices[cold.device].path().to_owned() });
        }
    }
    let watched = stage.watch.add(&mount);
    let watched = watched.map_err(|cause| AttachError::Io { path: image.bootstrap.clone(), cause })?;
    (stage.announce)(watched).map_err(AttachError::Unkept)?;
    let attached = stage.sandbox.outside(|| mount.attach(stage.target));
    attached.map_err(|cause| AttachError::Target { target: stage.target.to_owned(), cause })?;
    Ok(watched)
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
