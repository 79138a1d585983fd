//! The virtual machines that run cases on other kernels than the host's.
//!
//! Few distributions build the on-demand mode of cachefiles, and old kernels are old; `machine` has both.
//! They are booted in QEMU, without hardware help because many hosts are virtual
//! machines themselves. A guest is an initrd made of this program, `rafsd`, their libraries and
//! a static busybox, and an ext4 disk. Two serial ports come out of it: the kernel's messages, and
//! the report of the harness inside, so that a message of the kernel never tears a report line.
//!
//! A guest that panics, falls silent or takes too long is killed; the cases it did not report have
//! failed. So has the run when the kernel complained of itself, whatever the cases say.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tempfile::TempDir;

use crate::cases::interop;
use crate::host::{self, Need};
use crate::initrd::Archive;
use crate::isolate::{LONG_RUN, time_for_long_run};
use crate::machine::{Kernel, Machine};
use crate::report::{Tally, Verdict};
use crate::{Backend, Case, Interrupt};

const OVERALL_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// No case may take this long; see the timeout of a case in `isolate.rs`.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(3 * 60);
const POLL: Duration = Duration::from_millis(100);
/// Sparse; what the cases really write is kept.
const DISK_BYTES: u64 = 512 << 20;
/// The last line of a guest that reached its end, followed by the exit status of the harness in it.
const MARKER: &str = "== guest finished, exit status ";
/// Programs of the host that the guest is made with, and the Debian package of each.
const PROGRAMS: [(&str, &str); 5] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("mkfs.ext4", "e2fsprogs"),
    ("setpriv", "util-linux"),
    ("ldd", "libc-bin"),
];
/// What the kernel says when something is wrong with itself.
const COMPLAINTS: [&str; 5] = ["Kernel panic", "Oops:", "BUG:", "kernel BUG at", "blocked for more than"];
/// How much of each port is shown when the guest did not end well.
const LAST_LINES: usize = 40;

/// A case, and the backend to run it for.
pub(crate) type Run = (Backend, &'static Case);

/// Runs `cases` in one guest, printing and counting their reports.
pub(crate) fn run(machine: Machine, cases: &[Run], interrupt: &Interrupt, tally: &mut Tally) {
    let all = |tally: &mut Tally, verdict: Verdict| {
        cases.iter().for_each(|(backend, case)| tally.report(case.name, (*backend).into(), &verdict, None));
    };
    let kernel = match able().and_then(|()| machine.kernel()) {
        Ok(kernel) => kernel,
        Err(reason) => return all(tally, Verdict::Skipped(reason)),
    };
    let start = Instant::now();
    println!("booting {} for {} cases", kernel.image.display(), cases.len());
    match prepare(cases, &kernel).and_then(|dir| Guest::boot(dir, &kernel.image)) {
        Ok(guest) => guest.follow(cases, interrupt, tally),
        Err(error) => all(tally, Verdict::Failed { reason: format!("no guest: {error:#}"), output: String::new() }),
    }
    println!("the guest took {:.0} s", start.elapsed().as_secs_f64());
}

/// Why there is no guest on this host.
fn able() -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("the guest is x86-64 only".into());
    }
    for (program, package) in PROGRAMS {
        if host::find_program(program).is_none() {
            return Err(format!("no {program} (Debian package {package})"));
        }
    }
    Ok(())
}

/// Makes initrd and disk.
fn prepare(cases: &[Run], kernel: &Kernel) -> anyhow::Result<TempDir> {
    let dir = tempfile::Builder::new().prefix("rafsd-guest.").tempdir().context("make a directory")?;
    write_initrd(cases, kernel, dir.path()).context("make the initrd")?;
    let disk = dir.path().join("disk");
    File::create(&disk)?.set_len(DISK_BYTES).context("make the disk")?;
    let mkfs = host::find_program("mkfs.ext4").context("no mkfs.ext4")?;
    let root = dir.path().join("root");
    fill_disk(cases, &root).context("fill the disk")?;
    let mut mkfs = Command::new(mkfs);
    mkfs.args(["-q", "-F", "-b", "4096", "-d"]).arg(&root).arg(&disk);
    let made = mkfs.stdin(Stdio::null()).status()?;
    anyhow::ensure!(made.success(), "mkfs.ext4: {made}");
    Ok(dir)
}

