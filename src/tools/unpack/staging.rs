//! Where a directory is unpacked until it is complete.
//!
//! A target that does not exist is made beside its place and renamed. One that exists and is empty,
//! such as a mount point, gets a directory inside, whose content moves up at the end: after the
//! target has its attributes, and back again if one name cannot be moved. Either way the name says
//! that it is unfinished for as long as it is.

use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, Gid, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, renameat_with,
};

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
    /// attributes, and may be called more than once.
    ///
    /// A failure takes back what was done to a target that existed, except for extended attributes
    /// that were set on it.
    pub(super) fn finish(
        mut self,
        mut seal: impl FnMut(&OwnedFd) -> Result<(), UnpackError>,
    ) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Write { path: self.target.clone(), source };
        if self.target_exists {
            self.rehearse(&mut seal)?;
            self.fill(&mut seal)?;
            self.is_finished = true;
            return Ok(());
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

    /// Seals a directory that nobody needs, so that what the file system refuses is known before
    /// anything is done to the target.
    fn rehearse(&self, seal: &mut dyn FnMut(&OwnedFd) -> Result<(), UnpackError>) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Write { path: self.target.clone(), source };
        let make = |path: &Path| Ok(rustix::fs::mkdir(path, Mode::from_raw_mode(0o700))?);
        let (path, ()) = unused(&self.path, make).map_err(failed)?;
        let sealed = open_directory(&path).map_err(failed).and_then(|directory| seal(&directory));
        let removed = fs::remove_dir(&path).map_err(failed);
        sealed.and(removed)
    }

    /// Seals the target and moves everything up into it: all of it or nothing.
    fn fill(&self, seal: &mut dyn FnMut(&OwnedFd) -> Result<(), UnpackError>) -> Result<(), UnpackError> {
        let failed = |source| UnpackError::Write { path: self.target.clone(), source };
        let target = open_directory(&self.target).map_err(failed)?;
        let before = rustix::fs::fstat(&target).map_err(|errno| failed(errno.into()))?;
        let mut names = Names::new(&self.path, &target).map_err(failed)?;
        let filled = seal(&target).and_then(|()| names.move_up().map_err(failed));
        if filled.is_err() {
            give_back(&target, &before);
            names.move_back();
        }
        filled
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.is_finished {
            // The root may have the mode of the image's already, which may not allow it. What cannot
            // be removed has a name that says what it is.
            let _ = rustix::fs::chmod(&self.path, Mode::from_raw_mode(0o700));
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

const OPEN_DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OPEN_DIRECTORY, Mode::empty())?)
}

fn sync(directory: &OwnedFd) -> io::Result<()> {
    Ok(rustix::fs::syncfs(directory)?)
}

/// What lies in the staging directory, on its way up into the target.
struct Names<'t> {
    /// Name of the staging directory in the target.
    from_name: &'t OsStr,
    from: OwnedFd,
    to: &'t OwnedFd,
    /// In order, so that the same failure comes at the same name.
    names: Vec<CString>,
    /// How many of them have been moved.
    moved: usize,
}

impl<'t> Names<'t> {
    fn new(from: &'t Path, to: &'t OwnedFd) -> io::Result<Self> {
        let from_name = from.file_name().unwrap_or(OsStr::new("."));
        let from = open_directory(from)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&from)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();
        Ok(Self { from_name, from, to, names, moved: 0 })
    }

    /// Moves everything when it is on disk, and leaves the target with the mode and the time that
    /// it has now.
    fn move_up(&mut self) -> io::Result<()> {
        sync(&self.from)?;
        let sealed = rustix::fs::fstat(self.to)?;
        let mode = Mode::from_raw_mode(sealed.st_mode);
        // Its owner may need more than the image allows.
        let is_open = mode.contains(Mode::WUSR | Mode::XUSR);
        if !is_open {
            rustix::fs::fchmod(self.to, mode | Mode::WUSR | Mode::XUSR)?;
        }
        for name in &self.names {
            renameat_with(&self.from, name, self.to, name, RenameFlags::NOREPLACE)?;
            self.moved += 1;
        }
        rustix::fs::unlinkat(self.to, self.from_name, AtFlags::REMOVEDIR)?;
        if !is_open {
            rustix::fs::fchmod(self.to, mode)?;
        }
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: sealed.st_mtime, tv_nsec: sealed.st_mtime_nsec.cast_signed() },
        };
        rustix::fs::futimens(self.to, &times)?;
        sync(self.to)
    }

    /// As far as possible, moves what was moved back to where it is unfinished.
    fn move_back(&mut self) {
        if self.moved == self.names.len() {
            // The directory may be gone already.
            let _ = rustix::fs::mkdirat(self.to, self.from_name, Mode::from_raw_mode(0o700));
            let again = rustix::fs::openat(self.to, self.from_name, OPEN_DIRECTORY, Mode::empty());
            let Ok(again) = again else { return };
            self.from = again;
        }
        for name in &self.names[..self.moved] {
            let _ = renameat_with(self.to, name, &self.from, name, RenameFlags::NOREPLACE);
        }
    }
}

