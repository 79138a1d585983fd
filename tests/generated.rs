//! Images of generated archives and trees show what an independent model says, built with options
//! that come from the seed as well; and so does what some of them are unpacked to.
//!
//! A few hundred each time; `RAFSD_TREES=10000 cargo test --release --test generated` makes that
//! many of each kind, and `RAFSD_SEED=N` starts from another seed.

#[path = "support/generated/mod.rs"]
mod generated;
mod support;

use std::fmt::Write as _;
use std::fs;
use std::io::Cursor;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

use generated::member::{Item, archive};
use generated::minimal::minimal;
use generated::model::Model;
use generated::random;
use generated::shown::shown;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafsd::blob::BlobKey;
use rafsd::build::{self, Batching, BuildReport, BuildSpec, Compression, Encryption, Source, Version};
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::reader::Files;
use rafsd::source::LocalSource;
use rafsd::tools::unpack::{UnpackOptions, to_directory, to_stream};
use support::tree::Random;
use support::{building, listing};
use tokio::runtime::Runtime;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// What to build with one of several kits.
fn spec(source: Source, out: &Path, kit: u64) -> BuildSpec {
    let (compression, digest, chunk_size) = [
        (Compression::Lz4, DigestAlgorithm::Blake3, 4096),
        (Compression::None, DigestAlgorithm::Sha256, 4096),
        (Compression::Zstd { level: 1 }, DigestAlgorithm::Blake3, 8192),
        (Compression::Zstd { level: 3 }, DigestAlgorithm::Sha256, 1 << 20),
    ][usize::try_from(kit % 4).unwrap()];
    let mut spec = BuildSpec::new(source, out.to_owned());
    (spec.compression, spec.digest) = (compression, digest);
    (spec.chunk_size, spec.threads) = (chunk_size, NonZeroUsize::MIN);
    spec
}

/// Builds with one of several kits.
fn build(source: Source, out: &Path, kit: u64) -> Result<BuildReport, build::BuildError> {
    build::build(spec(source, out, kit), &())
}

/// Builds with a kit and with options that change how the image is read: the same for a seed.
fn build_any(source: Source, out: &Path, seed: u64) -> Result<BuildReport, build::BuildError> {
    let mut spec = spec(source, out, seed);
    let mut random = Random::new(seed ^ 0x6b69_7473);
    if random.below(3) == 0 {
        spec.chunk_size = 1 << (12 + random.below(10));
    }
    spec.batching = match random.below(4) {
        0 => Batching::Off,
        1 => Batching::Size(4096),
        2 => Batching::Size(spec.chunk_size),
        _ => Batching::Default,
    };
    if random.below(3) == 0 {
        let bytes = random.noise(48);
        let key = BlobKey::new(bytes[..32].try_into().unwrap(), bytes[32..].try_into().unwrap());
        spec.encryption = Encryption::Key(key.expect("halves that differ"));
    }
    (spec.blob_toc, spec.inline_bootstrap) = (random.below(3) == 0, random.below(3) == 0);
    build::build(spec, &())
}

/// The finished image, as tools read it.
fn open(report: &BuildReport, out: &Path) -> Files {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    let runtime = RUNTIME
        .get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());
    let source = Arc::new(LocalSource::new(out.join("blobs")).unwrap());
    Files::open(Path::new(&report.bootstrap), source, runtime.handle().clone()).expect("our own image opens")
}

/// Whether the image of this seed is unpacked as well: some of them, and all in a long run.
fn goes_round(seed: u64) -> bool {
    std::env::var_os("RAFSD_TREES").is_some() || seed.is_multiple_of(3)
}

/// What is different between the model and the image of the archive of the image.
fn wrong_with_way_back(model: &Model, report: &BuildReport, out: &Path, seed: u64) -> String {
    let mut bytes = Vec::new();
    if let Err(error) = to_stream(&open(report, out), &mut bytes, &()) {
        return format!("not packed: {error}");
    }
    let again = out.join("again");
    let source = Source::Archive { name: "unpacked.tar".into(), stream: Box::new(Cursor::new(bytes)) };
    match build_any(source, &again, seed + 1) {
        Ok(again) => differences(model, &again, 0),
        Err(error) => format!("our own archive was refused: {error}"),
    }
}

/// What is different between the model and the directory that the image is unpacked to.
fn wrong_with_directory(model: &Model, report: &BuildReport, out: &Path) -> String {
    let new = out.join("new");
    match to_directory(&open(report, out), &new, UnpackOptions::default(), &()) {
        Ok(_) => listing::diff(&model.lines(), &listing::of(&new).unwrap()),
        Err(error) => format!("not unpacked: {error}"),
    }
}

