use std::error::Error;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::RANGE;
use reqwest::{Client, Response, Url};
use tokio::time::timeout_at;

use super::answer::{self, Answer, ContentRange};
use super::{BlobSource, BoxFuture, OpenError, ReadCtx, SourceError};
use crate::base::{BlobId, ByteRange};
use crate::net::{self, Attempt, ClientOptions, RetryPolicy};

/// Memory taken for a body before its first byte has come. Larger bodies grow into theirs.
const FIRST_BUFFER: u64 = 4 << 20;

/// Blobs of an HTTP server, each at `BASE/ID`.
///
/// A read is one ranged `GET`, repeated as the policy says and given up at its deadline. Nothing
/// but the exact range is accepted as an answer. Needs a tokio runtime.
///
/// The user info and the query of the base URL go into every request, so that signed URLs work,
/// and into no message.
pub struct HttpSource {
    client: Client,
    base: Url,
    place: String,
    policy: RetryPolicy,
}

impl HttpSource {
    /// A source for the blobs below `base`. Connects to nobody yet.
    ///
    /// # Errors
    /// `base` is not an http or https URL, or no client can be built for it.
    pub fn new(base: &str, options: &ClientOptions, policy: RetryPolicy) -> Result<Self, OpenError> {
        let mut base = Url::parse(base).map_err(|error| OpenError::Url { detail: error.to_string() })?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(OpenError::Scheme { scheme: base.scheme().to_owned() });
        }
        base.set_fragment(None);
        let client = net::client(options, &base)?;
        let place = without_secrets(&base);
        Ok(Self { client, base, place, policy })
    }

    fn url(&self, blob: &BlobId) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push(blob.as_str());
        }
        url
    }

    /// Runs `once` until it succeeds, fails for good, or the deadline comes.
    async fn until_deadline<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        blob: &BlobId,
        range: ByteRange,
        ctx: ReadCtx,
        once: impl Fn() -> F,
    ) -> Result<T, SourceError> {
        let attempts = async {
            let mut patience = self.patience(blob, range, ctx);
            loop {
                match once().await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => patience.pause(failure).await?,
                }
            }
        };
        self.in_time(blob, range, ctx, attempts).await
    }

    /// The same for a body that is handed on as it arrives: each attempt goes on where the one before
    /// broke off, and one that brought something starts the count of failures anew.
    async fn pour(
        &self,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), SourceError> {
        let attempts = async {
            let mut rest = stored;
            while !rest.is_empty() {
                let mut patience = self.patience(blob, rest, ctx);
                let from = rest.start();
                while rest.start() == from
                    && let Err(failure) = self.pour_once(blob, &mut rest, take).await
                {
                    patience.pause(failure).await?;
                }
            }
            Ok(())
        };
        self.in_time(blob, stored, ctx, attempts).await
    }

    async fn in_time<T>(
        &self,
        blob: &BlobId,
        range: ByteRange,
        ctx: ReadCtx,
        attempts: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<T, SourceError> {
        timeout_at(ctx.deadline.into(), attempts)
            .await
            .unwrap_or_else(|_| Err(SourceError::Deadline { blob: blob.clone(), place: self.place.clone(), range }))
    }

    fn patience(&self, blob: &BlobId, range: ByteRange, ctx: ReadCtx) -> Patience {
        Patience { policy: self.policy, seed: seed(blob, range), failed: 0, deadline: ctx.deadline }
    }

    /// One attempt to fetch `stored`, which is not empty.
    async fn fetch(&self, blob: &BlobId, stored: ByteRange) -> Result<Bytes, Failure> {
        let response = self.ranged(blob, stored).await?;
        self.body(blob, response, stored).await
    }

    /// One attempt to hand on `rest`, which is not empty and becomes what has not been handed on.
    async fn pour_once(
        &self,
        blob: &BlobId,
        rest: &mut ByteRange,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let asked = rest.len();
        let mut response = self.ranged(blob, *rest).await?;
        while let Some(piece) = response.chunk().await.map_err(|error| self.transport(blob, error))? {
            let behind = rest.start().saturating_add(piece.len() as u64);
            *rest = ByteRange::new(behind, rest.end())
                .ok_or_else(|| self.improper(format!("it sent more than the {asked} bytes asked for")))?;
            take(piece);
        }
        if rest.is_empty() {
            return Ok(());
        }
        Err(self.unavailable(blob, format!("it sent {} of {asked} bytes", asked - rest.len())))
    }

    /// An answer that has `stored` as its body, as far as its head tells.
    async fn ranged(&self, blob: &BlobId, stored: ByteRange) -> Result<Response, Failure> {
        let response = self.get(blob, stored).await?;
        match Answer::to_range(response.status().as_u16(), response.headers(), stored) {
            Answer::Range => Ok(response),
            Answer::Ends(None) => {
                drop(response);
                match self.measure(blob).await? {
                    len if len < stored.end() => Err(self.failure(blob, stored, Answer::Ends(Some(len)))),
                    _ => Err(self.improper("it found an existing range not satisfiable".into())),
                }
            }
            other => Err(self.failure(blob, stored, other)),
        }
    }

    async fn get(&self, blob: &BlobId, stored: ByteRange) -> Result<Response, Failure> {
        let range = format!("bytes={}-{}", stored.start(), stored.end().saturating_sub(1));
        let request = self.client.get(self.url(blob)).header(RANGE, range);
        request.send().await.map_err(|error| self.transport(blob, error))
    }

    /// Collects a body that has to be as long as `stored`, and stops at the first byte too many.
    async fn body(&self, blob: &BlobId, mut response: Response, stored: ByteRange) -> Result<Bytes, Failure> {
        let want = usize::try_from(stored.len()).map_err(|_| self.unavailable(blob, "too large for memory".into()))?;
        let mut body = BytesMut::with_capacity(usize::try_from(stored.len().min(FIRST_BUFFER)).unwrap_or(want));
        while let Some(piece) = response.chunk().await.map_err(|error| self.transport(blob, error))? {
            if piece.len() > want - body.len() {
                return Err(self.improper(format!("it sent more than the {want} bytes asked for")));
            }
            body.extend_from_slice(&piece);
        }
        if body.len() < want {
            return Err(self.unavailable(blob, format!("it sent {} of {want} bytes", body.len())));
        }
        Ok(body.freeze())
    }

    /// One attempt to learn the length of a blob: by `HEAD`, or by its first byte where `HEAD` is
    /// not allowed, as with URLs signed for `GET`.
    async fn measure(&self, blob: &BlobId) -> Result<u64, Failure> {
        let request = self.client.head(self.url(blob));
        let response = request.send().await.map_err(|error| self.transport(blob, error))?;
        let headers = response.headers();
        match (response.status().as_u16(), answer::content_length(headers)) {
            (200, Some(len)) if !answer::is_encoded(headers) => Ok(len),
            (200 | 400 | 401 | 403 | 405 | 501, _) => self.measure_by_range(blob).await,
            (status, _) => Err(self.failure(blob, FIRST_BYTE, Answer::failed(status, headers))),
        }
    }

    async fn measure_by_range(&self, blob: &BlobId) -> Result<u64, Failure> {
        let response = self.get(blob, FIRST_BYTE).await?;
        let headers = response.headers();
        let len = match response.status().as_u16() {
            200 | 206 if answer::is_encoded(headers) => None,
            200 => answer::content_length(headers),
            206 => answer::content_range(headers).and_then(|ContentRange { total, .. }| total),
            416 => answer::unsatisfied_length(headers),
            status => return Err(self.failure(blob, FIRST_BYTE, Answer::failed(status, headers))),
        };
        len.ok_or_else(|| self.improper("it does not tell the length of the blob".into()))
    }

    fn failure(&self, blob: &BlobId, range: ByteRange, answer: Answer) -> Failure {
        let (blob, place) = (blob.clone(), self.place.clone());
        let error = match answer {
            Answer::NotFound => SourceError::NotFound { blob, place },
            Answer::Refused(status) => SourceError::Refused { blob, place, status },
            Answer::Ends(Some(len)) => SourceError::OutOfRange { blob, place, range, len },
            Answer::Improper(detail) => SourceError::NoRanges { place, detail },
            Answer::Busy { status, retry_after } => {
                let detail = format!("it answered with status {status}");
                return Failure { error: SourceError::Unavailable { blob, place, detail }, retry_after };
            }
            // Callers act on these two by themselves.
            Answer::Range | Answer::Ends(None) => {
                SourceError::NoRanges { place, detail: "it did not tell the length of the blob".into() }
            }
        };
        Failure { error, retry_after: None }
    }

    fn improper(&self, detail: String) -> Failure {
        SourceError::NoRanges { place: self.place.clone(), detail }.into()
    }

    fn unavailable(&self, blob: &BlobId, detail: String) -> Failure {
        SourceError::Unavailable { blob: blob.clone(), place: self.place.clone(), detail }.into()
    }

    /// Sorts what went wrong before or after an answer's head.
    fn transport(&self, blob: &BlobId, error: reqwest::Error) -> Failure {
        let error = error.without_url();
        match distrust(&error) {
            Some(detail) => SourceError::Untrusted { place: self.place.clone(), detail }.into(),
            None => self.unavailable(blob, with_causes(&error)),
        }
    }
}

