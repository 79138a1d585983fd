use std::fs;

use rafsd::build::{BuildError, Compression, HotPath, Remark, StillNeeded};
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image::{Image, Kind};

use crate::fixture::{Fixture, content, destroy_data, hot, inode, places, shown, text};
use crate::support::{building::output, listing, skip, tree, unable_to_mount};

#[test]
fn the_image_shows_the_same_tree_to_readers_and_to_the_kernel() {
    if let Some(why) = unable_to_mount() {
        return skip("the_image_shows_the_same_tree_to_readers_and_to_the_kernel", why);
    }
    let fixture = Fixture::new();
    let source = fixture.source("source", &[]);
    tree::make(&source, 1).unwrap();
    let lower = fixture.image("lower", &[("lower/a", &text(1, 200_000)), ("lower/b", &text(2, 70_000))]);
    let (upper, _) = fixture.build(&source, |_| {});
    let image = fixture.merge(&[&lower, &upper], "merged");
    let before = shown(&fixture.open(&image));
    let kernel_before = fixture.kernel_shows(&image);
    let files: Vec<String> = kernel_before
        .iter()
        .step_by(3)
        .filter_map(|line| str::from_utf8(&line.path).ok().map(|path| format!("/{path}")))
        .collect();
    let paths: Vec<&str> = files.iter().map(String::as_str).rev().collect();

    for (name, list) in [("some", hot(&paths)), ("all", hot(&["/"])), ("low", hot(&["/lower/b", "/lower"]))] {
        let (bootstrap, report) = fixture.optimize(&image, &list, name);

        assert_eq!(shown(&fixture.open(&bootstrap)), before, "{name}");
        listing::assert_same(&kernel_before, &fixture.kernel_shows(&bootstrap));
        // Members of batches cannot be copied one by one; they become members again.
        assert_eq!(report.encoded_chunks > 0, report.blob.batches > 0, "{name}");
        assert_eq!(report.blob.batches > 0, name != "low", "{name}");
    }
}

#[test]
fn hot_paths_are_read_from_the_hot_blob_alone() {
    let fixture = Fixture::new();
    let (big, both) = (text(3, 300_000), text(4, 100_000));
    let source =
        fixture.source("source", &[("cold", &text(5, 90_000)), ("big", &big), ("dir/deep/in", &both), ("copy", &both)]);
    fs::hard_link(source.join("big"), source.join("link")).unwrap();
    let (lower, _) = fixture.build(&source, |_| {});
    let upper = fixture.image("upper", &[("equal", &both), ("other", &text(6, 10))]);
    let image = fixture.merge(&[&lower, &upper], "merged");

    let (bootstrap, report) = fixture.optimize(&image, &hot(&["/dir", "/link"]), "hot");

    let files = fixture.open(&bootstrap);
    let devices = files.image().devices();
    assert!(devices.iter().all(|device| device.is_hot() == (device.blob.as_str() == report.blob.id)));
    for device in devices.iter().filter(|device| device.blob.as_str() != report.blob.id) {
        destroy_data(&fixture.path("all").join(device.blob.as_str()), device.entry.ci_offset.get());
    }
    let files = fixture.open(&bootstrap);
    for (path, want) in [("big", &big), ("link", &big), ("dir/deep/in", &both), ("copy", &both), ("equal", &both)] {
        assert!(content(&files, &inode(&files, path)) == *want, "{path}");
        assert!(places(&files, path).iter().all(|(blob, _)| *blob == report.blob.id), "{path}");
    }
    assert!(files.read_into(&inode(&files, "cold"), &mut Vec::new()).is_err());
    assert_eq!((report.blob.chunks, report.hot_bytes), (7, 400_000));
    let prefetch: Vec<_> = files.image().prefetch().collect();
    assert_eq!(prefetch, [inode(&files, "dir").nid, inode(&files, "link").nid]);
}

