//! The on-demand half of `/dev/cachefiles`: commands, requests, and the reply to a read.
//!
//! Message formats are those of `fs/cachefiles/ondemand.c` and `include/uapi/linux/cachefiles.h`
//! of Linux 6.12 (`cachefiles-ondemand.md` section 3). Native endianness.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::base::ByteRange;

/// Longest message the kernel sends, in bytes (`CACHEFILES_MSG_MAX_SIZE`).
pub const MAX_MESSAGE: usize = 1024;
/// Longest cookie key the kernel survives: a longer one trips a `BUG_ON` in its worker.
pub const MAX_COOKIE_KEY: usize = 252;
/// Where the device lives.
pub const DEVICE: &str = "/dev/cachefiles";

/// The open device. One open file description exists in the whole system.
#[derive(Debug)]
pub struct Device(File);

/// The right to ask about the files of a bound cache, folder by folder (`cachefiles-ondemand.md` section 10).
#[derive(Debug)]
pub struct Folders<'a>(&'a Device);

/// A request from the kernel.
#[derive(Debug)]
pub enum Request {
    /// A cookie is looked up; answer with [`Device::opened`] or [`Device::refuse_open`].
    Open(Open),
    /// A range is missing and somebody sleeps; answer with [`read_complete`].
    Read { msg_id: u32, object_id: u32, range: ByteRange },
    /// The object is gone. No answer.
    Close { object_id: u32 },
    /// A request of a kind this program does not know.
    Unknown { opcode: u32 },
}

/// The body of an open request.
#[derive(Debug)]
pub struct Open {
    /// Names the request in the answer.
    pub msg_id: u32,
    /// Names the object in later requests.
    pub object_id: u32,
    /// Write-only descriptor of the cache object.
    pub object: OwnedFd,
    /// For EROFS: `erofs,` and the domain or file system id.
    pub volume_key: Vec<u8>,
    /// For EROFS: the file system id, or the tag of a device.
    pub cookie_key: Vec<u8>,
}

