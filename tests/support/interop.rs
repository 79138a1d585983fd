//! Images made by Nydus's own builder. They are not part of the project: the folder is `RAFSD_INTEROP`,
//! or `../shared/interop` beside the checkout.

use std::path::{Path, PathBuf};

/// Images with blobs of their own that can be served: one for each compressor, digest and source, with
/// several blobs, with a dictionary, batched, encrypted, and two whose bootstrap lies in the blob. Those
/// of version 5 as well: [`V5`].
pub const SERVED: [&str; 16] = [
    "v6-none",
    "v6-zstd",
    "v6-lz4_block",
    "v6-sha256-1m",
    "v6-prefetch",
    "v6-tar",
    "v6-merged",
    "v6-dict",
    "v6-batch",
    "v6-encrypt",
    "v6-tar-inline",
    "v6-tar-toc",
    "v5-none",
    "v5-lz4_block",
    "v5-zstd",
    "v5-aligned-sha256",
];

/// Images of RAFS v5: one for each compressor, and one of aligned chunks.
pub const V5: [&str; 4] = ["v5-none", "v5-lz4_block", "v5-zstd", "v5-aligned-sha256"];

/// The folder, if it is there; else says aloud that `test` proves nothing.
pub fn folder(test: &str) -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/interop");
    let folder = std::env::var_os("RAFSD_INTEROP").map_or(default, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    super::skip(test, &format!("no images of other builders at {}", folder.display()));
    None
}
