//! The durable copy of presence bits as it lies on disk.
//!
//! One head and then pages of bits, each one sector long, so that a disk writes it whole or not at
//! all, and each with its own checksum, in case it does not. The head binds the bits to one unit
//! layout and to one data file; the pages' checksums start from the head's, so pages of an earlier
//! file mean nothing under a new head. Whatever is torn, damaged or foreign reads as absent.

use std::io;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::presence::words_for;
use super::sink::Sink;
use crate::base::Digest;
use crate::blob::UnitIndex;

/// Bytes per record: the smallest sector of any disk.
const PAGE: u64 = 512;

/// Words of bits in one page.
const WORDS: usize = 60;

const MAGIC: [u8; 8] = *b"rafsdpr1";

/// What a set of bits is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    /// Fingerprint of the unit map with all checks left out: merging checks of another image
    /// changes nothing about the bits.
    pub(super) layout: Digest,
    /// Number of units.
    pub(super) units: UnitIndex,
    /// Inode number of the data file.
    pub(super) inode: u64,
    /// When that inode was created, in nanoseconds since 1970; tells apart files that got the same
    /// number. 0 where the file system does not say.
    pub(super) born: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    layout: [u8; 32],
    units: U32,
    reserved: U32,
    inode: U64,
    born: U64,
    unused: [u8; 416],
    sum: [u8; 32],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Page {
    sum: [u8; 32],
    words: [U64; WORDS],
}

const _: () = assert!(size_of::<Head>() as u64 == PAGE);
const _: () = assert!(size_of::<Page>() as u64 == PAGE);

impl From<&Identity> for Head {
    fn from(identity: &Identity) -> Self {
        let mut head = Self {
            magic: MAGIC,
            layout: identity.layout.0,
            units: identity.units.into(),
            reserved: 0.into(),
            inode: identity.inode.into(),
            born: identity.born.into(),
            unused: [0; 416],
            sum: [0; 32],
        };
        head.sum = *blake3::hash(&head.as_bytes()[..480]).as_bytes();
        head
    }
}

impl Page {
    fn new(head: &Head, number: usize, words: &[u64]) -> Self {
        let mut page = Self { sum: [0; 32], words: [0.into(); WORDS] };
        for (slot, &word) in page.words.iter_mut().zip(words) {
            *slot = word.into();
        }
        page.sum = page.checksum(head, number);
        page
    }

    fn checksum(&self, head: &Head, number: usize) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&head.sum).update(&(number as u64).to_le_bytes()).update(self.words.as_bytes());
        *hasher.finalize().as_bytes()
    }
}

/// A file in which everything is absent.
pub(super) fn empty(identity: &Identity) -> Vec<u8> {
    Head::from(identity).as_bytes().to_vec()
}

/// The bits that `file` proves, for `identity`; all absent if it is about something else.
pub(super) fn read(file: &[u8], identity: &Identity) -> Vec<u64> {
    let mut words = vec![0; words_for(identity.units)];
    let want = Head::from(identity);
    let Some((head, mut rest)) = file.split_at_checked(size_of::<Head>()) else { return words };
    if head != want.as_bytes() {
        return words;
    }
    for (number, slots) in words.chunks_mut(WORDS).enumerate() {
        let Ok((page, tail)) = Page::ref_from_prefix(rest) else { break };
        if page.sum == page.checksum(&want, number) {
            for (slot, word) in slots.iter_mut().zip(&page.words) {
                *slot = word.get();
            }
        }
        rest = tail;
    }
    // A unit that does not exist is never present, whatever the last word says.
    if let (Some(last), used @ 1..) = (words.last_mut(), identity.units % 64) {
        *last &= (1 << used) - 1;
    }
    words
}

/// Writes the pages in which `after` differs from `before`, then syncs.
pub(super) fn write_changed(file: &dyn Sink, identity: &Identity, before: &[u64], after: &[u64]) -> io::Result<()> {
    let head = Head::from(identity);
    let mut changed = false;
    for (number, (old, new)) in before.chunks(WORDS).zip(after.chunks(WORDS)).enumerate() {
        if old != new {
            let page = Page::new(&head, number, new);
            file.write_at(page.as_bytes(), (number as u64 + 1) * PAGE)?;
            changed = true;
        }
    }
    if changed { file.sync() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    struct Memory(Mutex<Vec<u8>>);

    impl Sink for Memory {
        fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            let mut file = self.0.lock().unwrap();
            let at = usize::try_from(at).unwrap();
            let len = file.len().max(at + bytes.len());
            file.resize(len, 0);
            file[at..at + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn identity() -> Identity {
        Identity { layout: Digest([7; 32]), units: 64 * 60 + 70, inode: 5, born: 6 }
    }

    /// A file of two pages with a few bits in each, and the bits.
    fn sample() -> (Vec<u8>, Vec<u64>) {
        let mut words = vec![0; words_for(identity().units)];
        (words[0], words[59], words[60], words[61]) = (5, 1 << 63, 9, 0x3f);
        let file = Memory(Mutex::new(empty(&identity())));
        write_changed(&file, &identity(), &vec![0; words.len()], &words).unwrap();
        (file.0.into_inner().unwrap(), words)
    }

    #[test]
    fn bits_survive_a_round_trip() {
        let (file, words) = sample();
        assert_eq!(read(&file, &identity()), words);
        assert_eq!(read(&empty(&identity()), &identity()), vec![0; words.len()]);
    }

    #[test]
    fn a_damaged_page_is_absent_and_takes_no_other_with_it() {
        let (file, words) = sample();
        for at in 512..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            let mut want = words.clone();
            let page = (at - 512) / 512 * WORDS;
            let end = (page + WORDS).min(want.len());
            want[page..end].fill(0);
            assert_eq!(read(&bad, &identity()), want, "flip at {at}");
        }
        for len in 0..file.len() {
            let kept = if len < 1024 { 0 } else { WORDS };
            let mut want = words.clone();
            want[kept..].fill(0);
            assert_eq!(read(&file[..len], &identity()), want, "cut at {len}");
        }
    }

    #[test]
    fn bits_about_something_else_are_absent() {
        let (file, words) = sample();
        let absent = vec![0; words.len()];
        for other in [
            Identity { layout: Digest([8; 32]), ..identity() },
            Identity { inode: 6, ..identity() },
            Identity { born: 7, ..identity() },
            Identity { units: identity().units - 1, ..identity() },
        ] {
            assert_eq!(read(&file, &other), absent, "{other:?}");
        }
        let mut pages_under_new_head = empty(&Identity { inode: 6, ..identity() });
        pages_under_new_head.extend_from_slice(&file[512..]);
        assert_eq!(read(&pages_under_new_head, &Identity { inode: 6, ..identity() }), absent);
    }
}
