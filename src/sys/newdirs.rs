//! Directories that are made for something which may come to nothing.

use std::fs::{DirBuilder, remove_dir};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Those that were not there before, the outer ones first. With this value they go again, but for what something
/// was put into.
#[derive(Debug, Default)]
pub struct NewDirs(Vec<PathBuf>);

impl NewDirs {
    /// Makes `dir` with all above it, for its owner alone.
    ///
    /// # Errors
    /// What the file system says; those that came about before that go with this value too.
    pub fn make(&mut self, dir: &Path) -> io::Result<()> {
        let missing: Vec<_> = dir.ancestors().take_while(|above| !above.exists()).map(Path::to_owned).collect();
        self.0.extend(missing.into_iter().rev());
        DirBuilder::new().recursive(true).mode(0o700).create(dir)
    }

    /// It did not come to nothing: they stay.
    pub fn stay(mut self) {
        self.0.clear();
    }
}

impl Drop for NewDirs {
    fn drop(&mut self) {
        // One that is not empty, or gone, is as it should be.
        self.0.drain(..).rev().for_each(|dir| drop(remove_dir(dir)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_goes_and_what_was_there_or_is_used_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut dirs = NewDirs::default();
        std::fs::create_dir(dir.path().join("old")).unwrap();
        for name in ["old", "old/new/deep", "used/deep", "used/deep"] {
            dirs.make(&dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("used/file"), "").unwrap();

        drop(dirs);

        let left = |name: &str| dir.path().join(name).exists();
        assert!(left("old") && left("used") && !left("old/new") && !left("used/deep"));
        let mut dirs = NewDirs::default();
        dirs.make(&dir.path().join("kept")).unwrap();
        dirs.stay();
        assert!(left("kept"));
    }
}
