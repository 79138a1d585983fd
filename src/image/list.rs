use std::ops::ControlFlow;

use super::{Image, ImageError, Inode, Kind, Layout, Nid};
use crate::base::BLOCK;
use crate::format::erofs::{Dirent, MAX_NAME};
use crate::format::{array_at, record_at};

/// One name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Raw bytes, 1 to 255, no slash, no NUL.
    pub name: &'a [u8],
    pub nid: Nid,
    /// Kind as the directory gives it (`file_type` numbers of EROFS).
    pub file_type: u8,
}

impl DirEntry<'_> {
    /// Whether this is `.` or `..`.
    pub fn is_dot(&self) -> bool {
        matches!(self.name, b"." | b"..")
    }
}

impl Image {
    /// Visits the entries of directory `dir` in disk order, `.` and `..` among them, until `visit`
    /// breaks off.
    pub fn list<'a>(
        &'a self,
        dir: &Inode,
        visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let wrong = |rule| ImageError::Directory { nid: dir.nid, rule };
        if dir.kind != Kind::Directory {
            return Err(wrong("is not a directory"));
        }
        let (start, tail) = match dir.layout {
            Layout::Plain { at } => (at, None),
            Layout::Inline { at, tail } => (at, Some(tail)),
            Layout::Chunks { .. } | Layout::None => return Err(wrong("has no data")),
        };
        let mut done = 0;
        while done < dir.size {
            let len = BLOCK.min(dir.size - done);
            let at = match tail {
                Some(tail) if len < BLOCK => tail,
                _ => start.checked_add(done).ok_or_else(|| wrong("has data at an impossible place"))?,
            };
            let block = array_at::<u8>(self.bytes(), at, len, "directory block")?;
            if list_block(block, visit).map_err(wrong)?.is_break() {
                return Ok(());
            }
            done += len;
        }
        Ok(())
    }
}

fn list_block<'a>(
    block: &'a [u8],
    visit: &mut dyn FnMut(DirEntry<'a>) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, &'static str> {
    let first: &Dirent = record_at(block, 0, "entry").map_err(|_| "has a block without entries")?;
    let names_at = first.nameoff.get();
    if names_at == 0 || usize::from(names_at) % size_of::<Dirent>() != 0 {
        return Err("has a block with an impossible number of entries");
    }
    let count = u64::from(names_at) / size_of::<Dirent>() as u64;
    let entries: &[Dirent] = array_at(block, 0, count, "entries").map_err(|_| "has a block with too many entries")?;
    for (index, entry) in entries.iter().enumerate() {
        let from = usize::from(entry.nameoff.get());
        let to = entries.get(index + 1).map_or(block.len(), |next| usize::from(next.nameoff.get()));
        let mut name = block.get(from..to).ok_or("has a name outside its block")?;
        if index + 1 == entries.len() {
            // The last name of a block is padded with zeros.
            name = &name[..name.iter().position(|&b| b == 0).unwrap_or(name.len())];
        }
        if name.is_empty() || name.len() > MAX_NAME || name.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err("has an impossible name");
        }
        let entry = DirEntry { name, nid: entry.nid.get(), file_type: entry.file_type };
        if visit(entry).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
