//! What a box has seen, and whether everybody kept their secrets to themselves.

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fault::Door;
use crate::support::clock::Bustle;
use crate::support::secrets;

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub door: Door,
    /// Whether it came through the proxy.
    pub proxied: bool,
    /// The host that the client believes to talk to.
    pub host: String,
    pub method: String,
    pub path: String,
    pub query: String,
    /// The value of `Range`.
    pub range: Option<String>,
    /// By lower-case name.
    pub headers: Vec<(String, String)>,
    pub body: String,
    /// 0 until it was answered.
    pub status: u16,
    /// Bytes of the body that were handed on.
    pub sent: u64,
}

impl Seen {
    /// The value of the first header with this lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Whether a part of a blob was asked for.
    pub fn is_blob_read(&self) -> bool {
        self.method == "GET" && ["/blobs/sha256:", "/data/sha256:"].iter().any(|part| self.path.contains(part))
    }

    fn says(&self, text: &str) -> bool {
        let rest = self.headers.iter().map(|(_, value)| value);
        [&self.path, &self.query, &self.body].into_iter().chain(rest).any(|said| said.contains(text))
    }
}

/// A secret and the doors where it may be said.
#[derive(Clone, Debug)]
struct Kept {
    text: String,
    what: &'static str,
    at: Vec<Door>,
}

/// Requests at work for one scope of tokens.
#[derive(Clone, Copy, Debug, Default)]
struct Crowd {
    now: u64,
    most: u64,
    total: u64,
}

/// Everything that a box remembers.
#[derive(Debug, Default)]
pub struct Record {
    seen: Mutex<Vec<Seen>>,
    kept: Mutex<Vec<Kept>>,
    crowds: Mutex<HashMap<String, Crowd>>,
    busy: AtomicU64,
    steps: AtomicU64,
}

impl Record {
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Writes a request down and gives its place.
    pub fn enter(&self, seen: Seen) -> usize {
        self.step();
        let mut all = self.seen.lock().unwrap();
        all.push(seen);
        all.len() - 1
    }

    pub fn answered(&self, place: usize, status: u16) {
        self.seen.lock().unwrap()[place].status = status;
    }

    pub fn sent(&self, place: usize, bytes: usize) {
        self.step();
        self.seen.lock().unwrap()[place].sent += bytes as u64;
    }

    pub fn step(&self) {
        self.steps.fetch_add(1, Ordering::SeqCst);
    }

    /// Remembers a secret that was handed out or is known to both sides.
    pub fn keep(&self, text: &str, what: &'static str, at: &[Door]) {
        secrets::keep(text);
        self.kept.lock().unwrap().push(Kept { text: text.to_owned(), what, at: at.to_vec() });
    }

    /// What was said where it should not have been, without saying it again.
    pub fn leaks(&self) -> Vec<String> {
        let (seen, kept) = (self.seen.lock().unwrap(), self.kept.lock().unwrap());
        let mut leaks = BTreeSet::new();
        for request in seen.iter() {
            for secret in kept.iter().filter(|secret| !secret.at.contains(&request.door)) {
                if request.says(&secret.text) {
                    leaks.insert(format!("{} at {:?}: {} {}", secret.what, request.door, request.method, request.path));
                }
            }
        }
        leaks.into_iter().collect()
    }

    pub fn crowd_enters(&self, scope: &str) {
        let mut crowds = self.crowds.lock().unwrap();
        let crowd = crowds.entry(scope.to_owned()).or_default();
        crowd.now += 1;
        crowd.total += 1;
        crowd.most = crowd.most.max(crowd.now);
    }

    pub fn crowd_leaves(&self, scope: &str) {
        if let Some(crowd) = self.crowds.lock().unwrap().get_mut(scope) {
            crowd.now -= 1;
        }
    }

    /// Of the token requests for a scope: how many were at work at once at most, and how many there were.
    pub fn crowd(&self, scope: &str) -> (u64, u64) {
        let crowd = self.crowds.lock().unwrap().get(scope).copied().unwrap_or_default();
        (crowd.most, crowd.total)
    }

    pub fn scopes(&self) -> Vec<String> {
        self.crowds.lock().unwrap().keys().cloned().collect()
    }

    pub fn begin(&self) {
        self.busy.fetch_add(1, Ordering::SeqCst);
        self.step();
    }

    pub fn end(&self) {
        self.busy.fetch_sub(1, Ordering::SeqCst);
        self.step();
    }
}

impl Bustle for Record {
    fn busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst) > 0
    }

    fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }
}
