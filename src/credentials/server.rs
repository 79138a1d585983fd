//! Names of servers as places of credentials write them, and whom they mean.
//!
//! The same registry is `host`, `https://host`, `https://host/v1/` or `host/path`, and Docker's has four
//! names and more. Kubernetes allows `*` in the labels of a host.

use crate::net::{DOCKER, canonical};

/// What programs call Docker's registry, by long custom.
const DOCKER_BY_CUSTOM: &str = "https://index.docker.io/v1/";

/// A server, or part of one, that credentials are for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Server {
    /// Host and port in lower case; `*` and `?` may stand in it for parts of a label.
    host: String,
    /// Beginning of the repository's name; empty for all.
    path: String,
}

impl Server {
    /// Reads a name; `None` if it names nobody.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.split_once("://").map_or(text, |(_, rest)| rest);
        let (host, path) = text.split_once('/').unwrap_or((text, ""));
        let is_sign = |b: u8| b.is_ascii_alphanumeric() || b".-_:[]*?".contains(&b);
        if host.is_empty() || host.len() > 255 || !host.bytes().all(is_sign) {
            return None;
        }
        let path = path.trim_matches('/');
        // Versions of the protocol, which old files have in their keys.
        let path = if matches!(path, "v1" | "v2") { "" } else { path };
        Some(Self { host: canonical(host), path: path.to_owned() })
    }

    /// `HOST[:PORT]`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Beginning of the repository's name; empty for all.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether it means exactly one host.
    pub fn is_plain(&self) -> bool {
        !self.host.contains(['*', '?'])
    }

    /// How well it fits `repository` of `registry`, which is `HOST[:PORT]`: more is better, `None` is not at
    /// all. A host that is named goes before a pattern, then the longer path.
    pub fn fit(&self, registry: &str, repository: &str) -> Option<(bool, usize)> {
        let rest = repository.strip_prefix(self.path.as_str())?;
        let is_within = self.path.is_empty() || rest.is_empty() || rest.starts_with('/');
        let registry = canonical(registry);
        (is_within && hosts_match(&self.host, &registry)).then_some((self.is_plain(), self.path.len()))
    }
}

/// The one of `all` whose server fits `repository` of `registry` best, and how well.
pub(super) fn nearest<'a, T>(
    all: impl IntoIterator<Item = (&'a Server, T)>,
    registry: &str,
    repository: &str,
) -> Option<((bool, usize), T)> {
    let fitting = all.into_iter().filter_map(|(server, it)| Some((server.fit(registry, repository)?, it)));
    fitting.max_by_key(|(fit, _)| *fit)
}

impl std::fmt::Display for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.host)?;
        if self.path.is_empty() { Ok(()) } else { write!(f, "/{}", self.path) }
    }
}

/// What to call `registry` when a program is asked.
pub(super) fn for_programs(registry: &str) -> String {
    let name = canonical(registry);
    if name == DOCKER { DOCKER_BY_CUSTOM.to_owned() } else { name }
}

/// Label by label, so that `*.example` is not `a.b.example`; ports must be the same.
fn hosts_match(pattern: &str, host: &str) -> bool {
    let split = |text: &str| match text.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            (name.to_owned(), port.to_owned())
        }
        _ => (text.to_owned(), String::new()),
    };
    let ((pattern, port), (host, host_port)) = (split(pattern), split(host));
    port == host_port
        && pattern.split('.').count() == host.split('.').count()
        && pattern.split('.').zip(host.split('.')).all(|(pattern, label)| matches(pattern, label))
}

/// Whether `pattern`, with `*` for any text and `?` for one sign, is `text`. Takes as many steps as both
/// have signs, multiplied, at most.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    // Where to go on when a guess of what the last star stands for was wrong.
    let (mut p, mut t, mut again) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p, t));
                p += 1;
            }
            Some(sign) if *sign == b'?' || *sign == text[t] => (p, t) = (p + 1, t + 1),
            _ => match again {
                Some((star, from)) => {
                    (p, t) = (star + 1, from + 1);
                    again = Some((star, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|sign| *sign == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fit(server: &str, registry: &str, repository: &str) -> Option<(bool, usize)> {
        Server::parse(server).and_then(|server| server.fit(registry, repository))
    }

    #[test]
    fn a_registry_is_the_same_by_all_its_names() {
        for name in [
            "r.example",
            "R.Example",
            "https://r.example",
            "https://r.example/v1/",
            "http://r.example/v2",
            "r.example/",
        ] {
            assert_eq!(fit(name, "r.example", "a/b"), Some((true, 0)), "{name}");
        }
        for name in ["docker.io", "https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io"] {
            for registry in ["docker.io", "registry-1.docker.io", "index.docker.io"] {
                assert_eq!(fit(name, registry, "library/x"), Some((true, 0)), "{name} {registry}");
            }
        }
        assert_eq!(for_programs("registry-1.docker.io"), "https://index.docker.io/v1/");
        assert_eq!(for_programs("r.example:5000"), "r.example:5000");
    }

    #[test]
    fn others_are_not_meant() {
        for (name, registry, repository) in [
            ("r.example", "r.example:5000", "a"),
            ("r.example:5000", "r.example", "a"),
            ("r.example", "x.r.example", "a"),
            ("r.example", "evil-r.example", "a"),
            ("r.example/a", "r.example", "ab"),
            ("r.example/a/b", "r.example", "a"),
            ("*.example", "a.b.example", "a"),
            ("*.example", "example", "a"),
            ("*", "r.example", "a"),
        ] {
            assert_eq!(fit(name, registry, repository), None, "{name} {registry} {repository}");
        }
        for nobody in ["", "https://", "/a", "a b", "user@host"] {
            assert_eq!(Server::parse(nobody), None, "{nobody:?}");
        }
    }

    #[test]
    fn a_host_goes_before_a_pattern_and_a_long_path_before_a_short_one() {
        let fits = ["*.example", "*.example/a/b", "r.example", "r.example/a", "r.example/a/b"];
        let mut sorted = fits;
        sorted.sort_by_key(|name| fit(name, "r.example", "a/b/c"));
        assert_eq!(sorted, fits);
        assert_eq!(fit("*.dkr.ecr.*.amazonaws.com", "12.dkr.ecr.eu-1.amazonaws.com", "x"), Some((false, 0)));
        assert_eq!(fit("a?c*.example:5", "abc.example:5", "x"), Some((false, 0)));
    }

    #[test]
    fn patterns_with_many_stars_end_soon() {
        let pattern = "*a".repeat(60);
        assert!(!matches(&pattern, &"a".repeat(59)));
        assert!(matches(&pattern, &"a".repeat(200)));
    }
}
