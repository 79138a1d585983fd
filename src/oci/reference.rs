//! Names of images, by the grammar of the distribution specification and the customs of docker.
//!
//! `[docker://][HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`. The first part is a host if it has a dot, a colon
//! or a capital in it or is `localhost`; else the host is `docker.io`, where a repository of one part means
//! one below `library/`.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::sync::Arc;

use crate::base::Digest;
use crate::net::{DOCKER, canonical};

/// How the names of images in registries begin where a file could be meant as well.
const SCHEME: &str = "docker://";

/// The registry of names without one.
const DEFAULT_HOST: &str = DOCKER;

/// Longest name of a repository with its host, in bytes: what the reference implementation allows.
const MAX_NAME: usize = 255;

/// Longest tag, in bytes.
const MAX_TAG: usize = 128;

/// The tag that is meant if nobody says which.
const DEFAULT_TAG: &str = "latest";

/// A repository of a registry.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Repository {
    host: Arc<str>,
    path: Arc<str>,
}

/// Which version of an image is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// Whatever the tag points at when it is asked.
    Tag(String),
    /// This one and no other.
    Digest(Digest),
}

/// An image in a registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    repository: Repository,
    tag: Option<Arc<str>>,
    digest: Option<Arc<Digest>>,
}

/// Why a text names no image in a registry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} names no image in a registry: {why}")]
pub struct InvalidReference {
    pub text: String,
    pub why: &'static str,
}

impl Repository {
    /// The registry: `HOST[:PORT]`, with an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The name within the registry.
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Reference {
    /// Whether `text` is written as an image in a registry and not as a file.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with(SCHEME)
    }

    /// Where it is.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// What to ask the registry for: the digest if there is one.
    pub fn version(&self) -> Version {
        match self.digest() {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(self.tag.as_deref().unwrap_or(DEFAULT_TAG).to_owned()),
        }
    }

    fn digest(&self) -> Option<Digest> {
        self.digest.as_deref().copied()
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let bad = |why| InvalidReference { text: without_secrets(text), why };
        let rest = text.strip_prefix(SCHEME).unwrap_or(text);
        let (host, rest) = split_host(rest);
        let (rest, digest) = match rest.split_once('@') {
            None => (rest, None),
            Some((rest, digest)) => (rest, Some(parse_digest(digest).map_err(bad)?)),
        };
        let (path, tag) = match rest.split_once(':') {
            None => (rest, None),
            Some((path, tag)) => (path, Some(tag)),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(bad("a tag is 1 to 128 letters, digits, '_', '.' or '-', and does not begin with '.' or '-'"));
        }
        if let Some(host) = host
            && !is_host(host)
        {
            return Err(bad("that is no name of a host, nor an address"));
        }
        let host = canonical(host.unwrap_or(DEFAULT_HOST));
        let is_official = host == DEFAULT_HOST && !path.contains('/');
        let path = if is_official { format!("library/{path}") } else { path.to_owned() };
        if !path.split('/').all(is_component) {
            return Err(bad(
                "parts of a repository's name are lower-case letters and digits, with '.', '_', '__' or '-' between them",
            ));
        }
        if host.len() + 1 + path.len() > MAX_NAME {
            return Err(bad("it is longer than 255 bytes"));
        }
        let repository = Repository { host: host.into(), path: path.into() };
        Ok(Self { repository, tag: tag.map(Arc::from), digest: digest.map(Arc::new) })
    }
}

/// What may be repeated of `text`: somebody may have put a password before the host, as in an URL, with any signs in
/// it. What is before the last `@` that no digest follows is a login.
fn without_secrets(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").map_or(("", text), |(scheme, rest)| (scheme, rest));
    let is_digest = |at: &usize| ["sha256:", "sha512:"].iter().any(|kind| rest[at + 1..].starts_with(kind));
    let Some(at) = rest.rmatch_indices('@').map(|(at, _)| at).find(|at| !is_digest(at)) else { return text.to_owned() };
    let divider = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{divider}...{}", &rest[at..])
}

