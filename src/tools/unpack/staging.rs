//! Where a directory is unpacked until it is complete.
//!
//! A target that does not exist is made beside its place and renamed. One that exists and is empty,
//! such as a mount point, gets a directory inside, whose content moves up at the end. Either way
//! the name says that it is unfinished for as long as it is.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, Mode, OFlags, RenameFlags, renameat_with};

use super::UnpackError;
use crate::tools::output::{parent, unused};

/// A directory that is removed, as far as that is possible, unless it is finished.
#[derive(Debug)]
pub(super) struct Staging {
    target: PathBuf,
    /// Where the children of the root are made.
    path: PathBuf,
    target_exists: bool,
    is_finished: bool,
}

impl Staging {
    /// Refuses a `target` that has something in it.
    pub(super) fn create(target: &Path) -> Result<Self, UnpackError> {
        let failed = |source| UnpackError::Write { path: target.to_owned(), source };
        let target_exists = match fs::read_dir(target) {
            Ok(mut entries) => match entries.next() {
                None => true,
                Some(Ok(_)) => return Err(UnpackError::NotEmpty { path: target.to_owned() }),
                Some(Err(error)) => return Err(failed(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(failed(error)),
        };
        let place = if target_exists { target.join("unfinished") } else { target.to_owned() };
        let make = |path: &Path| Ok(rustix::fs::mkdir(path, Mode::from_raw_mode(0o700))?);
        let (path, ()) = unused(&place, make).map_err(failed)?;
        let staging = Self { target: target.to_owned(), path, target_exists, is_finished: false };
        staging.forget_inherited().map_err(failed)?;
        Ok(staging)
    }

    /// The directory, open.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        open_directory(&self.path)
    }

    /// Access lists of the parent must not spread into what the image says.
    fn forget_inherited(&self) -> io::Result<()> {
        let directory = self.open()?;
        for name in ["system.posix_acl_default", "system.posix_acl_access"] {
            use rustix::io::Errno;
            match rustix::fs::fremovexattr(&directory, name) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Puts the directory in its place when everything in it is on disk. `seal` gives the root its
    /// attributes.
    pub(super) fn finish(mut self, seal: impl FnOnce(&OwnedFd) -> Result<(), UnpackError>) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Write { path: self.target.clone(), source };
        if self.target_exists {
            move_up(&self.path, &self.target).map_err(failed)?;
            self.is_finished = true;
            let directory = open_directory(&self.target).map_err(failed)?;
            seal(&directory)?;
            return sync(&directory).map_err(failed);
        }
        let directory = self.open().map_err(failed)?;
        seal(&directory)?;
        sync(&directory).map_err(failed)?;
        let renamed = renameat_with(CWD, &self.path, CWD, &self.target, RenameFlags::NOREPLACE);
        renamed.map_err(|errno| failed(errno.into()))?;
        self.is_finished = true;
        let named = fs::File::open(parent(&self.target)).and_then(|parent| parent.sync_all());
        named.map_err(|source| UnpackError::Write { path: self.target.clone(), source })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.is_finished {
            // What cannot be removed has a name that says what it is.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

fn sync(directory: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::syncfs(directory)?)
}

/// Moves everything in `from` into `to` and removes `from`.
fn move_up(from: &Path, to: &Path) -> io::Result<()> {
    let (from_fd, to_fd) = (open_directory(from)?, open_directory(to)?);
    sync(&from_fd)?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&from_fd)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    for name in &names {
        renameat_with(&from_fd, name, &to_fd, name, RenameFlags::NOREPLACE)?;
    }
    let name = from.file_name().unwrap_or(OsStr::new("."));
    Ok(rustix::fs::unlinkat(&to_fd, name, rustix::fs::AtFlags::REMOVEDIR)?)
}
