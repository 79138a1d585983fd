//! Where stored bytes come from.
//!
//! A [`BlobSource`] answers ranged reads of whole blobs by id and knows nothing of what they mean.
//! Retries, time-outs and connection reuse live below, in `net`, once for every remote kind.

mod absent;
mod aligned;
mod answer;
mod body;
mod counted;
mod hedges;
mod http;
mod local;
mod localdisk;
mod network;
mod object;
mod patience;
mod relay;
mod tiers;
mod trail;
mod upstream;
mod whole;

pub use absent::AbsentSource;
pub use http::HttpUpstream;
pub use local::LocalSource;
pub use localdisk::{BadDisk, BadTable, LocalDisk};
pub use network::{Grounds, Network, NetworkOptions, Registry, Server};
pub use object::{BadPlace, ObjectUpstream};
pub use tiers::{Tier, Tiers};
pub use upstream::{Failure, Upstream};
pub use whole::WholeSource;

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use reqwest::Url;

use crate::base::{BlobId, ByteRange, Class, Fault, RequestId};
use crate::net::hosts::HostsError;
use crate::net::{ClientError, ClientOptions, Clock, EndpointOptions, RetryPolicy};
use crate::telemetry::Telemetry;

/// An owned future, so that the trait below can be made into an object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Who asks, how urgently, and until when an answer is of use.
#[derive(Clone, Copy, Debug)]
pub struct ReadCtx {
    /// Readers before prefetch.
    pub class: Class,
    /// Give up at this moment, retries included.
    pub deadline: Instant,
    /// For log lines: the request of the kernel that this read is for.
    pub request: RequestId,
}

impl ReadCtx {
    /// A read that no request of the kernel asked for.
    pub fn new(class: Class, deadline: Instant) -> Self {
        Self { class, deadline, request: RequestId::NONE }
    }
}

/// Answers ranged reads of blobs.
pub trait BlobSource: Send + Sync + 'static {
    /// Length of the stored blob in bytes.
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>>;

    /// Exactly `stored.len()` bytes, or an error. A short answer is an error.
    fn read<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>>;

    /// Hands the bytes of `stored` to `take`, in order and as they arrive; exactly `stored.len()` of
    /// them, or an error. What was taken before an error is sound, and whoever asks again goes on
    /// behind it. Dropping the future ends the transfer.
    ///
    /// Without more knowledge of the source, everything arrives at once.
    fn stream<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), SourceError>> {
        Box::pin(async move { self.read(blob, stored, ctx).await.map(take) })
    }

    /// What became of the bytes of `stored` that it gave last. Whoever brought wrong ones is not asked for them again
    /// where another place can be, and asked last for everything when that one was right.
    fn judged(&self, _blob: &BlobId, _stored: ByteRange, _verdict: Verdict) {}

    /// From how many places it may have a blob.
    fn places(&self) -> usize {
        1
    }

    /// What to call this source in messages: a directory or an URL, without secrets.
    fn describe(&self) -> String;
}

/// Whether bytes were what their digest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They were, after they had been wrong.
    Right,
    /// They were not.
    Wrong,
}

/// Where on this host the blobs of a spec lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnThisHost {
    /// As files by their ids.
    Directory(PathBuf),
    /// All of them in it.
    File(PathBuf),
}

/// Where on this host a spec as of [`open`] leads; `None` if it leads elsewhere, or nowhere.
pub fn on_this_host(spec: &str) -> Option<OnThisHost> {
    let Some((scheme, _)) = spec.split_once("://") else { return Some(OnThisHost::Directory(spec.into())) };
    let url = Url::parse(spec).ok()?;
    let path = Url::parse(&format!("file://{}", url.path())).ok()?.to_file_path().ok()?;
    match scheme.to_ascii_lowercase().as_str() {
        "file" => Some(OnThisHost::Directory(path)),
        "localdisk" => Some(OnThisHost::File(path)),
        _ => None,
    }
}

/// Why a source could not answer. Cheap to clone: one failed read may answer many readers.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// The source has no such blob.
    #[error("blob {blob} is not at {place}")]
    NotFound { blob: BlobId, place: String },
    /// The source knows the blob and refuses to hand it out.
    #[error("{place} refused blob {blob} (status {status}){}", remedy(*.status))]
    Refused { blob: BlobId, place: String, status: u16 },
    /// The blob ends before the range does.
    #[error("blob {blob} at {place} has {len} bytes, too few for {range}")]
    OutOfRange { blob: BlobId, place: String, range: ByteRange, len: u64 },
    /// The server answered a ranged request with something else.
    #[error("{place} does not answer ranged requests properly: {detail}")]
    NoRanges { place: String, detail: String },
    /// The other side cannot prove who it is, or sends us where nobody should follow.
    #[error("{place} cannot be trusted: {detail}")]
    Untrusted { place: String, detail: String },
    /// The server wants to know who we are, and there is no saying that.
    #[error("{place} is not to be read without a login: {detail}")]
    Unauthorized { place: String, detail: String },
    /// The other side failed or went away; worth another try.
    #[error("{place} failed to serve blob {blob}: {detail}")]
    Unavailable { blob: BlobId, place: String, detail: String },
    /// No answer within the time the reader may wait.
    #[error("{place} did not deliver {range} of blob {blob} in time")]
    Deadline { blob: BlobId, place: String, range: ByteRange },
    /// The local disk or network stack failed.
    #[error("cannot read blob {blob} at {place}")]
    Io {
        blob: BlobId,
        place: String,
        #[source]
        cause: Arc<std::io::Error>,
    },
}

