//! A FUSE server of our own.
//!
//! [`wire`] and [`reply`] are the protocol in pure functions, [`negotiation`] is what is agreed upon at the
//! start of a connection. [`Fuse`] has the threads that read requests of all connections; each
//! [`Connection`] answers from a [`Tree`], a closed set of questions about names and bytes.
//!
//! No thread waits for data: a read that misses is handed to [`Fill`](crate::cache::Fill) together with the
//! duty to answer it, and whoever completes the fill answers. There are no handles, and numbers of nodes are a
//! pure function of what they name, so nothing needs to be known about what the kernel has looked up: a
//! connection can go on in another process with the device, the tree, and what was [`Negotiated`]. Only a tree
//! that changes while it is shown, `blobfs`, has to write its numbers down.
//!
//! Where it is wanted and the kernel has it, requests come over io_uring instead (`ring`): the same questions and
//! the same answers, carried by other threads.
//!
//! All threads read one descriptor. A clone of it would take its unanswered requests with it when the process
//! dies (`fuse-notes.md` section 6).

mod anchor;
mod attach;
mod blobfs;
mod connection;
mod device;
mod duty;
mod interrupts;
mod lasting;
pub mod negotiation;
mod read;
pub mod reply;
mod ring;
pub(super) mod selftest;
mod server;
pub mod tree;
pub mod wire;

pub use attach::{Attachment, unmount_unprivileged};
pub use blobfs::{Blobfs, BlobfsError, Place};
pub use connection::Connection;
pub use device::Over;
pub(in crate::export) use device::{TryError, try_device};
pub use lasting::{AnnounceLasting, Keep, Lasting, Legacy, Part};
pub use negotiation::{Negotiated, Wishes};
pub use ring::{Lane, Lanes, NoLanes, Unavailable, availability};
pub use server::{Connected, Fuse};

use std::borrow::Cow;
use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Arc;

use self::reply::{Listed, Node, Statistics, Trust};
use self::wire::NodeId;
use super::Backing;
use crate::base::ByteRange;
use crate::image::ImageError;

/// What a connection serves. All of it is known without waiting, except for the bytes of devices.
pub trait Tree: Send + Sync {
    /// What is wanted of the kernel.
    fn wishes(&self) -> Wishes;

    /// What is called `name` in the directory `parent`; `None` if nothing is. `.` and `..` are asked for by who
    /// has a handle of a file, and only of trees that wish for that. The kernel is told of it: see [`Tree::forget`].
    fn find(&self, parent: NodeId, name: &[u8]) -> Result<Option<Node>, TreeError>;

    /// What `id` names.
    fn node(&self, id: NodeId) -> Result<Node, TreeError>;

    /// Where the symbolic link `id` points to.
    fn link(&self, id: NodeId) -> Result<Cow<'_, [u8]>, TreeError>;

    /// Visits the names in the directory `id` from place `from` on, 0 for the start, until `visit` breaks
    /// off. With each comes what it names, if `with_nodes` is set and it is sound and neither `.` nor `..`.
    fn list(&self, id: NodeId, from: u64, with_nodes: bool, visit: &mut Visit<'_>) -> Result<(), TreeError>;

    /// Visits what the bytes `range` of the file `id` are made of, in order and without a gap, up to the end
    /// of the file.
    fn pieces(&self, id: NodeId, range: ByteRange, visit: &mut dyn FnMut(Piece<'_>)) -> Result<(), TreeError>;

    /// The value of an extended attribute.
    fn xattr(&self, id: NodeId, name: &[u8]) -> Result<Cow<'_, [u8]>, TreeError>;

    /// The names of all extended attributes, each ended by a NUL, with those of the namespace `trusted` if
    /// that `is_trusted`.
    fn xattrs(&self, id: NodeId, is_trusted: bool) -> Result<Vec<u8>, TreeError>;

    /// A regular file that the kernel can be made to have in memory, or has anyway.
    fn anchor(&self) -> Option<Anchor>;

    /// Facts about the whole.
    fn statistics(&self) -> Statistics;

    /// How long it may be believed that a directory has no such name.
    fn trust_in_absence(&self) -> Trust {
        Trust::FOR_EVER
    }

    /// Somebody opens `id`, of a tree that may change. Tells whether what the kernel knows of it still holds.
    fn open(&self, _id: NodeId) -> Result<bool, TreeError> {
        Ok(true)
    }

    /// One who had opened `id` has closed it.
    fn close(&self, _id: NodeId) {}

    /// The kernel has dropped `id`, of which [`Tree::find`] has told it as often as `told` says, if it was not
    /// told again since.
    fn forget(&self, _id: NodeId, _told: u64) {}
}

/// How requests come, and answers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// Reads and writes of `/dev/fuse`.
    Dev,
    /// io_uring (Linux 6.14, where it is switched on).
    IoUring,
}

impl std::fmt::Display for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dev => "dev",
            Self::IoUring => "io-uring",
        })
    }
}

