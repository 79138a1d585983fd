//! Pre-content fanotify groups: create, mark inodes, read events, answer them.
//!
//! Constants are those of `include/uapi/linux/fanotify.h` of Linux 6.15; libc lacks the newer ones.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::journal::Journal;
use crate::base::ByteRange;

const FAN_CLASS_PRE_CONTENT: u32 = 0x8;
const FAN_CLOEXEC: u32 = 0x1;
const FAN_NONBLOCK: u32 = 0x2;
const FAN_UNLIMITED_QUEUE: u32 = 0x10;
const FAN_UNLIMITED_MARKS: u32 = 0x20;
const FAN_REPORT_FD_ERROR: u32 = 0x2000;
const FAN_MARK_ADD: u32 = 0x1;
const FAN_MARK_REMOVE: u32 = 0x2;
const FAN_ALLOW: u32 = 1;
const FAN_DENY: u32 = 2;
const FAN_Q_OVERFLOW: u64 = 0x4000;
const INFO_TYPE_RANGE: u8 = 6;
/// An event before the content of a file is accessed (Linux 6.14).
const FAN_PRE_ACCESS: u64 = 0x0010_0000;

/// Room for one read: about 1300 events.
pub const EVENT_BUFFER: usize = 64 << 10;
/// One event with its range record.
const EVENT_BYTES: usize = 48;

/// A fanotify group of the pre-content class.
///
/// While any process holds this descriptor, readers of marked files wait for an answer; when the
/// last holder closes it, they are all let through and see holes as zeros (measured on 6.18).
#[derive(Debug)]
pub struct Group(OwnedFd);

/// One access that waits for an answer.
#[derive(Debug)]
pub struct Event {
    /// The file being read, opened for reading by the kernel on our behalf; itself never subject
    /// to events. Its *number* names the event in the answer. `Err` holds the errno for which the
    /// kernel could not open it; such an event cannot be answered and was denied.
    pub file: Result<OwnedFd, i32>,
    /// Process of the reader, in our pid namespace.
    pub pid: i32,
    /// What is about to be read, or `None` if the kernel did not say.
    pub range: Option<ByteRange>,
    /// The queue ran over: accesses were let through without asking.
    pub overflow: bool,
}

/// What [`Group::answer`] tells the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Let the reader go on.
    Allow,
    /// Fail the reader with this errno. EROFS turns every errno into `EIO`.
    Deny(i32),
}

