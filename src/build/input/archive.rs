//! A tar archive as a source, plain or gzip.
//!
//! Nothing is ever extracted. Rules, where archives leave room:
//!
//! * Paths are taken below the root; `.` and repeated slashes vanish, `..` is an error.
//! * Missing parents are made (0755, root, 1970). A path given again replaces what it named, but
//!   a directory over a directory keeps its children.
//! * A hard link shares the inode of what it links to, whose attributes stay those of the first
//!   name: they exist only once. Links to directories are errors.
//! * Whiteouts and other marker files are files like any others.
//! * PAX global headers are ignored: version control writes them, and only as a comment.
//! * What is excluded is passed over with everything below it. A hard link to it is one to nothing.
//! * Sizes that disagree, unknown member types, a missing end mark: errors, since what follows
//!   could be anything.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;

use super::pax::{Extensions, MAX_EXTENSION};
use super::sparse::{self, MAX_SEGMENTS, ReadMapError, Segment, SparseBody};
use super::tarheader::{BLOCK, Member, TarHeader};
use super::{Read as ReadTree, check_target, device_number};
use crate::build::chunk::{Content, CutError, Cutter, PlainBody};
use crate::build::selection::Selection;
use crate::build::tree::{Kind, Meta, Node, NodeId, Tree};
use crate::build::xattr::Collector;
use crate::build::{BuildError, Progress, Unfit};

/// Longest path in an archive, in bytes. Each of its directories may have to be made.
const MAX_PATH: usize = 32 << 10;

/// Reads an archive into a tree, and file content into `cutter`. `name` is for errors.
pub(in crate::build) fn archive(
    name: &Path,
    stream: Box<dyn Read>,
    selection: &Selection,
    cutter: &mut Cutter<'_>,
    progress: &dyn Progress,
) -> Result<ReadTree, BuildError> {
    let raw = Rc::new(Cell::new(0));
    let (stream, is_gzip) = plain(Box::new(Measured { stream, len: raw.clone() }))
        .map_err(|source| BuildError::Read { path: name.to_owned(), source })?;
    let mut reader = Reader {
        stream: Counted { stream, at: 0 },
        tree: Tree::new(Meta::implied_directory()),
        skipped_xattrs: 0,
        name,
        selection,
        cutter,
        progress,
    };
    reader.members()?;
    let Reader { tree, skipped_xattrs, .. } = reader;
    Ok(ReadTree { tree, skipped_xattrs, gzip_bytes: is_gzip.then(|| raw.get()) })
}

/// The archive without its compression, and whether that was gzip.
fn plain(mut stream: Box<dyn Read>) -> io::Result<(Box<dyn BufRead>, bool)> {
    const BUFFER: usize = 1 << 17;
    const GZIP: [u8; 3] = [0x1f, 0x8b, 8];
    /// First bytes of a Zstandard frame's magic number.
    const ZSTD: [u8; 3] = [0x28, 0xb5, 0x2f];
    let mut start = Vec::new();
    stream.by_ref().take(GZIP.len() as u64).read_to_end(&mut start)?;
    let (is_gzip, is_zstd) = (start == GZIP, start == ZSTD);
    if is_zstd {
        let what = "it is compressed with zstd; decompress it on the way: zstd -dc ARCHIVE | rafsd build - ...";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let whole = BufReader::with_capacity(BUFFER, Cursor::new(start).chain(stream));
    let plain: Box<dyn BufRead> =
        if is_gzip { Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole))) } else { Box::new(whole) };
    Ok((plain, is_gzip))
}

/// Tells how much was read of a stream that somebody else owns.
struct Measured {
    stream: Box<dyn Read>,
    len: Rc<Cell<u64>>,
}

impl Read for Measured {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buffer)?;
        self.len.set(self.len.get() + n as u64);
        Ok(n)
    }
}

/// Knows how far it has read.
struct Counted {
    stream: Box<dyn BufRead>,
    at: u64,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buffer)?;
        self.at += n as u64;
        Ok(n)
    }
}

struct Reader<'a, 'c> {
    stream: Counted,
    tree: Tree,
    skipped_xattrs: u64,
    name: &'a Path,
    selection: &'a Selection,
    cutter: &'a mut Cutter<'c>,
    progress: &'a dyn Progress,
}

