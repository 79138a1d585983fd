//! An image as a directory or as a tar archive, with every attribute.
//!
//! Both go through the image in the order of its names and read content through
//! [`FileReader`](crate::reader::FileReader), so nothing is written that was not checked.

mod archive;
mod attributes;
mod directory;
mod header;
mod levels;
mod staging;

pub use archive::{to_archive, to_stream};
pub use directory::to_directory;

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::Serialize;

use crate::build::Progress;
use crate::image::{Image, ImageError, Kind};
use crate::reader::ReadError;

/// What may be left out where it cannot be kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnpackOptions {
    /// Leave files to the user who unpacks. Set-id bits of files of somebody else are dropped.
    pub no_same_owner: bool,
    /// Leave out character and block devices.
    pub skip_devices: bool,
    /// Leave out extended attributes that the file system or the lack of a privilege refuses.
    pub skip_xattrs: bool,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UnpackReport {
    /// The root is one of them.
    pub directories: u64,
    /// Regular files by content: a file with several names counts once.
    pub files: u64,
    pub symlinks: u64,
    /// Devices, FIFOs and sockets.
    pub specials: u64,
    /// Names beyond the first of their files.
    pub hard_links: u64,
    /// Bytes of all regular files, each counted once, holes included.
    pub bytes: u64,
    pub skipped: Skipped,
}

/// What was left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Entries whose owner is another one than in the image.
    pub owners: u64,
    pub devices: u64,
    pub xattrs: u64,
    /// Names of sockets, which an archive has no place for.
    pub sockets: u64,
}

/// Why an image was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The image makes no sense.
    #[error("the image is damaged at /{}", path.display())]
    Image {
        path: PathBuf,
        #[source]
        cause: ImageError,
    },
    /// The content of a file could not be had.
    #[error("cannot read /{} of the image", path.display())]
    Content {
        path: PathBuf,
        #[source]
        cause: Box<ReadError>,
    },
    /// Something could not be written.
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    /// A directory of the image has a name twice.
    #[error("/{} is in the image twice", path.display())]
    Twice { path: PathBuf },
    /// Whoever unpacks may not give files away.
    #[error("/{} belongs to {uid}:{gid}, which you may not set; --no-same-owner leaves files to you", path.display())]
    Owner { path: PathBuf, uid: u32, gid: u32 },
    /// Whoever unpacks may not make devices.
    #[error("/{} is a device, which you may not make; --skip-devices leaves devices out", path.display())]
    Device { path: PathBuf },
    /// An extended attribute cannot be kept.
    #[error("xattr {name} of /{} cannot be set; --skip-xattrs leaves out what cannot be set", path.display())]
    Xattr { path: PathBuf, name: String, source: io::Error },
    /// The target has something in it.
    #[error("{} is not empty; choose a directory that is empty or does not exist", path.display())]
    NotEmpty { path: PathBuf },
    /// Whoever reads our output has stopped, or its disk is full.
    #[error("cannot write the archive")]
    Stream(#[source] io::Error),
}

/// Names from the root as one path without a leading slash; empty for the root.
fn path_of(names: &[&[u8]]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&names.join(&b'/')))
}

/// Major and minor number out of a device number as the kernel encodes it.
fn device(rdev: u32) -> (u32, u32) {
    (rdev >> 8 & 0xfff, rdev & 0xff | rdev >> 12 & 0xfff00)
}

/// Tells `progress` how much there is to do, if it is worth a walk.
fn announce(image: &Image, progress: &dyn Progress) {
    if !progress.wants_total() {
        return;
    }
    let (mut entries, mut bytes, mut linked, mut walk) = (0, 0u64, HashSet::new(), image.walk());
    // Damage is met again, and reported, when the entry is written.
    while let Some(Ok(step)) = walk.next_visit() {
        entries += 1;
        let is_first = step.inode.nlink == 1 || linked.insert(step.inode.nid);
        if step.inode.kind == Kind::Regular && is_first {
            bytes = bytes.saturating_add(step.inode.size);
        }
    }
    progress.total(entries, bytes);
}

impl UnpackReport {
    /// Counts a name that is not a hard link.
    fn count(&mut self, kind: Kind, size: u64) {
        match kind {
            Kind::Directory => self.directories += 1,
            Kind::Regular => {
                self.files += 1;
                self.bytes += size;
            }
            Kind::Symlink => self.symlinks += 1,
            Kind::Character | Kind::Block | Kind::Fifo | Kind::Socket => self.specials += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_taken_apart_as_the_kernel_puts_them_together() {
        assert_eq!(device(0x0103), (1, 3));
        assert_eq!(device(0xffff_ffff), (0xfff, 0xf_ffff));
        assert_eq!(device(0x0011_032c), (259, 300));
    }
}
