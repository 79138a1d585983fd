//! Files that get their name when they are complete and on disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::sys;

/// A file being written beside the place where it will be. Removed when dropped unfinished.
#[derive(Debug)]
pub(super) struct OutputFile {
    file: File,
    path: PathBuf,
    place: PathBuf,
    is_finished: bool,
}

impl OutputFile {
    /// A new empty file, readable and writable, that will be at `place`.
    pub(super) fn create(place: &Path) -> io::Result<Self> {
        if place.file_name().is_none() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a file"));
        }
        sys::files::ensure_replaceable(place)?;
        let (path, file) = unused(place, |path| File::options().read(true).write(true).create_new(true).open(path))?;
        Ok(Self { file, path, place: place.to_owned(), is_finished: false })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file and gives it its name, over whatever had it.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, &self.place)?;
        self.is_finished = true;
        File::open(parent(&self.place))?.sync_all()
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The directory that `place` is in.
pub(super) fn parent(place: &Path) -> &Path {
    place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether two paths name the same place, however they are spelled: the same name in the same
/// directory. What is at the place does not matter, for it would be replaced.
pub(super) fn is_same_place(one: &Path, other: &Path) -> bool {
    let directory = |place: &Path| fs::metadata(parent(place)).map(|meta| (meta.dev(), meta.ino())).ok();
    // Nothing can be put in a directory that is not there.
    one.file_name() == other.file_name() && directory(one).is_some_and(|one| directory(other) == Some(one))
}

/// Makes something beside `place` under a name that says it is unfinished and that nobody uses.
pub(super) fn unused<T>(place: &Path, mut make: impl FnMut(&Path) -> io::Result<T>) -> io::Result<(PathBuf, T)> {
    let mut attempt = 0u32;
    loop {
        let path = parent(place).join(format!(".unfinished-{}-{attempt}", std::process::id()));
        match make(&path) {
            Ok(made) => return Ok((path, made)),
            // Left by a process that was killed, or in use by another thread.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_the_same_however_it_is_spelled() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        fs::create_dir(at("sub")).unwrap();
        std::os::unix::fs::symlink("sub", at("link")).unwrap();
        for (one, other, is_same) in [
            ("sub/file", "sub/file", true),
            ("sub/file", "sub/../sub/./file", true),
            ("sub/file", "link/file", true),
            ("sub/file", "sub/other", false),
            ("sub/file", "file", false),
        ] {
            assert_eq!(is_same_place(&at(one), &at(other)), is_same, "{other}");
        }
        assert!(is_same_place(Path::new("file"), Path::new("./file")));
    }

    #[test]
    fn an_unfinished_file_never_has_its_name_and_does_not_stay() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("out");
        fs::write(&place, "before").unwrap();

        drop(OutputFile::create(&place).unwrap());

        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert_eq!(fs::read(&place).unwrap(), b"before");
        OutputFile::create(&place).unwrap().finish().unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
