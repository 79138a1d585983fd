use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime};

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::DaemonError;
use super::api::observe::millis;
use super::api::{BackendChoice, ImageReport, Info, MountRequest, PrefetchTarget};
use super::asker::{Asker, WhileWanted};
use super::keeper::{self, Keepers};
use super::known::KnownImages;
use super::objects::Objects;
use super::observe::Occupied;
use super::origins::Origins;
use super::prefetch::Prefetches;
use super::prepare::{Prepared, Wanted, prepare};
use super::pulls::Pulls;
use super::records::{RecordId, Records};
use super::references::References;
use super::remote::FETCH_LAYER;
use super::served::{Mounted, Served};
use super::serving::Backends;
use super::stop::Ending;
use super::trace::Traces;
use super::turns::Turns;
use super::unserved::Unserved;
use crate::base::{BlobId, Chain};
use crate::blob::UnitMap;
use crate::cache::{Engine, Store, StoreOptions};
use crate::credentials::Credentials;
use crate::export::cachefiles::FsId;
use crate::export::fanotify::Caretaking;
use crate::export::fuse::Transport;
use crate::export::{BackendKind, MountWatch};
use crate::net::hosts::{LimitTables, Registries};
use crate::source::BlobSource;
use crate::sys::descriptors::alone;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Telemetry;

/// Where a daemon keeps its things.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of the cache: on ext4, XFS or btrfs.
    pub cache: PathBuf,
    /// Directory of sockets.
    pub run: PathBuf,
    pub store: StoreOptions,
    /// How keepers are started.
    pub keepers: keeper::Plan,
    /// Backends in the order of preference where a mount asks for none.
    pub backends: Vec<BackendKind>,
    /// How requests of FUSE are to come, where there is a choice.
    pub fuse_transport: Transport,
    /// Directory with a `hosts.toml` for each registry.
    pub hosts_dir: PathBuf,
    /// Hosts of registries that go before it.
    pub registries: Registries,
    /// Limits of hosts.
    pub host_limits: LimitTables,
    /// Who it is to registries.
    pub credentials: Credentials,
    /// The way out of the sandbox that the daemon is started in.
    pub sandbox: Sandbox,
}

/// The daemon: one store, its backends, and everything mounted.
#[derive(Debug)]
pub struct Daemon {
    pub(super) options: Options,
    pub(super) started: Instant,
    pub(super) telemetry: Telemetry,
    pub(super) occupied: Occupied,
    pub(super) runtime: Handle,
    pub(super) store: Arc<Store>,
    pub(super) backends: Backends,
    pub(super) keepers: Arc<Keepers>,
    pub(super) records: Records,
    pub(super) objects: Arc<Objects>,
    pub(super) origins: Origins,
    pub(super) images: KnownImages,
    pub(super) watch: Arc<MountWatch>,
    pub(super) watcher: Mutex<Option<JoinHandle<()>>>,
    pub(super) state: Mutex<State>,
    pub(super) ending: OnceLock<Ending>,
    pub(super) takeover_ms: OnceLock<u64>,
    pub(super) prefetches: Arc<Prefetches>,
    pub(super) traces: Traces,
    pub(super) references: References,
    pub(super) turns: Turns,
    pub(super) pulls: Pulls,
    /// A copy for each request that takes its time and has nothing to show for it yet.
    pub(super) errands: Arc<()>,
    /// Whether what somebody waits for is given up: see [`Asker`].
    pub(super) gives_up: watch::Sender<bool>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) stopping: bool,
    /// By mount point. `None` reserves the place while the mount is being made.
    pub(super) mounts: BTreeMap<PathBuf, Option<Mounted>>,
    /// Unmounted here, but the superblock lives on: in another mount namespace, or in open files.
    pub(super) lingering: Vec<Mounted>,
    pub(super) registered: BTreeMap<FsId, (Served, RecordId)>,
    /// Superblocks of a dead daemon that could not be taken over: their cold reads fail.
    pub(super) unserved: Vec<Unserved>,
    /// Devices that they may read, on the fanotify path.
    pub(super) caretakings: Vec<Caretaking>,
}

/// The domain of this daemon's own mounts on the cachefiles path.
pub(super) const DOMAIN: &str = "rafsd";

