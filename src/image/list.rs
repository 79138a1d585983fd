use std::ops::ControlFlow;

use super::{Image, ImageError, Inode, Kind, Layout, Nid};
use crate::format::erofs::{Dirent, MAX_NAME};
use crate::format::{array_at, record_at};

/// A place in a directory counts entries in this many of its bits, and blocks in those above: a block
/// has at most 341 entries.
const PLACE_BITS: u32 = 16;

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
        self.list_from(dir, 0, &mut |entry, _| visit(entry))
    }

    /// As [`Image::list`], from `place` on, which is 0 or was told with an entry: for whoever goes on where
    /// a visit broke off. With each entry comes the place behind it.
    ///
    /// A place that was never told leads to the next entry behind it, or to the end.
    pub fn list_from<'a>(
        &'a self,
        dir: &Inode,
        place: u64,
        visit: &mut dyn FnMut(DirEntry<'a>, u64) -> ControlFlow<()>,
    ) -> Result<(), ImageError> {
        let blocks = DirBlocks::new(self, dir)?;
        let mut first = usize::try_from(place & ((1 << PLACE_BITS) - 1)).expect("16 bits");
        for number in place >> PLACE_BITS..blocks.count() {
            let block = blocks.get(number)?;
            for index in first..block.count() {
                let behind = number << PLACE_BITS | (index as u64 + 1);
                if visit(block.entry(index)?, behind).is_break() {
                    return Ok(());
                }
            }
            first = 0;
        }
        Ok(())
    }

    /// What is called `name` in directory `dir`, searched for as [`Image::lookup`] does.
    ///
    /// # Errors
    /// If the directory or the inode makes no sense.
    pub fn child(&self, dir: &Inode, name: &[u8]) -> Result<Option<Inode>, ImageError> {
        let found = DirBlocks::new(self, dir)?.find(name)?;
        found.map(|entry| self.inode(entry.nid)).transpose()
    }

    /// The inode at `path`, which is taken from the root and may begin with a slash or not. Empty
    /// names and `.` are passed over, `..` leads nowhere, and links are not followed.
    ///
    /// Searches as the kernel does, by halving: first for the block, then in the block
    /// (`rafs-v6.md` section 9). In a directory whose names are out of order, names that
    /// [`Image::list`] shows may therefore not be found, here as in a mount.
    ///
    /// # Errors
    /// If a directory or an inode on the way makes no sense.
    pub fn lookup(&self, path: &[u8]) -> Result<Option<Inode>, ImageError> {
        let mut inode = self.inode(self.summary.root)?;
        for name in path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b".")) {
            if inode.kind != Kind::Directory || name == b".." {
                return Ok(None);
            }
            match self.child(&inode, name)? {
                Some(child) => inode = child,
                None => return Ok(None),
            }
        }
        Ok(Some(inode))
    }
}

/// The data of a directory, block by block.
pub(super) struct DirBlocks<'a> {
    image: &'a Image,
    nid: Nid,
    size: u64,
    start: u64,
    /// Where a last block of less than full length lies, if not behind the others.
    tail: Option<u64>,
}

impl<'a> DirBlocks<'a> {
    pub(super) fn new(image: &'a Image, dir: &Inode) -> Result<Self, ImageError> {
        let wrong = |rule| ImageError::Directory { nid: dir.nid, rule };
        if dir.kind != Kind::Directory {
            return Err(wrong("is not a directory"));
        }
        let (start, tail) = match dir.layout {
            Layout::Plain { at } => (at, None),
            Layout::Inline { at, tail } => (at, Some(tail)),
            Layout::Chunks { .. } | Layout::None => return Err(wrong("has no data")),
        };
        Ok(Self { image, nid: dir.nid, size: dir.size, start, tail })
    }

    pub(super) fn count(&self) -> u64 {
        self.size.div_ceil(self.image.summary.block_size)
    }

    /// Block `number`, which must be below [`DirBlocks::count`].
    pub(super) fn get(&self, number: u64) -> Result<DirBlock<'a>, ImageError> {
        let wrong = |rule| ImageError::Directory { nid: self.nid, rule };
        let block_size = self.image.summary.block_size;
        let done = number * block_size;
        let len = block_size.min(self.size - done);
        let at = match self.tail {
            Some(tail) if len < block_size => tail,
            _ => self.start.checked_add(done).ok_or_else(|| wrong("has data at an impossible place"))?,
        };
        let bytes = array_at::<u8>(self.image.bytes(), at, len, "directory block")?;
        let first: &Dirent = record_at(bytes, 0, "entry").map_err(|_| wrong("has a block without entries"))?;
        let names_at = first.nameoff.get();
        if names_at == 0 || usize::from(names_at) % size_of::<Dirent>() != 0 {
            return Err(wrong("has a block with an impossible number of entries"));
        }
        let count = u64::from(names_at) / size_of::<Dirent>() as u64;
        let entries = array_at(bytes, 0, count, "entries").map_err(|_| wrong("has a block with too many entries"))?;
        Ok(DirBlock { nid: self.nid, bytes, entries })
    }

    fn find(&self, name: &[u8]) -> Result<Option<DirEntry<'a>>, ImageError> {
        // The last block whose first name is not behind `name`, then the same among its entries.
        let before = last_at_most(self.count(), name, |number| self.get(number)?.entry(0))?;
        let Some(number) = before else { return Ok(None) };
        let block = self.get(number)?;
        let index = |number: u64| usize::try_from(number).expect("a block is small");
        let found = last_at_most(block.count() as u64, name, |number| block.entry(index(number)))?;
        let entry = found.map(|number| block.entry(index(number))).transpose()?;
        Ok(entry.filter(|entry| entry.name == name))
    }
}

