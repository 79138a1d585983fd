use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::connect::{DaemonArgs, block_on};
use super::mount::{absolute, named};
use super::{print_json, progress};
use crate::base::ByteSize;
use crate::cache::PrefetchState;
use crate::daemon::api::{ImageSpec, PrefetchOrder, PullReport, PullRequest};
use crate::oci::Platform;

/// Bring images here whole, without mounting them
///
/// Everything is checked as it comes, and what is in the cache already is not fetched again. A mount of such an image
/// then needs no server, with --offline if it is named by a tag. The images stay as long as the cache has room for
/// them; `rafsd cache pin` makes a blob stay. The cachefiles backend keeps its data elsewhere, so that its mounts
/// do not profit; `rafsd prefetch` is for those.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PullArgs {
    /// Images in registries, as docker://HOST/REPOSITORY:TAG, or bootstraps
    #[arg(value_name = "REFERENCE|BOOTSTRAP", required = true)]
    images: Vec<PathBuf>,

    /// Where the blobs are, as for `rafsd mount`
    #[arg(long, value_name = "DIR|URL")]
    blobs: Vec<String>,

    /// For which machine, where an image comes for several [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    #[command(flatten)]
    daemon: DaemonArgs,

    /// Print what was brought as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  everything of all images is in the cache, durably
  1  something could not be fetched, which is named
  2  wrong command line

Examples:
  rafsd pull docker://registry.example/team/app:1.2-nydus
  rafsd pull image/bootstrap --blobs https://blobs.example/image";

/// Exit status: 1 if something could not be fetched.
pub(super) fn run(args: PullArgs) -> anyhow::Result<ExitCode> {
    let requests = args.images.iter().map(|image| request(&args, image)).collect::<anyhow::Result<Vec<_>>>()?;
    let reports = block_on(async {
        let client = args.daemon.connect().await?;
        let mut reports = Vec::new();
        // One after the other: the first is then usable while the last is still on its way.
        for request in &requests {
            let report = client.pull(request).await?;
            let next = async |report: &PullReport| Ok(client.get_pull(report.id).await?);
            let name = report.name.clone();
            let id = report.id;
            let following = progress::follow(&name, report, None, |report| &report.stats, next);
            reports.push(tokio::select! {
                ended = following => ended?,
                // Nobody would know that it goes on.
                _ = tokio::signal::ctrl_c() => client.cancel_pull(id).await?,
            });
        }
        Ok(reports)
    })?;
    if args.json {
        print_json(&reports)?;
    }
    let mut failed = false;
    for report in &reports {
        if !args.json {
            say!(io::stdout(), "{}", summary(report))?;
        }
        if report.stats.state != PrefetchState::Done {
            failed = true;
            for failure in report.stats.failures.iter().chain(&report.stats.trouble) {
                // A closed stderr leaves nobody to tell.
                let _ = say!(io::stderr(), "rafsd: {}: {failure}", report.name);
            }
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn request(args: &PullArgs, image: &Path) -> anyhow::Result<PullRequest> {
    let blobs = super::mount::places(args.blobs.clone())?;
    let ca = args.ca.as_deref().map(absolute).transpose()?;
    let platform = args.platform.as_ref().map(ToString::to_string);
    let spec = ImageSpec { platform, blobs, ca, prefetch: PrefetchOrder::None, ..ImageSpec::default() };
    Ok(PullRequest { image: named(image, spec)? })
}

fn summary(report: &PullReport) -> String {
    let stats = &report.stats;
    let state = match stats.state {
        PrefetchState::Done => "complete",
        PrefetchState::Cancelled => "stopped",
        PrefetchState::Running | PrefetchState::Retrying | PrefetchState::Failed => "not all could be fetched",
    };
    let digest = report.manifest.as_ref().map(|digest| format!(" (sha256:{digest})")).unwrap_or_default();
    let (present, all) = (ByteSize(stats.bytes_present), ByteSize(stats.bytes));
    format!("{}{digest}: {state}, {present} of {all} present", report.name)
}
