//! Images in registries in the form in which nydusify puts them there: the documents and the layer of the bootstrap.
//! Descriptors come from whoever has put the bytes somewhere, and have a digest and a size.

use std::io::{self, Write};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

/// The media type of manifests.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The layer that a blob of the image is.
pub fn blob_layer(mut descriptor: Value) -> Value {
    descriptor["mediaType"] = "application/vnd.oci.image.layer.nydus.blob.v1".into();
    descriptor["annotations"] = json!({"containerd.io/snapshot/nydus-blob": "true"});
    descriptor
}

/// The layer that holds the bootstrap.
pub fn bootstrap_layer(descriptor: Value) -> Value {
    let mut layer = ordinary_layer(descriptor);
    layer["annotations"] = json!({
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "6",
    });
    layer
}

/// A layer as docker pushes it.
pub fn ordinary_layer(mut descriptor: Value) -> Value {
    descriptor["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into();
    descriptor
}

/// The bytes of [`bootstrap_layer`].
pub fn bootstrap_tar(bootstrap: &[u8]) -> io::Result<Vec<u8>> {
    let mut builder = Builder::new(Vec::new());
    let mut add = |path: &str, kind, content: &[u8]| {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        builder.append_data(&mut header, path, content)
    };
    add("image/", EntryType::Directory, b"")?;
    add("image/image.boot", EntryType::Regular, bootstrap)?;
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(&builder.into_inner()?)?;
    encoder.finish()
}

/// The text of a config.
pub fn config() -> String {
    json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}).to_string()
}

/// A manifest of layers, over a config with this descriptor.
pub fn manifest(mut config: Value, layers: &[Value]) -> Value {
    config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers})
}
