use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::base::layer;
use super::progress::Bar;
use crate::base::{ByteSize, Plain};
use crate::build::{self, DictionaryReport, DictionarySpec};
use crate::reader::LoadError;

/// Make a dictionary of the chunks that images have in common
///
/// Writes one bootstrap and moves no data: every chunk is a file in it, named by its digest, that
/// leads into the blob of the first image that has it. What is built with `rafsd build
/// --chunk-dict` then stores none of these chunks again, and needs these blobs to be served as
/// well. The same images give the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ChunkdictArgs {
    /// Bootstraps of images, which must agree in chunk size; blobs of the first are preferred
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,

    /// Bootstrap to write
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,

    /// Take chunks that at least so many of the images have
    #[arg(long, value_name = "N", default_value = "2")]
    min_images: NonZeroUsize,

    /// Take at most so many: those that most images have, of these the largest
    #[arg(long, value_name = "N")]
    max_chunks: Option<NonZeroUsize>,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  the dictionary is complete and on disk
  1  something failed, or the images have too little in common; nothing was made
  2  wrong command line

Examples:
  rafsd chunkdict base/bootstrap app/bootstrap tool/bootstrap -o dict.boot
  rafsd build rootfs/ --chunk-dict dict.boot -o image/";

/// Exit status: 0 when the dictionary is complete and on disk.
///
/// # Errors
/// Whatever stopped it; nothing was made then.
pub(super) fn run(args: ChunkdictArgs) -> anyhow::Result<ExitCode> {
    let images = args.images.iter().map(|path| layer(path)).collect::<Result<Vec<_>, LoadError>>()?;
    let spec = DictionarySpec {
        images: &images,
        out: args.out,
        min_images: args.min_images.get(),
        max_chunks: args.max_chunks.map(NonZeroUsize::get),
    };
    let bar = Bar::on_terminal("comparing");
    let report = build::dictionary(&spec, &bar).context("no dictionary was made")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The report for a person.
fn summary(report: &DictionaryReport) -> String {
    let mut out = format!("dictionary {} ({})\n", Plain(&report.bootstrap), ByteSize(report.bootstrap_bytes));
    out += &format!(
        "chunks     {} of {} in {} images, {} where the images have {}\n",
        report.chunks,
        report.distinct_chunks,
        report.images,
        ByteSize(report.plain_bytes),
        ByteSize(report.shared_plain_bytes)
    );
    for id in &report.blobs {
        out += &format!("with blob  {id}\n");
    }
    out
}
