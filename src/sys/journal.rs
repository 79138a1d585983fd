//! Shared memory that outlives the daemon: the events it had taken and not answered.
//!
//! A fanotify event that was read is known to the kernel only by the *number* its descriptor had
//! in the reading process. When that process is killed, whoever wants to answer in its place must
//! know the number, the file and the range. They are here, in a memory file that the keepers hold:
//!
//! ```text
//! 0        header: magic, version, number of slots, generation, numbers used so far
//! 4096     landing: the kernel writes the records of a read right here
//! 69632    slots: one for each descriptor number: device, inode, offset, count
//! ```
//!
//! No event can be lost between kernel and journal. The kernel copies an event's record before it
//! puts the event on the list of those that wait for an answer (`fanotify_read` of Linux 6.18), so
//! an event that waits is in the landing, whatever instruction the reader was killed at. From
//! there it moves to its slot, which also tells the file, and only then is the landing cleared. A
//! slot is cleared after the answer and before the number is free for another event.
//!
//! A record that stands here and waits no more does no harm: answering it gives `ENOENT`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::fanotify::{EVENT_BUFFER, records};
use super::files::InodeId;
use super::sharedmemory::{Kind, SharedMemory};
use crate::base::ByteRange;

/// Descriptor numbers that have a slot. The kernel gives the lowest free one, so this is also the
/// number of descriptors that a daemon may have open before events have to be denied.
const SLOTS: usize = 1 << 17;
const HEADER: usize = 4096;
const SLOT: usize = 32;
const LEN: usize = HEADER + EVENT_BUFFER + SLOTS * SLOT;

const KIND: Kind = Kind { name: c"rafsd-journal", magic: u64::from_le_bytes(*b"rafsdjrn"), version: 1, len: LEN };

/// Words of the header, behind magic and version.
const AT_GENERATION: usize = 16;
/// One more than the highest number that ever had an event.
const AT_USED: usize = 24;

/// The journal of one fanotify group.
#[derive(Debug)]
pub struct Journal {
    memory: SharedMemory,
    /// Bytes of the landing that may not be zero. Held while it is in use.
    landing: Mutex<usize>,
    /// Slots in use.
    outstanding: AtomicUsize,
}

/// An event that was taken and perhaps not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outstanding {
    /// Number of the event's descriptor in the process that took it.
    pub number: i32,
    /// The file being read; `None` if its reader was killed before it could write that down.
    pub file: Option<InodeId>,
    /// What is about to be read; `None` if the kernel did not say.
    pub range: Option<ByteRange>,
}

impl Journal {
    /// Numbers that an event can have: all that have a slot are below.
    pub const NUMBERS: i32 = 1 << 17;

