//! What of a source becomes part of an image, and with which attributes.

use super::overlay::Whiteouts;
use super::pattern::Pattern;
use super::tree::Meta;

/// What to leave out of a source and what to change in it. The default takes everything as it is.
#[derive(Clone, Debug)]
pub struct Selection {
    /// Entries to leave out, with everything below them.
    pub exclude: Vec<Pattern>,
    /// Prefixes of the only xattrs to keep; all if there is none.
    pub xattr_include: Vec<String>,
    /// Prefixes of xattrs to drop. Stronger than the ones to keep.
    pub xattr_exclude: Vec<String>,
    /// Which entries of a directory source are whiteouts and left out, with everything below them.
    /// Archives keep theirs: they are layers.
    pub drop_whiteouts: Whiteouts,
    pub owners: Owners,
    /// Times later than this become this: seconds since 1970.
    pub latest_mtime: Option<i64>,
}

impl Default for Selection {
    fn default() -> Self {
        Self {
            exclude: Vec::new(),
            xattr_include: Vec::new(),
            xattr_exclude: Vec::new(),
            drop_whiteouts: Whiteouts::None,
            owners: Owners::default(),
            latest_mtime: None,
        }
    }
}

/// Whose the entries of an image are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owners {
    /// As in the source, but for ids in one of these ranges.
    Mapped { uids: Vec<IdRange>, gids: Vec<IdRange> },
    /// Everything belongs to these.
    Fixed { uid: u32, gid: u32 },
    /// Nobody's: all ids are 0, and the image says that they mean nothing.
    Omitted,
}

impl Default for Owners {
    fn default() -> Self {
        Self::Mapped { uids: Vec::new(), gids: Vec::new() }
    }
}

/// `count` ids from `from` on become those from `to` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    from: u32,
    to: u32,
    count: u32,
}

/// Text that is no range of ids.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a range of ids; write FROM:TO or FROM:TO:COUNT, all within 32 bits")]
pub struct InvalidIdRange(String);

impl IdRange {
    fn map(&self, id: u32) -> Option<u32> {
        id.checked_sub(self.from).filter(|offset| *offset < self.count).map(|offset| self.to + offset)
    }

    /// Whether both say something of one id.
    pub fn overlaps(&self, other: &Self) -> bool {
        let end = |range: &Self| u64::from(range.from) + u64::from(range.count);
        u64::from(self.from) < end(other) && u64::from(other.from) < end(self)
    }
}

impl std::fmt::Display for IdRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}:{}", self.from, self.to, self.count)
    }
}

impl std::str::FromStr for IdRange {
    type Err = InvalidIdRange;

    fn from_str(text: &str) -> Result<Self, InvalidIdRange> {
        let invalid = || InvalidIdRange(text.to_owned());
        let mut numbers = text.split(':').map(|part| part.parse::<u32>().map_err(|_| invalid()));
        let mut next = || numbers.next().transpose();
        let (from, to) = (next()?.ok_or_else(invalid)?, next()?.ok_or_else(invalid)?);
        let count = next()?.unwrap_or(1);
        let fits = |start: u32| u64::from(start) + u64::from(count) <= 1 << 32;
        let sound = next()?.is_none() && count > 0 && fits(from) && fits(to);
        if sound { Ok(Self { from, to, count }) } else { Err(invalid()) }
    }
}

impl Selection {
    /// Whether the entry at `path`, names from the root, is left out.
    pub(super) fn excludes(&self, path: &[&[u8]], is_directory: bool) -> bool {
        self.exclude.iter().any(|pattern| pattern.matches(path, is_directory))
    }

    /// Whether an entry of an archive is left out, be it because something above it is.
    pub(super) fn excludes_at_any_level(&self, path: &[&[u8]], is_directory: bool) -> bool {
        self.exclude.iter().any(|pattern| pattern.matches_at_any_level(path, is_directory))
    }

