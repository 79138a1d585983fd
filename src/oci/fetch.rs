//! What this layer wants of the network.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use crate::base::Fault;

/// An owned future, so that the trait below can be made into an object.
pub type FetchFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One question to a registry.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// The repository that the question is about; who asks needs leave to read it.
    pub repository: &'a str,
    /// Path and query below the registry's root, beginning with `/v2/`.
    pub path: &'a str,
    /// Media types that are understood, for the header `Accept`; everything if it is empty.
    pub accept: &'a str,
    /// Only what would be answered, without the body.
    pub head: bool,
}

/// The head of an answer, of whatever status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Media type, without parameters.
    pub content_type: Option<String>,
    /// The digest that the server says the document has (`Docker-Content-Digest`).
    pub digest: Option<String>,
    /// Where the next page of a list is, as the server says it (`Link` with `rel="next"`).
    pub next: Option<String>,
}

/// What takes a body, piece by piece. An error ends the transfer.
pub type Taken<'a> = dyn FnMut(&[u8]) -> io::Result<()> + Send + 'a;

/// Asks one registry, or who stands in for it.
pub trait Fetch: Send + Sync {
    /// Asks, and hands the body to `take` as it arrives if the status is a success. Everything is undecoded and
    /// unchecked.
    ///
    /// Whoever implements this tries again what is worth it, as long as nothing of a body was taken.
    fn ask<'a>(&'a self, ask: Ask<'a>, take: &'a mut Taken<'_>) -> FetchFuture<'a, Result<Answer, FetchError>>;

    /// What to call the registry in messages: its name, without secrets.
    fn describe(&self) -> String;
}

/// Why there was no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// The registry cannot be reached, does not answer in time, or breaks off.
    #[error("{registry} does not answer: {detail}")]
    Unavailable { registry: String, detail: String },
    /// It wants to know who we are, and there is no saying that now.
    #[error("there is no login for {registry}: {detail}")]
    NoLogin { registry: String, detail: String, fault: Fault },
    /// What was asked for cannot be asked of it: its certificate or a redirect is bad, or the credentials cannot be had.
    #[error("{registry} cannot be used: {detail}")]
    Unusable { registry: String, detail: String },
    /// Whoever takes the body could not.
    #[error("cannot take what {registry} sends")]
    Taking {
        registry: String,
        #[source]
        cause: Arc<io::Error>,
    },
}

impl FetchError {
    /// What a caller may do about it.
    pub fn fault(&self) -> Fault {
        match self {
            Self::Unavailable { .. } => Fault::Transient,
            Self::NoLogin { fault, .. } => *fault,
            Self::Unusable { .. } | Self::Taking { .. } => Fault::Permanent,
        }
    }
}