    /// An empty journal in memory of its own.
    pub fn create() -> io::Result<Self> {
        let this = Self::over(SharedMemory::create(&KIND)?);
        let mut generation = [0; 8];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut generation)?;
        this.word(AT_GENERATION).store(u64::from_ne_bytes(generation), Ordering::Relaxed);
        Ok(this)
    }

    /// The journal that another process made.
    ///
    /// # Errors
    /// `InvalidData` if it is none, or of a version that this program does not know.
    pub fn open(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self::of_another(SharedMemory::open(fd, &KIND)?))
    }

    /// The same for who must not ask for memory: an error has no text.
    pub fn recognize(fd: OwnedFd) -> io::Result<Self> {
        let memory = SharedMemory::recognize(fd, &KIND)?;
        memory.map(Self::of_another).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn of_another(memory: SharedMemory) -> Self {
        let this = Self::over(memory);
        *this.landing.lock().unwrap() = EVENT_BUFFER;
        this.outstanding.store(this.slots().count(), Ordering::Relaxed);
        this
    }

    fn over(memory: SharedMemory) -> Self {
        Self { memory, landing: Mutex::new(0), outstanding: AtomicUsize::new(0) }
    }

    /// Tells this journal from every other one.
    pub fn generation(&self) -> u64 {
        self.word(AT_GENERATION).load(Ordering::Relaxed)
    }

    /// Events that are written down.
    pub fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Lets the kernel write what `read` reads from `source` into the landing, at most `most` bytes, and
    /// gives a copy. To be followed by [`Journal::clear_landing`], and only after that by the next.
    pub(super) fn land(&self, source: BorrowedFd<'_>, most: usize) -> io::Result<Vec<u8>> {
        let mut used = self.landing.lock().unwrap();
        let read = self.receive(source, most, &mut used)?;
        Ok(self.memory.copy(HEADER, read))
    }

    /// The same with the copy in `buffer`, and not more than that has room for. Tells its length.
    pub(super) fn land_in(&self, source: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
        let mut used = self.landing.lock().unwrap();
        let read = self.receive(source, buffer.len(), &mut used)?;
        self.memory.copy_to(HEADER, &mut buffer[..read]);
        Ok(read)
    }

    fn receive(&self, source: BorrowedFd<'_>, most: usize, used: &mut usize) -> io::Result<usize> {
        let len = most.min(EVENT_BUFFER);
        // The kernel may be stopped halfway, and what it did not reach must not look like records.
        self.zero_landing(used);
        *used = len;
        let read = match self.memory.read_from(source, HEADER, len) {
            Ok(read) => read,
            Err(error) => {
                // Nothing was taken, or the kernel denied what it had begun to give.
                *used = 0;
                return Err(error);
            }
        };
        *used = read;
        Ok(read)
    }

    /// Forgets the landing: each of its events has been answered or has a slot.
    pub fn clear_landing(&self) {
        self.zero_landing(&mut self.landing.lock().unwrap());
    }

    fn zero_landing(&self, used: &mut usize) {
        self.memory.zero(HEADER, *used);
        *used = 0;
    }

    /// Writes an event down. `false` if its number is too high for the journal.
    #[must_use]
    pub fn write(&self, number: i32, file: Option<InodeId>, range: ByteRange) -> bool {
        let Some(index) = usize::try_from(number).ok().filter(|&index| index < SLOTS) else { return false };
        let [device, inode, offset, count] = self.slot(index);
        let (dev, ino) = file.map_or((0, 0), |file| (file.device(), file.inode()));
        device.store(dev, Ordering::Relaxed);
        inode.store(ino, Ordering::Relaxed);
        offset.store(range.start(), Ordering::Relaxed);
        self.word(AT_USED).fetch_max(index as u64 + 1, Ordering::Relaxed);
        // An event of no bytes has one here, so that its slot is seen to be used.
        if count.swap(range.len().max(1), Ordering::Release) == 0 {
            self.outstanding.fetch_add(1, Ordering::Relaxed);
        }
        true
    }

    /// Strikes an event out: it was answered. Before its number can be given to another one.
    pub fn clear(&self, number: i32) {
        let Some(index) = usize::try_from(number).ok().filter(|&index| index < SLOTS) else { return };
        if self.slot(index)[3].swap(0, Ordering::Release) != 0 {
            self.outstanding.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Everything that may still wait for an answer, by number, each once. For a process that takes
    /// over, before it reads the group.
    pub fn inherited(&self) -> Vec<Outstanding> {
        let landing = self.landing.lock().unwrap();
        let bytes = self.memory.copy(HEADER, EVENT_BUFFER);
        drop(landing);
        let landed = records(&bytes).map(|(number, range)| Outstanding { number, file: None, range });
        let mut all: BTreeMap<i32, Outstanding> = landed.map(|event| (event.number, event)).collect();
        // A slot knows more than the landing does.
        all.extend(self.slots().map(|event| (event.number, event)));
        all.into_values().collect()
    }

    /// Calls `visit` with the number of everything that may still wait for an answer, some perhaps twice. Allocates
    /// nothing; `buffer` is used for the landing, and should have room for it, [`EVENT_BUFFER`].
    pub fn each_number(&self, buffer: &mut [u8], visit: &mut dyn FnMut(i32)) {
        let landing = self.landing.lock().unwrap();
        let len = buffer.len().min(EVENT_BUFFER);
        self.memory.copy_to(HEADER, &mut buffer[..len]);
        drop(landing);
        records(&buffer[..len]).for_each(|(number, _)| visit(number));
        self.slots().for_each(|event| visit(event.number));
    }

    fn slots(&self) -> impl Iterator<Item = Outstanding> + '_ {
        let used = usize::try_from(self.word(AT_USED).load(Ordering::Relaxed)).unwrap_or(SLOTS).min(SLOTS);
        (0..used).filter_map(|index| {
            let [device, inode, offset, count] = self.slot(index).map(|word| word.load(Ordering::Acquire));
            (count > 0).then(|| Outstanding {
                number: i32::try_from(index).expect("fewer slots than 2^31"),
                file: (inode != 0).then(|| InodeId::new(device, inode)),
                range: ByteRange::at(offset, count),
            })
        })
    }

    fn slot(&self, index: usize) -> [&AtomicU64; 4] {
        let at = HEADER + EVENT_BUFFER + index * SLOT;
        [0, 8, 16, 24].map(|word| self.word(at + word))
    }

    /// The word at byte `at`, a multiple of eight.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(!(HEADER..HEADER + EVENT_BUFFER).contains(&at));
        self.memory.word(at)
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: InodeId = InodeId::new(7, 9);

    fn range(at: u64) -> ByteRange {
        ByteRange::at(at, 4096).unwrap()
    }

    /// A successor's view of the same memory.
    fn successor(journal: &Journal) -> Journal {
        Journal::open(journal.as_fd().try_clone_to_owned().unwrap()).unwrap()
    }

    /// What the kernel would write for an event.
    fn record(number: i32, at: u64) -> Vec<u8> {
        let mut out = 48u32.to_ne_bytes().to_vec();
        out.extend([3, 0, 24, 0]);
        out.extend(0x0010_0000u64.to_ne_bytes());
        out.extend(number.to_ne_bytes());
        out.extend(1i32.to_ne_bytes());
        out.extend([6, 0, 24, 0, 0, 0, 0, 0]);
        out.extend(at.to_ne_bytes());
        out.extend(4096u64.to_ne_bytes());
        out
    }

    fn landed(journal: &Journal, bytes: &[u8]) {
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, bytes).unwrap();
        assert_eq!(journal.land(read.as_fd(), EVENT_BUFFER).unwrap(), bytes);
    }

    #[test]
    fn what_is_written_and_not_cleared_is_inherited() {
        let journal = Journal::create().unwrap();
        assert!(journal.write(40, Some(FILE), range(4096)) && journal.write(41, Some(FILE), range(8192)));
        assert!(journal.write(90_000, None, range(0)));
        journal.clear(40);

        let successor = successor(&journal);

        let expected = [(41, Some(FILE), 8192), (90_000, None, 0)].map(|(number, file, at)| Outstanding {
            number,
            file,
            range: Some(range(at)),
        });
        assert_eq!(successor.inherited(), expected);
        assert_eq!((successor.outstanding(), successor.generation()), (2, journal.generation()));
    }

    #[test]
    fn an_event_is_known_from_the_moment_the_kernel_gave_it() {
        let journal = Journal::create().unwrap();
        landed(&journal, &[record(50, 0), record(51, 4096)].concat());
        let only_landed = Outstanding { number: 50, file: None, range: Some(range(0)) };
        assert_eq!(successor(&journal).inherited()[0], only_landed);
        let mut numbers = Vec::new();
        successor(&journal).each_number(&mut vec![0; EVENT_BUFFER], &mut |number| numbers.push(number));
        assert_eq!(numbers, [50, 51]);

        assert!(journal.write(51, Some(FILE), range(4096)));
        let both = successor(&journal).inherited();
        assert_eq!(both, [only_landed, Outstanding { number: 51, file: Some(FILE), range: Some(range(4096)) }]);

        journal.clear_landing();
        assert_eq!(successor(&journal).inherited(), both[1..]);
    }

    #[test]
    fn a_shorter_batch_leaves_nothing_of_a_longer_one() {
        let journal = Journal::create().unwrap();
        landed(&journal, &(50..60).flat_map(|number| record(number, 0)).collect::<Vec<_>>());
        landed(&journal, &record(70, 0));
        let numbers: Vec<_> = successor(&journal).inherited().iter().map(|event| event.number).collect();
        assert_eq!(numbers, [70]);
    }

    #[test]
    fn numbers_beyond_the_journal_are_refused_and_other_files_are_no_journals() {
        let journal = Journal::create().unwrap();
        assert!(!journal.write(-1, Some(FILE), range(0)) && !journal.write(1 << 17, Some(FILE), range(0)));
        let file = tempfile::tempfile().unwrap();
        assert!(Journal::open(file.try_clone().unwrap().into()).is_err());
        file.set_len(LEN as u64).unwrap();
        assert!(Journal::open(file.into()).is_err());
    }
}
