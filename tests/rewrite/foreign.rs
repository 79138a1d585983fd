//! Images of the reference builder, which stores chunks in ways that a copy cannot keep.

use std::fs;
use std::path::{Path, PathBuf};

use rafsd::build::{self, BuildError, CompactSpec, Existing, Fate, HotPath, OptimizeReport, OptimizeSpec};

use crate::fixture::{Fixture, files_below, hot, shown};
use crate::support::interop::folder;

/// Puts the blobs of an image where all are and returns its bootstrap.
fn adopt(fixture: &Fixture, image: &Path) -> PathBuf {
    for blob in fs::read_dir(image.join("blobs")).unwrap() {
        let blob = blob.unwrap();
        fs::copy(blob.path(), fixture.path("all").join(blob.file_name())).unwrap();
    }
    image.join("bootstrap")
}

fn optimize(
    fixture: &Fixture,
    bootstrap: &Path,
    hot: &[HotPath],
    out: &Path,
    decrypt: bool,
) -> Result<OptimizeReport, BuildError> {
    let files = fixture.open(bootstrap);
    let existing = Existing { name: bootstrap, image: files.image(), chunks: &files };
    build::optimize(&OptimizeSpec { existing, hot, out_dir: out, decrypt }, &())
}

const IMAGES: [&str; 9] = [
    "v6-none",
    "v6-zstd",
    "v6-lz4_block",
    "v6-sha256-1m",
    "v6-prefetch",
    "v6-tar",
    "v6-merged",
    "v6-batch",
    "v6-encrypt",
];

#[test]
fn foreign_images_show_the_same_with_a_hot_blob() {
    let Some(folder) = folder("foreign_images_show_the_same_with_a_hot_blob") else { return };
    for name in IMAGES {
        let fixture = Fixture::new();
        let image = adopt(&fixture, &folder.join(name));
        let before = shown(&fixture.open(&image));
        let out = fixture.path("out");

        let report = optimize(&fixture, &image, &hot(&["/"]), &out, true).unwrap_or_else(|e| panic!("{name}: {e}"));

        fixture.collect(&out);
        let files = fixture.open(&out.join("bootstrap"));
        assert!(shown(&files) == before, "{name}");
        let copied = !matches!(name, "v6-batch" | "v6-encrypt");
        assert_eq!(report.encoded_chunks == 0, copied, "{name}: {report:?}");
        assert_eq!(files.image().devices().len(), 1, "{name}");
        assert!(before == shown(&fixture.open(&image)), "{name}: the image itself is not touched");
    }
}

#[test]
fn foreign_images_show_the_same_when_they_are_compacted() {
    let Some(folder) = folder("foreign_images_show_the_same_when_they_are_compacted") else { return };
    for name in IMAGES {
        let fixture = Fixture::new();
        let image = adopt(&fixture, &folder.join(name));
        let before = shown(&fixture.open(&image));

        let (bootstrap, report) = fixture.compact(&image, "out", |spec: &mut CompactSpec<'_>| {
            (spec.min_used, spec.decrypt) = (100, true);
        });

        assert!(shown(&fixture.open(&bootstrap)) == before, "{name}: {report:?}");
    }
}

#[test]
fn encrypted_chunks_are_not_stored_plain_unless_allowed() {
    let Some(folder) = folder("encrypted_chunks_are_not_stored_plain_unless_allowed") else { return };
    let fixture = Fixture::new();
    let image = adopt(&fixture, &folder.join("v6-encrypt"));
    let out = fixture.path("out");

    let error = optimize(&fixture, &image, &hot(&["/"]), &out, false).unwrap_err();
    assert!(matches!(error, BuildError::WouldDecrypt(_)), "{error:?}");
    assert_eq!(files_below(&out), Vec::<String>::new());

    let (_, report) = fixture.compact(&image, "compacted", |spec| spec.min_used = 100);
    assert!(report.nothing_to_do && report.blobs.iter().all(|blob| blob.fate == Fate::KeptEncrypted), "{report:?}");
}
