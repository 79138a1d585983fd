//! Read-only mappings of files that nobody else writes.

use std::fs::File;
use std::io;
use std::ops::Deref;

/// A whole file as bytes.
///
/// Only for files that this process owns and never shortens (a bootstrap in our own store):
/// reading past a new end would kill the process.
#[derive(Debug)]
pub struct ReadMap(Option<memmap2::Mmap>);

impl ReadMap {
    /// Maps `file` as long as it is now. An empty file gives no bytes.
    pub fn new(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self(None));
        }
        // SAFETY: the mapping is private to this value and read-only. Callers map only files in a
        // directory of mode 0700 that are complete and never written again, so the bytes cannot
        // change under the slice.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(Some(map)))
    }
}

impl Deref for ReadMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl AsRef<[u8]> for ReadMap {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
