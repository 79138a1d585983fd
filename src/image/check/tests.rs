use std::collections::BTreeSet;

use super::super::list::DirBlocks;
use super::super::sample::{self, Patch};
use super::super::{Image, Inode, Layout};
use super::*;
use crate::format::erofs::{INODE_SLOT, SUPERBLOCK_OFFSET};
use crate::format::rafs::{DEVICE_TABLE_OFFSET, EXT_SUPERBLOCK_OFFSET};

const SB: u64 = SUPERBLOCK_OFFSET;
const EXT: u64 = EXT_SUPERBLOCK_OFFSET;
const SLOT: u64 = DEVICE_TABLE_OFFSET;
/// Where the sample's blob table is.
const BLOB: u64 = 4096;

#[test]
fn a_sound_image_gives_no_finding() {
    let image = sample::image();
    let report = check(&image);

    assert_eq!(report.findings, []);
    assert!(report.is_sound());
    assert_eq!(report.paths, image.summary().paths);
    assert_eq!(report.inodes, report.paths - 1, "one name is a second link");
    assert_eq!(report.chunks, 1 + 5 + 2 + 5 + 1 + 1);
}

impl Patch {
    fn image_at(&self, path: &str) -> (Image, Inode) {
        let image = self.image();
        let inode = image.lookup(path.as_bytes()).unwrap().unwrap_or_else(|| panic!("no {path}"));
        (image, inode)
    }

    /// Overwrites bytes of the inode at `path`.
    fn inode(&mut self, path: &str, field: u64, new: &[u8]) {
        let (image, inode) = self.image_at(path);
        self.put(image.summary().meta_start + inode.nid * INODE_SLOT + field, new);
    }

    /// Overwrites bytes of the first chunk index of the file at `path`.
    fn index(&mut self, path: &str, field: u64, new: &[u8]) {
        let (_, inode) = self.image_at(path);
        let Layout::Chunks { indexes, .. } = inode.layout else { panic!("{path} has no chunks") };
        self.put(indexes + field, new);
    }

    /// Overwrites bytes of record `number` of the chunk table.
    fn record(&mut self, number: u64, field: u64, new: &[u8]) {
        let at = self.image().chunk_table.0 + number * 80 + field;
        self.put(at, new);
    }

    /// Where entry `name` of directory `dir` and its name lie.
    fn entry(&self, dir: &str, name: &str) -> (u64, u64) {
        let (image, dir) = self.image_at(dir);
        let base = image.bytes().as_ptr() as usize;
        let blocks = DirBlocks::new(&image, &dir).unwrap();
        for block in (0..blocks.count()).map(|number| blocks.get(number).unwrap()) {
            let start = block.bytes().as_ptr() as usize - base;
            for index in 0..block.count() {
                let entry = block.entry(index).unwrap();
                if entry.name == name.as_bytes() {
                    return ((start + index * 12) as u64, (entry.name.as_ptr() as usize - base) as u64);
                }
            }
        }
        panic!("no entry {name}");
    }

    /// Puts a prefetch table behind everything else.
    fn prefetch(&mut self, nids: &[u32]) {
        let at = self.bytes.len() as u64;
        self.bytes.resize(self.bytes.len() + 4096, 0);
        for (number, nid) in (0..).zip(nids) {
            self.put(at + number * 4, &nid.to_le_bytes());
        }
        self.put(EXT + 0x28, &at.to_le_bytes());
        self.put(EXT + 0x30, &u32::try_from(nids.len() * 4).unwrap().to_le_bytes());
    }

    /// A second blob with the fields of the first, but for its name.
    fn second_blob(&mut self) {
        for (table, size) in [(SLOT, 128), (BLOB, 256)] {
            let at = usize::try_from(table).unwrap();
            self.bytes.copy_within(at..at + size, at + size);
            self.put(table + size as u64, &[b'b'; 64]);
        }
        self.put(BLOB + 256 + 0x40, &[1]);
        self.put(SB + 0x56, &[2]);
        self.put(EXT + 0x10, &512u32.to_le_bytes());
    }
}

type Damage = fn(&mut Patch);

