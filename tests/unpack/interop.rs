//! Images made by Nydus's own builder, unpacked and checked. See `support/interop.rs` for where
//! they are looked for.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rafsd::image::{Image, Kind};
use rafsd::reader::{Files, bootstrap};
use rafsd::source::LocalSource;
use rafsd::tools::check::{self, Depth};
use rafsd::tools::export::{Verity, export};
use rafsd::tools::unpack::{UnpackOptions, to_directory};

use crate::fixture::{Fixture, names, unable_to_own};
use crate::support::image::Mounted;
use crate::support::interop::{SERVED, folder};
use crate::support::{listing, skip, unable_to_mount};

/// Besides those that can be served: `v6-zran` has its data in a gzip file, `v6-tarfs` in a plain tar.
const INDEXES: [&str; 2] = ["v6-zran", "v6-tarfs"];

/// Longer targets of links are spoilt by the writer in images with blocks of 512 bytes (`rafs-v6.md`
/// section 10): some are cut or misplaced, others cannot be read at all.
const SOUND_TARGET: u64 = 512;

/// A directory with everything that the image in `dir` needs, each under its id; and its bootstrap.
fn laid_out(fixture: &Fixture, dir: &Path) -> (PathBuf, PathBuf) {
    let blobs = fixture.path("blobs");
    fs::create_dir(&blobs).unwrap();
    if dir.join("blobs").is_dir() {
        for name in names(&dir.join("blobs")) {
            symlink(fs::canonicalize(dir.join("blobs").join(&name)).unwrap(), blobs.join(&name)).unwrap();
        }
    }
    let image = dir.join("bootstrap");
    if !image.is_file() {
        return (blobs.clone(), blobs.join(&names(&blobs)[0]));
    }
    let layer = dir.join("layer.tar.gz");
    if layer.is_file() {
        let id = bootstrap::open(&image).unwrap().devices()[0].blob.to_string();
        if dir.ends_with("v6-zran") {
            symlink(fs::canonicalize(layer).unwrap(), blobs.join(id)).unwrap();
        } else {
            let mut plain = flate2::read::MultiGzDecoder::new(File::open(layer).unwrap());
            std::io::copy(&mut plain, &mut File::create(blobs.join(id)).unwrap()).unwrap();
        }
    }
    (blobs, image)
}

fn open(fixture: &Fixture, blobs: &Path, image: &Path) -> Files {
    let source = Arc::new(LocalSource::new(blobs).unwrap());
    Files::open(image, source, fixture.runtime().clone()).unwrap_or_else(|e| panic!("{}: {e:?}", image.display()))
}

/// Makes FIFOs of the links in the bootstrap `image` whose targets its writer has spoilt, so that the
/// rest can be unpacked. Gives back their paths and the changed copy.
fn without_spoilt_links(fixture: &Fixture, image: &Path) -> (Vec<String>, PathBuf) {
    let bytes = bootstrap::load(image).unwrap().bytes;
    let image = Image::parse(bytes.clone()).unwrap();
    let (mut bytes, mut paths) = (bytes, Vec::new());
    for entry in image.walk().map(|entry| entry.unwrap()) {
        if entry.inode.kind == Kind::Symlink && entry.inode.size > SOUND_TARGET {
            let mode = image.summary().meta_start + 32 * entry.inode.nid + 4;
            let mode = usize::try_from(mode).unwrap();
            bytes[mode + 1] = bytes[mode + 1] & 0x0f | 0x10;
            paths.push(String::from_utf8(entry.path).expect("these have plain names"));
        }
    }
    let copy = fixture.path("bootstrap");
    fs::write(&copy, bytes).unwrap();
    (paths, copy)
}

