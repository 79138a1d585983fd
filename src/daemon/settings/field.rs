//! What a setting may be: kinds of values, read from text or TOML and printed again.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use super::{LogFormat, Restart, Settings};
use crate::base::{ByteSize, TimeSpan, toml_string, toml_strings};
use crate::export::BackendKind;
use crate::export::fuse::Transport;
use crate::telemetry::logging;

/// Which part of the settings, as what, within which range.
#[derive(Clone, Copy, Debug)]
pub enum Field {
    Path(fn(&mut Settings) -> &mut PathBuf),
    /// A path, or the word `none`.
    PathOrNone(fn(&mut Settings) -> &mut Option<PathBuf>),
    Paths(fn(&mut Settings) -> &mut Vec<PathBuf>),
    /// Bytes.
    Size(Range<u64>, fn(&mut Settings) -> &mut u64),
    /// Bytes, or the word `none`.
    SizeOrNone(Range<u64>, fn(&mut Settings) -> &mut Option<u64>),
    Percent(Range<u8>, fn(&mut Settings) -> &mut u8),
    Count(Range<usize>, fn(&mut Settings) -> &mut usize),
    /// Milliseconds.
    Time(Range<u64>, fn(&mut Settings) -> &mut Duration),
    /// Milliseconds, or the word `never`.
    TimeOrNever(Range<u64>, fn(&mut Settings) -> &mut Option<Duration>),
    Switch(fn(&mut Settings) -> &mut bool),
    Backends(fn(&mut Settings) -> &mut Vec<BackendKind>),
    Transport(fn(&mut Settings) -> &mut Transport),
    Restart(fn(&mut Settings) -> &mut Restart),
    LogRules(fn(&mut Settings) -> &mut String),
    LogFormat(fn(&mut Settings) -> &mut LogFormat),
    /// An address and port of the loopback interface, or the word `none`.
    LoopbackOrNone(fn(&mut Settings) -> &mut Option<SocketAddr>),
}

/// The least and the most that is accepted.
#[derive(Clone, Copy, Debug)]
pub struct Range<T>(pub T, pub T);

impl<T: Copy> Range<T> {
    fn inclusive(self) -> RangeInclusive<T> {
        self.0..=self.1
    }
}

/// A value before it has been looked at, and after it has been printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// From a flag or the environment, or a string of the file.
    Text(String),
    Whole(i64),
    Switch(bool),
    Items(Vec<String>),
}

impl Raw {
    /// As TOML has it.
    pub fn toml(&self) -> String {
        match self {
            Self::Text(text) => toml_string(text),
            Self::Whole(number) => number.to_string(),
            Self::Switch(on) => on.to_string(),
            Self::Items(items) => toml_strings(items),
        }
    }
}

/// Why a value is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    #[error("it must be {wanted}, not {found}")]
    Kind { wanted: &'static str, found: &'static str },
    #[error("{text:?} is not {wanted}")]
    Form { text: String, wanted: &'static str },
    #[error("{text} is out of range; it must be from {least} to {most}")]
    Range { text: String, least: String, most: String },
    #[error("{0:?} is given twice")]
    Twice(String),
    #[error("{0} is not of the loopback interface; listen there and put a proxy that asks who it is in front")]
    Exposed(SocketAddr),
    #[error("{0:?} must be an absolute path")]
    Relative(PathBuf),
    #[error("it must not be empty")]
    Empty,
}