impl BlobSource for HttpSource {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
        Box::pin(self.until_deadline(blob, FIRST_BYTE, ctx, move || self.measure(blob)))
    }

    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            if stored.is_empty() {
                // No range header can say this, and there is nothing to fetch.
                return Ok(Bytes::new());
            }
            self.until_deadline(blob, stored, ctx, move || self.fetch(blob, stored)).await
        })
    }

    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(self.pour(blob, stored, ctx, take))
    }

    fn describe(&self) -> String {
        self.place.clone()
    }
}

impl std::fmt::Debug for HttpSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpSource").field("place", &self.place).field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// What is asked for when only the length is wanted.
const FIRST_BYTE: ByteRange = ByteRange::new(0, 1).expect("ordered");

/// How often has been asked, and how often still may be.
struct Patience {
    policy: RetryPolicy,
    seed: u64,
    failed: u32,
    deadline: Instant,
}

impl Patience {
    /// Waits until it makes sense to ask again.
    ///
    /// # Errors
    /// The failure, if it does not.
    async fn pause(&mut self, failure: Failure) -> Result<(), SourceError> {
        self.failed += 1;
        let attempt = Attempt { failed: self.failed, seed: self.seed, retry_after: failure.retry_after };
        match self.policy.next(attempt, failure.error.fault(), Instant::now(), self.deadline) {
            Some(pause) => {
                tracing::debug!(error = %failure.error, failed = self.failed, ?pause, "asking again");
                tokio::time::sleep(pause).await;
                Ok(())
            }
            None => Err(failure.error),
        }
    }
}

