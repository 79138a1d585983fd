//! Where blobs come from: the backends of nydusd as specs of sources, and tables of registries.

use std::path::Path;
use std::time::Duration;

use reqwest::Url;

use super::table::Table;
use super::{Credentials, ImportError, Imported, is_absolute};
use crate::base::{BlobId, Secret};
use crate::credentials::user_and_password;
use crate::net::hosts::{HostConfig, ProxyUse, RegistryHosts, web, web_with_login};
use crate::net::{ClientOptions, Clock, canonical};
use crate::source::{BadPlace, ObjectUpstream, OpenError};

/// What `connect_timeout` may at most be to be taken seriously, in seconds.
const LONGEST: u64 = 3600;

/// Escapes a part of a query.
pub(super) fn quoted(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte);
    let escape = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    text.bytes().map(escape).collect()
}

/// What nydusd says of connections, where a host has settings.
#[derive(Default)]
struct Connection {
    skip_verify: bool,
    ca: Vec<String>,
    dial: Option<Duration>,
    /// The address, which may hold a login.
    proxy: Option<Secret>,
    ping: Option<Url>,
    fallback: bool,
}

impl Imported {
    /// `config` of the backend `kind`, whose name is at `key`.
    pub(super) fn backend(
        &mut self,
        key: &str,
        kind: &str,
        config: &mut Table,
        is_second: bool,
    ) -> Result<(), ImportError> {
        match kind {
            "localdisk" => self.localdisk(config),
            "localfs" => self.localfs(config),
            "oss" | "s3" => self.bucket(kind, config),
            "registry" => self.registry(config),
            "http-proxy" if is_second => self.http_proxy(config),
            _ => {
                let known = if is_second {
                    "localdisk, localfs, oss, s3, registry and http-proxy"
                } else {
                    "localdisk, localfs, oss, s3 and registry in version 1"
                };
                Err(ImportError::Backend { key: key.to_owned(), known })
            }
        }
    }

    fn localdisk(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let path = config.required("device_path")?;
        if !is_absolute(&path) {
            return Err(ImportError::Kind { key: config.full("device_path"), wanted: "an absolute path" });
        }
        let path = quoted(&path);
        if config.flag("disable_gpt")?.unwrap_or_default() {
            self.blobs.push(format!("localdisk://{path}?gpt=false&blob=ID"));
            self.remark(config.full("disable_gpt"), "put the id of the blob in the place of ID");
        } else {
            self.blobs.push(format!("localdisk://{path}"));
        }
        Ok(())
    }

    fn localfs(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let (file, dir) = (config.text("blob_file")?, config.text("dir")?);
        if file.is_none() && dir.is_none() {
            return Err(ImportError::Missing { key: config.full("dir") });
        }
        if let Some(file) = file {
            let path = Path::new(&file);
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            match path.parent() {
                Some(dir) if name.len() == 64 && name.parse::<BlobId>().is_ok() => {
                    self.place(&config.full("blob_file"), &dir.to_string_lossy());
                }
                _ if is_absolute(&file) => {
                    self.blobs.push(format!("localdisk://{}?gpt=false&blob=ID", quoted(&file)));
                    self.remark(config.full("blob_file"), "put the id of the blob in the place of ID");
                }
                _ => return Err(ImportError::Kind { key: config.full("blob_file"), wanted: "an absolute path" }),
            }
        }
        if let Some(dir) = dir {
            self.place(&config.full("dir"), &dir);
        }
        for dir in config.texts("alt_dirs")? {
            self.place(&config.full("alt_dirs"), &dir);
        }
        self.nobody_reads_ahead(config);
        Ok(())
    }

    /// A directory of blobs.
    fn place(&mut self, key: &str, dir: &str) {
        if !is_absolute(dir) {
            self.remark(key, "the path begins at the directory where `rafsd mount` is called");
        }
        self.blobs.push(if dir.is_empty() { ".".to_owned() } else { dir.to_owned() });
    }

