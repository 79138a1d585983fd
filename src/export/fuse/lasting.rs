//! Connections that outlive the process that serves them.
//!
//! A connection lives as long as somebody has its device open, and it is never begun anew: whoever goes on with
//! it must know what was agreed upon, and must see to it that requests which the dead process had taken are
//! answered. [`Lasting`] is the first. The second is up to the kernel from Linux 6.9 on, which sends those
//! requests again; for older ones they are written down in a [`RequestLog`], and replayed as if they had just
//! come. Either way nobody who waits notices more than the wait: all that a connection is asked can be answered
//! twice.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::attach::HANDSHAKE;
use super::connection::Before;
use super::negotiation::{Negotiated, flag};
use super::{Connected, Connection, Fuse, Tree};
use crate::export::{AttachError, WatchId};
use crate::sys::faultpoint;
use crate::sys::files::file_system_of;
use crate::sys::fuse::{DEVICE, Device, Options};
use crate::sys::mount::DetachedMount;
use crate::sys::requestlog::RequestLog;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Backend;

/// What a successor must know of a connection, beside having its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lasting {
    pub agreed: Negotiated,
    /// Device numbers of its file system, major and minor. The minor one names the connection in
    /// `/sys/fs/fuse/connections`.
    pub device: (u32, u32),
}

/// Told of a mount before anybody can see it, so that no mount lives that a successor would not know of: of its
/// superblock, and of its connection if it has one. An error undoes the mount.
pub type AnnounceLasting<'a> = &'a (dyn Fn(WatchId, Option<&Lasting>) -> io::Result<()> + Sync);

/// What has to be kept of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The device. The connection lives as long as somebody has it.
    Device,
    /// The requests that were taken and not answered, where the kernel does not send them again.
    Requests,
    /// The numbers that the kernel knows files of the host by.
    Names,
    /// The directory of the host that is shown.
    Directory,
    /// The slots of a connection over io_uring.
    Slots,
}

/// Who keeps what one connection needs to go on in another process.
pub trait Keep: Send + Sync {
    /// Keeps a part. Returns when it is in good hands.
    fn keep(&self, part: Part, fd: Arc<OwnedFd>) -> io::Result<()>;
}

/// What a dead process left of a connection.
#[derive(Debug)]
pub struct Legacy {
    pub device: OwnedFd,
    pub requests: Option<OwnedFd>,
    pub names: Option<OwnedFd>,
    pub directory: Option<OwnedFd>,
    pub slots: Option<OwnedFd>,
    pub lasting: Lasting,
}

impl Fuse {
    /// Mounts `tree` where no path leads to yet and starts answering. Returns when the kernel and we have shaken
    /// hands and the connection is in the hands of `keep`; not if it is over io_uring, which ends with us.
    ///
    /// On failure the connection has ended here; `keep` still has what it was given.
    pub(super) fn mount_lasting(
        self: &Arc<Self>,
        tree: Arc<dyn Tree>,
        backend: Backend,
        options: Options,
        keep: &dyn Keep,
        sandbox: &Sandbox,
    ) -> Result<(DetachedMount, Connected, Lasting), AttachError> {
        let unusable = |cause| AttachError::Io { path: DEVICE.into(), cause };
        let device = sandbox.outside(Device::open).map_err(unusable)?;
        let mount = sandbox.outside(|| device.mount(options)).map_err(AttachError::Mount)?;
        // Without an anchor nothing of it could be left to another daemon.
        let lanes = self.lanes_for_new().filter(|_| tree.anchor().is_some()).cloned();
        let connected = self.begin(self.connection(device, tree, backend, None, lanes)).map_err(unusable)?;
        match connected.make_lasting(&mount, keep) {
            Ok(lasting) => Ok((mount, connected, lasting)),
            Err(error) => {
                connected.close();
                Err(error)
            }
        }
    }

    /// Goes on with a connection of a process that has certainly died, and with whoever waits for an answer of
    /// it. Waits for no data.
    pub fn go_on(self: &Arc<Self>, legacy: Legacy, tree: Arc<dyn Tree>, backend: Backend) -> io::Result<Connected> {
        let Legacy { device, requests, slots, lasting, .. } = legacy;
        let device = Device::from_fd(device)?;
        let taken = requests.map(RequestLog::take_over).transpose();
        // Not read before what was left is seen to: a request must have somewhere to be written down, and must be
        // known before anything is said of it.
        let connection = self.connection(device, tree, backend, Some(lasting.agreed), None);
        faultpoint::reach("adopting");
        if lasting.agreed.over_io_uring() {
            return self.go_on_over_io_uring(connection, slots, lasting.device);
        }
        if resends(&lasting.agreed) {
            connection.device().resend()?;
            return self.begin(connection);
        }
        match taken {
            Ok(Some((log, left))) => {
                let log = Arc::new(log);
                connection.write_down_in(log.clone());
                for mut left in left {
                    let before = Before { slot: left.slot.take() };
                    connection.handle_contained(&left.bytes, Some(before));
                    log.clear_lane(&left);
                    faultpoint::reach("replayed");
                }
            }
            Ok(None) => {}
            // Of a newer or older release, or damaged.
            Err(error) => {
                tracing::error!(%error, "requests of the last daemon cannot be read: readers that waited then have to be killed");
            }
        }
        self.begin(connection)
    }
}

impl Fuse {
    /// The same over io_uring, with the slots that a predecessor left in peace.
    fn go_on_over_io_uring(
        self: &Arc<Self>,
        connection: Arc<Connection>,
        slots: Option<OwnedFd>,
        numbers: (u32, u32),
    ) -> io::Result<Connected> {
        let lanes = self.lanes().ok_or_else(|| io::Error::other("there are no threads for requests over io_uring"))?;
        let slots = slots.ok_or_else(|| io::Error::other("its slots went with the last daemon"))?;
        let (side, slots) = lanes.take_over(slots)?;
        connection.go_on_over(side);
        connection.set_numbers(numbers);
        let connected = self.begin(connection)?;
        lanes.resume(connected.connection(), slots);
        Ok(connected)
    }
}

impl Connected {
    /// Sees to it that the connection, mounted as `mount`, can go on in another process, and tells how.
    pub(super) fn make_lasting(&self, mount: &impl AsFd, keep: &dyn Keep) -> Result<Lasting, AttachError> {
        let connection = self.connection();
        let agreed = connection.negotiated(HANDSHAKE).map_err(AttachError::Handshake)?;
        if !agreed.over_io_uring() {
            keep.keep(Part::Device, connection.device().held()).map_err(AttachError::Unkept)?;
        }
        if !agreed.over_io_uring() && !resends(&agreed) {
            // Nobody but us has asked anything yet, unless a program has mounted it for us.
            let log = RequestLog::create().map_err(AttachError::Unkept)?;
            let copy = log.as_fd().try_clone_to_owned().map_err(AttachError::Unkept)?;
            keep.keep(Part::Requests, Arc::new(copy)).map_err(AttachError::Unkept)?;
            connection.write_down_in(Arc::new(log));
        }
        let device = file_system_of(mount).map_err(AttachError::Handshake)?;
        connection.set_numbers(device);
        Ok(Lasting { agreed, device })
    }
}

/// Whether the kernel sends requests again that a dead process had taken.
fn resends(agreed: &Negotiated) -> bool {
    agreed.flags & flag::HAS_RESEND != 0 && !faultpoint::pretends("no-resend")
}
