use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::connect::{Place, block_on};
use super::mount::absolute;
use super::{list, print_json, progress};
use crate::base::ByteSize;
use crate::cache::PrefetchState;
use crate::daemon::api::{FileRanges, PrefetchOrder, PrefetchReport, PrefetchRequest, PrefetchTarget};
use crate::tools::hotlist::{self, MAX_LIST};

/// Fetch data of a mounted image before anybody asks for it, behind all readers
///
/// Without --wait the daemon goes on by itself. What cannot be fetched now because the source does not
/// answer is asked for again, after 1 s at first and up to a minute later.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PrefetchArgs {
    /// Where the image is mounted, or the first digits of its name in `rafsd list`
    #[arg(value_name = "DIR|IMAGE")]
    image: PathBuf,

    /// Fetch what the image's own prefetch table names, in its order
    #[arg(long, group = "what")]
    hints: bool,

    /// The same, and then everything else; without any of these, this is what is done
    #[arg(long, group = "what")]
    all: bool,

    /// Fetch what a list names, in its order: paths and ranges, as `rafsd optimize` takes them; - for
    /// standard input
    #[arg(long, value_name = "FILE", group = "what")]
    paths: Option<PathBuf>,

    /// The same for a list that `rafsd trace` wrote
    #[arg(long, value_name = "FILE", group = "what")]
    trace: Option<PathBuf>,

    /// Stop every prefetch of the image instead
    #[arg(long, group = "what", conflicts_with = "wait")]
    cancel: bool,

    /// Return only when it is done, and fail if something could not be fetched
    #[arg(long)]
    wait: bool,

    /// With --wait: fail after this time; the daemon goes on all the same
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    timeout: Option<u64>,

    #[command(flatten)]
    place: Place,

    /// Print how it stands as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Exit status:
  0  begun, or with --wait: everything is in the cache, durably
  1  something could not be fetched, which is named, or could not even begin
  2  wrong command line

Examples:
  rafsd prefetch /mnt --all --wait
  printf '/usr/bin/app\\n/usr/lib/libc.so.6:0+65536\\n' | rafsd prefetch /mnt --paths -";

/// Exit status: 1 if with `--wait` something could not be fetched.
pub(super) fn run(args: PrefetchArgs) -> anyhow::Result<ExitCode> {
    let target = target(&args.image)?;
    let client = args.place.client()?;
    let explain = |error| args.place.explain(error);
    if args.cancel {
        let stopped = block_on(async { client.cancel_prefetch(&target).await.map_err(explain) })?;
        if args.json {
            print_json(&stopped)?;
        } else {
            say!(io::stdout(), "{} stopped", stopped.len())?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let order = match (&args.paths, &args.trace, args.hints) {
        (Some(list), ..) => read(list)?,
        (_, Some(list), _) => read(list)?,
        (_, _, true) => PrefetchOrder::Hints,
        _ => PrefetchOrder::All,
    };
    let until = args.timeout.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let report = block_on(async {
        let report = client.prefetch(&PrefetchRequest { target, order }).await.map_err(explain)?;
        for remark in &report.remarks {
            // A closed stderr leaves nobody to tell.
            let _ = say!(io::stderr(), "rafsd: {remark}");
        }
        if !args.wait {
            return Ok(report);
        }
        let next = async |report: &PrefetchReport| Ok(client.get_prefetch(report.id).await?);
        progress::follow("fetching", report, until, |report| &report.stats, next).await
    })?;
    if args.json {
        print_json(&report)?;
    } else {
        say!(io::stdout(), "{}", summary(&report))?;
    }
    let failed = args.wait && report.stats.state != PrefetchState::Done;
    if failed && !args.json {
        for failure in report.stats.failures.iter().chain(&report.stats.trouble) {
            let _ = say!(io::stderr(), "rafsd: {failure}");
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// One line about how it stands.
fn summary(report: &PrefetchReport) -> String {
    let stats = &report.stats;
    let state = match stats.state {
        PrefetchState::Running => "under way",
        PrefetchState::Retrying => "waiting for the source",
        PrefetchState::Done => "done",
        PrefetchState::Failed => "not all could be fetched",
        PrefetchState::Cancelled => "stopped",
    };
    let (present, all) = (ByteSize(stats.bytes_present), ByteSize(stats.bytes));
    format!("{}: {state}, {present} of {all} present", report.dir.display())
}

/// An existing directory is a mount point; else the first digits of an image.
pub(super) fn target(image: &Path) -> anyhow::Result<PrefetchTarget> {
    if image.is_dir() {
        return Ok(PrefetchTarget { dir: Some(absolute(image)?), image: None });
    }
    match image.to_str().filter(|text| text.len() >= 4 && text.bytes().all(|byte| byte.is_ascii_hexdigit())) {
        Some(digits) => Ok(PrefetchTarget { dir: None, image: Some(digits.to_ascii_lowercase()) }),
        None => {
            bail!("{} is neither a mount point nor four digits or more of an image in `rafsd list`", image.display())
        }
    }
}

/// What `--prefetch=WORD` means.
pub(super) fn order(word: &Path) -> anyhow::Result<PrefetchOrder> {
    match word.to_str() {
        Some("hints") => Ok(PrefetchOrder::Hints),
        Some("all") => Ok(PrefetchOrder::All),
        Some("none") => Ok(PrefetchOrder::None),
        _ => read(word),
    }
}

fn read(path: &Path) -> anyhow::Result<PrefetchOrder> {
    let hot = hotlist::parse(&list::read("list", path, MAX_LIST)?)
        .with_context(|| format!("cannot use the list {}", path.display()))?;
    Ok(PrefetchOrder::Files(hot.into_iter().map(|hot| FileRanges::new(&hot.path, hot.ranges)).collect()))
}
