//! The backends of one daemon and the threads that run them.

use std::fs::DirBuilder;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::DaemonError;
use super::api::BackendChoice;
use super::keeper::Keeper;
use crate::export::BackendKind;
use crate::export::cachefiles::Cachefiles;
use crate::export::fanotify::Fanotify;
use crate::export::host::Host;
use crate::sys::fanotify::Group;
use crate::sys::sandbox::Sandbox;

/// Started on first use: a host that only ever uses one backend never opens the other's device.
#[derive(Debug)]
pub(super) struct Backends {
    pub(super) host: Host,
    cache: PathBuf,
    /// Order of preference where nobody asks for one.
    order: Vec<BackendKind>,
    sandbox: Sandbox,
    fanotify: Mutex<Option<(Arc<Fanotify>, JoinHandle<()>)>>,
    cachefiles: Mutex<Option<(Arc<Cachefiles>, JoinHandle<()>)>>,
}

impl Backends {
    /// Finds out what this host can do, and prefers what comes first in `order`.
    pub(super) fn examine(cache: &Path, order: &[BackendKind], sandbox: Sandbox) -> io::Result<Self> {
        let mut host = sandbox.outside(|| Host::examine(cache))?;
        host.choice = order.iter().copied().find(|kind| host.can(*kind));
        let (cache, order) = (cache.to_owned(), order.to_vec());
        Ok(Self { host, cache, order, sandbox, fanotify: Mutex::default(), cachefiles: Mutex::default() })
    }

    /// The backend to use for `choice` and the reason, or why there is none.
    pub(super) fn choose(&self, choice: BackendChoice) -> Result<(BackendKind, String), DaemonError> {
        let kind = match choice {
            BackendChoice::Auto => {
                let kind = self.host.choice.ok_or_else(|| {
                    let say = |kind: &BackendKind| format!("{kind}: {}", self.host.obstacles(*kind));
                    let reasons = self.order.iter().rev().map(say).collect::<Vec<_>>().join("; ");
                    DaemonError::NoBackend { reasons }
                })?;
                let why = match kind {
                    BackendKind::Fanotify if self.host.can(BackendKind::Cachefiles) => {
                        "pre-content events passed their self test, and the settings prefer them"
                    }
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
        let service = Fanotify::new(group).map_err(start)?;
        let thread = self.spawn_narrow("fan-0", &service, Fanotify::run).map_err(start)?;
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
        let service = Cachefiles::bind(&root).map_err(start)?;
        let thread = self.spawn_narrow("cf-0", &service, Cachefiles::run).map_err(start)?;
        *slot = Some((service.clone(), thread));
        Ok(service)
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
        let fanotify = self.fanotify.lock().unwrap().as_ref().map(|(service, _)| service.clone());
        let cachefiles = self.cachefiles.lock().unwrap().as_ref().map(|(service, _)| service.clone());
        let stuck = [
            ("fan-0", fanotify.is_some_and(|service| !service.is_responsive(within))),
            ("cf-0", cachefiles.is_some_and(|service| !service.is_responsive(within))),
        ];
        stuck.into_iter().filter(|(_, stuck)| *stuck).map(|(name, _)| name).collect()
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
