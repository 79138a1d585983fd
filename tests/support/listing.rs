//! A tree as text: one line per entry, sorted by path, with everything a mount must preserve.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One entry. `facts` is text made for comparing and for reading in a failure message.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Line {
    /// Path below the root, empty for the root itself.
    pub path: Vec<u8>,
    /// Type, mode, owner, size, device, links, time, xattrs, target, content.
    pub facts: String,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/{} {}", self.path.escape_ascii(), self.facts)
    }
}

/// The listing of everything below `root`, the root included. Sizes and link counts of
/// directories are left out, since every filesystem has its own idea of them.
pub fn of(root: &Path) -> io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(below) = todo.pop() {
        let path = if below.as_os_str().is_empty() { root.to_owned() } else { root.join(&below) };
        let meta = fs::symlink_metadata(&path)?;
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                todo.push(below.join(entry?.file_name()));
            }
        }
        lines.push(Line { facts: facts(&path, &meta)?, path: below.into_os_string().into_vec() });
    }
    lines.sort();
    Ok(lines)
}

/// The listing of an overlayfs mount, made comparable with a copy of what it shows.
///
/// The layers are one file system, so that a file has the same inode number wherever it is seen.
pub fn of_overlay(root: &Path) -> io::Result<Vec<Line>> {
    let mut names = std::collections::HashMap::new();
    let mut inodes = Vec::new();
    let mut lines = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(below) = todo.pop() {
        let path = if below.as_os_str().is_empty() { root.to_owned() } else { root.join(&below) };
        let meta = match fs::symlink_metadata(&path) {
            // In a directory that only one layer has, overlayfs lists whiteouts and then finds
            // nothing of their names.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if meta.is_dir() {
            for entry in fs::read_dir(&path)? {
                todo.push(below.join(entry?.file_name()));
            }
        }
        *names.entry(meta.ino()).or_insert(0) += 1;
        inodes.push((meta.ino(), format!(" links={}", meta.nlink())));
        lines.push(Line { facts: facts(&path, &meta)?, path: below.into_os_string().into_vec() });
    }
    // Overlayfs tells the links that the file has in its layer, hidden ones included.
    for (line, (inode, links)) in lines.iter_mut().zip(inodes) {
        line.facts = line.facts.replacen(&links, &format!(" links={}", names[&inode]), 1);
    }
    lines.sort();
    Ok(lines)
}

/// Panics with the differing lines unless both listings are the same.
#[track_caller]
pub fn assert_same(want: &[Line], got: &[Line]) {
    let differences = diff(want, got);
    assert!(differences.is_empty(), "trees differ (- wanted, + got):\n{differences}");
}

/// The lines that are in only one of two sorted listings, at most 40 of them; empty if none.
pub fn diff(want: &[Line], got: &[Line]) -> String {
    let (mut out, mut shown) = (String::new(), 0);
    let (mut a, mut b) = (want.iter().peekable(), got.iter().peekable());
    loop {
        let (sign, line) = match (a.peek(), b.peek()) {
            (None, None) => return out,
            (Some(x), Some(y)) if x == y => {
                a.next();
                b.next();
                continue;
            }
            (Some(x), Some(y)) if x.path <= y.path => ('-', a.next().unwrap()),
            (Some(_), None) => ('-', a.next().unwrap()),
            (_, Some(_)) => ('+', b.next().unwrap()),
        };
        shown += 1;
        if shown > 40 {
            return out + "...\n";
        }
        writeln!(out, "{sign} {line}").unwrap();
    }
}

fn facts(path: &Path, meta: &Metadata) -> io::Result<String> {
    let kind = meta.file_type();
    let mut out =
        format!("{:06o} {}:{} {}.{:09}", meta.mode(), meta.uid(), meta.gid(), meta.mtime(), meta.mtime_nsec());
    if !kind.is_dir() {
        write!(out, " links={}", meta.nlink()).unwrap();
    }
    if kind.is_file() {
        write!(out, " size={} blake3={}", meta.len(), content(path)?).unwrap();
    }
    if kind.is_symlink() {
        write!(out, " -> {}", fs::read_link(path)?.as_os_str().as_bytes().escape_ascii()).unwrap();
    }
    if kind.is_char_device() || kind.is_block_device() {
        write!(out, " dev={}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())).unwrap();
    }
    for (name, value) in xattrs(path)? {
        write!(out, " {}={}", name.escape_ascii(), value.escape_ascii()).unwrap();
    }
    Ok(out)
}

/// All extended attributes of `path` itself, sorted by name.
pub fn xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut names[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(Vec::new()),
        other => other?,
    };
    let mut out = Vec::new();
    for name in names[..len].split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 1 << 16];
        let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])?;
        value.truncate(len);
        out.push((name.to_vec(), value));
    }
    out.sort();
    Ok(out)
}

fn content(path: &Path) -> io::Result<blake3::Hash> {
    let (mut hasher, mut buffer, mut file) = (blake3::Hasher::new(), vec![0; 1 << 18], File::open(path)?);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        };
    }
}