    fn bucket(&mut self, kind: &str, config: &mut Table) -> Result<(), ImportError> {
        let bucket = config.required("bucket_name")?;
        let prefix = config.text("object_prefix")?.unwrap_or_default();
        for (key, text) in [("bucket_name", &bucket), ("object_prefix", &prefix)] {
            if text.contains(['?', '#', '@']) || key == "bucket_name" && text.contains('/') {
                return Err(ImportError::Kind { key: config.full(key), wanted: "a name without ?, # and @" });
            }
        }
        let scheme = self.scheme(config)?;
        let endpoint = match kind {
            "oss" => Some(config.required("endpoint")?),
            _ => config.text("endpoint")?,
        };
        let mut query = Vec::new();
        if kind == "s3" {
            query.push(format!("region={}", quoted(&config.required("region")?)));
        }
        if let Some(endpoint) = endpoint {
            let host = endpoint.split_once("://").map_or(endpoint.as_str(), |(_, host)| host);
            let url = format!("{scheme}://{host}");
            if web(&url).is_none_or(|url| url.path() != "/") {
                return Err(ImportError::Kind { key: config.full("endpoint"), wanted: "a host" });
            }
            query.push(format!("endpoint={}", quoted(if scheme == "https" { host } else { &url })));
        }
        let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        let place = format!("{kind}://{bucket}/{prefix}{query}");
        ensure_accepted(&place, config)?;
        self.blobs.push(place);
        let key = config.full("access_key_secret");
        match (config.text("access_key_id")?, config.text("access_key_secret")?) {
            (Some(id), Some(secret)) => {
                self.credentials = Some(Credentials::Keys { id: Secret::new(id), secret: Secret::new(secret) });
                self.secret = Some(key.clone());
                self.remark(
                    key,
                    "not shown; --with-credentials FILE writes both keys to a file, which the query `credentials` of \
                     the place names, and without that the environment is looked at",
                );
            }
            (None, None) => {}
            _ => self.remark(key, "of no use without access_key_id, as that is without this"),
        }
        self.without_hosts(config)
    }

    fn http_proxy(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let address = config.required("addr")?;
        let path = config.text("path")?.unwrap_or_default();
        if address.starts_with('/') {
            self.remark(
                config.full("addr"),
                "a server at a Unix socket is not asked; have it listen at an address of loopback",
            );
        } else {
            let url = format!("{}/{}", address.trim_end_matches('/'), path.trim_matches('/'));
            let Some(url) = web(&url) else {
                return Err(ImportError::Kind { key: config.full("addr"), wanted: "an http or https URL" });
            };
            self.blobs.push(url.as_str().trim_end_matches('/').to_owned());
        }
        self.without_hosts(config)
    }

    fn registry(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let (host, repository) = (config.required("host")?, config.required("repo")?);
        let scheme = self.scheme(config)?;
        let name = canonical(&host);
        let wrong = |config: &Table, key, wanted| Err(ImportError::Kind { key: config.full(key), wanted });
        let Ok(plain) = RegistryHosts::plain(&name) else { return wrong(config, "host", "HOST or HOST:PORT") };
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        if !repository.chars().all(known) || repository.contains("..") || repository.starts_with('/') {
            return wrong(config, "repo", "the name of a repository");
        }
        let place = format!("{name}/{repository}");
        self.blobs.push(format!("docker://{place}"));
        self.login(&place, config)?;
        let connection = self.connection(config)?;
        let mut hosts = plain.clone();
        for origin in &mut hosts.hosts {
            // It can be http and https.
            origin.base.set_scheme(&scheme).unwrap_or_default();
        }
        let mut mirrors = self.mirrors(config);
        mirrors.append(&mut hosts.hosts);
        mirrors.iter_mut().for_each(|host| connection.apply(host));
        let hosts = RegistryHosts { hosts: mirrors };
        if hosts != plain {
            self.registries.insert(&name, hosts);
        }
        for key in ["blob_url_scheme", "blob_redirected_host"] {
            self.dropped(config, key, "redirects are followed where they lead; let the names that they say lead to the right host, and name that in `redirects` if it is in a private network");
        }
        self.nobody_reads_ahead(config);
        Ok(())
    }

    fn login(&mut self, place: &str, config: &mut Table) -> Result<(), ImportError> {
        let forms = [
            ("auth", "auth", "--user NAME --password-stdin"),
            ("registry_token", "registrytoken", "--registry-token-stdin"),
        ];
        for (key, entry, flags) in forms {
            let Some(secret) = config.text(key)? else { continue };
            if key == "auth" && user_and_password(&secret).is_none() {
                return Err(ImportError::Kind { key: config.full(key), wanted: "base64 of USER:PASSWORD" });
            }
            if self.credentials.is_some() {
                self.remark(config.full(key), "not taken beside `auth`, by which tokens are got as they are needed");
                continue;
            }
            let (place, secret) = (place.to_owned(), Secret::new(secret));
            let text = format!(
                "not shown; `rafsd credentials set {place} {flags}` gives it to the running daemon, and \
                 --with-credentials FILE writes it to a file, which the setting docker_config names"
            );
            self.remark(config.full(key), text);
            self.secret = Some(config.full(key));
            self.credentials = Some(Credentials::Registry { place, entry, secret });
        }
        Ok(())
    }

