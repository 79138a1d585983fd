//! Starting: from nothing, or in the place of a daemon that died.
//!
//! The order is what counts. Every image is taken over before the first event is answered, because
//! an event must find its device; the events that the dead daemon had taken are taken on before the
//! first new one is read, because a new one may have the same number. What this host can do is tried
//! out after that: readers wait.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::DaemonError;
use super::api::PrefetchOrder;
use super::blobfs::Shown;
use super::connections::Connections;
use super::keeper::{Inheritance, Keepers, Kind, Name};
use super::known::KnownImages;
use super::lookup::shown;
use super::mounts::{Daemon, Options, State};
use super::objects::Objects;
use super::observe::Occupied;
use super::origins::Origins;
use super::prepare::{Named, Prepared, resume};
use super::pulls::Pulls;
use super::records::{DeviceFile, Record, RecordId, Records, ensure_private};
use super::references::References;
use super::served::{Attachment, Mounted, Served, live};
use super::serving::{Backends, Legacy, device_file, spawn};
use super::trace::Traces;
use super::turns::Turns;
use super::unserved::Unserved;
use crate::base::{Chain, Digest};
use crate::cache::{Store, StoreOptions};
use crate::export::cachefiles::FsId;
use crate::export::{BackendKind, MountWatch, WatchId};
use crate::source::Network;
use crate::sys::fanotify::{Answer, Group};
use crate::sys::faultpoint;
use crate::sys::files::{InodeId, inode_id_at};
use crate::sys::journal::{Journal, Outstanding};
use crate::telemetry::Telemetry;

/// Events that a dead daemon had taken, with the numbers kept free for them.
type Events = Vec<(Outstanding, Option<OwnedFd>)>;

/// Files of devices that a dead daemon had open.
type Files = BTreeMap<InodeId, OwnedFd>;

/// What a dead daemon left, beside records and events, and what is found out about it while its images are
/// taken over.
#[derive(Default)]
struct Left {
    files: Files,
    connections: Connections,
    /// Images that several mounts share.
    prepared: HashMap<Digest, Arc<crate::image::Image>>,
}

impl Left {
    /// The file of a device. One that is marked must be the one that was opened before.
    fn open(&self, daemon: &Daemon, backend: BackendKind, device: &DeviceFile) -> Result<OwnedFd, DaemonError> {
        let path = daemon.store.data_path(&device.directory);
        let unusable = |cause| DaemonError::Io { path: path.clone(), cause };
        match self.files.get(&device.file()) {
            Some(file) => file.try_clone().map_err(unusable),
            None if backend == BackendKind::Fanotify => {
                Err(DaemonError::Record { what: "the keepers do not have the file of a device".to_owned() })
            }
            None => Ok(File::options().read(true).write(true).open(&path).map_err(unusable)?.into()),
        }
    }
}

