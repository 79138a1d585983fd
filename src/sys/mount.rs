//! Mounting by the file-descriptor calls (`fsopen` to `move_mount`), and unmounting.
//!
//! `mount(8)` is no substitute: it slips a loop device under an EROFS image file, which hides the
//! reads from fanotify. The old `mount(2)` has one page for all options, about thirty devices.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::descriptors::alone;

/// Why a mount was refused, with what the kernel said about it.
#[derive(Debug, thiserror::Error)]
#[error("{step} failed{}", said(log))]
pub struct MountError {
    /// The call that failed, with its argument.
    pub step: String,
    /// Messages of the file system, oldest first.
    pub log: Vec<String>,
    /// The errno.
    #[source]
    pub cause: io::Error,
}

fn said(log: &[String]) -> String {
    if log.is_empty() { String::new() } else { format!(" ({})", log.join("; ")) }
}

/// A configured file system that is not mounted yet.
#[derive(Debug)]
pub struct FsContext(OwnedFd);

impl FsContext {
    /// Starts configuring a file system of type `name`.
    ///
    /// # Errors
    /// `ENODEV` if the kernel has no such file system, `EPERM` without privilege.
    pub fn open(name: &str) -> Result<Self, MountError> {
        match rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(Self(fd)),
            Err(errno) => Err(MountError { step: format!("fsopen {name}"), log: Vec::new(), cause: errno.into() }),
        }
    }

    /// Sets option `key` to `value`.
    pub fn set(&self, key: &str, value: &str) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_string(self.0.as_fd(), key, value)
            .map_err(|e| self.failed(format!("{key}={value}"), e))
    }

    /// Sets option `key` to a path, which may hold any bytes.
    pub fn set_path(&self, key: &str, value: &Path) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_string(self.0.as_fd(), key, value)
            .map_err(|e| self.failed(format!("{key}={}", value.display()), e))
    }

    /// Sets option `key`, which has no value.
    pub fn set_flag(&self, key: &str) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_flag(self.0.as_fd(), key).map_err(|e| self.failed(key.to_owned(), e))
    }

    /// Creates the superblock and gives a detached, read-only mount of it.
    pub fn mount(self, attributes: MountAttrFlags) -> Result<DetachedMount, MountError> {
        self.set_flag("ro")?;
        rustix::mount::fsconfig_create(self.0.as_fd()).map_err(|e| self.failed("creating the superblock".into(), e))?;
        let flags = MountAttrFlags::MOUNT_ATTR_RDONLY | attributes;
        rustix::mount::fsmount(self.0.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
            .map(DetachedMount)
            .map_err(|e| self.failed("fsmount".into(), e))
    }

    /// What the file system has said so far, without its level prefix. Reading empties it.
    pub fn messages(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut buffer = [0; 1024];
        while let Ok(len @ 1..) = nix::unistd::read(&self.0, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..len]);
            let text = text.trim_end();
            // A letter for the level, a blank, the message.
            out.push(text.get(2..).unwrap_or(text).to_owned());
        }
        out
    }

    fn failed(&self, step: String, errno: rustix::io::Errno) -> MountError {
        MountError { step, log: self.messages(), cause: errno.into() }
    }
}

/// A mount that no path leads to yet. Dropping it unmounts.
#[derive(Debug)]
pub struct DetachedMount(OwnedFd);

impl DetachedMount {
    /// Another mount of what is mounted at `target`, as a bind mount would be.
    pub fn clone_of(target: &Path) -> io::Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        Ok(Self(rustix::mount::open_tree(rustix::fs::CWD, target, flags)?))
    }

    /// Shows other owners through this mount: whom the file system calls by a number, by the one that it has in
    /// the user namespace `users` outside of it. As runtimes of containers do.
    ///
    /// # Errors
    /// `EINVAL` if the file system allows no such mounts, `ENOSYS` before Linux 5.12.
    pub fn map_owners(&self, users: BorrowedFd<'_>) -> io::Result<()> {
        /// `struct mount_attr`.
        #[repr(C)]
        struct Attributes {
            set: u64,
            clear: u64,
            propagation: u64,
            users: u64,
        }
        const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
        let users = u64::try_from(users.as_raw_fd()).expect("an open descriptor");
        let attributes = Attributes { set: MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, users };
        let (mount, path, flags) = (self.0.as_raw_fd(), c"", libc::AT_EMPTY_PATH);
        // SAFETY: `path` is a C string and `attributes` a record of the length that is passed; both are only read
        // and live until the call returns, as do the two descriptors, one owned and one borrowed.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                mount,
                path.as_ptr(),
                flags,
                &raw const attributes,
                size_of::<Attributes>(),
            )
        };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Makes it visible at `target`, an existing directory. It is in use there until this is dropped.
    pub fn attach(&self, target: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(self.0.as_fd(), "", rustix::fs::CWD, target, flags)?)
    }
}

