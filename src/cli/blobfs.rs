use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::connect::{DaemonArgs, block_on};
use super::mount::{SourceArgs, absolute, named, warn_unconfirmed};
use super::print_json;
use crate::daemon::api::{BLOB_DIR, BlobfsRequest, ImageSpec};
use crate::oci::Reference;

/// Show a directory with the blobs of images in it, for others to mount
///
/// Everything in DIR appears at MOUNTPOINT as it is, read-only, and changes in it within a second. Besides, each blob
/// of the images has a file there whose data arrives when it is read, and each image one with its bootstrap. So a
/// virtual machine that is given MOUNTPOINT, or a container, can mount the images itself:
///
///   mount -t erofs -o device=blobs/BLOB blobs/IMAGE.bootstrap /mnt
///
/// with one device= for each blob, in the order in which --json lists them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE, verbatim_doc_comment)]
pub(super) struct BlobfsArgs {
    /// The directory to show; not on a FUSE or EROFS file system
    #[arg(value_name = "DIR")]
    source: PathBuf,

    /// Where to mount: an existing directory, which may be DIR itself
    #[arg(value_name = "MOUNTPOINT")]
    dir: PathBuf,

    /// Bootstrap of an image, or docker://HOST/REPOSITORY:TAG for one in a registry; may be given several times
    #[arg(long = "image", value_name = "BOOTSTRAP|REFERENCE", required = true)]
    images: Vec<PathBuf>,

    #[command(flatten)]
    from: SourceArgs,

    /// Name of the directory below MOUNTPOINT that the blobs appear in, whether DIR has one or not; . for MOUNTPOINT
    /// itself
    #[arg(long, value_name = "NAME", default_value = BLOB_DIR)]
    blob_dir: String,

    #[command(flatten)]
    daemon: DaemonArgs,

    /// Print what is served as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
Example:
  rafsd blobfs /srv/vm /run/vm/share --image image/bootstrap --blobs https://blobs.example/image";

/// Exit status: 0 when the mount is usable.
pub(super) fn run(args: BlobfsArgs) -> anyhow::Result<ExitCode> {
    let (source, dir) = (absolute(&args.source)?, absolute(&args.dir)?);
    let of_registry = args.from.spec()?;
    let of_file = ImageSpec { platform: None, offline: false, ..of_registry.clone() };
    let is_reference = |image: &PathBuf| image.to_str().is_some_and(Reference::is_meant);
    if (args.from.offline || args.from.platform.is_some()) && !args.images.iter().any(is_reference) {
        bail!("--offline and --platform are about images in registries; all of these are files");
    }
    let image = |image: &PathBuf| named(image, if is_reference(image) { of_registry.clone() } else { of_file.clone() });
    let images = args.images.iter().map(image).collect::<anyhow::Result<_>>()?;
    let request = BlobfsRequest { source, dir, images, blob_dir: args.blob_dir };
    let reports = block_on(async {
        let client = args.daemon.connect().await?;
        Ok(client.mount_blobfs(&request).await?)
    })?;
    reports.iter().try_for_each(warn_unconfirmed)?;
    if args.json {
        print_json(&reports)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = io::stdout().lock();
    say!(out, "{}: {} with blobs in {}", request.dir.display(), request.source.display(), request.blob_dir)?;
    for report in &reports {
        say!(out, "  {}.bootstrap", report.image)?;
        for device in &report.devices {
            say!(out, "    {}", device.blob)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
