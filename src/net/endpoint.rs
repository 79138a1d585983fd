//! One server, reached in one way: authorized, bounded in time and in where it may send us.
//!
//! Redirects are followed here and not by the HTTP library, because what matters about them cannot be said
//! there: no login and no header of the operator goes to another host, nobody is sent from https to http or
//! into a network that the server is not in itself ([`super::address`]), and where one led is remembered for as
//! long as that holds ([`super::redirects`]).

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::address::{Bounds, OutOfBounds, same_origin};
use super::outlet::Outlet;
use super::proxy::ProxyOptions;
use super::redirects::Redirects;
use super::{ClientError, ClientOptions, Clock, HostLimits, HostPace, Passage, client};
use crate::base::{Class, Fault, Secret};

/// Says who we are to one registry.
pub trait Authorize: Send + Sync + fmt::Debug {
    /// What to send with a request about `repository`; `None` if nothing is known to be wanted. Given up at
    /// `until`.
    fn authorization<'a>(&'a self, repository: &'a str, until: Instant) -> AuthorizeFuture<'a>;

    /// The same after an answer with status 401 and `headers` to a request with `sent`; `None` if there is
    /// nothing better to say.
    fn challenged<'a>(
        &'a self,
        repository: &'a str,
        headers: &'a HeaderMap,
        sent: Option<&'a HeaderValue>,
        until: Instant,
    ) -> AuthorizeFuture<'a>;
}

/// An owned future, so that [`Authorize`] can be made into an object.
pub type AuthorizeFuture<'a> = Pin<Box<dyn Future<Output = Result<Option<HeaderValue>, SendError>> + Send + 'a>>;

/// How a server is reached.
#[derive(Clone, Debug, Default)]
pub struct EndpointOptions {
    /// Patience, trust, identity, proxy.
    pub client: ClientOptions,
    /// Sent with every request to the server itself.
    pub headers: Vec<(HeaderName, Secret)>,
    /// Who we are to it.
    pub authorize: Option<Arc<dyn Authorize>>,
    /// Hosts that it may redirect to wherever they are, besides those that any may.
    pub redirect_hosts: Vec<String>,
    /// What is done when the proxy of `client` is ill; `None` for sending everything through it regardless.
    pub proxy: Option<ProxyOptions>,
    /// What the host may be asked, shared with everybody else who asks it; `None` for as much as there is.
    pub pace: Option<Arc<HostPace>>,
}

/// One request. The method is `GET` or `HEAD`: nothing here changes a server.
#[derive(Debug)]
pub struct Ask<'a> {
    /// `GET` or `HEAD`.
    pub method: Method,
    /// What to ask for, on the server of this endpoint.
    pub url: Url,
    /// Ranges and accepted types; they go where redirects lead.
    pub headers: HeaderMap,
    /// Whom it is for.
    pub class: Class,
    /// The repository that this is about, for the token.
    pub repository: Option<&'a str>,
    /// When nobody wants the answer any more.
    pub until: Instant,
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SendError {
    /// The connection failed; worth another try.
    #[error("{0}")]
    Transport(String),
    /// Nothing came for so long.
    #[error("it was silent for {} s", .0.as_secs_f32())]
    Silent(Duration),
    /// Nobody waits any more.
    #[error("no answer in time")]
    Late,
    /// It wants to be left alone for so long, and was.
    #[error("it asked to be left alone for {} s more", .0.as_secs_f32().ceil())]
    Resting(Duration),
    /// The other side cannot prove who it is, or sends us where nobody should follow.
    #[error("{0}")]
    Untrusted(String),
    /// There is no saying who we are. Whether another try may help depends.
    #[error("{detail}")]
    Unauthorized {
        fault: Fault,
        detail: String,
        /// Another try sooner will not help.
        retry_after: Option<Duration>,
    },
}

