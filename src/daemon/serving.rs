//! The backends of one daemon and the threads that run them.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::DaemonError;
use super::api::BackendChoice;
use super::keeper::{Held, Keepers, Kind, Name};
use super::mounts::Options;
use crate::base::Chain;
use crate::export::cachefiles::Cachefiles;
use crate::export::fanotify::Fanotify;
use crate::export::fuse::{Connection, Fuse, Lanes, Transport};
use crate::export::host::Host;
use crate::export::{BackendKind, Custody};
use crate::image::Image;
use crate::reader::ensure_block_size;
use crate::sys::fanotify::Group;
use crate::sys::files::InodeId;
use crate::sys::journal::Journal;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Telemetry;

/// Started on first use: a host that only ever uses one backend never opens the other's device.
#[derive(Debug)]
pub(super) struct Backends {
    host: OnceLock<Host>,
    cache: PathBuf,
    /// Order of preference where nobody asks for one.
    order: Vec<BackendKind>,
    /// How requests of FUSE are to come, where there is a choice.
    transport: Transport,
    sandbox: Sandbox,
    telemetry: Telemetry,
    fanotify: Mutex<Option<Running<Fanotify>>>,
    cachefiles: Mutex<Option<Running<Cachefiles>>>,
    fuse: Mutex<Option<Pool>>,
}

/// The FUSE server and its threads.
#[derive(Debug)]
struct Pool {
    service: Arc<Fuse>,
    threads: Vec<JoinHandle<()>>,
    /// Those that carry requests over io_uring, one for each processor; and why there are none although they are
    /// wanted.
    lanes: Vec<JoinHandle<()>>,
    no_lanes: Option<String>,
}

/// A service and the thread that runs it; no thread while a dead daemon's images are taken over.
#[derive(Debug)]
struct Running<T> {
    service: Arc<T>,
    thread: Option<JoinHandle<()>>,
}

/// What a dead daemon had open.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    pub(super) group: Option<(OwnedFd, Journal)>,
    pub(super) cachefiles: Option<OwnedFd>,
}

/// The keepers hold the files of marked devices.
impl Custody for Keepers {
    fn hold(&self, id: InodeId, file: &Arc<File>) -> io::Result<()> {
        Self::hold(self, device_name(id), file.clone())
    }

    fn release(&self, id: InodeId) {
        Self::release(self, device_name(id));
    }
}

/// By which the keepers know the file of a device.
pub(super) fn device_name(id: InodeId) -> Name {
    Name { kind: Kind::Device, key: [id.device(), id.inode()] }
}

/// The inverse of [`device_name`].
pub(super) fn device_file(name: Name) -> InodeId {
    InodeId::new(name.key[0], name.key[1])
}

impl Backends {
    /// Backends that go on with what a dead daemon had open, and start what it had not on first use.
    /// `telemetry` counts what they are asked.
    pub(super) fn new(
        options: &Options,
        legacy: Legacy,
        keepers: &Arc<Keepers>,
        telemetry: Telemetry,
    ) -> Result<Self, DaemonError> {
        let go_on = |(group, journal): (OwnedFd, Journal)| {
            Fanotify::new(group.into(), journal, keepers.clone(), telemetry.clone())
        };
        let fanotify = legacy.group.map(go_on).transpose().map_err(start_of("the fanotify service"))?;
        let cachefiles = legacy.cachefiles.map(|device| Cachefiles::adopt(device, telemetry.clone())).transpose();
        let cachefiles = cachefiles.map_err(start_of("the cachefiles service"))?;
        Ok(Self {
            host: OnceLock::new(),
            cache: options.cache.clone(),
            order: options.backends.clone(),
            transport: options.fuse_transport,
            sandbox: options.sandbox.clone(),
            telemetry,
            fanotify: Mutex::new(fanotify.map(|service| Running { service, thread: None })),
            cachefiles: Mutex::new(cachefiles.map(|service| Running { service, thread: None })),
            fuse: Mutex::default(),
        })
    }

    /// Finds out what this host can do. Takes a moment, in which readers are served already.
    pub(super) fn examine(&self) -> io::Result<()> {
        let bound = self.cachefiles.lock().unwrap().is_some();
        let mut host = self.sandbox.outside(|| Host::examine(&self.cache, bound))?;
        host.choice = self.order.iter().copied().find(|kind| host.can(*kind));
        let _ = self.host.set(host);
        Ok(())
    }

    /// What this host can do.
    pub(super) fn host(&self) -> &Host {
        self.host.get().expect("examined before requests are taken")
    }

