//! TOML to hosts. All mistakes are found in one reading.

use std::path::Path;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{HostConfig, HostsError, Note, ProxyUse, RegistryHosts};
use crate::base::{ByteSize, Secret, TimeSpan, nearest};
use crate::net::{HostLimits, IdentityFiles};

/// Least and most that `align` may be: a page, and what one request should at most be made longer by.
const ALIGN: [u64; 2] = [4 << 10, 64 << 20];

/// What the table of a host may have.
const HOST_KEYS: [&str; 8] =
    ["capabilities", "ca", "client", "skip_verify", "override_path", "header", "dial_timeout", "rafsd"];

/// What the root has besides.
const ROOT_KEYS: [&str; 2] = ["server", "host"];

/// What a table of limits may have.
const LIMIT_KEYS: [&str; 2] = ["concurrency", "bandwidth"];

/// What a table says.
#[derive(Debug)]
pub(super) struct Read {
    /// The hosts, or everything that is wrong.
    pub hosts: Result<RegistryHosts, Vec<Note>>,
    /// Keys that mean nothing here, or not as the others are.
    pub unknown: Vec<Note>,
}

/// The hosts of a file's text.
pub(super) fn read_text(text: &str, registry: &str, folder: &Path) -> Result<Read, HostsError> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut read = read_table(table.get_ref(), text, registry, folder)?;
    if !errors.is_empty() {
        let notes = errors.iter().map(|error| Note {
            line: error.span().map(|span| line(text, span.start)),
            text: error.message().to_owned(),
        });
        read.hosts = Err(notes.collect());
    }
    Ok(read)
}

/// The hosts of `registry` by a table, which is a part of `text`. Relative paths begin at `folder`.
///
/// # Errors
/// `registry` is not a host.
pub(super) fn read_table(table: &DeTable<'_>, text: &str, registry: &str, folder: &Path) -> Result<Read, HostsError> {
    let mut origin = RegistryHosts::plain(registry)?.hosts;
    let mut reader = Reader { text, folder, wrong: Vec::new(), unknown: Vec::new() };
    let mut hosts = Vec::new();
    if let Some(server) = table.get("server").and_then(|server| reader.text_of("server", server)) {
        let overridden = table.get("override_path").is_some_and(|value| value.get_ref().as_bool() == Some(true));
        let at = table.get("server").map_or(0, |server| server.span().start);
        match base(server, overridden) {
            Some(base) => origin = vec![HostConfig::new(base)],
            None => reader.wrong(at, "server must be a host or an http or https URL"),
        }
    }
    if let Some(origin) = origin.first_mut() {
        reader.host(table, origin, true);
    }
    if let Some(value) = table.get("host") {
        match value.get_ref() {
            DeValue::Table(list) => hosts = reader.hosts(list),
            _ => reader.wrong(value.span().start, "host must be a table"),
        }
    }
    hosts.append(&mut origin);
    let hosts = if reader.wrong.is_empty() { Ok(RegistryHosts { hosts }) } else { Err(reader.wrong) };
    Ok(Read { hosts, unknown: reader.unknown })
}

/// The limits that a table, a part of `text`, tells of, and everything that is wrong with it.
pub(super) fn read_limits(table: &DeTable<'_>, text: &str) -> (HostLimits, Vec<Note>) {
    let mut reader = Reader { text, folder: Path::new(""), wrong: Vec::new(), unknown: Vec::new() };
    let mut limits = HostLimits::default();
    for (key, value) in table {
        if !reader.limit(key.get_ref(), value, &mut limits) {
            let meant = nearest(key.get_ref(), LIMIT_KEYS).map(|key| format!("; did you mean {key:?}?"));
            let text = format!("unknown key {:?}{}", key.get_ref(), meant.unwrap_or_default());
            reader.wrong(key.span().start, text);
        }
    }
    (limits, reader.wrong)
}

struct Reader<'a> {
    text: &'a str,
    folder: &'a Path,
    wrong: Vec<Note>,
    unknown: Vec<Note>,
}

type Value<'a> = Spanned<DeValue<'a>>;

