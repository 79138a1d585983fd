//! A directory as a source: what its walk (`walk.rs`) shows becomes a tree and file content. What
//! changes while it is read is an error, never a mixture.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::walk::{Here, OPEN_DIRECTORY, Visitor, identity, kind_of, walk};
use super::{Read, check_target, device_number};
use crate::build::chunk::{Body, Content, CutError, Cutter};
use crate::build::prefetch::PrefetchHints;
use crate::build::selection::Selection;
use crate::build::tree::{Kind, Meta, Node, NodeId, Tree};
use crate::build::xattr::{self, Collector};
use crate::build::{BuildError, Progress, Unfit};

/// Reads what is selected below `root` into a tree, and file content into `cutter`: that of hinted
/// files first.
pub(in crate::build) fn directory(
    root: &Path,
    selection: &Selection,
    hints: &PrefetchHints,
    cutter: &mut Cutter<'_>,
    progress: &dyn Progress,
) -> Result<Read, BuildError> {
    if progress.wants_total() {
        let mut census = Census::default();
        walk(root, selection, &mut census)?;
        progress.total(census.entries, census.bytes);
    }
    let mut reader = Reader {
        tree: Tree::new(Meta::implied_directory()),
        linked: HashMap::new(),
        buffer: vec![0; xattr::MAX_VALUE + 1],
        skipped_xattrs: 0,
        selection,
        ahead: HashMap::new(),
        cutter,
        progress,
    };
    if !hints.is_empty() {
        let mut hinted = Hinted { hints, found: Vec::new() };
        walk(root, selection, &mut hinted)?;
        reader.read_ahead(root, hinted.in_order())?;
    }
    walk(root, selection, &mut reader)?;
    let Reader { tree, skipped_xattrs, .. } = reader;
    Ok(Read { tree, skipped_xattrs, gzip_bytes: None })
}

/// Counts what there is, for a progress bar.
#[derive(Default)]
struct Census {
    entries: u64,
    bytes: u64,
    linked: std::collections::HashSet<(u64, u64)>,
}

impl Visitor for Census {
    type Dir = ();

    fn root(&mut self, _: &Here<'_>, _: &Stat) -> Result<(), BuildError> {
        self.entries += 1;
        Ok(())
    }

    fn entry(&mut self, _: &Here<'_>, (): (), _: &OsStr, stat: &Stat) -> Result<Option<()>, BuildError> {
        self.entries += 1;
        let kind = kind_of(stat);
        if kind == FileType::RegularFile && (stat.st_nlink == 1 || self.linked.insert(identity(stat))) {
            self.bytes += u64::try_from(stat.st_size).unwrap_or(0);
        }
        Ok((kind == FileType::Directory).then_some(()))
    }
}

/// Finds the files whose data goes in front.
struct Hinted<'h> {
    hints: &'h PrefetchHints,
    /// The hint that each file goes by, and the file's names from the root.
    found: Vec<(usize, Vec<Box<[u8]>>)>,
}

impl Hinted<'_> {
    /// By hint, then as they were found.
    fn in_order(mut self) -> Vec<Vec<Box<[u8]>>> {
        self.found.sort_by_key(|(hint, _)| *hint);
        self.found.into_iter().map(|(_, names)| names).collect()
    }
}

impl Visitor for Hinted<'_> {
    type Dir = ();

    fn root(&mut self, _: &Here<'_>, _: &Stat) -> Result<(), BuildError> {
        Ok(())
    }

    fn entry(&mut self, here: &Here<'_>, (): (), name: &OsStr, stat: &Stat) -> Result<Option<()>, BuildError> {
        let kind = kind_of(stat);
        if kind == FileType::RegularFile && stat.st_size > 0 {
            let mut names = (here.names)();
            names.push(name.as_bytes().into());
            self.found.extend(self.hints.position(&names).map(|hint| (hint, names)));
        }
        Ok((kind == FileType::Directory).then_some(()))
    }
}

/// What tells whether a file has changed.
type Version = (i64, i64, u64);

