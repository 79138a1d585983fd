use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;

use super::connect::{Place, block_on};
use super::mount::sayable;
use super::prefetch::target;
use super::print_json;
use crate::daemon::api::{PrefetchTarget, TraceReport, TraceRequest, TraceResult};
use crate::daemon::client::Client;

/// Record what is read first of a mounted image, by file and by byte range
///
/// The result is a list that `rafsd optimize --paths`, `rafsd prefetch --trace` and
/// `rafsd mount --prefetch=FILE` take as it is.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct TraceArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLES: &str = "\
Reads of a blob that was complete in the cache when its image was mounted do not reach the daemon. To
record them too, mount with --trace, or use an empty cache.

Examples:
  rafsd trace start /mnt -o start.trace
  rafsd trace stop /mnt
  rafsd optimize image/bootstrap --paths start.trace -o hot/";

#[derive(Debug, Subcommand)]
enum What {
    /// Begin to record
    #[command(after_help = "Example:\n  rafsd trace start /mnt -o start.trace")]
    Start(Args),
    /// Stop, and write what was read, in the order of the first access
    #[command(after_help = "Example:\n  rafsd trace stop /mnt -o start.trace")]
    Stop(Args),
}

#[derive(Debug, clap::Args)]
struct Args {
    /// Where the image is mounted, or the first digits of its name in `rafsd list`
    #[arg(value_name = "DIR|IMAGE")]
    image: PathBuf,

    /// Where to write the list when the trace is stopped or the image unmounted [default: standard
    /// output of `rafsd trace stop`]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    #[command(flatten)]
    place: Place,

    /// Print everything that is known as JSON
    #[arg(long)]
    json: bool,
}

/// Exit status: 0 when the trace runs, or what it recorded has been written.
pub(super) fn run(args: TraceArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Start(args) => start(&args),
        What::Stop(args) => stop(&args),
    }
}

fn start(args: &Args) -> anyhow::Result<ExitCode> {
    let request = TraceRequest { target: target(&args.image)?, output: args.output.as_deref().map(place).transpose()? };
    let report = block_on(async {
        args.place.client()?.start_trace(&request).await.map_err(|error| args.place.explain(error))
    })?;
    if args.json {
        print_json(&report)?;
    } else {
        warn(&report);
    }
    Ok(ExitCode::SUCCESS)
}

fn stop(args: &Args) -> anyhow::Result<ExitCode> {
    let target = target(&args.image)?;
    let result =
        block_on(async { args.place.client()?.stop_trace(&target).await.map_err(|error| args.place.explain(error)) })?;
    let output = args.output.as_ref().or(result.report.output.as_ref());
    if let Some(output) = output {
        write(&result, output)?;
    }
    if args.json {
        print_json(&result)?;
    } else {
        warn(&result.report);
        if output.is_none() {
            write!(io::stdout(), "{}", result.list)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the trace of an image that has been unmounted, if it was asked for.
pub(super) async fn finish(client: &Client, dir: &Path) -> anyhow::Result<()> {
    let traces = client.list_traces().await?;
    if !traces.iter().any(|trace| trace.dir == dir && trace.output.is_some()) {
        return Ok(());
    }
    let result = client.stop_trace(&PrefetchTarget { dir: Some(dir.to_owned()), image: None }).await?;
    warn(&result.report);
    result.report.output.as_ref().map_or(Ok(()), |output| write(&result, output))
}

fn write(result: &TraceResult, output: &Path) -> anyhow::Result<()> {
    fs::write(output, &result.list).with_context(|| format!("cannot write the trace {}", output.display()))
}

/// What a trace does not tell, for a person.
fn warn(report: &TraceReport) {
    // A closed stderr leaves nobody to tell.
    let say = |text: String| drop(say!(io::stderr(), "rafsd: {text}"));
    for blob in &report.unseen {
        say(format!("blob {blob} is complete: the kernel reads it alone, unseen; mount with --trace to see it"));
    }
    if report.lost > 0 {
        say(format!("the trace is full: {} later reads are not in it", report.lost));
    }
}

/// An absolute path of a file that may not exist yet, in a directory that does.
pub(super) fn place(file: &Path) -> anyhow::Result<PathBuf> {
    let unusable = || format!("cannot write to {}", file.display());
    let name = file.file_name().with_context(unusable)?;
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sayable(dir.canonicalize().with_context(unusable)?.join(name))
}
