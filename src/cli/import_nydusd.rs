use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::Serialize;

use super::print_json;
use crate::base::Secret;
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
    let absolute = |path: &PathBuf| std::path::absolute(path).context("cannot tell the working directory");
    let out = args.out.as_ref().map(absolute).transpose()?;
    let auth = args.with_credentials.as_ref().map(absolute).transpose()?;
    if out.is_some() && out == auth {
        bail!("--out and --with-credentials name the same file; the secrets need one of their own");
    }
    let secrets = auth.zip(imported.credentials());
    // Both are there before anything is in one of them, and neither if the other cannot be.
    let mut made = Vec::new();
    if let Some((auth, secrets)) = secrets {
        imported.keep_credentials_in(auth.to_str().context("the path of --with-credentials is not UTF-8")?);
        made.push((NewFile::create(auth, 0o600)?, secrets));
    }
    let config = imported.config();
    if let Some(out) = out {
        made.push((NewFile::create(out, 0o644)?, Secret::new(config.as_str())));
    }
    made.iter_mut().try_for_each(|(file, text)| file.write(text.expose()))?;
    made.into_iter().for_each(|(file, _)| file.keep());
    if args.json {
        print_json(&Printed { config, mount: imported.mount(), remarks: imported.remarks() })?;
        return Ok(ExitCode::SUCCESS);
    }
    for Remark { key, text } in imported.remarks() {
        // A closed stderr leaves nobody to tell.
        let _ = say!(io::stderr(), "{key}: {text}");
    }
    let printed = if args.out.is_some() { imported.command() + "\n" } else { config };
    io::stdout().write_all(printed.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

/// A file that was not there before, and is not there any more when it is dropped without [`NewFile::keep`].
struct NewFile {
    path: PathBuf,
    file: File,
    is_kept: bool,
}

impl NewFile {
    fn create(path: PathBuf, mode: u32) -> anyhow::Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path);
        let file = file.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, file, is_kept: false })
    }

    fn write(&mut self, text: &str) -> anyhow::Result<()> {
        self.file.write_all(text.as_bytes()).with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_kept {
            // The error that led here is told.
            let _ = fs::remove_file(&self.path);
        }
    }
}