impl Raw {
    /// As it is written in the environment.
    pub fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Whole(number) => number.to_string(),
            Self::Switch(on) => if *on { "on" } else { "off" }.to_owned(),
            Self::Items(items) => items.join(","),
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Whole(_) => "a number",
            Self::Switch(_) => "a boolean",
            Self::Items(_) => "a list",
        }
    }

    /// A single word or number.
    fn one(&self, wanted: &'static str) -> Result<String, ValueError> {
        match self {
            Self::Text(text) => Ok(text.trim().to_owned()),
            Self::Whole(number) => Ok(number.to_string()),
            Self::Switch(_) | Self::Items(_) => Err(ValueError::Kind { wanted, found: self.kind() }),
        }
    }

    /// Text that is not a number.
    fn string(&self, wanted: &'static str) -> Result<&str, ValueError> {
        match self {
            Self::Text(text) => Ok(text),
            other => Err(ValueError::Kind { wanted, found: other.kind() }),
        }
    }

    fn list(&self, wanted: &'static str) -> Result<Vec<String>, ValueError> {
        match self {
            Self::Items(items) => Ok(items.clone()),
            Self::Text(text) if text.is_empty() => Ok(Vec::new()),
            Self::Text(text) => Ok(text.split(',').map(|item| item.trim().to_owned()).collect()),
            other => Err(ValueError::Kind { wanted, found: other.kind() }),
        }
    }
}

fn within<T: PartialOrd + Copy>(
    value: T,
    range: Range<T>,
    text: &str,
    show: impl Fn(T) -> String,
) -> Result<T, ValueError> {
    if range.inclusive().contains(&value) {
        return Ok(value);
    }
    Err(ValueError::Range { text: text.to_owned(), least: show(range.0), most: show(range.1) })
}

fn size(text: &str, range: Range<u64>, wanted: &'static str) -> Result<u64, ValueError> {
    let size: ByteSize = text.parse().map_err(|_| ValueError::Form { text: text.to_owned(), wanted })?;
    within(size.0, range, text, |bytes| ByteSize(bytes).exact())
}

fn time(text: &str, range: Range<u64>, wanted: &'static str) -> Result<Duration, ValueError> {
    let span: TimeSpan = text.parse().map_err(|_| ValueError::Form { text: text.to_owned(), wanted })?;
    let ms = u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX);
    within(ms, range, text, show_ms).map(Duration::from_millis)
}

fn show_ms(ms: u64) -> String {
    TimeSpan(Duration::from_millis(ms)).to_string()
}

fn path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() { Err(ValueError::Empty) } else { Ok(PathBuf::from(text)) }
}

fn unique<T: PartialEq>(items: Vec<T>, texts: &[String]) -> Result<Vec<T>, ValueError> {
    match (1..items.len()).find(|at| items[..*at].contains(&items[*at])) {
        Some(at) => Err(ValueError::Twice(texts[at].clone())),
        None => Ok(items),
    }
}