impl Device {
    /// Opens the device.
    ///
    /// # Errors
    /// `ENOENT` without the driver; `EBUSY` if another process has it, or still holds an object.
    pub fn open() -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(DEVICE).map(Self)
    }

    /// Has the requests delivered again that were delivered and not answered, after the process that
    /// took them has died. Objects that it had open are opened again before they are read.
    ///
    /// # Errors
    /// `EOPNOTSUPP` before Linux 6.8 (without back-ports): what was taken is then lost.
    pub fn restore(&self) -> io::Result<()> {
        self.command("restore")
    }

    fn command(&self, text: &str) -> io::Result<()> {
        // One write is one command; the kernel takes it whole or not at all.
        (&self.0).write_all(text.as_bytes())
    }

    /// Binds the cache at `root` in on-demand mode under the name `tag`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the file system lacks what a cache needs; `EINVAL` if the kernel was built
    /// without on-demand mode; `EBUSY` if the directory is in use.
    pub fn bind(&self, root: &Path, tag: &str) -> io::Result<()> {
        self.command(&format!("dir {}", root.display()))?;
        self.command(&format!("tag {tag}"))?;
        self.command("bind ondemand")
    }

    /// Runs `work` on a thread that has a working directory of its own: `inuse` and `cull` go by it.
    ///
    /// # Errors
    /// If there can be no such thread; and what `work` says.
    pub fn in_folders<T: Send>(&self, work: impl FnOnce(&Folders<'_>) -> io::Result<T> + Send) -> io::Result<T> {
        let own = || {
            // SAFETY: no memory is passed. What the threads of the process share, this one shares no more.
            if unsafe { libc::unshare(libc::CLONE_FS) } == -1 {
                return Err(io::Error::last_os_error());
            }
            work(&Folders(self))
        };
        let thread = std::thread::Builder::new().name("cull-0".to_owned());
        std::thread::scope(|scope| {
            let thread = thread.spawn_scoped(scope, own)?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Answers an open request: the object has `size` bytes. The kernel drops what it has cached
    /// under this key if the size differs from last time.
    pub fn opened(&self, msg_id: u32, size: u64) -> io::Result<()> {
        self.command(&format!("copen {msg_id},{size}"))
    }

    /// Fails an open request with `errno`. The caller must close the object's descriptor, or the
    /// next mount of the same name hangs.
    pub fn refuse_open(&self, msg_id: u32, errno: i32) -> io::Result<()> {
        self.command(&format!("copen {msg_id},-{errno}"))
    }

    /// The next request, or `None` if none waits.
    ///
    /// # Errors
    /// An error concerns one request, which the kernel has failed by itself; go on reading.
    pub fn next(&self) -> io::Result<Option<Request>> {
        let mut buffer = [0; MAX_MESSAGE];
        let len = nix::unistd::read(&self.0, &mut buffer)?;
        if len == 0 {
            return Ok(None);
        }
        let raw = parse(&buffer[..len]).ok_or_else(|| io::Error::other("cachefiles sent a malformed request"))?;
        Ok(Some(match raw {
            RawRequest::Read { msg_id, object_id, range } => Request::Read { msg_id, object_id, range },
            RawRequest::Close { object_id } => Request::Close { object_id },
            RawRequest::Unknown { opcode } => Request::Unknown { opcode },
            RawRequest::Open { msg_id, object_id, fd, volume_key, cookie_key } => {
                // SAFETY: the kernel installed this descriptor in our table with this message,
                // and each message is delivered to exactly one read.
                let object = unsafe { OwnedFd::from_raw_fd(fd) };
                // The kernel installs it without close-on-exec; a child would pin the object.
                nix::fcntl::fcntl(&object, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
                Request::Open(Open {
                    msg_id,
                    object_id,
                    object,
                    volume_key: volume_key.to_vec(),
                    cookie_key: cookie_key.to_vec(),
                })
            }
        }))
    }
}

impl Folders<'_> {
    /// Makes `folder` the one that the names of files belong to.
    pub fn enter(&self, folder: &Path) -> io::Result<()> {
        std::env::set_current_dir(folder)
    }

    /// Whether the kernel has the object open.
    ///
    /// # Errors
    /// `ENOENT` or `ESTALE` if it is not there.
    pub fn is_in_use(&self, file: &str) -> io::Result<bool> {
        self.ask("inuse", file).map(|idle| !idle)
    }

    /// Has the kernel remove an object that it does not have open; tells whether it did.
    pub fn cull(&self, file: &str) -> io::Result<bool> {
        match self.ask("cull", file) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            asked => asked,
        }
    }

    /// `false` where the kernel says that it is busy.
    fn ask(&self, command: &str, file: &str) -> io::Result<bool> {
        match self.0.command(&format!("{command} {file}")) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl From<OwnedFd> for Device {
    /// Goes on with the device that a process which has died had bound.
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Tells cachefiles that the read `msg_id` on this object has been answered. If the range is
/// still a hole, the reader gets `EIO`.
///
/// # Errors
/// `EINVAL` if nobody waits for it any more.
pub fn read_complete(object: BorrowedFd<'_>, msg_id: u32) -> io::Result<()> {
    const CACHEFILES_IOC_READ_COMPLETE: libc::Ioctl = 0x4004_9801;
    // SAFETY: the request takes its argument by value, so no memory is shared with the kernel,
    // and `object` is open for the whole call because it is borrowed.
    let rc = unsafe { libc::ioctl(object.as_raw_fd(), CACHEFILES_IOC_READ_COMPLETE, msg_id) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[derive(Debug, PartialEq, Eq)]
enum RawRequest<'a> {
    Open { msg_id: u32, object_id: u32, fd: i32, volume_key: &'a [u8], cookie_key: &'a [u8] },
    Read { msg_id: u32, object_id: u32, range: ByteRange },
    Close { object_id: u32 },
    Unknown { opcode: u32 },
}

fn parse(bytes: &[u8]) -> Option<RawRequest<'_>> {
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (msg_id, opcode, object_id) = (word(0)?, word(4)?, word(12)?);
    if word(8)? as usize != bytes.len() {
        return None;
    }
    match opcode {
        0 => {
            let (volume_len, cookie_len) = (word(16)? as usize, word(20)? as usize);
            let fd = i32::try_from(word(24)?).ok()?;
            let keys = bytes.get(32..)?;
            let (volume, rest) = keys.split_at_checked(volume_len)?;
            // The volume key counts its terminating NUL; the cookie key has none.
            let volume_key = volume.strip_suffix(&[0]).unwrap_or(volume);
            Some(RawRequest::Open { msg_id, object_id, fd, volume_key, cookie_key: rest.get(..cookie_len)? })
        }
        1 => Some(RawRequest::Close { object_id }),
        2 => Some(RawRequest::Read { msg_id, object_id, range: ByteRange::at(long(16)?, long(24)?)? }),
        _ => Some(RawRequest::Unknown { opcode }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The open request of `fsid=img1`, as captured from Linux 6.12 (`cachefiles-ondemand.md` 3).
    fn captured_open() -> Vec<u8> {
        let mut bytes: Vec<u8> = [0u32, 0, 0x2f, 1, 0xb, 4, 8, 0].iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend(b"erofs,img1\0img1");
        bytes
    }

    #[test]
    fn a_captured_open_request_is_understood() {
        let expected =
            RawRequest::Open { msg_id: 0, object_id: 1, fd: 8, volume_key: b"erofs,img1", cookie_key: b"img1" };
        assert_eq!(parse(&captured_open()), Some(expected));
    }

    #[test]
    fn damaged_requests_are_refused_without_a_panic() {
        let bytes = captured_open();
        for cut in 0..bytes.len() {
            assert_eq!(parse(&bytes[..cut]), None, "cut at {cut}");
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 0xff;
            let _ = parse(&bad);
        }
    }

    #[test]
    fn a_read_request_carries_its_range() {
        let mut bytes: Vec<u8> = [7u32, 2, 32, 3].iter().flat_map(|w| w.to_ne_bytes()).collect();
        bytes.extend([4096u64.to_ne_bytes(), 8192u64.to_ne_bytes()].concat());
        let range = ByteRange::at(4096, 8192).unwrap();
        assert_eq!(parse(&bytes), Some(RawRequest::Read { msg_id: 7, object_id: 3, range }));
    }
}
