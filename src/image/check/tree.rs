//! Every inode and every directory (`rafs-v6.md` sections 7 to 11 and 14).

use std::collections::HashMap;
use std::ops::ControlFlow;

use super::super::list::DirBlocks;
use super::super::{Image, ImageError, Inode, Kind, Layout, Nid, Visit};
use super::chunks::Records;
use super::claims::Claims;
use super::{Code, Place, Report};
use crate::base::ByteRange;
use crate::format::array_at;
use crate::format::erofs::{ChunkIndex, INODE_SLOT, MAX_NAME, XattrHead, file_type};
use crate::format::rafs::flags;
use zerocopy::little_endian::U32;

/// What is known of an inode that has been seen.
struct Seen {
    /// Names found so far.
    names: u32,
    nlink: u32,
}

struct Search<'i, 'r> {
    image: &'i Image,
    records: &'r mut Records,
    report: &'r mut Report,
    seen: HashMap<Nid, Seen>,
    claims: Claims,
    /// Number of each directory on the way from the root to the entry visited.
    above: Vec<Nid>,
    has_xattrs: bool,
    /// Whether every name has been found; else counts of names mean nothing.
    complete: bool,
}

pub(super) fn check(image: &Image, records: &mut Records, report: &mut Report) {
    let claims = Claims::new(image);
    let mut search = Search {
        image,
        records,
        report,
        seen: HashMap::new(),
        claims,
        above: Vec::new(),
        has_xattrs: false,
        complete: true,
    };
    let mut walk = image.walk();
    loop {
        let error = match walk.next_visit() {
            None => break,
            Some(Ok(visit)) => {
                if search.visit(&visit).is_break() {
                    break;
                }
                continue;
            }
            Some(Err(error)) => error,
        };
        search.complete = false;
        search.report.paths += 1;
        let path = walk.path().join(&b'/');
        search.report.add(code_of(&error), format!("/{}", path.escape_ascii()), || error.to_string());
    }
    search.finish();
}

/// The code that stands for an error of the reader.
fn code_of(error: &ImageError) -> Code {
    match error {
        ImageError::Truncated(_) => Code::Truncated,
        ImageError::Nanoseconds { .. } => Code::Nanoseconds,
        ImageError::Directory { .. } => Code::Directory,
        ImageError::Tree(_) => Code::Tree,
        _ => Code::Inode,
    }
}

impl Search<'_, '_> {
    /// Breaks off when inodes take up more bytes than there are.
    fn visit(&mut self, visit: &Visit<'_, '_>) -> ControlFlow<()> {
        let inode = &visit.inode;
        let place = Place::Inode(inode.nid, visit.path);
        self.report.paths += 1;
        self.above.truncate(visit.path.len());
        let parent = self.above.last().copied();
        if inode.kind == Kind::Directory {
            self.above.push(inode.nid);
        }
        let seen = self.seen.entry(inode.nid).or_insert(Seen { names: 0, nlink: inode.nlink });
        seen.names += 1;
        if seen.names > 1 {
            return ControlFlow::Continue(());
        }
        self.report.inodes += 1;
        if !self.claim(inode) {
            self.complete = false;
            self.report.add(Code::Overlap, &place, || "inodes take up more bytes than the bootstrap has".into());
            return ControlFlow::Break(());
        }
        let root = visit.path.is_empty();
        self.report.expect(!root || inode.kind == Kind::Directory, Code::Root, &place, || "is no directory".into());
        self.tail(inode, &place);
        self.xattrs(inode, &place);
        match (inode.kind, inode.layout) {
            (Kind::Directory, _) => self.directory(inode, parent.unwrap_or(inode.nid), &place),
            (Kind::Symlink, _) => self.symlink(inode, &place),
            (Kind::Regular, Layout::Chunks { bits, .. }) => {
                self.records.check_file(self.image, inode, bits, &place, self.report);
            }
            (Kind::Regular, _) => self.report.add(Code::FlatFile, &place, || "its data is in the bootstrap".into()),
            (Kind::Character | Kind::Block | Kind::Fifo | Kind::Socket, _) => {
                self.report.expect(inode.size == 0, Code::SpecialSize, &place, || format!("size is {}", inode.size));
            }
        }
        ControlFlow::Continue(())
    }

