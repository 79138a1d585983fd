//! Who lies in which bytes of the bootstrap.

use super::super::{Image, Nid};
use super::{Code, Report};
use crate::base::ByteRange;
use crate::format::erofs::{DeviceSlot, SUPERBLOCK_OFFSET};
use crate::format::rafs::{BlobEntry, ChunkRecord, DEVICE_TABLE_OFFSET, EXT_SUPERBLOCK_OFFSET, ExtSuperblock};
use crate::format::record_at;

/// Owner of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Table(&'static str),
    Inode(Nid),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Table(name) => f.write_str(name),
            Self::Inode(nid) => write!(f, "inode {nid}"),
        }
    }
}

/// Bytes that are taken up, and how many of the bootstrap's are not.
pub(super) struct Claims {
    taken: Vec<(ByteRange, Owner)>,
    left: u64,
}

impl Claims {
    /// The superblocks and tables of `image`.
    pub(super) fn new(image: &Image) -> Self {
        let ext: &ExtSuperblock =
            record_at(image.bytes(), EXT_SUPERBLOCK_OFFSET, "extended superblock").expect("checked by parse()");
        let mut claims = Self { taken: Vec::new(), left: image.bytes().len() as u64 };
        let devices = image.devices().len();
        let heads = EXT_SUPERBLOCK_OFFSET + size_of::<ExtSuperblock>() as u64 - SUPERBLOCK_OFFSET;
        let (chunks_at, chunks) = image.chunk_table;
        let (prefetch_at, prefetch) = image.prefetch_table;
        for (name, at, len) in [
            ("the superblocks", SUPERBLOCK_OFFSET, heads),
            ("the device table", DEVICE_TABLE_OFFSET, (devices * size_of::<DeviceSlot>()) as u64),
            ("the blob table", ext.blob_table_offset.get(), (devices * size_of::<BlobEntry>()) as u64),
            ("the chunk table", chunks_at, chunks * size_of::<ChunkRecord>() as u64),
            ("the prefetch table", prefetch_at, prefetch * size_of::<u32>() as u64),
        ] {
            claims.add(Owner::Table(name), ByteRange::at(at, len));
        }
        claims
    }

    /// Notes that `nid` takes up `range`. `false` if inodes have taken up more bytes than there
    /// are, so that some overlap; then it is time to stop.
    pub(super) fn inode(&mut self, nid: Nid, range: Option<ByteRange>) -> bool {
        self.add(Owner::Inode(nid), range)
    }

    fn add(&mut self, owner: Owner, range: Option<ByteRange>) -> bool {
        let Some(range) = range.filter(|range| !range.is_empty()) else { return true };
        self.left = self.left.saturating_sub(range.len());
        self.taken.push((range, owner));
        self.left > 0
    }

    /// Reports all bytes that are taken twice.
    pub(super) fn report(mut self, report: &mut Report) {
        self.taken.sort_unstable();
        let mut longest: Option<(ByteRange, Owner)> = None;
        for &(range, owner) in &self.taken {
            if let Some((before, other)) = longest
                && before.end() > range.start()
            {
                report.add(Code::Overlap, owner, || format!("bytes {range} overlap {other} ({before})"));
            }
            if longest.is_none_or(|(before, _)| before.end() < range.end()) {
                longest = Some((range, owner));
            }
        }
    }
}
