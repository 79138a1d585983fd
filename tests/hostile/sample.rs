//! A small image with everything in it, and where each of its structures lies.

use std::fs;
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use rafsd::base::{BLOCK, BlobId};
use rafsd::blob::{BlobTables, UnitMap, decode};
use rafsd::build::{Batching, BuildSpec, Compression, Source, build};
use rafsd::format::erofs::{ChunkIndex, DeviceSlot, Dirent, InodeExtended, SUPERBLOCK_OFFSET, Superblock};
use rafsd::format::rafs::{
    BlobEntry, ChunkRecord, DEVICE_TABLE_OFFSET, DigestAlgorithm, EXT_SUPERBLOCK_OFFSET, ExtSuperblock,
};
use rafsd::format::{array_at, record_at};
use rafsd::image::{Image, Kind, Layout};
use tempfile::TempDir;

use super::support::tree::Random;

/// One way to build the sample.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kit {
    pub(super) compression: Compression,
    pub(super) digest: DigestAlgorithm,
    pub(super) chunk_size: u64,
}

/// Every compression, both digests, several chunk sizes.
pub(super) const KITS: [Kit; 4] = [
    Kit { compression: Compression::Zstd { level: 3 }, digest: DigestAlgorithm::Blake3, chunk_size: 16 << 10 },
    Kit { compression: Compression::Lz4, digest: DigestAlgorithm::Sha256, chunk_size: 64 << 10 },
    Kit { compression: Compression::None, digest: DigestAlgorithm::Blake3, chunk_size: 32 << 10 },
    Kit { compression: Compression::Zstd { level: 1 }, digest: DigestAlgorithm::Sha256, chunk_size: 4 << 10 },
];

/// An image and what is known to be right about it.
pub(super) struct Sample {
    dir: TempDir,
    pub(super) bootstrap: Vec<u8>,
    /// The blob file.
    pub(super) stored: Vec<u8>,
    pub(super) blob: BlobId,
    /// The decoded device, computed unit by unit without a cache.
    pub(super) device: Vec<u8>,
    pub(super) map: UnitMap,
}

/// Where a kind of structure lies in the bootstrap: `records` of `size` bytes from `at`.
#[derive(Clone, Debug)]
pub(super) struct Region {
    pub(super) name: &'static str,
    pub(super) at: usize,
    pub(super) size: usize,
    pub(super) records: usize,
}

impl Region {
    pub(super) fn bytes(&self) -> Range<usize> {
        self.at..self.at + self.size * self.records
    }
}

impl Sample {
    pub(super) fn new(kit: Kit) -> Self {
        Self::of_archive(kit, archive())
    }

    /// The image of one incompressible file.
    pub(super) fn of_noise(len: usize, seed: u64) -> Self {
        let mut tar = tar::Builder::new(Vec::new());
        add_file(&mut tar, "noise", &Random::new(seed).noise(len));
        Self::of_archive(KITS[2], tar.into_inner().unwrap())
    }

    pub(super) fn of_archive(kit: Kit, archive: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stream = Box::new(std::io::Cursor::new(archive));
        let mut spec = BuildSpec::new(Source::Archive { name: "sample.tar".into(), stream }, dir.path());
        (spec.compression, spec.digest, spec.chunk_size) = (kit.compression, kit.digest, kit.chunk_size);
        (spec.batching, spec.threads) = (Batching::Off, NonZeroUsize::MIN);
        let report = build(spec, &()).unwrap();
        let bootstrap = fs::read(&report.bootstrap).unwrap();
        let stored = fs::read(&report.blobs[0].path).unwrap();
        let image = Image::parse(bootstrap.clone()).unwrap();
        let map = map_of(&image, &stored);
        let mut device = vec![0; index(map.decoded_len())];
        for unit in map.units() {
            let from = index(unit.stored.start())..index(unit.stored.end());
            let to = index(unit.blocks().start())..index(unit.blocks().end());
            decode(unit, map.key(), &stored[from], &mut device[to]).unwrap();
        }
        Self { dir, bootstrap, stored, blob: map.blob().clone(), device, map }
    }

    /// The directory with the blob in it.
    pub(super) fn blobs(&self) -> PathBuf {
        self.dir.path().join("blobs")
    }

    pub(super) fn image(&self) -> Image {
        Image::parse(self.bootstrap.clone()).unwrap()
    }