impl Daemon {
    /// Opens the store, starts the keepers, and goes on with what a dead daemon left, if anything.
    pub fn start(
        options: Options,
        runtime: Handle,
        mut inherited: Option<Inheritance>,
    ) -> Result<Arc<Self>, DaemonError> {
        let began = Instant::now();
        let start = |what| move |cause| DaemonError::Start { what, cause };
        let take = |kind| inherited.as_ref().and_then(|it| it.take(Name::only(kind)));
        let (lock, instance) = (take(Kind::Lock), take(Kind::Watch));
        let (group, cachefiles) = (take(Kind::Group), take(Kind::Cachefiles));
        let sandbox = options.sandbox.clone();
        let store_options = StoreOptions { sandbox: sandbox.clone(), ..options.store.clone() };
        let telemetry = Telemetry::default();
        let lock = lock.map(File::from);
        let store = Store::open_locked(&options.cache, store_options, runtime.clone(), lock, telemetry.clone())?;
        let watch = instance.map_or_else(MountWatch::new, MountWatch::of).map_err(start("the watch on mounts"))?;
        let (events, left) = inherited.as_mut().map_or_else(Default::default, |it| {
            let files = it.devices().filter_map(|name| Some((device_file(name), it.take(name)?))).collect::<Files>();
            let left = Left { files, connections: Connections::of(it), prepared: HashMap::new() };
            (std::mem::take(&mut it.events), left)
        });
        let journal = inherited.as_mut().and_then(Inheritance::take_journal);
        let takes_over = inherited.is_some();
        ensure_private(&options.run).map_err(start("the directory of sockets"))?;
        let records = Records::open(&options.run).map_err(start("the records of served images"))?;
        // Keepers unmount and start daemons, so they live outside, and so does whoever starts them.
        let keepers = sandbox.outside(|| Keepers::start(options.keepers.clone(), inherited));
        let keepers = keepers.map_err(start("the keepers"))?;
        // A successor must not write to files whose readers still ask our group.
        keepers.hold(Name::only(Kind::Lock), store.lock_file().clone()).map_err(start("the keepers"))?;
        keepers.hold(Name::only(Kind::Watch), watch.instance().clone()).map_err(start("the keepers"))?;
        let group = group.map(|group| with_journal(group, journal, &keepers)).transpose();
        let legacy = Legacy { group: group.map_err(start("the fanotify service"))?, cachefiles };
        let backends = Backends::new(&options, legacy, &keepers, telemetry.clone())?;
        sweep(&options.cache);
        let objects = Arc::new(Objects::new(options.cache.join("cachefiles-maps")));
        let origins = Origins::new(Network::new(options.network(), telemetry.clone()));
        let references = References::new(options.cache.join("references"));
        let daemon = Arc::new(Self {
            options,
            started: began,
            origins,
            images: KnownImages::default(),
            telemetry,
            occupied: Occupied::default(),
            runtime,
            store,
            backends,
            keepers,
            records,
            objects,
            watch: Arc::new(watch),
            watcher: Mutex::default(),
            state: Mutex::new(State::default()),
            ending: OnceLock::new(),
            takeover_ms: OnceLock::new(),
            prefetches: Arc::default(),
            traces: Traces::default(),
            references,
            turns: Turns::default(),
            pulls: Pulls::default(),
            errands: Arc::default(),
            gives_up: watch::Sender::new(false),
        });
        if takes_over {
            daemon.take_over(left, events)?;
            let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            let _ = daemon.takeover_ms.set(ms);
            tracing::info!(ms, "took over from a daemon that has gone");
            daemon.keepers.note_takeover();
        }
        // Also after a takeover: the daemon that died may have died while it did this.
        daemon.end_unkept_mounts()?;
        let thread =
            spawn("mnt-0", &daemon, |daemon| daemon.follow_unmounts()).map_err(start("the watch on mounts"))?;
        *daemon.watcher.lock().unwrap() = Some(thread);
        daemon.say_uses_are_known();
        daemon.make_room_to_examine();
        daemon.backends.examine().map_err(start("the examination of this host"))?;
        faultpoint::reach("examined");
        Ok(daemon)
    }

    /// What this host can do is tried out on the cache's disk: a full one would look like a host that can do little.
    fn make_room_to_examine(&self) {
        const NEEDED: u64 = 4 << 20;
        let free = || rustix::fs::statvfs(&self.options.cache).map_or(u64::MAX, |it| it.f_bavail * it.f_frsize);
        if free() < NEEDED && !(self.store.make_room(NEEDED) && free() >= NEEDED) {
            tracing::warn!(
                cache = %self.options.cache.display(),
                "the cache's disk is full, and nothing there can go: this host may be found to do less than it can; \
                 make room and restart the daemon"
            );
        }
    }

