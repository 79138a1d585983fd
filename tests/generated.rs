//! Images of generated archives and trees show what an independent model says.
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

use generated::member::{Item, archive};
use generated::minimal::minimal;
use generated::model::Model;
use generated::random;
use generated::shown::shown;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rafsd::build::{self, BuildReport, BuildSpec, Compression, Source};
use rafsd::format::rafs::DigestAlgorithm;
use support::tree::Random;
use support::{building, listing};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Builds with one of several kits.
fn build(source: Source, out: &Path, kit: u64) -> Result<BuildReport, build::BuildError> {
    let (compression, digest, chunk_size) = [
        (Compression::Lz4, DigestAlgorithm::Blake3, 4096),
        (Compression::None, DigestAlgorithm::Sha256, 4096),
        (Compression::Zstd { level: 1 }, DigestAlgorithm::Blake3, 8192),
        (Compression::Zstd { level: 3 }, DigestAlgorithm::Sha256, 1 << 20),
    ][usize::try_from(kit % 4).unwrap()];
    let out_dir = out.to_owned();
    let mut spec = BuildSpec::new(source, out_dir);
    (spec.compression, spec.digest) = (compression, digest);
    (spec.chunk_size, spec.threads) = (chunk_size, NonZeroUsize::MIN);
    build::build(spec, &())
}

/// What is different between image and model; empty if nothing is.
fn differences(model: &Model, report: &BuildReport) -> String {
    let shown = shown(report);
    let mut out = listing::diff(&model.lines(), &shown.lines);
    if model.groups() != shown.groups {
        writeln!(out, "links: {:?}\n  but: {:?}", model.groups(), shown.groups).unwrap();
    }
    if model.skipped_xattrs != report.skipped_xattrs {
        writeln!(out, "{} xattrs left out, not {}", report.skipped_xattrs, model.skipped_xattrs).unwrap();
    }
    out
}

/// What is wrong with the image of an archive; empty if nothing is.
fn wrong_with_archive(items: &[Item], out: &Path, kit: u64) -> String {
    let stream = Box::new(Cursor::new(archive(items)));
    let built =
        catch_unwind(AssertUnwindSafe(|| build(Source::Archive { name: "generated.tar".into(), stream }, out, kit)));
    let wrong = match (built, Model::of(items)) {
        (Err(_), _) => "the builder panicked".to_owned(),
        (Ok(Ok(report)), Ok(model)) => differences(&model, &report),
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
fn wrong_with_tree(items: &[Item], out: &Path, kit: u64) -> String {
    let Ok(model) = Model::of(items) else { return String::new() };
    let source = out.join("source");
    fs::create_dir_all(&source).unwrap();
    model.write_to(&source).unwrap();
    let wrong = match build(Source::Directory(source), &out.join("image"), kit) {
        Ok(report) => differences(&model, &report),
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