    fn scheme(&mut self, config: &mut Table) -> Result<String, ImportError> {
        match config.text("scheme")? {
            None => Ok("https".to_owned()),
            Some(scheme) if matches!(scheme.as_str(), "http" | "https") => Ok(scheme),
            Some(_) => Err(ImportError::Kind { key: config.full("scheme"), wanted: "http or https" }),
        }
    }

    fn connection(&mut self, config: &mut Table) -> Result<Connection, ImportError> {
        let mut connection = Connection {
            skip_verify: config.flag("skip_verify")?.unwrap_or_default(),
            ca: config.texts("ca_cert_files")?,
            fallback: true,
            ..Connection::default()
        };
        if connection.ca.iter().any(|file| !is_absolute(file)) {
            self.remark(config.full("ca_cert_files"), "relative paths begin at the directory of the config file here");
        }
        match config.number("connect_timeout")? {
            Some(seconds @ 1..=LONGEST) => connection.dial = Some(Duration::from_secs(seconds)),
            Some(_) => self.remark(config.full("connect_timeout"), "left at 5 s; it must be from 1 s to 1 h"),
            None => {}
        }
        self.patience(config);
        let mut proxy = config.table("proxy")?;
        let is_named = proxy.says_something("url");
        connection.fallback = proxy.flag("fallback")?.unwrap_or(true);
        connection.proxy = self.proxy_address(&mut proxy, connection.fallback)?;
        connection.ping = self.proxy_ping(&mut proxy)?;
        // Of one that could not be taken something was told.
        let said = [("ping_url", connection.ping.is_some()), ("fallback", !connection.fallback)];
        for (key, _) in said.into_iter().filter(|(_, is_said)| *is_said && !is_named) {
            self.remark(proxy.full(key), "of no use without `url`, as in nydusd: no proxy is named");
        }
        self.proxy_manners(&mut proxy);
        self.unknown(proxy);
        Ok(connection)
    }

    /// Where the proxy is. One that must not be gone around is taken or refused, and never left out.
    fn proxy_address(&mut self, proxy: &mut Table, fallback: bool) -> Result<Option<Secret>, ImportError> {
        let key = proxy.full("url");
        let Some(text) = proxy.text("url")? else { return Ok(None) };
        let Some(url) = web_with_login(&text) else {
            if !fallback {
                let wanted = "an http or https URL without a query, as `fallback` has nothing go around the proxy";
                return Err(ImportError::Kind { key, wanted });
            }
            self.remark(key, "not taken: it must be an http or https URL without a query in it");
            return Ok(None);
        };
        if !url.username().is_empty() || url.password().is_some() {
            self.remark(
                key,
                "its login is not shown; write USER:PASSWORD@ in the place of the stars in `proxy`, for root's eyes only",
            );
        }
        Ok(Some(Secret::new(url)))
    }

    fn proxy_ping(&mut self, proxy: &mut Table) -> Result<Option<Url>, ImportError> {
        let Some(text) = proxy.text("ping_url")? else { return Ok(None) };
        let url = web(&text);
        if url.is_none() {
            let text = "not taken: it must be an http or https URL without a login or a query in it";
            self.remark(proxy.full("ping_url"), text);
        }
        Ok(url)
    }

    /// What nydusd does with a proxy and rafsd does not.
    fn proxy_manners(&mut self, proxy: &mut Table) {
        self.dropped(proxy, "check_interval", "a proxy in use is examined every 5 s");
        self.dropped(proxy, "check_pause_elapsed", "a proxy that nobody uses is never asked");
        self.dropped(proxy, "use_http", "what is asked by TLS stays so; name a peer that takes plain http as a host of the registry: [registry.\"HOST\".host.\"http://127.0.0.1:65001\"]");
        self.dropped(proxy, "dragonfly_scheduler_endpoint", "no client of Dragonfly is built in; name its daemon as a host of the registry: [registry.\"HOST\".host.\"http://127.0.0.1:65001\"], with align = \"4MiB\" in its table rafsd");
    }

