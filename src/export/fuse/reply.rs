//! Answers to requests of `/dev/fuse`: facts in, bytes out.
//!
//! An answer is one write: a head with its whole length, then the body. Errors are a head alone. Nothing here
//! does I/O. Records are those of `include/uapi/linux/fuse.h` of Linux 6.18, in the byte order of the host.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::wire::NodeId;
use crate::base::BLOCK;

/// Length of the head of an answer.
pub const HEAD: usize = size_of::<ReplyHead>();

/// How long the kernel may believe what it was told, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trust(u64);

impl Trust {
    /// Of what never changes, as images do not. Ten years, as some kernels compute with it.
    pub const FOR_EVER: Self = Self(10 * 365 * 24 * 60 * 60);
    /// Of what somebody else may change at any time.
    pub const SHORT: Self = Self(1);
}

/// What every answer begins with (`struct fuse_out_header`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReplyHead {
    /// Of the whole answer, in bytes.
    pub len: u32,
    /// 0, or a negative errno.
    pub error: i32,
    pub unique: u64,
}

const _: () = assert!(size_of::<ReplyHead>() == 16);

/// The head of an answer with a body of `body` bytes, at most some megabytes.
pub fn head(unique: u64, body: usize) -> ReplyHead {
    ReplyHead { len: u32::try_from(HEAD + body).unwrap_or(u32::MAX), error: 0, unique }
}

/// The answer that a request failed with `errno`, a positive number.
pub fn failure(unique: u64, errno: i32) -> ReplyHead {
    // The kernel takes 1 to 511 only, and would leave the reader waiting for anything else.
    let errno = if (1..512).contains(&errno) { errno } else { libc::EIO };
    ReplyHead { len: u32::try_from(HEAD).expect("16"), error: -errno, unique }
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Names it to the kernel.
    pub id: NodeId,
    /// `st_ino`.
    pub ino: u64,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// As the kernel encodes it.
    pub rdev: u32,
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    /// `st_blksize`.
    pub block_size: u32,
    pub times: Times,
    /// In its name and in all of the above.
    pub trust: Trust,
}

impl Node {
    /// Something of our own, which never changes: root's, and of no time.
    pub fn ours(id: NodeId, ino: u64, (mode, nlink): (u32, u32), size: u64) -> Self {
        Self {
            id,
            ino,
            mode,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            size,
            blocks: size.div_ceil(512),
            block_size: u32::try_from(BLOCK).expect("4096"),
            times: Times::default(),
            trust: Trust::FOR_EVER,
        }
    }
}

/// Seconds and nanoseconds since 1970.
pub type Time = (i64, u32);

/// The times of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    pub access: Time,
    pub data: Time,
    pub change: Time,
}

impl Times {
    /// All the same.
    pub fn all(time: Time) -> Self {
        Self { access: time, data: time, change: time }
    }
}

/// Facts about a whole tree, in units of `block_size` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statistics {
    pub block_size: u32,
    pub blocks: u64,
    pub files: u64,
}

/// `struct fuse_attr`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    pub atimensec: u32,
    pub mtimensec: u32,
    pub ctimensec: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub blksize: u32,
    pub flags: u32,
}

const _: () = assert!(size_of::<Attr>() == 88);

/// `struct fuse_entry_out`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EntryOut {
    pub nodeid: u64,
    pub generation: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub entry_valid_nsec: u32,
    pub attr_valid_nsec: u32,
    pub attr: Attr,
}

const _: () = assert!(size_of::<EntryOut>() == 128);

/// `struct fuse_attr_out`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttrOut {
    pub attr_valid: u64,
    pub attr_valid_nsec: u32,
    pub dummy: u32,
    pub attr: Attr,
}

const _: () = assert!(size_of::<AttrOut>() == 104);

/// `struct fuse_open_out`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenOut {
    pub fh: u64,
    pub open_flags: u32,
    pub backing_id: i32,
}

const _: () = assert!(size_of::<OpenOut>() == 16);

/// `struct fuse_statfs_out`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatfsOut {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
    pub bsize: u32,
    pub namelen: u32,
    pub frsize: u32,
    pub padding: u32,
    pub spare: [u32; 6],
}

const _: () = assert!(size_of::<StatfsOut>() == 80);

/// `struct fuse_getxattr_out`: the length that a value or a list of names has.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XattrOut {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_dirent`; the name follows, padded to 8 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Dirent {
    pub ino: u64,
    pub off: u64,
    pub namelen: u32,
    pub kind: u32,
}

const _: () = assert!(size_of::<Dirent>() == 24);

impl Node {
    fn attr(&self) -> Attr {
        let Times { access, data, change } = self.times;
        Attr {
            ino: self.ino,
            size: self.size,
            blocks: self.blocks,
            atime: access.0.cast_unsigned(),
            mtime: data.0.cast_unsigned(),
            ctime: change.0.cast_unsigned(),
            atimensec: access.1,
            mtimensec: data.1,
            ctimensec: change.1,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            blksize: self.block_size,
            flags: 0,
        }
    }

    /// The answer to who asked for the node by its number.
    pub fn attributes(&self) -> AttrOut {
        AttrOut { attr_valid: self.trust.0, attr_valid_nsec: 0, dummy: 0, attr: self.attr() }
    }

    /// The answer to who asked for it by its name.
    pub fn entry(&self) -> EntryOut {
        EntryOut {
            nodeid: self.id,
            entry_valid: self.trust.0,
            attr_valid: self.trust.0,
            attr: self.attr(),
            ..EntryOut::default()
        }
    }
}

/// The answer that there is no such name.
pub fn no_entry(trust: Trust) -> EntryOut {
    EntryOut { entry_valid: trust.0, ..EntryOut::default() }
}

