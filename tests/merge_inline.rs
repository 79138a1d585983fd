//! `rafsd merge` of layers whose bootstraps lie in their blobs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rafsd::format::blobfile::features;
use rafsd::image::Image;

fn rafsd(args: &[&dyn AsRef<std::ffi::OsStr>]) {
    let output = Command::new(env!("CARGO_BIN_EXE_rafsd")).args(args.iter().map(AsRef::as_ref)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn write(dir: &Path, files: &[(&str, &str)]) {
    for (path, content) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
}

/// The only file in the only directory of blobs.
fn blob(image: &Path) -> PathBuf {
    let mut files = fs::read_dir(image.join("blobs")).unwrap();
    let file = files.next().unwrap().unwrap().path();
    assert!(files.next().is_none());
    file
}

/// Builds two layers with `flags`, the upper one knowing the chunks of the lower, merges them and
/// checks and unpacks what comes out.
fn merge_and_unpack(flags: &[&'static str]) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let text = "words and words ".repeat(20_000);
    write(&at("low"), &[("a", &text), ("d/b", "b"), ("gone", "x")]);
    write(&at("high"), &[("again", &text), ("d/c", "c"), (".wh.gone", "")]);
    let build = |name: &str, more: &[&dyn AsRef<std::ffi::OsStr>]| {
        let (source, out) = (at(name), at(&format!("{name}.image")));
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"build", &source, &"-o", &out, &"--blob-inline-meta"];
        args.extend(flags.iter().map(|flag| flag as &dyn AsRef<std::ffi::OsStr>));
        args.extend_from_slice(more);
        rafsd(&args);
        blob(&out)
    };
    let low = build("low", &[]);
    let high = build("high", &[&"--chunk-dict", &low]);
    fs::create_dir(at("blobs")).unwrap();
    fs::copy(&low, at("blobs").join(low.file_name().unwrap())).unwrap();
    fs::copy(&high, at("blobs").join(high.file_name().unwrap())).unwrap();

    rafsd(&[&"merge", &low, &high, &"-o", &at("merged")]);
    let pair = |path: &Path, name: &str| {
        fs::copy(path, at(name)).unwrap();
        format!("{}={}", path.file_name().unwrap().to_str().unwrap(), at(name).display())
    };
    rafsd(&[&"merge", &pair(&low, "one.blob"), &pair(&high, "two.blob"), &"-o", &at("paired")]);
    assert!(fs::read(at("merged")).unwrap() == fs::read(at("paired")).unwrap(), "ids stand for the names of files");

    let image = Image::open(&at("merged")).unwrap();
    assert_eq!(image.devices().len(), 2);
    for device in image.devices() {
        assert_eq!(device.entry.features.get() & features::INLINED_FS_META, 0, "its own bootstrap is elsewhere now");
        let file = fs::read(at("blobs").join(device.blob.as_str())).unwrap();
        let stored = usize::try_from(device.entry.compressed_size.get()).unwrap();
        let table = device.entry.ci_offset.get() + device.entry.ci_compressed_size.get();
        assert!(table < stored as u64 && stored < file.len());
        if !flags.contains(&"--blob-toc") {
            // The bootstrap in the blob is what comes next.
            assert_eq!(file[stored + 1024..][..4], 0xe0f5_e1e2u32.to_le_bytes());
        }
    }
    rafsd(&[&"check", &at("merged"), &"--blobs", &at("blobs"), &"--depth", &"data"]);
    rafsd(&[&"unpack", &at("merged"), &"--blobs", &at("blobs"), &"-o", &at("tree"), &"--no-same-owner"]);
    for (path, content) in [("a", &*text), ("again", &text), ("d/b", "b"), ("d/c", "c")] {
        assert!(fs::read(at("tree").join(path)).unwrap() == content.as_bytes(), "{path}");
    }
    assert!(!at("tree/gone").exists() && !at("tree/.wh.gone").exists());
}

#[test]
fn blobs_that_end_with_their_bootstrap_merge() {
    merge_and_unpack(&[]);
}

#[test]
fn blobs_with_a_table_of_contents_merge() {
    merge_and_unpack(&["--blob-toc"]);
}

#[test]
fn encrypted_blobs_without_batches_merge() {
    merge_and_unpack(&["--encrypt", "--batch-size=off"]);
}
