//! The log on standard error, and changing how much of it there is while the program runs.
//!
//! Lines have facts as fields. A line about a request of the kernel has its number in the field
//! `request`, in every layer. Addresses are logged as sources describe themselves, without user and
//! query.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// How lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people, coloured on a terminal.
    Text,
    /// One object per line.
    Json,
}

/// What is logged, changeable at any time. Clones are the same.
#[derive(Clone, Debug)]
pub struct LogControl {
    filter: Option<reload::Handle<Targets, Registry>>,
    rules: Arc<Mutex<Targets>>,
}

/// A level that means nothing.
#[derive(Debug, thiserror::Error)]
#[error("{rules:?} is not a log level: error, warn, info, debug, trace, off, or rules like info,rafsd::cache=debug")]
pub struct InvalidRules {
    rules: String,
}

impl LogControl {
    /// Begins to log. Once per process.
    pub fn start(rules: Targets, format: Format) -> Self {
        let (filter, handle) = reload::Layer::new(rules.clone());
        let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
        let layer = match format {
            Format::Text => layer.boxed(),
            Format::Json => layer.json().boxed(),
        };
        tracing_subscriber::registry().with(layer.with_filter(filter)).init();
        Self { filter: Some(handle), rules: Arc::new(Mutex::new(rules)) }
    }

    /// One that logs nothing and only remembers its rules: for tests.
    pub fn silent() -> Self {
        Self { filter: None, rules: Arc::default() }
    }

    /// Logs by these rules from now on; see [`parse`].
    pub fn set(&self, rules: &str) -> Result<(), InvalidRules> {
        let targets = parse(rules)?;
        let mut current = self.rules.lock().unwrap();
        if let Some(filter) = &self.filter {
            // It fails only when the subscriber is gone, and then nobody logs.
            let _ = filter.reload(targets.clone());
        }
        *current = targets;
        Ok(())
    }

    /// The rules in force.
    pub fn rules(&self) -> String {
        self.rules.lock().unwrap().to_string()
    }
}

impl fmt::Display for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.rules())
    }
}

/// Rules as people write them: a level, or a list like `info,rafsd::cache=debug`. A level alone holds
/// for this program; libraries then speak at most at `warn`.
pub fn parse(rules: &str) -> Result<Targets, InvalidRules> {
    // The library takes an empty text for `error` here, and for silence below.
    let is_level = |part: &str| part.trim().parse::<LevelFilter>().ok().filter(|_| !part.trim().is_empty());
    if let Some(level) = is_level(rules) {
        return Ok(Targets::new().with_default(level.min(LevelFilter::WARN)).with_target("rafsd", level));
    }
    // It also takes a word that is no level for a module to log everything of.
    let is_rule = |part: &str| part.contains('=') || is_level(part).is_some();
    let parsed = rules.parse().ok().filter(|_| rules.split(',').all(is_rule));
    parsed.ok_or_else(|| InvalidRules { rules: rules.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_levels_or_lists_and_nothing_else() {
        let log = LogControl::silent();
        for (given, shown) in [
            ("debug", "rafsd=debug,warn"),
            ("off", "rafsd=off,off"),
            ("error", "rafsd=error,error"),
            ("info,rafsd::cache=debug", "rafsd::cache=debug,info"),
        ] {
            log.set(given).unwrap();
            assert_eq!(log.rules(), shown, "{given}");
        }
        for bad in ["", " ", "loud", "rafsd=loud"] {
            let error = log.set(bad).unwrap_err().to_string();
            assert!(error.contains("is not a log level"), "{bad:?}: {error}");
        }
        assert_eq!(log.rules(), "rafsd::cache=debug,info", "a refused rule changes nothing");
    }
}
