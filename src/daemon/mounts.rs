use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::DaemonError;
use super::api::{BackendChoice, ImageReport, ImageSpec, Info, MountRequest, RegisterRequest};
use super::keeper::Keeper;
use super::objects::{Object, Objects};
use super::prepare::{Prepared, bootstrap_as_blob, prepare};
use super::served::{Live, Mounted, Served, blob_object};
use super::serving::{Backends, spawn};
use crate::base::{BlobId, Chain};
use crate::cache::{Store, StoreOptions};
use crate::export::cachefiles::{self, FsId, Registration};
use crate::export::{AttachError, BackendKind, Backing, LiveImage, MountWatch, WatchId, fanotify};
use crate::sys::mount::{detach, unmount};

/// Where a daemon keeps its things.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the cache: on ext4, XFS or btrfs.
    pub cache: PathBuf,
    /// Directory of sockets.
    pub run: PathBuf,
    /// This program, to start the keeper with.
    pub program: PathBuf,
    pub store: StoreOptions,
}

/// The daemon: one store, its backends, and everything mounted.
#[derive(Debug)]
pub struct Daemon {
    options: Options,
    runtime: Handle,
    store: Arc<Store>,
    backends: Backends,
    keeper: Keeper,
    objects: Objects,
    watch: Arc<MountWatch>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    /// By mount point. `None` reserves the place while the mount is being made.
    mounts: BTreeMap<PathBuf, Option<Mounted>>,
    /// Unmounted here, but the superblock lives on: in another mount namespace, or in open files.
    lingering: Vec<Mounted>,
    registered: BTreeMap<FsId, Served>,
}

/// The domain of this daemon's own mounts on the cachefiles path.
const DOMAIN: &str = "rafsd";

impl Daemon {
    /// Opens the store, tries out the host, and starts the keeper.
    pub fn start(options: Options, runtime: Handle) -> Result<Arc<Self>, DaemonError> {
        let start = |what| move |cause| DaemonError::Start { what, cause };
        Keeper::ensure_none(&options.run).map_err(start("a daemon"))?;
        let store = Store::open(&options.cache, options.store.clone(), runtime.clone())?;
        let backends = Backends::examine(&options.cache).map_err(start("the examination of this host"))?;
        let keeper = Keeper::start(&options.program, &options.run).map_err(start("the keeper"))?;
        // A successor must not write to files whose readers still ask our group.
        keeper.hold("store", store.lock_file()).map_err(start("the keeper"))?;
        let watch = Arc::new(MountWatch::new().map_err(start("the watch on mounts"))?);
        sweep(&options.cache);
        // Nothing is adopted from a predecessor: what a kernel has mounted all the same, its open
        // files tell.
        store.say_uses_are_known();
        let objects = Objects::new(options.cache.join("cachefiles-maps"));
        let daemon = Arc::new(Self {
            options,
            runtime,
            store,
            backends,
            keeper,
            objects,
            watch,
            watcher: Mutex::default(),
            state: Mutex::default(),
        });
        let thread =
            spawn("mnt-0", &daemon, |daemon| daemon.follow_unmounts()).map_err(start("the watch on mounts"))?;
        *daemon.watcher.lock().unwrap() = Some(thread);
        Ok(daemon)
    }

