//! Requests of `/dev/fuse`: bytes in, questions out.
//!
//! Records are those of `include/uapi/linux/fuse.h` of Linux 6.18, in the byte order of the host. Nothing here
//! does I/O or trusts a length: whatever does not fit is a [`WireError`], which says whom an error is owed.
//! A read-only server takes about twenty kinds of request; the others are told by number.

use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Least length of the buffer that requests are read into, in bytes (`FUSE_MIN_READ_BUFFER`). Enough for all
/// requests as long as no more than [`super::negotiation::MAX_WRITE`] bytes may be written at once.
pub const REQUEST_BUFFER: usize = 8192;

/// The number of the root.
pub const ROOT: NodeId = 1;

/// Bit of [`Request::unique`] that the kernel sets when it sends a request again (Linux 6.9).
pub const RESENT: u64 = 1 << 63;

/// Names a file, directory or link of a connection. 0 names nothing.
pub type NodeId = u64;

/// What every request begins with (`struct fuse_in_header`).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RequestHead {
    /// Of the whole request, in bytes.
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    /// Of extensions behind the body, in units of 8 bytes.
    pub extensions: u16,
    pub padding: u16,
}

const _: () = assert!(size_of::<RequestHead>() == 40);
const _: () = assert!(offset_of!(RequestHead, extensions) == 36);

/// What the kernel offers (`struct fuse_init_in`). Before 7.36 it ends behind `flags`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub flags2: u32,
    pub unused: [u32; 11],
}

const _: () = assert!(size_of::<InitIn>() == 64);

/// Bytes of [`InitIn`] that every kernel sends.
const SHORT_INIT: usize = offset_of!(InitIn, flags2);

/// `struct fuse_read_in`, for files and for directories.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadIn {
    pub fh: u64,
    pub offset: u64,
    pub size: u32,
    pub read_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

const _: () = assert!(size_of::<ReadIn>() == 40);

/// `struct fuse_getxattr_in`, for both kinds of question.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct XattrIn {
    pub size: u32,
    pub padding: u32,
}

/// `struct fuse_batch_forget_in`; as many pairs of node and count follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct BatchForgetIn {
    pub count: u32,
    pub dummy: u32,
}

/// `struct fuse_interrupt_in`.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InterruptIn {
    /// Of the request that somebody waits for.
    pub unique: u64,
}

/// Kinds of request (`enum fuse_opcode`).
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
}

/// One request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Names the request in its answer.
    pub unique: u64,
    /// What the question is about, if it is about one node.
    pub node: NodeId,
    /// Who asks, as the owner of the mount would call him; 0 for some questions of the kernel itself.
    pub uid: u32,
    /// The thread that asks; 0 if it is the kernel, or out of sight.
    pub pid: u32,
    pub question: Question<'a>,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question<'a> {
    /// The first request: what the kernel offers.
    Init(InitIn),
    /// What has this name in the directory? The name has no NUL and no slash, and is not empty.
    Lookup(&'a [u8]),
    /// What is it?
    Attributes,
    /// Where does the link point to?
    Link,
    /// May it be opened, and how?
    Open,
    OpenDirectory,
    /// The end of an open. There is nothing to end.
    Release,
    /// Bytes of a file.
    Read {
        offset: u64,
        size: u32,
    },
    /// Entries of a directory behind those that were told; `with_nodes` wants to know what each one is.
    List {
        from: u64,
        size: u32,
        with_nodes: bool,
    },
    /// Facts about the whole.
    Statistics,
    /// The value of an extended attribute; its length, if `size` is 0.
    Xattr {
        name: &'a [u8],
        size: u32,
    },
    /// The names of all of them; their length, if `size` is 0.
    Xattrs {
        size: u32,
    },
    /// The kernel drops what it knew. No answer.
    Forget(Forgotten<'a>),
    /// Somebody who waits for the answer to the request `unique` was sent a signal. No answer.
    Interrupt {
        unique: u64,
    },
    /// The end of the connection.
    Destroy,
    /// Something would be changed.
    Change,
    /// Something that this server does not do.
    Other {
        opcode: u32,
    },
}

/// Nodes that the kernel drops, each with how often it had been told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten<'a> {
    /// The node that the question is about.
    One { told: u64 },
    /// So many as there are pairs of number and count in these bytes.
    Many(&'a [u8]),
}

impl Forgotten<'_> {
    /// Number and count of each, in a question about `node`.
    pub fn each(&self, node: NodeId, mut visit: impl FnMut(NodeId, u64)) {
        match self {
            Self::One { told } => visit(node, *told),
            Self::Many(pairs) => {
                let (pairs, _) = pairs.as_chunks::<{ size_of::<[u64; 2]>() }>();
                let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
                pairs.iter().for_each(|pair| visit(word(&pair[..8]), word(&pair[8..])));
            }
        }
    }
}

impl Question<'_> {
    /// Whether the kernel waits for an answer.
    pub fn wants_answer(&self) -> bool {
        !matches!(self, Self::Forget(_) | Self::Interrupt { .. })
    }
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Nobody can be answered.
    #[error("a request of {len} bytes has no head")]
    Short { len: usize },
    /// Nobody can be answered either: the head cannot be trusted.
    #[error("a request of {len} bytes claims {claimed}")]
    Length { len: usize, claimed: u32 },
    /// The body does not fit its kind.
    #[error("a request of kind {opcode} {rule}")]
    Body { unique: u64, opcode: u32, rule: &'static str },
}

impl WireError {
    /// Whom an error is owed, if anybody.
    pub fn owed_to(&self) -> Option<u64> {
        match *self {
            Self::Short { .. } | Self::Length { .. } => None,
            Self::Body { opcode: opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT, .. } => None,
            Self::Body { unique, .. } => Some(unique),
        }
    }
}

impl<'a> Request<'a> {
    /// The request that `bytes` are, as one read of the device gave them.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WireError> {
        let short = WireError::Short { len: bytes.len() };
        let (head, body) = RequestHead::read_from_prefix(bytes).map_err(|_| short)?;
        if head.len as usize != bytes.len() {
            return Err(WireError::Length { len: bytes.len(), claimed: head.len });
        }
        let wrong = |rule| WireError::Body { unique: head.unique, opcode: head.opcode, rule };
        let body_len = body.len().checked_sub(usize::from(head.extensions) * 8);
        let body = &body[..body_len.ok_or_else(|| wrong("claims more extensions than it has bytes"))?];
        let question = question(head.opcode, body).map_err(wrong)?;
        Ok(Self { unique: head.unique, node: head.node, uid: head.uid, pid: head.pid, question })
    }
}

