use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::connect::{DaemonArgs, Place, block_on};
use super::prefetch::order;
use super::{print_json, trace};
use crate::base::ByteSize;
use crate::daemon::api::{BackendChoice, Blobs, ImageReport, ImageSpec, MountRequest, UnmountRequest, UnservedReport};
use crate::daemon::keeper;
use crate::oci::{Platform, Reference};

/// Where images come from, and what of them is fetched at once.
#[derive(Debug, clap::Args)]
pub(super) struct SourceArgs {
    /// Where the blobs are: a directory, the http(s) URL below which each has its id as name, or
    /// docker://HOST/REPOSITORY; may be given several times, and the first place is asked first
    ///
    /// An image in a registry has its blobs there, so for one of those this is needed only if they are kept elsewhere.
    /// It then says all places, the registry included.
    ///
    /// Secrets in a URL, such as a password or a signature, can be seen in the process list by
    /// every user of this host while this command runs.
    #[arg(long, value_name = "DIR|URL")]
    blobs: Vec<String>,

    /// For which machine, as OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, where an image in a registry comes for
    /// several [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    pub(super) platform: Option<Platform>,

    /// Take the image in a registry that the name led to the last time, and do not ask the registry about it
    #[arg(long)]
    pub(super) offline: bool,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// What to fetch before anybody asks, behind all readers
    ///
    /// hints: what the image's own prefetch table names, if it has one; all: the same and then
    /// everything else, which is also what --prefetch alone means; none; or a file with a list of
    /// paths and ranges as `rafsd optimize` takes it, such as a trace.
    #[arg(
        long,
        value_name = "hints|all|none|FILE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        default_value = "hints"
    )]
    prefetch: PathBuf,
}

impl SourceArgs {
    /// The same with paths that mean the same to the daemon, for an image that is yet to be named.
    pub(super) fn spec(&self) -> anyhow::Result<ImageSpec> {
        Ok(ImageSpec {
            platform: self.platform.as_ref().map(ToString::to_string),
            offline: self.offline,
            blobs: places(self.blobs.clone())?,
            ca: self.ca.as_deref().map(absolute).transpose()?,
            prefetch: order(&self.prefetch)?,
            ..ImageSpec::default()
        })
    }
}

/// Where an image and its blobs are.
#[derive(Debug, clap::Args)]
pub(super) struct ImageArgs {
    /// Bootstrap of the image, or docker://HOST/REPOSITORY:TAG for an image in a registry
    ///
    /// An image in a registry may be named by tag, by digest (docker://HOST/REPOSITORY@sha256:...), or by both, of
    /// which the digest decides.
    #[arg(value_name = "BOOTSTRAP|REFERENCE")]
    image: PathBuf,

    #[command(flatten)]
    from: SourceArgs,
}

impl ImageArgs {
    /// The same with paths that mean the same to the daemon.
    pub(super) fn spec(self) -> anyhow::Result<ImageSpec> {
        named(&self.image, self.from.spec()?)
    }
}

/// Places of blobs, with paths that mean the same to the daemon.
pub(super) fn places(blobs: Vec<String>) -> anyhow::Result<Blobs> {
    let place = |place: String| {
        if place.contains("://") { Ok(place) } else { Ok(absolute(Path::new(&place))?.display().to_string()) }
    };
    Ok(blobs.into_iter().map(place).collect::<anyhow::Result<Vec<_>>>()?.into())
}

/// `spec` with the image that `text` names: an image in a registry, or a bootstrap.
pub(super) fn named(text: &Path, spec: ImageSpec) -> anyhow::Result<ImageSpec> {
    if let Some(text) = text.to_str().filter(|text| Reference::is_meant(text)) {
        let reference: Reference = text.parse()?;
        return Ok(ImageSpec { reference: Some(reference.to_string()), ..spec });
    }
    if spec.blobs.is_empty() {
        bail!("--blobs must say where the blobs of {} are", text.display());
    }
    if spec.offline || spec.platform.is_some() {
        bail!("--offline and --platform are about images in registries; {} is a file", text.display());
    }
    Ok(ImageSpec { bootstrap: Some(absolute(text)?), ..spec })
}

