//! Where a registry is to be asked: mirrors and their order, in the form of containerd's `hosts.toml`.
//!
//! It is read from containerd's own directory, where what is not understood is containerd's business and only told, and
//! from our own config ([`Registries`]), where that is a mistake. A table `rafsd` in a host's table has what containerd
//! does not know. The result is data: nobody is connected to, and no certificate is looked at.

mod limits;
mod registries;
mod table;
mod written;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::HeaderName;
use toml::Spanned;
use toml::de::{DeString, DeTable, DeValue};

use super::{DOCKER, HostLimits, IdentityFiles, canonical};
use crate::base::Secret;

pub use limits::LimitTables;
pub use registries::Registries;
pub(crate) use table::{web, web_with_login};

/// Where containerd looks.
pub const DEFAULT_DIR: &str = "/etc/containerd/certs.d";

/// What stands for all registries in the place of a name.
const ALL: &str = "_default";

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// How a host is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ProxyUse {
    /// As the environment says.
    #[default]
    Environment,
    /// Without one.
    Direct,
    /// Through this one, whose address may hold a login.
    Through(Secret),
}

/// One host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Scheme, host and port, and the path in front of `REPOSITORY/blobs/DIGEST`: `/v2` as a rule. No slash at the end.
    pub base: Url,
    /// Whether tags may be asked for.
    pub resolve: bool,
    /// Whether manifests and blobs may be.
    pub pull: bool,
    /// Authorities to trust besides the system's.
    pub ca: Vec<PathBuf>,
    pub clients: Vec<IdentityFiles>,
    /// Whether anybody is believed to be the host.
    pub skip_verify: bool,
    /// For every request.
    pub headers: Vec<(HeaderName, Secret)>,
    pub dial_timeout: Option<Duration>,
    /// Requests begin and end at multiples of so many bytes, a power of two, so that a peer finds what it has.
    pub align: Option<u64>,
    /// Hosts that it may redirect to, and name for tokens, in whatever network they are.
    pub redirects: Vec<String>,
    pub proxy: ProxyUse,
    /// Whether the host is asked without its proxy while that is ill.
    pub proxy_fallback: bool,
    /// Asked whether the proxy is well.
    pub proxy_ping: Option<Url>,
    /// What it may be asked.
    pub limits: HostLimits,
}

impl HostConfig {
    /// A host of which nothing is known but where it is.
    pub fn new(base: Url) -> Self {
        Self {
            base,
            resolve: true,
            pull: true,
            ca: Vec::new(),
            clients: Vec::new(),
            skip_verify: false,
            headers: Vec::new(),
            dial_timeout: None,
            align: None,
            redirects: Vec::new(),
            proxy: ProxyUse::Environment,
            proxy_fallback: true,
            proxy_ping: None,
            limits: HostLimits::default(),
        }
    }

    /// The files that it names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let clients = self.clients.iter().flat_map(|pair| std::iter::once(&pair.cert).chain(&pair.key));
        self.ca.iter().chain(clients).map(PathBuf::as_path)
    }

    /// What a host that is asked for another one's images is told in the query `ns`.
    pub fn namespace<'a>(&self, registry: &'a str) -> Option<&'a str> {
        let own = authority(&self.base);
        // The usual port may be said or not.
        let named = Url::parse(&format!("{}://{registry}", self.base.scheme())).map(|url| authority(&url));
        let itself = named.is_ok_and(|named| named == own) || canonical(registry) == canonical(&own);
        (!itself).then_some(registry)
    }
}

/// All hosts of a registry, in the order in which they are asked; the origin is the last. Not empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistryHosts {
    pub hosts: Vec<HostConfig>,
}

impl RegistryHosts {
    /// `registry`, which is `HOST[:PORT]`, without mirrors: by https, unless it is this very host at a port of its own. The
    /// images of `docker.io`, by whichever of its names, are elsewhere.
    ///
    /// # Errors
    /// It is not a host.
    pub fn plain(registry: &str) -> Result<Self, HostsError> {
        let name = canonical(registry);
        let host = if name == DOCKER { "registry-1.docker.io" } else { &name };
        let scheme = if is_local(host) { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{host}/v2")).ok();
        // What changes the meaning of the URL is no host.
        let base = base.filter(|url| url.path() == "/v2" && url.username().is_empty() && url.query().is_none());
        let base = base.ok_or(HostsError::NoHost)?;
        Ok(Self { hosts: vec![HostConfig::new(base)] })
    }
}

/// Why hosts cannot be told.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostsError {
    /// What was given is not repeated: it may hold a login.
    #[error("that is not the name of a registry; write HOST or HOST:PORT")]
    NoHost,
    #[error("cannot read {}", file.display())]
    Read {
        file: PathBuf,
        #[source]
        cause: Arc<io::Error>,
    },
    #[error("cannot use {}: {}", file.display(), notes.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Wrong { file: PathBuf, notes: Vec<Note> },
}

