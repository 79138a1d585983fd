use std::fs;

use rafsd::build::{Compression, Fate};
use rafsd::image::Image;

use crate::fixture::{Fixture, layer, shown, text};
use crate::support::{building::output, listing, skip, unable_to_mount};

fn fates(report: &rafsd::build::CompactReport) -> Vec<Fate> {
    report.blobs.iter().map(|blob| blob.fate).collect()
}

#[test]
fn dead_chunks_are_gone_and_the_tree_is_the_same() {
    if let Some(why) = unable_to_mount() {
        return skip("dead_chunks_are_gone_and_the_tree_is_the_same", why);
    }
    let fixture = Fixture::new();
    let lower =
        fixture.image("lower", &[("stays", &text(1, 100_000)), ("goes", &text(2, 900_000)), ("dir/x", &text(3, 300))]);
    let upper = fixture.image("upper", &[(".wh.goes", b""), ("upper", &text(4, 500_000))]);
    let image = fixture.merge(&[&lower, &upper], "merged");
    let (before, kernel_before) = (shown(&fixture.open(&image)), fixture.kernel_shows(&image));

    let (bootstrap, report) = fixture.compact(&image, "compacted", |spec| spec.small = 0);

    let files = fixture.open(&bootstrap);
    assert_eq!(shown(&files), before);
    listing::assert_same(&kernel_before, &fixture.kernel_shows(&bootstrap));
    assert_eq!(fates(&report), [Fate::Rebuilt, Fate::Kept]);
    assert_eq!((report.live_chunks, report.new_blobs[0].chunks, report.encoded_chunks), (3, 3, 0));
    assert_eq!(report.new_blobs[0].decoded_bytes, 102_400 + 4096);
    assert!(report.stored_bytes_after < report.stored_bytes_before * 6 / 10, "{report:?}");
    let on_disk = |id: &str| fs::metadata(fixture.path("all").join(id)).unwrap().len();
    let stored: u64 = files.image().devices().iter().map(|device| on_disk(device.blob.as_str())).sum();
    assert_eq!(stored, report.stored_bytes_after);
}

#[test]
fn blobs_that_nothing_needs_are_dropped() {
    let fixture = Fixture::new();
    let lower = fixture.image("lower", &[("a", &text(1, 100_000))]);
    let upper = fixture.image("upper", &[("a", &text(2, 100_000))]);
    // The dead blob stays in the table of an image built upon a parent.
    let source = fixture.source("third", &[("a", &text(3, 100_000))]);
    let (image, _) = fixture.build(&source, |spec| spec.base.parent = Some(layer(&lower)));
    assert_eq!(Image::open(&image).unwrap().devices().len(), 2);
    let before = shown(&fixture.open(&image));

    let (bootstrap, report) = fixture.compact(&image, "compacted", |_| {});

    assert_eq!(fates(&report), [Fate::Dropped, Fate::Kept]);
    assert!(report.new_blobs.is_empty() && !report.nothing_to_do);
    assert_eq!(shown(&fixture.open(&bootstrap)), before);
    assert_eq!(Image::open(&bootstrap).unwrap().devices().len(), 1);
    drop(upper);
}

#[test]
fn small_blobs_of_one_form_are_merged_up_to_the_target() {
    let fixture = Fixture::new();
    let mut layers = Vec::new();
    for number in 0u64..6 {
        let name = format!("layer{number}");
        let noise = crate::support::tree::Random::new(number).noise(100_000);
        let source = fixture.source(&name, &[(&format!("file{number}"), noise.as_slice())]);
        let lz4 = number == 2;
        layers.push(
            fixture
                .build(&source, |spec| {
                    if lz4 {
                        spec.compression = Compression::Lz4
                    }
                })
                .0,
        );
    }
    let layers: Vec<_> = layers.iter().map(std::path::PathBuf::as_path).collect();
    let image = fixture.merge(&layers, "merged");
    let before = shown(&fixture.open(&image));

    let (bootstrap, report) = fixture.compact(&image, "compacted", |spec| spec.target = 250_000);

    assert_eq!(shown(&fixture.open(&bootstrap)), before);
    let want = [Fate::Merged, Fate::Merged, Fate::Kept, Fate::Merged, Fate::Merged, Fate::Kept];
    assert_eq!(fates(&report), want, "one has no equal, one finds no room");
    assert_eq!(report.new_blobs.iter().map(|blob| blob.chunks).collect::<Vec<_>>(), [4, 4]);
    assert!(report.new_blobs.iter().all(|blob| blob.stored_bytes < 250_000));

    let (bootstrap, report) = fixture.compact(&image, "all", |_| {});
    assert_eq!(shown(&fixture.open(&bootstrap)), before);
    assert_eq!((report.new_blobs.len(), report.new_blobs[0].chunks), (1, 10));
    assert_eq!(Image::open(&bootstrap).unwrap().devices().len(), 2);
}

