//! Blobs of an HTTP server: one ranged `GET`, and what its answer means.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use reqwest::header::{HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Url};

use super::answer::{self, Answer, ContentRange};
use super::body::Body;
use super::{BoxFuture, Failure, OpenError, ReadCtx, SourceError, Upstream};
use crate::base::{BlobId, ByteRange, Fault};
use crate::net::{Ask, Clock, Endpoint, EndpointOptions, Reply, SendError, without_secrets};

/// One HTTP server that has blobs.
///
/// A read is one ranged `GET`. Nothing but the exact range is accepted as an answer. The user info and the
/// query of the address go into every request, so that signed URLs work, and into no message. Needs a tokio
/// runtime.
pub struct HttpUpstream {
    endpoint: Arc<Endpoint>,
    locator: Locator,
    place: String,
}

/// Where on a server a blob is.
#[derive(Clone)]
enum Locator {
    /// At `BASE/ID`.
    Below(Url),
    /// At `BASE/blobs/sha256:ID`, where the base is `https://HOST/v2/REPOSITORY` (OCI distribution
    /// specification, "Pulling blobs").
    Repository { base: Url, repository: String },
}

impl HttpUpstream {
    /// The blobs below `base`. Connects to nobody yet.
    ///
    /// # Errors
    /// `base` is not an http or https URL, or no client can be built for it.
    pub fn new(base: &str, options: EndpointOptions, clock: Clock) -> Result<Self, OpenError> {
        let mut base = Url::parse(base).map_err(|error| OpenError::Url { detail: error.to_string() })?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(OpenError::Scheme { scheme: base.scheme().to_owned() });
        }
        base.set_fragment(None);
        let endpoint = Arc::new(Endpoint::new(&base, options, clock)?);
        Ok(Self { place: without_secrets(&base), endpoint, locator: Locator::Below(base) })
    }

    /// The blobs of `repository` in a registry. `base` is the address of its API for that repository, such as
    /// `https://HOST/v2/library/busybox`, on the server of `endpoint`.
    pub fn repository(endpoint: Arc<Endpoint>, base: Url, repository: &str) -> Self {
        let place = without_secrets(&base);
        Self { endpoint, locator: Locator::Repository { base, repository: repository.to_owned() }, place }
    }

    fn url(&self, blob: &BlobId) -> Url {
        let (mut url, in_repository) = match &self.locator {
            Locator::Below(base) => (base.clone(), false),
            Locator::Repository { base, .. } => (base.clone(), true),
        };
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty();
            if in_repository {
                path.push("blobs").push(&format!("sha256:{blob}"));
            } else {
                path.push(blob.as_str());
            }
        }
        url
    }

    async fn send(
        &self,
        blob: &BlobId,
        method: Method,
        range: Option<ByteRange>,
        ctx: ReadCtx,
    ) -> Result<Reply, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(range) = range {
            let range = format!("bytes={}-{}", range.start(), range.end().saturating_sub(1));
            headers.insert(RANGE, HeaderValue::from_str(&range).expect("digits"));
        }
        let repository = match &self.locator {
            Locator::Below(_) => None,
            Locator::Repository { repository, .. } => Some(repository.as_str()),
        };
        let ask = Ask { method, url: self.url(blob), headers, class: ctx.class, repository, until: ctx.deadline };
        self.endpoint.send(ask).await.map_err(|error| self.transport(blob, range.unwrap_or(FIRST_BYTE), error))
    }

    /// One attempt to hand on `stored`, which is not empty.
    async fn pour_once(
        &self,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let mut reply = self.ranged(blob, stored, ctx).await?;
        let mut body = Body::of(stored);
        while let Some(piece) = reply.chunk(ctx.deadline).await.map_err(|error| self.transport(blob, stored, error))? {
            body.piece(piece, take).map_err(|error| self.improper(error.to_string()))?;
        }
        body.end(take).map_err(|error| self.unavailable(blob, error.to_string()))
    }

    /// An answer that has `stored` as its body, as far as its head tells.
    async fn ranged(&self, blob: &BlobId, stored: ByteRange, ctx: ReadCtx) -> Result<Reply, Failure> {
        let reply = self.send(blob, Method::GET, Some(stored), ctx).await?;
        match Answer::to_range(reply.status(), reply.headers(), stored) {
            Answer::Range => Ok(reply),
            Answer::Ends(None) => {
                drop(reply);
                match self.measure(blob, ctx).await? {
                    len if len < stored.end() => Err(self.failure(blob, stored, Answer::Ends(Some(len)))),
                    _ => Err(self.improper("it found an existing range not satisfiable".into())),
                }
            }
            other => Err(self.failure(blob, stored, other)),
        }
    }

    /// One attempt to learn the length of a blob: by `HEAD`, or by its first byte where `HEAD` is
    /// not allowed, as with URLs signed for `GET`.
    async fn measure(&self, blob: &BlobId, ctx: ReadCtx) -> Result<u64, Failure> {
        let reply = self.send(blob, Method::HEAD, None, ctx).await?;
        let headers = reply.headers();
        match (reply.status(), answer::content_length(headers)) {
            (200, Some(len)) if !answer::is_encoded(headers) => Ok(len),
            (200 | 400 | 401 | 403 | 405 | 501, _) => {
                // Its place among the requests at once is wanted for the next one.
                drop(reply);
                self.measure_by_range(blob, ctx).await
            }
            (status, _) => Err(self.failure(blob, FIRST_BYTE, Answer::failed(status, headers))),
        }
    }

    async fn measure_by_range(&self, blob: &BlobId, ctx: ReadCtx) -> Result<u64, Failure> {
        let reply = self.send(blob, Method::GET, Some(FIRST_BYTE), ctx).await?;
        let headers = reply.headers();
        let len = match reply.status() {
            200 | 206 if answer::is_encoded(headers) => None,
            200 => answer::content_length(headers),
            206 => answer::content_range(headers).and_then(|ContentRange { total, .. }| total),
            416 => answer::unsatisfied_length(headers),
            status => return Err(self.failure(blob, FIRST_BYTE, Answer::failed(status, headers))),
        };
        len.ok_or_else(|| self.improper("it does not tell the length of the blob".into()))
    }

    fn failure(&self, blob: &BlobId, range: ByteRange, answer: Answer) -> Failure {
        answer.failure(blob, &self.place, range)
    }

    fn improper(&self, detail: String) -> Failure {
        SourceError::NoRanges { place: self.place.clone(), detail }.into()
    }

    fn unavailable(&self, blob: &BlobId, detail: String) -> Failure {
        SourceError::Unavailable { blob: blob.clone(), place: self.place.clone(), detail }.into()
    }

    fn transport(&self, blob: &BlobId, range: ByteRange, error: SendError) -> Failure {
        let (detail, place) = (error.to_string(), self.place.clone());
        match error {
            SendError::Untrusted(_) => SourceError::Untrusted { place, detail }.into(),
            SendError::Late => SourceError::Deadline { blob: blob.clone(), place, range }.into(),
            SendError::Unauthorized { .. } if error.fault() == Fault::Permanent => {
                SourceError::Unauthorized { place, detail }.into()
            }
            SendError::Unauthorized { .. } | SendError::Transport(_) | SendError::Silent(_) | SendError::Resting(_) => {
                Failure { retry_after: error.retry_after(), ..self.unavailable(blob, detail) }
            }
        }
    }
}

