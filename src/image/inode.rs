use super::{Image, ImageError};
use crate::base::ByteRange;
use crate::format::erofs::{
    CHUNK_FORMAT_BITS, CHUNK_FORMAT_INDEXES, INODE_SLOT, InodeCompact, InodeExtended, XattrEntry, XattrHead, layout,
};
use crate::format::record_at;

const NANOS_PER_SECOND: u32 = 1_000_000_000;

/// Number of an inode: its place in the metadata area in slots of 32 bytes.
pub type Nid = u64;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Regular,
    Directory,
    Symlink,
    Character,
    Block,
    Fifo,
    Socket,
}

/// Where the data of an inode lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Whole blocks of the bootstrap from byte `at`.
    Plain { at: u64 },
    /// Whole blocks from byte `at`, the rest behind the inode at byte `tail`.
    Inline { at: u64, tail: u64 },
    /// An array of chunk indexes at byte `indexes`. The kernel takes one for every 2^`bits` bytes;
    /// the array has one for every chunk of the image, which may be less.
    Chunks { indexes: u64, bits: u32 },
    /// No data: a special file.
    None,
}

/// One inode, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    pub nid: Nid,
    pub kind: Kind,
    /// Permission bits, set-id and sticky bits included.
    pub permissions: u16,
    /// Bytes of the file, the link target or the directory.
    pub size: u64,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Seconds and nanoseconds since 1970, the latter below 10^9; zero for a compact inode.
    pub mtime: (i64, u32),
    /// Device number of a character or block device, as the kernel encodes it.
    pub rdev: u32,
    /// The number that the builder gave the inode; informational (`rafs-v6.md` section 8.2).
    pub ino: u32,
    /// Where its extended attributes lie in the bootstrap; empty if it has none.
    pub xattrs: ByteRange,
    pub layout: Layout,
}

/// The fields that both forms of an inode have.
struct Common {
    format: u16,
    xattr_icount: u16,
    mode: u16,
    size: u64,
    u: u32,
    ino: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    len: u64,
}

impl Image {
    /// The inode with this number.
    pub fn inode(&self, nid: Nid) -> Result<Inode, ImageError> {
        let wrong = |rule| ImageError::Inode { nid, rule };
        let at = nid
            .checked_mul(INODE_SLOT)
            .and_then(|offset| offset.checked_add(self.summary.meta_start))
            .ok_or_else(|| wrong("has an impossible number"))?;
        let raw = self.raw_inode(at)?;
        if raw.format & !0xf != 0 {
            return Err(wrong("has unknown format bits"));
        }
        let kind = Kind::from_mode(raw.mode).ok_or_else(|| wrong("has an impossible file type"))?;
        if raw.nlink == 0 {
            return Err(wrong("has no links"));
        }
        // Whoever computes with it relies on this, and the kernel has other uses for larger values.
        if raw.mtime.1 >= NANOS_PER_SECOND {
            return Err(ImageError::Nanoseconds { nid, value: raw.mtime.1 });
        }
        if i64::try_from(raw.size).is_err() {
            return Err(wrong("is impossibly large"));
        }
        let xattrs = match raw.xattr_icount {
            0 => 0,
            n => size_of::<XattrHead>() as u64 + u64::from(n - 1) * size_of::<XattrEntry>() as u64,
        };
        let xattrs = ByteRange::at(at + raw.len, xattrs).ok_or_else(|| wrong("has an impossible number"))?;
        let behind = xattrs.end();
        let block = self.summary.block_size;
        let data = u64::from(raw.u) * block;
        let has_data = matches!(kind, Kind::Regular | Kind::Directory | Kind::Symlink);
        let layout = match raw.format >> 1 {
            _ if !has_data => Layout::None,
            layout::FLAT_PLAIN => Layout::Plain { at: data },
            layout::FLAT_INLINE => Layout::Inline { at: data, tail: behind },
            layout::CHUNK_BASED if kind == Kind::Regular => {
                // The kernel refuses unknown bits; without the flag the array has another form.
                if raw.u & 0xffff & !CHUNK_FORMAT_BITS != CHUNK_FORMAT_INDEXES {
                    return Err(wrong("has a chunk format that RAFS does not use"));
                }
                let bits = block.trailing_zeros() + (raw.u & CHUNK_FORMAT_BITS);
                Layout::Chunks { indexes: behind.next_multiple_of(8), bits }
            }
            _ => return Err(wrong("has a data layout that RAFS does not use")),
        };
        Ok(Inode {
            nid,
            kind,
            permissions: raw.mode & 0o7777,
            size: raw.size,
            nlink: raw.nlink,
            uid: raw.uid,
            gid: raw.gid,
            mtime: raw.mtime,
            rdev: if has_data { 0 } else { raw.u },
            ino: raw.ino,
            xattrs,
            layout,
        })
    }

    fn raw_inode(&self, at: u64) -> Result<Common, ImageError> {
        let compact: &InodeCompact = record_at(self.bytes(), at, "inode")?;
        if compact.format.get() & 1 == 0 {
            return Ok(Common {
                format: compact.format.get(),
                xattr_icount: compact.xattr_icount.get(),
                mode: compact.mode.get(),
                size: compact.size.get().into(),
                u: compact.u.get(),
                ino: compact.ino.get(),
                nlink: compact.nlink.get().into(),
                uid: compact.uid.get().into(),
                gid: compact.gid.get().into(),
                mtime: (0, 0),
                len: size_of::<InodeCompact>() as u64,
            });
        }
        let long: &InodeExtended = record_at(self.bytes(), at, "inode")?;
        Ok(Common {
            format: long.format.get(),
            xattr_icount: long.xattr_icount.get(),
            mode: long.mode.get(),
            size: long.size.get(),
            u: long.u.get(),
            ino: long.ino.get(),
            nlink: long.nlink.get(),
            uid: long.uid.get(),
            gid: long.gid.get(),
            mtime: (long.mtime.get().cast_signed(), long.mtime_nsec.get()),
            len: size_of::<InodeExtended>() as u64,
        })
    }
}

impl Kind {
    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Regular => "file",
            Self::Directory => "directory",
            Self::Symlink => "symlink",
            Self::Character => "character device",
            Self::Block => "block device",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }

    /// The bits of `st_mode` that say this.
    pub fn type_bits(self) -> u32 {
        match self {
            Self::Regular => libc::S_IFREG,
            Self::Directory => libc::S_IFDIR,
            Self::Symlink => libc::S_IFLNK,
            Self::Character => libc::S_IFCHR,
            Self::Block => libc::S_IFBLK,
            Self::Fifo => libc::S_IFIFO,
            Self::Socket => libc::S_IFSOCK,
        }
    }

    pub(super) fn from_mode(mode: u16) -> Option<Self> {
        Some(match u32::from(mode) & libc::S_IFMT {
            libc::S_IFREG => Self::Regular,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFCHR => Self::Character,
            libc::S_IFBLK => Self::Block,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::Patch;
    use super::*;

    #[test]
    fn nanoseconds_end_below_a_second() {
        for (value, is_sound) in [(999_999_999, true), (NANOS_PER_SECOND, false), (0x3fff_ffff, false)] {
            let mut patch = Patch::new();
            let image = patch.image();
            let nid = image.lookup(b"file").unwrap().unwrap().nid;
            patch.put(image.summary().meta_start + nid * INODE_SLOT + 0x28, &u32::to_le_bytes(value));

            let mtime = patch.image().inode(nid).map(|inode| inode.mtime.1);

            let want = if is_sound { Ok(value) } else { Err(ImageError::Nanoseconds { nid, value }) };
            assert_eq!(mtime, want);
        }
    }
}
