use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;

use super::base::layer;
use super::opened::BlobsArgs;
use super::progress::Bar;
use crate::base::{ByteSize, Plain};
use crate::build::{self, CompactReport, CompactSpec, Existing, Fate};

/// Rewrite an image without dead chunks and without tiny blobs
///
/// Blobs that no file needs are no longer named. Blobs of which little is used are rebuilt, small
/// ones are merged with others that are compressed and digested in the same way, by copying what
/// files lead to. All other blobs stay as they are and must be served beside the new ones; no blob
/// of the image is touched. The new blobs are read back before anything has its name. The same
/// image gives the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CompactArgs {
    /// Bootstrap of the image, or a blob that holds it
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    blobs: BlobsArgs,

    /// Directory for the new bootstrap and blobs/ID of new blobs; made if it is not there
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,

    /// Rebuild blobs of whose decoded bytes a smaller share is used
    #[arg(long, value_name = "PERCENT", default_value = "50%")]
    min_used: Percent,

    /// Merge blobs of which fewer stored bytes are used
    #[arg(long, value_name = "SIZE", default_value = "10MiB")]
    small: ByteSize,

    /// Stored bytes that blobs should have at most after merging
    #[arg(long, value_name = "SIZE", default_value = "100MiB")]
    target: ByteSize,

    /// Bootstrap of a dictionary, whose blobs are left alone because others use them as well
    #[arg(long, value_name = "BOOTSTRAP")]
    dict: Option<PathBuf>,

    /// Compact encrypted blobs too, whose chunks are plain then; else they stay as they are
    #[arg(long)]
    decrypt: bool,

    /// Print what was made as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
If there is nothing to do that is said, and the bootstrap is written all the same: it names the
same blobs.

Exit status:
  0  the image is complete and on disk, or there was nothing to do
  1  something failed; nothing was made
  2  wrong command line

Examples:
  rafsd compact image/bootstrap -o compacted/
  rafsd compact image/bootstrap --blobs https://blobs.example/image --min-used 80% --small 1MiB -o compacted/";

/// A share in whole percent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Percent(u8);

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_suffix('%').unwrap_or(text).parse().ok().filter(|percent| *percent <= 100);
        number.map(Self).ok_or_else(|| format!("{text:?} is not a whole number of percent up to 100%"))
    }
}

/// Exit status: 0 when the image is complete and on disk.
///
/// # Errors
/// Whatever stopped it; nothing was made then.
pub(super) fn run(args: CompactArgs) -> anyhow::Result<ExitCode> {
    let dictionary = args.dict.as_deref().map(layer).transpose().context("cannot open the dictionary")?;
    let opened = args.blobs.open(&args.image).context("cannot open the image")?;
    let spec = CompactSpec {
        existing: Existing { name: &args.image, image: opened.files.image(), chunks: &opened.files },
        out_dir: &args.out,
        min_used: args.min_used.0,
        small: args.small.0,
        target: args.target.0,
        dictionary: dictionary.as_ref(),
        decrypt: args.decrypt,
    };
    let bar = Bar::on_terminal("copying");
    let report = build::compact(&spec, &bar).context("no image was made")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The report for a person.
fn summary(report: &CompactReport) -> String {
    let mut out = String::new();
    if report.nothing_to_do {
        out += "nothing to do: every blob is large enough and well used\n";
    }
    out += &format!("bootstrap  {} ({})\n", Plain(&report.bootstrap), ByteSize(report.bootstrap_bytes));
    for blob in &report.new_blobs {
        out += &format!("new blob   {} ({}, {} chunks)\n", Plain(&blob.path), ByteSize(blob.stored_bytes), blob.chunks);
    }
    for blob in &report.blobs {
        let fate = match blob.fate {
            Fate::Kept => "kept",
            Fate::KeptForDictionary => "kept, in the dictionary",
            Fate::KeptEncrypted => "kept, encrypted",
            Fate::Dropped => "dropped",
            Fate::Rebuilt => "rebuilt",
            Fate::Merged => "merged",
        };
        let (used, all) = (ByteSize(blob.used_bytes), ByteSize(blob.decoded_bytes));
        out += &format!("blob       {}, {used} of {all} used: {fate}\n", blob.id);
    }
    let (before, after) = (ByteSize(report.stored_bytes_before), ByteSize(report.stored_bytes_after));
    out += &format!("stored     {before} before, {after} now\n");
    let (live, encoded) = (report.live_chunks, report.encoded_chunks);
    out + &format!("copied     {live} chunks, {encoded} of them encoded anew\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_percent() {
        for (text, want) in [("50%", Some(50)), ("0", Some(0)), ("100%", Some(100)), ("101%", None), ("", None)] {
            assert_eq!(text.parse::<Percent>().ok(), want.map(Percent), "{text}");
        }
        for bad in ["-1%", "5.5%", "%", "50%%", "256"] {
            assert!(bad.parse::<Percent>().is_err(), "{bad}");
        }
    }
}
