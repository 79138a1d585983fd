//! The daemon dies, or makes room, and another one goes on: no reader sees a wrong byte or an error.
//!
//! `RAFSD_KILLS=1000 cargo test --test kernel -- readers_survive_random_kills` is the long run; see
//! `docs/SEMANTICS.md`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rafsd::daemon::keeper;
use rafsd::net::server::{Fault, ServerOptions};

use super::fixture::{FILE, Fixture, content, drop_caches, is_fanotify, read_byte};
use crate::host::Need;
use crate::support::{listing, tree};
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, place: Place, run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs: NEEDS, place, run }
}

pub(crate) const CASES: &[Case] = &[
    case("readers_survive_random_kills", Place::Both, readers_survive_random_kills),
    case("readers_survive_a_kill_at_each_step", Place::Both, readers_survive_a_kill_at_each_step),
    case("keepers_start_another_daemon", Place::Both, keepers_start_another_daemon),
    case("any_one_of_three_puts_the_others_back", Place::Here, any_one_of_three_puts_the_others_back),
    case("a_stopped_keeper_holds_nobody_up", Place::Host, a_stopped_keeper_holds_nobody_up),
    case("an_upgrade_is_not_noticed_by_readers", Place::Both, an_upgrade_is_not_noticed_by_readers),
    case("keepers_go_by_the_settings_of_the_daemon_that_serves", Place::Both, keepers_go_by_the_settings_of_the_daemon),
    case("a_kill_while_keepers_are_replaced_is_survived", Place::Both, a_kill_while_keepers_are_replaced_is_survived),
    case("without_a_successor_reads_fail_in_time", Place::Both, without_a_successor_reads_fail_in_time),
    case("what_ends_while_no_daemon_runs_is_forgotten", Place::Here, what_ends_while_no_daemon_runs_is_forgotten),
    case("kept_mounts_are_served_by_the_next_daemon", Place::Both, kept_mounts_are_served_by_the_next_daemon),
    case("mounts_that_nobody_kept_are_ended_and_told", Place::Host, mounts_that_nobody_kept_are_ended_and_told),
    case("what_a_newer_release_wrote_down_is_denied_not_zeros", Place::Host, what_a_newer_release_wrote_down_is_denied),
    case("a_takeover_needs_no_source", Place::Here, a_takeover_needs_no_source),
    case("the_whole_tree_is_right_after_a_takeover", Place::Both, the_whole_tree_is_right_after_a_takeover),
    case("readers_survive_kills_where_nothing_is_sent_again", Place::Fuse, readers_survive_without_resend),
    case("readers_survive_a_kill_at_each_step_there", Place::Fuse, readers_survive_a_kill_at_each_step_there),
];

/// Bytes of one chunk: small, so that an image has many to miss.
const CHUNK: usize = 4096;

/// How many read while a daemon is killed at each step.
const READERS: usize = 4;

/// An image of many small chunks on a slow server, a daemon, and readers who compare what they read.
struct Siege<'a> {
    fixture: Fixture<'a>,
    mount: PathBuf,
    bytes: Arc<Vec<u8>>,
    /// How many daemons have had a cache of their own; the last one's is in use.
    caches: usize,
    readers: Vec<JoinHandle<()>>,
    watch: Arc<Watch>,
}

/// What readers do and see.
#[derive(Default)]
struct Watch {
    stop: AtomicBool,
    reads: AtomicU64,
    errors: Mutex<BTreeMap<i32, u64>>,
    wrong: Mutex<Option<String>>,
}

impl<'a> Siege<'a> {
    fn begin(ctx: &'a Ctx, daemon: &[&str]) -> anyhow::Result<Self> {
        Self::begin_as(ctx, daemon, None)
    }

    /// The same with a kernel that daemons take for another one, as `RAFSD_PRETEND` says.
    fn begin_as(ctx: &'a Ctx, daemon: &[&str], pretended: Option<&str>) -> anyhow::Result<Self> {
        Self::begin_of(ctx, daemon, pretended, if ctx.in_guest { 4 << 20 } else { 32 << 20 })
    }