impl Field {
    /// What a value has to be, for messages.
    pub fn wanted(&self) -> &'static str {
        match self {
            Self::Path(_) => "a path",
            Self::PathOrNone(_) => "a path, or none",
            Self::Paths(_) => "a list of paths",
            Self::Size(..) => "a size such as 64MiB",
            Self::SizeOrNone(..) => "a size such as 64MiB, or none",
            Self::Percent(..) => "a percentage",
            Self::Count(..) => "a number",
            Self::Time(..) => "a length of time such as 30s",
            Self::TimeOrNever(..) => "a length of time such as 30s, or never",
            Self::Switch(_) => "on or off",
            Self::Backends(_) => "a list of cachefiles, fanotify, fuse-device and fuse-tree",
            Self::Transport(_) => "dev or io-uring",
            Self::Restart(_) => "auto, keepers or never",
            Self::LogRules(_) => "a level or rules such as info,rafsd::cache=debug",
            Self::LogFormat(_) => "text or json",
            Self::LoopbackOrNone(_) => "an address such as 127.0.0.1:9660, or none",
        }
    }

    /// What stands for the value in help texts.
    pub fn value_name(&self) -> &'static str {
        match self {
            Self::Path(_) => "DIR",
            Self::PathOrNone(_) => "PATH",
            Self::Paths(_) => "DIR,...",
            Self::Size(..) | Self::SizeOrNone(..) => "SIZE",
            Self::Percent(..) => "PERCENT",
            Self::Count(..) => "NUMBER",
            Self::Time(..) | Self::TimeOrNever(..) => "TIME",
            Self::Switch(_) => "on|off",
            Self::Backends(_) => "BACKEND,...",
            Self::Transport(_) => "dev|io-uring",
            Self::Restart(_) => "auto|keepers|never",
            Self::LogRules(_) => "LEVEL",
            Self::LogFormat(_) => "text|json",
            Self::LoopbackOrNone(_) => "ADDRESS",
        }
    }

    /// The range, where there is one.
    pub fn range(&self) -> Option<(String, String)> {
        match self {
            Self::Size(range, _) | Self::SizeOrNone(range, _) => {
                Some((ByteSize(range.0).exact(), ByteSize(range.1).exact()))
            }
            Self::Percent(range, _) => Some((format!("{}%", range.0), format!("{}%", range.1))),
            Self::Count(range, _) => Some((range.0.to_string(), range.1.to_string())),
            Self::Time(range, _) | Self::TimeOrNever(range, _) => Some((show_ms(range.0), show_ms(range.1))),
            _ => None,
        }
    }

    /// Checks a value and puts it into `settings`, which an error leaves as they were.
    pub fn set(&self, settings: &mut Settings, raw: &Raw) -> Result<(), ValueError> {
        let wanted = self.wanted();
        let form = |text: &str| ValueError::Form { text: text.to_owned(), wanted };
        match *self {
            Self::Path(at) => *at(settings) = path(raw.string(wanted)?)?,
            Self::PathOrNone(at) => {
                let text = raw.string(wanted)?;
                *at(settings) = if text == "none" { None } else { Some(path(text)?) };
            }
            Self::Paths(at) => {
                *at(settings) = raw.list(wanted)?.iter().map(|item| path(item)).collect::<Result<_, _>>()?;
            }
            Self::Size(range, at) => *at(settings) = size(&raw.one(wanted)?, range, wanted)?,
            Self::SizeOrNone(range, at) => {
                let text = raw.one(wanted)?;
                *at(settings) = if text == "none" { None } else { Some(size(&text, range, wanted)?) };
            }
            Self::Percent(range, at) => {
                let text = raw.one(wanted)?;
                let number = text.trim_end_matches('%').parse().map_err(|_| form(&text))?;
                *at(settings) = within(number, range, &text, |number| format!("{number}%"))?;
            }
            Self::Count(range, at) => {
                let text = raw.one(wanted)?;
                let number = text.parse().map_err(|_| form(&text))?;
                *at(settings) = within(number, range, &text, |number| number.to_string())?;
            }
            Self::Time(range, at) => *at(settings) = time(&raw.one(wanted)?, range, wanted)?,
            Self::TimeOrNever(range, at) => {
                let text = raw.one(wanted)?;
                *at(settings) = if text == "never" { None } else { Some(time(&text, range, wanted)?) };
            }
            Self::Switch(at) => {
                *at(settings) = match raw {
                    Raw::Switch(on) => *on,
                    other => match other.one(wanted)?.to_ascii_lowercase().as_str() {
                        "on" | "true" | "yes" => true,
                        "off" | "false" | "no" => false,
                        text => return Err(form(text)),
                    },
                };
            }
            Self::Backends(at) => *at(settings) = backends(&raw.list(wanted)?, wanted)?,
            Self::Transport(at) => {
                *at(settings) = match raw.string(wanted)? {
                    "dev" => Transport::Dev,
                    "io-uring" => Transport::IoUring,
                    text => return Err(form(text)),
                };
            }
            Self::Restart(at) => {
                *at(settings) = match raw.string(wanted)? {
                    "auto" => Restart::Auto,
                    "keepers" => Restart::Keepers,
                    "never" => Restart::Never,
                    text => return Err(form(text)),
                };
            }
            Self::LogRules(at) => {
                let text = raw.string(wanted)?;
                logging::parse(text).map_err(|_| form(text))?;
                text.clone_into(at(settings));
            }
            Self::LogFormat(at) => {
                *at(settings) = match raw.string(wanted)? {
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    text => return Err(form(text)),
                };
            }
            Self::LoopbackOrNone(at) => {
                *at(settings) = match raw.string(wanted)?.trim() {
                    "none" => None,
                    text => Some(loopback(text, wanted)?),
                };
            }
        }
        Ok(())
    }

    /// The value in `settings`, as TOML would have it.
    pub fn show(&self, settings: &Settings) -> Raw {
        // The table has one way to a field, and that is for writing.
        let settings = &mut settings.clone();
        match *self {
            Self::Path(at) => Raw::Text(at(settings).to_string_lossy().into_owned()),
            Self::PathOrNone(at) => Raw::Text(
                at(settings).as_ref().map_or_else(|| "none".into(), |path| path.to_string_lossy().into_owned()),
            ),
            Self::Paths(at) => Raw::Items(at(settings).iter().map(|p| p.to_string_lossy().into_owned()).collect()),
            Self::Size(_, at) => Raw::Text(ByteSize(*at(settings)).exact()),
            Self::SizeOrNone(_, at) => {
                Raw::Text(at(settings).map_or_else(|| "none".to_owned(), |bytes| ByteSize(bytes).exact()))
            }
            Self::Percent(_, at) => Raw::Whole((*at(settings)).into()),
            Self::Count(_, at) => Raw::Whole(i64::try_from(*at(settings)).unwrap_or(i64::MAX)),
            Self::Time(_, at) => Raw::Text(TimeSpan(*at(settings)).to_string()),
            Self::TimeOrNever(_, at) => {
                Raw::Text(at(settings).map_or_else(|| "never".to_owned(), |time| TimeSpan(time).to_string()))
            }
            Self::Switch(at) => Raw::Switch(*at(settings)),
            Self::Backends(at) => Raw::Items(at(settings).iter().map(ToString::to_string).collect()),
            Self::Transport(at) => Raw::Text(at(settings).to_string()),
            Self::Restart(at) => Raw::Text(
                match at(settings) {
                    Restart::Auto => "auto",
                    Restart::Keepers => "keepers",
                    Restart::Never => "never",
                }
                .to_owned(),
            ),
            Self::LogRules(at) => Raw::Text(at(settings).clone()),
            Self::LogFormat(at) => Raw::Text(
                match at(settings) {
                    LogFormat::Text => "text",
                    LogFormat::Json => "json",
                }
                .to_owned(),
            ),
            Self::LoopbackOrNone(at) => {
                Raw::Text(at(settings).map_or_else(|| "none".to_owned(), |address| address.to_string()))
            }
        }
    }

    /// Fails for paths that would mean something else in every working directory.
    pub(super) fn ensure_absolute(&self, settings: &Settings) -> Result<(), ValueError> {
        let settings = &mut settings.clone();
        let paths = match *self {
            Self::Path(at) => vec![at(settings).clone()],
            Self::PathOrNone(at) => at(settings).iter().cloned().collect(),
            Self::Paths(at) => at(settings).clone(),
            _ => Vec::new(),
        };
        paths.into_iter().find(|path| !path.is_absolute()).map_or(Ok(()), |path| Err(ValueError::Relative(path)))
    }
}

