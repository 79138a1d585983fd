//! A daemon of its own for each case, an image, and the server its blobs come from.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rafsd::base::ByteRange;
use rafsd::net::server::{BlobServer, ServerOptions};
use serde_json::Value;

use crate::{Backend, Ctx};

/// Length of `big` and of the files made by [`Fixture::files`], in bytes.
pub(crate) const FILE: usize = 3 << 20;

/// An image on a server and a daemon that serves it. Dropping it kills what is left.
pub(crate) struct Fixture<'a> {
    pub(crate) ctx: &'a Ctx,
    pub(crate) server: BlobServer,
    daemon: Option<Child>,
    cache: PathBuf,
    environment: Vec<(&'static str, String)>,
    descriptors: Option<u64>,
    /// A command line before that of the next daemon.
    below: Vec<String>,
}

impl<'a> Fixture<'a> {
    /// Builds an image of what `fill` puts into an empty directory, and starts a daemon.
    pub(crate) fn new(ctx: &'a Ctx, fill: impl FnOnce(&Path) -> io::Result<()>) -> anyhow::Result<Self> {
        Self::with(ctx, &[], ServerOptions::default(), &[], fill)
    }

    /// The same with further options of `rafsd build`, of the server, and of `rafsd serve`.
    pub(crate) fn with(
        ctx: &'a Ctx,
        build: &[&str],
        server: ServerOptions,
        daemon: &[&str],
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> anyhow::Result<Self> {
        let source = ctx.dir.join("source");
        fs::create_dir(&source)?;
        fill(&source).context("make the source")?;
        let out = ctx.dir.join("image");
        let built = Command::new(&ctx.rafsd)
            .arg("build")
            .arg(&source)
            .arg("-o")
            .arg(&out)
            .args(["--compress", "lz4"])
            .args(build)
            .output()?;
        ensure!(built.status.success(), "build: {}", String::from_utf8_lossy(&built.stderr));
        let server = BlobServer::start(out.join("blobs"), server)?;
        let cache = ctx.dir.join("cache");
        let mut this =
            Self { ctx, server, daemon: None, cache, environment: Vec::new(), descriptors: None, below: Vec::new() };
        this.start(daemon)?;
        Ok(this)
    }

    /// An image of `count` files `0`, `1`, … of incompressible bytes, each [`FILE`] bytes long.
    pub(crate) fn files(ctx: &'a Ctx, count: usize) -> anyhow::Result<Self> {
        Self::new(ctx, |dir| (0..count).try_for_each(|i| fs::write(dir.join(i.to_string()), content(i, FILE))))
    }

    /// Builds the image again with these further options, from the same source. Only while nothing is
    /// mounted.
    pub(crate) fn rebuild(&self, options: &[&str]) -> anyhow::Result<()> {
        let out = self.ctx.dir.join("image");
        fs::remove_file(out.join("bootstrap"))?;
        let mut build = Command::new(&self.ctx.rafsd);
        build.arg("build").arg(self.source()).arg("-o").arg(&out).args(["--compress", "lz4"]).args(options);
        let built = build.output()?;
        ensure!(built.status.success(), "build: {}", String::from_utf8_lossy(&built.stderr));
        Ok(())
    }

    /// Facts about the daemon.
    pub(crate) fn info(&self) -> anyhow::Result<rafsd::daemon::api::Info> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = rafsd::daemon::client::Client::new(&self.run())?;
        Ok(runtime.block_on(client.info())?)
    }

