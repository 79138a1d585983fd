//! A registry over the network: its mirrors in order, and itself at the end.

use std::sync::Arc;
use std::time::Instant;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Url};

use super::fetch::{Answer, Ask, Fetch, FetchError, FetchFuture, Taken};
use crate::base::{Class, Fault};
use crate::net::{self, Attempt, Endpoint, Health, RetryPolicy, SendError, Standing};

/// One server that answers for a registry.
#[derive(Clone, Debug)]
pub struct Place {
    /// How it is asked.
    pub endpoint: Arc<Endpoint>,
    /// Where its interface is: what comes before `/REPOSITORY/manifests/...`, `/v2` as a rule.
    pub base: Url,
    /// The registry that it stands in for, if it has to be told.
    pub namespace: Option<String>,
    /// Whether it may be asked what a tag means.
    pub resolves: bool,
    /// Whether it may be asked for what has a digest.
    pub pulls: bool,
    /// How it has been doing; shared with everybody who asks the same server.
    pub health: Arc<Health>,
}

impl Place {
    /// Whether it may be asked that.
    fn answers(&self, path: &str) -> bool {
        if is_by_digest(path) { self.pulls } else { self.resolves }
    }

    /// Where to ask it for `path`, which begins with `/v2/`.
    fn url(&self, path: &str) -> Option<Url> {
        let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
        let mut url = self.base.clone();
        url.path_segments_mut().ok()?.pop_if_empty().extend(path.strip_prefix("/v2/")?.split('/'));
        url.set_query(query);
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Some(url)
    }
}

/// Whether a question is about something with a digest: what is wrong with the answer shows.
fn is_by_digest(path: &str) -> bool {
    path.rsplit('/').next().is_some_and(|last| last.starts_with("sha256:")) && !path.contains("/referrers/")
}

/// Asks the servers of a registry, one after the other, until a moment comes.
#[derive(Clone, Debug)]
pub struct Endpoints {
    registry: String,
    places: Vec<Place>,
    policy: RetryPolicy,
    until: Instant,
}

/// How asking one endpoint once ended.
enum Outcome {
    Answered(Answer),
    /// Somebody else may know better, or the same one later.
    Failed {
        answer: Option<Answer>,
        error: FetchError,
        retry_after: Option<std::time::Duration>,
    },
    /// Nobody else may be asked: a part of the body has been taken.
    Broken(FetchError),
}

impl Endpoints {
    /// `places` answer for `registry`, which is `HOST[:PORT]`, the best first. Nobody waits for an answer after
    /// `until`.
    pub fn new(registry: &str, places: Vec<Place>, policy: RetryPolicy, until: Instant) -> Self {
        Self { registry: registry.to_owned(), places, policy, until }
    }

    /// Whom to ask, those in good standing first.
    fn order(&self, path: &str) -> Vec<&Place> {
        let mut order: Vec<_> = self.places.iter().filter(|place| place.answers(path)).collect();
        order.sort_by_key(|place| match place.health.standing(place.endpoint.clock().now()) {
            Standing::Good => 0,
            // Its turn comes at the end, and that is a probe.
            Standing::Probe => {
                place.health.probed();
                1
            }
            Standing::Bad => 1,
        });
        order
    }

    async fn ask_all(&self, ask: Ask<'_>, take: &mut Taken<'_>) -> Result<Answer, FetchError> {
        let mut failed = 0;
        loop {
            let (mut last, mut pause) = (None, None);
            for place in self.order(ask.path) {
                match self.ask_one(place, ask, take).await {
                    Outcome::Answered(answer) => return Ok(answer),
                    Outcome::Broken(error) => return Err(error),
                    // The registry itself, which is the last, has the last word.
                    Outcome::Failed { answer, error, retry_after } => {
                        last = Some((answer, error));
                        pause = retry_after;
                    }
                }
            }
            let (Some((answer, error)), Some(first)) = (last, self.places.first()) else {
                let (registry, detail) = (self.registry.clone(), "no server of it may be asked that".to_owned());
                return Err(FetchError::Unusable { registry, detail });
            };
            failed += 1;
            let transient = answer.as_ref().map_or(error.fault(), |answer| fault(answer.status));
            let clock = first.endpoint.clock();
            let seed = ask.path.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
            let attempt = Attempt { failed, seed, retry_after: pause };
            match self.policy.next(attempt, transient, clock.now(), self.until) {
                Some(pause) => clock.sleep(pause).await,
                None => return answer.ok_or(error),
            }
        }
    }

