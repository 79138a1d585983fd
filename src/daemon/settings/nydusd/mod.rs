//! A configuration of nydusd, carried over: what it says becomes settings, tables of registries and arguments of a
//! mount, and what has no counterpart is told by name.
//!
//! Both generations are read: JSON of version 1, which nydus-snapshotter writes, and version 2, as TOML or JSON. As
//! nydusd does, a file is taken for the second if it says `version = 2`. Unknown keys are no mistake to nydusd, so
//! they are told of and nothing else. Secrets never get into anything that is made here, but for what [`Imported::credentials`] gives.

mod backend;
mod behaviour;
mod table;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde_json::json;
use toml::de::{DeTable, DeValue};

use self::table::Table;
use super::{Raw, Setting, Settings};
use crate::base::{Secret, toml_json};
use crate::net::hosts::Registries;

/// Why a file is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    #[error("it is neither JSON (line {}, column {}) nor TOML (line {toml})", json.0, json.1)]
    Syntax { json: (usize, usize), toml: usize },
    #[error("it is no configuration of nydusd: it has neither `version = 2` nor the `device` of version 1")]
    NotNydusd,
    #[error("version {0} is not known; 1 and 2 are")]
    Version(String),
    #[error("{key} is missing")]
    Missing { key: String },
    #[error("{key} must be {wanted}")]
    Kind { key: String, wanted: &'static str },
    #[error("{key} is no backend that nydusd has: it has {known}")]
    Backend { key: String, known: &'static str },
    #[error("{key} is no cache that nydusd has: it has blobcache, filecache, fscache and dummycache")]
    Cache { key: String },
}

/// A setting that was not carried over as it was.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Remark {
    /// Its whole name in the file.
    pub key: String,
    /// What to do instead, or why there is nothing to do.
    pub text: String,
}

/// The secrets of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Credentials {
    /// For a registry and the repositories below a path of it: base64 of `USER:PASSWORD`, or a token.
    Registry { place: String, entry: &'static str, secret: Secret },
    /// For a bucket.
    Keys { id: Secret, secret: Secret },
}

/// What a file means here.
#[derive(Debug, Default)]
pub struct Imported {
    /// Rows of the table of settings, in the order in which they were met.
    keys: Vec<&'static str>,
    settings: Settings,
    registries: Registries,
    /// Where blobs are, the first place to be asked first.
    blobs: Vec<String>,
    ca: Option<PathBuf>,
    prefetch: Option<&'static str>,
    credentials: Option<Credentials>,
    /// The key whose remark is about them.
    secret: Option<String>,
    remarks: Vec<Remark>,
}

/// Reads a file.
///
/// # Errors
/// nydusd would not take it either, or a value has no meaning.
pub fn import(text: &str) -> Result<Imported, ImportError> {
    let mut root = Table::root(parse(text)?)?;
    let mut imported = Imported::default();
    match root.version()? {
        2 => imported.version_2(&mut root)?,
        _ => imported.version_1(&mut root)?,
    }
    imported.unknown(root);
    Ok(imported)
}

fn parse(text: &str) -> Result<serde_json::Value, ImportError> {
    let json = match serde_json::from_str(text) {
        Ok(value) => return Ok(value),
        Err(error) => (error.line(), error.column()),
    };
    match DeTable::parse(text) {
        Ok(table) => Ok(toml_json(&DeValue::Table(table.into_inner()))),
        Err(error) => {
            let at = error.span().map_or(0, |span| span.start);
            let toml = 1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count();
            Err(ImportError::Syntax { json, toml })
        }
    }
}

impl Table {
    fn version(&mut self) -> Result<u64, ImportError> {
        if self.has("device") && !self.says("version", 2) {
            // To nydusd, a key that version 1 does not know, whatever it says.
            self.drop("version");
            return Ok(1);
        }
        match self.number("version")? {
            Some(2) => Ok(2),
            None => Err(ImportError::NotNydusd),
            Some(other) => Err(ImportError::Version(other.to_string())),
        }
    }
}

impl Imported {
    fn version_1(&mut self, root: &mut Table) -> Result<(), ImportError> {
        let mut device = root.table("device")?;
        self.id(&mut device);
        let mut backend = device.table("backend")?;
        let kind = backend.required("type")?;
        let mut config = backend.table("config")?;
        self.backend(&backend.full("type"), &kind, &mut config, false)?;
        self.unknown(config);
        self.unknown(backend);
        self.external(&mut device);
        let mut cache = device.table("cache")?;
        self.cache_of_1(&mut cache)?;
        self.unknown(cache);
        self.dropped(&mut device, "deduplication", "nydusd has done nothing with it for long; equal chunks in the cache are copied instead of fetched here anyway");
        self.unknown(device);
        self.files_of(root, "amplify_io", "digest_validate")?;
        let mut prefetch = root.table("fs_prefetch")?;
        self.prefetch(&mut prefetch, &behaviour::PREFETCH_1, true)?;
        self.unknown(prefetch);
        self.dropped(
            root,
            "warmup",
            "nydusd does nothing with it; `rafsd pull` or `rafsd prefetch` fetches ahead of a start",
        );
        self.dropped(
            root,
            "id_mapping",
            "ids are not mapped; a container runtime can mount what is mounted here with mapped ids",
        );
        Ok(())
    }

