//! A daemon of our own, driven by the command line as people do.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::daemon::api::ImageReport;

use super::measure::cpu_seconds;

/// How long the daemon may take to start, to end, or to fetch a whole image.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running `rafsd serve` with a fresh cache, for one image. Dropping it unmounts the image, ends the daemon and
/// removes the cache.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    dir: PathBuf,
}

impl Daemon {
    /// Starts a daemon below `dir`, which is made.
    pub(crate) fn start(dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(dir, &[])
    }

    /// The same with further options.
    pub(crate) fn start_with(dir: &Path, options: &[&str]) -> anyhow::Result<Self> {
        for name in ["run", "cache", "mnt"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let log = File::create(dir.join("log"))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        command.arg("serve").arg("--run").arg(dir.join("run")).arg("--cache").arg(dir.join("cache"));
        command.args(options);
        // A group of its own: what interrupts us at the terminal must not end it under our reads.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
        let child = command.spawn().context("cannot start the daemon")?;
        let mut daemon = Self { child, dir: dir.to_owned() };
        daemon.await_start()?;
        Ok(daemon)
    }

    /// The same, and mounts `image` with its blobs at `url`.
    pub(crate) fn mount(dir: &Path, image: &Path, url: &str, prefetch: bool) -> anyhow::Result<Self> {
        Self::mount_by("fanotify", dir, image, url, prefetch)
    }

    /// The same by another backend.
    pub(crate) fn mount_by(backend: &str, dir: &Path, image: &Path, url: &str, prefetch: bool) -> anyhow::Result<Self> {
        let daemon = Self::start(dir)?;
        daemon.mount_here(backend, image, url, prefetch)?;
        Ok(daemon)
    }

    /// Mounts `image` at [`Daemon::mnt`].
    pub(crate) fn mount_here(&self, backend: &str, image: &Path, url: &str, prefetch: bool) -> anyhow::Result<()> {
        let (bootstrap, mnt) = (image.join("bootstrap"), self.mnt());
        let prefetch = prefetch.then_some("--prefetch");
        let args = ["--backend", backend, "--blobs", url].into_iter().chain(prefetch).map(OsStr::new);
        self.ask("mount", args.chain([bootstrap.as_os_str(), mnt.as_os_str()]))?;
        Ok(())
    }

    /// What is mounted.
    pub(crate) fn images(&self) -> anyhow::Result<Vec<ImageReport>> {
        Ok(serde_json::from_slice(&self.ask("list", [OsStr::new("--json")])?.stdout)?)
    }

    /// Where the image is mounted.
    pub(crate) fn mnt(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// Waits until the whole image is in the cache and the kernel reads it alone.
    pub(crate) fn await_complete(&self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let images = self.images()?;
            if !images.is_empty() && images.iter().all(ImageReport::is_complete) {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("the image is not complete after {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Mounts `image`, which the daemon has already, once more by another backend.
    pub(crate) fn mount_again(&self, image: &Path, blobs: &str, backend: &str) -> anyhow::Result<PathBuf> {
        let mnt = self.dir.join(backend);
        fs::create_dir_all(&mnt)?;
        let bootstrap = image.join("bootstrap");
        let args = ["--backend", backend, "--blobs", blobs].map(OsStr::new);
        self.ask("mount", args.into_iter().chain([bootstrap.as_os_str(), mnt.as_os_str()]))?;
        Ok(mnt)
    }

    /// Processor seconds used so far by all threads.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        cpu_seconds(self.child.id())
    }

    /// Process ids of the daemon and of the keepers.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let keepers = rafsd::daemon::keeper::statuses(&self.dir.join("run"));
        [self.child.id()].into_iter().chain(keepers.iter().map(|keeper| keeper.pid)).collect()
    }

    fn await_start(&mut self) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.dir.join("run/rafsd.sock").exists() || self.ask("list", []).is_err() {
            if let Some(status) = self.child.try_wait()? {
                let log = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                bail!("the daemon did not start ({status}): {}", log.trim());
            }
            if Instant::now() > until {
                bail!("the daemon does not answer");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Runs `rafsd WHAT` with `args` for this daemon.
    pub(crate) fn ask<'a>(&self, what: &str, args: impl IntoIterator<Item = &'a OsStr>) -> anyhow::Result<Output> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        let output = command.arg(what).arg("--run").arg(self.dir.join("run")).args(args).output()?;
        if !output.status.success() {
            bail!("rafsd {what}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(output)
    }

    fn end(&mut self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGTERM)?;
        let until = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                self.child.kill()?;
                self.child.wait()?;
                bail!("the daemon did not end when asked and was killed");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::remove_dir_all(&self.dir)?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("bench: {}: {error:#}", self.dir.display());
        }
    }
}
