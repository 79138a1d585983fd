//! What a user can choose about an image: each option end to end, read back by other code.

mod support;

use std::fs;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rafsd::blob::{BlobKey, BlobTables, Decoder};
use rafsd::build::{
    self, Batching, BuildError, BuildReport, BuildSpec, Compression, Encryption, Owners, PrefetchHints, Progress,
    Source, VerifyError, Whiteouts,
};
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image::{Extent, Image};
use rafsd::reader;
use support::building::{output, spec};
use support::{image, listing, skip, tree, unable_to_mount};

fn key() -> BlobKey {
    BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [5; 16]).unwrap()
}

/// A way to change the defaults, with a name for messages.
type Choice = (&'static str, fn(&mut BuildSpec));

const LAYOUTS: [Choice; 9] = [
    ("unbatched", |spec| spec.batching = Batching::Off),
    ("small-batches", |spec| spec.batching = Batching::Size(4096)),
    ("toc", |spec| spec.blob_toc = true),
    ("inline", |spec| spec.inline_bootstrap = true),
    ("toc-inline", |spec| (spec.blob_toc, spec.inline_bootstrap) = (true, true)),
    ("encrypted", |spec| (spec.encryption, spec.batching) = (Encryption::Key(key()), Batching::Off)),
    ("encrypted-batches", |spec| {
        (spec.encryption, spec.batching, spec.compression) =
            (Encryption::Key(key()), Batching::Size(8192), Compression::Lz4);
    }),
    ("encrypted-plain", |spec| {
        (spec.encryption, spec.compression, spec.digest) =
            (Encryption::Key(key()), Compression::None, DigestAlgorithm::Sha256);
    }),
    ("everything", |spec| {
        (spec.encryption, spec.blob_toc, spec.inline_bootstrap) = (Encryption::Key(key()), true, true);
        (spec.chunk_size, spec.batching) = (1 << 16, Batching::Size(1 << 16));
    }),
];

#[test]
fn kernel_shows_the_same_tree_whatever_the_layout_of_the_blob() {
    if let Some(why) = unable_to_mount() {
        return skip("kernel_shows_the_same_tree_whatever_the_layout_of_the_blob", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::make(&source, 4).unwrap();
    let want = listing::of(&source).unwrap();
    for (name, choose) in LAYOUTS {
        let report = build_with(&source, &dir.path().join(name), choose);

        let mounted = mount(&report, dir.path());
        let got = listing::of(mounted.path()).unwrap();
        assert!(report.verified, "{name}");
        listing::assert_same(&want, &got);
    }
}

#[test]
fn neither_threads_nor_repetition_change_a_byte_of_any_layout() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    many_small_files(&source, 300);
    tree::big_file(&source.join("m-big"), 2, 3).unwrap();
    let hints = || PrefetchHints::parse(b"/s-77\n/m-big\n/s-3\n");
    for (name, choose) in LAYOUTS {
        let run = |threads: usize, run: usize| {
            let out = dir.path().join(format!("{name}-{threads}-{run}"));
            let mut spec = spec(Source::open(&source).unwrap(), &out);
            choose(&mut spec);
            spec.prefetch = hints();
            spec.threads = NonZeroUsize::new(threads).unwrap();
            build::build(spec, &()).unwrap();
            output(&out)
        };
        let want = run(1, 0);
        for (threads, again) in [(1, 1), (2, 0), (3, 0), (8, 0)] {
            assert!(run(threads, again) == want, "{name} with {threads} threads, run {again}");
        }
    }
}

#[test]
fn parts_of_a_blob_lie_in_the_order_of_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    many_small_files(&source, 20);
    let parts = |choose: fn(&mut BuildSpec), name: &str| {
        let report = build_with(&source, &dir.path().join(name), choose);
        let file = fs::read(&report.blobs[0].path).unwrap();
        let parts = parts(&file);
        let names: Vec<String> = parts.iter().map(|(name, _)| name.clone()).collect();
        (report, file, parts, names.join(" "))
    };

    let (report, file, found, names) = parts(|spec| spec.blob_toc = true, "toc");
    assert_eq!(names, "image.blob blob.meta blob.digest rafs.blob.toc");
    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let entry = &image.devices()[0].entry;
    assert_eq!(entry.features.get() & !0x84, 0x7000_0021, "but for batches");
    assert_eq!(entry.compressed_size.get(), file.len() as u64);
    let toc = found[3].1.start..file.len();
    assert_eq!((entry.toc_size.get() as usize, toc.len()), (4 * 128 + 512, 4 * 128 + 512));
    assert_eq!(entry.toc_digest, rafsd::codec::sha256(&file[toc]).0);
    assert_eq!(entry.ci_offset.get(), found[1].1.start as u64);
    let digests = &file[found[2].1.clone()];
    assert_eq!(digests.len(), usize::try_from(report.blobs[0].chunks).unwrap() * 32);
    let hashed = [&file[..found[2].1.start], &file[found[2].1.end..]].concat();
    assert_eq!(report.blobs[0].id, rafsd::codec::sha256(&hashed).to_string());

    let (report, file, found, names) = parts(|spec| spec.inline_bootstrap = true, "inline");
    assert_eq!(names, "image.blob blob.meta image.boot");
    assert!(report.bootstrap_in_blob && report.bootstrap == report.blobs[0].path);
    assert!(!dir.path().join("inline/bootstrap").exists());
    assert_eq!(report.blobs[0].id, rafsd::codec::sha256(&file).to_string());
    let boot = &file[found[2].1.clone()];
    assert_eq!(boot[1408..1472], [b'x'; 64]);
    let entry = &boot[4096..4096 + 256];
    assert_eq!(entry[..64], [b'x'; 64]);
    assert_eq!(u32::from_le_bytes(entry[0x54..0x58].try_into().unwrap()) & !0x84, 0x5000_0003);
    let before = u64::try_from(found[2].1.start).unwrap();
    assert_eq!(entry[0x58..0x60], before.to_le_bytes(), "everything before the bootstrap");

    let both: fn(&mut BuildSpec) = |spec| (spec.blob_toc, spec.inline_bootstrap) = (true, true);
    let (_, _, _, names) = parts(both, "both");
    assert_eq!(names, "image.blob blob.meta blob.digest image.boot rafs.blob.toc");
}

#[test]
fn tree_without_data_is_a_blob_only_if_it_holds_the_bootstrap() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("empty"), b"").unwrap();
    for (name, choose, want) in [
        ("inline", (|spec| spec.inline_bootstrap = true) as fn(&mut BuildSpec), "image.boot"),
        ("both", |spec| (spec.inline_bootstrap, spec.blob_toc) = (true, true), "image.boot rafs.blob.toc"),
    ] {
        let report = build_with(&source, &dir.path().join(name), choose);
        let file = fs::read(&report.blobs[0].path).unwrap();
        let names: Vec<String> = parts(&file).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names.join(" "), want);
        let loaded = reader::bootstrap::load(Path::new(&report.bootstrap)).unwrap();
        let image = Image::parse(loaded.bytes).unwrap();
        assert_eq!((image.devices().len(), image.summary().paths), (0, 2), "{name}");
    }
    let report = build_with(&source, &dir.path().join("toc"), |spec| {
        (spec.blob_toc, spec.encryption) = (true, Encryption::Random);
    });
    assert!(report.blobs.is_empty() && !report.encrypted);
}

