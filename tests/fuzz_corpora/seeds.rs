//! What the fuzzer starts from: small inputs of every kind, made by our own builder.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::num::NonZeroUsize;

use rafsd::build::{Batching, BuildSpec, Compression, Source, build};
use rafsd::codec::Compressor;
use rafsd::format::blobfile::Header;
use rafsd::format::rafs::DigestAlgorithm;
use rafsd::image::Image;
use zerocopy::IntoBytes;

use super::bodies;
use super::support::tree::Random;

type Seeds = BTreeMap<String, Vec<u8>>;

/// The seeds of every target.
pub(super) fn all() -> Vec<(&'static str, Seeds)> {
    let (mut bootstraps, mut tables, mut archives) = (Seeds::new(), Seeds::new(), Seeds::new());
    for (name, archive) in samples() {
        archives.insert(name.to_owned(), bodies::tar::pack(archive.clone()));
        for (kit, compression, digest) in [
            ("zstd", Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3),
            ("lz4", Compression::Lz4, DigestAlgorithm::Sha256),
            ("none", Compression::None, DigestAlgorithm::Blake3),
        ] {
            let image = image(archive.clone(), compression, digest);
            if kit != "lz4" {
                bootstraps.insert(format!("{name}-{kit}"), bodies::bootstrap::pack(&image.bootstrap));
            }
            if let Some(input) = image.tables() {
                tables.insert(format!("{name}-{kit}"), input);
            }
        }
    }
    vec![("bootstrap", bootstraps), ("blob_meta", tables), ("tar", archives), ("codec", streams())]
}

struct Made {
    bootstrap: Vec<u8>,
    blob: Option<Vec<u8>>,
}

fn image(archive: Vec<u8>, compression: Compression, digest: DigestAlgorithm) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let stream = Box::new(Cursor::new(archive));
    let mut spec = BuildSpec::new(Source::Archive { name: "seed.tar".into(), stream }, dir.path());
    (spec.compression, spec.digest, spec.batching) = (compression, digest, Batching::Off);
    (spec.chunk_size, spec.threads) = (4096, NonZeroUsize::MIN);
    let report = build(spec, &()).unwrap();
    Made {
        bootstrap: std::fs::read(&report.bootstrap).unwrap(),
        blob: report.blobs.first().map(|blob| std::fs::read(&blob.path).unwrap()),
    }
}

impl Made {
    /// The input of the target `blob_meta`; none where there are no chunks, or too many.
    fn tables(&self) -> Option<Vec<u8>> {
        let blob = self.blob.as_ref()?;
        let image = Image::parse(self.bootstrap.clone()).unwrap();
        let (entry, rows) = (image.devices()[0].entry, image.chunk_records());
        if rows.len() >= 16 {
            return None;
        }
        let header = blob.len() - size_of::<Header>();
        let array = usize::try_from(entry.ci_offset.get()).unwrap()..header;
        Some(bodies::blob_meta::pack(entry.as_bytes(), rows.as_bytes(), &blob[header..], &blob[array]))
    }
}

