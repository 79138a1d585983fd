//! A dm-verity tree: SHA-256, no salt, format 1, blocks of 4096 bytes on both sides, no superblock
//! (`build-rules.md` section 7).
//!
//! Levels lie top first. What is left of a level's last block is zero, as `veritysetup` wants it.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::base::{BLOCK, ByteRange, Digest};
use crate::codec::sha256;
use crate::sys::files::data_ranges;

/// Digests in one block.
const FAN_OUT: u64 = BLOCK / 32;
/// A block as a length in memory.
const PIECE: usize = 4096;

const _: () = assert!(PIECE as u64 == BLOCK);

/// Bytes read at once.
const READ: u64 = 1 << 20;

/// Where the levels of a tree lie, in bytes from the start of the tree; the lowest level first.
fn levels(data_blocks: u64) -> Vec<ByteRange> {
    let (mut lens, mut blocks) = (Vec::new(), data_blocks);
    while blocks > 1 {
        blocks = blocks.div_ceil(FAN_OUT);
        lens.push(blocks * BLOCK);
    }
    let mut end = lens.iter().sum::<u64>();
    let range = |len| {
        end -= len;
        ByteRange::at(end, len).expect("a tree is smaller than its data")
    };
    lens.into_iter().map(range).collect()
}

/// Length in bytes of the tree over `data_blocks` blocks.
pub(super) fn tree_len(data_blocks: u64) -> u64 {
    levels(data_blocks).iter().map(|level| level.len()).sum()
}

/// Writes the tree over the first `data_blocks` blocks of `data` to `tree` from byte `at`, and
/// gives back the root digest. `tree` may be the same file.
pub(super) fn write_tree(data: &File, data_blocks: u64, tree: &File, at: u64) -> io::Result<Digest> {
    let mut below = (data, ByteRange::at(0, data_blocks * BLOCK).expect("the length of a file"));
    for level in levels(data_blocks) {
        let place = ByteRange::at(at + level.start(), level.len()).expect("the length of a file");
        write_level(below.0, below.1, tree, place)?;
        below = (tree, place);
    }
    let mut top = [0; PIECE];
    below.0.read_exact_at(&mut top, below.1.start())?;
    Ok(sha256(&top))
}

/// Writes one digest for each block of `blocks` in `from` to `place` in `tree`, and zeros behind.
fn write_level(from: &File, blocks: ByteRange, tree: &File, place: ByteRange) -> io::Result<()> {
    // First, for it moves the position, which both files may share.
    let parts = data_ranges(from.as_fd(), blocks.end())?;
    let mut out = tree;
    out.seek(SeekFrom::Start(place.start()))?;
    let mut out = BufWriter::with_capacity(1 << 16, out);
    let zero = sha256(&[0; PIECE]).0;
    let mut buffer = vec![0; usize::try_from(READ).expect("a small number")];
    let mut at = blocks.start();
    // Holes are not read: a disk may be many times longer than what is in it.
    for data in parts {
        let data = data.align_out(BLOCK).expect("the length of a file").clamp_end(blocks.end());
        let start = data.start().max(at);
        for _ in (at.min(start)..start).step_by(PIECE) {
            out.write_all(&zero)?;
        }
        at = start;
        while at < data.end() {
            let len = usize::try_from(READ.min(data.end() - at)).expect("a small number");
            from.read_exact_at(&mut buffer[..len], at)?;
            for block in buffer[..len].chunks(PIECE) {
                out.write_all(&sha256(block).0)?;
            }
            at += len as u64;
        }
    }
    for _ in (at..blocks.end()).step_by(PIECE) {
        out.write_all(&zero)?;
    }
    let written = blocks.len() / BLOCK * 32;
    io::copy(&mut io::Read::take(io::repeat(0), place.len() - written), &mut out)?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree by the book: every level in memory.
    fn expected(data: &[u8]) -> (Vec<u8>, Digest) {
        let mut levels: Vec<Vec<u8>> = vec![data.to_vec()];
        while levels.last().unwrap().len() > 4096 {
            let mut level: Vec<u8> = levels.last().unwrap().chunks(4096).flat_map(|block| sha256(block).0).collect();
            level.resize(level.len().next_multiple_of(4096), 0);
            levels.push(level);
        }
        let root = sha256(levels.last().unwrap());
        levels.remove(0);
        levels.reverse();
        (levels.concat(), root)
    }

    #[test]
    fn trees_of_every_height_are_right() {
        for blocks in [1u32, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            let data: Vec<u8> = (0..blocks).flat_map(|i| [i.to_le_bytes(); 1024].concat()).collect();
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&data, 0).unwrap();

            let root = write_tree(&file, blocks.into(), &file, data.len() as u64).unwrap();

            let (tree, want) = expected(&data);
            assert_eq!(root, want, "{blocks}");
            assert_eq!(tree_len(blocks.into()), tree.len() as u64, "{blocks}");
            let mut got = vec![1; tree.len()];
            file.read_exact_at(&mut got, data.len() as u64).unwrap();
            assert!(got == tree, "{blocks}");
        }
    }

    #[test]
    fn holes_count_as_zeros() {
        let (holey, plain) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let mut content = vec![0; 300 * 4096];
        content[7 * 4096 + 5] = 1;
        content[200 * 4096] = 2;
        plain.write_all_at(&content, 0).unwrap();
        holey.set_len(content.len() as u64).unwrap();
        holey.write_all_at(&[1], 7 * 4096 + 5).unwrap();
        holey.write_all_at(&[2], 200 * 4096).unwrap();
        let roots = [&holey, &plain].map(|file| {
            let tree = tempfile::tempfile().unwrap();
            write_tree(file, 300, &tree, 0).unwrap()
        });
        assert_eq!(roots[0], roots[1]);
        assert_eq!(roots[0], expected(&content).1);
    }

    #[test]
    fn root_of_a_single_level_is_that_of_veritysetup() {
        // `veritysetup format --salt=- --no-superblock` over 128 blocks of zeros: one block of 128 digests.
        let file = tempfile::tempfile().unwrap();
        file.set_len(128 * 4096).unwrap();
        let tree = tempfile::tempfile().unwrap();
        let root = write_tree(&file, 128, &tree, 0).unwrap();
        let zero = sha256(&[0; 4096]);
        assert_eq!(zero.to_string(), "ad7facb2586fc6e966c004d7d1d16b024f5805ff7cb47c7a85dabd8b48892ca7");
        assert_eq!(root, sha256(&zero.0.repeat(128)));
    }
}
