//! Inode records with their names, link targets, xattrs and chunk records.

use std::ops::Range;

use super::xattr::Pairs;
use super::{Bootstrap, BootstrapError};
use crate::format::rafs::ChunkRecord;
use crate::format::rafs5::{self, inode_flags};
use crate::format::{array_at, record_at};
use crate::image::Kind;

const NANOS_PER_SECOND: u32 = 1_000_000_000;

/// Number of a path, from 1: its row of the inode table.
pub type Number = u32;

/// The inode at one path, checked.
#[derive(Clone, Debug)]
pub struct Inode<'a> {
    /// Of this path.
    pub number: Number,
    /// Of the first path of this inode: another one if it is a further name of a file.
    pub ino: Number,
    /// What it says is the directory it lies in; nothing relies on it.
    pub parent: u64,
    /// Of content, never of metadata.
    pub digest: [u8; 32],
    pub kind: Kind,
    /// Permission bits, set-id and sticky bits included.
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    pub nlink: u32,
    /// Device number as the kernel encodes it; 0 for what is no device.
    pub rdev: u32,
    /// Seconds and nanoseconds since 1970, the latter below 10^9.
    pub mtime: (i64, u32),
    /// `/` for the root.
    pub name: &'a [u8],
    /// Of a symbolic link.
    pub target: &'a [u8],
    /// Chunk records of a regular file, one for each chunk size of it; see [`Bootstrap::chunk`].
    pub chunks: &'a [ChunkRecord],
    /// Numbers of the children of a directory.
    pub children: Range<Number>,
    /// Pairs of name and value, behind each other.
    pub(super) xattrs: &'a [u8],
    /// Bytes that the record takes, with everything that belongs to it.
    pub len: u64,
}