    /// The same over a file of `len` bytes.
    fn begin_of(ctx: &'a Ctx, daemon: &[&str], pretended: Option<&str>, len: usize) -> anyhow::Result<Self> {
        let bytes = Arc::new(content(77, len));
        let options = ServerOptions { delay: Duration::from_millis(2), ..ServerOptions::default() };
        let build = ["--chunk-size", "4096"];
        let mut fixture = Fixture::with(ctx, &build, options, daemon, |dir| fs::write(dir.join("big"), &**bytes))?;
        if let Some(name) = pretended {
            fixture.set_environment("RAFSD_PRETEND", name.to_owned());
            fixture.restart(daemon)?;
        }
        let mount = fixture.mount("mnt")?;
        Ok(Self { fixture, mount, bytes, caches: 1, readers: Vec::new(), watch: Arc::default() })
    }

    /// Starts readers of single pages, each in an order of its own.
    fn start_readers(&mut self, count: usize) {
        for seed in 0..count {
            let (watch, bytes, path) = (self.watch.clone(), self.bytes.clone(), self.mount.join("big"));
            let seed = seed as u64 + 1 + self.caches as u64 * 100;
            self.readers.push(std::thread::spawn(move || read_pages(&path, &bytes, seed, &watch)));
        }
    }

    fn stop_readers(&mut self) -> Outcome {
        self.watch.stop.store(true, Ordering::Relaxed);
        for reader in self.readers.drain(..) {
            reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
        }
        self.watch.stop.store(false, Ordering::Relaxed);
        self.ensure_well()
    }

