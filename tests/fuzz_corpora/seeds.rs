//! What the fuzzer starts from: small inputs of every kind, made by our own builder.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::num::NonZeroUsize;

use rafsd::blob::{BlobKey, BlobTables};
use rafsd::build::{Batching, BuildSpec, Compression, Encryption, Source, build, lift};
use rafsd::codec::Compressor;
use rafsd::export::fuse::wire::{RequestHead, opcode};
use rafsd::format::blobfile::{ChunkInfoV2, Header, MAGIC, PartHeader, TocEntry, ZranContext, features};
use rafsd::format::erofs::{SUPERBLOCK_OFFSET, Superblock};
use rafsd::format::rafs::{Algorithm, BlobEntry, DigestAlgorithm};
use rafsd::image::Image;
use rafsd::image::v5::Bootstrap;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::bodies;
use super::support::tree::Random;
use super::support::v5::{Item, Writer, noise, tree};

type Seeds = BTreeMap<String, Vec<u8>>;

/// The seeds of every target.
pub(super) fn all() -> Vec<(&'static str, Seeds)> {
    let (mut bootstraps, mut tables, mut archives) = (Seeds::new(), Seeds::new(), Seeds::new());
    for (name, archive) in samples() {
        archives.insert(name.to_owned(), bodies::tar::pack(archive.clone()));
        let (zstd, blake3) = (Compression::Zstd { level: 3 }, DigestAlgorithm::Blake3);
        for (kit, compression, digest, batching, encryption) in [
            ("zstd", zstd, blake3, Batching::Off, Encryption::None),
            ("lz4", Compression::Lz4, DigestAlgorithm::Sha256, Batching::Off, Encryption::None),
            ("none", Compression::None, blake3, Batching::Off, Encryption::None),
            ("batched", zstd, blake3, Batching::Size(4096), Encryption::None),
            ("encrypted", zstd, blake3, Batching::Off, key()),
            ("both", zstd, blake3, Batching::Size(4096), key()),
        ] {
            let image = image(archive.clone(), |spec| {
                (spec.compression, spec.digest, spec.batching) = (compression, digest, batching);
                spec.encryption = encryption;
            });
            if matches!(kit, "zstd" | "none") {
                bootstraps.insert(format!("{name}-{kit}"), bodies::bootstrap::pack(&image.bootstrap));
            }
            if let Some(input) = image.tables() {
                tables.insert(format!("{name}-{kit}"), input);
            }
        }
    }
    bootstraps.insert("short-blocks".into(), bodies::bootstrap::pack(&short_blocks()));
    tables.extend(foreign());
    tables.insert("listed".into(), listed());
    vec![
        ("bootstrap", bootstraps),
        ("blob_meta", tables),
        ("tar", archives),
        ("codec", streams()),
        ("toc", files()),
        ("lists", lists()),
        ("oci", registries()),
        ("rafs5", version_5()),
        ("fuse_wire", requests()),
    ]
}

/// A blob without tables: its row, and some of the records that list its chunks.
fn listed() -> Vec<u8> {
    let written = Writer::default().image(&tree([("file", Item::File(noise(2, 40_000)))]));
    let bootstrap = lift(&Bootstrap::parse(&written.bytes).unwrap()).unwrap();
    let image = Image::parse(bootstrap).unwrap();
    let rows = &image.chunk_records()[..5];
    [&[5], image.devices()[0].entry.as_bytes(), rows.as_bytes()].concat()
}