/// How to do each kind of damage. What follows from it may be found as well.
const DAMAGES: &[(Code, Damage)] = &[
    (Code::Reserved, |p| p.put(SB + 4, &[1])),
    (Code::Reserved, |p| p.put(SB + 0x5a, &[1])),
    (Code::Checksum, |p| p.put(SB + 8, &[1])),
    (Code::VolumeName, |p| p.put(SB + 0x40, &[b'v'; 16])),
    (Code::PathCount, |p| p.put(SB + 0x10, &[1])),
    (Code::BlockCount, |p| p.put(SB + 0x24, &[1])),
    (Code::Length, |p| p.bytes.resize(p.bytes.len() + 512, 0)),
    (Code::TableStart, |p| {
        let at = p.bytes.len();
        p.bytes.resize(at + 4096, 0);
        p.bytes.copy_within(4096..4096 + 256, at + 512);
        p.put(EXT + 8, &(at as u64 + 512).to_le_bytes());
    }),
    (Code::Overlap, |p| {
        p.put(EXT + 0x28, &SLOT.to_le_bytes());
        p.put(EXT + 0x30, &[4]);
    }),
    (Code::Flags, |p| p.put(EXT + 3, &[3])),
    (Code::Flags, |p| {
        let set = p.bytes[usize::try_from(EXT).unwrap()];
        p.put(EXT, &[set & !0x20]);
    }),
    (Code::SharedXattrs, |p| p.put(SB + 0x2c, &[1])),
    (Code::MappedOverlap, Patch::second_blob),
    (Code::NotMapped, |p| p.put(SLOT + 0x44, &[0; 4])),
    (Code::DeviceLength, |p| p.put(SLOT + 0x40, &[1, 0])),
    (Code::BlobField, |p| p.put(BLOB + 0xd8, &[1])),
    (Code::BlobField, |p| p.put(BLOB + 0x48, &[0; 4])),
    (Code::BlobFeatures, |p| p.put(BLOB + 0x54, &[0])),
    (Code::BlobTables, |p| p.put(BLOB + 0x80, &[1])),
    (Code::UnusedBlob, Patch::second_blob),
    (Code::ChunkRecord, |p| p.record(0, 0x2c, &[0; 4])),
    (Code::ChunkRecord, |p| p.record(0, 0x20, &[7])),
    (Code::ChunkOrder, |p| p.record(0, 0, &[0xff; 32])),
    (Code::ChunkTwice, |p| {
        let second = usize::try_from(p.image().chunk_table.0).unwrap() + 80;
        let index = p.bytes[second + 0x48..second + 0x4c].to_vec();
        p.record(0, 0x48, &index);
    }),
    (Code::UnusedChunks, |p| p.inode("scattered", 8, &[0; 8])),
    (Code::Inode, |p| p.inode("file", 4, &[0; 2])),
    (Code::Directory, |p| {
        let (first, _) = p.entry("dir/sub", ".");
        p.put(first + 8, &[0; 2]);
    }),
    (Code::Truncated, |p| {
        let (entry, _) = p.entry("", "fifo");
        p.put(entry, &(1u64 << 40).to_le_bytes());
    }),
    (Code::Tree, |p| {
        let (entry, _) = p.entry("dir", "sub");
        p.put(entry, &128u64.to_le_bytes());
    }),
    (Code::Root, |p| {
        let (_, inode) = p.image_at("file");
        p.put(SB + 0xe, &u16::try_from(inode.nid).unwrap().to_le_bytes());
    }),
    (Code::LinkCount, |p| p.inode("file", 0x2c, &[3])),
    (Code::LinkCount, |p| p.inode("dir", 0x2c, &[2])),
    (Code::NameOrder, |p| {
        let (_, name) = p.entry("wide", "a-rather-long-name-100");
        p.put(name, b"z");
    }),
    (Code::NameTwice, |p| {
        let (_, name) = p.entry("wide", "a-rather-long-name-100");
        p.put(name, b"a-rather-long-name-099");
    }),
    (Code::Dots, |p| {
        let (entry, _) = p.entry("dir", "..");
        p.put(entry, &129u64.to_le_bytes());
    }),
    (Code::Dots, |p| {
        let (_, name) = p.entry("dir", ".");
        p.put(name, b"-");
    }),
    (Code::FileType, |p| {
        let (entry, _) = p.entry("", "fifo");
        p.put(entry + 10, &[1]);
    }),
    (Code::TailCrossesBlock, |p| p.inode("short", 8, &4095u64.to_le_bytes())),
    (Code::Nanoseconds, |p| p.inode("file", 0x28, &1_000_000_000u32.to_le_bytes())),
    (Code::SpecialSize, |p| p.inode("fifo", 8, &[5])),
    (Code::Symlink, |p| p.inode("short", 8, &[0])),
    (Code::XattrEmpty, |p| p.inode("xattrs", 2, &[1, 0])),
    (Code::Xattr, |p| {
        let area = p.image_at("xattrs").1.xattrs;
        p.put(area.start() + 13, &[9]);
    }),
    (Code::XattrTwice, |p| {
        let area = p.image_at("xattrs").1.xattrs;
        p.put(area.start() + 12, b"\x01\x01\x03\x00aonea");
        p.put(area.start() + 20, b"\x01\x01\x07\x00aseventh");
    }),
    (Code::FlatFile, |p| p.inode("empty", 0, &[1])),
    (Code::Hole, |p| p.index("file", 4, &[0xff; 4])),
    (Code::ChunkIndex, |p| p.index("file", 2, &[9])),
    (Code::ChunkIndex, |p| p.index("file", 0, &[0xff; 2])),
    (Code::ChunkMissing, |p| p.index("file", 4, &[2])),
    (Code::ChunkUnlisted, |p| {
        p.index("file", 4, &[2]);
        p.put(BLOB + 0x54, &[0x21]);
    }),
    (Code::ChunkLength, |p| p.inode("file", 8, &[3])),
    (Code::ChunkFormat, |p| p.inode("scattered", 0x10, &[0x21])),
    (Code::ChunkFormat, |p| p.inode("large", 0x10, &[0x21])),
    (Code::Prefetch, |p| p.prefetch(&[128, 77_777])),
    (Code::PrefetchEnd, |p| p.prefetch(&[128, 0, 128])),
];