impl Upstream for HttpUpstream {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>> {
        Box::pin(self.measure(blob, ctx))
    }

    fn pour<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(self.pour_once(blob, stored, ctx, take))
    }

    fn rests(&self) -> Option<Instant> {
        self.endpoint.rests()
    }

    fn is_limited(&self) -> bool {
        self.endpoint.is_limited()
    }

    fn describe(&self) -> String {
        self.place.clone()
    }
}

impl std::fmt::Debug for HttpUpstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpUpstream").field("place", &self.place).finish_non_exhaustive()
    }
}

/// What is asked for when only the length is wanted.
pub(super) const FIRST_BYTE: ByteRange = ByteRange::new(0, 1).expect("ordered");

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(base: &str) -> HttpUpstream {
        HttpUpstream::new(base, EndpointOptions::default(), Clock::default()).unwrap()
    }

    #[test]
    fn blobs_lie_below_the_base_whatever_its_form() {
        let blob: BlobId = "abc".parse().unwrap();
        for (base, url) in [
            ("http://h", "http://h/abc"),
            ("http://h/", "http://h/abc"),
            ("http://h:81/x/y", "http://h:81/x/y/abc"),
            ("http://h/x/#part", "http://h/x/abc"),
            ("http://u:p@h/x?sig=1&b=2", "http://u:p@h/x/abc?sig=1&b=2"),
        ] {
            assert_eq!(upstream(base).url(&blob).as_str(), url, "{base}");
        }
    }

    #[test]
    fn blobs_of_a_repository_are_named_by_their_digest() {
        let base = Url::parse("https://mirror/x/v2/library/busybox?ns=docker.io").unwrap();
        let endpoint = Endpoint::new(&base, EndpointOptions::default(), Clock::default()).unwrap();
        let upstream = HttpUpstream::repository(Arc::new(endpoint), base, "library/busybox");

        let url = upstream.url(&"ab".parse().unwrap());
        assert_eq!(url.as_str(), "https://mirror/x/v2/library/busybox/blobs/sha256:ab?ns=docker.io");
        assert_eq!(upstream.describe(), "https://mirror/x/v2/library/busybox");
    }

    #[test]
    fn secrets_of_the_base_url_are_never_shown() {
        let upstream = upstream("http://user:hunter2@h:81/x/?sig=hunter2#hunter2");

        assert_eq!(upstream.describe(), "http://h:81/x");
        let shown = format!("{upstream:?} {:?}", upstream.endpoint);
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn only_http_is_spoken() {
        for base in ["ftp://h/", "h/x", "", "http://"] {
            let error = HttpUpstream::new(base, EndpointOptions::default(), Clock::default());
            assert!(matches!(error, Err(OpenError::Url { .. } | OpenError::Scheme { .. })), "{base}: {error:?}");
        }
    }
}