/// Bootstraps of RAFS v5 with every kind of record.
fn version_5() -> Seeds {
    let file = |seed, len| Item::File(noise(seed, len));
    let xattrs = |item| Item::With(Box::new(item), vec![("user.a", b"1".to_vec()), ("security.b", vec![])]);
    let kinds = tree([
        ("b", Item::Dir(tree([("x", xattrs(file(1, 9000))), ("y", Item::Hard("b/x"))]))),
        ("c", Item::Link(b"b/x".to_vec())),
        ("d", Item::Fifo),
        ("e", Item::Char(259)),
    ]);
    let nested = tree([("a", Item::Dir(tree([("b", Item::Dir(tree([("c", xattrs(Item::Fifo))])))])))]);
    let chunks = tree([("long", file(2, 40_000)), ("same", file(2, 8192)), ("tiny", file(3, 1))]);
    let mut seeds = Seeds::new();
    for (name, tree) in [("kinds", kinds), ("nested", nested), ("chunks", chunks)] {
        for (kit, mut writer) in [
            ("zstd", Writer::default()),
            ("old", Writer { extended: false, sha256: true, ..Writer::default() }),
            ("gzip", Writer { compression: Algorithm::Gzip, prefetch: vec![2, 1], ..Writer::default() }),
        ] {
            let image = writer.image(&tree);
            seeds.insert(format!("{name}-{kit}"), bodies::bootstrap::pack(&image.bytes));
        }
    }
    seeds
}

/// Requests as kernels send them.
fn requests() -> Seeds {
    let request = |opcode, body: &[u8]| {
        let len = u32::try_from(size_of::<RequestHead>() + body.len()).unwrap();
        let head = RequestHead { len, opcode, unique: 6, node: 300, uid: 0, gid: 0, pid: 1, extensions: 0, padding: 0 };
        [head.as_bytes(), body].concat()
    };
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
    let read = words(&[0, 0, 4096, 0, 131_072, 0, 0, 0, 0x8000, 0]);
    let init = [words(&[7, 45, 131_072, 0x73ff_fffb, 0x3ff]), vec![0; 44]].concat();
    let old = words(&[7, 31, 131_072, 0x03ff_fffb]);
    let named = [words(&[64, 0]), b"user.name\0".to_vec()].concat();
    let walk = [
        request(opcode::LOOKUP, b"usr\0"),
        request(opcode::GETATTR, &words(&[0, 0, 0, 0])),
        request(opcode::OPENDIR, &words(&[0, 0])),
        request(opcode::READDIRPLUS, &read),
        request(opcode::READDIR, &read),
        request(opcode::READLINK, &[]),
        request(opcode::FORGET, &words(&[1, 0])),
        request(opcode::BATCH_FORGET, &words(&[1, 0, 5, 0, 1, 0])),
    ];
    let bytes = [
        request(opcode::OPEN, &words(&[0, 0])),
        request(opcode::READ, &read),
        request(opcode::INTERRUPT, &words(&[6, 0])),
        request(opcode::RELEASE, &[0; 24]),
    ];
    let attributes = [
        request(opcode::GETXATTR, &named),
        request(opcode::LISTXATTR, &words(&[0, 0])),
        request(opcode::STATFS, &[]),
        request(opcode::SETXATTR, &named),
        request(99, &[]),
    ];
    let hello = |body: &[u8]| bodies::fuse_wire::pack(&[request(opcode::INIT, body), request(opcode::DESTROY, &[])]);
    Seeds::from([
        ("init".into(), hello(&init)),
        ("init-old".into(), hello(&old)),
        ("walk".into(), bodies::fuse_wire::pack(&walk)),
        ("bytes".into(), bodies::fuse_wire::pack(&bytes)),
        ("attributes".into(), bodies::fuse_wire::pack(&attributes)),
    ])
}

fn key() -> Encryption {
    let key = BlobKey::new(std::array::from_fn(|at| u8::try_from(at).unwrap()), [7; 16]);
    Encryption::Key(key.unwrap())
}

/// An empty image that counts in blocks of 512 bytes, as those of plain tar layers do.
fn short_blocks() -> Vec<u8> {
    let (_, archive) = samples().remove(0);
    let mut bytes = image(archive, |_| ()).bootstrap;
    let sb = usize::try_from(SUPERBLOCK_OFFSET).unwrap();
    let (sb, _) = Superblock::mut_from_prefix(&mut bytes[sb..]).unwrap();
    sb.blkszbits = 9;
    sb.meta_blkaddr = (sb.meta_blkaddr.get() * 8).into();
    sb.blocks = (sb.blocks.get() * 8).into();
    bytes
}