    /// Goes on with the images of a dead daemon, and with its readers.
    fn take_over(self: &Arc<Self>, mut left: Left, events: Events) -> Result<(), DaemonError> {
        let taken = events.len();
        let start = |what| move |cause| DaemonError::Start { what, cause };
        let living = self.watch.living().map_err(start("the watch on mounts"))?;
        let mut known = HashSet::new();
        let mut prefetches = Vec::new();
        for (id, record) in self.records.load().map_err(start("the records of served images"))? {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    tracing::error!(%error, "the record of an image cannot be read; if it is mounted, its cold reads fail");
                    continue;
                }
            };
            let watch = record.superblock.map(WatchId::from);
            if watch.is_some_and(|watch| !living.contains(&watch)) {
                self.forget(id);
                continue;
            }
            known.extend(watch);
            if let Err(error) = self.take_over_one(id, &record, &mut left) {
                let (dir, why) = (record.dir.as_deref().unwrap_or(Path::new("-")), Chain(&error).to_string());
                tracing::error!(dir = %dir.display(), error = why, "an image cannot be served any more; its cold reads fail");
                if let Some(watch) = watch {
                    let uses = self.uses_of(&record);
                    self.leave_unserved(Unserved { watch, record: Some(id), dir: record.dir.clone(), uses, why });
                }
            }
            prefetches.extend(self.wanted_prefetch(&record));
            faultpoint::reach("adopted-one");
        }
        self.let_go(&left.connections);
        let files = left.files;
        let strangers: Vec<_> = living.difference(&known).copied().collect();
        if strangers.is_empty() {
            // What they were about has gone.
            self.records.remove_unreadable();
        }
        strangers.into_iter().for_each(|watch| self.leave_stranger(watch));
        let (fanotify, cachefiles) = self.backends.services();
        if let Some(fanotify) = fanotify {
            let all_served = self.state.lock().unwrap().unserved.is_empty();
            if all_served {
                let unused = files.iter().filter(|(id, _)| !fanotify.serves(**id));
                unused.for_each(|(id, file)| fanotify.forget(*id, file));
            } else {
                self.retire(&self.serve_what_is_present(&fanotify, &files));
            }
            fanotify.resume(events, all_served);
        }
        self.backends.go_on()?;
        for (dir, served, watch, order) in prefetches {
            self.prefetch_mounted(&dir, &served, watch, &order);
        }
        if let Some(Err(error)) = cachefiles.map(|service| service.restore()) {
            tracing::error!(%error, "this kernel does not deliver again what the last daemon had taken: readers that waited then have to be killed");
        }
        let mounts = self.state.lock().unwrap().mounts.len();
        self.telemetry.adoption.adoptions.inc();
        self.telemetry.adoption.mounts.add(mounts as u64);
        tracing::info!(mounts, waiting = taken, "goes on with the mounts and readers of the last daemon");
        Ok(())
    }

    /// What a mount that was taken over still wants to have fetched.
    fn wanted_prefetch(&self, record: &Record) -> Vec<(PathBuf, Served, WatchId, PrefetchOrder)> {
        let state = self.state.lock().unwrap();
        let mounted =
            record.dir.as_ref().filter(|_| !record.lingering).and_then(|dir| Some((dir, state.mounts.get(dir)?)));
        let Some((dir, Some(mounted))) = mounted else { return Vec::new() };
        let further = record.blobfs.iter().flat_map(Shown::further_prefetches);
        let orders = std::iter::once(&record.spec.prefetch).chain(further);
        let each = mounted.all().zip(orders);
        each.map(|(served, order)| (dir.clone(), served.clone(), mounted.watch, order.clone())).collect()
    }

    /// Superblocks of which nothing is known may read any of these files, of which it is not known either what is
    /// in them: they stay marked, so that whoever asks is denied. Images that are mounted from now on get files of
    /// their own.
    fn retire(&self, files: &BTreeSet<InodeId>) {
        for name in self.store.directories() {
            let path = self.store.data_path(&name);
            if inode_id_at(&path).is_ok_and(|id| files.contains(&id))
                && let Err(error) = std::fs::remove_file(&path)
            {
                tracing::error!(path = %path.display(), %error, "images with this blob cannot be served");
            }
        }
    }

    fn take_over_one(self: &Arc<Self>, id: RecordId, record: &Record, left: &mut Left) -> Result<(), DaemonError> {
        let damaged = |what: &str| DaemonError::Record { what: what.to_owned() };
        let watch = record.superblock.map(WatchId::from);
        if record.backend == BackendKind::Blobfs {
            let watch = watch.ok_or_else(|| damaged("no superblock"))?;
            self.watch.adopt(watch);
            let legacy = left.connections.take(id, record);
            let resume = &mut |of: &Record| {
                let image = self.resume_one(of, left)?;
                self.adopt_stored(of, image, &|it| left.open(self, of.backend, it))
            };
            let mounted = self.adopt_blobfs((id, record), watch, legacy, resume)?;
            self.note_adopted(record, mounted);
            return Ok(());
        }
        let mut image = self.resume_one(record, left)?;
        // Nobody else holds them until they are marked.
        let mut devices = Vec::new();
        let mut served = match record.backend {
            BackendKind::Fanotify | BackendKind::FuseDevice | BackendKind::FuseTree | BackendKind::Blobfs => {
                let served;
                (served, devices) = self.adopt_stored(record, image, &|it| left.open(self, record.backend, it))?;
                served
            }
            BackendKind::Cachefiles => {
                if self.backends.services().1.is_none() {
                    return Err(damaged("its kernel cache went with the last daemon; unmount it and mount it again"));
                }
                let name = record.name.as_ref().ok_or_else(|| damaged("no name"))?;
                let name = FsId::new(&name.id, name.domain.as_deref())?;
                let domain = name.domain.as_deref().unwrap_or(&name.id);
                let maps = image.image.devices().iter().map(|device| self.objects.saved(domain, &device.blob));
                let maps = maps.map(|map| map.map(Arc::new)).collect::<Option<Vec<_>>>();
                image.maps = maps.ok_or_else(|| damaged("the map of a blob is lost"))?;
                let image = Arc::new(image);
                // Of a mount it is asked for afterwards.
                let order = if watch.is_none() { record.spec.prefetch.clone() } else { PrefetchOrder::None };
                let served = self.serve_cachefiles(&order, image, &name, record.why.clone())?.0;
                if watch.is_none() {
                    self.state.lock().unwrap().registered.insert(name, (served, id));
                    return Ok(());
                }
                served
            }
        };
        let watch = watch.ok_or_else(|| damaged("no superblock"))?;
        self.watch.adopt(watch);
        let attachment = match record.backend {
            BackendKind::Fanotify => {
                let service = self.backends.fanotify(&self.keepers)?;
                Attachment::Fanotify(service.adopt(&live(record.backend, &served.prepared, &devices), watch)?)
            }
            BackendKind::FuseDevice | BackendKind::FuseTree | BackendKind::Blobfs => {
                let live = live(record.backend, &served.prepared, &devices);
                self.adopt_connection((id, record), &live, watch, &mut left.connections)?
            }
            BackendKind::Cachefiles => Attachment::Cachefiles,
        };
        served.transport = self.transport_of(&attachment);
        self.note_adopted(record, Mounted { watch, record: id, served, further: Vec::new(), attachment });
        Ok(())
    }

    fn note_adopted(&self, record: &Record, mounted: Mounted) {
        let mut state = self.state.lock().unwrap();
        match &record.dir {
            Some(dir) if !record.lingering => drop(state.mounts.insert(dir.clone(), Some(mounted))),
            _ => state.lingering.push(mounted),
        }
    }

    /// The image of a record, whose devices are not there yet.
    fn resume_one(&self, record: &Record, left: &mut Left) -> Result<Prepared, DaemonError> {
        let key = Digest::from_hex(&record.key);
        let key = key.ok_or_else(|| DaemonError::Record { what: "no digest".to_owned() })?;
        let source = self.origins.open_or_absent(&record.spec);
        let kept = self.store.shelves().bootstraps().keep_known(key);
        let mut image = match left.prepared.get(&key) {
            Some(image) => Prepared::again(kept, image.clone(), source),
            None => resume(kept, source)?,
        };
        left.prepared.insert(key, image.image.clone());
        image.named = record
            .manifest
            .as_deref()
            .and_then(Digest::from_hex)
            .zip(record.spec.reference.clone())
            .map(|(manifest, reference)| Named { reference: shown(&reference), manifest, unconfirmed: None });
        Ok(image)
    }
}

