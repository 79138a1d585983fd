use std::ops::ControlFlow;

use zerocopy::little_endian::U32;

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
    /// Visits the extended attributes of `inode` until `visit` breaks off: those behind the inode
    /// in disk order, then those that it shares with others, as the kernel lists them.
    ///
    /// RAFS writes no shared ones (`rafs-v6.md` section 11); they are read as EROFS defines them:
    /// the head of the area is followed by their numbers, which count words of four bytes from the
    /// shared area. An inode has at most 255 of them, and at most 256 KiB of its own, so what is
    /// visited for one inode is bounded by 17 MiB.
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
        let head_len = size_of::<XattrHead>() as u64;
        let shared: &[U32] = array_at(area, head_len, head.shared_count.into(), "numbers of shared xattrs")?;
        let mut rest = &area[size_of::<XattrHead>() + size_of_val(shared)..];
        while !rest.is_empty() {
            let (xattr, len) = xattr(rest).map_err(wrong)?;
            if visit(xattr).is_break() {
                return Ok(());
            }
            rest = rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        }
        for number in shared {
            let start = self.summary.shared_xattrs.ok_or_else(|| wrong("shares xattrs, and the image has none"))?;
            let at = u64::from(number.get()) * size_of::<U32>() as u64 + start;
            let left = self.summary.bootstrap_len.checked_sub(at);
            let left = left.ok_or_else(|| wrong("shares an xattr that lies behind the end of the bootstrap"))?;
            let (xattr, _) = xattr(array_at(self.bytes(), at, left, "shared xattr")?).map_err(wrong)?;
            if visit(xattr).is_break() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// The attribute at the start of `bytes`, and how many of them it takes without its padding.
fn xattr(bytes: &[u8]) -> Result<(Xattr<'_>, usize), &'static str> {
    let entry: &XattrEntry = record_at(bytes, 0, "xattr").map_err(|_| "has an xattr that runs out of its area")?;
    let (name_len, value_len) = (usize::from(entry.name_len), usize::from(entry.value_size.get()));
    let name_at = size_of::<XattrEntry>();
    let value_at = name_at + name_len;
    let end = value_at + value_len;
    let body = bytes.get(..end).ok_or("has an xattr that runs out of its area")?;
    let prefix = XATTR_PREFIXES.iter().find(|(index, _)| *index == entry.name_index);
    let (_, prefix) = prefix.ok_or("has an xattr in an unknown namespace")?;
    // The two ACL names are whole names, the others need something behind the dot.
    if (name_len == 0) == prefix.ends_with(b".") || body[name_at..value_at].contains(&0) {
        return Err("has an xattr with an impossible name");
    }
    Ok((Xattr { prefix, suffix: &body[name_at..value_at], value: &body[value_at..] }, end))
}

#[cfg(test)]
mod tests {
    use super::super::sample::{self, Patch};
    use super::*;
    use crate::format::erofs::SUPERBLOCK_OFFSET;

    /// Name and value.
    type Pair = (Vec<u8>, Vec<u8>);

    fn names(image: &Image, path: &str) -> Result<Vec<Pair>, ImageError> {
        let inode = image.lookup(path.as_bytes()).unwrap().expect("in the sample");
        let mut found = Vec::new();
        image.xattrs(&inode, &mut |xattr| {
            found.push((xattr.name(), xattr.value.to_vec()));
            ControlFlow::Continue(())
        })?;
        Ok(found)
    }

    /// The sample with `user.one` moved out of the inode: its head says that it shares number
    /// `number` of an area in the last block of the bootstrap.
    fn shared(number: u32) -> Image {
        let mut patch = Patch::new();
        let inode = patch.image().lookup(b"xattrs").unwrap().unwrap();
        let area = inode.xattrs;
        let block = u32::try_from(patch.bytes.len() / 4096).unwrap();
        patch.bytes.resize(patch.bytes.len() + 4096, 0);
        patch.put(u64::from(block) * 4096 + 8, &[5, 1, 6, 0]);
        patch.put(u64::from(block) * 4096 + 12, b"otherabroad");
        patch.put(SUPERBLOCK_OFFSET + 0x2c, &block.to_le_bytes());
        // One number takes the four bytes of the entry's head; what follows must be an entry again.
        let mut head = vec![0; usize::try_from(area.len()).unwrap()];
        head[4] = 1;
        head[12..16].copy_from_slice(&number.to_le_bytes());
        let rest = head.len() - 16;
        head[16..20].copy_from_slice(&[1, 1, u8::try_from(rest - 5).unwrap(), 0]);
        head[20] = b'a';
        patch.put(area.start(), &head);
        patch.image()
    }

    #[test]
    fn attributes_behind_the_inode_are_read() {
        let image = sample::image();
        assert_eq!(names(&image, "xattrs").unwrap(), [(b"user.one".to_vec(), b"first value".to_vec())]);
        assert_eq!(names(&image, "file").unwrap(), []);
    }

    #[test]
    fn shared_attributes_follow_the_inodes_own() {
        let found = names(&shared(2), "xattrs").unwrap();
        assert_eq!(found[0].0, b"user.a");
        assert_eq!(found[1..], [(b"user.other".to_vec(), b"abroad".to_vec())]);
    }

    #[test]
    fn shared_attributes_outside_the_bootstrap_are_refused() {
        for number in [1 << 20, u32::MAX, 1023] {
            assert!(names(&shared(number), "xattrs").is_err(), "{number}");
        }
    }

    #[test]
    fn an_image_without_a_shared_area_shares_nothing() {
        let mut patch = Patch::new();
        let inode = patch.image().lookup(b"xattrs").unwrap().unwrap();
        patch.put(inode.xattrs.start() + 4, &[1]);
        assert!(names(&patch.image(), "xattrs").is_err());
    }
}
