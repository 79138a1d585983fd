//! Patterns that name entries of a source, after the manner of gitignore files.
//!
//! Written here rather than taken from a crate because names are bytes, not text, and the language
//! is small:
//!
//! * `*` stands for any bytes but `/`, `?` for one of them, `[a-z]` for one of a set, `[!a-z]` for
//!   one not in it; `\` takes away the meaning of what follows it.
//! * A pattern without `/` names entries in every directory; with a `/`, at its start or within,
//!   only those at that path below the root. A `/` at its end restricts it to directories.
//! * `**` between slashes stands for any number of directories, none included; at the end, for
//!   everything below.
//!
//! There is no negation. Who excludes a directory excludes what is in it.

/// One pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    /// What each name of the path must look like.
    names: Vec<Name>,
    directories_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    /// Any number of names.
    Any,
    Glob(Vec<Token>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Byte(u8),
    One,
    Many,
    /// A byte that is in one of the ranges; or in none of them, if negated.
    Set {
        ranges: Vec<(u8, u8)>,
        negated: bool,
    },
}

/// Text that is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    #[error("the pattern is empty")]
    Empty,
    #[error("patterns that take an exclusion back (!...) are not supported; write \\! for a name that starts so")]
    Negated,
    #[error("the [ at byte {0} has no ] behind it")]
    OpenSet(usize),
    #[error("the pattern ends in a \\ that protects nothing")]
    Escape,
    #[error("a path has no '.' or '..' in it, so this matches nothing")]
    Dots,
}

impl Pattern {
    /// Reads a pattern.
    pub fn new(text: &[u8]) -> Result<Self, InvalidPattern> {
        if text.starts_with(b"!") {
            return Err(InvalidPattern::Negated);
        }
        let directories_only = text.ends_with(b"/");
        let anchored = text.iter().rposition(|byte| *byte != b'/').is_some_and(|last| text[..last].contains(&b'/'));
        let mut names = if anchored { Vec::new() } else { vec![Name::Any] };
        let mut at = 0;
        for part in text.split(|byte| *byte == b'/') {
            match part {
                b"" => {}
                b"." | b".." => return Err(InvalidPattern::Dots),
                b"**" => names.push(Name::Any),
                _ => names.push(Name::Glob(tokens(part, at)?)),
            }
            at += part.len() + 1;
        }
        if text.iter().all(|byte| *byte == b'/') {
            return Err(InvalidPattern::Empty);
        }
        if let Some(Name::Any) = names.last() {
            names.push(Name::Glob(vec![Token::Many]));
        }
        Ok(Self { names, directories_only })
    }

    /// Whether the pattern names the entry at `path`, given as names from the root.
    pub fn matches(&self, path: &[&[u8]], is_directory: bool) -> bool {
        if !is_directory && self.directories_only {
            return false;
        }
        // Where only the last name counts, deep paths need not be searched.
        let path = match self.names.as_slice() {
            [Name::Any, Name::Glob(_)] => &path[path.len().saturating_sub(1)..],
            _ => path,
        };
        !path.is_empty() && match_names(&self.names, path, Until::End, match_tokens)
    }

    /// Whether the pattern names the entry at `path` or a directory above it. Takes no longer than
    /// to look for one of them.
    pub fn matches_at_any_level(&self, path: &[&[u8]], is_directory: bool) -> bool {
        self.matches_above(path, is_directory, match_tokens)
    }

    fn matches_above(&self, path: &[&[u8]], is_directory: bool, fits: impl FnMut(&[Token], &[u8]) -> bool) -> bool {
        let directories = if is_directory { path.len() } else { path.len().saturating_sub(1) };
        let path = if self.directories_only { &path[..directories] } else { path };
        match_names(&self.names, path, Until::Anywhere, fits)
    }
}

impl std::str::FromStr for Pattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        Self::new(text.as_bytes())
    }
}

fn tokens(part: &[u8], at: usize) -> Result<Vec<Token>, InvalidPattern> {
    let mut out = Vec::new();
    let mut rest = part;
    while let [byte, behind @ ..] = rest {
        rest = behind;
        out.push(match byte {
            b'*' => Token::Many,
            b'?' => Token::One,
            b'\\' => {
                let [escaped, behind @ ..] = rest else { return Err(InvalidPattern::Escape) };
                rest = behind;
                Token::Byte(*escaped)
            }
            b'[' => {
                let (set, behind) = set(rest).ok_or(InvalidPattern::OpenSet(at + part.len() - rest.len() - 1))?;
                rest = behind;
                set
            }
            other => Token::Byte(*other),
        });
    }
    Ok(out)
}

/// The set whose bytes start after a `[`, and what follows its `]`.
fn set(mut rest: &[u8]) -> Option<(Token, &[u8])> {
    let negated = matches!(rest.first(), Some(b'!' | b'^'));
    if negated {
        rest = &rest[1..];
    }
    let mut ranges = Vec::new();
    loop {
        match rest {
            // The first byte of a set may be the one that would end it.
            [b']', behind @ ..] if !ranges.is_empty() => return Some((Token::Set { ranges, negated }, behind)),
            [low, b'-', high, behind @ ..] if *high != b']' => {
                ranges.push((*low, *high));
                rest = behind;
            }
            [byte, behind @ ..] => {
                ranges.push((*byte, *byte));
                rest = behind;
            }
            [] => return None,
        }
    }
}

/// How much of a text a pattern must match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    End,
    /// Any beginning of it will do.
    Anywhere,
}

