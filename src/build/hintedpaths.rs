//! Paths that an image wants to have prefetched, kept until its tree has become part of another.

use std::num::NonZeroU32;

use super::tree::{NodeId, Tree};
use crate::image::{Image, Nid};

/// Paths from one image. What lies on the way to several of them is kept once, so that they never
/// take more than the names of the image do.
#[derive(Debug, Default)]
pub(super) struct HintedPaths {
    /// The step before, 0 for the root, and the name that leads on from there. Step 1 is the first.
    steps: Vec<(u32, Box<[u8]>)>,
    /// The last step of each path, the most urgent first. 0 is the root itself.
    ends: Vec<u32>,
}

impl HintedPaths {
    /// The nodes that are at these paths now, where there are any.
    pub(super) fn nodes(&self, tree: &Tree) -> impl Iterator<Item = NodeId> {
        let mut at = Vec::with_capacity(self.steps.len() + 1);
        at.push(Some(NodeId::ROOT));
        for (before, name) in &self.steps {
            at.push(at[*before as usize].and_then(|dir| tree.child(dir, name)));
        }
        self.ends.iter().filter_map(move |end| at[*end as usize])
    }

    /// Whether the root is one of them.
    pub(super) fn has_root(&self) -> bool {
        self.ends.contains(&0)
    }
}

/// Most entries of a prefetch table that are followed: they are hints, and each is remembered.
const MAX_HINTS: usize = 1 << 16;

/// The entries of an image's prefetch table that are still to be met on a walk.
#[derive(Debug)]
pub(super) struct Hints {
    /// Number of the inode and place in the table, sorted.
    wanted: Vec<(Nid, usize)>,
    /// By place in the table, the last step of the first path of the inode.
    found: Vec<Option<u32>>,
    steps: Vec<(u32, Box<[u8]>)>,
    /// Steps to the path met last, as far as there are any.
    trail: Vec<NonZeroU32>,
}

impl Hints {
    pub(super) fn new(image: &Image) -> Self {
        let mut wanted: Vec<_> = image.prefetch().take(MAX_HINTS).zip(0..).collect();
        wanted.sort_unstable();
        wanted.dedup_by_key(|(nid, _)| *nid);
        let found = vec![None; wanted.iter().map(|(_, at)| at + 1).max().unwrap_or(0)];
        Self { wanted, found, steps: Vec::new(), trail: Vec::new() }
    }

    /// Remembers the first path of an inode that is hinted at. Paths come as a walk meets them:
    /// each directory before what is in it, and that before anything else.
    pub(super) fn met(&mut self, nid: Nid, path: &[&[u8]]) {
        self.trail.truncate(path.len().saturating_sub(1));
        let Ok(at) = self.wanted.binary_search_by_key(&nid, |(nid, _)| *nid) else { return };
        let at = self.wanted[at].1;
        if self.found[at].is_some() {
            return;
        }
        for name in &path[self.trail.len()..] {
            let before = self.trail.last().map_or(0, |step| step.get());
            self.steps.push((before, (*name).into()));
            let step = u32::try_from(self.steps.len()).ok().and_then(NonZeroU32::new);
            self.trail.push(step.expect("2 GiB have fewer names, and there was one"));
        }
        self.found[at] = Some(self.trail.last().map_or(0, |step| step.get()));
    }

    pub(super) fn paths(self) -> HintedPaths {
        HintedPaths { steps: self.steps, ends: self.found.into_iter().flatten().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tree::{Kind, Meta, Node};

    /// A file of this name in `dir`.
    fn add(tree: &mut Tree, dir: NodeId, name: &[u8], kind: Kind) -> NodeId {
        tree.insert(dir, name, Node { meta: Meta::implied_directory(), kind }).unwrap()
    }

    #[test]
    fn paths_are_followed_in_the_order_of_the_table_and_share_their_directories() {
        let mut hints = Hints {
            wanted: vec![(1, 4), (3, 2), (4, 0), (5, 3), (9, 1)],
            found: vec![None; 5],
            steps: Vec::new(),
            trail: Vec::new(),
        };
        for (nid, path) in [
            (1, &[] as &[&[u8]]),
            (2, &[b"a"]),
            (3, &[b"a", b"x"]),
            (4, &[b"a", b"y"]),
            (6, &[b"b"]),
            (3, &[b"b", b"x"]),
            (5, &[b"b", b"z"]),
        ] {
            hints.met(nid, path);
        }
        let paths = hints.paths();
        assert_eq!(paths.steps.len(), 5, "a, a/x, a/y, b, b/z");
        assert!(paths.has_root());

        let mut tree = Tree::new(Meta::implied_directory());
        let a = add(&mut tree, NodeId::ROOT, b"a", Kind::empty_directory());
        let x = add(&mut tree, a, b"x", Kind::Fifo);
        let y = add(&mut tree, a, b"y", Kind::Fifo);
        add(&mut tree, NodeId::ROOT, b"b", Kind::Fifo);
        assert_eq!(paths.nodes(&tree).collect::<Vec<_>>(), [y, x, NodeId::ROOT], "there is no b/z any more");
    }
}
