//! Tiny images as they have always been: the digests of bootstrap and blob, under version control.
//!
//! A change of the format, of the layout or of a compressor shows here. Where the change is meant,
//! `RAFSD_WRITE_GOLDEN=1 cargo test --test golden` writes the files anew, and the difference is for
//! a reader of the commit.

#[path = "support/generated/mod.rs"]
mod generated;
mod support;

use std::fmt::Write as _;
use std::fs;
use std::io::Cursor;
use std::num::NonZeroUsize;
use std::path::Path;

use generated::member::{Content, Island, Item, Member, Numbers, Style, What, archive};
use rafsd::build::{Batching, BuildSpec, Compression, Source, build};
use rafsd::codec;
use rafsd::format::rafs::DigestAlgorithm;

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
        ("wide", (0..120).map(|n| member(&format!("a-name-of-some-length-{n:03}"), file(0, 0))).collect()),
    ]
}

/// One line for each image: its digests and lengths.
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
            let stream = Box::new(Cursor::new(archive(&items)));
            let mut spec = BuildSpec::new(Source::Archive { name: tree.into(), stream }, dir.path());
            (spec.compression, spec.digest, spec.batching) = (compression, digest, batching);
            (spec.chunk_size, spec.threads) = (4096, NonZeroUsize::MIN);
            let report = build(spec, &()).unwrap();
            let bootstrap = codec::sha256(&fs::read(&report.bootstrap).unwrap());
            let blob = report.blobs.first().map_or("none", |blob| &blob.id[..16]);
            let bootstrap = &bootstrap.to_string()[..16];
            writeln!(out, "{tree} {kit}: bootstrap {bootstrap} {} blob {blob}", report.bootstrap_bytes).unwrap();
        }
    }
    out
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
