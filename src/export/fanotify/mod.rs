//! Serving by pre-content events over file-backed EROFS mounts.
//!
//! The device file in the cache *is* the device that EROFS reads: nothing is copied. Four orders
//! keep it right, and the types of this folder hold them:
//!
//! * our write descriptor is opened **before** the mark, or our own writes would raise events
//!   that we wait for ourselves (the store opens it; [`Fanotify::attach`] takes ready devices);
//! * the mark comes **before** the mount, or the mount's reads are never seen;
//! * a mark goes only when its device is settled or the **superblock** is gone, not merely
//!   unmounted: [`Attachment::release`] is to be called when [`MountWatch`] says so, and nothing
//!   else takes a mark away, not even a panic;
//! * before anybody can see the mount, a cold byte is read through it and must raise an event.
//!
//! What was taken from the kernel and not answered is written down in a [journal](crate::sys::journal), so that
//! [`Fanotify::resume`] can go on in the place of a process that died.
//!
//! Inodes are marked, never mounts or file systems, and nothing is ever written through the
//! descriptor of an event.

mod permission;
mod resume;
#[cfg(all(test, feature = "shuttle"))]
mod schedules;
mod service;

pub use service::Fanotify;

use std::path::Path;
use std::sync::Arc;

use self::service::MarkHold;
use super::erofs::{self, Making, Stage};
use super::probe::ColdByte;
use super::{Announce, AttachError, Backing, LiveImage, MountWatch, WatchId};
use crate::sys::files::InodeId;
use crate::sys::mount::DetachedMount;
use crate::sys::sandbox::Sandbox;

/// A mounted image. Keeps its devices marked until it is released.
#[derive(Debug)]
pub struct Attachment {
    /// Reports the end of the superblock.
    pub watch: WatchId,
    marks: Vec<MarkHold>,
}

impl Attachment {
    /// Lets go of the devices. Only when the superblock is gone; see [`MountWatch`].
    ///
    /// Dropping an attachment leaves the marks: readers then wait instead of seeing holes.
    pub fn release(self) {
        self.marks.into_iter().for_each(MarkHold::release);
    }
}

/// A device that no image is known for, and that something reads. Keeps it marked until it is released.
#[derive(Debug)]
pub struct Caretaking(MarkHold);

impl Caretaking {
    /// Lets go of the device. Only when nothing reads it any more.
    ///
    /// Dropping it leaves the mark, as with an [`Attachment`].
    pub fn release(self) {
        self.0.release();
    }
}

impl Fanotify {
    /// Mounts `image` at `target` and starts answering its reads.
    ///
    /// Blocks while the kernel mounts; [`Fanotify::run`] must be running on another thread. What
    /// a confined thread may not do is done outside of `sandbox`. On failure nothing stays behind.
    pub fn attach(
        self: &Arc<Self>,
        image: &LiveImage,
        target: &Path,
        watch: &MountWatch,
        announce: Announce<'_>,
        sandbox: &Sandbox,
    ) -> Result<Attachment, AttachError> {
        let _alone = self.attaching.lock().unwrap();
        let mut marks = Vec::new();
        match self.attach_marked(image, Stage { target, watch, announce, sandbox }, &mut marks) {
            Ok(watch) => Ok(Attachment { watch, marks }),
            Err(error) => {
                // The mount went before anybody could see it.
                marks.into_iter().for_each(MarkHold::release);
                Err(error)
            }
        }
    }

    /// Goes on with an image that a dead process had mounted: makes sure that its devices are marked,
    /// as they are as long as the group lives. `watch` reports the end of the superblock.
    pub fn adopt(self: &Arc<Self>, image: &LiveImage, watch: WatchId) -> Result<Attachment, AttachError> {
        let mut marks = Vec::new();
        for device in &image.devices {
            // On failure the marks made so far stay: readers are denied rather than shown holes.
            marks.push(self.mark(device)?);
        }
        Ok(Attachment { watch, marks })
    }

    /// Answers for a device that a dead process had marked, of an image that cannot be adopted.
    pub fn take_care_of(self: &Arc<Self>, device: &Arc<dyn Backing>) -> Result<Caretaking, AttachError> {
        self.mark(device).map(Caretaking)
    }

    /// The same for one that an image brings which is known, beyond the end of that.
    pub fn share_care_of(self: &Arc<Self>, id: InodeId) -> Option<Caretaking> {
        self.share(id).map(Caretaking)
    }

    fn attach_marked(
        self: &Arc<Self>,
        image: &LiveImage,
        stage: Stage<'_>,
        marks: &mut Vec<MarkHold>,
    ) -> Result<WatchId, AttachError> {
        for device in &image.devices {
            marks.push(self.mark(device)?);
        }
        let devices: Vec<_> = image.devices.iter().map(|device| device.path().to_owned()).collect();
        let make = || erofs::mount(&image.bootstrap, &devices).map_err(AttachError::Mount);
        let marks = &*marks;
        let reaches_us = |cold: &ColdByte, mount: &DetachedMount| {
            cold.reaches_us(mount, |read| marks[cold.device].expect_own_read(read))
        };
        erofs::publish(Making { make: &make, needs: &[], reaches_us: &reaches_us }, image, stage)
    }
}