/// Told of one name of a directory.
pub type Visit<'v> = dyn FnMut(&Listed<'_>, Option<&Node>) -> ControlFlow<()> + 'v;

/// A regular file, through which the kernel can be made to ask for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// One with this path, from the root on.
    Path(NodeId, Vec<u8>),
    /// One of these is open, or nobody reads anything.
    Open(std::ops::Range<NodeId>),
}

/// Some bytes of a file.
#[derive(Clone, Copy)]
pub enum Piece<'a> {
    /// So many zeros.
    Zeros(u64),
    /// Bytes that are known.
    Bytes(&'a [u8]),
    /// A range of a device.
    Device(&'a Arc<dyn Backing>, ByteRange),
    /// A range of a file that is there, as far as it goes: nothing may follow.
    File(&'a File, ByteRange),
}

impl std::fmt::Debug for Piece<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Zeros(len) => f.debug_tuple("Zeros").field(len).finish(),
            Self::Bytes(bytes) => f.debug_tuple("Bytes").field(&bytes.len()).finish(),
            Self::Device(_, decoded) => f.debug_tuple("Device").field(decoded).finish(),
            Self::File(_, range) => f.debug_tuple("File").field(range).finish(),
        }
    }
}

/// Why a tree cannot answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    #[error("there is no node of that number")]
    NoNode,
    #[error("it is no directory")]
    NotADirectory,
    #[error("it is a directory")]
    IsADirectory,
    /// Something else was asked of it than it can be asked.
    #[error("it is of another kind")]
    OtherKind,
    /// The kernel lets names of up to 1024 bytes through.
    #[error("no name is as long as {len} bytes")]
    LongName { len: usize },
    #[error("it has no such attribute")]
    NoXattr,
    /// Nothing in the tree has any.
    #[error("there are no extended attributes")]
    NoXattrs,
    #[error("the image is damaged")]
    Damaged(#[source] ImageError),
    /// What was there when the kernel was told of it is there no more.
    #[error("it was removed, renamed or replaced")]
    Gone,
    /// The file system below says so.
    #[error("the host's file cannot be used")]
    Host(#[source] rustix::io::Errno),
    /// Asked by this process itself, which wants to know that it is asked.
    #[error("nothing is read while the way is tried out")]
    Probed,
}

impl TreeError {
    /// What whoever asks is told. The only place where a refusal turns into a number.
    pub fn errno(&self) -> i32 {
        match self {
            Self::NoNode | Self::Gone => libc::ESTALE,
            Self::NotADirectory => libc::ENOTDIR,
            Self::IsADirectory => libc::EISDIR,
            Self::OtherKind => libc::EINVAL,
            Self::LongName { .. } => libc::ENAMETOOLONG,
            Self::NoXattr => libc::ENODATA,
            // The kernel does not ask again.
            Self::NoXattrs => libc::ENOSYS,
            // As EROFS itself.
            Self::Damaged(_) => libc::EUCLEAN,
            // By this the kernel would learn that nothing of the kind is ever answered.
            Self::Host(rustix::io::Errno::NOSYS) => libc::EOPNOTSUPP,
            Self::Host(errno) => errno.raw_os_error(),
            Self::Probed => libc::EIO,
        }
    }
}