impl Group {
    /// Creates a group with unlimited queue and marks.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`; `ENOSYS` if fanotify is not built in; `EINVAL` if this
    /// kernel does not know one of the flags.
    pub fn new() -> io::Result<Self> {
        let flags = FAN_CLASS_PRE_CONTENT
            | FAN_CLOEXEC
            | FAN_NONBLOCK
            | FAN_UNLIMITED_QUEUE
            | FAN_UNLIMITED_MARKS
            | FAN_REPORT_FD_ERROR;
        let event_flags = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC;
        // SAFETY: plain numbers in, a descriptor or -1 out.
        let fd = unsafe { libc::fanotify_init(flags, event_flags.cast_unsigned()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call just returned this descriptor and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Asks to be asked before any access to the content of `file`, by inode.
    ///
    /// Descriptors of the file that are open already stay exempt for ever; later ones are subject.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.14; `EOPNOTSUPP` on a file system without pre-content events
    /// (only ext4, XFS and btrfs have them).
    pub fn mark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change_mark(FAN_MARK_ADD, file)
    }

    /// Withdraws [`Group::mark`].
    pub fn unmark(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.change_mark(FAN_MARK_REMOVE, file)
    }

    fn change_mark(&self, change: u32, file: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: both descriptors are open for the whole call because they are borrowed, and a
        // null path makes the kernel take `file` itself.
        let rc = unsafe {
            libc::fanotify_mark(self.0.as_raw_fd(), change, FAN_PRE_ACCESS, file.as_raw_fd(), std::ptr::null())
        };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Reads as many waiting events as fit in `buffer`.
    ///
    /// # Errors
    /// `WouldBlock` if none waits. Other errors concern one event, which the kernel denied; the
    /// caller goes on reading.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Vec<Event>> {
        let len = nix::unistd::read(&self.0, buffer)?;
        Ok(parse(&buffer[..len]).map(own).collect())
    }

    /// Takes at most `most` waiting events, which `journal` knows from the same moment on. To be
    /// followed by [`Journal::clear_landing`] when all of them are written down or answered.
    ///
    /// # Errors
    /// As [`Group::read`].
    pub fn take(&self, journal: &Journal, most: usize) -> io::Result<Vec<Event>> {
        let bytes = journal.land(self.0.as_fd(), most.saturating_mul(EVENT_BYTES))?;
        Ok(parse(&bytes).map(own).collect())
    }

    /// As [`Group::take`], one event after the other, and tells how many. Allocates nothing: `buffer` is used in
    /// between, and decides how many are taken.
    ///
    /// # Errors
    /// As [`Group::read`].
    pub fn take_each(&self, journal: &Journal, buffer: &mut [u8], visit: &mut dyn FnMut(Event)) -> io::Result<usize> {
        let len = journal.land_in(self.0.as_fd(), buffer)?;
        Ok(parse(&buffer[..len]).map(own).map(visit).count())
    }

    /// Answers the event that came with `file`.
    ///
    /// # Errors
    /// `ENOENT` if no event with this number waits any more, for instance because its reader was
    /// killed.
    pub fn answer(&self, file: BorrowedFd<'_>, answer: Answer) -> io::Result<()> {
        self.answer_number(file.as_raw_fd(), answer)
    }

    /// Answers an event by the bare number of its descriptor, which need not be open here: the
    /// kernel only compares the number. For events that a dead process had read.
    pub fn answer_number(&self, number: i32, answer: Answer) -> io::Result<()> {
        let response = Response { fd: number, response: encode(answer) };
        match nix::unistd::write(&self.0, response.as_bytes()) {
            Ok(_) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Group {
    /// Wraps a group that another process created.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

/// The kernel accepts only these errnos in a denial; with any other the event stays unanswered.
fn encode(answer: Answer) -> u32 {
    match answer {
        Answer::Allow => FAN_ALLOW,
        Answer::Deny(errno) => {
            let accepted =
                [libc::EPERM, libc::EIO, libc::EBUSY, libc::ETXTBSY, libc::EAGAIN, libc::ENOSPC, libc::EDQUOT];
            let errno = if accepted.contains(&errno) { errno } else { libc::EIO };
            FAN_DENY | errno.cast_unsigned() << 24
        }
    }
}

/// Takes over the descriptor that the kernel has just installed.
fn own(event: RawEvent) -> Event {
    Event {
        // SAFETY: the kernel installed this descriptor in our table for this event, and each event
        // is delivered to exactly one read, whose bytes the callers have just got.
        file: if event.fd >= 0 { Ok(unsafe { OwnedFd::from_raw_fd(event.fd) }) } else { Err(-event.fd) },
        pid: event.pid,
        range: event.range,
        overflow: event.mask & FAN_Q_OVERFLOW != 0,
    }
}

/// Numbers and ranges of the events in `bytes` that wait for an answer, without touching any
/// descriptor: they are those of a process that is gone.
pub(super) fn records(bytes: &[u8]) -> impl Iterator<Item = (i32, Option<ByteRange>)> + '_ {
    parse(bytes).filter(|event| event.fd >= 0).map(|event| (event.fd, event.range))
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Response {
    fd: i32,
    response: u32,
}

#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C, packed)]
struct Metadata {
    event_len: u32,
    vers: u8,
    reserved: u8,
    metadata_len: u16,
    mask: u64,
    fd: i32,
    pid: i32,
}

#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C, packed)]
struct RangeRecord {
    info_type: u8,
    pad: u8,
    len: u16,
    pad2: u32,
    offset: u64,
    count: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct RawEvent {
    fd: i32,
    pid: i32,
    mask: u64,
    range: Option<ByteRange>,
}

/// Splits what the kernel wrote into events. Stops at the first record that does not fit.
fn parse(mut bytes: &[u8]) -> impl Iterator<Item = RawEvent> + '_ {
    std::iter::from_fn(move || {
        let (head, _) = Metadata::read_from_prefix(bytes).ok()?;
        let len = head.event_len as usize;
        if len < size_of::<Metadata>() || len > bytes.len() {
            bytes = &[];
            return None;
        }
        let (event, rest) = bytes.split_at(len);
        let records = event.get(usize::from(head.metadata_len)..).unwrap_or_default();
        bytes = rest;
        Some(RawEvent { fd: head.fd, pid: head.pid, mask: head.mask, range: find_range(records) })
    })
}

fn find_range(mut records: &[u8]) -> Option<ByteRange> {
    while let [info_type, _, low, high, ..] = *records {
        let len = usize::from(u16::from_ne_bytes([low, high]));
        if len < 4 || len > records.len() {
            return None;
        }
        if info_type == INFO_TYPE_RANGE {
            let (record, _) = RangeRecord::read_from_prefix(&records[..len]).ok()?;
            return ByteRange::at(record.offset, record.count);
        }
        records = &records[len..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(fd: i32, range: Option<(u64, u64)>) -> Vec<u8> {
        let record = range.map(|(offset, count)| {
            let mut record = vec![INFO_TYPE_RANGE, 0, 24, 0, 0, 0, 0, 0];
            record.extend(offset.to_ne_bytes());
            record.extend(count.to_ne_bytes());
            record
        });
        let record = record.unwrap_or_default();
        let mut out = u32::try_from(24 + record.len()).unwrap().to_ne_bytes().to_vec();
        out.extend([3, 0, 24, 0]);
        out.extend(FAN_PRE_ACCESS.to_ne_bytes());
        out.extend(fd.to_ne_bytes());
        out.extend(77i32.to_ne_bytes());
        out.extend(record);
        out
    }

    #[test]
    fn several_events_in_one_read_are_told_apart() {
        let bytes = [event(5, Some((4096, 8192))), event(6, None), event(-30, Some((0, 1)))].concat();

        let events: Vec<_> = parse(&bytes).collect();

        assert_eq!(events.iter().map(|e| e.fd).collect::<Vec<_>>(), [5, 6, -30]);
        assert_eq!(events[0].range, ByteRange::at(4096, 8192));
        assert_eq!(events[1].range, None);
        assert_eq!(events[0].pid, 77);
    }

    #[test]
    fn damaged_bytes_end_the_list_without_a_panic() {
        let bytes = [event(5, Some((0, 4096))), event(6, Some((0, 4096)))].concat();
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).count() <= 1);
        }
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[at] ^= flip;
                parse(&bad).for_each(drop);
            }
        }
    }

    #[test]
    fn an_errno_the_kernel_would_refuse_becomes_eio() {
        assert_eq!(encode(Answer::Allow), 1);
        assert_eq!(encode(Answer::Deny(libc::ENOSPC)), 2 | 28 << 24);
        assert_eq!(encode(Answer::Deny(libc::ETIMEDOUT)), 2 | 5 << 24);
    }
}
