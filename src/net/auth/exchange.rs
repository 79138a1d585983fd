//! Asking a token server, once.
//!
//! The protocol of docker's registries, which OCI's have too: `GET` with a password or without, or, for a
//! refresh token, the `POST` of OAuth 2. Redirects are followed here: a login goes to the server that the
//! registry named and to no other.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, Request, Response, Url};
use serde::Deserialize;

use super::Login;
use crate::base::Secret;
use crate::net::address::same_origin;
use crate::net::endpoint::transport;
use crate::net::outlet::Outlet;
use crate::net::{Clock, SendError, retry_after};

/// Most bytes of an answer. Tokens of a few KiB have been seen.
const MOST_BODY: usize = 256 << 10;

/// Redirects followed.
const MOST_REDIRECTS: usize = 3;

/// How long a token is in force that does not say so itself, by the protocol.
const UNSAID: Duration = Duration::from_secs(60);

/// The longest that any is believed to be.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Whom to ask for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    /// Address of the token server.
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    pub(super) scope: String,
}

/// A token, and how long it is in force from the moment it was asked for.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) token: Secret,
    pub(super) lifetime: Duration,
}

/// Why there is none.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The server refuses, with this status.
    Denied(u16),
    /// It cannot be reached, or makes no sense; not to be asked again for so long, if it said so.
    Unavailable { detail: String, retry_after: Option<Duration> },
    /// It cannot prove who it is, or sends us where nobody should go.
    Untrusted(String),
}

impl From<reqwest::Error> for Refusal {
    fn from(error: reqwest::Error) -> Self {
        match transport(error) {
            SendError::Untrusted(why) => Self::Untrusted(why),
            other => Self::Unavailable { detail: other.to_string(), retry_after: None },
        }
    }
}

/// What a token server answers. Other fields, such as the time of day of issue, are not looked at: its
/// clock may be wrong.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
}

/// A login as a header value.
pub(super) fn basic(user: &str, password: &Secret) -> Option<HeaderValue> {
    let text = format!("Basic {}", STANDARD.encode(format!("{user}:{}", password.expose())));
    sensitive(&text)
}

/// A token as a header value; `None` if it cannot be one.
pub(super) fn bearer(token: &Secret) -> Option<HeaderValue> {
    sensitive(&format!("Bearer {}", token.expose()))
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Whether a registry, or what it named, at `from` may send us to an address of the kind of `to`.
///
/// # Errors
/// Why not.
pub(super) fn may_go(from: &Url, to: &Url) -> Result<(), &'static str> {
    match (from.scheme(), to.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return Err("it would be asked without TLS"),
        _ => return Err("it is not reached by HTTP"),
    }
    if !to.username().is_empty() || to.password().is_some() {
        return Err("its address holds a login");
    }
    Ok(())
}

/// Asks for a token, and follows redirects. `outlet` has the one for an address: no server is asked as if it were
/// another.
pub(super) async fn ask(
    clock: &Clock,
    outlet: &(dyn Fn(&Url) -> Result<Outlet, Refusal> + Send + Sync),
    demand: &Demand,
    login: Option<&Login>,
    until: Instant,
    judge: &(dyn Fn(&Url) -> Result<(), String> + Send + Sync),
) -> Result<Grant, Refusal> {
    let mut at = demand.realm.clone();
    for _ in 0..=MOST_REDIRECTS {
        let is_home = same_origin(&at, &demand.realm);
        let outlet = outlet(&at)?;
        let request = request(&at, demand, login.filter(|_| is_home));
        let Ok(sent) = clock.timeout_at(until, outlet.execute(request)).await else {
            outlet.was_silent();
            return Err(unavailable("no answer in time"));
        };
        let response = sent?;
        if !response.status().is_redirection() {
            return granted(clock, response, until).await;
        }
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let next = location.and_then(|location| at.join(location).ok());
        let next = next.ok_or_else(|| Refusal::Untrusted("it redirects to no address".to_owned()))?;
        let away = |why| Refusal::Untrusted(format!("it redirects to another address, but {why}"));
        may_go(&at, &next).map_err(|why| away(why.to_owned()))?;
        judge(&next).map_err(away)?;
        if matches!(login, Some(Login::Identity(_))) && !same_origin(&next, &demand.realm) {
            return Err(away("a login is for one server".to_owned()));
        }
        at = next;
    }
    Err(Refusal::Untrusted("it redirects too often".to_owned()))
}

fn request(at: &Url, demand: &Demand, login: Option<&Login>) -> Request {
    let service = demand.service.as_deref().map(|service| ("service", service));
    if let Some(Login::Identity(refresh)) = login {
        let fields = [
            ("grant_type", "refresh_token"),
            ("client_id", "rafsd"),
            ("scope", &demand.scope),
            ("refresh_token", refresh.expose()),
        ];
        let mut form = Url::parse("form:").expect("a scheme and nothing else");
        form.query_pairs_mut().extend_pairs(fields.into_iter().chain(service));
        let mut request = Request::new(Method::POST, at.clone());
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        *request.body_mut() = Some(form.query().unwrap_or_default().to_owned().into());
        return request;
    }
    let mut url = at.clone();
    if *at == demand.realm {
        // A redirect says itself what is to be asked.
        url.query_pairs_mut().extend_pairs(service.into_iter().chain([("scope", demand.scope.as_str())]));
    }
    let mut request = Request::new(Method::GET, url);
    if let Some(Login::Basic { user, password }) = login
        && let Some(value) = basic(user, password)
    {
        request.headers_mut().insert(AUTHORIZATION, value);
    }
    request
}

async fn granted(clock: &Clock, mut response: Response, until: Instant) -> Result<Grant, Refusal> {
    let status = response.status();
    match status.as_u16() {
        200..=299 => {}
        // Too many requests and time-outs pass; everything else of this class is about us.
        408 | 425 | 429 => return Err(busy(&response)),
        400..=499 => return Err(Refusal::Denied(status.as_u16())),
        _ => return Err(busy(&response)),
    }
    let mut body = Vec::new();
    loop {
        let piece = clock.timeout_at(until, response.chunk()).await;
        let piece = piece.map_err(|_| unavailable("its answer does not end"))??;
        let Some(piece) = piece else { break };
        if piece.len() > MOST_BODY - body.len() {
            return Err(unavailable("its answer is too long"));
        }
        body.extend_from_slice(&piece);
    }
    let answer: Answer = serde_json::from_slice(&body).map_err(|_| unavailable("its answer is no token in JSON"))?;
    // Some servers give one of the two as an empty string.
    let token = [answer.token, answer.access_token].into_iter().flatten().find(|token| !token.is_empty());
    let token = Secret::new(token.ok_or_else(|| unavailable("there is no token in its answer"))?);
    let said = answer.expires_in.filter(|seconds| *seconds >= 1.0);
    let lifetime = said.and_then(|seconds| Duration::try_from_secs_f64(seconds.min(1e9)).ok()).unwrap_or(UNSAID);
    Ok(Grant { token, lifetime: lifetime.min(LONGEST) })
}

fn busy(response: &Response) -> Refusal {
    Refusal::Unavailable {
        detail: format!("it answers with status {}", response.status().as_u16()),
        retry_after: retry_after(response.headers()),
    }
}

fn unavailable(detail: &str) -> Refusal {
    Refusal::Unavailable { detail: detail.to_owned(), retry_after: None }
}
