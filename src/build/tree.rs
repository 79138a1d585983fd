//! The tree of an image before it has addresses: an arena of nodes, named from directories.
//!
//! A hard link is a second name for the same node, so attributes exist once and cannot disagree.
//! Children are kept in byte order, which is the order of the format. Nothing here recurses, so
//! the depth of a tree is limited by memory alone. Nodes that lost their last name stay in the
//! arena unreached.

use std::collections::BTreeMap;

use super::chunk::Content;
use super::error::Unfit;
use super::layout::MAX_METADATA;
use super::xattr;
use crate::format::erofs::{Dirent, InodeExtended, MAX_NAME};
use crate::image;

/// A node of one [`Tree`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct NodeId(u32);

impl NodeId {
    pub(super) const ROOT: Self = Self(0);

    /// Position in tables that run parallel to the arena.
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A full name and its value.
pub(super) type Xattr = (Box<[u8]>, Box<[u8]>);

/// What every kind of node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    /// Permission bits with setuid, setgid and sticky; no type.
    pub permissions: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, may be negative.
    pub mtime: i64,
    /// Below 10^9, counted forwards from `mtime`.
    pub mtime_nsec: u32,
    /// Sorted by name, only namespaces that the format knows.
    pub xattrs: Vec<Xattr>,
}

impl Meta {
    /// What a directory gets that nobody described: 0755, root, 1970.
    pub(super) fn implied_directory() -> Self {
        Self { permissions: 0o755, uid: 0, gid: 0, mtime: 0, mtime_nsec: 0, xattrs: Vec::new() }
    }
}

/// What a node is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    Regular(Content),
    Symlink(Box<[u8]>),
    /// Device number in the encoding of the format.
    Character(u32),
    /// Device number in the encoding of the format.
    Block(u32),
    Fifo,
    Socket,
}

impl Kind {
    pub(super) fn empty_directory() -> Self {
        Self::Directory(BTreeMap::new())
    }

    pub(super) fn is_directory(&self) -> bool {
        matches!(self, Self::Directory(_))
    }

    /// What an image calls it.
    pub(super) fn in_images(&self) -> image::Kind {
        match self {
            Self::Directory(_) => image::Kind::Directory,
            Self::Regular(_) => image::Kind::Regular,
            Self::Symlink(_) => image::Kind::Symlink,
            Self::Character(_) => image::Kind::Character,
            Self::Block(_) => image::Kind::Block,
            Self::Fifo => image::Kind::Fifo,
            Self::Socket => image::Kind::Socket,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub meta: Meta,
    pub kind: Kind,
}

/// All nodes of an image. Node 0 is the root directory.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    /// What the nodes will take at least in the metadata area, in bytes.
    metadata: u64,
}

impl Tree {
    pub(super) fn new(root: Meta) -> Self {
        Self { nodes: vec![Node { meta: root, kind: Kind::empty_directory() }], metadata: 0 }
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.index()]
    }

    /// Nodes ever made; ids are below it.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The children of `dir` in byte order; nothing for other kinds.
    pub(super) fn children(&self, dir: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let children = match &self.node(dir).kind {
            Kind::Directory(children) => Some(children),
            _ => None,
        };
        children.into_iter().flatten().map(|(name, id)| (&**name, *id))
    }

    /// The node that `dir` calls `name`.
    pub(super) fn child(&self, dir: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(dir).kind {
            Kind::Directory(children) => children.get(name).copied(),
            _ => None,
        }
    }

    /// Names a new node in `dir`. What had the name before is replaced, except that a directory
    /// put where a directory is keeps the children it finds there.
    pub(super) fn insert(&mut self, dir: NodeId, name: &[u8], node: Node) -> Result<NodeId, Unfit> {
        if let Some(old) = self.child(dir, name)
            && self.node(old).kind.is_directory()
            && node.kind.is_directory()
        {
            self.node_mut(old).meta = node.meta;
            return Ok(old);
        }
        let id = self.add(node)?;
        self.link(dir, name, id)?;
        Ok(id)
    }