impl AsFd for DetachedMount {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Unmounts what is at `target`, without following a symbolic link there.
///
/// Waits for reads that are on their way, and cannot be killed meanwhile. So it is done on a thread that has no
/// [descriptors](super::descriptors). Else a FUSE connection of ours would stay open for the sake of the thread that
/// waits for it to end, and with it every `sync` of the host (seen on 6.18 with EROFS over FUSE).
///
/// # Errors
/// `EBUSY` while files on it are open, `EINVAL` if nothing is mounted there.
pub fn unmount(target: &Path) -> io::Result<()> {
    alone(&[], || Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW)?))?
}

/// Takes what is at `target` out of the tree now; it goes away when its last user does. If that is now, this
/// waits as [`unmount`] does, on a thread without descriptors.
pub fn detach(target: &Path) -> io::Result<()> {
    alone(&[], || Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?))?
}

/// As [`detach`], on the calling thread, without asking for memory.
pub fn detach_here(target: &CStr) -> io::Result<()> {
    Ok(rustix::mount::unmount(target, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?)
}

/// Calls `visit` for each mount that this process can see, with the numbers of its file system and where it is.
/// Allocates nothing; `buffer` is used for lines, of which what has no room is passed over.
pub fn each_mount(buffer: &mut [u8], mut visit: impl FnMut((u32, u32), &[u8])) -> io::Result<()> {
    let mut file = File::open("/proc/self/mountinfo")?;
    let mut chunk = [0; 4096];
    let mut filled = 0;
    loop {
        let read = match file.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        for &byte in &chunk[..read] {
            if byte == b'\n' {
                if let Some((device, target)) = split_mountinfo(&mut buffer[..filled]) {
                    visit(device, target);
                }
                filled = 0;
            } else if filled < buffer.len() {
                buffer[filled] = byte;
                filled += 1;
            }
        }
    }
}

/// The file system of a line of the mount table, and where it is mounted, put right in place.
fn split_mountinfo(line: &mut [u8]) -> Option<((u32, u32), &[u8])> {
    let mut fields = line.split_mut(|byte| *byte == b' ').skip(2);
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let target = fields.nth(1)?;
    // Only a field that has an end is whole.
    fields.next()?;
    let len = unescape_in_place(target);
    Some((device, &target[..len]))
}

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// `st_dev` of the file system, as `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// File system type.
    pub fs_type: String,
    /// What is mounted.
    pub source: String,
}

/// The mount table of this process.
pub fn mount_table() -> io::Result<Vec<MountInfo>> {
    Ok(std::fs::read_to_string("/proc/self/mountinfo")?.lines().filter_map(parse_mountinfo).collect())
}

fn parse_mountinfo(line: &str) -> Option<MountInfo> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ').skip(2);
    let device = head.next()?.to_owned();
    let target = PathBuf::from(unescape(head.nth(1)?));
    let mut tail = tail.split(' ');
    Some(MountInfo { device, target, fs_type: tail.next()?.to_owned(), source: unescape(tail.next()?) })
}

/// Undoes the `\040` style escapes of the mount table.
fn unescape(text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let len = unescape_in_place(&mut bytes);
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}

/// The same in the same place; gives the length of what came of it.
fn unescape_in_place(text: &mut [u8]) -> usize {
    let (mut from, mut len) = (0, 0);
    while from < text.len() {
        let digits = text
            .get(from + 1..from + 4)
            .filter(|digits| text[from] == b'\\' && digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        let octal = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        text[len] = octal.unwrap_or(text[from]);
        from += if octal.is_some() { 4 } else { 1 };
        len += 1;
    }
    len
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_the_same_without_memory() {
        let frugal = || {
            let mut all = Vec::new();
            each_mount(&mut vec![0; 65536], |(major, minor), target| {
                all.push((format!("{major}:{minor}"), String::from_utf8_lossy(target).into_owned()));
            })
            .unwrap();
            all
        };
        let usual = || {
            let rows = mount_table().unwrap().into_iter();
            rows.map(|row| (row.device, row.target.display().to_string())).collect::<Vec<_>>()
        };
        // Others may mount in between.
        assert!((0..100).any(|_| frugal() == usual()), "{:?}", (frugal(), usual()));

        let mut line = *br"36 35 0:45 / /mnt/a\040b\134\04 ro,nosuid - erofs x";
        assert_eq!(split_mountinfo(&mut line), Some(((0, 45), &br"/mnt/a b\\04"[..])));
        for cut in 0..20 {
            let mut line = line;
            assert_eq!(split_mountinfo(&mut line[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn a_mount_table_line_with_escapes_is_understood() {
        let line = r"36 35 0:45 / /mnt/a\040b ro,nosuid shared:1 - erofs /cache/boot\134x ro,device=/x";
        let info = parse_mountinfo(line).unwrap();
        assert_eq!(info.target, Path::new("/mnt/a b"));
        assert_eq!((info.fs_type.as_str(), info.source.as_str()), ("erofs", r"/cache/boot\x"));
        assert_eq!(info.device, "0:45");
    }
}