/// Makes the directory that the guest's disk starts with: the images made by other builders, if a
/// case wants them and they are at hand.
fn fill_disk(cases: &[Run], root: &Path) -> anyhow::Result<()> {
    let to = root.join(host::GUEST_INTEROP);
    std::fs::create_dir(root)?;
    let is_wanted = cases.iter().any(|(_, case)| case.needs.contains(&Need::Interop));
    let Some(from) = host::interop(false).filter(|_| is_wanted) else { return Ok(()) };
    std::fs::create_dir(&to)?;
    let names = interop::IMAGES.iter().chain(&interop::LISTINGS).chain([&interop::ZRAN]);
    let copied = Command::new("cp")
        .args(["-R", "--no-preserve=mode"])
        .args(names.map(|name| from.join(name)))
        .arg(&to)
        .status()?;
    anyhow::ensure!(copied.success(), "cp: {copied}");
    Ok(())
}

fn write_initrd(cases: &[Run], kernel: &Kernel, dir: &Path) -> anyhow::Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(dir.join("initrd"))?));
    for dir in ["/dev", "/proc", "/sys", "/tmp", "/run", "/root", "/etc", "/var/tmp", host::GUEST_STORE] {
        archive.dir(dir)?;
    }
    archive.character("/dev/console", (5, 1))?;
    let init = include_str!("init.sh").replace("@STORE@", host::GUEST_STORE).replace("@MARKER@", MARKER);
    archive.file("/init", init.replace("@RUNS@", &commands(cases)).as_bytes())?;
    archive.dir("/modules")?;
    for module in &kernel.modules {
        let name = module.file_name().and_then(|name| name.to_str()).context("a module's name")?;
        archive.file(&format!("/modules/{name}"), &std::fs::read(module)?)?;
    }
    archive.program("/bin/busybox", &host::find_program("busybox").context("no busybox")?)?;
    archive.program("/bin/kernel-tests", &stripped(&std::env::current_exe()?, &dir.join("kernel-tests"))?)?;
    archive.program(host::GUEST_RAFSD, &stripped(&host::rafsd(false), &dir.join("rafsd"))?)?;
    for need in cases.iter().flat_map(|(_, case)| case.needs) {
        // A program the host lacks is lacking in the guest as well, and the case is skipped there.
        if let Need::Program(name) = need
            && let Some(program) = host::find_program(name)
        {
            archive.program(&format!("/bin/{name}"), &program)?;
        }
    }
    archive.finish()?;
    Ok(())
}

/// What the guest runs: this program once for each backend.
fn commands(cases: &[Run]) -> String {
    let mut commands = String::new();
    for part in cases.chunk_by(|(one, _), (other, _)| one == other) {
        let (backend, _) = part[0];
        let names: Vec<_> = part.iter().map(|(_, case)| case.name).collect();
        let names = names.join(" ");
        let name = backend.name();
        commands += &format!("/bin/kernel-tests --in-guest --backend {name} --exact {names} || status=1\n");
    }
    commands
}

/// A copy of `program` without symbols, which make most of a development build; without a working
/// `strip` the program itself.
fn stripped(program: &Path, copy: &Path) -> anyhow::Result<PathBuf> {
    let done = Command::new("strip").arg("-o").arg(copy).arg(program).status().is_ok_and(|status| status.success());
    Ok(if done { copy.into() } else { program.into() })
}

/// A running virtual machine. Dropping it ends it and removes its files.
struct Guest {
    qemu: Child,
    lines: Receiver<String>,
    console: Console,
    _dir: TempDir,
}

/// How following a guest ended.
enum End {
    Finished {
        status: String,
    },
    Gone,
    Silent,
    Late,
    Interrupted,
    /// Its output cannot be read any more.
    Lost(io::Error),
}

impl Guest {
    fn boot(dir: TempDir, kernel: &Path) -> anyhow::Result<Self> {
        let file = |name: &str| dir.path().join(name).display().to_string();
        let console = file("console");
        File::create(&console)?;
        // The kernel puts what it does not know into the environment of the first process.
        let long_run = |name| std::env::var(name).map(|value| format!(" {name}={value}")).unwrap_or_default();
        let long_run: String = LONG_RUN.into_iter().map(long_run).collect();
        // setpriv lets the emulator die with this program even when that is killed.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-M", "q35", "-accel", "tcg,thread=multi"])
            .args(["-smp", "2", "-cpu", "max", "-m", "1024", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-serial", &format!("file:{console}"), "-serial", "stdio"])
            .args(["-drive", &format!("file={},if=virtio,format=raw,cache=unsafe", file("disk"))])
            .arg("-kernel")
            .arg(kernel)
            .args(["-initrd", &file("initrd")])
            // A lock-up is two minutes long, because a busy host may stop an emulated processor for seconds.
            .args(["-append", &format!("console=ttyS0 panic=-1 oops=panic watchdog_thresh=60 loglevel=6{long_run}")]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).process_group(0);
        let mut qemu = qemu.spawn().context("start qemu-system-x86_64")?;
        let stdout = qemu.stdout.take().context("the emulator has no output")?;
        let (sender, lines) = channel();
        let console = Console { file: File::open(console)?, text: String::new() };
        let guest = Self { qemu, lines, console, _dir: dir };
        std::thread::Builder::new().name("guest-lines".into()).spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        })?;
        Ok(guest)
    }

