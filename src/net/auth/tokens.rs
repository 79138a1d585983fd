//! What is sent to one registry to say who we are.
//!
//! For each repository there is one *pass*: a token, or a password where the registry wants that. Whoever
//! needs one that is not there waits for the one request that fetches it; a pass that will end soon is
//! replaced in the background while it is still used. A request for a token goes on when those who wait
//! for it have left, because others will come.
//!
//! Times are counted from the moment a token was asked for, by [`Clock`]. No time of day is looked at.
//!
//! Locking: the one lock is held for looking and noting only, never while anybody is asked.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue};
use tokio::sync::watch;

use super::challenge::{Challenge, challenges};
use super::exchange::{self, Demand, Grant, Refusal, basic, bearer, may_go};
use super::passes::{Manner, Outcome, Pass, Repository, State};
use super::{AuthError, Keychain, Login};
use crate::net::address::Bounds;
use crate::net::client::{foreign, home};
use crate::net::outlet::Outlet;
use crate::net::proxy::ProxyOptions;
use crate::net::{Authorize, AuthorizeFuture, ClientOptions, Clock, without_secrets};

/// How token servers are reached.
#[derive(Clone, Debug)]
pub struct TokenOptions {
    /// Patience and trust. A certificate of ours, and blind belief, are for the registry's own host only.
    pub client: ClientOptions,
    /// Where the registry is reached; `None` for https by its name. Without TLS there, its token server may be
    /// without it too.
    pub server: Option<Url>,
    /// Hosts that may be token servers wherever they are, besides those that any may.
    pub hosts: Vec<String>,
    /// The longest that a token server may take, redirects included.
    pub patience: Duration,
    /// What is done when the proxy of `client` is ill; `None` for asking through it regardless.
    pub proxy: Option<ProxyOptions>,
}

impl Default for TokenOptions {
    /// 10 s for a token server, which is reached by TLS as the registry is.
    fn default() -> Self {
        let patience = Duration::from_secs(10);
        Self { client: ClientOptions::default(), server: None, hosts: Vec::new(), patience, proxy: None }
    }
}

/// How long a password, or a token that somebody else got, is used until the keychain is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// Who we are to one registry. Cheap to clone; clones are one.
#[derive(Clone)]
pub struct Tokens(Arc<Shared>);

struct Shared {
    registry: String,
    /// The registry itself, and where it may send us; `None` if its name is none.
    base: Option<(Url, Bounds)>,
    keychain: Arc<dyn Keychain>,
    options: TokenOptions,
    clock: Clock,
    state: Mutex<State>,
    /// Whether it is known in which network the registry is.
    is_found: AtomicBool,
    jitter: RandomState,
}

/// What somebody who needs a pass has to do.
enum Step {
    Send(HeaderValue),
    Wait(watch::Receiver<Option<Outcome>>),
    Told(Result<Option<HeaderValue>, AuthError>),
}

impl Tokens {
    /// Nothing is known yet of `registry`, which is `HOST[:PORT]`. Connects to nobody.
    pub fn new(registry: String, keychain: Arc<dyn Keychain>, options: TokenOptions, clock: Clock) -> Self {
        let base = options.server.clone().or_else(|| Url::parse(&format!("https://{registry}/")).ok());
        let base = base.map(|base| {
            let bounds = Bounds::of(&base, &options.client, &options.hosts);
            (base, bounds)
        });
        let (state, is_found, jitter) = (Mutex::default(), AtomicBool::new(false), RandomState::new());
        Self(Arc::new(Shared { registry, base, keychain, options, clock, state, is_found, jitter }))
    }

    /// What to send with a request about `repository`: what is in force, or is fetched now because the
    /// registry is known to want it. `None` if nothing is known to be wanted. Must be called on a runtime.
    ///
    /// # Errors
    /// There is no saying who we are, or not by `until`.
    pub async fn authorization(&self, repository: &str, until: Instant) -> Result<Option<HeaderValue>, AuthError> {
        let (step, is_asked) = self.0.step(repository, |entry, now| {
            let pass = entry.pass.as_ref().filter(|pass| now < pass.ends)?;
            Some((pass.value.clone(), now >= pass.renew))
        });
        match self.0.settle(step, until).await {
            // The registry has said nothing of this repository yet: it may be one for everybody.
            Err(AuthError::Denied { .. }) if !is_asked => Ok(None),
            outcome => outcome,
        }
    }

