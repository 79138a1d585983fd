//! One tree over another, as overlayfs would show them (`build-rules.md` section 5).
//!
//! An upper entry hides the lower one of the same name, but two directories become one, with the
//! attributes of the upper. Whiteouts act on what lies below their layer, never beside them, and
//! vanish. Nothing here recurses, so the depth of trees is limited by memory alone.
//!
//! Names are bytes: `.wh.` before a name that is not UTF-8 removes it as any other.

use super::error::Unfit;
use super::tree::{Kind, Meta, NodeId, Tree};

/// How a layer says that something below it is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whiteouts {
    /// Files named `.wh.NAME`, and `.wh..wh..opq` in a directory that hides all below it.
    #[default]
    Oci,
    /// Character devices 0/0, and directories with the xattr `trusted.overlay.opaque`.
    Overlayfs,
    /// It does not: everything is what it seems.
    None,
}

const PREFIX: &[u8] = b".wh.";
/// What AUFS kept for itself, and the name of the opaque mark.
const INTERNAL: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The second is what overlayfs uses when it is mounted without privileges.
const OPAQUE_XATTRS: [&[u8]; 2] = [b"trusted.overlay.opaque", b"user.overlay.opaque"];
/// Directories that were renamed and files whose data is elsewhere: what they show depends on
/// names in layers that have been left behind.
const REFERRING_XATTRS: [&[u8]; 4] =
    [b"trusted.overlay.redirect", b"user.overlay.redirect", b"trusted.overlay.metacopy", b"user.overlay.metacopy"];

/// What an entry of a layer is for.
enum Role<'n> {
    /// Itself.
    Entry,
    /// Removes what has this name below.
    Removes(&'n [u8]),
    /// A mark that is no part of the tree.
    Mark,
}

impl Whiteouts {
    fn role<'n>(self, tree: &Tree, name: &'n [u8], node: NodeId) -> Role<'n> {
        match self {
            Self::Oci if name.starts_with(INTERNAL) => Role::Mark,
            Self::Oci => name.strip_prefix(PREFIX).map_or(Role::Entry, Role::Removes),
            Self::Overlayfs if matches!(tree.node(node).kind, Kind::Character(0)) => Role::Removes(name),
            Self::Overlayfs | Self::None => Role::Entry,
        }
    }

    /// Whether a directory hides all that is below it.
    fn is_opaque(self, meta: &Meta, has: impl Fn(&[u8]) -> bool) -> bool {
        match self {
            Self::Oci => has(OPAQUE),
            Self::Overlayfs => {
                meta.xattrs.iter().any(|(name, value)| OPAQUE_XATTRS.contains(&&**name) && **value == *b"y")
            }
            Self::None => false,
        }
    }

    /// Takes the marks off a directory.
    fn clean(self, meta: &mut Meta) {
        if self == Self::Overlayfs && !meta.xattrs.is_empty() {
            meta.xattrs.retain(|(name, _)| !OPAQUE_XATTRS.contains(&&**name));
        }
    }

    /// Finds a node from `first` on that only overlayfs itself could resolve.
    pub(super) fn unresolvable(self, tree: &Tree, first: NodeId) -> Option<(NodeId, Unfit)> {
        if self != Self::Overlayfs {
            return None;
        }
        tree.nodes_from(first).find_map(|(id, node)| {
            let mut names = node.meta.xattrs.iter().map(|(name, _)| &**name);
            let xattr = names.find(|name| REFERRING_XATTRS.contains(name))?;
            Some((id, Unfit::OverlayXattr(xattr.escape_ascii().to_string())))
        })
    }
}

