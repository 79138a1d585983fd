//! Directories of the host with the blobs of images in them: mounting them, and going on with them.
//!
//! Several images may be in one mount. The first is the mount's own; the others are served beside it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::api::{BlobfsRequest, ImageReport, ImageSpec, PrefetchOrder};
use super::asker::Asker;
use super::connections::Kept;
use super::records::{DeviceFile, Record, RecordId};
use super::remote::FETCH_LAYER;
use super::served::{Attachment, Mounted, Served, live};
use super::{Daemon, DaemonError};
use crate::base::BlobId;
use crate::cache::{Device, KeptBootstrap};
use crate::export::fuse::{self, Blobfs, Lasting, Place};
use crate::export::{BackendKind, LiveImage, WatchId};

/// Why every one of these mounts is served as it is.
const WHY: &str = "the files of blobs are for others to mount";

/// What a successor must know of such a mount, beside its first image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Shown {
    /// The directory, for people: the keepers have it open.
    pub(super) source: PathBuf,
    /// Name of the directory of blobs; the root if `None`.
    pub(super) blob_dir: Option<String>,
    /// The other images.
    pub(super) further: Vec<Further>,
}

impl Shown {
    /// What the other images want to have prefetched.
    pub(super) fn further_prefetches(&self) -> impl Iterator<Item = &PrefetchOrder> {
        self.further.iter().map(|image| &image.spec.prefetch)
    }

    /// The digests of the other bootstraps, with the devices of each.
    pub(super) fn further_devices(&self) -> impl Iterator<Item = (&str, &[DeviceFile])> {
        self.further.iter().map(|image| (image.key.as_str(), image.devices.as_slice()))
    }
}

/// An image in a record that is not the mount's first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Further {
    spec: ImageSpec,
    key: String,
    devices: Vec<DeviceFile>,
    manifest: Option<String>,
}

impl Further {
    fn of(record: Record) -> Self {
        Self { spec: record.spec, key: record.key, devices: record.devices, manifest: record.manifest }
    }

    /// As if it was mounted alone.
    fn record(&self, first: &Record) -> Record {
        let Self { spec, key, devices, manifest } = self.clone();
        Record { spec, key, devices, manifest, blobfs: None, ..first.clone() }
    }
}

/// Gives the image of a record, with its devices.
type Resume<'a> = &'a mut dyn FnMut(&Record) -> Result<(Served, Vec<Arc<Device>>), DaemonError>;

/// An image with its devices.
struct Ready {
    served: Served,
    devices: Vec<Arc<Device>>,
}

impl Daemon {
    /// Shows a directory of the host with the blobs of images in it, and returns when it is usable. Given up as long as it
    /// is being prepared, it leaves nothing behind. Blocks.
    pub fn mount_blobfs(&self, request: &BlobfsRequest, asker: &Asker) -> Result<Vec<ImageReport>, DaemonError> {
        let (source, dir) = (self.directory(&request.source)?, self.directory(&request.dir)?);
        if request.images.is_empty() {
            return Err(DaemonError::NoImages);
        }
        for image in &request.images {
            image.whereabouts()?;
        }
        let blob_dir = Some(request.blob_dir.as_str()).filter(|name| *name != ".");
        let refused = |cause| DaemonError::Blobfs { source_dir: source.clone(), cause };
        let place = Place::open(&source, blob_dir).map_err(refused)?;
        if !self.backends.host().can(BackendKind::Blobfs) {
            let reasons = format!("blobfs: {}", self.backends.host().obstacles(BackendKind::Blobfs));
            return Err(DaemonError::NoBackend { reasons });
        }
        let reserved = self.reserve(&dir)?;
        let record = self.records.reserve();
        let shown = Shown { source: source.clone(), blob_dir: blob_dir.map(ToOwned::to_owned), further: Vec::new() };
        let mounted = self.attach_blobfs(&place, shown, (&request.images, asker), (&dir, record));
        let mounted = mounted.inspect_err(|_| self.forget(record))?;
        tracing::info!(dir = %dir.display(), source = %source.display(), "mounted with blobs in it");
        let (watched, all) = (mounted.watch, mounted.all().cloned().collect::<Vec<_>>());
        reserved.fill(mounted);
        for (served, image) in all.iter().zip(&request.images) {
            self.prefetch_mounted(&dir, served, watched, &image.prefetch);
        }
        let reports = all.iter().map(|served| served.report(Some(&dir), &self.telemetry)).collect();
        drop(all);
        // Somebody may have unmounted it before we could write it down.
        self.bury();
        Ok(reports)
    }

    fn attach_blobfs(
        &self,
        place: &Place,
        shown: Shown,
        (images, asker): (&[ImageSpec], &Asker),
        (dir, record): (&Path, RecordId),
    ) -> Result<Mounted, DaemonError> {
        // Of images that were made ready before another one failed, too.
        let mut kept = Vec::new();
        let ready = |spec| self.ready((spec, asker), &shown.source, &mut kept);
        let all = images.iter().map(ready).collect::<Result<Vec<_>, DaemonError>>();
        let attached = all.and_then(|all| self.attach_ready(place, shown, (images, all), (dir, record)));
        if attached.is_ok() {
            kept.iter().for_each(KeptBootstrap::settle);
        } else {
            kept.into_iter().for_each(KeptBootstrap::give_up);
        }
        attached
    }

