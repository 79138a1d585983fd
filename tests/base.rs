//! Images built upon others: a parent below the source, a dictionary of chunks.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use rafsd::base::Chain;
use rafsd::build::{self, Base, BuildError, BuildReport, Layer, MergeSpec, MergeVersion, Source, Whiteouts};
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image::Image;
use support::building::{build, spec};
use support::image::{self, Mounted};
use support::layers::{self, Form};
use support::tree::Random;
use support::{listing, skip, tree, unable_to_mount};

fn layer(bootstrap: &str) -> Layer {
    let name = PathBuf::from(bootstrap);
    Layer { image: Image::open(&name).unwrap(), name, id: None }
}

fn on_parent(source: &Path, parent: &BuildReport, whiteouts: Whiteouts, out: &Path) -> Result<BuildReport, BuildError> {
    let base = Base { parent: Some(layer(&parent.bootstrap)), whiteouts, dictionary: None };
    build::build(build::BuildSpec { base, ..spec(Source::open(source)?, out) }, &())
}

fn on_dictionary(source: &Path, dictionary: &BuildReport, out: &Path) -> Result<BuildReport, BuildError> {
    let base = Base { dictionary: Some(layer(&dictionary.bootstrap)), ..Base::default() };
    build::build(build::BuildSpec { base, ..spec(Source::open(source)?, out) }, &())
}

/// What the kernel shows of `bootstrap`, whose blobs are all those of these builds.
fn listing_of(bootstrap: &str, builds: &[&BuildReport], scratch: &Path) -> Vec<listing::Line> {
    let image = Image::open(Path::new(bootstrap)).unwrap();
    let mut devices = Vec::new();
    for (number, device) in image.devices().iter().enumerate() {
        let blob = builds.iter().flat_map(|build| &build.blobs).find(|blob| blob.id == device.blob.as_str());
        let path = scratch.join(format!("device-{number}"));
        image::expand(Path::new(&blob.expect("a blob of these builds").path), &path).unwrap();
        devices.push(path);
    }
    let at = scratch.join("mnt");
    fs::create_dir_all(&at).unwrap();
    let mounted = Mounted::new(Path::new(bootstrap), &devices, &at).unwrap();
    listing::of(mounted.path()).unwrap()
}

fn write(root: &Path, files: &[(&str, &[u8])]) -> PathBuf {
    for (path, content) in files {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    root.to_owned()
}

#[test]
fn directories_and_archives_upon_a_parent_show_what_overlayfs_shows() {
    if let Some(why) = unable_to_mount() {
        return skip("directories_and_archives_upon_a_parent_show_what_overlayfs_shows", why);
    }
    for seed in 500..512 {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut random = Random::new(seed);
        let (low, high) = (layers::random(&mut random, 50), layers::random(&mut random, 50));
        for name in ["low", "high", "high.oci", "overlay"] {
            fs::create_dir(at(name)).unwrap();
        }
        layers::write(&at("low"), &low, Form::Overlayfs, 1).unwrap();
        layers::write(&at("high"), &high, Form::Overlayfs, 2).unwrap();
        layers::write(&at("high.oci"), &high, Form::Oci, 2).unwrap();
        layers::pack(&at("high.oci"), &at("high.tar"));
        let trees = [at("low"), at("high")];
        let want = listing::of_overlay(Mounted::overlay(&trees, &at("overlay")).unwrap().path()).unwrap();

        let parent = build(&at("low"), &at("parent")).unwrap();
        let of_directory = on_parent(&at("high"), &parent, Whiteouts::Overlayfs, &at("one")).unwrap();
        let of_oci = on_parent(&at("high.oci"), &parent, Whiteouts::Oci, &at("two")).unwrap();
        let of_archive = on_parent(&at("high.tar"), &parent, Whiteouts::Oci, &at("three")).unwrap();

        for build in [of_directory, of_archive, of_oci] {
            // The lowest layer has marks of overlayfs whatever the upper one has.
            let mut got = listing_of(&build.bootstrap, &[&build, &parent], dir.path());
            if !build.bootstrap.contains("one") {
                got.retain(|line| !line.facts.contains("dev=0:0"));
                for line in &mut got {
                    line.facts = line.facts.replace(" trusted.overlay.opaque=y", "");
                }
            }
            listing::assert_same(&want, &got);
        }
    }
}

#[test]
fn what_the_parent_has_is_not_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(9);
    let (old, new) = (random.noise(3 << 20), random.noise(1 << 20));
    let low = write(&dir.path().join("low"), &[("a", &old), ("b", b"beta")]);
    let both = [old.as_slice(), &new].concat();
    let high = write(&dir.path().join("high"), &[("both", &both), ("beta", b"beta"), (".wh.b", b"")]);
    let parent = build(&low, &dir.path().join("parent")).unwrap();
    layers::pack(&high, &dir.path().join("high.tar"));

    for source in ["high", "high.tar"] {
        let out = dir.path().join(format!("{source}.out"));
        let report = on_parent(&dir.path().join(source), &parent, Whiteouts::Oci, &out).unwrap();

        assert_eq!((report.blobs.len(), report.blobs[0].chunks), (1, 1), "{source}");
        assert_eq!(report.deduplicated_bytes, (3 << 20) + 4);
        assert_eq!(report.base_blobs, [parent.blobs[0].id.clone()]);
        let image = Image::open(Path::new(&report.bootstrap)).unwrap();
        let ids: Vec<_> = image.devices().iter().map(|device| device.blob.to_string()).collect();
        assert_eq!(ids, [&parent.blobs[0].id, &report.blobs[0].id].map(Clone::clone), "the parent's blobs come first");
    }
}

