//! What a server says it wants to hear: `WWW-Authenticate`, as RFC 9110 (section 11) has it.
//!
//! Servers write it in many ways: several challenges in one header or in several, names in any case,
//! values quoted or not. What cannot be understood is passed over, and the rest is taken. However
//! much a server says, little of it is looked at.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// Headers that are looked at.
const MOST_HEADERS: usize = 8;

/// Bytes of one header that are looked at.
const MOST_BYTES: usize = 8 << 10;

/// Challenges altogether, and parameters of each.
const MOST_ITEMS: usize = 32;

/// One way in which a server wants to be told who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// In lower case: `basic`, `bearer`.
    pub scheme: String,
    /// Names in lower case, in the order of the header.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of this name, which is in lower case. It may hold anything.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// All challenges of an answer, in its order.
pub fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let mut found = Vec::new();
    for header in headers.get_all(WWW_AUTHENTICATE).iter().take(MOST_HEADERS) {
        let text = String::from_utf8_lossy(&header.as_bytes()[..header.len().min(MOST_BYTES)]);
        Reader(&text).challenges(&mut found);
    }
    found
}

/// What is left of a header.
struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    /// Reads to the end. Each turn takes at least one character.
    fn challenges(mut self, found: &mut Vec<Challenge>) {
        // Whether `found` ends with a challenge of this header, to which parameters belong.
        let mut is_open = false;
        loop {
            self.skip(|c| is_blank(c) || c == ',');
            let word = self.word();
            if word.is_empty() {
                if self.0.is_empty() {
                    return;
                }
                self.skip_element();
                continue;
            }
            let before = self.0;
            self.skip(is_blank);
            if self.take('=') {
                self.skip(is_blank);
                let Some(value) = self.value() else {
                    self.skip_element();
                    continue;
                };
                let last = found.last_mut().filter(|last| is_open && last.parameters.len() < MOST_ITEMS);
                if let Some(challenge) = last {
                    challenge.parameters.push((word.to_ascii_lowercase(), value));
                }
                continue;
            }
            if found.len() == MOST_ITEMS {
                return;
            }
            found.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
            is_open = true;
            self.0 = before;
            self.skip_credentials();
        }
    }

    fn skip(&mut self, what: impl Fn(char) -> bool) {
        self.0 = self.0.trim_start_matches(what);
    }

    fn take(&mut self, sign: char) -> bool {
        let rest = self.0.strip_prefix(sign);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn word(&mut self) -> &'a str {
        let end = self.0.find(|c| !is_token(c)).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        word
    }

    /// A word or a quoted string; `None` for neither, or one that does not end.
    fn value(&mut self) -> Option<String> {
        if !self.take('"') {
            // Addresses are often left unquoted, against the rule.
            let end = self.0.find(|c| is_blank(c) || c == ',' || c == '"').unwrap_or(self.0.len());
            let (word, rest) = self.0.split_at(end);
            self.0 = rest;
            return (!word.is_empty()).then(|| word.to_owned());
        }
        let mut value = String::new();
        let mut characters = self.0.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.0 = &self.0[at + 1..];
                    return Some(value);
                }
                '\\' => value.push(characters.next()?.1),
                other => value.push(other),
            }
        }
        self.0 = "";
        None
    }

    /// Goes behind what follows a scheme directly where that is one long word, as in
    /// `Negotiate abc==`, and not a parameter or another scheme.
    fn skip_credentials(&mut self) {
        let rest = self.0.trim_start_matches(is_blank);
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "-._~+/".contains(c))).unwrap_or(rest.len());
        let after = rest[end..].trim_start_matches('=');
        let ends = after.trim_start_matches(is_blank);
        if end > 0 && rest.len() < self.0.len() && (ends.is_empty() || ends.starts_with(',')) {
            self.0 = ends;
        }
    }

    /// Goes to the next comma that is not quoted.
    fn skip_element(&mut self) {
        let (mut is_quoted, mut is_escaped) = (false, false);
        let end = self.0.find(|c| {
            let is_end = c == ',' && !is_quoted;
            is_quoted ^= c == '"' && !is_escaped;
            is_escaped = c == '\\' && is_quoted && !is_escaped;
            is_end
        });
        self.0 = &self.0[end.unwrap_or(self.0.len())..];
    }
}

