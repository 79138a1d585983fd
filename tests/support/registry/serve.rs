//! What each door answers.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::Response;
use bytes::Bytes;
use reqwest::Url;

use super::access::Access;
use super::body::{Pouring, Ticket};
use super::fault::{Door, Fault};
use super::record::Seen;
use super::reply::Reply;
use super::wire::{Line, Mood};
use super::{Inner, dates};

/// A door and everything behind it.
pub(super) struct Doorstep {
    pub(super) door: Door,
    pub(super) inner: Arc<Inner>,
}

/// Answers one request, right or as the plan says.
pub(super) async fn answer(
    State(step): State<Arc<Doorstep>>,
    ConnectInfo(line): ConnectInfo<Line>,
    request: Request,
) -> Response {
    let inner = &step.inner;
    let mut ticket = Ticket::new(&inner.record);
    let seen = see(&step, request).await;
    let place = inner.record.enter(seen.clone());

    let mut reply = inner.reply(&seen, &line).await;
    if let Some(late) = reply.late {
        ticket.rest();
        inner.clock.sleep(late).await;
        ticket.resume();
    }
    if inner.next_is_shut_out(&seen) {
        reply = reply.with("connection", "close");
    }
    inner.record.answered(place, reply.status);
    let mut response = Response::builder().status(reply.status);
    if reply.measured {
        response = response.header("content-length", reply.body.len());
    }
    for (name, value) in &reply.headers {
        response = response.header(*name, value);
    }
    let bytes = if seen.method == "HEAD" { Bytes::new() } else { reply.body };
    let body = Pouring::new(bytes, reply.ending, inner.clock.clone(), line, ticket, place);
    response.body(Body::new(body)).expect("headers that are text")
}