#[test]
fn small_files_share_pieces_and_large_ones_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    many_small_files(&source, 200);
    let alone = build_with(&source, &dir.path().join("alone"), |spec| spec.batching = Batching::Off);
    let batched = build_with(&source, &dir.path().join("batched"), |_| ());
    assert_eq!((alone.blobs[0].batches, alone.deduplicated_bytes), (0, batched.deduplicated_bytes));
    assert!(batched.deduplicated_bytes > 0, "some files are equal");
    assert!(batched.blobs[0].batches > 0 && batched.blobs[0].chunks == alone.blobs[0].chunks);
    assert!(
        batched.blobs[0].stored_bytes < alone.blobs[0].stored_bytes * 2 / 3,
        "{} against {}",
        batched.blobs[0].stored_bytes,
        alone.blobs[0].stored_bytes
    );

    let large = dir.path().join("large");
    fs::create_dir(&large).unwrap();
    tree::big_file(&large.join("a"), 2, 1).unwrap();
    fs::write(large.join("only-small-one"), b"small").unwrap();
    let report = build_with(&large, &dir.path().join("large-image"), |_| ());
    let entry = Image::open(Path::new(&report.bootstrap)).unwrap().devices()[0].entry;
    assert_eq!((report.blobs[0].batches, entry.features.get()), (0, 0x4000_0001), "what has no neighbour is no batch");
}