/// Tables of blobs that we do not write: an index into a gzip file, and a plain tar.
fn foreign() -> Seeds {
    let mut entry = BlobEntry::new_zeroed();
    entry.id = [b'a'; 64];
    entry.chunk_size = (1 << 20).into();
    (entry.compressed_size, entry.uncompressed_size) = (5_000_000.into(), 5_000_000.into());
    entry.features = (features::TARFS | features::CAP_TAR_TOC).into();
    let empty = Header::new_zeroed();
    let tar = bodies::blob_meta::pack(entry.as_bytes(), &[], empty.as_bytes(), &[]);

    let rows = [
        ChunkInfoV2::alone((0, 5000), (10, 0), ChunkInfoV2::ZRAN, None),
        ChunkInfoV2::alone((8192, 300), (20, 0), ChunkInfoV2::ZRAN, Some(5000)),
    ];
    let mut context = ZranContext::new_zeroed();
    (context.in_offset, context.in_len, context.out_len) = (10.into(), 800.into(), 6000.into());
    (context.dict_size, context.ctx_bits, context.ctx_byte) = (32.into(), 3, 0xaa);
    let array = [rows.as_bytes(), context.as_bytes(), &[7; 32]].concat();
    let len = array.len() as u64;
    entry.features = (features::ZRAN | features::CHUNK_INFO_V2 | features::CAP_TAR_TOC | features::ALIGNED).into();
    (entry.chunk_count, entry.uncompressed_size) = (2.into(), 12_288.into());
    (entry.ci_offset, entry.ci_compressed_size, entry.ci_uncompressed_size) = (1000.into(), len.into(), len.into());
    let mut header = Header::new_zeroed();
    (header.magic, header.magic2) = (MAGIC.into(), MAGIC.into());
    (header.features, header.ci_entries, header.ci_offset) = (entry.features, 2.into(), 1000.into());
    (header.ci_compressed_size, header.ci_uncompressed_size) = (len.into(), len.into());
    (header.ci_zran_offset, header.ci_zran_size) = (48.into(), 72.into());
    header.ci_zran_count = 1.into();
    let zran = bodies::blob_meta::pack(entry.as_bytes(), &[], header.as_bytes(), &array);
    Seeds::from([("tar".into(), tar), ("zran".into(), zran)])
}

/// Inputs of the target `toc`: blob files of a few hundred bytes.
fn files() -> Seeds {
    let text = b"a bootstrap, a bootstrap, a bootstrap, a bootstrap".as_slice();
    let mut compressor = Compressor::zstd(3).unwrap();
    let packed = compressor.compress(text).unwrap().to_vec();
    let entry = |name: &str, flags, (at, stored): (usize, usize), plain: &[u8]| {
        let mut row = TocEntry::new_zeroed();
        row.name[..name.len()].copy_from_slice(name.as_bytes());
        row.flags = flags;
        (row.compressed_offset, row.compressed_size) = ((at as u64).into(), (stored as u64).into());
        row.uncompressed_size = (plain.len() as u64).into();
        row.digest = rafsd::codec::sha256(plain).0;
        row.as_bytes().to_vec()
    };
    let file = |parts: &[&[u8]], rows: Vec<Vec<u8>>| {
        let rows = rows.concat();
        let header = PartHeader::new("rafs.blob.toc", rows.len() as u64);
        [parts.concat(), rows, header.as_bytes().to_vec()].concat()
    };
    let (plain, zstd) = (TocEntry::PLAIN.into(), TocEntry::ZSTD.into());
    let short = vec![entry("image.boot", plain, (0, text.len()), text)];
    let long = vec![
        entry("image.blob", plain, (1 << 40, 99), b"elsewhere"),
        entry("blob.meta", zstd, (0, packed.len()), text),
        entry("blob.digest", plain, (packed.len(), 4), b"1234"),
    ];
    let last = PartHeader::new("image.boot", text.len() as u64);
    Seeds::from([
        ("plain".into(), file(&[text], short)),
        ("packed".into(), file(&[&packed, b"1234"], long)),
        ("bootstrap".into(), [text, last.as_bytes()].concat()),
    ])
}