    /// Notes the bytes of an inode: itself, its xattrs, what is behind it, and its blocks.
    fn claim(&mut self, inode: &Inode) -> bool {
        let summary = self.image.summary();
        let start = summary.meta_start + inode.nid * INODE_SLOT;
        let block = summary.block_size;
        let (behind, blocks) = match inode.layout {
            Layout::Chunks { indexes, .. } => {
                let count = inode.size.div_ceil(summary.chunk_size.into());
                (count.checked_mul(size_of::<ChunkIndex>() as u64).and_then(|len| indexes.checked_add(len)), None)
            }
            Layout::Inline { at, tail } => {
                let whole = inode.size / block * block;
                (tail.checked_add(inode.size - whole), ByteRange::at(at, whole))
            }
            Layout::Plain { at } => (Some(inode.xattrs.end()), ByteRange::at(at, inode.size)),
            Layout::None => (Some(inode.xattrs.end()), None),
        };
        let own = behind.and_then(|end| ByteRange::new(start, end));
        let both = [own, blocks];
        // What lies outside is found, and reported, by whoever reads it.
        let inside = both.map(|range| range.filter(|range| range.end() <= summary.bootstrap_len));
        inside.into_iter().all(|range| self.claims.inode(inode.nid, range))
    }

    fn tail(&mut self, inode: &Inode, place: &Place<'_>) {
        let Layout::Inline { tail, .. } = inode.layout else { return };
        let block = self.image.summary().block_size;
        let len = inode.size % block;
        self.report.expect(tail % block + len <= block, Code::TailCrossesBlock, place, || {
            format!("{len} bytes from byte {} of a block", tail % block)
        });
    }

    fn xattrs(&mut self, inode: &Inode, place: &Place<'_>) {
        if inode.xattrs.is_empty() {
            return;
        }
        self.has_xattrs = true;
        if inode.xattrs.len() <= size_of::<XattrHead>() as u64 {
            return self.report.add(Code::XattrEmpty, place, || "a head and no xattr".into());
        }
        let mut names: Vec<Vec<u8>> = Vec::new();
        let outcome = self.image.xattrs(inode, &mut |xattr| {
            names.push(xattr.name());
            ControlFlow::Continue(())
        });
        if let Err(cause) = outcome {
            self.report.add(Code::Xattr, place, || cause.to_string());
        }
        for name in names.iter().filter(|name| name.len() > MAX_NAME) {
            self.report.add(Code::Xattr, place, || format!("a name has {} bytes, more than 255", name.len()));
        }
        names.sort_unstable();
        for pair in names.windows(2) {
            self.report.expect(pair[0] != pair[1], Code::XattrTwice, place, || pair[0].escape_ascii().to_string());
        }
    }

    fn symlink(&mut self, inode: &Inode, place: &Place<'_>) {
        let summary = self.image.summary();
        let inline = matches!(inode.layout, Layout::Inline { .. });
        if summary.flags & flags::TARFS_MODE != 0 && inline && inode.size > summary.block_size {
            self.report.add(Code::TarfsSymlink, place, || {
                format!("a target of {} bytes, which the reference writer damages", inode.size)
            });
        } else if let Err(cause) = self.image.symlink(inode) {
            self.report.add(Code::Symlink, place, || cause.to_string());
        }
    }

