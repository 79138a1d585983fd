//! An image as a tree that is served as it is: names and attributes from the bootstrap, bytes from devices.
//!
//! The number of a node is that of its inode, moved up so that the root is 1 and nothing is 0. What is told is
//! what EROFS would show of the same image, `st_ino` and the order of directories included.

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;

use super::reply::{Listed, Node, Statistics, Times, Trust, put_name};
use super::wire::{NodeId, ROOT};
use super::{Anchor, Piece, Tree, TreeError, Wishes};
use crate::base::ByteRange;
use crate::export::{Backing, LiveImage};
use crate::format::erofs::file_type;
use crate::image::{Extent, Image, Inode, Kind, Nid, Visit, Xattr};

/// The number of inode 0, if that is not the root: behind "nothing" and the root.
const FIRST: NodeId = ROOT + 1;

/// Bytes of a name, as `statfs` tells.
const LONGEST_NAME: usize = 255;

/// The tree of an image.
pub struct ImageTree {
    image: Arc<Image>,
    devices: Vec<Arc<dyn Backing>>,
    has_xattrs: bool,
    has_lists: bool,
}

impl fmt::Debug for ImageTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageTree").field("image", &self.image).finish_non_exhaustive()
    }
}

impl ImageTree {
    /// The tree of `live`. Looks at each inode once, to find out whether any has extended attributes: where
    /// none has, the kernel is spared the asking.
    pub fn new(live: &LiveImage) -> Self {
        let (mut has_xattrs, mut has_lists) = (false, false);
        let mut walk = live.image.walk();
        while let Some(visit) = walk.next_visit() {
            // Damaged inodes are the problem of who looks at them.
            let Ok(inode) = visit.map(|visit| visit.inode) else { continue };
            if inode.xattrs.is_empty() {
                continue;
            }
            has_xattrs = true;
            let visited = live.image.xattrs(&inode, &mut |xattr| {
                has_lists |= is_list(&xattr);
                ControlFlow::Continue(())
            });
            if visited.is_ok() && has_lists {
                break;
            }
        }
        Self { image: live.image.clone(), devices: live.devices.clone(), has_xattrs, has_lists }
    }

    /// Type and permissions of the root.
    pub fn root_mode(&self) -> Result<u32, TreeError> {
        Ok(self.node(ROOT)?.mode)
    }

    fn inode(&self, id: NodeId) -> Result<Inode, TreeError> {
        let nid = match id {
            ROOT => self.image.summary().root,
            id => id.checked_sub(FIRST).ok_or(TreeError::NoNode)?,
        };
        self.image.inode(nid).map_err(TreeError::Damaged)
    }

    fn directory(&self, id: NodeId) -> Result<Inode, TreeError> {
        self.inode(id).and_then(|inode| match inode.kind {
            Kind::Directory => Ok(inode),
            _ => Err(TreeError::NotADirectory),
        })
    }

    fn id(&self, nid: Nid) -> NodeId {
        // An inode lies in the bootstrap, so its number is far from overflowing.
        if nid == self.image.summary().root { ROOT } else { nid.saturating_add(FIRST) }
    }

    fn describe(&self, inode: &Inode) -> Node {
        let block_size = self.image.summary().block_size;
        Node {
            id: self.id(inode.nid),
            ino: inode.nid,
            mode: inode.kind.type_bits() | u32::from(inode.permissions),
            nlink: inode.nlink,
            uid: inode.uid,
            gid: inode.gid,
            rdev: inode.rdev,
            size: inode.size,
            // As EROFS counts them, whatever lies on disk.
            blocks: inode.size.div_ceil(block_size).saturating_mul(block_size) / 512,
            block_size: u32::try_from(block_size).expect("512 or 4096"),
            times: Times::all(inode.mtime),
            trust: Trust::FOR_EVER,
        }
    }

    fn visit_xattrs<'a>(
        &'a self,
        id: NodeId,
        visit: &mut dyn FnMut(Xattr<'a>) -> ControlFlow<()>,
    ) -> Result<(), TreeError> {
        if !self.has_xattrs {
            return Err(TreeError::NoXattrs);
        }
        self.image.xattrs(&self.inode(id)?, visit).map_err(TreeError::Damaged)
    }
}

impl Tree for ImageTree {
    fn wishes(&self) -> Wishes {
        // The kernel checks permissions, and asks for no mapping where it would have to.
        Wishes { posix_acl: self.has_lists, idmap: true, handles: true, ..Wishes::default() }
    }

    fn find(&self, parent: NodeId, name: &[u8]) -> Result<Option<Node>, TreeError> {
        if name == b"." {
            return self.node(parent).map(Some);
        }
        let dir = self.directory(parent)?;
        if name.len() > LONGEST_NAME {
            return Err(TreeError::LongName { len: name.len() });
        }
        let found = self.image.child(&dir, name).map_err(TreeError::Damaged)?;
        Ok(found.map(|inode| self.describe(&inode)))
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        self.inode(id).map(|inode| self.describe(&inode))
    }

