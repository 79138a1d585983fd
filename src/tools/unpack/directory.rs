use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::{self, Made, Refused};
use super::levels::{Levels, open_beneath};
use super::staging::Staging;
use super::{UnpackError, UnpackOptions, UnpackReport, announce, device, path_of};
use crate::build::Progress;
use crate::image::{FirstPaths, Inode, Kind, Nid, Visit};
use crate::reader::{FileReader, Files, Piece, ReadError};
use crate::tools::sparse::SparseWriter;

/// Writes everything in the image to the directory `target`, which is empty or does not exist.
///
/// Nothing is written outside `target`, whatever the image says and whatever is replaced meanwhile;
/// a failure leaves at most a directory whose name says that it is unfinished. Everything is on
/// disk when this returns.
///
/// # Errors
/// An [`UnpackError`] that names the entry at fault.
pub fn to_directory(
    files: &Files,
    target: &Path,
    options: UnpackOptions,
    progress: &dyn Progress,
) -> Result<UnpackReport, UnpackError> {
    let staging = Staging::create(target)?;
    announce(files.image(), progress);
    let root = staging.open().map_err(|source| UnpackError::Write { path: target.to_owned(), source })?;
    let mut writer = Writer {
        files,
        reader: files.reader(),
        target,
        options,
        progress,
        levels: Levels::new(root),
        linked: FirstPaths::default(),
        left_out: HashSet::new(),
        report: UnpackReport::default(),
    };
    let root = writer.write_all()?;
    writer.report.count(Kind::Directory, 0);
    let skipped = writer.report.skipped.clone();
    staging.finish(|directory| {
        // What was left out of the root counts once, however often this is tried.
        writer.report.skipped = skipped.clone();
        let applied = writer.apply(&root, Made::Open(directory.as_fd()));
        applied.map_err(|refused| writer.refused(&[], &root, refused))
    })?;
    Ok(writer.report)
}

struct Writer<'a> {
    files: &'a Files,
    reader: FileReader<'a>,
    target: &'a Path,
    options: UnpackOptions,
    progress: &'a dyn Progress,
    levels: Levels,
    /// Of files with several paths.
    linked: FirstPaths<'a>,
    /// Those of them that were not written.
    left_out: HashSet<Nid>,
    report: UnpackReport,
}

/// Where an entry belongs: its names from the root, of which the last one is its own.
type Names<'n> = [&'n [u8]];

impl<'a> Writer<'a> {
    /// Writes all but the root itself, which is given back.
    fn write_all(&mut self) -> Result<Inode, UnpackError> {
        let (mut walk, mut root) = (self.files.image().walk(), None);
        while let Some(step) = walk.next_visit() {
            let Visit { path, inode } =
                step.map_err(|cause| UnpackError::Image { path: path_of(&self.levels.path()), cause })?;
            match path.split_last() {
                None if inode.kind == Kind::Directory => root = Some(inode),
                None => return Err(damaged(path, inode.nid, "is the root and no directory")),
                Some((_, parents)) => {
                    self.leave_to(parents.len())?;
                    self.entry(path, &inode)?;
                }
            }
            self.progress.advance(1, 0);
        }
        self.leave_to(0)?;
        Ok(root.expect("a walk begins with the root"))
    }

    fn entry(&mut self, names: &Names<'a>, inode: &Inode) -> Result<(), UnpackError> {
        if inode.kind != Kind::Directory && inode.nlink > 1 && self.is_linked(names, inode)? {
            return Ok(());
        }
        match inode.kind {
            Kind::Directory => {
                let name = names.last().expect("not the root");
                self.levels.enter(name, *inode).map_err(|error| self.not_made(names, error))?;
            }
            Kind::Regular => self.regular(names, inode)?,
            Kind::Symlink => {
                let target = self.files.image().symlink(inode);
                let target = target.map_err(|cause| UnpackError::Image { path: path_of(names), cause })?;
                self.make(names, inode, |here, name| rustix::fs::symlinkat(&*target, here, name))?;
            }
            Kind::Character | Kind::Block if self.options.skip_devices => {
                self.report.skipped.devices += 1;
                if inode.nlink > 1 {
                    self.left_out.insert(inode.nid);
                }
                return Ok(());
            }
            Kind::Character | Kind::Block | Kind::Fifo | Kind::Socket => self.special(names, inode)?,
        }
        // Directories are counted when they are finished.
        if inode.kind != Kind::Directory {
            self.report.count(inode.kind, inode.size);
        }
        Ok(())
    }

    /// Makes a further name for a file that has one. `false` if this is its first.
    fn is_linked(&mut self, names: &Names<'a>, inode: &Inode) -> Result<bool, UnpackError> {
        let Some(first) = self.linked.get(inode.nid) else {
            self.linked.note(inode.nid, names);
            return Ok(false);
        };
        if self.left_out.contains(&inode.nid) {
            self.report.skipped.devices += 1;
            return Ok(true);
        }
        let (first_name, parents) = first.split_last().expect("not the root");
        let linked = self.levels.find(&parents.join(&b'/')).and_then(|from| {
            let name = *names.last().expect("not the root");
            Ok(rustix::fs::linkat(&from, *first_name, self.levels.here()?, name, AtFlags::empty())?)
        });
        linked.map_err(|error| self.not_made(names, error))?;
        self.report.hard_links += 1;
        Ok(true)
    }