impl<'a> Bootstrap<'a> {
    /// The inode at path `number`.
    pub fn inode(&self, number: Number) -> Result<Inode<'a>, BootstrapError> {
        let wrong = |field, value: u64, rule| BootstrapError::Inode { number, field, value, rule };
        let row = number.checked_sub(1).and_then(|row| self.inode_table.get(row as usize));
        let row = row.ok_or(wrong("number", number.into(), "which is no row of the inode table"))?.get();
        let at = rafs5::inode_offset(row);
        let at = at.ok_or(wrong("row of the inode table", row.into(), "where no inode can be"))?;
        let raw: &rafs5::Inode = record_at(self.bytes, at, "inode")?;
        let kind = self.kind(number, raw)?;
        let mut parts = Parts { bytes: self.bytes, at: at + size_of::<rafs5::Inode>() as u64 };
        let name = parts.take(raw.name_size.get().into(), "name of an inode")?;
        check_name(number, name)?;
        let target = parts.take(raw.symlink_size.get().into(), "link target")?;
        if kind == Kind::Symlink && target.contains(&0) {
            return Err(wrong("target", 0, "a byte that no link can have"));
        }
        let xattrs = if raw.flags.get() & inode_flags::XATTR == 0 {
            [].as_slice()
        } else {
            let head: &rafs5::XattrHead = record_at(self.bytes, parts.at, "xattr table")?;
            parts.at += size_of::<rafs5::XattrHead>() as u64;
            parts.take(head.content_size.get(), "xattr table")?
        };
        let chunks: &[ChunkRecord] = match kind {
            Kind::Regular => {
                let count = u64::from(raw.child_count.get());
                let chunks = array_at(self.bytes, parts.at, count, "chunk records")?;
                parts.at += size_of_val(chunks) as u64;
                chunks
            }
            _ => &[],
        };
        Ok(Inode {
            number,
            ino: self.first_path(number, kind, raw)?,
            parent: raw.parent.get(),
            digest: raw.digest,
            kind,
            permissions: u16::try_from(raw.mode.get() & 0o7777).expect("12 bits"),
            uid: raw.uid.get(),
            gid: raw.gid.get(),
            size: raw.size.get(),
            nlink: raw.nlink.get(),
            // Others have what their source said, or all ones.
            rdev: if matches!(kind, Kind::Character | Kind::Block) { raw.rdev.get() } else { 0 },
            mtime: (raw.mtime.get().cast_signed(), raw.mtime_nsec.get()),
            name,
            target,
            chunks,
            children: self.children_of(number, kind, raw)?,
            xattrs,
            len: parts.at - at,
        })
    }

    /// The inodes in directory `inode`, nothing for other kinds. Ends with the first error, of which
    /// one is that the names are not in order.
    pub fn children<'s>(
        &'s self,
        inode: &Inode<'a>,
    ) -> impl Iterator<Item = Result<Inode<'a>, BootstrapError>> + use<'s, 'a> {
        let directory = inode.number;
        let mut before: Option<&'a [u8]> = None;
        let mut numbers = inode.children.clone();
        std::iter::from_fn(move || {
            let number = numbers.next()?;
            let child = self.inode(number).and_then(|child| {
                if before.is_some_and(|before| before >= child.name) {
                    return Err(BootstrapError::Order { directory, number });
                }
                before = Some(child.name);
                Ok(child)
            });
            if child.is_err() {
                numbers = 0..0;
            }
            Some(child)
        })
    }

    /// The kind of an inode whose fields go with it.
    fn kind(&self, number: Number, raw: &rafs5::Inode) -> Result<Kind, BootstrapError> {
        let wrong = |field, value: u64, rule| Err(BootstrapError::Inode { number, field, value, rule });
        let mode = raw.mode.get();
        let kind = u16::try_from(mode).ok().and_then(Kind::from_mode);
        let Some(kind) = kind else { return wrong("mode", mode.into(), "which is no kind of file") };
        let (flags, size) = (raw.flags.get(), raw.size.get());
        if flags & !inode_flags::KNOWN != 0 {
            return wrong("flags", flags, "of which some are unknown");
        }
        if flags & inode_flags::HAS_HOLE != 0 {
            return wrong("flags", flags, "a file with holes, which no builder writes and this version does not read");
        }
        if raw.nlink.get() == 0 {
            return wrong("link count", 0, "and 1 is the least");
        }
        if raw.mtime_nsec.get() >= NANOS_PER_SECOND {
            return wrong("mtime_nsec", raw.mtime_nsec.get().into(), "which is more than a second");
        }
        if i64::try_from(size).is_err() {
            return wrong("size", size, "which no file can have");
        }
        let target_len = u64::from(raw.symlink_size.get());
        let (children, chunks) = match kind {
            Kind::Directory => return Ok(kind),
            Kind::Regular => (raw.child_count.get(), size.div_ceil(self.summary.chunk_size.into())),
            _ => (raw.child_count.get(), 0),
        };
        if u64::from(children) != chunks {
            return wrong("number of chunks", children.into(), "which does not go with its size");
        }
        match kind {
            Kind::Symlink if target_len == 0 || target_len != size => {
                wrong("length of the link target", target_len, "which is not its size, or nothing")
            }
            Kind::Symlink => Ok(kind),
            _ if target_len != 0 => wrong("length of the link target", target_len, "and it is no link"),
            _ => Ok(kind),
        }
    }

    /// The number of the first path of an inode.
    fn first_path(&self, number: Number, kind: Kind, raw: &rafs5::Inode) -> Result<Number, BootstrapError> {
        let ino = raw.ino.get();
        let wrong = |rule| BootstrapError::Inode { number, field: "inode number", value: ino, rule };
        let first = Number::try_from(ino).ok().filter(|first| (1..=number).contains(first));
        let first = first.ok_or(wrong("which is none of a path up to this one"))?;
        if first != number && kind == Kind::Directory {
            return Err(wrong("and a directory has only one path"));
        }
        Ok(first)
    }

    fn children_of(&self, number: Number, kind: Kind, raw: &rafs5::Inode) -> Result<Range<Number>, BootstrapError> {
        let (first, count) = (raw.child_index.get(), raw.child_count.get());
        if kind != Kind::Directory || count == 0 {
            return Ok(0..0);
        }
        let wrong = |field, value: Number, rule| BootstrapError::Inode { number, field, value: value.into(), rule };
        if first <= number {
            return Err(wrong("child index", first, "which is not behind its own number"));
        }
        // The last one is a path of the image.
        let last = first.checked_add(count - 1).filter(|last| *last <= self.paths());
        let last = last.ok_or(wrong("child count", count, "more than there are inodes behind the first child"))?;
        Ok(first..last.saturating_add(1))
    }
}

/// What follows an inode, part by part, each padded.
struct Parts<'a> {
    bytes: &'a [u8],
    at: u64,
}

impl<'a> Parts<'a> {
    fn take(&mut self, len: u64, what: &'static str) -> Result<&'a [u8], BootstrapError> {
        let part = array_at(self.bytes, self.at, len, what)?;
        self.at = (self.at + len).next_multiple_of(rafs5::ALIGN);
        Ok(part)
    }
}

fn check_name(number: Number, name: &[u8]) -> Result<(), BootstrapError> {
    let wrong = |rule| Err(BootstrapError::Name { number, rule });
    if number == rafs5::ROOT {
        return if name == b"/" { Ok(()) } else { wrong("is that of the root, and not '/'") };
    }
    match name {
        [] => wrong("is empty"),
        b"." | b".." => wrong("is '.' or '..'"),
        _ if name.len() > rafs5::MAX_NAME => wrong("is longer than 256 bytes"),
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => wrong("has a '/' or NUL in it"),
        _ => Ok(()),
    }
}

impl<'a> Inode<'a> {
    /// Its extended attributes, in the order in which they are stored.
    pub fn xattrs(&self) -> Pairs<'a> {
        Pairs::new(self.number, self.xattrs)
    }
}