    /// What to repeat a request with that was answered with status 401 and `headers`; `None` if there is
    /// nothing better to say than `sent`. Must be called on a runtime.
    ///
    /// # Errors
    /// There is no saying who we are, or not by `until`.
    pub async fn challenged(
        &self,
        repository: &str,
        headers: &HeaderMap,
        sent: Option<&HeaderValue>,
        until: Instant,
    ) -> Result<Option<HeaderValue>, AuthError> {
        // Whom it may name depends on where it is.
        let found = self.0.clock.timeout_at(until, self.0.find_home()).await;
        found.map_err(|_| AuthError::Late { registry: self.0.registry.clone() })?;
        // Whatever else it says, what was sent is of no use any more.
        if let Some(login) = self.0.drop_refused(repository, sent) {
            self.0.keychain.refused(&self.0.registry, repository, &login);
        }
        if !self.0.learn(repository, &challenges(headers))? {
            return Ok(None);
        }
        let (step, _) = self.0.step(repository, |entry, now| {
            // Somebody else may have got a new one since.
            let pass = entry.pass.as_ref().filter(|pass| now < pass.ends && Some(&pass.value) != sent)?;
            Some((pass.value.clone(), false))
        });
        self.0.settle(step, until).await
    }
}

impl Authorize for Tokens {
    fn authorization<'a>(&'a self, repository: &'a str, until: Instant) -> AuthorizeFuture<'a> {
        Box::pin(async move { Ok(Self::authorization(self, repository, until).await?) })
    }

    fn challenged<'a>(
        &'a self,
        repository: &'a str,
        headers: &'a HeaderMap,
        sent: Option<&'a HeaderValue>,
        until: Instant,
    ) -> AuthorizeFuture<'a> {
        Box::pin(async move { Ok(Self::challenged(self, repository, headers, sent, until).await?) })
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").field("registry", &self.0.registry).finish_non_exhaustive()
    }
}

impl Shared {
    /// Notes what the registry wants. `false`: nothing that we can say.
    fn learn(&self, repository: &str, challenges: &[Challenge]) -> Result<bool, AuthError> {
        let wanted = challenges.iter().find(|it| it.scheme == "bearer" && it.get("realm").is_some());
        let Some(challenge) = wanted.or_else(|| challenges.iter().find(|it| it.scheme == "basic")) else {
            return Ok(false);
        };
        let manner = if challenge.scheme == "basic" { Manner::Basic } else { self.bearer(challenge)? };
        let scope = challenge.get("scope").and_then(|scope| pull_only(scope, repository));
        let mut state = self.state.lock().unwrap();
        state.manner = Some(manner);
        state.make_room(repository, self.clock.now());
        let entry = state.repositories.entry(repository.to_owned()).or_default();
        entry.is_asked = true;
        if entry.scope != scope {
            // A token for something else may be refused however new it is.
            // The pause after failures stays: a registry must not have us ask others ever faster.
            (entry.pass, entry.fetch) = (None, None);
            entry.scope = scope;
        }
        Ok(true)
    }

    fn bearer(&self, challenge: &Challenge) -> Result<Manner, AuthError> {
        let realm = challenge.get("realm").and_then(|realm| Url::parse(realm).ok());
        let untrusted = |server: String, why| AuthError::Untrusted { registry: self.registry.clone(), server, why };
        let realm = realm.ok_or_else(|| untrusted("somebody".to_owned(), "there is no address".to_owned()))?;
        self.judge(&realm).map_err(|why| untrusted(without_secrets(&realm), why))?;
        Ok(Manner::Bearer { realm, service: challenge.get("service").map(ToOwned::to_owned) })
    }