impl Reader<'_, '_> {
    fn members(&mut self) -> Result<(), BuildError> {
        let mut extensions = Extensions::default();
        let mut room = MAX_EXTENSION;
        let mut pending = false;
        let mut ended = false;
        let mut block = [0; BLOCK];
        while self.next_block(&mut block)? {
            // Whole archives may follow one another, so the end mark is only padding.
            if block == [0; BLOCK] {
                ended = true;
                continue;
            }
            ended = false;
            let header = TarHeader::parse(&block).map_err(|e| self.damaged(e))?;
            let is_named = extensions.path.is_some() || extensions.sparse.name.is_some();
            let member = header.member(is_named).map_err(|e| self.damaged(e))?;
            match member {
                Member::Extended => {
                    let records = self.extension(&header, &mut room)?;
                    extensions.apply(&records).map_err(|e| self.damaged(e))?;
                }
                Member::Global => {
                    self.extension(&header, &mut { MAX_EXTENSION })?;
                    continue;
                }
                Member::LongName => extensions.path = Some(until_nul(self.extension(&header, &mut room)?)),
                Member::LongLink => extensions.link = Some(until_nul(self.extension(&header, &mut room)?)),
                _ => {
                    self.member(member, &header, std::mem::take(&mut extensions))?;
                    pending = false;
                    room = MAX_EXTENSION;
                    continue;
                }
            }
            pending = true;
        }
        if pending || !ended {
            return Err(self.damaged("it ends without an end mark, so something may be missing"));
        }
        Ok(())
    }

    /// Reads the next block; false at the end of the stream.
    fn next_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, BuildError> {
        let mut filled = 0;
        while filled < BLOCK {
            match self.stream.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(self.damaged("it ends within a header")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
        Ok(true)
    }

    /// The content of a member that only says something about the next one. Takes its size from
    /// `room`: there is no limit to how many of them may come in a row.
    fn extension(&mut self, header: &TarHeader<'_>, room: &mut u64) -> Result<Vec<u8>, BuildError> {
        let size = header.size().map_err(|e| self.damaged(e))?;
        let too_much = format!("an extended header of {size} bytes, 1 MiB for one member is the limit");
        *room = room.checked_sub(size).ok_or_else(|| self.damaged(too_much))?;
        let mut bytes = vec![0; usize::try_from(size).expect("at most 1 MiB")];
        self.stream.read_exact(&mut bytes).map_err(|e| self.broken(e))?;
        self.skip_padding(size)?;
        Ok(bytes)
    }

    fn skip_padding(&mut self, size: u64) -> Result<(), BuildError> {
        let padding = usize::try_from(size.wrapping_neg() % BLOCK as u64).expect("below a block");
        self.stream.read_exact(&mut [0; BLOCK][..padding]).map_err(|e| self.broken(e))
    }

    fn member(&mut self, member: Member, header: &TarHeader<'_>, extensions: Extensions) -> Result<(), BuildError> {
        let sparse_name = extensions.sparse.name.clone();
        let path = sparse_name.or_else(|| extensions.path.clone()).unwrap_or_else(|| header.path());
        self.progress.advance(1, 0);
        let names = self.names(&path)?;
        // The root may be called "/"; anything else that starts so was not packed as a layer.
        if path.starts_with(b"/") && !names.is_empty() {
            return Err(self.damaged(format!("path {} is absolute; pack it without the '/'", path.escape_ascii())));
        }
        if self.selection.excludes_at_any_level(&names, member == Member::Directory) {
            return self.pass_over(member, header, &extensions);
        }
        let meta = self.meta(&path, header, &extensions)?;
        let link = extensions.link.as_deref().unwrap_or_else(|| header.link());
        let kind = match member {
            Member::Regular | Member::Sparse => Kind::Regular(self.content(&path, member, header, &extensions)?),
            Member::HardLink => return self.hard_link(&path, link),
            Member::Symlink => {
                check_target(link).map_err(|problem| self.unfit(&path, problem))?;
                if link.contains(&0) {
                    return Err(self.damaged("a link target holds NUL"));
                }
                Kind::Symlink(link.into())
            }
            Member::Directory => Kind::empty_directory(),
            Member::Fifo => Kind::Fifo,
            Member::Character | Member::Block => {
                let (major, minor) = header.device().map_err(|e| self.damaged(e))?;
                let device = device_number(major, minor).map_err(|problem| self.unfit(&path, problem))?;
                if member == Member::Character { Kind::Character(device) } else { Kind::Block(device) }
            }
            Member::Extended | Member::Global | Member::LongName | Member::LongLink => {
                unreachable!("members() keeps them")
            }
        };
        self.insert(&path, Node { meta, kind })
    }

    /// Reads to the end of a member that is left out.
    fn pass_over(&mut self, member: Member, header: &TarHeader<'_>, extensions: &Extensions) -> Result<(), BuildError> {
        if !matches!(member, Member::Regular | Member::Sparse) {
            return Ok(());
        }
        let stored = self.stored_size(header, extensions)?;
        if member == Member::Sparse {
            self.gnu_map(header)?;
        }
        let passed = io::copy(&mut self.stream.by_ref().take(stored), &mut io::sink()).map_err(|e| self.broken(e))?;
        if passed < stored {
            return Err(self.damaged("it is cut off"));
        }
        self.skip_padding(stored)
    }

    fn insert(&mut self, path: &[u8], node: Node) -> Result<(), BuildError> {
        let mut names = self.names(path)?;
        let Some(last) = names.pop() else {
            if !node.kind.is_directory() {
                return Err(self.damaged("a member other than a directory is called '.'"));
            }
            self.tree.node_mut(NodeId::ROOT).meta = node.meta;
            return Ok(());
        };
        let parent = self.parent(path, &names)?;
        self.tree.insert(parent, last, node).map_err(|problem| self.unfit(path, problem))?;
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), BuildError> {
        let mut node = Some(NodeId::ROOT);
        for name in self.names(target)? {
            node = node.and_then(|dir| self.tree.child(dir, name));
        }
        let unknown = format!("hard link {} to {}, which is not there", path.escape_ascii(), target.escape_ascii());
        let node = node.ok_or_else(|| self.damaged(unknown))?;
        match &self.tree.node(node).kind {
            Kind::Directory(_) => Err(self.damaged(format!("{} is a hard link to a directory", path.escape_ascii()))),
            _ => {
                let mut names = self.names(path)?;
                let Some(last) = names.pop() else { return Err(self.damaged("a hard link is called '.'")) };
                let parent = self.parent(path, &names)?;
                self.tree.link(parent, last, node).map_err(|problem| self.unfit(path, problem))
            }
        }
    }

    /// The components of a path.
    fn names<'p>(&self, path: &'p [u8]) -> Result<Vec<&'p [u8]>, BuildError> {
        if path.len() > MAX_PATH {
            return Err(self.damaged(format!("a path of {} bytes, {MAX_PATH} is the limit", path.len())));
        }
        let names = path.split(|b| *b == b'/').filter(|name| !matches!(*name, b"" | b"."));
        let names: Vec<&[u8]> = names.collect();
        if names.contains(&b"..".as_slice()) {
            return Err(self.damaged(format!("path {} has a '..' component", path.escape_ascii())));
        }
        Ok(names)
    }