    /// Whether an entry of a directory source is a whiteout to be left out.
    pub(super) fn is_whiteout(&self, name: &[u8], is_null_device: bool) -> bool {
        match self.drop_whiteouts {
            Whiteouts::Oci => name.starts_with(b".wh."),
            Whiteouts::Overlayfs => is_null_device,
            Whiteouts::None => false,
        }
    }

    pub(super) fn keeps_xattr(&self, name: &[u8]) -> bool {
        let any = |prefixes: &[String]| prefixes.iter().any(|prefix| name.starts_with(prefix.as_bytes()));
        (self.xattr_include.is_empty() || any(&self.xattr_include)) && !any(&self.xattr_exclude)
    }

    /// Gives an entry the attributes it shall have.
    pub(super) fn adjust(&self, meta: &mut Meta) {
        if let Some(latest) = self.latest_mtime
            && (meta.mtime, meta.mtime_nsec) > (latest, 0)
        {
            (meta.mtime, meta.mtime_nsec) = (latest, 0);
        }
        let mapped = |ranges: &[IdRange], id| ranges.iter().find_map(|range| range.map(id)).unwrap_or(id);
        (meta.uid, meta.gid) = match &self.owners {
            Owners::Mapped { uids, gids } => (mapped(uids, meta.uid), mapped(gids, meta.gid)),
            Owners::Fixed { uid, gid } => (*uid, *gid),
            Owners::Omitted => (0, 0),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_ranges_are_read_as_documented() {
        let range: IdRange = "1000:0:10".parse().unwrap();
        assert_eq!([999, 1000, 1009, 1010].map(|id| range.map(id)), [None, Some(0), Some(9), None]);
        assert_eq!("7:8".parse::<IdRange>().unwrap().map(7), Some(8));
        assert_eq!("4294967295:0".parse::<IdRange>().unwrap().map(u32::MAX), Some(0));
        for bad in ["", "1", "1:", "1:2:0", "1:2:3:4", "-1:2", "4294967295:0:2", "0:4294967295:2", "4294967296:0"] {
            assert!(bad.parse::<IdRange>().is_err(), "{bad}");
        }
        let overlaps = |a: &str, b: &str| a.parse::<IdRange>().unwrap().overlaps(&b.parse().unwrap());
        assert!(overlaps("0:9:10", "9:0") && !overlaps("0:9:10", "10:0"));
    }

    #[test]
    fn attributes_are_changed_as_told_and_no_further() {
        let mut selection = Selection { latest_mtime: Some(100), ..Selection::default() };
        selection.owners = Owners::Mapped { uids: vec!["5:50:2".parse().unwrap()], gids: Vec::new() };
        let changed = |mtime, mtime_nsec, uid| {
            let mut meta = Meta { mtime, mtime_nsec, uid, gid: 6, ..Meta::implied_directory() };
            selection.adjust(&mut meta);
            (meta.mtime, meta.mtime_nsec, meta.uid, meta.gid)
        };
        assert_eq!(changed(100, 0, 6), (100, 0, 51, 6));
        assert_eq!(changed(100, 1, 7), (100, 0, 7, 6));
        assert_eq!(changed(-5, 9, 0), (-5, 9, 0, 6));
    }

    #[test]
    fn exclusion_of_xattrs_is_stronger_than_inclusion() {
        let selection = Selection {
            xattr_include: vec!["user.".into(), "security.".into()],
            xattr_exclude: vec!["user.tmp".into()],
            ..Selection::default()
        };
        let kept =
            ["user.a", "user.tmp.x", "security.capability", "trusted.x"].map(|n| selection.keeps_xattr(n.as_bytes()));
        assert_eq!(kept, [true, false, true, false]);
        assert!(Selection::default().keeps_xattr(b"trusted.x"));
    }

    #[test]
    fn what_is_below_something_excluded_is_excluded() {
        let selection = Selection { exclude: vec!["/a/b/".parse().unwrap()], ..Selection::default() };
        assert!(selection.excludes_at_any_level(&[b"a", b"b", b"c"], false));
        assert!(selection.excludes_at_any_level(&[b"a", b"b"], true));
        assert!(!selection.excludes_at_any_level(&[b"a", b"b"], false));
    }
}
