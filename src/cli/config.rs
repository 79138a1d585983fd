use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use super::settings::{SettingsArgs, file_text, stray_variables, wrong_values};
use super::{import_nydusd, print_json};
use crate::daemon::settings::{self, Origin, Raw, Resolved, TABLE};
use crate::sys::memory;

/// Check or print the settings of the daemon
///
/// docs/CONFIG.md lists them.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct ConfigArgs {
    #[command(subcommand)]
    what: What,
}

const EXAMPLE: &str = "\
Examples:
  rafsd config check /etc/rafsd/config.toml
  rafsd config print
  rafsd config print --defaults
  rafsd config import-nydusd /etc/nydus/nydusd-config.json";

#[derive(Debug, clap::Subcommand)]
enum What {
    Check(CheckArgs),
    Print(PrintArgs),
    ImportNydusd(import_nydusd::ImportArgs),
}

/// Tell everything that is wrong in a config file, and in the environment
#[derive(Debug, clap::Args)]
struct CheckArgs {
    /// The file
    #[arg(value_name = "FILE", default_value = settings::DEFAULT_FILE)]
    file: PathBuf,
}

/// Print the settings and where each comes from, as a config file
#[derive(Debug, clap::Args)]
struct PrintArgs {
    /// What `rafsd serve` would use with these flags, this environment and this file (the default)
    #[arg(long)]
    effective: bool,

    /// The defaults, with what they mean
    #[arg(long, conflicts_with = "effective")]
    defaults: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    settings: SettingsArgs,
}

/// Exit status: 1 if the file or the environment has mistakes or the settings cannot be used.
pub(super) fn run(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    match args.what {
        What::Check(args) => check(&args),
        What::Print(args) => print(&args).map(|()| ExitCode::SUCCESS),
        What::ImportNydusd(args) => import_nydusd::run(&args),
    }
}

fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let text = settings::read_file(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    let path = std::path::absolute(&args.file).context("cannot tell the working directory")?;
    let resolved = settings::resolve(Some(file_text(&path, &text)), &[]);
    let mut out = io::stdout().lock();
    let around = [wrong_values(), stray_variables()].concat();
    for mistake in &around {
        say!(out, "{mistake}")?;
    }
    if resolved.mistakes.is_empty() && around.is_empty() {
        let set = resolved.origins.iter().filter(|origin| **origin == Origin::File).count();
        let registries = match resolved.settings.registries.len() {
            0 => String::new(),
            1 => ", 1 registry".to_owned(),
            count => format!(", {count} registries"),
        };
        let hosts = match resolved.settings.host_limits.len() {
            0 => String::new(),
            1 => ", limits of 1 host".to_owned(),
            count => format!(", limits of {count} hosts"),
        };
        say!(out, "{}: {set} settings{registries}{hosts}, no mistakes", args.file.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    for mistake in &resolved.mistakes {
        say!(out, "{}: {mistake}", args.file.display())?;
    }
    Ok(ExitCode::FAILURE)
}

fn print(args: &PrintArgs) -> anyhow::Result<()> {
    let (mut resolved, file) =
        if args.defaults { (settings::resolve(None, &[]), None) } else { args.settings.resolve()? };
    if !args.defaults {
        resolved.fit_memory(memory::limit());
    }
    if args.json {
        return print_json(&Printed::new(&resolved, file));
    }
    let mut out = io::stdout().lock();
    if let Some(file) = file {
        say!(out, "# file: {}", file.display())?;
    }
    for (setting, origin) in TABLE.iter().zip(&resolved.origins) {
        let value = setting.field.show(&resolved.settings).toml();
        if args.defaults {
            writeln!(out, "# {}\n{} = {value}\n", setting.help, setting.key)?;
        } else {
            writeln!(out, "{:<40} # {origin}", format!("{} = {value}", setting.key))?;
        }
    }
    // Only the file has them. Headers may hold logins, which are for nobody who reads this.
    write!(out, "{}{}", resolved.settings.registries.written(), resolved.settings.host_limits.written())?;
    Ok(())
}

/// What `--json` prints.
#[derive(Serialize)]
struct Printed {
    /// The config file that was read.
    file: Option<PathBuf>,
    settings: BTreeMap<&'static str, PrintedSetting>,
    /// Hosts of registries, which only the file tells of.
    registries: serde_json::Value,
    /// Limits of hosts, likewise.
    hosts: serde_json::Value,
}

#[derive(Serialize)]
struct PrintedSetting {
    value: serde_json::Value,
    origin: Origin,
}

impl Printed {
    fn new(resolved: &Resolved, file: Option<PathBuf>) -> Self {
        let settings = TABLE.iter().zip(&resolved.origins).map(|(setting, origin)| {
            let value = match setting.field.show(&resolved.settings) {
                Raw::Text(text) => text.into(),
                Raw::Whole(number) => number.into(),
                Raw::Switch(on) => on.into(),
                Raw::Items(items) => items.into(),
            };
            (setting.key, PrintedSetting { value, origin: *origin })
        });
        let (registries, hosts) = (resolved.settings.registries.printed(), resolved.settings.host_limits.printed());
        Self { file, settings: settings.collect(), registries, hosts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use crate::daemon::settings::{ConfigText, Settings, read_text};

    #[test]
    fn what_is_printed_is_read_as_the_same_settings() {
        let text = "cache = \"/a \\\"b\\\\ \\u007f\"\nsandbox_read = [\"/srv\", \"/x\"]\nsandbox = false\nfetches = 3\n\
                    exit_when_idle = \"90s\"\nbackend = [\"fanotify\"]\ngap = 1000\n\
                    [registry.\"docker.io\".host.\"m.example\"]\nca = \"a.pem\"\n[registry._default.rafsd]\nconcurrency = 2\n";
        let file = |text| ConfigText { text, dir: Path::new("/etc/rafsd") };
        let resolved = settings::resolve(Some(file(text)), &[]);
        assert_eq!(resolved.mistakes, []);

        let lines = TABLE
            .iter()
            .map(|setting| format!("{} = {}\n", setting.key, setting.field.show(&resolved.settings).toml()));
        let mut again = Settings::default();
        let tables = resolved.settings.registries.written() + &resolved.settings.host_limits.written();
        let printed = lines.collect::<String>() + &tables;
        let (keys, mistakes) = read_text(file(&printed), &mut again);

        assert_eq!((mistakes, keys.len()), (vec![], TABLE.len()));
        assert_eq!(again, resolved.settings);
    }
}
