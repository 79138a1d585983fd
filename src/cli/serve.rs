use std::ffi::OsString;
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::connect::{Place, block_on};
use super::reload::Reload;
use super::settings::{SettingsArgs, stray_variables};
use super::userdirs::ensure_own;
use crate::cache::StoreError;
use crate::credentials::{Credentials, Programs, Runner, Sources};
use crate::daemon::control::Control;
use crate::daemon::settings::{Origin, Resolved, Restart, Settings, TABLE};
use crate::daemon::{Daemon, DaemonError, Ending, ONLY_CHECK, Options, keeper};
use crate::export::fuse::Transport;
use crate::net::Clock;
use crate::sys::newdirs::NewDirs;
use crate::sys::sandbox::{Policy, Sandbox};
use crate::sys::service::Supervisor;
use crate::sys::{memory, process};
use crate::telemetry::logging::{self, LogControl};

/// Run the daemon that serves mounted images
///
/// SIGTERM and SIGINT unmount everything and exit; requests under way have five seconds to end,
/// and none after a second signal. A mount that is in use and incomplete stays:
/// its readers wait, held by the keeper, and never see zeros. SIGHUP has the settings read again; of
/// those only the log changes at once.
///
/// Every setting is a flag, an environment variable and a key of the config file; a flag goes
/// before the environment, the environment before the file. `rafsd config print` shows what is
/// used.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd serve --cache /var/lib/rafsd --deadline 30s")]
pub(super) struct ServeArgs {
    #[command(flatten)]
    settings: SettingsArgs,

    /// Leave the terminal's session and the working directory
    #[arg(long, hide = true)]
    detached: bool,

    /// Only see whether the settings can be used: asked before an upgrade to this program
    #[arg(long = ONLY_CHECK.trim_start_matches('-'), hide = true)]
    only_check: bool,
}

/// How long to wait for a predecessor to leave the cache.
const HANDOVER: Duration = Duration::from_secs(10);

/// How long a daemon stays without anything to serve that a mount started, unless somebody says.
const DETACHED_IDLE: Duration = Duration::from_secs(10);

/// Name of the control socket among those of a service manager.
const CONTROL_NAME: &str = "control";

/// Exit status: 0 after an orderly stop.
pub(super) fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    if args.only_check {
        let (resolved, _) = args.settings.resolve()?;
        logging::parse(&resolved.settings.log).context("cannot use the rules of the log")?;
        return Ok(ExitCode::SUCCESS);
    }
    // First, because it takes descriptors that it knows by number.
    let supervisor = Supervisor::from_environment();
    let (mut resolved, file) = args.settings.resolve()?;
    let found = resolved.settings.clone();
    resolved.fit_memory(memory::limit());
    let idle = idle_of(&resolved, args.detached);
    let mut settings = resolved.settings;
    let rules = logging::parse(&settings.log).context("cannot use the rules of the log")?;
    let log = super::start_log(rules, settings.log_format);
    stray_variables().iter().for_each(|stray| tracing::warn!("{stray}"));
    if args.detached {
        process::leave_session().context("cannot leave the session")?;
    }
    process::protect_from_oom();
    process::raise_descriptor_limit().context("cannot raise the limit of open files")?;
    let mut made = NewDirs::default();
    make_dirs(&mut settings, &mut made)?;
    // Before anything else is opened: numbers of descriptors have a meaning now.
    let handed = supervisor.take_those(|label| keeper::Name::from_label(label).is_some());
    let inherited = keeper::inherit(&settings.run, handed).context("cannot take over from the last daemon")?;
    supervisor.connect().context("cannot reach the service manager")?;
    if args.detached {
        // Not to keep busy the file system that a command was started in.
        std::env::set_current_dir("/").context("cannot leave the working directory")?;
    }
    // Before any thread is started, so that all of them are inside.
    let sandbox = if settings.sandbox { enter_sandbox(&settings)? } else { Sandbox::off() };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().min(4)))
        .thread_name("net")
        .enable_all()
        .build()?;
    let file = file.map(|file| file.display().to_string());
    tracing::debug!(file, "settings are known");
    let keep_mounts = settings.keep_mounts;
    let reload = Arc::new(Reload::new(args.settings, found, log.clone()));
    let (start, way_out) = ((sandbox.clone(), log, reload, idle, &supervisor), sandbox);
    let daemon = match serve(&runtime, settings, start, inherited) {
        Ok(daemon) => {
            made.stay();
            daemon
        }
        Err(error) => {
            way_out.outside(|| drop(made));
            return Err(error);
        }
    };
    match daemon.asked_to() {
        Some(Ending::Upgrade) => daemon.hand_over(true),
        None if keep_mounts => daemon.hand_over(false),
        Some(Ending::Stop) | None => {
            daemon.stop();
            runtime.shutdown_timeout(Duration::from_secs(1));
            return Ok(ExitCode::SUCCESS);
        }
    }
    // A successor may be at work already: nothing that unwinding would do is wanted now.
    std::process::exit(0)
}