/// A failed attempt.
struct Failure {
    error: SourceError,
    /// Pause the server asked for before another one.
    retry_after: Option<Duration>,
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self { error, retry_after: None }
    }
}

/// The URL as it may be shown: no user, no password, no signature.
fn without_secrets(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path().trim_end_matches('/'))
}

/// Keeps requests that fail together from being repeated together.
fn seed(blob: &BlobId, range: ByteRange) -> u64 {
    let mut hasher = DefaultHasher::new();
    (blob, range).hash(&mut hasher);
    hasher.finish()
}

/// Why the other side must not be believed, if that is what the error says: its certificate is no
/// good, or it redirects where nobody should follow. Asking again would not change either.
fn distrust(error: &reqwest::Error) -> Option<String> {
    if error.is_redirect() {
        return Some(with_causes(error));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn source(base: &str) -> HttpSource {
        HttpSource::new(base, &ClientOptions::default(), RetryPolicy::default()).unwrap()
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
            assert_eq!(source(base).url(&blob).as_str(), url, "{base}");
        }
    }

    #[test]
    fn secrets_of_the_base_url_are_never_shown() {
        let source = source("http://user:hunter2@h:81/x/?sig=hunter2#hunter2");

        assert_eq!(source.describe(), "http://h:81/x");
        assert!(!format!("{source:?}").contains("hunter2"), "{source:?}");
    }

    #[test]
    fn only_http_is_spoken() {
        for base in ["ftp://h/", "h/x", "", "http://"] {
            let error = HttpSource::new(base, &ClientOptions::default(), RetryPolicy::default());
            assert!(matches!(error, Err(OpenError::Url { .. } | OpenError::Scheme { .. })), "{base}: {error:?}");
        }
    }
}
