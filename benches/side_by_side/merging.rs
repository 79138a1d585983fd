//! Merging thirty layers of five thousand files each, beside another program that can.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::measure::{Turned, seconds};
use super::report::{Report, Target};
use super::{Interrupted, Turns};

const LAYERS: usize = 30;
/// Directories of a layer; half of them are in every layer, half in this one only.
const DIRECTORIES: usize = 100;
/// Files of a directory, of which a fifth replace those of the layer below.
const FILES: usize = 50;

/// Measures merging. `nydus_image` is a program that is called like Nydus's image builder.
pub(crate) fn measure(
    scratch: &Path,
    turns: Turns,
    nydus_image: Option<&Path>,
    interrupted: &Interrupted,
    report: &mut Report,
) -> anyhow::Result<()> {
    let dir = scratch.join("merging");
    let mut layers = Vec::new();
    for number in 0..LAYERS {
        interrupted.check()?;
        layers.push(layer(&dir, number)?);
    }
    let ours = || {
        interrupted.check()?;
        let mut merge = Command::new(env!("CARGO_BIN_EXE_rafsd"));
        merge.arg("merge").args(&layers).arg("-o").arg(dir.join("ours"));
        run(merge)
    };
    let other = || {
        let Some(program) = nydus_image else { return Ok(f64::NAN) };
        let mut merge = Command::new(program);
        merge.arg("merge").arg("--bootstrap").arg(dir.join("other")).args(&layers);
        run(merge)
    };
    let turned = Turned::take(turns.read, ours, other)?;
    report.value("merge, 30 layers of 5000 files", turned.ours(), "s", Target::AtMost(0.3));
    if nydus_image.is_some() {
        let times = (turned.ours(), turned.other(), "s");
        report.compare("merge / nydus-image merge", times, turned.ratio(), Target::None);
    }
    fs::remove_dir_all(dir)?;
    Ok(())
}

/// Makes a layer and returns its bootstrap, named by its blob as the other program expects it.
fn layer(dir: &Path, number: usize) -> anyhow::Result<PathBuf> {
    let source = dir.join(format!("source-{number}"));
    for directory in 0..DIRECTORIES {
        let own = if directory < DIRECTORIES / 2 { 0 } else { number };
        let path = source.join(format!("d{}/e{directory}-{own}", directory % 25));
        fs::create_dir_all(&path)?;
        for file in 0..FILES {
            let own = if file < FILES / 5 { 0 } else { number };
            fs::write(path.join(format!("file-{file}-{own}")), format!("{number} {directory} {file}"))?;
        }
    }
    let image = dir.join(format!("image-{number}"));
    let mut build = Command::new(env!("CARGO_BIN_EXE_rafsd"));
    build.arg("build").arg(&source).arg("-o").arg(&image);
    run(build)?;
    fs::remove_dir_all(source)?;
    let blob = fs::read_dir(image.join("blobs"))?.next().context("a layer has a blob")??.file_name();
    let bootstrap = image.join(blob);
    fs::rename(image.join("bootstrap"), &bootstrap)?;
    Ok(bootstrap)
}

/// Runs a program to its end and tells how many seconds it took.
fn run(mut command: Command) -> anyhow::Result<f64> {
    let name = command.get_program().to_owned();
    command.stdout(Stdio::null());
    seconds(|| {
        let status = command.status().with_context(|| format!("cannot run {}", name.display()))?;
        if !status.success() {
            bail!("{} ended with {status}", name.display());
        }
        Ok(())
    })
}
