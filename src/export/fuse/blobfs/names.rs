//! What the kernel was told of: a number for each file of the host that it knows, and where that file is.
//!
//! A number is never used for another file: one that is put into the place of another gets a number of its own.
//! It is in a memory file before the kernel hears of it, with how often the kernel has heard; whoever has that file
//! goes on with the same numbers. When the kernel has dropped all that it was told of a number, its place is free
//! for another: there are as many as the kernel keeps at a time.
//!
//! A process that dies between writing and telling leaves a count that is too high, so that a number stays longer
//! than it is needed, until the end of the mount. None ever goes too early.
//!
//! ```text
//! 0        magic, version
//! N * 312  place N: how often the kernel was told (0: free), number, parent, identity, name
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, memfd_create};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::export::fuse::wire::NodeId;
use crate::sys::beneath::Identity;
use crate::sys::faultpoint;

/// The first number that is given out; those before it mean the same for ever.
pub(super) const FIRST: NodeId = 1 << 32;

const MAGIC: u64 = u64::from_le_bytes(*b"rafsdnam");
const VERSION: u64 = 1;

/// Bytes of a place.
const PLACE: usize = size_of::<Record>();

/// Longest name.
const LONGEST: usize = 255;

/// Longest path that is put together, in bytes.
const LONGEST_PATH: usize = 1 << 16;

/// A place as it lies in the memory file, which only this host ever reads.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    told: u64,
    number: u64,
    parent: u64,
    device: u64,
    inode: u64,
    born: i64,
    born_nanos: u32,
    len: u16,
    name: [u8; 258],
}

const _: () = assert!(size_of::<Record>() == 312);

/// All that the kernel knows of one mount.
#[derive(Debug)]
pub(super) struct Names {
    file: File,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_number: HashMap<NodeId, Named>,
    /// The newest number of each name, by directory.
    by_name: HashMap<NodeId, HashMap<Arc<[u8]>, NodeId>>,
    free: Vec<u64>,
    /// Places so far, the head among them.
    places: u64,
    /// The last number that was given out.
    last: NodeId,
}

#[derive(Clone, Debug)]
struct Named {
    parent: NodeId,
    name: Arc<[u8]>,
    identity: Identity,
    told: u64,
    place: u64,
}

impl Names {
    /// Nothing is known.
    pub(super) fn create() -> io::Result<Self> {
        let file = File::from(memfd_create(c"rafsd-names", MemfdFlags::CLOEXEC)?);
        file.write_all_at([MAGIC, VERSION].as_bytes(), 0)?;
        Ok(Self { file, known: Mutex::new(Known { places: 1, last: FIRST, ..Known::default() }) })
    }