#[test]
fn every_kind_of_damage_is_found() {
    for (number, (code, damage)) in DAMAGES.iter().enumerate() {
        let mut patch = Patch::new();
        damage(&mut patch);
        let report = check(&patch.image());
        let found: BTreeSet<_> = report.findings.iter().map(|finding| finding.code).collect();
        assert!(found.contains(code), "damage {number}: {code} is not in {found:?}");
    }
}

#[test]
fn every_code_has_a_damage_that_shows_it() {
    let tested: BTreeSet<_> = DAMAGES.iter().map(|(code, _)| *code).collect();
    // The first is no finding of `check()`, the second needs an image of blocks of 512 bytes, the
    // others are found in blobs, and in images of RAFS v5.
    let blobs = [Code::BlobMissing, Code::BlobDiffers, Code::BlobUnchecked, Code::ChunkDamaged, Code::Uncheckable];
    let v5 = [Code::InodeDigest, Code::InodeParent, Code::UnusedInodes, Code::XattrNamespace];
    let apart = [&[Code::Unusable, Code::TarfsSymlink], blobs.as_slice(), &v5].concat();
    let untested: Vec<_> = Code::ALL.iter().filter(|code| !tested.contains(code) && !apart.contains(code)).collect();
    assert_eq!(untested, [] as [&Code; 0]);
}

#[test]
fn names_of_codes_are_distinct() {
    let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
    assert_eq!(names.len(), Code::ALL.len());
}

#[test]
fn a_damage_that_has_no_consequences_is_the_only_finding() {
    let mut patch = Patch::new();
    patch.inode("file", 0x2c, &[3]);
    let report = check(&patch.image());

    let [finding] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
    assert_eq!((finding.code, finding.severity), (Code::LinkCount, Severity::Error));
    assert_eq!(finding.detail, "3 links, 2 names found");
    assert_eq!((report.errors, report.remarks), (1, 0));
}

#[test]
fn a_time_that_makes_no_sense_is_found_by_its_own_code() {
    let mut patch = Patch::new();
    patch.inode("fifo", 0x28, &2_000_000_000u32.to_le_bytes());
    let report = check(&patch.image());

    let [finding] = report.findings.as_slice() else { panic!("{:?}", report.findings) };
    assert_eq!((finding.code, finding.place.as_str()), (Code::Nanoseconds, "/fifo"));
    assert!(finding.detail.ends_with("has mtime_nsec 2000000000, more than 999999999"), "{}", finding.detail);
}

#[test]
fn a_bounded_number_of_findings_is_kept_and_all_are_counted() {
    let mut report = Report::default();
    for number in 0..MAX_FINDINGS + 10 {
        report.add(Code::Hole, Place::Row("row", number as u64), || "x".repeat(10_000));
    }
    assert_eq!((report.findings.len(), report.remarks), (MAX_FINDINGS, 1010));
    assert!(report.findings.iter().all(|finding| finding.detail.len() == MAX_TEXT));
    assert!(report.is_sound(), "remarks are no errors");
}

#[test]
fn inodes_that_lie_over_each_other_end_the_search() {
    // Two files that claim half of the bootstrap each for their chunk indexes.
    let mut patch = Patch::new();
    let len = patch.bytes.len() as u64;
    patch.inode("large", 8, &(len / 8 * 4096).to_le_bytes());
    patch.inode("twin", 8, &(len / 8 * 4096).to_le_bytes());
    let report = check(&patch.image());

    assert!(report.findings.iter().any(|finding| matches!(finding.code, Code::Overlap | Code::Truncated)));
    assert!(report.chunks <= len / 8, "{} chunks", report.chunks);
}
