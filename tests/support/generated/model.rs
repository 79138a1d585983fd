//! What an archive means: the tree that is there when all of its members have been put in place.
//!
//! Members act in order, as for an extracting tar. Where an image differs from an extraction the
//! rules for images decide: missing parents are made with mode 0755, root, 1970; a member that is
//! no directory takes the place of a directory with all below it; zeros between members mean nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, Uid, XattrFlags};

use super::member::{Content, Item, Member, What};
use crate::support::listing::Line;
use crate::support::tree::set_mtime;

/// A tree by path. Names of one inode share a position in `nodes`.
#[derive(Clone, Debug)]
pub struct Model {
    paths: BTreeMap<Vec<u8>, usize>,
    nodes: Vec<Node>,
    /// Xattrs in namespaces that an image has no number for.
    pub skipped_xattrs: u64,
}

#[derive(Clone, Debug)]
struct Node {
    kind: Kind,
    permissions: u16,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    File(Content),
    Symlink(Vec<u8>),
    Character(u64, u64),
    Block(u64, u64),
    Directory,
    Fifo,
}

/// Why an archive cannot become an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    DotDot,
    Absolute,
    ParentIsNoDirectory,
    RootIsNoDirectory,
    LinkToNothing,
    LinkToDirectory,
    NameLength,
    PathLength,
    Nul,
    TargetLength,
    Owner,
    DeviceNumber,
    XattrLength,
    Damaged,
}

impl Refused {
    /// What a message must name, so that whoever made the archive knows what to change.
    pub fn named(self) -> &'static str {
        match self {
            Self::DotDot => "'..'",
            Self::Absolute => "absolute",
            Self::ParentIsNoDirectory => "parent is not a directory",
            Self::RootIsNoDirectory => "called '.'",
            Self::LinkToNothing => "not there",
            Self::LinkToDirectory => "directory",
            Self::NameLength => "255",
            Self::PathLength => "32",
            Self::Nul => "NUL",
            Self::TargetLength => "4095",
            Self::Owner => "32 bits",
            Self::DeviceNumber => "device number",
            Self::XattrLength => "65535",
            Self::Damaged => "generated.tar",
        }
    }
}

/// Namespaces that EROFS has numbers for.
const NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
/// Whole names that it has numbers for.
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

impl Default for Model {
    fn default() -> Self {
        Self { paths: BTreeMap::from([(Vec::new(), 0)]), nodes: vec![Node::implied()], skipped_xattrs: 0 }
    }
}

impl Model {
    /// What `items` mean.
    pub fn of(items: &[Item]) -> Result<Self, Refused> {
        let mut model = Self::default();
        for item in items {
            match item {
                Item::Member(member) => model.put(member)?,
                Item::Damaged(_) => return Err(Refused::Damaged),
                Item::Global(_) | Item::EndMark => {}
            }
        }
        Ok(model)
    }

    /// Puts one more member in place. After an error the tree means nothing.
    pub fn put(&mut self, member: &Member) -> Result<(), Refused> {
        let path = normal(&member.path)?;
        if member.path.starts_with(b"/") && !path.is_empty() {
            return Err(Refused::Absolute);
        }
        let mut node = Node::of(member)?;
        self.skipped_xattrs += node.drop_unknown_xattrs()?;
        match &member.what {
            What::HardLink(target) => return self.link(&path, target),
            What::File(content) => node.kind = Kind::File(content.clone()),
            What::Symlink(target) if target.is_empty() || target.len() > 4095 => return Err(Refused::TargetLength),
            What::Symlink(target) if target.contains(&0) => return Err(Refused::Nul),
            What::Symlink(target) => node.kind = Kind::Symlink(target.clone()),
            What::Character(major, minor) | What::Block(major, minor) if *major > 0xfff || *minor > 0xf_ffff => {
                return Err(Refused::DeviceNumber);
            }
            What::Character(major, minor) => node.kind = Kind::Character(*major, *minor),
            What::Block(major, minor) => node.kind = Kind::Block(*major, *minor),
            What::Directory => node.kind = Kind::Directory,
            What::Fifo => node.kind = Kind::Fifo,
        }
        let is_directory = node.kind == Kind::Directory;
        if path.is_empty() && !is_directory {
            return Err(Refused::RootIsNoDirectory);
        }
        self.nodes.push(node);
        self.place(&path, self.nodes.len() - 1, is_directory)
    }

    fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Refused> {
        let target = normal(target)?;
        let node = *self.paths.get(&target).ok_or(Refused::LinkToNothing)?;
        if path.is_empty() {
            return Err(Refused::RootIsNoDirectory);
        }
        match &self.nodes[node].kind {
            Kind::Directory => Err(Refused::LinkToDirectory),
            // A second name for itself changes nothing.
            _ if path == target => Ok(()),
            _ => self.place(path, node, false),
        }
    }

    fn place(&mut self, path: &[u8], node: usize, is_directory: bool) -> Result<(), Refused> {
        for at in (0..path.len()).filter(|at| path[*at] == b'/') {
            let parent = path[..at].to_vec();
            match self.paths.get(&parent) {
                Some(parent) if self.nodes[*parent].kind == Kind::Directory => {}
                Some(_) => return Err(Refused::ParentIsNoDirectory),
                None => {
                    self.nodes.push(Node::implied());
                    self.paths.insert(parent, self.nodes.len() - 1);
                }
            }
        }
        if !is_directory {
            let below = [path, b"/"].concat();
            self.paths.retain(|path, _| !path.starts_with(&below));
        }
        self.paths.insert(path.to_vec(), node);
        Ok(())
    }

    /// The tree that this layer makes over `lower`. Whiteouts (`.wh.NAME`, and `.wh..wh..opq` for
    /// all of a directory) act on what is in `lower` alone, and are in neither place afterwards.
    pub fn over(&self, lower: &Self) -> Self {
        let mut out = lower.clone();
        for path in self.paths.keys() {
            match Whiteout::of(path) {
                Some(Whiteout::Removal(gone)) => out.remove(&gone, true),
                Some(Whiteout::Opaque(directory)) => out.remove(&directory, false),
                None => {}
            }
        }
        let first = out.nodes.len();
        out.nodes.extend(self.nodes.iter().cloned());
        for (path, node) in self.paths.iter().filter(|(path, _)| Whiteout::of(path).is_none()) {
            let is_directory = |model: &Self, node: usize| model.nodes[node].kind == Kind::Directory;
            let merged = out.paths.get(path).is_some_and(|old| is_directory(&out, *old)) && is_directory(self, *node);
            if !merged {
                out.remove(path, true);
            }
            out.paths.insert(path.clone(), first + node);
        }
        out
    }

    /// The same layer with the whiteouts of overlayfs: devices 0/0 and an xattr. Only those that
    /// hide something in `lower`: in a directory that is not merged, the kernel lists the others.
    pub fn for_overlayfs(&self, lower: &Self) -> Self {
        let mut out = self.clone();
        let (mut opaque, mut removed) = (Vec::new(), Vec::new());
        for path in self.paths.keys() {
            match Whiteout::of(path) {
                Some(Whiteout::Opaque(directory)) => opaque.push(directory),
                // A directory would be merged with the one that it replaces.
                Some(Whiteout::Removal(gone)) if self.has_directory(&gone) => opaque.push(gone),
                Some(Whiteout::Removal(gone)) if !self.paths.contains_key(&gone) => removed.push(gone),
                Some(Whiteout::Removal(_)) => {}
                None => continue,
            }
            out.paths.remove(path);
        }
        removed.retain(|gone| {
            let hidden = |directory: &Vec<u8>| gone.starts_with(&[directory, &b"/"[..]].concat());
            lower.paths.contains_key(gone) && !opaque.iter().any(hidden)
        });
        for directory in opaque {
            let mut node = out.nodes[out.paths[&directory]].clone();
            node.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
            out.nodes.push(node);
            out.paths.insert(directory, out.nodes.len() - 1);
        }
        for gone in removed {
            out.nodes.push(Node { kind: Kind::Character(0, 0), ..Node::implied() });
            out.paths.insert(gone, out.nodes.len() - 1);
        }
        out
    }

