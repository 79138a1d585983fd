use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::connect::{DaemonArgs, block_on};
use super::mount::{absolute, named, places};
use super::prefetch::order;
use super::print_json;
use crate::daemon::api::{BLOB_DIR, BlobfsRequest, ImageSpec};
use crate::oci::{Platform, Reference};

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

    /// Where the blobs of all images are, as for `rafsd mount`; may be given several times
    ///
    /// Images in registries have their blobs there, so that it is needed only for bootstraps, and if blobs are kept
    /// elsewhere.
    #[arg(long, value_name = "DIR|URL")]
    blobs: Vec<String>,

    /// Name of the directory below MOUNTPOINT that the blobs appear in, whether DIR has one or not; . for MOUNTPOINT
    /// itself
    #[arg(long, value_name = "NAME", default_value = BLOB_DIR)]
    blob_dir: String,

    /// For which machine, as OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, where an image in a registry comes for
    /// several [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,

    /// Take what the names of images in registries led to the last time, and do not ask the registries about them
    #[arg(long)]
    offline: bool,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// What to fetch before anybody asks, behind all readers: hints, all or none, as for `rafsd mount`
    #[arg(
        long,
        value_name = "hints|all|none",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        default_value = "hints"
    )]
    prefetch: PathBuf,

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
    for path in [&source, &dir] {
        path.to_str().with_context(|| format!("the path {} is not UTF-8", path.display()))?;
    }
    let ca = args.ca.as_deref().map(absolute).transpose()?;
    let (blobs, prefetch) = (places(args.blobs)?, order(&args.prefetch)?);
    let spec = ImageSpec { blobs, ca, prefetch, ..ImageSpec::default() };
    let platform = args.platform.as_ref().map(ToString::to_string);
    let of_registry = ImageSpec { platform, offline: args.offline, ..spec.clone() };
    let is_reference = |image: &PathBuf| image.to_str().is_some_and(Reference::is_meant);
    if (args.offline || args.platform.is_some()) && !args.images.iter().any(is_reference) {
        bail!("--offline and --platform are about images in registries; all of these are files");
    }
    let image = |image: &PathBuf| named(image, if is_reference(image) { of_registry.clone() } else { spec.clone() });
    let images = args.images.iter().map(image).collect::<anyhow::Result<_>>()?;
    let request = BlobfsRequest { source, dir, images, blob_dir: args.blob_dir };
    let reports = block_on(async {
        let client = args.daemon.connect().await?;
        Ok(client.mount_blobfs(&request).await?)
    })?;
    if args.json {
        print_json(&reports)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{}: {} with blobs in {}", request.dir.display(), request.source.display(), request.blob_dir)?;
    for report in &reports {
        writeln!(out, "  {}.bootstrap", report.image)?;
        for device in &report.devices {
            writeln!(out, "    {}", device.blob)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
