//! Cases that need a kernel: they mount, serve and kill for real.
//!
//! # Adding a case
//!
//! Write `fn case(ctx: &Ctx) -> Outcome` in a file of its subject, list it in that file's
//! `CASES: &[Case]`, and name the table in [`TABLES`]. Files about backends live in `cases/`, files
//! about the kernel alone beside this one.
//!
//! A case gets a [`Ctx`] with the backend to use, an empty directory of its own on a disk file
//! system, and the path of the `rafsd` binary. It fails by returning an error or by panicking; what
//! it prints is shown when it fails. It runs as a process of its own, so it may crash or hang; the
//! harness then kills whatever it started and unmounts whatever lies below its directory. A case
//! that *passes* must have cleaned up by itself: processes and mounts left behind turn it into a
//! failure.
//!
//! # Where cases run
//!
//! The backends fanotify, fuse-device and fuse-tree are tested on this host, cachefiles in a virtual machine, which
//! boots once for all of them: this same program, packed with the `rafsd` binary into an initrd,
//! runs there as `--in-guest` and its report lines are counted here (`guest.rs`). Some cases over FUSE run there too, and
//! more of them on a second machine with Debian's Linux 6.1 (`machine.rs`). A [`Need`] that
//! is not met skips the case with its reason; so does a missing emulator or kernel.
//!
//! # Usage
//!
//! `cargo test --test kernel -- [--list] [--backend NAME|all] [--transport dev|io-uring|all]
//! [--machine on-demand|stock] [--exact] [--skip TEXT]
//! [NAME...]`. Other flags of the usual test harness are accepted and ignored. Environment:
//! `RAFSD_TEST_KERNEL` names the guest's kernel (else the one `build-kernel` left in its cache),
//! `RAFSD_TEST_DIR` a directory for scratch files on ext4, XFS or btrfs. The last line is
//! `N passed, N failed, N skipped`; the exit status is 1 when a case failed.

mod args;
mod cases;
mod facts;
mod guest;
mod host;
mod initrd;
mod isolate;
mod machine;
mod mounts;
mod report;
mod ring;
mod selftest;
#[path = "../tests/support/mod.rs"]
mod support;

use machine::Machine;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;

use args::{Args, Mode};
use host::Need;
use report::{Tally, Verdict};

/// Every case, by subject.
const TABLES: &[&[Case]] = &[
    selftest::CASES,
    facts::CASES,
    cases::events::CASES,
    cases::reading::CASES,
    cases::random::CASES,
    cases::metadata::CASES,
    cases::posix::CASES,
    cases::idmap::CASES,
    cases::images::CASES,
    cases::interop::CASES,
    cases::sharing::CASES,
    cases::space::CASES,
    cases::unserved::CASES,
    cases::faults::CASES,
    cases::takeover::CASES,
    cases::selfwait::CASES,
    cases::upgrades::CASES,
    cases::v5::CASES,
    cases::many::CASES,
    cases::lifecycle::CASES,
    cases::givenup::CASES,
    cases::unprivileged::CASES,
    cases::meddling::CASES,
    cases::baddays::CASES,
    cases::service::CASES,
    cases::systemd::CASES,
    cases::prefetch::CASES,
    cases::observing::CASES,
    cases::fuse::CASES,
    cases::blobfs::CASES,
    cases::ring::CASES,
    cases::registry::CASES,
];

/// What a case returns; the error's whole chain is printed.
pub(crate) type Outcome = anyhow::Result<()>;

/// One promise about the kernel, or about the daemon on a kernel.
#[derive(Debug)]
pub(crate) struct Case {
    /// Unique, a sentence in snake case: the name is the promise.
    pub(crate) name: &'static str,
    /// What must be there; the first need that is not met skips the case.
    pub(crate) needs: &'static [Need],
    pub(crate) place: Place,
    pub(crate) run: fn(&Ctx) -> Outcome,
}