#[test]
fn batches_are_cut_as_the_format_says() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    // In name order: two members, one that is too large, one batch that the third file closes.
    for (name, len, byte) in
        [("a", 2047, 1), ("b", 2047, 2), ("c", 2048, 3), ("d", 2047, 4), ("e", 2047, 5), ("f", 3, 6), ("g", 2047, 4)]
    {
        fs::write(source.join(name), vec![byte; len]).unwrap();
    }
    let report = build_with(&source, &dir.path().join("out"), |spec| {
        (spec.batching, spec.compression) = (Batching::Size(4096), Compression::None);
    });

    let file = fs::read(&report.blobs[0].path).unwrap();
    let bytes = |runs: &[(u8, usize)]| runs.iter().flat_map(|(byte, len)| vec![*byte; *len]).collect::<Vec<u8>>();
    let data = bytes(&[(1, 2047), (2, 2047), (3, 2048), (4, 2047), (5, 2047), (6, 3)]);
    assert_eq!(file[..data.len()], data);
    let table = &file[data.len()..];
    let word = |at: usize| u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
    let entry = |n: usize| (word(24 * n) >> 56, word(24 * n + 8), word(24 * n + 16));
    let stored = |at: u64, len: u64| len << 40 | at;
    assert_eq!(entry(0), (5, stored(0, 0), 0));
    assert_eq!(entry(1), (5, stored(0, 0), 2047));
    let crc = u64::from(rafsd::codec::crc32c(&[3; 2048]));
    assert_eq!(entry(2), (0x10, stored(4094, 2048), crc));
    assert_eq!(entry(3), (5, stored(6142, 0), 1 << 32));
    assert_eq!(entry(4), (5, stored(6142, 0), 1 << 32 | 2047));
    // 4094 + 3 is not below 4096.
    assert_eq!(entry(5), (5, stored(10236, 0), 2 << 32));
    let contexts = &table[6 * 24..6 * 24 + 3 * 40];
    let sizes: Vec<u64> = contexts.chunks(40).map(|c| u64::from_le_bytes(c[..8].try_into().unwrap())).collect();
    assert_eq!(sizes, [4094 << 32 | 4094, 4094 << 32 | 4094, 3 << 32 | 3]);
    assert!(contexts.chunks(40).all(|c| c[8..] == [0; 32]));
    assert_eq!((report.blobs[0].chunks, report.deduplicated_bytes), (6, 2047), "g is d");
}

#[test]
fn encrypted_files_of_every_short_length_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for len in 1..40u8 {
        fs::write(source.join(format!("{len:02}-count")), (0..len).collect::<Vec<u8>>()).unwrap();
        fs::write(source.join(format!("{len:02}-zeros")), vec![0; len.into()]).unwrap();
        let mut marked = vec![len; len.into()];
        marked.extend_from_slice(&[0x78, 0x90]);
        fs::write(source.join(format!("{len:02}-mark")), marked).unwrap();
    }
    let large: Vec<u8> = tree::Random::new(1).noise(5000);
    for (name, compression) in
        [("none", Compression::None), ("zstd", Compression::default()), ("lz4", Compression::Lz4)]
    {
        for (batched, batching) in [("off", Batching::Off), ("on", Batching::Size(4096))] {
            // With and without something between them that makes each a batch of its own.
            for every in [0, 1] {
                for n in 0..40 * every {
                    fs::write(source.join(format!("{n:02}-d")), &large[n..]).unwrap();
                }
                let report = build_with(&source, &dir.path().join(format!("{name}-{batched}-{every}")), |spec| {
                    (spec.compression, spec.batching) = (compression, batching);
                    spec.encryption = Encryption::Key(key());
                });

                assert!(report.encrypted);
                assert_files_decode_to(&source, &report);
                assert_no_misleading_context(&report);
            }
        }
    }
}

