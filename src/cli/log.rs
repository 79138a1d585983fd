use std::io::{self, Write};
use std::process::ExitCode;

use super::connect::{Place, block_on};
use crate::daemon::api::observe::LogRules;

/// Show or change how much the running daemon logs
///
/// Holds until the daemon ends. Each line about a read has the read's number in the field `request`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd log debug\n  rafsd log info,rafsd::cache=debug")]
pub(super) struct LogArgs {
    /// error, warn, info, debug, trace, off, or rules like info,rafsd::cache=debug; shows the rules if left out
    #[arg(value_name = "LEVEL")]
    level: Option<String>,

    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when the daemon logs as wanted.
pub(super) fn run(args: LogArgs) -> anyhow::Result<ExitCode> {
    let rules = block_on(async {
        let client = args.place.client()?;
        let answer = match args.level {
            Some(level) => client.set_log_rules(&LogRules { level }).await,
            None => client.log_rules().await,
        };
        answer.map_err(|e| args.place.explain(e))
    })?;
    say!(io::stdout(), "{}", rules.level)?;
    Ok(ExitCode::SUCCESS)
}
