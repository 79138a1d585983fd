//! Shared memory that outlives the daemon: requests of a FUSE connection that were taken and not answered.
//!
//! Since Linux 6.9 the kernel sends them again when it is asked to. Before, a request that a dead process had
//! read is known to nobody, and whoever waits for it waits for good, unkillable. So requests are read into
//! memory that the keepers hold, and a successor answers those that it finds there:
//!
//! ```text
//! 0        header: magic, version, slots used so far
//! 4096     lanes: the kernel writes the request of a read right here; one for each thread that reads
//! 135168   slots: requests that wait for data, the length before each
//! ```
//!
//! No request can be lost: the kernel copies one before the read returns, whatever instruction the reader is
//! killed at. A lane is cleared when its request was answered or has a slot, a slot after the answer. To
//! answer one that stands here and was answered gives `ENOENT`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use super::sharedmemory::{Kind, SharedMemory};

const HEADER: usize = 4096;
/// Threads that may read at once.
const LANES: usize = 16;
/// As long as the kernel wants the buffer for a request to be.
pub const LANE: usize = 8192;
/// Requests that may wait for data at once.
const SLOTS: usize = 1 << 14;
/// The length, then the request: a read has 80 bytes.
const SLOT: usize = 128;
/// Longest request that has room in a slot.
pub const LONGEST: usize = SLOT - 8;
const AT_SLOTS: usize = HEADER + LANES * LANE;
const LEN: usize = AT_SLOTS + SLOTS * SLOT;

const KIND: Kind = Kind { name: c"rafsd-requests", magic: u64::from_le_bytes(*b"rafsdrql"), version: 1, len: LEN };

/// Word of the header, behind magic and version: one more than the highest slot that was ever in use.
const AT_USED: usize = 16;
/// Where a request has its length (4 bytes) and its number (8 bytes).
const NUMBER_AT: usize = 8;
const SHORTEST: usize = 40;

/// The memory of one connection.
#[derive(Debug)]
pub struct RequestLog {
    memory: SharedMemory,
    free: Mutex<Free>,
}

#[derive(Debug)]
struct Free {
    /// A bit for each lane.
    lanes: u32,
    /// Slots that were used and are free again.
    slots: Vec<usize>,
    /// The first that was never used.
    unused: usize,
}

/// A request where the kernel has written it. Dropping it forgets the request: it was answered, or has a slot.
#[derive(Debug)]
pub struct Landed<'a> {
    log: &'a RequestLog,
    lane: usize,
}

/// Names a request that waits for data.
#[derive(Debug, PartialEq, Eq)]
pub struct Slot(usize);

/// A request that a dead process had taken and perhaps not answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    pub bytes: Vec<u8>,
    /// Where it is written down, if it had to wait: to be struck out when it is answered.
    pub slot: Option<Slot>,
    /// Where the kernel had written it, if it stands there still.
    lane: Option<usize>,
}

impl RequestLog {
    /// An empty log in memory of its own.
    pub fn create() -> io::Result<Self> {
        Ok(Self::over(SharedMemory::create(&KIND)?))
    }

    /// The log that another process made, and what stands there. It stands there until it is forgotten: a
    /// process that dies halfway through answering leaves the rest to the next one.
    ///
    /// # Errors
    /// `InvalidData` if it is none, or of a version that this program does not know.
    pub fn take_over(fd: OwnedFd) -> io::Result<(Self, Vec<Left>)> {
        let this = Self::over(SharedMemory::open(fd, &KIND)?);
        let left = this.left();
        Ok((this, left))
    }

    /// Forgets where the kernel had written `left`, which was answered or has a slot by now. Before anything
    /// else is [landed](RequestLog::land) here.
    pub fn clear_lane(&self, left: &Left) {
        if let Some(lane) = left.lane {
            self.memory.zero(Self::lane_at(lane), SHORTEST);
        }
    }

    fn over(memory: SharedMemory) -> Self {
        let used = usize::try_from(memory.word(AT_USED).load(Ordering::Relaxed)).unwrap_or(SLOTS).min(SLOTS);
        let this = Self { memory, free: Mutex::new(Free { lanes: 0, slots: Vec::new(), unused: used }) };
        // Highest first, so that the lowest is taken first.
        this.free.lock().unwrap().slots = (0..used).rev().filter(|slot| this.is_free(*slot)).collect();
        this
    }