fn question(opcode: u32, body: &[u8]) -> Result<Question<'_>, &'static str> {
    Ok(match opcode {
        opcode::INIT => Question::Init(init(body)?),
        opcode::LOOKUP => Question::Lookup(name(body)?),
        opcode::GETATTR => Question::Attributes,
        opcode::READLINK => Question::Link,
        opcode::OPEN => Question::Open,
        opcode::OPENDIR => Question::OpenDirectory,
        opcode::RELEASE | opcode::RELEASEDIR => Question::Release,
        opcode::READ => {
            let (read, _) = record::<ReadIn>(body)?;
            Question::Read { offset: read.offset, size: read.size }
        }
        opcode::READDIR | opcode::READDIRPLUS => {
            let (read, _) = record::<ReadIn>(body)?;
            let with_nodes = opcode == opcode::READDIRPLUS;
            Question::List { from: read.offset, size: read.size, with_nodes }
        }
        opcode::STATFS => Question::Statistics,
        opcode::GETXATTR => {
            let (xattr, rest) = record::<XattrIn>(body)?;
            Question::Xattr { name: text(rest)?, size: xattr.size }
        }
        opcode::LISTXATTR => Question::Xattrs { size: record::<XattrIn>(body)?.0.size },
        opcode::FORGET => Question::Forget(Forgotten::One { told: record::<u64>(body)?.0 }),
        opcode::BATCH_FORGET => {
            let (head, pairs) = record::<BatchForgetIn>(body)?;
            let len = usize::try_from(head.count).ok().and_then(|count| count.checked_mul(size_of::<[u64; 2]>()));
            let pairs = len.and_then(|len| pairs.get(..len)).ok_or("has fewer nodes than it claims")?;
            Question::Forget(Forgotten::Many(pairs))
        }
        opcode::INTERRUPT => Question::Interrupt { unique: record::<InterruptIn>(body)?.0.unique },
        opcode::DESTROY => Question::Destroy,
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::TMPFILE
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE => Question::Change,
        opcode => Question::Other { opcode },
    })
}

fn record<T: FromBytes + KnownLayout + Immutable>(body: &[u8]) -> Result<(T, &[u8]), &'static str> {
    T::read_from_prefix(body).map_err(|_| "has too short a body")
}

/// Old kernels send less, later ones may send more.
fn init(body: &[u8]) -> Result<InitIn, &'static str> {
    if body.len() < SHORT_INIT {
        return Err("has too short a body");
    }
    let mut whole = [0; size_of::<InitIn>()];
    let len = body.len().min(whole.len());
    whole[..len].copy_from_slice(&body[..len]);
    Ok(InitIn::read_from_bytes(&whole).expect("as long as the record"))
}

/// A text that ends with the only NUL in it.
fn text(bytes: &[u8]) -> Result<&[u8], &'static str> {
    match bytes.split_last() {
        Some((0, text)) if !text.is_empty() && !text.contains(&0) => Ok(text),
        _ => Err("has a name that is empty or not ended by its only NUL"),
    }
}

