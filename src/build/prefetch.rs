//! Which files somebody will want first (`build-rules.md` section 4).

use std::collections::HashMap;

use super::tree::{Kind, NodeId, Tree};

/// Paths whose files should be fetched first, in that order.
#[derive(Clone, Debug, Default)]
pub struct PrefetchHints {
    /// Names from the root, for each hint.
    hints: Vec<Vec<Box<[u8]>>>,
    /// Positions in `hints` by path.
    by_path: HashMap<Vec<Box<[u8]>>, usize>,
    ignored: usize,
    /// Whether the image lists them, besides having their data in front.
    pub table: bool,
}

/// Longest list of hints in bytes: far more paths than anybody reads before an image is useful.
pub const MAX_HINTS: u64 = 64 << 20;

impl PrefetchHints {
    /// Reads a list: one absolute path in a line, blanks around it ignored. Lines that are not
    /// absolute, that name a path again, or one below a path named before, count as ignored.
    pub fn parse(text: &[u8]) -> Self {
        let mut hints = Self { table: true, ..Self::default() };
        for line in text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty()) {
            let names = line.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
            let names: Vec<Box<[u8]>> = names.map(Into::into).collect();
            if !line.starts_with(b"/") || hints.position(&names).is_some() {
                hints.ignored += 1;
                continue;
            }
            hints.by_path.insert(names.clone(), hints.hints.len());
            hints.hints.push(names);
        }
        hints
    }

    /// Lines that say nothing new.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    pub(super) fn is_empty(&self) -> bool {
        self.hints.is_empty()
    }

    /// The position of the nearest hint that names `path`, names from the root, or something above
    /// it.
    pub(super) fn position(&self, path: &[Box<[u8]>]) -> Option<usize> {
        (0..=path.len()).rev().find_map(|depth| self.by_path.get(&path[..depth]).copied())
    }

    /// What the image lists: the node of every hint that is there, but for empty files.
    pub(super) fn listed(&self, tree: &Tree) -> Vec<NodeId> {
        let node = |names: &Vec<Box<[u8]>>| names.iter().try_fold(NodeId::ROOT, |dir, name| tree.child(dir, name));
        let holds_data = |node: &NodeId| !matches!(&tree.node(*node).kind, Kind::Regular(content) if content.size == 0);
        let hints = if self.table { self.hints.as_slice() } else { &[] };
        hints.iter().filter_map(node).filter(holds_data).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Box<[u8]>> {
        text.split('/').filter(|name| !name.is_empty()).map(|name| name.as_bytes().into()).collect()
    }

    #[test]
    fn lists_are_read_as_the_format_has_it() {
        let hints =
            PrefetchHints::parse(b"  /usr/bin/sh \r\n\nrelative\n/etc/\n/etc/passwd\n/etc\n/usr\n//usr/./lib\n");

        assert_eq!(hints.hints, [path("usr/bin/sh"), path("etc"), path("usr")]);
        assert_eq!(hints.ignored(), 4, "relative, below /etc, /etc again, below /usr");
        let position = |text| hints.position(&path(text));
        assert_eq!(position("/usr/bin/sh"), Some(0), "the narrower hint came first and stays");
        assert_eq!((position("/usr/bin"), position("/etc/a/b"), position("/var")), (Some(2), Some(1), None));
        assert_eq!(PrefetchHints::parse(b"/").position(&path("/any/thing")), Some(0));
    }

    #[test]
    fn table_has_what_is_there_and_has_data() {
        use crate::build::chunk::Content;
        use crate::build::tree::{Meta, Node};
        let mut tree = Tree::new(Meta::implied_directory());
        let mut add = |name: &[u8], kind| {
            tree.insert(NodeId::ROOT, name, Node { meta: Meta::implied_directory(), kind }).unwrap()
        };
        let dir = add(b"dir", Kind::empty_directory());
        let file = add(b"file", Kind::Regular(Content::of_size(1)));
        add(b"empty", Kind::Regular(Content::default()));

        let mut hints = PrefetchHints::parse(b"/gone\n/file\n/empty\n/dir\n");
        assert_eq!(hints.listed(&tree), [file, dir]);
        assert_eq!(PrefetchHints::parse(b"/").listed(&tree), [NodeId::ROOT]);
        hints.table = false;
        assert_eq!(hints.listed(&tree), []);
    }
}