/// Makes the directories of a daemon, and gives them their real names.
fn make_dirs(settings: &mut Settings, made: &mut NewDirs) -> anyhow::Result<()> {
    for dir in [&mut settings.run, &mut settings.cache] {
        made.make(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        ensure_own(dir)?;
        *dir = dir.canonicalize().with_context(|| format!("cannot use {}", dir.display()))?;
    }
    Ok(())
}

/// Serves until something ends it, and gives the daemon to be ended.
fn serve(
    runtime: &Runtime,
    settings: Settings,
    (sandbox, log, reload, idle, supervisor): (Sandbox, LogControl, Arc<Reload>, Option<Duration>, &Supervisor),
    inherited: Option<keeper::Inheritance>,
) -> anyhow::Result<Arc<Daemon>> {
    let stop = Arc::new(Notify::new());
    // First, so that two daemons started at once do not both try out the host.
    let control = {
        let _inside = runtime.enter();
        let control = match supervisor.take(CONTROL_NAME) {
            Some(socket) => Control::adopt(socket).context("cannot use the control socket")?,
            None => Control::bind(&settings.run, inherited.is_some())?,
        };
        let control = control.with_log(log).with_metrics(metrics_listener(&settings, inherited.is_some())?);
        // Before anything is mounted: from here on a signal is an orderly stop.
        watch_signals(stop.clone(), reload)?;
        control
    };
    let (store, keepers) = (settings.store_options(), plan(&settings, supervisor)?);
    let credentials = credentials(&settings, &sandbox)?;
    let Settings { cache, run, backend: backends, fuse_transport, hosts_dir, registries, host_limits, .. } = settings;
    if fuse_transport == Transport::IoUring {
        tracing::warn!(
            "FUSE requests may come over io_uring: if this daemon is killed, what it has mounted that way fails for good; \
             only an upgrade or an orderly end leaves it to the next daemon"
        );
    }
    let options = Options {
        cache,
        run: run.clone(),
        store,
        keepers,
        backends,
        fuse_transport,
        hosts_dir,
        registries,
        host_limits,
        credentials,
        sandbox,
    };
    let daemon = start(&options, runtime.handle(), inherited)?;
    let choice = daemon.info().host.choice;
    tracing::info!(run = %run.display(), ?choice, "serving");
    let status = choice.map_or_else(|| "no image can be mounted here".into(), |kind| format!("serving by {kind}"));
    if let Err(error) = supervisor.ready(&status) {
        tracing::warn!(%error, "the service manager does not hear that this daemon is ready");
    }
    if let Some(period) = supervisor.watchdog() {
        runtime.spawn(feed_watchdog(supervisor.clone(), daemon.clone(), period));
    }
    // On a thread of the runtime, like what it answers. Whatever ends it, the daemon is ended in order.
    match runtime.block_on(runtime.spawn(control.serve(daemon.clone(), stop, idle))) {
        Ok(Ok(())) => tracing::info!("stopping"),
        Ok(Err(error)) => tracing::error!(%error, "stopping: the control socket cannot be answered on"),
        Err(error) => tracing::error!(%error, "stopping: the control socket is not answered on any more"),
    }
    if let Err(error) = supervisor.stopping() {
        tracing::warn!(%error, "the service manager does not hear that this daemon stops");
    }
    Ok(daemon)
}

/// Where metrics are answered besides the control socket, if anywhere. Readers of a daemon that has
/// gone do not wait for somebody to free an address: a successor does without.
fn metrics_listener(settings: &Settings, takes_over: bool) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = settings.metrics_listen else { return Ok(None) };
    match TcpListener::bind(address) {
        Err(error) if takes_over => {
            tracing::error!(%address, %error, "metrics are answered on the control socket only");
            Ok(None)
        }
        outcome => outcome.map(Some).with_context(|| format!("cannot listen at {address}")),
    }
}