    /// Has the kernel write what `device` gives into the log, and copies it to `buffer`, which has room for
    /// [`LANE`] bytes.
    ///
    /// # Errors
    /// Those of the read; `WouldBlock` also if more threads read than there are lanes.
    pub fn land<'a>(&'a self, device: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(Landed<'a>, usize)> {
        assert!(buffer.len() >= LANE, "room for any request");
        let lane = self.take_lane().ok_or(io::ErrorKind::WouldBlock)?;
        let landed = Landed { log: self, lane };
        // Else the kernel could not write once this process is being killed, and would fail the request.
        self.memory.zero(Self::lane_at(lane), LANE);
        // This thread alone uses the lane.
        let len = self.memory.read_from(device, Self::lane_at(lane), LANE)?;
        buffer[..len].copy_from_slice(&self.memory.copy(Self::lane_at(lane), len));
        Ok((landed, len))
    }

    fn take_lane(&self) -> Option<usize> {
        let mut free = self.free.lock().unwrap();
        let lane = (0..LANES).find(|lane| free.lanes & 1 << lane == 0)?;
        free.lanes |= 1 << lane;
        Some(lane)
    }

    /// Writes down a request that has to wait for data. `None` if it is too long or too many wait.
    pub fn write(&self, request: &[u8]) -> Option<Slot> {
        if request.is_empty() || request.len() > LONGEST {
            return None;
        }
        let slot = {
            let mut free = self.free.lock().unwrap();
            match free.slots.pop() {
                Some(slot) => slot,
                None if free.unused == SLOTS => return None,
                None => {
                    free.unused += 1;
                    self.memory.word(AT_USED).store(free.unused as u64, Ordering::Release);
                    free.unused - 1
                }
            }
        };
        let at = Self::slot_at(slot);
        self.memory.put(at + 8, request);
        // Last: a slot with a length is a whole request.
        self.memory.word(at).store(request.len() as u64, Ordering::Release);
        Some(Slot(slot))
    }

    /// Strikes out a request that was answered.
    pub fn strike_out(&self, slot: Slot) {
        let Slot(slot) = slot;
        self.memory.word(Self::slot_at(slot)).store(0, Ordering::Release);
        self.free.lock().unwrap().slots.push(slot);
    }

    /// What stands in the log, each request once, in the order of their numbers.
    fn left(&self) -> Vec<Left> {
        let mut found: BTreeMap<u64, Left> = BTreeMap::new();
        let mut add = |bytes: Vec<u8>, lane: Option<usize>, slot: Option<usize>| {
            let len = bytes.first_chunk().map_or(0, |len| u32::from_ne_bytes(*len) as usize);
            let number = bytes.get(NUMBER_AT..NUMBER_AT + 8).and_then(|bytes| bytes.first_chunk().copied());
            let number = number.map(u64::from_ne_bytes).filter(|_| (SHORTEST..=bytes.len()).contains(&len));
            let Some(number) = number else { return };
            let new = || Left { bytes: bytes[..len].to_vec(), lane: None, slot: None };
            let left = found.entry(number).or_insert_with(new);
            left.lane = left.lane.or(lane);
            left.slot = left.slot.take().or(slot.map(Slot));
        };
        for lane in 0..LANES {
            add(self.memory.copy(Self::lane_at(lane), LANE), Some(lane), None);
        }
        let used = self.free.lock().unwrap().unused;
        for slot in (0..used).filter(|slot| !self.is_free(*slot)) {
            add(self.memory.copy(Self::slot_at(slot) + 8, LONGEST), None, Some(slot));
        }
        found.into_values().collect()
    }

    fn is_free(&self, slot: usize) -> bool {
        self.memory.word(Self::slot_at(slot)).load(Ordering::Acquire) == 0
    }

    const fn lane_at(lane: usize) -> usize {
        HEADER + lane * LANE
    }

    const fn slot_at(slot: usize) -> usize {
        AT_SLOTS + slot * SLOT
    }
}

impl AsFd for RequestLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

