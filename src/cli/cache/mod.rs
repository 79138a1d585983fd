//! `rafsd cache`: through the daemon if one runs, else on the directory itself, under its lock.

mod text;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Subcommand;

use super::connect::{Place, block_on};
use super::print_json;
use super::progress::Bar;
use super::userdirs::user_dirs;
use crate::base::ByteSize;
use crate::build::Progress;
use crate::cache::{Shelves, StoreError, VerifyReport};
use crate::daemon::api::{CacheReport, GcRequest};
use crate::daemon::client::{Client, ClientError};
use crate::daemon::{keeper, stock};

/// See what is in the cache, check it, and make room in it
///
/// Asks the daemon. When none runs, works on the directory of the cache itself. A blob that a
/// mounted image uses is never removed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  rafsd cache list\n  rafsd cache gc --to 20GiB --dry-run")]
pub(super) struct CacheArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(ListArgs),
    Usage(UsageArgs),
    Verify(VerifyArgs),
    Gc(GcArgs),
    Pin(PinArgs),
    Drop(DropArgs),
}

/// Which cache is meant.
#[derive(Debug, clap::Args)]
struct CachePlace {
    #[command(flatten)]
    place: Place,

    /// Directory of the cache, for when no daemon runs, or not that of the daemon [default: /var/lib/rafsd]
    #[arg(long, value_name = "DIR", env = "RAFSD_CACHE")]
    cache: Option<PathBuf>,

    /// Print the facts as JSON
    #[arg(long)]
    json: bool,
}

/// List the blobs in the cache
///
/// SIZE is what a blob really takes on disk, PRESENT the part of it that was fetched.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd cache list --json")]
struct ListArgs {
    #[command(flatten)]
    cache: CachePlace,
}

/// Tell what each image takes in the cache, and what of it others share
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd cache usage")]
struct UsageArgs {
    #[command(flatten)]
    cache: CachePlace,
}

/// Read what is in the cache again, and check every byte by its digest
///
/// A spoilt unit of a blob that nobody uses is made absent, so that it is fetched again; a spoilt copy of a bootstrap
/// goes. What is in use is only told.
#[derive(Debug, clap::Args)]
#[command(after_help = VERIFY_HELP)]
struct VerifyArgs {
    /// Blobs and bootstraps to verify, or beginnings of their names [default: all]
    #[arg(value_name = "BLOB")]
    blobs: Vec<String>,

    #[command(flatten)]
    cache: CachePlace,
}

const VERIFY_HELP: &str = "\
Example:
  rafsd cache verify

Exit status: 0 if everything is sound, 1 if something was spoilt.";

/// Remove what nobody uses
///
/// Without a target, everything that no mounted image uses and that is not pinned: blobs, and
/// copies of bootstraps. The least recently used goes first.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd cache gc --to 20GiB --older-than 7d")]
struct GcArgs {
    /// Stop when so much is left
    #[arg(long, value_name = "SIZE", default_value = "0")]
    to: ByteSize,

    /// Only what was last used longer ago than this: 90s, 30m, 12h, 7d
    #[arg(long, value_name = "TIME")]
    older_than: Option<Age>,

    /// Tell what would go, and remove nothing
    #[arg(long)]
    dry_run: bool,

    #[command(flatten)]
    cache: CachePlace,
}

/// Keep a blob in the cache, whatever room is wanted
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd cache pin 9dc702c3")]
struct PinArgs {
    /// The blob, or the beginning of its name
    #[arg(value_name = "BLOB")]
    blob: String,

    /// Let it go again when room is wanted
    #[arg(long)]
    remove: bool,

    #[command(flatten)]
    cache: CachePlace,
}

/// Remove one blob from the cache; refused while it is in use or pinned
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  rafsd cache drop 9dc702c3")]
struct DropArgs {
    /// The blob, or the beginning of its name
    #[arg(value_name = "BLOB")]
    blob: String,

    #[command(flatten)]
    cache: CachePlace,
}

/// Exit status: 0, or 1 if `verify` found something spoilt.
pub(super) fn run(args: CacheArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::List(args) => args.cache.tell(&args.cache.open()?.report()?, text::list),
        Command::Usage(args) => {
            let usage = match args.cache.open()? {
                Cache::Served(client) => block_on(async { Ok(client.cache_usage().await?) })?,
                Cache::Idle(shelves) => stock::idle_usage(&shelves)?,
            };
            args.cache.tell(&usage, |out, usage| text::usage(out, usage))
        }
        Command::Verify(args) => verify(&args),
        Command::Gc(args) => {
            let older_than = args.older_than.map(|age| age.0.as_secs());
            let request = GcRequest { to: args.to.0, older_than, dry_run: args.dry_run };
            let report = match args.cache.open()? {
                Cache::Served(client) => block_on(async { Ok(client.collect(&request).await?) })?,
                Cache::Idle(shelves) => stock::collect(&shelves, &request)?,
            };
            args.cache.tell(&report, text::collected)
        }
        Command::Pin(args) => {
            let (blob, pinned) = (&args.blob, !args.remove);
            let name = match args.cache.open()? {
                Cache::Served(client) => block_on(async { Ok(client.pin(blob, pinned).await?) })?,
                Cache::Idle(shelves) => stock::pin(&shelves, blob, pinned)?,
            };
            args.cache.tell(&serde_json::json!({ "name": name, "pinned": pinned }), |out, _| {
                say!(out, "{name}: {}", if pinned { "pinned" } else { "not pinned" })
            })
        }
        Command::Drop(args) => {
            let removed = match args.cache.open()? {
                Cache::Served(client) => block_on(async { Ok(client.drop_blob(&args.blob).await?) })?,
                Cache::Idle(shelves) => stock::drop_blob(&shelves, &args.blob)?,
            };
            args.cache.tell(&removed, |out, removed| say!(out, "{}: {} freed", removed.name, ByteSize(removed.bytes)))
        }
    }
}

fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let cache = args.cache.open()?;
    let report = cache.report()?;
    let blobs = report.blobs.iter().map(|blob| (&*blob.stock.name, blob.stock.bytes));
    let bootstraps = report.bootstraps.iter().map(|bootstrap| (&*bootstrap.name, bootstrap.bytes));
    let stock: Vec<(&str, u64)> = blobs.chain(bootstraps).collect();
    let mut chosen = Vec::new();
    for asked in &args.blobs {
        let whole = stock.iter().find(|(name, _)| name == asked);
        let mut begin = stock.iter().filter(|(name, _)| name.starts_with(asked.as_str()));
        match (whole, begin.next(), begin.next()) {
            (Some(found), ..) | (None, Some(found), None) => chosen.push(*found),
            (None, None, _) => {
                bail!("neither a blob {asked} nor a bootstrap is in the cache; `rafsd cache list` shows what is")
            }
            (None, Some(_), Some(_)) => bail!("{asked} is the beginning of several names in the cache"),
        }
    }
    if args.blobs.is_empty() {
        chosen = stock;
    }
    let bar = Bar::on_terminal("Verifying");
    bar.total(chosen.len() as u64, chosen.iter().map(|(_, bytes)| bytes).sum());
    let reports = chosen.into_iter().map(|(name, _)| cache.verify(name, &bar)).collect::<anyhow::Result<Vec<_>>>()?;
    drop(bar);
    args.cache.tell(&reports, |out, reports| text::verified(out, reports))?;
    let sound = reports.iter().all(|report| report.spoilt.is_empty());
    if let Some(cut) = reports.iter().find(|report| report.cut_short) {
        bail!(
            "{} was not read to its end: the daemon is stopping, or another file has taken its place; verify it again",
            cut.name
        );
    }
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A cache, and whom to ask about it.
enum Cache {
    /// The daemon that serves from it.
    Served(Client),
    /// Nobody: its directory is ours while this lives.
    Idle(Arc<Shelves>),
}

impl Cache {
    fn report(&self) -> anyhow::Result<CacheReport> {
        match self {
            Self::Served(client) => block_on(async { Ok(client.cache().await?) }),
            Self::Idle(shelves) => Ok(stock::report(shelves)?),
        }
    }

    fn verify(&self, name: &str, bar: &Bar) -> anyhow::Result<VerifyReport> {
        match self {
            Self::Served(client) => {
                let report = block_on(async { Ok(client.verify(name).await?) })?;
                bar.advance(1, report.bytes);
                Ok(report)
            }
            Self::Idle(shelves) => Ok(stock::verify(shelves, name, &mut |bytes| {
                bar.advance(0, bytes);
                true
            })?),
        }
    }
}

impl CachePlace {
    /// The daemon's cache, or the one at the directory that was named, if it is not the daemon's
    /// or there is no daemon.
    fn open(&self) -> anyhow::Result<Cache> {
        let client = self.place.client()?;
        let real = |dir: &Path| dir.canonicalize().ok();
        match block_on(async { Ok(client.info().await) })? {
            Ok(info) if self.cache.as_deref().is_none_or(|dir| real(dir) == real(&info.cache)) => {
                return Ok(Cache::Served(client));
            }
            Ok(_) | Err(ClientError::NoDaemon { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let of_user = user_dirs().map(|dirs| dirs.cache);
        let default = of_user.as_deref().unwrap_or(Path::new("/var/lib/rafsd"));
        let dir = self.cache.as_deref().unwrap_or(default);
        match Shelves::open(dir) {
            Ok(shelves) => Ok(Cache::Idle(shelves)),
            Err(error @ StoreError::Locked { .. }) => Err(match keeper::status(&self.place.run) {
                Ok(status) => anyhow::Error::new(error).context(format!(
                    "the keepers of a daemon that is gone hold the cache, one of them is process {}; `rafsd serve` goes on with its mounts, `rafsd recover` ends them",
                    status.pid
                )),
                Err(_) => error.into(),
            }),
            Err(other) => Err(other).context("no daemon answers, and the cache cannot be used without one"),
        }
    }

    /// Prints `facts`, as JSON if that was asked for.
    fn tell<T: serde::Serialize>(
        &self,
        facts: &T,
        describe: impl FnOnce(&mut dyn std::io::Write, &T) -> std::io::Result<()>,
    ) -> anyhow::Result<ExitCode> {
        if self.json {
            print_json(facts)?;
        } else {
            describe(&mut std::io::stdout().lock(), facts)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A length of time as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Age(Duration);

impl FromStr for Age {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a length of time; write 90s, 30m, 12h or 7d");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let seconds = match &text[digits.len()..] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(seconds).map(|seconds| Self(Duration::from_secs(seconds))).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_read_as_people_write_them() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800)] {
            assert_eq!(text.parse(), Ok(Age(Duration::from_secs(seconds))), "{text}");
        }
        for bad in ["", "7", "d", "-1d", "1.5h", "1w", "99999999999999999d"] {
            assert!(bad.parse::<Age>().is_err(), "{bad}");
        }
    }
}
