//! From a reference to the manifest of an image.
//!
//! An index may have the image in several forms for one platform, and none of them marked. Those that are
//! marked come first, the others are looked at in their order. If an image is an ordinary one, something else in the
//! registry may say that it is the same in RAFS form.

use serde::{Deserialize, Serialize};

use super::document::{Descriptor, Index, Manifest, Parsed, media};
use super::error::OciError;
use super::platform::Platform;
use super::reference::{Reference, Version};
use super::registry::{Document, Registry};
use super::shape::{Image, Shape, classify};
use crate::base::Digest;
use crate::codec::sha256;

/// Most manifests of an index, and most referrers, that are looked at.
const MOST_CANDIDATES: usize = 16;

/// One document of the chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// How the one before leads here.
    pub how: How,
    /// SHA-256 in hexadecimal digits.
    pub digest: String,
    pub content_type: Option<String>,
    /// The platform that the one before says it is for.
    pub platform: Option<String>,
    /// The document as it was sent.
    pub text: String,
}

/// How a chain leads to a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// The reference names it.
    Named,
    /// It is listed in an index for the platform.
    Listed,
    /// The same, and the index says that it is a Nydus image.
    Marked,
    /// It has the one before as its subject.
    Refers,
}

/// Where a reference leads.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub reference: Reference,
    /// From what the reference names to the manifest; never empty.
    pub links: Vec<Link>,
    /// The last of them.
    pub manifest: Manifest,
    pub manifest_digest: Digest,
    pub shape: Shape,
}

impl Resolved {
    /// What links from before lead to, if each is what its digest says.
    pub fn of_links(reference: &Reference, links: Vec<Link>) -> Option<Self> {
        let is_sound = |link: &Link| Digest::from_hex(&link.digest) == Some(sha256(link.text.as_bytes()));
        if !links.iter().all(is_sound) {
            return None;
        }
        let last = links.last()?;
        let Ok(Parsed::Manifest(manifest)) = Parsed::parse(last.text.as_bytes(), last.content_type.as_deref()) else {
            return None;
        };
        let shape = classify(&manifest, matches!(last.how, How::Marked));
        let manifest_digest = Digest::from_hex(&last.digest)?;
        Some(Self { reference: reference.clone(), links, manifest: *manifest, manifest_digest, shape })
    }

    /// Digest of what the reference itself names.
    pub fn head(&self) -> Option<Digest> {
        Digest::from_hex(&self.links.first()?.digest)
    }

    /// The image, if it can be mounted as far as its manifest tells.
    ///
    /// # Errors
    /// It is of another kind, of a version that is not served, or encrypted.
    pub fn image(&self) -> Result<&Image, OciError> {
        let reference = self.reference.clone();
        let image = match &self.shape {
            Shape::Rafs(image) => image,
            Shape::Foreign(foreign) => {
                let (what, remedy) = (foreign.what().to_owned(), foreign.remedy());
                return Err(OciError::NotRafs { reference, what, remedy });
            }
        };
        let unsupported = |why: String| Err(OciError::Unsupported { reference: reference.clone(), why });
        if image.bootstrap.media_type.ends_with("+encrypted") {
            return unsupported(
                "its bootstrap layer is encrypted for somebody, and layers are not decrypted here".to_owned(),
            );
        }
        match image.version.as_deref() {
            None | Some("5" | "6") => Ok(image),
            Some(version) => unsupported(format!("it says that it is of RAFS version {version:?}; 5 and 6 are served")),
        }
    }
}

/// A document that was reached.
struct Reached {
    links: Vec<Link>,
    manifest: Manifest,
    digest: Digest,
    shape: Shape,
}

