//! The backends of one daemon and the threads that run them.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::DaemonError;
use super::api::BackendChoice;
use super::keeper::Keeper;
use crate::export::BackendKind;
use crate::export::cachefiles::Cachefiles;
use crate::export::fanotify::Fanotify;
use crate::export::host::Host;
use crate::sys::fanotify::Group;
use crate::telemetry::Telemetry;

/// Started on first use: a host that only ever uses one backend never opens the other's device.
#[derive(Debug)]
pub(super) struct Backends {
    pub(super) host: Host,
    cache: PathBuf,
    telemetry: Telemetry,
    fanotify: Mutex<Option<(Arc<Fanotify>, JoinHandle<()>)>>,
    cachefiles: Mutex<Option<(Arc<Cachefiles>, JoinHandle<()>)>>,
}

impl Backends {
    /// Finds out what this host can do. `telemetry` counts what the backends are asked.
    pub(super) fn examine(cache: &Path, telemetry: Telemetry) -> io::Result<Self> {
        let (host, cache) = (Host::examine(cache)?, cache.to_owned());
        Ok(Self { host, cache, telemetry, fanotify: Mutex::default(), cachefiles: Mutex::default() })
    }

    /// The backend to use for `choice` and the reason, or why there is none.
    pub(super) fn choose(&self, choice: BackendChoice) -> Result<(BackendKind, String), DaemonError> {
        let kind = match choice {
            BackendChoice::Auto => {
                let kind = self.host.choice.ok_or_else(|| {
                    let say = |kind| format!("{kind}: {}", self.host.obstacles(kind));
                    let reasons = [BackendKind::Fanotify, BackendKind::Cachefiles].map(say).join("; ");
                    DaemonError::NoBackend { reasons }
                })?;
                let why = match kind {
                    BackendKind::Cachefiles => "this kernel has on-demand cachefiles, the fastest path",
                    BackendKind::Fanotify => "pre-content events passed their self test, and there is no cachefiles",
                };
                return Ok((kind, why.to_owned()));
            }
            BackendChoice::Fanotify => BackendKind::Fanotify,
            BackendChoice::Cachefiles => BackendKind::Cachefiles,
        };
        if !self.host.can(kind) {
            return Err(DaemonError::NoBackend { reasons: format!("{kind}: {}", self.host.obstacles(kind)) });
        }
        Ok((kind, "asked for".to_owned()))
    }

    /// The fanotify service. Its group is in the keeper's hands before the first mark is made.
    pub(super) fn fanotify(&self, keeper: &Keeper) -> Result<Arc<Fanotify>, DaemonError> {
        let mut slot = self.fanotify.lock().unwrap();
        if let Some((service, _)) = &*slot {
            return Ok(service.clone());
        }
        let start = |cause| DaemonError::Start { what: "the fanotify service", cause };
        let group = Arc::new(Group::new().map_err(start)?);
        keeper.hold("group", group.as_fd()).map_err(start)?;
        let service = Fanotify::new(group, self.telemetry.clone()).map_err(start)?;
        let thread = spawn("fan-0", &service, |service| service.run()).map_err(start)?;
        *slot = Some((service.clone(), thread));
        Ok(service)
    }

    /// The cachefiles service, its cache bound below the cache directory.
    pub(super) fn cachefiles(&self) -> Result<Arc<Cachefiles>, DaemonError> {
        let mut slot = self.cachefiles.lock().unwrap();
        if let Some((service, _)) = &*slot {
            return Ok(service.clone());
        }
        let start = |cause| DaemonError::Start { what: "the cachefiles service", cause };
        let root = self.cache.join("cachefiles");
        DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(start)?;
        let service = Cachefiles::bind(&root, self.telemetry.clone()).map_err(start)?;
        let thread = spawn("cf-0", &service, |service| service.run()).map_err(start)?;
        *slot = Some((service.clone(), thread));
        Ok(service)
    }

    /// Events answered at once, events that waited, and READs of cachefiles.
    pub(super) fn counts(&self) -> (u64, u64, u64) {
        let (hit, missed) = self.fanotify.lock().unwrap().as_ref().map_or((0, 0), |(service, _)| service.counts());
        let reads = self.cachefiles.lock().unwrap().as_ref().map_or(0, |(service, _)| service.reads());
        (hit, missed, reads)
    }

    /// Whether the kernel has objects of the cachefiles backend open, whoever mounted them.
    pub(super) fn has_open_objects(&self) -> bool {
        self.cachefiles.lock().unwrap().as_ref().is_some_and(|(service, _)| service.is_in_use())
    }

    /// Ends the services. Only when nothing is mounted through them any more.
    pub(super) fn stop(&self) {
        if let Some((service, thread)) = self.fanotify.lock().unwrap().take() {
            service.stop();
            let _ = thread.join();
        }
        if let Some((service, thread)) = self.cachefiles.lock().unwrap().take() {
            service.stop();
            let _ = thread.join();
        }
    }
}

/// Runs a service on a thread of its own. A service that ends by an error leaves readers waiting,
/// which is for a person to hear about; the process stays so that nothing is shown wrongly.
pub(super) fn spawn<T: Send + Sync + 'static>(
    name: &str,
    service: &Arc<T>,
    run: fn(&T) -> io::Result<()>,
) -> io::Result<JoinHandle<()>> {
    let service = service.clone();
    let thread = name.to_owned();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(error) = run(&service) {
            tracing::error!(thread, %error, "a service stopped answering the kernel");
        }
    })
}
