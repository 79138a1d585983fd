//! One served image: what keeps it served, and what is told about it.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use super::api::{DeviceReport, ImageReport};
use super::objects::Object;
use super::prepare::Prepared;
use crate::blob::UnitMap;
use crate::cache::{Device, Engine, Fill};
use crate::export::cachefiles::{ObjectSpec, Registration};
use crate::export::{BackendKind, WatchId, fanotify};

/// What keeps a mounted image served.
#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) watch: WatchId,
    pub(super) served: Served,
    /// Absent for the cachefiles backend, whose registration is in `served`.
    pub(super) attachment: Option<fanotify::Attachment>,
}

impl Mounted {
    /// Lets go of everything, after the superblock has gone.
    pub(super) fn release(self) {
        if let Some(attachment) = self.attachment {
            attachment.release();
        }
    }
}

/// One served image: what is told about it.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) backend: BackendKind,
    /// Why this backend.
    pub(super) why: String,
    pub(super) prepared: Arc<Prepared>,
    pub(super) devices: Vec<Live>,
    /// For the cachefiles backend: keeps the image's names known.
    pub(super) registration: Option<Arc<Registration>>,
}

/// The device behind a blob: there from the start with fanotify, from the first read on with
/// cachefiles.
#[derive(Clone, Debug)]
pub(super) enum Live {
    Stored(Weak<Device>),
    Object(Arc<Object>),
}

impl Live {
    pub(super) fn device(&self) -> Option<Arc<Device>> {
        match self {
            Self::Stored(device) => device.upgrade(),
            Self::Object(object) => object.device(),
        }
    }
}

impl Served {
    /// What is told about it, mounted at `dir` if anywhere.
    pub(super) fn report(&self, dir: Option<&PathBuf>) -> ImageReport {
        let prepared = &self.prepared;
        let device = |(map, live): (&UnitMap, &Live)| DeviceReport {
            blob: map.blob().to_string(),
            decoded_bytes: map.decoded_len(),
            stored_bytes: map.units().iter().map(|unit| unit.stored.end()).max().unwrap_or(0),
            stats: live.device().map(|device| device.stats()),
        };
        ImageReport {
            dir: dir.cloned(),
            backend: self.backend,
            why: self.why.clone(),
            image: prepared.key.to_string(),
            bootstrap_bytes: prepared.image.summary().bootstrap_len,
            source: prepared.source.describe(),
            mount_options: self.registration.as_ref().map(|registration| registration.name().mount_options()),
            devices: prepared.maps.iter().zip(&self.devices).map(device).collect(),
        }
    }
}

impl ImageReport {
    /// Whether the kernel can read all of it without us.
    pub fn is_complete(&self) -> bool {
        self.devices.iter().all(|device| device.stats.is_some_and(|stats| stats.complete))
    }
}

/// An object of the kernel's cache of `size` bytes.
pub(super) fn blob_object(object: Arc<Object>, size: u64, engine: &Arc<Engine>, eager: bool) -> ObjectSpec {
    let engine = engine.clone();
    ObjectSpec {
        size,
        open: Box::new(move |sink, present| {
            let (map, source) = object.known();
            let device = Device::with_sink(map, source, sink, present, engine.clone());
            object.opened(&device);
            if eager {
                device.complete_in_background();
            }
            device as Arc<dyn Fill>
        }),
    }
}