/// Reads a request to its end. Behind a proxy it is seen as if it had come to the door it is for.
async fn see(step: &Doorstep, request: Request) -> Seen {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 64 << 10).await.unwrap_or_default();
    let headers: Vec<_> = head
        .headers
        .iter()
        .map(|(name, value)| (name.as_str().to_owned(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
        .collect();
    let find = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    let host = head.uri.authority().map(ToString::to_string).or_else(|| find("host")).unwrap_or_default();
    let proxied = step.door == Door::Proxy;
    Seen {
        door: if proxied { step.inner.behind(&host) } else { step.door },
        proxied,
        host,
        method: head.method.to_string(),
        path: head.uri.path().to_owned(),
        query: head.uri.query().unwrap_or_default().to_owned(),
        range: find("range"),
        headers,
        body: String::from_utf8_lossy(&body).into_owned(),
        status: 0,
        sent: 0,
    }
}

impl Inner {
    /// The door that is meant by a host's name and port, or the proxy itself.
    fn behind(&self, host: &str) -> Door {
        Door::ALL.into_iter().find(|door| self.host(*door) == host).unwrap_or(Door::Proxy)
    }

    async fn reply(&self, seen: &Seen, line: &Line) -> Reply {
        let by_proxy = if seen.proxied && seen.is_blob_read() { self.plan.count(Door::Proxy).1 } else { None };
        let is_proxy = by_proxy.is_some();
        if let Some(refusal) = self.refusal(seen).filter(|_| !is_proxy) {
            return refusal;
        }
        let counts = (seen.door == Door::Tokens || seen.is_blob_read()) && !is_proxy;
        let fault = if counts { self.plan.count(seen.door).1 } else { by_proxy };
        match &fault {
            Some(Fault::HangUp | Fault::Refuse(_) | Fault::Deaf(_)) => {
                line.mute();
                return Reply::new(500, "");
            }
            Some(Fault::ResetHead) => {
                line.mute();
                line.reset_at_end();
                return Reply::new(500, "");
            }
            _ => {}
        }
        let mut reply = match fault.as_ref().and_then(|fault| self.replaced(seen, fault)) {
            Some(reply) => reply,
            None if is_proxy => Reply::new(502, ""),
            None => match seen.door {
                Door::Registry => self.registry(seen, fault.as_ref()),
                Door::Storage | Door::Elsewhere => self.stored(seen, fault.as_ref()),
                Door::Tokens => self.token(seen, fault.as_ref()).await,
                Door::Proxy => Reply::new(502, ""),
            },
        };
        match fault {
            Some(Fault::StallHead) => reply.late = Some(Duration::MAX),
            Some(Fault::Late(by)) if seen.door != Door::Tokens => reply.late = Some(by),
            _ => {}
        }
        reply
    }

    /// What people without the right to be here are told. It is no fault and is not counted.
    fn refusal(&self, seen: &Seen) -> Option<Reply> {
        let said = seen.header("authorization").unwrap_or_default();
        match (seen.door, self.access) {
            (Door::Registry, Access::Basic) if !self.keys.is_basic(said) => {
                Some(Reply::new(401, "").with("www-authenticate", "Basic realm=\"box\""))
            }
            (Door::Registry, Access::Bearer | Access::Anonymous) => {
                let scope = scope_of(&seen.path);
                let welcome = scope.lets_in(said, &self.keys);
                (!welcome).then(|| self.challenge(&seen.path, (!said.is_empty()).then_some("invalid_token")))
            }
            (Door::Storage, _) => {
                let url = Url::parse(&format!("http://x{}?{}", seen.path, seen.query)).ok()?;
                let said = url.query_pairs().find(|(key, _)| key == "X-Amz-Signature");
                let signed = said.is_some_and(|(_, text)| self.keys.is_signed(&seen.path, &text));
                (!signed).then(|| Reply::new(403, "<Error><Code>AccessDenied</Code></Error>"))
            }
            _ => None,
        }
    }

    fn challenge(&self, path: &str, error: Option<&str>) -> Reply {
        let mut text = format!("Bearer realm=\"{}/token\",service=\"box\"", self.url(Door::Tokens));
        if let Some(scope) = scope_of(path).0 {
            text += &format!(",scope=\"{scope}\"");
        }
        if let Some(error) = error {
            text += &format!(",error=\"{error}\"");
        }
        Reply::new(401, "{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}").with("www-authenticate", text)
    }

    /// An answer that has nothing to do with what was asked for.
    fn replaced(&self, seen: &Seen, fault: &Fault) -> Option<Reply> {
        let redirect = |location: String| Reply::new(307, "").with("location", location);
        let bearer = |base: &str| {
            Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{base}/token\",service=\"box\""))
        };
        let digest = seen.path.rsplit('/').next().unwrap_or_default();
        let here = self.url(seen.door);
        Some(match fault {
            Fault::Status(status) => Reply::new(*status, "no"),
            Fault::RetryAfter(status, seconds) => Reply::new(*status, "").with("retry-after", seconds.to_string()),
            Fault::RetryAfterDate(status, seconds) => {
                let until = self.wall() + Duration::from_secs(*seconds);
                Reply::new(*status, "").with("date", dates::http(self.wall())).with("retry-after", dates::http(until))
            }
            Fault::NoChallenge => Reply::new(401, ""),
            Fault::StrangeChallenge => Reply::new(401, "").with("www-authenticate", "Negotiate"),
            Fault::ForeignRealm => bearer(&self.url(Door::Elsewhere)),
            Fault::Realm(base) => bearer(base),
            Fault::TokenRefused => self.challenge(&seen.path, Some("invalid_token")),
            Fault::RedirectLoop => redirect(format!("{here}{}", seen.path)),
            Fault::RedirectChain(hops) => {
                let done = seen.query.strip_prefix("hop=").and_then(|hop| hop.parse().ok()).unwrap_or(0);
                if done >= *hops {
                    return None;
                }
                redirect(format!("{here}{}?hop={}", seen.path, done + 1))
            }
            Fault::RedirectTo(location) => redirect(location.clone()),
            Fault::RedirectElsewhere | Fault::RedirectToPlain => {
                redirect(format!("{}/data/{digest}", self.url(Door::Elsewhere)))
            }
            Fault::RedirectToLoopback => {
                redirect(format!("http://127.0.0.1:{}/data/{digest}", self.address(Door::Elsewhere).port()))
            }
            Fault::RedirectToName(name) => {
                redirect(format!("http://{name}:{}/data/{digest}", self.address(Door::Elsewhere).port()))
            }
            Fault::RedirectNowhere => Reply::new(307, ""),
            _ => return None,
        })
    }

    fn registry(&self, seen: &Seen, fault: Option<&Fault>) -> Reply {
        let Some(rest) = seen.path.strip_prefix("/v2/") else { return Reply::new(404, "") };
        if rest.is_empty() {
            return Reply::new(200, "{}");
        }
        if let Some((repository, name)) = rest.split_once("/manifests/") {
            return match self.content.find_document(repository, name) {
                Some(document) => Reply::new(200, document.bytes.clone())
                    .with("docker-content-digest", super::content::digest(&document.bytes))
                    .with("content-type", document.media_type),
                None => Reply::new(404, "{\"errors\":[{\"code\":\"MANIFEST_UNKNOWN\"}]}"),
            };
        }
        let Some((repository, digest)) = rest.split_once("/blobs/") else { return Reply::new(404, "") };
        match self.content.find_blob(repository, digest) {
            None => Reply::new(404, "{\"errors\":[{\"code\":\"BLOB_UNKNOWN\"}]}"),
            Some(_) if self.storage => self.to_storage(digest, fault),
            Some(blob) => self.blob(seen, digest, &blob, fault),
        }
    }

    fn to_storage(&self, digest: &str, fault: Option<&Fault>) -> Reply {
        let path = format!("/data/{digest}");
        let expired = fault == Some(&Fault::ExpiredSignature);
        let life = if expired { Duration::ZERO } else { self.signature_life };
        let signature = self.keys.sign(&path, life);
        let date = dates::compact(self.wall());
        let query = format!("X-Amz-Date={date}&X-Amz-Expires={}&X-Amz-Signature={signature}", life.as_secs());
        Reply::new(307, "").with("location", format!("{}{path}?{query}", self.url(Door::Storage)))
    }

    fn stored(&self, seen: &Seen, fault: Option<&Fault>) -> Reply {
        let digest = seen.path.rsplit('/').next().unwrap_or_default();
        match self.content.any_blob(digest) {
            Some(blob) => self.blob(seen, digest, &blob, fault),
            None => Reply::new(404, ""),
        }
    }

    fn blob(&self, seen: &Seen, digest: &str, blob: &Bytes, fault: Option<&Fault>) -> Reply {
        let other = match fault {
            Some(Fault::OtherBlob) => self.content.other_blob(digest),
            _ => None,
        };
        Reply::to_range(other.as_ref().unwrap_or(blob), seen.range.as_deref(), fault)
    }

    async fn token(&self, seen: &Seen, fault: Option<&Fault>) -> Reply {
        let text = if seen.method == "POST" { &seen.body } else { &seen.query };
        let Ok(form) = Url::parse(&format!("http://x/?{text}")) else { return Reply::new(400, "") };
        let all = |key: &str| -> Vec<String> {
            form.query_pairs().filter(|(name, _)| name == key).map(|(_, value)| value.into_owned()).collect()
        };
        let one = |key: &str| all(key).into_iter().next().unwrap_or_default();
        let scopes = all("scope").join(" ");
        let _crowd = Crowd::enter(self, &scopes);
        if let Some(Fault::Late(by)) = fault {
            self.record.end();
            self.clock.sleep(*by).await;
            self.record.begin();
        }
        let by_header = self.keys.is_basic(seen.header("authorization").unwrap_or_default());
        let welcome = match (seen.method.as_str(), one("grant_type").as_str()) {
            ("POST", "refresh_token") => one("refresh_token") == self.keys.refresh,
            ("POST", "password") => one("password") == self.keys.password,
            _ => by_header || self.access == Access::Anonymous,
        };
        if !welcome || self.keys.is_locked() {
            return Reply::new(401, "{\"details\":\"incorrect username or password\"}");
        }
        self.token_for(&scopes, fault)
    }

    fn token_for(&self, scopes: &str, fault: Option<&Fault>) -> Reply {
        let (mut life, mut skew) = (self.token_life, 0);
        match fault {
            Some(Fault::NoToken) => return Reply::new(200, "<html>It works!</html>"),
            Some(Fault::ShortToken(seconds)) => life = Duration::from_secs(*seconds),
            Some(Fault::SkewedToken(seconds)) => skew = *seconds,
            _ => {}
        }
        let token = self.keys.issue(scopes, life);
        let mut text = serde_json::json!({ "token": token, "access_token": token });
        if fault != Some(&Fault::EndlessToken) {
            text["expires_in"] = life.as_secs().into();
            text["issued_at"] = dates::rfc3339(dates::skewed(self.wall(), skew)).into();
        }
        Reply::new(200, text.to_string()).with("content-type", "application/json")
    }

    /// Shuts the door if that is what is planned for the next request. `true` if it did.
    pub(super) fn next_is_shut_out(&self, seen: &Seen) -> bool {
        let counts = seen.door == Door::Tokens || seen.is_blob_read();
        counts && self.shut_out(seen.door)
    }

    /// The same before there was any request.
    pub(super) fn shut_out(&self, door: Door) -> bool {
        let (mood, outage) = match self.plan.at(door, self.plan.counted(door)) {
            Some(Fault::Refuse(outage)) => (Mood::Shut, outage),
            Some(Fault::Deaf(outage)) => (Mood::Deaf, outage),
            _ => return false,
        };
        let change = self.moods[door as usize].clone();
        if *change.borrow() != Mood::Open {
            return true;
        }
        self.plan.pass_over(door);
        change.send_replace(mood);
        let clock = self.clock.clone();
        tokio::spawn(async move {
            clock.sleep(outage).await;
            change.send_replace(Mood::Open);
        });
        true
    }
}

/// The scope that a path needs; everything else is for everybody with a token.
struct Scope(Option<String>);

fn scope_of(path: &str) -> Scope {
    let rest = path.strip_prefix("/v2/").unwrap_or_default();
    let repository = rest.split_once("/manifests/").or_else(|| rest.split_once("/blobs/")).map(|(name, _)| name);
    Scope(repository.map(|name| format!("repository:{name}:pull")))
}

impl Scope {
    fn lets_in(&self, said: &str, keys: &super::access::Keys) -> bool {
        match &self.0 {
            Some(scope) => keys.is_bearer(said, scope),
            None => keys.is_any_bearer(said),
        }
    }
}

/// One more who wants a token for these scopes.
struct Crowd<'a> {
    inner: &'a Inner,
    scopes: String,
}

impl<'a> Crowd<'a> {
    fn enter(inner: &'a Inner, scopes: &str) -> Self {
        inner.record.crowd_enters(scopes);
        Self { inner, scopes: scopes.to_owned() }
    }
}

impl Drop for Crowd<'_> {
    fn drop(&mut self) {
        self.inner.record.crowd_leaves(&self.scopes);
    }
}
