//! The mount table, and mounts that end with their owner.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::mount::{MntFlags, umount2};

/// One row of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) mountpoint: PathBuf,
    pub(crate) kind: String,
    /// As given to the mount call: a device, a file, or any word.
    pub(crate) source: OsString,
}

/// Mounts at or below `dir`, oldest first.
pub(crate) fn below(dir: &Path) -> io::Result<Vec<Row>> {
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table.split(|b| *b == b'\n').filter_map(row).filter(|row| row.mountpoint.starts_with(dir)).collect())
}

/// Unmounts everything at or below `dir`, youngest first, and returns what was there. A file system
/// that is in use leaves the tree now and disappears with its last user.
pub(crate) fn detach_below(dir: &Path) -> io::Result<Vec<Row>> {
    let rows = below(dir)?;
    for row in rows.iter().rev() {
        umount2(&row.mountpoint, MntFlags::MNT_DETACH)?;
    }
    Ok(rows)
}

/// A mount that is detached when this is dropped.
#[derive(Debug)]
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

/// Fields are separated by blanks; a variable number of optional ones ends with a lone dash (proc(5)).
fn row(line: &[u8]) -> Option<Row> {
    let mut fields = line.split(|b| *b == b' ');
    let mountpoint = PathBuf::from(unescape(fields.nth(4)?));
    fields.by_ref().find(|field| *field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Row { mountpoint, kind, source: unescape(fields.next()?) })
}

/// Blank, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

impl Row {
    /// Whether this is the mount of `source` at `mountpoint`.
    pub(crate) fn is(&self, mountpoint: &Path, kind: &str, source: &Path) -> bool {
        self.mountpoint == mountpoint && self.kind == kind && self.source.as_bytes() == source.as_os_str().as_bytes()
    }
}
