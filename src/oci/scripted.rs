//! A registry that is written down, for tests.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::fetch::{Answer, Ask, Fetch, FetchError, FetchFuture, Taken};
use crate::codec::sha256;

#[derive(Default)]
pub(super) struct Scripted {
    answers: Mutex<HashMap<String, (Answer, Vec<u8>)>>,
    asked: Mutex<Vec<String>>,
}

impl Scripted {
    /// Gives `body` at `path`, with its digest.
    pub(super) fn put(&self, path: &str, body: &[u8]) {
        self.put_as(path, body, &format!("sha256:{}", sha256(body)));
    }

    pub(super) fn put_as(&self, path: &str, body: &[u8], digest: &str) {
        let answer = Answer { status: 200, digest: Some(digest.to_owned()), ..Answer::default() };
        self.answers.lock().unwrap().insert(path.to_owned(), (answer, body.to_vec()));
    }

    pub(super) fn fail(&self, path: &str, status: u16) {
        let answer = Answer { status, ..Answer::default() };
        self.answers.lock().unwrap().insert(path.to_owned(), (answer, Vec::new()));
    }

    pub(super) fn link(&self, path: &str, next: &str) {
        self.answers.lock().unwrap().get_mut(path).expect("there is one").0.next = Some(next.to_owned());
    }

    /// What was asked since the last time, in order.
    pub(super) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl Fetch for Scripted {
    fn ask<'a>(&'a self, ask: Ask<'a>, take: &'a mut Taken<'_>) -> FetchFuture<'a, Result<Answer, FetchError>> {
        let method = if ask.head { "HEAD" } else { "GET" };
        self.asked.lock().unwrap().push(format!("{method} {}", ask.path));
        let found = self.answers.lock().unwrap().get(ask.path).cloned();
        let (answer, body) = found.unwrap_or((Answer { status: 404, ..Answer::default() }, Vec::new()));
        let taken = if ask.head || answer.status != 200 { Ok(()) } else { body.chunks(4096).try_for_each(take) };
        let registry = self.describe();
        let outcome = taken.map_err(|cause| FetchError::Taking { registry, cause: Arc::new(cause) });
        Box::pin(std::future::ready(outcome.map(|()| answer)))
    }

    fn describe(&self) -> String {
        "r.example".to_owned()
    }
}