/// Puts the directory `upper` over the directory `lower`, which becomes what both show together.
/// `upper` is left empty.
pub(super) fn put_over(tree: &mut Tree, lower: NodeId, upper: NodeId, whiteouts: Whiteouts) {
    let mut todo = vec![(Some(lower), upper)];
    while let Some((lower, upper)) = todo.pop() {
        let top = tree.node_mut(upper);
        let Kind::Directory(added) = &mut top.kind else { continue };
        let mut added = std::mem::take(added);
        let opaque = whiteouts.is_opaque(&top.meta, |name| added.contains_key(name));
        whiteouts.clean(&mut top.meta);
        let target = lower.unwrap_or(upper);
        if let Some(lower) = lower {
            let meta = std::mem::replace(&mut tree.node_mut(upper).meta, Meta::implied_directory());
            tree.node_mut(lower).meta = meta;
        }
        let mut shown = match &mut tree.node_mut(target).kind {
            Kind::Directory(below) if !opaque => std::mem::take(below),
            _ => Default::default(),
        };
        if whiteouts != Whiteouts::None {
            // All of them first: a name may be removed and added by one layer.
            added.retain(|name, node| match whiteouts.role(tree, name, *node) {
                Role::Entry => true,
                Role::Removes(below) => {
                    shown.remove(below);
                    false
                }
                Role::Mark => false,
            });
        }
        let first = todo.len();
        if shown.is_empty() {
            todo.extend(added.values().filter(|node| tree.node(**node).kind.is_directory()).map(|node| (None, *node)));
            shown = added;
        } else {
            for (name, node) in added {
                let is_directory = |id: NodeId| tree.node(id).kind.is_directory();
                let below = shown.get(&name).copied();
                match below.filter(|below| is_directory(node) && is_directory(*below)) {
                    Some(below) => todo.push((Some(below), node)),
                    None => {
                        if is_directory(node) {
                            todo.push((None, node));
                        }
                        shown.insert(name, node);
                    }
                }
            }
        }
        if whiteouts == Whiteouts::None {
            // Nothing is hidden in directories that have nothing below them.
            let mut at = 0;
            todo.retain(|(lower, _)| {
                at += 1;
                at <= first || lower.is_some()
            });
        }
        if let Kind::Directory(children) = &mut tree.node_mut(target).kind {
            *children = shown;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tree::Node;

    fn tree() -> Tree {
        Tree::new(Meta::implied_directory())
    }

    fn put(tree: &mut Tree, dir: NodeId, name: &[u8], kind: Kind) -> NodeId {
        tree.insert(dir, name, Node { meta: Meta::implied_directory(), kind }).unwrap()
    }

    fn root(tree: &mut Tree) -> NodeId {
        tree.add(Node { meta: Meta::implied_directory(), kind: Kind::empty_directory() }).unwrap()
    }

    fn names(tree: &Tree, dir: NodeId) -> Vec<&[u8]> {
        tree.children(dir).map(|(name, _)| name).collect()
    }

    #[test]
    fn depth_is_limited_by_memory_alone() {
        let mut tree = tree();
        let upper_root = root(&mut tree);
        let (mut lower, mut upper) = (NodeId::ROOT, upper_root);
        for _ in 0..100_000 {
            put(&mut tree, lower, b"gone", Kind::Fifo);
            put(&mut tree, upper, b".wh.gone", Kind::Fifo);
            lower = put(&mut tree, lower, b"d", Kind::empty_directory());
            upper = put(&mut tree, upper, b"d", Kind::empty_directory());
        }
        put(&mut tree, lower, b"low", Kind::Fifo);
        put(&mut tree, upper, b"high", Kind::Fifo);

        put_over(&mut tree, NodeId::ROOT, upper_root, Whiteouts::Oci);

        let mut dir = NodeId::ROOT;
        for _ in 0..100_000 {
            assert_eq!(names(&tree, dir), [b"d"]);
            dir = tree.child(dir, b"d").unwrap();
        }
        assert_eq!(names(&tree, dir), [b"high".as_slice(), b"low"]);
    }

    #[test]
    fn names_that_are_not_utf8_are_removed_like_others() {
        let mut tree = tree();
        let upper = root(&mut tree);
        put(&mut tree, NodeId::ROOT, b"\xff", Kind::Fifo);
        put(&mut tree, NodeId::ROOT, b"x", Kind::Fifo);
        put(&mut tree, upper, b".wh.\xff", Kind::Fifo);

        put_over(&mut tree, NodeId::ROOT, upper, Whiteouts::Oci);

        assert_eq!(names(&tree, NodeId::ROOT), [b"x"]);
    }

    #[test]
    fn a_mark_loses_its_xattr_and_other_xattrs_stay() {
        for opaque in OPAQUE_XATTRS {
            let mut tree = tree();
            let upper = root(&mut tree);
            let below = put(&mut tree, NodeId::ROOT, b"d", Kind::empty_directory());
            put(&mut tree, below, b"hidden", Kind::Fifo);
            let dir = put(&mut tree, upper, b"d", Kind::empty_directory());
            let other: (Box<[u8]>, Box<[u8]>) = (b"user.a".as_slice().into(), b"1".as_slice().into());
            tree.node_mut(dir).meta.xattrs = vec![(opaque.into(), b"y".as_slice().into()), other.clone()];

            put_over(&mut tree, NodeId::ROOT, upper, Whiteouts::Overlayfs);

            let dir = tree.child(NodeId::ROOT, b"d").unwrap();
            assert!(names(&tree, dir).is_empty());
            assert_eq!(tree.node(dir).meta.xattrs, [other]);
        }
    }

    #[test]
    fn directories_and_files_that_refer_to_other_layers_are_found() {
        let mut tree = tree();
        let upper = root(&mut tree);
        let dir = put(&mut tree, upper, b"d", Kind::empty_directory());
        assert_eq!(Whiteouts::Overlayfs.unresolvable(&tree, upper), None);

        let redirect: Box<[u8]> = b"trusted.overlay.redirect".as_slice().into();
        tree.node_mut(dir).meta.xattrs = vec![(redirect, b"/old".as_slice().into())];

        let found = Whiteouts::Overlayfs.unresolvable(&tree, upper);
        assert_eq!(found, Some((dir, Unfit::OverlayXattr("trusted.overlay.redirect".into()))));
        assert_eq!(tree.path_of(upper, dir), Some(b"d".to_vec()));
        assert_eq!(Whiteouts::Oci.unresolvable(&tree, upper), None);
    }
}
