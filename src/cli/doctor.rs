use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;

use super::print_json;
use super::settings::settings_for_clients;
use crate::base::Chain;
use crate::export::fuse;
use crate::export::host::{Finding, Host};
use crate::sys::sandbox;

/// Try out what this host can do, and say what is missing
///
/// Nothing is guessed from version numbers: scratch files are made in the cache directory, really
/// mounted and really read, and removed again.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct DoctorArgs {
    /// Directory of the cache; its file system matters [default: that of the config file, or /var/lib/rafsd]
    #[arg(long, value_name = "DIR", env = "RAFSD_CACHE")]
    cache: Option<PathBuf>,

    /// Config file of the daemon [default: /etc/rafsd/config.toml, if it is there]
    #[arg(long, value_name = "FILE", env = "RAFSD_CONFIG")]
    config: Option<PathBuf>,

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
    let cache = match args.cache {
        Some(cache) => cache,
        None => settings_for_clients(args.config.as_deref())?.cache,
    };
    let mut host = Host::examine(&cache, false).with_context(|| format!("cannot use {}", cache.display()))?;
    host.findings.extend([fuse_io_uring(), landlock(), seccomp()]);
    if args.json {
        print_json(&host)?;
    } else {
        let mut out = io::stdout().lock();
        say!(out, "kernel {}, cache at {} on {}", host.kernel, cache.display(), host.cache_file_system)?;
        for finding in &host.findings {
            let mark = if finding.works { "yes" } else { "no " };
            say!(out, "  {mark}  {:<20} {}", finding.name, finding.detail)?;
            if let Some(remedy) = &finding.remedy {
                say!(out, "       {:<20} -> {remedy}", "")?;
            }
        }
        match host.choice {
            Some(kind) => say!(out, "images are served by {kind}")?,
            None => say!(out, "no image can be mounted here")?,
        }
    }
    Ok(if host.choice.is_some() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether requests of FUSE can come the faster way, which the settings choose. Without it they come the usual way.
fn fuse_io_uring() -> Finding {
    let available = fuse::availability();
    let (detail, remedy) = match &available {
        Ok(()) => ("FUSE requests of new mounts can come over io_uring".to_owned(), None),
        Err(unavailable) => (Chain(unavailable).to_string(), Some(unavailable.remedy().to_owned())),
    };
    Finding { name: "fuse-io-uring".into(), works: available.is_ok(), detail, remedy }
}

/// What the sandbox of the daemon stands on. Without it images are served all the same.
fn landlock() -> Finding {
    let version = sandbox::landlock_version();
    Finding {
        name: "landlock".into(),
        works: version.is_some(),
        detail: version.map_or_else(
            || "this kernel does not confine files; the daemon says so and goes on".into(),
            |version| format!("files are confined, by version {version} of the interface"),
        ),
        remedy: version
            .is_none()
            .then(|| "use a kernel built with SECURITY_LANDLOCK, with landlock in its list of security modules".into()),
    }
}

fn seccomp() -> Finding {
    let works = sandbox::has_seccomp();
    Finding {
        name: "seccomp".into(),
        works,
        detail: if works { "system calls are filtered" } else { "system calls cannot be filtered" }.into(),
        remedy: (!works).then(|| "use a kernel built with SECCOMP_FILTER".into()),
    }
}
