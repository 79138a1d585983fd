//! Why a reference leads to no image that can be mounted.

use std::sync::Arc;

use super::fetch::FetchError;
use super::reference::Reference;
use crate::base::Digest;

/// What is wrong with a document of a registry.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DocumentError {
    #[error("it is not UTF-8")]
    NotText,
    #[error("it is longer than 4 MiB")]
    TooLong,
    #[error("it is no document of an image")]
    Json(#[source] Arc<serde_json::Error>),
    #[error("it is of the kind {kind:?}, which is no image")]
    Kind { kind: String },
    #[error("it could be both an index and a manifest")]
    Ambiguous,
    #[error("it names the digest {text:?}: {why}")]
    Digest { text: String, why: &'static str },
}

impl From<serde_json::Error> for DocumentError {
    fn from(error: serde_json::Error) -> Self {
        Self::Json(Arc::new(error))
    }
}

/// Why a reference leads to no image that can be mounted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OciError {
    /// The registry cannot be asked.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The registry has no such thing, or does not tell who asks.
    #[error("{what} is not in {repository}, or {registry} does not show it to us")]
    NotFound { registry: String, repository: String, what: String },
    /// The registry does not let us in.
    #[error(
        "{registry} refuses {what} of {repository} (status {status}): check the credentials for it, and whether they may read it"
    )]
    Refused { registry: String, repository: String, what: String, status: u16 },
    /// The registry fails.
    #[error("{registry} failed to give {what} of {repository} (status {status})")]
    Failed { registry: String, repository: String, what: String, status: u16 },
    /// The registry gives something else than it was asked for.
    #[error(
        "{registry} gave something else as {what} of {repository}: it has the digest sha256:{got}, not sha256:{want}"
    )]
    Forged { registry: String, repository: String, what: String, want: Box<Digest>, got: Box<Digest> },
    /// The same, by length.
    #[error("{registry} gave something else as {what} of {repository}: it has not {size} bytes")]
    Length { registry: String, repository: String, what: String, size: u64 },
    /// A document makes no sense.
    #[error("{what} of {repository} cannot be used")]
    Document {
        repository: String,
        what: String,
        #[source]
        cause: DocumentError,
    },
    /// An index of indexes of indexes.
    #[error("{reference} leads through more than two indexes")]
    TooDeep { reference: Reference },
    /// An index that leads to no manifest.
    #[error("{reference} leads to no manifest")]
    NoManifest { reference: Reference },
    /// An index without the platform.
    #[error("{reference} has nothing for {platform}; it has {offered}")]
    NoPlatform { reference: Reference, platform: String, offered: String },
    /// An image of another kind.
    #[error("{reference} is {what}, not a RAFS image; {remedy}")]
    NotRafs { reference: Reference, what: String, remedy: &'static str },
    /// A RAFS image of a kind that is not served.
    #[error("{reference} cannot be mounted: {why}")]
    Unsupported { reference: Reference, why: String },
    /// Nothing is known of a reference that may not be asked about.
    #[error(
        "nothing is kept of {reference}, and without the registry nothing can be learned; mount it once without --offline"
    )]
    Unknown { reference: Reference },
    /// The layer that should hold the bootstrap does not.
    #[error("the bootstrap layer of {reference} cannot be used")]
    Bootstrap {
        reference: Reference,
        #[source]
        cause: Arc<super::bootstrap::LayerError>,
    },
    /// The bootstrap wants a blob that the manifest does not name.
    #[error(
        "the bootstrap of {reference} wants blob {blob}, which its manifest does not name; give --blobs if the blobs are kept elsewhere"
    )]
    Stranger { reference: Reference, blob: String },
}

impl OciError {
    /// Whether this is about one document of several, and says nothing about the others.
    pub(super) fn is_of_one_document(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::Document { .. } | Self::NoPlatform { .. })
    }
}
