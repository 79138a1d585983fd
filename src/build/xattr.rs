//! Which xattrs the format can hold, and how many bytes they take (`rafs-v6.md` section 11).

use super::error::Unfit;
use super::tree::{Meta, Xattr};
use crate::format::erofs::{XATTR_PREFIXES, XattrEntry, XattrHead};

/// Longest full name and longest value, in bytes: the limits of Linux, and of the length fields.
pub(super) const MAX_NAME: usize = 255;
pub(super) const MAX_VALUE: usize = 65535;

/// The number of a name's prefix and the rest of the name, or `None` if the format has no number
/// for that namespace.
pub(super) fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    if name.len() > MAX_NAME {
        return None;
    }
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let suffix = name.strip_prefix(*prefix)?;
        // The two ACL names are whole names, the others need something behind the dot.
        (suffix.is_empty() != prefix.ends_with(b".")).then_some((*index, suffix))
    })
}

/// Bytes of one entry with its padding.
fn entry_bytes(suffix: &[u8], value: &[u8]) -> usize {
    (size_of::<XattrEntry>() + suffix.len() + value.len()).next_multiple_of(4)
}

/// Bytes of a node's xattr area, 0 if it has none.
pub(super) fn area_bytes(meta: &Meta) -> usize {
    let entries = meta.xattrs.iter().filter_map(|(name, value)| Some(entry_bytes(split(name)?.1, value)));
    match entries.sum::<usize>() {
        0 => 0,
        bytes => size_of::<XattrHead>() + bytes,
    }
}

/// Collects the xattrs of one entry. Namespaces that the format cannot hold are counted, not kept.
#[derive(Debug, Default)]
pub(super) struct Collector {
    kept: Vec<Xattr>,
    pub skipped: u64,
}

impl Collector {
    pub(super) fn add(&mut self, name: &[u8], value: &[u8]) -> Result<(), Unfit> {
        if split(name).is_none() {
            self.skipped += 1;
            return Ok(());
        }
        if value.len() > MAX_VALUE {
            return Err(Unfit::XattrValue { name: name.escape_ascii().to_string(), len: value.len() });
        }
        self.kept.push((name.into(), value.into()));
        Ok(())
    }

    /// Puts what was collected into `meta`, sorted: the order of the format is free, ours is fixed.
    pub(super) fn store(mut self, meta: &mut Meta) -> Result<(), Unfit> {
        // A name given twice, as in a PAX header, means its last value. Found out here and not in
        // `add`, where a header full of names would make each be compared with each.
        self.kept.reverse();
        self.kept.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.kept.dedup_by(|(a, _), (b, _)| a == b);
        meta.xattrs = self.kept;
        let bytes = area_bytes(meta);
        // `xattr_icount` has 16 bits and counts words behind the head.
        let max = size_of::<XattrHead>() + 4 * (usize::from(u16::MAX) - 1);
        if bytes > max { Err(Unfit::XattrArea(bytes)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbered_namespaces_are_split() {
        assert_eq!(split(b"user.a"), Some((1, b"a".as_slice())));
        assert_eq!(split(b"system.posix_acl_default"), Some((3, b"".as_slice())));
        assert_eq!(split(b"security.capability"), Some((6, b"capability".as_slice())));
        for bad in [b"user.".as_slice(), b"system.posix_acl_accessx", b"system.nfs4_acl", b"btrfs.x", b""] {
            assert_eq!(split(bad), None, "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn last_value_of_a_repeated_name_wins() {
        let mut collector = Collector::default();
        for (name, value) in [("user.b", "1"), ("system.nfs4_acl", "x"), ("user.a", "2"), ("user.b", "3")] {
            collector.add(name.as_bytes(), value.as_bytes()).unwrap();
        }
        let mut meta = Meta::implied_directory();
        assert_eq!(collector.skipped, 1);
        collector.store(&mut meta).unwrap();
        assert_eq!(meta.xattrs.len(), 2);
        assert_eq!((&*meta.xattrs[1].0, &*meta.xattrs[1].1), (b"user.b".as_slice(), b"3".as_slice()));
        assert_eq!(area_bytes(&meta), 12 + 8 + 8);
    }
}
