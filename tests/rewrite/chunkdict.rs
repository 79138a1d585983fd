use std::path::{Path, PathBuf};

use rafsd::build::{self, BuildError, Compression, DictionaryReport, DictionarySpec};
use rafsd::image::Image;

use crate::fixture::{Fixture, assert_sound, content, files_below, inode, layer, places, shown, text};

fn dictionary(
    fixture: &Fixture,
    images: &[&Path],
    min_images: usize,
    max_chunks: Option<usize>,
) -> Result<(PathBuf, DictionaryReport), BuildError> {
    let images: Vec<_> = images.iter().map(|path| layer(path)).collect();
    let out = fixture.path("dict.boot");
    let spec = DictionarySpec { images: &images, out: out.clone(), min_images, max_chunks };
    build::dictionary(&spec, &()).map(|report| (out, report))
}

/// Three images: one file is in all, one in two.
fn three(fixture: &Fixture) -> [PathBuf; 3] {
    let (all, two) = (text(1, 3 << 16), text(2, 2 << 16));
    [
        fixture.image("a", &[("all", &all), ("a", &text(3, 1000))]),
        fixture.image("b", &[("x/all", &all), ("x/two", &two), ("twice", &text(4, 500)), ("twice2", &text(4, 500))]),
        fixture.image("c", &[("all", &all), ("two", &two), ("c", &text(5, 1000))]),
    ]
}

#[test]
fn what_enough_images_share_is_in_the_dictionary() {
    let fixture = Fixture::new();
    let [a, b, c] = three(&fixture);
    for (min, chunks, images_bytes) in [(1, 8, 9 + 4), (2, 5, 9 + 4), (3, 3, 9)] {
        let (_, report) = dictionary(&fixture, &[&a, &b, &c], min, None).unwrap();
        assert_eq!((report.images, report.distinct_chunks, report.chunks), (3, 8, chunks), "{min}");
        assert_eq!(report.shared_plain_bytes >> 16, images_bytes, "{min}");
    }
    assert_eq!(dictionary(&fixture, &[&a, &b, &c], 2, Some(3)).unwrap().1.chunks, 3);
    let error = dictionary(&fixture, &[&a, &b, &c], 4, None).unwrap_err();
    assert!(matches!(error, BuildError::NothingShared { images: 4 }), "{error:?}");
}

#[test]
fn the_dictionary_is_an_image_whose_files_are_chunks() {
    let fixture = Fixture::new();
    let [a, b, c] = three(&fixture);

    let (path, report) = dictionary(&fixture, &[&a, &b, &c], 2, None).unwrap();

    assert_sound(&path);
    let files = fixture.open(&path);
    let records: Vec<_> = files.image().chunk_records().to_vec();
    assert_eq!((records.len(), report.blobs.len()), (5, 2));
    for record in records {
        let digest = rafsd::base::Digest(record.digest).to_string();
        let bytes = content(&files, &inode(&files, &format!("chunks/{}/{digest}", &digest[..2])));
        assert_eq!(rafsd::codec::blake3(&bytes).to_string(), digest);
    }
    let rows = |path: &Path| -> Vec<_> {
        Image::open(path)
            .unwrap()
            .devices()
            .iter()
            .map(|device| (device.blob.clone(), device.entry.ci_offset))
            .collect()
    };
    let originals = [rows(&a), rows(&b)].concat();
    assert!(rows(&path).iter().all(|row| originals.contains(row)), "rows are those of the images");
}

#[test]
fn a_build_with_the_dictionary_stores_nothing_that_is_in_it() {
    let fixture = Fixture::new();
    let [a, b, c] = three(&fixture);
    let (path, _) = dictionary(&fixture, &[&a, &b, &c], 2, None).unwrap();
    let own = text(6, 1000);
    let source = fixture.source("new", &[("all", &text(1, 3 << 16)), ("two", &text(2, 2 << 16)), ("own", &own)]);
    let (plain, _) = fixture.build(&source, |_| {});
    let want = shown(&fixture.open(&plain));

    let (image, report) = fixture.build(&source, |spec| spec.base.dictionary = Some(layer(&path)));

    assert_eq!((report.blobs[0].chunks, report.deduplicated_bytes), (1, 5 << 16));
    let files = fixture.open(&image);
    assert_eq!(shown(&files), want);
    let first = Image::open(&a).unwrap().devices()[0].blob.to_string();
    assert!(places(&files, "all").iter().all(|(blob, _)| *blob == first), "the first image's blob is preferred");
}

#[test]
fn the_same_images_give_the_same_dictionary() {
    let fixture = Fixture::new();
    let [a, b, c] = three(&fixture);
    let mut made = (0..3).map(|_| {
        let (path, report) = dictionary(&fixture, &[&a, &b, &c], 2, Some(4)).unwrap();
        (std::fs::read(path).unwrap(), report)
    });
    let first = made.next().unwrap();
    assert!(made.all(|again| again == first));
}

#[test]
fn images_that_do_not_fit_together_are_refused_by_name() {
    let fixture = Fixture::new();
    let a = fixture.image("a", &[("x", &text(1, 100_000))]);
    let (b, _) = fixture.build(&fixture.source("b", &[("x", &text(1, 100_000))]), |spec| spec.chunk_size = 1 << 20);

    let error = dictionary(&fixture, &[&a, &b], 1, None).unwrap_err();

    assert!(matches!(&error, BuildError::Image { image, .. } if *image == b), "{error:?}");
    assert_eq!(files_below(&fixture.path("dict.boot")), Vec::<String>::new());
    assert!(!fixture.path("dict.boot").exists());
    // Compression does not matter: a chunk is what its plain bytes are.
    let source = fixture.source("c", &[("x", &text(1, 100_000))]);
    let (c, _) = fixture.build(&source, |spec| spec.compression = Compression::Lz4);
    assert_eq!(dictionary(&fixture, &[&a, &c], 2, None).unwrap().1.chunks, 2);
}
