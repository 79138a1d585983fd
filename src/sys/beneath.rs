//! A directory of the host and what is beneath it, and nothing else: whatever links, renames and mounts do.
//!
//! Everything is found from an open descriptor of the directory, name by name, by `openat2` (Linux 5.6): no
//! symbolic link is followed, no mount point crossed, and no `..` taken. What was found is held by a descriptor
//! that gives no access (`O_PATH`), and is opened through that: who replaces a file by a device meanwhile does not
//! have the device opened.

use std::ffi::CString;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, ResolveFlags, SeekFrom, Statx, StatxFlags, StatxTimestamp, fstatvfs,
    getxattr, listxattr, open, openat2, readlinkat, seek, statx,
};
use rustix::io::Errno;

/// Most bytes of names that are resolved by one call; the kernel takes 4095.
const LONGEST_STEP: usize = 3500;

/// Bytes of a first try at a value; most are shorter.
const USUAL_XATTR: usize = 256;

/// Longest value of an extended attribute, and longest list of their names.
const LONGEST_XATTR: usize = 1 << 16;

/// Bytes of directory entries that are read at once.
const LISTING: usize = 16 << 10;

/// The directory. Clones are one descriptor.
#[derive(Clone, Debug)]
pub struct Beneath(Arc<OwnedFd>);

/// Something beneath it, or itself.
#[derive(Debug)]
pub struct Found {
    fd: OwnedFd,
    facts: Facts,
}

/// What tells a file from another one that was put into its place. Numbers of inodes are given out again, so the
/// time of birth counts as well, where the file system knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Number of its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// Seconds and nanoseconds since 1970; zeros if it is unknown.
    pub born: (i64, u32),
}

/// What the host tells of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    pub identity: Identity,
    /// Type and permissions, as in `st_mode`.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Of a device that the file is: major and minor number.
    pub rdev: (u32, u32),
    pub size: u64,
    /// In units of 512 bytes.
    pub blocks: u64,
    pub block_size: u32,
    /// Seconds and nanoseconds since 1970.
    pub accessed: (i64, u32),
    pub modified: (i64, u32),
    pub changed: (i64, u32),
}

/// One name of a directory.
#[derive(Clone, Copy, Debug)]
pub struct Name<'a> {
    pub name: &'a [u8],
    pub inode: u64,
    /// As in `d_type`.
    pub kind: u8,
    /// Where to go on behind it.
    pub next: u64,
}

impl Facts {
    /// Whether it is of this type, one of `S_IFMT`.
    pub fn is(&self, kind: u32) -> bool {
        self.mode & libc::S_IFMT == kind
    }
}

impl Beneath {
    /// The directory at `path`, behind symbolic links.
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(Arc::new(open(path, flags, Mode::empty())?)))
    }

    /// One that another process had.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    /// The descriptor, for whoever keeps it.
    pub fn held(&self) -> Arc<OwnedFd> {
        self.0.clone()
    }

    /// The directory itself.
    pub fn itself(&self) -> Result<Found, Errno> {
        Found::at(&*self.0, b".")
    }

    /// Bytes of a block of its file system, how many of those it has, and how many files it has room for.
    pub fn size(&self) -> Result<(u64, u64, u64), Errno> {
        let stat = fstatvfs(&*self.0)?;
        Ok((stat.f_frsize, stat.f_blocks, stat.f_files))
    }

    /// What `path`, names with slashes between, leads to. It may be longer than what the kernel takes at once.
    ///
    /// # Errors
    /// `NOENT` or `NOTDIR` if it leads nowhere; `LOOP` if a name before the last is a link, `XDEV` if one is a mount
    /// point.
    pub fn find(&self, mut path: &[u8]) -> Result<Found, Errno> {
        let mut step: Option<OwnedFd> = None;
        while path.len() > LONGEST_STEP {
            let slash = path[..LONGEST_STEP].iter().rposition(|byte| *byte == b'/').ok_or(Errno::NAMETOOLONG)?;
            let dir = step.as_ref().unwrap_or(&self.0);
            step = Some(enter(dir, &path[..slash], OFlags::DIRECTORY)?);
            path = &path[slash + 1..];
        }
        Found::at(step.as_ref().unwrap_or(&self.0), path)
    }
}

