//! One served image: what keeps it served, and what is told about it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::api::observe::ImageState;
use super::api::{DeviceReport, ImageReport, ImageSpec, TransportReport};
use super::objects::Object;
use super::observe::source_reports;
use super::prepare::Prepared;
use super::records::{CacheName, DeviceFile, Record, RecordId};
use crate::base::ByteRange;
use crate::blob::UnitMap;
use crate::cache::{Device, DeviceOfImage, Engine, Fill, ImageUse};
use crate::export::cachefiles::{ObjectSpec, Registration};
use crate::export::{BackendKind, Backing, LiveImage, WatchId, fanotify, fuse};
use crate::sys::files::inode_id;
use crate::telemetry::Telemetry;

/// What keeps a mounted image served.
#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) watch: WatchId,
    /// What a successor would read of it.
    pub(super) record: RecordId,
    pub(super) served: Served,
    /// Images that are served in the same mount.
    pub(super) further: Vec<Served>,
    pub(super) attachment: Attachment,
}

/// What a backend keeps for a mount.
#[derive(Debug)]
pub(super) enum Attachment {
    Fanotify(fanotify::Attachment),
    /// Nothing: the registration is in what is served.
    Cachefiles,
    Fuse(fuse::Attachment),
}

impl Mounted {
    /// All images that are served in it.
    pub(super) fn all(&self) -> impl Iterator<Item = &Served> {
        std::iter::once(&self.served).chain(&self.further)
    }