/// Mount an image; its data arrives when it is read
///
/// Asks the daemon, starting one if none runs, and returns when the mount is usable.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct MountArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// Where to mount: an existing directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Record what is read from the first moment on, of complete blobs too; `rafsd umount` and
    /// `rafsd trace stop` write it here
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// How cold reads reach the daemon
    #[arg(long, value_enum, default_value_t = BackendChoice::Auto)]
    backend: BackendChoice,

    #[command(flatten)]
    daemon: DaemonArgs,

    /// Print what was mounted as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
Examples:
  rafsd mount docker://registry.example/team/app:1.2-nydus /mnt
  rafsd mount image/bootstrap /mnt --blobs https://blobs.example/image
  rafsd mount image/bootstrap /mnt --blobs https://blobs.example/image --prefetch=start.trace";

/// Exit status: 0 when the mount is usable.
pub(super) fn mount(args: MountArgs) -> anyhow::Result<ExitCode> {
    let dir = absolute(&args.dir)?;
    let trace = args.trace.as_deref().map(trace::place).transpose()?;
    let request = MountRequest { image: args.image.spec()?, dir, backend: args.backend, trace };
    let report = block_on(async {
        let client = args.daemon.connect().await?;
        Ok(client.mount(&request).await?)
    })?;
    warn_unconfirmed(&report)?;
    if args.json {
        print_json(&report)?;
    } else {
        say!(io::stdout(), "{}: {} ({})", request.dir.display(), report.backend, report.why)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells people that a tag may lead elsewhere by now.
pub(super) fn warn_unconfirmed(image: &ImageReport) -> io::Result<()> {
    let (Some(reference), Some(why)) = (&image.reference, &image.unconfirmed) else { return Ok(()) };
    say!(io::stderr(), "warning: this is what {reference} led to the last time, for {why}")
}

/// Unmount an image
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd umount /mnt")]
pub(super) struct UmountArgs {
    /// Where it is mounted
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Take it out of the tree even while files on it are open; they stay served until closed
    #[arg(long)]
    lazy: bool,

    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when nothing of the image is mounted there any more.
pub(super) fn umount(args: UmountArgs) -> anyhow::Result<ExitCode> {
    let request = UnmountRequest { dir: mount_point(&args.dir)?, lazy: args.lazy };
    let unmounted = block_on(async {
        let client = args.place.client()?;
        let unmounted = client.unmount(&request).await.map_err(|e| args.place.explain(e))?;
        trace::finish(&client, &request.dir).await?;
        anyhow::Ok(unmounted)
    })?;
    if unmounted.still_served {
        say!(io::stdout(), "{}: still served until the last file is closed", request.dir.display())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// List mounted and registered images
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd list --json")]
pub(super) struct ListArgs {
    #[command(flatten)]
    place: Place,

    /// Print everything that is known as JSON
    #[arg(long)]
    json: bool,
}

/// Exit status: 0, also when nothing is mounted or no daemon runs.
pub(super) fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    use crate::daemon::client::ClientError;
    let (images, unserved) = block_on(async {
        let client = args.place.client()?;
        match client.list().await {
            Err(ClientError::NoDaemon { .. }) if keeper::status(&args.place.run).is_err() => {
                Ok((Vec::new(), Vec::new()))
            }
            Err(other) => Err(args.place.explain(other)),
            Ok(images) => Ok((images, client.info().await?.unserved)),
        }
    })?;
    if args.json {
        print_json(&images)?;
        return Ok(ExitCode::SUCCESS);
    }
    table(&mut io::stdout().lock(), &images, &unserved)?;
    Ok(ExitCode::SUCCESS)
}

/// A line for each, below a head; nothing at all for none.
fn table(out: &mut dyn Write, images: &[ImageReport], unserved: &[UnservedReport]) -> io::Result<()> {
    if !images.is_empty() || !unserved.is_empty() {
        say!(out, "{:<10}  {:>9}  {:>10}  {:<12}  WHERE", "BACKEND", "PRESENT", "FETCHED", "IMAGE")?;
    }
    for image in images {
        let options = image.mount_options.as_deref().unwrap_or_default();
        let place = image.dir.as_deref().map_or_else(|| format!("-o {options}"), |dir| dir.display().to_string());
        let (present, fetched) = progress(image);
        say!(
            out,
            "{:<10}  {present:>9}  {fetched:>10}  {:<12}  {place}",
            image.backend.to_string(),
            &image.image[..12]
        )?;
    }
    for mount in unserved {
        let place = mount.dir.as_deref().map_or_else(|| "-".into(), Path::to_string_lossy);
        say!(out, "{:<10}  {:>9}  {:>10}  {:<12}  {place}: not served, {}", "-", "-", "-", "-", mount.why)?;
    }
    Ok(())
}

/// Part of the units that is present, and stored bytes fetched so far.
fn progress(image: &ImageReport) -> (String, String) {
    let stats: Vec<_> = image.devices.iter().filter_map(|device| device.stats).collect();
    let units: u64 = stats.iter().map(|stats| u64::from(stats.units)).sum();
    let present: u64 = stats.iter().map(|stats| u64::from(stats.units_present)).sum();
    let fetched = stats.iter().map(|stats| stats.stored_bytes_fetched).sum();
    let part = if image.is_complete() {
        "complete".to_owned()
    } else if stats.len() < image.devices.len() || units == 0 {
        "-".to_owned()
    } else {
        format!("{}%", present * 100 / units)
    };
    (part, ByteSize(fetched).to_string())
}

/// The place of a mount, as the daemon is told it. A file system that nobody answers for does not say where it is; the
/// directory around it does.
pub(super) fn mount_point(path: &Path) -> anyhow::Result<PathBuf> {
    let around = || Some(path.parent()?.canonicalize().ok()?.join(path.file_name()?));
    let found = path.canonicalize().or_else(|error| around().ok_or(error));
    sayable(found.with_context(|| format!("cannot use {}", path.display()))?)
}

/// A path as the daemon is told it: absolute, and the real one.
pub(super) fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    sayable(path.canonicalize().with_context(|| format!("cannot use {}", path.display()))?)
}

/// Paths travel as JSON, which has no words for other bytes.
pub(super) fn sayable(path: PathBuf) -> anyhow::Result<PathBuf> {
    if path.to_str().is_none() {
        bail!("the daemon cannot be told of {}, because this name is not UTF-8; give it another one", path.display());
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;
    use crate::daemon::api::samples;

    #[test]
    fn a_name_that_cannot_be_told_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let bootstrap = dir.path().join(std::ffi::OsStr::from_bytes(b"boot\xff"));
        std::fs::write(&bootstrap, "").unwrap();
        let spec = ImageSpec { blobs: "/".into(), ..ImageSpec::default() };

        let refused = [named(&bootstrap, spec).map(drop), mount_point(&bootstrap).map(drop)];

        for refused in refused {
            let error = format!("{:#}", refused.unwrap_err());
            assert!(error.contains("boot\u{fffd}, because this name is not UTF-8"), "{error}");
        }
    }

    #[test]
    fn each_image_has_one_line_whatever_its_mount_point_is_called() {
        let (mut image, mut unserved) = (samples::image(), samples::info().unserved);
        image.dir = Some("/mnt\nfanotify  complete  /forged\u{1b}[2J".into());
        unserved[0].dir = Some("/old\r/new".into());
        let mut out = Vec::new();
        table(&mut out, &[image], &unserved).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "\
BACKEND       PRESENT     FETCHED  IMAGE         WHERE
fanotify          11%     2.0 MiB  4708d6385377  /mnt\\nfanotify  complete  /forged\\u{1b}[2J
-                   -           -  -             /old\\r/new: not served, no connection
"
        );
    }
}