#[test]
fn chunks_that_blobs_have_in_common_become_one() {
    let fixture = Fixture::new();
    let same = text(1, 200_000);
    let first = fixture.image("first", &[("a", &same), ("b", &text(2, 10))]);
    let second = fixture.image("second", &[("c", &same), ("d", &text(3, 10))]);
    let image = fixture.merge(&[&first, &second], "merged");
    let before = shown(&fixture.open(&image));

    let (bootstrap, report) = fixture.compact(&image, "compacted", |_| {});

    assert_eq!(shown(&fixture.open(&bootstrap)), before);
    assert_eq!((report.live_chunks, report.new_blobs[0].chunks), (10, 6));
}

#[test]
fn shares_are_compared_with_the_threshold() {
    let fixture = Fixture::new();
    let chunk = 1 << 16;
    let lower = fixture.image("lower", &[("half", &text(1, 2 * chunk)), ("other", &text(2, 2 * chunk))]);
    let upper = fixture.image("upper", &[(".wh.other", b""), ("x", b"x")]);
    let image = fixture.merge(&[&lower, &upper], "merged");
    for (min_used, want) in [(0, Fate::Kept), (50, Fate::Kept), (51, Fate::Rebuilt), (100, Fate::Rebuilt)] {
        let (_, report) = fixture.compact(&image, &format!("at {min_used}"), |spec| {
            (spec.min_used, spec.small) = (min_used, 0);
        });
        assert_eq!(fates(&report), [want, Fate::Kept], "{min_used}");
        assert_eq!(report.nothing_to_do, want == Fate::Kept);
    }
}

#[test]
fn where_there_is_nothing_to_do_the_same_blobs_are_named() {
    let fixture = Fixture::new();
    let image = fixture.image("source", &[("a", &text(1, 200_000))]);

    let (bootstrap, report) = fixture.compact(&image, "compacted", |_| {});

    assert!(report.nothing_to_do && report.new_blobs.is_empty());
    assert_eq!(fs::read(&bootstrap).unwrap(), fs::read(&image).unwrap(), "ours was in its final form already");
    assert!(!fixture.path("compacted/blobs").exists());

    let empty = fixture.image("empty", &[("a", b"")]);
    let (_, report) = fixture.compact(&empty, "of empty", |_| {});
    assert!(report.nothing_to_do && report.blobs.is_empty());
}

#[test]
fn blobs_of_the_dictionary_are_left_alone() {
    let fixture = Fixture::new();
    let dictionary = fixture.image("dictionary", &[("shared", &text(1, 100_000)), ("dead", &text(2, 900_000))]);
    let source = fixture.source("source", &[("shared", &text(1, 100_000)), ("own", &text(3, 1000))]);
    let (image, report) = fixture.build(&source, |spec| spec.base.dictionary = Some(layer(&dictionary)));
    assert_eq!((report.blobs[0].chunks, report.base_blobs.len()), (1, 1));

    let dict = layer(&dictionary);
    let files = fixture.open(&image);
    let existing = rafsd::build::Existing { name: &image, image: files.image(), chunks: &files };
    let out = fixture.path("compacted");
    let mut spec = rafsd::build::CompactSpec {
        existing,
        out_dir: &out,
        min_used: 50,
        small: 10 << 20,
        target: 100 << 20,
        dictionary: Some(&dict),
        decrypt: false,
    };
    let with = rafsd::build::compact(&spec, &()).unwrap();
    spec.dictionary = None;
    let without = rafsd::build::compact(&spec, &()).unwrap();

    assert_eq!(fates(&with), [Fate::Kept, Fate::KeptForDictionary]);
    assert_eq!(fates(&without), [Fate::Merged, Fate::Rebuilt]);
}

#[test]
fn repetition_changes_no_byte_and_a_second_time_there_is_nothing_to_do() {
    let fixture = Fixture::new();
    let lower = fixture.image("lower", &[("a", &text(1, 100_000)), ("b", &text(2, 500_000))]);
    let upper = fixture.image("upper", &[(".wh.b", b""), ("c", &text(3, 1000))]);
    let image = fixture.merge(&[&lower, &upper], "merged");

    let (one, report) = fixture.compact(&image, "one", |_| {});
    fixture.compact(&image, "two", |_| {});
    let (_, again) = fixture.compact(&one, "again", |_| {});

    assert!(!report.nothing_to_do && again.nothing_to_do);
    assert_eq!(output(&fixture.path("one")), output(&fixture.path("two")));
}
