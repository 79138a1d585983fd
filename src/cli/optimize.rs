use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::list;
use super::opened::BlobsArgs;
use super::progress::Bar;
use crate::base::{ByteSize, Plain};
use crate::build::{self, Existing, OptimizeReport, OptimizeSpec};
use crate::tools::hotlist::{self, MAX_LIST};

/// Rewrite an image with a hot blob: what is needed first, in the order in which it is needed
///
/// Copies the chunks of the listed files into one new blob, in the order of the list, and leads
/// every file that uses them there. The listed paths become the prefetch table of the new image.
/// The blobs of the image are not touched; as far as the report says so they are still needed,
/// and must be served beside the new one. The same image and list give the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct OptimizeArgs {
    /// Bootstrap of the image, or a blob that holds it
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    blobs: BlobsArgs,

    /// What is hot, the most urgent first: a file, or - for standard input; see below
    #[arg(long, value_name = "FILE")]
    paths: PathBuf,

    /// Directory for the new bootstrap and blobs/ID of the hot blob; made if it is not there
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,

    /// Store chunks of encrypted blobs plain, so that everybody who can read the hot blob can read
    /// them
    #[arg(long)]
    decrypt: bool,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Lists:
  One absolute path per line; a directory means all below it. PATH:OFFSET+LENGTH[,OFFSET+LENGTH...]
  means the chunks with bytes in these ranges. A line that ends so is always read so: a path that
  ends so itself, or that has blanks at its ends or bytes that are no text, is written as a line
  of JSON, {\"path\":\"/a:1+2\",\"ranges\":[[0,4096]]} or {\"path_hex\":\"2fff\"}. The list may also be one
  document, {\"version\":\"v1\",\"files\":[{\"path\":\"/a\",\"ranges\":[[0,4096]]}]}. No ranges mean all.

Exit status:
  0  the image is complete and on disk, even if there are remarks about the list
  1  something failed, or nothing on the list has data; nothing was made
  2  wrong command line

Examples:
  rafsd optimize image/bootstrap --paths hot.txt -o hot/
  printf '/usr/bin/app\\n/usr/lib/libc.so.6:0+65536\\n' | rafsd optimize image/bootstrap --paths - -o hot/";

/// Exit status: 0 when the image is complete and on disk.
///
/// # Errors
/// Whatever stopped it; nothing was made then.
pub(super) fn run(args: OptimizeArgs) -> anyhow::Result<ExitCode> {
    let hot = hotlist::parse(&list::read("list", &args.paths, MAX_LIST)?).context("cannot use the list")?;
    let opened = args.blobs.open(&args.image).context("cannot open the image")?;
    let spec = OptimizeSpec {
        existing: Existing { name: &args.image, image: opened.files.image(), chunks: &opened.files },
        hot: &hot,
        out_dir: &args.out,
        decrypt: args.decrypt,
    };
    let bar = Bar::on_terminal("copying");
    let report = build::optimize(&spec, &bar).context("no image was made")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Most remarks that a person is shown.
const SHOWN_REMARKS: usize = 10;

/// The report for a person.
fn summary(report: &OptimizeReport) -> String {
    let blob = &report.blob;
    let mut out = format!("bootstrap  {} ({})\n", Plain(&report.bootstrap), ByteSize(report.bootstrap_bytes));
    out += &format!(
        "hot blob   {} ({}, {} chunks of {}, {} of them encoded anew)\n",
        Plain(&blob.path),
        ByteSize(blob.stored_bytes),
        blob.chunks,
        ByteSize(report.hot_bytes),
        report.encoded_chunks
    );
    for other in &report.others {
        let (needed, all) = (ByteSize(other.needed_bytes), ByteSize(other.decoded_bytes));
        out += &match other.needed_chunks {
            0 => format!("not used   {}\n", other.id),
            chunks => format!("with blob  {}, {needed} of {all} in {chunks} of {} chunks\n", other.id, other.chunks),
        };
    }
    out += &format!("prefetch   {} paths\n", report.prefetched_paths);
    for remark in report.remarks.iter().take(SHOWN_REMARKS) {
        out += &format!("remark     {} {}\n", Plain(&remark.path), remark.problem);
    }
    match report.remarks.len().saturating_sub(SHOWN_REMARKS) {
        0 => out,
        more => out + &format!("remark     and {more} more; see --json\n"),
    }
}
