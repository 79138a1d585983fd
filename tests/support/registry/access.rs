//! Who may do what: logins, tokens with an end, signed addresses with an end.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rafsd::net::Clock;

use super::fault::Door;
use super::record::Record;

/// How a registry wants people to prove who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Not at all.
    Open,
    /// By name and password with each request.
    Basic,
    /// By a token, for which the token server wants name and password.
    Bearer,
    /// By a token that everybody gets.
    Anonymous,
}

/// The name of the one user.
pub const USER: &str = "box-user-name";

struct Token {
    /// `repository:NAME:pull`, several of them with spaces between.
    scopes: String,
    ends: Instant,
}

/// Everything that opens a door.
pub struct Keys {
    pub password: String,
    /// What may be changed into tokens.
    pub refresh: String,
    tokens: Mutex<HashMap<String, Token>>,
    /// By signature: the path it is for, and its end.
    signatures: Mutex<HashMap<String, (String, Instant)>>,
    clock: Clock,
    record: Arc<Record>,
    /// Nobody is let in, whatever they say.
    locked: AtomicBool,
}

impl Keys {
    pub(super) fn new(access: Access, clock: Clock, record: Arc<Record>) -> Self {
        let (password, refresh) = (fresh("pw"), fresh("refresh"));
        let asked_by = match access {
            Access::Basic => vec![Door::Registry],
            Access::Open | Access::Bearer | Access::Anonymous => vec![Door::Tokens],
        };
        record.keep(&password, "the password", &asked_by);
        record.keep(&basic(USER, &password), "name and password", &asked_by);
        record.keep(&refresh, "the refresh token", &[Door::Tokens]);
        let (tokens, signatures) = (Mutex::default(), Mutex::default());
        Self { password, refresh, tokens, signatures, clock, record, locked: AtomicBool::new(false) }
    }

    /// From now on no login is good any more and no token, or all logins are again.
    pub fn lock(&self, locked: bool) {
        self.locked.store(locked, Ordering::SeqCst);
        self.revoke_tokens();
    }

    pub(super) fn is_locked(&self) -> bool {
        self.locked.load(Ordering::SeqCst)
    }

    /// Whether this is the value of an `Authorization` header with the right password.
    pub(super) fn is_basic(&self, value: &str) -> bool {
        !self.is_locked() && value.strip_prefix("Basic ").is_some_and(|said| said == basic(USER, &self.password))
    }

    pub(super) fn issue(&self, scopes: &str, life: Duration) -> String {
        let text = fresh("token");
        self.record.keep(&text, "a token", &[Door::Registry]);
        let ends = self.clock.now() + life;
        self.tokens.lock().unwrap().insert(text.clone(), Token { scopes: scopes.to_owned(), ends });
        text
    }

    /// Whether this is the value of an `Authorization` header with a token for `scope` that has not ended.
    pub(super) fn is_bearer(&self, value: &str, scope: &str) -> bool {
        let Some(said) = value.strip_prefix("Bearer ") else { return false };
        let tokens = self.tokens.lock().unwrap();
        let holds = |token: &Token| token.ends > self.clock.now() && token.scopes.split(' ').any(|has| has == scope);
        tokens.get(said).is_some_and(holds)
    }

    /// Whether it is one with any token that has not ended.
    pub(super) fn is_any_bearer(&self, value: &str) -> bool {
        let tokens = self.tokens.lock().unwrap();
        let found = value.strip_prefix("Bearer ").and_then(|said| tokens.get(said));
        found.is_some_and(|token| token.ends > self.clock.now())
    }

    /// No token is good any more.
    pub fn revoke_tokens(&self) {
        self.tokens.lock().unwrap().clear();
    }

    pub(super) fn sign(&self, path: &str, life: Duration) -> String {
        let text = fresh("signature");
        self.record.keep(&text, "a signature", &[Door::Storage]);
        let ends = self.clock.now() + life;
        self.signatures.lock().unwrap().insert(text.clone(), (path.to_owned(), ends));
        text
    }

    pub(super) fn is_signed(&self, path: &str, signature: &str) -> bool {
        let signatures = self.signatures.lock().unwrap();
        signatures.get(signature).is_some_and(|(for_path, ends)| for_path == path && *ends > self.clock.now())
    }

    /// No signature is good any more.
    pub fn revoke_signatures(&self) {
        self.signatures.lock().unwrap().clear();
    }
}

/// A secret nobody has seen before.
pub fn fresh(kind: &str) -> String {
    let random = |salt: u8| RandomState::new().hash_one(salt);
    format!("{kind}{:016x}{:016x}", random(0), random(1))
}

/// What stands behind `Basic`.
pub fn basic(user: &str, password: &str) -> String {
    base64(format!("{user}:{password}").as_bytes())
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let number = (0..3).fold(0, |sum, at| sum << 8 | u32::from(group.get(at).copied().unwrap_or(0)));
        for digit in 0..4 {
            let value = usize::try_from(number >> (18 - 6 * digit) & 63).expect("small");
            text.push(if digit <= group.len() { DIGITS[value] as char } else { '=' });
        }
    }
    text
}

#[test]
fn base64_is_what_everybody_writes() {
    for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
        assert_eq!(base64(bytes.as_bytes()), text);
    }
}