    /// Whether the registry may send us to `to`. What names mean is judged when they are resolved.
    fn judge(&self, to: &Url) -> Result<(), String> {
        let Some((base, bounds)) = &self.base else { return Err("the name of the registry is no address".to_owned()) };
        may_go(base, to)?;
        if to.host_str() != base.host_str() && bounds.forbids(to) {
            return Err("it is in a network of this host that the registry is not in itself".to_owned());
        }
        Ok(())
    }

    /// Drops the pass that was refused, unless somebody has already. Gives the login to give up.
    fn drop_refused(&self, repository: &str, sent: Option<&HeaderValue>) -> Option<Login> {
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap();
        let entry = state.repositories.get_mut(repository)?;
        entry.drop_refused(sent, now)?.login
    }

    /// What to do for a pass, given what `usable` makes of the present one: its value, and whether a new
    /// one should be fetched in the background. Also whether the registry has spoken of this repository.
    fn step(
        self: &Arc<Self>,
        repository: &str,
        usable: impl FnOnce(&Repository, Instant) -> Option<(HeaderValue, bool)>,
    ) -> (Step, bool) {
        let now = self.clock.now();
        let generation = self.keychain.generation();
        let mut state = self.state.lock().unwrap();
        state.follow(generation);
        let Some(manner) = state.manner.clone() else { return (Step::Told(Ok(None)), false) };
        state.make_room(repository, now);
        let entry = state.repositories.entry(repository.to_owned()).or_default();
        let (usable, is_asked) = (usable(entry, now), entry.is_asked);
        if let Some((value, false)) = usable {
            return (Step::Send(value), is_asked);
        }
        let pause = entry.failure.as_ref().filter(|failure| now < failure.until);
        let step = match (usable, &entry.fetch, pause) {
            (Some((value, _)), Some(_), _) | (Some((value, _)), None, Some(_)) => Step::Send(value),
            (Some((value, _)), None, None) => {
                self.fetch(entry, repository, manner);
                Step::Send(value)
            }
            (None, Some(fetch), _) => Step::Wait(fetch.clone()),
            (None, None, Some(failure)) => Step::Told(failure.told(now)),
            (None, None, None) => Step::Wait(self.fetch(entry, repository, manner)),
        };
        (step, is_asked)
    }

    async fn settle(&self, step: Step, until: Instant) -> Result<Option<HeaderValue>, AuthError> {
        let mut fetch = match step {
            Step::Send(value) => return Ok(Some(value)),
            Step::Told(told) => return told,
            Step::Wait(fetch) => fetch,
        };
        let ended = self.clock.timeout_at(until, fetch.wait_for(Option::is_some)).await;
        let outcome = ended.map_err(|_| AuthError::Late { registry: self.registry.clone() })?;
        // Only a runtime that ends drops the sender before it has told.
        let outcome = outcome.map_or(Ok(None), |outcome| outcome.clone().unwrap_or(Ok(None)));
        outcome.map(|pass| pass.map(|pass| pass.value))
    }

    /// Begins the one request for a pass of `repository`.
    fn fetch(
        self: &Arc<Self>,
        entry: &mut Repository,
        repository: &str,
        manner: Manner,
    ) -> watch::Receiver<Option<Outcome>> {
        let (tell, told) = watch::channel(None);
        entry.fetch = Some(told.clone());
        let scope = entry.scope.clone().unwrap_or_else(|| format!("repository:{repository}:pull"));
        let (shared, repository, mine) = (self.clone(), repository.to_owned(), told.clone());
        tokio::spawn(async move {
            let obtained = shared.obtain(&repository, manner, scope).await;
            let outcome = shared.note(&repository, &mine, obtained);
            tell.send_replace(Some(outcome));
        });
        told
    }

    /// Writes down how a request ended, unless it was forgotten meanwhile.
    fn note(
        &self,
        repository: &str,
        mine: &watch::Receiver<Option<Outcome>>,
        (outcome, retry_after): (Outcome, Option<Duration>),
    ) -> Outcome {
        let now = self.clock.now();
        let mut state = self.state.lock().unwrap();
        let entry = state.repositories.entry(repository.to_owned()).or_default();
        if !entry.fetch.as_ref().is_some_and(|fetch| fetch.same_channel(mine)) {
            return outcome;
        }
        entry.fetch = None;
        let outcome = match outcome {
            // Saying the same again is no answer to a refusal.
            Ok(Some(pass)) if entry.refused.as_ref() == Some(&pass.value) => {
                // It was perhaps the registry that was not well: after the pause it may be said again.
                entry.refused = None;
                Ok(None)
            }
            other => other,
        };
        match &outcome {
            Ok(Some(pass)) => (entry.pass, entry.failure) = (Some(pass.clone()), None),
            other => {
                let pause = entry.fail(other.clone(), retry_after, now);
                return outcome.map_err(|error| error.for_now(pause));
            }
        }
        outcome
    }

