//! What goes over the control socket, as JSON.

mod blobfs;
mod credentials;
mod image;
pub mod observe;
mod prefetch;
mod registry;
#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod schema;
mod trace;

pub use blobfs::{BLOB_DIR, BlobfsRequest};
pub use credentials::{CredentialKind, CredentialsReport, CredentialsRequest, CredentialsTarget, Hidden, LoginRequest};
pub use image::{Blobs, ImageSpec, SpecError, Whereabouts};
pub use prefetch::{FileRanges, PrefetchOrder, PrefetchReport, PrefetchRequest, PrefetchTarget};
pub use registry::{DocumentReport, LayerReport, PullReport, PullRequest, ResolveReport, ResolveRequest};
pub use trace::{TraceReport, TraceRequest, TraceResult};

mod cache;
pub use cache::{BlobReport, BlobRequest, BlobUsage, CacheReport, GcReport, GcRequest, ImageUsage, PinRequest};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::observe::{HealthReport, ImageState, SourceReport};
use crate::cache::DeviceStats;
use crate::export::BackendKind;
use crate::export::fuse::Transport;
use crate::export::host::Host;

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum BackendChoice {
    /// The best this host has: cachefiles where it exists, then fanotify, fuse-device, fuse-tree
    #[default]
    Auto,
    /// Pre-content events over file-backed EROFS (Linux 6.14 and later)
    Fanotify,
    /// EROFS over the kernel's on-demand cache (Linux 5.19 to 7.1)
    Cachefiles,
    /// EROFS over files of a FUSE file system (Linux 6.12 and later, by loop devices before)
    FuseDevice,
    /// A FUSE file system that shows the image (Linux 5.4 and later, and users who are not root)
    FuseTree,
}

/// `POST /v1/mounts`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    pub image: ImageSpec,
    /// Mount point, absolute, an existing directory.
    pub dir: PathBuf,
    #[serde(default)]
    pub backend: BackendChoice,
    /// Record what is read from the first moment on, of complete blobs too. Where whoever stops the
    /// trace is to write it, an absolute path.
    #[serde(default)]
    pub trace: Option<PathBuf>,
}

/// `DELETE /v1/mounts`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct UnmountRequest {
    /// Mount point, absolute.
    pub dir: PathBuf,
    /// Take it out of the tree even while files on it are open.
    #[serde(default)]
    pub lazy: bool,
}

/// The answer to `DELETE /v1/mounts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Unmounted {
    /// Somebody keeps the file system alive, in another mount namespace or by an open file. It is
    /// served until that ends.
    pub still_served: bool,
}

/// `POST /v1/images`: makes an image mountable by anyone through `mount -t erofs -o fsid=`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    pub image: ImageSpec,
    /// `fsid=` of the mount.
    pub id: String,
    /// `domain_id=` of the mount.
    #[serde(default)]
    pub domain: Option<String>,
}

/// `DELETE /v1/images`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct UnregisterRequest {
    pub id: String,
    #[serde(default)]
    pub domain: Option<String>,
}

/// `POST /v1/upgrade`: makes room for another program, which goes on with everything.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct UpgradeRequest {
    /// The program, absolute.
    pub program: PathBuf,
}

/// One device of a served image.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct DeviceReport {
    /// Blob id.
    pub blob: String,
    /// Bytes of the decoded blob.
    pub decoded_bytes: u64,
    /// Bytes of the stored blob that hold its chunks.
    pub stored_bytes: u64,
    /// What has been done for it; absent while nobody has it open.
    pub stats: Option<DeviceStats>,
    /// How it is doing; absent while nobody has it open.
    pub health: Option<HealthReport>,
}

/// How requests of FUSE come to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct TransportReport {
    pub used: Transport,
    /// Why this way.
    pub why: String,
}

/// One mounted or registered image.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ImageReport {
    /// Mount point; absent for an image that is only registered.
    pub dir: Option<PathBuf>,
    /// The directory that is shown there with the blobs of the image in it; absent where the image itself is.
    #[serde(default)]
    pub shows: Option<PathBuf>,
    pub backend: BackendKind,
    /// Why this backend.
    pub why: String,
    /// How requests of FUSE come, if any do.
    #[serde(default)]
    pub transport: Option<TransportReport>,
    pub state: ImageState,
    /// SHA-256 of the bootstrap.
    pub image: String,
    /// What it was called when it was asked for, if it comes from a registry.
    #[serde(default)]
    pub reference: Option<String>,
    /// SHA-256 of the manifest that this led to.
    #[serde(default)]
    pub manifest: Option<String>,
    /// Why the registry could not be asked whether the reference still leads there, if that was so when this daemon was
    /// told to mount or register it.
    #[serde(default)]
    pub unconfirmed: Option<String>,
    /// Bytes of the bootstrap.
    pub bootstrap_bytes: u64,
    /// Where stored bytes come from.
    pub source: String,
    /// That source, and those that other images of the same blobs brought.
    pub sources: Vec<SourceReport>,
    /// Options with which anybody can mount it, for the cachefiles backend.
    pub mount_options: Option<String>,
    pub devices: Vec<DeviceReport>,
}

/// `GET /v1/info`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Info {
    pub version: String,
    pub pid: u32,
    /// Milliseconds since its start.
    pub uptime_ms: u64,
    pub cache: PathBuf,
    /// Whether the process lives that keeps readers waiting should this daemon die.
    pub keeper_alive: bool,
    /// Pre-content events answered at once, and those that had to wait for data.
    pub events_hit: u64,
    pub events_missed: u64,
    /// READ requests of the cachefiles backend.
    pub cachefiles_reads: u64,
    /// Milliseconds that readers waited while this daemon took over from another one; `null` if it
    /// started from nothing.
    pub takeover_ms: Option<u64>,
    /// Mounts of an earlier daemon that live and cannot be served: what is missing of them cannot be read.
    #[serde(default)]
    pub unserved: Vec<UnservedReport>,
    /// What this host can do, tried when the daemon started.
    pub host: Host,
}

/// A mount that nobody serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct UnservedReport {
    /// Where it is mounted; `null` if it is not any more, or that is not known.
    pub dir: Option<PathBuf>,
    pub why: String,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Failure {
    /// What went wrong, with its causes.
    pub error: String,
}