/// The last of `count` sorted entries whose name is `name` or before it.
fn last_at_most<'a>(
    count: u64,
    name: &[u8],
    entry: impl Fn(u64) -> Result<DirEntry<'a>, ImageError>,
) -> Result<Option<u64>, ImageError> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        if entry(middle)?.name <= name {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(low.checked_sub(1))
}

/// One block of a directory: at least one entry.
pub(super) struct DirBlock<'a> {
    nid: Nid,
    bytes: &'a [u8],
    entries: &'a [Dirent],
}

impl<'a> DirBlock<'a> {
    #[cfg(test)]
    pub(super) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(super) fn count(&self) -> usize {
        self.entries.len()
    }

    /// Entry `index`, which must be below [`DirBlock::count`].
    pub(super) fn entry(&self, index: usize) -> Result<DirEntry<'a>, ImageError> {
        let wrong = |rule| ImageError::Directory { nid: self.nid, rule };
        let entry = &self.entries[index];
        let next = self.entries.get(index + 1);
        let from = usize::from(entry.nameoff.get());
        let to = next.map_or(self.bytes.len(), |next| usize::from(next.nameoff.get()));
        let mut name = self.bytes.get(from..to).ok_or_else(|| wrong("has a name outside its block"))?;
        if next.is_none() {
            // The last name of a block is padded with zeros.
            name = &name[..name.iter().position(|&b| b == 0).unwrap_or(name.len())];
        }
        if name.is_empty() || name.len() > MAX_NAME || name.iter().any(|b| matches!(b, 0 | b'/')) {
            return Err(wrong("has an impossible name"));
        }
        Ok(DirEntry { name, nid: entry.nid.get(), file_type: entry.file_type })
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;

    #[test]
    fn every_listed_path_is_found_and_nothing_else() {
        let image = sample::image();
        let mut paths = 0;
        for entry in image.walk() {
            let entry = entry.unwrap();
            assert_eq!(image.lookup(&entry.path).unwrap(), Some(entry.inode), "{}", entry.path.escape_ascii());
            let mut longer = entry.path.clone();
            longer.push(b'!');
            assert_eq!(image.lookup(&longer).unwrap(), None, "{}", longer.escape_ascii());
            paths += 1;
        }
        assert_eq!(paths, image.summary().paths);
    }

    #[test]
    fn a_listing_goes_on_where_it_broke_off() {
        let image = sample::image();
        for visit in image.walk() {
            let dir = visit.unwrap().inode;
            if dir.kind != Kind::Directory {
                continue;
            }
            let (mut whole, mut pieced) = (Vec::new(), Vec::new());
            image.list(&dir, &mut |entry| push(&mut whole, entry.name)).unwrap();
            let (mut place, mut more) = (0, true);
            while more {
                more = false;
                let from = place;
                let one = &mut |entry: DirEntry<'_>, behind| {
                    (place, more) = (behind, true);
                    let _ = push(&mut pieced, entry.name);
                    ControlFlow::Break(())
                };
                image.list_from(&dir, from, one).unwrap();
            }
            assert_eq!(pieced, whole);
            for nowhere in [u64::MAX, 1 << 40, place | 0xffff] {
                image.list_from(&dir, nowhere, &mut |_, _| panic!("nothing is there")).unwrap();
            }
        }
    }

    fn push(names: &mut Vec<Vec<u8>>, name: &[u8]) -> ControlFlow<()> {
        names.push(name.to_vec());
        ControlFlow::Continue(())
    }

    #[test]
    fn paths_are_taken_from_the_root_and_never_lead_up() {
        let image = sample::image();
        let root = image.inode(image.summary().root).unwrap();
        let find = |path: &str| image.lookup(path.as_bytes()).unwrap();

        assert_eq!(find("/"), Some(root));
        assert_eq!(find("//dir/.//"), find("dir"));
        assert!(find("dir").is_some());
        assert_eq!(find("dir/.."), None);
        assert_eq!(find("file/below"), None, "a file has nothing below it");
    }
}