    /// A new node without a name.
    pub(super) fn add(&mut self, node: Node) -> Result<NodeId, Unfit> {
        // Checked as they come, so that an archive that unpacks to very many entries ends here.
        self.take(least_bytes(&node))?;
        let id = NodeId(u32::try_from(self.nodes.len()).map_err(|_| Unfit::TooManyEntries)?);
        self.nodes.push(node);
        Ok(id)
    }

    /// Takes all nodes of another tree in, and returns what its root is called here. It has no
    /// name yet.
    pub(super) fn adopt(&mut self, other: Self) -> Result<NodeId, Unfit> {
        self.take(other.metadata)?;
        let offset = u32::try_from(self.nodes.len()).map_err(|_| Unfit::TooManyEntries)?;
        let fits = u32::try_from(other.nodes.len()).is_ok_and(|len| offset.checked_add(len).is_some());
        if !fits {
            return Err(Unfit::TooManyEntries);
        }
        self.nodes.extend(other.nodes.into_iter().map(|mut node| {
            if let Kind::Directory(children) = &mut node.kind {
                children.values_mut().for_each(|child| child.0 += offset);
            }
            node
        }));
        Ok(NodeId(offset))
    }

    /// Makes all files name the chunks that their cuts became, which has to be done once.
    pub(super) fn settle(&mut self, chunk_of_cut: &[u32]) {
        for node in &mut self.nodes {
            if let Kind::Regular(content) = &mut node.kind {
                *content = content.settled(chunk_of_cut);
            }
        }
    }

    /// The nodes from `first` on, in the order in which they were made.
    pub(super) fn nodes_from(&self, first: NodeId) -> impl Iterator<Item = (NodeId, &Node)> {
        (first.0..).map(NodeId).zip(&self.nodes[first.index()..])
    }

    /// A path of `node` below the directory `root`, in time that grows with the whole tree.
    pub(super) fn path_of(&self, root: NodeId, node: NodeId) -> Option<Vec<u8>> {
        let mut todo = vec![(root, Vec::new())];
        while let Some((dir, path)) = todo.pop() {
            if dir == node {
                return Some(path);
            }
            for (name, child) in self.children(dir) {
                if child == node || self.node(child).kind.is_directory() {
                    let slash: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    todo.push((child, [&path, slash, name].concat()));
                }
            }
        }
        None
    }

    /// The node at this path.
    pub(super) fn find<'n>(&self, path: impl IntoIterator<Item = &'n [u8]>) -> Option<NodeId> {
        path.into_iter().try_fold(NodeId::ROOT, |dir, name| self.child(dir, name))
    }

    /// Gives an existing node, or the one about to be made, a name in `dir`.
    pub(super) fn link(&mut self, dir: NodeId, name: &[u8], node: NodeId) -> Result<(), Unfit> {
        if name.len() > MAX_NAME {
            return Err(Unfit::NameTooLong(name.len()));
        }
        if name.is_empty() || name == b"." || name == b".." || name.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err(Unfit::Name);
        }
        let Kind::Directory(children) = &mut self.node_mut(dir).kind else { return Err(Unfit::ParentNotDirectory) };
        if children.insert(name.into(), node).is_some() {
            return Ok(());
        }
        self.take((size_of::<Dirent>() + name.len()) as u64)
    }

    /// Counts bytes of metadata that something new will take at least.
    fn take(&mut self, bytes: u64) -> Result<(), Unfit> {
        self.metadata += bytes;
        if self.metadata > MAX_METADATA { Err(Unfit::TooManyEntries) } else { Ok(()) }
    }

    /// Calls `visit` with the node of every name, in the order in which the format numbers, stores and lays
    /// things out: the root, then the children of a directory in name order, then each child
    /// directory in the same way.
    pub(super) fn walk<E>(&self, mut visit: impl FnMut(NodeId) -> Result<(), E>) -> Result<(), E> {
        visit(NodeId::ROOT)?;
        let mut todo = vec![NodeId::ROOT];
        while let Some(dir) = todo.pop() {
            let first = todo.len();
            for (_, node) in self.children(dir) {
                visit(node)?;
                if self.node(node).kind.is_directory() {
                    todo.push(node);
                }
            }
            todo[first..].reverse();
        }
        Ok(())
    }
}

