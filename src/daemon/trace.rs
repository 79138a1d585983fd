//! Traces of mounted images: which parts of which files were read first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use super::api::{PrefetchTarget, TraceReport, TraceRequest, TraceResult};
use super::attribution::{attribute, list};
use super::prefetch::devices;
use super::{Daemon, DaemonError};
use crate::cache::{Device, Trace};
use crate::image::Image;

/// Most traces at once, those of images that were unmounted meanwhile among them.
const MOST_TRACES: usize = 64;

/// All traces, by mount point. They outlive their mount, so that unmounting loses nothing.
#[derive(Debug, Default)]
pub(super) struct Traces(Mutex<BTreeMap<PathBuf, Recording>>);

/// A trace under way. Dropping it ends the recording.
#[derive(Debug)]
struct Recording {
    image: Arc<Image>,
    trace: Arc<Trace>,
    devices: Vec<Weak<Device>>,
    output: Option<PathBuf>,
    unseen: Vec<String>,
}

impl Recording {
    fn report(&self, dir: &Path) -> TraceReport {
        let (reads, lost) = self.trace.len();
        TraceReport { dir: dir.to_owned(), output: self.output.clone(), reads, lost, unseen: self.unseen.clone() }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.devices.iter().filter_map(Weak::upgrade).for_each(|device| device.stop_trace(&self.trace));
    }
}

impl Traces {
    /// Records what is read of `devices`. `unseen` are those whose reads will not come here.
    pub(super) fn start(
        &self,
        dir: &Path,
        image: &Arc<Image>,
        devices: &[Arc<Device>],
        output: Option<PathBuf>,
        unseen: Vec<String>,
    ) -> Result<TraceReport, DaemonError> {
        let mut traces = self.0.lock().unwrap();
        if traces.contains_key(dir) {
            return Err(DaemonError::Traced(dir.to_owned()));
        }
        if traces.len() >= MOST_TRACES {
            return Err(DaemonError::TooManyTraces);
        }
        let trace = Arc::new(Trace::new(devices.len()));
        devices.iter().enumerate().for_each(|(number, device)| device.start_trace(&trace, number));
        let devices = devices.iter().map(Arc::downgrade).collect();
        let recording = Recording { image: image.clone(), trace, devices, output, unseen };
        let report = recording.report(dir);
        traces.insert(dir.to_owned(), recording);
        Ok(report)
    }

    /// Forgets a trace, if there is one.
    pub(super) fn discard(&self, dir: &Path) {
        // Outside of the lock: the end of a recording may take marks away.
        let removed = self.0.lock().unwrap().remove(dir);
        drop(removed);
    }
}

impl Daemon {
    /// Begins to record what is read of a mounted image.
    ///
    /// # Errors
    /// If the target is not mounted here, or its reads are being recorded already.
    pub fn start_trace(&self, request: &TraceRequest) -> Result<TraceReport, DaemonError> {
        let (dir, served) = self.find(&request.target)?;
        let devices = devices(&served)?;
        // Their marks are gone, and nothing brings one back under a mount that is there already.
        let unseen =
            devices.iter().filter(|device| device.is_complete_durable()).map(|device| device.blob().to_string());
        self.traces.start(&dir, &served.prepared.image, &devices, request.output.clone(), unseen.collect())
    }

    /// The traces under way.
    pub fn list_traces(&self) -> Vec<TraceReport> {
        self.traces.0.lock().unwrap().iter().map(|(dir, recording)| recording.report(dir)).collect()
    }

    /// Ends a trace, also one of an image that was unmounted since, and gives what it recorded.
    ///
    /// # Errors
    /// If there is none, or the image makes no sense.
    pub fn stop_trace(&self, target: &PrefetchTarget) -> Result<TraceResult, DaemonError> {
        let dir = match &target.dir {
            Some(dir) => dir.clone(),
            None => self.find(target)?.0,
        };
        let removed = self.traces.0.lock().unwrap().remove(&dir);
        let recording = removed.ok_or_else(|| DaemonError::NotTraced(dir.clone()))?;
        let report = recording.report(&dir);
        let reads = recording.trace.recorded().reads;
        let image = recording.image.clone();
        drop(recording);
        let found = attribute(&image, &reads).map_err(DaemonError::Image)?;
        Ok(TraceResult { report, list: list(&found.files), unmapped_bytes: found.unmapped })
    }
}
