//! Several sources built into one image: what overlayfs shows of the same layers, from a blob for
//! each or from one for all.

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rafsd::build::{
    self, BuildError, BuildReport, BuildSpec, Encryption, Layer, MergeSpec, MergeVersion, Source, Whiteouts,
};
use rafsd::image::Image;
use support::building::{output, spec};
use support::image::{self, Mounted};
use support::layers::{self, Form, What};
use support::tree::Random;
use support::{listing, skip, unable_to_mount};

/// A directory for sources and images.
struct Workshop(tempfile::TempDir);

impl Workshop {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A directory of regular files.
    fn files(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let source = self.path(name);
        fs::create_dir(&source).unwrap();
        for (path, content) in files {
            let path = source.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        source
    }

    fn spec(&self, sources: &[PathBuf], out: &str) -> BuildSpec {
        let mut sources: Vec<_> = sources.iter().map(|path| Source::open(path).unwrap()).collect();
        let mut spec = spec(sources.remove(0), &self.path(out));
        spec.sources.append(&mut sources);
        spec
    }

    fn build(&self, sources: &[PathBuf], out: &str) -> BuildReport {
        build::build(self.spec(sources, out), &()).unwrap()
    }

    /// What the kernel shows of an image whose blobs are those of `reports`.
    fn shown(&self, bootstrap: &Path, reports: &[&BuildReport]) -> Vec<listing::Line> {
        let devices = Image::open(bootstrap).unwrap();
        let devices = devices.devices().iter().map(|device| {
            let mut blobs = reports.iter().flat_map(|report| &report.blobs);
            let blob = blobs.find(|blob| blob.id == device.blob.as_str()).expect("a blob of these images");
            let expanded = self.path(&format!("device-{}", blob.id));
            if !expanded.exists() {
                image::expand(Path::new(&blob.path), &expanded).unwrap();
            }
            expanded
        });
        let devices: Vec<_> = devices.collect();
        let at = self.path("mnt");
        fs::create_dir_all(&at).unwrap();
        listing::of(Mounted::new(bootstrap, &devices, &at).unwrap().path()).unwrap()
    }
}

fn names(report: &BuildReport) -> Vec<String> {
    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let mut names = Vec::new();
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        names.push(String::from_utf8(visit.unwrap().path.join(&b'/')).unwrap());
    }
    names
}

/// Kinds of change from a short list, three layers deep, and trees that meet by chance.
fn stacks() -> Vec<Vec<layers::Layer>> {
    let file = |text: &str| What::File(text.as_bytes().to_vec());
    let dir = |opaque| What::Directory { opaque };
    let entry = |path: &str, what: What| (path.as_bytes().to_vec(), what);
    let by_hand = vec![
        vec![
            entry("f-d", file("low")),
            entry("d-f", dir(false)),
            entry("d-f/gone", file("low")),
            entry("opaque", dir(false)),
            entry("opaque/gone", file("low")),
            entry("back", file("low")),
            entry("linked", file("low")),
            entry("link", What::HardLink(b"linked".to_vec())),
        ],
        vec![
            entry("f-d", dir(false)),
            entry("f-d/new", file("middle")),
            entry("d-f", file("middle")),
            entry("opaque", dir(true)),
            entry("opaque/middle", file("middle")),
            entry("back", What::Whiteout),
            entry("linked", What::Symlink(b"elsewhere".to_vec())),
        ],
        vec![
            entry("f-d", dir(false)),
            entry("f-d/new", What::Fifo),
            entry("d-f", What::Character),
            entry("opaque", dir(false)),
            entry("opaque/high", file("middle")),
            entry("back", file("high")),
        ],
    ];
    let mut stacks = vec![by_hand];
    for seed in 0..6 {
        let mut random = Random::new(seed);
        stacks.push((0..3).map(|_| layers::random(&mut random, 40)).collect());
    }
    stacks
}

