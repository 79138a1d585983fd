use super::{Image, ImageError, Inode, Kind, Layout};
use crate::format::array_at;
use crate::format::erofs::ChunkIndex;

impl Image {
    /// The chunk array of a regular file, one row for each chunk of the image's chunk size; none
    /// for an empty file. What the rows say is not checked.
    ///
    /// # Errors
    /// If `inode` is no regular file, keeps its bytes in the bootstrap, or its array lies outside
    /// the bootstrap.
    pub fn chunk_array(&self, inode: &Inode) -> Result<&[ChunkIndex], ImageError> {
        let wrong = |rule| ImageError::Inode { nid: inode.nid, rule };
        if inode.kind != Kind::Regular {
            return Err(wrong("is not a regular file"));
        }
        match inode.layout {
            Layout::Chunks { indexes, .. } => {
                let count = inode.size.div_ceil(self.summary.chunk_size.into());
                Ok(array_at(self.bytes(), indexes, count, "chunk array")?)
            }
            _ if inode.size == 0 => Ok(&[]),
            _ => Err(wrong("keeps the bytes of a file in the bootstrap")),
        }
    }
}
