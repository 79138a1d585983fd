//! Limits of hosts that somebody's own config tells of: for each a table by the host's name, whatever is asked of it.
//!
//! A registry, a mirror, the endpoint of a bucket and a plain server are all one host to this. The name `_default`
//! stands for all hosts that nobody has said anything of, each by itself.

use std::collections::BTreeMap;
use std::fmt::Write;

use reqwest::Url;
use toml::de::{DeTable, DeValue};

use super::table::{self, shown};
use super::written::limits;
use super::{ALL, Note, Registries, RegistryHosts, authority, in_order};
use crate::base::{toml_json, toml_string};
use crate::net::{HostLimits, canonical};

/// What somebody's own config says, by the names of hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitTables {
    named: BTreeMap<String, HostLimits>,
    /// For those that are not named.
    all: Option<HostLimits>,
}

impl LimitTables {
    /// What `tables`, a part of `text`, say of the hosts by whose names they are there, and everything that is wrong.
    pub fn read(tables: &DeTable<'_>, text: &str) -> (Self, Vec<Note>) {
        let mut read = Self::default();
        let mut wrong = Vec::new();
        for (name, value) in in_order(tables) {
            let host = &**name.get_ref();
            let line = Some(table::line(text, name.span().start));
            let mut about =
                |line, text: &str| wrong.push(Note { line, text: format!("host {:?}: {text}", shown(host)) });
            let DeValue::Table(value) = value.get_ref() else {
                about(line, "it must be a table");
                continue;
            };
            if host != ALL && RegistryHosts::plain(host).is_err() {
                about(line, "that is not the name of a host; write HOST or HOST:PORT");
                continue;
            }
            let (limits, notes) = table::read_limits(value, text);
            notes.iter().for_each(|note| about(note.line, &note.text));
            let one = canonical(host);
            if one == ALL {
                read.all = Some(limits);
            } else if read.named.insert(one.clone(), limits).is_some() {
                about(line, &format!("that is the host {one:?}, which has a table already"));
            }
        }
        (read, wrong)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.named.len() + usize::from(self.all.is_some())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is said of the host of this very address.
    pub fn of(&self, address: &Url) -> Option<HostLimits> {
        let with_port = || Some(format!("{}:{}", address.host_str()?, address.port_or_known_default()?));
        let names = [with_port(), Some(authority(address))];
        names.into_iter().flatten().find_map(|name| self.named.get(&canonical(&name)).copied())
    }

    /// What is said of all hosts of which nothing else is.
    pub fn of_all(&self) -> HostLimits {
        self.all.unwrap_or_default()
    }

    /// Hosts of which tables of registries tell limits as well: which of them hold would be anybody's guess.
    pub fn told_twice(&self, registries: &Registries) -> Vec<Note> {
        let mut twice = Vec::new();
        for (registry, hosts, has_server) in registries.all() {
            // The last one has no address where all registries are meant.
            let known = hosts.hosts.len().saturating_sub(usize::from(!has_server));
            let both = |base: &Url| self.of(base).is_some();
            for host in hosts.hosts[..known].iter().filter(|host| host.limits != HostLimits::default()) {
                if both(&host.base) {
                    let name = authority(&host.base);
                    let text = format!("host {name:?}: the table of registry {registry:?} has limits of it as well");
                    twice.push(Note { line: None, text });
                }
            }
        }
        twice
    }

    fn tables(&self) -> impl Iterator<Item = (&str, HostLimits)> {
        let named = self.named.iter().map(|(name, limits)| (name.as_str(), *limits));
        named.chain(self.all.map(|all| (ALL, all)))
    }

    /// As tables of a config file; nothing if there are none.
    pub fn written(&self) -> String {
        let mut out = String::new();
        for (name, of) in self.tables() {
            write!(out, "\n[host.{}]\n{}", toml_string(name), limits(of)).expect("a string takes it");
        }
        out
    }

    /// The same facts as JSON, by the names of hosts.
    pub fn printed(&self) -> serde_json::Value {
        let facts = |of| {
            let text = limits(of);
            let table = DeTable::parse(&text).expect("what is written is TOML");
            toml_json(&DeValue::Table(table.into_inner()))
        };
        serde_json::Value::Object(self.tables().map(|(name, of)| (name.to_owned(), facts(of))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (LimitTables, Vec<String>) {
        let table = DeTable::parse(text).unwrap();
        let Some(DeValue::Table(tables)) = table.get_ref().get("host").map(|host| host.get_ref()) else { panic!() };
        let (read, wrong) = LimitTables::read(tables, text);
        (read, wrong.iter().map(ToString::to_string).collect())
    }

    const TEXT: &str = "[host.\"Store.lan:9000\"]\nconcurrency = 8\nbandwidth = \"100MiB\"\n\
                        [host.\"docker.io\"]\nconcurrency = 4\n[host._default]\nbandwidth = \"1GiB\"\n";

    #[test]
    fn a_host_is_known_by_its_name_and_port_whatever_is_asked_of_it() {
        let (tables, wrong) = read(TEXT);
        assert_eq!((wrong, tables.len()), (vec![], 3));
        let store = Some(HostLimits { concurrency: Some(8), bandwidth: Some(100 << 20) });
        let docker = Some(HostLimits { concurrency: Some(4), bandwidth: None });
        for (address, limits) in [
            ("http://store.lan:9000/bucket", store),
            ("https://STORE.lan:9000/v2", store),
            ("https://store.lan/", None),
            ("https://registry-1.docker.io/v2", docker),
            ("https://docker.io:443/", docker),
            ("https://docker.io:5000/", None),
        ] {
            assert_eq!(tables.of(&Url::parse(address).unwrap()), limits, "{address}");
        }
        assert_eq!(tables.of_all(), HostLimits { concurrency: None, bandwidth: Some(1 << 30) });
        let (https, _) = read("[host.\"s:443\"]\nconcurrency = 1\n");
        let of = |address| https.of(&Url::parse(address).unwrap()).is_some();
        assert!(of("https://s/x") && !of("http://s/x"));
    }

    #[test]
    fn what_is_written_is_read_as_the_same() {
        let (tables, _) = read(TEXT);
        assert_eq!(read(&tables.written()).0, tables);
        let printed = serde_json::json!({
            "store.lan:9000": {"concurrency": 8, "bandwidth": "100MiB"},
            "docker.io": {"concurrency": 4},
            "_default": {"bandwidth": "1GiB"},
        });
        assert_eq!(tables.printed(), printed);
        assert_eq!(LimitTables::default().written(), "");
    }

    #[test]
    fn mistakes_are_told_with_line_host_and_remedy() {
        let (_, wrong) = read(
            "[host.a]\nconcurency = 3\n[host.\"u:hunter2@b\"]\n[host]\nx = 1\n[host.c]\nconcurrency = 0\nbandwidth = 5\n\
             [host.C]\n[host.\"http://d\"]\n",
        );
        assert_eq!(
            wrong,
            [
                "line 2: host \"a\": unknown key \"concurency\"; did you mean \"concurrency\"?",
                "line 3: host \"b\": that is not the name of a host; write HOST or HOST:PORT",
                "line 5: host \"x\": it must be a table",
                "line 8: host \"c\": bandwidth must be a string",
                "line 7: host \"c\": concurrency must be a number from 1 to 1024",
                "line 9: host \"C\": that is the host \"c\", which has a table already",
                "line 10: host \"http://d\": that is not the name of a host; write HOST or HOST:PORT",
            ]
        );
    }

    #[test]
    fn a_host_with_limits_of_two_kinds_is_named() {
        let text = "[registry.r]\n[registry.r.rafsd]\nconcurrency = 3\n[registry.r.host.\"https://m:81\"]\n\
                    [registry.r.host.\"https://m:81\".rafsd]\nbandwidth = \"1MiB\"\n\
                    [registry._default.rafsd]\nconcurrency = 1\n[host.\"m:81\"]\n[host.\"default.invalid\"]\n";
        let table = DeTable::parse(text).unwrap();
        let Some(DeValue::Table(tables)) = table.get_ref().get("registry").map(|it| it.get_ref()) else { panic!() };
        let (registries, wrong) = Registries::read(tables, text, std::path::Path::new("/"));
        assert_eq!(wrong, []);

        let twice: Vec<_> = read(text).0.told_twice(&registries).iter().map(ToString::to_string).collect();

        assert_eq!(twice, ["host \"m:81\": the table of registry \"r\" has limits of it as well"]);
    }
}