impl SendError {
    /// What a caller may do about it.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Transport(_) | Self::Silent(_) | Self::Late | Self::Resting(_) => Fault::Transient,
            Self::Untrusted(_) => Fault::Permanent,
            Self::Unauthorized { fault, .. } => *fault,
        }
    }

    /// How long another try will not help, if that is known.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unauthorized { retry_after, .. } => *retry_after,
            Self::Resting(left) => Some(*left),
            _ => None,
        }
    }
}

/// One server.
pub struct Endpoint {
    base: Url,
    home: Outlet,
    foreign: Outlet,
    bounds: Bounds,
    options: EndpointOptions,
    /// What the operator wants said with every request to the server itself.
    headers: HeaderMap,
    redirects: Redirects,
    pace: Arc<HostPace>,
    clock: Clock,
}

/// How an attempt to follow redirects ended.
enum Led {
    /// At an answer.
    Here(Response),
    /// At an answer of another host, whose address is this.
    Elsewhere(Response, Url),
}

impl Endpoint {
    /// The server at `base`. Connects to nobody yet.
    ///
    /// # Errors
    /// No client can be built with these options.
    pub fn new(base: &Url, options: EndpointOptions, clock: Clock) -> Result<Self, ClientError> {
        let bounds = Bounds::of(base, &options.client, &options.redirect_hosts);
        let outlet = |build: &dyn Fn(&ClientOptions) -> Result<Client, ClientError>| {
            Outlet::new(&options.client, options.proxy.as_ref(), &clock, build)
        };
        let home = outlet(&|options| client::home(options, base, bounds.home_resolver()))?;
        let foreign = outlet(&|options| client::foreign(options, base, bounds.foreign_resolver()))?;
        let (headers, redirects) = (said(&options.headers)?, Redirects::default());
        let alone = || Arc::new(HostPace::new(HostLimits::default(), clock.clone()));
        let pace = options.pace.clone().unwrap_or_else(alone);
        Ok(Self { base: base.clone(), home, foreign, bounds, options, headers, redirects, pace, clock })
    }

    /// The base address, as it was given.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// The time it goes by.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Asks once, or twice where the first answer says that something remembered has ended: a token, or a
    /// signed address. Whatever the status is, an answer is no error.
    ///
    /// # Errors
    /// There is no answer.
    pub async fn send(&self, ask: Ask<'_>) -> Result<Reply, SendError> {
        let passage = self.pace.enter(ask.class, ask.until).await?;
        let response = self.answer(&ask).await?;
        passage.answered(response.status().as_u16(), response.headers());
        let idle = self.options.client.idle_timeout;
        Ok(Reply { response, clock: self.clock.clone(), idle, passage })
    }

    /// Until when the host wants to be left alone, if it does.
    pub fn rests(&self) -> Option<Instant> {
        self.pace.rests()
    }

    /// Whether requests to the host may have to wait for limits of its own.
    pub fn is_limited(&self) -> bool {
        self.pace.is_limited()
    }

    async fn answer(&self, ask: &Ask<'_>) -> Result<Response, SendError> {
        // What is signed for one method is of no use for another.
        let is_remembered = ask.method == Method::GET;
        if let Some(target) = self.redirects.find(&ask.url, self.clock.now()).filter(|_| is_remembered) {
            match self.once(&self.foreign, ask, &target, None).await {
                Ok(response) if !has_ended(response.status()) && !response.status().is_redirection() => {
                    return Ok(response);
                }
                Ok(_) | Err(SendError::Transport(_) | SendError::Silent(_) | SendError::Untrusted(_)) => {
                    self.redirects.forget(&ask.url, &target);
                }
                Err(other) => return Err(other),
            }
        }
        match self.follow(ask).await? {
            Led::Here(response) => Ok(response),
            Led::Elsewhere(response, _) if !has_ended(response.status()) => Ok(response),
            // A signed address that ended on the way, or whose clock is wrong: once more, from the start.
            Led::Elsewhere(first, target) => {
                self.redirects.forget(&ask.url, &target);
                drop(first);
                match self.follow(ask).await? {
                    Led::Here(response) | Led::Elsewhere(response, _) => Ok(response),
                }
            }
        }
    }

