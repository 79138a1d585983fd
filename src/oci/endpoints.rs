//! A registry over the network: its mirrors in order, and itself at the end.

use std::sync::Arc;
use std::time::Instant;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, LINK, RETRY_AFTER};
use reqwest::{Method, Url};

use super::fetch::{Answer, Ask, Fetch, FetchError, FetchFuture, Taken};
use crate::base::{Class, Fault};
use crate::net::{self, Attempt, Endpoint, RetryPolicy, SendError};

/// Asks the endpoints of a registry, one after the other, until a moment comes.
#[derive(Clone, Debug)]
pub struct Endpoints {
    registry: String,
    /// Each with the name that it wants to be told of the registry that it stands in for.
    endpoints: Vec<(Arc<Endpoint>, Option<String>)>,
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
    /// `endpoints` stand in for `registry`, which is `HOST[:PORT]`; there is at least one. Their bases are those
    /// of the API, up to `/v2` as a rule; those with a name are told it as `ns`. Nobody waits for an answer after
    /// `until`.
    pub fn new(
        registry: &str,
        endpoints: Vec<(Arc<Endpoint>, Option<String>)>,
        policy: RetryPolicy,
        until: Instant,
    ) -> Self {
        Self { registry: registry.to_owned(), endpoints, policy, until }
    }

    async fn ask_all(&self, ask: Ask<'_>, take: &mut Taken<'_>) -> Result<Answer, FetchError> {
        let mut failed = 0;
        loop {
            let (mut last, mut pause) = (None, None);
            for (endpoint, namespace) in &self.endpoints {
                match self.ask_one(endpoint, namespace.as_deref(), ask, take).await {
                    Outcome::Answered(answer) => return Ok(answer),
                    Outcome::Broken(error) => return Err(error),
                    // The registry itself, which is the last, has the last word.
                    Outcome::Failed { answer, error, retry_after } => {
                        last = Some((answer, error));
                        pause = retry_after;
                    }
                }
            }
            let Some((answer, error)) = last else { return Err(self.unavailable("it has no address")) };
            failed += 1;
            let transient = answer.as_ref().map_or(error.fault(), |answer| fault(answer.status));
            let clock = self.endpoints[0].0.clock();
            let seed = ask.path.bytes().fold(0u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
            let attempt = Attempt { failed, seed, retry_after: pause };
            match self.policy.next(attempt, transient, clock.now(), self.until) {
                Some(pause) => clock.sleep(pause).await,
                None => return answer.map_or(Err(error), Ok),
            }
        }
    }

    async fn ask_one(
        &self,
        endpoint: &Endpoint,
        namespace: Option<&str>,
        ask: Ask<'_>,
        take: &mut Taken<'_>,
    ) -> Outcome {
        let failed = |error| Outcome::Failed { answer: None, error, retry_after: None };
        let Some(url) = address(endpoint.base(), namespace, ask.path) else {
            return failed(self.unavailable("no address for that"));
        };
        let mut headers = HeaderMap::new();
        if let Ok(accept) = HeaderValue::from_str(ask.accept)
            && !ask.accept.is_empty()
        {
            headers.insert(ACCEPT, accept);
        }
        let method = if ask.head { Method::HEAD } else { Method::GET };
        let (class, repository) = (Class::OnDemand, Some(ask.repository));
        let sent = net::Ask { method, url, headers, class, repository, until: self.until };
        let mut reply = match endpoint.send(sent).await {
            Ok(reply) => reply,
            Err(error) => return failed(self.sent(&error)),
        };
        let answer = answer(reply.status(), reply.headers());
        if answer.status != 200 {
            let error = self.unavailable(&format!("status {}", answer.status));
            // What one mirror has not, or does not give, the next may.
            let retry_after = reply.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            let retry_after = retry_after.map(std::time::Duration::from_secs);
            return Outcome::Failed { answer: Some(answer), error, retry_after };
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
        match error.fault() {
            Fault::Transient => FetchError::Unavailable { registry, detail },
            Fault::Permanent | Fault::Corrupt | Fault::Cancelled => FetchError::Unusable { registry, detail },
        }
    }

    fn unavailable(&self, detail: &str) -> FetchError {
        FetchError::Unavailable { registry: self.registry.clone(), detail: detail.to_owned() }
    }
}

/// Where `path`, which begins with `/v2/`, is below the API at `base`.
fn address(base: &Url, namespace: Option<&str>, path: &str) -> Option<Url> {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let mut url = base.clone();
    url.set_path(&format!("{}{}", base.path().trim_end_matches('/'), path.strip_prefix("/v2")?));
    url.set_query(query);
    if let Some(namespace) = namespace {
        url.query_pairs_mut().append_pair("ns", namespace);
    }
    Some(url)
}

/// Whether an answer may be another one a moment later.
fn fault(status: u16) -> Fault {
    match status {
        408 | 429 | 500 | 502..=504 => Fault::Transient,
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
    fn mirrors_are_asked_below_their_own_path_and_told_for_whom() {
        let url = |base: &str, namespace, path| address(&base.parse().unwrap(), namespace, path).map(String::from);

        let plain = url("https://r/v2", None, "/v2/a/manifests/1");
        assert_eq!(plain.as_deref(), Some("https://r/v2/a/manifests/1"));
        let mirror = url("https://m/cache/r/", Some("r"), "/v2/a/referrers/x?n=1");
        assert_eq!(mirror.as_deref(), Some("https://m/cache/r/a/referrers/x?n=1&ns=r"));
        assert_eq!(url("https://r/v2", None, "/v3/a"), None);
    }

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
}
