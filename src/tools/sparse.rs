//! Writing content so that blocks of zeros become holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::base::BLOCK;

/// A block as a length in memory.
const PIECE: usize = 4096;

const _: () = assert!(PIECE as u64 == BLOCK);

/// A file being written from front to back.
#[derive(Debug)]
pub(super) struct SparseWriter<'a> {
    file: &'a File,
    at: u64,
}

impl<'a> SparseWriter<'a> {
    /// A writer from byte `at` of `file`, which has no data behind it.
    pub(super) fn new(file: &'a File, at: u64) -> Self {
        Self { file, at }
    }

    /// Appends `bytes`. Whole blocks of zeros are passed over.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = run(bytes, self.at);
            let (run, rest) = bytes.split_at(len);
            if !is_hole(run, self.at) {
                self.file.write_all_at(run, self.at)?;
            }
            self.at += len as u64;
            bytes = rest;
        }
        Ok(())
    }

    /// Appends `len` zeros.
    pub(super) fn zeros(&mut self, len: u64) {
        self.at += len;
    }

    /// Ends the file here.
    pub(super) fn finish(self) -> io::Result<()> {
        self.file.set_len(self.at)
    }
}

/// Whether `piece`, which starts at `at`, is one or more whole blocks of zeros.
fn is_hole(piece: &[u8], at: u64) -> bool {
    at.is_multiple_of(BLOCK) && piece.len() as u64 >= BLOCK && piece.iter().all(|byte| *byte == 0)
}

/// Length of the longest start of `bytes` that is all blocks of zeros, or has none.
fn run(bytes: &[u8], at: u64) -> usize {
    let to_boundary = usize::try_from(BLOCK - at % BLOCK).expect("at most a block");
    let mut end = to_boundary.min(bytes.len());
    let first_is_hole = is_hole(&bytes[..end], at);
    for block in bytes[end..].chunks(PIECE) {
        if is_hole(block, 0) != first_is_hole {
            break;
        }
        end += block.len();
    }
    end
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::base::ByteRange;
    use crate::sys::files::data_ranges;

    /// Writes `content` in pieces of `piece` bytes, and gives back what is in the file.
    fn written(content: &[u8], piece: usize) -> (Vec<u8>, Vec<ByteRange>) {
        let file = tempfile::tempfile().unwrap();
        let mut writer = SparseWriter::new(&file, 0);
        for piece in content.chunks(piece) {
            writer.write(piece).unwrap();
        }
        writer.finish().unwrap();
        let mut got = vec![0xff; content.len()];
        file.read_exact_at(&mut got, 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), content.len() as u64);
        (got, data_ranges(file.as_fd(), content.len() as u64).unwrap())
    }

    #[test]
    fn blocks_of_zeros_are_holes_and_nothing_else_is() {
        let mut content = vec![0; 20 * 4096 + 100];
        content[4095] = 1;
        content[8192] = 2;
        content[10 * 4096..12 * 4096].fill(3);

        let (got, data) = written(&content, 1 << 20);

        assert_eq!(got, content);
        let blocks: Vec<_> = data.iter().map(|range| (range.start() / 4096, range.end().div_ceil(4096))).collect();
        assert_eq!(blocks, [(0, 1), (2, 3), (10, 12), (20, 21)]);
    }

    #[test]
    fn pieces_of_any_size_give_the_same_bytes() {
        let mut content = vec![0; 9 * 4096 + 17];
        content[5000..20000].fill(7);
        for piece in [1, 100, 4095, 4096, 4097, 10_000] {
            assert_eq!(written(&content, piece).0, content, "{piece}");
        }
    }

    #[test]
    fn zeros_at_the_end_are_part_of_the_file() {
        let file = tempfile::tempfile().unwrap();
        let mut writer = SparseWriter::new(&file, 0);
        writer.write(b"x").unwrap();
        writer.zeros(1 << 30);
        writer.finish().unwrap();
        assert_eq!(file.metadata().unwrap().len(), (1 << 30) + 1);
    }
}
