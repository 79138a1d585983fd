//! Images built from directories: the same bytes every time, and what the kernel makes of them.

mod support;

use std::cell::Cell;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;

use rafsd::build::{self, BuildError, Compression, Progress, Source};
use rafsd::format::rafs::DigestAlgorithm;
use support::building::{assert_mounts_as, build, build_watched, mount, output, spec};
use support::{listing, skip, tree, unable_to_mount};

#[test]
fn kernel_shows_the_tree_the_image_was_built_from() {
    if let Some(why) = unable_to_mount() {
        return skip("kernel_shows_the_tree_the_image_was_built_from", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::make(&source, 1).unwrap();
    let want = listing::of(&source).unwrap();
    for (name, compression, digest, chunk_size) in [
        ("default", Compression::default(), DigestAlgorithm::Blake3, 1 << 20),
        ("lz4", Compression::Lz4, DigestAlgorithm::Sha256, 1 << 16),
        ("none", Compression::None, DigestAlgorithm::Blake3, 1 << 24),
        ("smallest", Compression::Zstd { level: 1 }, DigestAlgorithm::Blake3, 1 << 12),
    ] {
        let mut spec = spec(Source::open(&source).unwrap(), &dir.path().join(name));
        (spec.compression, spec.digest, spec.chunk_size) = (compression, digest, chunk_size);

        let report = build::build(spec, &()).unwrap();

        assert_mounts_as(&want, &report, dir.path());
        assert_eq!((report.skipped_xattrs, report.hard_links), (0, 3), "{name}");
    }
}

#[test]
fn directories_count_their_subdirectories_as_links() {
    if let Some(why) = unable_to_mount() {
        return skip("directories_count_their_subdirectories_as_links", why);
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("source/a/b")).unwrap();
    fs::create_dir_all(dir.path().join("source/c")).unwrap();

    let report = build(&dir.path().join("source"), &dir.path().join("out")).unwrap();

    let mounted = mount(&report, dir.path());
    let links = |path: &str| fs::metadata(mounted.path().join(path)).unwrap().nlink();
    assert_eq!([links(""), links("a"), links("a/b"), links("c")], [4, 3, 2, 2]);
}

#[test]
fn tree_without_data_has_no_blob_and_still_mounts() {
    if let Some(why) = unable_to_mount() {
        return skip("tree_without_data_has_no_blob_and_still_mounts", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let empty = build(&source, &dir.path().join("out")).unwrap();
    assert_eq!((empty.blobs.len(), empty.bootstrap_bytes), (0, 8192));
    assert_mounts_as(&listing::of(&source).unwrap(), &empty, dir.path());

    File::create(source.join("empty file")).unwrap();
    symlink("target", source.join("link")).unwrap();
    let report = build(&source, &dir.path().join("out")).unwrap();
    assert!(report.blobs.is_empty());
    assert_mounts_as(&listing::of(&source).unwrap(), &report, dir.path());
}

#[test]
fn neither_threads_nor_repetition_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mut random = tree::Random::new(7);
    // Many equal chunks close together: whoever is faster must not decide which one is stored.
    let pieces: Vec<Vec<u8>> = (0..20).map(|_| random.text(4096)).collect();
    for file in 0..60 {
        let chosen = |random: &mut tree::Random| pieces[usize::try_from(random.below(20)).unwrap()].clone();
        let content: Vec<u8> = (0..10).flat_map(|_| chosen(&mut random)).collect();
        fs::write(source.join(format!("repeated-{file}")), content).unwrap();
    }
    for file in 0..40 {
        let len = usize::try_from(random.below(30_000)).unwrap();
        let content = if file % 3 == 0 { random.noise(len) } else { random.text(len) };
        fs::write(source.join(format!("odd-size-{file}")), content).unwrap();
    }
    tree::big_file(&source.join("big"), 2, 3).unwrap();
    for compression in [Compression::default(), Compression::Zstd { level: 9 }, Compression::Lz4, Compression::None] {
        let run = |threads: usize, run: usize| {
            let out = dir.path().join(format!("{compression:?}-{threads}-{run}"));
            let mut spec = spec(Source::open(&source).unwrap(), &out);
            (spec.compression, spec.chunk_size) = (compression, 4096);
            spec.threads = NonZeroUsize::new(threads).unwrap();
            build::build(spec, &()).unwrap();
            output(&out)
        };
        let want = run(1, 0);
        assert_eq!(want.len(), 2);
        for (threads, again) in [(1, 1), (2, 0), (2, 1), (3, 0), (8, 0), (8, 1)] {
            assert!(run(threads, again) == want, "{compression:?} with {threads} threads, run {again}");
        }
    }
}

#[test]
fn equal_chunks_are_stored_once_and_holes_are_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let content = tree::Random::new(1).noise(3 << 20);
    fs::write(source.join("a"), &content).unwrap();
    fs::write(source.join("b"), &content).unwrap();
    // A terabyte of nothing: one chunk, and 8 bytes of index for each mebibyte.
    File::create(source.join("hole")).unwrap().set_len(1 << 40).unwrap();

    let report = build(&source, &dir.path().join("out")).unwrap();

    assert_eq!((report.blobs[0].chunks, report.deduplicated_bytes), (4, 3 << 20));
    assert_eq!((report.hole_bytes, report.source_bytes), (1 << 40, (1 << 40) + (6 << 20)));
    assert!(report.bootstrap_bytes < (8 << 20) + 100_000, "{}", report.bootstrap_bytes);
}

#[test]
fn trees_deeper_than_any_path_or_descriptor_limit_are_built() {
    const LEVELS: u64 = 2500;
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o755);
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY;
    let mut here = rustix::fs::open(&source, flags, mode).unwrap();
    for _ in 0..LEVELS {
        rustix::fs::mkdirat(&here, "one-level-down", mode).unwrap();
        here = rustix::fs::openat(&here, "one-level-down", flags, mode).unwrap();
    }

    let report = build(&source, &dir.path().join("out"));

    // The standard library removes trees with a descriptor for every level.
    assert!(Command::new("rm").arg("-rf").arg(&source).status().unwrap().success());
    assert_eq!(report.unwrap().directories, LEVELS + 1);
}

/// Does something to the source once a number of bytes has been read.
struct Meddler<F> {
    after: u64,
    read: Cell<u64>,
    act: F,
}

impl<F: Fn()> Progress for Meddler<F> {
    fn advance(&self, _: u64, bytes: u64) {
        let before = self.read.replace(self.read.get() + bytes);
        if before < self.after && self.read.get() >= self.after {
            (self.act)();
        }
    }
}

#[track_caller]
fn assert_change_is_noticed(act: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    fs::create_dir_all(source.join("a")).unwrap();
    fs::create_dir_all(source.join("z")).unwrap();
    tree::big_file(&source.join("a/file"), 4, 1).unwrap();
    tree::set_mtime(&source.join("a/file"), 1000, 0).unwrap();
    let meddler = Meddler { after: 1 << 20, read: Cell::new(0), act: || act(&source) };

    let error = build_watched(&source, &out, &meddler).unwrap_err();

    assert!(matches!(&error, BuildError::Changed { path } if path.starts_with(&source)), "{error:?}");
    assert_eq!(output(&out), [], "nothing is left of a failed build");
}

#[test]
fn files_that_change_while_they_are_read_are_an_error() {
    assert_change_is_noticed(|source| {
        File::options().write(true).open(source.join("a/file")).unwrap().set_len(10).unwrap()
    });
    assert_change_is_noticed(|source| {
        let mut file = File::options().append(true).open(source.join("a/file")).unwrap();
        std::io::Write::write_all(&mut file, b"more").unwrap();
    });
}

#[test]
fn directory_replaced_by_a_link_is_not_followed() {
    assert_change_is_noticed(|source| {
        fs::remove_dir(source.join("z")).unwrap();
        symlink("/etc", source.join("z")).unwrap();
    });
}

#[test]
fn source_with_the_output_inside_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = build(dir.path(), &dir.path().join("out")).unwrap_err();
    assert!(matches!(error, BuildError::OutputInSource { .. }), "{error:?}");
}

#[test]
fn settings_outside_the_format_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("source")).unwrap();
    for bad in [0, 2048, 4097, 1 << 25, 1 << 40] {
        let mut spec = spec(Source::open(&dir.path().join("source")).unwrap(), &dir.path().join("out"));
        spec.chunk_size = bad;
        let error = build::build(spec, &()).unwrap_err();
        assert!(matches!(error, BuildError::ChunkSize(size) if size == bad), "{error:?}");
    }
}
