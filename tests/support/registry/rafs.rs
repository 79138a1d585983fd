//! Images in RAFS form, as nydusify puts them into a registry.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use serde_json::{Value, json};

use super::content::{Content, MANIFEST};
use crate::support::nydusform;

impl Content {
    /// Puts the image in `dir`, as `rafsd build` leaves it, into a repository. Whether the manifest names the blobs,
    /// which are there either way, is said.
    pub fn image(&mut self, repository: &str, tag: &str, dir: &Path, with_blobs: bool) {
        let blobs = fs::read_dir(dir.join("blobs")).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap());
        let mut layers: Vec<_> = blobs.map(|blob| nydusform::blob_layer(self.described(repository, blob))).collect();
        if !with_blobs {
            // Something else in their place: without any it would be an image that is kept elsewhere.
            layers = vec![nydusform::blob_layer(self.described(repository, "not a blob of the image"))];
        }
        let bootstrap = nydusform::bootstrap_tar(&fs::read(dir.join("bootstrap")).unwrap()).unwrap();
        layers.push(nydusform::bootstrap_layer(self.described(repository, bootstrap)));
        let config = self.described(repository, nydusform::config());
        self.document(repository, tag, MANIFEST, nydusform::manifest(config, &layers).to_string());
    }

    /// Puts a blob there; gives its descriptor without a media type.
    fn described(&mut self, repository: &str, bytes: impl Into<Bytes>) -> Value {
        let bytes = bytes.into();
        let size = bytes.len();
        json!({"digest": self.blob(repository, bytes), "size": size})
    }
}
