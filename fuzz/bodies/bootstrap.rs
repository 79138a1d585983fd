//! A bootstrap from the superblock to the last extent of the last file.
//!
//! Most of a small bootstrap is zeros, which a mutation would hit almost always. So an input is a
//! list of pieces: two bytes, a slot number, and the 32 bytes that lie in that slot. Inodes begin
//! on slots; the superblocks and tables are whole numbers of them.

use std::ops::ControlFlow;

use rafsd::image::{Extent, Image, Inode, Kind};

const SLOT: usize = 32;
/// Bootstraps are whole blocks.
const PADDED: usize = 4096;
/// 64 KiB: room for two blocks of metadata, directories and all tables.
const MAX_SLOTS: usize = 2048;
/// Paths that are looked at. A bootstrap of this length has at most 5461.
const MAX_VISITS: usize = 600;
/// Extents of one file that are looked at.
const MAX_EXTENTS: usize = 600;

/// The bootstrap that `input` describes.
pub fn unpack(input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in input.chunks(2 + SLOT).filter(|piece| piece.len() > 2) {
        let (slot, piece) = piece.split_at(2);
        let at = usize::from(u16::from_le_bytes([slot[0], slot[1]])) % MAX_SLOTS * SLOT;
        if bytes.len() < at + SLOT {
            bytes.resize(at + SLOT, 0);
        }
        bytes[at..at + piece.len()].copy_from_slice(piece);
    }
    bytes.resize(bytes.len().next_multiple_of(PADDED), 0);
    bytes
}

/// The input that describes `bootstrap`.
///
/// # Panics
/// If it is too long to be described.
pub fn pack(bootstrap: &[u8]) -> Vec<u8> {
    assert!(bootstrap.len() <= MAX_SLOTS * SLOT, "at most 64 KiB");
    let mut input = Vec::new();
    for (slot, piece) in (0u16..).zip(bootstrap.chunks(SLOT)).filter(|(_, piece)| piece.iter().any(|b| *b != 0)) {
        input.extend_from_slice(&slot.to_le_bytes());
        input.extend_from_slice(piece);
    }
    input
}

pub fn run(input: &[u8]) {
    let Ok(image) = Image::parse(unpack(input)) else { return };
    assert!(image.summary().chunk_size.is_power_of_two() && matches!(image.summary().block_size, 512 | 4096));
    let _ = image.chunk_records().len();

    for nid in image.prefetch().take(64) {
        let _ = image.inode(nid);
    }

    let mut walk = image.walk();
    for number in 0..MAX_VISITS {
        let Some(visit) = walk.next_visit() else { break };
        let Ok(visit) = visit else { continue };
        for name in visit.path {
            assert!((1..=255).contains(&name.len()) && !name.contains(&b'/') && !name.contains(&0));
            assert!(*name != b"." && *name != b"..");
        }
        look_at(&image, &visit.inode);
        // Each of these goes down from the root again.
        if number < 64 {
            let _ = image.lookup(&visit.path.join(&b"/"[..]));
        }
    }
    // Inodes that no directory leads to, and places that are none.
    for piece in input.chunks(2 + SLOT).filter(|piece| piece.len() > 2).take(64) {
        let nid = u64::from(u16::from_le_bytes([piece[0], piece[1]]));
        if let Ok(inode) = image.inode(nid) {
            look_at(&image, &inode);
        }
    }
}

/// Everything that can be asked about one inode.
fn look_at(image: &Image, inode: &Inode) {
    assert!(inode.nlink > 0 && inode.permissions <= 0o7777);
    if image.list(inode, &mut |_| ControlFlow::Continue(())).is_ok() {
        assert_eq!(inode.kind, Kind::Directory);
    }
    if let Ok(target) = image.symlink(inode) {
        assert!(inode.kind == Kind::Symlink && target.len() as u64 == inode.size);
        assert!((1..=4096).contains(&target.len()) && !target.contains(&0));
    }
    let _ = image.xattrs(inode, &mut |xattr| {
        assert!(!xattr.name().is_empty() && !xattr.suffix.contains(&0));
        ControlFlow::Continue(())
    });

    let (mut at, mut left) = (0, MAX_EXTENTS);
    let whole = image.extents(inode, &mut |extent| {
        let (from, len) = match extent {
            Extent::Hole { at, len } => (at, len),
            Extent::Inline { at, bytes } => (at, bytes.len() as u64),
            Extent::Device { at, device, decoded } => {
                assert!(decoded.end() <= image.devices()[device].len);
                (at, decoded.len())
            }
        };
        assert!(from == at && len > 0, "pieces follow each other");
        at += len;
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let has_data = matches!(inode.kind, Kind::Regular | Kind::Directory | Kind::Symlink);
    if whole.is_ok() && left > 0 && has_data {
        assert_eq!(at, inode.size, "the pieces are the whole file");
    }
    let block = image.summary().block_size;
    if inode.size < 1 << 24 {
        let _ = image.kernel_ranges(inode, &mut |device, range| {
            assert!(range.end() <= image.devices()[device].len && range.start().is_multiple_of(block));
        });
    }
}
