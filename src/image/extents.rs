use std::ops::ControlFlow;

use super::{Image, ImageError, Inode, Layout};
use crate::base::ByteRange;
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
        self.extents_from(inode, 0, visit)
    }

    /// As [`Image::extents`], without the chunks that end at or before byte `from`: for whoever
    /// goes on where a visit broke off. Pieces kept in the bootstrap are visited whatever `from` is.
    ///
    /// # Errors
    /// As [`Image::extents`].
    pub fn extents_from<'a>(
        &'a self,
        inode: &Inode,
        from: u64,
        visit: &mut dyn FnMut(Extent<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        match inode.layout {
            Layout::None => Ok(()),
            Layout::Plain { at } => self.inline(0, at, inode.size, visit).map(|_| ()),
            Layout::Inline { at, tail } => {
                let block = self.summary.block_size;
                let whole = inode.size / block * block;
                match self.inline(0, at, whole, visit)? {
                    ControlFlow::Continue(()) => self.inline(whole, tail, inode.size - whole, visit).map(|_| ()),
                    ControlFlow::Break(()) => Ok(()),
                }
            }
            Layout::Chunks { indexes, .. } => self.chunks(inode, indexes, from, visit),
        }
    }

    /// The blocks of devices that the kernel may read for `inode`, as it understands the inode.
    ///
    /// [`Image::extents`] goes by the chunk size of the image. The kernel goes by the one in the
    /// inode: where that is larger it reads on behind the first chunk of each index
    /// (`rafs-v6.md` section 12). In a sound image both ways lead to the same bytes.
    ///
    /// # Errors
    /// As [`Image::extents`].
    pub fn kernel_ranges(&self, inode: &Inode, visit: &mut dyn FnMut(usize, ByteRange)) -> Result<(), ImageError> {
        let Layout::Chunks { indexes, bits } = inode.layout else {
            return self.extents(inode, &mut |_| ControlFlow::Continue(()));
        };
        let chunk_size = 1u64 << bits;
        let rows: &[ChunkIndex] = array_at(self.bytes(), indexes, inode.size.div_ceil(chunk_size), "chunk array")?;
        for (number, row) in (0..).zip(rows) {
            let len = chunk_size.min(inode.size - number * chunk_size);
            if let Some((device, decoded)) = self.place(inode, row, len)? {
                visit(device, decoded.align_out(self.summary.block_size).expect("within a device"));
            }
        }
        Ok(())
    }

    /// Device and range behind a chunk index, or `None` for a hole.
    pub(super) fn place(
        &self,
        inode: &Inode,
        row: &ChunkIndex,
        len: u64,
    ) -> Result<Option<(usize, ByteRange)>, ImageError> {
        let wrong = |rule| ImageError::Inode { nid: inode.nid, rule };
        if row.blkaddr.get() == HOLE {
            return Ok(None);
        }
        let device = row.blob().map(usize::from).filter(|&device| device < self.devices.len());
        let device = device.ok_or_else(|| wrong("uses a device that does not exist"))?;
        let decoded = ByteRange::at(u64::from(row.blkaddr.get()) * self.summary.block_size, len);
        let decoded = decoded.filter(|decoded| decoded.end() <= self.devices[device].len);
        Ok(Some((device, decoded.ok_or_else(|| wrong("uses bytes behind the end of a device"))?)))
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
        from: u64,
        visit: &mut dyn FnMut(Extent<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let chunk_size = u64::from(self.summary.chunk_size);
        let count = inode.size.div_ceil(chunk_size);
        let rows: &[ChunkIndex] = array_at(self.bytes(), indexes, count, "chunk array")?;
        let first = from / chunk_size;
        let skipped = usize::try_from(first.min(count)).expect("the rows are in memory");
        for (number, row) in (first..).zip(&rows[skipped..]) {
            let at = number * chunk_size;
            let len = chunk_size.min(inode.size - at);
            let extent = match self.place(inode, row, len)? {
                None => Extent::Hole { at, len },
                Some((device, decoded)) => Extent::Device { at, device, decoded },
            };
            if visit(extent).is_break() {
                break;
            }
        }
        Ok(())
    }
}
