//! Directories of the host with blobs in them, as JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::ImageSpec;

/// `POST /v1/blobfs`: shows a directory of the host, with the blobs of images in it, at another place.
///
/// The answer is a list of the images, as `GET /v1/mounts` gives them; it is unmounted like an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct BlobfsRequest {
    /// The directory, absolute.
    pub source: PathBuf,
    /// Mount point, absolute, an existing directory.
    pub dir: PathBuf,
    /// The images, at least one.
    pub images: Vec<ImageSpec>,
    /// Name of the directory below the mount point that the blobs appear in; the mount point itself if it is `.`.
    #[serde(default = "blobs")]
    pub blob_dir: String,
}

/// Where blobs are unless it is said.
pub const BLOB_DIR: &str = "blobs";

fn blobs() -> String {
    BLOB_DIR.to_owned()
}