impl Drop for Landed<'_> {
    fn drop(&mut self) {
        // What has no length is no request.
        self.log.memory.zero(RequestLog::lane_at(self.lane), SHORTEST);
        self.log.free.lock().unwrap().lanes &= !(1 << self.lane);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request of `len` bytes.
    fn request(number: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0x55; len];
        bytes[..4].copy_from_slice(&u32::try_from(len).unwrap().to_ne_bytes());
        bytes[NUMBER_AT..NUMBER_AT + 8].copy_from_slice(&number.to_ne_bytes());
        bytes
    }

    /// What a successor finds.
    fn left(log: &RequestLog) -> Vec<Vec<u8>> {
        let (_, left) = RequestLog::take_over(log.as_fd().try_clone_to_owned().unwrap()).unwrap();
        left.into_iter().map(|left| left.bytes).collect()
    }

    fn land<'a>(log: &'a RequestLog, bytes: &[u8]) -> Landed<'a> {
        let (read, write) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&write, bytes).unwrap();
        let mut buffer = vec![0; LANE];
        let (landed, len) = log.land(read.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..len], bytes);
        landed
    }

    #[test]
    fn a_request_is_known_from_the_moment_the_kernel_gave_it_until_it_is_answered() {
        let log = RequestLog::create().unwrap();
        let landed = land(&log, &request(2, 300));
        let other = land(&log, &request(4, 80));
        let slot = log.write(&request(4, 80)).unwrap();
        drop(other);

        assert_eq!(left(&log), [request(2, 300), request(4, 80)]);
        assert_eq!(left(&log), [request(2, 300), request(4, 80)], "it stands there for the next one as well");

        drop(landed);
        let again = log.write(&request(6, 80)).unwrap();
        assert_eq!(left(&log), [request(4, 80), request(6, 80)]);
        log.strike_out(slot);
        log.strike_out(again);
        assert_eq!(left(&log), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_successor_forgets_one_request_after_the_other() {
        let log = RequestLog::create().unwrap();
        let landed = [land(&log, &request(2, 80)), land(&log, &request(4, 300))];
        log.write(&request(2, 80)).unwrap();
        log.write(&request(6, 80)).unwrap();
        // As a process that is killed.
        landed.into_iter().for_each(std::mem::forget);

        let (successor, left) = RequestLog::take_over(log.as_fd().try_clone_to_owned().unwrap()).unwrap();

        let mut expected = vec![request(2, 80), request(4, 300), request(6, 80)];
        assert!(left.iter().map(|left| &left.bytes).eq(&expected));
        assert_eq!(left.iter().map(|left| left.slot.is_some()).collect::<Vec<_>>(), [true, false, true]);
        for left in left {
            successor.clear_lane(&left);
            left.slot.into_iter().for_each(|slot| successor.strike_out(slot));
            expected.remove(0);
            assert_eq!(self::left(&log), expected);
        }
    }

    #[test]
    fn an_answered_request_leaves_nothing() {
        let log = RequestLog::create().unwrap();
        for number in 0..100 {
            drop(land(&log, &request(number, 4096)));
            let slot = log.write(&request(number, 80)).unwrap();
            assert_eq!(slot, Slot(0), "slots are used again");
            log.strike_out(slot);
        }
        assert_eq!(left(&log), Vec::<Vec<u8>>::new());
    }

    #[test]
    fn a_full_log_says_so_and_a_successor_goes_on_with_it() {
        let log = RequestLog::create().unwrap();
        for number in 0..SLOTS as u64 {
            assert!(log.write(&request(number, LONGEST)).is_some());
        }
        assert!(log.write(&request(1, 80)).is_none());
        assert!(log.write(&request(1, LONGEST + 1)).is_none() && log.write(&[]).is_none());

        let (successor, left) = RequestLog::take_over(log.as_fd().try_clone_to_owned().unwrap()).unwrap();

        assert_eq!(left.len(), SLOTS);
        assert!(left.iter().zip(0..).all(|(left, number)| left.bytes == request(number, LONGEST)));
        assert!(successor.write(&request(1, 80)).is_none());
        left.into_iter().take(1).filter_map(|left| left.slot).for_each(|slot| successor.strike_out(slot));
        assert!(successor.write(&request(1, 80)).is_some());
    }

    #[test]
    fn a_read_that_fails_leaves_nothing_and_there_is_a_lane_for_each_thread() {
        let log = RequestLog::create().unwrap();
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let mut buffer = vec![0; LANE];
        assert_eq!(log.land(read.as_fd(), &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let landed: Vec<_> = (0..LANES as u64).map(|number| land(&log, &request(number, 80))).collect();
        nix::unistd::write(&write, &request(99, 80)).unwrap();
        assert_eq!(log.land(read.as_fd(), &mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(landed);
        assert!(log.land(read.as_fd(), &mut buffer).is_ok());
    }

    #[test]
    fn what_is_no_log_is_refused_and_nonsense_in_one_is_no_request() {
        let file = tempfile::tempfile().unwrap();
        let open = || RequestLog::take_over(file.try_clone().unwrap().into()).map(drop).map_err(|e| e.kind());
        assert_eq!(open(), Err(io::ErrorKind::InvalidData));
        file.set_len(LEN as u64).unwrap();
        assert_eq!(open(), Err(io::ErrorKind::InvalidData));
        let log = RequestLog::create().unwrap();
        for len in [0u32, 39, 81, u32::MAX] {
            let mut bytes = request(2, 80);
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            let _ = log.write(&bytes);
        }
        assert_eq!(left(&log).len(), 1, "of a lane or slot only what it has room for");
    }
}