/// Something about one place of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// From 1; `None` where it is about the whole.
    pub line: Option<usize>,
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.text),
            None => f.write_str(&self.text),
        }
    }
}

/// The hosts of `registry`, a [`canonical`] name, as `own` or `dir` has them. A `dir` that does not exist has none.
///
/// What is about this very registry goes before what is about all, and in each `own` before `dir`.
///
/// # Errors
/// The file of the registry cannot be read, or something in it is wrong: all of it is told.
pub fn find(own: &Registries, dir: &Path, registry: &str) -> Result<RegistryHosts, HostsError> {
    let plain = RegistryHosts::plain(registry)?;
    if let Some(named) = own.named(registry) {
        return Ok(named.clone());
    }
    let folder = folders(dir, registry).into_iter().find(|folder| folder.is_dir());
    let is_named = folder.as_ref().is_some_and(|folder| !folder.ends_with(ALL));
    match folder {
        Some(folder) if is_named || !own.has_all() => in_folder(&folder, registry, plain),
        _ => Ok(own.as_one_of_all(plain)),
    }
}

/// The hosts of `registry`, whose settings are in `folder`.
fn in_folder(folder: &Path, registry: &str, plain: RegistryHosts) -> Result<RegistryHosts, HostsError> {
    let file = folder.join("hosts.toml");
    let text = match read_file(&file) {
        Ok(text) => text,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(with_certificates(plain, folder)),
        Err(cause) => return Err(HostsError::Read { file, cause: Arc::new(cause) }),
    };
    let read = table::read_text(&text, registry, folder)?;
    for note in &read.unknown {
        tracing::warn!(file = %file.display(), "{note}");
    }
    match read.hosts {
        Ok(hosts) => Ok(hosts),
        Err(notes) => Err(HostsError::Wrong { file, notes }),
    }
}

/// Where containerd looks for a registry, in its order.
fn folders(dir: &Path, registry: &str) -> Vec<PathBuf> {
    // A name that leads out of the directory has nothing in it.
    if registry.contains('/') || registry.starts_with('.') {
        return Vec::new();
    }
    let port = registry.rsplit_once(':').map(|(host, port)| format!("{host}_{port}_"));
    let names = port.into_iter().chain([registry.to_owned(), ALL.to_owned()]);
    names.map(|name| dir.join(name)).collect()
}

/// Docker's older form: authorities and certificates of a registry lie in its directory, by their endings.
fn with_certificates(mut plain: RegistryHosts, folder: &Path) -> RegistryHosts {
    let Ok(entries) = std::fs::read_dir(folder) else { return plain };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for host in &mut plain.hosts {
        for file in &files {
            match file.extension().and_then(|ending| ending.to_str()) {
                Some("crt") => host.ca.push(file.clone()),
                Some("cert") => {
                    let key = file.with_extension("key");
                    host.clients.push(IdentityFiles { cert: file.clone(), key: key.is_file().then_some(key) });
                }
                _ => {}
            }
        }
    }
    plain
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
}

/// `HOST[:PORT]` of an URL, the port if it is not the usual one.
pub fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Tables as they come in the file; they are sorted by name.
fn in_order<'a, 'b>(tables: &'b DeTable<'a>) -> Vec<(&'b Spanned<DeString<'a>>, &'b Spanned<DeValue<'a>>)> {
    let mut tables: Vec<_> = tables.iter().collect();
    tables.sort_by_key(|(name, _)| name.span().start);
    tables
}

/// Whether a registry is on this host at a port where nobody expects TLS, as containerd has it.
fn is_local(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, port),
        _ => (registry, ""),
    };
    let host = host.trim_matches(['[', ']']);
    let local = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    local && !matches!(port, "" | "443")
}

#[cfg(test)]
mod tests;