    /// Stops them unless `is_dead` says meanwhile that the daemon they may wait for has gone; then they read on. Tells
    /// whether they have stopped.
    fn stop_readers_unless(&mut self, is_dead: impl Fn() -> bool) -> anyhow::Result<bool> {
        self.watch.stop.store(true, Ordering::Relaxed);
        while !self.readers.iter().all(JoinHandle::is_finished) {
            if is_dead() {
                self.watch.stop.store(false, Ordering::Relaxed);
                let before = self.readers.len();
                self.readers.retain(|reader| !reader.is_finished());
                self.start_readers(before - self.readers.len());
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stop_readers()?;
        Ok(true)
    }

    fn ensure_well(&self) -> Outcome {
        if let Some(wrong) = &*self.watch.wrong.lock().unwrap() {
            anyhow::bail!("a wrong byte was read: {wrong}");
        }
        Ok(())
    }

    fn errors(&self) -> BTreeMap<i32, u64> {
        self.watch.errors.lock().unwrap().clone()
    }

    /// Reads that have ended, and waits until `more` further ones have.
    fn wait_for_reads(&self, more: u64) -> Outcome {
        let wanted = self.watch.reads.load(Ordering::Relaxed) + more;
        let until = Instant::now() + Duration::from_secs(60);
        while self.watch.reads.load(Ordering::Relaxed) < wanted {
            self.ensure_well()?;
            ensure!(Instant::now() < until, "readers do not get on: {}", self.fixture.log());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Part of the image that is not in the cache yet, in per cent.
    fn missing(&self) -> anyhow::Result<u64> {
        let list = self.fixture.list()?;
        let stats = &list.first().context("an image")?["devices"][0]["stats"];
        let number = |name: &str| stats[name].as_u64();
        let (Some(units), Some(present)) = (number("units"), number("units_present")) else { return Ok(100) };
        Ok(100 - present * 100 / units.max(1))
    }

    /// Begins anew with an empty cache when little is missing any more.
    fn renew_if_warm(&mut self, daemon: &[&str]) -> Outcome {
        self.renew_if_warm_unless(daemon, || false)
    }

    /// The same while the daemon may be killed, which `is_dead` tells.
    fn renew_if_warm_unless(&mut self, daemon: &[&str], is_dead: impl Fn() -> bool) -> Outcome {
        if self.missing()? > 30 {
            return Ok(());
        }
        let readers = self.readers.len();
        if !self.stop_readers_unless(is_dead)? {
            return Ok(());
        }
        self.renew(daemon, readers)
    }

    /// Begins anew with an empty cache and so many readers. Nobody reads now.
    fn renew(&mut self, daemon: &[&str], readers: usize) -> Outcome {
        if !self.fixture.list()?.is_empty() {
            self.fixture.umount(&self.mount)?;
        }
        self.fixture.stop()?;
        self.caches += 1;
        let cache = self.fixture.ctx.dir.join(format!("cache-{}", self.caches));
        fs::remove_dir_all(self.fixture.cache()).or_else(|error| match error.kind() {
            ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        self.fixture.use_cache(&cache);
        self.fixture.start(daemon)?;
        self.mount = self.fixture.mount("mnt")?;
        self.start_readers(readers);
        Ok(())
    }

    /// The whole file once more, from a cold page cache.
    fn end(mut self) -> Outcome {
        self.stop_readers()?;
        drop_caches()?;
        ensure!(fs::read(self.mount.join("big"))? == *self.bytes, "the whole file at the end");
        self.fixture.umount(&self.mount)?;
        self.fixture.finish()
    }
}

fn read_pages(path: &Path, bytes: &[u8], seed: u64, watch: &Watch) {
    let pages = bytes.len() / CHUNK;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut buffer = vec![0; CHUNK];
    let file = File::open(path).expect("metadata needs nobody");
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM).expect("advice");
    while !watch.stop.load(Ordering::Relaxed) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = usize::try_from(state % pages as u64).expect("small") * CHUNK;
        match file.read_exact_at(&mut buffer, at as u64) {
            Ok(()) if buffer == bytes[at..at + CHUNK] => {}
            Ok(()) => {
                let zeros = buffer.iter().all(|&byte| byte == 0);
                *watch.wrong.lock().unwrap() = Some(format!("page at {at}, zeros: {zeros}"));
                return;
            }
            Err(error) => {
                *watch.errors.lock().unwrap().entry(error.raw_os_error().unwrap_or(0)).or_default() += 1;
            }
        }
        watch.reads.fetch_add(1, Ordering::Relaxed);
    }
}

fn rounds(name: &str, here: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(here)
}

fn readers_survive_random_kills(ctx: &Ctx) -> Outcome {
    let kills = rounds("RAFSD_KILLS", if ctx.in_guest { 4 } else { 40 });
    survive(Siege::begin(ctx, PATIENT)?, kills)
}

/// As before Linux 6.9.
fn readers_survive_without_resend(ctx: &Ctx) -> Outcome {
    survive(Siege::begin_as(ctx, PATIENT, Some("no-resend"))?, rounds("RAFSD_KILLS", 40))
}

fn the_whole_tree_is_right_after_a_takeover(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::new(ctx, |dir| tree::make(dir, 7))?;
    let mount = fixture.mount("mnt")?;
    // So that the kernel knows some of it, and asks for the rest of who comes later.
    let known = fs::read_dir(&mount)?.count();
    ensure!(known > 5, "the root has {known} entries");
    for _ in 0..2 {
        fixture.kill()?;
        fixture.start(&[])?;
        let (want, got) = (listing::of(&fixture.source())?, listing::of(&mount)?);
        let differences = listing::diff(&want, &got);
        ensure!(differences.is_empty(), "- source, + mount:\n{differences}");
        drop_caches()?;
    }
    fixture.umount(&mount)?;
    fixture.finish()
}

/// Daemons that live for less than two seconds, one after the other, count as none: in a long run of them the
/// deadline would pass, and with it what fails closed for good.
const PATIENT: &[&str] = &["--deadline", "30m"];

fn survive(mut siege: Siege<'_>, kills: usize) -> Outcome {
    siege.start_readers(4);
    let mut slowest = Duration::ZERO;
    for round in 0..kills {
        // Spread over what a miss takes, and a little longer.
        std::thread::sleep(Duration::from_micros((round as u64 * 7919) % 20_000));
        let killed = Instant::now();
        siege.fixture.kill()?;
        siege.fixture.start(PATIENT)?;
        siege.wait_for_reads(1)?;
        slowest = slowest.max(killed.elapsed());
        siege.renew_if_warm(PATIENT).with_context(|| format!("round {round}"))?;
    }
    println!("{kills} kills, {} reads, errors {:?}", siege.watch.reads.load(Ordering::Relaxed), siege.errors());
    println!("readers went on after at most {slowest:?}");
    ensure!(siege.errors().is_empty(), "readers saw errors: {:?}\n{}", siege.errors(), siege.fixture.log());
    siege.end()
}

/// Every step of a miss, and of the takeover after one.
const STEPS: &[&str] =
    &["taken", "written-down", "fetched", "decoded", "landed", "published", "answered", "synced", "flushed"];
const TAKEOVER_STEPS: &[&str] = &["adopted-one", "adopting"];

fn readers_survive_a_kill_at_each_step(ctx: &Ctx) -> Outcome {
    kill_at_each_step(ctx, Siege::begin(ctx, &[])?, TAKEOVER_STEPS)
}

/// As before Linux 6.9.
fn readers_survive_a_kill_at_each_step_there(ctx: &Ctx) -> Outcome {
    let siege = Siege::begin_as(ctx, &[], Some("no-resend"))?;
    kill_at_each_step(ctx, siege, &["adopted-one", "adopting", "replayed"])
}

fn kill_at_each_step(ctx: &Ctx, mut siege: Siege<'_>, takeover: &[&str]) -> Outcome {
    // Where a confined daemon may remove it.
    let token = siege.fixture.run().join("token");
    siege.start_readers(READERS);
    let host_only = ["taken", "written-down", "answered", "adopting", "synced", "flushed"];
    for step in STEPS.iter().chain(takeover) {
        if ctx.in_guest && host_only.contains(step) {
            continue;
        }
        siege.renew_if_warm(&[])?;
        siege.fixture.kill()?;
        siege.fixture.set_environment("RAFSD_FAULT_POINT", format!("{step}:{}", token.display()));
        fs::write(&token, b"")?;
        // One that dies while it takes over never answers.
        let _ = siege.fixture.start(&[]);
        let until = Instant::now() + Duration::from_secs(30);
        while token.exists() {
            ensure!(Instant::now() < until, "no daemon ever reached {step}: {}", siege.fixture.log());
            siege.renew_if_warm_unless(&[], || !token.exists()).ok();
            std::thread::sleep(Duration::from_millis(2));
        }
        // One that died while it made room for another has been followed by that.
        siege.fixture.kill().ok();
        siege.fixture.start(&[]).with_context(|| format!("after a kill at {step}"))?;
        if siege.readers.is_empty() {
            siege.renew(&[], READERS).with_context(|| format!("again after a kill at {step}"))?;
        }
        siege.wait_for_reads(20).with_context(|| format!("after a kill at {step}"))?;
        ensure!(
            siege.errors().is_empty(),
            "errors after a kill at {step}: {:?}\n{}",
            siege.errors(),
            siege.fixture.log()
        );
    }
    siege.end()
}

/// Waits until another daemon than `before` answers, and gives its process id.
fn another_daemon(fixture: &Fixture<'_>, before: u32) -> anyhow::Result<u32> {
    let client = rafsd::daemon::client::Client::new(&fixture.run())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Ok(info) = runtime.block_on(client.info())
            && info.pid != before
        {
            return Ok(info.pid);
        }
        ensure!(Instant::now() < until, "no other daemon comes: {}", fixture.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a daemon that somebody else started.
fn stop_by_command(siege: Siege<'_>) -> Outcome {
    let Siege { mut fixture, mount, .. } = siege;
    fixture.umount(&mount)?;
    fixture.must(&["stop"])?;
    fixture.forget_daemon()?;
    ensure!(crate::mounts::below(&fixture.ctx.dir)?.is_empty(), "still mounted");
    let until = Instant::now() + Duration::from_secs(10);
    while !keeper::statuses(&fixture.run()).is_empty() {
        ensure!(Instant::now() < until, "keepers are left");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn keepers_start_another_daemon(ctx: &Ctx) -> Outcome {
    let mut siege = Siege::begin(ctx, &["--restart", "keepers"])?;
    siege.start_readers(2);
    let mut daemon = siege.fixture.pid();
    for _ in 0..2 {
        siege.wait_for_reads(5)?;
        kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
        siege.fixture.forget_daemon()?;
        daemon = another_daemon(&siege.fixture, daemon)?;
        siege.wait_for_reads(5)?;
    }
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}", siege.errors());
    stop_by_command(siege)
}

/// Stopped, it lives and answers nothing: neither the other keeper nor the next daemon may wait for it.
fn a_stopped_keeper_holds_nobody_up(ctx: &Ctx) -> Outcome {
    let mut siege = Siege::begin(ctx, &["--restart", "keepers"])?;
    siege.start_readers(2);
    let (run, mut daemon) = (siege.fixture.run(), siege.fixture.pid());
    for rank in [0, 1] {
        siege.wait_for_reads(5)?;
        let stopped = keeper::statuses(&run).get(rank).context("two keepers")?.pid;
        kill(Pid::from_raw(i32::try_from(stopped)?), Signal::SIGSTOP)?;
        kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
        siege.fixture.forget_daemon()?;

        daemon = another_daemon(&siege.fixture, daemon).with_context(|| format!("keeper {rank} stopped"))?;

        siege.wait_for_reads(5)?;
        let until = Instant::now() + Duration::from_secs(20);
        while keeper::statuses(&run).iter().filter(|it| it.pid != stopped).count() < 2 {
            ensure!(Instant::now() < until, "keeper {rank}: nobody took its place");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Gone on, it would take the daemon for dead and deny readers.
        let _ = kill(Pid::from_raw(i32::try_from(stopped)?), Signal::SIGCONT);
        siege.wait_for_reads(5)?;
    }
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}\n{}", siege.errors(), siege.fixture.log());
    stop_by_command(siege)
}

fn any_one_of_three_puts_the_others_back(ctx: &Ctx) -> Outcome {
    let mut siege = Siege::begin(ctx, &["--restart", "keepers"])?;
    siege.start_readers(2);
    let run = siege.fixture.run();
    let mut daemon = siege.fixture.pid();
    // Who dies, in this order, nothing waited for in between: 0 and 1 are keepers, 2 is the daemon.
    for dying in [&[0][..], &[1], &[0, 2], &[2, 0], &[1, 2], &[2, 1], &[0, 1]] {
        siege.wait_for_reads(5)?;
        let keepers = keeper::statuses(&run);
        ensure!(keepers.len() == 2, "before {dying:?}: {keepers:?}");
        let victims = [keepers[0].pid, keepers[1].pid, daemon];
        for &who in dying {
            kill(Pid::from_raw(i32::try_from(victims[who])?), Signal::SIGKILL)?;
        }
        if dying.contains(&2) {
            siege.fixture.forget_daemon()?;
            daemon = another_daemon(&siege.fixture, daemon)?;
        }
        siege.wait_for_reads(5).with_context(|| format!("after {dying:?}"))?;
        let until = Instant::now() + Duration::from_secs(20);
        while keeper::statuses(&run).iter().filter(|it| !it.orphaned && !victims.contains(&it.pid)).count()
            < dying.iter().filter(|&&who| who < 2).count()
            || keeper::statuses(&run).len() < 2
        {
            ensure!(Instant::now() < until, "after {dying:?}: {:?}", keeper::statuses(&run));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}\n{}", siege.errors(), siege.fixture.log());
    stop_by_command(siege)
}

fn an_upgrade_is_not_noticed_by_readers(ctx: &Ctx) -> Outcome {
    let mut siege = Siege::begin(ctx, &["--restart", "keepers"])?;
    siege.start_readers(4);
    let other = ctx.dir.join("rafsd-next");
    fs::copy(&ctx.rafsd, &other)?;
    let mut daemon = siege.fixture.pid();
    for _ in 0..if ctx.in_guest { 1 } else { 3 } {
        siege.wait_for_reads(20)?;
        let said = siege.fixture.must(&["upgrade", "--json", "--program", other.to_str().context("UTF-8")?])?;
        println!("{}", said.trim());
        siege.fixture.forget_daemon()?;
        let next = another_daemon(&siege.fixture, daemon)?;
        let program = fs::read_link(format!("/proc/{next}/exe"))?;
        ensure!(program == other, "process {next} runs {}", program.display());
        daemon = next;
        siege.wait_for_reads(20)?;
    }
    let bad = ctx.dir.join("bad");
    fs::write(&bad, b"#!/bin/sh\nexit 1\n")?;
    let refused = siege.fixture.command(&["upgrade", "--program", bad.to_str().context("UTF-8")?])?;
    ensure!(!refused.status.success(), "went on with a program that does not run");
    siege.wait_for_reads(20)?;
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}\n{}", siege.errors(), siege.fixture.log());
    stop_by_command(siege)
}

/// Waits until there are two keepers, each with a daemon, and none of `before`. Gives their numbers.
fn other_keepers(fixture: &Fixture<'_>, before: &[u32]) -> anyhow::Result<Vec<u32>> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let there = keeper::statuses(&fixture.run());
        let others = there.iter().filter(|it| !it.orphaned && !before.contains(&it.pid));
        if others.count() == 2 {
            return Ok(there.iter().map(|it| it.pid).collect());
        }
        ensure!(Instant::now() < until, "before {before:?}, now {there:?}: {}", fixture.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn keepers_go_by_the_settings_of_the_daemon(ctx: &Ctx) -> Outcome {
    let config = ctx.dir.join("rafsd.toml");
    fs::write(&config, "deadline = \"600s\"\n")?;
    let options = ["--restart", "keepers", "--config", config.to_str().context("UTF-8")?];
    // Something has to be missing at the end, after all that is read meanwhile.
    let mut siege = Siege::begin_of(ctx, &options, None, if ctx.in_guest { 16 << 20 } else { 32 << 20 })?;
    siege.start_readers(2);
    let (daemon, keepers) = (siege.fixture.pid(), siege.fixture.keepers());
    siege.wait_for_reads(5)?;

    // The same settings after a crash: the same keepers.
    kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
    siege.fixture.forget_daemon()?;
    let daemon = another_daemon(&siege.fixture, daemon)?;
    siege.wait_for_reads(5)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(siege.fixture.keepers() == keepers, "replaced for nothing");

    // Another program, and another deadline.
    let other = ctx.dir.join("rafsd-next");
    fs::copy(&ctx.rafsd, &other)?;
    fs::write(&config, "deadline = \"2s\"\n")?;
    siege.fixture.must(&["upgrade", "--program", other.to_str().context("UTF-8")?])?;
    let daemon = another_daemon(&siege.fixture, daemon)?;
    other_keepers(&siege.fixture, &keepers)?;
    siege.wait_for_reads(5)?;
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}\n{}", siege.errors(), siege.fixture.log());
    kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
    let daemon = another_daemon(&siege.fixture, daemon)?;
    let program = fs::read_link(format!("/proc/{daemon}/exe"))?;
    ensure!(program == other, "process {daemon} runs {}", program.display());

    // Whoever is started ends again: readers are denied when the new deadline has passed.
    fs::write(&config, "no settings")?;
    ensure!(siege.missing()? > 0, "nothing is missing");
    kill(Pid::from_raw(i32::try_from(daemon)?), Signal::SIGKILL)?;
    let clock = Instant::now();
    let got = fs::read(siege.mount.join("big")).map(|bytes| bytes.len()).map_err(|e| e.raw_os_error());
    let waited = clock.elapsed();
    ensure!(got.is_err_and(is_failure), "{got:?}");
    ensure!(waited < Duration::from_secs(if ctx.in_guest { 60 } else { 20 }), "after {waited:?}");

    fs::write(&config, "deadline = \"2s\"\n")?;
    let _ = another_daemon(&siege.fixture, daemon)?;
    if !is_fanotify(ctx) {
        // The kernel let go of its cache; see `without_a_successor_reads_fail_in_time`.
        nix::mount::umount(&siege.mount)?;
        siege.mount = siege.fixture.mount("again")?;
    }
    stop_by_command(siege)
}

fn a_kill_while_keepers_are_replaced_is_survived(ctx: &Ctx) -> Outcome {
    let mut siege = Siege::begin(ctx, &[])?;
    let token = siege.fixture.run().join("token");
    siege.start_readers(2);
    for (seconds, step) in (100..).zip(["keeper-filled", "keeper-posted"]) {
        let before = siege.fixture.keepers();
        siege.wait_for_reads(5)?;
        siege.fixture.kill()?;
        siege.fixture.set_environment("RAFSD_FAULT_POINT", format!("{step}:{}", token.display()));
        fs::write(&token, b"")?;
        let options = [String::from("--deadline"), format!("{seconds}s")];
        let options = options.each_ref().map(String::as_str);
        // It may die before it is asked anything.
        let _ = siege.fixture.start(&options);
        let until = Instant::now() + Duration::from_secs(60);
        while token.exists() {
            ensure!(Instant::now() < until, "no daemon ever reached {step}: {}", siege.fixture.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        siege.fixture.forget_daemon()?;
        // Everything is held twice, by whomever.
        ensure!(siege.fixture.keepers().len() == 2, "{step}: {:?}", keeper::statuses(&siege.fixture.run()));
        siege.fixture.start(&options).with_context(|| format!("after a kill at {step}"))?;
        siege.wait_for_reads(20).with_context(|| format!("after a kill at {step}"))?;
        let now = other_keepers(&siege.fixture, &before)?;
        let processes = keepers_of(&siege.fixture.run())?;
        ensure!(processes.len() == 2 && now.iter().all(|pid| processes.contains(pid)), "{step}: {processes:?}");
        ensure!(siege.errors().is_empty(), "{step}: {:?}\n{}", siege.errors(), siege.fixture.log());
    }
    siege.end()
}

/// All processes that are keepers of `run`, whether they can be reached or not.
fn keepers_of(run: &Path) -> anyhow::Result<Vec<u32>> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let mut found = Vec::new();
        for process in fs::read_dir("/proc")?.flatten() {
            let Ok(pid) = process.file_name().to_string_lossy().parse::<u32>() else { continue };
            let words = fs::read(process.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = words.split(|byte| *byte == 0).collect();
            if words.get(1) == Some(&&b"keeper"[..]) && words.contains(&run.as_os_str().as_encoded_bytes()) {
                found.push(pid);
            }
        }
        // One that was replaced may need a moment to leave.
        if found.len() <= 2 || Instant::now() > until {
            return Ok(found);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn without_a_successor_reads_fail_in_time(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    fixture.restart(&["--deadline", "2"])?;
    let mount = fixture.mount("mnt")?;
    fixture.kill()?;
    let clock = Instant::now();

    let got = read_byte(&mount.join("0"), 0);

    let waited = clock.elapsed();
    ensure!(got.is_err_and(is_failure), "{got:?}");
    let longest = Duration::from_secs(if ctx.in_guest { 40 } else { 10 });
    ensure!(waited >= Duration::from_millis(1500) && waited < longest, "after {waited:?}");
    fixture.start(&[])?;
    if !is_fanotify(ctx) {
        // The kernel let go of its cache when the keepers did, and says so for as long as the mount lives.
        ensure!(read_byte(&mount.join("1"), 0).is_err(), "from a cache that is gone");
        ensure!(fixture.log().contains("unmount it and mount it again"), "{}", fixture.log());
        nix::mount::umount(&mount)?;
        let again = fixture.mount("again")?;
        ensure!(fs::read(again.join("1"))? == content(1, FILE), "mounted again");
        fixture.umount(&again)?;
        return fixture.finish();
    }
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "a later daemon goes on all the same");
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "a later daemon goes on all the same");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// What a reader of cachefiles or FUSE may get for data that nobody brings.
fn is_failure(errno: Option<i32>) -> bool {
    let failures = [nix::libc::EIO, nix::libc::ENOBUFS, nix::libc::ENOTCONN, nix::libc::ECONNABORTED];
    errno.is_some_and(|errno| failures.contains(&errno))
}

fn what_ends_while_no_daemon_runs_is_forgotten(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let (first, second) = (fixture.mount("first")?, fixture.mount("second")?);
    // Unmounted, but a file is open.
    let third = fixture.mount("third")?;
    let open = File::open(third.join("1"))?;
    fixture.must(&["umount", "--lazy", third.to_str().context("UTF-8")?])?;
    fixture.kill()?;
    nix::mount::umount(&first)?;
    fixture.start(&[])?;

    let dirs: Vec<_> = fixture.list()?.iter().map(|image| image["dir"].clone()).collect();

    ensure!(dirs == [second.to_str().context("UTF-8")?], "{dirs:?}");
    let mut byte = [0];
    open.read_exact_at(&mut byte, 1 << 20).context("of a lazily unmounted image")?;
    ensure!(byte[0] == content(1, FILE)[1 << 20], "of a lazily unmounted image");
    drop(open);
    ensure!(fs::read(second.join("0"))? == content(0, FILE), "of the one that stays");
    let again = fixture.mount("first")?;
    ensure!(fs::read(again.join("1"))? == content(1, FILE), "mounted again at the same place");
    for dir in [again, second] {
        fixture.umount(&dir)?;
    }
    let held = keeper::statuses(&fixture.run());
    ensure!(held.iter().all(|it| it.alive == 0), "{held:?}");
    fixture.finish()
}

/// What the unit for systemd has the daemon be started with.
fn options_of_the_unit() -> anyhow::Result<Vec<&'static str>> {
    let line = include_str!("../../docs/rafsd.service").lines().find_map(|line| line.strip_prefix("ExecStart="));
    let words: Vec<_> = line.context("it starts nothing")?.split(' ').collect();
    ensure!(words.get(1) == Some(&"serve"), "{words:?}");
    Ok(words[2..].to_vec())
}

/// As `systemctl restart` does.
fn kept_mounts_are_served_by_the_next_daemon(ctx: &Ctx) -> Outcome {
    let options = options_of_the_unit()?;
    let mut siege = Siege::begin(ctx, &options)?;
    siege.start_readers(2);
    for _ in 0..2 {
        siege.wait_for_reads(10)?;
        siege.fixture.stop()?;
        ensure!(!crate::mounts::below(&ctx.dir)?.is_empty(), "it was unmounted");
        siege.fixture.start(&options)?;
    }
    siege.wait_for_reads(10)?;
    siege.stop_readers()?;
    ensure!(siege.errors().is_empty(), "{:?}\n{}", siege.errors(), siege.fixture.log());
    stop_by_command(siege)
}

fn mounts_that_nobody_kept_are_ended_and_told(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let whole = fixture.build_other("whole", |dir| fs::write(dir.join("w"), content(5, FILE)))?;
    let complete = fixture.mount_other(&whole, "complete", &["--prefetch"])?;
    fixture.wait_for_list("complete", |images| images[0]["devices"][0]["stats"]["complete"] == true)?;
    let incomplete = fixture.mount("incomplete")?;
    let open = File::open(incomplete.join("0"))?;
    // All three at once, as `kill -9 -1` would.
    fixture.kill_all()?;
    // The kernel shows holes now: the very thing that must not stay.
    ensure!(
        read_byte(&incomplete.join("0"), 0) == Ok(0),
        "this kernel fails closed; the keepers are not needed any more"
    );

    fixture.start(&[])?;

    let left = crate::mounts::below(&ctx.dir)?;
    ensure!(left.iter().map(|row| &row.mountpoint).eq([&complete]), "mounted: {left:?}");
    ensure!(fixture.log().contains("may have read zeros"), "{}", fixture.log());
    let mut byte = [0];
    for at in [0, 1 << 20] {
        let got = open.read_exact_at(&mut byte, at).map_err(|e| e.raw_os_error());
        ensure!(got == Err(Some(nix::libc::EIO)), "of an open file at {at}: {got:?} {byte:?}");
    }
    drop_caches()?;
    ensure!(fs::read(complete.join("w"))? == content(5, FILE), "the complete one");
    nix::mount::umount(&complete)?;
    drop(open);
    let again = fixture.mount("again")?;
    ensure!(fs::read(again.join("0"))? == content(0, FILE), "mounted again");
    fixture.umount(&again)?;
    fixture.finish()
}

fn what_a_newer_release_wrote_down_is_denied(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    fixture.kill()?;
    for record in fs::read_dir(fixture.run().join("served"))? {
        fs::write(record?.path(), br#"{"version": 99, "record": {"something": "else"}}"#)?;
    }
    fixture.start(&[])?;

    let got = read_byte(&mount.join("0"), 0);

    ensure!(got == Err(Some(nix::libc::EIO)), "{got:?}");
    ensure!(fixture.log().contains("version 99"), "{}", fixture.log());
    fixture.umount(&mount).context("what has no record that can be read")?;
    let records = || Ok::<_, std::io::Error>(fs::read_dir(fixture.run().join("served"))?.count());
    let until = Instant::now() + Duration::from_secs(10);
    while records()? > 0 {
        ensure!(Instant::now() < until, "a record is left that is about nothing");
        std::thread::sleep(Duration::from_millis(20));
    }
    let again = fixture.mount("again")?;
    ensure!(fs::read(again.join("0"))? == content(0, FILE), "mounted again");
    fixture.umount(&again)?;
    fixture.finish()
}

fn a_takeover_needs_no_source(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    // One byte, so that nothing is read ahead; and time for its presence to become durable.
    let byte = |result| result == Ok(content(0, FILE)[0]);
    ensure!(byte(read_byte(&mount.join("0"), 0)), "before");
    std::thread::sleep(Duration::from_secs(3));
    fixture.server.set_fault(Fault::Status { code: 403, retry_after: None });
    fixture.kill()?;
    drop_caches()?;

    fixture.start(&["--deadline", "2"])?;

    ensure!(byte(read_byte(&mount.join("0"), 0)), "what is present is read while the source is down");
    ensure!(read_byte(&mount.join("1"), 2 << 20) == Err(Some(nix::libc::EIO)), "what is missing fails");
    fixture.server.set_fault(Fault::None);
    ensure!(fs::read(mount.join("1"))? == content(1, FILE), "and comes when the source does");
    fixture.umount(&mount)?;
    fixture.finish()
}