#[test]
fn chunks_lie_in_the_order_of_the_list_and_whole_files_in_one_piece() {
    let fixture = Fixture::new();
    let image =
        fixture.image("source", &[("a", &text(1, 200_000)), ("b", &text(2, 100_000)), ("c", &text(3, 300_000))]);
    let (bootstrap, report) = fixture.optimize(&image, &hot(&["/c", "/a"]), "hot");

    let files = fixture.open(&bootstrap);
    let chunk = 1 << 16;
    let hot = report.blob.id;
    let want: Vec<_> = (0..5).map(|i| (hot.clone(), i * chunk)).collect();
    assert_eq!(places(&files, "c"), want);
    let behind = 300_000u64.next_multiple_of(4096);
    let want: Vec<_> = (0..4).map(|i| (hot.clone(), behind + i * chunk)).collect();
    assert_eq!(places(&files, "a"), want);
    let bits = |path| match inode(&files, path).layout {
        rafsd::image::Layout::Chunks { bits, .. } => bits,
        other => panic!("{other:?}"),
    };
    assert_eq!((bits("c"), bits("a")), (19, 18), "contiguous files are one chunk to the kernel");
}

#[test]
fn ranges_take_the_chunks_that_have_bytes_in_them() {
    let fixture = Fixture::new();
    let image = fixture.image("source", &[("file", &text(1, 10 << 16))]);
    let chunk = 1 << 16;
    for (ranges, want) in [
        (vec![(0, 1)], vec![0]),
        (vec![(chunk, chunk)], vec![1]),
        (vec![(chunk - 1, 2)], vec![0, 1]),
        (vec![(9 * chunk, u64::MAX), (3 * chunk, 1)], vec![3, 9]),
        (vec![(5 * chunk, 0), (2 * chunk, 1)], vec![2]),
        (vec![], (0..10).collect()),
    ] {
        let list = [HotPath { path: b"/file".to_vec(), ranges: ranges.clone() }];
        let out = tempfile::tempdir_in(fixture.dir.path()).unwrap();
        let report = fixture.try_optimize(&image, &list, out.path()).unwrap();
        fixture.collect(out.path());

        let files = fixture.open(&out.path().join("bootstrap"));
        let hot = places(&files, "file").into_iter().enumerate().filter(|(_, (blob, _))| *blob == report.blob.id);
        assert_eq!(hot.map(|(chunk, _)| chunk).collect::<Vec<_>>(), want, "{ranges:?}");
        assert_eq!(content(&files, &inode(&files, "file")).len(), 10 << 16);
    }
}

#[test]
fn the_report_says_what_is_still_needed_of_each_blob() {
    let fixture = Fixture::new();
    let lower = fixture.image("lower", &[("a", &text(1, 5 << 16)), ("b", &text(2, 3 << 16))]);
    let upper = fixture.image("upper", &[("c", &text(3, 100))]);
    let image = fixture.merge(&[&lower, &upper], "merged");
    let ids: Vec<String> = Image::open(&image).unwrap().devices().iter().map(|d| d.blob.to_string()).collect();

    let (bootstrap, report) = fixture.optimize(&image, &hot(&["/c", "/a"]), "hot");

    let needed = |id: &String, chunks, needed_chunks, decoded_bytes, needed_bytes| StillNeeded {
        id: id.clone(),
        chunks,
        needed_chunks,
        decoded_bytes,
        needed_bytes,
    };
    assert_eq!(report.others, [needed(&ids[0], 8, 3, 8 << 16, 3 << 16), needed(&ids[1], 1, 0, 4096, 0)]);
    let named: Vec<String> = Image::open(&bootstrap).unwrap().devices().iter().map(|d| d.blob.to_string()).collect();
    assert_eq!(named, [ids[0].clone(), report.blob.id]);
}

