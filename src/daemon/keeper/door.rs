//! Where a keeper is reached: a socket under the name of its rank, which one process at a time has.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::post::socket_path;
use crate::sys::fdpass;
use crate::sys::files::{InodeId, inode_id_at};

/// The socket of a rank, and whether it is this process that listens there.
///
/// A new keeper takes the name over from an old one at once, by renaming: whoever connects reaches the
/// one or the other. The old one can tell, because the name leads to another inode.
pub(super) struct Door {
    path: PathBuf,
    /// The name until the new socket listens.
    fresh: PathBuf,
    open: Option<(OwnedFd, InodeId)>,
}

impl Door {
    /// The door of `rank` below `run`, not open yet.
    pub(super) fn new(run: &Path, rank: usize) -> Self {
        let path = socket_path(run, rank);
        let fresh = path.with_extension("new");
        Self { path, fresh, open: None }
    }

    /// Listens under the name, whoever had it.
    pub(super) fn open(&mut self) -> io::Result<()> {
        let listener = fdpass::listen(&self.fresh)?;
        let id = inode_id_at(&self.fresh)?;
        fs::rename(&self.fresh, &self.path)?;
        self.open = Some((listener, id));
        Ok(())
    }

    /// What connections come from, if it was opened.
    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.open.as_ref().map(|(listener, _)| listener.as_fd())
    }

    /// Whether the name leads to this process.
    pub(super) fn is_ours(&self) -> bool {
        self.open.as_ref().is_some_and(|(_, id)| inode_id_at(&self.path).is_ok_and(|there| there == *id))
    }

    /// The process that the name leads to, if one listens there.
    pub(super) fn owner(&self) -> Option<u32> {
        let socket = fdpass::connect(&self.path).ok()?;
        fdpass::peer(socket.as_fd()).ok().map(|(pid, _)| pid)
    }

    /// Takes the name away, unless it has come to another process.
    pub(super) fn close(&mut self) {
        if self.is_ours() {
            let _ = fs::remove_file(&self.path);
        }
        self.open = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_goes_from_one_to_the_other_and_is_removed_by_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let (mut old, mut new) = (Door::new(dir.path(), 1), Door::new(dir.path(), 1));
        assert_eq!((old.is_ours(), old.owner()), (false, None));
        old.open().unwrap();
        assert_eq!((old.is_ours(), new.is_ours(), new.owner()), (true, false, Some(std::process::id())));

        new.open().unwrap();
        assert_eq!((old.is_ours(), new.is_ours()), (false, true));
        old.close();
        assert!(new.is_ours(), "an old one must not take the name of the new one away");
        new.close();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_whose_owner_died_is_nobodys() {
        let dir = tempfile::tempdir().unwrap();
        let (mut dead, mut next) = (Door::new(dir.path(), 0), Door::new(dir.path(), 0));
        dead.open().unwrap();
        dead.open = None;

        assert_eq!(next.owner(), None);
        next.open().unwrap();
        assert_eq!((next.is_ours(), next.owner()), (true, Some(std::process::id())));
    }
}
