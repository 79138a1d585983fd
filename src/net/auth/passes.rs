//! What is known of the passes of one registry: plain facts under one lock, which nobody holds for long.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::HeaderValue;
use tokio::sync::watch;

use super::{AuthError, Login};
use crate::net::outlet::Outlet;

/// The first pause after a failure; doubled after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// The longest pause: credentials may have been mended.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The longest that a busy token server may keep us from asking again.
const LONGEST_REQUESTED: Duration = Duration::from_secs(60);

/// A pass that is refused so soon after it was got is no better than the one before.
const YOUNG: Duration = Duration::from_secs(5);

/// Repositories that are remembered; those without a pass in force go first.
const MOST_REPOSITORIES: usize = 4096;

/// What one registry wants, and what it is told of each repository.
#[derive(Default)]
pub(super) struct State {
    /// What the registry asked for last, whatever it was about.
    pub(super) manner: Option<Manner>,
    pub(super) repositories: HashMap<String, Repository>,
    /// That of the keychain when all this was got from it.
    pub(super) generation: u64,
    /// By scheme, host and port of the token server.
    pub(super) outlets: HashMap<String, Outlet>,
}

/// How a registry wants to be told who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    Basic,
    /// By a token of this server.
    Bearer {
        realm: Url,
        service: Option<String>,
    },
}

/// What is known of one repository.
#[derive(Default)]
pub(super) struct Repository {
    /// Whether the registry has refused somebody who said nothing, or too little.
    pub(super) is_asked: bool,
    /// The name that the registry has for it, where it asks for another one.
    pub(super) scope: Option<String>,
    pub(super) pass: Option<Pass>,
    /// The request that is under way.
    pub(super) fetch: Option<watch::Receiver<Option<Outcome>>>,
    pub(super) failure: Option<Failure>,
    /// Passes in a row that were refused right after they were got.
    pub(super) refusals: u32,
    /// What was refused last, so that it is not taken for news.
    pub(super) refused: Option<HeaderValue>,
}

/// What to send.
#[derive(Clone)]
pub(super) struct Pass {
    pub(super) value: HeaderValue,
    /// What it was got with.
    pub(super) login: Option<Login>,
    pub(super) since: Instant,
    pub(super) renew: Instant,
    pub(super) ends: Instant,
}

/// Why there is no pass.
pub(super) struct Failure {
    pub(super) outcome: Outcome,
    pub(super) count: u32,
    /// Before this nobody asks again.
    pub(super) until: Instant,
}

impl Failure {
    /// What somebody is told who comes at `now`.
    pub(super) fn told(&self, now: Instant) -> Result<Option<HeaderValue>, AuthError> {
        let pause = self.until.saturating_duration_since(now);
        self.outcome.clone().map(|_| None).map_err(|error| error.for_now(pause))
    }
}

/// `None`: there is nothing to say that was not said.
pub(super) type Outcome = Result<Option<Pass>, AuthError>;

impl State {
    /// Forgets all that was got with credentials, if these have changed since.
    pub(super) fn follow(&mut self, generation: u64) {
        if std::mem::replace(&mut self.generation, generation) == generation {
            return;
        }
        for entry in self.repositories.values_mut() {
            (entry.pass, entry.failure, entry.fetch, entry.refused, entry.refusals) = (None, None, None, None, 0);
        }
    }

    /// Lets go of what is of no use, when there are many.
    pub(super) fn make_room(&mut self, wanted: &str, now: Instant) {
        if self.repositories.len() < MOST_REPOSITORIES || self.repositories.contains_key(wanted) {
            return;
        }
        let is_used = |entry: &Repository| entry.fetch.is_some() || entry.pass.as_ref().is_some_and(|it| now < it.ends);
        self.repositories.retain(|_, entry| is_used(entry));
        if self.repositories.len() >= MOST_REPOSITORIES {
            self.repositories.retain(|_, entry| entry.fetch.is_some());
        }
    }
}

impl Repository {
    /// Notes that there is nothing to send. Nobody asks again for as long as this gives.
    pub(super) fn fail(&mut self, outcome: Outcome, retry_after: Option<Duration>, now: Instant) -> Duration {
        let count = self.failure.as_ref().map_or(0, |failure| failure.count).max(self.refusals.saturating_sub(2));
        let pause = FIRST_PAUSE.saturating_mul(1 << count.min(8)).min(LONGEST_PAUSE);
        let pause = pause.max(retry_after.unwrap_or_default().min(LONGEST_REQUESTED));
        self.failure = Some(Failure { outcome, count: count.saturating_add(1), until: now + pause });
        pause
    }

    /// Drops the pass that was sent and refused, unless somebody has already.
    pub(super) fn drop_refused(&mut self, sent: Option<&HeaderValue>, now: Instant) -> Option<Pass> {
        let pass = self.pass.take_if(|pass| Some(&pass.value) == sent)?;
        let is_young = now.saturating_duration_since(pass.since) < YOUNG;
        self.refusals = if is_young { self.refusals + 1 } else { 0 };
        if self.refusals > 1 {
            // The last one was new as well: a third will not be better, but later one may be.
            self.fail(Ok(None), None, now);
        }
        self.refused = Some(pass.value.clone());
        Some(pass)
    }
}
