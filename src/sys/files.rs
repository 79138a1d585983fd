//! Small facts about open files: identity, holes, file system kind.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use crate::base::ByteRange;

/// What tells one inode from all others on this host while it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId {
    device: u64,
    inode: u64,
}

impl InodeId {
    /// The inode `inode` of the file system `device` (`st_dev`).
    pub const fn new(device: u64, inode: u64) -> Self {
        Self { device, inode }
    }

    /// `st_dev` of its file system.
    pub const fn device(self) -> u64 {
        self.device
    }

    /// `st_ino`.
    pub const fn inode(self) -> u64 {
        self.inode
    }
}

/// The identity of the inode behind `file`.
pub fn inode_id(file: impl AsFd) -> io::Result<InodeId> {
    let stat = nix::sys::stat::fstat(file)?;
    Ok(InodeId { device: stat.st_dev, inode: stat.st_ino })
}

/// The identity of the inode at `path`, behind symbolic links.
pub fn inode_id_at(path: &Path) -> io::Result<InodeId> {
    let stat = nix::sys::stat::stat(path)?;
    Ok(InodeId { device: stat.st_dev, inode: stat.st_ino })
}

/// The parts of a file's first `len` bytes that are data, not holes, found by
/// `SEEK_DATA`/`SEEK_HOLE`. Works on descriptors that cannot be read.
///
/// Moves the position of the file; users of this function write by offset only.
pub fn data_ranges(file: BorrowedFd<'_>, len: u64) -> io::Result<Vec<ByteRange>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < len {
        let Some(start) = seek(file, at, libc::SEEK_DATA)?.filter(|&start| start < len) else { break };
        let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(len).min(len);
        let Some(range) = ByteRange::new(start, end).filter(|range| !range.is_empty()) else {
            return Err(io::Error::other("the file's hole map is inconsistent"));
        };
        ranges.push(range);
        at = end;
    }
    Ok(ranges)
}

fn seek(file: BorrowedFd<'_>, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(io::Error::other)?;
    // SAFETY: plain numbers in and out; the descriptor is open because it is borrowed.
    let found = unsafe { libc::lseek64(file.as_raw_fd(), at, whence) };
    if found >= 0 {
        return Ok(Some(found.cast_unsigned()));
    }
    match io::Error::last_os_error() {
        e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        e => Err(e),
    }
}

/// The name of the file system that holds `file`, or its magic number in hexadecimal.
pub fn file_system(file: impl AsFd) -> io::Result<String> {
    let magic = nix::sys::statfs::fstatfs(file)?.filesystem_type().0;
    let known = [
        (libc::EXT4_SUPER_MAGIC, "ext4"),
        (libc::XFS_SUPER_MAGIC, "xfs"),
        (libc::BTRFS_SUPER_MAGIC, "btrfs"),
        (libc::TMPFS_MAGIC, "tmpfs"),
        (libc::OVERLAYFS_SUPER_MAGIC, "overlay"),
        (libc::NFS_SUPER_MAGIC, "nfs"),
        (libc::FUSE_SUPER_MAGIC, "fuse"),
    ];
    let name = known.iter().find(|(number, _)| *number == magic);
    Ok(name.map_or_else(|| format!("{magic:#x}"), |(_, name)| (*name).to_owned()))
}

/// Fails if something is at `path` that a new file must not replace: a device, a FIFO or a socket,
/// a directory, or a symbolic link, behind which people expect their file.
pub fn ensure_replaceable(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(there) if !there.is_file() => {
            let what = "there is something else than a regular file already; name another place";
            Err(io::Error::new(io::ErrorKind::AlreadyExists, what))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_are_told_from_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 65536).unwrap();
        file.write_all_at(&[1; 8192], 262_144).unwrap();

        let ranges = data_ranges(file.as_fd(), 1 << 20).unwrap();

        assert_eq!(ranges, [ByteRange::at(65536, 4096).unwrap(), ByteRange::at(262_144, 8192).unwrap()]);
        assert_eq!(data_ranges(file.as_fd(), 4096).unwrap(), []);
    }
}
