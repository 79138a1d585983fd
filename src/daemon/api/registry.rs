//! Images in registries, as JSON: where references lead, and what is brought here whole.

use serde::{Deserialize, Serialize};

use super::{BackendChoice, ImageSpec};
use crate::cache::PrefetchStats;
use crate::export::BackendKind;

/// `POST /v1/resolve`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// An image in a registry.
    pub image: ImageSpec,
    /// By which backend it would be mounted.
    #[serde(default)]
    pub backend: BackendChoice,
}

/// Where a reference leads, and how it would be mounted here.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ResolveReport {
    /// Whole, with registry and tag or digest.
    pub reference: String,
    /// From what the reference names to the manifest.
    pub documents: Vec<DocumentReport>,
    /// SHA-256 of the manifest.
    pub manifest: String,
    pub layers: Vec<LayerReport>,
    /// What it is, in words.
    pub kind: String,
    /// `native`: the data is in layers of its own. `external`: the registry has the bootstrap only. `zran`: the
    /// data is in layers of the ordinary image. `null` for an image that is no RAFS image.
    pub layout: Option<String>,
    /// As an annotation says it.
    pub rafs_version: Option<String>,
    /// Why it cannot be mounted here; `null` if it can, as far as manifest and host tell.
    pub problem: Option<String>,
    /// Where blobs would be fetched from, in this order.
    pub sources: Vec<String>,
    /// Who we are to the registry; no secrets.
    pub login: String,
    /// The backend that would serve it.
    pub backend: Option<BackendKind>,
    /// Why this one.
    pub why: Option<String>,
}

/// One document of the chain.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DocumentReport {
    /// `named` by the reference; `listed` in the index before it, or `marked` there as a Nydus image; or it `refers`
    /// to the one before.
    pub how: String,
    /// `index` or `manifest`.
    pub kind: String,
    /// SHA-256.
    pub digest: String,
    pub bytes: u64,
    /// The platform that the index says.
    pub platform: Option<String>,
}

/// One layer of the manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct LayerReport {
    /// `blob`, `tables`, `bootstrap`, or `layer` of an image that is no RAFS image.
    pub role: String,
    /// As the manifest writes it.
    pub digest: String,
    pub media_type: String,
    /// Stored.
    pub bytes: u64,
    /// The layer that tables are about.
    pub about: Option<String>,
}

/// `POST /v1/pulls`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    pub image: ImageSpec,
}

/// An image that is brought here whole, under way or ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct PullReport {
    /// Unique while the daemon runs.
    pub id: u64,
    /// The reference, whole, or the path of the bootstrap.
    pub name: String,
    /// SHA-256 of the manifest, for an image of a registry.
    pub manifest: Option<String>,
    /// SHA-256 of the bootstrap.
    pub image: String,
    #[serde(flatten)]
    pub stats: PrefetchStats,
}
