//! What a registry has of one repository, fetched and checked.

use std::io;

use super::document::{Config, Descriptor, Index, MAX_DOCUMENT, Parsed, media};
use super::error::{DocumentError, OciError};
use super::fetch::{Ask, Fetch};
use super::reference::{Repository, Version, parse_digest};
use crate::base::Digest;
use crate::codec::{Sha256, sha256};

/// Most pages of a list of referrers that are read.
const MOST_PAGES: usize = 16;

/// One repository of one registry.
#[derive(Clone, Copy)]
pub struct Registry<'a> {
    fetch: &'a dyn Fetch,
    repository: &'a Repository,
}

impl std::fmt::Debug for Registry<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("repository", self.repository).finish_non_exhaustive()
    }
}

/// A document that has the digest it is known by.
#[derive(Clone, Debug)]
pub struct Document {
    pub digest: Digest,
    /// As the header says; what the document says of itself comes first.
    pub content_type: Option<String>,
    /// The very bytes, which are JSON.
    pub text: String,
    pub parsed: Parsed,
}

impl<'a> Registry<'a> {
    /// Asks `fetch` for things of `repository`.
    pub fn new(fetch: &'a dyn Fetch, repository: &'a Repository) -> Self {
        Self { fetch, repository }
    }

    /// A manifest or an index.
    ///
    /// # Errors
    /// If there is none, it is no sound document, or another one than the digest says.
    pub async fn document(&self, version: &Version) -> Result<Document, OciError> {
        let what = what_is(version);
        let mut bytes = Vec::new();
        let answer = self.get(&self.manifests(version), media::ACCEPTED, &what, &mut collect(&mut bytes)).await;
        let answer = answer.map_err(|error| self.too_long(error, &bytes, &what))?;
        let digest = sha256(&bytes);
        let stated = answer.digest.as_deref().and_then(|text| parse_digest(text).ok());
        let want = match version {
            Version::Digest(want) => Some(*want),
            Version::Tag(_) => stated,
        };
        if let Some(want) = want.filter(|want| *want != digest) {
            return Err(self.forged(&what, want, digest));
        }
        let content_type = answer.content_type;
        let parsed = Parsed::parse(&bytes, content_type.as_deref()).map_err(self.unusable(&what))?;
        let text = String::from_utf8(bytes).map_err(|_| DocumentError::NotText).map_err(self.unusable(&what))?;
        Ok(Document { digest, content_type, text, parsed })
    }

    /// What a tag points at now; `None` if the registry answers without saying so.
    ///
    /// # Errors
    /// As [`Registry::document`].
    pub async fn head(&self, tag: &str) -> Result<Option<Digest>, OciError> {
        let version = Version::Tag(tag.to_owned());
        let path = self.manifests(&version);
        let ask = Ask { repository: self.repository.path(), path: &path, accept: media::ACCEPTED, head: true };
        let answer = self.fetch.ask(ask, &mut |_: &[u8]| Ok(())).await?;
        self.succeeded(answer.status, &what_is(&version))?;
        Ok(answer.digest.as_deref().and_then(|text| parse_digest(text).ok()))
    }

    /// What an image's config says.
    pub async fn config(&self, descriptor: &Descriptor) -> Result<Config, OciError> {
        let mut bytes = Vec::new();
        let what = "the config";
        let taken = self.blob(descriptor, what, &mut collect(&mut bytes)).await;
        taken.map_err(|error| self.too_long(error, &bytes, what))?;
        serde_json::from_slice(&bytes).map_err(DocumentError::from).map_err(self.unusable(what))
    }