    fn regular(&mut self, names: &Names<'_>, inode: &Inode) -> Result<(), UnpackError> {
        let name = names.last().expect("not the root");
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let made = self.levels.here().and_then(|here| open_beneath(here, name, flags, 0o600));
        let file = File::from(made.map_err(|error| self.not_made(names, error))?);
        let (target, progress) = (self.target, self.progress);
        let mut writer = SparseWriter::new(&file, 0);
        let written = self.reader.read(inode, &mut |piece| match piece {
            Piece::Bytes(bytes) => {
                progress.advance(0, bytes.len() as u64);
                writer.write(bytes).map_err(Failure::Write)
            }
            Piece::Zeros(len) => {
                progress.advance(0, len);
                writer.zeros(len);
                Ok(())
            }
        });
        match written.and_then(|()| writer.finish().map_err(Failure::Write)) {
            Ok(()) => {
                let applied = self.apply(inode, Made::Open(file.as_fd()));
                applied.map_err(|refused| self.refused(names, inode, refused))
            }
            Err(Failure::Read(cause)) => Err(UnpackError::Content { path: path_of(names), cause: Box::new(cause) }),
            Err(Failure::Write(source)) => Err(UnpackError::Write { path: target.join(path_of(names)), source }),
        }
    }

    fn special(&mut self, names: &Names<'_>, inode: &Inode) -> Result<(), UnpackError> {
        let kind = match inode.kind {
            Kind::Character => FileType::CharacterDevice,
            Kind::Block => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
            _ => FileType::Socket,
        };
        // FIFOs and sockets have a number as well, which means nothing.
        let is_device = matches!(inode.kind, Kind::Character | Kind::Block);
        let (major, minor) = if is_device { device(inode.rdev) } else { (0, 0) };
        let number = rustix::fs::makedev(major, minor);
        let made = self
            .make(names, inode, |here, name| rustix::fs::mknodat(here, name, kind, Mode::from_raw_mode(0o600), number));
        match made {
            Err(UnpackError::Write { source, .. }) if is_device && is_refused(&source) => {
                Err(UnpackError::Device { path: path_of(names) })
            }
            other => other,
        }
    }

    /// Makes what has no content with `make` and gives it its attributes.
    fn make(
        &mut self,
        names: &Names<'_>,
        inode: &Inode,
        make: impl FnOnce(std::os::fd::BorrowedFd<'_>, &[u8]) -> Result<(), Errno>,
    ) -> Result<(), UnpackError> {
        let name = *names.last().expect("not the root");
        let made = self.levels.here().and_then(|here| {
            make(here, name)?;
            // By itself, for what is a link must not be followed: not even the one just made.
            let fd = rustix::fs::openat(here, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            Ok(fd)
        });
        let fd = made.map_err(|error| self.not_made(names, error))?;
        let applied = self.apply(inode, Made::Path(fd.as_fd()));
        applied.map_err(|refused| self.refused(names, inode, refused))
    }

    /// Leaves directories until only `depth` of them are left, finishing each.
    fn leave_to(&mut self, depth: usize) -> Result<(), UnpackError> {
        while self.levels.depth() > depth {
            let left = self.levels.leave();
            let (fd, name, inode) = left.map_err(|error| self.not_made(&self.levels.path(), error))?;
            self.report.count(Kind::Directory, 0);
            let applied = self.apply(&inode, Made::Open(fd.as_fd()));
            applied.map_err(|refused| {
                let mut names = self.levels.path();
                names.push(&name);
                self.refused(&names, &inode, refused)
            })?;
        }
        Ok(())
    }

    fn apply(&mut self, inode: &Inode, made: Made<'_>) -> Result<(), Refused> {
        attributes::apply(self.files.image(), inode, made, &self.options, &mut self.report.skipped)
    }

    fn refused(&self, names: &Names<'_>, inode: &Inode, refused: Refused) -> UnpackError {
        let path = path_of(names);
        match refused {
            Refused::Image(cause) => UnpackError::Image { path, cause },
            Refused::Owner => UnpackError::Owner { path, uid: inode.uid, gid: inode.gid },
            Refused::Xattr { name, errno } => {
                let name = name.escape_ascii().to_string();
                UnpackError::Xattr { path, name, source: errno.into() }
            }
            Refused::Other(source) => UnpackError::Write { path: self.target.join(path), source },
        }
    }

    /// Why an entry could not be made. The target was empty, so what is there came out of the image.
    fn not_made(&self, names: &Names<'_>, error: io::Error) -> UnpackError {
        let path = path_of(names);
        if error.kind() == io::ErrorKind::AlreadyExists {
            return UnpackError::Twice { path };
        }
        UnpackError::Write { path: self.target.join(path), source: error }
    }
}

/// The two ways in which a file is not copied.
enum Failure {
    Read(ReadError),
    Write(io::Error),
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

fn is_refused(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

fn damaged(names: &Names<'_>, nid: Nid, rule: &'static str) -> UnpackError {
    UnpackError::Image { path: path_of(names), cause: crate::image::ImageError::Inode { nid, rule } }
}
