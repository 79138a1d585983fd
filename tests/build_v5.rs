//! RAFS v5 written and read back: every kind of file, every option that the version has, the refusal of
//! every one that it has not, and what becomes of such an image in version 6.

mod support;

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rafsd::blob::BlobKey;
use rafsd::build::{
    self, Base, Batching, BuildError, BuildReport, BuildSpec, Compression, ConvertReport, ConvertSpec, Encryption,
    Layer, MergeSpec, MergeVersion, PrefetchHints, Progress, Source, VerifyError, Version, Whiteouts,
};
use rafsd::codec;
use rafsd::format::blobfile::features;
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image;
use rafsd::image::v5::{Bootstrap, Inode};
use rafsd::reader::{Files, bootstrap};
use rafsd::source::LocalSource;
use rafsd::tools::check::v5::check;
use rafsd::tools::unpack::{UnpackOptions, to_directory};
use support::building::{output, spec, unpacked};
use support::{listing, skip, tree};
use tempfile::TempDir;

const PACKED: Version = Version::V5 { aligned: false };
const ALIGNED: Version = Version::V5 { aligned: true };

/// A scratch directory with a source tree in it.
struct Shop {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Shop {
    fn new() -> Self {
        let shop = Self { dir: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap() };
        fs::create_dir(shop.path("source")).unwrap();
        shop
    }

    /// With a few files and directories, for hosts where nobody is root.
    fn with_files() -> Self {
        let shop = Self::new();
        let mut random = tree::Random::new(5);
        for (name, len) in [("b", 150_000), ("a", 70_000), ("dir/c", 4096), ("dir/d", 9), ("empty", 0)] {
            let path = shop.path("source").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, random.text(len)).unwrap();
        }
        fs::hard_link(shop.path("source/a"), shop.path("source/dir/a-again")).unwrap();
        fs::copy(shop.path("source/b"), shop.path("source/b-again")).unwrap();
        shop
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    fn spec(&self, out: &str) -> BuildSpec {
        let mut spec = spec(Source::open(&self.path("source")).unwrap(), &self.path(out));
        (spec.version, spec.chunk_size) = (PACKED, 1 << 16);
        spec
    }

    fn build(&self, out: &str, choose: impl FnOnce(&mut BuildSpec)) -> BuildReport {
        let mut spec = self.spec(out);
        choose(&mut spec);
        build::build(spec, &()).unwrap_or_else(|e| panic!("{out}: {e:?}"))
    }

    /// What is in an image whose blobs are in `blobs`, unpacked.
    fn listing(&self, bootstrap: &Path, blobs: &Path) -> Vec<listing::Line> {
        unpacked(bootstrap, blobs, &self.path("unpacked"), &self.runtime)
    }

    fn convert(&self, bootstrap_path: &Path, out: &str) -> Result<ConvertReport, BuildError> {
        let image = bootstrap::open(bootstrap_path).unwrap();
        build::convert(&ConvertSpec { name: bootstrap_path, image: &image, out_dir: &self.path(out) })
    }
}

/// Every inode of a bootstrap, with its path.
fn inodes<'a>(image: &Bootstrap<'a>) -> Vec<(String, Inode<'a>)> {
    let mut out = vec![(String::new(), image.inode(1).unwrap())];
    let mut at = 0;
    while at < out.len() {
        let children: Vec<_> = image.children(&out[at].1).map(Result::unwrap).collect();
        for child in children {
            out.push((format!("{}/{}", out[at].0, String::from_utf8_lossy(child.name)), child));
        }
        at += 1;
    }
    out
}

/// Compression, digest, layout, whether the bootstrap lies in the blob, and the chunk size.
const KITS: [(Compression, DigestAlgorithm, Version, bool, u64); 7] = [
    (Compression::None, DigestAlgorithm::Blake3, PACKED, false, 1 << 16),
    (Compression::None, DigestAlgorithm::Sha256, ALIGNED, true, 1 << 20),
    (Compression::Lz4, DigestAlgorithm::Blake3, ALIGNED, false, 1 << 12),
    (Compression::Lz4, DigestAlgorithm::Sha256, PACKED, false, 1 << 16),
    (Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, PACKED, true, 1 << 20),
    (Compression::Zstd { level: 1 }, DigestAlgorithm::Sha256, PACKED, false, 1 << 14),
    (Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, ALIGNED, false, 1 << 24),
];

