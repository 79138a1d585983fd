//! Everything that `rafsd serve` can be told.
//!
//! One [`TABLE`] names each setting once. From it come the keys of the config file, the flags
//! (`read_ahead` is `--read-ahead`), the environment variables (`RAFSD_READ_AHEAD`), the ranges
//! and the text of `docs/CONFIG.md`. A flag goes before the environment, the environment before
//! the file, the file before the default.
//!
//! Beside them the file has tables about registries, `[registry."HOST"]`, which are what containerd has in a
//! `hosts.toml` for each ([`crate::net::hosts`]), and tables of limits, `[host."HOST"]`.
//!
//! Nothing secret is among the settings, so all of them may be printed. In tables of registries the values of
//! headers and the logins of proxies are secrets, which are not.

mod field;
mod file;
pub mod nydusd;
mod table;

pub use field::{Field, Raw, ValueError};
pub use file::{ConfigText, HOST, Located, Mistake, REGISTRY, read_file, read_text};
pub use table::TABLE;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cache::StoreOptions;
use crate::export::BackendKind;
use crate::export::fuse::Transport;
use crate::net::hosts::{LimitTables, Registries};

/// Where the config file is looked for when nobody names one. It need not exist.
pub const DEFAULT_FILE: &str = "/etc/rafsd/config.toml";

/// One setting: a row of [`TABLE`].
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Key in the config file: lower case, words joined by `_`.
    pub key: &'static str,
    /// What it may be, and where it goes.
    pub field: Field,
    /// The default as it would be written in the environment.
    pub default: &'static str,
    /// What it means, in one line.
    pub help: &'static str,
}

impl Setting {
    /// The flag of `rafsd serve`, without its two dashes.
    pub fn flag(&self) -> String {
        self.key.replace('_', "-")
    }

    /// The environment variable.
    pub fn env(&self) -> String {
        format!("RAFSD_{}", self.key.to_ascii_uppercase())
    }

    /// The setting with this key.
    pub fn named(key: &str) -> Option<&'static Setting> {
        TABLE.iter().find(|setting| setting.key == key)
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Who starts another daemon when this one dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// The keepers, unless a service manager started this one.
    Auto,
    /// The keepers that hold its descriptors.
    Keepers,
    /// Somebody else, or nobody.
    Never,
}

/// The values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Directory of the cache.
    pub cache: PathBuf,
    /// Directory of sockets.
    pub run: PathBuf,
    /// Backends in the order in which they are taken where nobody asks for one. Not empty.
    pub backend: Vec<BackendKind>,
    /// How requests of FUSE are to come, where there is a choice.
    pub fuse_transport: Transport,
    /// Limits of the cache. `decode_threads` may be 0 here; see [`Settings::store_options`].
    pub store: StoreOptions,
    /// Directory with a `hosts.toml` for each registry.
    pub hosts_dir: PathBuf,
    /// Hosts of registries, told of in the config file itself; they go before `hosts_dir`.
    pub registries: Registries,
    /// Limits of hosts, likewise.
    pub host_limits: LimitTables,
    /// Logins of docker and its like; `None` for the usual places.
    pub docker_config: Option<PathBuf>,
    /// The kubelet's config file of credential provider plugins.
    pub credential_providers: Option<PathBuf>,
    /// Directory of their programs.
    pub credential_provider_bin_dir: Option<PathBuf>,
    /// Docker-config secrets of Kubernetes.
    pub registry_secrets: Vec<PathBuf>,
    /// Exit after so long without anything to serve; `None` for never.
    pub exit_when_idle: Option<Duration>,
    pub restart: Restart,
    /// Whether SIGTERM leaves mounts to the next daemon.
    pub keep_mounts: bool,
    /// Rules of what is logged; see [`crate::telemetry::logging::parse`].
    pub log: String,
    pub log_format: LogFormat,
    /// Address of the loopback interface where `GET /metrics` is answered as well.
    pub metrics_listen: Option<SocketAddr>,
    /// Whether threads confine themselves.
    pub sandbox: bool,
    /// Where the confined daemon may read besides its own directories; empty for anywhere.
    pub sandbox_read: Vec<PathBuf>,
}

impl Default for Settings {
    /// What [`TABLE`] says.
    fn default() -> Self {
        let mut settings = Self {
            cache: PathBuf::new(),
            run: PathBuf::new(),
            backend: Vec::new(),
            fuse_transport: Transport::Dev,
            store: StoreOptions::default(),
            hosts_dir: PathBuf::new(),
            registries: Registries::default(),
            host_limits: LimitTables::default(),
            docker_config: None,
            credential_providers: None,
            credential_provider_bin_dir: None,
            registry_secrets: Vec::new(),
            exit_when_idle: None,
            restart: Restart::Auto,
            keep_mounts: false,
            log: String::new(),
            log_format: LogFormat::Text,
            metrics_listen: None,
            sandbox: true,
            sandbox_read: Vec::new(),
        };
        for setting in TABLE {
            setting.field.set(&mut settings, &Raw::Text(setting.default.to_owned())).expect("held by a test");
        }
        settings
    }
}