/// Takes the host off, if the first part looks like one.
fn split_host(text: &str) -> (Option<&str>, &str) {
    let Some((first, rest)) = text.split_once('/') else { return (None, text) };
    let looks =
        first == "localhost" || first.contains(['.', ':', '[']) || first.bytes().any(|b| b.is_ascii_uppercase());
    if looks { (Some(first), rest) } else { (None, text) }
}

/// `NAME`, `ADDRESS` or `[IPV6]`, and perhaps a port.
fn is_host(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.parse::<Ipv6Addr>().is_err() {
                return false;
            }
            (None, port.strip_prefix(':').or(if port.is_empty() { None } else { Some("?") }))
        }
        None => match text.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(text), None),
        },
    };
    let is_label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        !label.is_empty() && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    let is_port =
        |port: &str| port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    name.is_none_or(|name| name.split('.').all(is_label)) && port.is_none_or(is_port)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().is_some_and(|&b| is_plain(b)) || !bytes.last().is_some_and(|&b| is_plain(b)) {
        return false;
    }
    let separators = bytes.split(|&b| is_plain(b)).filter(|run| !run.is_empty());
    let is_separator = |run: &[u8]| matches!(run, b"." | b"_" | b"__") || run.iter().all(|&b| b == b'-');
    separators.into_iter().all(is_separator)
}

fn is_tag(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = text.as_bytes();
    (1..=MAX_TAG).contains(&bytes.len())
        && is_word(bytes[0])
        && bytes.iter().all(|&b| is_word(b) || b == b'.' || b == b'-')
}

/// Reads `sha256:` and 64 lower-case digits, which is all that is served.
pub(super) fn parse_digest(text: &str) -> Result<Digest, &'static str> {
    let (algorithm, digits) = text.split_once(':').ok_or("a digest is sha256: and 64 hexadecimal digits")?;
    if algorithm != "sha256" {
        return Err("only digests by sha256 are supported");
    }
    // Capitals would make two names of one thing.
    let is_lower = !digits.bytes().any(|b| b.is_ascii_uppercase());
    Digest::from_hex(digits).filter(|_| is_lower).ok_or("a digest is sha256: and 64 hexadecimal digits")
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

impl fmt::Debug for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Version {
    /// As it stands at the end of a request for a manifest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => write!(f, "sha256:{digest}"),
        }
    }
}

impl fmt::Display for Reference {
    /// Whole: with host and tag or digest, and without a scheme.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.repository, f)?;
        match (&self.tag, self.digest()) {
            (Some(tag), _) => write!(f, ":{tag}")?,
            (None, None) => write!(f, ":{DEFAULT_TAG}")?,
            (None, Some(_)) => {}
        }
        self.digest().map_or(Ok(()), |digest| write!(f, "@sha256:{digest}"))
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn whole(text: &str) -> String {
        text.parse::<Reference>().unwrap_or_else(|error| panic!("{error}")).to_string()
    }

    #[test]
    fn names_are_completed_as_docker_does() {
        for (text, expected) in [
            ("docker://ubuntu", "docker.io/library/ubuntu:latest"),
            ("docker://ubuntu:24.04", "docker.io/library/ubuntu:24.04"),
            ("docker.io/ubuntu", "docker.io/library/ubuntu:latest"),
            ("docker://index.docker.io/some/app:1", "docker.io/some/app:1"),
            ("Registry.docker.io/app", "docker.io/library/app:latest"),
            ("some/app", "docker.io/some/app:latest"),
            ("docker://registry.example/app", "registry.example/app:latest"),
            ("REGISTRY.example/app", "registry.example/app:latest"),
            ("localhost/app:x", "localhost/app:x"),
            ("localhost:5000/a/b/c-d__e.f:V1.0-x", "localhost:5000/a/b/c-d__e.f:V1.0-x"),
            ("docker://[::1]:5000/app:t", "[::1]:5000/app:t"),
            ("[fd00::7]/app", "[fd00::7]/app:latest"),
            ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
            ("a--b/c", "docker.io/a--b/c:latest"),
        ] {
            assert_eq!(whole(text), expected, "{text}");
            assert_eq!(whole(expected), expected, "it is its own name");
        }
    }

