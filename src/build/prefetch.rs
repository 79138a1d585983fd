//! Which files somebody will want first (`build-rules.md` section 4).

use std::collections::HashMap;

use super::tree::{Kind, NodeId, Tree};

/// Paths whose files should be fetched first, in that order.
#[derive(Clone, Debug, Default)]
pub struct PrefetchHints {
    /// What each step is called: the number of the step before it, [`START`] for the root, and a
    /// name. Steps are numbered from 1 as they come. So to look for a path is to look for each of
    /// its names once.
    steps: HashMap<Box<[u8]>, u32>,
    /// By number of its last step, the position of a hint.
    positions: HashMap<u32, usize>,
    /// The last step of each hint.
    ends: Vec<u32>,
    ignored: usize,
    /// Whether the image lists them, besides having their data in front.
    pub table: bool,
}

/// The step that every path begins with.
const START: u32 = 0;

/// The name of a step behind step `before`.
fn step_name(before: u32, name: &[u8]) -> Vec<u8> {
    [&before.to_be_bytes(), name].concat()
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
            let names: Vec<&[u8]> = names.collect();
            if !line.starts_with(b"/") || hints.position(&names).is_some() {
                hints.ignored += 1;
                continue;
            }
            let end = names.iter().fold(START, |before, name| hints.step(before, name));
            hints.positions.insert(end, hints.ends.len());
            hints.ends.push(end);
        }
        hints
    }

    /// Lines that say nothing new.
    pub fn ignored(&self) -> usize {
        self.ignored
    }

    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The number of a step, new or not.
    fn step(&mut self, before: u32, name: &[u8]) -> u32 {
        let next = u32::try_from(self.steps.len() + 1).expect("a list of 64 MiB has fewer names");
        *self.steps.entry(step_name(before, name).into()).or_insert(next)
    }

    /// The position of the nearest hint that names `path`, names from the root, or something above
    /// it.
    pub(super) fn position(&self, path: &[impl AsRef<[u8]>]) -> Option<usize> {
        let mut nearest = self.positions.get(&START);
        let mut at = START;
        for name in path {
            let Some(step) = self.steps.get(step_name(at, name.as_ref()).as_slice()) else { break };
            at = *step;
            nearest = self.positions.get(&at).or(nearest);
        }
        nearest.copied()
    }

    /// What the image lists: the node of every hint that is there, but for empty files.
    pub(super) fn listed(&self, tree: &Tree) -> Vec<NodeId> {
        if !self.table {
            return Vec::new();
        }
        let mut steps: Vec<(u32, &[u8])> = self.steps.iter().map(|(step, number)| (*number, &**step)).collect();
        steps.sort_unstable();
        let mut nodes = vec![Some(NodeId::ROOT)];
        for (_, step) in steps {
            let (before, name) = step.split_first_chunk().expect("a step has a number and a name");
            let dir = nodes[u32::from_be_bytes(*before) as usize];
            nodes.push(dir.and_then(|dir| tree.child(dir, name)));
        }
        let holds_data = |node: &NodeId| !matches!(&tree.node(*node).kind, Kind::Regular(content) if content.size == 0);
        self.ends.iter().filter_map(|end| nodes[*end as usize]).filter(holds_data).collect()
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

        assert_eq!(hints.ends.len(), 3, "/usr/bin/sh, /etc, /usr");
        assert_eq!(hints.ignored(), 4, "relative, below /etc, /etc again, below /usr");
        let position = |text| hints.position(&path(text));
        assert_eq!(position("/usr/bin/sh"), Some(0), "the narrower hint came first and stays");
        assert_eq!((position("/usr/bin"), position("/etc/a/b"), position("/var")), (Some(2), Some(1), None));
        assert_eq!(PrefetchHints::parse(b"/").position(&path("/any/thing")), Some(0));
    }

    #[test]
    fn a_line_of_many_names_takes_a_step_for_each() {
        let names = 500_000;
        let line = "/a".repeat(names);

        let hints = PrefetchHints::parse(format!("{line}\n{line}/b\n{line}\n/c{line}\n").as_bytes());

        assert_eq!(hints.steps.len(), 2 * names + 1);
        assert_eq!((hints.ends.len(), hints.ignored()), (2, 2));
        assert_eq!(hints.position(&path(&format!("/c{line}/x"))), Some(1));
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