    /// Facts about the daemon and its host.
    pub fn info(&self) -> Info {
        let (events_hit, events_missed, cachefiles_reads) = self.backends.counts();
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            cache: self.options.cache.clone(),
            events_hit,
            events_missed,
            cachefiles_reads,
            host: self.backends.host.clone(),
        }
    }

    /// Fails if this host cannot serve by `choice`.
    pub fn ensure_backend(&self, choice: BackendChoice) -> Result<(), DaemonError> {
        self.backends.choose(choice).map(|_| ())
    }

    /// Mounts an image and returns when it is usable. Blocks.
    pub fn mount(&self, request: &MountRequest) -> Result<ImageReport, DaemonError> {
        // One directory, one name: two spellings must not be two mounts.
        let dir = std::fs::canonicalize(&request.dir).ok().filter(|dir| request.dir.is_absolute() && dir.is_dir());
        let dir = dir.ok_or_else(|| DaemonError::NotADirectory(request.dir.clone()))?;
        let request = &MountRequest { dir: dir.clone(), ..request.clone() };
        ensure_absolute(&request.image)?;
        let _reserved = self.reserve(&dir)?;
        let mounted = self.mount_reserved(request)?;
        let report = mounted.served.report(Some(&dir));
        tracing::info!(dir = %dir.display(), backend = %report.backend, image = report.image, "mounted");
        self.state.lock().unwrap().mounts.insert(dir.clone(), Some(mounted));
        // Somebody may have unmounted it before we could write it down.
        self.bury();
        Ok(report)
    }

    fn reserve<'a>(&'a self, dir: &'a Path) -> Result<Reservation<'a>, DaemonError> {
        let mut state = self.state.lock().unwrap();
        if state.stopping {
            return Err(DaemonError::Stopping);
        }
        if state.mounts.contains_key(dir) {
            return Err(DaemonError::Mounted(dir.to_owned()));
        }
        state.mounts.insert(dir.to_owned(), None);
        Ok(Reservation { daemon: self, dir })
    }

    fn mount_reserved(&self, request: &MountRequest) -> Result<Mounted, DaemonError> {
        let (kind, why) = self.backends.choose(request.backend)?;
        let prepared = Arc::new(self.prepare(&request.image)?);
        if self.state.lock().unwrap().stopping {
            return Err(DaemonError::Stopping);
        }
        let (watch, served, attachment) = match kind {
            BackendKind::Fanotify => self.mount_fanotify(request, prepared, why)?,
            BackendKind::Cachefiles => self.mount_cachefiles(request, prepared, why)?,
        };
        Ok(Mounted { watch, served, attachment })
    }

    fn prepare(&self, spec: &ImageSpec) -> Result<Prepared, DaemonError> {
        let saved = |blob: &BlobId| self.store.saved_map(blob).or_else(|| self.objects.saved(DOMAIN, blob));
        let once = || prepare(spec, self.store.shelves().bootstraps(), &saved, &self.runtime);
        match once() {
            Err(DaemonError::Store(error)) if error.is_full() && self.store.make_room(1) => once(),
            outcome => outcome,
        }
    }

    /// The store, for what is said about it and done to it beside mounting.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Everything that is served, with where it is mounted, if anywhere: lingering mounts too.
    pub(super) fn served(&self) -> Vec<(Option<PathBuf>, Served)> {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.iter().filter_map(|(dir, mounted)| Some((dir, mounted.as_ref()?)));
        let mounted = mounted.map(|(dir, mounted)| (Some(dir.clone()), mounted.served.clone()));
        let lingering = state.lingering.iter().map(|mounted| (None, mounted.served.clone()));
        mounted.chain(lingering).chain(state.registered.values().map(|served| (None, served.clone()))).collect()
    }

    /// Whether it is on its way out, so that long work should end.
    pub(super) fn is_stopping(&self) -> bool {
        self.state.lock().unwrap().stopping
    }

    fn mount_fanotify(
        &self,
        request: &MountRequest,
        prepared: Arc<Prepared>,
        why: String,
    ) -> Result<(WatchId, Served, Option<fanotify::Attachment>), DaemonError> {
        let devices = prepared
            .maps
            .iter()
            .map(|map| self.store.device(map.clone(), prepared.source.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        let image = LiveImage {
            image: prepared.image.clone(),
            bootstrap: prepared.bootstrap.clone(),
            devices: devices.iter().map(|device| device.clone() as Arc<dyn Backing>).collect(),
        };
        let service = self.backends.fanotify(&self.keeper)?;
        let attachment =
            service.attach(&image, &request.dir, &self.watch, &|mount| self.keeper.mounting(&request.dir, mount))?;
        if request.image.prefetch {
            devices.iter().for_each(|device| device.complete_in_background());
        }
        let live = devices.iter().map(|device| Live::Stored(Arc::downgrade(device))).collect();
        let served = Served { backend: BackendKind::Fanotify, why, prepared, devices: live, registration: None };
        Ok((attachment.watch, served, Some(attachment)))
    }

    fn mount_cachefiles(
        &self,
        request: &MountRequest,
        prepared: Arc<Prepared>,
        why: String,
    ) -> Result<(WatchId, Served, Option<fanotify::Attachment>), DaemonError> {
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
            match self.serve_cachefiles(&request.image, prepared.clone(), &name, why.clone()) {
                Err(DaemonError::Attach(AttachError::Taken(_))) => mount_number += 1,
                Err(DaemonError::Contradiction { .. }) => domain_number += 1,
                other => break other?,
            }
        };
        let watch = cachefiles::mount(registration.name(), &request.dir, &self.watch, &|mount| {
            self.keeper.mounting(&request.dir, mount)
        })?;
        Ok((watch, served, None))
    }

    fn serve_cachefiles(
        &self,
        spec: &ImageSpec,
        prepared: Arc<Prepared>,
        name: &FsId,
        why: String,
    ) -> Result<(Served, Arc<Registration>), DaemonError> {
        let service = self.backends.cachefiles()?;
        let engine = self.store.engine();
        let (boot_map, boot_source) = bootstrap_as_blob(&prepared)?;
        let size = prepared.image.summary().bootstrap_len;
        // Metadata is read page by page, each read waiting for us: fetch all of it at the first.
        let boot = Arc::new(Object::new(boot_map, boot_source));
        let boot = blob_object(boot, size, engine, true);
        let domain = name.domain.as_deref().unwrap_or(&name.id);
        let objects = self.objects.enter(domain, &prepared.maps, &prepared.source)?;
        let blobs = prepared.maps.iter().zip(&objects).map(|(map, object)| {
            (map.blob().to_string(), blob_object(object.clone(), map.decoded_len(), engine, spec.prefetch))
        });
        let registration = Arc::new(service.register(name, boot, blobs.collect())?);
        let registered = Some(registration.clone());
        let devices = objects.into_iter().map(Live::Object).collect();
        let served = Served { backend: BackendKind::Cachefiles, why, prepared, devices, registration: registered };
        Ok((served, registration))
    }

    /// Makes an image mountable by anybody under names of the caller's choice.
    pub fn register(&self, request: &RegisterRequest) -> Result<ImageReport, DaemonError> {
        let name = FsId::new(&request.id, request.domain.as_deref())?;
        ensure_absolute(&request.image)?;
        let (_, why) = self.backends.choose(BackendChoice::Cachefiles)?;
        let prepared = Arc::new(self.prepare(&request.image)?);
        let (served, _) = self.serve_cachefiles(&request.image, prepared, &name, why)?;
        let report = served.report(None);
        let mut state = self.state.lock().unwrap();
        if state.stopping {
            return Err(DaemonError::Stopping);
        }
        state.registered.insert(name, served);
        Ok(report)
    }

    /// Forgets a registered image. What is mounted from it stays served.
    pub fn unregister(&self, id: &str, domain: Option<&str>) -> Result<(), DaemonError> {
        let name = FsId::new(id, domain)?;
        let removed = self.state.lock().unwrap().registered.remove(&name);
        removed.map(drop).ok_or_else(|| DaemonError::NotRegistered(name.mount_options()))
    }

    /// Everything that is mounted or registered.
    pub fn list(&self) -> Vec<ImageReport> {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.iter().filter_map(|(dir, mounted)| Some((dir, mounted.as_ref()?)));
        let mounts = mounted.map(|(dir, mounted)| mounted.served.report(Some(dir)));
        mounts.chain(state.registered.values().map(|served| served.report(None))).collect()
    }

    /// Whether nothing is mounted, being mounted, lingering or registered, by us or by others.
    pub fn is_idle(&self) -> bool {
        let state = self.state.lock().unwrap();
        !self.backends.has_open_objects()
            && state.mounts.is_empty()
            && state.lingering.is_empty()
            && state.registered.is_empty()
    }

    /// Unmounts `dir`. Returns when the file system is gone, or after a moment if somebody else
    /// keeps it alive; it stays served until then. Blocks.
    pub fn unmount(&self, dir: &Path, lazy: bool) -> Result<(), DaemonError> {
        let watch = {
            let state = self.state.lock().unwrap();
            let mounted = state.mounts.get(dir).and_then(Option::as_ref);
            mounted.map(|mounted| mounted.watch).ok_or_else(|| DaemonError::NotMounted(dir.to_owned()))?
        };
        let outcome = if lazy { detach(dir) } else { unmount(dir) };
        outcome.map_err(|cause| DaemonError::Unmount { dir: dir.to_owned(), cause })?;
        let until = Instant::now() + Duration::from_secs(2);
        while self.watch.is_alive(watch) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut state = self.state.lock().unwrap();
        // The watching thread may have been first.
        if let Some(Some(mounted)) = state.mounts.remove(dir) {
            state.lingering.push(mounted);
        }
        drop(state);
        self.bury();
        Ok(())
    }

    /// Lets go of what served superblocks that are gone.
    fn bury(&self) {
        let mut gone = Vec::new();
        let mut state = self.state.lock().unwrap();
        let is_dead = |mounted: &Mounted| !self.watch.is_alive(mounted.watch);
        gone.extend(state.lingering.extract_if(.., |mounted| is_dead(mounted)));
        let dead: Vec<_> =
            state.mounts.iter().filter(|(_, m)| m.as_ref().is_some_and(is_dead)).map(|(d, _)| d.clone()).collect();
        for dir in dead {
            tracing::info!(dir = %dir.display(), "unmounted");
            gone.extend(state.mounts.remove(&dir).flatten());
        }
        drop(state);
        // Outside the lock: the last owner of a device waits for the disk.
        gone.into_iter().for_each(Mounted::release);
    }

    /// Learns of every superblock that goes away, whoever unmounted it.
    fn follow_unmounts(&self) -> io::Result<()> {
        while self.watch.wait()?.is_some() {
            self.bury();
        }
        Ok(())
    }

    /// Unmounts everything that can be unmounted, makes the cache durable and ends the threads.
    /// What is busy and incomplete is left to the keeper: its readers wait and never see zeros.
    /// Blocks.
    pub fn stop(&self) {
        self.state.lock().unwrap().stopping = true;
        self.wait_for_reservations();
        let dirs: Vec<_> = self.state.lock().unwrap().mounts.keys().cloned().collect();
        for dir in dirs {
            if let Err(error) = self.unmount(&dir, false) {
                tracing::warn!(error = %Chain(&error), "stays mounted");
            }
        }
        self.state.lock().unwrap().registered.clear();
        self.bury();
        self.outlive_the_unkept();
        let in_use = self.is_in_use();
        self.backends.stop();
        if let Err(error) = self.store.close() {
            tracing::error!(error = %Chain(&error), "what was fetched last may have to be fetched again");
        }
        if !in_use {
            self.keeper.finish();
        } else {
            tracing::warn!("incomplete images are still in use; the keeper holds their readers, see `rafsd recover`");
        }
        self.watch.stop();
        if let Some(thread) = self.watcher.lock().unwrap().take() {
            let _ = thread.join();
        }
    }

    /// Waits, for a while, for mounts that are being made: they end on their own deadlines.
    fn wait_for_reservations(&self) {
        let until = Instant::now() + Duration::from_secs(60);
        while self.state.lock().unwrap().mounts.values().any(Option::is_none) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether somebody may still ask for data that is missing.
    fn is_in_use(&self) -> bool {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.values().flatten().any(|mounted| !mounted.served.report(None).is_complete());
        let being_made = state.mounts.values().any(Option::is_none);
        mounted || being_made || !state.lingering.is_empty()
    }

    /// The keeper was killed: this process is then the last that holds the group, and must not
    /// end before the last mount does.
    fn outlive_the_unkept(&self) {
        while self.is_in_use() && !self.keeper.is_alive() {
            tracing::error!("the keeper has died and incomplete images are in use; waiting for them to be unmounted");
            std::thread::sleep(Duration::from_secs(5));
            self.bury();
        }
    }
}

/// A mount point that a mount is being made for. Dropping it frees the place unless it was used.
struct Reservation<'a> {
    daemon: &'a Daemon,
    dir: &'a Path,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.daemon.state.lock().unwrap();
        if state.mounts.get(self.dir).is_some_and(Option::is_none) {
            state.mounts.remove(self.dir);
        }
    }
}

/// Removes what a crash left half made. Only with the store's lock in hand.
fn sweep(cache: &Path) {
    let scratch = |dir: PathBuf, prefixes: &'static [&'static str]| {
        std::fs::read_dir(dir).into_iter().flatten().flatten().filter(move |entry| {
            let name = entry.file_name();
            prefixes.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        })
    };
    for entry in
        scratch(cache.join("bootstraps"), &[".new-"]).chain(scratch(cache.to_owned(), &[".selftest-", ".bind-"]))
    {
        let path = entry.path();
        let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "cannot remove what a crash left");
        }
    }
}

/// A relative path would mean something else to the daemon than to who sent it.
fn ensure_absolute(spec: &ImageSpec) -> Result<(), DaemonError> {
    let relative = [Some(&spec.bootstrap), spec.ca.as_ref()].into_iter().flatten().find(|path| !path.is_absolute());
    relative.map_or(Ok(()), |path| Err(DaemonError::Relative(path.clone())))
}
