//! Which kind of image a manifest describes.

use std::collections::BTreeSet;

use super::document::{Descriptor, Manifest, annotation, media};
use crate::base::Digest;

/// What a manifest is to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    Rafs(Box<Image>),
    Foreign(Foreign),
}

/// A RAFS image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub layout: Layout,
    /// The layer with the bootstrap in it.
    pub bootstrap: Descriptor,
    /// Version of the bootstrap as an annotation says it: `5`, `6`, or `7`, which is no version of ours.
    pub version: Option<String>,
    /// The layers with data or tables, in order.
    pub blobs: Vec<Descriptor>,
    /// Everything whose bytes the manifest names: its layers, and the foreign layers that tables are about.
    pub named: BTreeSet<Digest>,
}

/// Where a RAFS image has its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// In layers of its own.
    Native,
    /// Somewhere else: the registry has nothing but the bootstrap.
    External,
    /// In the layers of the ordinary image that it was made for; its own layers have tables only.
    Zran,
}

/// An image, or something else, that has no bootstrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    Ordinary,
    Stargz,
    ZstdChunked,
    OverlayBd,
    /// No image at all.
    Artifact,
}

/// What a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Blob,
    /// Tables of a foreign layer.
    Tables,
    Bootstrap,
    /// A layer of an ordinary image.
    Layer,
}

impl Role {
    /// Of the layer number `at` of a manifest that is `shape`.
    pub fn of(manifest: &Manifest, at: usize, shape: &Shape) -> Self {
        let layer = &manifest.layers[at];
        match shape {
            Shape::Foreign(_) => Self::Layer,
            Shape::Rafs(_) if at + 1 == manifest.layers.len() => Self::Bootstrap,
            Shape::Rafs(_) if layer.annotations.contains_key(annotation::REF) => Self::Tables,
            Shape::Rafs(_) => Self::Blob,
        }
    }

    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blob => "blob",
            Self::Tables => "tables",
            Self::Bootstrap => "bootstrap",
            Self::Layer => "layer",
        }
    }
}

impl Layout {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::External => "external",
            Self::Zran => "zran",
        }
    }
}

impl Foreign {
    /// What it is, with an article.
    pub fn what(self) -> &'static str {
        match self {
            Self::Ordinary => "an ordinary OCI image",
            Self::Stargz => "an eStargz image",
            Self::ZstdChunked => "a zstd:chunked image",
            Self::OverlayBd => "an OverlayBD image",
            Self::Artifact => "an artifact",
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Artifact => "nothing in it can be mounted",
            Self::Ordinary | Self::Stargz | Self::ZstdChunked | Self::OverlayBd => {
                "convert it first, for example with `nydusify convert --source REF --target REF-nydus`"
            }
        }
    }
}

/// Tells what `manifest` is. `marked` says that whoever pointed at it called it a Nydus image.
///
/// The bootstrap is the last layer. Layers may be fewer or more than those of the image it was made of, and
/// unknown annotations mean nothing.
pub fn classify(manifest: &Manifest, marked: bool) -> Shape {
    let config = manifest.config.media_type.as_str();
    let is_said = |kind: &str| manifest.artifact_type.as_deref() == Some(kind) || config == kind;
    let Some((last, others)) = manifest.layers.split_last() else { return Shape::Foreign(foreign(manifest)) };
    let marked = marked || is_said(media::NYDUS_MANIFEST) || is_said(media::NYDUS_CONFIG);
    let is_blob = |layer: &Descriptor| layer.is(annotation::BLOB) || layer.media_type == media::NYDUS_BLOB;
    if !last.is(annotation::BOOTSTRAP) && (!marked || is_blob(last)) {
        return Shape::Foreign(foreign(manifest));
    }
    let refs = || others.iter().filter_map(|layer| layer.annotations.get(annotation::REF));
    let layout = if others.is_empty() {
        Layout::External
    } else if refs().next().is_some() {
        Layout::Zran
    } else {
        Layout::Native
    };
    // One that cannot be checked names nothing.
    let layers = others.iter().filter_map(|layer| layer.sha256().ok());
    let foreign = refs().filter_map(|digest| super::reference::parse_digest(digest).ok());
    let version = last.annotations.get(annotation::FS_VERSION);
    Shape::Rafs(Box::new(Image {
        layout,
        bootstrap: last.clone(),
        version: version.or_else(|| manifest.annotations.get(annotation::FS_VERSION)).cloned(),
        blobs: others.to_vec(),
        named: layers.chain(foreign).collect(),
    }))
}

