//! Commands that look at finished images: exit status, and the shape of what they print.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use support::building;

struct Built {
    dir: tempfile::TempDir,
}

impl Built {
    /// An image of two files with the same content and a third one.
    fn new(third: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir_all(source.join("dir")).unwrap();
        fs::write(source.join("one"), b"the same content").unwrap();
        fs::write(source.join("dir/two"), b"the same content").unwrap();
        fs::write(source.join("third"), third).unwrap();
        building::build(&source, &dir.path().join("image")).unwrap();
        Self { dir }
    }

    fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image/bootstrap")
    }

    fn blobs(&self) -> PathBuf {
        self.dir.path().join("image/blobs")
    }

    fn blob(&self) -> PathBuf {
        fs::read_dir(self.blobs()).unwrap().next().unwrap().unwrap().path()
    }
}

fn rafsd(args: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rafsd")).args(args.iter().map(AsRef::as_ref)).output().unwrap()
}

fn status(output: &Output) -> i32 {
    output.status.code().expect("not killed")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn codes(report: &Value) -> Vec<&str> {
    report["findings"].as_array().unwrap().iter().map(|finding| finding["code"].as_str().unwrap()).collect()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_name_that_is_told_in_an_error_stays_in_its_line() {
    let output = rafsd(&[&"check", &"/nowhere\nrafsd: all is well\u{1b}[2J"]);

    assert_eq!(status(&output), 2);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("/nowhere\\nrafsd: all is well\\u{1b}[2J: "), "{said:?}");
    assert!(said.lines().count() == 1 && !said.contains('\u{1b}'), "{said:?}");
}

#[test]
fn a_sound_image_is_sound_at_every_depth() {
    let built = Built::new(b"other");
    for depth in ["meta", "blob", "data"] {
        let output = rafsd(&[&"check", &built.bootstrap(), &"--blobs", &built.blobs(), &"--depth", &depth, &"--json"]);
        let report = json(&output);

        assert_eq!((status(&output), &report["errors"], &report["depth"]), (0, &0.into(), &depth.into()), "{report}");
        assert_eq!((&report["paths"], &report["chunks"]), (&5.into(), &3.into()));
        match depth {
            "meta" => assert_eq!(report["blobs"], Value::Array(vec![])),
            "blob" => {
                assert_eq!((&report["blobs"][0]["chunks"], &report["blobs"][0]["verified"]), (&2.into(), &0.into()))
            }
            _ => assert_eq!(
                (&report["blobs"][0]["verified"], &report["blobs"][0]["decoded_bytes"]),
                (&2.into(), &21.into())
            ),
        }
    }
}

#[test]
fn a_damaged_image_is_told_from_one_that_cannot_be_checked() {
    let built = Built::new(b"other");
    // Nothing there, no image, and blobs where nobody listens.
    assert_eq!(status(&rafsd(&[&"check", &built.dir.path().join("absent")])), 2);
    assert_eq!(status(&rafsd(&[&"check", &built.blob()])), 2);
    let nowhere = "http://127.0.0.1:1/";
    assert_eq!(status(&rafsd(&[&"check", &built.bootstrap(), &"--depth", &"blob", &"--blobs", &nowhere])), 2);
    assert_eq!(status(&rafsd(&[&"check", &built.bootstrap(), &"--depth", &"data"])), 0, "blobs lie beside it");
    assert_eq!(status(&rafsd(&[&"check", &"--no-such-flag"])), 2);

    // A chunk that does not decode to its digest is seen only by who looks.
    flip(&built.blob(), 0);
    let check =
        |depth: &str| rafsd(&[&"check", &built.bootstrap(), &"--blobs", &built.blobs(), &"--depth", &depth, &"--json"]);
    assert_eq!(status(&check("blob")), 0);
    let output = check("data");
    assert_eq!((status(&output), codes(&json(&output))), (1, vec!["chunk-damaged"]));

    fs::remove_file(built.blob()).unwrap();
    let output = check("blob");
    assert_eq!((status(&output), codes(&json(&output))), (1, vec!["blob-missing"]));

    // The number of paths, and the block size.
    flip(&built.bootstrap(), 1024 + 0x10);
    let output = rafsd(&[&"check", &built.bootstrap(), &"--json"]);
    assert_eq!((status(&output), codes(&json(&output))), (1, vec!["path-count"]));
    flip(&built.bootstrap(), 1024 + 0xc);
    let output = rafsd(&[&"check", &built.bootstrap(), &"--json"]);
    assert_eq!((status(&output), codes(&json(&output))), (1, vec!["unusable"]));
}

#[test]
fn one_thing_of_an_image_is_shown() {
    let built = Built::new(b"other");
    let show = |args: &[&str]| {
        let bootstrap = built.bootstrap();
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"inspect", &bootstrap];
        all.extend(args.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
        rafsd(&all)
    };

    let image = json(&show(&["--json"]));
    assert_eq!((&image["is"], &image["paths"], &image["block_size"]), (&"image".into(), &5.into(), &4096.into()));
    let inode = json(&show(&["--path", "/dir/two", "--json"]));
    assert_eq!((&inode["kind"], &inode["size"]), (&"file".into(), &16.into()));
    let same = json(&show(&["--nid", &inode["nid"].to_string(), "--json"]));
    assert_eq!(same, inode);
    let blob = json(&show(&["--blob", "0", "--json"]));
    assert_eq!(blob["chunks"], 2);
    assert_eq!(json(&show(&["--blob", blob["id"].as_str().unwrap(), "--json"])), blob);
    let at = format!("0:{}", inode["chunks"][0]["chunk"]);
    let chunk = json(&show(&["--chunk", &at, "--json"]));
    assert_eq!(chunk["users"], serde_json::json!(["/dir/two", "/one"]));
    assert_eq!(chunk["digest"], inode["chunks"][0]["digest"]);
    let text = String::from_utf8(show(&["--path", "/dir/two"]).stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with("kind ") && line.ends_with(" file")), "{text}");
    let dump = String::from_utf8(show(&["--dump"]).stdout).unwrap();
    assert!(dump.lines().any(|line| line == "/dir/two size 16"));
    assert!(!dump.contains("/dir/two inode "));
    assert!(String::from_utf8(show(&["--dump", "--layout"]).stdout).unwrap().contains("/dir/two inode "));

    for absent in [["--path", "/nowhere"], ["--blob", "7"], ["--chunk", "0:9"], ["--nid", "99999999"]] {
        assert_eq!(status(&show(&absent)), 1, "{absent:?}");
    }
    assert_eq!(status(&show(&["--chunk", "x"])), 2);
    assert_eq!(status(&show(&["--dump", "--path", "/"])), 2);
}