/// Bytes of an inode with what surely belongs to it.
fn least_bytes(node: &Node) -> u64 {
    let target = if let Kind::Symlink(target) = &node.kind { target.len() } else { 0 };
    (size_of::<InodeExtended>() + xattr::area_bytes(&node.meta) + target) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(kind: Kind) -> Node {
        Node { meta: Meta::implied_directory(), kind }
    }

    #[test]
    fn walk_visits_all_children_before_any_grandchild() {
        let mut tree = Tree::new(Meta::implied_directory());
        let mut made = |dir, name: &[u8], kind| tree.insert(dir, name, node(kind)).unwrap();
        let b = made(NodeId::ROOT, b"b", Kind::empty_directory());
        let c = made(NodeId::ROOT, b"c", Kind::Fifo);
        let a = made(NodeId::ROOT, b"a", Kind::empty_directory());
        let (below_b, below_a) = (made(b, b"x", Kind::Fifo), made(a, b"y", Kind::Fifo));

        let mut visited = Vec::new();
        tree.walk(|node| {
            visited.push(node);
            Ok::<(), ()>(())
        })
        .unwrap();

        assert_eq!(visited, [NodeId::ROOT, a, b, c, below_a, below_b]);
    }

    #[test]
    fn directory_over_directory_keeps_the_children() {
        let mut tree = Tree::new(Meta::implied_directory());
        let dir = tree.insert(NodeId::ROOT, b"d", node(Kind::empty_directory())).unwrap();
        tree.insert(dir, b"x", node(Kind::Fifo)).unwrap();

        let again = tree.insert(NodeId::ROOT, b"d", node(Kind::empty_directory())).unwrap();
        assert!(again == dir && tree.child(dir, b"x").is_some());

        let fifo = tree.insert(NodeId::ROOT, b"d", node(Kind::Fifo)).unwrap();
        assert_eq!((tree.child(NodeId::ROOT, b"d"), tree.child(fifo, b"x")), (Some(fifo), None));
    }

    #[test]
    fn names_take_room_even_if_their_node_is_not_new() {
        let mut tree = Tree::new(Meta::implied_directory());
        let fifo = tree.insert(NodeId::ROOT, b"fifo", node(Kind::Fifo)).unwrap();
        let entry = size_of::<Dirent>() as u64 + 1;
        tree.metadata = MAX_METADATA - 2 * entry;

        assert_eq!(tree.link(NodeId::ROOT, b"a", fifo), Ok(()));
        assert_eq!(tree.link(NodeId::ROOT, b"a", fifo), Ok(()), "a name that is there already takes nothing");
        assert_eq!(tree.link(NodeId::ROOT, b"b", fifo), Ok(()));
        assert_eq!(tree.link(NodeId::ROOT, b"c", fifo), Err(Unfit::TooManyEntries));
    }

    #[test]
    fn names_that_no_directory_can_hold_are_refused() {
        let mut tree = Tree::new(Meta::implied_directory());
        for bad in [b"".as_slice(), b".", b"..", b"a/b", b"a\0b", &[b'n'; 256]] {
            assert!(tree.insert(NodeId::ROOT, bad, node(Kind::Fifo)).is_err(), "{bad:?}");
        }
        let fifo = tree.insert(NodeId::ROOT, b"fifo", node(Kind::Fifo)).unwrap();
        assert!(tree.insert(fifo, b"x", node(Kind::Fifo)).is_err());
    }
}