    fn version_2(&mut self, root: &mut Table) -> Result<(), ImportError> {
        self.id(root);
        match root.optional("backend")? {
            Some(mut backend) => {
                let kind = backend.required("type")?;
                let mut config = backend.table(&kind)?;
                self.backend(&backend.full("type"), &kind, &mut config, true)?;
                self.unknown(config);
                for other in backend.rest() {
                    self.remark(other, "nydusd does not look at it: another backend is chosen");
                }
            }
            None => self.remark("backend", "there is none; `--blobs` must say where the blobs are"),
        }
        self.external(root);
        let mut cache = root.table("cache")?;
        let of_cache = cache.table("prefetch")?;
        self.cache_of_2(&mut cache)?;
        self.unknown(cache);
        let mut rafs = root.table("rafs")?;
        self.files_of(&mut rafs, "batch_size", "validate")?;
        let of_files = rafs.table("prefetch")?;
        self.unknown(rafs);
        // That of the files goes before that of the cache, which is a copy of it where it is off.
        let is_of_cache = of_cache.is_on("enable") && !of_files.is_on("enable");
        let (mut used, mut other) = if is_of_cache { (of_cache, of_files) } else { (of_files, of_cache) };
        self.prefetch(&mut used, &behaviour::PREFETCH_2, false)?;
        self.unknown(used);
        if !other.is_on("enable") {
            other.drop("enable");
        }
        for key in other.rest() {
            self.remark(key, "there is one prefetch here, and the other table of it was taken");
        }
        self.dropped(root, "overlay", "mounts are read-only; put overlayfs over them for a writable view");
        Ok(())
    }

    fn id(&mut self, table: &mut Table) {
        self.dropped(table, "id", "images are told apart by their contents, and metrics by mounts");
    }

    fn external(&mut self, table: &mut Table) {
        self.dropped(
            table,
            "external_backends",
            "give `--blobs` several times: each place is asked for what those before it do not have",
        );
    }

    /// Takes a setting of ours, unless it is out of the range that is accepted here.
    fn set(&mut self, of: &str, key: &'static str, value: Raw) {
        let Some(setting) = Setting::named(key) else { return };
        let mut changed = self.settings.clone();
        let taken = setting.field.set(&mut changed, &value).and_then(|()| setting.field.ensure_absolute(&changed));
        match taken {
            Ok(()) => {
                self.settings = changed;
                if !self.keys.contains(&key) {
                    self.keys.push(key);
                }
            }
            Err(error) => self.remark(of, format!("left at the default of {key} ({}): {error}", setting.default)),
        }
    }

    fn remark(&mut self, key: impl Into<String>, text: impl Into<String>) {
        self.remarks.push(Remark { key: key.into(), text: text.into() });
    }

    /// Remarks upon a key if it is there and says something.
    fn dropped(&mut self, table: &mut Table, key: &str, text: &str) {
        if table.drop(key) {
            self.remark(table.full(key), text);
        }
    }

    fn unknown(&mut self, table: Table) {
        for key in table.rest() {
            self.remark(key, "nydusd does not know it either and passes over it");
        }
    }

    /// What was not carried over as it was.
    pub fn remarks(&self) -> &[Remark] {
        &self.remarks
    }

    /// The text of a file with the secrets, if there are any, in the form in which they are looked for here: a
    /// `config.json` of docker, or lines of keys.
    pub fn credentials(&self) -> Option<Secret> {
        let text = match self.credentials.as_ref()? {
            Credentials::Registry { place, entry, secret } => {
                format!("{:#}\n", json!({"auths": {place: {*entry: secret.expose()}}}))
            }
            Credentials::Keys { id, secret } => {
                format!("aws_access_key_id = {}\naws_secret_access_key = {}\n", id.expose(), secret.expose())
            }
        };
        Some(Secret::new(text))
    }

    /// Says that the secrets are in `file`, an absolute path, and does not remark upon them any more.
    pub fn keep_credentials_in(&mut self, file: &str) {
        match &self.credentials {
            None => return,
            Some(Credentials::Registry { .. }) => self.set("auth", "docker_config", Raw::Text(file.to_owned())),
            Some(Credentials::Keys { .. }) => {
                for spec in &mut self.blobs {
                    let sign = if spec.contains('?') { '&' } else { '?' };
                    *spec += &format!("{sign}credentials={}", backend::quoted(file));
                }
            }
        }
        self.remarks.retain(|remark| Some(&remark.key) != self.secret.as_ref());
    }

    /// The arguments of `rafsd mount` besides bootstrap and directory.
    pub fn mount(&self) -> Vec<String> {
        let mut args: Vec<String> = self.blobs.iter().flat_map(|spec| ["--blobs".to_owned(), spec.clone()]).collect();
        args.extend(self.ca.iter().flat_map(|file| ["--ca".to_owned(), file.display().to_string()]));
        args.extend(self.prefetch.map(|order| format!("--prefetch={order}")));
        args
    }

    /// The same as one line for a shell.
    pub fn command(&self) -> String {
        let args: Vec<_> = self.mount().iter().map(|arg| for_shell(arg)).collect();
        format!("rafsd mount BOOTSTRAP DIR {}", args.join(" ")).trim_end().to_owned()
    }

    /// A config file that begins with the command.
    pub fn config(&self) -> String {
        let mut out = format!("# {}\n", self.command());
        for setting in self.keys.iter().filter_map(|key| Setting::named(key)) {
            out += &format!("{} = {}\n", setting.key, setting.field.show(&self.settings).toml());
        }
        out + &self.registries.written()
    }
}

/// A word as a shell reads it.
fn for_shell(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Whether a path means the same in every working directory.
fn is_absolute(path: &str) -> bool {
    Path::new(path).is_absolute()
}
