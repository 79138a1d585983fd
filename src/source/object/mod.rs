//! Buckets of S3 and its kin, of Google and of Azure.
//!
//! Signing is the business of the crate `object_store`; connections, patience and trust are those of
//! every other client here, because the crate asks through [`Transport`]. That is also where the head of
//! each answer is noted, so that a bucket is judged as strictly as any server: by [`Answer`]. The crate
//! repeats nothing.
//!
//! A blob is the object `PREFIX` + blob id. The prefix is plain text in front of the name, as Nydus has it, and
//! not a directory.

mod address;
mod place;
mod transport;

use std::error::Error;
use std::fs;
use std::future::Future;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore};
use reqwest::Url;

pub use self::place::BadPlace;
use self::place::Place;
use self::transport::{Head, Seen};
use super::answer::{self, Answer};
use super::body::Body;
use super::{BoxFuture, Failure, OpenError, ReadCtx, SourceError, Upstream};
use crate::base::{BlobId, ByteRange, TimeSpan};
use crate::net::{ClientOptions, Clock, HostLimits, HostPace, Passage, SendError};

/// One bucket, or the part of it whose names begin with a prefix. Needs a tokio runtime.
pub struct ObjectUpstream {
    place: Place,
    address: Url,
    options: ClientOptions,
    shown: String,
    opened: Mutex<Opened>,
    pace: Arc<HostPace>,
    clock: Clock,
}

/// A client that signs with what the file of credentials said at that time.
#[derive(Clone)]
struct Opened {
    store: Arc<dyn ObjectStore>,
    file: Option<FileState>,
}

/// By which a file that was replaced is known.
type FileState = (u64, i64, i64, u64);

impl ObjectUpstream {
    /// The bucket that `spec` names, such as `s3://BUCKET/PREFIX?region=eu-central-1`; docs/SOURCES.md has all of
    /// them. Connects to nobody yet.
    ///
    /// # Errors
    /// The spec is malformed, its credentials cannot be read, or no client can be built.
    pub fn new(spec: &str, options: &ClientOptions, clock: Clock) -> Result<Self, OpenError> {
        let place = Place::parse(spec)?;
        let opened = Mutex::new(open(&place, options)?);
        let (address, shown, options) = (place.address()?, place.to_string(), options.clone());
        let pace = Arc::new(HostPace::new(HostLimits::default(), clock.clone()));
        Ok(Self { place, address, options, shown, opened, pace, clock })
    }

    /// Where the cloud is asked, without the bucket, whose name may be a part of the host's.
    pub fn address(&self) -> &Url {
        &self.address
    }

    /// The same bucket, asked no more than its host may be.
    #[must_use]
    pub fn at_pace(self, pace: Arc<HostPace>) -> Self {
        Self { pace, ..self }
    }

    /// What `work` gives, unless the bucket is silent for too long.
    async fn patiently<T>(&self, blob: &BlobId, work: impl Future<Output = T>) -> Result<T, Failure> {
        let idle = self.options.idle_timeout;
        // A patience that is too long to be a moment is for ever.
        let Some(until) = self.clock.now().checked_add(idle) else { return Ok(work.await) };
        let silent = |_| self.unavailable(blob, format!("it was silent for {}", TimeSpan(idle)));
        self.clock.timeout_at(until, work).await.map_err(silent)
    }

    fn key(&self, blob: &BlobId) -> Result<Path, Failure> {
        let refused = |error: object_store::path::Error| {
            self.improper(format!("{:?} cannot be the name of an object: {error}", self.place.prefix))
        };
        Path::parse(format!("{}{blob}", self.place.prefix)).map_err(refused)
    }

    /// Waits for the turn of one request about `range`.
    async fn turn(&self, blob: &BlobId, range: ByteRange, ctx: ReadCtx) -> Result<Passage, Failure> {
        let entered = self.pace.enter(ctx.class, ctx.deadline).await;
        entered.map_err(|error| self.kept_waiting(blob, range, &error))
    }

    /// What is told of a request that had to wait too long for the limits of its host, or for its sleep.
    fn kept_waiting(&self, blob: &BlobId, range: ByteRange, error: &SendError) -> Failure {
        match error.retry_after() {
            Some(left) => Failure { retry_after: Some(left), ..self.unavailable(blob, error.to_string()) },
            None => SourceError::Deadline { blob: blob.clone(), place: self.shown.clone(), range }.into(),
        }
    }

    /// Asks once; and once more if the credentials were refused and others are in their file by now.
    async fn ask(
        &self,
        blob: &BlobId,
        range: ByteRange,
        options: &GetOptions,
        ctx: ReadCtx,
    ) -> Result<(Passage, Head, object_store::GetResult), Failure> {
        let key = self.key(blob)?;
        let passage = self.turn(blob, range, ctx).await?;
        for again in [true, false] {
            let opened = self.opened.lock().unwrap().clone();
            let (seen, mut options) = (Seen::default(), options.clone());
            options.extensions.insert(seen.clone());
            let asked = self.patiently(blob, opened.store.get_opts(&key, options)).await?;
            let head = seen.take();
            head.iter().for_each(|head| passage.answered(head.status, &head.headers));
            if again && head.as_ref().is_some_and(|head| matches!(head.status, 401 | 403)) && self.reopen(&opened) {
                continue;
            }
            return match (asked, head) {
                (Ok(result), Some(head)) => Ok((passage, head, result)),
                (Err(error), head) => Err(self.failure(blob, range, &error, head)),
                (Ok(_), None) => Err(self.improper("it answered without being asked".into())),
            };
        }
        Err(self.unavailable(blob, "its credentials change all the time".into()))
    }