/// A group with the journal of its events. If there is none that can be read, whoever waits is
/// denied: what number an event has is unknown, so all that are possible are tried.
fn with_journal(group: OwnedFd, journal: Option<Journal>, keepers: &Keepers) -> io::Result<(OwnedFd, Journal)> {
    if let Some(journal) = journal {
        return Ok((group, journal));
    }
    let answering = Group::from(group.try_clone()?);
    for number in 0..Journal::NUMBERS {
        // ENOENT for the numbers that name nothing.
        let _ = answering.answer_number(number, Answer::Deny(libc::EIO));
    }
    let journal = Journal::create()?;
    keepers.hold(Name::only(Kind::Journal), Arc::new(journal.as_fd().try_clone_to_owned()?))?;
    Ok((group, journal))
}

/// Removes what a crash left half made. Only with the store's lock in hand.
fn sweep(cache: &Path) {
    let scratch = |dir: PathBuf, prefixes: &'static [&'static str]| {
        std::fs::read_dir(dir).into_iter().flatten().flatten().filter(move |entry| {
            let name = entry.file_name();
            prefixes.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
        })
    };
    for entry in scratch(cache.join("bootstraps"), &[".new-"])
        .chain(scratch(cache.join("references"), &[".new-"]))
        .chain(scratch(cache.to_owned(), &[".selftest-", ".bind-"]))
    {
        let path = entry.path();
        let removed: io::Result<()> =
            if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        if let Err(error) = removed {
            tracing::warn!(path = %path.display(), %error, "cannot remove what a crash left");
        }
    }
}