#[test]
fn keys_of_encrypted_blobs_are_new_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("secret"), b"a secret that must not lie in the blob").unwrap();
    let run = |name: &str| {
        let report = build_with(&source, &dir.path().join(name), |spec| {
            (spec.encryption, spec.compression) = (Encryption::Random, Compression::None);
        });
        assert_files_decode_to(&source, &report);
        let blob = fs::read(&report.blobs[0].path).unwrap();
        assert!(!blob.windows(8).any(|window| window == b"a secret"));
        (Image::open(Path::new(&report.bootstrap)).unwrap().devices()[0].entry.meta_digest, report.blobs[0].id.clone())
    };
    let (one, other) = (run("one"), run("other"));
    assert!(one.0 != other.0 && one.1 != other.1);
}

#[test]
fn damage_between_writing_and_publishing_fails_the_build() {
    struct Flip(fn(u64) -> u64);
    impl Progress for Flip {
        fn verifying(&self, blob: Option<&Path>) {
            let file = fs::File::options().read(true).write(true).open(blob.unwrap()).unwrap();
            let at = (self.0)(file.metadata().unwrap().len());
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), tree::Random::new(3).noise(3 << 20)).unwrap();
    many_small_files(&source, 30);
    let run = |flip: fn(u64) -> u64, verify: bool| {
        let out = dir.path().join("out");
        let _ = fs::remove_dir_all(&out);
        let mut spec = spec(Source::open(&source).unwrap(), &out);
        spec.verify = verify;
        let made = build::build(spec, &Flip(flip));
        (made, output(&out).len())
    };

    let (error, left) = run(|_| 1_500_000, true);
    let error = error.unwrap_err();
    assert!(matches!(error, BuildError::Verify(VerifyError::Chunk { chunk: 1, at: 1_048_576, .. })), "{error:?}");
    assert_eq!(left, 0, "nothing is left of a failed build");
    let (error, left) = run(|len| len - 4096, true);
    assert!(matches!(error, Err(BuildError::Verify(VerifyError::Tables(_)))), "{error:?}");
    assert_eq!(left, 0);
    let (unchecked, left) = run(|_| 1_500_000, false);
    assert!(!unchecked.unwrap().verified, "who does not look does not see");
    assert_eq!(left, 2);
}

#[test]
fn hinted_files_lie_in_front_and_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("dir/sub")).unwrap();
    for (name, byte) in [("a", 1), ("dir/b", 2), ("dir/sub/c", 3), ("z", 4)] {
        fs::write(source.join(name), vec![byte; 100]).unwrap();
    }
    fs::write(source.join("empty"), b"").unwrap();
    let list = b"/z\n/gone\n/empty\nrelative\n/dir\n/dir/b\n";
    let run = |name: &str, table: bool| {
        let report = build_with(&source, &dir.path().join(name), |spec| {
            spec.prefetch = PrefetchHints::parse(list);
            spec.prefetch.table = table;
            (spec.batching, spec.compression) = (Batching::Off, Compression::None);
        });
        let data = fs::read(&report.blobs[0].path).unwrap()[..400].chunks(100).map(|c| c[0]).collect::<Vec<_>>();
        let bootstrap = fs::read(&report.bootstrap).unwrap();
        let word = |at: usize| u32::from_le_bytes(bootstrap[at..at + 4].try_into().unwrap());
        let (at, len) = (word(0x4a8) as usize, word(0x4b0) as usize);
        let table: Vec<u64> = (at..at + len).step_by(4).map(|at| word(at).into()).collect();
        (report, data, table)
    };

    let (report, data, table) = run("fs", true);
    assert_eq!(data, [4, 2, 3, 1], "z, all of dir, the rest");
    assert_eq!((report.prefetch_entries, table.len()), (2, 2), "neither what is gone nor what is empty");
    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let nids: Vec<u64> = ["z", "dir"].iter().map(|name| nid_of(&image, name)).collect();
    assert_eq!(table, nids);

    let (report, data, table) = run("blob", false);
    assert_eq!((data, table.len(), report.prefetch_entries), (vec![4, 2, 3, 1], 0, 0));
}