/// Follows `reference` to a manifest, for `platform`, or for that of this program if there is a choice.
///
/// # Errors
/// The registry does not give what is needed, or gives something unsound. That it is no RAFS image is no error.
pub async fn resolve(
    registry: &Registry<'_>,
    reference: &Reference,
    platform: Option<&Platform>,
) -> Result<Resolved, OciError> {
    let here = Platform::here();
    let wanted = platform.unwrap_or(&here);
    let way = Way { registry, reference, wanted };
    let first = registry.document(&reference.version()).await?;
    let is_manifest = matches!(first.parsed, Parsed::Manifest(_));
    let reached = way.follow(first, How::Named, None, Vec::new()).await?;
    let mut found = reached.ok_or_else(|| OciError::NoManifest { reference: reference.clone() })?;
    if is_manifest && let Some(asked) = platform {
        way.ensure_platform(&found.manifest, asked).await?;
    }
    if matches!(found.shape, Shape::Foreign(_))
        && let Some(better) = way.referrer(&found).await?
    {
        found = better;
    }
    let Reached { links, manifest, digest: manifest_digest, shape } = found;
    Ok(Resolved { reference: reference.clone(), links, manifest, manifest_digest, shape })
}

struct Way<'a> {
    registry: &'a Registry<'a>,
    reference: &'a Reference,
    wanted: &'a Platform,
}

impl Way<'_> {
    /// Goes on from a document: the first RAFS image behind it, or else the first image of any kind.
    async fn follow(
        &self,
        document: Document,
        how: How,
        platform: Option<String>,
        mut links: Vec<Link>,
    ) -> Result<Option<Reached>, OciError> {
        let Document { digest, content_type, text, parsed } = document;
        let marked = how == How::Marked;
        links.push(Link { how, digest: digest.to_string(), content_type, platform, text });
        match parsed {
            Parsed::Manifest(manifest) => {
                let shape = classify(&manifest, marked);
                Ok(Some(Reached { links, manifest: *manifest, digest, shape }))
            }
            // This one is the third.
            Parsed::Index(_) if links.len() > 2 => Err(OciError::TooDeep { reference: self.reference.clone() }),
            Parsed::Index(index) => Box::pin(self.choose(&index, &links)).await,
        }
    }

    async fn choose(&self, index: &Index, links: &[Link]) -> Result<Option<Reached>, OciError> {
        let candidates = candidates(index, self.wanted);
        if candidates.is_empty() {
            let offered = offered(index);
            let (reference, platform) = (self.reference.clone(), self.wanted.to_string());
            return Err(OciError::NoPlatform { reference, platform, offered });
        }
        let (mut second, mut unusable) = (None, None);
        for candidate in candidates.into_iter().take(MOST_CANDIDATES) {
            let how = if candidate.is_marked_nydus() { How::Marked } else { How::Listed };
            let platform = candidate.platform.as_ref().map(|stated| stated.platform().to_string());
            let followed = async { self.follow(self.linked(candidate).await?, how, platform, links.to_vec()).await };
            match followed.await {
                Ok(Some(found)) if matches!(found.shape, Shape::Rafs(_)) => return Ok(Some(found)),
                Ok(found) => second = second.or(found),
                // Another one may do.
                Err(error) if error.is_of_one_document() => unusable = unusable.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match (second, unusable) {
            (None, Some(error)) => Err(error),
            (second, _) => Ok(second),
        }
    }

    async fn linked(&self, descriptor: &Descriptor) -> Result<Document, OciError> {
        let bad = |cause| OciError::Document {
            repository: self.reference.repository().to_string(),
            what: "the index".to_owned(),
            cause,
        };
        let digest = descriptor.sha256().map_err(bad)?;
        self.registry.document(&Version::Digest(digest)).await
    }

    /// A RAFS image that says it is the same as `ordinary`.
    async fn referrer(&self, ordinary: &Reached) -> Result<Option<Reached>, OciError> {
        let mut listed = self.registry.referrers(ordinary.digest).await?;
        let rank = |it: &Descriptor| match it.artifact_type.as_deref() {
            Some(media::NYDUS_MANIFEST | media::NYDUS_CONFIG) => Some(0),
            // What has no type of its own is listed by that of its config.
            None | Some("" | media::CONFIG | media::DOCKER_CONFIG) => Some(1),
            Some(_) => None,
        };
        listed.retain(|it| rank(it).is_some());
        listed.sort_by_key(rank);
        for candidate in listed.iter().take(MOST_CANDIDATES) {
            let document = match self.linked(candidate).await {
                Ok(document) => document,
                // A list outlives what is in it.
                Err(error) if error.is_of_one_document() => continue,
                Err(error) => return Err(error),
            };
            let Parsed::Manifest(manifest) = &document.parsed else { continue };
            let subject = manifest.subject.as_ref().and_then(|subject| subject.sha256().ok());
            let shape = classify(manifest, false);
            if subject == Some(ordinary.digest) && matches!(shape, Shape::Rafs(_)) {
                return self.follow(document, How::Refers, None, ordinary.links.clone()).await;
            }
        }
        Ok(None)
    }

    /// A manifest that no index chose is for whatever its config says.
    async fn ensure_platform(&self, manifest: &Manifest, asked: &Platform) -> Result<(), OciError> {
        let stated = self.registry.config(&manifest.config).await?.platform.platform();
        if stated.os.is_empty() || asked.rank(&stated).is_some() {
            return Ok(());
        }
        let (platform, offered) = (asked.to_string(), stated.to_string());
        Err(OciError::NoPlatform { reference: self.reference.clone(), platform, offered })
    }
}

/// What of `index` serves `wanted`: marked ones first, then by how well they fit, then by their order. Entries
/// that do not say what they are for come last.
fn candidates<'a>(index: &'a Index, wanted: &Platform) -> Vec<&'a Descriptor> {
    const UNSAID: u8 = 9;
    let rank = |entry: &Descriptor| match &entry.platform {
        Some(stated) if !stated.os.is_empty() => wanted.rank(&stated.platform()),
        _ => Some(UNSAID),
    };
    let mut fitting: Vec<_> = index.manifests.iter().filter_map(|entry| Some((rank(entry)?, entry))).collect();
    fitting.sort_by_key(|(rank, entry)| (!entry.is_marked_nydus(), *rank));
    fitting.into_iter().map(|(_, entry)| entry).collect()
}