impl Settings {
    /// The limits of the cache, with the number of decoding threads settled.
    pub fn store_options(&self) -> StoreOptions {
        let mut store = self.store.clone();
        if store.decode_threads == 0 {
            store.decode_threads = StoreOptions::default().decode_threads;
        }
        store
    }

    /// What two settings together get wrong.
    pub fn contradictions(&self) -> Vec<Mistake> {
        let store = &self.store;
        let pairs = [
            ("memory_reserve", store.memory_reserve, "memory", store.memory),
            ("readahead_first", store.readahead_first, "readahead_most", store.readahead_most),
            ("low_water", store.low_water.into(), "high_water", store.high_water.into()),
        ];
        let wrong = pairs.into_iter().filter(|(_, lesser, _, greater)| lesser > greater);
        wrong.map(|(key, _, most, _)| Mistake::Above { key, most }).collect()
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    Default,
    /// Below the default, because memory control groups leave little.
    Memory,
    File,
    Environment,
    Flag,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Default => "default",
            Self::Memory => "memory",
            Self::File => "file",
            Self::Environment => "environment",
            Self::Flag => "flag",
        })
    }
}

/// A value that a flag or the environment gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub key: &'static str,
    pub text: String,
    pub origin: Origin,
}

/// The values with their origins.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub settings: Settings,
    /// One for each row of [`TABLE`].
    pub origins: Vec<Origin>,
    /// Everything that is wrong. The settings are not to be used unless this is empty.
    pub mistakes: Vec<Located>,
}

/// Directories of a user who is not root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserDirs {
    pub cache: PathBuf,
    pub run: PathBuf,
}

impl Resolved {
    /// Has directories that nobody has set be those of `user`, who is not root.
    pub fn fit_user(&mut self, user: Option<UserDirs>) {
        let Some(user) = user else { return };
        let free = TABLE.iter().zip(&self.origins).filter(|(_, origin)| **origin == Origin::Default);
        for (setting, _) in free {
            match setting.key {
                "cache" => self.settings.cache.clone_from(&user.cache),
                "run" => self.settings.run.clone_from(&user.run),
                _ => {}
            }
        }
    }

    /// Lowers what nobody has set to what suits a process that may use `limit` bytes of memory.
    pub fn fit_memory(&mut self, limit: Option<u64>) {
        let fitting = StoreOptions::within(limit);
        let store = &mut self.settings.store;
        let fields = [
            ("memory", &mut store.memory, fitting.memory),
            ("memory_reserve", &mut store.memory_reserve, fitting.memory_reserve),
            ("window", &mut store.window, fitting.window),
            ("prefetch_window", &mut store.prefetch_window, fitting.prefetch_window),
            ("readahead_first", &mut store.readahead_first, fitting.readahead_first),
            ("readahead_most", &mut store.readahead_most, fitting.readahead_most),
        ];
        for (key, field, fitting) in fields.into_iter().filter(|(_, field, fitting)| **field > *fitting) {
            let at = TABLE.iter().position(|setting| setting.key == key);
            if let Some(origin) = at.map(|at| &mut self.origins[at]).filter(|origin| **origin == Origin::Default) {
                *origin = Origin::Memory;
                *field = fitting;
            }
        }
        store.stream = store.stream.min(fitting.stream);
        store.unsynced = fitting.unsynced;
        // What was set goes before what was lowered.
        store.memory = store.memory.max(store.memory_reserve);
        store.readahead_most = store.readahead_most.max(store.readahead_first);
    }
}

