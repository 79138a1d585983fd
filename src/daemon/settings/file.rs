//! The config file: TOML with one key for each setting.
//!
//! All mistakes are found in one reading. An unknown key is refused by name, with the known one
//! that looks most like it.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::{Raw, Setting, Settings, TABLE, ValueError};
use crate::base::nearest;
use crate::net::hosts::{LimitTables, Note, Registries};

/// The key of the tables of registries.
pub const REGISTRY: &str = "registry";

/// The key of the tables of limits of hosts. Nothing else is no setting by itself.
pub const HOST: &str = "host";

/// Longest config file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mistake {
    #[error("unknown key {key:?}{}", .nearest.map(|key| format!("; did you mean {key:?}?")).unwrap_or_default())]
    Unknown { key: String, nearest: Option<&'static str> },
    #[error("{key}: {cause}")]
    Value { key: &'static str, cause: ValueError },
    #[error("{key}: it must not be more than {most}")]
    Above { key: &'static str, most: &'static str },
    #[error("{0}")]
    Syntax(String),
    /// In what is said of a registry or a host, which is named.
    #[error("{0}")]
    Table(String),
}

impl Mistake {
    /// A mistake that is not in the file, or not at one place of it.
    pub(super) fn nowhere(self) -> Located {
        Located { line: None, mistake: self }
    }
}

/// A mistake and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Line of the file, from 1.
    pub line: Option<usize>,
    pub mistake: Mistake,
}

impl Located {
    /// Something in a table that begins at `line`.
    fn of_table(note: Note, line: Option<usize>) -> Self {
        Self { line: note.line.or(line), mistake: Mistake::Table(note.text) }
    }

    fn is_broken_syntax_of(&self, line: Option<usize>) -> bool {
        self.line == line && matches!(self.mistake, Mistake::Syntax(_))
    }
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "line {line}: {}", self.mistake),
            None => self.mistake.fmt(f),
        }
    }
}

/// The text of a config file.
///
/// # Errors
/// It cannot be read, is longer than 1 MiB, or is not UTF-8.
pub fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 MiB"));
    }
    Ok(text)
}

/// The text of a config file and where it is.
#[derive(Clone, Copy, Debug)]
pub struct ConfigText<'a> {
    pub text: &'a str,
    /// Where relative paths in tables of registries begin: the directory of the file.
    pub dir: &'a Path,
}

/// Puts what the file says into `settings`. Gives the keys that it set, and what is wrong.
pub fn read_text(file: ConfigText<'_>, settings: &mut Settings) -> (Vec<&'static str>, Vec<Located>) {
    let ConfigText { text, dir } = file;
    let (table, errors) = DeTable::parse_recoverable(text);
    let place = |at: usize| Some(1 + text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count());
    let mut mistakes: Vec<_> = errors
        .iter()
        .map(|error| {
            let line = error.span().and_then(|span| place(span.start));
            Located { line, mistake: Mistake::Syntax(error.message().to_owned()) }
        })
        .collect();
    let mut keys = Vec::new();
    for (key, value) in table.get_ref() {
        let line = place(key.span().start);
        let wrong = match (&**key.get_ref(), value.get_ref()) {
            (REGISTRY, DeValue::Table(tables)) => {
                let (registries, wrong) = Registries::read(tables, text, dir);
                settings.registries = registries;
                wrong
            }
            (HOST, DeValue::Table(tables)) => {
                let (limits, wrong) = LimitTables::read(tables, text);
                settings.host_limits = limits;
                wrong
            }
            _ => {
                match take(key.get_ref(), value, settings) {
                    Ok(key) => keys.push(key),
                    // Where the syntax is broken, what is around it means nothing.
                    Err(_) if mistakes.iter().any(|other| other.is_broken_syntax_of(line)) => {}
                    Err(mistake) => mistakes.push(Located { line, mistake }),
                }
                continue;
            }
        };
        mistakes.extend(wrong.into_iter().map(|note| Located::of_table(note, line)));
    }
    let twice = settings.host_limits.told_twice(&settings.registries);
    mistakes.extend(twice.into_iter().map(|note| Located::of_table(note, None)));
    mistakes.sort_by_key(|mistake| mistake.line);
    (keys, mistakes)
}

