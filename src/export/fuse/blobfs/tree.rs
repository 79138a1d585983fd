use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use rustix::io::Errno;

use super::files::OpenFiles;
use super::names::Names;
use crate::base::{BLOCK, ByteRange};
use crate::export::fuse::reply::{Listed, Node, Statistics, Times, Trust};
use crate::export::fuse::wire::{NodeId, ROOT};
use crate::export::fuse::{Anchor, Piece, Tree, TreeError, Visit, Wishes};
use crate::export::{Backing, LiveImage};
use crate::sys::beneath::{self, Beneath, Facts, Found, Name};

/// The directory of blobs, if it is not the root.
const BLOBS: NodeId = ROOT + 1;

/// The number of the first file that is ours.
const FIRST: NodeId = BLOBS + 1;

/// `st_ino` of the directory of blobs where the host has none, and behind it of files that are ours: far from
/// where file systems begin to count.
const OWN_INODES: u64 = 1 << 62;

/// Where in a directory our own names begin. Behind those of file systems: the highest that ext4 gives is
/// `0x7fff_fffe_ffff_ffff`, and those that are lower elsewhere only have to be others.
const OWN_PLACES: u64 = 0x7fff_ffff_4000_0000;

/// Bytes of a name.
const LONGEST_NAME: usize = 255;

/// The host's directory, with our files in it.
pub(super) struct BlobTree {
    host: Beneath,
    names: Names,
    files: OpenFiles,
    /// Name of the directory of blobs in the root; `None` if it is the root.
    blob_dir: Option<Box<[u8]>>,
    own: Vec<Own>,
    /// Places in `own`.
    by_name: HashMap<Box<[u8]>, usize>,
}

/// A file that is ours.
struct Own {
    name: Box<[u8]>,
    content: Content,
}

enum Content {
    /// A blob in its decoded form.
    Device(Arc<dyn Backing>),
    /// The bootstrap of an image, as the kernel reads it.
    Bootstrap(File, u64),
}

impl Own {
    fn len(&self) -> u64 {
        match &self.content {
            Content::Device(backing) => backing.decoded_len(),
            Content::Bootstrap(_, len) => *len,
        }
    }
}

impl fmt::Debug for BlobTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobTree").field("host", &self.host).field("names", &self.names).finish_non_exhaustive()
    }
}

impl BlobTree {
    /// The tree of `host` with the blobs and bootstraps of `images`, in the directory `blob_dir` of its root or else
    /// in the root. A blob that several images have is the first one's.
    pub(super) fn new(host: Beneath, names: Names, images: &[LiveImage], blob_dir: Option<&str>) -> io::Result<Self> {
        let mut this = Self {
            host,
            names,
            files: OpenFiles::default(),
            blob_dir: blob_dir.map(|name| name.as_bytes().into()),
            own: Vec::new(),
            by_name: HashMap::new(),
        };
        for image in images {
            for (device, backing) in image.image.devices().iter().zip(&image.devices) {
                this.add(device.blob.as_str(), Content::Device(backing.clone()));
            }
            let file = File::open(&image.bootstrap)?;
            let len = file.metadata()?.len();
            let digest = image.bootstrap.file_name().and_then(|name| name.to_str()).unwrap_or("image");
            this.add(&format!("{digest}.bootstrap"), Content::Bootstrap(file, len));
        }
        Ok(this)
    }

    fn add(&mut self, name: &str, content: Content) {
        let name: Box<[u8]> = name.as_bytes().into();
        if !self.by_name.contains_key(&name) {
            self.by_name.insert(name.clone(), self.own.len());
            self.own.push(Own { name, content });
        }
    }

    /// The first blob of the tree, by its path.
    pub(super) fn some_blob(&self) -> Option<Vec<u8>> {
        let name = &self.own.first()?.name;
        Some(self.blob_dir.iter().chain([name]).map(|name| &**name).collect::<Vec<_>>().join(&b'/'))
    }