/// Puts a config file, if there is one, and `given` over the defaults.
pub fn resolve(file: Option<ConfigText<'_>>, given: &[Given]) -> Resolved {
    let mut settings = Settings::default();
    let mut origins = vec![Origin::Default; TABLE.len()];
    let mut mistakes = Vec::new();
    let mut from = |key: &str, origin| {
        if let Some(at) = TABLE.iter().position(|setting| setting.key == key) {
            origins[at] = origin;
        }
    };
    if let Some(file) = file {
        let (keys, wrong) = read_text(file, &mut settings);
        keys.into_iter().for_each(|key| from(key, Origin::File));
        mistakes.extend(wrong);
    }
    for Given { key, text, origin } in given {
        let Some(setting) = Setting::named(key) else { continue };
        match setting.field.set(&mut settings, &Raw::Text(text.clone())) {
            Ok(()) => from(key, *origin),
            Err(cause) => mistakes.push(Mistake::Value { key: setting.key, cause }.nowhere()),
        }
    }
    mistakes.extend(settings.contradictions().into_iter().map(Mistake::nowhere));
    Resolved { settings, origins, mistakes }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> ConfigText<'_> {
        ConfigText { text, dir: std::path::Path::new("/etc/rafsd") }
    }

    fn given(key: &'static str, text: &str, origin: Origin) -> Given {
        Given { key, text: text.to_owned(), origin }
    }

    #[test]
    fn directories_that_nobody_set_are_those_of_the_user() {
        let user = UserDirs { cache: "/home/u/.cache/rafsd".into(), run: "/run/user/7/rafsd".into() };
        let mut resolved = resolve(Some(file("run = \"/set\"")), &[]);

        resolved.fit_user(Some(user.clone()));

        assert_eq!((&resolved.settings.cache, &resolved.settings.run), (&user.cache, &PathBuf::from("/set")));
        let mut of_root = resolve(None, &[]);
        of_root.fit_user(None);
        assert_eq!(of_root.settings, Settings::default());
    }

    #[test]
    fn every_default_is_valid_and_is_the_one_of_the_layer_that_uses_it() {
        let settings = Settings::default();

        assert_eq!(settings.store_options(), StoreOptions::default());
        assert_eq!(settings.contradictions(), []);
        for setting in TABLE {
            let shown = setting.field.show(&settings);
            assert_eq!(shown.text(), setting.default, "{}: a default is written as it is printed", setting.key);
        }
    }

    #[test]
    fn little_memory_lowers_what_nobody_has_set() {
        const MIB: u64 = 1 << 20;
        let fitted = |given: &[Given], limit| {
            let mut resolved = resolve(None, given);
            resolved.fit_memory(limit);
            assert_eq!(resolved.settings.contradictions(), []);
            resolved.settings.store
        };
        let set = |key, text| given(key, text, Origin::Flag);
        let small = Some(32 * MIB);

        assert_eq!(fitted(&[], None), Settings::default().store);
        let store = fitted(&[], small);
        assert_eq!((store.memory, store.memory_reserve, store.window), (4 * MIB, MIB, MIB));
        assert_eq!(fitted(&[set("memory", "64MiB")], small).memory, 64 * MIB, "what somebody said");
        let store = fitted(&[set("memory_reserve", "16MiB"), set("readahead_first", "8MiB")], small);
        assert_eq!((store.memory, store.memory_reserve), (16 * MIB, 16 * MIB));
        assert_eq!((store.readahead_first, store.readahead_most), (8 * MIB, 8 * MIB));
    }

    #[test]
    fn what_was_lowered_says_so() {
        let mut resolved = resolve(None, &[given("window", "4MiB", Origin::Flag)]);
        resolved.fit_memory(Some(32 << 20));
        let origin = |key| resolved.origins[TABLE.iter().position(|setting| setting.key == key).unwrap()];
        assert_eq!(
            (origin("memory"), origin("window"), origin("gap")),
            (Origin::Memory, Origin::Flag, Origin::Default)
        );
    }

    #[test]
    fn a_flag_goes_before_the_environment_before_the_file_before_the_default() {
        let text = "deadline = \"5s\"\nfetches = 5\nmemory = \"256MiB\"\n";
        let environment = [given("deadline", "6s", Origin::Environment), given("fetches", "6", Origin::Environment)];
        let flags = [given("deadline", "7s", Origin::Flag)];

        let resolved = resolve(Some(file(text)), &[&environment[..], &flags].concat());

        assert_eq!(resolved.mistakes, []);
        let origin = |key| resolved.origins[TABLE.iter().position(|setting| setting.key == key).unwrap()];
        let store = &resolved.settings.store;
        assert_eq!((store.deadline, origin("deadline")), (Duration::from_secs(7), Origin::Flag));
        assert_eq!((store.fetches, origin("fetches")), (6, Origin::Environment));
        assert_eq!((store.memory, origin("memory")), (256 << 20, Origin::File));
        assert_eq!((store.gap, origin("gap")), (64 << 10, Origin::Default));
    }

    #[test]
    fn what_two_settings_get_wrong_together_names_both() {
        let resolved = resolve(Some(file("memory = \"16MiB\"")), &[]);

        let told: Vec<_> = resolved.mistakes.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["memory_reserve: it must not be more than memory"]);
    }

    #[test]
    fn the_log_rules_of_the_table_are_rules() {
        assert!(crate::telemetry::logging::parse(&Settings::default().log).is_ok());
    }
}
