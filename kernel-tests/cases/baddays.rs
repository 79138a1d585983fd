//! Dead sources, and hosts that are short of everything.
//!
//! What a reader may see is data or an error; what must not happen is a wrong byte, a process that
//! cannot be killed, or a daemon that is gone afterwards.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::libc::EIO;
use rafsd::net::server::Fault;

use super::fixture::{FILE, Fixture, content, drop_caches, read_byte};
use crate::host::Need;
use crate::{Case, Ctx, Outcome, Place};

const NEEDS: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend];

const fn case(name: &'static str, needs: &'static [Need], run: fn(&Ctx) -> Outcome) -> Case {
    Case { name, needs, place: Place::Host, run }
}

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "readers_stuck_on_a_dead_source_die_when_killed_and_the_mount_goes",
        needs: NEEDS,
        place: Place::Here,
        run: readers_stuck_on_a_dead_source_die_when_killed_and_the_mount_goes,
    },
    case(
        "a_daemon_short_of_descriptors_serves_all_readers",
        &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Program("prlimit")],
        a_daemon_short_of_descriptors_serves_all_readers,
    ),
    case("a_daemon_short_of_memory_is_slow_and_lives", NEEDS_MEMORY, a_daemon_short_of_memory_is_slow_and_lives),
    case("a_hundred_thousand_opens_leave_nothing_behind", NEEDS, a_hundred_thousand_opens_leave_nothing_behind),
    case("a_second_daemon_is_refused_and_told_by_whom", NEEDS, a_second_daemon_is_refused_and_told_by_whom),
    case(
        "a_clock_that_jumps_changes_nothing",
        &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::Program("faketime")],
        a_clock_that_jumps_changes_nothing,
    ),
];

const NEEDS_MEMORY: &[Need] = &[Need::Root, Need::Erofs, Need::DiskStore, Need::Backend, Need::MemoryGroups];

/// Length of one of [`small_files`]: a cold read of each is an event of its own.
const SMALL: usize = 5000;

fn small_files<'a>(ctx: &'a Ctx, count: usize) -> anyhow::Result<Fixture<'a>> {
    Fixture::new(ctx, |dir| (0..count).try_for_each(|i| fs::write(dir.join(i.to_string()), content(i, SMALL))))
}

// ---- a dead source ----------------------------------------------------------------------------------

/// Restores a setting of the kernel when dropped.
struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    fn change(path: &'static str, value: &str) -> anyhow::Result<Self> {
        let before = fs::read_to_string(path)?;
        fs::write(path, value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, &self.before) {
            eprintln!("cannot restore {}: {error}", self.path);
        }
    }
}

fn readers_stuck_on_a_dead_source_die_when_killed_and_the_mount_goes(ctx: &Ctx) -> Outcome {
    const READERS: usize = 256;
    // Stricter than the 30 s that matter, so that the case need not last a minute.
    const HUNG_TASK_SECS: u64 = 8;
    const HUNG_TASK: &str = "/proc/sys/kernel/hung_task_timeout_secs";
    let watched = Path::new(HUNG_TASK).exists();
    let mut fixture = small_files(ctx, READERS)?;
    fixture.restart(&["--deadline", "5m"])?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);
    let mut log = KernelLog::from_here();
    let _setting = watched.then(|| Setting::change(HUNG_TASK, &HUNG_TASK_SECS.to_string())).transpose()?;

    let mut readers = (0..READERS).map(|i| cat(&mount.join(i.to_string()))).collect::<anyhow::Result<Vec<_>>>()?;
    // Long enough for the kernel to look at each of them twice.
    std::thread::sleep(if watched { Duration::from_secs(2 * HUNG_TASK_SECS + 2) } else { Duration::from_secs(1) });
    for reader in &mut readers {
        ensure!(reader.try_wait()?.is_none(), "a reader went on without data");
    }
    let threads = threads(fixture.pid())?;
    let clock = Instant::now();
    readers.iter_mut().try_for_each(Child::kill)?;
    for reader in &mut readers {
        reader.wait()?;
    }
    let died = clock.elapsed();
    ensure!(died < Duration::from_secs(1), "the last of {READERS} readers died after {died:?}");
    let clock = Instant::now();
    fixture.umount(&mount)?;
    let unmounted = clock.elapsed();
    ensure!(unmounted < Duration::from_secs(5), "unmounted after {unmounted:?}");
    println!("{READERS} readers died within {died:?}; unmounted after {unmounted:?}");
    if watched {
        let mut tasks: Vec<_> = readers.iter().map(Child::id).collect();
        tasks.extend(threads);
        let ours: Vec<_> = log.new_lines()?.into_iter().filter(|line| is_hung_report(line, &tasks)).collect();
        ensure!(ours.is_empty(), "{ours:?}");
    } else {
        println!("this kernel does not look for hung tasks");
    }
    fixture.finish()
}