#[test]
fn every_kind_of_file_comes_back_from_every_kit_and_from_version_6_of_it() {
    if !rustix::process::geteuid().is_root() {
        return skip("every_kind_of_file_comes_back_from_every_kit_and_from_version_6_of_it", "not root");
    }
    let shop = Shop::new();
    tree::make(&shop.path("source"), 4).unwrap();
    let want = listing::of(&shop.path("source")).unwrap();
    for (number, (compression, digest, version, inline, chunk_size)) in KITS.into_iter().enumerate() {
        let name = format!("kit-{number}");
        let report = shop.build(&name, |spec| {
            (spec.compression, spec.digest, spec.version) = (compression, digest, version);
            (spec.inline_bootstrap, spec.chunk_size) = (inline, chunk_size);
        });
        let path = Path::new(&report.bootstrap);
        let blobs = shop.path(&name).join("blobs");
        assert!(report.verified && report.bootstrap_in_blob == inline);

        listing::assert_same(&want, &shop.listing(path, &blobs));
        let found = bootstrap::find(path, None).unwrap();
        let checked = check(&found.v5().unwrap());
        assert_eq!((checked.errors, checked.remarks), (0, 0), "{name}: {:?}", checked.findings);

        let before = output(&shop.path(&name));
        let converted = shop.convert(path, "converted").unwrap();
        assert_eq!(output(&shop.path(&name)), before, "{name}: something was touched");
        let [table] = converted.tables.as_slice() else { panic!("{name}: {converted:?}") };
        assert_eq!((table.chunks, table.chunks_of_blob), (report.blobs[0].chunks, report.blobs[0].chunks), "{name}");
        fs::copy(&table.path, blobs.join(&table.id)).unwrap();
        let new = Path::new(&converted.bootstrap);
        assert!(bootstrap::find(new, None).unwrap().v5().is_err(), "{name}: it is of version 6");
        listing::assert_same(&want, &shop.listing(new, &blobs));
        fs::remove_dir_all(shop.path("converted")).unwrap();
    }
}

#[test]
fn threads_and_repetition_change_no_byte() {
    let shop = Shop::with_files();
    for (name, version, inline) in [("packed", PACKED, false), ("aligned", ALIGNED, true)] {
        let run = |threads: usize| {
            let out = format!("{name}-{threads}");
            shop.build(&out, |spec| {
                (spec.version, spec.inline_bootstrap) = (version, inline);
                spec.threads = NonZeroUsize::new(threads).unwrap();
            });
            output(&shop.path(out))
        };
        assert_eq!(run(1), run(8));
    }
}

#[test]
fn a_blob_is_its_chunks_and_is_named_by_its_digest() {
    let shop = Shop::with_files();
    for (name, version) in [("packed", PACKED), ("aligned", ALIGNED)] {
        let report = shop.build(name, |spec| spec.version = version);
        let [blob] = report.blobs.as_slice() else { panic!("{report:?}") };
        let stored = fs::read(&blob.path).unwrap();
        let bytes = fs::read(&report.bootstrap).unwrap();
        let image = Bootstrap::parse(&bytes).unwrap();

        assert_eq!(blob.id, codec::sha256(&stored).to_string());
        assert_eq!(image.blobs()[0].id.as_str(), blob.id);
        assert_eq!(image.blobs()[0].features, features::CAP_TAR_TOC);
        let extent = image.blobs()[0].extent.unwrap();
        assert_eq!((u64::from(extent.chunks), extent.stored_len), (blob.chunks, stored.len() as u64));
        // Two files are equal, and another has two names.
        let mut chunks: Vec<_> = inodes(&image).iter().flat_map(|(_, inode)| inode.chunks.to_vec()).collect();
        chunks.sort_by_key(|chunk| chunk.index.get());
        chunks.dedup_by_key(|chunk| chunk.index.get());
        assert_eq!(chunks.len(), 7, "three, two, one and one");
        let (mut stored_end, mut plain_end) = (0, 0);
        for chunk in &chunks {
            let places = (chunk.compressed_offset.get(), chunk.uncompressed_offset.get());
            assert_eq!(places, (stored_end, plain_end), "{name}: chunk {}", chunk.index);
            stored_end += u64::from(chunk.compressed_size.get());
            plain_end += u64::from(chunk.uncompressed_size.get());
            if version == ALIGNED {
                plain_end = plain_end.next_multiple_of(4096);
            }
        }
        assert_eq!((stored_end, plain_end), (stored.len() as u64, extent.decoded_len));
        assert_eq!(blob.decoded_bytes, plain_end);
    }
}