    /// The directory `names`, with whatever is missing of it.
    fn parent(&mut self, path: &[u8], names: &[&[u8]]) -> Result<NodeId, BuildError> {
        let mut dir = NodeId::ROOT;
        for name in names {
            dir = match self.tree.child(dir, name) {
                Some(child) => child,
                None => {
                    let node = Node { meta: Meta::implied_directory(), kind: Kind::empty_directory() };
                    self.tree.insert(dir, name, node).map_err(|problem| self.unfit(path, problem))?
                }
            };
        }
        Ok(dir)
    }

    fn meta(&mut self, path: &[u8], header: &TarHeader<'_>, extensions: &Extensions) -> Result<Meta, BuildError> {
        let id = |what: &str, stated: Option<u64>, field: Result<u64, String>| {
            // The field holds rubbish where the number did not fit and a record replaces it.
            let id = stated.map_or(field, Ok).map_err(|e| self.damaged(e))?;
            u32::try_from(id).map_err(|_| self.damaged(format!("{what} {id} does not fit in 32 bits")))
        };
        let uid = id("uid", extensions.uid, header.uid())?;
        let gid = id("gid", extensions.gid, header.gid())?;
        let (mtime, mtime_nsec) = match extensions.mtime {
            Some(time) => time,
            None => (header.mtime().map_err(|e| self.damaged(e))?, 0),
        };
        let mode = header.mode().map_err(|e| self.damaged(e))?;
        let permissions = u16::try_from(mode & 0o7777).expect("12 bits");
        let mut meta = Meta { permissions, uid, gid, mtime, mtime_nsec, xattrs: Vec::new() };
        let mut collector = Collector::default();
        for (name, value) in extensions.xattrs.iter().filter(|(name, _)| self.selection.keeps_xattr(name)) {
            collector.add(name, value).map_err(|problem| self.unfit(path, problem))?;
        }
        self.skipped_xattrs += collector.skipped + extensions.lost_acls();
        collector.store(&mut meta).map_err(|problem| self.unfit(path, problem))?;
        self.selection.adjust(&mut meta);
        Ok(meta)
    }

