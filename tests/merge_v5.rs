//! Layers merged into one image of RAFS v5: the same tree as in version 6, the same places in the blobs as in
//! the layers, and what that version cannot say.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rafsd::build::{
    self, Batching, BlobFacts, BuildError, BuildSpec, Compression, Encryption, Layer, MergeReport, MergeSpec,
    MergeVersion, NotInVersion5, Packed, Source, Version, Whiteouts,
};
use rafsd::format::rafs::{Algorithm, DigestAlgorithm};
use rafsd::image::v5::Bootstrap;
use rafsd::reader::bootstrap;
use rafsd::tools::check::v5::check;
use support::building::{spec, unpacked};
use support::layers::{self, Form};
use support::tree::Random;
use support::v5::{self as by_hand, Item, Writer, noise};
use support::{listing, skip};
use tempfile::TempDir;

const PACKED: Version = Version::V5 { aligned: false };
const ALIGNED: Version = Version::V5 { aligned: true };

/// A directory in which layers are built and merged; all blobs are in one place.
struct Shop {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Shop {
    fn new() -> Self {
        let shop = Self { dir: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap() };
        fs::create_dir(shop.path("blobs")).unwrap();
        shop
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Builds the layer `name` of `source` and returns its bootstrap.
    fn layer(&self, source: &Path, name: &str, choose: impl FnOnce(&mut BuildSpec)) -> PathBuf {
        let mut spec = spec(Source::open(source).unwrap(), &self.path(name));
        (spec.version, spec.chunk_size) = (PACKED, 1 << 16);
        choose(&mut spec);
        let report = build::build(spec, &()).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        for blob in &report.blobs {
            fs::copy(&blob.path, self.path("blobs").join(&blob.id)).unwrap();
        }
        report.bootstrap.into()
    }

    /// Builds a layer of regular files.
    fn files(&self, name: &str, files: &[(&str, &[u8])], choose: impl FnOnce(&mut BuildSpec)) -> PathBuf {
        let source = self.path(format!("{name}.source"));
        fs::create_dir_all(&source).unwrap();
        for (path, content) in files {
            let path = source.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        self.layer(&source, name, choose)
    }

    /// Writes what `writer` makes of `tree` as layer `name`.
    fn by_hand(&self, writer: &mut Writer, tree: &by_hand::Tree, name: &str) -> PathBuf {
        let written = writer.image(tree);
        fs::write(self.path(name), &written.bytes).unwrap();
        fs::write(self.path("blobs").join(writer.id()), &writer.blob).unwrap();
        self.path(name)
    }

    /// What is in an image, unpacked.
    fn listing(&self, bootstrap: &Path) -> Vec<listing::Line> {
        unpacked(bootstrap, &self.path("blobs"), &self.path("unpacked"), &self.runtime)
    }
}

/// A merge into version 5 or 6 with everything left as it is by default.
fn merge_spec(layers: &[PathBuf], is_v5: bool, out: &Path) -> MergeSpec {
    let mut packed = Packed::default();
    let layers = layers.iter().map(|path| {
        let found = bootstrap::find(path, None).unwrap();
        if is_v5 && found.is_v5() {
            packed.add(&found.v5().unwrap()).unwrap();
        }
        Layer { image: bootstrap::open(path).unwrap(), name: path.clone(), id: None }
    });
    MergeSpec {
        layers: layers.collect(),
        parent: None,
        dictionary: None,
        whiteouts: Whiteouts::Oci,
        prefetch: None,
        facts: Vec::new(),
        version: if is_v5 { MergeVersion::V5(packed) } else { MergeVersion::V6 },
        out: out.to_owned(),
    }
}

/// Merges into version 5; the digests of all inodes must be right.
fn merge(layers: &[PathBuf], out: &Path) -> Result<MergeReport, BuildError> {
    let report = build::merge(merge_spec(layers, true, out), &())?;
    let bytes = fs::read(out).unwrap();
    let checked = check(&Bootstrap::parse(&bytes).unwrap());
    assert_eq!((checked.errors, checked.remarks), (0, 0), "{:?}", checked.findings);
    Ok(report)
}

#[track_caller]
fn refusal(layers: &[PathBuf], out: &Path) -> String {
    let error = merge(layers, out).unwrap_err();
    assert!(!out.exists());
    rafsd::base::Chain(&error).to_string()
}

/// What readers are told of a chunk: blob, number and every place, digest.
type Told = (String, [u64; 6], [u8; 32]);

/// What readers are told of each chunk of each file.
fn chunks(bootstrap: &Path) -> BTreeMap<String, Vec<Told>> {
    let bytes = fs::read(bootstrap).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    let mut todo = vec![(String::new(), image.inode(1).unwrap())];
    let mut files = BTreeMap::new();
    while let Some((path, inode)) = todo.pop() {
        for child in image.children(&inode) {
            let child = child.unwrap();
            todo.push((format!("{path}/{}", String::from_utf8_lossy(child.name)), child));
        }
        let of = |record: &rafsd::format::rafs::ChunkRecord| {
            let numbers = [
                record.index.get().into(),
                record.flags.get().into(),
                record.compressed_offset.get(),
                record.compressed_size.get().into(),
                record.uncompressed_offset.get(),
                record.uncompressed_size.get().into(),
            ];
            (image.blobs()[record.blob_index.get() as usize].id.to_string(), numbers, record.digest)
        };
        if !inode.chunks.is_empty() {
            files.insert(path, inode.chunks.iter().map(of).collect());
        }
    }
    files
}

#[test]
fn random_stacks_are_in_version_5_what_they_are_in_version_6() {
    if !rustix::process::geteuid().is_root() {
        return skip("random_stacks_are_in_version_5_what_they_are_in_version_6", "not root");
    }
    let shop = Shop::new();
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let count = 2 + random.below(4);
        let layers: Vec<_> = (0..count).map(|_| layers::random(&mut random, 40)).collect();
        let mut built = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let tree = shop.path(format!("{seed}-{number}.source"));
            fs::create_dir(&tree).unwrap();
            layers::write(&tree, layer, Form::Oci, number as u64).unwrap();
            built.push(shop.layer(&tree, &format!("{seed}-{number}"), |spec| {
                spec.version = [PACKED, ALIGNED][number % 2];
            }));
        }
        let (five, six) = (shop.path(format!("{seed}.five")), shop.path(format!("{seed}.six")));
        let report = merge(&built, &five).unwrap();
        let other = build::merge(merge_spec(&built, false, &six), &()).unwrap();
        listing::assert_same(&shop.listing(&six), &shop.listing(&five));
        let counts = |it: &MergeReport| (it.files, it.directories, it.hard_links, it.specials, it.blobs.clone());
        assert_eq!(counts(&report), counts(&other), "{seed}");
    }
}

#[test]
fn one_layer_merges_into_itself() {
    let shop = Shop::new();
    let content = Random::new(3).text(200_000);
    let files = [("a", &content[..]), ("dir/b", &content[..70_001]), ("dir/c", b"short"), ("empty", b"")];
    for (name, version) in [("packed", PACKED), ("aligned", ALIGNED)] {
        let layer = shop.files(name, &files, |spec| spec.version = version);
        let out = shop.path(format!("{name}.merged"));

        merge(std::slice::from_ref(&layer), &out).unwrap();

        assert!(fs::read(&out).unwrap() == fs::read(&layer).unwrap(), "{name}: the same bootstrap, byte for byte");
    }
}

#[test]
fn chunks_keep_every_place_and_blobs_are_numbered_by_first_use() {
    let shop = Shop::new();
    let mut layers = Vec::new();
    let mut want = BTreeMap::new();
    for (seed, compression) in [(1, Algorithm::Gzip), (2, Algorithm::Gzip)] {
        let mut writer = Writer { compression, ..Writer::default() };
        // Later layers come first in the tree.
        let name = format!("{}-file", 9 - seed);
        let item = |len| Item::File(noise(seed, len));
        let tree = by_hand::tree([("hidden", item(5000)), ("d", Item::Dir(by_hand::tree([(&name, item(30_001))])))]);
        let layer = shop.by_hand(&mut writer, &tree, &format!("layer-{seed}"));
        want.append(&mut chunks(&layer));
        layers.push(layer);
    }
    layers.push(shop.files("top", &[(".wh.hidden", b"")], |spec| spec.chunk_size = 4096));
    let out = shop.path("merged");

    let report = merge(&layers, &out).unwrap();

    want.remove("/hidden");
    assert_eq!(chunks(&out), want);
    let first: Vec<_> = ["/d/7-file", "/d/8-file"].map(|path| want[path][0].0.clone()).into();
    assert_eq!((&report.blobs, report.dropped_blobs.len()), (&first, 0));
    assert!(want["/d/8-file"].iter().any(|(_, numbers, _)| numbers[4] % 4096 != 0), "they are packed");
}

#[test]
fn layers_of_version_6_join_where_their_blobs_are_plain_chunks() {
    let shop = Shop::new();
    let content = Random::new(8).text(200_000);
    let low = shop.files("low", &[("a", &content), ("both", b"low")], |_| ());
    let six = |batching, blob_toc| {
        move |spec: &mut BuildSpec| {
            (spec.version, spec.batching, spec.blob_toc) = (Version::V6, batching, blob_toc);
        }
    };
    let files: [(&str, &[u8]); 2] = [("b", &content[7..]), ("both", b"high")];
    for (name, blob_toc) in [("plain", false), ("toc", true)] {
        let high = shop.files(name, &files, six(Batching::Off, blob_toc));
        let (five, out) = (shop.path(format!("{name}.five")), shop.path(format!("{name}.six")));
        let layers = [low.clone(), high.clone()];
        let report = merge(&layers, &five).unwrap();
        assert_eq!(report.blobs.len(), 2);
        build::merge(merge_spec(&layers, false, &out), &()).unwrap();
        listing::assert_same(&shop.listing(&out), &shop.listing(&five));

        // What was merged into version 6 no longer tells where plain bytes of version 5 are.
        let said = refusal(&[out], &shop.path("no"));
        assert!(said.contains("is of version 5, and no layer of that version tells"), "{said}");
        assert!(said.contains("--fs-version 6"), "{said}");
        // Those of version 6 alone are fine.
        merge(&[high], &shop.path(format!("{name}.alone"))).unwrap();
    }

    let batched = shop.files("batched", &[("x", b"1"), ("y", b"2")], six(Batching::Default, false));
    let said = refusal(&[low.clone(), batched], &shop.path("no"));
    assert!(said.contains("a blob with batches"), "{said}");
    let encrypted = shop.files("encrypted", &[("x", b"1")], |spec| {
        (spec.version, spec.batching, spec.encryption) = (Version::V6, Batching::Off, Encryption::Random);
    });
    let said = refusal(&[low, encrypted], &shop.path("no"));
    assert!(said.contains("is encrypted"), "{said}");
}

#[test]
fn all_blobs_have_one_digest_and_one_compression_unless_nothing_is_compressed() {
    let shop = Shop::new();
    let text = "words ".repeat(9000).into_bytes();
    let zstd = shop.files("zstd", &[("a", &text)], |_| ());
    let lz4 = shop.files("lz4", &[("b", &text)], |spec| spec.compression = Compression::Lz4);
    let none = shop.files("none", &[("c", &text)], |spec| spec.compression = Compression::None);
    let sha256 = shop.files("sha256", &[("d", &text[1..])], |spec| spec.digest = DigestAlgorithm::Sha256);
    let out = shop.path("merged");

    let said = refusal(&[zstd.clone(), lz4.clone()], &out);
    assert!(said.contains("is compressed with") && said.contains("lz4_block") && said.contains("zstd"), "{said}");
    let said = refusal(&[zstd.clone(), sha256], &out);
    assert!(said.contains("sha256") && said.contains("blake3"), "{said}");

    for (layers, compression) in [
        (vec![zstd.clone(), none.clone()], Algorithm::Zstd),
        (vec![none.clone(), lz4.clone()], Algorithm::Lz4Block),
        (vec![none], Algorithm::None),
    ] {
        merge(&layers, &out).unwrap();
        assert_eq!(Bootstrap::parse(&fs::read(&out).unwrap()).unwrap().summary().compression, compression);
        assert_eq!(shop.listing(&out).len(), layers.len() + 1);
    }
    // What counts is what is left.
    fs::remove_file(&out).unwrap();
    let top = shop.files("top", &[(".wh.b", b"")], |_| ());
    assert_eq!(merge(&[zstd, lz4, top], &out).unwrap().dropped_blobs.len(), 1);
}

#[test]
fn layers_that_contradict_each_other_and_old_ones_are_refused() {
    let shop = Shop::new();
    let item = |seed| by_hand::tree([("f", Item::File(noise(seed, 9000)))]);
    let mut writer = Writer { id: Some("a".repeat(64)), ..Writer::default() };
    let one = writer.image(&item(1)).bytes;
    let mut aligned = Writer { aligned: true, ..Writer { id: Some("a".repeat(64)), ..Writer::default() } };
    aligned.plain = 1;
    let other = aligned.image(&item(1)).bytes;
    let mut packed = Packed::default();
    packed.add(&Bootstrap::parse(&one).unwrap()).unwrap();
    let error = packed.add(&Bootstrap::parse(&other).unwrap()).unwrap_err();
    assert!(matches!(error, NotInVersion5::Sizes { .. }), "{error:?}");

    let mut old = Writer { extended: false, ..Writer::default() };
    let old = shop.by_hand(&mut old, &item(2), "old");
    let said = refusal(&[old], &shop.path("no"));
    assert!(said.contains("so old that no image tells how many chunks it has"), "{said}");
}

#[test]
fn wishes_names_and_sizes_of_blobs_are_in_the_image() {
    let shop = Shop::new();
    let low = shop.files("low", &[("a", b"1"), ("d/x", b"2")], |_| ());
    let high = shop.files("high", &[("c", b"3")], |_| ());
    let out = shop.path("merged");
    let id: rafsd::base::BlobId = "registry".parse().unwrap();
    let mut spec = merge_spec(&[low.clone(), high.clone()], true, &out);
    spec.layers[1].id = Some(id.clone());
    spec.prefetch = Some(vec![b"/c".to_vec(), b"/d".to_vec(), b"/none".to_vec()]);
    spec.facts = vec![BlobFacts { size: Some(12345), ..BlobFacts::about(id.clone()) }];

    assert_eq!(build::merge(spec, &()).unwrap().prefetched_paths, 2);

    let bytes = fs::read(&out).unwrap();
    let image = Bootstrap::parse(&bytes).unwrap();
    let names: Vec<_> = image.prefetch().map(|number| image.inode(number).unwrap().name).collect();
    assert_eq!(names, [b"c", b"d"]);
    let blob = image.blobs().iter().find(|blob| blob.id == id).unwrap();
    assert_eq!(blob.extent.unwrap().stored_len, 12345);

    let mut spec = merge_spec(&[low, high], true, &out);
    spec.layers[1].id = Some(id.clone());
    spec.facts = vec![BlobFacts { toc_size: Some(1024), ..BlobFacts::about(id) }];
    let error = build::merge(spec, &()).unwrap_err();
    assert!(matches!(error, BuildError::NotInVersion5(_)), "{error:?}");
}

#[test]
fn the_command_merges_and_says_what_it_cannot() {
    let shop = Shop::new();
    shop.files("low", &[("a", b"1"), ("gone", b"2")], |_| ());
    shop.files("high", &[("b", b"3"), (".wh.gone", b"")], |_| ());
    shop.files("six", &[("x", b"1"), ("y", b"2")], |spec| spec.version = Version::V6);
    let run = |args: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_rafsd")).current_dir(shop.dir.path()).args(args).output().unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };

    let (code, said, _) = run(&["merge", "low/bootstrap", "high/bootstrap", "-o", "five", "--fs-version", "5"]);
    assert!(code == Some(0) && said.contains("2 files"), "{said}");
    let (code, said, _) = run(&["check", "five"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(chunks(&shop.path("five")).into_keys().collect::<Vec<_>>(), ["/a", "/b"]);

    let (code, _, said) = run(&["merge", "low/bootstrap", "six/bootstrap", "-o", "no", "--fs-version", "5"]);
    assert!(code == Some(1) && said.contains("blob with batches") && said.contains("--fs-version 6"), "{said}");
    assert!(!shop.path("no").exists());
}