#[test]
fn a_hard_link_is_a_record_with_the_number_of_the_first() {
    let shop = Shop::with_files();
    let report = shop.build("out", |_| ());
    let bytes = fs::read(&report.bootstrap).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    let all = inodes(&image);
    let find = |path: &str| &all.iter().find(|(other, _)| other == path).unwrap().1;
    let (first, second) = (find("/a"), find("/dir/a-again"));

    assert_eq!((first.ino, second.ino), (first.number, first.number));
    assert_eq!((first.nlink, second.nlink), (2, 2));
    assert_eq!((first.digest, first.chunks.len()), (second.digest, second.chunks.len()));
    assert_eq!(u64::from(image.paths()) - 1, image.summary().inodes);
    let dir = find("/dir");
    assert!(second.parent == u64::from(dir.number) && dir.nlink == 2 && find("").nlink == 3);
}

#[test]
fn prefetched_paths_are_listed_or_their_bytes_told() {
    let shop = Shop::with_files();
    let hints = |table| {
        let mut hints = PrefetchHints::parse(b"/b\n/dir\n/nowhere\n/empty\n");
        hints.table = table;
        hints
    };
    let report = shop.build("fs", |spec| spec.prefetch = hints(true));
    let bytes = fs::read(&report.bootstrap).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    let all = inodes(&image);
    let path = |number| all.iter().find(|(_, inode)| inode.number == number).unwrap().0.as_str();
    assert_eq!(image.prefetch().map(path).collect::<Vec<_>>(), ["/b", "/dir"]);
    assert_eq!((image.blobs()[0].prefetch_size, report.prefetch_entries), (0, 2));

    let report = shop.build("blob", |spec| spec.prefetch = hints(false));
    let bytes = fs::read(&report.bootstrap).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    assert_eq!(image.prefetch().count(), 0);
    // One of the files in /dir is another name of /a.
    let end = |path: &str| {
        let all = inodes(&image);
        let inode = &all.iter().find(|(other, _)| other == path).unwrap().1;
        inode.chunks.iter().map(|chunk| chunk.compressed_offset.get() + u64::from(chunk.compressed_size.get())).max()
    };
    let want = ["/b", "/dir/c", "/dir/d", "/dir/a-again"].into_iter().filter_map(end).max().unwrap();
    assert_eq!(u64::from(image.blobs()[0].prefetch_size), want);
}

#[test]
fn only_the_head_of_a_blob_is_told() {
    let shop = Shop::with_files();
    let mut hints = PrefetchHints::parse(b"/dir/c\n");
    hints.table = false;
    let report = shop.build("out", |spec| spec.prefetch = hints);
    let bytes = fs::read(&report.bootstrap).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    let all = inodes(&image);
    let chunk = all.iter().find(|(path, _)| path == "/dir/c").unwrap().1.chunks[0];
    assert_eq!((chunk.compressed_offset.get(), chunk.index.get()), (0, 0), "it is stored first");
    assert_eq!(image.blobs()[0].prefetch_size, chunk.compressed_size.get());
}

#[test]
fn what_version_5_does_not_have_is_refused_by_name() {
    let shop = Shop::with_files();
    let v6 = shop.build("v6", |spec| spec.version = Version::V6);
    let layer = || {
        let path = PathBuf::from(&v6.bootstrap);
        Some(Layer { image: bootstrap::open(&path).unwrap(), name: path, id: None })
    };
    let key = || BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [5; 16]).unwrap();
    let check = |named: &str, choose: &dyn Fn(&mut BuildSpec)| {
        let mut spec = shop.spec("refused");
        choose(&mut spec);
        let error = build::build(spec, &()).unwrap_err();
        assert!(matches!(error, BuildError::NotInVersion5(_)), "{named}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(named) && text.contains("--fs-version 6"), "{named}: {text}");
        assert!(!shop.path("refused").exists());
    };
    check("--batch-size", &|spec| spec.batching = Batching::Size(4096));
    check("--encrypt", &|spec| spec.encryption = Encryption::Key(key()));
    check("--blob-toc", &|spec| spec.blob_toc = true);
    check("--parent", &|spec| spec.base = Base { parent: layer(), ..Base::default() });
    check("--chunk-dict", &|spec| spec.base = Base { dictionary: layer(), ..Base::default() });
}