    /// The services that there are, such as those that go on for a dead daemon.
    pub(super) fn services(&self) -> (Option<Arc<Fanotify>>, Option<Arc<Cachefiles>>) {
        let fanotify = self.fanotify.lock().unwrap().as_ref().map(|running| running.service.clone());
        let cachefiles = self.cachefiles.lock().unwrap().as_ref().map(|running| running.service.clone());
        (fanotify, cachefiles)
    }

    /// Starts the threads of services that were taken over.
    pub(super) fn go_on(&self) -> Result<(), DaemonError> {
        if let Some(running) = &mut *self.fanotify.lock().unwrap()
            && running.thread.is_none()
        {
            let thread = self.spawn_narrow("fan-0", &running.service, Fanotify::run);
            running.thread = Some(thread.map_err(start_of("the fanotify service"))?);
        }
        if let Some(running) = &mut *self.cachefiles.lock().unwrap()
            && running.thread.is_none()
        {
            let thread = self.spawn_narrow("cf-0", &running.service, Cachefiles::run);
            running.thread = Some(thread.map_err(start_of("the cachefiles service"))?);
        }
        Ok(())
    }

    /// The backend to use for `choice` and the reason, or why there is none.
    pub(super) fn choose(&self, choice: BackendChoice) -> Result<(BackendKind, String), DaemonError> {
        let kind = match choice {
            BackendChoice::Auto => {
                let host = self.host();
                let kind = host.choice.ok_or_else(|| {
                    let say = |kind: &BackendKind| format!("{kind}: {}", host.obstacles(*kind));
                    let reasons = self.order.iter().rev().map(say).collect::<Vec<_>>().join("; ");
                    DaemonError::NoBackend { reasons }
                })?;
                let why = match kind {
                    BackendKind::Fanotify if host.can(BackendKind::Cachefiles) => {
                        "pre-content events passed their self test, and the settings prefer them"
                    }
                    BackendKind::Cachefiles => "this kernel has on-demand cachefiles, the fastest path",
                    BackendKind::Fanotify => "pre-content events passed their self test, and there is no cachefiles",
                    BackendKind::FuseDevice
                        if [BackendKind::Cachefiles, BackendKind::Fanotify].iter().any(|it| host.can(*it)) =>
                    {
                        "EROFS can read through FUSE, and the settings prefer that"
                    }
                    BackendKind::FuseDevice => {
                        "EROFS can read through FUSE, and there are neither pre-content events nor cachefiles"
                    }
                    BackendKind::FuseTree if self.order.iter().any(|it| *it != kind && host.can(*it)) => {
                        "FUSE works, and the settings prefer it"
                    }
                    BackendKind::FuseTree => "FUSE works, and nothing faster does",
                    BackendKind::Blobfs => unreachable!("no setting names it"),
                };
                return Ok((kind, why.to_owned()));
            }
            BackendChoice::Fanotify => BackendKind::Fanotify,
            BackendChoice::Cachefiles => BackendKind::Cachefiles,
            BackendChoice::FuseDevice => BackendKind::FuseDevice,
            BackendChoice::FuseTree => BackendKind::FuseTree,
        };
        if !self.host().can(kind) {
            return Err(DaemonError::NoBackend { reasons: format!("{kind}: {}", self.host().obstacles(kind)) });
        }
        Ok((kind, "asked for".to_owned()))
    }

