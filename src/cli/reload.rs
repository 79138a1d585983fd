//! SIGHUP to a daemon: its settings are read again.
//!
//! What is logged changes at once. Everything else is what threads, queues, keepers and the sandbox
//! were made with, and takes another daemon, to which `rafsd upgrade` hands over.

use anyhow::Context;

use super::settings::SettingsArgs;
use crate::daemon::settings::{HOST, REGISTRY, Settings, TABLE};
use crate::telemetry::logging::LogControl;

/// What a daemon was started with.
pub(super) struct Reload {
    args: SettingsArgs,
    /// As they were found when it started.
    used: Settings,
    log: LogControl,
}

impl Reload {
    pub(super) fn new(args: SettingsArgs, used: Settings, log: LogControl) -> Self {
        Self { args, used, log }
    }

    /// Reads the settings again, from flags, environment and file, and logs what came of it. Nothing
    /// changes if anything is wrong in them. Blocks.
    pub(super) fn run(&self) {
        match self.apply() {
            Ok(waiting) if waiting.is_empty() => tracing::info!("settings were read again"),
            Ok(waiting) => tracing::warn!(
                settings = waiting.join(", "),
                "settings were read again; those that differ are for the next daemon: `rafsd upgrade` starts it"
            ),
            Err(error) => tracing::error!(error = format!("{error:#}"), "settings stay as they are"),
        }
    }

    /// Gives the keys of what has changed and could not be applied.
    fn apply(&self) -> anyhow::Result<Vec<&'static str>> {
        let (resolved, _) = self.args.resolve()?;
        let now = resolved.settings;
        self.log.set(&now.log).context("log")?;
        let differs = TABLE.iter().filter(|it| it.key != "log" && it.field.show(&now) != it.field.show(&self.used));
        let registries = (now.registries != self.used.registries).then_some(REGISTRY);
        let hosts = (now.host_limits != self.used.host_limits).then_some(HOST);
        Ok(differs.map(|setting| setting.key).chain(registries).chain(hosts).collect())
    }
}