    /// Starts a daemon with these further options and waits until it answers.
    pub(crate) fn start(&mut self, options: &[&str]) -> anyhow::Result<()> {
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new(&self.ctx.rafsd);
        command.arg("serve").arg("--cache").arg(self.cache()).arg("--run").arg(self.run());
        if !options.contains(&"--restart") {
            // A case that kills a daemon says itself who starts another one.
            command.args(["--restart", "never"]);
        }
        command.args(options).envs(self.environment.iter().map(|(name, value)| (name, value)));
        let mut below = std::mem::take(&mut self.below);
        if let Some(limit) = self.descriptors {
            // Both limits, because a daemon takes what the hard one allows.
            below.extend(["prlimit".to_owned(), format!("--nofile={limit}:{limit}")]);
        }
        if let Some((program, arguments)) = below.split_first() {
            let mut wrapped = Command::new(program);
            wrapped.args(arguments).arg(command.get_program()).args(command.get_args());
            wrapped.envs(self.environment.iter().map(|(name, value)| (name, value)));
            command = wrapped;
        }
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        self.daemon = Some(child);
        let until = Instant::now() + Duration::from_secs(if self.ctx.in_guest { 60 } else { 20 });
        // Somebody has to listen: `list` finds nothing, successfully, behind the socket of a daemon that died.
        let listens = |run: &Path| UnixStream::connect(run.join("rafsd.sock")).is_ok();
        while !listens(&self.run()) || !self.command(&["list", "--json"])?.status.success() {
            let gone = self.daemon.as_mut().expect("just started").try_wait()?;
            ensure!(gone.is_none(), "the daemon ended at once: {}", self.log());
            ensure!(Instant::now() < until, "the daemon does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The same, with `command` before the command line.
    pub(crate) fn start_below(&mut self, command: Vec<String>, options: &[&str]) -> anyhow::Result<()> {
        self.below = command;
        self.start(options)
    }

    /// Stops and starts the daemon with these options.
    pub(crate) fn restart(&mut self, options: &[&str]) -> anyhow::Result<()> {
        self.stop()?;
        self.start(options)
    }

    /// Ends the daemon by SIGTERM and waits for it.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs") };
        signal(&daemon, nix::sys::signal::Signal::SIGTERM)?;
        let until = Instant::now() + Duration::from_secs(30);
        while daemon.try_wait()?.is_none() {
            if Instant::now() > until {
                daemon.kill()?;
                bail!("the daemon ignores SIGTERM: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Kills the daemon by SIGKILL. Gives the process ids of the keepers it leaves behind.
    pub(crate) fn kill(&mut self) -> anyhow::Result<Vec<u32>> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs") };
        let keepers = self.keepers();
        daemon.kill()?;
        daemon.wait()?;
        Ok(keepers)
    }

    /// Kills the daemon and both keepers, nobody of whom can do anything in between.
    pub(crate) fn kill_all(&mut self) -> anyhow::Result<()> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs") };
        let keepers = self.keepers();
        signal(&daemon, nix::sys::signal::Signal::SIGSTOP)?;
        for pid in &keepers {
            nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(i32::try_from(*pid)?),
                nix::sys::signal::Signal::SIGKILL,
            )?;
        }
        daemon.kill()?;
        daemon.wait()?;
        keepers.into_iter().try_for_each(wait_for_exit)
    }

    /// Builds an image of what `fill` puts into a directory `name`, in another directory than that of
    /// the fixture's own, and gives the latter.
    pub(crate) fn build_other(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> io::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let (source, out) = (self.ctx.dir.join(name), self.ctx.dir.join(format!("{name}-image")));
        fs::create_dir(&source)?;
        fill(&source).context("make the source")?;
        let built = Command::new(&self.ctx.rafsd).arg("build").arg(&source).arg("-o").arg(&out).output()?;
        ensure!(built.status.success(), "build: {}", String::from_utf8_lossy(&built.stderr));
        Ok(out)
    }

    /// Mounts an image of [`Fixture::build_other`] at a new directory `name`, its blobs read from disk.
    pub(crate) fn mount_other(&self, image: &Path, name: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        let dir = self.ctx.dir.join(name);
        fs::create_dir_all(&dir)?;
        let text = |path: &Path| path.to_str().map(ToOwned::to_owned).context("UTF-8");
        let (bootstrap, blobs, at) = (text(&image.join("bootstrap"))?, text(&image.join("blobs"))?, text(&dir)?);
        let fixed = ["mount", &bootstrap, &at, "--blobs", &blobs, "--backend", self.ctx.backend.name()];
        self.must(&[&fixed[..], options].concat())?;
        Ok(dir)
    }

    /// Process ids of the keepers.
    pub(crate) fn keepers(&self) -> Vec<u32> {
        rafsd::daemon::keeper::statuses(&self.run()).iter().map(|status| status.pid).collect()
    }

    /// Limits how many descriptors daemons may have open that are started from now on.
    pub(crate) fn limit_descriptors(&mut self, limit: u64) {
        self.descriptors = Some(limit);
    }

    /// Adds a variable to the environment of daemons started from now on.
    pub(crate) fn set_environment(&mut self, name: &'static str, value: String) {
        self.environment.retain(|(known, _)| *known != name);
        self.environment.push((name, value));
    }

    /// Takes note that somebody else started the daemon that runs now, and ended the last one.
    pub(crate) fn forget_daemon(&mut self) -> anyhow::Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.wait()?;
        }
        Ok(())
    }

    /// Waits until a daemon that was killed has ended with all its threads, for which `patience` must be enough.
    pub(crate) fn ensure_gone(&mut self, patience: Duration) -> anyhow::Result<()> {
        let Some(mut daemon) = self.daemon.take() else { bail!("no daemon runs") };
        let until = Instant::now() + patience;
        while daemon.try_wait()?.is_none() {
            if Instant::now() > until {
                let stuck = threads_of(daemon.id());
                end_connections_of(&self.ctx.dir.join("connections"), daemon.id())?;
                bail!("it waits for itself: {stuck:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Process id of the daemon.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.as_ref().map_or(0, Child::id)
    }

    /// Runs `rafsd ARGS --run …`.
    pub(crate) fn command(&self, args: &[&str]) -> io::Result<Output> {
        Command::new(&self.ctx.rafsd).args(args).arg("--run").arg(self.run()).stdin(Stdio::null()).output()
    }

    /// The same; an error if it fails.
    pub(crate) fn must(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = self.command(args)?;
        ensure!(
            output.status.success(),
            "rafsd {}: {}\n{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr),
            self.log()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Mounts the image at a new directory `name`, with these further options.
    pub(crate) fn mount_with(&self, name: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        self.mount_so(name, self.ctx.backend.name(), options)
    }

    /// Mounts the image at a new directory `name` by another backend than the one under test.
    pub(crate) fn mount_by(&self, name: &str, backend: &str) -> anyhow::Result<PathBuf> {
        self.mount_so(name, backend, &[])
    }

    /// Mounts another image over the same blobs at a new directory `name`.
    pub(crate) fn mount_image(&self, bootstrap: &Path, name: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        self.mount_at(bootstrap, name, self.ctx.backend.name(), options)
    }

    fn mount_so(&self, name: &str, backend: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        self.mount_at(&self.bootstrap(), name, backend, options)
    }

    fn mount_at(&self, bootstrap: &Path, name: &str, backend: &str, options: &[&str]) -> anyhow::Result<PathBuf> {
        let dir = self.ctx.dir.join(name);
        fs::create_dir_all(&dir)?;
        let url = self.server.url();
        let dir_text = dir.to_str().context("UTF-8")?;
        let fixed = ["mount", bootstrap.to_str().context("UTF-8")?, dir_text, "--blobs", &url];
        let backend = ["--backend", backend];
        self.must(&[&fixed[..], &backend, options].concat())?;
        Ok(dir)
    }

    /// Mounts the image at a new directory `name`.
    pub(crate) fn mount(&self, name: &str) -> anyhow::Result<PathBuf> {
        self.mount_with(name, &[])
    }

    /// Unmounts `dir` by the command.
    pub(crate) fn umount(&self, dir: &Path) -> anyhow::Result<()> {
        self.must(&["umount", dir.to_str().context("UTF-8")?]).map(drop)
    }

    /// What `rafsd list` knows.
    pub(crate) fn list(&self) -> anyhow::Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.must(&["list", "--json"])?)?)
    }

    /// Waits until `rafsd list` satisfies `wanted`.
    pub(crate) fn wait_for_list(&self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> anyhow::Result<()> {
        let until = Instant::now() + Duration::from_secs(60);
        while !wanted(&self.list()?) {
            ensure!(Instant::now() < until, "never {what}: {:?}\n{}", self.list()?, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    pub(crate) fn source(&self) -> PathBuf {
        self.ctx.dir.join("source")
    }

    pub(crate) fn bootstrap(&self) -> PathBuf {
        self.ctx.dir.join("image/bootstrap")
    }

    pub(crate) fn cache(&self) -> PathBuf {
        self.cache.clone()
    }

    /// Daemons started from now on have their cache there.
    pub(crate) fn use_cache(&mut self, dir: &Path) {
        dir.clone_into(&mut self.cache);
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.ctx.dir.join("run")
    }

    fn log_path(&self) -> PathBuf {
        self.ctx.dir.join("daemon.log")
    }

    /// What all daemons of this case have logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Stored ranges that were fetched of any blob, with how often, sorted.
    pub(crate) fn fetched(&self) -> Vec<(ByteRange, usize)> {
        let stats = self.server.stats();
        let mut ranges: Vec<_> =
            stats.fetches().into_iter().filter_map(|((_, range), count)| Some((range?, count))).collect();
        ranges.sort();
        ranges
    }

    /// Fails unless no stored byte was fetched twice.
    pub(crate) fn ensure_fetched_once(&self) -> anyhow::Result<()> {
        let ranges = self.fetched();
        ensure!(!ranges.is_empty(), "nothing was fetched at all");
        ensure!(ranges.iter().all(|(_, count)| *count == 1), "fetched more than once: {ranges:?}");
        let overlap = ranges.windows(2).find(|pair| pair[0].0.overlaps(pair[1].0));
        ensure!(overlap.is_none(), "fetched twice: {overlap:?}");
        Ok(())
    }

    /// Unmounts everything and ends the daemon, as a case that passes must.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        let keepers = self.keepers();
        self.stop()?;
        let left = crate::mounts::below(&self.ctx.dir)?;
        ensure!(left.is_empty(), "mounts are left: {left:?}");
        for keeper in rafsd::daemon::keeper::SOCKETS {
            ensure!(!self.run().join(keeper).exists(), "a keeper is left: {keeper}");
        }
        keepers.into_iter().try_for_each(wait_for_exit)?;
        ensure!(!self.run().join("rafsd.sock").exists(), "the socket is left");
        Ok(())
    }
}

impl Drop for Fixture<'_> {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            eprintln!("daemon's log:\n{}", self.log());
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Names and states of the threads of a process.
fn threads_of(pid: u32) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stat = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
    stat.map(|stat| stat.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect()
}

/// Ends the FUSE connections that threads of a process still have open, so that they go on, by a mount of the kernel's
/// list of them at `dir`.
fn end_connections_of(dir: &Path, pid: u32) -> anyhow::Result<()> {
    fs::create_dir_all(dir)?;
    nix::mount::mount(Some("none"), dir, Some("fusectl"), nix::mount::MsFlags::empty(), None::<&str>)?;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        for descriptor in fs::read_dir(thread.path().join("fdinfo")).into_iter().flatten().flatten() {
            let facts = fs::read_to_string(descriptor.path()).unwrap_or_default();
            for number in facts.lines().filter_map(|line| line.strip_prefix("fuse_connection:")) {
                let _ = fs::write(dir.join(number.trim()).join("abort"), "1");
            }
        }
    }
    Ok(nix::mount::umount(dir)?)
}

fn signal(child: &Child, signal: nix::sys::signal::Signal) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    Ok(nix::sys::signal::kill(pid, signal)?)
}

/// `len` bytes that no codec can shorten and that differ for each `seed`.
pub(crate) fn content(seed: usize, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

/// Makes the kernel forget all it has cached, so that the next read is cold.
pub(crate) fn drop_caches() -> anyhow::Result<()> {
    nix::unistd::sync();
    Ok(fs::write("/proc/sys/vm/drop_caches", "3")?)
}

/// Waits until the process has ended, reaped or not.
pub(crate) fn wait_for_exit(pid: u32) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(20);
    let ended = || match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.contains(") Z "),
        Err(_) => true,
    };
    while !ended() {
        ensure!(Instant::now() < until, "process {pid} does not leave");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Reads one byte; the errno if that fails.
pub(crate) fn read_byte(path: &Path, at: u64) -> Result<u8, Option<i32>> {
    let read = || {
        let mut byte = [0];
        File::open(path)?.read_exact_at(&mut byte, at)?;
        Ok(byte[0])
    };
    read().map_err(|e: io::Error| e.raw_os_error())
}

/// Whether this case is about fanotify.
pub(crate) fn is_fanotify(ctx: &Ctx) -> bool {
    ctx.backend == Backend::Fanotify
}