/// The platforms of an index, for a message.
fn offered(index: &Index) -> String {
    let stated = index.manifests.iter().filter_map(|entry| Some(entry.platform.as_ref()?.platform().to_string()));
    // Attestations are listed with a platform that is none.
    let mut all: Vec<_> = stated.filter(|platform| platform != "unknown/unknown").take(64).collect();
    all.sort();
    all.dedup();
    if all.is_empty() { "nothing".to_owned() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::document::annotation;
    use super::super::scripted::Scripted;
    use super::super::shape::{Foreign, Layout};
    use super::*;

    /// A registry with documents in the repository `app`.
    #[derive(Default)]
    struct Box(Scripted);

    impl Box {
        /// Puts a document there; gives its descriptor.
        fn put(&self, document: &Value) -> Value {
            let text = document.to_string();
            let digest = sha256(text.as_bytes());
            self.0.put(&format!("/v2/app/manifests/sha256:{digest}"), text.as_bytes());
            json!({"digest": format!("sha256:{digest}"), "size": text.len(), "mediaType": document["mediaType"]})
        }

        fn tag(&self, tag: &str, document: &Value) -> Value {
            self.0.put(&format!("/v2/app/manifests/{tag}"), document.to_string().as_bytes());
            self.put(document)
        }

        async fn resolve_for(&self, platform: Option<&str>) -> Result<Resolved, OciError> {
            let reference: Reference = "r.example/app:1".parse().unwrap();
            let platform = platform.map(|text| text.parse().unwrap());
            resolve(&Registry::new(&self.0, reference.repository()), &reference, platform.as_ref()).await
        }

        async fn resolve(&self) -> Resolved {
            self.resolve_for(Some("linux/amd64")).await.unwrap_or_else(|error| panic!("{error}"))
        }
    }

    fn layer(seed: u8, annotations: Value) -> Value {
        json!({"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": format!("sha256:{}", Digest([seed; 32])),
            "size": 1, "annotations": annotations})
    }

    fn manifest(seed: u8, layers: Vec<Value>) -> Value {
        let config = json!({"mediaType": media::CONFIG, "digest": format!("sha256:{}", Digest([seed; 32])), "size": 2});
        json!({"schemaVersion": 2, "mediaType": media::MANIFEST, "config": config, "layers": layers})
    }

    fn nydus(seed: u8) -> Value {
        let boot = json!({annotation::BOOTSTRAP: "true", annotation::FS_VERSION: "6"});
        manifest(seed, vec![layer(seed, json!({annotation::BLOB: "true"})), layer(seed + 1, boot)])
    }

    fn ordinary(seed: u8) -> Value {
        manifest(seed, vec![layer(seed, Value::Null)])
    }

    fn index(entries: Vec<Value>) -> Value {
        json!({"schemaVersion": 2, "mediaType": media::INDEX, "manifests": entries})
    }

    fn on(mut descriptor: Value, platform: Value, artifact: Option<&str>) -> Value {
        descriptor["platform"] = platform;
        if let Some(artifact) = artifact {
            descriptor["artifactType"] = artifact.into();
        }
        descriptor
    }

    fn amd64() -> Value {
        json!({"os": "linux", "architecture": "amd64"})
    }

    fn hows(resolved: &Resolved) -> Vec<How> {
        resolved.links.iter().map(|link| link.how).collect()
    }

    #[tokio::test]
    async fn a_manifest_is_its_own_chain() {
        let there = Box::default();
        there.tag("1", &nydus(1));

        let resolved = there.resolve_for(None).await.unwrap();

        assert_eq!(hows(&resolved), [How::Named]);
        assert_eq!(resolved.image().unwrap().layout, Layout::Native);
        assert_eq!(there.0.asked(), ["GET /v2/app/manifests/1"], "one request");
        let again = Resolved::of_links(&resolved.reference, resolved.links.clone()).unwrap();
        assert_eq!((again.manifest_digest, again.shape), (resolved.manifest_digest, resolved.shape.clone()));
        let mut changed = resolved.links;
        changed[0].text.push(' ');
        assert!(Resolved::of_links(&resolved.reference, changed).is_none());
    }

    #[tokio::test]
    async fn merged_indexes_of_both_generations_lead_to_the_nydus_manifest() {
        let features = json!({"os": "linux", "architecture": "amd64", "os.features": ["nydus.remoteimage.v1"]});
        for (platform, artifact) in [(amd64(), Some(media::NYDUS_MANIFEST)), (features, None)] {
            let there = Box::default();
            let plain = on(there.put(&ordinary(1)), amd64(), None);
            let lazy = on(there.put(&nydus(3)), platform, artifact);
            let other = on(there.put(&nydus(5)), json!({"os": "linux", "architecture": "arm64"}), artifact);
            there.tag("1", &index(vec![plain, other, lazy.clone()]));

            let resolved = there.resolve().await;

            assert_eq!(format!("sha256:{}", resolved.manifest_digest), lazy["digest"]);
            assert_eq!(hows(&resolved), [How::Named, How::Marked]);
            assert_eq!(there.0.asked().len(), 2, "the ordinary one is not even looked at");
        }
    }

    #[tokio::test]
    async fn an_index_without_marks_is_searched_in_its_order() {
        let there = Box::default();
        let attestation = on(there.put(&ordinary(9)), json!({"os": "unknown", "architecture": "unknown"}), None);
        let plain = on(there.put(&ordinary(1)), amd64(), None);
        let lazy = on(there.put(&nydus(3)), amd64(), None);
        there.tag("1", &index(vec![attestation.clone(), plain.clone(), lazy.clone()]));
        let resolved = there.resolve().await;
        assert_eq!(format!("sha256:{}", resolved.manifest_digest), lazy["digest"]);

        there.tag("1", &index(vec![attestation, plain.clone()]));
        let resolved = there.resolve().await;
        assert_eq!(resolved.shape, Shape::Foreign(Foreign::Ordinary));
        let error = resolved.image().unwrap_err().to_string();
        assert!(error.contains("an ordinary OCI image") && error.contains("nydusify convert"), "{error}");
        let error = there.resolve_for(Some("linux/riscv64")).await.unwrap_err().to_string();
        assert!(error.contains("nothing for linux/riscv64; it has linux/amd64"), "{error}");
    }

    #[tokio::test]
    async fn indexes_in_indexes_end_at_the_second() {
        let there = Box::default();
        let inner = there.put(&index(vec![on(there.put(&nydus(1)), amd64(), None)]));
        let middle = there.tag("1", &index(vec![inner.clone()]));
        assert_eq!(hows(&there.resolve().await), [How::Named, How::Listed, How::Listed]);

        there.tag("1", &index(vec![middle]));
        assert!(matches!(there.resolve_for(None).await, Err(OciError::TooDeep { .. })));
        there.tag("1", &index(Vec::new()));
        assert!(matches!(there.resolve_for(None).await, Err(OciError::NoPlatform { .. })));
    }

    #[tokio::test]
    async fn a_referrer_in_rafs_form_is_found_among_others() {
        let there = Box::default();
        let subject = there.tag("1", &ordinary(1));
        let referring = |mut manifest: Value, subject: &Value| {
            manifest["subject"] = subject.clone();
            there.put(&manifest)
        };
        let typed = |mut descriptor: Value, artifact: &str| {
            descriptor["artifactType"] = artifact.into();
            descriptor
        };
        let signature = typed(referring(nydus(20), &subject), "application/vnd.dev.cosign.artifact.sig.v1+json");
        let elsewhere = typed(referring(nydus(22), &there.put(&ordinary(9))), media::NYDUS_MANIFEST);
        let lost = typed(json!({"digest": format!("sha256:{}", Digest([77; 32])), "size": 3}), media::NYDUS_MANIFEST);
        let no_image = typed(referring(ordinary(24), &subject), media::CONFIG);
        let right = referring(nydus(26), &subject);
        let list = index(vec![signature, no_image, lost, elsewhere, right.clone()]);
        let digest = subject["digest"].as_str().unwrap();
        there.0.put(&format!("/v2/app/referrers/{digest}"), list.to_string().as_bytes());

        let resolved = there.resolve_for(None).await.unwrap();

        assert_eq!(format!("sha256:{}", resolved.manifest_digest), right["digest"]);
        assert_eq!(hows(&resolved), [How::Named, How::Refers]);
    }

    #[tokio::test]
    async fn a_platform_that_was_asked_for_is_looked_up_in_the_config() {
        let there = Box::default();
        let mut image = nydus(1);
        let config = br#"{"os": "linux", "architecture": "arm64", "config": {"Env": ["A=b"]}}"#;
        let digest = sha256(config);
        image["config"]["digest"] = format!("sha256:{digest}").into();
        image["config"]["size"] = config.len().into();
        there.0.put(&format!("/v2/app/blobs/sha256:{digest}"), config);
        there.tag("1", &image);

        assert!(there.resolve_for(Some("linux/arm64")).await.is_ok());
        assert!(matches!(there.resolve_for(Some("linux/amd64")).await, Err(OciError::NoPlatform { .. })));
        assert!(there.resolve_for(None).await.is_ok(), "nobody asked");
    }

    #[tokio::test]
    async fn versions_and_encryption_that_are_not_served_are_said_so() {
        let there = Box::default();
        let mut image = nydus(1);
        image["layers"][1]["annotations"][annotation::FS_VERSION] = "7".into();
        there.tag("1", &image);
        let error = there.resolve_for(None).await.unwrap().image().unwrap_err().to_string();
        assert!(error.contains("version \"7\"; 5 and 6 are served"), "{error}");

        let mut image = nydus(1);
        image["layers"][1]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted".into();
        there.tag("1", &image);
        let error = there.resolve_for(None).await.unwrap().image().unwrap_err().to_string();
        assert!(error.contains("bootstrap layer is encrypted"), "{error}");
    }
}