fn version(stat: &Stat) -> Version {
    (stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
}

/// Makes the tree.
struct Reader<'a, 'c> {
    tree: Tree,
    /// Nodes of regular files with several names, by device and inode.
    linked: HashMap<(u64, u64), NodeId>,
    buffer: Vec<u8>,
    skipped_xattrs: u64,
    selection: &'a Selection,
    /// Content that was read before its turn, by device and inode.
    ahead: HashMap<(u64, u64), (Version, Content)>,
    cutter: &'a mut Cutter<'c>,
    progress: &'a dyn Progress,
}

impl Visitor for Reader<'_, '_> {
    type Dir = NodeId;

    fn root(&mut self, here: &Here<'_>, stat: &Stat) -> Result<NodeId, BuildError> {
        let meta = self.meta(here, OsStr::new("."), stat)?;
        self.tree.node_mut(NodeId::ROOT).meta = meta;
        self.progress.advance(1, 0);
        Ok(NodeId::ROOT)
    }

    fn entry(&mut self, here: &Here<'_>, dir: NodeId, name: &OsStr, stat: &Stat) -> Result<Option<NodeId>, BuildError> {
        self.progress.advance(1, 0);
        let unfit = |problem| BuildError::Entry { path: here.path_of(name), problem };
        let kind = kind_of(stat);
        let shared = (kind != FileType::Directory && stat.st_nlink > 1).then(|| identity(stat));
        if let Some(node) = shared.and_then(|key| self.linked.get(&key)) {
            self.tree.link(dir, name.as_bytes(), *node).map_err(unfit)?;
            return Ok(None);
        }
        let node = if kind == FileType::RegularFile {
            self.regular(here, name, stat)?
        } else {
            Node { kind: self.other_kind(here, name, stat)?, meta: self.meta(here, name, stat)? }
        };
        let id = self.tree.insert(dir, name.as_bytes(), node).map_err(unfit)?;
        self.linked.extend(shared.map(|key| (key, id)));
        Ok((kind == FileType::Directory).then_some(id))
    }
}

impl Reader<'_, '_> {
    /// Everything but regular files.
    fn other_kind(&self, here: &Here<'_>, name: &OsStr, stat: &Stat) -> Result<Kind, BuildError> {
        let unfit = |problem| BuildError::Entry { path: here.path_of(name), problem };
        let device = || {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            device_number(major.into(), minor.into()).map_err(unfit)
        };
        match kind_of(stat) {
            FileType::Directory => Ok(Kind::empty_directory()),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(here.fd, name, Vec::new()).map_err(|e| here.read_error(name, e))?;
                check_target(target.as_bytes()).map_err(unfit)?;
                Ok(Kind::Symlink(target.into_bytes().into()))
            }
            FileType::CharacterDevice => device().map(Kind::Character),
            FileType::BlockDevice => device().map(Kind::Block),
            FileType::Fifo => Ok(Kind::Fifo),
            FileType::Socket => Ok(Kind::Socket),
            FileType::RegularFile | FileType::Unknown => Err(BuildError::Changed { path: here.path_of(name) }),
        }
    }

    /// Reads the content of these files, each named from the root, before that of all others.
    fn read_ahead(&mut self, root: &Path, files: Vec<Vec<Box<[u8]>>>) -> Result<(), BuildError> {
        for names in files {
            let mut fd = rustix::fs::open(root, OPEN_DIRECTORY.difference(OFlags::NOFOLLOW), Mode::empty())
                .map_err(|errno| BuildError::Read { path: root.to_owned(), source: errno.into() })?;
            let (file, directories) = names.split_last().expect("a file has a name");
            for depth in 0..directories.len() {
                let here = Here { fd: fd.as_fd(), path: &|| path_below(root, &names[..depth]), names: &Vec::new };
                let name = OsStr::from_bytes(&names[depth]);
                let next = rustix::fs::openat(here.fd, name, OPEN_DIRECTORY, Mode::empty());
                fd = next.map_err(|errno| here.read_error(name, errno))?;
            }
            let here = Here { fd: fd.as_fd(), path: &|| path_below(root, directories), names: &Vec::new };
            let (file, before) = self.open(&here, OsStr::from_bytes(file), None)?;
            if !self.ahead.contains_key(&identity(&before)) {
                let content = self.content(&here, &file, &before)?;
                self.ahead.insert(identity(&before), (version(&before), content));
            }
        }
        Ok(())
    }

    fn regular(&mut self, here: &Here<'_>, name: &OsStr, listed: &Stat) -> Result<Node, BuildError> {
        let (file, before) = self.open(here, name, Some(listed))?;
        let content = match self.ahead.get(&identity(&before)) {
            None => self.content(here, &file, &before)?,
            Some((read, content)) if *read == version(&before) => content.clone(),
            Some(_) => return Err(BuildError::Changed { path: here.path_of(name) }),
        };
        let meta = self.meta(here, name, &before)?;
        let after = rustix::fs::fstat(&file.fd).map_err(|e| here.read_error(name, e))?;
        if version(&before) != version(&after) {
            return Err(BuildError::Changed { path: here.path_of(name) });
        }
        Ok(Node { kind: Kind::Regular(content), meta })
    }

    /// Opens a regular file, which must be the one that was listed.
    fn open<'n>(
        &self,
        here: &Here<'_>,
        name: &'n OsStr,
        listed: Option<&Stat>,
    ) -> Result<(OpenFile<'n>, Stat), BuildError> {
        // Should it have become a FIFO, opening it must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(here.fd, name, flags, Mode::empty()).map_err(|e| here.read_error(name, e))?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| here.read_error(name, e))?;
        let is_other = listed.is_some_and(|listed| identity(listed) != identity(&stat));
        if is_other || kind_of(&stat) != FileType::RegularFile {
            return Err(BuildError::Changed { path: here.path_of(name) });
        }
        Ok((OpenFile { name, fd: File::from(fd) }, stat))
    }

    fn content(&mut self, here: &Here<'_>, file: &OpenFile<'_>, stat: &Stat) -> Result<Content, BuildError> {
        let changed = || BuildError::Changed { path: here.path_of(file.name) };
        let size = u64::try_from(stat.st_size).map_err(|_| changed())?;
        // Only files with fewer blocks than bytes are worth asking for holes.
        let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        let mut body = FileBody { file: &file.fd, at: 0, size, sparse: allocated < size, next_data: 0 };
        self.cutter.cut(size, &mut body).map_err(|e| match e {
            CutError::Read(e) if e.kind() == io::ErrorKind::UnexpectedEof => changed(),
            CutError::Read(source) => BuildError::Read { path: here.path_of(file.name), source },
            CutError::Limit(limit) => BuildError::Limit(limit),
            CutError::Stopped => changed(),
        })
    }

    fn meta(&mut self, here: &Here<'_>, name: &OsStr, stat: &Stat) -> Result<Meta, BuildError> {
        let mut meta = Meta {
            permissions: u16::try_from(stat.st_mode & 0o7777).expect("12 bits"),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nsec: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
            xattrs: Vec::new(),
        };
        let xattrs = self.xattrs(here, name)?;
        self.skipped_xattrs += xattrs.skipped;
        xattrs.store(&mut meta).map_err(|problem| BuildError::Entry { path: here.path_of(name), problem })?;
        self.selection.adjust(&mut meta);
        Ok(meta)
    }

    fn xattrs(&mut self, here: &Here<'_>, name: &OsStr) -> Result<Collector, BuildError> {
        let mut collector = Collector::default();
        // There is no call for the xattrs of a name in an open directory, and descriptors that
        // merely name a file are refused. The way through /proc works for every kind of entry.
        let mut path = format!("/proc/self/fd/{}/", here.fd.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.as_bytes());
        let path = OsStr::from_bytes(&path);
        let names = match rustix::fs::llistxattr(path, &mut self.buffer[..]) {
            Err(Errno::OPNOTSUPP) => return Ok(collector),
            other => self.buffer[..other.map_err(|e| here.read_error(name, e))?].to_vec(),
        };
        for xattr in names.split(|b| *b == 0).filter(|xattr| !xattr.is_empty()) {
            if !self.selection.keeps_xattr(xattr) {
                continue;
            }
            let value = match rustix::fs::lgetxattr(path, OsStr::from_bytes(xattr), &mut self.buffer[..]) {
                // Removed since it was listed, or listed by a filesystem that does not let us see it.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => continue,
                other => &self.buffer[..other.map_err(|e| here.read_error(name, e))?],
            };
            let added = collector.add(xattr, value);
            added.map_err(|problem: Unfit| BuildError::Entry { path: here.path_of(name), problem })?;
        }
        Ok(collector)
    }
}