/// Gives a directory the owner and the mode that it had, as far as possible.
fn give_back(directory: &OwnedFd, before: &Stat) {
    let (owner, group) = (Uid::from_raw(before.st_uid), Gid::from_raw(before.st_gid));
    let _ = rustix::fs::fchown(directory, Some(owner), Some(group));
    let _ = rustix::fs::fchmod(directory, Mode::from_raw_mode(before.st_mode));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    /// A staging directory with three names in it, and the target it is in.
    fn staged(dir: &Path) -> (Staging, PathBuf) {
        let target = dir.join("target");
        fs::create_dir(&target).unwrap();
        fs::set_permissions(&target, fs::Permissions::from_mode(0o750)).unwrap();
        let staging = Staging::create(&target).unwrap();
        fs::create_dir(staging.path.join("a")).unwrap();
        fs::write(staging.path.join("a/file"), "ours").unwrap();
        fs::write(staging.path.join("b"), "ours").unwrap();
        fs::write(staging.path.join("c"), "ours").unwrap();
        (staging, target)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn a_name_that_appears_meanwhile_takes_everything_back() {
        let dir = tempfile::tempdir().unwrap();
        let (staging, target) = staged(dir.path());

        let error = staging.finish(|directory| {
            fs::write(target.join("b"), "theirs").unwrap();
            rustix::fs::fchmod(directory, Mode::from_raw_mode(0o711)).unwrap();
            Ok(())
        });

        let Err(UnpackError::Write { source, .. }) = error else { panic!("{error:?}") };
        assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names(&target), ["b"]);
        assert_eq!(fs::read(target.join("b")).unwrap(), b"theirs");
        assert_eq!(mode(&target), 0o750);
    }

    #[test]
    fn a_root_that_cannot_be_sealed_leaves_the_target_as_it_was() {
        // The first call is for another directory, the second one for the target.
        for fails_at in [1, 2] {
            let dir = tempfile::tempdir().unwrap();
            let (staging, target) = staged(dir.path());
            let mut calls = 0;

            let error = staging.finish(|directory| {
                calls += 1;
                assert!(!target.join("a").exists(), "nothing has its name before the root is sealed");
                rustix::fs::fchmod(directory, Mode::from_raw_mode(0o500)).unwrap();
                if calls == fails_at { Err(UnpackError::Twice { path: "a".into() }) } else { Ok(()) }
            });

            assert!(matches!(error, Err(UnpackError::Twice { .. })), "{error:?}");
            assert_eq!((names(&target), mode(&target)), (Vec::new(), 0o750));
        }
    }

    #[test]
    fn a_target_that_is_filled_keeps_the_mode_and_the_time_of_its_seal() {
        let dir = tempfile::tempdir().unwrap();
        let (staging, target) = staged(dir.path());

        let sealed = |directory: &OwnedFd| {
            rustix::fs::fchmod(directory, Mode::from_raw_mode(0o2511)).unwrap();
            let time = Timespec { tv_sec: -5, tv_nsec: 7 };
            rustix::fs::futimens(directory, &Timestamps { last_access: time, last_modification: time }).unwrap();
            Ok(())
        };
        staging.finish(sealed).unwrap();

        let meta = fs::metadata(&target).unwrap();
        assert_eq!((mode(&target), meta.mtime(), meta.mtime_nsec()), (0o2511, -5, 7));
        assert_eq!(names(&target), ["a", "b", "c"]);
        assert_eq!(names(&target.join("a")), ["file"]);
    }
}
