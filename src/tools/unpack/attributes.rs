//! Owner, xattrs, mode and time of what has just been made.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use super::{Skipped, UnpackOptions};
use crate::image::{Image, ImageError, Inode, Kind};

/// A descriptor of something that was made.
#[derive(Clone, Copy, Debug)]
pub(super) enum Made<'a> {
    /// Open for use: a regular file or a directory.
    Open(BorrowedFd<'a>),
    /// Stands for the inode only (`O_PATH`): a symbolic link or a special file.
    Path(BorrowedFd<'a>),
}

/// What could not be set.
#[derive(Debug)]
pub(super) enum Refused {
    Image(ImageError),
    Owner,
    Xattr { name: Vec<u8>, errno: Errno },
    Other(io::Error),
}

impl From<Errno> for Refused {
    fn from(errno: Errno) -> Self {
        Self::Other(errno.into())
    }
}

/// Gives `made` the attributes of `inode`. The order matters: changing the owner takes set-id bits
/// and capabilities away, setting an access list changes the mode, and the time comes last.
pub(super) fn apply(
    image: &Image,
    inode: &Inode,
    made: Made<'_>,
    options: &UnpackOptions,
    skipped: &mut Skipped,
) -> Result<(), Refused> {
    let is_owned = set_owner(inode, made, options)?;
    if !is_owned {
        skipped.owners += 1;
    }
    set_xattrs(image, inode, made, options, skipped)?;
    if inode.kind != Kind::Symlink {
        let set_id = if is_owned { 0 } else { 0o6000 };
        let mode = Mode::from_raw_mode(u32::from(inode.permissions & !set_id));
        match made {
            Made::Open(fd) => rustix::fs::fchmod(fd, mode)?,
            Made::Path(fd) => rustix::fs::chmod(proc_path(fd), mode)?,
        }
    }
    let (seconds, nanos) = inode.mtime;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
    };
    Ok(rustix::fs::utimensat(made.fd(), c"", &times, AtFlags::EMPTY_PATH)?)
}

impl<'a> Made<'a> {
    fn fd(self) -> BorrowedFd<'a> {
        match self {
            Self::Open(fd) | Self::Path(fd) => fd,
        }
    }
}

/// Whether the file now has the owner that the image gives it.
fn set_owner(inode: &Inode, made: Made<'_>, options: &UnpackOptions) -> Result<bool, Refused> {
    if options.no_same_owner {
        let stat = rustix::fs::fstat(made.fd())?;
        return Ok((stat.st_uid, stat.st_gid) == (inode.uid, inode.gid));
    }
    // The kernel reads -1 as "leave it", so an image that says it cannot be obeyed.
    if inode.uid == u32::MAX || inode.gid == u32::MAX {
        return Err(Refused::Owner);
    }
    let (uid, gid) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
    match rustix::fs::chownat(made.fd(), c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH) {
        Ok(()) => Ok(true),
        // What has no place in a user namespace is INVAL.
        Err(Errno::PERM | Errno::INVAL) => Err(Refused::Owner),
        Err(errno) => Err(errno.into()),
    }
}

fn set_xattrs(
    image: &Image,
    inode: &Inode,
    made: Made<'_>,
    options: &UnpackOptions,
    skipped: &mut Skipped,
) -> Result<(), Refused> {
    let mut outcome = Ok(());
    let walked = image.xattrs(inode, &mut |xattr| {
        let name = xattr.name();
        let set = match made {
            Made::Open(fd) => rustix::fs::fsetxattr(fd, &*name, xattr.value, XattrFlags::empty()),
            Made::Path(fd) => rustix::fs::setxattr(proc_path(fd), &*name, xattr.value, XattrFlags::empty()),
        };
        match set {
            Ok(()) => {}
            // No room is among the reasons: ext4 says so of a value longer than a block.
            Err(_) if options.skip_xattrs => skipped.xattrs += 1,
            Err(errno) => outcome = Err(Refused::Xattr { name, errno }),
        }
        if outcome.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    outcome.and(walked.map_err(Refused::Image))
}

/// The name that `/proc` gives to what is behind a descriptor; it leads there and nowhere else.
fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}
