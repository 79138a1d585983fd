use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::opened::BlobsArgs;
use super::progress::Bar;
use crate::base::ByteSize;
use crate::tools::unpack::{self, UnpackOptions, UnpackReport};

/// Unpack an image into a directory or a tar archive, with every attribute
///
/// Every byte is checked before it is written. A directory or archive has its name only when it is
/// complete and on disk.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct UnpackArgs {
    /// Bootstrap of the image, a blob that holds it, or docker://HOST/REPOSITORY:TAG
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    #[command(flatten)]
    blobs: BlobsArgs,

    /// Directory to unpack into: one that is empty, or that does not exist
    #[arg(short, long, value_name = "DIR", required_unless_present = "tar", conflicts_with = "tar")]
    out: Option<PathBuf>,

    /// Archive to write, or - for standard output; sockets have no place in it
    #[arg(long, value_name = "FILE")]
    tar: Option<PathBuf>,

    /// Leave files to the user who unpacks; set-id bits of files of somebody else are dropped
    #[arg(long, conflicts_with = "tar")]
    no_same_owner: bool,

    /// Leave out character and block devices
    #[arg(long, conflicts_with = "tar")]
    skip_devices: bool,

    /// Leave out extended attributes that cannot be set, by this user or on this file system
    #[arg(long, conflicts_with = "tar")]
    skip_xattrs: bool,

    /// Print what was written as JSON; with --tar - on standard error
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  everything is written and on disk, but for what was asked to be left out
  1  something failed; nothing has the name that was asked for
  2  wrong command line

Examples:
  rafsd unpack image/bootstrap -o rootfs/
  rafsd unpack image/bootstrap --blobs https://blobs.example/image --tar - | tar -t
  rafsd unpack docker://registry.example/team/app:1.2-nydus -o rootfs/";

/// Exit status: 0 when everything is written and on disk.
///
/// # Errors
/// Whatever stopped it; nothing has the final name then.
pub fn run(args: UnpackArgs) -> anyhow::Result<ExitCode> {
    let to_stdout = args.tar.as_deref() == Some(Path::new("-"));
    if to_stdout && io::stdout().is_terminal() {
        bail!("an archive is not written to a terminal; redirect standard output or name a file");
    }
    let opened = args.blobs.open(&args.image).context("cannot open the image")?;
    let bar = Bar::on_terminal("unpacking");
    let report = match (&args.out, &args.tar) {
        (Some(directory), _) => {
            let options = UnpackOptions {
                no_same_owner: args.no_same_owner,
                skip_devices: args.skip_devices,
                skip_xattrs: args.skip_xattrs,
            };
            unpack::to_directory(&opened.files, directory, options, &bar)?
        }
        (None, Some(_)) if to_stdout => unpack::to_stream(&opened.files, &mut io::stdout().lock(), &bar)?,
        (None, Some(archive)) => unpack::to_archive(&opened.files, archive, &bar)?,
        (None, None) => bail!("either --out or --tar must be given"),
    };
    drop(bar);
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { summary(&report) };
    let written =
        if to_stdout { io::stderr().write_all(text.as_bytes()) } else { io::stdout().write_all(text.as_bytes()) };
    match written {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("cannot print the report"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// The report for a person.
fn summary(report: &UnpackReport) -> String {
    let mut out = format!(
        "contents   {} files, {} directories, {} symlinks, {} special files, {} hard links\n",
        report.files, report.directories, report.symlinks, report.specials, report.hard_links
    );
    out += &format!("data       {}\n", ByteSize(report.bytes));
    let skipped = &report.skipped;
    for (count, what) in [
        (skipped.owners, "owners"),
        (skipped.devices, "devices"),
        (skipped.xattrs, "xattrs"),
        (skipped.sockets, "sockets"),
    ] {
        if count > 0 {
            out += &format!("left out   {count} {what}\n");
        }
    }
    out
}
