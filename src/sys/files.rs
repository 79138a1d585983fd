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

/// Major and minor number of the file system that has `file`, told by the kernel alone. An ordinary look at a file asks the
/// server of a FUSE file system, which may be this process: killed in between, it would wait for itself for ever.
pub fn file_system_of(file: impl AsFd) -> io::Result<(u32, u32)> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let told = statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    Ok((told.stx_dev_major, told.stx_dev_minor))
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

/// Whether all of `range` of a file is data, none of it a hole, as far as the file system tells them apart.
///
/// Moves the position of the file; users of this function write by offset only.
pub fn is_data(file: BorrowedFd<'_>, range: ByteRange) -> io::Result<bool> {
    let begins = seek(file, range.start(), libc::SEEK_DATA)? == Some(range.start());
    Ok(range.is_empty()
        || begins && seek(file, range.start(), libc::SEEK_HOLE)?.is_some_and(|hole| hole >= range.end()))
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

/// Whether anybody else has the regular file behind `file` open: a process in any namespace, a
/// mapping, or a file system of the kernel that is mounted over it, taken out of the tree or not.
/// `file` must be open for reading only.
///
/// The kernel gives a write lease only on a file that nobody else has open (seen on 6.18, with
/// EROFS over the file too). The lease is given back at once.
///
/// # Errors
/// `Unsupported` where the file system has no leases, else what the system says.
pub fn is_open_elsewhere(file: BorrowedFd<'_>) -> io::Result<bool> {
    /// Not in every version of the C library's headers; the same number on all of Linux but MIPS.
    const F_SETSIG: libc::c_int = 10;
    let control = |command, argument: libc::c_int| {
        // SAFETY: these commands take numbers only, and the descriptor is open because it is borrowed.
        let rc = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // Whoever opens the file while it is leased has us told by a signal. The usual one would end
    // this process, this one does nothing.
    control(F_SETSIG, libc::SIGURG)?;
    match control(libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => control(libc::F_SETLEASE, libc::F_UNLCK).map(|()| false),
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOLCK)) => {
            Err(io::ErrorKind::Unsupported.into())
        }
        Err(e) => Err(e),
    }
}

/// Makes `range` of `from` appear at `at` in `to`, sharing the blocks on disk. All three must be
/// multiples of the file system's block size.
///
/// # Errors
/// `Unsupported` where the file system shares no blocks, or not between these two files.
pub fn clone_range(from: BorrowedFd<'_>, range: ByteRange, to: BorrowedFd<'_>, at: u64) -> io::Result<()> {
    #[repr(C)]
    struct FileCloneRange {
        src_fd: i64,
        src_offset: u64,
        src_length: u64,
        dest_offset: u64,
    }
    const FICLONERANGE: libc::Ioctl = 0x4020_940d;
    const _: () = assert!(size_of::<FileCloneRange>() == 0x20);
    let request = FileCloneRange {
        src_fd: from.as_raw_fd().into(),
        src_offset: range.start(),
        src_length: range.len(),
        dest_offset: at,
    };
    // SAFETY: the kernel only reads the request, which lives until the call returns, and has the
    // layout of `struct file_clone_range`; both descriptors are open because they are borrowed.
    let rc = unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const request) };
    if rc == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EXDEV | libc::EINVAL)) => {
            Err(io::ErrorKind::Unsupported.into())
        }
        e => Err(e),
    }
}

/// Whether `bytes` more can be written below `dir` now, by what the file system says is free, and by the limits that this
/// process is under, which only trying tells: so many bytes as are `tried` are allocated for a file without a name, which
/// is gone when this returns. Others do without them for that moment, so nothing is allocated where what is free cannot
/// be enough, and nothing on file systems that allocate nothing beforehand.
pub fn has_room(dir: &Path, bytes: u64, tried: u64) -> io::Result<bool> {
    use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open, statvfs};
    let stat = statvfs(dir)?;
    // A tmpfs without a limit has no size.
    let says = |blocks: u64| stat.f_blocks == 0 || blocks.saturating_mul(stat.f_frsize) >= bytes;
    // What is kept for the superuser may be for us; what is not tried does not count on it.
    if !says(if tried < bytes { stat.f_bavail } else { stat.f_bfree }) {
        return Ok(false);
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let allocated = open(dir, flags, Mode::RUSR | Mode::WUSR)
        .map(|file| rustix::io::retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, tried)));
    match allocated {
        Ok(Ok(())) => Ok(true),
        Ok(Err(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)) => Ok(false),
        // Also where there is no room for an inode, which data does not need.
        Ok(Err(_)) | Err(_) => Ok(says(stat.f_bavail)),
    }
}

/// `EROFS_SUPER_MAGIC_V1` of `linux/magic.h`.
const EROFS_SUPER_MAGIC: libc::c_long = 0xe0f5_e1e2;

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
        (EROFS_SUPER_MAGIC, "erofs"),
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
    fn a_file_is_open_elsewhere_while_somebody_has_it_open_or_mapped() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 4096]).unwrap();
        let asked = || is_open_elsewhere(std::fs::File::open(&path).unwrap().as_fd());
        if asked().is_err_and(|e| e.kind() == io::ErrorKind::Unsupported) {
            return eprintln!("SKIPPED: no leases on this file system");
        }
        assert!(!asked().unwrap());

        for write in [false, true] {
            let open = std::fs::OpenOptions::new().read(true).write(write).open(&path).unwrap();
            assert!(asked().unwrap(), "open, for writing: {write}");
            drop(open);
            assert!(!asked().unwrap(), "closed, for writing: {write}");
        }
        let map = crate::sys::mmap::ReadMap::new(&std::fs::File::open(&path).unwrap()).unwrap();
        assert!(asked().unwrap(), "mapped");
        drop(map);
        assert!(!asked().unwrap(), "unmapped");
    }

    #[test]
    fn holes_are_told_from_data() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 65536).unwrap();
        file.write_all_at(&[1; 8192], 262_144).unwrap();

        let ranges = data_ranges(file.as_fd(), 1 << 20).unwrap();

        assert_eq!(ranges, [ByteRange::at(65536, 4096).unwrap(), ByteRange::at(262_144, 8192).unwrap()]);
        assert_eq!(data_ranges(file.as_fd(), 4096).unwrap(), []);
        let is_data = |at, len| is_data(file.as_fd(), ByteRange::at(at, len).unwrap()).unwrap();
        assert!(is_data(262_144, 8192) && is_data(266_240, 4096) && !is_data(262_144, 8193) && !is_data(258_048, 8192));
        assert!(!is_data(0, 4096) && !is_data(2 << 20, 1));
    }

    #[test]
    fn room_is_what_the_file_system_says_and_no_more_is_tried_than_was_said() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let stat = rustix::fs::statvfs(dir.path()).unwrap();
        let (size, page) = (stat.f_blocks * stat.f_frsize, 4096);
        if stat.f_bavail * stat.f_frsize < 64 * page {
            return eprintln!("SKIPPED: the disk is full");
        }
        assert!(has_room(dir.path(), page, page).unwrap());
        assert!(has_room(dir.path(), 2 * page, page).unwrap());
        assert!(!has_room(dir.path(), size + page, page).unwrap(), "although a page can be allocated");
        assert!(!has_room(dir.path(), size + page, size + page).unwrap());
    }
}
