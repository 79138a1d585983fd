//! Proof that reads of a mount reach us, made before anybody else can see the mount.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Backing;
use crate::base::{BLOCK, ByteRange};
use crate::image::{Extent, Image, ImageError, Kind};

/// A byte of a file that lies in a part of its device that is not filled yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ColdByte {
    /// Names from the root.
    pub(super) path: Vec<Vec<u8>>,
    /// Position in the file.
    pub(super) at: u64,
    /// Position in [`Image::devices`].
    pub(super) device: usize,
}

/// One cold byte for each device that has one.
///
/// Damaged inodes are passed over: they are the reader's problem, not the mount's.
pub(super) fn find_cold(image: &Image, devices: &[impl AsRef<dyn Backing>]) -> Result<Vec<ColdByte>, ImageError> {
    let mut wanted: Vec<bool> = devices.iter().map(|device| !device.as_ref().is_settled()).collect();
    let mut found = Vec::new();
    let mut walk = image.walk();
    while wanted.contains(&true) {
        let Some(step) = walk.next_visit() else { break };
        let Ok(step) = step else { continue };
        if step.inode.kind != Kind::Regular {
            continue;
        }
        let mut visit = |extent: Extent<'_>| {
            if let Extent::Device { at, device, decoded } = extent
                && wanted[device]
                && !devices[device].as_ref().present(first_block(decoded))
            {
                wanted[device] = false;
                let path = step.path.iter().map(|name| name.to_vec()).collect();
                found.push(ColdByte { path, at, device });
            }
            ControlFlow::Continue(())
        };
        // Extents before a damaged one have been looked at; that is all that is wanted here.
        let _ = image.extents(&step.inode, &mut visit);
    }
    Ok(found)
}

fn first_block(decoded: ByteRange) -> ByteRange {
    ByteRange::at(decoded.start(), BLOCK).expect("a device is shorter than 2^44 bytes")
}

impl ColdByte {
    /// Reads the byte through the mount whose root is `root`. Blocks until the read is answered.
    pub(super) fn read(&self, root: &impl AsFd) -> io::Result<()> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // Name by name: the whole path may be longer than one call accepts.
        let mut at: OwnedFd = root.as_fd().try_clone_to_owned()?;
        for name in &self.path {
            at = openat(&at, OsStr::from_bytes(name), flags, Mode::empty())?;
        }
        let file = File::from(at);
        nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_RANDOM)?;
        file.read_exact_at(&mut [0], self.at)
    }
}