    /// What a process that has died had told.
    ///
    /// # Errors
    /// `InvalidData` if it is something else, or of a version that this program does not know.
    pub(super) fn take_over(file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        let mut head = [0u64; 2];
        file.read_exact_at(head.as_mut_bytes(), 0)?;
        if head != [MAGIC, VERSION] {
            let what = "the names that the last daemon told of are of another release";
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let places = file.metadata()?.len().div_ceil(PLACE as u64).max(1);
        let mut known = Known { places, last: FIRST, ..Known::default() };
        for place in 1..places {
            let record = read(&file, place)?;
            known.last = known.last.max(record.number);
            match record.named(place) {
                Some(named) if !known.by_number.contains_key(&record.number) => known.insert(record.number, named),
                _ => known.free.push(place),
            }
        }
        Ok(Self { file, known: Mutex::new(known) })
    }

    /// The memory file, for whoever keeps it.
    pub(super) fn held(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    /// The number of the file `identity` that is called `name` in the directory `parent`, which the kernel is about
    /// to be told.
    pub(super) fn tell(&self, parent: NodeId, name: &[u8], identity: Identity) -> io::Result<NodeId> {
        let mut known = self.known.lock().unwrap();
        let number = known.by_name.get(&parent).and_then(|names| names.get(name).copied());
        if let Some(number) = number
            && let Some(named) = known.by_number.get_mut(&number)
            && named.identity == identity
        {
            let told = named.told.saturating_add(1);
            write_count(&self.file, named.place, told)?;
            named.told = told;
            return Ok(number);
        }
        let (number, place) = (known.last + 1, known.free.last().copied().unwrap_or(known.places));
        let named = Named { parent, name: name.into(), identity, told: 1, place };
        write(&self.file, number, &named)?;
        faultpoint::reach("named");
        known.last = number;
        if known.free.pop().is_none() {
            known.places += 1;
        }
        known.insert(number, named);
        Ok(number)
    }

    /// Names with slashes between that lead to `number` from the first known directory, and the identity of what is
    /// to be found there. That directory is the first of the pair, `base(number)` its path.
    ///
    /// `None` if the kernel was never told of it.
    pub(super) fn path(&self, number: NodeId, base: impl Fn(NodeId) -> Option<Vec<u8>>) -> Option<(Vec<u8>, Identity)> {
        let known = self.known.lock().unwrap();
        let found = known.by_number.get(&number)?;
        let (mut at, mut names, mut len) = (found, vec![&*found.name], found.name.len());
        let mut path = loop {
            if let Some(base) = base(at.parent) {
                break base;
            }
            at = known.by_number.get(&at.parent)?;
            names.push(&at.name);
            len += 1 + at.name.len();
            if len > LONGEST_PATH {
                return None;
            }
        };
        for name in names.iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
        }
        Some((path, found.identity))
    }

    /// The kernel has dropped a number that it was told of so many times. Tells whether it knows it no more.
    pub(super) fn forget(&self, number: NodeId, told: u64) -> bool {
        let mut known = self.known.lock().unwrap();
        let Some(named) = known.by_number.get_mut(&number) else { return false };
        let left = named.told.saturating_sub(told);
        // What cannot be written down stays known to a successor, which does no harm.
        if let Err(error) = write_count(&self.file, named.place, left) {
            tracing::warn!(%error, "what the kernel has forgotten cannot be forgotten here");
            return false;
        }
        named.told = left;
        if left == 0 {
            known.remove(number);
        }
        left == 0
    }

    /// Numbers that are known.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.lock().unwrap().by_number.len()
    }
}

impl Known {
    fn insert(&mut self, number: NodeId, named: Named) {
        // Of two the later one is what is there.
        let newest = self.by_name.entry(named.parent).or_default().entry(named.name.clone()).or_insert(number);
        *newest = (*newest).max(number);
        self.by_number.insert(number, named);
    }

    fn remove(&mut self, number: NodeId) {
        let Some(named) = self.by_number.remove(&number) else { return };
        self.free.push(named.place);
        let Some(names) = self.by_name.get_mut(&named.parent) else { return };
        if names.get(&named.name) == Some(&number) {
            names.remove(&named.name);
        }
        if names.is_empty() {
            self.by_name.remove(&named.parent);
        }
    }
}

impl Record {
    /// What it says, if it is in use and makes sense.
    fn named(&self, place: u64) -> Option<Named> {
        let name = self.name.get(..usize::from(self.len)).filter(|name| (1..=LONGEST).contains(&name.len()))?;
        let is_name = !name.contains(&b'/') && !name.contains(&0) && !matches!(name, b"." | b"..");
        let is_used = self.told > 0 && self.number > FIRST && self.parent != self.number;
        (is_name && is_used).then(|| Named {
            parent: self.parent,
            name: name.into(),
            identity: Identity { device: self.device, inode: self.inode, born: (self.born, self.born_nanos) },
            told: self.told,
            place,
        })
    }
}

fn read(file: &File, place: u64) -> io::Result<Record> {
    let mut record = Record::new_zeroed();
    let mut done = 0;
    // The last place may have been begun only.
    while done < PLACE {
        match file.read_at(&mut record.as_mut_bytes()[done..], place * PLACE as u64 + done as u64)? {
            0 => break,
            more => done += more,
        }
    }
    Ok(record)
}

/// Writes a place that is free so far. That it is in use is said last, by one word: who dies before that has written
/// nothing.
fn write(file: &File, number: NodeId, named: &Named) -> io::Result<()> {
    let mut name = [0; 258];
    let room = name.get_mut(..named.name.len()).filter(|room| room.len() <= LONGEST);
    room.ok_or(io::ErrorKind::InvalidFilename)?.copy_from_slice(&named.name);
    let record = Record {
        told: 0,
        number,
        parent: named.parent,
        device: named.identity.device,
        inode: named.identity.inode,
        born: named.identity.born.0,
        born_nanos: named.identity.born.1,
        len: u16::try_from(named.name.len()).expect("at most 255"),
        name,
    };
    let at = named.place * PLACE as u64;
    file.write_all_at(record.as_bytes(), at)?;
    write_count(file, named.place, named.told)
}