fn name(bytes: &[u8]) -> Result<&[u8], &'static str> {
    text(bytes).and_then(|name| if name.contains(&b'/') { Err("has a name with a slash") } else { Ok(name) })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A request as the kernel sends it.
    pub(in crate::export::fuse) fn request(opcode: u32, unique: u64, node: NodeId, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(size_of::<RequestHead>() + body.len()).unwrap();
        let head = RequestHead { len, opcode, unique, node, uid: 0, gid: 0, pid: 1, extensions: 0, padding: 0 };
        [head.as_bytes(), body].concat()
    }

    fn read_body(offset: u64, size: u32) -> Vec<u8> {
        let body = ReadIn { fh: 0, offset, size, read_flags: 0, lock_owner: 0, flags: 0, padding: 0 };
        body.as_bytes().to_vec()
    }

    #[test]
    fn questions_are_understood() {
        let xattr = [&[4, 0, 0, 0, 0, 0, 0, 0][..], b"user.a\0"].concat();
        let cases: [(u32, Vec<u8>, Question<'_>); 12] = [
            (opcode::LOOKUP, b"etc\0".to_vec(), Question::Lookup(b"etc")),
            (opcode::GETATTR, vec![0; 16], Question::Attributes),
            (opcode::READLINK, vec![], Question::Link),
            (opcode::READ, read_body(4096, 512), Question::Read { offset: 4096, size: 512 }),
            (opcode::READDIR, read_body(7, 4096), Question::List { from: 7, size: 4096, with_nodes: false }),
            (opcode::READDIRPLUS, read_body(0, 4096), Question::List { from: 0, size: 4096, with_nodes: true }),
            (opcode::GETXATTR, xattr, Question::Xattr { name: b"user.a", size: 4 }),
            (opcode::LISTXATTR, vec![0; 8], Question::Xattrs { size: 0 }),
            (opcode::FORGET, vec![1; 8], Question::Forget(Forgotten::One { told: 0x0101_0101_0101_0101 })),
            (opcode::MKDIR, b"anything".to_vec(), Question::Change),
            (opcode::STATFS, vec![], Question::Statistics),
            (4711, vec![1; 100], Question::Other { opcode: 4711 }),
        ];
        for (opcode, body, question) in cases {
            let bytes = request(opcode, 42, 7, &body);
            let expected = Request { unique: 42, node: 7, uid: 0, pid: 1, question };
            assert_eq!(Request::parse(&bytes), Ok(expected), "{opcode}");
        }
    }

    #[test]
    fn many_nodes_are_forgotten_at_once() {
        let words = [2u64, 11, 1, 12, 3];
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let forgotten = |body: &[u8]| {
            let bytes = request(opcode::BATCH_FORGET, 9, 0, body);
            let Question::Forget(forgotten) = Request::parse(&bytes)?.question else { panic!("something else") };
            let mut each = Vec::new();
            forgotten.each(7, |node, told| each.push((node, told)));
            Ok::<_, WireError>(each)
        };
        assert_eq!(forgotten(&body).unwrap(), [(11, 1), (12, 3)]);
        body[0] = 1;
        assert_eq!(forgotten(&body).unwrap(), [(11, 1)], "what follows is none of it");
        body[0] = 3;
        assert_eq!(forgotten(&body).unwrap_err().owed_to(), None);
    }

    #[test]
    fn old_and_future_kernels_are_understood() {
        let words = [7u32, 31, 131_072, 0x3fff_fffb, 5];
        let long: Vec<u8> = words.iter().chain(&[0; 20]).flat_map(|word| word.to_ne_bytes()).collect();
        let (old, new) = (request(opcode::INIT, 2, 0, &long[..16]), request(opcode::INIT, 2, 0, &long));
        let flags2 = |bytes: &[u8]| match Request::parse(bytes).unwrap().question {
            Question::Init(init) => (init.minor, init.flags2),
            other => panic!("{other:?}"),
        };
        assert_eq!((flags2(&old), flags2(&new)), ((31, 0), (31, 5)));
    }

    #[test]
    fn damaged_requests_are_refused_and_only_those_who_wait_are_owed_an_answer() {
        let whole = request(opcode::READ, 9, 1, &read_body(0, 1));
        for len in 0..40 {
            assert_eq!(Request::parse(&whole[..len]), Err(WireError::Short { len }));
        }
        for len in 40..whole.len() {
            let error = Request::parse(&whole[..len]).unwrap_err();
            assert_eq!((error, error.owed_to()), (WireError::Length { len, claimed: 80 }, None));
        }
        for body in [&b""[..], b"\0", b"a", b"a\0b\0", b"a/b\0"] {
            let bytes = request(opcode::LOOKUP, 9, 1, body);
            assert_eq!(Request::parse(&bytes).unwrap_err().owed_to(), Some(9), "{body:?}");
        }
        for opcode in [opcode::FORGET, opcode::BATCH_FORGET, opcode::INTERRUPT] {
            let mut bytes = request(opcode, 9, 1, &[]);
            bytes[offset_of!(RequestHead, extensions)] = 1;
            assert_eq!(Request::parse(&bytes).unwrap_err().owed_to(), None);
        }
        let mut bytes = request(opcode::LOOKUP, 9, 1, b"name\0\0\0\0");
        bytes[offset_of!(RequestHead, extensions)] = 2;
        assert_eq!(Request::parse(&bytes).unwrap_err().owed_to(), Some(9));
    }
}
