use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::Serialize;

use super::print_json;
use crate::daemon::settings::nydusd::{self, Remark};
use crate::daemon::settings::read_file;

/// Turn a configuration of nydusd into one of rafsd
///
/// Reads the JSON of version 1, which nydus-snapshotter writes, and version 2 as TOML or JSON. Prints a config file
/// whose first line has the arguments of `rafsd mount`. What has no counterpart, and what to do about it, is told on
/// standard error. Secrets are not printed.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ImportArgs {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// File to write, instead of standard output; it must not exist
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Write logins and keys to this file, for its owner only, and have the result name it; it must not exist
    #[arg(long, value_name = "FILE")]
    with_credentials: Option<PathBuf>,

    /// Print the result as JSON, remarks included
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  rafsd config import-nydusd /etc/nydus/nydusd-config.json
  rafsd config import-nydusd nydusd.toml -o /etc/rafsd/config.toml --with-credentials /etc/rafsd/auth.json

Exit status: 0 if the file was understood, whatever the remarks; 1 otherwise.";

/// What `--json` prints.
#[derive(Serialize)]
struct Printed<'a> {
    /// The config file.
    config: String,
    /// Arguments of `rafsd mount`.
    mount: Vec<String>,
    remarks: &'a [Remark],
}

/// Exit status: 0 if the file was understood.
///
/// # Errors
/// It was not, or a file cannot be written.
pub(super) fn run(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let text = read_file(&args.file).with_context(|| format!("cannot read {}", args.file.display()))?;
    let imported = nydusd::import(&text);
    let mut imported = imported.with_context(|| format!("cannot use {}", args.file.display()))?;
    if let (Some(file), Some(secrets)) = (&args.with_credentials, imported.credentials()) {
        let file = std::path::absolute(file).context("cannot tell the working directory")?;
        let name = file.to_str().context("the path of --with-credentials is not UTF-8")?;
        write_new(&file, secrets.expose(), 0o600)?;
        imported.keep_credentials_in(name);
    }
    let config = imported.config();
    if let Some(out) = &args.out {
        write_new(out, &config, 0o644)?;
    }
    if args.json {
        print_json(&Printed { config, mount: imported.mount(), remarks: imported.remarks() })?;
        return Ok(ExitCode::SUCCESS);
    }
    for Remark { key, text } in imported.remarks() {
        // A closed stderr leaves nobody to tell.
        let _ = writeln!(io::stderr(), "{key}: {text}");
    }
    let printed = if args.out.is_some() { imported.command() + "\n" } else { config };
    io::stdout().write_all(printed.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a file that is not there yet.
fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.with_context(|| format!("cannot write {}", path.display()))
}
