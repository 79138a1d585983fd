use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::connect::{Place, block_on};
use super::print_json;
use crate::daemon::api::UpgradeRequest;

/// Replace the running daemon by this program, without unmounting anything
///
/// Reads that miss wait for the moment that it takes; reads of what is present do not even notice.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd upgrade")]
pub(super) struct UpgradeArgs {
    /// The program to go on with [default: this one]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,

    #[command(flatten)]
    place: Place,

    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

/// How long a successor may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was done.
#[derive(Debug, serde::Serialize)]
struct Upgraded {
    from_version: String,
    to_version: String,
    pid: u32,
    /// Milliseconds for which the new daemon had everything and answered nobody.
    takeover_ms: Option<u64>,
    /// Milliseconds until it answered on its socket.
    total_ms: u128,
}

/// Exit status: 0 when another daemon serves.
pub(super) fn run(args: UpgradeArgs) -> anyhow::Result<ExitCode> {
    let program = match &args.program {
        Some(program) => program.canonicalize().with_context(|| format!("cannot use {}", program.display()))?,
        None => std::env::current_exe().context("cannot find this program")?,
    };
    let done = block_on(async {
        let client = args.place.client()?;
        let before = client.info().await.map_err(|e| args.place.explain(e))?;
        let began = Instant::now();
        client.upgrade(&UpgradeRequest { program }).await?;
        loop {
            if let Ok(now) = client.info().await
                && now.pid != before.pid
            {
                return anyhow::Ok(Upgraded {
                    from_version: before.version,
                    to_version: now.version,
                    pid: now.pid,
                    takeover_ms: now.takeover_ms,
                    total_ms: began.elapsed().as_millis(),
                });
            }
            ensure!(began.elapsed() < PATIENCE, "no other daemon has come; see the log of the daemon");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })?;
    if args.json {
        print_json(&done)?;
    } else {
        let Upgraded { from_version, to_version, pid, total_ms, .. } = &done;
        writeln!(io::stdout(), "{from_version} -> {to_version}: process {pid} serves after {total_ms} ms")?;
    }
    Ok(ExitCode::SUCCESS)
}
