//! The documents of a registry: index, manifest, config.
//!
//! Only the fields that somebody here looks at; unknown ones are passed over. What a document is decides its
//! media type, and one that could be read as either kind is refused, so that nobody else reads another image
//! from the same bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use super::error::DocumentError;
use super::platform::Platform;
use super::reference::parse_digest;
use crate::base::Digest;

/// Longest document that is read, in bytes: what registries take.
pub const MAX_DOCUMENT: usize = 4 << 20;

/// Media types that are asked for, and that a document may have.
pub mod media {
    pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Of the retired first version of docker's manifests, signed and without digests of layers that mean anything.
    pub(in crate::oci) const DOCKER_V1: &str = "application/vnd.docker.distribution.manifest.v1";
    /// All that are understood, for the header `Accept`.
    pub(in crate::oci) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
        application/vnd.oci.image.manifest.v1+json, \
        application/vnd.docker.distribution.manifest.list.v2+json, \
        application/vnd.docker.distribution.manifest.v2+json";
    /// Of an image's config.
    pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Of the config of a Nydus image in an index that has the ordinary image too.
    pub const NYDUS_CONFIG: &str = "application/vnd.nydus.image.config.v1+json";
    /// Of a Nydus manifest, as an artifact.
    pub const NYDUS_MANIFEST: &str = "application/vnd.nydus.image.manifest.v1+json";
    /// Of a layer that is a blob of a Nydus image.
    pub const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
}

/// Names of annotations.
pub mod annotation {
    /// The layer is a blob.
    pub const BLOB: &str = "containerd.io/snapshot/nydus-blob";
    /// The layer holds the bootstrap.
    pub const BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
    /// Version of the bootstrap: `5` or `6`; `7` from version 3 of Nydus on.
    pub const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
    /// The layer has the tables of this one, which holds the data.
    pub const REF: &str = "containerd.io/snapshot/nydus-ref";
    pub(in crate::oci) const STARGZ: &str = "containerd.io/snapshot/stargz/toc.digest";
    pub(in crate::oci) const ZSTD_CHUNKED: &str = "io.github.containers.zstd-chunked.manifest-checksum";
    pub(in crate::oci) const OVERLAYBD: &str = "containerd.io/snapshot/overlaybd/blob-digest";
}

/// The feature of a platform that marked Nydus manifests in an index before the middle of 2025.
const NYDUS_FEATURE: &str = "nydus.remoteimage.v1";

type Annotations = BTreeMap<String, String>;

/// What points at a document or a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    /// `ALGORITHM:DIGITS`, unchecked.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: Annotations,
    #[serde(default)]
    pub artifact_type: Option<String>,
    #[serde(default)]
    pub platform: Option<StatedPlatform>,
}

impl Descriptor {
    /// The digest, if it is one that can be checked.
    ///
    /// # Errors
    /// By another algorithm than SHA-256, or malformed.
    pub fn sha256(&self) -> Result<Digest, DocumentError> {
        parse_digest(&self.digest).map_err(|why| DocumentError::Digest { text: self.digest.clone(), why })
    }

    /// Whether an annotation says `true`.
    pub fn is(&self, annotation: &str) -> bool {
        self.annotations.get(annotation).is_some_and(|value| value == "true")
    }

    /// Whether an index marks it as a Nydus manifest, in either way.
    pub fn is_marked_nydus(&self) -> bool {
        let has_feature = |platform: &StatedPlatform| platform.os_features.iter().any(|it| it == NYDUS_FEATURE);
        self.artifact_type.as_deref() == Some(media::NYDUS_MANIFEST) || self.platform.as_ref().is_some_and(has_feature)
    }
}

/// The platform of a descriptor, as somebody wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct StatedPlatform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub variant: Option<String>,
    #[serde(default, rename = "os.features", deserialize_with = "nullable")]
    pub os_features: Vec<String>,
}

impl StatedPlatform {
    /// The same as far as it decides what can run.
    pub fn platform(&self) -> Platform {
        let variant = self.variant.clone().filter(|variant| !variant.is_empty());
        Platform { os: self.os.clone(), architecture: self.architecture.clone(), variant }
    }
}

/// A list of manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Index {
    #[serde(default, deserialize_with = "nullable")]
    pub manifests: Vec<Descriptor>,
}

/// An image, or something else made of blobs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    pub config: Descriptor,
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<Descriptor>,
    #[serde(default, deserialize_with = "nullable")]
    pub annotations: Annotations,
    #[serde(default)]
    pub artifact_type: Option<String>,
    /// The manifest that this one belongs to.
    #[serde(default)]
    pub subject: Option<Descriptor>,
}

/// What an image's config says of interest here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Config {
    #[serde(flatten)]
    pub platform: StatedPlatform,
}

/// A document of either kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    Index(Index),
    Manifest(Box<Manifest>),
}

