//! Building and merging beside the format's reference builder, whose program is given by its path.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::corpus::Corpus;
use super::measure::{Turned, seconds};
use super::report::{Report, Target};
use super::{Interrupted, Turns};

/// Share of the reference's time that ours may take, as the ratio that is printed.
const TARGET: f64 = 1.0 / 0.40;

/// Makes ours do what the reference does, and no more.
const EQUAL: &[&str] = &["--batch-size", "off", "--no-verify"];

/// What is built, and how both are told.
struct Contest<'a> {
    name: &'static str,
    source: &'a Path,
    kind: &'static str,
    ours: &'static [&'static str],
}

/// Measures building from a directory and from an archive, each with the defaults of both programs
/// and with equal work: no batches, no second look at what was written.
pub(crate) fn measure(
    corpus: &Corpus,
    scratch: &Path,
    turns: Turns,
    program: &Path,
    interrupted: &Interrupted,
    report: &mut Report,
) -> anyhow::Result<()> {
    let archive = scratch.join("files.tar");
    run(Command::new("tar").arg("-C").arg(&corpus.dir).arg("-cf").arg(&archive).arg("."))?;
    let contests = [
        Contest { name: "directory, equal work", source: &corpus.dir, kind: "dir-rafs", ours: EQUAL },
        Contest { name: "directory, defaults", source: &corpus.dir, kind: "dir-rafs", ours: &[] },
        Contest { name: "tar, equal work", source: &archive, kind: "tar-rafs", ours: EQUAL },
        Contest { name: "tar, defaults", source: &archive, kind: "tar-rafs", ours: &[] },
    ];
    for contest in contests {
        let (ours, theirs) = (scratch.join("built"), scratch.join("reference"));
        let turned = Turned::take(
            turns.build,
            || {
                interrupted.check()?;
                empty(&ours)?;
                let mut build = Command::new(env!("CARGO_BIN_EXE_rafsd"));
                build.arg("build").arg(contest.source).arg("-o").arg(&ours).args(contest.ours);
                seconds(|| run(&mut build))
            },
            || {
                interrupted.check()?;
                empty(&theirs)?;
                let mut create = Command::new(program);
                create.args(["create", "--fs-version", "6", "--compressor", "zstd", "--log-level", "error"]);
                create.args(["-t", contest.kind]).arg("-B").arg(theirs.join("bootstrap")).arg("-D").arg(&theirs);
                seconds(|| run(create.arg(contest.source)))
            },
        )?;
        let speed = (corpus.rate(turned.ours()), corpus.rate(turned.other()), "MB/s");
        report.compare(format!("build / reference: {}", contest.name), speed, turned.ratio(), Target::Ratio(TARGET));
        let sizes = Turned::of(vec![bytes_below(&ours)?], vec![bytes_below(&theirs)?]);
        let mib = (sizes.ours(), sizes.other(), "MiB");
        report.compare(format!("... size: {}", contest.name), mib, sizes.ratio(), Target::Ratio(0.98));
    }
    Ok(())
}

/// MiB of all files below `dir`.
fn bytes_below(dir: &Path) -> anyhow::Result<f64> {
    let (mut total, mut todo) = (0, vec![PathBuf::from(dir)]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let meta = entry.metadata()?;
            if meta.is_dir() {
                todo.push(entry.path());
            } else {
                total += meta.len();
            }
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "printed with one decimal")]
    Ok(total as f64 / f64::from(1 << 20))
}

fn empty(dir: &Path) -> anyhow::Result<()> {
    if dir.exists() {
        fs::remove_dir_all(dir)?;
    }
    Ok(fs::create_dir(dir)?)
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let name = command.get_program().to_owned();
    let ended = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    let ended = ended.with_context(|| format!("cannot run {}", name.display()))?;
    if !ended.success() {
        bail!("{} ended with {ended}", name.display());
    }
    Ok(())
}
