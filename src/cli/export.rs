use std::convert::Infallible;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::opened::BlobsArgs;
use super::progress::Bar;
use crate::base::{ByteSize, Plain};
use crate::tools::export::{self, ExportReport, Verity};

/// Write an image as one disk that the kernel mounts without rafsd
///
/// Every byte is checked before it is written, and blocks of zeros are holes. The disk has its name
/// only when it is complete and synced.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// Bootstrap of the image, a blob that holds it, or docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    blobs: BlobsArgs,

    /// File to write; it is replaced
    #[arg(short, long, value_name = "DISK")]
    out: PathBuf,

    /// Add a dm-verity hash tree: append puts it behind the data, anything else names a file for it
    #[arg(long, value_name = "append|FILE", value_parser = verity)]
    verity: Option<Verity>,

    /// Print what was written as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  the disk is complete
  1  something failed; nothing was replaced, except that the disk was if the message says so:
     a hash tree in a file of its own gets its name after the disk
  2  wrong command line

Examples:
  rafsd export image/bootstrap -o image.erofs && mount -o loop image.erofs /mnt
  rafsd export image/bootstrap --blobs https://blobs.example/image -o image.erofs --verity append
  rafsd export docker://registry.example/team/app:1.2-nydus -o image.erofs";

fn verity(text: &str) -> Result<Verity, Infallible> {
    Ok(if text == "append" { Verity::Append } else { Verity::File(text.into()) })
}

/// Exit status: 0 when the disk is complete and synced.
///
/// # Errors
/// Whatever stopped it; nothing was replaced then, or the disk alone if it says so.
pub fn run(args: ExportArgs) -> anyhow::Result<ExitCode> {
    let opened = args.blobs.open(&args.image).context("cannot open the image")?;
    let bar = Bar::on_terminal("exporting");
    let verity = args.verity.unwrap_or(Verity::None);
    let hash_file = if let Verity::File(path) = &verity { Some(path.as_path()) } else { None };
    for place in std::iter::once(args.out.as_path()).chain(hash_file) {
        args.blobs.refuse_input(place, &args.image, opened.files.image())?;
    }
    let report = export::export(&opened.files, &args.out, &verity, &bar).context("cannot export the image")?;
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The report for a person.
fn summary(report: &ExportReport) -> String {
    let size = |bytes| ByteSize(bytes).to_string();
    let mut out = format!("disk       {} ({})\n", Plain(&report.disk), size(report.disk_bytes));
    out += &format!("data       {} of {} devices\n", size(report.data_bytes), report.devices);
    if report.is_placed_anew {
        out += "devices    placed anew: the image did not say where they belong\n";
    }
    if let Some(verity) = &report.verity {
        out += &format!("root hash  {}\n", verity.root_hash);
        out += &format!(
            "hash tree  {} at byte {} ({}), over {} blocks of 4096 bytes\n",
            Plain(&verity.hash_file),
            verity.hash_offset,
            size(verity.hash_bytes),
            verity.data_blocks
        );
    }
    out
}
