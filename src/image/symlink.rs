use std::borrow::Cow;
use std::ops::ControlFlow;

use super::{Extent, Image, ImageError, Inode, Kind};

/// Longest target in bytes: what readers accept (`rafs-v6.md` section 10).
const MAX_TARGET: u64 = 4096;

impl Image {
    /// The target of a symbolic link: 1 to 4096 bytes without NUL.
    ///
    /// # Errors
    /// If `inode` is no link, or its target is not a possible one.
    pub fn symlink(&self, inode: &Inode) -> Result<Cow<'_, [u8]>, ImageError> {
        let wrong = |rule| ImageError::Inode { nid: inode.nid, rule };
        if inode.kind != Kind::Symlink {
            return Err(wrong("is not a symbolic link"));
        }
        if inode.size == 0 || inode.size > MAX_TARGET {
            return Err(wrong("has a link target outside 1 to 4096 bytes"));
        }
        let mut target = Cow::Borrowed(&[][..]);
        self.extents(inode, &mut |extent| {
            if let Extent::Inline { bytes, .. } = extent {
                if target.is_empty() {
                    target = Cow::Borrowed(bytes);
                } else {
                    target.to_mut().extend_from_slice(bytes);
                }
            }
            ControlFlow::Continue(())
        })?;
        if target.len() as u64 != inode.size || target.contains(&0) {
            return Err(wrong("has an impossible link target"));
        }
        Ok(target)
    }
}