    /// Lets go of everything, after the superblock has gone.
    pub(super) fn release(self) {
        match self.attachment {
            Attachment::Fanotify(attachment) => attachment.release(),
            Attachment::Cachefiles => {}
            Attachment::Fuse(attachment) => attachment.release(),
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
    /// Has readers of its devices be under its limits, among others'.
    pub(super) _uses: Vec<Arc<ImageUse>>,
    /// For the cachefiles backend: keeps the image's names known.
    pub(super) registration: Option<Arc<Registration>>,
    /// For devices over FUSE: of each, whether the kernel reads its file without asking, as decided at the mount.
    pub(super) straight: Vec<bool>,
    /// The directory that is shown with its blobs in it, if it is not the image itself that is mounted.
    pub(super) shows: Option<PathBuf>,
    /// How requests of FUSE come, if any do.
    pub(super) transport: Option<TransportReport>,
}

/// The device behind a blob: there from the start with fanotify, from the first read on with
/// cachefiles.
#[derive(Clone, Debug)]
pub(super) enum Live {
    Stored(Weak<Device>),
    Object(Arc<Object>),
}

impl Live {
    /// The device, if there is one now.
    pub(super) fn device(&self) -> Option<Arc<Device>> {
        match self {
            Self::Stored(device) => device.upgrade(),
            Self::Object(object) => object.device(),
        }
    }
}

impl Served {
    /// An image whose devices lie in the store, served by `backend`.
    pub(super) fn stored(backend: BackendKind, prepared: Arc<Prepared>, devices: &[Arc<Device>], why: String) -> Self {
        let uses = devices.iter().map(|device| Arc::new(device.used_by(prepared.limits_key()))).collect();
        let devices = devices.iter().map(|device| Live::Stored(Arc::downgrade(device))).collect();
        let straight = Vec::new();
        Self {
            backend,
            why,
            prepared,
            devices,
            _uses: uses,
            registration: None,
            straight,
            shows: None,
            transport: None,
        }
    }

    /// Its devices that lie in the store.
    pub(super) fn stored_devices(&self) -> Vec<Arc<Device>> {
        let stored = self.devices.iter().filter_map(|live| match live {
            Live::Stored(device) => device.upgrade(),
            Live::Object(_) => None,
        });
        stored.collect()
    }

    /// What a successor must know of it.
    pub(super) fn record(&self, spec: &ImageSpec, dir: Option<&Path>, watch: Option<WatchId>) -> Record {
        let files = self.stored_devices().into_iter().filter_map(|device| {
            let file = inode_id(device.data_file()?).ok()?;
            Some(DeviceFile::new(device.directory()?.to_owned(), file))
        });
        let name = self.registration.as_ref().map(|registration| registration.name());
        Record {
            dir: dir.map(Path::to_owned),
            superblock: watch.map(Into::into),
            lingering: false,
            backend: self.backend,
            why: self.why.clone(),
            spec: spec.clone(),
            key: self.prepared.key.to_string(),
            devices: files.collect(),
            name: name.map(|name| CacheName { id: name.id.clone(), domain: name.domain.clone() }),
            fuse: None,
            straight: self.straight.clone(),
            manifest: self.prepared.named.as_ref().map(|named| named.manifest.to_string()),
            blobfs: None,
        }
    }

    /// What is told about it, mounted at `dir` if anywhere. Looks at every unit.
    pub(super) fn report(&self, dir: Option<&PathBuf>, telemetry: &Telemetry) -> ImageReport {
        let prepared = &self.prepared;
        let mut sources = vec![prepared.source.describe()];
        let mut device = |(map, live): (&Arc<UnitMap>, &Live)| {
            let device = live.device();
            let health = device.as_ref().map(|device| device.health());
            for source in health.iter().flat_map(|health| &health.sources) {
                if !sources.contains(source) {
                    sources.push(source.clone());
                }
            }
            DeviceReport {
                blob: map.blob().to_string(),
                decoded_bytes: map.decoded_len(),
                stored_bytes: map.units().iter().map(|unit| unit.stored.end()).max().unwrap_or(0),
                stats: device.map(|device| device.stats()),
                health: health.map(Into::into),
            }
        };
        let devices = prepared.maps.iter().zip(&self.devices).map(&mut device).collect();
        ImageReport {
            dir: dir.cloned(),
            shows: self.shows.clone(),
            backend: self.backend,
            why: self.why.clone(),
            transport: self.transport.clone(),
            state: self.state(),
            image: prepared.key.to_string(),
            reference: prepared.named.as_ref().map(|named| named.reference.clone()),
            manifest: prepared.named.as_ref().map(|named| named.manifest.to_string()),
            unconfirmed: prepared.named.as_ref().and_then(|named| named.unconfirmed.clone()),
            bootstrap_bytes: prepared.image.summary().bootstrap_len,
            source: prepared.source.describe(),
            sources: source_reports(sources, telemetry),
            mount_options: self.registration.as_ref().map(|registration| registration.name().mount_options()),
            devices,
        }
    }

    /// The devices that somebody has open.
    pub(super) fn open_devices(&self) -> impl Iterator<Item = Arc<Device>> {
        self.devices.iter().filter_map(Live::device)
    }

    /// Whether it needs the daemon, and whether that works.
    pub(super) fn state(&self) -> ImageState {
        if self.is_complete() {
            ImageState::Complete
        } else if self.open_devices().any(|device| device.is_failing()) {
            ImageState::Degraded
        } else {
            ImageState::Lazy
        }
    }

    /// Whether its readers need the daemon, or may.
    pub(super) fn needs_us(&self) -> bool {
        match self.backend {
            BackendKind::Fanotify | BackendKind::Cachefiles => !self.is_complete(),
            BackendKind::FuseDevice => self.straight.contains(&false),
            BackendKind::FuseTree | BackendKind::Blobfs => true,
        }
    }

    /// Whether all of it is here.
    pub(super) fn is_complete(&self) -> bool {
        self.devices.iter().all(|live| live.device().is_some_and(|device| device.is_complete_durable()))
    }

    /// Since when the first of its waiting readers has waited.
    pub(super) fn oldest_wait(&self) -> Option<Instant> {
        self.open_devices().filter_map(|device| device.waiting().1).min()
    }
}

impl ImageReport {
    /// Whether all of it is here.
    pub fn is_complete(&self) -> bool {
        self.devices.iter().all(|device| device.stats.is_some_and(|stats| stats.complete))
    }
}

/// The image over these devices, as `backend` mounts it. A connection of FUSE is one mount's, so that it is known whose
/// readers ask; of the files in a directory of blobs, and of what the kernel asks about files in the cache, it is not.
pub(super) fn live(backend: BackendKind, prepared: &Prepared, devices: &[Arc<Device>]) -> LiveImage {
    let mut live = prepared.live(devices);
    match backend {
        BackendKind::FuseDevice | BackendKind::FuseTree => {
            let key = prepared.limits_key();
            let of_image = |device: &Arc<Device>| Arc::new(DeviceOfImage::new(device.clone(), key)) as Arc<dyn Backing>;
            live.devices = devices.iter().map(of_image).collect();
        }
        BackendKind::Fanotify | BackendKind::Cachefiles | BackendKind::Blobfs => {}
    }
    live
}

/// An object of the kernel's cache of `size` bytes.
///
/// Once the kernel reads it, `wants` are fetched, in order, and then all of it if it is `eager`.
pub(super) fn blob_object(
    object: Arc<Object>,
    size: u64,
    engine: &Arc<Engine>,
    wants: Vec<ByteRange>,
    eager: bool,
) -> ObjectSpec {
    let engine = engine.clone();
    ObjectSpec {
        size,
        open: Box::new(move |sink, present| {
            let (map, source) = object.known();
            let device = Device::with_sink(map, source, sink, present, engine.clone());
            device.is_used_by(object.users());
            object.opened(&device);
            if eager || !wants.is_empty() {
                device.fetch_in_background(&wants, eager);
            }
            device as Arc<dyn Fill>
        }),
    }
}