/// What is different between image and model; empty if nothing is.
fn differences(model: &Model, report: &BuildReport, skipped_xattrs: u64) -> String {
    let shown = shown(report);
    let mut out = listing::diff(&model.lines(), &shown.lines);
    if model.groups() != shown.groups {
        writeln!(out, "links: {:?}\n  but: {:?}", model.groups(), shown.groups).unwrap();
    }
    if skipped_xattrs != report.skipped_xattrs {
        writeln!(out, "{} xattrs left out, not {skipped_xattrs}", report.skipped_xattrs).unwrap();
    }
    out
}

/// What is wrong with the image of an archive; empty if nothing is.
fn wrong_with_archive(items: &[Item], out: &Path, seed: u64) -> String {
    let stream = Box::new(Cursor::new(archive(items)));
    let built = catch_unwind(AssertUnwindSafe(|| {
        build_any(Source::Archive { name: "generated.tar".into(), stream }, out, seed)
    }));
    let wrong = match (built, Model::of(items)) {
        (Err(_), _) => "the builder panicked".to_owned(),
        (Ok(Ok(report)), Ok(model)) => {
            let wrong = differences(&model, &report, model.skipped_xattrs);
            if !wrong.is_empty() || !goes_round(seed) { wrong } else { wrong_with_way_back(&model, &report, out, seed) }
        }
        (Ok(Err(_)), Err(_)) if !building::output(out).is_empty() => "a refused archive left files behind".to_owned(),
        (Ok(Err(error)), Err(refused)) if !error.to_string().contains(refused.named()) => {
            format!("refused without naming {:?}: {error}", refused.named())
        }
        (Ok(Err(_)), Err(_)) => String::new(),
        (Ok(Ok(_)), Err(refused)) => format!("built, and should have been refused: {refused:?}"),
        (Ok(Err(error)), Ok(_)) => format!("refused: {error}"),
    };
    clear(out);
    wrong
}

/// What is wrong with the image of the tree that `items` make; empty if nothing is.
fn wrong_with_tree(items: &[Item], out: &Path, seed: u64) -> String {
    let Ok(model) = Model::of(items) else { return String::new() };
    let source = out.join("source");
    fs::create_dir_all(&source).unwrap();
    model.write_to(&source).unwrap();
    let image = out.join("image");
    let wrong = match build_any(Source::Directory(source), &image, seed) {
        Ok(report) => {
            let wrong = differences(&model, &report, model.skipped_xattrs);
            if !wrong.is_empty() || !goes_round(seed) { wrong } else { wrong_with_directory(&model, &report, &image) }
        }
        Err(error) => format!("refused: {error}"),
    };
    clear(out);
    wrong
}

/// What is wrong with the RAFS v5 image of an archive; empty if nothing is. Another version of the format
/// shows the same model by the way back.
fn wrong_with_v5(items: &[Item], out: &Path, seed: u64) -> String {
    let Ok(model) = Model::of(items).map(Model::in_version_5) else { return String::new() };
    let stream = Box::new(Cursor::new(archive(items)));
    let mut spec = spec(Source::Archive { name: "generated.tar".into(), stream }, out, seed);
    spec.version = Version::V5 { aligned: seed.is_multiple_of(2) };
    spec.inline_bootstrap = seed.is_multiple_of(5);
    let wrong = match build::build(spec, &()) {
        Ok(report) => wrong_with_way_back(&model, &report, out, seed),
        Err(error) => format!("refused: {error}"),
    };
    clear(out);
    wrong
}

fn clear(out: &Path) {
    fs::remove_dir_all(out).unwrap();
    fs::create_dir(out).unwrap();
}

/// Fails with the shortest list that still goes wrong.
fn check(count: u64, generate: fn(&mut Random) -> Vec<Item>, wrong: fn(&[Item], &Path, u64) -> String) {
    let dir = scratch();
    let out: PathBuf = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    let first = setting("RAFSD_SEED", 0);
    for seed in first..first + count {
        let items = generate(&mut Random::new(seed));
        if wrong(&items, &out, seed).is_empty() {
            continue;
        }
        let short = minimal(items, |items| !wrong(items, &out, seed).is_empty());
        let problem = wrong(&short, &out, seed);
        let cut = |text: String| text.chars().take(1500).collect::<String>();
        panic!("seed {seed}: {}\n{}", cut(problem), cut(format!("{short:#?}")));
    }
    eprintln!("{count} generated trees");
}

#[test]
fn images_of_archives_show_what_the_members_mean() {
    check(setting("RAFSD_TREES", 300), random::items, wrong_with_archive);
}

#[test]
fn images_of_version_5_show_what_the_members_mean() {
    check(setting("RAFSD_TREES", 150), random::items, wrong_with_v5);
}