    /// Removes what is below `path`, and the path itself if `whole`; never the root.
    fn remove(&mut self, path: &[u8], whole: bool) {
        let below = if path.is_empty() { Vec::new() } else { [path, b"/"].concat() };
        let goes = |other: &[u8]| if other == path { whole } else { other.starts_with(&below) };
        self.paths.retain(|other, _| other.is_empty() || !goes(other));
    }

    /// The same as RAFS v5 can hold it: other nodes than files have one name, and further ones become copies.
    pub fn in_version_5(mut self) -> Self {
        let mut met = BTreeSet::new();
        for node in self.paths.values_mut() {
            if !met.insert(*node) && !matches!(self.nodes[*node].kind, Kind::File(_)) {
                self.nodes.push(self.nodes[*node].clone());
                *node = self.nodes.len() - 1;
            }
        }
        self
    }

    /// Whether a directory is at `path`.
    pub fn has_directory(&self, path: &[u8]) -> bool {
        self.paths.get(path).is_some_and(|node| self.nodes[*node].kind == Kind::Directory)
    }

    /// Every path as `listing::of` shows it where the tree is mounted, sorted.
    pub fn lines(&self) -> Vec<Line> {
        let mut links = BTreeMap::<usize, usize>::new();
        for node in self.paths.values() {
            *links.entry(*node).or_default() += 1;
        }
        let facts = |node: &usize| self.nodes[*node].facts(links[node]);
        self.paths.iter().map(|(path, node)| Line { path: path.clone(), facts: facts(node) }).collect()
    }

    /// The names of every inode that has several, sorted.
    pub fn groups(&self) -> Vec<Vec<Vec<u8>>> {
        let mut groups = BTreeMap::<usize, Vec<Vec<u8>>>::new();
        for (path, node) in &self.paths {
            groups.entry(*node).or_default().push(path.clone());
        }
        let mut groups: Vec<_> = groups.into_values().filter(|names| names.len() > 1).collect();
        groups.sort();
        groups
    }

    /// Makes the tree below the empty directory `root`. Needs to be root.
    pub fn write_to(&self, root: &Path) -> io::Result<()> {
        let place = |path: &[u8]| match path {
            b"" => root.to_owned(),
            path => root.join(OsStr::from_bytes(path)),
        };
        let mut first = BTreeMap::<usize, &Vec<u8>>::new();
        for (path, node) in self.paths.iter().filter(|(path, _)| !path.is_empty()) {
            match first.entry(*node) {
                std::collections::btree_map::Entry::Occupied(other) => fs::hard_link(place(other.get()), place(path))?,
                std::collections::btree_map::Entry::Vacant(free) => {
                    self.nodes[*node].make(&place(path))?;
                    free.insert(path);
                }
            }
        }
        // Children before parents, since making a child changes its parent's time.
        for (path, node) in self.paths.iter().rev() {
            self.nodes[*node].dress(&place(path))?;
        }
        Ok(())
    }
}

/// What a marker file of an OCI layer asks for.
enum Whiteout {
    /// This path goes.
    Removal(Vec<u8>),
    /// All below this directory goes.
    Opaque(Vec<u8>),
}

impl Whiteout {
    fn of(path: &[u8]) -> Option<Self> {
        let (directory, name) = match path.iter().rposition(|b| *b == b'/') {
            Some(at) => (&path[..at], &path[at + 1..]),
            None => (&b""[..], path),
        };
        match name.strip_prefix(b".wh.")? {
            b".wh..opq" => Some(Self::Opaque(directory.to_vec())),
            gone if directory.is_empty() => Some(Self::Removal(gone.to_vec())),
            gone => Some(Self::Removal([directory, b"/", gone].concat())),
        }
    }
}

/// A path below the root: no empty and no `.` components.
pub fn normal(path: &[u8]) -> Result<Vec<u8>, Refused> {
    if path.contains(&0) {
        return Err(Refused::Nul);
    }
    if path.len() > 32 << 10 {
        return Err(Refused::PathLength);
    }
    let names: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    if names.contains(&b"..".as_slice()) {
        return Err(Refused::DotDot);
    }
    if names.iter().any(|name| name.len() > 255) {
        return Err(Refused::NameLength);
    }
    Ok(names.join(&b"/"[..]))
}