    /// Everything that has a structure, found through the format alone where that is possible.
    pub(super) fn regions(&self) -> Vec<Region> {
        let image = self.image();
        let bytes = self.bootstrap.as_slice();
        let sb: &Superblock = record_at(bytes, SUPERBLOCK_OFFSET, "superblock").unwrap();
        let ext: &ExtSuperblock = record_at(bytes, EXT_SUPERBLOCK_OFFSET, "extended superblock").unwrap();
        let mut out = Vec::new();
        let mut add = |name, at: u64, size, records: u64| {
            out.push(Region { name, at: index(at), size, records: index(records) });
        };
        let devices = u64::from(sb.extra_devices.get());
        let chunks = ext.chunk_table_size.get() / size_of::<ChunkRecord>() as u64;
        add("superblock", SUPERBLOCK_OFFSET, size_of::<Superblock>(), 1);
        add("extended superblock", EXT_SUPERBLOCK_OFFSET, size_of::<ExtSuperblock>(), 1);
        add("device slot", DEVICE_TABLE_OFFSET, size_of::<DeviceSlot>(), devices);
        add("blob entry", ext.blob_table_offset.get(), size_of::<BlobEntry>(), devices);
        add("chunk record", ext.chunk_table_offset.get(), size_of::<ChunkRecord>(), chunks);
        let mut walk = image.walk();
        while let Some(visit) = walk.next_visit() {
            let inode = visit.unwrap().inode;
            let at = image.summary().meta_start + inode.nid * 32;
            let raw: &InodeExtended = record_at(bytes, at, "inode").unwrap();
            let behind = at + size_of::<InodeExtended>() as u64;
            add("inode", at, size_of::<InodeExtended>(), 1);
            if let words @ 1.. = u64::from(raw.xattr_icount.get()) {
                add("xattr", behind, 4, 3 + words - 1);
            }
            match inode.layout {
                Layout::Chunks { indexes, .. } => {
                    let count = inode.size.div_ceil(image.summary().chunk_size.into());
                    add("chunk index", indexes, size_of::<ChunkIndex>(), count);
                }
                Layout::Inline { at, tail } if inode.kind == Kind::Directory => {
                    for block in 0..inode.size / BLOCK {
                        add(
                            "directory entry",
                            at + block * BLOCK,
                            size_of::<Dirent>(),
                            entries(bytes, at + block * BLOCK),
                        );
                    }
                    if inode.size % BLOCK != 0 {
                        add("directory entry", tail, size_of::<Dirent>(), entries(bytes, tail));
                    }
                }
                Layout::Plain { at } if inode.kind == Kind::Directory => {
                    for block in 0..inode.size.div_ceil(BLOCK) {
                        add(
                            "directory entry",
                            at + block * BLOCK,
                            size_of::<Dirent>(),
                            entries(bytes, at + block * BLOCK),
                        );
                    }
                }
                _ => {}
            }
        }
        out
    }
}

fn entries(bytes: &[u8], block: u64) -> u64 {
    let first: &Dirent = record_at(bytes, block, "entry").unwrap();
    u64::from(first.nameoff.get()) / size_of::<Dirent>() as u64
}

/// The map of the first device, as the daemon makes it.
fn map_of(image: &Image, stored: &[u8]) -> UnitMap {
    let tables = BlobTables::new(&image.devices()[0].entry).unwrap();
    let at = tables.stored();
    let bytes: &[u8] = array_at(stored, at.start(), at.len(), "tables").unwrap();
    tables.with_digests(tables.geometry(bytes).unwrap(), image.chunk_records().iter()).unwrap()
}

/// Offsets of these small images as positions in memory.
pub(super) fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Files around the boundaries of chunks, links, devices, xattrs, deep, wide and empty
/// directories.
fn archive() -> Vec<u8> {
    let mut random = Random::new(11);
    let mut tar = tar::Builder::new(Vec::new());
    for len in [0, 1, 4095, 4096, 4097, 16384, 50_000, 65_537] {
        add_file(&mut tar, &format!("text/{len}"), &random.text(len));
    }
    let noise = random.noise(40_000);
    add_file(&mut tar, "noise", &noise);
    tar.append_pax_extensions([
        ("SCHILY.xattr.user.text", b"value".as_slice()),
        ("SCHILY.xattr.security.noise", &noise[..300]),
    ])
    .unwrap();
    add_file(&mut tar, "xattrs", b"attributes");
    for number in 0..150 {
        add_file(&mut tar, &format!("wide/a-rather-long-name-{number}"), if number % 9 == 0 { b"x" } else { b"" });
    }
    add_file(&mut tar, &format!("{}bottom", "deep/".repeat(20)), b"made it");
    for (name, kind, target) in [
        ("link", tar::EntryType::Symlink, "noise"),
        ("second", tar::EntryType::Link, "noise"),
        ("fifo", tar::EntryType::Fifo, ""),
        ("null", tar::EntryType::Char, ""),
        ("empty", tar::EntryType::Directory, ""),
    ] {
        let mut header = header(0);
        header.set_entry_type(kind);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        match target {
            "" => tar.append_data(&mut header, name, std::io::empty()).unwrap(),
            _ => tar.append_link(&mut header, name, target).unwrap(),
        }
    }
    tar.into_inner().unwrap()
}

fn header(len: usize) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_size(len as u64);
    header.set_mode(0o644);
    header.set_uid(7);
    header.set_gid(8);
    header.set_mtime(1_700_000_000);
    header
}

fn add_file(tar: &mut tar::Builder<Vec<u8>>, path: &str, content: &[u8]) {
    tar.append_data(&mut header(content.len()), path, content).unwrap();
}

#[test]
fn the_sample_has_every_structure() {
    for kit in KITS {
        let sample = Sample::new(kit);
        let regions = sample.regions();
        for name in [
            "superblock",
            "extended superblock",
            "device slot",
            "blob entry",
            "chunk record",
            "inode",
            "xattr",
            "chunk index",
            "directory entry",
        ] {
            assert!(regions.iter().any(|region| region.name == name && region.records > 0), "{name} in {kit:?}");
        }
        let mut units = 0;
        let image = sample.image();
        let mut walk = image.walk();
        while let Some(visit) = walk.next_visit() {
            let mut count = |_| {
                units += 1;
                ControlFlow::Continue(())
            };
            image.extents(&visit.unwrap().inode, &mut count).unwrap();
        }
        assert!(units > 20, "{units}");
    }
}
