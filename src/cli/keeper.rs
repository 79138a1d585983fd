use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;

use super::connect::Place;
use crate::daemon::keeper::{self, Orders};
use crate::sys::spawn::Prepared;
use crate::telemetry::logging::Format;

/// Hold descriptors for a daemon; started by it with a socket as standard input
#[derive(Debug, clap::Args)]
pub(super) struct KeeperArgs {
    /// Directory of the sockets
    #[arg(long)]
    run: PathBuf,

    /// 0, or 1 for the one that steps back while the other lives
    #[arg(long)]
    rank: usize,

    /// Milliseconds that readers wait for a successor of a daemon that vanished
    #[arg(long)]
    patience: u64,

    /// Do without a sandbox
    #[arg(long)]
    no_sandbox: bool,

    /// Command line of a daemon to start when one vanishes
    #[arg(last = true)]
    successor: Vec<OsString>,
}

/// Exit status: 0 when nothing is left to hold.
pub(super) fn keep(args: KeeperArgs, log_format: Format) -> anyhow::Result<ExitCode> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    // A successor inherits standard input.
    let nothing = File::open("/dev/null").context("cannot open /dev/null")?;
    nix::unistd::dup2_stdin(nothing).context("cannot leave standard input")?;
    let successor = if args.successor.is_empty() { None } else { Some(Prepared::new(args.successor)?) };
    let patience = Duration::from_millis(args.patience);
    let sandbox = !args.no_sandbox;
    let orders = Orders { run: args.run, rank: args.rank, patience, successor, sandbox, log_format };
    keeper::keep(socket, orders).context("the keeper failed")?;
    Ok(ExitCode::SUCCESS)
}

/// End the mounts of a daemon that was killed
///
/// When a daemon dies, readers of its mounts wait instead of seeing zeros. This takes those mounts
/// out of the tree and lets the waiting reads fail with EIO.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd recover")]
pub(super) struct RecoverArgs {
    #[command(flatten)]
    place: Place,
}

/// Exit status: 0 when no mount of a dead daemon is left in the tree.
pub(super) fn recover(args: RecoverArgs) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    let status = match keeper::recover(&args.place.run) {
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            say!(out, "nothing to recover: no daemon has left anything behind")?;
            return Ok(ExitCode::SUCCESS);
        }
        other => other.context("the keeper does not answer")?,
    };
    if !status.orphaned {
        say!(out, "nothing to recover: the daemon is running")?;
    } else if status.alive == 0 {
        say!(out, "recovered: all mounts of the dead daemon have ended")?;
    } else {
        let alive = status.alive;
        say!(out, "recovered: out of the tree; {alive} still have open files, whose cold reads now fail with EIO")?;
    }
    Ok(ExitCode::SUCCESS)
}