/// Where a case makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(dead_code, reason = "offered to every case, whether one of today uses it or not")]
pub(crate) enum Place {
    /// On this host, with the fanotify backend.
    Host,
    /// In the virtual machine, with the cachefiles backend.
    Guest,
    /// On this host, with each backend that works there.
    Here,
    /// On this host, with each backend over FUSE; some also in guests: see `machine`.
    Fuse,
    /// On this host, with each backend over FUSE, requests over io_uring.
    Ring,
    /// With one backend.
    Only(Backend),
    /// Everywhere, with each backend.
    Both,
}

impl Place {
    /// Whether a case of this place is run for `backend`.
    fn runs(self, backend: Backend) -> bool {
        match self {
            Self::Host => backend == Backend::Fanotify,
            Self::Guest => backend == Backend::Cachefiles,
            Self::Here => backend != Backend::Cachefiles,
            Self::Only(wanted) => backend == wanted,
            Self::Fuse => matches!(backend, Backend::FuseDevice | Backend::FuseTree),
            Self::Ring => false,
            Self::Both => true,
        }
    }
}

/// The way into the kernel under test; decides where the case runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Fanotify,
    Cachefiles,
    FuseDevice,
    FuseTree,
}

impl Backend {
    /// As the command lines of this program and of `rafsd` spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::Cachefiles => "cachefiles",
            Self::FuseDevice => "fuse-device",
            Self::FuseTree => "fuse-tree",
        }
    }
}

/// The way that a case runs: a backend, and for those over FUSE how requests come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    pub(crate) backend: Backend,
    pub(crate) over_ring: bool,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.backend.name())?;
        if self.over_ring { f.write_str(" over io_uring") } else { Ok(()) }
    }
}

impl From<Backend> for Way {
    fn from(backend: Backend) -> Self {
        Self { backend, over_ring: false }
    }
}

/// What a case gets.
#[derive(Debug)]
#[allow(dead_code, reason = "offered to every case, whether one of today uses it or not")]
pub(crate) struct Ctx {
    /// The backend to use.
    pub(crate) backend: Backend,
    /// Empty directory, on ext4, XFS or btrfs when the case needs [`Need::DiskStore`]; removed afterwards.
    pub(crate) dir: PathBuf,
    /// The `rafsd` binary of this build.
    pub(crate) rafsd: PathBuf,
    /// Whether this is the virtual machine: one or two orders of magnitude slower than the host.
    pub(crate) in_guest: bool,
}

/// Set when the user asked to stop; every wait of the harness looks at it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the flag on SIGINT, SIGTERM or SIGHUP, so that virtual machine, mounts and files are taken
    /// away before the program ends.
    fn watch() -> anyhow::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        let this = Self::default();
        let flag = Arc::clone(&this.0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut int, mut term, mut hup) = {
            let _entered = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
        };
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = int.recv() => {}, _ = term.recv() => {}, _ = hup.recv() => {} }
            });
            flag.store(true, Ordering::Relaxed);
        })?;
        Ok(this)
    }
}

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(message) => {
            eprintln!("error: {message}");
            return ExitCode::from(2);
        }
    };
    let status = match &args.mode {
        Mode::List => Ok(list(&args)),
        Mode::One { name, dir } => one(&args, name, dir.clone()),
        Mode::All => all(&args),
    };
    status.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn selected(args: &Args, backend: Backend) -> Vec<&'static Case> {
    let wanted = |case: &&Case| case.place.runs(backend) && args.runs(backend) && args.selects(case.name);
    TABLES.iter().copied().flatten().filter(wanted).collect()
}

/// The cases that run over io_uring.
fn selected_over_ring(args: &Args, backend: Backend) -> Vec<&'static Case> {
    let wanted = |case: &&Case| ring::runs(case, backend) && args.runs(backend) && args.selects(case.name);
    TABLES.iter().copied().flatten().filter(wanted).collect()
}

fn list(args: &Args) -> ExitCode {
    for backend in [Backend::Fanotify, Backend::FuseDevice, Backend::FuseTree, Backend::Cachefiles] {
        for case in args.transport.runs(false).then(|| selected(args, backend)).into_iter().flatten() {
            println!("{} [{}]", case.name, Way::from(backend));
        }
        for case in args.transport.runs(true).then(|| selected_over_ring(args, backend)).into_iter().flatten() {
            println!("{} [{}]", case.name, Way { backend, over_ring: true });
        }
    }
    ExitCode::SUCCESS
}