    /// Asks the keychain and, where a token is wanted, its server.
    async fn obtain(&self, repository: &str, manner: Manner, scope: String) -> (Outcome, Option<Duration>) {
        let login = match self.keychain.login(&self.registry, repository).await {
            Ok(login) => login,
            Err(error) => return (Err(error.into()), None),
        };
        let since = self.clock.now();
        match (manner, &login) {
            (Manner::Basic, Some(Login::Basic { user, password })) => {
                (Ok(basic(user, password).map(|value| self.pass(value, login, since, ASK_AGAIN))), None)
            }
            (Manner::Bearer { .. }, Some(Login::Bearer(token))) => {
                (Ok(bearer(token).map(|value| self.pass(value, login, since, ASK_AGAIN))), None)
            }
            // A password or nothing: there is no other way to say who we are.
            (Manner::Basic, Some(Login::Identity(_) | Login::Bearer(_)) | None) => (Ok(None), None),
            (Manner::Bearer { realm, service }, _) => {
                let demand = Demand { realm, service, scope };
                self.token(repository, &demand, login).await
            }
        }
    }

    /// A token for `login`, or for another one that the keychain has when that is refused.
    async fn token(&self, repository: &str, demand: &Demand, mut login: Option<Login>) -> (Outcome, Option<Duration>) {
        let mut is_second = false;
        loop {
            let since = self.clock.now();
            let refusal = match self.ask(demand, login.as_ref(), since).await {
                Ok(Ok(grant)) => {
                    let value = bearer(&grant.token);
                    let pass = value.map(|value| self.pass(value, login.clone(), since, grant.lifetime));
                    return (pass.map(Some).ok_or_else(|| self.unavailable(demand, "its token cannot be sent")), None);
                }
                Ok(Err(refusal)) => refusal,
                Err(error) => return (Err(error), None),
            };
            let (server, registry) = (without_secrets(&demand.realm), self.registry.clone());
            match refusal {
                Refusal::Unavailable { detail, retry_after } => {
                    return (Err(self.unavailable(demand, &detail)), retry_after);
                }
                Refusal::Untrusted(why) => return (Err(AuthError::Untrusted { registry, server, why }), None),
                Refusal::Denied(status) => {
                    let origin = login.as_ref().and_then(|_| self.keychain.origin(&self.registry, repository));
                    if let Some(refused) = login.as_ref().filter(|_| !is_second) {
                        is_second = true;
                        self.keychain.refused(&self.registry, repository, refused);
                        match self.keychain.login(&self.registry, repository).await {
                            Ok(other) if other.is_some() && other != login => {
                                login = other;
                                continue;
                            }
                            _ => {}
                        }
                    }
                    let repository = repository.to_owned();
                    return (Err(AuthError::Denied { server, registry, repository, status, origin }), None);
                }
            }
        }
    }

    async fn ask(
        &self,
        demand: &Demand,
        login: Option<&Login>,
        now: Instant,
    ) -> Result<Result<Grant, Refusal>, AuthError> {
        self.outlet(&demand.realm)?;
        let outlet = |at: &Url| {
            let told = |error: AuthError| Refusal::Unavailable { detail: error.to_string(), retry_after: None };
            self.outlet(at).map_err(told)
        };
        let until = now.checked_add(self.options.patience).unwrap_or(now);
        Ok(exchange::ask(&self.clock, &outlet, demand, login, until, &|to| self.judge(to)).await)
    }