/// Metrics are told to whoever asks, so nobody outside of this machine may.
fn loopback(text: &str, wanted: &'static str) -> Result<SocketAddr, ValueError> {
    let address: SocketAddr = text.parse().map_err(|_| ValueError::Form { text: text.to_owned(), wanted })?;
    if address.ip().is_loopback() { Ok(address) } else { Err(ValueError::Exposed(address)) }
}

fn backends(names: &[String], wanted: &'static str) -> Result<Vec<BackendKind>, ValueError> {
    let kind = |name: &String| match name.as_str() {
        "cachefiles" => Ok(BackendKind::Cachefiles),
        "fanotify" => Ok(BackendKind::Fanotify),
        "fuse-device" => Ok(BackendKind::FuseDevice),
        "fuse-tree" => Ok(BackendKind::FuseTree),
        _ => Err(ValueError::Form { text: name.clone(), wanted }),
    };
    let kinds: Vec<_> = names.iter().map(kind).collect::<Result<_, _>>()?;
    if kinds.is_empty() { Err(ValueError::Empty) } else { unique(kinds, names) }
}

#[cfg(test)]
mod tests {
    use super::super::Setting;
    use super::*;

    fn refused(key: &str, raw: &Raw) -> String {
        let mut settings = Settings::default();
        let error = Setting::named(key).unwrap().field.set(&mut settings, raw).unwrap_err();
        assert_eq!(settings, Settings::default(), "an error changes nothing");
        error.to_string()
    }