#[test]
fn sources_are_layers_with_a_blob_each_and_their_hidden_chunks_are_not_in_the_new_table() {
    let shop = Shop::with_files();
    let upper = shop.path("upper");
    fs::create_dir_all(upper.join("dir")).unwrap();
    fs::write(upper.join(".wh.a"), "").unwrap();
    fs::write(upper.join("dir/.wh.a-again"), "").unwrap();
    fs::write(upper.join("dir/new"), tree::Random::new(9).noise(100_000)).unwrap();
    let report = shop.build("out", |spec| spec.sources.push(Source::open(&upper).unwrap()));
    assert_eq!(report.blobs.len(), 2);
    let blobs = shop.path("out/blobs");

    let before = shop.listing(Path::new(&report.bootstrap), &blobs);
    let paths: Vec<_> = before.iter().map(|line| String::from_utf8_lossy(&line.path).into_owned()).collect();
    assert_eq!(paths, ["", "b", "b-again", "dir", "dir/c", "dir/d", "dir/new", "empty"]);

    let converted = shop.convert(Path::new(&report.bootstrap), "converted").unwrap();
    let counts: Vec<_> = converted.tables.iter().map(|table| (table.chunks, table.chunks_of_blob)).collect();
    assert_eq!(counts, [(5, 7), (2, 2)], "two chunks of /a are hidden");
    for table in &converted.tables {
        fs::copy(&table.path, blobs.join(&table.id)).unwrap();
    }
    listing::assert_same(&before, &shop.listing(Path::new(&converted.bootstrap), &blobs));
    let again = shop.convert(Path::new(&converted.bootstrap), "again").unwrap();
    assert_eq!((again.tables.len(), again.kept_blobs.len()), (0, 2));
    let bytes = |path: &str| fs::read(path).unwrap();
    assert_eq!(bytes(&again.bootstrap), bytes(&converted.bootstrap), "there was nothing to do");
}

#[test]
fn layers_of_both_versions_become_one_image_that_can_be_converted() {
    let shop = Shop::with_files();
    let (lower, upper) = (shop.path("source"), shop.path("upper"));
    fs::create_dir_all(upper.join("dir")).unwrap();
    fs::write(upper.join("dir/new"), tree::Random::new(9).noise(100_000)).unwrap();
    fs::write(upper.join("dir/.wh.d"), "").unwrap();
    let merged = |name: &str, versions: [Version; 2]| {
        let layers = [&lower, &upper].into_iter().zip(versions).enumerate().map(|(number, (source, version))| {
            let out = format!("{name}-{number}");
            let report = shop.build(&out, |spec| {
                (spec.sources, spec.version) = (vec![Source::open(source).unwrap()], version);
            });
            fs::create_dir_all(shop.path("blobs")).unwrap();
            fs::copy(&report.blobs[0].path, shop.path("blobs").join(&report.blobs[0].id)).unwrap();
            let path = PathBuf::from(report.bootstrap);
            Layer { image: bootstrap::open(&path).unwrap(), name: path, id: None }
        });
        let spec = MergeSpec {
            layers: layers.collect(),
            parent: None,
            dictionary: None,
            whiteouts: Whiteouts::Oci,
            prefetch: None,
            facts: Vec::new(),
            version: MergeVersion::V6,
            out: shop.path(name),
        };
        build::merge(spec, &()).unwrap();
        shop.path(name)
    };
    let blobs = shop.path("blobs");
    let want = shop.listing(&merged("six", [Version::V6, Version::V6]), &blobs);
    for (name, versions, tables) in [
        ("five", [PACKED, ALIGNED], 2),
        ("five-below", [PACKED, Version::V6], 1),
        ("five-above", [Version::V6, PACKED], 1),
    ] {
        let image = merged(name, versions);
        listing::assert_same(&want, &shop.listing(&image, &blobs));
        let report = image::check::check(&bootstrap::open(&image).unwrap());
        assert_eq!(report.findings, [], "{name}: what was written is sound");

        let converted = shop.convert(&image, &format!("{name}-converted")).unwrap();
        assert_eq!((converted.tables.len(), converted.kept_blobs.len()), (tables, 2 - tables), "{name}");
        for table in &converted.tables {
            fs::copy(&table.path, blobs.join(&table.id)).unwrap();
        }
        listing::assert_same(&want, &shop.listing(Path::new(&converted.bootstrap), &blobs));
    }
}

