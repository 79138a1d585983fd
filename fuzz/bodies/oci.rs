//! What a registry sends, and what people call an image in one: names, documents, layers with a bootstrap.
//!
//! The first byte of an input says which.

use std::collections::BTreeSet;

use rafsd::oci::document::Parsed;
use rafsd::oci::{Reference, Shape, bootstrap, classify};

/// What an input may be.
pub const NAME: u8 = 0;
/// An index or a manifest.
pub const DOCUMENT: u8 = 1;
/// A layer that holds a bootstrap.
pub const LAYER: u8 = 2;

pub fn run(input: &[u8]) {
    read(input);
}

/// Whether `input` is what its first byte says.
pub fn read(input: &[u8]) -> bool {
    let Some((kind, bytes)) = input.split_first() else { return false };
    match kind % 3 {
        NAME => str::from_utf8(bytes).is_ok_and(is_name),
        DOCUMENT => is_document(bytes),
        _ => bootstrap::unpack(bytes).is_ok(),
    }
}

fn is_name(text: &str) -> bool {
    let Ok(reference) = text.parse::<Reference>() else { return false };
    let whole = reference.to_string();
    assert_eq!(whole.parse::<Reference>().map(|again| again.to_string()), Ok(whole), "a whole name is its own");
    let path = reference.repository().path();
    assert!(!path.contains("..") && !path.contains(['?', '#', '%', '@', ' ']), "{path} would be another address");
    true
}

fn is_document(bytes: &[u8]) -> bool {
    let Ok(Parsed::Manifest(manifest)) = Parsed::parse(bytes, None) else {
        return Parsed::parse(bytes, None).is_ok();
    };
    for marked in [false, true] {
        let Shape::Rafs(image) = classify(&manifest, marked) else { continue };
        let layers: BTreeSet<_> = manifest.layers.iter().filter_map(|layer| layer.sha256().ok()).collect();
        assert_eq!(manifest.layers.last(), Some(&image.bootstrap), "the last layer");
        assert!(image.blobs.len() + 1 == manifest.layers.len());
        assert!(image.blobs.iter().filter_map(|blob| blob.sha256().ok()).all(|digest| layers.contains(&digest)));
    }
    true
}

/// The input for these bytes.
pub fn pack(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&[kind], bytes].concat()
}