    #[test]
    fn a_digest_decides_and_the_tag_stays_for_people() {
        let both: Reference = format!("docker://r.example/app:1@{DIGEST}").parse().unwrap();
        assert_eq!(both.to_string(), format!("r.example/app:1@{DIGEST}"));
        assert_eq!(both.version().to_string(), DIGEST);

        let pinned: Reference = format!("r.example/app@{DIGEST}").parse().unwrap();
        assert_eq!(pinned.to_string(), format!("r.example/app@{DIGEST}"));
        let tagged: Reference = "r.example/app".parse().unwrap();
        assert_eq!(tagged.version(), Version::Tag("latest".to_owned()));
        assert!(matches!(pinned.version(), Version::Digest(_)), "{pinned}");
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        let long = format!("r.example/{}", "a".repeat(300));
        for (text, why) in [
            ("", "parts of a repository"),
            ("docker://", "parts of a repository"),
            ("r.example/", "parts of a repository"),
            ("r.example//a", "parts of a repository"),
            ("r.example/App", "parts of a repository"),
            ("r.example/a..b", "parts of a repository"),
            ("r.example/a___b", "parts of a repository"),
            ("r.example/a-", "parts of a repository"),
            ("r.example/../etc", "parts of a repository"),
            ("r.example/a%2fb", "parts of a repository"),
            ("r.example/a?x=1", "parts of a repository"),
            ("r.example/ümlaut", "parts of a repository"),
            ("r.example/a:", "a tag is"),
            ("r.example/a:-x", "a tag is"),
            ("r.example/a:x/y", "a tag is"),
            ("r.example:0/a", "no name of a host"),
            ("r.example:66000/a", "no name of a host"),
            ("r.example:/a", "no name of a host"),
            ("r.example:+80/a", "no name of a host"),
            ("-r.example/a", "no name of a host"),
            ("user:secret@r.example/a", "no name of a host"),
            ("[::1/a", "no name of a host"),
            ("[::1]x/a", "no name of a host"),
            ("[nope]:1/a", "no name of a host"),
            ("https://r.example/a", "no name of a host"),
            ("r.example/a@sha512:00", "only digests by sha256"),
            ("r.example/a@sha256:00", "a digest is sha256"),
            ("r.example/a@", "a digest is sha256"),
            (long.as_str(), "longer than 255"),
        ] {
            let error = text.parse::<Reference>().expect_err(text);
            assert!(error.why.contains(why), "{text}: {error}");
        }
        let secret = "docker://user:hunter2@r.example/a".parse::<Reference>().unwrap_err().to_string();
        assert!(secret.contains("docker://...@r.example/a") && !secret.contains("hunter2"), "{secret}");
        for login in ["docker://me:hunter2@r.example", "docker://me:hun/ter2@r.example/a", "me:hunter2@r/a@sha256:1"] {
            let told = login.parse::<Reference>().unwrap_err().to_string();
            assert!(!told.contains("ter2") && told.contains("...@r"), "{told}");
        }
        let upper = format!("r.example/a@{}", DIGEST.replace('e', "E"));
        assert!(upper.parse::<Reference>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_one_whole_name(text in "\\PC{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap().to_string(), reference.to_string());
            }
        }

        #[test]
        fn names_by_the_grammar_are_taken_as_they_are(
            host in "[a-z][a-z0-9]{0,8}\\.[a-z]{2,4}(:[1-9][0-9]{0,3})?",
            path in "[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}(/[a-z0-9]{1,5}){0,2}",
            tag in "[A-Za-z0-9_][A-Za-z0-9._-]{0,20}",
        ) {
            let text = format!("{host}/{path}:{tag}");
            let expected = if host == "docker.io" { return Ok(()) } else { text.clone() };
            prop_assert_eq!(text.parse::<Reference>().unwrap().to_string(), expected);
        }
    }
}
