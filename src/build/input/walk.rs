//! A walk through a directory, for whoever wants to see its entries.
//!
//! Every step is relative to an open directory and follows no symbolic link, so nothing outside
//! the source is seen whatever is renamed meanwhile. Only one directory is open at a time: the
//! way back up is `..`, checked against the directory we came from. So neither the depth of the
//! tree nor the length of its paths has a limit.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::build::BuildError;
use crate::build::selection::Selection;

/// Somebody who is shown every entry: a directory, then all its entries by name, then each of its
/// subdirectories in the same way.
pub(super) trait Visitor {
    /// How the visitor calls a directory.
    type Dir: Copy;

    fn root(&mut self, here: &Here<'_>, stat: &Stat) -> Result<Self::Dir, BuildError>;

    /// Returns a value for directories only.
    fn entry(
        &mut self,
        here: &Here<'_>,
        dir: Self::Dir,
        name: &OsStr,
        stat: &Stat,
    ) -> Result<Option<Self::Dir>, BuildError>;
}

/// The directory that is open, and how we got there.
pub(super) struct Here<'a> {
    pub(super) fd: BorrowedFd<'a>,
    pub(super) path: &'a dyn Fn() -> PathBuf,
    /// The names from the root.
    pub(super) names: &'a dyn Fn() -> Vec<Box<[u8]>>,
}

impl Here<'_> {
    pub(super) fn path_of(&self, name: &OsStr) -> PathBuf {
        let path = (self.path)();
        if name == "." { path } else { path.join(name) }
    }

    pub(super) fn read_error(&self, name: &OsStr, errno: Errno) -> BuildError {
        let path = self.path_of(name);
        match errno {
            // An entry that was listed and is gone, or is another kind now, is a moving target.
            Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::NOTDIR => BuildError::Changed { path },
            _ => BuildError::Read { path, source: errno.into() },
        }
    }
}

/// A directory between the root and where we are.
pub(super) struct Level<D> {
    name: CString,
    identity: (u64, u64),
    /// Subdirectories still to visit, last one first.
    todo: Vec<Subdirectory<D>>,
}

/// A directory that was seen and is still to visit.
pub(super) struct Subdirectory<D> {
    name: CString,
    dir: D,
    identity: (u64, u64),
}

pub(super) const OPEN_DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

pub(super) fn walk<V: Visitor>(root: &Path, selection: &Selection, visitor: &mut V) -> Result<(), BuildError> {
    let failed = |errno: Errno| BuildError::Read { path: root.to_owned(), source: errno.into() };
    // The root itself may be a symbolic link: it is what the user named.
    let mut fd = rustix::fs::open(root, OPEN_DIRECTORY.difference(OFlags::NOFOLLOW), Mode::empty()).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let dir = visitor.root(&Here { fd: fd.as_fd(), path: &|| root.to_owned(), names: &Vec::new }, &stat)?;
    let mut levels: Vec<Level<V::Dir>> = Vec::new();
    let todo = list(root, &levels, &fd, dir, selection, visitor)?;
    levels.push(Level { name: CString::default(), identity: identity(&stat), todo });
    loop {
        let level = levels.last_mut().expect("popped only below");
        if let Some(Subdirectory { name, dir, identity }) = level.todo.pop() {
            fd = step(root, &levels, &fd, &name, identity)?;
            levels.push(Level { name, identity, todo: Vec::new() });
            let todo = list(root, &levels, &fd, dir, selection, visitor)?;
            levels.last_mut().expect("just pushed").todo = todo;
        } else {
            levels.pop();
            let Some(parent) = levels.last() else { return Ok(()) };
            fd = step(root, &levels, &fd, c"..", parent.identity)?;
        }
    }
}

pub(super) fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

pub(super) fn path_of<D>(root: &Path, levels: &[Level<D>]) -> PathBuf {
    let mut path = root.to_owned();
    path.extend(levels.iter().skip(1).map(|level| OsStr::from_bytes(level.name.to_bytes())));
    path
}

pub(super) fn names_of<D>(levels: &[Level<D>]) -> Vec<Box<[u8]>> {
    levels.iter().skip(1).map(|level| level.name.to_bytes().into()).collect()
}

/// Opens the directory that `from` calls `name`, which must be the one that was seen before.
pub(super) fn step<D>(
    root: &Path,
    levels: &[Level<D>],
    from: &OwnedFd,
    name: &std::ffi::CStr,
    expected: (u64, u64),
) -> Result<OwnedFd, BuildError> {
    let here = Here { fd: from.as_fd(), path: &|| path_of(root, levels), names: &|| names_of(levels) };
    let name_text = OsStr::from_bytes(name.to_bytes());
    let fd =
        rustix::fs::openat(from, name, OPEN_DIRECTORY, Mode::empty()).map_err(|e| here.read_error(name_text, e))?;
    let stat = rustix::fs::fstat(&fd).map_err(|e| here.read_error(name_text, e))?;
    if identity(&stat) == expected { Ok(fd) } else { Err(BuildError::Changed { path: here.path_of(name_text) }) }
}

/// Shows the visitor every selected entry of the open directory, and returns the subdirectories.
pub(super) fn list<V: Visitor>(
    root: &Path,
    levels: &[Level<V::Dir>],
    fd: &OwnedFd,
    dir: V::Dir,
    selection: &Selection,
    visitor: &mut V,
) -> Result<Vec<Subdirectory<V::Dir>>, BuildError> {
    let here = Here { fd: fd.as_fd(), path: &|| path_of(root, levels), names: &|| names_of(levels) };
    let mut names = Vec::new();
    let entries = rustix::fs::Dir::read_from(fd).map_err(|e| here.read_error(OsStr::new("."), e))?;
    for entry in entries {
        let entry = entry.map_err(|e| here.read_error(OsStr::new("."), e))?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    let mut subdirectories = Vec::new();
    for name in names {
        let text = OsStr::from_bytes(name.to_bytes());
        let stat = rustix::fs::statat(fd, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| here.read_error(text, e))?;
        if is_left_out(selection, levels, text, &stat) {
            continue;
        }
        if let Some(dir) = visitor.entry(&here, dir, text, &stat)? {
            subdirectories.push(Subdirectory { name, dir, identity: identity(&stat) });
        }
    }
    subdirectories.reverse();
    Ok(subdirectories)
}

pub(super) fn is_left_out<D>(selection: &Selection, levels: &[Level<D>], name: &OsStr, stat: &Stat) -> bool {
    let is_null_device = kind_of(stat) == FileType::CharacterDevice && stat.st_rdev == 0;
    if selection.is_whiteout(name.as_bytes(), is_null_device) {
        return true;
    }
    if selection.exclude.is_empty() {
        return false;
    }
    let mut path: Vec<&[u8]> = levels.iter().skip(1).map(|level| level.name.to_bytes()).collect();
    path.push(name.as_bytes());
    selection.excludes(&path, kind_of(stat) == FileType::Directory)
}

pub(super) fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}