    async fn ask_one(&self, place: &Place, ask: Ask<'_>, take: &mut Taken<'_>) -> Outcome {
        let failed = |error| Outcome::Failed { answer: None, error, retry_after: None };
        let Some(url) = place.url(ask.path) else { return failed(self.unavailable("no address for that")) };
        let mut headers = HeaderMap::new();
        if let Ok(accept) = HeaderValue::from_str(ask.accept)
            && !ask.accept.is_empty()
        {
            headers.insert(ACCEPT, accept);
        }
        let method = if ask.head { Method::HEAD } else { Method::GET };
        let (class, repository) = (Class::OnDemand, Some(ask.repository));
        let sent = net::Ask { method, url, headers, class, repository, until: self.until };
        let mut reply = match place.endpoint.send(sent).await {
            Ok(reply) => reply,
            Err(error) => {
                place.health.failed(place.endpoint.clock().now());
                return Outcome::Failed { answer: None, error: self.sent(&error), retry_after: error.retry_after() };
            }
        };
        let answer = answer(reply.status(), reply.headers());
        match fault(answer.status) {
            Fault::Transient => place.health.failed(place.endpoint.clock().now()),
            _ => place.health.worked(),
        }
        if answer.status != 200 {
            let error = self.unavailable(&format!("status {}", answer.status));
            // What one mirror has not, or does not give, the next may.
            return Outcome::Failed { answer: Some(answer), error, retry_after: net::retry_after(reply.headers()) };
        }
        let mut taken = false;
        loop {
            match reply.chunk(self.until).await {
                Ok(Some(piece)) => {
                    taken = true;
                    if let Err(cause) = take(&piece) {
                        let registry = self.registry.clone();
                        return Outcome::Broken(FetchError::Taking { registry, cause: Arc::new(cause) });
                    }
                }
                Ok(None) => return Outcome::Answered(answer),
                Err(error) if taken => return Outcome::Broken(self.sent(&error)),
                Err(error) => return failed(self.sent(&error)),
            }
        }
    }

    fn sent(&self, error: &SendError) -> FetchError {
        let (registry, detail) = (self.registry.clone(), error.to_string());
        if let SendError::Unauthorized { fault, .. } = error {
            return FetchError::NoLogin { registry, detail, fault: *fault };
        }
        match error.fault() {
            Fault::Transient => FetchError::Unavailable { registry, detail },
            Fault::Permanent | Fault::Corrupt | Fault::Cancelled => FetchError::Unusable { registry, detail },
        }
    }

    fn unavailable(&self, detail: &str) -> FetchError {
        FetchError::Unavailable { registry: self.registry.clone(), detail: detail.to_owned() }
    }
}

/// Whether an answer may be another one a moment later.
fn fault(status: u16) -> Fault {
    match status {
        408 | 425 | 429 | 500..=599 => Fault::Transient,
        _ => Fault::Permanent,
    }
}

fn answer(status: u16, headers: &HeaderMap) -> Answer {
    let text = |name: &str| Some(headers.get(name)?.to_str().ok()?.trim().to_owned());
    let media_type = text(CONTENT_TYPE.as_str());
    Answer {
        status,
        content_type: media_type.and_then(|it| Some(it.split(';').next()?.trim().to_ascii_lowercase())),
        digest: text("docker-content-digest"),
        next: text(LINK.as_str()).and_then(|link| next(&link)),
    }
}

/// The address of the next page in a header `Link`, if it is on the same server.
fn next(link: &str) -> Option<String> {
    let of = |part: &str| {
        let (target, parameters) = part.trim().strip_prefix('<')?.split_once('>')?;
        let is_next = parameters.split(';').any(|it| matches!(it.trim(), "rel=\"next\"" | "rel=next"));
        (is_next && target.starts_with('/') && !target.starts_with("//")).then(|| target.to_owned())
    };
    link.split(',').find_map(of)
}

impl Fetch for Endpoints {
    fn ask<'a>(&'a self, ask: Ask<'a>, take: &'a mut Taken<'_>) -> FetchFuture<'a, Result<Answer, FetchError>> {
        Box::pin(self.ask_all(ask, take))
    }

    fn describe(&self) -> String {
        self.registry.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_on_the_same_server() {
        for (link, expected) in [
            ("</v2/a/referrers/x?n=1>; rel=\"next\"", Some("/v2/a/referrers/x?n=1")),
            ("</v2/x>; rel=prev, </v2/y>; rel=next", Some("/v2/y")),
            ("<//evil.example/v2/x>; rel=\"next\"", None),
            ("<https://evil.example/v2/x>; rel=\"next\"", None),
            ("</v2/x>", None),
            ("nonsense", None),
        ] {
            assert_eq!(next(link).as_deref(), expected, "{link}");
        }
    }

    fn place(base: &str, namespace: Option<&str>, resolves: bool) -> Place {
        let base = Url::parse(base).unwrap();
        let endpoint = Endpoint::new(&base, net::EndpointOptions::default(), net::Clock::default()).unwrap();
        let namespace = namespace.map(ToOwned::to_owned);
        Place { endpoint: Arc::new(endpoint), base, namespace, resolves, pulls: true, health: Arc::default() }
    }

    #[test]
    fn each_server_is_asked_below_its_own_address() {
        let own = place("https://r.example/v2", None, true);
        let mirror = place("http://m.example/proxy/v2/", Some("r.example"), false);
        let url = |place: &Place, path: &str| place.url(path).unwrap().to_string();
        assert_eq!(url(&own, "/v2/a/b/manifests/1"), "https://r.example/v2/a/b/manifests/1");
        assert_eq!(
            url(&mirror, "/v2/a/referrers/sha256:00?page=2"),
            "http://m.example/proxy/v2/a/referrers/sha256:00?page=2&ns=r.example"
        );
        let digest = "/v2/a/manifests/sha256:00";
        assert!(own.answers("/v2/a/manifests/1") && mirror.answers(digest) && mirror.answers("/v2/a/blobs/sha256:00"));
        assert!(!mirror.answers("/v2/a/manifests/1") && !mirror.answers("/v2/a/referrers/sha256:00"));
    }
}
