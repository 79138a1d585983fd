//! Images that are brought here whole without being mounted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::api::{PrefetchOrder, PullReport, PullRequest};
use super::lookup::Found;
use super::order::plan;
use super::prepare::Prepared;
use super::remote::FETCH_LAYER;
use super::{Daemon, DaemonError};
use crate::cache::{Device, Prefetch, PrefetchStats};

/// Ended pulls that are still told about.
const MOST_ENDED: usize = 64;

/// Most pulls that are under way at once.
const MOST_RUNNING: usize = 64;

/// How often it is looked whether a pull has ended, so that it lets go of what it held.
const STEP: Duration = Duration::from_millis(200);

/// All pulls, in the order in which they began.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    last: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    jobs: Vec<Job>,
    /// Pulls of which is being found out what they are.
    beginning: usize,
    /// The daemon ends.
    is_closed: bool,
}

/// A pull that is beginning. Dropped before it is one, it was none.
struct Beginning<'a>(&'a Pulls);

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().beginning -= 1;
    }
}

#[derive(Debug)]
struct Job {
    id: u64,
    name: String,
    manifest: Option<String>,
    image: String,
    work: Work,
}

#[derive(Debug)]
enum Work {
    /// The devices and the bootstrap stay until it is done.
    Going { prefetch: Prefetch, _devices: Vec<Arc<Device>>, _prepared: Arc<Prepared> },
    /// What is left to tell, without what it took to do it.
    Ended(PrefetchStats),
}

impl Job {
    fn settle(&mut self) {
        if let Work::Going { prefetch, .. } = &self.work
            && prefetch.has_ended()
        {
            self.work = Work::Ended(prefetch.stats());
        }
    }

    fn is_going(&self) -> bool {
        matches!(self.work, Work::Going { .. })
    }

    fn cancel(&mut self) {
        if let Work::Going { prefetch, .. } = &self.work {
            prefetch.cancel();
            self.settle();
        }
    }

    fn report(&mut self) -> PullReport {
        self.settle();
        let stats = match &self.work {
            Work::Going { prefetch, .. } => prefetch.stats(),
            Work::Ended(stats) => stats.clone(),
        };
        let (name, manifest, image) = (self.name.clone(), self.manifest.clone(), self.image.clone());
        PullReport { id: self.id, name, manifest, image, stats }
    }
}

impl Pulls {
    /// Whether some are under way.
    pub(super) fn are_under_way(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        state.jobs.iter_mut().for_each(Job::settle);
        state.beginning > 0 || state.jobs.iter().any(Job::is_going)
    }

    /// Stops all of them, and has no others begin.
    pub(super) fn close(&self) {
        let mut state = self.state.lock().unwrap();
        state.is_closed = true;
        state.jobs.iter_mut().for_each(Job::cancel);
    }

    fn begin(&self) -> Result<Beginning<'_>, DaemonError> {
        let mut state = self.state.lock().unwrap();
        let going = state.jobs.iter().filter(|job| job.is_going()).count();
        if state.is_closed {
            return Err(DaemonError::Stopping);
        }
        if going + state.beginning >= MOST_RUNNING {
            return Err(DaemonError::TooManyPulls);
        }
        state.beginning += 1;
        Ok(Beginning(self))
    }

    fn add(&self, mut job: Job) -> Result<PullReport, DaemonError> {
        let mut state = self.state.lock().unwrap();
        if state.is_closed {
            job.cancel();
            return Err(DaemonError::Stopping);
        }
        let jobs = &mut state.jobs;
        jobs.iter_mut().for_each(Job::settle);
        let ended = jobs.iter().filter(|job| !job.is_going()).count();
        let mut surplus = ended.saturating_sub(MOST_ENDED);
        jobs.retain(|job| {
            let leaves = surplus > 0 && !job.is_going();
            surplus -= usize::from(leaves);
            !leaves
        });
        let report = job.report();
        jobs.push(job);
        Ok(report)
    }

    /// Whether this one still holds what it needs.
    fn is_going(&self, id: u64) -> bool {
        let settled = |job: &mut Job| {
            job.settle();
            job.is_going()
        };
        self.with(id, settled).unwrap_or(false)
    }

    fn with<T>(&self, id: u64, work: impl FnOnce(&mut Job) -> T) -> Result<T, DaemonError> {
        let mut state = self.state.lock().unwrap();
        state.jobs.iter_mut().find(|job| job.id == id).map(work).ok_or(DaemonError::NoPull(id))
    }
}

impl Daemon {
    /// Begins to bring an image here whole, into the cache in files; what the cachefiles backend mounts is copied from there.
    /// Returns when it is known what that is. Blocks.
    ///
    /// # Errors
    /// As [`Daemon::mount`], as far as that does not concern the mount.
    pub fn pull(self: &Arc<Self>, request: &PullRequest) -> Result<PullReport, DaemonError> {
        let spec = &request.image;
        let _beginning = self.pulls.begin()?;
        // It goes on without whoever asked for it.
        let asker = &self.asker();
        let found = self.look_up(spec, asker)?;
        let queue = found.queue(self);
        let turn = queue.as_ref().map(|queue| queue.wait(Instant::now() + FETCH_LAYER, asker)).transpose()?;
        let mut prepared = self.prepare(spec, &found, asker)?;
        let open = |map: &Arc<_>| self.store.device(Arc::clone(map), prepared.source.clone());
        let devices = prepared.maps.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let own = std::mem::replace(&mut prepared.maps, devices.iter().map(|device| device.map()).collect());
        self.remember(&mut prepared, own);
        prepared.kept().settle();
        drop(turn);
        let plan = plan(&prepared.image, &PrefetchOrder::All);
        let prefetch = Prefetch::start(self.engine(), &devices, &plan.wants, plan.rest);
        let name = match &found {
            Found::File(path) => path.display().to_string(),
            Found::Image { resolved, .. } => resolved.reference.to_string(),
        };
        let id = self.pulls.last.fetch_add(1, Ordering::Relaxed) + 1;
        let report = self.pulls.add(Job {
            id,
            name,
            manifest: prepared.named.as_ref().map(|named| named.manifest.to_string()),
            image: prepared.key.to_string(),
            work: Work::Going { prefetch, _devices: devices, _prepared: Arc::new(prepared) },
        })?;
        let daemon = Arc::downgrade(self);
        // Nobody may ask again, and what it holds cannot be evicted.
        drop(self.runtime().spawn(async move {
            while daemon.upgrade().is_some_and(|daemon| daemon.pulls.is_going(id)) {
                tokio::time::sleep(STEP).await;
            }
        }));
        Ok(report)
    }

    /// All pulls under way, and those that ended last.
    pub fn list_pulls(&self) -> Vec<PullReport> {
        self.pulls.state.lock().unwrap().jobs.iter_mut().map(Job::report).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// If there is none of this number any more.
    pub fn get_pull(&self, id: u64) -> Result<PullReport, DaemonError> {
        self.pulls.with(id, Job::report)
    }

    /// Stops one of them; what has come stays.
    ///
    /// # Errors
    /// As [`Daemon::get_pull`].
    pub fn cancel_pull(&self, id: u64) -> Result<PullReport, DaemonError> {
        self.pulls.with(id, |job| {
            job.cancel();
            job.report()
        })
    }
}