impl Node {
    fn implied() -> Self {
        Self { kind: Kind::Directory, permissions: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new() }
    }

    fn of(member: &Member) -> Result<Self, Refused> {
        let owner = |id: u64| u32::try_from(id).map_err(|_| Refused::Owner);
        Ok(Self {
            kind: Kind::Directory,
            permissions: u16::try_from(member.mode & 0o7777).expect("12 bits"),
            uid: owner(member.uid)?,
            gid: owner(member.gid)?,
            mtime: member.mtime,
            xattrs: member.xattrs.iter().cloned().collect(),
        })
    }

    fn drop_unknown_xattrs(&mut self) -> Result<u64, Refused> {
        let known = |name: &[u8]| {
            ACLS.contains(&name) || NAMESPACES.iter().any(|space| name.starts_with(space) && name.len() > space.len())
        };
        let before = self.xattrs.len();
        self.xattrs.retain(|name, _| known(name));
        let fits = |(name, value): (&Vec<u8>, &Vec<u8>)| name.len() <= 255 && value.len() <= 65535;
        if !self.xattrs.iter().all(fits) {
            return Err(Refused::XattrLength);
        }
        Ok((before - self.xattrs.len()) as u64)
    }

    /// As `listing` writes them.
    fn facts(&self, links: usize) -> String {
        let kind = match &self.kind {
            Kind::File(_) => libc::S_IFREG,
            Kind::Symlink(_) => libc::S_IFLNK,
            Kind::Character(..) => libc::S_IFCHR,
            Kind::Block(..) => libc::S_IFBLK,
            Kind::Directory => libc::S_IFDIR,
            Kind::Fifo => libc::S_IFIFO,
        };
        let mode = kind | u32::from(self.permissions);
        let mut out = format!("{mode:06o} {}:{} {}.{:09}", self.uid, self.gid, self.mtime.0, self.mtime.1);
        if self.kind != Kind::Directory {
            write!(out, " links={links}").unwrap();
        }
        match &self.kind {
            Kind::File(content) => {
                write!(out, " size={} blake3={}", content.size, blake3::hash(&content.bytes())).unwrap();
            }
            Kind::Symlink(target) => write!(out, " -> {}", target.escape_ascii()).unwrap(),
            Kind::Character(major, minor) | Kind::Block(major, minor) => write!(out, " dev={major}:{minor}").unwrap(),
            Kind::Directory | Kind::Fifo => {}
        }
        for (name, value) in &self.xattrs {
            write!(out, " {}={}", name.escape_ascii(), value.escape_ascii()).unwrap();
        }
        out
    }

    fn make(&self, path: &Path) -> io::Result<()> {
        let special = |kind, major: u64, minor: u64| {
            let (major, minor) = (u32::try_from(major).expect("12 bits"), u32::try_from(minor).expect("20 bits"));
            let device = rustix::fs::makedev(major, minor);
            Ok(rustix::fs::mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), device)?)
        };
        match &self.kind {
            Kind::Directory => fs::create_dir(path),
            Kind::Symlink(target) => symlink(OsStr::from_bytes(target), path),
            Kind::Character(major, minor) => special(FileType::CharacterDevice, *major, *minor),
            Kind::Block(major, minor) => special(FileType::BlockDevice, *major, *minor),
            Kind::Fifo => special(FileType::Fifo, 0, 0),
            Kind::File(content) => {
                let file = File::create(path)?;
                file.set_len(content.size)?;
                content.islands.iter().try_for_each(|island| file.write_all_at(&island.bytes(), island.at))
            }
        }
    }

    /// Owner, mode, xattrs and time; owners first, since changing them clears set-id bits.
    fn dress(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        rustix::fs::chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if !matches!(self.kind, Kind::Symlink(_)) {
            fs::set_permissions(path, fs::Permissions::from_mode(self.permissions.into()))?;
        }
        for (name, value) in &self.xattrs {
            rustix::fs::lsetxattr(path, OsStr::from_bytes(name), value, XattrFlags::empty())?;
        }
        set_mtime(path, self.mtime.0, self.mtime.1.into())
    }
}
