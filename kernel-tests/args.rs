//! The command line: ours, plus tolerance for what `cargo test -- …` passes to every test program.

use std::path::PathBuf;

use crate::Backend;
use crate::machine::Machine;

/// Flags of the usual test harness that take a value, which must not be mistaken for a case's name.
const IGNORED_WITH_VALUE: &[&str] = &["--test-threads", "--format", "--color", "--logfile", "-Z", "--shuffle-seed"];

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    All,
    List,
    /// One case in this process; what [`crate::isolate`] starts.
    One {
        name: String,
        dir: PathBuf,
    },
}

/// How requests come in cases over FUSE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Dev,
    Ring,
    All,
}

impl Transport {
    /// Whether cases run that way.
    pub(crate) fn runs(self, over_ring: bool) -> bool {
        match self {
            Self::Dev => !over_ring,
            Self::Ring => over_ring,
            Self::All => true,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) mode: Mode,
    pub(crate) in_guest: bool,
    /// `None` is all of them.
    pub(crate) backend: Option<Backend>,
    /// `None` is the host, and all guests after it.
    pub(crate) machine: Option<Machine>,
    pub(crate) transport: Transport,
    names: Vec<String>,
    exact: bool,
    skips: Vec<String>,
}

impl Args {
    pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self {
            mode: Mode::All,
            in_guest: false,
            backend: None,
            machine: None,
            transport: Transport::All,
            names: vec![],
            exact: false,
            skips: vec![],
        };
        let (mut run_one, mut dir) = (None, None);
        let mut args = args;
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--list" => parsed.mode = Mode::List,
                "--in-guest" => parsed.in_guest = true,
                "--exact" => parsed.exact = true,
                "--skip" => parsed.skips.push(value()?),
                "--backend" => {
                    parsed.backend = match value()?.as_str() {
                        "fanotify" => Some(Backend::Fanotify),
                        "cachefiles" => Some(Backend::Cachefiles),
                        "fuse-device" => Some(Backend::FuseDevice),
                        "fuse-tree" => Some(Backend::FuseTree),
                        "all" => None,
                        other => {
                            let known = "fanotify, cachefiles, fuse-device, fuse-tree or all";
                            return Err(format!("unknown backend {other:?}: {known}"));
                        }
                    }
                }
                "--machine" => {
                    let wanted = value()?;
                    let found = Machine::ALL.into_iter().find(|machine| machine.name() == wanted);
                    parsed.machine = Some(found.ok_or_else(|| format!("no machine {wanted:?}: on-demand or stock"))?);
                }
                "--transport" => {
                    parsed.transport = match value()?.as_str() {
                        "dev" => Transport::Dev,
                        "io-uring" => Transport::Ring,
                        "all" => Transport::All,
                        other => return Err(format!("unknown transport {other:?}: dev, io-uring or all")),
                    }
                }
                "--run-one" => run_one = Some(value()?),
                "--dir" => dir = Some(PathBuf::from(value()?)),
                flag if IGNORED_WITH_VALUE.contains(&flag) => drop(value()?),
                flag if flag.starts_with('-') => {}
                name => parsed.names.push(name.to_owned()),
            }
        }
        if let Some(name) = run_one {
            parsed.mode = Mode::One { name, dir: dir.ok_or("--run-one needs --dir")? };
        }
        Ok(parsed)
    }

    pub(crate) fn runs(&self, backend: Backend) -> bool {
        self.backend.is_none_or(|wanted| wanted == backend)
    }

    pub(crate) fn selects(&self, name: &str) -> bool {
        let hit = |text: &String| if self.exact { name == text } else { name.contains(text.as_str()) };
        (self.names.is_empty() || self.names.iter().any(hit)) && !self.skips.iter().any(hit)
    }
}
