use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::connect::{Place, block_on};
use super::mount::absolute;
use super::print_json;
use crate::daemon::api::{Info, UpgradeRequest};
use crate::daemon::client::{Client, ClientError};
use crate::daemon::keeper;
use crate::sys::files::{InodeId, inode_id_at};

/// Replace the running daemon by this program, without unmounting anything
///
/// Reads that miss wait for the moment that it takes; reads of what is present do not even notice. If another
/// upgrade is under way, this waits for it, and does nothing more if it brought the same program.
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
/// How often it is looked for.
const PAUSE: Duration = Duration::from_millis(5);

/// What was done.
#[derive(Debug, serde::Serialize)]
struct Upgraded {
    /// Absent if the daemon had already gone when this command looked for it.
    from_version: Option<String>,
    to_version: String,
    pid: u32,
    /// Whether another upgrade, which was under way, has done it.
    by_another: bool,
    /// Milliseconds for which the new daemon had everything and answered nobody.
    takeover_ms: Option<u64>,
    /// Milliseconds until it answered on its socket.
    total_ms: u128,
}

/// Exit status: 0 when the program that was asked for serves.
pub(super) fn run(args: UpgradeArgs) -> anyhow::Result<ExitCode> {
    let program = match &args.program {
        Some(program) => absolute(program)?,
        None => std::env::current_exe().context("cannot find this program")?,
    };
    let done = block_on(Upgrade::new(&args.place, program)?.run())?;
    if args.json {
        print_json(&done)?;
    } else {
        let Upgraded { from_version, to_version, pid, by_another, total_ms, .. } = &done;
        let from = from_version.as_deref().unwrap_or("?");
        let how = if *by_another { ", brought by another upgrade," } else { "" };
        say!(io::stdout(), "{from} -> {to_version}: process {pid}{how} serves after {total_ms} ms")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One upgrade, from the moment at which it was asked for.
struct Upgrade<'a> {
    place: &'a Place,
    client: Client,
    program: PathBuf,
    began: Instant,
}

impl<'a> Upgrade<'a> {
    fn new(place: &'a Place, program: PathBuf) -> anyhow::Result<Self> {
        Ok(Self { place, client: place.client()?, program, began: Instant::now() })
    }

    async fn run(self) -> anyhow::Result<Upgraded> {
        let (turn, others) = match Turn::try_take(&self.place.run)? {
            Some(turn) => (turn, None),
            None => {
                // It may be the old daemon, the new one, or between the two.
                let seen = self.client.info().await.ok();
                (self.wait_for_turn().await?, Some(seen))
            }
        };
        let before = self.serving().await?;
        if let Some(seen) = others
            && seen.as_ref().is_none_or(|seen| seen.pid != before.pid)
            && runs(before.pid, &self.program) != Some(false)
        {
            return Ok(self.report(seen.map(|seen| seen.version), before, true));
        }
        match self.client.upgrade(&UpgradeRequest { program: self.program.clone() }).await {
            Ok(()) => {}
            // It may have heard it all the same, or be about to end for somebody else.
            Err(error) if is_between(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let after = self.another_than(before.pid).await?;
        // Others go on from here.
        drop(turn);
        ensure!(
            runs(after.pid, &self.program) != Some(false),
            "{} has ended in its start, and version {}, process {}, goes on in its place; the log of the daemon tells why",
            self.program.display(),
            after.version,
            after.pid
        );
        Ok(self.report(Some(before.version), after, false))
    }

    fn report(&self, from_version: Option<String>, now: Info, by_another: bool) -> Upgraded {
        Upgraded {
            from_version,
            to_version: now.version,
            pid: now.pid,
            by_another,
            takeover_ms: now.takeover_ms,
            total_ms: self.began.elapsed().as_millis(),
        }
    }

    async fn wait_for_turn(&self) -> anyhow::Result<Turn> {
        let began = Instant::now();
        loop {
            if let Some(turn) = Turn::try_take(&self.place.run)? {
                return Ok(turn);
            }
            ensure!(began.elapsed() < PATIENCE, "another upgrade has not come to its end; see the log of the daemon");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The daemon, which may be about to come in the place of one that has gone.
    async fn serving(&self) -> anyhow::Result<Info> {
        let began = Instant::now();
        loop {
            match self.client.info().await {
                Ok(info) => return Ok(info),
                Err(error) if is_between(&error) && self.is_awaited() && began.elapsed() < PATIENCE => {}
                Err(error) => return Err(self.place.explain(error)),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The next daemon that is not process `pid`.
    async fn another_than(&self, pid: u32) -> anyhow::Result<Info> {
        let began = Instant::now();
        loop {
            match self.client.info().await {
                Ok(info) if info.pid != pid => return Ok(info),
                Ok(_) => {}
                Err(error) if is_between(&error) && self.is_awaited() => {}
                Err(error) if is_between(&error) => bail!("the daemon has ended, and no other one is to come"),
                Err(error) => return Err(error.into()),
            }
            ensure!(began.elapsed() < PATIENCE, "no other daemon has come; see the log of the daemon");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Whether somebody holds what a daemon left, or is about to start.
    fn is_awaited(&self) -> bool {
        !keeper::statuses(&self.place.run).is_empty()
    }
}

/// Whether an error may come of one daemon's end before another one's beginning.
fn is_between(error: &ClientError) -> bool {
    match error {
        ClientError::NoDaemon { .. } | ClientError::HungUp { .. } | ClientError::Garbled { .. } => true,
        // It was there, and then it was not, or the other way round.
        ClientError::Unusable { .. } => true,
        ClientError::NotAllowed { .. } | ClientError::Silent { .. } | ClientError::Refused(_) => false,
    }
}

/// Whether process `pid` runs the file `program`; `None` if that cannot be seen from here.
fn runs(pid: u32, program: &Path) -> Option<bool> {
    let inode = |path: &Path| -> Option<InodeId> { inode_id_at(path).ok() };
    let exe = Path::new("/proc").join(pid.to_string()).join("exe");
    Some(inode(&exe)? == inode(program)?)
}

/// The right to upgrade the daemon of one run directory. One process at a time has it; it goes with the process.
struct Turn(#[expect(dead_code, reason = "held for its lock")] Option<File>);

impl Turn {
    /// `None` if another process has it.
    fn try_take(run: &Path) -> anyhow::Result<Option<Self>> {
        let dir = match File::open(run) {
            // Then no daemon is there either, which is better said.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(Self(None))),
            opened => opened.with_context(|| format!("cannot use {}", run.display()))?,
        };
        match dir.try_lock() {
            Ok(()) => Ok(Some(Self(Some(dir)))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("cannot lock {}", run.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_the_turn() {
        let dir = tempfile::tempdir().unwrap();
        let turn = Turn::try_take(dir.path()).unwrap();
        assert!(turn.is_some() && Turn::try_take(dir.path()).unwrap().is_none());

        drop(turn);

        assert!(Turn::try_take(dir.path()).unwrap().is_some());
    }

    #[test]
    fn a_process_is_known_by_its_program() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(runs(std::process::id(), &own), Some(true));
        assert_eq!(runs(std::process::id(), Path::new("/bin/sh")), Some(false));
        assert_eq!(runs(u32::MAX, &own), None);
    }
}
