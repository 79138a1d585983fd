//! The directories between the target and where we are.
//!
//! Every step goes from an open directory to a name in it and follows no symbolic link, so no
//! name in an image and nothing that is replaced meanwhile leads out of the target. The innermost
//! directories are kept open; the others are found again from the target, in steps that are short
//! enough for the kernel. So neither depth nor the length of paths has a limit.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::image::Inode;

/// Directories kept open: far below any limit of descriptors, and more levels than most trees have.
const OPEN: usize = 64;
/// Bytes of a path given to the kernel at once; its limit is 4095.
const STEP: usize = 3800;

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Opens `name` relative to `dir`, beneath it and through no link or mount.
pub(super) fn open_beneath(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags, mode: u32) -> io::Result<OwnedFd> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(dir, name, flags | OFlags::CLOEXEC, Mode::from_raw_mode(mode), resolve)?)
}

#[derive(Debug)]
pub(super) struct Levels {
    root: OwnedFd,
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    name: Box<[u8]>,
    inode: Inode,
    identity: (u64, u64),
    fd: Option<OwnedFd>,
}

impl Levels {
    /// No level yet; `root` is where the children of the image's root belong.
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root, levels: Vec::new() }
    }

    /// Directories entered below the root.
    pub(super) fn depth(&self) -> usize {
        self.levels.len()
    }

    /// The directory we are in.
    pub(super) fn here(&mut self) -> io::Result<BorrowedFd<'_>> {
        let Some(level) = self.levels.last() else { return Ok(self.root.as_fd()) };
        if level.fd.is_none() {
            let names: Vec<&[u8]> = self.levels.iter().map(|level| &*level.name).collect();
            let fd = self.find(&names.join(&b'/'))?;
            if identity(fd.as_fd())? != level.identity {
                return Err(io::Error::other("the directory was replaced while it was written"));
            }
            self.levels.last_mut().expect("seen above").fd = Some(fd);
        }
        Ok(self.levels.last().and_then(|level| level.fd.as_ref()).expect("opened above").as_fd())
    }

    /// Opens the directory at `path` below the root; an empty path is the root.
    pub(super) fn find(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let mut fd = open_beneath(self.root.as_fd(), b".", OPEN_DIRECTORY, 0)?;
        let mut rest = path;
        while !rest.is_empty() {
            let cut = if rest.len() <= STEP { None } else { rest[..STEP].iter().rposition(|b| *b == b'/') };
            let (step, behind) = cut.map_or((rest, &[][..]), |cut| (&rest[..cut], &rest[cut + 1..]));
            fd = open_beneath(fd.as_fd(), step, OPEN_DIRECTORY, 0)?;
            rest = behind;
        }
        Ok(fd)
    }

    /// Makes the directory `name` and enters it. Nobody else may enter it until it is finished.
    pub(super) fn enter(&mut self, name: &[u8], inode: Inode) -> io::Result<()> {
        let here = self.here()?;
        rustix::fs::mkdirat(here, name, Mode::from_raw_mode(0o700))?;
        let fd = open_beneath(here, name, OPEN_DIRECTORY, 0)?;
        let identity = identity(fd.as_fd())?;
        self.levels.push(Level { name: name.into(), inode, identity, fd: Some(fd) });
        if let Some(outer) = self.levels.len().checked_sub(OPEN + 1) {
            self.levels[outer].fd = None;
        }
        Ok(())
    }

    /// Leaves the directory we are in: gives it back, with its name, to be finished.
    pub(super) fn leave(&mut self) -> io::Result<(OwnedFd, Box<[u8]>, Inode)> {
        self.here()?;
        let level = self.levels.pop().expect("somewhere to leave");
        Ok((level.fd.expect("opened by here()"), level.name, level.inode))
    }

    /// Path of the directory we are in, below the root.
    pub(super) fn path(&self) -> Vec<&[u8]> {
        self.levels.iter().map(|level| &*level.name).collect()
    }
}

fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
