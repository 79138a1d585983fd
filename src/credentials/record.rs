//! Docker's `config.json`, which `auth.json` of others and the secrets of Kubernetes are too.
//!
//! One entry that makes no sense is an error for whoever needs it, and for nobody else. Errors say where,
//! and never what: the text may be a password.

use std::collections::BTreeMap;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::server::{Server, nearest};
use crate::base::Secret;
use crate::net::auth::Login;

/// Padding is often left out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What takes the place of a name where the password is a refresh token.
pub(super) const TOKEN_USER: &str = "<token>";

/// What a file says.
#[derive(Default)]
pub(super) struct AuthRecords {
    logins: Vec<(Server, Result<Login, String>)>,
    /// Helpers of single servers: the name behind `docker-credential-`.
    helpers: Vec<(Server, String)>,
    /// The helper for everybody.
    store: Option<String>,
}

#[derive(Deserialize)]
struct Document {
    auths: Option<BTreeMap<String, Option<Entry>>>,
    #[serde(rename = "credHelpers")]
    helpers: Option<BTreeMap<String, String>>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

impl AuthRecords {
    /// Reads `config.json`, or the older `.dockercfg`, which is its `auths` alone.
    ///
    /// # Errors
    /// It is neither: where that shows.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        let mistake = |error: serde_json::Error| {
            format!("not a config.json of docker (line {}, column {})", error.line(), error.column())
        };
        let document: Document = serde_json::from_slice(text).map_err(mistake)?;
        if document.auths.is_none() && document.helpers.is_none() && document.store.is_none() {
            // The entries of an older file, if it says anything of servers.
            let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(text).map_err(mistake)?;
            let entry = |(name, value): (String, serde_json::Value)| {
                let is_entry = ["auth", "username", "identitytoken"].iter().any(|key| value.get(key).is_some());
                let entry = is_entry.then(|| serde_json::from_value(value).ok())?;
                Some((name, entry))
            };
            let auths = Some(entries.into_iter().filter_map(entry).collect());
            return Ok(Self::from_document(Document { auths, ..document }));
        }
        Ok(Self::from_document(document))
    }

    fn from_document(document: Document) -> Self {
        let login = |(name, entry): (String, Option<Entry>)| {
            let login = entry.unwrap_or_default().login()?;
            let login = login.map_err(|what| format!("the entry of {} {what}", shown(&name)));
            Some((Server::parse(&name)?, login))
        };
        let helper = |(name, helper): (String, String)| Some((Server::parse(&name)?, helper));
        Self {
            logins: document.auths.into_iter().flatten().filter_map(login).collect(),
            helpers: document.helpers.into_iter().flatten().filter_map(helper).collect(),
            store: document.store.filter(|store| !store.is_empty()),
        }
    }

    /// The nearest login that is written down.
    ///
    /// # Errors
    /// Its entry makes no sense.
    pub(super) fn find(&self, registry: &str, repository: &str) -> Result<Option<Login>, String> {
        self.nearest(registry, repository).map_or(Ok(None), |(_, login)| login.map(Some))
    }

    /// The same with how near it is.
    pub(super) fn nearest(&self, registry: &str, repository: &str) -> Option<((bool, usize), Result<Login, String>)> {
        let logins = self.logins.iter().map(|(server, login)| (server, login));
        nearest(logins, registry, repository).map(|(fit, login)| (fit, login.clone()))
    }

    /// The helpers to ask, in order.
    pub(super) fn helpers(&self, registry: &str, repository: &str) -> Vec<&str> {
        let own = nearest(self.helpers.iter().map(|(server, name)| (server, name)), registry, repository);
        let own = own.map(|(_, name)| name.as_str());
        own.into_iter().chain(self.store.as_deref()).collect()
    }
}

impl Entry {
    /// `None` for an entry that only says that a helper knows more.
    fn login(self) -> Option<Result<Login, &'static str>> {
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        if let Some(token) = filled(self.registrytoken) {
            return Some(Ok(Login::Bearer(Secret::new(token))));
        }
        if let Some(token) = filled(self.identitytoken) {
            return Some(Ok(Login::Identity(Secret::new(token))));
        }
        if let Some(auth) = filled(self.auth) {
            return Some(user_and_password(&auth).ok_or("is not base64 of USER:PASSWORD"));
        }
        match (filled(self.username), self.password) {
            (Some(user), Some(password)) => Some(Ok(named(user, Secret::new(password)))),
            (None, None) => None,
            _ => Some(Err("has a name without a password, or a password without a name")),
        }
    }
}