#[test]
fn what_is_excluded_is_not_in_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("keep/cache")).unwrap();
    fs::create_dir_all(source.join("var/cache/deep")).unwrap();
    for name in ["keep/a.o", "keep/a.c", "keep/cache/x", "var/cache/deep/y", "top.o", ".wh.gone", "keep/.wh..wh..opq"] {
        fs::write(source.join(name), name).unwrap();
    }
    fs::hard_link(source.join("keep/a.c"), source.join("keep/z.c")).unwrap();
    let archive = dir.path().join("source.tar");
    let tar = std::process::Command::new("tar").arg("-cf").arg(&archive).arg("-C").arg(&source).arg(".").status();
    assert!(tar.unwrap().success());
    let run = |source: &Path, patterns: &[&str], whiteouts: Whiteouts| {
        let report = build_with(source, &dir.path().join("out"), |spec| {
            spec.selection.exclude = patterns.iter().map(|pattern| pattern.parse().unwrap()).collect();
            spec.selection.drop_whiteouts = whiteouts;
        });
        names_of(&report).join(" ")
    };
    let want = ".wh.gone keep keep/.wh..wh..opq keep/a.c keep/cache keep/cache/x keep/z.c var";
    for source in [&source, &archive] {
        assert_eq!(run(source, &["*.o", "/var/cache/"], Whiteouts::None), want);
    }
    let without = "keep keep/a.c keep/cache keep/cache/x keep/z.c var";
    assert_eq!(run(&source, &["*.o", "/var/cache/"], Whiteouts::Oci), without);
    assert_eq!(run(&archive, &["*.o", "/var/cache/"], Whiteouts::Oci), want, "an archive is a layer");
}

#[test]
fn attributes_are_those_that_were_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let file = source.join("file");
    fs::write(&file, b"x").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("file", source.join("link")).unwrap();
    tree::set_mtime(&file, 2_000_000_000, 5).unwrap();
    for (name, value) in [("user.keep", "1"), ("user.drop", "2"), ("trusted.t", "3")] {
        if rustix::fs::lsetxattr(&file, name, value.as_bytes(), rustix::fs::XattrFlags::empty()).is_err() {
            return skip("attributes_are_those_that_were_chosen", "xattrs cannot be set here");
        }
    }
    let (uid, gid) = (fs::metadata(&file).unwrap().uid(), fs::metadata(&file).unwrap().gid());
    let run = |choose: &dyn Fn(&mut BuildSpec)| {
        let report = build_with(&source, &dir.path().join("out"), |spec| choose(spec));
        let image = Image::open(Path::new(&report.bootstrap)).unwrap();
        let inode = image.inode(nid_of(&image, "file")).unwrap();
        let mut xattrs = Vec::new();
        image
            .xattrs(&inode, &mut |xattr| {
                xattrs.push(String::from_utf8(xattr.name()).unwrap());
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        let explicit = image.summary().flags & 0x10 != 0;
        ((inode.uid, inode.gid), inode.mtime, xattrs.join(" "), explicit)
    };
    let all = "trusted.t user.drop user.keep";
    let time = (2_000_000_000, 5);
    assert_eq!(run(&|_| ()), ((uid, gid), time, all.to_owned(), true));
    assert_eq!(
        run(&|spec| {
            spec.selection.owners = Owners::Mapped {
                uids: vec![format!("{uid}:4000000000").parse().unwrap()],
                gids: vec![format!("{gid}:70000:2").parse().unwrap()],
            };
            spec.selection.latest_mtime = Some(1_000_000_000);
            spec.selection.xattr_include = vec!["user.".into()];
            spec.selection.xattr_exclude = vec!["user.d".into()];
        }),
        ((4_000_000_000, 70_000), (1_000_000_000, 0), "user.keep".to_owned(), true)
    );
    let fixed = run(&|spec| spec.selection.owners = Owners::Fixed { uid: 7, gid: 8 });
    assert_eq!(fixed, ((7, 8), time, all.to_owned(), true));
    assert_eq!(run(&|spec| spec.selection.owners = Owners::Omitted), ((0, 0), time, all.to_owned(), false));
}

#[test]
fn gzip_archives_are_compared_with_the_blob() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    many_small_files(&source, 100);
    let archive = dir.path().join("layer.tar.gz");
    let tar = std::process::Command::new("tar").arg("-czf").arg(&archive).arg("-C").arg(&source).arg(".").status();
    assert!(tar.unwrap().success());

    let report = build_with(&archive, &dir.path().join("out"), |_| ());

    assert_eq!(report.gzip_bytes, Some(fs::metadata(&archive).unwrap().len()));
    assert_eq!(build_with(&source, &dir.path().join("out"), |_| ()).gzip_bytes, None);
}