fn write_count(file: &File, place: u64, told: u64) -> io::Result<()> {
    file.write_all_at(told.as_bytes(), place * PLACE as u64)
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record").field("number", &self.number).field("told", &self.told).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: NodeId = 1;

    fn identity(inode: u64) -> Identity {
        Identity { device: 1, inode, born: (5, 6) }
    }

    fn base(number: NodeId) -> Option<Vec<u8>> {
        (number == ROOT).then(Vec::new)
    }

    fn path(names: &Names, number: NodeId) -> Option<(Vec<u8>, u64)> {
        names.path(number, base).map(|(path, identity)| (path, identity.inode))
    }

    #[test]
    fn a_file_keeps_its_number_and_another_in_its_place_gets_one_of_its_own() {
        let names = Names::create().unwrap();
        let dir = names.tell(ROOT, b"dir", identity(10)).unwrap();
        let file = names.tell(dir, b"file", identity(11)).unwrap();
        assert_eq!(names.tell(dir, b"file", identity(11)).unwrap(), file);
        let other = names.tell(dir, b"file", identity(12)).unwrap();

        assert_ne!(other, file);
        assert_eq!(path(&names, file), Some((b"dir/file".to_vec(), 11)));
        assert_eq!(path(&names, other), Some((b"dir/file".to_vec(), 12)));
        assert_eq!(names.tell(dir, b"file", identity(12)).unwrap(), other);
        assert_eq!(path(&names, 4711), None);
    }

    #[test]
    fn what_the_kernel_has_dropped_as_often_as_it_was_told_is_forgotten_and_its_place_used_again() {
        let names = Names::create().unwrap();
        for round in 0..1000 {
            let number = names.tell(ROOT, format!("name-{round}").as_bytes(), identity(round)).unwrap();
            assert_eq!(names.tell(ROOT, format!("name-{round}").as_bytes(), identity(round)).unwrap(), number);
            assert!(!names.forget(number, 1));
            assert_eq!(names.len(), 1);
            assert!(names.forget(number, 1) && !names.forget(number, 1));
        }
        assert_eq!(names.len(), 0);
        assert!(names.file.metadata().unwrap().len() <= 2 * PLACE as u64, "places are used again");
    }

    #[test]
    fn a_successor_knows_the_same_numbers_and_counts_on() {
        let names = Names::create().unwrap();
        let dir = names.tell(ROOT, b"dir", identity(10)).unwrap();
        let gone = names.tell(dir, b"gone", identity(13)).unwrap();
        let file = names.tell(dir, &[b'n'; 255], identity(11)).unwrap();
        let newer = names.tell(dir, &[b'n'; 255], identity(12)).unwrap();
        names.tell(dir, &[b'n'; 255], identity(12)).unwrap();
        names.forget(gone, 1);

        let next = Names::take_over(names.held().unwrap()).unwrap();

        assert_eq!(path(&next, file), path(&names, file));
        assert_eq!(next.tell(dir, &[b'n'; 255], identity(12)).unwrap(), newer);
        assert!(!next.forget(newer, 2) && next.forget(newer, 1) && next.forget(file, 1));
        let fresh = next.tell(ROOT, b"fresh", identity(14)).unwrap();
        assert!(fresh > newer, "no number is used again");
        assert_eq!(next.len(), 2);
    }

    #[test]
    fn what_was_begun_or_damaged_is_nothing() {
        let names = Names::create().unwrap();
        let number = names.tell(ROOT, b"file", identity(10)).unwrap();
        let whole = read(&names.file, 1).unwrap();
        let damaged = [
            Record { told: 0, ..whole },
            Record { len: 0, ..whole },
            Record { len: 300, ..whole },
            Record { number: 7, ..whole },
            // The same number twice.
            whole,
        ];
        for (record, place) in damaged.iter().zip(2..) {
            names.file.write_all_at(record.as_bytes(), place * PLACE as u64).unwrap();
        }
        names.file.write_all_at(&[1; 20], 7 * PLACE as u64).unwrap();

        let next = Names::take_over(names.held().unwrap()).unwrap();

        assert_eq!((next.len(), path(&next, number)), (1, Some((b"file".to_vec(), 10))));
        let other = File::from(memfd_create(c"other", MemfdFlags::CLOEXEC).unwrap());
        other.write_all_at(&[7; 4096], 0).unwrap();
        assert_eq!(Names::take_over(other.into()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
