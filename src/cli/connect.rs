//! Finding the daemon, or starting one.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::builder::OsStringValueParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command, FromArgMatches};

use super::settings;
use super::userdirs::ensure_own;
use crate::daemon::client::{Client, ClientError};
use crate::daemon::keeper;
use crate::sys::service;

/// Which daemon is meant: the one whose sockets are where a flag, the environment or the config
/// file says.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Directory of the daemon's sockets.
    pub(super) run: PathBuf,
    /// The config file, where somebody names one.
    config: Option<PathBuf>,
}

impl clap::Args for Place {
    fn augment_args(command: Command) -> Command {
        let run = Arg::new("run")
            .long("run")
            .value_name("DIR")
            .env("RAFSD_RUN")
            .value_parser(OsStringValueParser::new())
            .help("Directory of the daemon's sockets [default: that of the config file, or /run/rafsd]");
        command.arg(run).arg(settings::config_arg())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Place {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let config = settings::config_of(matches);
        let run = match matches.get_one::<OsString>("run") {
            Some(run) => PathBuf::from(run),
            None => {
                let settings = settings::settings_for_clients(config.as_deref());
                settings.map_err(|error| clap::Error::raw(ErrorKind::Io, format!("{error:#}")))?.run
            }
        };
        Ok(Self { run, config })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A daemon that is started if it does not run.
#[derive(Debug, clap::Args)]
pub(super) struct DaemonArgs {
    /// Directory of the cache, for a daemon that is started now [default: that of the config file, or /var/lib/rafsd]
    #[arg(long, value_name = "DIR", env = "RAFSD_CACHE")]
    cache: Option<PathBuf>,

    #[command(flatten)]
    place: Place,
}

impl DaemonArgs {
    /// A client of a daemon that answers.
    pub(super) async fn connect(&self) -> anyhow::Result<Client> {
        self.place.connect_or_start(self.cache.as_deref()).await
    }
}

/// How long a started daemon may take to answer: trying out a host takes under a second, waiting
/// for a predecessor to leave the cache some more.
const PATIENCE: Duration = Duration::from_secs(20);

impl Place {
    /// A client, whether or not anybody answers.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        Client::new(&self.run).context("cannot set up the client")
    }

    /// Adds to "no daemon answers" what can be done about it.
    pub(super) fn explain(&self, error: ClientError) -> anyhow::Error {
        let orphaned = matches!(error, ClientError::NoDaemon { .. }) && keeper::status(&self.run).is_ok();
        let error = anyhow::Error::new(error);
        if orphaned {
            return error.context(
                "the daemon has vanished and its readers wait; `rafsd serve` takes over, `rafsd recover` ends the mounts",
            );
        }
        error
    }

    /// A client of a daemon that answers, started now if there is none. A started daemon leaves
    /// when it has had nothing to serve for a while.
    async fn connect_or_start(&self, cache: Option<&Path>) -> anyhow::Result<Client> {
        if self.run.symlink_metadata().is_ok() {
            ensure_own(&self.run)?;
        }
        let client = self.client()?;
        match client.info().await {
            Ok(info) => {
                if let Some(asked) = cache
                    && fs::canonicalize(asked).ok() != fs::canonicalize(&info.cache).ok()
                {
                    let has = info.cache.display();
                    bail!(
                        "the running daemon has its cache at {has}, not {}; leave --cache out, or give another --run",
                        asked.display()
                    );
                }
                return Ok(client);
            }
            Err(ClientError::NoDaemon { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let (mut child, log) = self.start(cache)?;
        let until = Instant::now() + PATIENCE;
        while client.info().await.is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("the daemon did not start ({status}): {}", log.last_lines());
            }
            if Instant::now() > until {
                bail!("the daemon does not answer; see {}", log.path.display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(client)
    }

    fn start(&self, cache: Option<&Path>) -> anyhow::Result<(Child, Log)> {
        let run = self.run.display();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.run)
            .with_context(|| format!("cannot create {run}"))?;
        ensure_own(&self.run)?;
        // The daemon works in another directory.
        let run = self.run.canonicalize().with_context(|| format!("cannot use {run}"))?;
        let cache = cache.map(std::path::absolute).transpose().context("cannot tell the working directory")?;
        let path = run.join("rafsd.log");
        let (log, output) = Log::open(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = process::Command::new(program);
        command.arg("serve").arg("--detached").arg("--run").arg(run);
        // Whoever mounts may be a service; what it starts here is not.
        for name in service::VARIABLES {
            command.env_remove(name);
        }
        if let Some(config) = &self.config {
            let config = config.canonicalize().with_context(|| format!("cannot use {}", config.display()))?;
            command.arg("--config").arg(config);
        }
        if let Some(cache) = cache {
            command.arg("--cache").arg(cache);
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok((command.spawn().context("cannot start the daemon")?, log))
    }
}

/// Where a started daemon logs. Daemons that are started one after the other, or at once, share it.
struct Log {
    path: PathBuf,
    /// Length when this daemon was started.
    start: u64,
}

impl Log {
    /// A longer log is put aside, where the next one to be put aside replaces it.
    const LIMIT: u64 = 4 << 20;

    fn open(path: &Path) -> io::Result<(Self, File)> {
        if fs::metadata(path).is_ok_and(|meta| meta.len() > Self::LIMIT) {
            fs::rename(path, path.with_extension("log.old"))?;
        }
        let file = File::options().create(true).append(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
        let start = file.metadata()?.len();
        Ok((Self { path: path.to_owned(), start }, file))
    }

    /// The last lines since the start.
    fn last_lines(&self) -> String {
        let read = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.start))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            io::Result::Ok(bytes)
        };
        let text = read().map_or_else(|e| e.to_string(), |bytes| String::from_utf8_lossy(&bytes).into_owned());
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(3)..].join("; ")
    }
}

/// A runtime for one command.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_log_keeps_what_was_there_and_tells_only_of_this_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rafsd.log");
        fs::write(&path, "an older daemon\n").unwrap();

        let (log, mut file) = Log::open(&path).unwrap();
        file.write_all(b"one\ntwo\nthree\nfour\n").unwrap();

        assert_eq!(log.last_lines(), "two; three; four");
        assert!(fs::read_to_string(&path).unwrap().starts_with("an older daemon\none\n"));
    }

    #[test]
    fn a_log_that_grew_long_is_put_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rafsd.log");
        File::create(&path).unwrap().set_len(Log::LIMIT + 1).unwrap();

        let (_, file) = Log::open(&path).unwrap();

        assert_eq!(file.metadata().unwrap().len(), 0);
        assert_eq!(fs::metadata(dir.path().join("rafsd.log.old")).unwrap().len(), Log::LIMIT + 1);
    }
}