    /// The backend that `chosen` becomes once it is known for which image: the kernel's own EROFS gets no image in
    /// blocks that are no pages. Where the choice was ours, the one that asks us for everything takes its place.
    pub(super) fn fit(
        &self,
        chosen: (BackendKind, String),
        choice: BackendChoice,
        image: &Image,
    ) -> Result<(BackendKind, String), DaemonError> {
        let tree = BackendKind::FuseTree;
        match ensure_block_size(image) {
            Ok(()) => Ok(chosen),
            Err(_) if chosen.0 == tree => Ok(chosen),
            Err(_) if choice == BackendChoice::Auto && self.order.contains(&tree) && self.host().can(tree) => {
                let size = image.summary().block_size;
                Ok((tree, format!("the image has blocks of {size} bytes, which {} cannot serve", chosen.0)))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The fanotify service. Its group is in the keepers' hands before the first mark is made.
    pub(super) fn fanotify(&self, keepers: &Arc<Keepers>) -> Result<Arc<Fanotify>, DaemonError> {
        let mut slot = self.fanotify.lock().unwrap();
        if let Some(running) = &*slot {
            return Ok(running.service.clone());
        }
        let start = start_of("the fanotify service");
        let group = Group::new().map_err(start)?;
        let journal = Journal::create().map_err(start)?;
        let hold = |kind, fd: io::Result<OwnedFd>| keepers.hold(Name::only(kind), Arc::new(fd?) as Held);
        // The journal first: a group in the hands of a successor is of no use without it.
        hold(Kind::Journal, journal.as_fd().try_clone_to_owned()).map_err(start)?;
        hold(Kind::Group, group.as_fd().try_clone_to_owned()).map_err(start)?;
        let service = Fanotify::new(group, journal, keepers.clone(), self.telemetry.clone()).map_err(start)?;
        let thread = Some(self.spawn_narrow("fan-0", &service, Fanotify::run).map_err(start)?);
        *slot = Some(Running { service: service.clone(), thread });
        Ok(service)
    }

    /// The directory that the kernel's cache is bound at.
    pub(super) fn kernel_cache(&self) -> PathBuf {
        self.cache.join("cachefiles")
    }

    /// The cachefiles service, its cache bound below the cache directory and its device in the
    /// keepers' hands.
    pub(super) fn cachefiles(&self, keepers: &Keepers) -> Result<Arc<Cachefiles>, DaemonError> {
        let mut slot = self.cachefiles.lock().unwrap();
        if let Some(running) = &*slot {
            return Ok(running.service.clone());
        }
        let start = start_of("the cachefiles service");
        let root = self.kernel_cache();
        DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(start)?;
        let service = Cachefiles::bind(&root, self.telemetry.clone()).map_err(start)?;
        let device = service.device().map_err(start)?;
        keepers.hold(Name::only(Kind::Cachefiles), Arc::new(device)).map_err(start)?;
        let thread = Some(self.spawn_narrow("cf-0", &service, Cachefiles::run).map_err(start)?);
        *slot = Some(Running { service: service.clone(), thread });
        Ok(service)
    }

    /// The FUSE server, with its threads.
    pub(super) fn fuse(&self) -> Result<Arc<Fuse>, DaemonError> {
        let mut slot = self.fuse.lock().unwrap();
        if let Some(pool) = &*slot {
            return Ok(pool.service.clone());
        }
        let start = start_of("the FUSE server");
        let service = Fuse::new(self.telemetry.clone()).map_err(start)?;
        let spawn = |number| self.spawn_narrow(&format!("fuse-{number}"), &service, Fuse::run);
        let threads = (0..Fuse::threads()).map(spawn).collect::<io::Result<_>>().map_err(start)?;
        let mut pool = Pool { service: service.clone(), threads, lanes: Vec::new(), no_lanes: None };
        if self.transport == Transport::IoUring
            && let Err(error) = self.start_lanes(&mut pool, true)
        {
            let error = Chain(&*error).to_string();
            tracing::warn!(error, "FUSE requests do not come over io_uring");
            pool.no_lanes = Some(error);
        }
        *slot = Some(pool);
        Ok(service)
    }

    /// The same, which can go on with connections over io_uring, whatever new ones use.
    pub(super) fn fuse_with_lanes(&self) -> Result<Arc<Fuse>, DaemonError> {
        let service = self.fuse()?;
        let mut slot = self.fuse.lock().unwrap();
        if let Some(pool) = slot.as_mut().filter(|pool| pool.service.lanes().is_none()) {
            self.start_lanes(pool, false).map_err(|error| start_of("FUSE over io_uring")(io::Error::other(error)))?;
        }
        Ok(service)
    }

    /// Starts the threads that carry requests over io_uring, those of new connections too if `for_new`.
    fn start_lanes(&self, pool: &mut Pool, for_new: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let lanes = self.sandbox.outside(Lanes::create)?;
        for lane in lanes.lanes() {
            let sandbox = self.sandbox.clone();
            pool.lanes.push(spawn(&format!("uring-{}", lane.cpu()), lane, move |lane| {
                if let Err(error) = lane.bind() {
                    tracing::warn!(cpu = lane.cpu(), %error, "a thread cannot be bound to its processor");
                }
                sandbox.narrow();
                lane.run()
            })?);
        }
        pool.service.use_lanes(lanes, for_new);
        Ok(())
    }

    /// Why FUSE requests come the way that the settings wish, or another one.
    pub(super) fn why_transport(&self, used: Transport) -> String {
        let no_lanes = self.fuse.lock().unwrap().as_ref().and_then(|pool| pool.no_lanes.clone());
        match (self.transport == used, no_lanes) {
            (true, _) => "the settings choose it".to_owned(),
            (false, Some(reason)) => reason,
            (false, None) => "the settings choose the other way".to_owned(),
        }
    }

    fn fuse_if_any(&self) -> Option<Arc<Fuse>> {
        self.fuse.lock().unwrap().as_ref().map(|pool| pool.service.clone())
    }

    /// Starts a thread that answers the kernel and can do little else.
    fn spawn_narrow<T: Send + Sync + 'static>(
        &self,
        name: &str,
        service: &Arc<T>,
        run: fn(&T) -> io::Result<()>,
    ) -> io::Result<JoinHandle<()>> {
        let sandbox = self.sandbox.clone();
        spawn(name, service, move |service| {
            sandbox.narrow();
            run(service)
        })
    }

    /// The names of those threads that answer the kernel and do not come round within this time.
    /// Blocks.
    pub(super) fn unresponsive(&self, within: Duration) -> Vec<&'static str> {
        // Asked without the locks: whoever starts or stops a service must not wait for a stuck one.
        let (fanotify, cachefiles) = self.services();
        let stuck = [
            ("fan-0", fanotify.is_some_and(|service| !service.is_responsive(within))),
            ("cf-0", cachefiles.is_some_and(|service| !service.is_responsive(within))),
            ("fuse-0", self.fuse_if_any().is_some_and(|service| !service.is_responsive(within))),
        ];
        stuck.into_iter().filter(|(_, stuck)| *stuck).map(|(name, _)| name).collect()
    }

    /// Events answered at once, events that waited, and READs of cachefiles.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let (hit, missed) = self.fanotify.lock().unwrap().as_ref().map_or((0, 0), |it| it.service.counts());
        let reads = self.cachefiles.lock().unwrap().as_ref().map_or(0, |it| it.service.reads());
        (hit, missed, reads)
    }

