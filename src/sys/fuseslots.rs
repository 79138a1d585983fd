//! FUSE requests over io_uring (Linux 6.14): the memory of their slots.
//!
//! A **slot** holds one request at a time. The kernel writes it there, we write the answer over it, and one
//! command both hands the answer in and asks for the next request. Slots belong to **queues**, one for each
//! processor that there might be; a request goes to that of the processor which its reader runs on.
//!
//! The memory of all slots of a connection is a memory file, mapped where the kernel was told that it is. A
//! successor that maps it at the same place may answer what it finds there: the kernel goes by the addresses,
//! whichever process hands an answer in (seen on 6.18). What it finds is all there is only if nothing was on the
//! way into a slot when its predecessor ended, because nobody gets that any more:
//! [`SlotMemory::say_whole`].
//!
//! ```text
//! 0        magic, version, address, queues, slots of each, bytes of a payload, whether it is whole
//! 4096     a block for each slot: its state, where its parts are, then what the kernel and we write
//! ...      payloads, each a multiple of pages
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: u64 = u64::from_le_bytes(*b"rafsdrng");
const VERSION: u64 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 8;
const AT_ADDRESS: usize = 16;
const AT_QUEUES: usize = 24;
const AT_SLOTS: usize = 32;
const AT_PAYLOAD: usize = 40;
const AT_WHOLE: usize = 48;

const HEADER: usize = 4096;
/// A block: the state, two `struct iovec`, and from [`AT_HEADERS`] on `struct fuse_uring_req_header`.
const BLOCK: usize = 512;
const AT_VECTORS: usize = 16;
const AT_HEADERS: usize = 128;
/// Bytes of `struct fuse_uring_req_header`: room for a head, for the first argument, and the ring's own record.
const HEADERS: usize = 288;
const AT_ARGUMENT: usize = AT_HEADERS + 128;
const ARGUMENT: usize = 128;
/// `struct fuse_uring_ent_in_out`: flags, the number to hand the answer in by, bytes of the payload.
const AT_NUMBER: usize = AT_HEADERS + 256 + 8;
const AT_PAYLOAD_LEN: usize = AT_HEADERS + 256 + 16;
/// `struct fuse_in_header` and `struct fuse_out_header`.
const REQUEST_HEAD: usize = 40;
const ANSWER_HEAD: usize = 16;

const _: () = assert!(AT_HEADERS + HEADERS <= BLOCK);
const _: () = assert!(size_of::<libc::iovec>() * 2 + AT_VECTORS <= AT_HEADERS);

/// Pages of 64 KiB are the largest that a kernel here could have.
const ALIGN: usize = 1 << 16;

/// Where memory of slots is looked for room: far from where programs, their heaps, stacks and libraries lie, so
/// that a successor finds the same place free.
const PLACES: u64 = 1 << 45;
const PLACE: u64 = 1 << 34;
const MOST_PLACES: u64 = 1 << 11;

/// Most of each that is believed of memory which somebody else has made.
const MOST_QUEUES: u64 = 1 << 13;
const MOST_SLOTS: u64 = 1 << 8;
const MOST_PAYLOAD: u64 = 1 << 22;

/// How many slots there are, and how large they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub queues: u16,
    /// Of each queue.
    pub slots: u16,
    /// Bytes of the longest answer, and of what comes with a request beside its first argument.
    pub payload: u32,
}

impl Shape {
    fn count(self) -> usize {
        usize::from(self.queues) * usize::from(self.slots)
    }

    fn payload(self) -> usize {
        self.payload as usize
    }

    fn payloads_at(self) -> usize {
        (HEADER + self.count() * BLOCK).next_multiple_of(ALIGN)
    }

    /// `None` if it has no room at any place.
    fn len(self) -> Option<usize> {
        let len = self.count().checked_mul(self.payload())?.checked_add(self.payloads_at())?;
        (len as u64 <= PLACE && self.count() > 0 && self.payload().is_multiple_of(4096)).then_some(len)
    }
}

/// What is in a slot that the kernel does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that anybody waits for.
    Nothing,
    /// A request.
    Request,
    /// An answer that has not been handed in.
    Answer,
}

/// The memory of all slots of one connection.
#[derive(Debug)]
pub struct SlotMemory {
    at: NonNull<u8>,
    len: usize,
    shape: Shape,
    file: OwnedFd,
}

// SAFETY: the pointer is to a mapping that this value owns; what lies there is atomics, or is touched through a
// `Slot` alone, of which there is one for each.
unsafe impl Send for SlotMemory {}
// SAFETY: as above.
unsafe impl Sync for SlotMemory {}

