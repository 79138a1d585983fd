//! Which image is meant, as JSON.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::PrefetchOrder;
use crate::oci::{InvalidPlatform, InvalidReference, Platform, Reference, Repository};

/// Where an image is and how its blobs are reached.
///
/// Either a bootstrap in a file and where its blobs are, or an image in a registry, which has its blobs
/// as well unless it is said where else they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Bootstrap file, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap: Option<PathBuf>,
    /// Image in a registry: `[docker://]HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// `OS/ARCHITECTURE` or `OS/ARCHITECTURE/VARIANT` where the reference leaves a choice; that of this host if not
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Take the image that the reference led to the last time, and ask the registry nothing about it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub offline: bool,
    /// Where the blobs are: a directory, a base URL, or `docker://HOST/REPOSITORY`; or a list of such places, of
    /// which the first is asked first.
    #[serde(default, skip_serializing_if = "Blobs::is_empty")]
    pub blobs: Blobs,
    /// PEM file with further certificate authorities for `https` sources.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// What to fetch before anybody asks, behind all readers.
    #[serde(default)]
    pub prefetch: PrefetchOrder,
}

/// Places of blobs, the first of which is asked first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(from = "Spelled", into = "Spelled")]
pub struct Blobs(Vec<String>);

/// The ways to write [`Blobs`].
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(untagged)]
enum Spelled {
    One(String),
    Many(Vec<String>),
}

impl From<Spelled> for Blobs {
    fn from(spelled: Spelled) -> Self {
        match spelled {
            Spelled::One(place) => Self(vec![place]),
            Spelled::Many(places) => Self(places),
        }
    }
}

impl From<Blobs> for Spelled {
    fn from(Blobs(mut places): Blobs) -> Self {
        // As every release reads it.
        if places.len() == 1 { Self::One(places.remove(0)) } else { Self::Many(places) }
    }
}

impl From<String> for Blobs {
    fn from(place: String) -> Self {
        Self(vec![place])
    }
}

impl From<&str> for Blobs {
    fn from(place: &str) -> Self {
        Self(vec![place.to_owned()])
    }
}

impl From<Vec<String>> for Blobs {
    fn from(places: Vec<String>) -> Self {
        Self(places)
    }
}

impl Blobs {
    /// The places.
    pub fn places(&self) -> &[String] {
        &self.0
    }

    /// Whether nobody said where they are.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Where an image is, once it is clear that it is said in one way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// A bootstrap in this file.
    File(PathBuf),
    /// An image in a registry.
    Registry(Reference),
}

/// Why a spec names no image.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpecError {
    #[error("an image is named either by its bootstrap or by a reference to a registry")]
    OneOfTwo,
    #[error("it must be said where the blobs are")]
    NoBlobs,
    #[error("a platform and offline are about images in registries")]
    OnlyRegistry,
    #[error("{} is not an absolute path", .0.display())]
    Relative(PathBuf),
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    #[error(transparent)]
    Platform(#[from] InvalidPlatform),
}

impl ImageSpec {
    /// Where the image is.
    ///
    /// # Errors
    /// It is said in no way or in two, or in one that means something else to the daemon than to who sent it.
    pub fn whereabouts(&self) -> Result<Whereabouts, SpecError> {
        let relative = [&self.bootstrap, &self.ca].into_iter().flatten().find(|path| !path.is_absolute());
        if let Some(path) = relative {
            return Err(SpecError::Relative(path.clone()));
        }
        match (&self.bootstrap, &self.reference) {
            (Some(_), None) if self.platform.is_some() || self.offline => Err(SpecError::OnlyRegistry),
            (Some(_), None) if self.blobs.is_empty() => Err(SpecError::NoBlobs),
            (Some(path), None) => Ok(Whereabouts::File(path.clone())),
            (None, Some(text)) => Ok(Whereabouts::Registry(text.parse()?)),
            _ => Err(SpecError::OneOfTwo),
        }
    }

    /// The platform that was asked for.
    ///
    /// # Errors
    /// It is none.
    pub fn wanted_platform(&self) -> Result<Option<Platform>, SpecError> {
        Ok(self.platform.as_deref().map(str::parse).transpose()?)
    }

    /// Where the blobs are to be had, in order: where it is said, or else in the repository of the image.
    pub fn places(&self) -> Vec<String> {
        let of = |repository: &Repository| format!("docker://{repository}");
        match self.whereabouts() {
            Ok(Whereabouts::Registry(reference)) if self.blobs.is_empty() => vec![of(reference.repository())],
            _ => self.blobs.0.clone(),
        }
    }

    /// Whether an older release would misread it.
    pub fn is_new(&self) -> bool {
        self.reference.is_some() || self.blobs.0.len() != 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ImageSpec {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn an_image_is_named_in_one_way() {
        let file = spec(r#"{"bootstrap": "/b", "blobs": "/blobs"}"#);
        assert_eq!(file.whereabouts().unwrap(), Whereabouts::File("/b".into()));
        assert_eq!(file.places(), ["/blobs"]);
        let image = spec(r#"{"reference": "docker://r.example/a/b:1"}"#);
        assert_eq!(image.whereabouts().unwrap(), Whereabouts::Registry("r.example/a/b:1".parse().unwrap()));
        assert_eq!(image.places(), ["docker://r.example/a/b"]);
        let elsewhere = spec(r#"{"reference": "r.example/a", "blobs": ["/one", "http://two"]}"#);
        assert_eq!(elsewhere.places(), ["/one", "http://two"]);

        for (text, why) in [
            (r#"{}"#, "either by"),
            (r#"{"bootstrap": "/b", "reference": "r.example/a", "blobs": "/c"}"#, "either by"),
            (r#"{"bootstrap": "/b"}"#, "where the blobs are"),
            (r#"{"bootstrap": "b", "blobs": "/c"}"#, "absolute"),
            (r#"{"bootstrap": "/b", "blobs": "/c", "ca": "x.pem"}"#, "absolute"),
            (r#"{"bootstrap": "/b", "blobs": "/c", "offline": true}"#, "in registries"),
            (r#"{"reference": "r.example/A"}"#, "lower-case"),
        ] {
            let error = spec(text).whereabouts().expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(spec(r#"{"reference": "r.example/a", "platform": "amd64"}"#).wanted_platform().is_err());
    }

    #[test]
    fn what_older_releases_know_is_written_as_they_read_it() {
        let file = spec(r#"{"bootstrap": "/b", "blobs": ["/blobs"], "prefetch": "none"}"#);
        assert_eq!(
            serde_json::to_string(&file).unwrap(),
            r#"{"bootstrap":"/b","blobs":"/blobs","ca":null,"prefetch":"none"}"#
        );
        assert!(!file.is_new() && spec(r#"{"reference": "r.example/a"}"#).is_new());
        assert!(spec(r#"{"bootstrap": "/b", "blobs": ["/one", "/two"]}"#).is_new());
        assert!(serde_json::from_str::<ImageSpec>(r#"{"bootstrap": "/b", "blobs": 7}"#).is_err());
    }
}
