//! Images in RAFS form, as nydusify puts them into a registry.

use std::fs;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use super::content::{Content, MANIFEST, digest};

impl Content {
    /// Puts the image in `dir`, as `rafsd build` leaves it, into a repository. Whether the manifest names the blobs,
    /// which are there either way, is said.
    pub fn image(&mut self, repository: &str, tag: &str, dir: &Path, with_blobs: bool) {
        let mut layers = Vec::new();
        for entry in fs::read_dir(dir.join("blobs")).unwrap() {
            let bytes = fs::read(entry.unwrap().path()).unwrap();
            let size = bytes.len();
            layers.push(json!({
                "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1",
                "digest": self.blob(repository, bytes),
                "size": size,
                "annotations": { "containerd.io/snapshot/nydus-blob": "true" },
            }));
        }
        if !with_blobs {
            // Something else in their place: without any it would be an image that is kept elsewhere.
            let other = "not a blob of the image";
            layers = vec![json!({
                "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1",
                "digest": self.blob(repository, other),
                "size": other.len(),
                "annotations": { "containerd.io/snapshot/nydus-blob": "true" },
            })];
        }
        let layer = bootstrap_layer(&fs::read(dir.join("bootstrap")).unwrap());
        let size = layer.len();
        layers.push(json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": self.blob(repository, layer),
            "size": size,
            "annotations": {
                "containerd.io/snapshot/nydus-bootstrap": "true",
                "containerd.io/snapshot/nydus-fs-version": "6",
            },
        }));
        let config =
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}).to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(config.as_bytes()),
                "size": config.len(),
            },
            "layers": layers,
        });
        self.blob(repository, config);
        self.document(repository, tag, MANIFEST, manifest.to_string());
    }
}

fn bootstrap_layer(bootstrap: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
    let mut header = tar::Header::new_ustar();
    header.set_size(bootstrap.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, "image/image.boot", bootstrap).unwrap();
    tar.into_inner().unwrap().finish().unwrap()
}