fn is_blank(c: char) -> bool {
    c == ' ' || c == '\t'
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::HeaderValue;

    use super::*;

    /// Each challenge as `scheme{name=value;...}`.
    fn read(headers: &[&str]) -> String {
        let mut map = HeaderMap::new();
        for header in headers {
            map.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(header.as_bytes()).unwrap());
        }
        let show = |it: &Challenge| {
            let parameters: Vec<_> = it.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("{}{{{}}}", it.scheme, parameters.join(";"))
        };
        challenges(&map).iter().map(show).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn challenges_are_read_in_every_way_that_servers_write_them() {
        for (headers, expected) in [
            (
                &[r#"Bearer realm="https://a.example/token",service="r.example",scope="repository:a/b:pull,push""#][..],
                "bearer{realm=https://a.example/token;service=r.example;scope=repository:a/b:pull,push}",
            ),
            (&[r#"BASIC Realm="x""#], "basic{realm=x}"),
            (&["Basic"], "basic{}"),
            (&[r#"Basic realm = "a \"b\" \\ c" , charset="UTF-8""#], r#"basic{realm=a "b" \ c;charset=UTF-8}"#),
            (
                &[r#"Negotiate, Basic realm="x", Bearer realm=https://a/t?x=1,service=s"#],
                "negotiate{} basic{realm=x} bearer{realm=https://a/t?x=1;service=s}",
            ),
            (&[r#"Negotiate abc/d==, Basic realm="x""#], "negotiate{} basic{realm=x}"),
            (&[r#"Bearer realm="a""#, r#"Basic realm="b""#], "bearer{realm=a} basic{realm=b}"),
            (&[r#",, Basic realm="x",,"#], "basic{realm=x}"),
            (&[r#"Basic realm="x", , Bearer realm="y""#], "basic{realm=x} bearer{realm=y}"),
        ] {
            assert_eq!(read(headers), expected, "{headers:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_passed_over() {
        for (header, expected) in [
            ("", ""),
            ("=", ""),
            (r#"realm="x""#, ""),
            (r#"Basic realm="x"#, "basic{}"),
            (r#"Basic realm=, Bearer realm="y""#, "basic{} bearer{realm=y}"),
            (r#"(), Basic realm="x""#, "basic{realm=x}"),
            (r#"("a,b"), Basic realm="x""#, "basic{realm=x}"),
            ("Basic \u{e9}\u{e9}", "basic{}"),
        ] {
            assert_eq!(read(&[header]), expected, "{header:?}");
        }
    }

    #[test]
    fn however_much_is_said_little_is_read() {
        let many = "Basic,".repeat(10_000);
        assert_eq!(read(&[&many]).split(' ').count(), MOST_ITEMS);
        let long = format!("Basic {}", "a=b,".repeat(1000));
        assert_eq!(read(&[&long]).matches("a=b").count(), MOST_ITEMS);
        assert_eq!(read(&["Basic"; 100]).split(' ').count(), MOST_HEADERS);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_fail(text in "[a-zB \t=,\"\\\\()\u{e9}]{0,60}") {
            read(&[&text.replace('\t', " ")]);
        }

        #[test]
        fn what_was_quoted_is_read_again(value in "[ -~]{0,40}") {
            let quoted = value.replace('\\', r"\\").replace('"', "\\\"");
            let header = format!("Bearer realm=\"{quoted}\", service=s");
            prop_assert_eq!(read(&[&header]), format!("bearer{{realm={value};service=s}}"));
        }
    }
}