    /// Whether the kernel has objects of the cachefiles backend open, whoever mounted them.
    pub(super) fn has_open_objects(&self) -> bool {
        self.cachefiles.lock().unwrap().as_ref().is_some_and(|it| it.service.is_in_use())
    }

    /// Takes no more events; those that were taken are still answered. Only before the end.
    pub(super) fn pause(&self) {
        let ends = |service: &dyn Fn(), thread: &mut Option<JoinHandle<()>>| {
            if let Some(thread) = thread.take() {
                service();
                let _ = thread.join();
            }
        };
        if let Some(Running { service, thread }) = &mut *self.fanotify.lock().unwrap() {
            ends(&|| service.stop(), thread);
        }
        if let Some(Running { service, thread }) = &mut *self.cachefiles.lock().unwrap() {
            ends(&|| service.stop(), thread);
        }
        if let Some(Pool { service, threads, lanes, .. }) = &mut *self.fuse.lock().unwrap() {
            service.stop();
            threads.drain(..).for_each(|thread| drop(thread.join()));
            service.stop_lanes(&self.sandbox);
            lanes.drain(..).for_each(|thread| drop(thread.join()));
        }
    }

    /// Answers nobody any more: who waits now, waits for a successor. Only before the end.
    pub(super) fn freeze(&self) {
        if let Some(running) = &*self.fanotify.lock().unwrap() {
            running.service.freeze();
        }
        self.connections().iter().for_each(|connection| connection.freeze());
    }

    /// Events of fanotify and requests of FUSE that wait for data.
    pub(super) fn waiting(&self) -> usize {
        let events = self.fanotify.lock().unwrap().as_ref().map_or(0, |it| it.service.waiting());
        events + self.connections().iter().map(|connection| connection.waiting()).sum::<usize>()
    }

    fn connections(&self) -> Vec<Arc<Connection>> {
        self.fuse_if_any().map(|service| service.connections()).unwrap_or_default()
    }
}

fn start_of(what: &'static str) -> impl Fn(io::Error) -> DaemonError + Copy {
    move |cause| DaemonError::Start { what, cause }
}

/// Runs a service on a thread of its own. A service that ends by an error leaves readers waiting,
/// which is for a person to hear about; the process stays so that nothing is shown wrongly.
pub(super) fn spawn<T: Send + Sync + 'static>(
    name: &str,
    service: &Arc<T>,
    run: impl FnOnce(&T) -> io::Result<()> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let service = service.clone();
    let thread = name.to_owned();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = run(&service) {
            tracing::error!(thread, %error, "a service stopped answering the kernel");
        }
    })
}