    /// Sends the content of a regular file down the pipeline.
    fn content(
        &mut self,
        path: &[u8],
        member: Member,
        header: &TarHeader<'_>,
        extensions: &Extensions,
    ) -> Result<Content, BuildError> {
        let stored = self.stored_size(header, extensions)?;
        let (map, real_size) = if member == Member::Sparse {
            let (map, real_size) = self.gnu_map(header)?;
            (Some((map, stored)), real_size)
        } else if extensions.sparse.is_sparse {
            let sparse = &extensions.sparse;
            let missing = "a sparse file without its real size";
            let real_size = sparse.real_size.ok_or_else(|| self.damaged(missing))?;
            let mut left = stored;
            let map = if sparse.map_in_content { self.map_in_content(&mut left)? } else { sparse.map.clone() };
            (Some((map, left)), real_size)
        } else {
            (None, stored)
        };
        if let Some((map, stored)) = &map {
            sparse::check(map, real_size, *stored).map_err(|e| self.damaged(e))?;
        }
        let content = self.cut(path, real_size, map.as_ref().map(|(map, _)| map.as_slice()))?;
        self.skip_padding(stored)?;
        Ok(content)
    }

    fn cut(&mut self, path: &[u8], size: u64, map: Option<&[Segment]>) -> Result<Content, BuildError> {
        let stream = &mut self.stream;
        let cut = match map {
            None => self.cutter.cut(size, &mut PlainBody(stream)),
            Some(map) => self.cutter.cut(size, &mut SparseBody { stream, map, at: 0 }),
        };
        cut.map_err(|e| match e {
            CutError::Read(e) => self.broken(e),
            CutError::Limit(limit) => BuildError::Limit(limit),
            CutError::Stopped => BuildError::Changed { path: display(path) },
        })
    }

    /// Bytes of content that follow the header. A PAX size may say more than the field can hold,
    /// but not contradict it.
    fn stored_size(&self, header: &TarHeader<'_>, extensions: &Extensions) -> Result<u64, BuildError> {
        const LARGEST_FIELD: u64 = 0o777_7777_7777;
        match extensions.size {
            // The field holds whatever the writer liked where the size does not fit.
            Some(size) if size > LARGEST_FIELD => Ok(size),
            Some(size) => match header.size() {
                Ok(field) if field == size => Ok(size),
                _ => Err(self.damaged("header and extended header disagree about a size")),
            },
            None => header.size().map_err(|e| self.damaged(e)),
        }
    }

    /// The map of an old GNU sparse member, and the size of the file with its holes.
    fn gnu_map(&mut self, header: &TarHeader<'_>) -> Result<(Vec<Segment>, u64), BuildError> {
        let (entries, mut more, real_size) = header.sparse().map_err(|e| self.damaged(e))?;
        let mut map = Vec::new();
        sparse::gnu_entries(entries, &mut map).map_err(|e| self.damaged(e))?;
        let mut block = [0; BLOCK];
        while more {
            self.stream.read_exact(&mut block).map_err(|e| self.broken(e))?;
            sparse::gnu_entries(&block[..504], &mut map).map_err(|e| self.damaged(e))?;
            if map.len() > MAX_SEGMENTS {
                return Err(self.damaged("a sparse file with too many segments"));
            }
            more = block[504] != 0;
        }
        Ok((map, real_size))
    }

    fn map_in_content(&mut self, left: &mut u64) -> Result<Vec<Segment>, BuildError> {
        sparse::read_map(&mut self.stream, left).map_err(|e| match e {
            ReadMapError::Io(e) => self.broken(e),
            ReadMapError::Damaged => self.damaged("damaged sparse map"),
        })
    }

    fn damaged(&self, problem: impl Into<String>) -> BuildError {
        BuildError::Archive { archive: self.name.to_owned(), at: self.stream.at, problem: problem.into() }
    }

    fn broken(&self, e: io::Error) -> BuildError {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("it is cut off"),
            // What the gzip decoder says about bytes that are not gzip.
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData => self.damaged(e.to_string()),
            _ => BuildError::Read { path: self.name.to_owned(), source: e },
        }
    }

    fn unfit(&self, path: &[u8], problem: Unfit) -> BuildError {
        BuildError::Entry { path: display(path), problem }
    }
}

fn display(path: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(path)).to_owned()
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.truncate(len);
    bytes
}