impl Reader<'_> {
    fn wrong(&mut self, at: usize, text: impl Into<String>) {
        self.wrong.push(Note { line: Some(line(self.text, at)), text: text.into() });
    }

    fn hosts(&mut self, list: &DeTable<'_>) -> Vec<HostConfig> {
        // The table is sorted by name; the order that counts is that of the file.
        let mut entries: Vec<_> = list.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        let mut hosts = Vec::new();
        for (name, value) in entries {
            let at = name.span().start;
            let DeValue::Table(table) = value.get_ref() else {
                self.wrong(at, format!("host {:?} must be a table", shown(name.get_ref())));
                continue;
            };
            let overridden = table.get("override_path").is_some_and(|value| value.get_ref().as_bool() == Some(true));
            let Some(base) = base(name.get_ref(), overridden) else {
                self.wrong(at, format!("{:?} is not a host or an http or https URL", shown(name.get_ref())));
                continue;
            };
            let mut host = HostConfig::new(base);
            self.host(table, &mut host, false);
            hosts.push(host);
        }
        hosts
    }

    /// Puts what a table says into `host`. The root table is that of the origin.
    fn host(&mut self, table: &DeTable<'_>, host: &mut HostConfig, root: bool) {
        for (key, value) in table {
            let at = key.span().start;
            match &**key.get_ref() {
                "server" | "host" if root => {}
                "capabilities" => self.capabilities(value, host),
                "ca" => host.ca = self.strings("ca", value).iter().map(|path| self.folder.join(path)).collect(),
                "client" => self.clients(value, host),
                "skip_verify" => host.skip_verify = self.switch("skip_verify", value),
                // Looked at before, with the URL.
                "override_path" => drop(self.switch("override_path", value)),
                "header" => self.headers(value, host),
                "dial_timeout" => host.dial_timeout = self.span("dial_timeout", value),
                "rafsd" => match value.get_ref() {
                    DeValue::Table(table) => self.ours(table, host),
                    _ => self.wrong(at, "rafsd must be a table"),
                },
                other => {
                    let known = HOST_KEYS.into_iter().chain(ROOT_KEYS.into_iter().filter(|_| root));
                    let meant = nearest(other, known).map(|key| format!("; did you mean {key:?}?"));
                    let text = format!("unknown key {other:?}{}", meant.unwrap_or_default());
                    self.unknown.push(Note { line: Some(line(self.text, at)), text });
                }
            }
        }
    }

    fn ours(&mut self, table: &DeTable<'_>, host: &mut HostConfig) {
        for (key, value) in table {
            let at = key.span().start;
            match &**key.get_ref() {
                "align" => {
                    let bytes = self.size("align", value);
                    let [least, most] = ALIGN;
                    if bytes.is_some_and(|bytes| !bytes.is_power_of_two() || !(least..=most).contains(&bytes)) {
                        self.wrong(at, "align must be a power of two from 4KiB to 64MiB");
                    }
                    host.align = bytes;
                }
                "proxy" => match self.text_of("proxy", value) {
                    Some("environment") => host.proxy = ProxyUse::Environment,
                    Some("none") => host.proxy = ProxyUse::Direct,
                    Some(text) => match web_with_login(text) {
                        Some(url) => host.proxy = ProxyUse::Through(Secret::new(url)),
                        None => self.wrong(at, "proxy must be an http or https URL, environment or none"),
                    },
                    None => {}
                },
                "redirects" => host.redirects = self.strings("redirects", value),
                "proxy_fallback" => host.proxy_fallback = self.switch("proxy_fallback", value),
                "proxy_ping" => match self.text_of("proxy_ping", value).map(web) {
                    Some(None) => self.wrong(at, "proxy_ping must be an http or https URL"),
                    Some(url) => host.proxy_ping = url,
                    None => {}
                },
                key if self.limit(key, value, &mut host.limits) => {}
                // This table is ours, so that nobody else can mean something by it.
                other => self.wrong(
                    at,
                    format!("unknown key {other:?}; rafsd has align, redirects, proxy, proxy_fallback, proxy_ping, concurrency and bandwidth"),
                ),
            }
        }
        self.without_proxy(table);
    }

    /// Takes a limit; tells whether the key is one.
    fn limit(&mut self, key: &str, value: &Value<'_>, limits: &mut HostLimits) -> bool {
        let at = value.span().start;
        match key {
            "concurrency" => match value.get_ref().as_integer().and_then(|n| n.as_str().parse().ok()) {
                Some(count @ 1..=1024) => limits.concurrency = Some(count),
                _ => self.wrong(at, "concurrency must be a number from 1 to 1024"),
            },
            "bandwidth" => match self.size("bandwidth", value) {
                Some(0..1024) => self.wrong(at, "bandwidth must be at least 1KiB"),
                bytes => limits.bandwidth = bytes,
            },
            _ => return false,
        }
        true
    }

    /// Tells what is about a proxy where none is named.
    fn without_proxy(&mut self, table: &DeTable<'_>) {
        let proxy = table.get("proxy").map(|value| value.get_ref().as_str());
        if !matches!(proxy, None | Some(Some("environment" | "none"))) {
            return;
        }
        for key in ["proxy_fallback", "proxy_ping"] {
            let Some(value) = table.get(key) else { continue };
            // To fall back is what is done anyway.
            if value.get_ref().as_bool() != Some(true) {
                let text = format!("{key} has no effect without proxy = \"URL\"");
                self.unknown.push(Note { line: Some(line(self.text, value.span().start)), text });
            }
        }
    }

    fn capabilities(&mut self, value: &Value<'_>, host: &mut HostConfig) {
        let words = self.strings("capabilities", value);
        // None is the same as all.
        if words.is_empty() {
            return;
        }
        (host.resolve, host.pull) = (false, false);
        for word in words {
            match word.as_str() {
                "resolve" => host.resolve = true,
                "pull" => host.pull = true,
                "push" | "referrers" => {}
                _ => self.wrong(value.span().start, format!("unknown capability {word:?}")),
            }
        }
    }

    fn clients(&mut self, value: &Value<'_>, host: &mut HostConfig) {
        let at = value.span().start;
        let path = |text: &str| self.folder.join(text);
        let pair = |value: &Value<'_>| match value.get_ref() {
            DeValue::String(cert) => Some(IdentityFiles { cert: path(cert), key: None }),
            DeValue::Array(pair) => match pair.iter().map(|item| item.get_ref().as_str()).collect::<Vec<_>>()[..] {
                [Some(cert), Some(key)] => {
                    // Containerd takes "" for no key.
                    Some(IdentityFiles { cert: path(cert), key: (!key.is_empty()).then(|| path(key)) })
                }
                _ => None,
            },
            _ => None,
        };
        let pairs: Option<Vec<_>> = match value.get_ref() {
            DeValue::String(_) => pair(value).map(|pair| vec![pair]),
            DeValue::Array(items) => items.iter().map(pair).collect(),
            _ => None,
        };
        match pairs {
            Some(pairs) => host.clients = pairs,
            None => self.wrong(at, "client must be a path, or a list of paths and of pairs of a certificate and a key"),
        }
    }

    fn headers(&mut self, value: &Value<'_>, host: &mut HostConfig) {
        let DeValue::Table(table) = value.get_ref() else {
            return self.wrong(value.span().start, "header must be a table");
        };
        for (name, value) in table {
            let Ok(header) = HeaderName::from_bytes(name.get_ref().as_bytes()) else {
                self.wrong(name.span().start, format!("{:?} is not the name of a header", name.get_ref()));
                continue;
            };
            for text in self.strings("a header", value) {
                // The value is not told: it may be a secret.
                match HeaderValue::from_str(&text) {
                    Ok(_) => host.headers.push((header.clone(), Secret::new(text))),
                    Err(_) => self.wrong(value.span().start, format!("the value of {header} cannot be sent")),
                }
            }
        }
    }

    /// One string, or a list of them.
    fn strings(&mut self, key: &str, value: &Value<'_>) -> Vec<String> {
        let all: Option<Vec<_>> = match value.get_ref() {
            DeValue::String(text) => Some(vec![text.clone().into_owned()]),
            DeValue::Array(items) => items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect(),
            _ => None,
        };
        if all.is_none() {
            self.wrong(value.span().start, format!("{key} must be a string or a list of strings"));
        }
        all.unwrap_or_default()
    }

    fn text_of<'v>(&mut self, key: &str, value: &'v Value<'_>) -> Option<&'v str> {
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.wrong(value.span().start, format!("{key} must be a string"));
        }
        text
    }

    fn switch(&mut self, key: &str, value: &Value<'_>) -> bool {
        let on = value.get_ref().as_bool();
        if on.is_none() {
            self.wrong(value.span().start, format!("{key} must be true or false"));
        }
        on.unwrap_or_default()
    }

    fn span(&mut self, key: &str, value: &Value<'_>) -> Option<Duration> {
        let span = self.text_of(key, value)?.parse::<TimeSpan>();
        if span.is_err() {
            self.wrong(value.span().start, format!("{key} must be a length of time such as 3s"));
        }
        span.ok().map(|span| span.0)
    }

    fn size(&mut self, key: &str, value: &Value<'_>) -> Option<u64> {
        let size = self.text_of(key, value)?.parse::<ByteSize>();
        if size.is_err() {
            self.wrong(value.span().start, format!("{key} must be a size such as 4MiB"));
        }
        size.ok().map(|size| size.0)
    }
}

/// Where a host's API begins. Without a scheme it is https; plain http has to be said.
fn base(text: &str, overridden: bool) -> Option<Url> {
    let mut url = web(&if text.contains("://") { text.to_owned() } else { format!("https://{text}") })?;
    let path = url.path().trim_end_matches('/').to_owned();
    let path = if overridden || path.ends_with("/v2") { path } else { format!("{path}/v2") };
    url.set_path(&path);
    Some(url)
}

/// An address of the web without anything in it that would have to be kept secret.
pub(crate) fn web(text: &str) -> Option<Url> {
    web_with_login(text).filter(|url| url.username().is_empty() && url.password().is_none())
}

/// The same with or without `USER:PASSWORD@`.
pub(crate) fn web_with_login(text: &str) -> Option<Url> {
    let url = Url::parse(text).ok()?;
    let bare = url.query().is_none() && url.fragment().is_none() && url.has_host();
    (bare && matches!(url.scheme(), "http" | "https")).then_some(url)
}

/// A host as it may be shown: without a password that does not belong there.
pub(super) fn shown(host: &str) -> &str {
    host.rsplit_once('@').map_or(host, |(_, host)| host)
}

pub(super) fn line(text: &str, at: usize) -> usize {
    1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count()
}
