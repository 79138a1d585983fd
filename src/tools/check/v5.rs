//! What can be wrong with a RAFS v5 bootstrap and is not seen any more when it is lifted: above all the
//! digest of every inode, which goes up the tree to the root (`rafs-v5.md` section 8).
//!
//! Inodes are looked at by number and not from the root down, so that one that is damaged hides no other.
//! The work is bounded by the length of the bootstrap, against which every inode counts.

use std::ops::Range;

use crate::base::Digest;
use crate::blob::digest_of;
use crate::build::is_showable_xattr;
use crate::format::rafs5::ROOT;
use crate::image::Kind;
use crate::image::check::{Code, Report};
use crate::image::v5::{Bootstrap, BootstrapError, Inode, Number};

/// Looks at everything in `image`.
pub fn check(image: &Bootstrap<'_>) -> Report {
    let paths = image.paths() as usize + 1;
    let mut check = Check {
        image,
        report: Report::default(),
        directory_of: vec![0; paths],
        names: vec![0; paths],
        links: vec![0; paths],
        used: vec![false; image.blobs().len()],
    };
    check.directory_of[ROOT as usize] = ROOT;
    let mut room = image.bytes().len() as u64;
    for number in 1..=image.paths() {
        match image.inode(number) {
            Ok(inode) => {
                let Some(left) = room.checked_sub(inode.len) else {
                    check.report.add(Code::Tree, place(number), || "lies over others before it".into());
                    break;
                };
                room = left;
                check.inode(&inode);
            }
            Err(cause) => check.add(Code::Inode, number, &cause),
        }
    }
    check.whole();
    check.report
}

struct Check<'a, 'b> {
    image: &'a Bootstrap<'b>,
    report: Report,
    /// Which directory has each path as its child; 0 if none does.
    directory_of: Vec<Number>,
    /// Names of each inode, by the number of its first path.
    names: Vec<u32>,
    /// What each inode that is no directory says about that, by the same number; 0 where none was met.
    links: Vec<u32>,
    /// Whether a file uses each blob.
    used: Vec<bool>,
}

fn place(number: Number) -> String {
    format!("inode {number}")
}

impl Check<'_, '_> {
    fn add(&mut self, code: Code, number: Number, cause: &BootstrapError) {
        self.report.add(code, place(number), || cause.to_string());
    }

    fn inode(&mut self, inode: &Inode<'_>) {
        let number = inode.number;
        self.report.inodes += u64::from(inode.ino == number);
        self.names[inode.ino as usize] += 1;
        if inode.kind != Kind::Directory && inode.ino == number {
            self.links[number as usize] = inode.nlink;
        }
        match inode.kind {
            Kind::Directory => self.directory(inode),
            Kind::Regular => self.file(inode),
            _ => self.digest(inode, if inode.kind == Kind::Symlink { inode.target } else { b"" }),
        }
        let mut names: Vec<&[u8]> = Vec::new();
        for pair in inode.xattrs() {
            match pair {
                Ok((name, _)) => names.push(name),
                Err(cause) => self.add(Code::Xattr, number, &cause),
            }
        }
        for name in names.iter().filter(|name| !is_showable_xattr(name)) {
            self.report.add(Code::XattrNamespace, place(number), || {
                format!("xattr {} cannot be shown by the kernel, and is left out", name.escape_ascii())
            });
        }
        names.sort_unstable();
        for pair in names.windows(2).filter(|pair| pair[0] == pair[1]) {
            self.report.add(Code::XattrTwice, place(number), || format!("xattr {}", pair[0].escape_ascii()));
        }
    }

    fn directory(&mut self, inode: &Inode<'_>) {
        let number = inode.number;
        // Children of two directories would be looked at again and again.
        if !self.claim(number, inode.children.clone()) {
            return;
        }
        let (mut digests, mut subdirectories, mut whole) = (Vec::new(), 0u64, true);
        for child in self.image.children(inode) {
            match child {
                Ok(child) => {
                    digests.extend_from_slice(&child.digest);
                    subdirectories += u64::from(child.kind == Kind::Directory);
                    if child.parent != u64::from(number) {
                        let parent = child.parent;
                        self.report.add(Code::InodeParent, place(child.number), || {
                            format!("says that it lies in directory {parent}, and lies in {number}")
                        });
                    }
                }
                Err(cause) => {
                    whole = false;
                    // Others are told of where they are met by their number.
                    if let BootstrapError::Order { .. } = cause {
                        self.add(Code::NameOrder, number, &cause);
                    }
                }
            }
        }
        if whole {
            self.digest(inode, &digests);
            let (links, found) = (u64::from(inode.nlink), subdirectories + 2);
            if links != found {
                self.report.add(Code::LinkCount, place(number), || format!("{links} links, and {found} are there"));
            }
        }
    }

    /// Notes that the paths `children` lie in directory `number`; `false` if some lie in another one.
    fn claim(&mut self, number: Number, children: Range<Number>) -> bool {
        for child in children {
            let before = std::mem::replace(&mut self.directory_of[child as usize], number);
            if before != 0 {
                self.report.add(Code::Tree, place(child), || {
                    format!("lies in directory {number}, and in directory {before} as well")
                });
                return false;
            }
        }
        true
    }

    fn file(&mut self, inode: &Inode<'_>) {
        let digests: Vec<u8> = inode.chunks.iter().flat_map(|record| record.digest).collect();
        self.digest(inode, &digests);
        for position in 0u32.. {
            match self.image.chunk(inode, position) {
                None => break,
                Some(Ok(chunk)) => self.used[chunk.blob] = true,
                Some(Err(cause)) => self.add(Code::ChunkRecord, inode.number, &cause),
            }
        }
        // Further names of a file have its chunks once more.
        if inode.ino == inode.number {
            self.report.chunks += inode.chunks.len() as u64;
        }
    }

    /// Compares the digest of an inode with that of its content.
    fn digest(&mut self, inode: &Inode<'_>, content: &[u8]) {
        let Digest(got) = digest_of(self.image.summary().digest, content);
        if got != inode.digest {
            let (got, says) = (Digest(got), Digest(inode.digest));
            self.report.add(Code::InodeDigest, place(inode.number), || {
                format!("its content has the digest {got}, and it says {says}")
            });
        }
    }

    /// What can only be told when all inodes were met.
    fn whole(&mut self) {
        let image = self.image;
        self.report.paths = self.directory_of.iter().filter(|directory| **directory != 0).count() as u64;
        let lost = u64::from(image.paths()) - self.report.paths;
        if lost > 0 {
            let detail = || format!("no directory leads to {lost} of its {} inodes", image.paths());
            self.report.add(Code::UnusedInodes, "inode table", detail);
        }
        let links = (0..).zip(self.links.iter().zip(&self.names));
        for (number, (links, names)) in links.filter(|(_, (links, names))| **links != 0 && links != names) {
            self.report.add(Code::LinkCount, place(number), || format!("{links} links, and {names} names"));
        }
        for (index, _) in self.used.iter().enumerate().filter(|(_, used)| !**used) {
            self.report.add(Code::UnusedBlob, format!("blob {index}"), || "no file uses it".into());
        }
        for number in image.prefetch().filter(|number| *number > image.paths()) {
            self.report.add(Code::Prefetch, "prefetch table", || format!("inode {number} is none of the image"));
        }
    }
}
