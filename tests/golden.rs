//! Tiny images as they have always been, under version control: the digests of bootstrap and blob, and
//! for some of them everything in the bootstrap as text.
//!
//! A change of the format, of the layout or of a compressor shows here. Where the change is meant,
//! `RAFSD_WRITE_GOLDEN=1 cargo test --test golden` writes the files anew, and the difference is for
//! a reader of the commit.

#[path = "support/generated/mod.rs"]
mod generated;
mod support;

use std::fs;
use std::io::Cursor;
use std::num::NonZeroUsize;
use std::path::Path;

use generated::member::{Content, Island, Item, Member, Numbers, Style, What, archive};
use rafsd::blob::BlobKey;
use rafsd::build::{
    Batching, BuildReport, BuildSpec, Compression, Encryption, Layer, MergeSpec, MergeVersion, Source, Version,
    Whiteouts, build, merge,
};
use rafsd::codec;
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image::Image;
use rafsd::image::dump::{Detail, dump};
use rafsd::reader::bootstrap;

fn member(path: &str, what: What) -> Item {
    Item::Member(Member {
        path: path.into(),
        what,
        mode: 0o750,
        uid: 1000,
        gid: 70_000,
        mtime: (1_700_000_000, 123_456_789),
        xattrs: Vec::new(),
        style: Style { numbers: Numbers::Pax, ..Style::default() },
    })
}

fn file(size: usize, seed: u64) -> What {
    let islands = if size == 0 { Vec::new() } else { vec![Island { at: 0, len: size, seed }] };
    What::File(Content { size: size as u64, islands })
}

/// Small trees, each with something of its own.
fn trees() -> Vec<(&'static str, Vec<Item>)> {
    let mut dressed = match member("dressed", file(10, 1)) {
        Item::Member(member) => member,
        _ => unreachable!("a member was made"),
    };
    dressed.xattrs = vec![
        (b"user.b".to_vec(), b"two\nlines".to_vec()),
        (b"user.a".to_vec(), b"\0".to_vec()),
        (b"trusted.overlay.opaque".to_vec(), b"y".to_vec()),
    ];
    vec![
        ("empty", vec![]),
        (
            "kinds",
            vec![
                member("directory", What::Directory),
                member("directory/file", file(3000, 1)),
                member("symlink", What::Symlink(b"directory/file".to_vec())),
                member("hard", What::HardLink(b"directory/file".to_vec())),
                member("character", What::Character(1, 3)),
                member("block", What::Block(259, 65_537)),
                member("fifo", What::Fifo),
                member("empty", file(0, 0)),
            ],
        ),
        (
            "chunks",
            vec![member("text", file(10_000, 1)), member("noise", file(9000, 3)), member("again", file(10_000, 1))],
        ),
        ("xattrs", vec![Item::Member(dressed)]),
        ("small", (0..5).map(|n| member(&format!("small-{n}"), file(900 + 300 * n, 9))).collect()),
        ("wide", (0..120).map(|n| member(&format!("a-name-of-some-length-{n:03}"), file(0, 0))).collect()),
    ]
}

/// What to build of the tree called `name`, in one thread.
fn spec(name: &str, items: &[Item], out: &Path) -> BuildSpec {
    let stream = Box::new(Cursor::new(archive(items)));
    let mut spec = BuildSpec::new(Source::Archive { name: name.into(), stream }, out);
    (spec.chunk_size, spec.threads) = (4096, NonZeroUsize::MIN);
    spec
}

fn key() -> Encryption {
    let key = BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [7; 16]);
    Encryption::Key(key.unwrap())
}

/// One line for an image: its digests and lengths.
fn line(tree: &str, kit: &str, report: &BuildReport) -> String {
    let bootstrap = codec::sha256(&fs::read(&report.bootstrap).unwrap());
    let blob = report.blobs.first().map_or("none", |blob| &blob.id[..16]);
    let bootstrap = &bootstrap.to_string()[..16];
    format!("{tree} {kit}: bootstrap {bootstrap} {} blob {blob}\n", report.bootstrap_bytes)
}

fn digests() -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut out = String::new();
    for (tree, items) in trees() {
        for (kit, compression, digest, batching) in [
            ("none blake3", Compression::None, DigestAlgorithm::Blake3, Batching::Off),
            ("lz4 blake3", Compression::Lz4, DigestAlgorithm::Blake3, Batching::Off),
            ("zstd blake3", Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, Batching::Off),
            ("zstd sha256", Compression::Zstd { level: 3 }, DigestAlgorithm::Sha256, Batching::Off),
            ("zstd batched", Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, Batching::Default),
        ] {
            let mut spec = spec(tree, &items, dir.path());
            (spec.compression, spec.digest, spec.batching) = (compression, digest, batching);
            out.push_str(&line(tree, kit, &build(spec, &()).unwrap()));
        }
    }
    out
}

/// The same for what surrounds the chunks of a blob, and what hides them.
fn digests_of_blobs() -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut out = String::new();
    for (tree, items) in trees() {
        for (kit, toc, inline, encryption) in [
            ("toc", true, false, Encryption::None),
            ("inline", false, true, Encryption::None),
            ("toc inline", true, true, Encryption::None),
            ("encrypted", false, false, key()),
            ("encrypted toc inline", true, true, key()),
        ] {
            let mut spec = spec(tree, &items, dir.path());
            (spec.blob_toc, spec.inline_bootstrap, spec.encryption) = (toc, inline, encryption);
            out.push_str(&line(tree, kit, &build(spec, &()).unwrap()));
        }
    }
    out
}