#[test]
fn images_of_directories_show_what_is_in_them() {
    if !rustix::process::geteuid().is_root() {
        return support::skip("images_of_directories_show_what_is_in_them", "not root");
    }
    check(setting("RAFSD_TREES", 150), random::tree, wrong_with_tree);
}

/// The kernel is the judge of both the model and the reader.
#[test]
fn kernel_shows_what_the_model_says() {
    if let Some(why) = support::unable_to_mount() {
        return support::skip("kernel_shows_what_the_model_says", why);
    }
    let dir = tempfile::tempdir().unwrap();
    let mut mounted = 0;
    for seed in 0..40 {
        let items = random::items(&mut Random::new(seed));
        let Ok(model) = Model::of(&items) else { continue };
        let stream = Box::new(Cursor::new(archive(&items)));
        let out = dir.path().join(seed.to_string());
        let report = build(Source::Archive { name: "generated.tar".into(), stream }, &out, seed).unwrap();

        building::assert_mounts_as(&model.lines(), &report, dir.path());
        mounted += 1;
    }
    assert!(mounted > 20, "{mounted}");
}

/// The model of layers, which merged images are compared with, is worth what overlayfs says it is.
#[test]
fn overlayfs_stacks_layers_as_the_model_says() {
    if let Some(why) = support::unable_to_mount() {
        return support::skip("overlayfs_stacks_layers_as_the_model_says", why);
    }
    for seed in 0..setting("RAFSD_TREES", 40) {
        let dir = scratch();
        let layers = random::layers(&mut Random::new(seed), 4);
        let (mut merged, mut lower) = (Model::default(), Vec::new());
        for (number, items) in layers.iter().enumerate() {
            let layer = Model::of(items).expect("layers are sound");
            let place = dir.path().join(number.to_string());
            fs::create_dir(&place).unwrap();
            layer.for_overlayfs(&merged).write_to(&place).unwrap();
            merged = layer.over(&merged);
            lower.insert(0, place.display().to_string());
        }
        let at = dir.path().join("merged");
        fs::create_dir(&at).unwrap();
        let options = format!("lowerdir={}", lower.join(":"));
        mount(Some("overlay"), &at, Some("overlay"), MsFlags::MS_RDONLY, Some(options.as_str())).unwrap();
        let shown = listing::of(&at);
        umount2(&at, MntFlags::MNT_DETACH).unwrap();

        // Overlayfs counts links in the layer, whoever hides some of them.
        let without_links = |mut lines: Vec<listing::Line>| {
            for line in &mut lines {
                line.facts =
                    line.facts.split(' ').filter(|fact| !fact.starts_with("links=")).collect::<Vec<_>>().join(" ");
            }
            lines
        };
        let differences = listing::diff(&without_links(merged.lines()), &without_links(shown.unwrap()));
        assert!(differences.is_empty(), "seed {seed}:\n{differences}");
    }
}

/// Another program that knows EROFS: it reads every inode, directory and block.
#[test]
fn fsck_finds_nothing_wrong() {
    if Command::new("fsck.erofs").arg("-V").output().is_err() {
        return support::skip("fsck_finds_nothing_wrong", "fsck.erofs is not installed (erofs-utils)");
    }
    let dir = scratch();
    let device = dir.path().join("device");
    let mut checked = 0;
    for seed in 0..60 {
        let items = random::items(&mut Random::new(seed));
        if Model::of(&items).is_err() {
            continue;
        }
        let stream = Box::new(Cursor::new(archive(&items)));
        let out = dir.path().join(seed.to_string());
        let report = build(Source::Archive { name: "generated.tar".into(), stream }, &out, seed).unwrap();
        let mut fsck = Command::new("fsck.erofs");
        for blob in &report.blobs {
            support::image::expand(Path::new(&blob.path), &device).unwrap();
            fsck.arg(format!("--device={}", device.display()));
        }
        // With this it reads the data as well, and writes it nowhere.
        let said = fsck.arg("--extract").arg(&report.bootstrap).output().unwrap();

        let text = String::from_utf8_lossy(&said.stderr).chars().take(600).collect::<String>();
        assert!(said.status.success(), "seed {seed}: {text}\n{items:#?}");
        checked += 1;
    }
    assert!(checked > 30, "{checked}");
}

/// Without this the generator could make only what is easy.
#[test]
fn generator_makes_both_images_and_refusals() {
    let models: Vec<_> = (0..300).map(|seed| Model::of(&random::items(&mut Random::new(seed)))).collect();
    let refused = models.iter().filter(|model| model.is_err()).count();
    let linked = models.iter().flatten().filter(|model| !model.groups().is_empty()).count();
    assert!((30..100).contains(&refused), "{refused} of 300 refused");
    assert!(linked > 10, "{linked} of 300 have hard links");
}