    /// The way to a token server, or to where one redirects. It keeps its connections.
    fn outlet(&self, realm: &Url) -> Result<Outlet, AuthError> {
        let key = realm.origin().ascii_serialization();
        if let Some(outlet) = self.state.lock().unwrap().outlets.get(&key) {
            return Ok(outlet.clone());
        }
        let client = |options: &ClientOptions| match &self.base {
            // The registry itself, by this port or another.
            Some((base, bounds)) if base.host_str() == realm.host_str() => home(options, realm, bounds.home_resolver()),
            Some((_, bounds)) => foreign(options, realm, bounds.foreign_resolver()),
            None => crate::net::client(options, realm),
        };
        let outlet = Outlet::new(&self.options.client, self.options.proxy.as_ref(), &self.clock, &client)?;
        let outlets = &mut self.state.lock().unwrap().outlets;
        if outlets.len() >= 16 {
            // A registry that names another server each time.
            outlets.clear();
        }
        outlets.insert(key, outlet.clone());
        Ok(outlet)
    }

    /// Finds out in which network the registry is, and with it whom it may name, unless that is known. Without
    /// an answer, that is the public, until somebody asks again.
    async fn find_home(&self) {
        let Some((base, bounds)) = &self.base else { return };
        if self.is_found.load(Ordering::Relaxed) {
            return;
        }
        let host = base.host_str().unwrap_or_default();
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let Some(name) = host.parse().ok().filter(|_| !is_address) else { return };
        let found = bounds.home_resolver().resolve(name);
        let until = self.clock.now().checked_add(self.options.client.connect_timeout);
        let found = self.clock.timeout_at(until.unwrap_or_else(|| self.clock.now()), found).await;
        self.is_found.store(matches!(found, Ok(Ok(_))), Ordering::Relaxed);
    }

    fn unavailable(&self, demand: &Demand, detail: &str) -> AuthError {
        AuthError::Unavailable {
            server: without_secrets(&demand.realm),
            registry: self.registry.clone(),
            detail: detail.to_owned(),
            // Whoever notes it knows better.
            retry_after: Duration::ZERO,
        }
    }

    /// Something to send that is in force for `lifetime` from `since` on. It is not used to the very end:
    /// a request takes time too.
    fn pass(&self, value: HeaderValue, login: Option<Login>, since: Instant, lifetime: Duration) -> Pass {
        // 70 to 85 %: those that were got together are not renewed together, on no host of many.
        let share = u32::try_from(self.jitter.hash_one((since, value.as_bytes())) % 1000).unwrap_or(0);
        let renew = lifetime.saturating_mul(700 + share * 150 / 1000) / 1000;
        let ends = lifetime.saturating_mul(95) / 100;
        Pass { value, login, since, renew: since + renew, ends: since + ends }
    }
}

/// The scope to ask for where a registry names one: that repository, to be read and nothing else. `None` if
/// it is the usual one, or not of that kind.
fn pull_only(scope: &str, repository: &str) -> Option<String> {
    let first = scope.split(' ').find_map(|it| it.strip_prefix("repository:"))?;
    let (name, actions) = first.rsplit_once(':')?;
    let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/:".contains(&b));
    let is_wanted = is_name && name.len() <= 512 && name != repository && actions.split(',').any(|it| it == "pull");
    is_wanted.then(|| format!("repository:{name}:pull"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_may_name_a_repository_its_own_way_but_gets_no_more_than_a_reader() {
        for (scope, expected) in [
            ("repository:a/b:pull", None),
            ("repository:a/b:pull,push", None),
            ("repository:proxy/a/b:pull,push", Some("repository:proxy/a/b:pull")),
            ("registry:catalog:* repository:x/a/b:pull", Some("repository:x/a/b:pull")),
            ("repository:x:push", None),
            ("repository::pull", None),
            ("repository:a b:pull", None),
            ("repository:\u{e9}:pull", None),
            ("registry:catalog:*", None),
        ] {
            assert_eq!(pull_only(scope, "a/b").as_deref(), expected, "{scope}");
        }
    }

    #[test]
    fn nothing_secret_is_shown() {
        let realm = Url::parse("https://u:p@a.example:1/token?key=secret").unwrap();
        assert_eq!(without_secrets(&realm), "https://a.example:1/token");
    }
}
