use std::fs::File;
use std::io;

use crate::base::BLOCK;

/// Where decoded bytes of one device are written.
///
/// Every write of a device is direct-I/O clean: offset, length and memory address are multiples of
/// [`BLOCK`], and no piece is longer than [`MAX_PIECE`].
pub trait Sink: Send + Sync {
    /// Writes all of `bytes` at the decoded offset `at`.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;

    /// Returns when everything written before is on stable storage. After an error, nothing
    /// written since the last success may be relied on.
    fn sync(&self) -> io::Result<()>;

    /// Fills `bytes` with what lies from `at` on.
    ///
    /// # Errors
    /// `Unsupported` where nothing can be read again.
    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        let _ = (bytes, at);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The file behind it, if that is an ordinary one that can be read as well.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// Longest single write in bytes. Kernels before the autumn of 2024 misreport longer short writes
/// to cachefiles objects (`cachefiles-ondemand.md` section 6).
pub const MAX_PIECE: usize = 1 << 20;

/// Writes `blocks` at `at` in pieces a sink accepts.
pub(super) fn write_blocks(sink: &dyn Sink, blocks: &[u8], at: u64) -> io::Result<()> {
    let mut at = at;
    for piece in blocks.chunks(MAX_PIECE) {
        sink.write_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(())
}

/// Room for one decoded unit that a thread reuses from unit to unit.
///
/// Direct I/O wants aligned memory; a slice of a slightly larger vector has it without `unsafe`.
#[derive(Debug, Default)]
pub(super) struct Scratch(Vec<u8>);

impl Scratch {
    /// `len` bytes at an address that is a multiple of [`BLOCK`]. Their contents are arbitrary.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let align = usize::try_from(BLOCK).expect("a block is small");
        let want = len + align - 1;
        if self.0.len() < want {
            self.0 = vec![0; want];
        }
        let skip = self.0.as_ptr().addr().wrapping_neg() % align;
        &mut self.0[skip..skip + len]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(usize, usize, u64)>>);

    impl Sink for Recorder {
        fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            self.0.lock().unwrap().push((bytes.as_ptr().addr() % 4096, bytes.len(), at));
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn every_write_is_fit_for_direct_io() {
        let sink = Recorder::default();
        let mut scratch = Scratch::default();

        write_blocks(&sink, scratch.room(4096), 8192).unwrap();
        write_blocks(&sink, scratch.room((2 << 20) + 4096), 1 << 30).unwrap();

        let at = 1 << 30;
        let want = [(0, 4096, 8192), (0, 1 << 20, at), (0, 1 << 20, at + (1 << 20)), (0, 4096, at + (2 << 20))];
        assert_eq!(*sink.0.lock().unwrap(), want);
    }
}
