//! What the demo sets up, and how all of it goes away again.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Handle;

use super::stop::Stop;
use crate::base::Chain;
use crate::cache::StoreOptions;
use crate::credentials::Credentials;
use crate::daemon::settings::Settings;
use crate::daemon::{Daemon, Options, keeper};
use crate::export::fuse::Transport;
use crate::net::Clock;
use crate::net::hosts::{LimitTables, Registries};
use crate::net::server::{BlobServer, ServerOptions, Stats};
use crate::sys::sandbox::Sandbox;
use crate::sys::service::Supervisor;

/// How long a file system may outlive its mount: a killed program needs a moment to let go of it.
const LINGER: Duration = Duration::from_secs(5);

/// A directory of our own, removed at the end.
#[derive(Debug)]
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    pub(super) fn new(parent: &Path) -> anyhow::Result<Self> {
        let parent = parent.canonicalize().with_context(|| format!("cannot use {}", parent.display()))?;
        let dir = parent.join(format!("rafsd-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let until = Instant::now() + LINGER;
        loop {
            match fs::remove_dir_all(&self.0) {
                // A file that was being made while its directory was emptied.
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < until => {}
                Err(error) => {
                    tracing::warn!(dir = %self.0.display(), %error, "cannot remove the scratch directory");
                    return;
                }
                Ok(()) => return,
            }
        }
    }
}

/// What has to be cleared away whatever happens.
pub(super) struct Stage {
    scratch: PathBuf,
    pub(super) stop: Stop,
    server: Mutex<Option<BlobServer>>,
    daemon: Mutex<Option<Arc<Daemon>>>,
}

impl Stage {
    pub(super) fn new(scratch: PathBuf) -> Self {
        Self { scratch, stop: Stop::new(), server: Mutex::default(), daemon: Mutex::default() }
    }

    /// A new directory.
    pub(super) fn dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.stop.check()?;
        let dir = self.scratch.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    pub(super) fn start_daemon(&self, runtime: &Handle) -> anyhow::Result<Arc<Daemon>> {
        let run = self.dir("run")?;
        let program = PathBuf::from("/proc/self/exe");
        let keepers = keeper::Plan {
            program,
            run: run.clone(),
            patience: LINGER,
            successor: None,
            sandbox: true,
            supervisor: Supervisor::default(),
        };
        let options = Options {
            cache: self.dir("cache")?,
            run,
            store: StoreOptions::default(),
            keepers,
            backends: Settings::default().backend,
            fuse_transport: Transport::Dev,
            hosts_dir: PathBuf::new(),
            registries: Registries::default(),
            host_limits: LimitTables::default(),
            credentials: Credentials::only_given(Clock::default()),
            sandbox: Sandbox::off(),
        };
        let daemon = Daemon::start(options, runtime.clone(), None)?;
        *self.daemon.lock().unwrap() = Some(daemon.clone());
        Ok(daemon)
    }

    /// Serves `blobs`. Gives the URL.
    pub(super) fn start_server(&self, blobs: PathBuf, delay: Duration) -> anyhow::Result<String> {
        let options = ServerOptions { delay, ..ServerOptions::default() };
        let server = BlobServer::start(blobs, options).context("cannot start the server")?;
        let url = server.url();
        let mut slot = self.server.lock().unwrap();
        // Under the lock, so that no server comes after `interrupt` took it away.
        self.stop.check()?;
        *slot = Some(server);
        Ok(url)
    }

    /// What the server has done so far.
    pub(super) fn served(&self) -> anyhow::Result<Stats> {
        let server = self.server.lock().unwrap();
        Ok(server.as_ref().context("the server has gone")?.stats())
    }

    /// Makes everything end soon that is under way on other threads: reads that wait for the
    /// server fail within seconds, however long its delay.
    pub(super) fn interrupt(&self) {
        self.stop.set();
        drop(self.server.lock().unwrap().take());
    }

    /// Takes away everything but the scratch directory. Blocks.
    pub(super) fn clear(&self) {
        drop(self.server.lock().unwrap().take());
        let Some(daemon) = self.daemon.lock().unwrap().take() else { return };
        for dir in daemon.list().into_iter().filter_map(|image| image.dir) {
            if let Err(error) = daemon.unmount(&dir, true) {
                tracing::warn!(error = %Chain(&error), "stays mounted");
            }
        }
        let until = Instant::now() + LINGER;
        while !daemon.is_idle() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let is_idle = daemon.is_idle();
        daemon.stop();
        // Now the keeper knows that nobody answers any more.
        drop(daemon);
        // A stranger has a file open. What it still reads fails instead of waiting for good, and
        // the keeper leaves with it.
        if !is_idle && let Err(error) = keeper::recover(&self.scratch.join("run")) {
            tracing::warn!(%error, "somebody still uses the demo's mount");
        }
    }
}