    fn mirrors(&mut self, config: &mut Table) -> Vec<HostConfig> {
        let mut hosts: Vec<HostConfig> = Vec::new();
        let key = config.full("mirrors");
        for mirror in config.tables("mirrors") {
            let mut mirror = match mirror {
                Ok(mirror) => mirror,
                Err(key) => {
                    self.remark(key, "not taken: it must be an object in a list; nydusd does not look at it");
                    continue;
                }
            };
            let text = mirror.text("host").ok().flatten().unwrap_or_default();
            let url = web(&if text.contains("://") { text } else { format!("https://{text}") });
            let Some(mut base) = url else {
                let text = "the mirror is not taken: that must be a host or an http or https URL without a login or a query in it; nydusd does not look at it";
                self.remark(mirror.full("host"), text);
                continue;
            };
            let path = base.path().trim_end_matches('/').to_owned();
            base.set_path(&format!("{path}/v2"));
            self.dropped(
                &mut mirror,
                "headers",
                "not shown, as they may be secrets; write them into the table `header` of the mirror",
            );
            for key in ["ping_url", "health_check_interval", "failure_limit", "auth_through"] {
                self.dropped(
                    &mut mirror,
                    key,
                    "a mirror that failed twice goes behind the others until a request finds that it is back",
                );
            }
            self.unknown(mirror);
            if hosts.iter().all(|host| host.base != base) {
                hosts.push(HostConfig::new(base));
            }
        }
        if !hosts.is_empty() {
            self.remark(key, "nydusd has done nothing with it since 2025; here it is asked first");
        }
        hosts
    }

    /// What of connections has no place where there are no hosts with settings: buckets and plain servers.
    fn without_hosts(&mut self, config: &mut Table) -> Result<(), ImportError> {
        let mut files = config.texts("ca_cert_files")?;
        match files.len() {
            0 => {}
            1 => self.ca = files.pop().map(Into::into),
            _ => self.remark(
                config.full("ca_cert_files"),
                "`--ca` takes one file; put the certificates into one, one behind the other",
            ),
        }
        self.dropped(
            config,
            "skip_verify",
            "a bucket or a plain server has to prove who it is; name its authority with `--ca`",
        );
        self.dropped(config, "connect_timeout", "5 s for buckets and plain servers");
        self.patience(config);
        let mut proxy = config.table("proxy")?;
        for key in ["url", "ping_url", "fallback"] {
            self.dropped(
                &mut proxy,
                key,
                "for buckets and plain servers the proxy is that of the environment, HTTPS_PROXY and its like",
            );
        }
        self.proxy_manners(&mut proxy);
        self.unknown(proxy);
        self.dropped(
            config,
            "mirrors",
            "give `--blobs` several times: what the first place does not give is asked of the next",
        );
        self.nobody_reads_ahead(config);
        Ok(())
    }

    fn patience(&mut self, config: &mut Table) {
        self.dropped(
            config,
            "timeout",
            "a server that is silent for 10 s is asked again, and a read may wait as long as the setting deadline says",
        );
        self.dropped(
            config,
            "retry_limit",
            "what is worth another try is tried, with growing pauses, until the setting deadline",
        );
    }

    fn nobody_reads_ahead(&mut self, config: &mut Table) {
        for key in ["readahead", "readahead_sec"] {
            self.dropped(
                config,
                key,
                "nydusd does nothing with it; readahead_first and readahead_most are about readers that walk forward",
            );
        }
    }
}

/// Has a spec of a bucket read by who will have to read it. Nobody is asked, and what the credentials of this
/// environment are worth is not its business.
fn ensure_accepted(place: &str, config: &Table) -> Result<(), ImportError> {
    let opened = ObjectUpstream::new(place, &ClientOptions::default(), Clock::default());
    let Err(OpenError::Bucket(cause)) = opened else { return Ok(()) };
    let (key, wanted) = match cause {
        BadPlace::Credentials { .. } | BadPlace::Builder(_) => return Ok(()),
        BadPlace::Prefix(_) => ("object_prefix", "what the name of an object can begin with"),
        // The queries are called as the keys are.
        BadPlace::Value { key, wanted } => (key, wanted),
        _ => ("bucket_name", "the name of a bucket"),
    };
    Err(ImportError::Kind { key: config.full(key), wanted })
}

impl Connection {
    fn apply(&self, host: &mut HostConfig) {
        host.skip_verify = self.skip_verify && host.base.scheme() == "https";
        host.ca = self.ca.iter().map(Into::into).collect();
        host.dial_timeout = self.dial;
        if let Some(proxy) = &self.proxy {
            host.proxy = ProxyUse::Through(proxy.clone());
            host.proxy_ping.clone_from(&self.ping);
            host.proxy_fallback = self.fallback;
        }
    }
}
