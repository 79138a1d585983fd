//! What number every path has and where its record lies: a pure function of the tree.

use crate::build::error::{BuildError, Limit};
use crate::build::tree::{Kind, Meta, NodeId, Tree};
use crate::format::rafs::ChunkRecord;
use crate::format::rafs5::{self, ExtendedBlob, Inode, XattrHead, XattrPair};

/// One path of the tree. A hard link has one for each of its names.
#[derive(Clone, Copy, Debug)]
pub(in crate::build) struct Path<'t> {
    pub name: &'t [u8],
    pub node: NodeId,
    /// Number of the directory; 0 for the root.
    pub parent: u32,
    /// Number of the first path of the same inode.
    pub ino: u32,
    /// Names of a regular file, 2 + subdirectories of a directory, else 1.
    pub links: u32,
    /// Number of the first child of a directory, also if there is none; else 0.
    pub first_child: u32,
    /// Children of a directory.
    pub children: u32,
    /// Byte position of the record.
    pub at: u64,
}

/// A number and a place for every path.
#[derive(Debug)]
pub(in crate::build) struct Layout<'t> {
    /// Path number n is at n - 1.
    pub paths: Vec<Path<'t>>,
    /// Positions in `paths` in the order of the records.
    pub order: Vec<usize>,
    /// By node: the number of an inode that it is.
    inos: Vec<u32>,
    /// Distinct inodes.
    pub inodes: u32,
    pub has_xattrs: bool,
    pub tables: Tables,
    /// Bytes of the whole bootstrap.
    pub len: u64,
}

impl Layout<'_> {
    /// The number of a directory or a regular file that has a path.
    pub(super) fn ino(&self, node: NodeId) -> u32 {
        self.inos[node.index()]
    }
}

/// Where the tables start, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::build) struct Tables {
    pub inodes: u64,
    pub prefetch: u64,
    pub blobs: u64,
    pub extended: u64,
    /// Of the first record.
    pub records: u64,
}

impl Tables {
    /// For so many paths and entries of the prefetch table, and blobs with ids of these lengths.
    fn new(paths: u64, prefetch: u64, blob_ids: &[usize]) -> Self {
        let row = size_of::<u32>() as u64;
        let inodes = u64::from(rafs5::SUPERBLOCK_LEN);
        let prefetch_at = inodes + align(row * paths);
        let blobs = prefetch_at + align(row * prefetch);
        let ids: u64 = blob_ids.iter().map(|len| (size_of::<rafs5::BlobHead>() + len + 1) as u64).sum();
        // No id is followed by a NUL at the end of the table.
        let extended = blobs + align(ids.saturating_sub(1));
        let records = extended + size_of::<ExtendedBlob>() as u64 * blob_ids.len() as u64;
        Self { inodes, prefetch: prefetch_at, blobs, extended, records }
    }
}

/// Rounds up to where a table or a part of a record may start.
pub(super) fn align(bytes: u64) -> u64 {
    bytes.next_multiple_of(rafs5::ALIGN)
}

/// Numbers and places every path of `tree`, behind tables for so many entries of the prefetch table
/// and blobs with ids of these lengths. `chunk_size` in bytes.
pub(in crate::build) fn layout<'t>(
    tree: &'t Tree,
    chunk_size: u32,
    prefetch: usize,
    blob_ids: &[usize],
) -> Result<Layout<'t>, BuildError> {
    let mut paths = number(tree)?;
    let Inodes { inos, count: inodes, has_xattrs } = identify(tree, &mut paths);
    let tables = Tables::new(paths.len() as u64, prefetch as u64, blob_ids);
    let mut len = tables.records;
    let mut order = Vec::with_capacity(paths.len());
    let mut todo = vec![0];
    while let Some(at) = todo.pop() {
        order.push(at);
        let path = &mut paths[at];
        path.at = len;
        len += record_bytes(tree, path, chunk_size);
        if len > rafs5::MAX_LEN {
            return Err(BuildError::Limit(Limit::Metadata));
        }
        let first = index(path.first_child.saturating_sub(1));
        todo.extend((first..first + index(path.children)).rev());
    }
    Ok(Layout { paths, order, inos, inodes, has_xattrs, tables, len })
}

/// The paths in the order of their numbers, which is that of [`Tree::walk`].
fn number(tree: &Tree) -> Result<Vec<Path<'_>>, BuildError> {
    let root = Path { name: b"/", node: NodeId::ROOT, parent: 0, ino: 1, links: 2, first_child: 0, children: 0, at: 0 };
    let mut paths = vec![root];
    let mut todo = vec![0];
    while let Some(dir) = todo.pop() {
        let first = paths.len();
        let parent = count(dir + 1)?;
        for (name, node) in tree.children(paths[dir].node) {
            paths.push(Path { name, node, parent, ino: 0, links: 1, first_child: 0, children: 0, at: 0 });
        }
        let is_directory = |at: &usize| tree.node(paths[*at].node).kind.is_directory();
        let below: Vec<usize> = (first..paths.len()).filter(is_directory).rev().collect();
        paths[dir].links = count(below.len() + 2)?;
        paths[dir].first_child = count(first + 1)?;
        paths[dir].children = count(paths.len() - first)?;
        todo.extend(below);
    }
    Ok(paths)
}

/// The inodes that paths lead to.
struct Inodes {
    /// By node.
    inos: Vec<u32>,
    count: u32,
    has_xattrs: bool,
}

