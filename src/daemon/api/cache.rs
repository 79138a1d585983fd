//! What is said about the cache, and asked of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cache::{BlobStock, BootstrapStock, Removed, StoreStats};

/// `GET /v1/cache`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct CacheReport {
    /// Directory of the cache.
    pub dir: PathBuf,
    /// What the daemon has done for it; absent when no daemon runs.
    pub stats: Option<StoreStats>,
    pub blobs: Vec<BlobReport>,
    pub bootstraps: Vec<BootstrapStock>,
    /// Bytes on disk of the kernel's own cache, as far as its files have names.
    pub kernel_cache_bytes: u64,
    /// Bytes on disk of what images have promised about it.
    pub promises_bytes: u64,
    /// Bytes on disk of everything.
    pub bytes: u64,
}

/// One blob in the cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BlobReport {
    #[serde(flatten)]
    pub stock: BlobStock,
    /// Which served images use it: mount points, or the options that an image is registered under.
    pub used_by: Vec<String>,
}

/// `GET /v1/cache/usage`: what one image takes in the cache.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ImageUsage {
    /// SHA-256 of the bootstrap.
    pub image: String,
    /// Where it is mounted now.
    pub mounted: Vec<PathBuf>,
    /// Bytes and inodes on disk of its bootstrap and its blobs.
    pub bytes: u64,
    pub inodes: u64,
    /// Those of them that another image in the cache has as well.
    pub shared_bytes: u64,
    pub shared_inodes: u64,
    /// Bytes on disk of the copy of the bootstrap.
    pub bootstrap_bytes: u64,
    pub blobs: Vec<BlobUsage>,
}

/// One blob of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct BlobUsage {
    /// As in the list of the cache; the blob's id if it is in the kernel's own cache.
    pub name: String,
    pub bytes: u64,
    pub inodes: u64,
    /// How many images in the cache have it.
    pub images: u32,
    /// Whether it lies in the kernel's own cache: its bytes are then those of the units present.
    pub in_kernel_cache: bool,
}

/// `POST /v1/cache/gc`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct GcRequest {
    /// Bytes that may be left; 0 to remove everything that nobody uses.
    #[serde(default)]
    pub to: u64,
    /// Remove only what was last used longer ago than so many seconds.
    #[serde(default)]
    pub older_than: Option<u64>,
    /// Tell what would be removed, and remove nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What a collection removed, or would.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GcReport {
    pub removed: Vec<Removed>,
    /// Bytes on disk that they took.
    pub freed_bytes: u64,
    /// Bytes on disk of what is left.
    pub left_bytes: u64,
    pub dry_run: bool,
}

/// `POST /v1/cache/verify`, `DELETE /v1/cache/blobs`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BlobRequest {
    /// A name in the cache, or a beginning of one that no other has.
    pub blob: String,
}

/// `PUT /v1/cache/pins`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// A name in the cache, or a beginning of one that no other has.
    pub blob: String,
    /// Whether it must stay from now on.
    pub pinned: bool,
}