#[test]
fn batch_sizes_outside_the_format_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let run = |choose: fn(&mut BuildSpec)| {
        let mut spec = spec(Source::open(&source).unwrap(), &dir.path().join("out"));
        choose(&mut spec);
        build::build(spec, &())
    };
    for bad in [0, 2048, 5000, 1 << 21, 1 << 40] {
        let mut spec = spec(Source::open(&source).unwrap(), &dir.path().join("out"));
        spec.batching = Batching::Size(bad);
        let error = build::build(spec, &()).unwrap_err();
        assert!(matches!(error, BuildError::BatchSize { size, chunk_size: 0x10_0000 } if size == bad), "{error:?}");
    }
    let error = run(|spec| (spec.chunk_size, spec.encryption) = (1 << 24, Encryption::Random));
    assert!(matches!(error, Err(BuildError::LongEntries)), "{error:?}");
    assert!(run(|spec| spec.chunk_size = 1 << 24).is_ok() && run(|spec| spec.chunk_size = 1 << 12).is_ok());
}

fn build_with(source: &Path, out: &Path, choose: impl FnOnce(&mut BuildSpec)) -> BuildReport {
    let mut spec = spec(Source::open(source).unwrap(), out);
    choose(&mut spec);
    build::build(spec, &()).unwrap()
}

/// Files of 20 to 2000 bytes of text, every tenth like the one before.
fn many_small_files(dir: &Path, count: usize) {
    let mut random = tree::Random::new(11);
    let mut content = Vec::new();
    for n in 0..count {
        if n % 10 != 9 {
            let len = usize::try_from(20 + random.below(2000)).unwrap();
            content = random.text(len);
        }
        fs::write(dir.join(format!("s-{n}")), &content).unwrap();
    }
}

/// The image of a report, its bootstrap taken from wherever it lies.
fn open(report: &BuildReport) -> Image {
    Image::parse(reader::bootstrap::load(Path::new(&report.bootstrap)).unwrap().bytes).unwrap()
}

/// The only blob of an image as the device it stands for, written by the reading side.
fn expand(report: &BuildReport, device: &Path) {
    let image = open(report);
    let file = fs::read(&report.blobs[0].path).unwrap();
    let tables = BlobTables::new(&image.devices()[0].entry).unwrap();
    let cut = |start: u64, end: u64| &file[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()];
    let map = tables.geometry(cut(tables.stored().start(), tables.stored().end())).unwrap();
    let map = tables.with_digests(map, image.chunk_records().iter()).unwrap();
    let mut decoder = Decoder::new();
    let out = fs::File::create(device).unwrap();
    for unit in map.units() {
        let mut bytes = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
        decoder.decode(map.key(), unit, cut(unit.stored.start(), unit.stored.end()), &mut bytes).unwrap();
        out.write_all_at(&bytes, unit.decoded.start()).unwrap();
    }
    out.set_len(map.decoded_len()).unwrap();
}

