use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::connect::Place;
use crate::daemon::keeper;

/// Hold descriptors for a daemon; started by it with a socket as standard input
#[derive(Debug, clap::Args)]
pub(super) struct KeeperArgs {
    /// Where to answer questions
    #[arg(long)]
    socket: PathBuf,
}

/// Exit status: 0 when nothing is left to hold.
pub(super) fn keep(args: KeeperArgs) -> anyhow::Result<ExitCode> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    keeper::keep(socket, &args.socket).context("the keeper failed")?;
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
            writeln!(out, "nothing to recover: no daemon has left anything behind")?;
            return Ok(ExitCode::SUCCESS);
        }
        other => other.context("the keeper does not answer")?,
    };
    if !status.orphaned {
        writeln!(out, "nothing to recover: the daemon is running")?;
    } else if status.alive == 0 {
        writeln!(out, "recovered: {} mount(s) ended", status.mounts.len())?;
    } else {
        let alive = status.alive;
        writeln!(out, "recovered: out of the tree; {alive} still have open files, whose cold reads now fail with EIO")?;
    }
    Ok(ExitCode::SUCCESS)
}
