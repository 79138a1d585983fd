//! What a client asks about the cache.

use reqwest::Method;

use super::api::{BlobRequest, CacheReport, GcReport, GcRequest, ImageUsage, PinRequest};
use super::client::{Client, ClientError};
use crate::cache::{Removed, VerifyReport};

impl Client {
    /// What is in the cache.
    pub async fn cache(&self) -> Result<CacheReport, ClientError> {
        self.call(Method::GET, "cache", &()).await
    }

    /// What each image takes there.
    pub async fn cache_usage(&self) -> Result<Vec<ImageUsage>, ClientError> {
        self.call(Method::GET, "cache/usage", &()).await
    }

    /// Removes what nobody uses.
    pub async fn collect(&self, request: &GcRequest) -> Result<GcReport, ClientError> {
        self.call(Method::POST, "cache/gc", request).await
    }

    /// Reads a blob again and checks it; answers when that is done.
    pub async fn verify(&self, blob: &str) -> Result<VerifyReport, ClientError> {
        self.call(Method::POST, "cache/verify", &BlobRequest { blob: blob.to_owned() }).await
    }

    /// Makes a blob stay, or no longer; gives its whole name.
    pub async fn pin(&self, blob: &str, pinned: bool) -> Result<String, ClientError> {
        self.call(Method::PUT, "cache/pins", &PinRequest { blob: blob.to_owned(), pinned }).await
    }

    /// Removes a blob that nobody uses.
    pub async fn drop_blob(&self, blob: &str) -> Result<Removed, ClientError> {
        self.call(Method::DELETE, "cache/blobs", &BlobRequest { blob: blob.to_owned() }).await
    }
}
