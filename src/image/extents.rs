use std::ops::ControlFlow;

use super::{Image, ImageError, Inode, Layout};
use crate::base::{BLOCK, ByteRange};
use crate::format::array_at;
use crate::format::erofs::{ChunkIndex, HOLE};

/// A piece of a file and where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent<'a> {
    /// Zeros.
    Hole { at: u64, len: u64 },
    /// Bytes kept in the bootstrap.
    Inline { at: u64, bytes: &'a [u8] },
    /// A range of a device, by its position in [`Image::devices`].
    Device { at: u64, device: usize, decoded: ByteRange },
}

impl Image {
    /// Visits the pieces of `inode` in order until `visit` breaks off.
    ///
    /// # Errors
    /// If the inode's data lies outside the bootstrap or names a device that does not exist.
    pub fn extents<'a>(
        &'a self,
        inode: &Inode,
        visit: &mut dyn FnMut(Extent<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        match inode.layout {
            Layout::None => Ok(()),
            Layout::Plain { at } => self.inline(0, at, inode.size, visit).map(|_| ()),
            Layout::Inline { at, tail } => {
                let whole = inode.size / BLOCK * BLOCK;
                match self.inline(0, at, whole, visit)? {
                    ControlFlow::Continue(()) => self.inline(whole, tail, inode.size - whole, visit).map(|_| ()),
                    ControlFlow::Break(()) => Ok(()),
                }
            }
            Layout::Chunks { indexes } => self.chunks(inode, indexes, visit),
        }
    }

    fn inline<'a>(
        &'a self,
        at: u64,
        from: u64,
        len: u64,
        visit: &mut dyn FnMut(Extent<'a>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ImageError> {
        if len == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        let bytes = array_at::<u8>(self.bytes(), from, len, "file data")?;
        Ok(visit(Extent::Inline { at, bytes }))
    }

    fn chunks<'a>(
        &'a self,
        inode: &Inode,
        indexes: u64,
        visit: &mut dyn FnMut(Extent<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let wrong = |rule| ImageError::Inode { nid: inode.nid, rule };
        let chunk_size = u64::from(self.summary.chunk_size);
        let count = inode.size.div_ceil(chunk_size);
        let rows: &[ChunkIndex] = array_at(self.bytes(), indexes, count, "chunk array")?;
        for (number, row) in (0..).zip(rows) {
            let at = number * chunk_size;
            let len = chunk_size.min(inode.size - at);
            let extent = if row.blkaddr.get() == HOLE {
                Extent::Hole { at, len }
            } else {
                let device = row.blob().map(usize::from).filter(|&device| device < self.devices.len());
                let device = device.ok_or_else(|| wrong("uses a device that does not exist"))?;
                let decoded = ByteRange::at(u64::from(row.blkaddr.get()) * BLOCK, len).expect("32-bit block number");
                if decoded.end() > self.devices[device].len {
                    return Err(wrong("uses bytes behind the end of a device"));
                }
                Extent::Device { at, device, decoded }
            };
            if visit(extent).is_break() {
                break;
            }
        }
        Ok(())
    }
}
