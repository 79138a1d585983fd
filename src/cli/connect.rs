//! Finding the daemon, or starting one.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::daemon::client::{Client, ClientError};
use crate::daemon::keeper;

/// Which daemon is meant.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Place {
    /// Directory of the daemon's sockets
    #[arg(long, value_name = "DIR", env = "RAFSD_RUN", default_value = "/run/rafsd")]
    pub(super) run: PathBuf,
}

/// A daemon that is started if it does not run.
#[derive(Debug, clap::Args)]
pub(super) struct DaemonArgs {
    /// Directory of the cache, for a daemon that is started now [default: /var/lib/rafsd]
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
        let orphaned = matches!(error, ClientError::NoDaemon { .. }) && keeper::ask(&self.run, "status").is_ok();
        let error = anyhow::Error::new(error);
        if orphaned {
            return error.context("the daemon has vanished and its readers wait; `rafsd recover` ends that");
        }
        error
    }

    /// A client of a daemon that answers, started now if there is none. A started daemon leaves
    /// when it has had nothing to serve for a while.
    async fn connect_or_start(&self, cache: Option<&Path>) -> anyhow::Result<Client> {
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
        let log = self.run.join("rafsd.log");
        let mut child = self.start(cache, &log)?;
        let until = Instant::now() + PATIENCE;
        while client.info().await.is_err() {
            if let Some(status) = child.try_wait()? {
                bail!("the daemon did not start ({status}): {}", last_lines(&log));
            }
            if Instant::now() > until {
                bail!("the daemon does not answer; see {}", log.display());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(client)
    }

    fn start(&self, cache: Option<&Path>, log: &Path) -> anyhow::Result<Child> {
        let run = self.run.display();
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.run)
            .with_context(|| format!("cannot create {run}"))?;
        let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let mut command = Command::new(program);
        command.arg("serve").arg("--detached").arg("--run").arg(&self.run);
        command.args(["--exit-when-idle", "10"]);
        if let Some(cache) = cache {
            command.arg("--cache").arg(cache);
        }
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        command.spawn().context("cannot start the daemon")
    }
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(3)..].join("; ")
}

/// A runtime for one command.
pub(super) fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}