fn enter(dir: impl AsFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    openat2(dir, path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | flags, Mode::empty(), resolve)
}

impl Found {
    fn at(dir: impl AsFd, path: &[u8]) -> Result<Self, Errno> {
        let fd = enter(dir, path, OFlags::empty())?;
        let facts = facts(&fd)?;
        Ok(Self { fd, facts })
    }

    /// What it is.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// What `name`, one name, is in this directory.
    pub fn child(&self, name: &[u8]) -> Result<Self, Errno> {
        if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
            return Err(Errno::NOENT);
        }
        Self::at(&self.fd, name)
    }

    /// The file, open for reading.
    ///
    /// # Errors
    /// `INVAL` if it is no regular file.
    pub fn open(&self) -> Result<File, Errno> {
        if !self.facts.is(libc::S_IFREG) {
            return Err(Errno::INVAL);
        }
        self.reopen(OFlags::NONBLOCK).map(File::from)
    }

    /// Visits the names of this directory, `.` and `..` among them, from place `from` on, 0 for the start, until
    /// `visit` breaks off. Tells whether it came to the end.
    ///
    /// # Errors
    /// `NOTDIR`; `INVAL` for a place that cannot be.
    pub fn list(&self, from: u64, visit: &mut dyn FnMut(Name<'_>) -> ControlFlow<()>) -> Result<bool, Errno> {
        let dir = self.reopen(OFlags::DIRECTORY)?;
        if from > 0 {
            seek(&dir, SeekFrom::Start(from))?;
        }
        let mut buffer = Vec::with_capacity(LISTING);
        let mut entries = RawDir::new(&dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let (inode, kind) = (entry.ino(), kind_in_listing(entry.file_type()));
            let name = Name { name: entry.file_name().to_bytes(), inode, kind, next: entry.next_entry_cookie() };
            if visit(name).is_break() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where this link points to.
    ///
    /// # Errors
    /// `INVAL` or `NOENT` if it is none.
    pub fn link(&self) -> Result<Vec<u8>, Errno> {
        readlinkat(&self.fd, "", Vec::new()).map(CString::into_bytes)
    }

    /// The value of an extended attribute.
    ///
    /// # Errors
    /// `NODATA` if it has none of that name, `OPNOTSUPP` where there are none.
    pub fn xattr(&self, name: &[u8]) -> Result<Vec<u8>, Errno> {
        with_room(|room| getxattr(self.path(), name, room))
    }

    /// The names of all extended attributes that this process may see, each ended by a NUL.
    pub fn xattrs(&self) -> Result<Vec<u8>, Errno> {
        with_room(|room| listxattr(self.path(), room))
    }

    /// The very inode, whatever its name leads to by now.
    fn reopen(&self, flags: OFlags) -> Result<OwnedFd, Errno> {
        open(self.path(), OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC | flags, Mode::empty())
    }

    /// A path that leads to the inode alone; of a link, to the link.
    fn path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }
}

/// Calls with room for what is usual, then with room for all that there can be.
fn with_room(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; USUAL_XATTR];
    let len = match call(&mut value) {
        Err(Errno::RANGE) => {
            value.resize(LONGEST_XATTR, 0);
            call(&mut value)?
        }
        outcome => outcome?,
    };
    value.truncate(len);
    Ok(value)
}

/// What the host tells of an open file.
pub fn facts(file: impl AsFd) -> Result<Facts, Errno> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = statx(file, "", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, mask)?;
    Ok(of_stat(&stat))
}