    fn directory(&mut self, dir: &Inode, parent: Nid, place: &Place<'_>) {
        let mut dots = [0u32; 2];
        let (mut last, mut below): (Option<&[u8]>, u32) = (None, 0);
        let blocks = match DirBlocks::new(self.image, dir) {
            Ok(blocks) => blocks,
            Err(cause) => return self.report.add(Code::Directory, place, || cause.to_string()),
        };
        for number in 0..blocks.count() {
            let Ok(block) = blocks.get(number) else { return };
            for index in 0..block.count() {
                let Ok(entry) = block.entry(index) else { return };
                match last.map(|last| last.cmp(entry.name)) {
                    None | Some(std::cmp::Ordering::Less) => {}
                    Some(order) => {
                        let code = if order.is_eq() { Code::NameTwice } else { Code::NameOrder };
                        self.report.add(code, place, || {
                            format!("{} in block {number}, entry {index}", entry.name.escape_ascii())
                        });
                    }
                }
                last = Some(entry.name);
                if entry.is_dot() {
                    dots[entry.name.len() - 1] += 1;
                    let want = [dir.nid, parent][entry.name.len() - 1];
                    self.report.expect(entry.nid == want, Code::Dots, place, || {
                        format!("{} is inode {}, should be {want}", entry.name.escape_ascii(), entry.nid)
                    });
                }
                // An inode that makes no sense is reported when it is visited.
                let Ok(inode) = self.image.inode(entry.nid) else { continue };
                below += u32::from(inode.kind == Kind::Directory && !entry.is_dot());
                let want = type_number(inode.kind);
                self.report.expect(entry.file_type == want, Code::FileType, place, || {
                    format!("{} has type {}, its inode {want}", entry.name.escape_ascii(), entry.file_type)
                });
            }
        }
        self.report.expect(dots == [1, 1], Code::Dots, place, || {
            format!("{} entries for itself and {} for the directory above", dots[0], dots[1])
        });
        self.report.expect(dir.nlink == below.saturating_add(2), Code::LinkCount, place, || {
            format!("{} links, with {below} directories in it", dir.nlink)
        });
    }

    /// What can be said only when everything has been seen.
    fn finish(mut self) {
        let paths = self.image.summary().paths;
        let found = self.report.paths;
        self.report.expect(!self.complete || paths == found, Code::PathCount, "superblock", || {
            format!("{paths} paths, {found} found")
        });
        let flag = self.image.summary().flags & flags::HAS_XATTR != 0;
        self.report.expect(flag || !self.has_xattrs, Code::Flags, "extended superblock", || {
            "inodes have xattrs, and the image does not say so".into()
        });
        if self.complete {
            self.link_counts();
        }
        self.prefetch();
        self.claims.report(self.report);
    }

    fn link_counts(&mut self) {
        let wrong = |(nid, seen): (&Nid, &Seen)| (seen.names != seen.nlink).then_some((*nid, seen.names, seen.nlink));
        let mut wrong: Vec<_> = self.seen.iter().filter_map(wrong).collect();
        wrong.sort_unstable();
        for (nid, names, nlink) in wrong {
            // Those of directories count other things, and have been looked at.
            if self.image.inode(nid).is_ok_and(|inode| inode.kind != Kind::Directory) {
                self.report
                    .add(Code::LinkCount, Place::Row("inode", nid), || format!("{nlink} links, {names} names found"));
            }
        }
    }

    fn prefetch(&mut self) {
        let mut count = 0;
        for (number, nid) in (0..).zip(self.image.prefetch()) {
            let known = self.seen.contains_key(&nid);
            self.report.expect(known || !self.complete, Code::Prefetch, Place::Row("prefetch entry", number), || {
                format!("inode {nid} is not in the tree")
            });
            count = number + 1;
        }
        let (at, len) = self.image.prefetch_table;
        let table: &[U32] = array_at(self.image.bytes(), at, len, "prefetch table").expect("checked by parse()");
        let behind = (0u64..).zip(table).skip_while(|(number, _)| *number < count).filter(|(_, nid)| nid.get() != 0);
        let behind = behind.count();
        self.report.expect(behind == 0, Code::PrefetchEnd, "prefetch table", || {
            format!("{behind} entries behind its end mark")
        });
    }
}

fn type_number(kind: Kind) -> u8 {
    match kind {
        Kind::Regular => file_type::REGULAR,
        Kind::Directory => file_type::DIRECTORY,
        Kind::Character => file_type::CHARACTER,
        Kind::Block => file_type::BLOCK,
        Kind::Fifo => file_type::FIFO,
        Kind::Socket => file_type::SOCKET,
        Kind::Symlink => file_type::SYMLINK,
    }
}
