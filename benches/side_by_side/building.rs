//! Building beside `zstd -3` of the same bytes on one thread.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};

use super::corpus::Corpus;
use super::measure::{Turned, seconds};
use super::report::{Report, Target};
use super::{Interrupted, Turns};

/// How often the memory of a running build is looked at.
const LOOK: Duration = Duration::from_millis(2);

/// Measures building and leaves the directory of the image.
pub(crate) fn measure(
    corpus: &Corpus,
    scratch: &Path,
    turns: Turns,
    mkfs_erofs: Option<&Path>,
    interrupted: &Interrupted,
    report: &mut Report,
) -> anyhow::Result<PathBuf> {
    let image = scratch.join("image");
    let mut peak_kib = 0;
    let (mut our_cpu, mut zstd_cpu) = (Vec::new(), Vec::new());
    let mut ours = || {
        interrupted.check()?;
        if image.exists() {
            fs::remove_dir_all(&image)?;
        }
        let mut build = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        build.arg("build").arg(&corpus.dir).arg("-o").arg(&image);
        let before = cpu_seconds(UsageWho::RUSAGE_CHILDREN)?;
        let ran = watched(build)?;
        our_cpu.push(cpu_seconds(UsageWho::RUSAGE_CHILDREN)? - before);
        peak_kib = ran.peak_kib.max(peak_kib);
        Ok(ran.seconds)
    };
    let build = |turned: &Turned| (corpus.rate(turned.ours()), corpus.rate(turned.other()), "MB/s");

    let library = Turned::take(turns.build, &mut ours, || {
        let before = cpu_seconds(UsageWho::RUSAGE_THREAD)?;
        let taken = zstd_library(corpus)?;
        zstd_cpu.push(cpu_seconds(UsageWho::RUSAGE_THREAD)? - before);
        Ok(taken)
    })?;
    report.compare("build / zstd -3 library, one thread", build(&library), library.ratio(), Target::Ratio(1.3));
    if Command::new("zstd").arg("--version").output().is_ok() {
        let joined = scratch.join("joined");
        join(corpus, &joined)?;
        let program = Turned::take(turns.build, &mut ours, || zstd_program(&joined, &scratch.join("packed")))?;
        report.compare("build / zstd -3 --single-thread", build(&program), program.ratio(), Target::Ratio(1.3));
        fs::remove_file(joined)?;
        fs::remove_file(scratch.join("packed"))?;
    }
    if let Some(program) = mkfs_erofs {
        let codec = erofs_codec(program)?;
        let peer = Turned::take(turns.build, &mut ours, || mkfs(program, codec, corpus, &scratch.join("erofs")))?;
        report.compare(format!("build / mkfs.erofs -z{codec}"), build(&peer), peer.ratio(), Target::None);
        fs::remove_file(scratch.join("erofs"))?;
    }
    our_cpu.truncate(zstd_cpu.len());
    let cpu = Turned::of(our_cpu, zstd_cpu);
    // Says what the clock would on a host with nothing else to do.
    report.compare("build, processor time", (cpu.ours(), cpu.other(), "s"), cpu.ratio(), Target::None);
    #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
    report.value("build, peak memory", peak_kib as f64 / 1024.0, "MiB", Target::AtMost(64.0));
    Ok(image)
}

/// Processor seconds that this thread or all ended children have used.
fn cpu_seconds(who: UsageWho) -> anyhow::Result<f64> {
    let usage = getrusage(who)?;
    let seconds = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs());
    Ok((seconds(usage.user_time()) + seconds(usage.system_time())).as_secs_f64())
}

/// What one run of a program took.
#[derive(Debug)]
struct Ran {
    seconds: f64,
    peak_kib: u64,
}

/// Runs a program to its end and watches its memory.
///
/// The peak that `wait4` tells is no use: it starts at that of the process that forked, us.
fn watched(mut command: Command) -> anyhow::Result<Ran> {
    let name = command.get_program().to_owned();
    let clock = Instant::now();
    let mut child = command.stdout(Stdio::null()).spawn().with_context(|| format!("cannot run {}", name.display()))?;
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut peak_kib = 0;
    let ended = loop {
        // Gone with the process, so the last good look counts.
        peak_kib = high_water_kib(&status).unwrap_or(0).max(peak_kib);
        if let Some(ended) = child.try_wait()? {
            break ended;
        }
        std::thread::sleep(LOOK);
    };
    let seconds = clock.elapsed().as_secs_f64();
    succeeded(&name.to_string_lossy(), ended)?;
    Ok(Ran { seconds, peak_kib })
}

fn high_water_kib(status: &Path) -> Option<u64> {
    let text = fs::read_to_string(status).ok()?;
    text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn succeeded(name: &str, status: ExitStatus) -> anyhow::Result<()> {
    if !status.success() {
        bail!("{name} ended with {status}");
    }
    Ok(())
}

/// The library in this process, in pieces as long as the builder's. What comes out is thrown away.
fn zstd_library(corpus: &Corpus) -> anyhow::Result<f64> {
    let mut compressor = zstd::bulk::Compressor::new(3)?;
    let (mut plain, mut packed) = (vec![0; 1 << 20], vec![0; zstd::zstd_safe::compress_bound(1 << 20)]);
    seconds(|| {
        for (path, _) in &corpus.files {
            let mut file = File::open(corpus.dir.join(path))?;
            loop {
                let len = fill(&mut file, &mut plain)?;
                if len == 0 {
                    break;
                }
                compressor.compress_to_buffer(&plain[..len], &mut packed[..])?;
            }
        }
        Ok(())
    })
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    loop {
        match file.read(&mut buffer[len..])? {
            0 => return Ok(len),
            more => len += more,
        }
    }
}

/// All files in one, as `zstd` wants its input.
fn join(corpus: &Corpus, to: &Path) -> anyhow::Result<()> {
    let mut out = File::create(to)?;
    for (path, _) in &corpus.files {
        io::copy(&mut File::open(corpus.dir.join(path))?, &mut out)?;
    }
    Ok(())
}

fn zstd_program(joined: &Path, packed: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new("zstd");
    command.args(["-3", "--single-thread", "-q", "-f"]).arg(joined).arg("-o").arg(packed);
    seconds(|| succeeded("zstd", command.status()?))
}

/// The best codec that this build of mkfs.erofs has.
fn erofs_codec(program: &Path) -> anyhow::Result<&'static str> {
    let help = Command::new(program).arg("--help").output();
    let help = help.with_context(|| format!("cannot run {}", program.display()))?;
    let help = String::from_utf8_lossy(&help.stdout).into_owned() + &String::from_utf8_lossy(&help.stderr);
    let known = help.lines().find_map(|line| line.strip_prefix("Available compressors are:")).unwrap_or_default();
    Ok(if known.contains("zstd") { "zstd,3" } else { "lz4" })
}

fn mkfs(program: &Path, codec: &str, corpus: &Corpus, image: &Path) -> anyhow::Result<f64> {
    let mut command = Command::new(program);
    command.arg("--quiet").arg(format!("-z{codec}")).arg(image).arg(&corpus.dir).stdout(Stdio::null());
    seconds(|| succeeded("mkfs.erofs", command.status()?))
}