#[test]
fn stacks_of_sources_look_as_overlayfs_shows_them_and_as_their_merged_images() {
    let test = "stacks_of_sources_look_as_overlayfs_shows_them_and_as_their_merged_images";
    if let Some(why) = unable_to_mount() {
        return skip(test, why);
    }
    for stack in stacks() {
        let shop = Workshop::new();
        fs::create_dir(shop.path("memory")).unwrap();
        let memory = Mounted::memory(&shop.path("memory")).unwrap();
        let mut sources = [Vec::new(), Vec::new()];
        for (number, layer) in stack.iter().enumerate() {
            for (sources, form) in sources.iter_mut().zip([Form::Overlayfs, Form::Oci]) {
                let tree = memory.path().join(format!("{form:?}-{number}"));
                fs::create_dir(&tree).unwrap();
                layers::write(&tree, layer, form, number as u64).unwrap();
                sources.push(tree);
            }
        }
        fs::create_dir(shop.path("overlay")).unwrap();
        let want = listing::of_overlay(Mounted::overlay(&sources[0], &shop.path("overlay")).unwrap().path()).unwrap();
        let archive = memory.path().join("middle.tar");
        layers::pack(&sources[1][1], &archive);
        sources[1][1] = archive;

        for (sources, whiteouts) in sources.iter().zip([Whiteouts::Overlayfs, Whiteouts::Oci]) {
            let build = |out: &str, one_blob| {
                let mut spec = shop.spec(sources, out);
                (spec.base.whiteouts, spec.one_blob) = (whiteouts, one_blob);
                build::build(spec, &()).unwrap()
            };
            let (many, one) = (build("many", false), build("one", true));
            assert_eq!(one.blobs.len(), 1);
            listing::assert_same(&want, &shop.shown(Path::new(&many.bootstrap), &[&many]));
            listing::assert_same(&want, &shop.shown(Path::new(&one.bootstrap), &[&one]));

            let built: Vec<_> =
                (0..3).map(|at| shop.build(&sources[at..=at], &format!("layer-{whiteouts:?}-{at}"))).collect();
            let layer = |report: &BuildReport| {
                let name = PathBuf::from(&report.bootstrap);
                Layer { image: Image::open(&name).unwrap(), name, id: None }
            };
            let merge = MergeSpec {
                layers: built.iter().map(layer).collect(),
                parent: None,
                dictionary: None,
                whiteouts,
                prefetch: None,
                facts: Vec::new(),
                version: MergeVersion::V6,
                out: shop.path("merged"),
            };
            build::merge(merge, &()).unwrap();
            listing::assert_same(&want, &shop.shown(&shop.path("merged"), &built.iter().collect::<Vec<_>>()));
        }
    }
}

#[test]
fn what_a_lower_layer_has_is_not_stored_again() {
    let shop = Workshop::new();
    let text = Random::new(1).text(300_000);
    let text = std::str::from_utf8(&text).unwrap();
    let sources = [
        shop.files("low", &[("a", text)]),
        shop.files("middle", &[("b", text)]),
        shop.files("high", &[("c", text), ("d", "more")]),
    ];

    let report = shop.build(&sources, "out");

    assert_eq!((report.files, report.source_bytes, report.deduplicated_bytes), (4, 900_004, 600_000));
    assert_eq!(report.blobs.iter().map(|blob| blob.chunks).collect::<Vec<_>>(), [1, 1]);
    let blobs: Vec<_> = report.layers.iter().map(|layer| layer.blob.as_deref()).collect();
    assert_eq!(blobs, [Some(&*report.blobs[0].id), None, Some(&*report.blobs[1].id)]);
    assert_eq!(names(&report), ["", "a", "b", "c", "d"]);
}

#[test]
fn blobs_that_are_hidden_entirely_are_not_kept() {
    let shop = Workshop::new();
    let hidden = [
        shop.files("low", &[("a", "hidden")]),
        shop.files("middle", &[("b", "seen")]),
        shop.files("high", &[(".wh.a", "this is content too")]),
    ];

    let report = shop.build(&hidden, "out");

    let kept: Vec<_> = report.layers.iter().map(|layer| layer.blob.is_some()).collect();
    assert_eq!((report.blobs.len(), kept), (1, vec![false, true, false]));
    assert_eq!(output(&shop.path("out")).len(), 2, "a bootstrap and a blob");

    let nothing = [shop.files("low2", &[("a", "")]), shop.files("high2", &[(".wh.a", "this is content too")])];
    let report = shop.build(&nothing, "none");
    assert_eq!((report.blobs.len(), names(&report)), (0, vec![String::new()]));
    assert_eq!(output(&shop.path("none")).len(), 1, "a bootstrap");
}

#[test]
fn one_blob_of_one_source_is_the_image_that_it_always_was() {
    let shop = Workshop::new();
    let source = [shop.files("source", &[("a", "one"), (".wh.b", "two"), ("c", "one")])];
    shop.build(&source, "plain");
    let spec = BuildSpec { one_blob: true, ..shop.spec(&source, "one") };
    build::build(spec, &()).unwrap();

    assert!(output(&shop.path("plain")) == output(&shop.path("one")));
    assert_eq!(names(&shop.build(&source, "plain")), ["", ".wh.b", "a", "c"]);
}

