//! The whole of rafsd in one command, on whatever host this is.

mod play;
mod pull;
mod stage;
mod stop;
mod subject;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;
use tokio::runtime::Handle;

use self::stage::{Scratch, Stage};
use self::stop::{Signals, Until};
use super::print_json;
use super::progress::Bar;
use crate::base::ByteSize;
use crate::build::{self, BuildReport, BuildSpec, Source};
use crate::daemon::api::{BackendChoice, ImageReport, ImageSpec, MountRequest, PrefetchOrder};

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

/// How long what is under way when a signal comes may take to end: longer than a read that fails
/// because its server has gone, with all its retries.
const PATIENCE: Duration = Duration::from_secs(10);

/// Exit status: 0 when the program ran out of the mount, 128 and its number after a signal.
pub(super) fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Before there is anything that a signal could leave behind.
    let signals = runtime.block_on(async { Signals::listen() })?;
    let scratch = Scratch::new(&args.scratch)?;
    let stage = Arc::new(Stage::new(scratch.0.clone()));
    let outcome = runtime.block_on(watch(args, stage.clone(), signals));
    stage.clear();
    // What still writes below the scratch directory ends here.
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(scratch);
    outcome
}

/// Performs until the end or a signal.
async fn watch(args: DemoArgs, stage: Arc<Stage>, mut signals: Signals) -> anyhow::Result<ExitCode> {
    let (play, json, handle) = (stage.clone(), args.json, Handle::current());
    let mut show = tokio::task::spawn_blocking(move || perform(&play, &args, &handle));
    let status = tokio::select! {
        show = &mut show => return show?.and_then(|show| show.print(json)).map(|()| ExitCode::SUCCESS),
        status = signals.next() => status,
    };
    // A closed stderr changes nothing about cleaning up.
    let _ = say(format_args!("interrupted; cleaning up"));
    // Off this thread, because the server's end is waited for.
    let _ = tokio::task::spawn_blocking(move || stage.interrupt()).await;
    if tokio::time::timeout(PATIENCE, show).await.is_err() {
        tracing::warn!("what was under way does not end");
    }
    Ok(ExitCode::from(status))
}

fn perform(stage: &Stage, args: &DemoArgs, runtime: &Handle) -> anyhow::Result<Show> {
    // First, so that a host that cannot serve says so before anything is built.
    let daemon = stage.start_daemon(runtime)?;
    daemon.ensure_backend(args.backend)?;
    let subject = subject::choose(args.source.as_deref())?;
    say(format_args!("building an image of {}", subject.dir.display()))?;
    let image = stage.dir("image")?;
    let clock = Instant::now();
    let build = build::build(
        BuildSpec::new(Source::open(&subject.dir)?, &image),
        &Until { stop: &stage.stop, bar: Bar::on_terminal("building") },
    )?;
    let build_seconds = clock.elapsed().as_secs_f64();

    let url = stage.start_server(image.join("blobs"), Duration::from_millis(args.delay))?;
    let (mount, clock) = (stage.dir("mnt")?, Instant::now());
    let spec = ImageSpec {
        bootstrap: Some(image.join("bootstrap")),
        blobs: url.clone().into(),
        prefetch: PrefetchOrder::None,
        ..ImageSpec::default()
    };
    let request = MountRequest { image: spec, dir: mount.clone(), backend: args.backend, trace: None };
    daemon.mount(&request, &daemon.asker())?;
    let mount_seconds = clock.elapsed().as_secs_f64();
    stage.stop.check()?;
    say(format_args!("mounted; running {} from the mount", subject.program))?;

    let played = play::play(&subject, &mount, &stage.dir("out")?, &stage.stop)?;
    let served = stage.served()?;
    let report = daemon.list().into_iter().find(|image| image.dir.as_ref() == Some(&mount));
    let report = report.context("the mount has gone")?;
    say(format_args!("for comparison: fetching and unpacking the whole image from the same server"))?;
    let pull = pull::everything(&build, &url, &image, &stage.dir("pull")?, runtime, &stage.stop)?;
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

fn say(what: std::fmt::Arguments<'_>) -> io::Result<()> {
    say!(io::stderr(), "{what}")
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
        let mut line = |name: &str, text: String| say!(out, "  {name:<16} {text}");
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
