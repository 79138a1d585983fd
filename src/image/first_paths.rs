//! Where files with several names were met first.
//!
//! A whole path for every such file would take far more memory than the bootstrap that describes
//! it, for a path may be a megabyte long. So directories are kept as a tree of names that lie in
//! the bootstrap, and each of them only once.

use std::collections::HashMap;

use super::Nid;

/// The first path of each file that was noted during one walk.
///
/// Takes a fixed number of bytes for every file and every directory above one, so less than a small
/// multiple of the bootstrap.
#[derive(Debug, Default)]
pub struct FirstPaths<'a> {
    /// Directories with a noted file beneath them.
    directories: Vec<Name<'a>>,
    /// Numbers in `directories` of those above the file noted last, the outermost one first.
    above: Vec<usize>,
    files: HashMap<Nid, Name<'a>>,
}

/// One name and what it is in.
#[derive(Clone, Copy, Debug)]
struct Name<'a> {
    /// Number in `directories`; `None` in the root.
    parent: Option<usize>,
    name: &'a [u8],
}

impl<'a> FirstPaths<'a> {
    /// Notes that file `nid` is at `path`, unless it was noted before. Calls have to be in the order
    /// of a [`Walk`](super::Walk).
    pub fn note(&mut self, nid: Nid, path: &[&'a [u8]]) {
        let Some((name, parents)) = path.split_last() else { return };
        if self.files.contains_key(&nid) {
            return;
        }
        let known = self.above.iter().zip(parents);
        let known = known.take_while(|(number, name)| same(self.directories[**number].name, name)).count();
        self.above.truncate(known);
        for name in &parents[known..] {
            let parent = self.above.last().copied();
            self.above.push(self.directories.len());
            self.directories.push(Name { parent, name });
        }
        self.files.insert(nid, Name { parent: self.above.last().copied(), name });
    }

    /// Names from the root to where file `nid` was noted; `None` if it was not.
    pub fn get(&self, nid: Nid) -> Option<Vec<&'a [u8]>> {
        let mut at = *self.files.get(&nid)?;
        let mut names = vec![at.name];
        while let Some(parent) = at.parent {
            at = self.directories[parent];
            names.push(at.name);
        }
        names.reverse();
        Some(names)
    }
}

/// Whether two names are equal: at once if they lie in the same place, as they mostly do.
fn same(one: &[u8], other: &[u8]) -> bool {
    std::ptr::eq(one, other) || one == other
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<&[u8]> {
        text.split('/').map(str::as_bytes).collect()
    }

    #[test]
    fn the_first_path_of_each_file_is_kept() {
        let mut paths = FirstPaths::default();
        let walk = ["a/b/c/one", "a/b/two", "a/c/one", "a/c/three", "b/four", "five"];
        for (number, at) in (1..).zip(walk) {
            paths.note(number, &path(at));
        }
        for number in 1..=6 {
            paths.note(number, &path("somewhere/else"));
        }

        for (number, at) in (1..).zip(walk) {
            assert_eq!(paths.get(number), Some(path(at)));
        }
        assert_eq!(paths.get(7), None);
    }

    #[test]
    fn a_directory_is_kept_once() {
        let mut paths = FirstPaths::default();
        for (number, at) in (1..).zip(["a/b/1", "a/b/2", "a/b/c/3", "a/b/4", "a/5", "a/d/6"]) {
            paths.note(number, &path(at));
        }

        let names: Vec<_> = paths.directories.iter().map(|directory| directory.name).collect();
        assert_eq!(names, [b"a", b"b", b"c", b"d"]);
    }
}