impl SlotMemory {
    /// New memory with all its slots.
    ///
    /// # Errors
    /// `InvalidInput` for a shape that has no room.
    pub fn create(shape: Shape) -> io::Result<(Arc<Self>, Vec<Slot>)> {
        let len = shape.len().ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a name and plain numbers in, a descriptor or -1 out.
        let fd = unsafe { libc::memfd_create(c"rafsd-slots".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call just returned this descriptor and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(len as u64)?;
        let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW;
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
        let at = (0..MOST_PLACES).find_map(|number| match map(&file, PLACES + number * PLACE, len) {
            // Somebody is there.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => None,
            other => Some(other),
        });
        let at = at.unwrap_or_else(|| Err(io::ErrorKind::OutOfMemory.into()))?;
        let this = Self { at, len, shape, file: file.into() };
        for (word, value) in [
            (AT_VERSION, VERSION),
            (AT_ADDRESS, at.as_ptr().expose_provenance() as u64),
            (AT_QUEUES, shape.queues.into()),
            (AT_SLOTS, shape.slots.into()),
            (AT_PAYLOAD, shape.payload.into()),
            (AT_MAGIC, MAGIC),
        ] {
            this.word(word).store(value, Ordering::Release);
        }
        Ok(this.with_slots())
    }

    /// The memory that another process made and has [said](SlotMemory::say_whole) to be whole, with all its
    /// slots. From now on it is not.
    ///
    /// # Errors
    /// `InvalidData` if it is none, is of a version that this program does not know, or is not whole; `EEXIST` if
    /// its place is taken.
    pub fn take_over(fd: OwnedFd) -> io::Result<(Arc<Self>, Vec<Slot>)> {
        let bad = |what| io::Error::new(io::ErrorKind::InvalidData, format!("the slots of a FUSE connection {what}"));
        let file = File::from(fd);
        let mut words = [0; 7];
        let mut head = [0; 56];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut head, 0)?;
        for (word, bytes) in words.iter_mut().zip(head.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        let [magic, version, address, queues, slots, payload, whole] = words;
        if magic != MAGIC || version != VERSION {
            return Err(bad("are of another version"));
        }
        let fits = queues <= MOST_QUEUES && slots <= MOST_SLOTS && payload <= MOST_PAYLOAD;
        let number = |word| u16::try_from(word).unwrap_or(0);
        let shape =
            Shape { queues: number(queues), slots: number(slots), payload: u32::try_from(payload).unwrap_or(0) };
        let len = shape.len().filter(|len| fits && file.metadata().is_ok_and(|it| it.len() == *len as u64));
        let len = len.ok_or_else(|| bad("make no sense"))?;
        if whole != 1 {
            return Err(bad("are not all there is: their daemon was killed"));
        }
        if !(PLACES..PLACES + MOST_PLACES * PLACE).contains(&address) || !address.is_multiple_of(PLACE) {
            return Err(bad("make no sense"));
        }
        let at = map(&file, address, len)?;
        let this = Self { at, len, shape, file: file.into() };
        this.word(AT_WHOLE).store(0, Ordering::Release);
        Ok(this.with_slots())
    }

    fn with_slots(self) -> (Arc<Self>, Vec<Slot>) {
        let this = Arc::new(self);
        let of_queue = |queue| (0..this.shape.slots).map(move |number| (queue, number));
        let all = (0..this.shape.queues).flat_map(of_queue);
        let slots = all.map(|(queue, number)| Slot { memory: this.clone(), queue, number }).collect();
        (this, slots)
    }

    /// Says that every request which the kernel has given away lies in a slot, and that the kernel has no slot of
    /// a processor that is there.
    pub fn say_whole(&self) {
        self.word(AT_WHOLE).store(1, Ordering::Release);
    }

    /// How many there are of what.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The word at byte `at`, a multiple of eight.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len);
        // SAFETY: in bounds and aligned, because a mapping starts at a page; mapped as long as `self` lives; the
        // words that are asked for are never anything but atomics.
        unsafe { AtomicU64::from_ptr(self.at.as_ptr().add(at).cast()) }
    }
}

impl AsFd for SlotMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SlotMemory {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours, and every slot, which might refer to it, holds `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// Maps `len` bytes of `file` at `address` and nowhere else.
fn map(file: &File, address: u64, len: usize) -> io::Result<NonNull<u8>> {
    let wanted = usize::try_from(address).map_err(|_| io::ErrorKind::InvalidInput)?;
    let wanted = std::ptr::without_provenance_mut::<libc::c_void>(wanted);
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the flag leaves every mapping alone that is there already, so no memory of anybody is changed.
    let at = unsafe { libc::mmap(wanted, len, protection, flags, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    if at != wanted {
        // A kernel before 4.17, for which it was a wish.
        // SAFETY: it was just mapped, and nobody refers to it.
        unsafe { libc::munmap(at, len) };
        return Err(io::ErrorKind::Unsupported.into());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// The right to one slot that the kernel does not have. Dropping it leaves what is in it.
#[derive(Debug)]
pub struct Slot {
    memory: Arc<SlotMemory>,
    queue: u16,
    number: u16,
}

impl Slot {
    /// The queue that it belongs to: the number of a processor.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// What is in it.
    pub fn content(&self) -> Content {
        match self.memory.word(self.block()).load(Ordering::Acquire) {
            1 => Content::Request,
            2 => Content::Answer,
            _ => Content::Nothing,
        }
    }

    pub(super) fn say(&self, content: Content) {
        self.memory.word(self.block()).store(content as u64, Ordering::Release);
    }

    /// The number that an answer is handed in by; it is that of the request.
    pub fn unique(&self) -> u64 {
        self.memory.word(self.block() + AT_NUMBER).load(Ordering::Relaxed)
    }

    /// Puts the request in it into `buffer`, as a read of the device would have given it, and tells its length.
    /// `None` if what is there is none, or longer than the buffer.
    pub fn request(&self, buffer: &mut [u8]) -> Option<usize> {
        let len = u32::from_ne_bytes(*self.bytes(self.block() + AT_HEADERS, 4).first_chunk()?) as usize;
        let payload = u32::from_ne_bytes(*self.bytes(self.block() + AT_PAYLOAD_LEN, 4).first_chunk()?) as usize;
        let argument = len.checked_sub(REQUEST_HEAD)?.checked_sub(payload).filter(|len| *len <= ARGUMENT)?;
        if payload > self.memory.shape.payload() {
            return None;
        }
        let (head, rest) = buffer.get_mut(..len)?.split_at_mut(REQUEST_HEAD);
        let (first, others) = rest.split_at_mut(argument);
        head.copy_from_slice(self.bytes(self.block() + AT_HEADERS, REQUEST_HEAD));
        first.copy_from_slice(self.bytes(self.block() + AT_ARGUMENT, argument));
        others.copy_from_slice(self.bytes(self.payload(), payload));
        Some(len)
    }

    /// Room for the body of an answer. What came with the request beside its first argument is there, and is lost
    /// when it is written to.
    pub fn room(&mut self) -> &mut [u8] {
        let (at, len) = (self.payload(), self.memory.shape.payload());
        // SAFETY: within the mapping, which lives as long as `self`. Nobody else refers to these bytes: there is one
        // right to each slot, the kernel has given it up to us, and no other process maps the memory while we live.
        unsafe { std::slice::from_raw_parts_mut(self.memory.at.as_ptr().add(at), len) }
    }

    /// Makes an answer of what is in it: `head`, and the first `body` bytes of its [room](Slot::room).
    pub fn answer(&mut self, head: &[u8; ANSWER_HEAD], body: u32) {
        assert!(body <= self.memory.shape.payload);
        let at = self.block();
        // SAFETY: within the block of this slot, and so within the mapping; nobody else refers to it, as above.
        unsafe {
            std::ptr::copy_nonoverlapping(head.as_ptr(), self.memory.at.as_ptr().add(at + AT_HEADERS), ANSWER_HEAD);
            self.memory.at.as_ptr().add(at + AT_PAYLOAD_LEN).cast::<u32>().write(body);
        }
        self.say(Content::Answer);
    }

    /// Writes down where its parts are, and tells where that is written.
    pub(super) fn vectors(&mut self) -> *mut libc::iovec {
        let (headers, payload) = (self.block() + AT_HEADERS, self.payload());
        let at = |at: usize| self.memory.at.as_ptr().wrapping_add(at).cast::<libc::c_void>();
        let vectors = [
            libc::iovec { iov_base: at(headers), iov_len: HEADERS },
            libc::iovec { iov_base: at(payload), iov_len: self.memory.shape.payload() },
        ];
        let place = at(self.block() + AT_VECTORS).cast::<libc::iovec>();
        // SAFETY: within the block of this slot, aligned as pointers are, and nobody else refers to it.
        unsafe { std::ptr::copy_nonoverlapping(vectors.as_ptr(), place, vectors.len()) };
        place
    }

    fn index(&self) -> usize {
        usize::from(self.queue) * usize::from(self.memory.shape.slots) + usize::from(self.number)
    }

    fn block(&self) -> usize {
        HEADER + self.index() * BLOCK
    }

    fn payload(&self) -> usize {
        self.memory.shape.payloads_at() + self.index() * self.memory.shape.payload()
    }

    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        assert!(at + len <= self.memory.len);
        // SAFETY: within the mapping, as just checked, which lives as long as `self`; nobody writes to a slot but who
        // has the right to it.
        unsafe { std::slice::from_raw_parts(self.memory.at.as_ptr().add(at), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Places are taken one after the other, by all tests of this process.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    const SHAPE: Shape = Shape { queues: 2, slots: 3, payload: 8192 };

    fn write(slot: &Slot, at: usize, bytes: &[u8]) {
        let place = slot.memory.at.as_ptr().wrapping_add(slot.block() + at);
        // SAFETY: within the block, and the test is alone.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), place, bytes.len()) };
    }

    /// Puts a request there as the kernel would.
    fn put(slot: &mut Slot, claimed: u32, argument: &[u8], payload: &[u8]) {
        write(slot, AT_HEADERS, &claimed.to_ne_bytes());
        write(slot, AT_ARGUMENT, argument);
        write(slot, AT_PAYLOAD_LEN, &u32::try_from(payload.len()).unwrap().to_ne_bytes());
        slot.room()[..payload.len()].copy_from_slice(payload);
    }

    #[test]
    fn a_request_in_parts_reads_as_one() {
        let _alone = ALONE.lock().unwrap();
        let (_memory, mut slots) = SlotMemory::create(SHAPE).unwrap();
        let slot = &mut slots[4];
        let mut buffer = [0; 256];
        put(slot, 40 + 8 + 5, b"argument", b"name\0");
        assert_eq!(slot.request(&mut buffer), Some(53));
        assert_eq!(&buffer[40..53], b"argumentname\0");
        for claimed in [0, 39, 44, 40 + 129 + 5, 4000, u32::MAX] {
            put(slot, claimed, b"argument", b"name\0");
            assert_eq!(slot.request(&mut buffer), None, "{claimed}");
        }
        write(slot, AT_PAYLOAD_LEN, &u32::MAX.to_ne_bytes());
        assert_eq!(slot.request(&mut buffer), None);
    }

    #[test]
    fn memory_goes_on_at_the_same_place_only_if_it_was_said_to_be_whole() {
        let _alone = ALONE.lock().unwrap();
        let (memory, mut slots) = SlotMemory::create(SHAPE).unwrap();
        put(&mut slots[1], 40, b"", b"");
        slots[1].say(Content::Request);
        slots[2].answer(&[7; 16], 5);
        let place = memory.at;
        let copy = || memory.as_fd().try_clone_to_owned().unwrap();
        let refused = SlotMemory::take_over(copy()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
        memory.say_whole();
        let fd = copy();
        assert!(SlotMemory::take_over(copy()).is_err(), "its place is taken");
        drop((memory, slots));

        let (memory, slots) = SlotMemory::take_over(fd).unwrap();

        assert_eq!((memory.at, memory.shape()), (place, SHAPE));
        let contents: Vec<_> = slots.iter().map(Slot::content).collect();
        assert_eq!(contents[..3], [Content::Nothing, Content::Request, Content::Answer]);
        assert_eq!(slots[2].bytes(slots[2].block() + AT_HEADERS, 16), [7; 16]);
        let again = memory.as_fd().try_clone_to_owned().unwrap();
        drop((memory, slots));
        assert!(SlotMemory::take_over(again).is_err(), "not whole any more");
    }

    #[test]
    fn what_is_no_memory_of_slots_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let open = || SlotMemory::take_over(file.try_clone().unwrap().into()).map(drop).map_err(|error| error.kind());
        assert_eq!(open(), Err(io::ErrorKind::UnexpectedEof));
        file.set_len(1 << 20).unwrap();
        assert_eq!(open(), Err(io::ErrorKind::InvalidData));
        let words = [MAGIC, VERSION, PLACES, u64::MAX, 1 << 8, 1 << 22, 1];
        let head: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        std::os::unix::fs::FileExt::write_all_at(&file, &head, 0).unwrap();
        assert_eq!(open(), Err(io::ErrorKind::InvalidData));
        assert_eq!(SlotMemory::create(Shape { queues: 0, ..SHAPE }).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