fn foreign(manifest: &Manifest) -> Foreign {
    let has = |annotation: &str| manifest.layers.iter().any(|layer| layer.annotations.contains_key(annotation));
    let config = manifest.config.media_type.as_str();
    if manifest.artifact_type.is_some() || !["", media::CONFIG, media::DOCKER_CONFIG].contains(&config) {
        Foreign::Artifact
    } else if has(annotation::STARGZ) {
        Foreign::Stargz
    } else if has(annotation::ZSTD_CHUNKED) {
        Foreign::ZstdChunked
    } else if has(annotation::OVERLAYBD) {
        Foreign::OverlayBd
    } else {
        Foreign::Ordinary
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(seed: u8) -> String {
        format!("sha256:{}", Digest([seed; 32]))
    }

    fn layer(seed: u8, media_type: &str, annotations: &[(&str, &str)]) -> Descriptor {
        let annotations = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Descriptor {
            media_type: media_type.to_owned(),
            digest: digest(seed),
            size: 1,
            annotations,
            ..Descriptor::default()
        }
    }

    const TAR: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

    fn manifest(config: &str, layers: Vec<Descriptor>) -> Manifest {
        Manifest { config: layer(0, config, &[]), layers, ..Manifest::default() }
    }

    fn blob(seed: u8) -> Descriptor {
        layer(seed, media::NYDUS_BLOB, &[(annotation::BLOB, "true")])
    }

    fn bootstrap() -> Descriptor {
        layer(9, TAR, &[(annotation::BOOTSTRAP, "true"), (annotation::FS_VERSION, "6")])
    }

    fn image(shape: Shape) -> Image {
        match shape {
            Shape::Rafs(image) => *image,
            Shape::Foreign(foreign) => panic!("{foreign:?}"),
        }
    }

    #[test]
    fn the_shapes_are_told_by_their_layers() {
        let native = image(classify(&manifest(media::CONFIG, vec![blob(1), blob(2), bootstrap()]), false));
        assert_eq!((native.layout, native.version.as_deref()), (Layout::Native, Some("6")));
        assert_eq!(native.named, BTreeSet::from([Digest([1; 32]), Digest([2; 32])]));

        let external = image(classify(&manifest(media::DOCKER_CONFIG, vec![bootstrap()]), false));
        assert_eq!((external.layout, external.named.len()), (Layout::External, 0));

        let original = digest(7);
        let tables = layer(1, media::NYDUS_BLOB, &[(annotation::BLOB, "true"), (annotation::REF, &original)]);
        let zran = manifest(media::CONFIG, vec![tables, bootstrap()]);
        let shape = classify(&zran, false);
        assert_eq!([0, 1].map(|at| Role::of(&zran, at, &shape)), [Role::Tables, Role::Bootstrap]);
        let zran = image(shape);
        assert_eq!(zran.layout, Layout::Zran);
        assert_eq!(zran.named, BTreeSet::from([Digest([1; 32]), Digest([7; 32])]));
    }

    #[test]
    fn any_of_the_signals_will_do_and_the_last_layer_decides() {
        let plain = || vec![blob(1), layer(9, TAR, &[])];
        assert!(matches!(classify(&manifest(media::CONFIG, plain()), true), Shape::Rafs(_)));
        assert!(matches!(classify(&manifest(media::NYDUS_CONFIG, plain()), false), Shape::Rafs(_)));
        let artifact = Manifest {
            artifact_type: Some(media::NYDUS_MANIFEST.to_owned()),
            ..manifest("application/vnd.oci.empty.v1+json", plain())
        };
        assert!(matches!(classify(&artifact, false), Shape::Rafs(_)));
        assert_eq!(classify(&manifest(media::CONFIG, plain()), false), Shape::Foreign(Foreign::Ordinary));
        let first = manifest(media::CONFIG, vec![bootstrap(), blob(1)]);
        assert_eq!(classify(&first, true), Shape::Foreign(Foreign::Ordinary), "a blob is no bootstrap");
        let unsure = layer(9, TAR, &[(annotation::BOOTSTRAP, "false")]);
        assert_eq!(classify(&manifest(media::CONFIG, vec![unsure]), false), Shape::Foreign(Foreign::Ordinary));
    }

    #[test]
    fn other_kinds_are_called_by_their_name() {
        for (annotations, kind) in [
            (&[][..], Foreign::Ordinary),
            (&[(annotation::STARGZ, "x")], Foreign::Stargz),
            (&[(annotation::ZSTD_CHUNKED, "x")], Foreign::ZstdChunked),
            (&[(annotation::OVERLAYBD, "x")], Foreign::OverlayBd),
        ] {
            let shape = classify(&manifest(media::CONFIG, vec![layer(1, TAR, annotations)]), false);
            assert_eq!(shape, Shape::Foreign(kind));
        }
        let chart = manifest("application/vnd.cncf.helm.config.v1+json", vec![layer(1, TAR, &[])]);
        assert_eq!(classify(&chart, false), Shape::Foreign(Foreign::Artifact));
        assert_eq!(classify(&manifest(media::CONFIG, vec![]), true), Shape::Foreign(Foreign::Ordinary));
    }
}
