use std::error::Error;
use std::fs;
use std::path::Path;

use rafsd::build::BuildError;
use rafsd::image::Image;

use crate::fixture::{Fixture, files_below, hot, text};
use crate::support::image::Mounted;
use crate::support::{skip, tree::Random, unable_to_mount};

/// An error with all its causes.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

/// An image of two layers, half of the lower dead.
fn layered(fixture: &Fixture) -> std::path::PathBuf {
    let noise = Random::new(9).noise(1 << 20);
    let lower = fixture.image("lower", &[("a", &noise), ("b", &text(2, 2 << 20))]);
    let upper = fixture.image("upper", &[(".wh.b", b""), ("c", &text(3, 1000))]);
    fixture.merge(&[&lower, &upper], "merged")
}

/// Flips a bit of the chunk with this number in the first blob of an image. Returns the blob's id.
fn flip(fixture: &Fixture, image: &Path, number: u32) -> String {
    let image = Image::open(image).unwrap();
    let mut records = image.chunk_records().iter();
    let record = records.find(|row| row.blob_index.get() == 0 && row.index.get() == number).unwrap();
    let id = image.devices()[0].blob.to_string();
    let path = fixture.path("all").join(&id);
    let mut bytes = fs::read(&path).unwrap();
    bytes[usize::try_from(record.compressed_offset.get() + 10).unwrap()] ^= 1;
    fs::write(&path, bytes).unwrap();
    id
}

#[test]
fn a_damaged_chunk_is_named_and_nothing_is_left_behind() {
    let fixture = Fixture::new();
    let image = layered(&fixture);
    let id = flip(&fixture, &image, 5);

    let out = fixture.path("out");
    let optimized = fixture.try_optimize(&image, &hot(&["/a"]), &out).unwrap_err();
    let compacted = fixture.try_compact(&image, &out, |_| {}).unwrap_err();

    for error in [optimized, compacted] {
        assert!(matches!(error, BuildError::Chunk(_)), "{error:?}");
        let text = chain(&error);
        assert!(text.starts_with(&format!("chunk 5 of blob {id} is damaged: ")), "{text}");
        assert_eq!(files_below(&out), Vec::<String>::new());
    }
    // What is not copied is not read.
    fixture.try_optimize(&image, &hot(&["/c"]), &out).unwrap();
}

#[test]
fn a_blob_that_was_cut_is_named_and_nothing_is_left_behind() {
    let fixture = Fixture::new();
    let image = layered(&fixture);
    let files = fixture.open(&image);
    let id = files.image().devices()[0].blob.to_string();
    fs::File::options().write(true).open(fixture.path("all").join(&id)).unwrap().set_len(1000).unwrap();
    let out = fixture.path("out");

    let existing = rafsd::build::Existing { name: &image, image: files.image(), chunks: &files };
    let list = hot(&["/a"]);
    let spec = rafsd::build::OptimizeSpec { existing, hot: &list, out_dir: &out, decrypt: false };
    let error = rafsd::build::optimize(&spec, &()).unwrap_err();

    assert!(chain(&error).contains(&id), "{}", chain(&error));
    assert_eq!(files_below(&out), Vec::<String>::new());
}

#[test]
fn a_full_disk_leaves_nothing_that_looks_finished() {
    if let Some(why) = unable_to_mount() {
        return skip("a_full_disk_leaves_nothing_that_looks_finished", why);
    }
    let fixture = Fixture::new();
    let image = layered(&fixture);
    let at = fixture.path("small");
    fs::create_dir(&at).unwrap();
    let _mounted = Mounted::small(&at).unwrap();

    let optimized = fixture.try_optimize(&image, &hot(&["/a"]), &at.join("hot")).unwrap_err();
    let compacted = fixture.try_compact(&image, &at.join("compact"), |spec| spec.min_used = 100).unwrap_err();

    for error in [optimized, compacted] {
        let BuildError::Write { source, .. } = &error else { panic!("{error:?}") };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        assert_eq!(files_below(&at), Vec::<String>::new());
    }
}
