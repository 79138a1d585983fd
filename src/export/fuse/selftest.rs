//! Whether this host lets us serve through FUSE, found by mounting for a moment.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::negotiation::{MAX_READ, Negotiated, Reaction, Wishes, flag, negotiate};
use super::wire::{Question, REQUEST_BUFFER, Request};
use crate::sys::fuse::{Device, FusermountError, Options, find_fusermount, mount_by, unmount_by};
use crate::sys::mount::MountError;

/// How long the kernel may take to say what it offers, in milliseconds.
const PATIENCE: u16 = 5000;

/// Why it does not.
#[derive(Debug, thiserror::Error)]
pub(in crate::export) enum FuseTestError {
    #[error("/dev/fuse cannot be opened")]
    Open(#[source] io::Error),
    #[error("mounting FUSE file systems is not allowed, and there is no fusermount3")]
    NotAllowed,
    #[error("a FUSE file system cannot be mounted")]
    Mount(#[source] MountError),
    #[error("a FUSE file system cannot be mounted by fusermount3")]
    Fusermount(#[source] FusermountError),
    #[error("cannot write to the cache directory")]
    Scratch(#[source] io::Error),
    #[error("the kernel does not begin the FUSE protocol")]
    Silent(#[source] io::Error),
    #[error("the kernel speaks FUSE {major}.{minor}")]
    TooOld { major: u32, minor: u32 },
}

/// What the kernel offers, and how it was mounted.
pub(in crate::export) struct Offer {
    negotiated: Negotiated,
    by_program: bool,
}

/// Flags whose presence makes a difference that people can see.
const TOLD: u64 = flag::HAS_RESEND | flag::ALLOW_IDMAP | flag::OVER_IO_URING;

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.by_program { "fusermount3 mounts" } else { "FUSE file systems can be mounted" };
        write!(f, "{how}; protocol 7.{}", self.negotiated.minor)?;
        for (word, offered) in [("with", self.negotiated.offered), ("without", !self.negotiated.offered)] {
            let names: Vec<_> =
                flag::NAMES.iter().filter(|(bit, _)| offered & TOLD & bit != 0).map(|(_, name)| *name).collect();
            if !names.is_empty() {
                write!(f, ", {word} {}", names.join(" "))?;
            }
        }
        Ok(())
    }
}

/// Mounts a file system for a moment and reads what the kernel offers. Nothing stays behind; a scratch
/// directory in `cache`, which exists, is used where `fusermount3` has to mount.
pub(in crate::export) fn offer(cache: &Path) -> Result<Offer, FuseTestError> {
    let options =
        Options { root_mode: libc::S_IFDIR | 0o755, allow_other: false, max_read: MAX_READ, is_foreign: false };
    let device = Device::open().map_err(FuseTestError::Open)?;
    match device.mount(options) {
        // Dropped at the end of this arm: the mount is in no tree.
        Ok(_mount) => Ok(Offer { negotiated: first_request(&device)?, by_program: false }),
        Err(error) if matches!(error.cause.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
            by_program(cache, options)
        }
        Err(error) => Err(FuseTestError::Mount(error)),
    }
}

fn by_program(cache: &Path, options: Options) -> Result<Offer, FuseTestError> {
    let program = find_fusermount().ok_or(FuseTestError::NotAllowed)?;
    let scratch = cache.join(format!(".selftest-fuse-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).map_err(FuseTestError::Scratch)?;
    let mounted = mount_by(&program, &scratch, options).map_err(FuseTestError::Fusermount);
    let offered = mounted.and_then(|device| {
        let offered = first_request(&device);
        let _ = unmount_by(&program, &scratch, true);
        offered
    });
    let _ = std::fs::remove_dir(&scratch);
    Ok(Offer { negotiated: offered?, by_program: true })
}

fn first_request(device: &Device) -> Result<Negotiated, FuseTestError> {
    let mut buffer = vec![0; REQUEST_BUFFER];
    let _ = poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], PollTimeout::from(PATIENCE));
    let len = device.read(&mut buffer).map_err(FuseTestError::Silent)?;
    match Request::parse(&buffer[..len]) {
        Ok(Request { question: Question::Init(offered), .. }) => match negotiate(&offered, Wishes::default()) {
            Reaction::Agree(_, negotiated) => Ok(negotiated),
            _ => Err(FuseTestError::TooOld { major: offered.major, minor: offered.minor }),
        },
        Ok(_) => Err(FuseTestError::Silent(io::Error::other("its first request is another one"))),
        Err(error) => Err(FuseTestError::Silent(io::Error::other(error))),
    }
}