    /// Hands the bytes of a blob to `take` as they arrive. They are sound only if this succeeds.
    ///
    /// # Errors
    /// If what was sent is not what the descriptor says, by length or by digest; at the latest one piece after
    /// its end.
    pub async fn blob(
        &self,
        descriptor: &Descriptor,
        what: &str,
        take: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<(), OciError> {
        let want = descriptor.sha256().map_err(self.unusable(what))?;
        let path = format!("/v2/{}/blobs/sha256:{want}", self.repository.path());
        let (mut hasher, mut len) = (Sha256::new(), 0u64);
        let mut checking = |piece: &[u8]| {
            len += piece.len() as u64;
            if len > descriptor.size {
                return Err(io::Error::other("more than was announced"));
            }
            hasher.update(piece);
            take(piece)
        };
        let got = self.get(&path, "", what, &mut checking).await;
        if len > descriptor.size {
            return Err(self.wrong_length(what, descriptor.size));
        }
        got?;
        if len != descriptor.size {
            return Err(self.wrong_length(what, descriptor.size));
        }
        let got = hasher.finish();
        if got != want { Err(self.forged(what, want, got)) } else { Ok(()) }
    }

    /// What has the manifest `digest` as its subject, by the interface for that, or else by the tag that stands
    /// in for it. Unchecked: what is listed may be about something else.
    pub async fn referrers(&self, digest: Digest) -> Result<Vec<Descriptor>, OciError> {
        let what = "the referrers";
        let mut path = format!("/v2/{}/referrers/sha256:{digest}", self.repository.path());
        let mut found = Vec::new();
        for page in 0..MOST_PAGES {
            let mut bytes = Vec::new();
            let answer = self.get(&path, media::INDEX, what, &mut collect(&mut bytes)).await;
            let answer = match answer {
                Ok(answer) => answer,
                // Registries say in many ways that they do not know the interface.
                Err(OciError::NotFound { .. }) if page == 0 => return self.referrers_by_tag(digest).await,
                Err(OciError::Failed { status: 400 | 405 | 406 | 501, .. }) if page == 0 => {
                    return self.referrers_by_tag(digest).await;
                }
                Err(error) => return Err(self.too_long(error, &bytes, what)),
            };
            match Parsed::parse(&bytes, answer.content_type.as_deref()) {
                Ok(Parsed::Index(Index { manifests })) => found.extend(manifests),
                // A page for people, by a registry that answers everything.
                Ok(Parsed::Manifest(_)) | Err(_) if page == 0 => return self.referrers_by_tag(digest).await,
                Ok(Parsed::Manifest(_)) => return Err(self.unusable(what)(DocumentError::Ambiguous)),
                Err(error) => return Err(self.unusable(what)(error)),
            }
            // Only within this repository: anything else is none of its business.
            let here = format!("/v2/{}/referrers/", self.repository.path());
            match answer.next.filter(|next| next.starts_with(&here)) {
                Some(next) => path = next,
                None => break,
            }
        }
        Ok(found)
    }

    async fn referrers_by_tag(&self, digest: Digest) -> Result<Vec<Descriptor>, OciError> {
        match self.document(&Version::Tag(format!("sha256-{digest}"))).await {
            Ok(Document { parsed: Parsed::Index(index), .. }) => Ok(index.manifests),
            Ok(_) | Err(OciError::NotFound { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn manifests(&self, version: &Version) -> String {
        format!("/v2/{}/manifests/{version}", self.repository.path())
    }

    async fn get(
        &self,
        path: &str,
        accept: &str,
        what: &str,
        take: &mut (dyn FnMut(&[u8]) -> io::Result<()> + Send),
    ) -> Result<super::fetch::Answer, OciError> {
        let ask = Ask { repository: self.repository.path(), path, accept, head: false };
        let answer = self.fetch.ask(ask, take).await?;
        self.succeeded(answer.status, what)?;
        Ok(answer)
    }

    fn succeeded(&self, status: u16, what: &str) -> Result<(), OciError> {
        let (registry, repository, what) = self.named(what);
        match status {
            200 => Ok(()),
            404 => Err(OciError::NotFound { registry, repository, what }),
            401 | 403 => Err(OciError::Refused { registry, repository, what, status }),
            _ => Err(OciError::Failed { registry, repository, what, status }),
        }
    }

    fn named(&self, what: &str) -> (String, String, String) {
        (self.fetch.describe(), self.repository.to_string(), what.to_owned())
    }

    fn unusable(&self, what: &str) -> impl Fn(DocumentError) -> OciError + use<> {
        let (_, repository, what) = self.named(what);
        move |cause| OciError::Document { repository: repository.clone(), what: what.clone(), cause }
    }

    fn forged(&self, what: &str, want: Digest, got: Digest) -> OciError {
        let (registry, repository, what) = self.named(what);
        OciError::Forged { registry, repository, what, want: Box::new(want), got: Box::new(got) }
    }

    fn wrong_length(&self, what: &str, size: u64) -> OciError {
        let (registry, repository, what) = self.named(what);
        OciError::Length { registry, repository, what, size }
    }

    /// `error`, unless it is ours: what came was longer than a document.
    fn too_long(&self, error: OciError, taken: &[u8], what: &str) -> OciError {
        if taken.len() > MAX_DOCUMENT { self.unusable(what)(DocumentError::TooLong) } else { error }
    }
}

/// Takes a document, and no more of it than one byte above what is allowed.
fn collect(bytes: &mut Vec<u8>) -> impl FnMut(&[u8]) -> io::Result<()> + Send + '_ {
    |piece| {
        let room = (MAX_DOCUMENT + 1).saturating_sub(bytes.len());
        bytes.extend_from_slice(&piece[..piece.len().min(room)]);
        if bytes.len() > MAX_DOCUMENT { Err(io::Error::other("a document of more than 4 MiB")) } else { Ok(()) }
    }
}

fn what_is(version: &Version) -> String {
    match version {
        Version::Tag(tag) => format!("the tag {tag:?}"),
        Version::Digest(digest) => format!("the manifest sha256:{digest}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::scripted::Scripted;
    use super::*;
    use crate::oci::Reference;

    const REPOSITORY: &str = "r.example/team/app";

    fn repository() -> Repository {
        REPOSITORY.parse::<Reference>().unwrap().repository().clone()
    }

    fn index(digests: &[Digest]) -> String {
        let entries: Vec<_> = digests.iter().map(|it| format!(r#"{{"digest": "sha256:{it}", "size": 1}}"#)).collect();
        format!(r#"{{"mediaType": "{}", "manifests": [{}]}}"#, media::INDEX, entries.join(","))
    }

    async fn document(script: &Scripted, version: Version) -> Result<Document, OciError> {
        Registry::new(script, &repository()).document(&version).await
    }

    #[tokio::test]
    async fn a_document_is_what_its_digest_says_or_nothing() {
        let text = index(&[]);
        let digest = sha256(text.as_bytes());
        let other = Digest([3; 32]);
        let script = Scripted::default();
        script.put(&format!("/v2/team/app/manifests/sha256:{digest}"), text.as_bytes());
        script.put(&format!("/v2/team/app/manifests/sha256:{other}"), text.as_bytes());
        script.put("/v2/team/app/manifests/1", text.as_bytes());
        script.put_as("/v2/team/app/manifests/lie", text.as_bytes(), &format!("sha256:{other}"));

        assert_eq!(document(&script, Version::Digest(digest)).await.unwrap().text, text);
        assert_eq!(document(&script, Version::Tag("1".into())).await.unwrap().digest, digest);
        for version in [Version::Digest(other), Version::Tag("lie".into())] {
            let error = document(&script, version).await.unwrap_err();
            assert!(
                matches!(&error, OciError::Forged { want, got, .. } if **want == other && **got == digest),
                "{error:?}"
            );
        }
        assert!(matches!(document(&script, Version::Tag("2".into())).await, Err(OciError::NotFound { .. })));
    }

    #[tokio::test]
    async fn statuses_and_sizes_are_told_apart() {
        let script = Scripted::default();
        for status in [401, 403, 500, 204] {
            script.fail(&format!("/v2/team/app/manifests/s{status}"), status);
        }
        script.put("/v2/team/app/manifests/long", &vec![b' '; MAX_DOCUMENT + 1]);
        let mut texts = Vec::new();
        for tag in ["s401", "s403", "s500", "s204", "long"] {
            texts.push(document(&script, Version::Tag(tag.into())).await.unwrap_err());
        }
        let [unknown, forbidden, failed, empty, long] = texts.try_into().unwrap();
        assert!(matches!(unknown, OciError::Refused { status: 401, .. }));
        assert!(forbidden.to_string().contains("check the credentials"), "{forbidden}");
        assert!(matches!(failed, OciError::Failed { status: 500, .. }));
        assert!(matches!(empty, OciError::Failed { status: 204, .. }), "no content is no document");
        assert!(matches!(long, OciError::Document { cause: DocumentError::TooLong, .. }), "{long:?}");
    }

    #[tokio::test]
    async fn blobs_are_checked_by_length_and_digest() {
        let (script, repository) = (Scripted::default(), repository());
        let registry = Registry::new(&script, &repository);
        let digest = sha256(b"content");
        let at = format!("/v2/team/app/blobs/sha256:{digest}");
        let descriptor = Descriptor { digest: format!("sha256:{digest}"), size: 7, ..Descriptor::default() };
        let mut outcomes = Vec::new();
        for sent in [&b"content"[..], b"conten", b"contentx", b"CONTENT"] {
            script.put(&at, sent);
            let mut got = Vec::new();
            let outcome = registry.blob(&descriptor, "a layer", &mut collect(&mut got)).await;
            assert!(got.len() <= 7);
            outcomes.push(outcome.map(|()| got));
        }
        let [right, short, long, wrong] = outcomes.try_into().unwrap();
        assert_eq!(right.unwrap(), b"content");
        assert!(matches!(short, Err(OciError::Length { size: 7, .. })));
        assert!(matches!(long, Err(OciError::Length { size: 7, .. })));
        assert!(matches!(wrong, Err(OciError::Forged { .. })));
    }

    #[tokio::test]
    async fn referrers_come_in_pages_or_by_the_tag_that_stands_in() {
        let (script, repository) = (Scripted::default(), repository());
        let registry = Registry::new(&script, &repository);
        let subject = Digest([1; 32]);
        let (first, second) = (Digest([2; 32]), Digest([3; 32]));
        let listed = |found: Vec<Descriptor>| found.iter().map(|it| it.sha256().unwrap()).collect::<Vec<_>>();
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), []);

        script.put(&format!("/v2/team/app/manifests/sha256-{subject}"), index(&[first]).as_bytes());
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), [first]);
        let api = format!("/v2/team/app/referrers/sha256:{subject}");
        script.fail(&api, 400);
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), [first]);
        script.put(&api, b"<html>welcome</html>");
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), [first]);

        let next = format!("{api}?page=2");
        script.put(&api, index(&[second]).as_bytes());
        script.put(&next, index(&[first]).as_bytes());
        script.link(&api, &next);
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), [second, first]);
        script.link(&api, "/v2/other/app/referrers/x");
        assert_eq!(listed(registry.referrers(subject).await.unwrap()), [second], "that is another repository");
        script.link(&api, &api);
        assert_eq!(registry.referrers(subject).await.unwrap().len(), MOST_PAGES, "a circle ends");
        script.fail(&api, 503);
        assert!(registry.referrers(subject).await.is_err(), "that is no answer");
    }
}