#[test]
fn images_of_nydus_unpack_to_what_their_listing_says() {
    let test = "images_of_nydus_unpack_to_what_their_listing_says";
    let Some(folder) = folder(test) else { return };
    if let Some(why) = unable_to_own() {
        return skip(test, why);
    }
    for name in SERVED.into_iter().chain(INDEXES) {
        let (fixture, dir) = (Fixture::new(), folder.join(name));
        let (blobs, mut image) = laid_out(&fixture, &dir);
        let mut spoilt = Vec::new();
        if name == "v6-tarfs" {
            (spoilt, image) = without_spoilt_links(&fixture, &image);
            assert!((1..10).contains(&spoilt.len()), "{spoilt:?}");
        }
        let files = open(&fixture, &blobs, &image);

        let unpacked = to_directory(&files, &fixture.path("new"), UnpackOptions::default(), &());

        unpacked.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let listing =
            Command::new("python3").arg(folder.join("listtree.py")).arg(fixture.path("new")).output().unwrap();
        assert!(listing.status.success(), "{name}: {}", String::from_utf8_lossy(&listing.stderr));
        let want = fs::read_to_string(folder.join(fs::read_to_string(dir.join("expect")).unwrap().trim())).unwrap();
        let got = String::from_utf8(listing.stdout).unwrap();
        let cut = |line: &str| line.chars().take(300).collect::<String>();
        for (want, got) in want.lines().zip(got.lines()) {
            let path = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["path"].clone();
            let is_spoilt = spoilt.iter().any(|spoilt| path(want) == spoilt.as_str() && path(got) == spoilt.as_str());
            assert!(want == got || is_spoilt, "{name} differs:\n- {}\n+ {}", cut(want), cut(got));
        }
        assert!(want.lines().count() > 10 && want.lines().count() == got.lines().count(), "{name}");
    }
}

#[test]
fn every_chunk_of_the_images_of_nydus_is_what_it_should_be() {
    let Some(folder) = folder("every_chunk_of_the_images_of_nydus_is_what_it_should_be") else { return };
    for name in SERVED.into_iter().chain(INDEXES) {
        let fixture = Fixture::new();
        let (blobs, image) = laid_out(&fixture, &folder.join(name));
        let source = LocalSource::new(&blobs).unwrap();
        let image = bootstrap::open(&image).unwrap();

        let report = check::check(&image, Depth::Data, Some(&source), fixture.runtime(), &()).unwrap();

        assert!(report.found.is_sound() && !report.is_partial(), "{name}: {:?}", report.found.findings);
        for blob in &report.blobs {
            assert!(blob.verified > 0 && blob.verified + blob.unpromised == blob.chunks, "{name}: {blob:?}");
        }
    }
}

#[test]
fn a_damaged_layer_is_told_from_a_sound_one() {
    let Some(folder) = folder("a_damaged_layer_is_told_from_a_sound_one") else { return };
    for name in ["v6-zran", "v6-tarfs"] {
        let fixture = Fixture::new();
        let (blobs, image) = laid_out(&fixture, &folder.join(name));
        let image = bootstrap::open(&image).unwrap();
        let layer = blobs.join(image.devices()[0].blob.as_str());
        let mut bytes = fs::read(&layer).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::remove_file(&layer).unwrap();
        fs::write(&layer, bytes).unwrap();
        let source = LocalSource::new(&blobs).unwrap();

        let report = check::check(&image, Depth::Data, Some(&source), fixture.runtime(), &()).unwrap();

        assert!(!report.found.is_sound() && !report.is_partial(), "{name}");
    }
}

#[test]
fn a_changed_tar_layer_is_not_opened() {
    let Some(folder) = folder("a_changed_tar_layer_is_not_opened") else { return };
    let fixture = Fixture::new();
    let (blobs, image) = laid_out(&fixture, &folder.join("v6-tarfs"));
    let layer = blobs.join(bootstrap::open(&image).unwrap().devices()[0].blob.as_str());
    File::options().append(true).open(&layer).and_then(|mut file| std::io::Write::write_all(&mut file, b"x")).unwrap();

    let source = Arc::new(LocalSource::new(&blobs).unwrap());
    let error = Files::open(&image, source, fixture.runtime().clone()).unwrap_err().to_string();

    assert!(error.contains("cannot be verified") && error.contains("plain tar layer"), "{error}");
}

#[test]
fn the_kernel_shows_a_tar_layer_as_one_disk_like_it_is_unpacked() {
    let test = "the_kernel_shows_a_tar_layer_as_one_disk_like_it_is_unpacked";
    let Some(folder) = folder(test) else { return };
    if let Some(why) = unable_to_mount() {
        return skip(test, why);
    }
    let fixture = Fixture::new();
    let (blobs, image) = laid_out(&fixture, &folder.join("v6-tarfs"));
    let (_, image) = without_spoilt_links(&fixture, &image);
    let files = open(&fixture, &blobs, &image);
    let (disk, target, unpacked) = (fixture.path("disk"), fixture.path("mnt"), fixture.path("new"));
    fs::create_dir(&target).unwrap();
    to_directory(&files, &unpacked, UnpackOptions::default(), &()).unwrap();

    export(&files, &disk, &Verity::None, &()).unwrap();

    let mounted = Mounted::new(&disk, &[], &target).unwrap();
    let want = listing::of(&unpacked).unwrap();
    assert!(want.len() > 500);
    listing::assert_same(&want, &listing::of(mounted.path()).unwrap());
}
