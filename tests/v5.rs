//! RAFS v5, read by lifting it: what becomes of a sound image, what is said of a damaged one, and that
//! images which list different chunks of a blob share its cache.

#[path = "v5/damage.rs"]
mod damage;
#[path = "v5/sharing.rs"]
mod sharing;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rafsd::build::lift;
use rafsd::format::rafs::Algorithm;
use rafsd::image::check::check;
use rafsd::image::v5::Bootstrap;
use rafsd::image::{Image, Kind, Origin};
use rafsd::reader::{Files, bootstrap, ensure_checkable};
use rafsd::source::LocalSource;
use rafsd::tools::check::v5;
use support::v5::{Item, Tree, Writer, Written, noise, tree};
use tempfile::TempDir;

/// Every kind of file, names in awkward order, chunks of one byte and of many, chunks that are the same.
fn everything() -> Tree {
    let with = |item: Item, xattrs: Vec<(&'static str, Vec<u8>)>| Item::With(Box::new(item), xattrs);
    let deep = tree([("z", Item::File(noise(9, 5000))), ("a", Item::Hard("dir/twin")), (".hidden", Item::Fifo)]);
    let dir = tree([
        ("twin", with(Item::File(noise(1, 12_345)), vec![("user.a", b"1\x002".to_vec()), ("trusted.b", vec![])])),
        ("deep", Item::Dir(deep)),
        ("empty", Item::Dir(Tree::new())),
    ]);
    tree([
        ("-", Item::File(vec![])),
        ("dir", with(Item::Dir(dir), vec![("security.x", vec![0; 300]), ("system.nfs4_acl", b"gone".to_vec())])),
        ("link", Item::Link(b"dir/twin".to_vec())),
        ("null", Item::Char(259)),
        ("one", Item::File(b"1".to_vec())),
        ("same", Item::File(noise(1, 4096))),
        ("zeros", Item::File(vec![0; 40_960])),
        ("\u{e9}", Item::File(noise(3, 8192))),
    ])
}

/// Content of every file of `tree` by path; further names as well.
fn contents(tree: &Tree) -> BTreeMap<Vec<u8>, Vec<u8>> {
    fn add(at: &[u8], tree: &Tree, out: &mut BTreeMap<Vec<u8>, Vec<u8>>, hard: &mut Vec<(Vec<u8>, &'static str)>) {
        for (name, item) in tree {
            let path = [at, if at.is_empty() { b"" } else { b"/" }, name].concat();
            let item = if let Item::With(item, _) = item { item } else { item };
            match item {
                Item::Dir(tree) => add(&path, tree, out, hard),
                Item::File(content) => drop(out.insert(path, content.clone())),
                Item::Hard(first) => hard.push((path, first)),
                _ => {}
            }
        }
    }
    let (mut out, mut hard) = (BTreeMap::new(), Vec::new());
    add(b"", tree, &mut out, &mut hard);
    for (path, first) in hard {
        out.insert(path, out[first.as_bytes()].clone());
    }
    out
}

/// A directory with an image in it.
struct Laid {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Laid {
    fn new(writer: &Writer, image: &Written) -> Self {
        let laid = Self { dir: tempfile::tempdir().unwrap(), runtime: tokio::runtime::Runtime::new().unwrap() };
        fs::create_dir(laid.dir.path().join("blobs")).unwrap();
        fs::write(laid.dir.path().join("blobs").join(writer.id()), &writer.blob).unwrap();
        fs::write(laid.dir.path().join("bootstrap"), &image.bytes).unwrap();
        laid
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn files(&self, bootstrap: &Path) -> Files {
        let source = Arc::new(LocalSource::new(self.path("blobs")).unwrap());
        Files::open(bootstrap, source, self.runtime.handle().clone()).unwrap_or_else(|e| panic!("{e:?}"))
    }
}

/// What the lifted image says is in every file.
fn read_all(files: &Files) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in files.image().walk().map(|entry| entry.unwrap()) {
        if entry.inode.kind == Kind::Regular {
            let mut content = Vec::new();
            files.read_into(&entry.inode, &mut content).unwrap_or_else(|e| panic!("{e:?}"));
            out.insert(entry.path, content);
        }
    }
    out
}

#[test]
fn every_compression_digest_and_layout_reads_as_it_was_written() {
    let mut kinds = 0;
    for compression in [Algorithm::None, Algorithm::Lz4Block, Algorithm::Zstd, Algorithm::Gzip] {
        for bits in 0..8 {
            let (sha256, extended, aligned) = (bits & 1 != 0, bits & 2 != 0, bits & 4 != 0);
            let mut writer = Writer { compression, sha256, extended, aligned, ..Writer::default() };
            let image = writer.image(&everything());
            let laid = Laid::new(&writer, &image);
            let what = format!("{compression:?}, SHA-256 {sha256}, extended {extended}, aligned {aligned}");

            let files = laid.files(&laid.path("bootstrap"));

            let (want, got) = (contents(&everything()), read_all(&files));
            assert!(want.len() == 8 && want == got, "{what}: {:?}", want.iter().zip(&got).find(|(a, b)| a != b));
            assert_eq!(files.image().summary().origin, Origin::V5);
            assert_eq!(check(files.image()).findings, [], "{what}");
            ensure_checkable(files.image(), files.maps()).unwrap_or_else(|e| panic!("{what}: {e}"));
            kinds += 1;
        }
    }
    assert_eq!(kinds, 32);
}

#[test]
fn metadata_is_kept() {
    let mut writer = Writer::default();
    let image = writer.image(&everything());
    let laid = Laid::new(&writer, &image);
    let files = laid.files(&laid.path("bootstrap"));
    let image = files.image();
    let inode = |path: &str| image.lookup(path.as_bytes()).unwrap().unwrap_or_else(|| panic!("no {path}"));

    let twin = inode("dir/twin");
    assert_eq!(twin, inode("dir/deep/a"), "one inode with two names");
    assert_eq!((twin.nlink, twin.uid, twin.gid, twin.permissions), (2, 1000, 100, 0o644));
    assert_eq!((twin.mtime, twin.size), ((1_700_000_000, 5), 12_345));
    assert_eq!((inode("null").kind, inode("null").rdev), (Kind::Character, 259));
    assert_eq!(&*image.symlink(&inode("link")).unwrap(), b"dir/twin");
    assert_eq!((inode("dir/deep/.hidden").kind, inode("dir/empty").nlink, inode("dir").nlink), (Kind::Fifo, 2, 4));
    let xattrs = |path| {
        let mut found = Vec::new();
        let visit = &mut |xattr: rafsd::image::Xattr<'_>| {
            found.push((String::from_utf8(xattr.name().to_vec()).unwrap(), xattr.value.to_vec()));
            std::ops::ControlFlow::Continue(())
        };
        image.xattrs(&inode(path), visit).unwrap();
        found
    };
    assert_eq!(xattrs("dir/twin"), [("trusted.b".into(), vec![]), ("user.a".into(), b"1\x002".to_vec())]);
    assert_eq!(xattrs("dir"), [("security.x".into(), vec![0; 300])], "of the others EROFS has none");
}

#[test]
fn what_is_to_be_fetched_first_is_so_in_the_lifted_image() {
    let mut writer = Writer::default();
    let numbers = writer.image(&everything()).numbers;
    let wanted = ["zeros", "dir/deep/a", "dir", "dir/twin", "null"];
    // A further name is the file of the first; what has no data is nothing to fetch.
    writer.prefetch = wanted.iter().map(|path| numbers[path.as_bytes()]).chain([999, 0, 1]).collect();
    let image = Image::parse(lift(&Bootstrap::parse(&writer.image(&everything()).bytes).unwrap()).unwrap()).unwrap();
    let nid = |path: &str| image.lookup(path.as_bytes()).unwrap().unwrap().nid;
    assert_eq!(image.prefetch().collect::<Vec<_>>(), [nid("zeros"), nid("dir/twin"), nid("dir")]);
}

#[test]
fn a_bootstrap_in_its_blob_gets_the_name_of_the_file() {
    for (id, features) in [("x".repeat(64), 0x5000_0000), ("old-name".into(), 0)] {
        let mut writer = Writer { id: Some(id), features, ..Writer::default() };
        let image = writer.image(&everything());
        let laid = Laid::new(&writer, &image);
        let name = "ab".repeat(32);
        // With tar headers, the length of the blob is that of the data and one of them.
        let mut image = image;
        let framed = writer.blob.len() as u64 + if features == 0 { 0 } else { 512 };
        image.set(image.extended_at + 16, &framed.to_le_bytes());
        fs::write(laid.path("blobs").join(&name), writer.inlined(&image)).unwrap();

        let files = laid.files(&laid.path("blobs").join(&name));

        assert_eq!(files.image().devices()[0].blob.as_str(), name);
        assert!(contents(&everything()) == read_all(&files));
    }
    let mut writer = Writer { id: Some("x".repeat(64)), ..Writer::default() };
    let laid = Laid::new(&writer.clone(), &writer.image(&everything()));
    let unnamed = bootstrap::open(&laid.path("bootstrap")).unwrap_err();
    assert!(format!("{:#}", anyhow::Error::from(unnamed)).contains("does not name it"), "nobody knows its blob");
    let name = laid.path(&format!("{}.image.boot", "cd".repeat(32)));
    fs::rename(laid.path("bootstrap"), &name).unwrap();
    assert_eq!(bootstrap::open(&name).unwrap().devices()[0].blob.as_str(), "cd".repeat(32));
}

#[test]
fn commands_say_that_it_is_version_5_and_unpack_it() {
    let mut writer = Writer::default();
    let image = writer.image(&everything());
    let laid = Laid::new(&writer, &image);
    let rafsd = |args: &[&str]| {
        let output =
            Command::new(env!("CARGO_BIN_EXE_rafsd")).args(args).current_dir(laid.dir.path()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    };

    let (status, text) = rafsd(&["inspect", "bootstrap"]);
    assert!(status == 0 && text.contains("RAFS v5"), "{text}");
    let (status, text) = rafsd(&["stat", "bootstrap"]);
    assert!(status == 0 && text.starts_with("bootstrap (RAFS v5)\n"), "{text}");
    let (status, text) = rafsd(&["check", "bootstrap", "--depth", "data"]);
    assert!(status == 0 && text.contains("bootstrap: sound; 15 paths"), "{text}");
    assert!(text.contains("remark[xattr-namespace]") && text.contains("system.nfs4_acl"), "{text}");
    let (status, text) = rafsd(&["unpack", "bootstrap", "--tar", "out.tar"]);
    assert_eq!(status, 0, "{text}");

    let mut spoilt = image.clone();
    spoilt.put("dir/deep/z", 3, &[0xee]);
    fs::write(laid.path("bootstrap"), &spoilt.bytes).unwrap();
    let (status, text) = rafsd(&["check", "bootstrap"]);
    assert!(status == 1 && text.matches("error[inode-digest]").count() == 2, "its own and its directory's: {text}");

    spoilt.set(4, &0x400u32.to_le_bytes());
    fs::write(laid.path("bootstrap"), &spoilt.bytes).unwrap();
    for command in ["inspect", "check", "stat"] {
        let (status, text) = rafsd(&[command, "bootstrap"]);
        let says = ["RAFS v4", "convert the image from its OCI original", "rafsd build"];
        assert!(status != 0 && says.iter().all(|part| text.contains(part)), "{command}: {text}");
    }
}

#[test]
fn lifting_is_the_same_every_time_and_a_hundred_thousand_files_are_lifted_soon() {
    const FILES: usize = 100_000;
    let mut root = Tree::new();
    for dir in 0..FILES / 100 {
        let files = (0..100).map(|file| {
            let name = format!("file-{file:03}-of-a-usual-length").into_bytes();
            (name, Item::File(format!("content {}", dir * 100 + file).into_bytes()))
        });
        root.insert(format!("directory-{dir}").into_bytes(), Item::Dir(files.collect()));
    }
    let written = Writer { compression: Algorithm::None, ..Writer::default() }.image(&root);

    let clock = Instant::now();
    let lifted = lift(&Bootstrap::parse(&written.bytes).unwrap()).unwrap();
    let took = clock.elapsed();

    // Half a second is what is promised of a release build on a quiet machine.
    let most = if cfg!(debug_assertions) { Duration::from_secs(60) } else { Duration::from_millis(500) };
    eprintln!("{FILES} files, {} bytes of v5, {} lifted, in {took:?}", written.bytes.len(), lifted.len());
    assert!(took < most, "{took:?}");
    let image = Image::parse(lifted.clone()).unwrap();
    assert_eq!(image.summary().paths, (FILES + FILES / 100 + 1) as u64);
    assert_eq!(image.chunk_records().len(), FILES);
    assert!(lift(&Bootstrap::parse(&written.bytes).unwrap()).unwrap() == lifted);
    let report = v5::check(&Bootstrap::parse(&written.bytes).unwrap());
    assert_eq!((report.findings, report.inodes), (vec![], image.summary().paths));
}