impl Daemon {
    /// Facts about the daemon and its host.
    pub fn info(&self) -> Info {
        let (events_hit, events_missed, cachefiles_reads) = self.backends.counts();
        Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: millis(self.started.elapsed()),
            keeper_alive: self.keepers.is_alive(),
            cache: self.options.cache.clone(),
            events_hit,
            events_missed,
            cachefiles_reads,
            takeover_ms: self.takeover_ms.get().copied(),
            unserved: self.unserved(),
            host: self.backends.host().clone(),
        }
    }

    /// Fails if this host cannot serve by `choice`.
    pub fn ensure_backend(&self, choice: BackendChoice) -> Result<(), DaemonError> {
        self.backends.choose(choice).map(|_| ())
    }

    /// The one name of a directory of the host, given by an absolute path. Looked up by a thread that may wait for ever:
    /// the path may lead through a mount of ours.
    pub(super) fn directory(&self, dir: &Path) -> Result<PathBuf, DaemonError> {
        let found = self.real_name(dir).ok_or_else(|| DaemonError::NotADirectory(dir.to_owned()))?;
        // What lies there would be out of reach, or look as if it were ours.
        let own = [&self.options.cache, &self.options.run];
        match own.iter().any(|own| own.starts_with(&found) || found.starts_with(own)) {
            true => Err(DaemonError::OwnPlace(found)),
            false => Ok(found),
        }
    }

    pub(super) fn real_name(&self, dir: &Path) -> Option<PathBuf> {
        let look = || std::fs::canonicalize(dir).ok().filter(|found| dir.is_absolute() && found.is_dir());
        self.options.sandbox.outside(|| alone(&[], look)).ok().flatten()
    }

    /// Mounts an image and returns when it is usable. Given up as long as it is being prepared, it leaves nothing behind.
    /// Blocks.
    pub fn mount(&self, request: &MountRequest, asker: &Asker) -> Result<ImageReport, DaemonError> {
        // One directory, one name: two spellings must not be two mounts.
        let dir = self.directory(&request.dir)?;
        let request = &MountRequest { dir: dir.clone(), ..request.clone() };
        request.image.whereabouts()?;
        self.note_taken_away(&dir);
        let reserved = self.reserve(&dir)?;
        let mounted = self.mount_reserved(request, asker).inspect_err(|error| self.forget_trace(request, error))?;
        let report = mounted.served.report(Some(&dir), &self.telemetry);
        tracing::info!(dir = %dir.display(), backend = %report.backend, image = report.image, "mounted");
        let (served, watched) = (mounted.served.clone(), mounted.watch);
        reserved.fill(mounted);
        self.prefetch_mounted(&dir, &served, watched, &request.image.prefetch);
        drop(served);
        // Somebody may have unmounted it before we could write it down.
        self.bury();
        Ok(report)
    }

    /// Takes back what was mounted at `dir` for somebody who never learnt of it. Blocks.
    pub(super) fn take_back(&self, dir: &Path) {
        self.traces.discard(dir);
        // Lazily: whoever found it meanwhile is served until the end.
        match self.unmount(dir, true) {
            Ok(_) | Err(DaemonError::NotMounted(_)) => {}
            Err(error) => tracing::warn!(error = %Chain(&error), "stays mounted, though whoever asked has gone"),
        }
    }

    /// A mount that failed is not recorded. The trace that it was refused for is another one's.
    fn forget_trace(&self, request: &MountRequest, error: &DaemonError) {
        if request.trace.is_some() && !matches!(error, DaemonError::Traced(_)) {
            self.traces.discard(&request.dir);
        }
    }

    pub(super) fn reserve<'a>(&'a self, dir: &'a Path) -> Result<Reservation<'a>, DaemonError> {
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

    fn mount_reserved(&self, request: &MountRequest, asker: &Asker) -> Result<Mounted, DaemonError> {
        let (kind, why) = self.backends.choose(request.backend)?;
        // Held until the maps of the image are kept: who comes for the same one meanwhile finds all of it.
        let found = self.look_up_to_mount(&request.image, asker)?;
        let queue = found.queue(self);
        let _turn = queue.as_ref().map(|queue| queue.wait(Instant::now() + FETCH_LAYER, asker)).transpose()?;
        let prepared = self.prepare(&request.image, &found, asker)?;
        prepared.or_undone(|prepared| {
            asker.ensure_wanted()?;
            self.mount_prepared(request, (kind, why), prepared)
        })
    }

    fn mount_prepared(
        &self,
        request: &MountRequest,
        choice: (BackendKind, String),
        mut prepared: Prepared,
    ) -> Result<Mounted, DaemonError> {
        let (kind, why) = self.backends.fit(choice, request.backend, &prepared.image)?;
        if self.state.lock().unwrap().stopping {
            return Err(DaemonError::Stopping);
        }
        let record = self.records.reserve();
        let mounted = match kind {
            BackendKind::Cachefiles => {
                let own = prepared.maps.clone();
                self.remember(&mut prepared, own);
                self.mount_cachefiles(request, Arc::new(prepared), why, record)
            }
            BackendKind::Fanotify | BackendKind::FuseDevice | BackendKind::FuseTree | BackendKind::Blobfs => {
                self.mount_stored(kind, request, prepared, why, record)
            }
        };
        mounted.inspect_err(|_| self.forget(record))
    }

    pub(super) fn prepare_from(
        &self,
        wanted: &Wanted<'_>,
        source: &Arc<dyn BlobSource>,
        asker: &Asker,
    ) -> Result<Prepared, DaemonError> {
        let asked = WhileWanted { source: source.clone(), asker: asker.clone() };
        let saved = |blob: &BlobId| self.store.saved_map(blob).or_else(|| self.objects.saved(DOMAIN, blob));
        let bootstraps = self.store.shelves().bootstraps();
        let once = || prepare(wanted, (source.clone(), &asked), bootstraps, &self.images, &saved, &self.runtime);
        let outcome = match once() {
            Err(DaemonError::Store(error)) if error.is_full() && self.store.make_room(1) => once(),
            outcome => outcome,
        };
        // Whatever did not come for that reason.
        outcome.map_err(|error| asker.refusal().unwrap_or(error))
    }

    /// The store, for what is said about it and done to it beside mounting.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Everything that is served, with where it is mounted, if anywhere: lingering mounts too.
    pub(super) fn all_served(&self) -> Vec<(Option<PathBuf>, Served)> {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.iter().filter_map(|(dir, mounted)| Some((dir, mounted.as_ref()?)));
        let mounted =
            mounted.flat_map(|(dir, mounted)| mounted.all().map(|served| (Some(dir.clone()), served.clone())));
        let lingering = state.lingering.iter().flat_map(Mounted::all).map(|served| (None, served.clone()));
        mounted.chain(lingering).chain(state.registered.values().map(|(served, _)| (None, served.clone()))).collect()
    }

    /// Whether it is on its way out, so that long work should end.
    pub(super) fn is_stopping(&self) -> bool {
        self.state.lock().unwrap().stopping
    }

    /// Keeps in mind what was found out about an image whose maps are `own`.
    pub(super) fn remember(&self, prepared: &mut Prepared, own: Vec<Arc<UnitMap>>) {
        let Some(origin) = prepared.origin.take() else { return };
        // What others have added is theirs to say, should they be gone by then.
        let shared = |(own, shared): (Arc<UnitMap>, &Arc<UnitMap>)| if *shared == own { shared.clone() } else { own };
        let maps = own.into_iter().zip(&prepared.maps).map(shared).collect();
        if let Ok(known) = prepared.known(maps) {
            self.images.remember(origin, known, SystemTime::now());
        }
    }

    /// Everything that is mounted or registered.
    pub fn list(&self) -> Vec<ImageReport> {
        // Outside the lock: a report looks at every unit.
        let report = |(dir, served): (Option<PathBuf>, Served)| served.report(dir.as_ref(), &self.telemetry);
        self.served().into_iter().map(report).collect()
    }

    /// Everything that is mounted or registered, with its mount point.
    pub(super) fn served(&self) -> Vec<(Option<PathBuf>, Served)> {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.iter().filter_map(|(dir, mounted)| Some((dir, mounted.as_ref()?)));
        let mounts = mounted.flat_map(|(dir, mounted)| mounted.all().map(|served| (Some(dir.clone()), served.clone())));
        mounts.chain(state.registered.values().map(|(served, _)| (None, served.clone()))).collect()
    }

    /// The mounted image that is meant, and where it is mounted.
    pub(super) fn find(&self, target: &PrefetchTarget) -> Result<(PathBuf, Served), DaemonError> {
        let state = self.state.lock().unwrap();
        let mounted = state.mounts.iter().filter_map(|(dir, mounted)| Some((dir, mounted.as_ref()?)));
        let mounted = mounted.flat_map(|(dir, mounted)| mounted.all().map(move |served| (dir, served)));
        match (&target.dir, &target.image) {
            (Some(dir), None) => {
                let mut there = mounted.filter(|(at, _)| *at == dir);
                let found = there.next().ok_or_else(|| DaemonError::NotMounted(dir.clone()))?;
                if there.next().is_some() {
                    return Err(DaemonError::SeveralAt(dir.clone()));
                }
                Ok((found.0.clone(), found.1.clone()))
            }
            (None, Some(digits)) => {
                let meant: Vec<_> =
                    mounted.filter(|(_, served)| served.prepared.key.to_string().starts_with(digits)).collect();
                let (dir, served) = meant.first().ok_or_else(|| DaemonError::NoImage(digits.clone()))?;
                if meant.iter().any(|(_, other)| other.prepared.key != served.prepared.key) {
                    return Err(DaemonError::SeveralImages(digits.clone()));
                }
                Ok(((*dir).clone(), (*served).clone()))
            }
            _ => Err(DaemonError::NoTarget),
        }
    }

    pub(super) fn engine(&self) -> &Arc<Engine> {
        self.store.engine()
    }

    pub(super) fn watch(&self) -> &Arc<MountWatch> {
        &self.watch
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Whether nothing is mounted, being mounted, lingering or registered, by us or by others.
    pub fn is_idle(&self) -> bool {
        let state = self.state.lock().unwrap();
        !self.backends.has_open_objects()
            && !self.pulls.are_under_way()
            && Arc::strong_count(&self.errands) == 1
            && state.mounts.is_empty()
            && state.lingering.is_empty()
            && state.unserved.is_empty()
            && state.registered.is_empty()
    }

    /// Lets go of what served superblocks that are gone.
    pub(super) fn bury(&self) {
        let mut gone = Vec::new();
        let mut state = self.state.lock().unwrap();
        let is_dead = |mounted: &Mounted| !self.watch.is_alive(mounted.watch);
        gone.extend(state.lingering.extract_if(.., |mounted| is_dead(mounted)));
        let dead: Vec<_> =
            state.mounts.iter().filter(|(_, m)| m.as_ref().is_some_and(is_dead)).map(|(d, _)| d.clone()).collect();
        for dir in dead {
            tracing::info!(dir = %dir.display(), "unmounted");
            self.prefetches.cancel(Some(&dir));
            gone.extend(state.mounts.remove(&dir).flatten());
        }
        drop(state);
        self.bury_the_unserved();
        // Outside the lock: the last owner of a device waits for the disk.
        for mounted in gone {
            let record = mounted.record;
            mounted.release();
            self.forget(record);
        }
    }

    /// Learns of every superblock that goes away, whoever unmounted it.
    pub(super) fn follow_unmounts(&self) -> io::Result<()> {
        while self.watch.wait()?.is_some() {
            self.bury();
        }
        Ok(())
    }
}

/// A mount point that a mount is being made for. Dropping it frees the place unless it was used.
pub(super) struct Reservation<'a> {
    daemon: &'a Daemon,
    dir: &'a Path,
}

impl Reservation<'_> {
    /// Puts the mount into its place. From then on it may be gone, and the place another one's.
    pub(super) fn fill(self, mounted: Mounted) {
        self.daemon.state.lock().unwrap().mounts.insert(self.dir.to_owned(), Some(mounted));
        std::mem::forget(self);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut state = self.daemon.state.lock().unwrap();
        if state.mounts.get(self.dir).is_some_and(Option::is_none) {
            state.mounts.remove(self.dir);
        }
    }
}
