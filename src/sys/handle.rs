//! Handles of files: what the servers of network file systems know a file by.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Most bytes of a handle (`MAX_HANDLE_SZ`).
const MOST: usize = 128;

/// Names a file of one file system for as long as that has the file, whether the kernel remembers it or not.
///
/// `struct file_handle`.
#[derive(Clone, Debug)]
#[repr(C)]
pub struct Handle {
    len: u32,
    kind: i32,
    bytes: [u8; MOST],
}

impl Handle {
    /// The handle of what is at `path`, which may be a symbolic link.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the file system has none.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let mut handle = Self { len: u32::try_from(MOST).expect("128"), kind: 0, bytes: [0; MOST] };
        let mut mount = 0;
        // SAFETY: `path` is a C string; `handle` has room for as many bytes as it says, and `mount` for a number.
        // The kernel writes to both and keeps neither.
        let rc = unsafe {
            libc::name_to_handle_at(libc::AT_FDCWD, path.as_ptr(), (&raw mut handle).cast(), &raw mut mount, 0)
        };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(handle) }
    }

    /// Finds the file again, without a way to read it or what it contains. `mount` is any file of its mount.
    ///
    /// # Errors
    /// `ESTALE` if there is no such file, `EPERM` without `CAP_DAC_READ_SEARCH`.
    pub fn open(&self, mount: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let mut handle = self.clone();
        let flags = libc::O_PATH | libc::O_CLOEXEC;
        // SAFETY: `handle` is a record of the length that it says, and `mount` is open for the whole call.
        let fd = unsafe { libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::sys::files::inode_id;

    #[test]
    fn a_handle_has_the_length_that_the_kernel_says() {
        let root = std::fs::File::open("/").unwrap();
        // Not every file system has handles, and not everybody may open them.
        let Ok(handle) = Handle::of(Path::new("/")) else { return };
        assert!(handle.len as usize <= MOST);
        if let Ok(opened) = handle.open(root.as_fd()) {
            assert_eq!(inode_id(&opened).unwrap(), inode_id(&root).unwrap());
        }
    }
}