#[test]
fn commands_build_and_convert_and_say_what_they_made() {
    let shop = Shop::with_files();
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_rafsd")).current_dir(shop.dir.path()).args(args).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (code, said, _) = run(&["build", "source", "-o", "five", "--fs-version", "5", "--aligned-chunk", "--json"]);
    assert_eq!(code, Some(0), "{said}");
    let built: serde_json::Value = serde_json::from_str(&said).unwrap();

    let (code, said, _) = run(&["convert", "five/bootstrap", "-o", "six", "--json"]);
    assert_eq!(code, Some(0), "{said}");
    let report: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(report["tables"][0]["blob"], built["blobs"][0]["id"]);
    let table = fs::read(shop.path(report["tables"][0]["path"].as_str().unwrap())).unwrap();
    assert_eq!(report["tables"][0]["id"], codec::sha256(&table).to_string());
    let (code, said, _) = run(&["convert", "six/bootstrap", "-o", "again"]);
    assert!(code == Some(0) && said.contains("nothing to convert"), "{said}");

    let (code, _, said) = run(&["build", "source", "-o", "no", "--fs-version", "5", "--encrypt"]);
    assert!(code == Some(1) && said.contains("RAFS v5 has no encryption (--encrypt)"), "{said}");
    let (code, _, said) = run(&["convert", "source/b", "-o", "no"]);
    assert!(code == Some(1) && said.contains("source/b"), "{said}");
    assert!(!shop.path("no").exists());
}

/// With the same options, what Nydus's own builder made is made again, byte for byte.
#[test]
fn an_image_of_another_builder_is_built_again_from_what_is_in_it() {
    let test = "an_image_of_another_builder_is_built_again_from_what_is_in_it";
    if !rustix::process::geteuid().is_root() {
        return skip(test, "not root");
    }
    let Some(folder) = support::interop::folder(test) else { return };
    let (theirs, shop) = (folder.join("v5-none"), Shop::new());
    let source = Arc::new(LocalSource::new(theirs.join("blobs")).unwrap());
    let files = Files::open(&theirs.join("bootstrap"), source, shop.runtime.handle().clone()).unwrap();
    fs::remove_dir(shop.path("source")).unwrap();
    to_directory(&files, &shop.path("source"), UnpackOptions::default(), &()).unwrap();

    let report = shop.build("out", |spec| spec.compression = Compression::None);

    assert!(theirs.join("blobs").join(&report.blobs[0].id).exists(), "the blob is another one");
    assert!(fs::read(&report.bootstrap).unwrap() == fs::read(theirs.join("bootstrap")).unwrap());
}

#[test]
fn an_image_without_data_needs_no_blob_in_either_version() {
    let shop = Shop::new();
    fs::create_dir(shop.path("source/dir")).unwrap();
    fs::write(shop.path("source/empty"), "").unwrap();
    let report = shop.build("out", |_| ());
    assert!(report.blobs.is_empty());
    let converted = shop.convert(Path::new(&report.bootstrap), "converted").unwrap();
    assert!(converted.tables.is_empty() && converted.kept_blobs.is_empty());
    let blobs = shop.path("out/blobs");
    let lists = [report.bootstrap, converted.bootstrap].map(|path| shop.listing(Path::new(&path), &blobs));
    listing::assert_same(&lists[0], &lists[1]);
    assert_eq!(lists[0].len(), 3);
}

/// Spoils a blob when everything is written.
struct Spoiler;

impl Progress for Spoiler {
    fn verifying(&self, blob: Option<&Path>) {
        use std::os::unix::fs::FileExt;
        let file = fs::File::options().read(true).write(true).open(blob.unwrap()).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 70_000).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 70_000).unwrap();
    }
}

#[test]
fn a_blob_that_was_spoilt_is_found_and_nothing_is_published() {
    let shop = Shop::with_files();
    let mut spec = shop.spec("out");
    spec.compression = Compression::None;
    let error = build::build(spec, &Spoiler).unwrap_err();
    assert!(matches!(error, BuildError::Verify(VerifyError::Chunk { chunk: 2, at: 70_000, .. })), "{error:?}");
    assert_eq!(output(&shop.path("out")), []);
}