/// What to do about a status by which a server refuses.
fn remedy(status: u16) -> &'static str {
    match status {
        401 => "; it wants a login, and docs/CREDENTIALS.md tells where that is looked for",
        403 => "; the login that it was given, if any, may not read that",
        _ => "",
    }
}

impl SourceError {
    /// What a caller may do about it.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Unavailable { .. } | Self::Deadline { .. } => Fault::Transient,
            Self::NotFound { .. }
            | Self::Refused { .. }
            | Self::OutOfRange { .. }
            | Self::NoRanges { .. }
            | Self::Untrusted { .. }
            | Self::Unauthorized { .. }
            | Self::Io { .. } => Fault::Permanent,
        }
    }
}

/// Opens the source that `spec` names, for a tool that asks nothing else; see [`Network::open`].
///
/// `options` and `policy` apply to remote sources only.
pub fn open(spec: &str, options: &ClientOptions, policy: RetryPolicy) -> Result<Arc<dyn BlobSource>, OpenError> {
    let options = NetworkOptions { client: options.clone(), policy, ..NetworkOptions::default() };
    Network::new(options, Telemetry::default()).open(&[spec.to_owned()], None)
}

/// The blobs of one HTTP server, each at `BASE/ID`, asked again as `policy` says. Connects to nobody yet.
///
/// # Errors
/// `base` is not an http or https URL, or no client can be built for it.
pub fn http(base: &str, options: &ClientOptions, policy: RetryPolicy) -> Result<Tiers, OpenError> {
    let options = EndpointOptions { client: options.clone(), ..EndpointOptions::default() };
    let upstream = HttpUpstream::new(base, options, Clock::default())?;
    Ok(Tiers::new(vec![Tier::new(upstream)], policy, Clock::default()))
}

/// Why there is no source to ask.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OpenError {
    /// A local source is not a directory that can be looked into.
    #[error("cannot use {} as a directory of blobs", dir.display())]
    Directory {
        dir: PathBuf,
        #[source]
        cause: Arc<std::io::Error>,
    },
    /// The address of a remote source is malformed. It is not repeated here: it may hold a secret.
    #[error("the address of the blobs is not a valid URL: {detail}")]
    Url { detail: String },
    /// Nobody here speaks this protocol.
    #[error("blobs cannot be fetched over {scheme:?}; give a directory or an http or https URL")]
    Scheme { scheme: String },
    /// The spec of a bucket is malformed, or its credentials cannot be used.
    #[error(transparent)]
    Bucket(#[from] BadPlace),
    /// A disk of blobs cannot be used.
    #[error(transparent)]
    Disk(#[from] BadDisk),
    /// The settings of a registry's hosts are wrong.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// No place was named.
    #[error("there is no place to fetch blobs from; name a directory or an address")]
    Nowhere,
    /// No client could be built for the remote source.
    #[error(transparent)]
    Client(#[from] ClientError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(spec: &str) -> Result<String, OpenError> {
        open(spec, &ClientOptions::default(), RetryPolicy::default()).map(|source| source.describe())
    }

    #[test]
    fn sources_are_opened_by_the_form_of_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();

        assert_eq!(describe(path).unwrap(), path);
        assert_eq!(describe(&format!("file://{path}")).unwrap(), path);
        assert_eq!(describe("HTTP://h/x/").unwrap(), "http://h/x");
    }

    #[test]
    fn specs_of_this_host_are_known_by_their_place() {
        let dir = |path: &str| Some(OnThisHost::Directory(path.into()));
        assert_eq!(on_this_host("some/dir"), dir("some/dir"));
        assert_eq!(on_this_host("FILE:///a%20b/c"), dir("/a b/c"));
        let disk = Some(OnThisHost::File("/img/disk".into()));
        assert_eq!(on_this_host("localdisk:///img/disk?gpt=false&blob=x"), disk);
        for elsewhere in ["https://h/x", "docker://h/r", "s3://b/x", "file://h:x:y"] {
            assert_eq!(on_this_host(elsewhere), None, "{elsewhere}");
        }
    }

    #[test]
    fn names_that_lead_nowhere_say_why() {
        for (spec, text) in [
            ("/nonexistent", "cannot use /nonexistent as a directory of blobs"),
            ("file://elsewhere/x", "the address of the blobs is not a valid URL: not a path on this host"),
            ("ftp://h/", "blobs cannot be fetched over \"ftp\"; give a directory or an http or https URL"),
        ] {
            assert_eq!(describe(spec).unwrap_err().to_string(), text);
        }
    }
}