    fn attach_ready(
        &self,
        place: &Place,
        mut shown: Shown,
        (images, all): (&[ImageSpec], Vec<Ready>),
        (dir, record): (&Path, RecordId),
    ) -> Result<Mounted, DaemonError> {
        ensure_agreement(&all)?;
        let live: Vec<_> = all.iter().map(Ready::live).collect();
        let blob_dir = shown.blob_dir.clone();
        let further = |(ready, spec): (&Ready, &ImageSpec)| Further::of(ready.served.record(spec, None, None));
        shown.further = all.iter().zip(images).skip(1).map(further).collect();
        let announce = |watch, fuse: Option<&Lasting>| {
            let known = all[0].served.record(&images[0], Some(dir), Some(watch));
            self.records.write(record, &Record { fuse: fuse.copied(), blobfs: Some(shown.clone()), ..known })
        };
        let keep = Kept { keepers: &self.keepers, record };
        let what = Blobfs { images: &live, blob_dir: blob_dir.as_deref() };
        let (watch, sandbox) = (&self.watch, &self.options.sandbox);
        let service = self.backends.fuse()?;
        let attached = service.attach_blobfs((place, &what), dir, (watch, &announce), &keep, sandbox)?;
        Ok(of_all(all, record, attached))
    }

    /// An image whose devices are ready; its bootstrap is noted in `kept` as soon as there is one.
    fn ready(
        &self,
        (spec, asker): (&ImageSpec, &Asker),
        source: &Path,
        kept: &mut Vec<KeptBootstrap>,
    ) -> Result<Ready, DaemonError> {
        let found = self.look_up_to_mount(spec, asker)?;
        let queue = found.queue(self);
        let _turn = queue.as_ref().map(|queue| queue.wait(Instant::now() + FETCH_LAYER, asker)).transpose()?;
        let mut prepared = self.prepare(spec, &found, asker)?;
        kept.push(prepared.kept().again());
        asker.ensure_wanted()?;
        let devices = self.devices_of(&mut prepared)?;
        let mut served = Served::stored(BackendKind::Blobfs, Arc::new(prepared), &devices, WHY.to_owned());
        served.shows = Some(source.to_owned());
        Ok(Ready { served, devices })
    }

    /// Goes on with the mount of a dead daemon. `resume` gives the image of a record that has one.
    pub(super) fn adopt_blobfs(
        &self,
        (id, record): (RecordId, &Record),
        watch: WatchId,
        legacy: Option<fuse::Legacy>,
        resume: Resume<'_>,
    ) -> Result<Mounted, DaemonError> {
        // Whoever waits there must not wait for somebody who never comes.
        self.adopt_shown((id, record), watch, legacy, resume).inspect_err(|_| self.release_connection(id))
    }

    fn adopt_shown(
        &self,
        (id, record): (RecordId, &Record),
        watch: WatchId,
        legacy: Option<fuse::Legacy>,
        resume: Resume<'_>,
    ) -> Result<Mounted, DaemonError> {
        let damaged = |what: &str| DaemonError::Record { what: what.to_owned() };
        let shown = record.blobfs.as_ref().ok_or_else(|| damaged("it does not say what it shows"))?;
        let legacy = legacy
            .ok_or_else(|| damaged("its FUSE connection went with the last daemon; unmount it and mount it again"))?;
        let mut all = Vec::new();
        for record in std::iter::once(record.clone()).chain(shown.further.iter().map(|it| it.record(record))) {
            let (mut served, devices) = resume(&record)?;
            served.shows = Some(shown.source.clone());
            all.push(Ready { served, devices });
        }
        let live: Vec<_> = all.iter().map(Ready::live).collect();
        let what = Blobfs { images: &live, blob_dir: shown.blob_dir.as_deref() };
        let attached = self.backends.fuse()?.adopt_blobfs(&what, watch, legacy);
        let attached = attached.map_err(|cause| DaemonError::Start { what: "a FUSE connection", cause })?;
        Ok(of_all(all, id, attached))
    }
}

impl Ready {
    fn live(&self) -> LiveImage {
        live(self.served.backend, &self.served.prepared, &self.devices)
    }
}

fn of_all(all: Vec<Ready>, record: RecordId, attached: fuse::Attachment) -> Mounted {
    let watch = attached.watch;
    let mut all = all.into_iter().map(|ready| ready.served);
    let served = all.next().expect("at least one image");
    Mounted { watch, record, served, further: all.collect(), attachment: Attachment::Fuse(attached) }
}

/// One name is one file: images that promise different bytes for a blob cannot be in one tree.
fn ensure_agreement(all: &[Ready]) -> Result<(), DaemonError> {
    let mut known: HashMap<BlobId, &Arc<Device>> = HashMap::new();
    for ready in all {
        for (device, of_image) in ready.devices.iter().zip(ready.served.prepared.image.devices()) {
            let first = known.entry(of_image.blob.clone()).or_insert(device);
            if !Arc::ptr_eq(first, device) {
                return Err(DaemonError::BlobTwice(of_image.blob.clone()));
            }
        }
    }
    Ok(())
}