fn path_below(root: &Path, names: &[Box<[u8]>]) -> PathBuf {
    let mut path = root.to_owned();
    path.extend(names.iter().map(|name| OsStr::from_bytes(name)));
    path
}

/// A regular file that is open.
struct OpenFile<'n> {
    name: &'n OsStr,
    fd: File,
}

/// The content of an open file. Reads by position, so that looking for holes disturbs nothing.
struct FileBody<'f> {
    file: &'f File,
    at: u64,
    size: u64,
    /// Whether looking for holes can pay.
    sparse: bool,
    /// If larger than `at`: everything between them is a hole.
    next_data: u64,
}

impl Body for FileBody<'_> {
    fn fill(&mut self, plain: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(plain, self.at)?;
        self.at += plain.len() as u64;
        Ok(())
    }

    fn skip_zeros(&mut self, len: u64) -> io::Result<bool> {
        if self.sparse && self.next_data <= self.at {
            self.next_data = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
                Ok(next) => next,
                // Nothing but a hole until the end.
                Err(Errno::NXIO) => self.size,
                // A filesystem that cannot tell: then every byte is read.
                Err(_) => {
                    self.sparse = false;
                    0
                }
            };
        }
        let skip = self.next_data >= self.at + len;
        if skip {
            self.at += len;
        }
        Ok(skip)
    }
}
