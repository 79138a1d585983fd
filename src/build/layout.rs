//! Where everything in the metadata area goes: a pure function of the tree.
//!
//! The algorithm is that of `rafs-v6.md` section 12.1, so that images of the same tree have the
//! same shape whoever builds them. Positions are relative to the metadata area, whose first block
//! stays empty because inode number 0 would mean a deleted entry.

use std::collections::VecDeque;

use super::error::{BuildError, Limit};
use super::tree::{Kind, Node, NodeId, Tree};
use super::xattr;
use crate::base::BLOCK;
use crate::format::erofs::{Dirent, INODE_SLOT, InodeExtended};

/// Where one node lies, and what is known about it only when the whole tree is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// Byte position of the inode, a multiple of 32. 0 until it is placed.
    pub inode: u64,
    /// Byte position of the first whole block of a directory or link target.
    pub data: u64,
    /// Bytes of directory content or link target.
    pub data_len: u64,
    /// Whether the bytes behind the last whole block follow the inode.
    pub inline: bool,
    /// Number in the order of [`Tree::walk`], of the first name.
    pub ino: u32,
    /// Names of the node, or 2 + subdirectories.
    pub links: u32,
    /// Bytes of the inode with its xattrs.
    pub head: u64,
}

impl Place {
    /// What the kernel calls this inode.
    pub(super) fn nid(&self) -> u64 {
        self.inode / INODE_SLOT
    }
}

/// The result: a place for every node that has a name.
#[derive(Debug)]
pub(super) struct Layout {
    places: Vec<Place>,
    /// Names in the tree, the root's included.
    pub names: u32,
    /// Length of the metadata area in bytes, whole blocks.
    pub len: u64,
    pub has_xattrs: bool,
}

impl Layout {
    pub(super) fn place(&self, node: NodeId) -> &Place {
        &self.places[node.index()]
    }
}

/// Places every node of `tree` that can be reached. `chunk_size` in bytes.
pub(super) fn layout(tree: &Tree, chunk_size: u32) -> Result<Layout, BuildError> {
    let mut layout = number(tree)?;
    let mut space = Space::new();
    place(tree, &mut layout, &mut space, NodeId::ROOT, chunk_size);
    let mut todo = vec![NodeId::ROOT];
    while let Some(dir) = todo.pop() {
        if dir != NodeId::ROOT {
            place(tree, &mut layout, &mut space, dir, chunk_size);
        }
        let first = todo.len();
        for (_, child) in tree.children(dir) {
            if tree.node(child).kind.is_directory() {
                todo.push(child);
            } else if layout.place(child).inode == 0 {
                place(tree, &mut layout, &mut space, child, chunk_size);
            } else {
                space.end = space.end.next_multiple_of(INODE_SLOT);
            }
        }
        todo[first..].reverse();
        if space.end > MAX_METADATA {
            return Err(BuildError::Limit(Limit::Metadata));
        }
    }
    layout.len = space.end.next_multiple_of(BLOCK);
    Ok(layout)
}

/// Largest bootstrap that readers accept, in bytes (`rafs-v6.md` section 1).
pub(super) const MAX_METADATA: u64 = 2 << 30;

/// Numbers the nodes and counts their names.
fn number(tree: &Tree) -> Result<Layout, BuildError> {
    let mut places = vec![Place::default(); tree.len()];
    let (mut names, mut has_xattrs) = (0, false);
    let walked = tree.walk(|id| {
        names += 1;
        let place = &mut places[id.index()];
        if place.ino == 0 {
            place.ino = names;
        }
        place.links += 1;
        let node = tree.node(id);
        has_xattrs |= !node.meta.xattrs.is_empty();
        if node.kind.is_directory() {
            let children = tree.children(id);
            let subdirectories = children.filter(|(_, child)| tree.node(*child).kind.is_directory()).count();
            place.links = u32::try_from(subdirectories + 2).map_err(|_| BuildError::Limit(Limit::Metadata))?;
        }
        Ok(())
    });
    walked.map(|()| Layout { places, names, len: 0, has_xattrs })
}