/// A login from base64 of `USER:PASSWORD`, as the `auth` of an entry has it; `None` if it is something else.
pub fn user_and_password(auth: &str) -> Option<Login> {
    let text = String::from_utf8(BASE64.decode(auth.trim()).ok()?).ok()?;
    let (user, password) = text.split_once(':')?;
    // Old versions of docker filled up with zeros.
    let password = Secret::new(password.trim_end_matches('\0'));
    (!user.is_empty()).then(|| named(user.to_owned(), password))
}

/// A login as helpers and files name it.
pub(super) fn named(user: String, password: Secret) -> Login {
    if user == TOKEN_USER { Login::Identity(password) } else { Login::Basic { user, password } }
}

/// A key as it may be shown: somebody may have put an address with a password there.
fn shown(key: &str) -> String {
    Server::parse(key).map_or_else(|| "a server".to_owned(), |server| server.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn basic(user: &str, password: &str) -> Login {
        Login::Basic { user: user.to_owned(), password: Secret::new(password) }
    }

    fn find(text: &str, registry: &str, repository: &str) -> Result<Option<Login>, String> {
        AuthRecords::parse(text.as_bytes())?.find(registry, repository)
    }

    #[test]
    fn every_form_of_an_entry_is_a_login() {
        for (entry, login) in [
            (r#"{"auth": "bWU6cDpx"}"#, basic("me", "p:q")),
            (r#"{"auth": "bWU6cAAA"}"#, basic("me", "p")),
            (r#"{"auth": " bWU6cA "}"#, basic("me", "p")),
            (r#"{"username": "me", "password": "p", "email": "x"}"#, basic("me", "p")),
            (r#"{"auth": "bWU6cA==", "identitytoken": "i"}"#, Login::Identity(Secret::new("i"))),
            (r#"{"username": "<token>", "password": "i"}"#, Login::Identity(Secret::new("i"))),
            (r#"{"registrytoken": "r"}"#, Login::Bearer(Secret::new("r"))),
        ] {
            let text = format!(r#"{{"auths": {{"https://r.example/v1/": {entry}}}, "psFormat": "x"}}"#);
            assert_eq!(find(&text, "r.example", "a"), Ok(Some(login.clone())), "{entry}");
            let older = format!(r#"{{"https://r.example/v1/": {entry}}}"#);
            if !entry.contains("registrytoken") {
                assert_eq!(find(&older, "r.example", "a"), Ok(Some(login)), ".dockercfg: {entry}");
            }
        }
    }

    #[test]
    fn what_makes_no_sense_is_told_to_whoever_needs_it_and_shows_no_secret() {
        let text = r#"{"auths": {"a.example": {"auth": "hunter2!"}, "b.example": {"password": "hunter2"},
            "https://u:hunter2@c.example": {"auth": "x"}, "d.example": {"auth": "bWU6cA=="}, "e.example": {}, "f.example": null}}"#;
        assert_eq!(find(text, "a.example", "x"), Err("the entry of a.example is not base64 of USER:PASSWORD".into()));
        assert!(find(text, "b.example", "x").unwrap_err().contains("without a name"));
        assert_eq!(find(text, "d.example", "x"), Ok(Some(basic("me", "p"))));
        for nobody in ["c.example", "e.example", "f.example", "g.example"] {
            assert_eq!(find(text, nobody, "x"), Ok(None), "{nobody}");
        }
        for text in [r#"{"auths": {"a": "hunter2"}}"#, r#"["hunter2"]"#, r#"{"auths": hunter2}"#, "", "\u{1}hunter2"] {
            let error = AuthRecords::parse(text.as_bytes()).err().expect(text);
            assert!(error.starts_with("not a config.json of docker (line ") && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn helpers_are_those_of_the_server_and_then_that_of_everybody() {
        let text = r#"{"credHelpers": {"r.example": "one", "r.example/a": "two"}, "credsStore": "all"}"#;
        let records = AuthRecords::parse(text.as_bytes()).unwrap();
        assert_eq!(records.helpers("r.example", "a/b"), ["two", "all"]);
        assert_eq!(records.helpers("r.example", "b"), ["one", "all"]);
        assert_eq!(records.helpers("s.example", "b"), ["all"]);
    }

    proptest! {
        #[test]
        fn nothing_makes_it_fail(text in r#"(\{|\}|"auths"|:|,|"a.b"|"auth"|"username"|null|1|"bWU6cA"| ){0,20}"#) {
            if let Ok(records) = AuthRecords::parse(text.as_bytes()) {
                let _ = records.find("a.b", "x");
            }
        }
    }
}
