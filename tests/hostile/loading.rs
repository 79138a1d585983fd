//! Bootstraps that are sound in each part and made to cost much when they become part of another.

use std::mem::offset_of;

use rafsd::build::{BuildError, Layer, MergeSpec, MergeVersion, Whiteouts, merge};
use rafsd::format::erofs::{Dirent, SUPERBLOCK_OFFSET};
use rafsd::format::rafs::{EXT_SUPERBLOCK_OFFSET, ExtSuperblock};
use rafsd::image::{Image, Kind};

use super::allocations::peak_of;
use super::sample::{KITS, Sample, index};

const BLOCK: usize = 4096;

fn put(bootstrap: &mut [u8], at: u64, value: &[u8]) {
    bootstrap[index(at)..][..value.len()].copy_from_slice(value);
}

/// Appends whole blocks and says where they begin.
fn append(bootstrap: &mut Vec<u8>, bytes: &[u8]) -> usize {
    let at = bootstrap.len().next_multiple_of(BLOCK);
    bootstrap.resize(at, 0);
    bootstrap.extend_from_slice(bytes);
    bootstrap.resize(bootstrap.len().next_multiple_of(BLOCK), 0);
    at
}

/// Merges the image with nothing. What was made, and the most bytes that took.
fn merged(bootstrap: Vec<u8>) -> (Result<u64, BuildError>, usize) {
    let dir = tempfile::tempdir().unwrap();
    let layers = vec![Layer { name: "layer".into(), image: Image::parse(bootstrap).unwrap(), id: None }];
    let out = dir.path().join("merged");
    let (parent, dictionary, prefetch, facts) = (None, None, None, Vec::new());
    let spec = MergeSpec {
        layers,
        parent,
        dictionary,
        whiteouts: Whiteouts::Oci,
        prefetch,
        facts,
        version: MergeVersion::V6,
        out,
    };
    peak_of(|| merge(spec, &()).map(|report| report.prefetched_paths))
}

const DEPTH: usize = 1000;
const HINTS: u64 = 20_000;

/// `HINTS` files in a directory at `DEPTH`, which the prefetch table has all of.
fn deep_hints() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..HINTS {
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("wide/{number}"), b"x".as_slice()).unwrap();
    }
    // The archive would be large with the long paths in it: the directory changes places with an
    // empty one when the image is there.
    for name in ["empty/".into(), "d/".repeat(DEPTH)] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_size(0);
        tar.append_data(&mut header, name + "bottom", std::io::empty()).unwrap();
    }
    let sample = Sample::of_archive(KITS[0], tar.into_inner().unwrap());
    let image = sample.image();
    let nid = |path: &str| image.lookup(path.as_bytes()).unwrap().unwrap().nid;
    let (wide, bottom) = (nid("wide"), nid(&("d/".repeat(DEPTH) + "bottom")));
    let mut bootstrap = sample.bootstrap.clone();
    for region in sample.regions().iter().filter(|region| region.name == "directory entry") {
        for at in region.bytes().step_by(size_of::<Dirent>()) {
            let number = u64::from_le_bytes(bootstrap[at..at + 8].try_into().unwrap());
            let other = [(wide, bottom), (bottom, wide)].into_iter().find(|(from, _)| *from == number);
            if let Some((_, to)) = other {
                put(&mut bootstrap, at as u64, &to.to_le_bytes());
            }
        }
    }
    let mut table = Vec::new();
    let mut walk = image.walk();
    while let Some(visit) = walk.next_visit() {
        let inode = visit.unwrap().inode;
        if inode.kind == Kind::Regular {
            table.extend_from_slice(&u32::try_from(inode.nid).unwrap().to_le_bytes());
        }
    }
    assert_eq!(table.len(), index(HINTS) * 4);
    let at = append(&mut bootstrap, &table) as u64;
    let ext = |field: usize| EXT_SUPERBLOCK_OFFSET + field as u64;
    put(&mut bootstrap, ext(offset_of!(ExtSuperblock, prefetch_table_offset)), &at.to_le_bytes());
    let size = u32::try_from(table.len()).unwrap();
    put(&mut bootstrap, ext(offset_of!(ExtSuperblock, prefetch_table_size)), &size.to_le_bytes());
    let paths = Image::parse(bootstrap.clone()).unwrap();
    assert!(paths.lookup(("d/".repeat(DEPTH) + "bottom/7").as_bytes()).unwrap().is_some());
    bootstrap
}

#[test]
fn hints_in_deep_directories_cost_no_more_than_the_names_of_the_image() {
    let bootstrap = deep_hints();
    let len = bootstrap.len();

    let (made, peak) = merged(bootstrap);

    assert_eq!(made.unwrap(), HINTS);
    // The tree, the layout and the new bootstrap; the paths spelt out are 300 MB more.
    assert!(peak < 16 * len, "{peak} bytes of memory for {len}");
}

/// Bytes of a shared value.
const VALUE: usize = 60_000;

#[test]
fn an_xattr_that_is_shared_counts_each_time() {
    let sample = Sample::new(KITS[0]);
    let mut bootstrap = sample.bootstrap.clone();
    let area = sample.image().lookup(b"xattrs").unwrap().unwrap().xattrs;
    // One entry: length of the name, its namespace, length of the value.
    let mut entry = vec![4, 1];
    entry.extend_from_slice(&u16::try_from(VALUE).unwrap().to_le_bytes());
    entry.extend_from_slice(b"much");
    entry.resize(entry.len() + VALUE, b'x');
    let block = append(&mut bootstrap, &entry) / BLOCK;
    put(&mut bootstrap, SUPERBLOCK_OFFSET + 0x2c, &u32::try_from(block).unwrap().to_le_bytes());
    // The whole area of the inode becomes numbers, all 0: the first entry.
    let mut head = vec![0; index(area.len())];
    let references = u8::try_from((head.len() - 12) / 4).unwrap();
    head[4] = references;
    put(&mut bootstrap, area.start(), &head);
    let len = bootstrap.len();
    assert!(usize::from(references) * VALUE > 16 * len, "{references} references in {len} bytes");

    let (made, peak) = merged(bootstrap);

    let cause = made.map_err(|e| std::error::Error::source(&e).unwrap().to_string());
    assert!(cause.as_ref().is_err_and(|cause| cause.contains("share xattrs")), "{cause:?}");
    assert!(peak < 8 * len, "{peak} bytes of memory for {len}");
}