/// How the keepers are started, and how they start a daemon in place of this one.
fn plan(settings: &Settings, supervisor: &Supervisor) -> anyhow::Result<keeper::Plan> {
    let program = process::own_program().context("cannot find this program")?;
    let managed = ["NOTIFY_SOCKET", "INVOCATION_ID"].iter().any(|name| std::env::var_os(name).is_some());
    let by_keepers = match settings.restart {
        Restart::Keepers => true,
        Restart::Never => false,
        Restart::Auto => !managed,
    };
    let command = || std::iter::once(program.clone().into()).chain(std::env::args_os().skip(1)).collect();
    let successor = by_keepers.then(command);
    let (run, patience) = (settings.run.clone(), settings.store.deadline);
    let sandbox = settings.sandbox;
    Ok(keeper::Plan { program, run, patience, successor, sandbox, supervisor: supervisor.clone() })
}

/// When to exit for want of work.
fn idle_of(resolved: &Resolved, detached: bool) -> Option<Duration> {
    let at = TABLE.iter().position(|setting| setting.key == "exit_when_idle");
    let is_default = at.is_some_and(|at| resolved.origins[at] == Origin::Default);
    if detached && is_default { Some(DETACHED_IDLE) } else { resolved.settings.exit_when_idle }
}

/// Confines this thread and all that come after it. What the kernel lacks is told once.
fn enter_sandbox(settings: &Settings) -> anyhow::Result<Sandbox> {
    let own = |path: &str| PathBuf::from(path);
    let write = vec![settings.cache.clone(), settings.run.clone()];
    let read = (!settings.sandbox_read.is_empty()).then(|| {
        let asked = settings.sandbox_read.iter().cloned();
        let asked = asked.chain(credential_sources(settings).readable(&variable)).chain([settings.hosts_dir.clone()]);
        // A certificate that is renewed is another file of the same directory.
        let certificates_of = |file: &Path| file.parent().map(Path::to_owned);
        let asked = asked.chain(settings.registries.files().filter_map(certificates_of));
        asked.chain(READ_ANYWAY.iter().map(|path| own(path))).chain(certificates()).collect()
    });
    let policy = Policy { write, devices: vec![own(crate::sys::cachefiles::DEVICE), own("/dev/null")], read };
    let (sandbox, strength) =
        Sandbox::enter(&policy).context("cannot enter the sandbox; `--sandbox off` does without")?;
    match (strength.landlock, strength.seccomp) {
        (Some(version), true) => tracing::debug!(landlock = version, "confined"),
        (landlock, seccomp) => {
            tracing::warn!(?landlock, seccomp, "this kernel has only part of the sandbox; see `rafsd doctor`");
        }
    }
    Ok(sandbox)
}

/// Where credentials come from. Programs that know some are run outside of the sandbox.
pub(super) fn credentials(settings: &Settings, sandbox: &Sandbox) -> anyhow::Result<Credentials> {
    let programs: Arc<dyn Programs> = Arc::new(Runner::new(sandbox.clone()));
    let credentials = Credentials::open(&credential_sources(settings), &variable, &programs, Clock::default());
    credentials.context("cannot use the credentials for registries")
}

