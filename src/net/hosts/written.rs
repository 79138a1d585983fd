//! Hosts to TOML: what was read, written so that it is read as the same.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use reqwest::Url;
use toml::de::DeTable;

use super::{HostConfig, ProxyUse, Registries};
use crate::base::{ByteSize, Secret, TimeSpan, toml_json, toml_string, toml_strings};
use crate::net::HostLimits;

impl Registries {
    /// As tables of a config file, secrets left out; nothing if there are none.
    pub fn written(&self) -> String {
        self.all_written(false)
    }

    /// The same with everything that was read.
    #[cfg(test)]
    pub(super) fn written_whole(&self) -> String {
        self.all_written(true)
    }

    fn all_written(&self, shows_secrets: bool) -> String {
        let mut out = String::new();
        for (name, hosts, has_server) in self.all() {
            let Some((origin, mirrors)) = hosts.hosts.split_last() else { continue };
            let table = format!("registry.{}", toml_string(name));
            let server = if has_server { key("server", &toml_string(origin.base.as_str())) } else { String::new() };
            out += &host(&table, &server, origin, shows_secrets);
            for mirror in mirrors {
                out += &host(&format!("{table}.host.{}", toml_string(mirror.base.as_str())), "", mirror, shows_secrets);
            }
        }
        out
    }

    /// The same facts as JSON: for each registry its hosts, in the order in which they are asked. Without secrets. The
    /// last one is the registry itself, which has no address where all are meant.
    pub fn printed(&self) -> serde_json::Value {
        let facts = |it: &HostConfig, is_known: bool| {
            let text = host("it", "", it, false);
            let table = DeTable::parse(&text).expect("what is written is TOML");
            let mut facts = toml_json(table.get_ref().get("it").expect("it was just written").get_ref());
            facts["host"] = if is_known { it.base.as_str().into() } else { serde_json::Value::Null };
            facts
        };
        let all = self.all().map(|(name, hosts, has_server)| {
            let last = hosts.hosts.len().saturating_sub(1);
            let hosts = hosts.hosts.iter().enumerate();
            (name.to_owned(), hosts.map(|(at, host)| facts(host, has_server || at < last)).collect())
        });
        serde_json::Value::Object(all.collect())
    }
}

pub(super) fn key(key: &str, value: &str) -> String {
    format!("{key} = {value}\n")
}

/// One host as a table and those below it, in the same order in which they are documented.
fn host(table: &str, first: &str, host: &HostConfig, shows_secrets: bool) -> String {
    let mut out = format!("\n[{table}]\n{first}");
    let path = |path: &Path| path.to_string_lossy().into_owned();
    if !(host.pull && host.resolve) {
        let named = [(host.pull, "pull"), (host.resolve, "resolve")];
        let may: Vec<_> = named.into_iter().filter(|(may, _)| *may).map(|(_, word)| word).collect();
        // Without any word it would be all.
        out += &key("capabilities", &toml_strings(if may.is_empty() { vec!["push"] } else { may }));
    }
    if !host.ca.is_empty() {
        out += &key("ca", &toml_strings(host.ca.iter().map(|file| path(file))));
    }
    if !host.clients.is_empty() {
        let pair = |it: &super::IdentityFiles| {
            toml_strings([path(&it.cert), it.key.as_deref().map_or_else(String::new, path)])
        };
        let pairs: Vec<_> = host.clients.iter().map(pair).collect();
        out += &key("client", &format!("[{}]", pairs.join(", ")));
    }
    if host.skip_verify {
        out += &key("skip_verify", "true");
    }
    if let Some(span) = host.dial_timeout {
        out += &key("dial_timeout", &toml_string(&TimeSpan(span).to_string()));
    }
    if !host.base.path().ends_with("/v2") {
        out += &key("override_path", "true");
    }
    let values = said(host);
    if !values.is_empty() {
        write!(out, "\n[{table}.header]\n").expect("a string takes it");
        for (name, values) in values {
            let value = if shows_secrets { toml_strings(values) } else { "\"***\" # not shown".to_owned() };
            out += &key(&toml_string(name), &value);
        }
    }
    let ours = ours(host, shows_secrets);
    if !ours.is_empty() {
        write!(out, "\n[{table}.rafsd]\n{ours}").expect("a string takes it");
    }
    out
}

fn said(host: &HostConfig) -> BTreeMap<&str, Vec<&str>> {
    let mut said = BTreeMap::<_, Vec<_>>::new();
    for (name, value) in &host.headers {
        said.entry(name.as_str()).or_default().push(value.expose());
    }
    said
}

/// The address of a proxy, whose login is what has to be hidden.
fn proxy(address: &Secret, shows_secrets: bool) -> String {
    let (text, url) = (address.expose(), Url::parse(address.expose()).ok());
    let is_bare = |url: &Url| url.username().is_empty() && url.password().is_none();
    match (shows_secrets, url) {
        (false, Some(mut url)) if !is_bare(&url) => {
            // A host that can have a login can have another.
            let _ = url.set_username("***").and_then(|()| url.set_password(None));
            toml_string(url.as_str()) + " # login not shown"
        }
        (false, None) => "\"***\" # not shown".to_owned(),
        _ => toml_string(text),
    }
}

pub(super) fn limits(limits: HostLimits) -> String {
    let mut out = String::new();
    if let Some(count) = limits.concurrency {
        out += &key("concurrency", &count.to_string());
    }
    if let Some(bytes) = limits.bandwidth {
        out += &key("bandwidth", &toml_string(&ByteSize(bytes).exact()));
    }
    out
}

/// What containerd does not know.
fn ours(host: &HostConfig, shows_secrets: bool) -> String {
    let mut out = String::new();
    if let Some(bytes) = host.align {
        out += &key("align", &toml_string(&ByteSize(bytes).exact()));
    }
    out += &limits(host.limits);
    if !host.redirects.is_empty() {
        out += &key("redirects", &toml_strings(&host.redirects));
    }
    match &host.proxy {
        ProxyUse::Environment => {}
        ProxyUse::Direct => out += &key("proxy", "\"none\""),
        ProxyUse::Through(url) => out += &key("proxy", &proxy(url, shows_secrets)),
    }
    if let Some(url) = &host.proxy_ping {
        out += &key("proxy_ping", &toml_string(url.as_str()));
    }
    if !host.proxy_fallback {
        out += &key("proxy_fallback", "false");
    }
    out
}