fn take(key: &str, value: &Spanned<DeValue<'_>>, settings: &mut Settings) -> Result<&'static str, Mistake> {
    let Some(setting) = Setting::named(key) else {
        if [REGISTRY, HOST].contains(&key) {
            return Err(Mistake::Table(format!("{key}: it must be a table")));
        }
        let known = TABLE.iter().map(|setting| setting.key).chain([REGISTRY, HOST]);
        return Err(Mistake::Unknown { key: key.to_owned(), nearest: nearest(key, known) });
    };
    let wrong = |cause| Mistake::Value { key: setting.key, cause };
    let wanted = setting.field.wanted();
    let raw = raw(value.get_ref(), wanted).map_err(wrong)?;
    let mut changed = settings.clone();
    setting.field.set(&mut changed, &raw).map_err(wrong)?;
    setting.field.ensure_absolute(&changed).map_err(wrong)?;
    *settings = changed;
    Ok(setting.key)
}

fn raw(value: &DeValue<'_>, wanted: &'static str) -> Result<Raw, ValueError> {
    let found = |found| ValueError::Kind { wanted, found };
    match value {
        DeValue::String(text) => Ok(Raw::Text(text.clone().into_owned())),
        DeValue::Integer(number) => {
            let parsed = i64::from_str_radix(number.as_str(), number.radix());
            parsed.map(Raw::Whole).map_err(|_| ValueError::Form { text: number.as_str().to_owned(), wanted })
        }
        DeValue::Boolean(on) => Ok(Raw::Switch(*on)),
        DeValue::Array(items) => {
            let item = |item: &Spanned<DeValue<'_>>| match item.get_ref() {
                DeValue::String(text) => Ok(text.clone().into_owned()),
                _ => Err(found("a list of something else")),
            };
            items.iter().map(item).collect::<Result<_, _>>().map(Raw::Items)
        }
        DeValue::Float(_) => Err(found("a fraction")),
        DeValue::Datetime(_) => Err(found("a date")),
        DeValue::Table(_) => Err(found("a table")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, settings: &mut Settings) -> (Vec<&'static str>, Vec<Located>) {
        read_text(ConfigText { text, dir: Path::new("/etc/rafsd") }, settings)
    }

    fn told(text: &str) -> Vec<String> {
        let (_, mistakes) = read(text, &mut Settings::default());
        mistakes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn all_mistakes_are_told_at_once_with_line_and_remedy() {
        let text =
            "# ours\ndedline = \"5s\"\n\nmemory = \"lots\"\nfetches = 0\ncache = \"var/cache\"\n[store]\nx = 1\n";
        assert_eq!(
            told(text),
            [
                "line 2: unknown key \"dedline\"; did you mean \"deadline\"?",
                "line 4: memory: \"lots\" is not a size such as 64MiB",
                "line 5: fetches: 0 is out of range; it must be from 1 to 1024",
                "line 6: cache: \"var/cache\" must be an absolute path",
                "line 7: unknown key \"store\"",
            ]
        );
    }

    #[test]
    fn keys_written_like_flags_are_understood_in_the_refusal() {
        assert_eq!(
            told("read-ahead-first = 1"),
            ["line 1: unknown key \"read-ahead-first\"; did you mean \"readahead_first\"?"]
        );
        assert_eq!(
            told("Prefetch-Window = 1"),
            ["line 1: unknown key \"Prefetch-Window\"; did you mean \"prefetch_window\"?"]
        );
    }

    #[test]
    fn broken_syntax_is_told_beside_other_mistakes() {
        let told = told("deadline = 5s\nnonsense = 1\n");
        assert!(told.iter().any(|line| line.starts_with("line 1: ")), "{told:?}");
        assert!(told.iter().any(|line| line == "line 2: unknown key \"nonsense\""), "{told:?}");
    }

    #[test]
    fn numbers_of_every_notation_count_in_bytes_and_seconds() {
        let mut settings = Settings::default();
        let (keys, mistakes) = read("gap = 0x1000\ndeadline = 1_0\nfetches = \"7\"\nsandbox = false\n", &mut settings);
        assert_eq!(mistakes, []);
        assert_eq!(keys.len(), 4);
        let store = &settings.store;
        assert_eq!((store.gap, store.deadline.as_secs(), store.fetches, settings.sandbox), (4096, 10, 7, false));
    }

    #[test]
    fn tables_of_registries_are_those_of_hosts_toml_and_begin_at_the_file() {
        let text = "fetches = 3\n[registry.\"docker.io\"]\nca = \"root.pem\"\n\
                    [registry.\"docker.io\".host.\"https://m.example\"]\nclient = [[\"me.cert\", \"/k/me.key\"]]\n\
                    [registry.\"docker.io\".host.\"https://m.example\".rafsd]\nconcurrency = 4\n";
        let mut settings = Settings::default();
        let (keys, mistakes) = read(text, &mut settings);

        assert_eq!((keys, mistakes), (vec!["fetches"], vec![]));
        assert_eq!(settings.registries.len(), 1);
        let files: Vec<_> = settings.registries.files().map(|file| file.to_str().unwrap().to_owned()).collect();
        assert_eq!(files, ["/etc/rafsd/me.cert", "/k/me.key", "/etc/rafsd/root.pem"]);
    }

    #[test]
    fn mistakes_about_registries_are_told_with_line_registry_and_remedy() {
        let text = "[registry.\"docker.io\"]\nserve = \"x\"\n[registry.\"docker.io\".host.\"https://m\"]\n\
                    skip-verify = true\ncapabilitys = []\ndial_timeout = \"soon\"\n\
                    [registry.\"docker.io\".host.\"https://m\".rafsd]\nalign = \"5KiB\"\n\
                    [registry.\"u:hunter2@r\"]\n[registry]\nx = 1\n[registry.two.host.\"a\"]\n\
                    [registry.two.host.\"https://a\"]\n";
        assert_eq!(
            told(text),
            [
                "line 2: registry \"docker.io\": unknown key \"serve\"; did you mean \"server\"?",
                "line 4: registry \"docker.io\": unknown key \"skip-verify\"; did you mean \"skip_verify\"?",
                "line 5: registry \"docker.io\": unknown key \"capabilitys\"; did you mean \"capabilities\"?",
                "line 6: registry \"docker.io\": dial_timeout must be a length of time such as 3s",
                "line 8: registry \"docker.io\": align must be a power of two from 4KiB to 64MiB",
                "line 9: registry \"r\": that is not the name of a registry; write HOST or HOST:PORT",
                "line 11: registry \"x\": it must be a table",
                "line 12: registry \"two\": https://a/v2 is told of twice",
            ]
        );
        assert_eq!(told("registry = 1\n"), ["line 1: registry: it must be a table"]);
        assert_eq!(told("host = 1\n"), ["line 1: host: it must be a table"]);
        assert_eq!(told("[registries.x]\n"), ["line 1: unknown key \"registries\"; did you mean \"registry\"?"]);
    }

    #[test]
    fn limits_of_a_host_are_told_in_one_place() {
        let text = "fetches = 3\n[host.\"store.lan:9000\"]\nconcurrency = 8\nbandwith = \"1MiB\"\n";
        assert_eq!(
            told(text),
            ["line 4: host \"store.lan:9000\": unknown key \"bandwith\"; did you mean \"bandwidth\"?"]
        );
        let text = text.replace("bandwith", "bandwidth");
        let mut settings = Settings::default();
        let (keys, mistakes) = read(&text, &mut settings);
        assert_eq!((keys, mistakes, settings.host_limits.len()), (vec!["fetches"], vec![], 1));

        let both = text + "[registry.r.host.\"http://store.lan:9000\".rafsd]\nconcurrency = 1\n";
        assert_eq!(told(&both), ["host \"store.lan:9000\": the table of registry \"r\" has limits of it as well"]);
    }

    #[test]
    fn hostile_text_is_refused_and_survived() {
        let deep = "a = ".to_owned() + &"[".repeat(100_000);
        for text in
            [deep.as_str(), "= = =", "cache = [1, \"x\"]", "a.b.c = 1", "\u{feff}", "fetches = 99999999999999999999"]
        {
            let (keys, mistakes) = read(text, &mut Settings::default());
            assert!(keys.is_empty(), "{keys:?}");
            assert!(!mistakes.is_empty() || text == "\u{feff}");
        }
    }
}