/// Inputs of the target `lists`.
fn lists() -> Seeds {
    let texts: [(&str, u8, &[u8]); 9] = [
        ("hints", 0, b"/usr/bin/sh\n relative\n/etc/\n/etc/passwd\n//usr/./lib\n"),
        ("hot-text", 1, b"/a\n/b:0+4096,8192+1\n\n/c/d e\n"),
        ("hot-lines", 1, b"{\"path\":\"/a\",\"ranges\":[[0,4096]]}\n{\"path_hex\":\"2fff\"}\n/x\n"),
        ("hot-document", 1, b"{\"version\":\"v1\",\"files\":[{\"path\":\"/a\",\"ranges\":[[0,4096],[5,6]]}]}"),
        ("glob", 2, b"usr/**/*.[a-co]?"),
        ("set", 2, b"[!]a-c]\\*x/"),
        ("stars", 2, b"*a*a*a*a*a*b"),
        ("range", 3, b"1000:0:65536"),
        ("one", 3, b"4294967295:0"),
    ];
    texts.map(|(name, list, text)| (name.to_owned(), bodies::lists::pack(list, text))).into()
}

/// Inputs of the target `oci`.
fn registries() -> Seeds {
    use bodies::oci::{DOCUMENT, LAYER, NAME, pack};
    let digest = format!("sha256:{}", "5b".repeat(32));
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":2}},"layers":[{{"digest":"{digest}","size":1,"annotations":{{"containerd.io/snapshot/nydus-blob":"true"}}}},{{"digest":"{digest}","size":1,"annotations":{{"containerd.io/snapshot/nydus-bootstrap":"true","containerd.io/snapshot/nydus-fs-version":"6"}}}}]}}"#
    );
    let index = format!(
        r#"{{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{{"digest":"{digest}","size":9,"artifactType":"application/vnd.nydus.image.manifest.v1+json","platform":{{"os":"linux","architecture":"amd64"}}}}]}}"#
    );
    let tar = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(9);
        builder.append_data(&mut header, "image/image.boot", &b"bootstrap"[..]).unwrap();
        builder.into_inner().unwrap()
    };
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &tar).unwrap();
        encoder.finish().unwrap()
    };
    let name = format!("docker://registry.example:5000/team/app__x.y-z:1.2@{digest}");
    Seeds::from([
        ("name".into(), pack(NAME, name.as_bytes())),
        ("address".into(), pack(NAME, b"[fd00::7]:5000/a")),
        ("short".into(), pack(NAME, b"ubuntu")),
        ("manifest".into(), pack(DOCUMENT, manifest.as_bytes())),
        ("index".into(), pack(DOCUMENT, index.as_bytes())),
        ("layer".into(), pack(LAYER, &gzip)),
        ("layer-zstd".into(), pack(LAYER, &zstd::encode_all(&tar[..], 1).unwrap())),
        ("layer-plain".into(), pack(LAYER, tar.strip_suffix(&[0; 1024]).unwrap_or(&tar))),
    ])
}

struct Made {
    bootstrap: Vec<u8>,
    blob: Option<Vec<u8>>,
}

fn image(archive: Vec<u8>, change: impl FnOnce(&mut BuildSpec)) -> Made {
    let dir = tempfile::tempdir().unwrap();
    let stream = Box::new(Cursor::new(archive));
    let mut spec = BuildSpec::new(Source::Archive { name: "seed.tar".into(), stream }, dir.path());
    (spec.chunk_size, spec.threads) = (4096, NonZeroUsize::MIN);
    change(&mut spec);
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
        let tables = BlobTables::new(&entry).unwrap();
        let clear = |stored: &[u8]| {
            let mut text = stored.to_vec();
            tables.key().map_or(Ok(()), |key| key.decrypt(&mut text)).unwrap();
            text
        };
        let (header, array) = (clear(&blob[header..]), clear(&blob[array]));
        Some(bodies::blob_meta::pack(entry.as_bytes(), rows.as_bytes(), &header, &array))
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
