//! The whole of rafsd in one command, on whatever host this is.

mod pull;
mod subject;

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use self::subject::{Program, Subject};
use super::print_json;
use super::progress::Bar;
use crate::base::ByteSize;
use crate::build::{self, BuildReport, BuildSpec, Compression, Source};
use crate::cache::StoreOptions;
use crate::daemon::api::{BackendChoice, ImageReport, ImageSpec, MountRequest};
use crate::daemon::{Daemon, Options};
use crate::format::rafs::DigestAlgorithm;
use crate::net::server::{BlobServer, ServerOptions};

/// See it work: build an image of a directory, mount it lazily, run a program from it
///
/// Everything happens below one scratch directory and on the loopback interface, and all of it is
/// removed at the end. The image is served by an HTTP server inside this process that waits a few
/// milliseconds before each answer, as a registry nearby would.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd demo --source /usr/lib/git-core")]
pub(super) struct DemoArgs {
    /// Directory to make an image of [default: one with programs and libraries, at least 100 MB]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,

    /// Where to put the scratch directory: on ext4, XFS or btrfs
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,

    /// Delay of the server before each answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 5)]
    delay: u64,

    /// How cold reads reach the daemon
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    backend: BackendChoice,

    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
}

/// What is shown at the end.
#[derive(Debug, Serialize)]
struct Show {
    source: PathBuf,
    build: BuildReport,
    build_seconds: f64,
    image: ImageReport,
    mount_seconds: f64,
    program: Vec<String>,
    first_byte_seconds: f64,
    program_seconds: f64,
    fetched_bytes: u64,
    fetched_requests: u64,
    pull: pull::Pull,
}

/// Exit status: 0 when the program ran out of the mount.
pub(super) fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let scratch = Scratch::new(&args.scratch)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let stage = Stage { scratch: scratch.0.clone(), daemon: std::sync::Mutex::new(None) };
    let stage = Arc::new(stage);
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut term = signal(SignalKind::terminate())?;
        let (play, json) = (stage.clone(), args.json);
        let handle = Handle::current();
        let show = tokio::task::spawn_blocking(move || play.perform(&args, &handle));
        tokio::select! {
            show = show => show?.and_then(|show| show.print(json)).map(|()| ExitCode::SUCCESS),
            _ = interrupt.recv() => Ok(ExitCode::from(130)),
            _ = term.recv() => Ok(ExitCode::from(143)),
        }
    });
    stage.clear();
    drop(scratch);
    // A build that was interrupted still holds a thread of the runtime.
    runtime.shutdown_background();
    outcome
}

/// A directory of our own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(parent: &Path) -> anyhow::Result<Self> {
        let dir = parent.join(format!("rafsd-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(dir = %self.0.display(), %error, "cannot remove the scratch directory");
        }
    }
}

/// What has to be cleared away whatever happens.
struct Stage {
    scratch: PathBuf,
    daemon: std::sync::Mutex<Option<Arc<Daemon>>>,
}

impl Stage {
    fn clear(&self) {
        if let Some(daemon) = self.daemon.lock().unwrap().take() {
            daemon.stop();
        }
    }

