//! What a finished image shows, read with the library: the bootstrap, and every byte of every file
//! through the tables and checks that serving uses.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use rafsd::blob::{BlobTables, UnitMap, decode};
use rafsd::build::BuildReport;
use rafsd::image::{Extent, Image, Inode, Kind, Nid};
use rafsd::reader::bootstrap;

use crate::support::listing::Line;

/// An image by path.
#[derive(Debug)]
pub struct Shown {
    /// As `listing::of` writes them, sorted.
    pub lines: Vec<Line>,
    /// The names of every inode that has several, sorted.
    pub groups: Vec<Vec<Vec<u8>>>,
}

/// Reads everything in the image that `report` tells of.
pub fn shown(report: &BuildReport) -> Shown {
    let image = bootstrap::open(Path::new(&report.bootstrap)).expect("our own image opens");
    // A blob that holds nothing but the bootstrap is no device.
    let with_data = report.blobs.iter().filter(|blob| blob.chunks > 0).count();
    assert_eq!(image.devices().len(), with_data);
    let blobs: Vec<Blob> = (0..image.devices().len())
        .map(|device| Blob::open(&image, device, Path::new(&report.blobs[device].path)))
        .collect();
    let (mut lines, mut names, mut walk) = (Vec::new(), BTreeMap::<Nid, Vec<Vec<u8>>>::new(), image.walk());
    while let Some(visit) = walk.next_visit() {
        let visit = visit.expect("our own inodes are sound");
        let path = visit.path.join(&b"/"[..]);
        lines.push(Line { facts: facts(&image, &blobs, &visit.inode), path: path.clone() });
        names.entry(visit.inode.nid).or_default().push(path);
    }
    assert_eq!(image.summary().paths, lines.len() as u64);
    lines.sort();
    let mut groups: Vec<_> = names.into_values().filter(|names| names.len() > 1).collect();
    groups.iter_mut().for_each(|names| names.sort());
    groups.sort();
    Shown { lines, groups }
}

struct Blob {
    map: UnitMap,
    stored: Vec<u8>,
}

impl Blob {
    fn open(image: &Image, device: usize, path: &Path) -> Self {
        let stored = fs::read(path).expect("the blob is there");
        let tables = BlobTables::new(&image.devices()[device].entry).expect("our own tables");
        let map = tables.geometry(&stored[usizes(tables.stored().start(), tables.stored().end())]).expect("geometry");
        let map = tables.with_digests(map, image.chunk_records().iter()).expect("digests");
        Self { map, stored }
    }

    /// `len` plain bytes from `at`.
    fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let unit = self.map.get(self.map.find(at).expect("a unit is there")).expect("a unit");
        let mut plain = vec![0; usize::try_from(unit.blocks().len()).unwrap()];
        let stored = &self.stored[usizes(unit.stored.start(), unit.stored.end())];
        decode(unit, self.map.key(), stored, &mut plain).expect("our own chunk decodes");
        let from = at - unit.decoded.start();
        assert!(from + len <= unit.decoded.len(), "an extent lies in one chunk");
        plain[usizes(from, from + len)].to_vec()
    }
}

fn usizes(from: u64, to: u64) -> std::ops::Range<usize> {
    usize::try_from(from).unwrap()..usize::try_from(to).unwrap()
}

fn facts(image: &Image, blobs: &[Blob], inode: &Inode) -> String {
    let mode = inode.kind.type_bits() | u32::from(inode.permissions);
    let mut out = format!("{mode:06o} {}:{} {}.{:09}", inode.uid, inode.gid, inode.mtime.0, inode.mtime.1);
    if inode.kind != Kind::Directory {
        write!(out, " links={}", inode.nlink).unwrap();
    }
    if inode.kind == Kind::Regular {
        write!(out, " size={} blake3={}", inode.size, content(image, blobs, inode)).unwrap();
    }
    if inode.kind == Kind::Symlink {
        write!(out, " -> {}", image.symlink(inode).expect("our own link").escape_ascii()).unwrap();
    }
    if matches!(inode.kind, Kind::Character | Kind::Block) {
        let rdev = inode.rdev;
        write!(out, " dev={}:{}", rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & 0xfff00).unwrap();
    }
    let mut xattrs = BTreeMap::new();
    let mut keep = |xattr: rafsd::image::Xattr<'_>| {
        assert!(xattrs.insert(xattr.name(), xattr.value.to_vec()).is_none(), "an xattr is there once");
        ControlFlow::Continue(())
    };
    image.xattrs(inode, &mut keep).expect("our own xattrs");
    for (name, value) in xattrs {
        write!(out, " {}={}", name.escape_ascii(), value.escape_ascii()).unwrap();
    }
    out
}

fn content(image: &Image, blobs: &[Blob], inode: &Inode) -> blake3::Hash {
    let (mut hasher, mut read) = (blake3::Hasher::new(), 0);
    let mut visit = |extent: Extent<'_>| {
        let bytes = match extent {
            Extent::Hole { len, .. } => vec![0; usize::try_from(len).unwrap()],
            Extent::Inline { bytes, .. } => bytes.to_vec(),
            Extent::Device { device, decoded, .. } => blobs[device].read(decoded.start(), decoded.len()),
        };
        read += bytes.len() as u64;
        hasher.update(&bytes);
        ControlFlow::Continue(())
    };
    image.extents(inode, &mut visit).expect("our own extents");
    assert_eq!(read, inode.size);
    hasher.finalize()
}