/// Archives whose images fit in 64 KiB.
fn samples() -> Vec<(&'static str, Vec<u8>)> {
    let mut random = Random::new(3);
    let empty = tar::Builder::new(Vec::new()).into_inner().unwrap();

    let mut kinds = tar::Builder::new(Vec::new());
    let acl = [2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255];
    kinds
        .append_pax_extensions([
            ("SCHILY.xattr.user.text", b"a\nb=c\0".as_slice()),
            ("SCHILY.xattr.security.capability", &[1, 0, 0, 2]),
            ("SCHILY.xattr.system.posix_acl_access", &acl),
            ("mtime", b"-1.25"),
        ])
        .unwrap();
    file(&mut kinds, "file", b"content");
    file(&mut kinds, "directory/empty", b"");
    for (name, kind, target) in [
        ("link", tar::EntryType::Symlink, "file"),
        ("second", tar::EntryType::Link, "file"),
        ("long-link", tar::EntryType::Symlink, "target/".repeat(30).as_str()),
        ("fifo", tar::EntryType::Fifo, ""),
        ("null", tar::EntryType::Char, ""),
        ("disk", tar::EntryType::Block, ""),
    ] {
        let mut header = header(0);
        header.set_entry_type(kind);
        match target {
            "" => kinds.append_data(&mut header, name, std::io::empty()).unwrap(),
            _ => kinds.append_link(&mut header, name, target).unwrap(),
        }
    }

    let mut wide = tar::Builder::new(Vec::new());
    for number in 0..70 {
        file(&mut wide, &format!("wide/a-long-name-for-the-second-block-{number}"), b"");
    }
    let mut chunks = tar::Builder::new(Vec::new());
    for len in [1, 4096, 8200] {
        file(&mut chunks, &format!("text-{len}"), &random.text(len));
    }
    file(&mut chunks, "noise", &random.noise(4500));
    let done = |builder: tar::Builder<Vec<u8>>| builder.into_inner().unwrap();
    vec![
        ("empty", empty),
        ("kinds", done(kinds)),
        ("wide", done(wide)),
        ("chunks", done(chunks)),
        ("sparse", sparse_archive()),
    ]
}

/// All versions of sparse members.
fn sparse_archive() -> Vec<u8> {
    let mut out = tar::Builder::new(Vec::new());
    out.append_pax_extensions([("GNU.sparse.size", "9000".as_bytes()), ("GNU.sparse.map", b"8000,7")]).unwrap();
    file(&mut out, "version-0.1", b"payload");
    let old = [
        ("GNU.sparse.size", b"9000".as_slice()),
        ("GNU.sparse.numblocks", b"1"),
        ("GNU.sparse.offset", b"4096"),
        ("GNU.sparse.numbytes", b"7"),
    ];
    out.append_pax_extensions(old).unwrap();
    file(&mut out, "version-0.0", b"payload");
    let new = [
        ("GNU.sparse.major", b"1".as_slice()),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"version-1.0"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    out.append_pax_extensions(new).unwrap();
    file(&mut out, "GNUSparseFile.0/version-1.0", format!("{:\0<512}payload", "1\n8993\n7\n").as_bytes());

    let mut old_gnu = tar::Header::new_gnu();
    old_gnu.set_entry_type(tar::EntryType::GNUSparse);
    old_gnu.set_size(7);
    old_gnu.set_mode(0o600);
    let fields = old_gnu.as_gnu_mut().unwrap();
    fields.sparse[0].set_offset(4096);
    fields.sparse[0].set_length(7);
    fields.set_real_size(9000);
    old_gnu.set_path("old").unwrap();
    old_gnu.set_cksum();
    out.append(&old_gnu, b"payload".as_slice()).unwrap();
    out.into_inner().unwrap()
}

fn header(len: usize) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_size(len as u64);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_700_000_000);
    header.set_device_major(1).unwrap();
    header.set_device_minor(300).unwrap();
    header
}

fn file(out: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    out.append_data(&mut header(content.len()), path, content).unwrap();
}

/// Inputs of the target `codec`.
fn streams() -> Seeds {
    let mut random = Random::new(4);
    let mut seeds = Seeds::new();
    for (name, plain) in [("text", random.text(900)), ("runs", [vec![b'a'; 3000], vec![0; 3000]].concat())] {
        let len = u16::try_from(plain.len()).unwrap();
        let mut add = |codec, number, stored: &[u8]| {
            seeds.insert(format!("{codec}-{name}"), bodies::codec::pack(number, len, stored));
        };
        add("lz4", 0, Compressor::lz4().compress(&plain).unwrap());
        add("zstd", 2, Compressor::zstd(3).unwrap().compress(&plain).unwrap());
        let mut gzip = Vec::new();
        flate2::read::GzEncoder::new(plain.as_slice(), flate2::Compression::best()).read_to_end(&mut gzip).unwrap();
        add("gzip", 1, &gzip);
    }
    seeds
}
