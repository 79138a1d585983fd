//! What a registry has: blobs by digest, manifests by tag and by digest.

use std::collections::BTreeMap;

use bytes::Bytes;
use rafsd::codec::sha256;
use serde_json::json;

/// The media type of manifests that are made here.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A manifest as it is sent.
#[derive(Clone, Debug)]
pub struct Document {
    pub media_type: String,
    pub bytes: Bytes,
}

/// Everything that lies in a registry. Blobs are the same for all repositories that name them.
#[derive(Clone, Debug, Default)]
pub struct Content {
    blobs: BTreeMap<String, Bytes>,
    /// By repository, then by tag or digest.
    documents: BTreeMap<(String, String), Document>,
    /// Which repository has which blob.
    linked: Vec<(String, String)>,
}

/// `sha256:` and the digits.
pub fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", sha256(bytes))
}

impl Content {
    /// Lays a blob into a repository and tells its digest.
    pub fn blob(&mut self, repository: &str, bytes: impl Into<Bytes>) -> String {
        let bytes = bytes.into();
        let digest = digest(&bytes);
        self.blobs.insert(digest.clone(), bytes);
        self.linked.push((repository.to_owned(), digest.clone()));
        digest
    }

    /// Lays down a manifest under a tag and tells its digest.
    pub fn document(&mut self, repository: &str, tag: &str, media_type: &str, bytes: impl Into<Bytes>) -> String {
        let document = Document { media_type: media_type.to_owned(), bytes: bytes.into() };
        let digest = digest(&document.bytes);
        for name in [tag, &digest] {
            self.documents.insert((repository.to_owned(), name.to_owned()), document.clone());
        }
        digest
    }

    /// A manifest over layers that are there, with an empty configuration.
    pub fn manifest(&mut self, repository: &str, tag: &str, layers: &[(&str, &str)]) -> String {
        let config = self.blob(repository, "{}");
        let layers: Vec<_> = layers
            .iter()
            .map(|(media_type, digest)| {
                json!({ "mediaType": media_type, "digest": digest, "size": self.blobs[*digest].len() })
            })
            .collect();
        let text = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2 },
            "layers": layers,
        });
        self.document(repository, tag, MANIFEST, text.to_string())
    }

    pub fn find_blob(&self, repository: &str, digest: &str) -> Option<Bytes> {
        let linked = self.linked.iter().any(|(name, blob)| name == repository && blob == digest);
        linked.then(|| self.blobs[digest].clone())
    }

    /// A blob of any repository, as a storage has it.
    pub fn any_blob(&self, digest: &str) -> Option<Bytes> {
        self.blobs.get(digest).cloned()
    }

    /// A blob that is not this one.
    pub fn other_blob(&self, digest: &str) -> Option<Bytes> {
        self.blobs.iter().find(|(name, bytes)| *name != digest && bytes.len() > 2).map(|(_, bytes)| bytes.clone())
    }

    pub fn find_document(&self, repository: &str, name: &str) -> Option<Document> {
        self.documents.get(&(repository.to_owned(), name.to_owned())).cloned()
    }
}