#[test]
fn numbers_of_one_and_of_several_images_are_counted() {
    let (one, other) = (Built::new(b"first!"), Built::new(b"second"));
    let alone = json(&rafsd(&[&"stat", &one.bootstrap(), &"--json"]));
    let image = &alone["images"][0];

    assert_eq!(image["inodes"], serde_json::json!({"directory": 2, "file": 3}));
    assert_eq!((&image["file_bytes"], &image["chunk_bytes"], &image["chunks"]), (&38.into(), &22.into(), &2.into()));
    assert_eq!(image["chunk_sizes"], serde_json::json!({"8": 1, "16": 1}));
    assert_eq!((&alone["pairs"], &alone["total"]), (&Value::Array(vec![]), &Value::Null));

    let output = rafsd(&[&"stat", &one.bootstrap(), &other.bootstrap(), &one.bootstrap(), &"--json"]);
    let several = json(&output);
    assert_eq!(status(&output), 0);
    let pairs: Vec<_> = several["pairs"].as_array().unwrap().iter().collect();
    let shared =
        |pair: &Value| (pair["blobs"].as_array().unwrap().len(), pair["chunks"].clone(), pair["chunk_bytes"].clone());
    assert_eq!(shared(pairs[0]), (0, 1.into(), 16.into()));
    assert_eq!(shared(pairs[1]), (1, 2.into(), 22.into()));
    assert_eq!(several["total"]["chunks"], 3);
    assert_eq!(several["total"]["chunk_bytes"], 28);
    assert_eq!((&several["total"]["blobs"], &several["total"]["shared_blobs"]), (&2.into(), &1.into()));
    assert_eq!(several["total"]["shared_chunks"], 2);

    assert_eq!(status(&rafsd(&[&"stat", &one.blob()])), 1);
    let text = String::from_utf8(rafsd(&[&"stat", &one.bootstrap(), &other.bootstrap()]).stdout).unwrap();
    assert!(text.contains("share 0 blobs, 1 chunks (16 B)"), "{text}");
}

#[test]
fn outputs_replace_neither_what_is_read_nor_what_is_no_file() {
    let built = Built::new(b"other");
    let dir = built.dir.path();
    let fifo = dir.join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
    let (bootstrap, blob) = (fs::read(built.bootstrap()).unwrap(), fs::read(built.blob()).unwrap());

    for out in [fifo.clone(), dir.join("link"), built.bootstrap(), built.blob()] {
        assert_eq!(status(&rafsd(&[&"export", &built.bootstrap(), &"-o", &out])), 1, "{}", out.display());
    }
    for out in [&fifo, &dir.join("link")] {
        assert_eq!(status(&rafsd(&[&"unpack", &built.bootstrap(), &"--tar", out])), 1);
        assert_eq!(status(&rafsd(&[&"merge", &built.bootstrap(), &"-o", out])), 1);
        assert_eq!(status(&rafsd(&[&"chunkdict", &"--min-images", &"1", &built.bootstrap(), &"-o", out])), 1);
    }

    use std::os::unix::fs::FileTypeExt;
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(dir.join("link")).unwrap().is_symlink());
    assert!(fs::read(built.bootstrap()).unwrap() == bootstrap && fs::read(built.blob()).unwrap() == blob);
}

#[test]
fn a_chunk_table_with_empty_rows_is_no_dictionary() {
    let built = Built::new(b"other");
    let mut bytes = fs::read(built.bootstrap()).unwrap();
    let at = usize::try_from(u64::from_le_bytes(bytes[0x498..0x4a0].try_into().unwrap())).unwrap();
    bytes[at..at + 80].fill(0);
    let damaged = built.dir.path().join("damaged");
    fs::write(&damaged, bytes).unwrap();

    let output = rafsd(&[&"chunkdict", &"--min-images", &"1", &damaged, &"-o", &built.dir.path().join("dict")]);

    assert_eq!(status(&output), 1);
    assert!(String::from_utf8_lossy(&output.stderr).contains("row 0 of the chunk table"));
    assert!(!built.dir.path().join("dict").exists());
}