/// Matches with one place to come back to, so that the work is bounded by the product of the
/// lengths: whatever a later `**` can match, an earlier one need not try.
fn match_names(pattern: &[Name], path: &[&[u8]], until: Until, mut fits: impl FnMut(&[Token], &[u8]) -> bool) -> bool {
    backtrack(
        pattern,
        path,
        until,
        |name| matches!(name, Name::Any),
        |name, part| match name {
            Name::Glob(tokens) => fits(tokens, part),
            Name::Any => unreachable!("asked for above"),
        },
    )
}

fn match_tokens(tokens: &[Token], name: &[u8]) -> bool {
    backtrack(
        tokens,
        name,
        Until::End,
        |token| matches!(token, Token::Many),
        |token, byte| match token {
            Token::Byte(want) => want == byte,
            Token::One => true,
            Token::Set { ranges, negated } => ranges.iter().any(|(low, high)| (low..=high).contains(&byte)) != *negated,
            Token::Many => unreachable!("asked for above"),
        },
    )
}

fn backtrack<P, T>(
    pattern: &[P],
    text: &[T],
    until: Until,
    is_many: impl Fn(&P) -> bool,
    mut fits: impl FnMut(&P, &T) -> bool,
) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut resume = None;
    loop {
        match pattern.get(p) {
            Some(many) if is_many(many) => {
                p += 1;
                resume = Some((p, t));
                continue;
            }
            Some(one) if text.get(t).is_some_and(|item| fits(one, item)) => {
                (p, t) = (p + 1, t + 1);
                continue;
            }
            None if until == Until::Anywhere || t == text.len() => return true,
            _ => {}
        }
        match resume {
            Some((after, from)) if from < text.len() => {
                (p, t) = (after, from + 1);
                resume = Some((after, from + 1));
            }
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, path: &str) -> bool {
        let is_directory = path.ends_with('/');
        let names: Vec<&[u8]> = path.trim_end_matches('/').split('/').map(str::as_bytes).collect();
        pattern.parse::<Pattern>().unwrap().matches(&names, is_directory)
    }

    #[test]
    fn patterns_match_as_documented() {
        for (pattern, yes, no) in [
            ("*.pyc", vec!["a.pyc", "x/y/.pyc"], vec!["a.py", "a.pyc/b", "pyc"]),
            ("/etc", vec!["etc"], vec!["a/etc", "etc/passwd"]),
            ("a/b", vec!["a/b"], vec!["x/a/b", "a/b/c", "a"]),
            ("cache/", vec!["cache/", "x/cache/"], vec!["cache", "x/cache"]),
            ("/a/**/z", vec!["a/z", "a/b/z", "a/b/c/z"], vec!["z", "a/b", "b/a/z"]),
            ("a/**", vec!["a/b", "a/b/c"], vec!["b", "a"]),
            ("**/x", vec!["x", "a/b/x"], vec!["y"]),
            ("?[a-c!]", vec!["xa", "x!", "zc"], vec!["xd", "a", "xaa"]),
            ("[!a-c]x", vec!["dx", "]x"], vec!["ax", "x"]),
            ("[]-]", vec!["]", "-"], vec!["x"]),
            (r"\*\[", vec!["*["], vec!["x["]),
            ("a*b*c", vec!["abc", "aXbYbc"], vec!["abcd", "ab"]),
            (r"\!x", vec!["!x"], vec!["x"]),
        ] {
            for path in yes {
                assert!(matches(pattern, path), "{pattern} should match {path}");
            }
            for path in no {
                assert!(!matches(pattern, path), "{pattern} should not match {path}");
            }
        }
        let latin1 = Pattern::new(b"caf\xe9").unwrap();
        assert!(latin1.matches(&[b"caf\xe9"], false) && !latin1.matches(&[b"cafe"], false));
    }

    #[test]
    fn what_is_no_pattern_is_refused_by_name() {
        for (text, want) in [
            ("", InvalidPattern::Empty),
            ("/", InvalidPattern::Empty),
            ("!x", InvalidPattern::Negated),
            ("ab/c[d", InvalidPattern::OpenSet(4)),
            ("a\\", InvalidPattern::Escape),
            ("a/../b", InvalidPattern::Dots),
        ] {
            assert_eq!(text.parse::<Pattern>(), Err(want), "{text}");
        }
    }

    #[test]
    fn work_does_not_explode_with_the_number_of_stars() {
        let pattern = "*a".repeat(60) + "b";
        assert!(!matches(&pattern, &"a".repeat(250)));
    }

    #[test]
    fn what_is_below_a_match_is_found_as_by_trying_every_level() {
        let paths = ["a", "a/b", "a/b/c", "x/a/b", "b/a", "a/x/b/y", "c", "a/a/b"];
        for pattern in ["a", "a/", "/a/b", "/a/b/", "*b", "a/**/b", "/a/**", "**/b/c", "?/a/"] {
            let pattern: Pattern = pattern.parse().unwrap();
            for (path, is_directory) in paths.iter().flat_map(|path| [(path, false), (path, true)]) {
                let names: Vec<&[u8]> = path.split('/').map(str::as_bytes).collect();
                let tried = |depth: usize| pattern.matches(&names[..depth], depth < names.len() || is_directory);
                let want = (1..=names.len()).any(tried);
                assert_eq!(pattern.matches_at_any_level(&names, is_directory), want, "{pattern:?} {path}");
            }
        }
    }

    #[test]
    fn a_pattern_without_a_slash_looks_at_each_name_once() {
        let path = vec![b"a".as_slice(); 16 << 10];
        for pattern in ["*.pyc", "b/"] {
            let mut looks = 0;
            let found = pattern.parse::<Pattern>().unwrap().matches_above(&path, true, |tokens, name| {
                looks += 1;
                match_tokens(tokens, name)
            });
            assert_eq!((found, looks), (false, path.len()), "{pattern}");
        }
    }
}
