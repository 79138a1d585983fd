//! `/dev/fuse`: opening it, mounting what is served through it, and its reads and writes.
//!
//! Whoever may mount does so by the calls of [`mount`](super::mount); others ask `fusermount3`, a program that
//! may, which hands the descriptor back over a socket.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::mount::MountAttrFlags;

use super::fdpass;
use super::mount::{DetachedMount, FsContext, MountError};

/// Where the device lives.
pub const DEVICE: &str = "/dev/fuse";

/// The name by which these mounts are told from others: their type is `fuse.rafsd`.
pub const SUBTYPE: &str = "rafsd";

/// How long `fusermount3` may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the mount of a connection is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Type and permissions of the root, as in `st_mode`.
    pub root_mode: u32,
    /// Whether other users than the owner of the mount may use it.
    pub allow_other: bool,
    /// Most bytes of one read.
    pub max_read: u32,
    /// Whether what is shown may be anybody's: set-id bits and devices in it mean nothing then.
    pub is_foreign: bool,
}

/// The device, or one end of a socket in its place for tests. All clones are one open file: whoever has one
/// keeps the connection alive.
#[derive(Clone, Debug)]
pub struct Device(std::sync::Arc<OwnedFd>);

impl Device {
    /// Opens the device. It is a connection once it is mounted.
    ///
    /// # Errors
    /// `ENOENT` or `ENODEV` without the driver, `EACCES` or `EPERM` where the host or a control group forbids it.
    pub fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE)?;
        Ok(Self(std::sync::Arc::new(file.into())))
    }

    /// A connection that another process has mounted, or had.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(std::sync::Arc::new(fd)))
    }

    /// The same open file, for whoever keeps it.
    pub fn held(&self) -> std::sync::Arc<OwnedFd> {
        self.0.clone()
    }

    /// Reads one request into `buffer`.
    ///
    /// # Errors
    /// `WouldBlock` if there is none; `ENODEV` or `ECONNABORTED` when the connection has ended; `ENOENT` if a
    /// request was withdrawn just now.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }

    /// Writes one whole answer.
    ///
    /// # Errors
    /// `ENOENT` if nobody waits for it any more; `ENODEV` when the connection has ended; `EINVAL` if it is no
    /// answer.
    pub fn write(&self, answer: &[u8]) -> io::Result<()> {
        match rustix::io::write(&self.0, answer)? {
            len if len == answer.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Has the kernel send every request again that was read and not answered, with bit 63 of its number set:
    /// after a process that had read some has certainly died.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.9.
    pub fn resend(&self) -> io::Result<()> {
        const FUSE_NOTIFY_RESEND: i32 = 7;
        let mut message = [0; 16];
        message[..4].copy_from_slice(&16u32.to_ne_bytes());
        message[4..8].copy_from_slice(&FUSE_NOTIFY_RESEND.to_ne_bytes());
        self.write(&message)
    }

    /// Has the kernel ask for something at once, as if the calling thread had caused it: it is asked what it has in
    /// memory of nothing of the regular file `node`. Its answer, of which `number`, an even one, is the number, is a
    /// request like others where requests come over a ring, and is owed an answer there.
    ///
    /// # Errors
    /// `ENOENT` if the kernel does not have the file in memory; `EINVAL` if it is no regular one; `ENODEV` when the
    /// connection has ended.
    pub fn nudge(&self, node: u64, number: u64) -> io::Result<()> {
        const FUSE_NOTIFY_RETRIEVE: i32 = 5;
        // The head, then `struct fuse_notify_retrieve_out`: number, node, offset, size, padding.
        let mut message = [0; 48];
        message[..4].copy_from_slice(&48u32.to_ne_bytes());
        message[4..8].copy_from_slice(&FUSE_NOTIFY_RETRIEVE.to_ne_bytes());
        message[16..24].copy_from_slice(&number.to_ne_bytes());
        message[24..32].copy_from_slice(&node.to_ne_bytes());
        self.write(&message)
    }

    /// Makes a mount of this device that no path leads to yet. The kernel's first request waits to be read then.
    ///
    /// # Errors
    /// `EPERM` for who may not mount, `ENODEV` without the driver.
    pub fn mount(&self, options: Options) -> Result<DetachedMount, MountError> {
        let context = FsContext::open("fuse")?;
        context.set("source", SUBTYPE)?;
        context.set("subtype", SUBTYPE)?;
        context.set("fd", &self.0.as_raw_fd().to_string())?;
        context.set("rootmode", &format!("{:o}", options.root_mode))?;
        context.set("user_id", &nix::unistd::geteuid().to_string())?;
        context.set("group_id", &nix::unistd::getegid().to_string())?;
        context.set("max_read", &options.max_read.to_string())?;
        context.set_flag("default_permissions")?;
        if options.allow_other {
            context.set_flag("allow_other")?;
        }
        let foreign = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        context.mount(if options.is_foreign { foreign } else { MountAttrFlags::empty() })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why the program that may mount did not.
#[derive(Debug, thiserror::Error)]
pub enum FusermountError {
    #[error("cannot start {}", program.display())]
    Start {
        program: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{} refused: {said}", program.display())]
    Refused { program: PathBuf, said: String },
    #[error("{} handed no descriptor back", program.display())]
    Silent {
        program: PathBuf,
        #[source]
        cause: io::Error,
    },
}

/// Mounts at `target` by the set-uid program `program`, usually `fusermount3`, and gives the connection's
/// device. Blocks until the program has ended.
pub fn mount_by(program: &Path, target: &Path, options: Options) -> Result<Device, FusermountError> {
    let silent = |cause| FusermountError::Silent { program: program.to_owned(), cause };
    let start = |cause| FusermountError::Start { program: program.to_owned(), cause };
    let (ours, theirs) = UnixStream::pair().map_err(silent)?;
    fdpass::set_timeout(ours.as_fd(), Some(PATIENCE)).map_err(silent)?;
    let mut words = format!("ro,nosuid,nodev,fsname={SUBTYPE},subtype={SUBTYPE},default_permissions");
    // Its own maximum is the only one that it takes, and the type of the root is what it finds.
    let _ = write!(words, ",max_read={}", options.max_read);
    if options.allow_other {
        words.push_str(",allow_other");
    }
    // The socket becomes its standard input, whose number is the same in every process.
    let mut command = Command::new(program);
    command.arg("-o").arg(words).arg("--").arg(target).env("_FUSE_COMMFD", "0");
    let child = command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = child.spawn().map_err(start)?;
    drop(command);
    let received = fdpass::receive(ours.as_fd(), &mut [0; 64]);
    if received.is_err() {
        // It has said nothing in all this time, and is not waited for.
        let _ = child.kill();
    }
    let output = child.wait_with_output().map_err(silent)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(FusermountError::Refused { program: program.to_owned(), said });
    }
    match received.map_err(silent)? {
        Some((_, Some(fd))) => Device::from_fd(fd).map_err(silent),
        _ => Err(silent(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Unmounts what [`mount_by`] has mounted at `target`.
pub fn unmount_by(program: &Path, target: &Path, lazy: bool) -> Result<(), FusermountError> {
    let start = |cause| FusermountError::Start { program: program.to_owned(), cause };
    let mut command = Command::new(program);
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(target);
    let output = command.stdin(Stdio::null()).output().map_err(start)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(FusermountError::Refused { program: program.to_owned(), said })
}

/// The program that mounts for users who may not, if it is installed: found along `PATH`.
pub fn find_fusermount() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["fusermount3", "fusermount"].map(OsStr::new);
    let dirs: Vec<_> = std::env::split_paths(&path).collect();
    names.iter().find_map(|name| dirs.iter().map(|dir| dir.join(name)).find(|path| path.is_file()))
}