    fn link(&self, id: NodeId) -> Result<Cow<'_, [u8]>, TreeError> {
        let inode = self.inode(id)?;
        if inode.kind != Kind::Symlink {
            return Err(TreeError::OtherKind);
        }
        self.image.symlink(&inode).map_err(TreeError::Damaged)
    }

    fn list(&self, id: NodeId, from: u64, with_nodes: bool, visit: &mut super::Visit<'_>) -> Result<(), TreeError> {
        let dir = self.directory(id)?;
        let listed = self.image.list_from(&dir, from, &mut |entry, next| {
            let listed = Listed { name: entry.name, ino: entry.nid, kind: kind_in_listing(entry.file_type), next };
            let is_told = with_nodes && !entry.is_dot();
            let node = is_told.then(|| self.image.inode(entry.nid).ok()).flatten();
            visit(&listed, node.map(|inode| self.describe(&inode)).as_ref())
        });
        listed.map_err(TreeError::Damaged)
    }

    fn pieces(&self, id: NodeId, range: ByteRange, visit: &mut dyn FnMut(Piece<'_>)) -> Result<(), TreeError> {
        let inode = self.inode(id)?;
        match inode.kind {
            Kind::Regular => {}
            Kind::Directory => return Err(TreeError::IsADirectory),
            _ => return Err(TreeError::OtherKind),
        }
        let range = range.clamp_end(inode.size);
        if range.is_empty() {
            return Ok(());
        }
        let walked = self.image.extents_from(&inode, range.start(), &mut |extent| {
            let (at, len) = match &extent {
                Extent::Hole { at, len } => (*at, *len),
                Extent::Inline { at, bytes } => (*at, bytes.len() as u64),
                Extent::Device { at, decoded, .. } => (*at, decoded.len()),
            };
            // Both ends relative to the extent.
            let (first, last) = (range.start().saturating_sub(at), range.end().saturating_sub(at).min(len));
            if first < last {
                visit(self.part(&extent, first, last));
            }
            if at.saturating_add(len) < range.end() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        walked.map_err(TreeError::Damaged)
    }

    fn xattr(&self, id: NodeId, name: &[u8]) -> Result<Cow<'_, [u8]>, TreeError> {
        let mut value = None;
        self.visit_xattrs(id, &mut |xattr| {
            if name.strip_prefix(xattr.prefix) == Some(xattr.suffix) {
                value = Some(xattr.value);
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        })?;
        value.map(Cow::Borrowed).ok_or(TreeError::NoXattr)
    }

    fn xattrs(&self, id: NodeId, is_trusted: bool) -> Result<Vec<u8>, TreeError> {
        let mut names = Vec::new();
        if !self.has_xattrs {
            // And none is what EROFS lists: the error of `visit_xattrs` would be remembered and told to everybody.
            return Ok(names);
        }
        self.visit_xattrs(id, &mut |xattr| {
            if is_trusted || xattr.prefix != b"trusted." {
                put_name(&mut names, [xattr.prefix, xattr.suffix]);
            }
            ControlFlow::Continue(())
        })?;
        Ok(names)
    }

    fn anchor(&self) -> Option<Anchor> {
        let (nid, path) = first_file(&self.image)?;
        Some(Anchor::Path(self.id(nid), path))
    }

    fn statistics(&self) -> Statistics {
        let summary = self.image.summary();
        let devices = self.image.devices().iter().map(|device| device.len).sum::<u64>();
        Statistics {
            block_size: u32::try_from(summary.block_size).expect("512 or 4096"),
            blocks: (summary.bootstrap_len + devices) / summary.block_size,
            files: summary.paths,
        }
    }
}

impl ImageTree {
    /// The bytes `first..last` of an extent.
    fn part<'a>(&'a self, extent: &Extent<'a>, first: u64, last: u64) -> Piece<'a> {
        let index = |at: u64| usize::try_from(at).expect("the bytes are in memory");
        match extent {
            Extent::Hole { .. } => Piece::Zeros(last - first),
            Extent::Inline { bytes, .. } => Piece::Bytes(&bytes[index(first)..index(last)]),
            Extent::Device { device, decoded, .. } => {
                let part = ByteRange::at(decoded.start() + first, last - first).expect("within the device");
                Piece::Device(&self.devices[*device], part)
            }
        }
    }
}

/// A regular file of an image, and its path from the root on.
pub(super) fn first_file(image: &Image) -> Option<(Nid, Vec<u8>)> {
    let mut walk = image.walk();
    while let Some(step) = walk.next_visit() {
        if let Ok(Visit { path: names, inode }) = step
            && inode.kind == Kind::Regular
        {
            return Some((inode.nid, names.join(&b"/"[..])));
        }
    }
    None
}

fn is_list(xattr: &Xattr<'_>) -> bool {
    xattr.prefix.starts_with(b"system.posix_acl_")
}

fn kind_in_listing(kind: u8) -> u8 {
    match kind {
        file_type::REGULAR => libc::DT_REG,
        file_type::DIRECTORY => libc::DT_DIR,
        file_type::CHARACTER => libc::DT_CHR,
        file_type::BLOCK => libc::DT_BLK,
        file_type::FIFO => libc::DT_FIFO,
        file_type::SOCKET => libc::DT_SOCK,
        file_type::SYMLINK => libc::DT_LNK,
        _ => libc::DT_UNKNOWN,
    }
}
