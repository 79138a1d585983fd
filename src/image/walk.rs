use std::collections::HashSet;
use std::ops::ControlFlow;

use super::{Image, ImageError, Inode, Kind, Nid};
use crate::format::erofs::Dirent;

/// Deepest directory nesting that is followed: with names of one byte, a path of this depth is
/// already longer than any path Linux accepts in one call.
const MAX_DEPTH: usize = 4096;

/// Visits every inode of an image once per path, parents before children, without recursion.
///
/// Bounded whatever the image holds: a directory is entered once, so a circle or a directory with
/// two parents is an error; and there cannot be more entries than the bootstrap has room for, so
/// directories that share their blocks to multiply themselves are one too.
#[derive(Debug)]
pub struct Walk<'a> {
    image: &'a Image,
    /// Entries still to visit, with the depth of their path.
    pending: Vec<(usize, &'a [u8], Nid)>,
    /// Names from the root to the entry visited last.
    path: Vec<&'a [u8]>,
    entered: HashSet<Nid>,
    /// Entries that may still be found.
    budget: u64,
}

/// One step of a [`Walk`].
#[derive(Debug)]
pub struct Visit<'w, 'a> {
    /// Names from the root; empty for the root itself.
    pub path: &'w [&'a [u8]],
    pub inode: Inode,
}

/// One path of an image with its inode: what a [`Walk`] gives as an iterator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Names from the root with slashes between them; empty for the root itself.
    pub path: Vec<u8>,
    pub inode: Inode,
}

impl Iterator for Walk<'_> {
    type Item = Result<Entry, ImageError>;

    /// [`Walk::next_visit`] with a path that is copied: easier to hold, slower in large images.
    fn next(&mut self) -> Option<Self::Item> {
        let step = self.next_visit()?;
        Some(step.map(|visit| Entry { path: visit.path.join(&b'/'), inode: visit.inode }))
    }
}

impl Image {
    /// A walk from the root.
    pub fn walk(&self) -> Walk<'_> {
        self.walk_from(self.summary.root)
    }

    /// A walk over `top`, a directory or anything else, and what is below it. Paths begin there.
    pub fn walk_from(&self, top: Nid) -> Walk<'_> {
        Walk {
            image: self,
            pending: vec![(0, b"", top)],
            path: Vec::new(),
            entered: HashSet::new(),
            budget: self.summary.bootstrap_len / size_of::<Dirent>() as u64,
        }
    }
}

impl<'a> Walk<'a> {
    /// The next inode, or `None` when all have been visited. After an error the walk may go on
    /// with what else it knows.
    pub fn next_visit(&mut self) -> Option<Result<Visit<'_, 'a>, ImageError>> {
        let (depth, name, nid) = self.pending.pop()?;
        self.path.truncate(depth.saturating_sub(1));
        if depth > 0 {
            self.path.push(name);
        }
        let step = self.image.inode(nid).and_then(|inode| {
            if inode.kind == Kind::Directory {
                self.enter(depth, &inode)?;
            }
            Ok(inode)
        });
        Some(step.map(|inode| Visit { path: &self.path, inode }))
    }

    /// Names from the root to what [`Walk::next_visit`] gave last, be it an error.
    pub fn path(&self) -> &[&'a [u8]] {
        &self.path
    }

    fn enter(&mut self, depth: usize, dir: &Inode) -> Result<(), ImageError> {
        if depth >= MAX_DEPTH {
            return Err(ImageError::Tree("is too deep"));
        }
        if !self.entered.insert(dir.nid) {
            return Err(ImageError::Tree("reaches a directory twice"));
        }
        let first = self.pending.len();
        let (pending, budget) = (&mut self.pending, &mut self.budget);
        self.image.list(dir, &mut |entry| {
            if !entry.is_dot() {
                pending.push((depth + 1, entry.name, entry.nid));
            }
            *budget = budget.saturating_sub(1);
            if *budget == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if self.budget == 0 {
            return Err(ImageError::Tree("has more entries than the bootstrap can hold"));
        }
        self.pending[first..].reverse();
        Ok(())
    }
}