#[test]
fn a_source_with_nothing_new_makes_no_blob_and_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    tree::big_file(&source.join("big"), 3, 1).unwrap();
    write(&source, &[("d/small", b"small"), ("zeros", &[0; 10_000])]);
    let parent = build(&source, &dir.path().join("parent")).unwrap();

    let again = on_parent(&source, &parent, Whiteouts::None, &dir.path().join("again")).unwrap();

    assert_eq!((again.blobs.len(), again.deduplicated_bytes), (0, again.source_bytes));
    assert!(fs::read(again.bootstrap).unwrap() == fs::read(&parent.bootstrap).unwrap());

    // An image with a dictionary is whole without it: the dictionary's blob is its own by then.
    let known = on_dictionary(&source, &parent, &dir.path().join("known")).unwrap();
    assert_eq!((known.blobs.len(), known.base_blobs.len()), (0, 1));
    assert!(fs::read(known.bootstrap).unwrap() == fs::read(&parent.bootstrap).unwrap());
}

#[test]
fn blobs_of_a_dictionary_follow_the_new_one_and_only_if_used() {
    let dir = tempfile::tempdir().unwrap();
    let built = |name: &str, files: &[(&str, &[u8])]| {
        let source = write(&dir.path().join(format!("{name}.source")), files);
        build(&source, &dir.path().join(name)).unwrap()
    };
    let (used, idle) = (built("used", &[("x", b"in the dictionary")]), built("idle", &[("y", b"never")]));
    let out = dir.path().join("dictionary");
    let dictionary = MergeSpec {
        layers: vec![layer(&idle.bootstrap), layer(&used.bootstrap)],
        parent: None,
        dictionary: None,
        whiteouts: Whiteouts::None,
        prefetch: None,
        facts: Vec::new(),
        version: MergeVersion::V6,
        out: out.clone(),
    };
    let dictionary = build::merge(dictionary, &()).unwrap();
    assert_eq!(dictionary.blobs.len(), 2);
    let dictionary = BuildReport { bootstrap: dictionary.bootstrap, ..BuildReport::default() };
    let source = write(&dir.path().join("source"), &[("a", b"in the dictionary"), ("b", b"new")]);

    let report = on_dictionary(&source, &dictionary, &dir.path().join("out")).unwrap();

    let image = Image::open(Path::new(&report.bootstrap)).unwrap();
    let ids: Vec<_> = image.devices().iter().map(|device| device.blob.to_string()).collect();
    assert_eq!(ids, [&report.blobs[0].id, &used.blobs[0].id].map(Clone::clone));
    assert_eq!((report.blobs[0].chunks, report.base_blobs), (1, vec![used.blobs[0].id.clone()]));
    if unable_to_mount().is_none() {
        let got = listing_of(&report.bootstrap, &[&used, &report_of(&report.blobs)], dir.path());
        listing::assert_same(&listing::of(&source).unwrap(), &got);
    }
}

fn report_of(blobs: &[build::BlobReport]) -> BuildReport {
    BuildReport { blobs: blobs.to_vec(), ..BuildReport::default() }
}

#[test]
fn neither_threads_nor_repetition_change_what_is_built_upon_a_parent() {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random::new(11);
    let pieces: Vec<Vec<u8>> = (0..40).map(|_| random.text(4096)).collect();
    let mut sources = Vec::new();
    for (name, known) in [("low", 20), ("high", 40)] {
        let root = dir.path().join(name);
        for file in 0..40 {
            let chosen = |random: &mut Random| pieces[usize::try_from(random.below(known)).unwrap()].clone();
            let content: Vec<u8> = (0..10).flat_map(|_| chosen(&mut random)).collect();
            write(&root, &[(&format!("{name}-{file}"), &content)]);
        }
        sources.push(root);
    }
    let mut low = spec(Source::open(&sources[0]).unwrap(), &dir.path().join("parent"));
    low.chunk_size = 4096;
    let parent = build::build(low, &()).unwrap();
    let run = |threads: usize| {
        let out = dir.path().join(format!("out-{threads}"));
        let mut high = spec(Source::open(&sources[1]).unwrap(), &out);
        (high.chunk_size, high.threads) = (4096, threads.try_into().unwrap());
        high.base.parent = Some(layer(&parent.bootstrap));
        let report = build::build(high, &()).unwrap();
        assert!(report.blobs[0].chunks <= 20, "the others are in the parent");
        support::building::output(&out)
    };
    let want = run(1);
    for threads in [1, 2, 8] {
        assert!(run(threads) == want, "{threads} threads");
    }
}

#[test]
fn bases_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = write(&dir.path().join("source"), &[("a", b"a")]);
    let mut small = spec(Source::open(&source).unwrap(), &dir.path().join("small"));
    small.chunk_size = 4096;
    let small = build::build(small, &()).unwrap();
    let mut other = spec(Source::open(&source).unwrap(), &dir.path().join("other"));
    other.digest = DigestAlgorithm::Sha256;
    let other = build::build(other, &()).unwrap();
    let out = dir.path().join("out");
    let check = |result: Result<BuildReport, BuildError>, reason: &str| {
        let text = Chain(&result.expect_err(reason)).to_string();
        assert!(text.contains(reason), "{text}");
        assert!(!out.join("bootstrap").exists());
    };

    check(on_parent(&source, &small, Whiteouts::Oci, &out), "chunk size 4096, the images before it 1048576");
    check(on_dictionary(&source, &small, &out), "chunk size 4096");
    check(on_dictionary(&source, &other, &out), "has a blake3 digest");
}
