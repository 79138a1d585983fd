//! The log on standard error, and changing how much of it there is while the program runs.
//!
//! Lines have facts as fields. A line about a request of the kernel has its number in the field
//! `request`, in every layer. Addresses are logged as sources describe themselves, without user and
//! query. A line of text stays a line, whatever names and messages are in it.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::{Arc, Mutex};

use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{FormatFields, debug_fn};
use tracing_subscriber::fmt::{MakeWriter, layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::base::Plain;

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
        let lines = lines(format, io::stderr, io::stderr().is_terminal());
        tracing_subscriber::registry().with(lines.with_filter(filter)).init();
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

/// Writes lines of this form by `writer`; for people, coloured if `colours`.
fn lines<W>(format: Format, writer: W, colours: bool) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = layer().with_writer(writer).with_ansi(colours);
    match format {
        Format::Text => layer.fmt_fields(plain_fields()).boxed(),
        Format::Json => layer.json().boxed(),
    }
}

/// Fields as the library writes them, but all in one line. The library itself lets a newline pass, with which a name
/// could forge a line.
fn plain_fields() -> impl for<'a> FormatFields<'a> + Send + Sync {
    debug_fn(|writer, field, value| {
        let value = Plain(format_args!("{value:?}"));
        match (field.name(), writer.has_ansi_escapes()) {
            ("message", _) => write!(writer, "{value}"),
            (name, false) => write!(writer, "{name}={value}"),
            // In italics, and dim.
            (name, true) => write!(writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"),
        }
    })
    .delimited(" ")
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
    use std::io::Write;

    use super::*;

    /// Keeps what was logged.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What a log of this form says of a hostile name.
    fn logged(format: Format, colours: bool) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let name = "/mnt\n2026-01-01T00:00:00Z ERROR rafsd: forged\u{1b}[2J";
        let log = tracing_subscriber::registry().with(lines(format, move || writer.clone(), colours));
        tracing::subscriber::with_default(log, || {
            tracing::info!(dir = %name, backend = ?Some(1), "mounted {name}");
        });
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn a_name_neither_forges_a_line_nor_drives_a_terminal() {
        let name = "/mnt\\n2026-01-01T00:00:00Z ERROR rafsd: forged\\u{1b}[2J";
        let text = logged(Format::Text, false);
        assert!(text.ends_with(&format!(": mounted {name} dir={name} backend=Some(1)\n")), "{text:?}");
        assert_eq!(text.lines().count(), 1, "{text}");

        let coloured = logged(Format::Text, true);
        assert!(coloured.contains("\u{1b}[3mdir\u{1b}[0m") && coloured.contains(name), "{coloured:?}");
        assert!(!coloured.contains("\u{1b}[2J") && coloured.lines().count() == 1, "{coloured:?}");

        let json: serde_json::Value = serde_json::from_str(&logged(Format::Json, false)).unwrap();
        assert_eq!(json["fields"]["dir"], "/mnt\n2026-01-01T00:00:00Z ERROR rafsd: forged\u{1b}[2J");
    }

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