#[test]
fn chunks_of_another_form_are_encoded_anew() {
    let fixture = Fixture::new();
    let (zstd, lz4, plain, noise) =
        (text(1, 200_000), text(2, 100_000), text(3, 50_000), tree::Random::new(4).noise(70_000));
    let first = fixture.image("first", &[("zstd", &zstd), ("noise", &noise)]);
    let second = fixture.source("second", &[("lz4", &lz4)]);
    let (second, _) =
        fixture.build(&second, |spec| (spec.compression, spec.digest) = (Compression::Lz4, DigestAlgorithm::Sha256));
    let (third, _) =
        fixture.build(&fixture.source("third", &[("plain", &plain)]), |spec| spec.compression = Compression::None);
    let image = fixture.merge(&[&first, &second, &third], "merged");
    let before = shown(&fixture.open(&image));

    let (bootstrap, report) = fixture.optimize(&image, &hot(&["/"]), "hot");

    let files = fixture.open(&bootstrap);
    assert_eq!(shown(&files), before);
    let [device] = files.image().devices() else { panic!("{:?}", files.image().devices()) };
    assert_eq!((device.entry.compression.get(), device.entry.digest.get()), (3, 0), "what most bytes had");
    assert_eq!((report.blob.chunks, report.encoded_chunks), (9, 2), "plain bytes stay plain, lz4 does not");
}

#[test]
fn neither_repetition_nor_doubled_lines_change_a_byte() {
    let fixture = Fixture::new();
    let image = fixture.image("source", &[("a", &text(1, 200_000)), ("b", &text(2, 100_000)), ("c", b"x")]);

    fixture.optimize(&image, &hot(&["/b", "/a"]), "one");
    fixture.optimize(&image, &hot(&["/b", "/a"]), "two");
    fixture.optimize(&image, &hot(&["/b", "/b/", "//a", "/b", "/a"]), "doubled");

    assert_eq!(output(&fixture.path("one")), output(&fixture.path("two")));
    assert_eq!(output(&fixture.path("one")), output(&fixture.path("doubled")));
}

#[test]
fn lines_that_cannot_be_followed_are_remarks() {
    let fixture = Fixture::new();
    let source = fixture.source("source", &[("dir/file", &text(1, 1000)), ("empty", b"")]);
    std::os::unix::fs::symlink("dir/file", source.join("symlink")).unwrap();
    let (image, _) = fixture.build(&source, |_| {});
    let range = |path: &str, range| HotPath { path: path.into(), ranges: vec![range] };
    let mut list = hot(&["/absent", "/dir/file/below", "/symlink", "/empty"]);
    list.extend([range("/dir/file", (999, 2)), range("/dir", (0, 1)), range("/dir/file", (u64::MAX, u64::MAX))]);

    let (_, report) = fixture.optimize(&image, &list, "hot");

    let remark = |path: &str, problem| Remark { path: path.to_owned(), problem };
    let want = [
        remark("/absent", "is not in the image"),
        remark("/dir/file/below", "is not in the image"),
        remark("/symlink", "is not a file or directory"),
        remark("/dir/file", "ends before the end of a range"),
        remark("/dir", "is a directory, of which all is taken"),
        remark("/dir/file", "ends before the end of a range"),
    ];
    assert_eq!((report.remarks.as_slice(), report.blob.chunks), (want.as_slice(), 1));
}

#[test]
fn a_list_without_data_is_refused() {
    let fixture = Fixture::new();
    let image = fixture.image("source", &[("file", b"x"), ("empty", b"")]);
    for list in [hot(&[]), hot(&["/absent"]), hot(&["/empty"])] {
        let out = fixture.path("hot");
        let error = fixture.try_optimize(&image, &list, &out).unwrap_err();
        assert!(matches!(error, BuildError::NothingHot), "{error:?}");
        assert!(!out.exists());
    }
}

#[test]
fn an_image_can_be_optimized_again() {
    let fixture = Fixture::new();
    let image = fixture.image("source", &[("a", &text(1, 200_000)), ("b", &text(2, 100_000))]);
    let before = shown(&fixture.open(&image));
    let (first, _) = fixture.optimize(&image, &hot(&["/a"]), "first");

    let (second, report) = fixture.optimize(&first, &hot(&["/b", "/a"]), "second");

    let files = fixture.open(&second);
    assert_eq!(shown(&files), before);
    assert!(report.others.iter().all(|other| other.needed_chunks == 0), "{:?}", report.others);
    assert_eq!(files.image().devices().len(), 1);
    assert_eq!(inode(&files, "a").kind, Kind::Regular);
}