/// The answer to an open, of a kernel that asks. What is `stable` stays in the kernel's memory from one open to
/// the next.
pub fn opened(is_directory: bool, is_stable: bool) -> OpenOut {
    const KEEP_CACHE: u32 = 1 << 1;
    const CACHE_DIR: u32 = 1 << 3;
    let kept = KEEP_CACHE | if is_directory { CACHE_DIR } else { 0 };
    OpenOut { fh: 0, open_flags: if is_stable { kept } else { 0 }, backing_id: 0 }
}

impl Statistics {
    /// The answer; the file system is full.
    pub fn answer(&self) -> StatfsOut {
        StatfsOut {
            blocks: self.blocks,
            files: self.files,
            bsize: self.block_size,
            frsize: self.block_size,
            namelen: 255,
            ..StatfsOut::default()
        }
    }
}

/// One name of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    pub name: &'a [u8],
    pub ino: u64,
    /// As in `d_type`.
    pub kind: u8,
    /// Where to go on behind it; never 0.
    pub next: u64,
}

/// The entries of a directory that fit into one answer.
#[derive(Debug)]
pub struct Listing<'a> {
    room: &'a mut [u8],
    len: usize,
}

impl<'a> Listing<'a> {
    /// A listing in `room`, of which nothing is taken yet.
    pub fn new(room: &'a mut [u8]) -> Self {
        Self { room, len: 0 }
    }

    /// Bytes that are taken.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no name in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a name. `false` if it does not fit: nothing was added, and nothing more is to be.
    pub fn add(&mut self, listed: &Listed<'_>) -> bool {
        self.put(None, listed)
    }

    /// Adds a name with what it is; `None` if that is not to be told: of `.` and `..`, and of what is damaged.
    pub fn add_node(&mut self, node: Option<&Node>, listed: &Listed<'_>) -> bool {
        self.put(Some(node.map_or_else(EntryOut::default, Node::entry)), listed)
    }

    fn put(&mut self, entry: Option<EntryOut>, listed: &Listed<'_>) -> bool {
        let Ok(namelen) = u32::try_from(listed.name.len()) else { return false };
        let dirent = Dirent { ino: listed.ino, off: listed.next, namelen, kind: listed.kind.into() };
        let entry = entry.as_ref().map_or(&[][..], IntoBytes::as_bytes);
        let named = size_of_val(&dirent) + listed.name.len();
        let padding = [0; 8];
        let parts = [entry, dirent.as_bytes(), listed.name, &padding[..named.next_multiple_of(8) - named]];
        let len = parts.iter().map(|part| part.len()).sum();
        let Some(mut room) = self.room.get_mut(self.len..).and_then(|room| room.get_mut(..len)) else { return false };
        for part in parts {
            let (here, behind) = room.split_at_mut(part.len());
            here.copy_from_slice(part);
            room = behind;
        }
        self.len += len;
        true
    }
}

/// Names of extended attributes, each ended by a NUL.
pub fn put_name(names: &mut Vec<u8>, parts: [&[u8]; 2]) {
    parts.iter().for_each(|part| names.extend_from_slice(part));
    names.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node() -> Node {
        Node {
            id: 9,
            ino: 7,
            mode: libc::S_IFREG | 0o644,
            nlink: 2,
            uid: 1000,
            gid: 1001,
            rdev: 0,
            size: 5000,
            blocks: 16,
            block_size: 4096,
            times: Times { access: (1, 2), data: (-1, 5), change: (3, 4) },
            trust: Trust::SHORT,
        }
    }

    #[test]
    fn attributes_lie_where_the_kernel_looks_for_them() {
        let (entry, attributes) = (node().entry(), node().attributes());
        let bytes = entry.as_bytes();
        let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((long(0), long(40), long(48), long(56)), (9, 7, 5000, 16));
        assert_eq!((long(16), long(24)), (1, 1));
        // Before 1970: the kernel takes the same bits.
        assert_eq!((long(64), long(72), long(80)), (1, u64::MAX, 3));
        assert_eq!((word(40 + 48), word(40 + 52), word(40 + 56)), (2, 5, 4));
        assert_eq!((word(40 + 60), word(40 + 64), word(40 + 68), word(40 + 72)), (0o100_644, 2, 1000, 1001));
        assert_eq!(attributes.as_bytes()[16..], bytes[40..]);
    }

    #[test]
    fn a_listing_ends_before_the_name_that_does_not_fit() {
        let listed = |name| Listed { name, ino: 3, kind: libc::DT_REG, next: 4 };
        let mut bytes = vec![1; 32 + 40];
        let mut listing = Listing::new(&mut bytes);
        assert!(listing.add(&listed(b"12345678")));
        assert!(listing.add(&listed(b"123456789")));
        assert!(!listing.add(&listed(b"")));
        assert_eq!(listing.len(), 32 + 40);
        assert_eq!(bytes[32 + 24..][..16], *b"123456789\0\0\0\0\0\0\0");
        assert_eq!((bytes[0], bytes[8], bytes[16], bytes[20]), (3, 4, 8, 8));

        let mut bytes = vec![1; 128 + 32 + 31];
        let mut listing = Listing::new(&mut bytes);
        assert!(listing.is_empty());
        assert!(listing.add_node(Some(&node()), &listed(b"a")));
        assert!(!listing.add(&listed(b"b")));
        assert_eq!(listing.len(), 160);
    }

    #[test]
    fn an_errno_that_the_kernel_would_not_take_becomes_eio() {
        assert_eq!(failure(1, libc::ENOENT).error, -libc::ENOENT);
        for wrong in [0, -5, 512, i32::MAX, i32::MIN] {
            assert_eq!(failure(1, wrong).error, -libc::EIO);
        }
    }
}