    #[test]
    fn refusals_say_what_is_wanted() {
        let text = |text: &str| Raw::Text(text.to_owned());
        let items = |items: &[&str]| Raw::Items(items.iter().map(|item| (*item).to_owned()).collect());
        for (key, raw, told) in [
            ("memory", text("lots"), "\"lots\" is not a size such as 64MiB"),
            ("memory", Raw::Whole(5), "5 is out of range; it must be from 1MiB to 1TiB"),
            ("memory", Raw::Switch(true), "it must be a size such as 64MiB, not a boolean"),
            ("deadline", text("0s"), "0s is out of range; it must be from 100ms to 1h"),
            ("deadline", Raw::Whole(-1), "\"-1\" is not a length of time such as 30s"),
            ("exit_when_idle", text("soon"), "\"soon\" is not a length of time such as 30s, or never"),
            ("fetches", Raw::Whole(0), "0 is out of range; it must be from 1 to 1024"),
            ("sandbox", text("maybe"), "\"maybe\" is not on or off"),
            ("backend", items(&[]), "it must not be empty"),
            ("backend", items(&["fuse"]), "\"fuse\" is not a list of cachefiles, fanotify, fuse-device and fuse-tree"),
            ("backend", text("fanotify,fanotify"), "\"fanotify\" is given twice"),
            ("cache", text(""), "it must not be empty"),
            ("cache", Raw::Whole(1), "it must be a path, not a number"),
            ("fuse_transport", text("uring"), "\"uring\" is not dev or io-uring"),
            ("restart", text("always"), "\"always\" is not auto, keepers or never"),
            ("log_format", text("xml"), "\"xml\" is not text or json"),
            ("metrics_listen", text("9660"), "\"9660\" is not an address such as 127.0.0.1:9660, or none"),
            ("metrics_listen", Raw::Whole(9660), "it must be an address such as 127.0.0.1:9660, or none, not a number"),
            (
                "metrics_listen",
                text("0.0.0.0:9660"),
                "0.0.0.0:9660 is not of the loopback interface; listen there and put a proxy that asks who it is in front",
            ),
            ("log", text("loud"), "\"loud\" is not a level or rules such as info,rafsd::cache=debug"),
            ("log", text("rafsd=loud"), "\"rafsd=loud\" is not a level or rules such as info,rafsd::cache=debug"),
        ] {
            assert_eq!(refused(key, &raw), told, "{key}");
        }
    }

    #[test]
    fn lists_are_taken_from_text_and_from_toml() {
        let mut settings = Settings::default();
        let field = &Setting::named("backend").unwrap().field;
        for raw in [Raw::Text("fanotify, cachefiles".into()), Raw::Items(vec!["fanotify".into(), "cachefiles".into()])]
        {
            field.set(&mut settings, &raw).unwrap();
            assert_eq!(settings.backend, [BackendKind::Fanotify, BackendKind::Cachefiles]);
        }
    }
}
