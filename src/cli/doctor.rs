use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::print_json;
use crate::export::host::Host;

/// Try out what this host can do, and say what is missing
///
/// Nothing is guessed from version numbers: scratch files are made in the cache directory, really
/// mounted and really read, and removed again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct DoctorArgs {
    /// Directory of the cache; its file system matters
    #[arg(long, value_name = "DIR", env = "RAFSD_CACHE", default_value = "/var/lib/rafsd")]
    cache: PathBuf,

    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
Example:
  rafsd doctor --cache /var/lib/rafsd

Exit status: 0 if images can be mounted here, 1 if not.";

/// Exit status: 0 if images can be mounted here, 1 if not.
pub(super) fn run(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let host = Host::examine(&args.cache, false).with_context(|| format!("cannot use {}", args.cache.display()))?;
    if args.json {
        print_json(&host)?;
    } else {
        let mut out = io::stdout().lock();
        writeln!(out, "kernel {}, cache at {} on {}", host.kernel, args.cache.display(), host.cache_file_system)?;
        for finding in &host.findings {
            let mark = if finding.works { "yes" } else { "no " };
            writeln!(out, "  {mark}  {:<20} {}", finding.name, finding.detail)?;
            if let Some(remedy) = &finding.remedy {
                writeln!(out, "       {:<20} -> {remedy}", "")?;
            }
        }
        match host.choice {
            Some(kind) => writeln!(out, "images are served by {kind}")?,
            None => writeln!(out, "no image can be mounted here")?,
        }
    }
    Ok(if host.choice.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
