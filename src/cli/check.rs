use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::ValueEnum;

use super::opened::{self, BlobsArgs, Place};
use super::print_json;
use super::progress::Bar;
use crate::base::{ByteSize, Chain};
use crate::image::check::{self as metadata, Code};
use crate::image::{Image, ImageError};
use crate::reader::LoadError;
use crate::tools::check::{self, Report};

/// Tell whether an image is sound, without mounting it
///
/// Looks at all tables, inodes and directories of the bootstrap; with --depth also at the blobs.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CheckArgs {
    /// Bootstrap to look at, a blob that holds its bootstrap, or docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    blobs: BlobsArgs,

    /// How far to look: at the bootstrap, at the tables of the blobs, or at every chunk
    #[arg(long, value_enum, default_value_t = Depth::Meta)]
    depth: Depth,

    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  rafsd check image/bootstrap
  rafsd check image/bootstrap --depth data
  rafsd check image/bootstrap --blobs https://blobs.example/image --depth blob
  rafsd check docker://registry.example/team/app:1.2-nydus --depth data

Exit status: 0 if the image is sound, 1 if it is damaged, 2 if that could not be found out: a wrong
command line, no image, a source that fails, or a blob of a kind that cannot be looked at.
Remarks are no damage.";

/// Could not look.
const UNKNOWN: u8 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Depth {
    Meta,
    Blob,
    Data,
}

impl From<Depth> for check::Depth {
    fn from(depth: Depth) -> Self {
        match depth {
            Depth::Meta => Self::Meta,
            Depth::Blob => Self::Blob,
            Depth::Data => Self::Data,
        }
    }
}

/// Exit status: as the help says. Failures are told here, since elsewhere they give 1.
pub(super) fn run(args: &CheckArgs) -> ExitCode {
    match look(args).and_then(|report| print(args, &report).map(|()| report)) {
        Ok(report) if !report.found.is_sound() => ExitCode::FAILURE,
        Ok(report) if report.is_partial() => ExitCode::from(UNKNOWN),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            // A closed stderr leaves nobody to tell.
            let _ = say!(io::stderr(), "rafsd: {error:#}");
            ExitCode::from(UNKNOWN)
        }
    }
}

fn look(args: &CheckArgs) -> anyhow::Result<Report> {
    let runtime = opened::runtime()?;
    let Place { found, origin } = args.blobs.find(&args.image, &runtime)?;
    // What cannot even be opened is told of below.
    let before = found.v5().map_or_else(|_| metadata::Report::default(), |image| check::v5::check(&image));
    let loaded = match found.load() {
        Ok(loaded) => loaded,
        Err(LoadError::Lift { cause, .. }) if !cause.is_of_another_version() => {
            let mut report = before;
            // What the look before has found is not told again.
            if report.is_sound() {
                report.add(Code::Unusable, "bootstrap", || Chain(&cause).to_string());
            }
            return Ok(Report::of_metadata(report));
        }
        Err(cause) => return Err(cause.into()),
    };
    let image = match Image::parse(loaded.bytes) {
        Ok(image) => image,
        // What has the marks of an image and is none has been damaged; anything else is no image.
        Err(cause) if !matches!(cause, ImageError::NotRafs(_)) => {
            return Ok(Report::of_metadata(metadata::Report::unusable(&cause)));
        }
        Err(cause) => return Err(LoadError::Image { path: args.image.clone(), cause }.into()),
    };
    args.blobs.admit(&origin, &image)?;
    let source = if args.depth == Depth::Meta { None } else { Some(args.blobs.source(&origin)?) };
    let bar = Bar::on_terminal("checking");
    let mut report = check::check(&image, args.depth.into(), source.as_deref(), runtime.handle(), &bar)?;
    report.found.absorb(before);
    Ok(report)
}

fn print(args: &CheckArgs, report: &Report) -> anyhow::Result<()> {
    let printed = if args.json { print_json(report) } else { describe(args, report).map_err(Into::into) };
    match printed {
        // Whoever read our output has seen enough; the exit status still tells.
        Err(error) if error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) => {
            Ok(())
        }
        other => other.context("cannot write to standard output"),
    }
}

fn describe(args: &CheckArgs, report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let found = &report.found;
    for finding in &found.findings {
        say!(out, "{finding}")?;
    }
    let kept = found.findings.len() as u64;
    if found.errors + found.remarks > kept {
        say!(out, "... and {} more", found.errors + found.remarks - kept)?;
    }
    for blob in &report.blobs {
        let size = |bytes| ByteSize(bytes).to_string();
        match &blob.unchecked {
            Some(kind) => say!(out, "blob {}: not looked at, it is {kind}", blob.id)?,
            None if report.depth == check::Depth::Data => say!(
                out,
                "blob {}: {} of {} chunks are what they should be ({} stored, {} plain), {} are used by no file",
                blob.id,
                blob.verified,
                blob.chunks,
                size(blob.stored_bytes),
                size(blob.decoded_bytes),
                blob.unpromised
            )?,
            None => say!(out, "blob {}: {} chunks", blob.id, blob.chunks)?,
        }
    }
    let verdict = if !found.is_sound() {
        "damaged"
    } else if report.is_partial() {
        "sound as far as could be seen"
    } else {
        "sound"
    };
    say!(
        out,
        "{}: {verdict}; {} paths, {} inodes, {} chunks, {} errors, {} remarks",
        args.image.display(),
        found.paths,
        found.inodes,
        found.chunks,
        found.errors,
        found.remarks
    )
}
