//! Images in the kernel's own cache: under names of ours, to be mounted here, or of the caller's choice, to be
//! mounted by anybody.

use std::sync::Arc;
use std::time::Instant;

use super::api::{BackendChoice, ImageReport, MountRequest, PrefetchOrder, RegisterRequest};
use super::asker::Asker;
use super::mounts::DOMAIN;
use super::objects::Object;
use super::order::plan;
use super::prefetch::devices;
use super::prepare::{Prepared, bootstrap_as_blob};
use super::records::RecordId;
use super::remote::FETCH_LAYER;
use super::served::{Attachment, Live, Mounted, Served, blob_object};
use super::{Daemon, DaemonError};
use crate::export::cachefiles::{self, Culling, FsId, ObjectName, Registration};
use crate::export::{AttachError, BackendKind};
use crate::reader::ensure_block_size;
use crate::sys::mount::unmount;

impl Daemon {
    /// Registers an image under a name of our own, and mounts it.
    pub(super) fn mount_cachefiles(
        &self,
        request: &MountRequest,
        prepared: Arc<Prepared>,
        why: String,
        record: RecordId,
    ) -> Result<Mounted, DaemonError> {
        // Images of this daemon share blobs through one domain, unless they contradict each other;
        // each mount of an image needs a name of its own there. Short, because the kernel tells
        // mounts apart by the first 36 bytes of `domain,name` only (the name of a directory in
        // sysfs, seen on 6.12).
        let short = prepared.key.to_string()[..20].to_owned();
        let (mut mount_number, mut domain_number) = (1u32, 1u32);
        let numbered = |name: &str, number| if number == 1 { name.to_owned() } else { format!("{name}.{number}") };
        let (served, registration) = loop {
            let domain = numbered(DOMAIN, domain_number);
            let name = FsId::new(&numbered(&short, mount_number), Some(&domain))?;
            // What is wanted ahead of a mount, and followed, is up to `prefetch_mounted`.
            match self.serve_cachefiles(&PrefetchOrder::None, prepared.clone(), &name, why.clone()) {
                Err(DaemonError::Attach(AttachError::Taken(_))) => mount_number += 1,
                Err(DaemonError::Contradiction { .. }) => domain_number += 1,
                other => break other?,
            }
        };
        let announce =
            |watch| self.records.write(record, &served.record(&request.image, Some(&request.dir), Some(watch)));
        let name = registration.name();
        let watch = cachefiles::mount(name, &request.dir, &self.watch, &announce, &self.options.sandbox)?;
        if let Some(output) = &request.trace {
            let trace = |devices: Vec<_>| {
                let image = &served.prepared.image;
                self.traces.start(&request.dir, image, &devices, Some(output.clone()), Vec::new())
            };
            let undo = || self.options.sandbox.outside(|| unmount(&request.dir));
            // Nobody has been told of the mount yet.
            devices(&served).and_then(trace).inspect_err(|_| drop(undo()))?;
        }
        Ok(Mounted { watch, record, served, further: Vec::new(), attachment: Attachment::Cachefiles })
    }

    pub(super) fn serve_cachefiles(
        &self,
        order: &PrefetchOrder,
        prepared: Arc<Prepared>,
        name: &FsId,
        why: String,
    ) -> Result<(Served, Arc<Registration>), DaemonError> {
        let service = self.backends.cachefiles(&self.keepers)?;
        self.store.attend_kernel(|| {
            let objects = Arc::clone(&self.objects);
            let let_go = move |object: &ObjectName<'_>, cull: &mut dyn FnMut() -> _| {
                objects.let_go(object.domain, object.name, cull)
            };
            let (root, sandbox) = (self.backends.kernel_cache(), self.options.sandbox.clone());
            Arc::new(Culling::new(service.clone(), &root, sandbox, Box::new(let_go)))
        });
        // What was pulled, or read through another backend, need not be fetched once more for the kernel's cache.
        self.store.offer_to_others(prepared.maps.iter().map(|map| map.blob()));
        let engine = self.store.engine();
        let (boot_map, boot_source) = bootstrap_as_blob(&prepared)?;
        let size = prepared.image.summary().bootstrap_len;
        // Metadata is read page by page, each read waiting for us: fetch all of it at the first.
        let boot = Arc::new(Object::new(Arc::new(boot_map), boot_source));
        let boot = blob_object(boot, size, engine, Vec::new(), true);
        let domain = name.domain.as_deref().unwrap_or(&name.id);
        let objects = self.objects.enter(domain, &prepared.maps, &prepared.source)?;
        let (plan, key) = (plan(&prepared.image, order), prepared.limits_key());
        let uses = objects.iter().map(|object| Arc::new(engine.used_by(object.users(), key))).collect();
        let blobs = prepared.maps.iter().zip(&objects).enumerate().map(|(device, (map, object))| {
            let wants = plan.wants.iter().filter(|want| want.device == device).map(|want| want.decoded).collect();
            (map.blob().to_string(), blob_object(object.clone(), map.decoded_len(), engine, wants, plan.rest))
        });
        let registration = Arc::new(service.register(name, boot, blobs.collect())?);
        let registered = Some(registration.clone());
        let devices = objects.into_iter().map(Live::Object).collect();
        let served = Served {
            backend: BackendKind::Cachefiles,
            why,
            prepared,
            devices,
            _uses: uses,
            registration: registered,
            straight: Vec::new(),
            shows: None,
            transport: None,
        };
        Ok((served, registration))
    }

    /// Makes an image mountable by anybody under names of the caller's choice. Given up as long as it is being prepared,
    /// it leaves nothing behind.
    pub fn register(&self, request: &RegisterRequest, asker: &Asker) -> Result<ImageReport, DaemonError> {
        let _errand = Arc::clone(&self.errands);
        let name = FsId::new(&request.id, request.domain.as_deref())?;
        request.image.whereabouts()?;
        let (_, why) = self.backends.choose(BackendChoice::Cachefiles)?;
        let found = self.look_up_to_mount(&request.image, asker)?;
        let queue = found.queue(self);
        let turn = queue.as_ref().map(|queue| queue.wait(Instant::now() + FETCH_LAYER, asker)).transpose()?;
        self.prepare(&request.image, &found, asker)?.or_undone(|prepared| {
            asker.ensure_wanted()?;
            ensure_block_size(&prepared.image)?;
            let served = self.serve_cachefiles(&request.image.prefetch, Arc::new(prepared), &name, why);
            // Its maps are known from here on.
            drop(turn);
            self.note_registered(request, name, served?.0)
        })
    }

    fn note_registered(
        &self,
        request: &RegisterRequest,
        name: FsId,
        served: Served,
    ) -> Result<ImageReport, DaemonError> {
        let report = served.report(None, &self.telemetry);
        let mut state = self.state.lock().unwrap();
        if state.stopping {
            return Err(DaemonError::Stopping);
        }
        let record = self.records.reserve();
        let written = self.records.write(record, &served.record(&request.image, None, None));
        written.map_err(|cause| DaemonError::Attach(AttachError::Unkept(cause)))?;
        state.registered.insert(name, (served, record));
        Ok(report)
    }

    /// Forgets a registered image. What is mounted from it stays served.
    pub fn unregister(&self, id: &str, domain: Option<&str>) -> Result<(), DaemonError> {
        let name = FsId::new(id, domain)?;
        let removed = self.state.lock().unwrap().registered.remove(&name);
        let (_, record) = removed.ok_or_else(|| DaemonError::NotRegistered(name.mount_options()))?;
        self.records.remove(record);
        Ok(())
    }
}
