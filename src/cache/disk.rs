//! The file operations of a store, as far as a power cut or a failing disk can tell them apart.
//!
//! A store changes its directory through a [`Disk`] and nothing else, so a test can put one below it
//! that remembers every operation, loses what was not synced, or fails where it is told to. The lock
//! is not part of it: after a power cut nobody holds it.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rustix::fs::OFlags;

use super::sink::Sink;
use crate::base::ByteRange;
use crate::sys::files::{data_ranges, has_room, is_open_elsewhere};

/// The directory tree of a store.
///
/// Nothing is durable before it is synced: bytes and length of a file by its own
/// [`Sink::sync`], names by [`Disk::sync_dir`] of the directory they are in.
pub trait Disk: Send + Sync + 'static {
    /// Creates `dir` and what is missing above it, closed to other users. It may be there already.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;

    /// All bytes of the file at `path`.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// What is at `path`, without following a link.
    fn facts(&self, path: &Path) -> io::Result<FileFacts>;

    /// Opens an empty file at `path` for writing, closed to other users; what was there is gone.
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// Opens the file at `path` for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>>;

    /// The names in a directory, in no order.
    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>>;

    /// Gives a file or directory another name in the same directory; a file or an empty directory that
    /// had that name is gone.
    ///
    /// # Errors
    /// `DirectoryNotEmpty` or `AlreadyExists` if a directory with something in it has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes the name of a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Removes a directory that is empty.
    fn remove_dir(&self, dir: &Path) -> io::Result<()>;

    /// Returns when the names in `dir` are on stable storage.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Whether `bytes` more can be written below the directory `dir` now, of which so many are `tried`, and occupied until
    /// this returns. Changes nothing that outlasts the call.
    fn has_room(&self, dir: &Path, bytes: u64, tried: u64) -> io::Result<bool> {
        has_room(dir, bytes, tried)
    }

    /// Bytes below the directory `dir` that nothing occupies, for whomever they are.
    fn free(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bfree.saturating_mul(stat.f_frsize))
    }

    /// Whether anybody at all has the file at `path` open, a kernel that has it mounted included.
    ///
    /// # Errors
    /// `Unsupported` where the file system does not say.
    fn is_open(&self, path: &Path) -> io::Result<bool> {
        is_open_elsewhere(File::open(path)?.as_fd())
    }
}

/// A file of a store, open for writing.
pub trait DiskFile: Sink {
    /// Changes the length in bytes; what is new is a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// What the file is at this moment.
    fn facts(&self) -> io::Result<FileFacts>;

    /// The parts of the file's first `len` bytes that are data, not holes, in order.
    fn data_ranges(&self, len: u64) -> io::Result<Vec<ByteRange>>;

    /// The open file of this host that is written to, if it is one.
    fn host_file(&self) -> Option<&Arc<File>> {
        None
    }
}

/// What tells one file from another, and from itself at another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Whether it is an ordinary file.
    pub is_file: bool,
    /// Whether it is a directory.
    pub is_dir: bool,
    /// Length in bytes.
    pub len: u64,
    /// Inode number.
    pub inode: u64,
    /// When the inode was created, in nanoseconds since 1970; tells apart files that got the same
    /// number. 0 where the file system does not say.
    pub born: u64,
    /// When anything of it was changed last, in nanoseconds since 1970: the change time of the inode, which nobody can
    /// set. Kernels before 6.13 count it in ticks of some milliseconds.
    pub changed: u64,
}

impl FileFacts {
    /// Whether both are about one file of one length, whatever was done to it in between.
    pub fn is_same_file(&self, other: &Self) -> bool {
        Self { changed: 0, ..*self } == Self { changed: 0, ..*other }
    }
}

impl From<Metadata> for FileFacts {
    fn from(meta: Metadata) -> Self {
        let born = meta.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let born = born.and_then(|age| u64::try_from(age.as_nanos()).ok()).unwrap_or(0);
        let changed = meta.ctime().saturating_mul(1_000_000_000).saturating_add(meta.ctime_nsec());
        let (is_file, is_dir) = (meta.is_file(), meta.is_dir());
        Self { is_file, is_dir, len: meta.len(), inode: meta.ino(), born, changed: changed.try_into().unwrap_or(0) }
    }
}

/// The file systems of this host.
#[derive(Debug)]
pub struct HostDisk;

impl Disk for HostDisk {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn facts(&self, path: &Path) -> io::Result<FileFacts> {
        fs::symlink_metadata(path).map(FileFacts::from)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
        Ok(Box::new(FileSink::new(open?)))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(FileSink::new(OpenOptions::new().read(true).write(true).open(path)?)))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn remove_dir(&self, dir: &Path) -> io::Result<()> {
        fs::remove_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

/// An ordinary file.
#[derive(Debug)]
pub struct FileSink {
    file: Arc<File>,
    /// Whether it is open for reading as well.
    readable: bool,
}

impl FileSink {
    /// Writes to `file`, which must be open for writing, and for reading if anybody asks for it.
    pub fn new(file: impl Into<Arc<File>>) -> Self {
        let file = file.into();
        // What an earlier release had opened and left behind is not.
        let mode = rustix::fs::fcntl_getfl(&file).map(|flags| flags & OFlags::ACCMODE);
        Self { file, readable: mode.is_ok_and(|mode| mode == OFlags::RDWR) }
    }
}

impl Sink for FileSink {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(bytes, at)
    }

    fn file(&self) -> Option<&File> {
        self.readable.then_some(&*self.file)
    }
}

impl DiskFile for FileSink {
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn facts(&self) -> io::Result<FileFacts> {
        self.file.metadata().map(FileFacts::from)
    }

    fn data_ranges(&self, len: u64) -> io::Result<Vec<ByteRange>> {
        data_ranges(self.file.as_fd(), len)
    }

    fn host_file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }
}

impl fmt::Debug for dyn Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disk")
    }
}