#[test]
fn a_failing_layer_leaves_nothing() {
    let shop = Workshop::new();
    let good = [shop.files("low", &[("a", "1")]), shop.files("middle", &[("b", "2")])];
    let bad = shop.path("bad.tar");
    fs::write(&bad, [b'x'; 5000]).unwrap();
    let sources: Vec<_> = good.into_iter().chain([bad.clone()]).collect();
    for one_blob in [false, true] {
        let spec = BuildSpec { one_blob, ..shop.spec(&sources, "out") };
        let error = build::build(spec, &()).unwrap_err();
        assert!(matches!(&error, BuildError::Archive { archive, .. } if *archive == bad), "{error}");
        assert_eq!(output(&shop.path("out")), []);
    }
}

#[test]
fn a_blob_that_is_damaged_before_it_is_checked_ends_the_build_with_nothing() {
    struct Vandal(std::cell::Cell<u32>, u32);
    impl build::Progress for Vandal {
        fn verifying(&self, blob: Option<&Path>) {
            if self.0.replace(self.0.get() + 1) == self.1 {
                let path = blob.unwrap();
                let mut bytes = fs::read(path).unwrap();
                bytes[0] ^= 1;
                fs::write(path, bytes).unwrap();
            }
        }
    }
    let shop = Workshop::new();
    let sources: Vec<_> = ["one", "two", "three"].map(|name| shop.files(name, &[(name, name)])).into();
    for victim in 0..3 {
        let error = build::build(shop.spec(&sources, "out"), &Vandal(0.into(), victim)).unwrap_err();
        assert!(matches!(error, BuildError::Verify(_)), "{error}");
        assert_eq!(output(&shop.path("out")), []);
    }
}

#[test]
fn a_bootstrap_in_a_blob_needs_one_blob() {
    let shop = Workshop::new();
    let sources = [shop.files("low", &[("a", "1"), ("b", "1")]), shop.files("high", &[(".wh.a", ""), ("c", "3")])];
    let spec = |one_blob| BuildSpec { inline_bootstrap: true, one_blob, ..shop.spec(&sources, "out") };
    let error = build::build(spec(false), &()).unwrap_err().to_string();
    assert!(error.contains("--one-blob"), "{error}");

    let report = build::build(spec(true), &()).unwrap();

    assert_eq!(output(&shop.path("out")).len(), 1);
    let image = rafsd::reader::bootstrap::open(Path::new(&report.bootstrap)).unwrap();
    let size = |name: &[u8]| image.lookup(name).unwrap().map(|inode| inode.size);
    assert_eq!([b"a", b"b", b"c"].map(|name| size(name)), [None, Some(1), Some(1)]);
}

#[test]
fn every_blob_of_an_encrypted_stack_has_a_key_of_its_own() {
    let shop = Workshop::new();
    let sources: Vec<_> = ["one", "two", "three"].map(|name| shop.files(name, &[(name, name)])).into();
    let spec = BuildSpec { encryption: Encryption::Random, ..shop.spec(&sources, "out") };

    let report = build::build(spec, &()).unwrap();

    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let keys: BTreeSet<_> = image.devices().iter().map(|device| device.entry.meta_digest).collect();
    assert_eq!((report.encrypted, report.blobs.len(), keys.len()), (true, 3, 3));
}

#[test]
fn a_parent_lies_below_all_layers_and_its_chunks_are_not_stored_again() {
    let shop = Workshop::new();
    let parent = shop.build(&[shop.files("parent", &[("p", "parent"), ("gone", "this")])], "parent.out");
    let sources = [shop.files("low", &[(".wh.gone", ""), ("q", "parent")]), shop.files("high", &[("r", "new")])];
    let mut spec = shop.spec(&sources, "out");
    let name = PathBuf::from(&parent.bootstrap);
    spec.base.parent = Some(Layer { image: Image::open(&name).unwrap(), name, id: None });

    let report = build::build(spec, &()).unwrap();

    assert_eq!(names(&report), ["", "p", "q", "r"]);
    assert_eq!((report.base_blobs, report.blobs.len()), (vec![parent.blobs[0].id.clone()], 1));
}

#[test]
fn hints_are_about_the_tree_of_all_layers() {
    let shop = Workshop::new();
    let low = shop.files("low", &[("dir/a", "1"), ("gone", "2")]);
    let sources = [low, shop.files("high", &[("b", "3"), (".wh.gone", "")])];
    let hints = build::PrefetchHints::parse(b"/b\n/gone\n/dir/a\n");
    let spec = BuildSpec { prefetch: hints, ..shop.spec(&sources, "out") };

    let report = build::build(spec, &()).unwrap();

    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let nid = |path: &str| image.lookup(path.as_bytes()).unwrap().unwrap().nid;
    assert_eq!(image.prefetch().collect::<Vec<_>>(), [nid("b"), nid("dir/a")]);
    assert_eq!(report.prefetch_entries, 2);
}