fn of_stat(stat: &Statx) -> Facts {
    let time = |time: &StatxTimestamp| (time.tv_sec, time.tv_nsec);
    let is_born = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    let identity = Identity {
        device: u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor),
        inode: stat.stx_ino,
        born: if is_born { time(&stat.stx_btime) } else { (0, 0) },
    };
    Facts {
        identity,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        block_size: stat.stx_blksize,
        accessed: time(&stat.stx_atime),
        modified: time(&stat.stx_mtime),
        changed: time(&stat.stx_ctime),
    }
}

fn kind_in_listing(kind: FileType) -> u8 {
    match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    use super::*;

    fn errno(found: Result<Found, Errno>) -> Errno {
        found.map(|found| *found.facts()).expect_err("it was found")
    }

    #[test]
    fn what_is_outside_is_never_found() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, secret) = (dir.path().join("in"), dir.path().join("secret"));
        fs::create_dir_all(inside.join("a/b")).unwrap();
        fs::write(&secret, "secret").unwrap();
        symlink("../secret", inside.join("link")).unwrap();
        symlink(dir.path(), inside.join("out")).unwrap();
        symlink("/proc/self/fd", inside.join("fds")).unwrap();
        let root = Beneath::open(&inside).unwrap();

        for path in [&b"../secret"[..], b"a/../../secret", b"/etc/passwd", secret.as_os_str().as_encoded_bytes()] {
            assert_eq!(errno(root.find(path)), Errno::XDEV, "{}", path.escape_ascii());
        }
        for path in [&b"out/secret"[..], b"fds/0"] {
            assert_eq!(errno(root.find(path)), Errno::LOOP, "{}", path.escape_ascii());
        }
        let found = root.find(b"a/b").unwrap();
        for name in [&b".."[..], b".", b"", b"../../secret", b"/"] {
            assert_eq!(errno(found.child(name)), Errno::NOENT, "{}", name.escape_ascii());
        }
        let link = root.find(b"link").unwrap();
        assert_eq!((link.link().unwrap(), link.open().err()), (b"../secret".to_vec(), Some(Errno::INVAL)));
    }

    #[test]
    fn a_file_is_opened_as_it_was_found() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "old").unwrap();
        let root = Beneath::open(dir.path()).unwrap();
        let found = root.find(b"file").unwrap();
        fs::write(dir.path().join("other"), "new").unwrap();
        fs::rename(dir.path().join("other"), dir.path().join("file")).unwrap();

        let mut text = String::new();
        found.open().unwrap().read_to_string(&mut text).unwrap();

        assert_eq!(text, "old");
        assert_ne!(root.find(b"file").unwrap().facts().identity, found.facts().identity);
    }

    #[test]
    fn paths_may_be_longer_than_the_kernel_takes_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = Beneath::open(dir.path()).unwrap();
        let name = [b'n'; 255];
        let mut at = root.itself().unwrap();
        for _ in 0..40 {
            rustix::fs::mkdirat(&at.fd, &name[..], Mode::from_raw_mode(0o755)).unwrap();
            at = at.child(&name).unwrap();
        }
        let path = vec![&name[..]; 40].join(&b'/');

        assert_eq!(root.find(&path).unwrap().facts().identity, at.facts().identity);
    }

    #[test]
    fn names_are_listed_from_any_place() {
        let dir = tempfile::tempdir().unwrap();
        (0..500).for_each(|number| fs::write(dir.path().join(format!("file-{number:04}")), "").unwrap());
        let root = Beneath::open(dir.path()).unwrap().itself().unwrap();
        let (mut names, mut from) = (Vec::new(), 0);
        loop {
            let mut left = 7;
            let is_end = root.list(from, &mut |name| {
                if left == 0 {
                    return ControlFlow::Break(());
                }
                left -= 1;
                names.push(name.name.to_vec());
                from = name.next;
                ControlFlow::Continue(())
            });
            if is_end.unwrap() {
                break;
            }
        }
        names.sort();
        let mut wanted: Vec<_> = (0..500).map(|number| format!("file-{number:04}").into_bytes()).collect();
        wanted.extend([b".".to_vec(), b"..".to_vec()]);
        wanted.sort();
        assert_eq!(names, wanted);
    }
}