    /// Takes the credentials anew if their file is another one than that of `tried`.
    fn reopen(&self, tried: &Opened) -> bool {
        let mut opened = self.opened.lock().unwrap();
        if opened.file != tried.file {
            return true;
        }
        if self.place.credentials.as_deref().and_then(state_of) == tried.file {
            return false;
        }
        match open(&self.place, &self.options) {
            Ok(new) => {
                *opened = new;
                true
            }
            // Half written, perhaps: the next refusal looks again.
            Err(error) => {
                tracing::warn!(place = self.shown, %error, "the new credentials cannot be used");
                false
            }
        }
    }

    async fn pour_once(
        &self,
        blob: &BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Failure> {
        let options =
            GetOptions { range: Some(GetRange::Bounded(stored.start()..stored.end())), ..GetOptions::default() };
        let (passage, head, result) = self.ask(blob, stored, &options, ctx).await?;
        match Answer::to_range(head.status, &head.headers, stored) {
            Answer::Range => {}
            other => return Err(self.judged(blob, stored, other)),
        }
        let (mut pieces, mut body) = (result.into_stream(), Body::of(stored));
        while let Some(piece) = self.patiently(blob, std::future::poll_fn(|cx| pieces.as_mut().poll_next(cx))).await? {
            let piece = piece.map_err(|error| self.failure(blob, stored, &error, None))?;
            let paid = passage.pay(piece.len() as u64, ctx.deadline).await;
            paid.map_err(|error| self.kept_waiting(blob, stored, &error))?;
            body.piece(piece, take).map_err(|error| self.improper(error.to_string()))?;
        }
        body.end(take).map_err(|error| self.unavailable(blob, error.to_string()))
    }

    async fn measure(&self, blob: &BlobId, ctx: ReadCtx) -> Result<u64, Failure> {
        let options = GetOptions { head: true, ..GetOptions::default() };
        let (_, head, _) = self.ask(blob, ByteRange::default(), &options, ctx).await?;
        match answer::content_length(&head.headers) {
            Some(len) if !answer::is_encoded(&head.headers) => Ok(len),
            _ => Err(self.improper("it does not tell the length of the blob".into())),
        }
    }

    /// Sorts what went wrong. Nothing of what the crate says is repeated: a server's own words may hold what a
    /// signature is made of.
    fn failure(&self, blob: &BlobId, range: ByteRange, error: &object_store::Error, head: Option<Head>) -> Failure {
        if let Some(head) = head {
            return match head.status {
                200..=299 => self.judged(blob, range, Answer::to_range(head.status, &head.headers, range)),
                // A signature is for one address, so that this is of no use, and it could lead anywhere.
                status @ 300..=399 => {
                    let detail = format!("it sends us somewhere else (status {status})");
                    SourceError::Untrusted { place: self.shown.clone(), detail }.into()
                }
                416 => self.judged(blob, range, Answer::Ends(answer::unsatisfied_length(&head.headers))),
                status => self.judged(blob, range, Answer::failed(status, &head.headers)),
            };
        }
        let mut causes = std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
        match causes.find_map(transport::network_error) {
            Some(SendError::Untrusted(detail)) => SourceError::Untrusted { place: self.shown.clone(), detail }.into(),
            Some(other) => self.unavailable(blob, other.to_string()),
            None => self.unavailable(blob, "the request could not be signed or sent; look at its credentials".into()),
        }
    }

    fn judged(&self, blob: &BlobId, range: ByteRange, answer: Answer) -> Failure {
        answer.failure(blob, &self.shown, range)
    }

    fn improper(&self, detail: String) -> Failure {
        SourceError::NoRanges { place: self.shown.clone(), detail }.into()
    }

    fn unavailable(&self, blob: &BlobId, detail: String) -> Failure {
        SourceError::Unavailable { blob: blob.clone(), place: self.shown.clone(), detail }.into()
    }
}

fn open(place: &Place, options: &ClientOptions) -> Result<Opened, OpenError> {
    // First, so that a file which changes meanwhile is taken again.
    let file = place.credentials.as_deref().and_then(state_of);
    Ok(Opened { store: place.open(options)?, file })
}

fn state_of(path: &std::path::Path) -> Option<FileState> {
    let facts = fs::metadata(path).ok()?;
    Some((facts.ino(), facts.mtime(), facts.mtime_nsec(), facts.len()))
}

impl Upstream for ObjectUpstream {
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
        self.pace.rests()
    }

    fn is_limited(&self) -> bool {
        self.pace.is_limited()
    }

    fn describe(&self) -> String {
        self.shown.clone()
    }
}

impl std::fmt::Debug for ObjectUpstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ObjectUpstream").field("place", &self.shown).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
