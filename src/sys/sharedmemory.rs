//! Memory that outlives the process: a memory file, mapped, of a length that nobody can change.
//!
//! It begins with a magic number and a version, so that a successor knows what it was given. Other processes may
//! write to it at any time: words are atomics, and everything else is copied in and out, never referred to.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;

/// What tells one kind of such memory from others.
#[derive(Debug)]
pub(super) struct Kind {
    /// What it is called in messages, and by the kernel.
    pub(super) name: &'static std::ffi::CStr,
    pub(super) magic: u64,
    pub(super) version: u64,
    /// Bytes, a multiple of 8.
    pub(super) len: usize,
}

/// Memory of one kind. Its first two words are taken.
#[derive(Debug)]
pub(super) struct SharedMemory {
    map: MmapRaw,
    file: OwnedFd,
    len: usize,
}

impl SharedMemory {
    /// New memory of zeros, but for the two words.
    pub(super) fn create(kind: &Kind) -> io::Result<Self> {
        // SAFETY: a name and plain numbers in, a descriptor or -1 out.
        let fd = unsafe { libc::memfd_create(kind.name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call just returned this descriptor and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(kind.len as u64)?;
        // Nobody can shorten it under a mapping.
        let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW;
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
        let this = Self::map(file, kind.len)?;
        this.word(AT_VERSION).store(kind.version, Ordering::Relaxed);
        this.word(AT_MAGIC).store(kind.magic, Ordering::Release);
        Ok(this)
    }

    /// What another process made.
    ///
    /// # Errors
    /// `InvalidData` if it is of another kind, or of a version that this program does not know.
    pub(super) fn open(fd: OwnedFd, kind: &Kind) -> io::Result<Self> {
        Self::recognize(fd, kind)?.map_err(|what| {
            let text = format!("what should be {} {what}", kind.name.to_string_lossy());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })
    }

    /// The same, or what is wrong with it. Allocates nothing.
    pub(super) fn recognize(fd: OwnedFd, kind: &Kind) -> io::Result<Result<Self, &'static str>> {
        let file = File::from(fd);
        if file.metadata()?.len() != kind.len as u64 {
            return Ok(Err("has another length"));
        }
        let this = Self::map(file, kind.len)?;
        if this.word(AT_MAGIC).load(Ordering::Acquire) != kind.magic {
            return Ok(Err("is something else"));
        }
        if this.word(AT_VERSION).load(Ordering::Relaxed) != kind.version {
            return Ok(Err("is of another version"));
        }
        Ok(Ok(this))
    }

    fn map(file: File, len: usize) -> io::Result<Self> {
        let map = memmap2::MmapOptions::new().len(len).map_raw(&file)?;
        Ok(Self { map, file: file.into(), len })
    }

    /// The word at byte `at`, a multiple of eight.
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8));
        // SAFETY: in bounds and aligned, because a mapping starts at a page; mapped as long as `self` lives;
        // other processes may change it at any time, which is what atomics are for.
        unsafe { AtomicU64::from_ptr(self.at(at, 8).cast()) }
    }

    /// Has the kernel write what `source` gives to byte `at`, at most `len` bytes; tells how many. To be called
    /// by one thread at a time for one place.
    ///
    /// # Errors
    /// Those of `read`.
    pub(super) fn read_from(&self, source: BorrowedFd<'_>, at: usize, len: usize) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `len` bytes, all of them in the mapping, as `at` checks, which lives as
        // long as `self` and of which nobody holds a reference.
        let read = unsafe { libc::read(source.as_raw_fd(), self.at(at, len).cast(), len) };
        usize::try_from(read).map(|read| read.min(len)).map_err(|_| io::Error::last_os_error())
    }

    /// Makes `len` bytes zero.
    pub(super) fn zero(&self, at: usize, len: usize) {
        // SAFETY: mapped as long as `self` lives, as `at` checks, and nobody holds a reference into the mapping.
        unsafe { std::ptr::write_bytes(self.at(at, len), 0, len) };
    }

    /// Writes `bytes` to byte `at`.
    pub(super) fn put(&self, at: usize, bytes: &[u8]) {
        // SAFETY: the mapping has room for them, as `at` checks, and nobody holds a reference into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(at, bytes.len()), bytes.len()) };
    }

    /// A copy of `len` bytes.
    pub(super) fn copy(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        // SAFETY: the mapping has `len` bytes there, as `at` checks, the vector as many, and they do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(self.at(at, len), bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Copies what is at byte `at` into `bytes`.
    pub(super) fn copy_to(&self, at: usize, bytes: &mut [u8]) {
        // SAFETY: the mapping has as many bytes there, as `at` checks, and they do not overlap with a slice of ours.
        unsafe { std::ptr::copy_nonoverlapping(self.at(at, bytes.len()), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Where byte `at` is, with `len` bytes of the mapping from there on.
    fn at(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at <= self.len && len <= self.len - at, "{len} bytes at {at} of {}", self.len);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.map.as_mut_ptr().add(at) }
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
