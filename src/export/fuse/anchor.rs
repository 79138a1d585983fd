//! A regular file that the kernel has in memory, for as long as it is made to ask for nothing.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fstat};

use super::wire::NodeId;
use super::{Anchor, Connection};
use crate::sys::descriptors::alone;
use crate::sys::inotify::device_numbers;
use crate::sys::mount::mount_table;
use crate::sys::sandbox::Sandbox;

/// Files of which the kernel has one, while this lives.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) nodes: Range<NodeId>,
    _file: Option<OwnedFd>,
}

impl Held {
    /// Those of a connection that is answered. Blocks.
    ///
    /// # Errors
    /// `NotFound` if it is mounted at no place that this process can see, or has no file.
    pub(super) fn find(connection: &Connection, sandbox: &Sandbox) -> io::Result<Self> {
        let none = || io::Error::new(io::ErrorKind::NotFound, "it has no file at a place that can be seen");
        match connection.tree.anchor().ok_or_else(none)? {
            Anchor::Open(nodes) => Ok(Self { nodes, _file: None }),
            Anchor::Path(node, path) => {
                let numbers = connection.numbers().ok_or_else(none)?;
                // Once by a thread that may wait for an answer for ever; then the kernel knows the way.
                let ask = || alone(&[], || open(numbers, &path).map(drop))?;
                let file = sandbox.try_outside(|| ask().and_then(|()| open(numbers, &path)?.ok_or_else(none)))?;
                Ok(Self { nodes: node..node + 1, _file: Some(file) })
            }
        }
    }
}

/// The file `path` of the file system with these device numbers, wherever it is mounted, and without opening it: that
/// would be told to the server.
fn open(numbers: (u32, u32), path: &[u8]) -> io::Result<Option<OwnedFd>> {
    let device = format!("{}:{}", numbers.0, numbers.1);
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    for mount in mount_table()?.iter().filter(|mount| mount.device == device) {
        // Another one may be mounted over it, or a part of it only.
        let root = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&mount.target);
        let Ok(root) = root else { continue };
        let file = openat(&root, OsStr::from_bytes(path), flags, Mode::empty());
        let is_there = |file: &OwnedFd| fstat(file).is_ok_and(|stat| device_numbers(stat.st_dev).ok() == Some(numbers));
        if let Some(file) = file.ok().filter(is_there) {
            return Ok(Some(file));
        }
    }
    Ok(None)
}