    fn dir(&self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = self.scratch.join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    fn perform(&self, args: &DemoArgs, runtime: &Handle) -> anyhow::Result<Show> {
        // First, so that a host that cannot serve says so before anything is built.
        let daemon = self.start_daemon(runtime)?;
        daemon.ensure_backend(args.backend)?;
        let subject = subject::choose(args.source.as_deref())?;
        say(format_args!("building an image of {}", subject.dir.display()))?;
        let image = self.dir("image")?;
        let clock = Instant::now();
        let build = build::build(
            BuildSpec {
                source: Source::open(&subject.dir)?,
                out_dir: image.clone(),
                compression: Compression::default(),
                digest: DigestAlgorithm::Blake3,
                chunk_size: 1 << 20,
                threads: std::thread::available_parallelism()?,
            },
            &Bar::on_terminal("building"),
        )?;
        let build_seconds = clock.elapsed().as_secs_f64();

        let options = ServerOptions { delay: Duration::from_millis(args.delay), ..ServerOptions::default() };
        let server = BlobServer::start(image.join("blobs"), options).context("cannot start the server")?;
        let (mount, clock) = (self.dir("mnt")?, Instant::now());
        let spec = ImageSpec { bootstrap: image.join("bootstrap"), blobs: server.url(), ca: None, prefetch: false };
        daemon.mount(&MountRequest { image: spec, dir: mount.clone(), backend: args.backend })?;
        let mount_seconds = clock.elapsed().as_secs_f64();
        say(format_args!("mounted; running {} from the mount", subject.program))?;

        let played = play(&subject, &mount)?;
        let served = server.stats();
        let report = daemon.list().into_iter().find(|image| image.dir.as_ref() == Some(&mount));
        let report = report.context("the mount has gone")?;
        say(format_args!("for comparison: fetching and unpacking the whole image from the same server"))?;
        let pull = pull::everything(&build, &server.url(), &image, &self.dir("pull")?, runtime)?;
        Ok(Show {
            source: subject.dir.clone(),
            build,
            build_seconds,
            image: report,
            mount_seconds,
            program: subject.program.words(),
            first_byte_seconds: played.first_byte.as_secs_f64(),
            program_seconds: played.end.as_secs_f64(),
            fetched_bytes: served.bytes_sent,
            fetched_requests: served.requests,
            pull,
        })
    }

    fn start_daemon(&self, runtime: &Handle) -> anyhow::Result<Arc<Daemon>> {
        let options = Options {
            cache: self.dir("cache")?,
            run: self.dir("run")?,
            program: PathBuf::from("/proc/self/exe"),
            store: StoreOptions::default(),
        };
        let daemon = Daemon::start(options, runtime.clone())?;
        *self.daemon.lock().unwrap() = Some(daemon.clone());
        Ok(daemon)
    }
}

struct Played {
    first_byte: Duration,
    end: Duration,
}

/// Reads the first byte of the program, cold, then runs it to its end.
fn play(subject: &Subject, mount: &Path) -> anyhow::Result<Played> {
    let Program { path, args, .. } = &subject.program;
    let program = mount.join(path);
    let clock = Instant::now();
    let mut byte = [0];
    fs::File::open(&program)?.read_exact(&mut byte).with_context(|| format!("cannot read {}", program.display()))?;
    let first_byte = clock.elapsed();
    let mut command = Command::new(&program);
    command.args(args).stdin(Stdio::null()).env("LD_LIBRARY_PATH", subject.library_path(mount));
    let output = command.output().with_context(|| format!("cannot run {}", program.display()))?;
    let end = clock.elapsed();
    if !output.status.success() {
        bail!("{} ended with {}: {}", program.display(), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    say(format_args!("it says: {}", said.lines().next().unwrap_or_default()))?;
    Ok(Played { first_byte, end })
}

fn say(what: std::fmt::Arguments<'_>) -> io::Result<()> {
    writeln!(io::stderr(), "{what}")
}

impl Show {
    fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            return print_json(self);
        }
        let stored: u64 = self.build.blobs.iter().map(|blob| blob.stored_bytes).sum();
        let image = stored + self.build.bootstrap_bytes;
        let size = |bytes| ByteSize(bytes).to_string();
        let part = |bytes: u64| (bytes * 100).checked_div(stored).unwrap_or(0);
        let mut out = io::stdout().lock();
        let mut line = |name: &str, text: String| writeln!(out, "  {name:<16} {text}");
        line("served by", format!("{} ({})", self.image.backend, self.image.why))?;
        line(
            "image",
            format!(
                "{} from {} of files in {:.1} s: bootstrap {}, blob {}",
                size(image),
                size(self.build.source_bytes),
                self.build_seconds,
                size(self.build.bootstrap_bytes),
                size(stored)
            ),
        )?;
        line("mounted in", format!("{:.0} ms", self.mount_seconds * 1e3))?;
        line("first byte after", format!("{:.0} ms", self.first_byte_seconds * 1e3))?;
        line("program done", format!("after {:.0} ms: {}", self.program_seconds * 1e3, self.program.join(" ")))?;
        line(
            "fetched",
            format!(
                "{} in {} requests, {}% of the blob",
                size(self.fetched_bytes),
                self.fetched_requests,
                part(self.fetched_bytes)
            ),
        )?;
        line(
            "a full pull",
            format!("{} and {:.0} ms before the program could start", size(self.pull.bytes), self.pull.seconds * 1e3),
        )?;
        Ok(())
    }
}