    /// Asks the server itself and goes where it sends us.
    async fn follow(&self, ask: &Ask<'_>) -> Result<Led, SendError> {
        let mut at = ask.url.clone();
        let mut authorization = self.authorization(ask).await?;
        let mut hops = 0;
        // Whoever said nothing has to learn first what is wanted, and may then find that it has ended.
        let mut challenges = if authorization.is_none() { 2 } else { 1 };
        loop {
            let is_home = same_origin(&at, &self.base);
            let outlet = if is_home { &self.home } else { &self.foreign };
            let response = self.once(outlet, ask, &at, authorization.as_ref().filter(|_| is_home)).await?;
            if is_home && response.status() == StatusCode::UNAUTHORIZED && challenges > 0 {
                challenges -= 1;
                if let Some(better) = self.challenged(ask, response.headers(), authorization.as_ref()).await? {
                    authorization = Some(better);
                    continue;
                }
            }
            let Some(next) = self.next(&at, &response)? else {
                return Ok(if is_home { Led::Here(response) } else { Led::Elsewhere(response, at) });
            };
            if hops == self.options.client.max_redirects {
                return Err(SendError::Untrusted(format!("it redirects more than {hops} times")));
            }
            hops += 1;
            if !same_origin(&next, &self.base) && ask.method == Method::GET {
                self.redirects.learn(ask.url.clone(), next.clone(), response.headers(), self.clock.now());
            }
            at = next;
        }
    }

    async fn authorization(&self, ask: &Ask<'_>) -> Result<Option<HeaderValue>, SendError> {
        match (&self.options.authorize, ask.repository) {
            (Some(authorize), Some(repository)) => authorize.authorization(repository, ask.until).await,
            _ => Ok(None),
        }
    }

    async fn challenged(
        &self,
        ask: &Ask<'_>,
        headers: &HeaderMap,
        sent: Option<&HeaderValue>,
    ) -> Result<Option<HeaderValue>, SendError> {
        match (&self.options.authorize, ask.repository) {
            (Some(authorize), Some(repository)) => authorize.challenged(repository, headers, sent, ask.until).await,
            _ => Ok(None),
        }
    }

    /// Where the answer to a request to `from` sends us, if it does.
    fn next(&self, from: &Url, response: &Response) -> Result<Option<Url>, SendError> {
        if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let untrusted = |detail: &str| Err(SendError::Untrusted(format!("it redirects {detail}")));
        let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let Some(mut next) = location.and_then(|location| from.join(location).ok()) else {
            return untrusted("to no address");
        };
        next.set_fragment(None);
        match (from.scheme(), next.scheme()) {
            (_, "https") | ("http", "http") => {}
            ("https", scheme) => return untrusted(&format!("from https to {scheme}")),
            (_, scheme) => return untrusted(&format!("to {scheme}")),
        }
        if !same_origin(&next, &self.base) && self.bounds.forbids(&next) {
            let host = next.host_str().unwrap_or_default();
            return untrusted(&format!("to {host}, which is in a network of this host that it is not in itself"));
        }
        Ok(Some(next))
    }

    /// One request to `url`, until the head of its answer.
    async fn once(
        &self,
        outlet: &Outlet,
        ask: &Ask<'_>,
        url: &Url,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, SendError> {
        let mut headers = ask.headers.clone();
        if same_origin(url, &self.base) {
            headers.extend(self.headers.clone());
            if let Some(authorization) = authorization {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
        }
        let idle = self.options.client.idle_timeout;
        let request = outlet.request(ask.method.clone(), url.clone()).headers(headers).build().map_err(transport)?;
        let sent = patient(&self.clock, idle, ask.until, outlet.execute(request)).await;
        if matches!(sent, Err(SendError::Silent(_))) {
            outlet.was_silent();
        }
        sent?.map_err(transport)
    }
}

/// The headers, none of which is ever shown.
fn said(headers: &[(HeaderName, Secret)]) -> Result<HeaderMap, ClientError> {
    let mut said = HeaderMap::new();
    for (name, value) in headers {
        let value = HeaderValue::from_str(value.expose());
        let mut value = value.map_err(|_| ClientError::BadHeader { name: name.to_string() })?;
        value.set_sensitive(true);
        said.append(name.clone(), value);
    }
    Ok(said)
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("place", &without_secrets(&self.base)).finish_non_exhaustive()
    }
}

/// Whether an answer of an object store says that the address is not, or no longer, allowed.
fn has_ended(status: StatusCode) -> bool {
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410)
}