fn cat(path: &Path) -> anyhow::Result<Child> {
    Ok(Command::new("cat").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

/// The threads of a process.
fn threads(pid: u32) -> anyhow::Result<Vec<u32>> {
    fs::read_dir(format!("/proc/{pid}/task"))?.map(|task| Ok(task?.file_name().to_string_lossy().parse()?)).collect()
}

/// A report about one of these tasks. Others on this host are not the business of a case.
fn is_hung_report(line: &str, tasks: &[u32]) -> bool {
    let task = line.split(" blocked for more than").next().and_then(|start| start.rsplit(':').next());
    line.contains(" blocked for more than") && task.is_some_and(|id| tasks.iter().any(|task| task.to_string() == id))
}

/// What the kernel logs from now on.
struct KernelLog(Option<File>);

impl KernelLog {
    fn from_here() -> Self {
        let open = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open("/dev/kmsg");
        let mut this = Self(open.ok());
        // Everything that is there already.
        let _ = this.new_lines();
        this
    }

    /// Each read gives one record; `EPIPE` means that some were overwritten.
    fn new_lines(&mut self) -> anyhow::Result<Vec<String>> {
        let file = self.0.as_mut().context("no /dev/kmsg")?;
        let (mut lines, mut record) = (Vec::new(), [0; 8192]);
        loop {
            match file.read(&mut record) {
                Ok(len) => lines.push(String::from_utf8_lossy(&record[..len]).into_owned()),
                Err(error) if error.raw_os_error() == Some(nix::libc::EPIPE) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(lines),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

// ---- short of something -------------------------------------------------------------------------------

/// Reads all files at once, each on a thread. How many could be read; an error if one had wrong bytes.
fn read_all_at_once(mount: &Path, count: usize, meanwhile: impl FnOnce() -> Outcome) -> anyhow::Result<usize> {
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..count)
            .map(|number| {
                let path = mount.join(number.to_string());
                std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, move || (number, fs::read(path)))
            })
            .collect::<Result<_, _>>()?;
        meanwhile()?;
        let mut good = 0;
        for reader in readers {
            match reader.join().expect("a reader does not panic") {
                (number, Ok(bytes)) => {
                    ensure!(bytes == content(number, SMALL), "file {number} has wrong bytes");
                    good += 1;
                }
                (number, Err(error)) => ensure!(error.raw_os_error() == Some(EIO), "file {number}: {error}"),
            }
        }
        Ok(good)
    })
}

fn a_daemon_short_of_descriptors_serves_all_readers(ctx: &Ctx) -> Outcome {
    const READERS: usize = 300;
    let mut fixture = small_files(ctx, READERS)?;
    fixture.limit_descriptors(256);
    fixture.restart(&[])?;
    let mount = fixture.mount("mnt")?;
    fixture.server.set_fault(Fault::StallHead);

    let good = read_all_at_once(&mount, READERS, || {
        std::thread::sleep(Duration::from_secs(2));
        fixture.server.set_fault(Fault::None);
        Ok(())
    })?;

    ensure!(good == READERS, "only {good} of {READERS} readers got their bytes");
    drop_caches()?;
    let later = read_all_at_once(&mount, 100, || Ok(()))?;
    ensure!(later == 100, "when there are enough again: {later} of 100");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// A memory control group of one case. Dropping it removes it, when nothing is in it.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    fn new(limit: u64) -> anyhow::Result<Self> {
        let (root, file) = crate::host::memory_groups().context("checked by the need")?;
        let dir = root.join(format!("rafsd-case-{}", std::process::id()));
        fs::create_dir(&dir)?;
        let this = Self(dir);
        fs::write(this.0.join(file), limit.to_string())?;
        Ok(this)
    }

    fn procs(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        while let Err(error) = fs::remove_dir(&self.0) {
            if Instant::now() > until {
                return eprintln!("cannot remove {}: {error}", self.0.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn a_daemon_short_of_memory_is_slow_and_lives(ctx: &Ctx) -> Outcome {
    const FILES: usize = 40;
    let group = MemoryGroup::new(32 << 20)?;
    let mut fixture = Fixture::files(ctx, FILES)?;
    fixture.stop()?;
    let procs = group.procs();
    let join = format!("echo $$ > {}; exec \"$@\"", procs.display());
    fixture.start_below(["sh", "-c", &join, "sh"].map(ToOwned::to_owned).into(), &[])?;
    let (pid, mount) = (fixture.pid(), fixture.mount_with("mnt", &["--prefetch"])?);

    let clock = Instant::now();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|first| {
                let mount = &mount;
                scope.spawn(move || -> Outcome {
                    for number in (first..FILES).step_by(4) {
                        let bytes = fs::read(mount.join(number.to_string()))?;
                        ensure!(bytes == content(number, FILE), "file {number} has wrong bytes");
                    }
                    Ok(())
                })
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })?;
    println!("{FILES} files of 3 MiB in {:?} with 32 MiB; {} MiB resident", clock.elapsed(), resident(pid)? >> 20);

    ensure!(fixture.list()?.len() == 1, "the daemon is gone");
    fixture.umount(&mount)?;
    fixture.finish()?;
    drop(group);
    Ok(())
}

/// Resident memory of a process in bytes.
fn resident(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Names of what a process has open.
fn descriptors(pid: u32) -> anyhow::Result<BTreeSet<String>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?.collect::<Result<Vec<_>, _>>()?;
    let name = |entry: &fs::DirEntry| {
        let target = fs::read_link(entry.path()).map(|path| path.display().to_string()).unwrap_or_default();
        format!("{} {target}", entry.file_name().display())
    };
    Ok(entries.iter().map(name).filter(|name| !name.contains("socket:")).collect())
}

fn a_hundred_thousand_opens_leave_nothing_behind(ctx: &Ctx) -> Outcome {
    const LOOPS: usize = 100_000;
    const GROWTH: u64 = 2 << 20;
    let fixture = Fixture::files(ctx, 2)?;
    let mount = fixture.mount("mnt")?;
    // File 1 stays cold: a complete blob has no events.
    let want = content(0, FILE);
    ensure!(fs::read(mount.join("0"))? == want, "the first read");
    let read_one = |turn: usize| -> Outcome {
        let (file, at) = (File::open(mount.join("0"))?, turn % (FILE / 4096) * 4096);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64)?;
        ensure!(byte[0] == want[at], "turn {turn}");
        // Else the next reader of this page would not ask.
        Ok(posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?)
    };
    (0..5000).try_for_each(read_one)?;
    let pids: Vec<_> = fixture.keepers().into_iter().chain([fixture.pid()]).collect();
    ensure!(pids.len() == 3, "a daemon and two keepers: {pids:?}");
    let before: Vec<_> = pids.iter().map(|&pid| (resident(pid), descriptors(pid))).collect();
    let events = super::lifecycle::events(&fixture)?;

    let clock = Instant::now();
    (0..LOOPS).try_for_each(read_one)?;

    let raised = super::lifecycle::events(&fixture)? - events;
    println!("{LOOPS} turns, {raised} events in {:?}", clock.elapsed());
    ensure!(raised >= LOOPS as u64, "only {raised} events");
    for (pid, (memory, open)) in pids.into_iter().zip(before) {
        let (memory, open, now) = (memory?, open?, resident(pid)?);
        println!("process {pid}: {} KiB resident before, {} KiB after", memory >> 10, now >> 10);
        ensure!(now < memory + GROWTH, "process {pid} grew from {memory} to {now} bytes");
        let open_now = descriptors(pid)?;
        ensure!(open_now.len() <= open.len(), "process {pid}: {:?}", open_now.difference(&open));
    }
    fixture.umount(&mount)?;
    fixture.finish()
}

fn a_second_daemon_is_refused_and_told_by_whom(ctx: &Ctx) -> Outcome {
    let fixture = Fixture::files(ctx, 1)?;
    let mount = fixture.mount("mnt")?;
    let (cache, run) = (fixture.cache(), ctx.dir.join("run2"));
    let second = || Command::new(&ctx.rafsd).arg("serve").arg("--cache").arg(&cache).arg("--run").arg(&run).output();

    let refused = second()?;

    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success(), "it started");
    ensure!(said.contains(&fixture.pid().to_string()) && said.contains(&cache.display().to_string()), "{said}");
    ensure!(fs::read(mount.join("0"))? == content(0, FILE), "the first one serves on");
    fixture.umount(&mount)?;
    fixture.finish()
}

fn a_clock_that_jumps_changes_nothing(ctx: &Ctx) -> Outcome {
    let mut fixture = Fixture::files(ctx, 8)?;
    fixture.stop()?;
    let clock = ctx.dir.join("clock");
    let set = |text: &str| -> Outcome { Ok(File::create(&clock)?.write_all(text.as_bytes())?) };
    set("+10y")?;
    let file = format!("FAKETIME_TIMESTAMP_FILE={}", clock.display());
    // Not by the program `faketime`, which stays the parent of what it runs.
    let preload = format!("LD_PRELOAD={}", fake_clock()?.display());
    let wrapper = ["env", &file, &preload, "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1"];
    fixture.start_below(wrapper.map(ToOwned::to_owned).into(), &["--deadline", "3s"])?;
    let mount = fixture.mount("mnt")?;
    let year = |line: &str| line[..4].parse::<u32>().ok();
    let (first, last) = (fixture.log(), fixture.log());
    let years = (first.lines().next().and_then(year), last.lines().last().and_then(year));
    ensure!(years.0.zip(years.1).is_some_and(|(first, last)| last >= first + 9), "the clock did not jump: {years:?}");

    // Backwards, so that nothing is read ahead.
    for (number, jump) in [(7, "+0"), (5, "-10y"), (3, "+10y")] {
        set(jump)?;
        let asked = Instant::now();
        ensure!(
            read_byte(&mount.join(number.to_string()), 0) == Ok(content(number, FILE)[0]),
            "file {number} after {jump}"
        );
        ensure!(asked.elapsed() < Duration::from_secs(3), "file {number} took {:?} after {jump}", asked.elapsed());
    }
    fixture.server.set_fault(Fault::StallHead);
    let asked = Instant::now();
    let reader = std::thread::spawn({
        let path = mount.join("0");
        move || read_byte(&path, 0)
    });
    std::thread::sleep(Duration::from_millis(500));
    set("-1y")?;
    let got = reader.join().expect("a reader does not panic");
    ensure!(got == Err(Some(EIO)), "{got:?}");
    let waited = asked.elapsed();
    ensure!(waited >= Duration::from_secs(3) && waited < Duration::from_secs(20), "a deadline of 3 s took {waited:?}");
    fixture.umount(&mount)?;
    fixture.finish()
}

/// The library that comes with `faketime`.
fn fake_clock() -> anyhow::Result<PathBuf> {
    let dirs = fs::read_dir("/usr/lib")?.filter_map(|dir| Some(dir.ok()?.path())).chain([PathBuf::from("/usr/lib")]);
    let mut libraries = dirs.map(|dir| dir.join("faketime/libfaketime.so.1"));
    libraries.find(|library| library.is_file()).context("faketime has no library in /usr/lib")
}
