//! Prefetches of mounted images: what is wanted of an image, on its way or done.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::api::{PrefetchOrder, PrefetchReport, PrefetchRequest, PrefetchTarget};
use super::order::plan;
use super::served::{Live, Served};
use super::{Daemon, DaemonError};
use crate::cache::{Device, Engine, Prefetch, PrefetchStats};
use crate::export::WatchId;

/// Ended prefetches that are still told about.
const MOST_ENDED: usize = 64;

/// Most prefetches of one image that are under way at once.
const MOST_RUNNING: usize = 16;

/// How long the kernel may take to set up the objects of a new mount.
const SET_UP: Duration = Duration::from_secs(5);

/// All prefetches, in the order in which they began.
#[derive(Debug, Default)]
pub(super) struct Prefetches {
    last: AtomicU64,
    jobs: Mutex<Vec<Job>>,
}

#[derive(Debug)]
struct Job {
    id: u64,
    dir: PathBuf,
    image: String,
    order: &'static str,
    remarks: Vec<String>,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Going(Prefetch),
    /// What is left to tell, without what it took to do it.
    Ended(PrefetchStats),
}

impl Job {
    /// Lets go of what an ended prefetch held.
    fn settle(&mut self) {
        if let Work::Going(prefetch) = &self.work
            && prefetch.has_ended()
        {
            self.work = Work::Ended(prefetch.stats());
        }
    }

    fn cancel(&mut self) {
        if let Work::Going(prefetch) = &self.work {
            prefetch.cancel();
            self.settle();
        }
    }

    fn report(&mut self) -> PrefetchReport {
        self.settle();
        let stats = match &self.work {
            Work::Going(prefetch) => prefetch.stats(),
            Work::Ended(stats) => stats.clone(),
        };
        let (dir, image, order) = (self.dir.clone(), self.image.clone(), self.order.to_owned());
        PrefetchReport { id: self.id, dir, image, order, remarks: self.remarks.clone(), stats }
    }
}

impl Prefetches {
    /// Begins a prefetch for the image mounted at `dir`. Waits a moment if the kernel has just begun to
    /// set it up.
    pub(super) fn start(
        &self,
        dir: &Path,
        served: &Served,
        engine: &Engine,
        order: &PrefetchOrder,
    ) -> Result<PrefetchReport, DaemonError> {
        let plan = plan(&served.prepared.image, order);
        let devices = devices(served)?;
        let mut jobs = self.jobs.lock().unwrap();
        jobs.iter_mut().for_each(Job::settle);
        let is_going = |job: &&Job| matches!(job.work, Work::Going(_));
        if jobs.iter().filter(is_going).filter(|job| job.dir == dir).count() >= MOST_RUNNING {
            return Err(DaemonError::TooManyPrefetches(dir.to_owned()));
        }
        let ended = jobs.iter().filter(|job| !is_going(job)).count();
        let mut surplus = ended.saturating_sub(MOST_ENDED);
        jobs.retain(|job| {
            let leaves = surplus > 0 && !is_going(&job);
            surplus -= usize::from(leaves);
            !leaves
        });
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let prefetch = Prefetch::start(engine, &devices, &plan.wants, plan.rest);
        let image = served.prepared.key.to_string();
        let work = Work::Going(prefetch);
        let mut job = Job { id, dir: dir.to_owned(), image, order: order.name(), remarks: plan.remarks, work };
        let report = job.report();
        jobs.push(job);
        Ok(report)
    }

    /// Stops what is under way for `dir`; for all images if it is `None`.
    pub(super) fn cancel(&self, dir: Option<&Path>) -> Vec<PrefetchReport> {
        let mut jobs = self.jobs.lock().unwrap();
        let meant = |job: &&mut Job| dir.is_none_or(|dir| job.dir == dir) && matches!(job.work, Work::Going(_));
        let cancelled = jobs.iter_mut().filter(meant).map(|job| {
            job.cancel();
            job.report()
        });
        cancelled.collect()
    }

    fn list(&self) -> Vec<PrefetchReport> {
        self.jobs.lock().unwrap().iter_mut().map(Job::report).collect()
    }

    fn get(&self, id: u64) -> Option<PrefetchReport> {
        self.jobs.lock().unwrap().iter_mut().find(|job| job.id == id).map(Job::report)
    }
}

/// The devices of an image. Those in the kernel's own cache are there once it has set them up.
pub(super) fn devices(served: &Served) -> Result<Vec<Arc<Device>>, DaemonError> {
    let until = Instant::now() + SET_UP;
    let mut devices = Vec::new();
    for (map, live) in served.prepared.maps.iter().zip(&served.devices) {
        loop {
            if let (Live::Object(_), Some(registration)) = (live, &served.registration) {
                registration.wake(map.blob().as_str());
            }
            if let Some(device) = live.device() {
                break devices.push(device);
            }
            if Instant::now() >= until || matches!(live, Live::Stored(_)) {
                return Err(DaemonError::NotOpen(map.blob().clone()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(devices)
}

impl Daemon {
    /// Begins to fetch what is wanted of a mounted image, behind all readers. May wait a moment for the
    /// kernel.
    ///
    /// # Errors
    /// If the target is not mounted here, or is not one image.
    pub fn prefetch(&self, request: &PrefetchRequest) -> Result<PrefetchReport, DaemonError> {
        let (dir, served) = self.find(&request.target)?;
        self.prefetches.start(&dir, &served, self.engine(), &request.order)
    }

    /// All prefetches under way, and those that ended last.
    pub fn list_prefetches(&self) -> Vec<PrefetchReport> {
        self.prefetches.list()
    }

    /// One of them.
    ///
    /// # Errors
    /// If there is none of this number any more.
    pub fn get_prefetch(&self, id: u64) -> Result<PrefetchReport, DaemonError> {
        self.prefetches.get(id).ok_or(DaemonError::NoPrefetch(id))
    }

    /// Stops all prefetches of a mounted image; gives those that were under way.
    ///
    /// # Errors
    /// As [`Daemon::prefetch`].
    pub fn cancel_prefetch(&self, target: &PrefetchTarget) -> Result<Vec<PrefetchReport>, DaemonError> {
        let (dir, _) = self.find(target)?;
        Ok(self.prefetches.cancel(Some(&dir)))
    }

    /// Begins what a mount was asked to fetch ahead, without holding up who asked.
    pub(super) fn prefetch_mounted(&self, dir: &Path, served: &Served, watched: WatchId, order: &PrefetchOrder) {
        if *order == PrefetchOrder::None {
            return;
        }
        if *order == PrefetchOrder::Hints && served.prepared.image.prefetch().next().is_none() {
            return;
        }
        let (prefetches, engine, watch) = (self.prefetches.clone(), self.engine().clone(), self.watch().clone());
        let (dir, served, order) = (dir.to_owned(), served.clone(), order.clone());
        let start = move || {
            match prefetches.start(&dir, &served, &engine, &order) {
                Ok(report) => {
                    tracing::info!(dir = %dir.display(), bytes = report.stats.bytes, "prefetching {}", report.order)
                }
                Err(error) => tracing::warn!(dir = %dir.display(), %error, "nothing is prefetched"),
            }
            // Unmounted meanwhile: whoever did it found nothing to stop.
            if !watch.is_alive(watched) {
                prefetches.cancel(Some(&dir));
            }
        };
        drop(self.runtime().spawn_blocking(start));
    }
}