impl Parsed {
    /// Reads a document that was sent as `content_type`.
    ///
    /// # Errors
    /// Longer than 4 MiB, no JSON, of a kind that nobody here knows, or of both kinds at once.
    pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Outline {
            #[serde(default)]
            schema_version: Option<u64>,
            #[serde(default)]
            media_type: Option<String>,
            #[serde(default)]
            manifests: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            layers: Option<serde::de::IgnoredAny>,
            #[serde(default)]
            config: Option<serde::de::IgnoredAny>,
        }
        if bytes.len() > MAX_DOCUMENT {
            return Err(DocumentError::TooLong);
        }
        let outline: Outline = serde_json::from_slice(bytes)?;
        if outline.schema_version == Some(1) {
            return Err(DocumentError::Kind { kind: media::DOCKER_V1.to_owned() });
        }
        let is_index = outline.manifests.is_some();
        let is_manifest = outline.layers.is_some() || outline.config.is_some();
        if is_index && is_manifest {
            return Err(DocumentError::Ambiguous);
        }
        // What the document says of itself has a digest; the header has none.
        let stated = outline.media_type.as_deref().or(content_type).unwrap_or_default();
        match stated {
            media::INDEX | media::DOCKER_LIST if is_manifest => Err(DocumentError::Ambiguous),
            media::MANIFEST | media::DOCKER_MANIFEST if is_index => Err(DocumentError::Ambiguous),
            media::INDEX | media::DOCKER_LIST => Ok(Self::Index(serde_json::from_slice(bytes)?)),
            media::MANIFEST | media::DOCKER_MANIFEST => Ok(Self::Manifest(serde_json::from_slice(bytes)?)),
            "" | "application/json" | "text/plain" | "application/octet-stream" if is_index => {
                Ok(Self::Index(serde_json::from_slice(bytes)?))
            }
            "" | "application/json" | "text/plain" | "application/octet-stream" if is_manifest => {
                Ok(Self::Manifest(serde_json::from_slice(bytes)?))
            }
            other => Err(DocumentError::Kind { kind: other.to_owned() }),
        }
    }
}

/// Programs write `null` where they have nothing.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(text: &str, content_type: Option<&str>) -> Result<Parsed, String> {
        Parsed::parse(text.as_bytes(), content_type).map_err(|error| error.to_string())
    }

    #[test]
    fn documents_are_told_apart_by_what_they_say_of_themselves() {
        let manifest =
            format!(r#"{{"schemaVersion": 2, "config": {{"digest": "{DIGEST}", "size": 2}}, "layers": null}}"#);
        assert!(matches!(parse(&manifest, None), Ok(Parsed::Manifest(it)) if it.layers.is_empty()));
        assert!(matches!(parse(&manifest, Some(media::DOCKER_MANIFEST)), Ok(Parsed::Manifest(_))));
        assert!(matches!(parse(r#"{"manifests": []}"#, Some("application/json")), Ok(Parsed::Index(_))));
        let named = format!(r#"{{"mediaType": "{}", "manifests": null, "unknown": [1]}}"#, media::DOCKER_LIST);
        assert!(matches!(parse(&named, Some("text/html")), Ok(Parsed::Index(_))), "the header is second");
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let both = format!(r#"{{"config": {{"digest": "{DIGEST}", "size": 2}}, "layers": [], "manifests": []}}"#);
        for (text, kind) in [
            (both.as_str(), None),
            (both.as_str(), Some(media::MANIFEST)),
            (r#"{"manifests": []}"#, Some(media::MANIFEST)),
            (r#"{"layers": []}"#, Some(media::INDEX)),
        ] {
            assert!(parse(text, kind).unwrap_err().contains("both"), "{text} as {kind:?}");
        }
    }

    #[test]
    fn what_is_no_document_is_refused_with_its_kind() {
        assert!(parse("<html>", None).unwrap_err().contains("no document"));
        assert!(parse(r#"{"errors": []}"#, Some("text/html")).unwrap_err().contains("text/html"));
        assert!(parse(r#"{"schemaVersion": 1, "fsLayers": []}"#, None).unwrap_err().contains("manifest.v1"));
        assert!(parse(r#"{"layers": [{"digest": 7, "size": 1}], "config": {}}"#, None).is_err());
        assert!(parse(r#"{"manifests": [{"digest": "sha256:00", "size": -1}]}"#, None).is_err());
        let long = format!("{{\"manifests\": [], \"x\": \"{}\"}}", "y".repeat(MAX_DOCUMENT));
        assert!(parse(&long, None).unwrap_err().contains("4 MiB"));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(&format!("{{\"manifests\": {deep}}}"), None).is_err());
    }

    #[test]
    fn digests_are_checked_where_they_are_used() {
        let descriptor = |digest: &str| Descriptor { digest: digest.to_owned(), ..Descriptor::default() };
        assert_eq!(format!("sha256:{}", descriptor(DIGEST).sha256().unwrap()), DIGEST);
        for bad in ["", "sha256:", "sha512:00", "sha256:../../x"] {
            assert!(descriptor(bad).sha256().is_err(), "{bad}");
        }
    }

    #[test]
    fn both_generations_of_marks_are_known() {
        let descriptor = |text: &str| serde_json::from_str::<Descriptor>(text).unwrap();
        let artifact = format!(r#"{{"digest": "{DIGEST}", "size": 1, "artifactType": "{}"}}"#, media::NYDUS_MANIFEST);
        let feature = format!(
            r#"{{"digest": "{DIGEST}", "size": 1, "platform": {{"os": "linux", "architecture": "amd64", "os.features": ["{NYDUS_FEATURE}"]}}}}"#
        );
        let ordinary = format!(
            r#"{{"digest": "{DIGEST}", "size": 1, "annotations": null, "platform": {{"os": "linux", "architecture": "amd64", "os.features": null, "os.version": "1"}}}}"#
        );
        assert_eq!([artifact, feature, ordinary].map(|it| descriptor(&it).is_marked_nydus()), [true, true, false]);
    }
}