fn place(tree: &Tree, layout: &mut Layout, space: &mut Space, id: NodeId, chunk_size: u32) {
    let node = tree.node(id);
    let place = &mut layout.places[id.index()];
    place.head = (size_of::<InodeExtended>() + xattr::area_bytes(&node.meta)) as u64;
    match &node.kind {
        Kind::Directory(_) => {
            place.data_len = directory_bytes(tree, id);
            space.with_tail(place);
        }
        Kind::Symlink(target) => {
            place.data_len = target.len() as u64;
            space.with_tail(place);
        }
        Kind::Regular(content) => {
            let total = place.head.next_multiple_of(8) + 8 * content.size.div_ceil(chunk_size.into());
            place.inode = space.take_or_append(total);
            space.align();
        }
        Kind::Character(_) | Kind::Block(_) | Kind::Fifo | Kind::Socket => {
            place.inode = space.append(place.head);
            space.align();
        }
    }
    debug_assert!(place.inode.is_multiple_of(INODE_SLOT) && place.inode != 0, "{node:?}", node = brief(node));
}

fn brief(node: &Node) -> (u16, bool) {
    (node.meta.permissions, node.kind.is_directory())
}

/// Length of a directory's content: entries do not cross blocks, the last block is not padded.
fn directory_bytes(tree: &Tree, dir: NodeId) -> u64 {
    let mut size = 0;
    // The order of "." and ".." among the names decides how blocks fill.
    for name in names_with_dots(tree, dir) {
        let len = size_of::<Dirent>() as u64 + name.len() as u64;
        if size % BLOCK + len > BLOCK {
            size = size.next_multiple_of(BLOCK);
        }
        size += len;
    }
    size
}

fn names_with_dots(tree: &Tree, dir: NodeId) -> impl Iterator<Item = &[u8]> {
    entries(tree, dir, dir).map(|(name, _)| name)
}

/// The entries of a directory in byte order, with "." and ".." where they sort: names that begin
/// with a byte below '.' come first.
pub(super) fn entries(tree: &Tree, dir: NodeId, parent: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
    let mut dots = [(b".".as_slice(), dir), (b"..".as_slice(), parent)].into_iter().peekable();
    let mut children = tree.children(dir).peekable();
    std::iter::from_fn(move || match (dots.peek(), children.peek()) {
        (Some((dot, _)), Some((name, _))) if name < dot => children.next(),
        (Some(_), _) => dots.next(),
        (None, _) => children.next(),
    })
}

/// The free space of the metadata area: everything from `end` on, and the unused ends of earlier
/// blocks by size in slots.
struct Space {
    end: u64,
    free: Vec<VecDeque<u64>>,
}

const SLOTS_PER_BLOCK: u64 = BLOCK / INODE_SLOT;

impl Space {
    fn new() -> Self {
        Self { end: BLOCK, free: vec![VecDeque::new(); index(SLOTS_PER_BLOCK)] }
    }

    fn align(&mut self) {
        self.end = self.end.next_multiple_of(INODE_SLOT);
    }

    fn append(&mut self, size: u64) -> u64 {
        let at = self.end;
        self.end += size;
        at
    }

    fn take_or_append(&mut self, size: u64) -> u64 {
        self.take(size).unwrap_or_else(|| self.append(size))
    }

    /// Room for `size` bytes in the unused end of an earlier block.
    fn take(&mut self, size: u64) -> Option<u64> {
        if size >= BLOCK {
            return None;
        }
        let slots = size.div_ceil(INODE_SLOT);
        for have in slots..SLOTS_PER_BLOCK {
            if let Some(block) = self.free[index(have)].pop_front() {
                let at = block + BLOCK - INODE_SLOT * have;
                self.give(at + INODE_SLOT * slots);
                return Some(at);
            }
        }
        None
    }