/// The head of an answer, and its body as it comes.
pub struct Reply {
    response: Response,
    clock: Clock,
    idle: Duration,
    passage: Passage,
}

impl Reply {
    /// The status.
    pub fn status(&self) -> u16 {
        self.response.status().as_u16()
    }

    /// The headers.
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// The connection broke, or was silent for too long, or `until` came.
    pub async fn chunk(&mut self, until: Instant) -> Result<Option<Bytes>, SendError> {
        let piece = patient(&self.clock, self.idle, until, self.response.chunk()).await?.map_err(transport)?;
        if let Some(piece) = &piece {
            self.passage.pay(piece.len() as u64, until).await?;
        }
        Ok(piece)
    }

    /// The whole body, which may have `most` bytes; `None` if it has more.
    ///
    /// # Errors
    /// As [`Reply::chunk`].
    pub async fn body(mut self, most: usize, until: Instant) -> Result<Option<Vec<u8>>, SendError> {
        let mut body = Vec::new();
        while let Some(piece) = self.chunk(until).await? {
            if piece.len() > most - body.len() {
                return Ok(None);
            }
            body.extend_from_slice(&piece);
        }
        Ok(Some(body))
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// What `work` gives, unless it is silent for `idle` or `until` comes.
async fn patient<T>(
    clock: &Clock,
    idle: Duration,
    until: Instant,
    work: impl Future<Output = T>,
) -> Result<T, SendError> {
    let silent = clock.now().checked_add(idle).filter(|silent| *silent < until);
    let ended = clock.timeout_at(silent.unwrap_or(until), work).await;
    ended.map_err(|_| if silent.is_some() { SendError::Silent(idle) } else { SendError::Late })
}

/// Sorts what went wrong before or after an answer's head.
pub(super) fn transport(error: reqwest::Error) -> SendError {
    sorted(&error.without_url())
}

/// The same for an error that somebody has taken the address out of, which may be a secret.
pub(crate) fn sorted(error: &reqwest::Error) -> SendError {
    match distrust(error) {
        Some(detail) => SendError::Untrusted(detail),
        None => SendError::Transport(with_causes(error)),
    }
}

/// Why the other side must not be believed, if that is what the error says. Asking again would not change it.
fn distrust(error: &reqwest::Error) -> Option<String> {
    if let Some(out) = causes(error).find_map(|cause| cause.downcast_ref::<OutOfBounds>()) {
        return Some(format!("it redirects to a host that must not be asked: {out}"));
    }
    match causes(error).find_map(tls_error)? {
        rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer) => {
            Some("its certificate is not signed by an authority trusted here".to_owned())
        }
        bad @ rustls::Error::InvalidCertificate(_) => Some(bad.to_string()),
        _ => None,
    }
}

/// The error of the TLS library that `cause` is, or hides: an I/O error does not list what it
/// wraps among its sources, and here one I/O error wraps another.
fn tls_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    cause.downcast_ref().or_else(|| tls_error(cause.downcast_ref::<io::Error>()?.get_ref()?))
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The error and its causes on one line: the outermost text alone says only that sending failed.
fn with_causes(error: &reqwest::Error) -> String {
    causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The URL as it may be shown: no user, no password, no signature.
pub fn without_secrets(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path().trim_end_matches('/'))
}
