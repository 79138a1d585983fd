//! Images whose devices lie in files of the store: mounting them by the backend that reads the files, and going
//! on with them.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::api::{MountRequest, TransportReport};
use super::connections::{Connections, Kept};
use super::prepare::Prepared;
use super::records::{DeviceFile, Record, RecordId};
use super::served::{Attachment, Mounted, Served, live};
use super::{Daemon, DaemonError};
use crate::blob::UnitMap;
use crate::cache::Device;
use crate::export::fuse::{Lasting, Over};
use crate::export::{BackendKind, LiveImage, WatchId};

impl Daemon {
    /// Mounts by a backend that reads the device files of the store.
    pub(super) fn mount_stored(
        &self,
        kind: BackendKind,
        request: &MountRequest,
        mut prepared: Prepared,
        why: String,
        record: RecordId,
    ) -> Result<Mounted, DaemonError> {
        let devices = self.devices_of(&mut prepared)?;
        let image = live(kind, &prepared, &devices);
        if let Some(output) = &request.trace {
            // Before any mark, so that complete blobs get one too.
            self.traces.start(&request.dir, &prepared.image, &devices, Some(output.clone()), Vec::new())?;
        }
        let mut served = Served::stored(kind, Arc::new(prepared), &devices, why);
        if kind == BackendKind::FuseDevice {
            served.straight = image.devices.iter().map(|device| device.is_settled()).collect();
        }
        let announce = |watch, fuse: Option<&Lasting>| {
            let known = served.record(&request.image, Some(&request.dir), Some(watch));
            self.records.write(record, &Record { fuse: fuse.copied(), ..known })
        };
        let (dir, watch, sandbox) = (&request.dir, &self.watch, &self.options.sandbox);
        let keep = Kept { keepers: &self.keepers, record };
        let (watch, attachment) = match kind {
            BackendKind::Cachefiles | BackendKind::Blobfs => unreachable!("they are mounted another way"),
            BackendKind::Fanotify => {
                let service = self.backends.fanotify(&self.keepers)?;
                let attachment = service.attach(&image, dir, watch, &|watch| announce(watch, None), sandbox)?;
                (attachment.watch, Attachment::Fanotify(attachment))
            }
            BackendKind::FuseDevice => {
                let over = Over { image: &image, straight: &served.straight };
                let service = self.backends.fuse()?;
                let attachment = service.attach_devices(over, dir, (watch, &announce), &keep, sandbox)?;
                (attachment.watch, Attachment::Fuse(attachment))
            }
            BackendKind::FuseTree => {
                let service = self.backends.fuse()?;
                let attachment = service.attach(&image, dir, (watch, &announce), &keep, sandbox)?;
                (attachment.watch, Attachment::Fuse(attachment))
            }
        };
        served.transport = self.transport_of(&attachment);
        Ok(Mounted { watch, record, served, further: Vec::new(), attachment })
    }

    /// The devices of an image, shared with all that agree with it.
    pub(super) fn devices_of(&self, prepared: &mut Prepared) -> Result<Vec<Arc<Device>>, DaemonError> {
        let device = |map: &Arc<UnitMap>| self.store.device(map.clone(), prepared.source.clone());
        let devices = prepared.maps.iter().map(device).collect::<Result<Vec<_>, _>>()?;
        // One copy of each map, whatever the number of images that share it.
        let own = std::mem::replace(&mut prepared.maps, devices.iter().map(|device| device.map()).collect());
        self.remember(prepared, own);
        Ok(devices)
    }

    /// The devices of a dead daemon's image. `open` gives the file of each.
    pub(super) fn adopt_stored(
        &self,
        record: &Record,
        mut image: Prepared,
        open: &dyn Fn(&DeviceFile) -> Result<OwnedFd, DaemonError>,
    ) -> Result<(Served, Vec<Arc<Device>>), DaemonError> {
        let adopt = |it: &DeviceFile| -> Result<Arc<Device>, DaemonError> {
            Ok(self.store.adopt(&it.directory, File::from(open(it)?), image.source.clone())?)
        };
        let devices = record.devices.iter().map(adopt).collect::<Result<Vec<_>, _>>()?;
        if devices.len() != image.image.devices().len() {
            return Err(DaemonError::Record { what: "it names other devices than the image has".to_owned() });
        }
        image.maps = devices.iter().map(|device| device.map()).collect();
        let mut served = Served::stored(record.backend, Arc::new(image), &devices, record.why.clone());
        served.straight.clone_from(&record.straight);
        Ok((served, devices))
    }

    /// How the requests of a mount come, if that is a question.
    pub(super) fn transport_of(&self, attachment: &Attachment) -> Option<TransportReport> {
        let Attachment::Fuse(attachment) = attachment else { return None };
        let (used, why) = attachment.transport()?;
        let why = why.map_or_else(|| self.backends.why_transport(used), ToOwned::to_owned);
        Some(TransportReport { used, why })
    }

    /// Goes on with a mount over a FUSE connection, if the keepers still have that.
    pub(super) fn adopt_connection(
        &self,
        (id, record): (RecordId, &Record),
        image: &LiveImage,
        watch: WatchId,
        connections: &mut Connections,
    ) -> Result<Attachment, DaemonError> {
        let damaged = |what: &str| DaemonError::Record { what: what.to_owned() };
        let legacy = connections.take(id, record);
        if record.fuse.is_some() && legacy.is_none() {
            return Err(damaged("its FUSE connection went with the last daemon; unmount it and mount it again"));
        }
        let over_io_uring = legacy.as_ref().is_some_and(|legacy| legacy.lasting.agreed.over_io_uring());
        let service = if over_io_uring { self.backends.fuse_with_lanes() } else { self.backends.fuse() };
        // Whoever waits there must not wait for somebody who never comes.
        let service = service.inspect_err(|_| self.release_connection(id))?;
        let attached = match (record.backend, legacy) {
            (BackendKind::FuseTree, Some(legacy)) => service.adopt(image, watch, legacy),
            (BackendKind::FuseTree, None) => return Err(damaged("no connection")),
            (_, legacy) => service.adopt_devices(image, watch, legacy),
        };
        let attached = attached.inspect_err(|_| self.release_connection(id));
        if over_io_uring {
            // From now on it ends with us again.
            self.release_connection(id);
        }
        attached.map(Attachment::Fuse).map_err(|cause| DaemonError::Start { what: "a FUSE connection", cause })
    }
}