    /// Remembers that the block of `at` is unused from there on.
    fn give(&mut self, at: u64) {
        if !at.is_multiple_of(BLOCK) {
            let slots = (BLOCK - at % BLOCK) / INODE_SLOT;
            self.free[index(slots)].push_back(at - at % BLOCK);
        }
    }

    fn give_end(&mut self) {
        self.give(self.end);
        self.end = self.end.next_multiple_of(BLOCK);
    }

    /// Places an inode whose data lies in whole blocks, with the rest behind the inode if both
    /// fit in one block.
    fn with_tail(&mut self, place: &mut Place) {
        let tail = place.data_len % BLOCK;
        let whole = place.data_len - tail;
        place.inline = tail != 0 && place.head + tail <= BLOCK;
        if place.inline {
            place.inode = self.take(place.head + tail).unwrap_or_else(|| {
                if BLOCK - self.end % BLOCK < place.head + tail {
                    self.give_end();
                }
                self.append(place.head + tail)
            });
            if whole != 0 {
                self.give_end();
            }
            place.data = self.append(whole);
        } else {
            place.inode = self.take_or_append(place.head);
            self.give_end();
            place.data = self.append(place.data_len.next_multiple_of(BLOCK));
        }
        self.align();
    }
}

fn index(slots: u64) -> usize {
    usize::try_from(slots).expect("at most 128")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tree::Meta;

    fn tree(names: &[&[u8]]) -> Tree {
        let mut tree = Tree::new(Meta::implied_directory());
        for name in names {
            let meta = Meta::implied_directory();
            tree.insert(NodeId::ROOT, name, Node { meta, kind: Kind::Fifo }).unwrap();
        }
        tree
    }

    #[test]
    fn dots_stand_where_they_sort() {
        let tree = tree(&[b"-", b"...", b"a"]);
        let names: Vec<_> = names_with_dots(&tree, NodeId::ROOT).collect();
        assert_eq!(names, [b"-".as_slice(), b".", b"..", b"...", b"a"]);
    }

    #[test]
    fn root_is_inode_128_and_an_empty_one_has_27_bytes() {
        let layout = layout(&tree(&[]), 1 << 20).unwrap();
        let root = layout.place(NodeId::ROOT);
        assert_eq!((root.nid(), root.data_len, root.inline, root.links), (128, 27, true, 2));
        assert_eq!(layout.len, 8192);
    }

    #[test]
    fn no_two_nodes_overlap_and_no_tail_crosses_a_block() {
        let mut all = Tree::new(Meta::implied_directory());
        let mut dirs = vec![NodeId::ROOT];
        for i in 0..2000u64 {
            let name = format!("{i}-{}", "n".repeat(index(i * 37 % 240)));
            let kind = match i % 5 {
                0 => Kind::empty_directory(),
                1 => Kind::Symlink(vec![b't'; index(i * 7919 % 4095 + 1)].into()),
                2 => Kind::Socket,
                _ => Kind::Regular(crate::build::chunk::Content::of_size(i * i * 100)),
            };
            let dir = dirs[index(i) % dirs.len()];
            let id = all.insert(dir, name.as_bytes(), Node { meta: Meta::implied_directory(), kind }).unwrap();
            if i % 5 == 0 && i < 500 {
                dirs.push(id);
            }
        }

        let layout = layout(&all, 4096).unwrap();

        let mut used = Vec::new();
        all.walk(|id| {
            let place = layout.place(id);
            let tail = if place.inline { place.data_len % BLOCK } else { 0 };
            let behind = match &all.node(id).kind {
                Kind::Regular(content) => 8 * content.size.div_ceil(4096),
                _ => tail,
            };
            let end = place.inode + place.head + behind;
            assert!(tail == 0 || place.inode / BLOCK == (end - 1) / BLOCK);
            used.push((place.inode, end));
            if place.data_len > tail {
                used.push((place.data, place.data + place.data_len - tail));
            }
            Ok::<(), ()>(())
        })
        .unwrap();
        used.sort_unstable();
        assert!(used.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        assert!(used.last().unwrap().1 <= layout.len && used[0].0 >= BLOCK);
    }
}