/// The same for RAFS v5.
fn digests_of_v5() -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut out = String::new();
    for (tree, items) in trees() {
        for (kit, compression, digest, aligned, inline) in [
            ("none blake3", Compression::None, DigestAlgorithm::Blake3, false, false),
            ("lz4 sha256", Compression::Lz4, DigestAlgorithm::Sha256, false, false),
            ("zstd blake3", Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, false, false),
            ("zstd sha256 aligned", Compression::Zstd { level: 3 }, DigestAlgorithm::Sha256, true, false),
            ("zstd blake3 inline", Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3, false, true),
        ] {
            let mut spec = spec(tree, &items, dir.path());
            (spec.compression, spec.digest) = (compression, digest);
            (spec.version, spec.inline_bootstrap) = (Version::V5 { aligned }, inline);
            out.push_str(&line(tree, kit, &build(spec, &()).unwrap()));
        }
    }
    out
}

/// Everything in a bootstrap.
fn text(image: &Image, detail: Detail) -> String {
    let mut out = Vec::new();
    dump(image, detail, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// The text of a small tree's image.
fn text_of(tree: &str, detail: Detail, change: impl FnOnce(&mut BuildSpec)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (_, items) = trees().into_iter().find(|(name, _)| *name == tree).unwrap();
    let mut spec = spec(tree, &items, dir.path());
    change(&mut spec);
    let report = build(spec, &()).unwrap();
    text(&bootstrap::open(Path::new(&report.bootstrap)).unwrap(), detail)
}

/// Compares `fresh` with a file under `tests/golden`, or writes the file.
#[track_caller]
fn assert_golden(name: &str, fresh: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("RAFSD_WRITE_GOLDEN").is_some() {
        fs::write(&path, fresh).unwrap();
    }
    let kept = fs::read_to_string(&path).unwrap();
    let differences: Vec<String> = kept
        .lines()
        .filter(|line| !fresh.lines().any(|other| other == *line))
        .map(|line| format!("- {line}"))
        .chain(fresh.lines().filter(|line| !kept.lines().any(|other| other == *line)).map(|line| format!("+ {line}")))
        .take(40)
        .collect();
    assert!(differences.is_empty() && kept == fresh, "{name} has changed:\n{}", differences.join("\n"));
}

#[test]
fn tiny_images_have_the_digests_they_always_had() {
    assert_golden("digests.txt", &digests());
}

#[test]
fn tiny_blobs_of_every_form_have_the_digests_they_always_had() {
    assert_golden("blobs.txt", &digests_of_blobs());
}

#[test]
fn tiny_images_of_version_5_have_the_digests_they_always_had() {
    assert_golden("v5.txt", &digests_of_v5());
}

#[test]
fn hard_links_devices_and_links_read_as_they_always_did() {
    assert_golden("kinds.txt", &text_of("kinds", Detail::Meaning, |spec| spec.batching = Batching::Off));
}

#[test]
fn xattrs_read_as_they_always_did() {
    assert_golden("xattrs.txt", &text_of("xattrs", Detail::Layout, |_| ()));
}

#[test]
fn batched_chunks_lie_where_they_always_did() {
    assert_golden("batched.txt", &text_of("small", Detail::Layout, |_| ()));
}

#[test]
fn an_encrypted_blob_with_all_parts_reads_as_it_always_did() {
    let all = |spec: &mut BuildSpec| {
        (spec.blob_toc, spec.inline_bootstrap, spec.encryption) = (true, true, key());
    };
    assert_golden("encrypted.txt", &text_of("chunks", Detail::Layout, all));
}

#[test]
fn two_merged_layers_read_as_they_always_did() {
    let dir = tempfile::tempdir().unwrap();
    let upper = vec![
        member("directory", What::Directory),
        member("directory/.wh.file", file(0, 0)),
        member("fifo", file(5000, 2)),
        member("text", file(10_000, 1)),
    ];
    let lower = trees().into_iter().flat_map(|(name, items)| if name == "kinds" { items } else { Vec::new() });
    let layers = [("lower", lower.collect()), ("upper", upper)].map(|(name, items): (_, Vec<Item>)| {
        let report = build(spec(name, &items, &dir.path().join(name)), &()).unwrap();
        let image = Image::open(Path::new(&report.bootstrap)).unwrap();
        Layer { name: name.into(), image, id: None }
    });
    let merging = MergeSpec {
        layers: layers.into(),
        parent: None,
        dictionary: None,
        whiteouts: Whiteouts::Oci,
        prefetch: Some(vec![b"/text".to_vec(), b"/directory".to_vec()]),
        facts: Vec::new(),
        version: MergeVersion::V6,
        out: dir.path().join("merged"),
    };

    merge(merging, &()).unwrap();

    let image = Image::open(&dir.path().join("merged")).unwrap();
    assert_golden("merged.txt", &text(&image, Detail::Meaning));
}