/// Finds the paths that are one inode.
fn identify(tree: &Tree, paths: &mut [Path<'_>]) -> Inodes {
    let (mut inos, mut names) = (vec![0; tree.len()], vec![0; tree.len()]);
    let (mut count, mut has_xattrs) = (0, false);
    for (number, path) in (1..).zip(&mut *paths) {
        let (node, slot) = (tree.node(path.node), path.node.index());
        has_xattrs |= !node.meta.xattrs.is_empty();
        if inos[slot] == 0 || !matches!(node.kind, Kind::Regular(_)) {
            inos[slot] = number;
            count += 1;
        }
        path.ino = inos[slot];
        names[slot] += 1;
    }
    for path in paths {
        if let Kind::Regular(_) = tree.node(path.node).kind {
            path.links = names[path.node.index()];
        }
    }
    Inodes { inos, count, has_xattrs }
}

/// Bytes of the record of a path with everything that belongs to it.
fn record_bytes(tree: &Tree, path: &Path<'_>, chunk_size: u32) -> u64 {
    let node = tree.node(path.node);
    let rest = match &node.kind {
        Kind::Symlink(target) => align(target.len() as u64),
        Kind::Regular(content) => size_of::<ChunkRecord>() as u64 * content.size.div_ceil(chunk_size.into()),
        _ => 0,
    };
    let xattrs = match xattr_bytes(&node.meta) {
        0 => 0,
        bytes => align(size_of::<XattrHead>() as u64 + bytes),
    };
    size_of::<Inode>() as u64 + align(path.name.len() as u64) + rest + xattrs
}

/// Bytes of all pairs of xattrs, without head and padding.
pub(super) fn xattr_bytes(meta: &Meta) -> u64 {
    let pair = |name: &[u8], value: &[u8]| (size_of::<XattrPair>() + name.len() + 1 + value.len()) as u64;
    meta.xattrs.iter().map(|(name, value)| pair(name, value)).sum()
}

fn count(number: usize) -> Result<u32, BuildError> {
    u32::try_from(number).map_err(|_| BuildError::Limit(Limit::Metadata))
}

pub(super) fn index(number: u32) -> usize {
    usize::try_from(number).expect("32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::chunk::Content;
    use crate::build::tree::Node;

    fn node(kind: Kind) -> Node {
        Node { meta: Meta::implied_directory(), kind }
    }

    #[test]
    fn numbers_go_by_directory_and_records_go_down_first() {
        let mut tree = Tree::new(Meta::implied_directory());
        let mut add = |dir, name: &[u8], kind| tree.insert(dir, name, node(kind)).unwrap();
        let a = add(NodeId::ROOT, b"a", Kind::empty_directory());
        let file = add(a, b"file", Kind::Regular(Content::of_size(5000)));
        let b = add(NodeId::ROOT, b"b", Kind::Fifo);
        let c = add(NodeId::ROOT, b"c", Kind::empty_directory());
        tree.link(c, b"link", file).unwrap();
        tree.link(c, b"pipe", b).unwrap();

        let layout = layout(&tree, 4096, 1, &[64, 3]).unwrap();

        let names: Vec<&[u8]> = layout.paths.iter().map(|path| path.name).collect();
        assert_eq!(names, [b"/".as_slice(), b"a", b"b", b"c", b"file", b"link", b"pipe"]);
        let order: Vec<&[u8]> = layout.order.iter().map(|at| layout.paths[*at].name).collect();
        assert_eq!(order, [b"/".as_slice(), b"a", b"file", b"b", b"c", b"link", b"pipe"]);
        let facts = |path: &Path<'_>| (path.parent, path.ino, path.links, path.first_child, path.children);
        let all: Vec<_> = layout.paths.iter().map(facts).collect();
        assert_eq!(
            all,
            [
                (0, 1, 4, 2, 3),
                (1, 2, 2, 5, 1),
                (1, 3, 1, 0, 0),
                (1, 4, 2, 6, 2),
                (2, 5, 2, 0, 0),
                (4, 5, 2, 0, 0),
                (4, 7, 1, 0, 0)
            ]
        );
        assert_eq!(layout.inodes, 6);
        let tables = layout.tables;
        assert_eq!((tables.inodes, tables.prefetch, tables.blobs), (8192, 8192 + 32, 8192 + 40));
        assert_eq!((tables.extended, tables.records), (8232 + 88, 8232 + 88 + 128));
        assert_eq!(layout.paths[1].at, tables.records + 136);
        assert_eq!(layout.paths[2].at, layout.paths[4].at + 136 + 160, "behind a file of two chunks");
    }

    #[test]
    fn an_image_without_blobs_has_empty_tables() {
        let tree = Tree::new(Meta::implied_directory());
        let layout = layout(&tree, 4096, 0, &[]).unwrap();
        let at = 8192 + 8;
        let empty = Tables { inodes: 8192, prefetch: at, blobs: at, extended: at, records: at };
        assert_eq!((layout.tables, layout.len), (empty, at + 136));
        assert_eq!((layout.paths[0].first_child, layout.paths[0].children), (2, 0));
    }

    #[test]
    fn more_than_a_reader_takes_is_refused() {
        let mut tree = Tree::new(Meta::implied_directory());
        let huge = Content::of_size(4096 * (rafs5::MAX_LEN / 80));
        let id = tree.insert(NodeId::ROOT, b"huge", node(Kind::Regular(huge))).unwrap();
        assert!(matches!(layout(&tree, 4096, 0, &[]), Err(BuildError::Limit(Limit::Metadata))));
        assert!(layout(&tree, 8192, 0, &[]).is_ok());
        // Every name has all records of the file.
        tree.link(NodeId::ROOT, b"link", id).unwrap();
        assert!(matches!(layout(&tree, 8192, 0, &[]), Err(BuildError::Limit(Limit::Metadata))));
    }
}