    /// Type and permissions of the root.
    pub(super) fn root_mode(&self) -> Result<u32, TreeError> {
        Ok(self.node(ROOT)?.mode)
    }

    fn is_blob_dir(&self, id: NodeId) -> bool {
        id == if self.blob_dir.is_some() { BLOBS } else { ROOT }
    }

    fn own(&self, id: NodeId) -> Option<&Own> {
        let number = id.checked_sub(FIRST).and_then(|number| usize::try_from(number).ok());
        number.and_then(|number| self.own.get(number))
    }

    /// What is ours in the directory `parent`.
    fn own_child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        if self.is_blob_dir(parent)
            && let Some(number) = self.by_name.get(name)
        {
            return Some(FIRST + *number as u64);
        }
        (parent == ROOT && self.blob_dir.as_deref() == Some(name)).then_some(BLOBS)
    }

    /// The path of a directory that needs not be told of.
    fn fixed_path(&self, id: NodeId) -> Option<Vec<u8>> {
        match id {
            ROOT => Some(Vec::new()),
            BLOBS => self.blob_dir.as_ref().map(|name| name.to_vec()),
            _ => None,
        }
    }

    /// The host's file that the kernel knows by this number.
    fn host(&self, id: NodeId) -> Result<Found, TreeError> {
        if id == ROOT {
            return self.host.itself().map_err(TreeError::Host);
        }
        if id == BLOBS {
            return self.host_blob_dir().ok_or(TreeError::NoNode);
        }
        let (path, identity) = self.names.path(id, |id| self.fixed_path(id)).ok_or(TreeError::NoNode)?;
        let found = self.host.find(&path).map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP => TreeError::Gone,
            errno => TreeError::Host(errno),
        })?;
        if found.facts().identity == identity { Ok(found) } else { Err(TreeError::Gone) }
    }

    /// The host's own directory of blobs, if it has one.
    fn host_blob_dir(&self) -> Option<Found> {
        let found = self.host.find(self.blob_dir.as_ref()?).ok()?;
        found.facts().is(libc::S_IFDIR).then_some(found)
    }

    fn host_directory(&self, id: NodeId) -> Result<Found, TreeError> {
        if self.own(id).is_some() {
            return Err(TreeError::NotADirectory);
        }
        let found = self.host(id)?;
        if found.facts().is(libc::S_IFDIR) { Ok(found) } else { Err(TreeError::NotADirectory) }
    }

    fn own_node(&self, id: NodeId, own: &Own) -> Node {
        // Whoever reads it reads all of the image, whatever the permissions in there.
        Node::ours(id, OWN_INODES + id, (libc::S_IFREG | 0o400, 1), own.len())
    }

    /// The directory of blobs, as the host has it, or as it would.
    fn blob_dir_node(&self) -> Result<Node, TreeError> {
        if let Some(found) = self.host_blob_dir() {
            return Ok(host_node(BLOBS, found.facts()));
        }
        let root = self.host(ROOT)?;
        let facts = root.facts();
        let mode = facts.mode & 0o755 | libc::S_IFDIR;
        Ok(Node { ino: OWN_INODES + BLOBS, mode, nlink: 2, ..host_node(BLOBS, facts) })
    }

    /// The file, open.
    fn file(&self, id: NodeId, is_opening: bool) -> Result<Arc<File>, TreeError> {
        if !is_opening && let Some(file) = self.files.get(id) {
            return Ok(file);
        }
        let found = self.host(id)?;
        let file = found.open().map_err(|errno| match errno {
            Errno::INVAL if found.facts().is(libc::S_IFDIR) => TreeError::IsADirectory,
            Errno::INVAL => TreeError::OtherKind,
            errno => TreeError::Host(errno),
        })?;
        Ok(self.files.keep(id, Arc::new(file), is_opening))
    }

    /// Lists what is ours in the directory `id` from the `from`th name on, then `dots` if the host lists none.
    fn list_own(&self, id: NodeId, from: u64, dots: &[(&'static [u8], NodeId)], visit: &mut Visit<'_>) {
        let mut all: Vec<(&[u8], NodeId, u8)> = Vec::new();
        if id == ROOT
            && let Some(name) = &self.blob_dir
        {
            all.push((name, BLOBS, libc::DT_DIR));
        }
        if self.is_blob_dir(id) {
            let files = (FIRST..).zip(&self.own);
            all.extend(files.map(|(id, own)| (&*own.name, id, libc::DT_REG)));
        }
        all.extend(dots.iter().map(|(name, id)| (*name, *id, libc::DT_DIR)));
        let rest = all.into_iter().zip(OWN_PLACES + 1..).skip(usize::try_from(from).unwrap_or(usize::MAX));
        for ((name, id, kind), next) in rest {
            let ino = if id < FIRST { self.node(id).map_or(id, |node| node.ino) } else { OWN_INODES + id };
            if visit(&Listed { name, ino, kind, next }, None).is_break() {
                break;
            }
        }
    }
}

/// What the host tells of a file, for the kernel.
fn host_node(id: NodeId, facts: &Facts) -> Node {
    let (major, minor) = facts.rdev;
    Node {
        id,
        ino: facts.identity.inode,
        mode: facts.mode,
        nlink: facts.nlink,
        uid: facts.uid,
        gid: facts.gid,
        rdev: minor & 0xff | major << 8 | (minor & !0xff) << 12,
        size: facts.size,
        blocks: facts.blocks,
        block_size: facts.block_size,
        times: Times { access: facts.accessed, data: facts.modified, change: facts.changed },
        trust: Trust::SHORT,
    }
}

impl Tree for BlobTree {
    /// None: what a successor needs of it does not fit into slots.
    fn anchor(&self) -> Option<Anchor> {
        None
    }

    fn wishes(&self) -> Wishes {
        Wishes { posix_acl: true, idmap: true, changing: true, ..Wishes::default() }
    }

    fn find(&self, parent: NodeId, name: &[u8]) -> Result<Option<Node>, TreeError> {
        if name.len() > LONGEST_NAME {
            return Err(TreeError::LongName { len: name.len() });
        }
        if let Some(id) = self.own_child(parent, name) {
            return self.node(id).map(Some);
        }
        let dir = match self.host_directory(parent) {
            Err(_) if parent == BLOBS && self.blob_dir.is_some() => return Ok(None),
            dir => dir?,
        };
        let found = match dir.child(name) {
            Err(Errno::NOENT) => return Ok(None),
            found => found.map_err(TreeError::Host)?,
        };
        let id = self.names.tell(parent, name, found.facts().identity).map_err(|error| {
            tracing::warn!(%error, "the kernel cannot be told of another file");
            TreeError::Host(Errno::NOMEM)
        })?;
        Ok(Some(host_node(id, found.facts())))
    }

    fn node(&self, id: NodeId) -> Result<Node, TreeError> {
        if id == BLOBS && self.blob_dir.is_some() {
            return self.blob_dir_node();
        }
        if let Some(own) = self.own(id) {
            return Ok(self.own_node(id, own));
        }
        // Also when it was removed or replaced meanwhile: somebody has it open.
        if let Some(file) = self.files.get(id) {
            return Ok(host_node(id, &beneath::facts(&*file).map_err(TreeError::Host)?));
        }
        Ok(host_node(id, self.host(id)?.facts()))
    }

    fn link(&self, id: NodeId) -> Result<Cow<'_, [u8]>, TreeError> {
        if self.own(id).is_some() {
            return Err(TreeError::OtherKind);
        }
        let found = self.host(id)?;
        if !found.facts().is(libc::S_IFLNK) {
            return Err(TreeError::OtherKind);
        }
        found.link().map(Cow::Owned).map_err(TreeError::Host)
    }

    fn list(&self, id: NodeId, from: u64, _: bool, visit: &mut Visit<'_>) -> Result<(), TreeError> {
        let own_places = OWN_PLACES..=OWN_PLACES + 3 + self.own.len() as u64;
        let dir = match self.host_directory(id) {
            Err(_) if id == BLOBS && self.blob_dir.is_some() => None,
            dir => Some(dir?),
        };
        let dots: &[(&[u8], NodeId)] = if dir.is_some() { &[] } else { &[(b".", BLOBS), (b"..", ROOT)] };
        let dir = match dir {
            Some(dir) if !own_places.contains(&from) => dir,
            _ => {
                self.list_own(id, from.saturating_sub(OWN_PLACES), dots, visit);
                return Ok(());
            }
        };
        let itself = dir.facts().identity.inode;
        let listed = dir.list(from, &mut |Name { name, inode, kind, next }| {
            if own_places.contains(&next) || self.own_child(id, name).is_some() {
                return ControlFlow::Continue(());
            }
            let ino = if id == ROOT && name == b".." { itself } else { inode };
            visit(&Listed { name, ino, kind, next }, None)
        });
        if listed.map_err(TreeError::Host)? {
            self.list_own(id, 0, dots, visit);
        }
        Ok(())
    }

    fn pieces(&self, id: NodeId, range: ByteRange, visit: &mut dyn FnMut(Piece<'_>)) -> Result<(), TreeError> {
        let Some(own) = self.own(id) else {
            let file = self.file(id, false)?;
            visit(Piece::File(&file, range));
            return Ok(());
        };
        if let Some(inside) = Some(range.clamp_end(own.len())).filter(|inside| !inside.is_empty()) {
            visit(match &own.content {
                Content::Device(backing) => Piece::Device(backing, inside),
                Content::Bootstrap(file, _) => Piece::File(file, inside),
            });
        }
        Ok(())
    }

    fn xattr(&self, id: NodeId, name: &[u8]) -> Result<Cow<'_, [u8]>, TreeError> {
        if self.own(id).is_some() {
            return Err(TreeError::NoXattr);
        }
        let found = match self.host(id) {
            Err(TreeError::NoNode) if id == BLOBS => return Err(TreeError::NoXattr),
            found => found?,
        };
        found.xattr(name).map(Cow::Owned).map_err(|errno| match errno {
            Errno::NODATA => TreeError::NoXattr,
            errno => TreeError::Host(errno),
        })
    }

    fn xattrs(&self, id: NodeId, is_trusted: bool) -> Result<Vec<u8>, TreeError> {
        if self.own(id).is_some() {
            return Ok(Vec::new());
        }
        let found = match self.host(id) {
            Err(TreeError::NoNode) if id == BLOBS => return Ok(Vec::new()),
            found => found?,
        };
        let all = found.xattrs().map_err(TreeError::Host)?;
        if is_trusted {
            return Ok(all);
        }
        let shown = all.split_inclusive(|byte| *byte == 0).filter(|name| !name.starts_with(b"trusted."));
        Ok(shown.flatten().copied().collect())
    }

    fn statistics(&self) -> Statistics {
        let (block_size, blocks, files) = self.host.size().unwrap_or((BLOCK, 0, 0));
        Statistics { block_size: u32::try_from(block_size).unwrap_or(u32::MAX), blocks, files }
    }

    fn trust_in_absence(&self) -> Trust {
        Trust::SHORT
    }

    fn open(&self, id: NodeId) -> Result<bool, TreeError> {
        if self.own(id).is_some() {
            return Ok(true);
        }
        match self.file(id, true) {
            Ok(_) | Err(TreeError::IsADirectory) => Ok(false),
            Err(_) if id == BLOBS && self.blob_dir.is_some() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn close(&self, id: NodeId) {
        self.files.close(id);
    }

    fn forget(&self, id: NodeId, told: u64) {
        if self.names.forget(id, told) {
            self.files.forget(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn tree(dir: &Path) -> BlobTree {
        let mut tree =
            BlobTree::new(Beneath::open(dir).unwrap(), Names::create().unwrap(), &[], Some("blobs")).unwrap();
        let file = tempfile::tempfile().unwrap();
        fs::write(dir.join("bootstrap"), "").unwrap();
        tree.add("ours", Content::Bootstrap(file, 0));
        tree
    }

    /// All names of a directory, asked for one by one.
    fn names(tree: &BlobTree, id: NodeId) -> Vec<String> {
        let (mut all, mut from) = (Vec::new(), 0);
        loop {
            let mut next = None;
            let visit = &mut |listed: &Listed<'_>, _: Option<&Node>| {
                if next.is_some() {
                    return ControlFlow::Break(());
                }
                all.push(String::from_utf8(listed.name.to_vec()).unwrap());
                next = Some(listed.next);
                ControlFlow::Continue(())
            };
            tree.list(id, from, false, visit).unwrap();
            match next {
                Some(next) => from = next,
                None => break,
            }
        }
        all.sort();
        all
    }

    #[test]
    fn our_names_are_there_whether_the_host_has_them_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        assert_eq!(names(&tree, ROOT), [".", "..", "blobs", "bootstrap"]);
        assert_eq!(names(&tree, BLOBS), [".", "..", "ours"]);
        assert_eq!(tree.find(ROOT, b"blobs").unwrap().unwrap().id, BLOBS);
        assert_eq!(tree.find(BLOBS, b"theirs"), Ok(None));

        fs::create_dir(dir.path().join("blobs")).unwrap();
        for name in ["ours", "theirs"] {
            fs::write(dir.path().join("blobs").join(name), "text").unwrap();
        }

        assert_eq!(names(&tree, ROOT), [".", "..", "blobs", "bootstrap"]);
        assert_eq!(names(&tree, BLOBS), [".", "..", "ours", "theirs"]);
        assert_eq!(tree.find(BLOBS, b"ours").unwrap().unwrap().size, 0);
        assert_eq!(tree.find(BLOBS, b"theirs").unwrap().unwrap().size, 4);
    }

    #[test]
    fn who_has_a_file_open_reads_on_and_all_others_find_the_new_one() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let put = |text: &str| {
            fs::write(dir.path().join("new"), text).unwrap();
            fs::rename(dir.path().join("new"), dir.path().join("file")).unwrap();
        };
        put("old");
        let old = tree.find(ROOT, b"file").unwrap().unwrap().id;
        assert_eq!(tree.open(old), Ok(false));
        put("newer");

        let new = tree.find(ROOT, b"file").unwrap().unwrap();

        assert!(new.id != old && new.size == 5);
        assert_eq!(tree.node(old).map(|node| (node.size, node.nlink)), Ok((3, 0)));
        tree.close(old);
        assert_eq!(tree.node(old), Err(TreeError::Gone));
        assert_eq!(tree.open(old), Err(TreeError::Gone));
        tree.forget(old, 1);
        assert_eq!(tree.node(old), Err(TreeError::NoNode));
    }

    #[test]
    fn any_number_and_any_place_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let known = tree.find(ROOT, b"bootstrap").unwrap().unwrap().id;
        let ids = [0, ROOT, BLOBS, FIRST, FIRST + 1, super::super::names::FIRST, known, known + 1, u64::MAX];
        let places = [0, 1, OWN_PLACES, OWN_PLACES + 1, OWN_PLACES + 9, 1 << 63, u64::MAX];
        for id in ids {
            let range = ByteRange::at(u64::MAX - 9, 9).unwrap();
            let _ =
                (tree.find(id, b"x"), tree.node(id), tree.link(id), tree.xattr(id, b"user.x"), tree.xattrs(id, true));
            let _ = (tree.open(id), tree.pieces(id, range, &mut |_| {}));
            for from in places {
                let mut count = 0;
                let _ = tree.list(id, from, true, &mut |_, _| {
                    count += 1;
                    ControlFlow::Continue(())
                });
                assert!(count <= 4, "{id} from {from}");
            }
            tree.close(id);
            tree.forget(id, u64::MAX);
        }
    }
}
