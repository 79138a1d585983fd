//! Registries that somebody's own config tells of: for each a table with what its `hosts.toml` would have.
//!
//! The tables are read by the code that reads `hosts.toml`. The config is ours alone, so that an unknown key is a
//! mistake. The name `_default` stands for all registries that are not named. Registries go by their [`canonical`] names.

use std::collections::BTreeMap;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use super::table::{self, shown};
use super::{ALL, HostConfig, Note, RegistryHosts, in_order};
use crate::net::canonical;

/// What somebody's own config says, by the names of registries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registries {
    named: BTreeMap<String, RegistryHosts>,
    /// For those that are not named.
    all: Option<All>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct All {
    hosts: RegistryHosts,
    /// Whether all of them are at this server, instead of where each is.
    has_server: bool,
}

impl Registries {
    /// What `tables`, a part of `text`, say of the registries by whose names they are there, and everything that is
    /// wrong. Relative paths begin at `folder`.
    pub fn read(tables: &DeTable<'_>, text: &str, folder: &Path) -> (Self, Vec<Note>) {
        let mut registries = Self::default();
        let mut wrong = Vec::new();
        let mut names = BTreeMap::new();
        for (name, value) in in_order(tables) {
            let registry = &**name.get_ref();
            let line = Some(table::line(text, name.span().start));
            let mut about = |line, text: &str| {
                wrong.push(Note { line, text: format!("registry {:?}: {text}", shown(registry)) });
            };
            let DeValue::Table(value) = value.get_ref() else {
                about(line, "it must be a table");
                continue;
            };
            let one = canonical(registry);
            if let Some(other) = names.insert(one.clone(), registry) {
                about(line, &format!("that is the registry {:?}, which has a table already", shown(other)));
                continue;
            }
            // Any name does where all are meant.
            let asked = if one == ALL { "default.invalid" } else { &one };
            let read = match table::read_table(value, text, asked, folder) {
                Ok(read) => read,
                Err(error) => {
                    about(line, &error.to_string());
                    continue;
                }
            };
            for note in &read.unknown {
                about(note.line, &note.text);
            }
            match read.hosts {
                Ok(hosts) => match twice(&hosts) {
                    Some(host) => about(line, &format!("{} is told of twice", host.base)),
                    None => registries.put(one, hosts, value.contains_key("server")),
                },
                Err(notes) => notes.iter().for_each(|note| about(note.line, &note.text)),
            }
        }
        (registries, wrong)
    }

    /// `name` is a [`canonical`] one.
    fn put(&mut self, name: String, hosts: RegistryHosts, has_server: bool) {
        if name == ALL {
            self.all = Some(All { hosts, has_server });
        } else {
            self.named.insert(name, hosts);
        }
    }

    /// Has `registry` be asked at `hosts`.
    pub fn insert(&mut self, registry: &str, hosts: RegistryHosts) {
        self.put(canonical(registry), hosts, true);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.named.len() + usize::from(self.all.is_some())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their names, hosts, and whether it was said where the origin is.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &RegistryHosts, bool)> {
        let named = self.named.iter().map(|(name, hosts)| (name.as_str(), hosts, true));
        named.chain(self.all.iter().map(|all| (ALL, &all.hosts, all.has_server)))
    }

    /// The files that they name.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.all().flat_map(|(_, hosts, _)| &hosts.hosts).flat_map(HostConfig::files)
    }

    /// What is said of this very registry.
    pub(super) fn named(&self, registry: &str) -> Option<&RegistryHosts> {
        self.named.get(&canonical(registry))
    }

    /// Whether something is said of all registries.
    pub(super) fn has_all(&self) -> bool {
        self.all.is_some()
    }

    /// What is said of all, for one that is where `plain` says.
    pub(super) fn as_one_of_all(&self, plain: RegistryHosts) -> RegistryHosts {
        let Some(all) = &self.all else { return plain };
        let mut hosts = all.hosts.clone();
        if let (false, Some(origin), Some(own)) = (all.has_server, hosts.hosts.last_mut(), plain.hosts.last()) {
            origin.base = own.base.clone();
        }
        hosts
    }
}

/// A host that comes a second time, such as with and without its scheme.
fn twice(hosts: &RegistryHosts) -> Option<&HostConfig> {
    // The last is the origin, which may well be its own mirror.
    let mirrors = hosts.hosts.split_last().map_or(&[][..], |(_, mirrors)| mirrors);
    let is_known = |at: usize| mirrors[..at].iter().any(|other| other.base == mirrors[at].base);
    (1..mirrors.len()).find(|at| is_known(*at)).map(|at| &mirrors[at])
}