fn credential_sources(settings: &Settings) -> Sources {
    Sources {
        docker_config: settings.docker_config.clone(),
        providers: settings.credential_providers.clone(),
        provider_dir: settings.credential_provider_bin_dir.clone(),
        secrets: settings.registry_secrets.clone(),
    }
}

/// A variable of the environment. Services have no `HOME` there, but one all the same.
fn variable(name: &str) -> Option<OsString> {
    let set = std::env::var_os(name);
    if name == "HOME" { set.or_else(|| Some(std::env::home_dir()?.into_os_string())) } else { set }
}

/// What name resolution and TLS read, and what the daemon reads about itself and the kernel. Names
/// are resolved by libraries that are loaded when the first name is asked for.
const READ_ANYWAY: &[&str] = &[
    "/etc/resolv.conf",
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/nsswitch.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/etc/ssl",
    "/etc/pki",
    "/etc/ca-certificates",
    "/usr/share/ca-certificates",
    "/usr/local/share/ca-certificates",
    "/run/systemd/resolve",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/proc",
    "/sys/fs",
    "/sys/devices/system/cpu",
    "/dev/urandom",
];

/// Where the environment says that trusted certificates are.
fn certificates() -> impl Iterator<Item = PathBuf> {
    ["SSL_CERT_FILE", "SSL_CERT_DIR"].into_iter().filter_map(std::env::var_os).map(PathBuf::from)
}

/// Starts the daemon, waiting a while for one that is just leaving the same cache.
fn start(
    options: &Options,
    handle: &Handle,
    mut inherited: Option<keeper::Inheritance>,
) -> anyhow::Result<Arc<Daemon>> {
    let until = Instant::now() + HANDOVER;
    loop {
        match Daemon::start(options.clone(), handle.clone(), inherited.take()) {
            Err(DaemonError::Store(StoreError::Locked { .. })) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(50));
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// Tells the service manager that the daemon is well, for as long as it is: the runtime's timers
/// and threads, its blocking threads, and the threads that answer the kernel must all come round.
async fn feed_watchdog(supervisor: Supervisor, daemon: Arc<Daemon>, period: Duration) {
    loop {
        tokio::time::sleep(period / 4).await;
        let asked = daemon.clone();
        let answer = tokio::task::spawn_blocking(move || asked.ensure_alive(period / 8));
        match tokio::time::timeout(period / 2, answer).await {
            Ok(Ok(Ok(()))) => {
                if let Err(error) = supervisor.alive() {
                    tracing::warn!(%error, "the watchdog does not hear that this daemon is well");
                }
            }
            Ok(Ok(Err(stuck))) => tracing::error!(error = %stuck, "the watchdog is not fed"),
            Ok(Err(_)) | Err(_) => tracing::error!("the watchdog is not fed: the blocking threads do not answer"),
        }
    }
}

fn watch_signals(stop: Arc<Notify>, reload: Arc<Reload>) -> io::Result<()> {
    let mut term = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            let reload = reload.clone();
            // It fails only when the runtime ends.
            let _ = tokio::task::spawn_blocking(move || reload.run()).await;
        }
    });
    tokio::spawn(async move {
        // The first asks to stop, the next one not to wait for clients.
        loop {
            tokio::select! { _ = term.recv() => {}, _ = interrupt.recv() => {} }
            stop.notify_one();
        }
    });
    Ok(())
}

/// Stop the daemon: unmount everything and exit
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd stop")]
pub(super) struct StopArgs {
    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when the daemon has gone.
pub(super) fn stop(args: StopArgs) -> anyhow::Result<ExitCode> {
    let pid = block_on(async {
        let client = args.place.client()?;
        let info = client.info().await.map_err(|e| args.place.explain(e))?;
        client.stop().await?;
        Ok(info.pid)
    })?;
    let process = Path::new("/proc").join(pid.to_string()).join("stat");
    let until = Instant::now() + Duration::from_secs(60);
    // A zombie has stopped; whoever started it has not looked yet.
    while std::fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z ")) {
        anyhow::ensure!(Instant::now() < until, "the daemon (process {pid}) does not stop");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(ExitCode::SUCCESS)
}