fn mount(report: &BuildReport, scratch: &Path) -> image::Mounted {
    let (bootstrap, device, at) = (scratch.join("bootstrap"), scratch.join("device"), scratch.join("mnt"));
    fs::write(&bootstrap, reader::bootstrap::load(Path::new(&report.bootstrap)).unwrap().bytes).unwrap();
    expand(report, &device);
    fs::create_dir_all(&at).unwrap();
    image::Mounted::new(&bootstrap, &[device], &at).unwrap()
}

/// Every file in the root of `source`, compared with the bytes that the image leads to.
#[track_caller]
fn assert_files_decode_to(source: &Path, report: &BuildReport) {
    let dir = tempfile::tempdir().unwrap();
    let device: PathBuf = dir.path().join("device");
    expand(report, &device);
    let (image, device) = (open(report), fs::read(device).unwrap());
    for name in names_of(report) {
        let inode = image.inode(nid_of(&image, &name)).unwrap();
        let mut content = Vec::new();
        image
            .extents(&inode, &mut |extent| {
                let Extent::Device { decoded, .. } = extent else { panic!("{name} has no data in the blob") };
                let range = usize::try_from(decoded.start()).unwrap()..usize::try_from(decoded.end()).unwrap();
                content.extend_from_slice(&device[range]);
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert!(content == fs::read(source.join(&name)).unwrap(), "{name} is another");
    }
}

/// Readers that know an encrypted batch by its sizes alone must get it right, and must not take a
/// text for a padded one: no text of a batch may be shorter than a cipher block.
#[track_caller]
fn assert_no_misleading_context(report: &BuildReport) {
    let image = open(report);
    let file = fs::read(&report.blobs[0].path).unwrap();
    let tables = BlobTables::new(&image.devices()[0].entry).unwrap();
    let range = tables.stored();
    let stored = &file[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()];
    for unit in tables.geometry(stored).unwrap().units() {
        let range = usize::try_from(unit.stored.start()).unwrap()..usize::try_from(unit.stored.end()).unwrap();
        if unit.part.is_some() {
            let mut text = file[range].to_vec();
            let padded = text.len();
            key().decrypt(&mut text).unwrap();
            assert_eq!(text.len(), padded, "a batch is never padded by the cipher");
            assert!(!BlobKey::is_ambiguous(&text));
        } else if unit.stored.len() == 18 {
            let mut text = file[range].to_vec();
            key().decrypt(&mut text).unwrap();
            assert!(!BlobKey::is_ambiguous(&text));
        }
    }
}

fn names_of(report: &BuildReport) -> Vec<String> {
    let image = open(report);
    let (mut walk, mut names) = (image.walk(), Vec::new());
    while let Some(visit) = walk.next_visit() {
        let path = visit.unwrap().path.join(&b'/');
        names.push(String::from_utf8(path).unwrap());
    }
    names.sort();
    names.split_off(1)
}

fn nid_of(image: &Image, path: &str) -> u64 {
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let visit = visit.unwrap();
        if visit.path.join(&b'/') == path.as_bytes() {
            return visit.inode.nid;
        }
    }
    panic!("{path} is not there")
}

/// The parts of a blob with tar headers, found from its end, first part first.
fn parts(file: &[u8]) -> Vec<(String, Range<usize>)> {
    let mut parts = Vec::new();
    let mut end = file.len();
    while end > 0 {
        let header = &file[end - 512..end];
        assert_eq!(&header[257..265], b"ustar  \0");
        let text = |range: Range<usize>| {
            let field = &header[range];
            let len = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
            String::from_utf8(field[..len].to_vec()).unwrap()
        };
        let size = usize::from_str_radix(&text(124..136), 8).unwrap();
        let sum: u32 =
            header.iter().enumerate().map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) }).sum();
        assert_eq!(u32::from_str_radix(&text(148..156), 8).unwrap(), sum);
        parts.push((text(0..100), end - 512 - size..end - 512));
        end -= 512 + size;
    }
    parts.reverse();
    parts
}