/// The child's side of [`isolate::run`]: one case, in this process.
fn one(args: &Args, name: &str, dir: PathBuf) -> anyhow::Result<ExitCode> {
    isolate::die_with_parent().context("ask to be killed with the harness")?;
    let backend = args.backend.context("--run-one needs --backend")?;
    let case =
        TABLES.iter().copied().flatten().chain(selftest::BAD).find(|case| case.name == name).context("no such case")?;
    let ctx = Ctx { backend, dir, rafsd: host::rafsd(args.in_guest), in_guest: args.in_guest };
    (case.run)(&ctx)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs one case and reports how it ended.
fn run_one(args: &Args, case: &Case, way: Way, interrupt: &Interrupt, tally: &mut Tally) {
    if interrupt.is_set() {
        return;
    }
    let unmet = case.needs.iter().find_map(|need| need.unmet(way.backend, args.in_guest));
    let (verdict, elapsed) = match unmet {
        Some(reason) => (Verdict::Skipped(reason), None),
        None => {
            let limit = isolate::time_limit(args.in_guest);
            isolate::run(case, way, args.in_guest, &host::store(args.in_guest), limit, interrupt)
        }
    };
    tally.report(case.name, way, &verdict, elapsed);
}

/// Runs cases over FUSE with requests over io_uring, for which the kernel's switch is turned.
fn all_over_ring(args: &Args, interrupt: &Interrupt, tally: &mut Tally) {
    let runs = [Backend::FuseDevice, Backend::FuseTree]
        .into_iter()
        .flat_map(|backend| selected_over_ring(args, backend).into_iter().map(move |case| (backend, case)));
    let runs: Vec<_> = runs.collect();
    if runs.is_empty() || interrupt.is_set() {
        return;
    }
    let switch = ring::Switch::on();
    for (backend, case) in runs {
        let way = Way { backend, over_ring: true };
        match &switch {
            Ok(_) => run_one(args, case, way, interrupt, tally),
            Err(reason) => tally.report(case.name, way, &Verdict::Skipped(reason.clone()), None),
        }
    }
}

fn all(args: &Args) -> anyhow::Result<ExitCode> {
    let interrupt = Interrupt::watch().context("watch for signals")?;
    isolate::sweep(&host::store(args.in_guest))?;
    let mut tally = Tally::default();
    Machine::ensure_known(TABLES)?;
    let with = |backend| selected(args, backend).into_iter().map(move |case| (backend, case));
    let everywhere = [Backend::Cachefiles, Backend::Fanotify, Backend::FuseDevice, Backend::FuseTree];
    // A guest is told the one backend to use.
    let on_host: &[Backend] = if args.in_guest { &everywhere } else { &everywhere[1..] };
    let is_wanted = args.in_guest || args.machine.is_none();
    let usual = is_wanted && args.transport.runs(false);
    for (here, case) in on_host.iter().filter(|_| usual).flat_map(|backend| with(*backend)) {
        if args.in_guest && !interrupt.is_set() {
            println!("running {}", case.name);
        }
        run_one(args, case, here.into(), &interrupt, &mut tally);
    }
    if is_wanted && !args.in_guest && args.transport.runs(true) {
        all_over_ring(args, &interrupt, &mut tally);
    }
    if !args.in_guest && args.transport.runs(false) && !interrupt.is_set() {
        for machine in Machine::ALL.into_iter().filter(|machine| args.machine.is_none_or(|wanted| wanted == *machine)) {
            let runs = everywhere.iter().flat_map(|backend| with(*backend));
            let runs: Vec<_> = runs.filter(|(backend, case)| machine.runs(case, *backend)).collect();
            if !runs.is_empty() && !interrupt.is_set() {
                guest::run(machine, &runs, &interrupt, &mut tally);
            }
        }
    }
    if interrupt.is_set() {
        anyhow::bail!("interrupted; {tally} so far");
    }
    if !args.in_guest {
        println!("{tally}");
    }
    Ok(if tally.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