    /// Prints and counts the guest's report until it ends, then accounts for what was not reported.
    fn follow(mut self, cases: &[Run], interrupt: &Interrupt, tally: &mut Tally) {
        let mut missing = cases.to_vec();
        let mut said = Vec::new();
        let failed_before = tally.failed;
        let end = self.listen(interrupt, &mut |line| {
            // Only a case that is still awaited is counted, and so only once.
            let mut words = line.split(' ').skip(1);
            let (name, backend) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let backend = backend.trim_matches(['[', ']', ':']);
            let of_line = |(of, case): &Run| case.name == name && of.name() == backend;
            if let Some(at) = missing.iter().position(of_line)
                && tally.count(line).is_some()
            {
                missing.remove(at);
            }
            if !line.starts_with("running ") {
                println!("{line}");
            }
            said.push(line.to_owned());
        });
        let complaint = self.console.complaint();
        let reason = match end {
            End::Finished { status } if (status != "0") == (tally.failed > failed_before) => None,
            End::Finished { status } => Some(format!("its harness ended with status {status}")),
            End::Gone => Some("it went down before its end".into()),
            End::Silent => Some(format!("nothing came from it for {} s", SILENCE_TIMEOUT.as_secs())),
            End::Late => Some(format!("it took more than {} s", OVERALL_TIMEOUT.as_secs())),
            End::Lost(error) => Some(format!("its output cannot be read: {error}")),
            End::Interrupted => return,
        };
        let ended_well = reason.is_none() && complaint.is_none();
        let reason = complaint.or(reason).unwrap_or_else(|| "its harness did not run it".into());
        for (backend, case) in &missing {
            let verdict =
                Verdict::Failed { reason: format!("the guest did not report it: {reason}"), output: String::new() };
            tally.report(case.name, (*backend).into(), &verdict, None);
        }
        if !ended_well {
            let tail = |lines: &[&str]| lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
            let said: Vec<_> = said.iter().map(String::as_str).collect();
            let console: Vec<_> = self.console.text.lines().collect();
            let output = format!("last lines of the cases:\n{}\nof the kernel:\n{}", tail(&said), tail(&console));
            tally.report("guest_stays_well", cases[0].0.into(), &Verdict::Failed { reason, output }, None);
        }
    }

    /// Hands every line of the report to `line` until the guest ends or is given up.
    fn listen(&mut self, interrupt: &Interrupt, line: &mut dyn FnMut(&str)) -> End {
        let start = Instant::now();
        let mut last_sign = start;
        loop {
            match self.console.read() {
                Ok(true) => last_sign = Instant::now(),
                Ok(false) => {}
                Err(error) => return End::Lost(error),
            }
            match self.lines.recv_timeout(POLL) {
                Ok(text) => {
                    last_sign = Instant::now();
                    if let Some(status) = text.strip_prefix(MARKER) {
                        return self.last_words(End::Finished { status: status.to_owned() });
                    }
                    line(&text);
                }
                Err(RecvTimeoutError::Disconnected) => return self.last_words(End::Gone),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if interrupt.is_set() {
                return End::Interrupted;
            }
            if start.elapsed() > OVERALL_TIMEOUT + time_for_long_run(true) {
                return End::Late;
            }
            if last_sign.elapsed() > SILENCE_TIMEOUT + time_for_long_run(true) {
                return End::Silent;
            }
        }
    }

    /// Takes in what the kernel said until `end`.
    fn last_words(&mut self, end: End) -> End {
        self.console.read().map_or_else(End::Lost, |_| end)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Err(error) = self.qemu.kill().and_then(|()| self.qemu.wait()) {
            eprintln!("cannot end the emulator: {error}");
        }
    }
}

/// The kernel's messages, in a file that grows.
struct Console {
    file: File,
    text: String,
}

impl Console {
    /// Takes in what is new; whether there was any.
    fn read(&mut self) -> io::Result<bool> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        self.text.push_str(&String::from_utf8_lossy(&bytes));
        Ok(!bytes.is_empty())
    }

    /// The first line in which the kernel complains of itself.
    fn complaint(&self) -> Option<String> {
        let bad = |line: &&str| COMPLAINTS.iter().any(|text| line.contains(text));
        self.text.lines().find(bad).map(|line| format!("its kernel said: {}", line.trim()))
    }
}
