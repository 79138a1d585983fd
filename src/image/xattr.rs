use std::ops::ControlFlow;

use super::{Image, ImageError, Inode};
use crate::format::erofs::{XATTR_PREFIXES, XattrEntry, XattrHead};
use crate::format::{array_at, record_at};

/// One extended attribute as it lies in the bootstrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// The namespace, with its dot; the whole name for the two ACLs.
    pub prefix: &'static [u8],
    /// The rest of the name.
    pub suffix: &'a [u8],
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// The whole name.
    pub fn name(&self) -> Vec<u8> {
        [self.prefix, self.suffix].concat()
    }
}

impl Image {
    /// Visits the extended attributes of `inode` in disk order until `visit` breaks off.
    ///
    /// # Errors
    /// If the area runs out of the bootstrap, an entry runs out of the area, or a name is in a
    /// namespace that the format has no number for.
    pub fn xattrs<'a>(
        &'a self,
        inode: &Inode,
        visit: &mut dyn FnMut(Xattr<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let wrong = |rule| ImageError::Inode { nid: inode.nid, rule };
        if inode.xattrs.is_empty() {
            return Ok(());
        }
        let area: &[u8] = array_at(self.bytes(), inode.xattrs.start(), inode.xattrs.len(), "xattr area")?;
        let head: &XattrHead = record_at(area, 0, "xattr head")?;
        if head.shared_count != 0 {
            return Err(wrong("has shared xattrs, and the image has no shared area"));
        }
        let mut rest = &area[size_of::<XattrHead>()..];
        while !rest.is_empty() {
            let entry: &XattrEntry = record_at(rest, 0, "xattr")?;
            let (name_len, value_len) = (usize::from(entry.name_len), usize::from(entry.value_size.get()));
            let name_at = size_of::<XattrEntry>();
            let value_at = name_at + name_len;
            let end = value_at + value_len;
            let body = rest.get(..end).ok_or_else(|| wrong("has an xattr that runs out of its area"))?;
            let prefix = XATTR_PREFIXES.iter().find(|(index, _)| *index == entry.name_index);
            let (_, prefix) = prefix.ok_or_else(|| wrong("has an xattr in an unknown namespace"))?;
            // The two ACL names are whole names, the others need something behind the dot.
            if (name_len == 0) == prefix.ends_with(b".") || body[name_at..value_at].contains(&0) {
                return Err(wrong("has an xattr with an impossible name"));
            }
            if visit(Xattr { prefix, suffix: &body[name_at..value_at], value: &body[value_at..] }).is_break() {
                break;
            }
            rest = rest.get(end.next_multiple_of(4)..).unwrap_or(&[]);
        }
        Ok(())
    }
}
