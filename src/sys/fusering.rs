//! The ring of a thread that carries FUSE requests over io_uring (Linux 6.14).
//!
//! It can do nothing else: that is settled when it is made, and cannot be undone.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::fuseslots::{Content, Slot};

/// Commands that may be on their way to the kernel at once; more are handed over in several goes.
const COMMANDS: u32 = 256;
/// Completions that have room. The kernel keeps what has none.
const COMPLETIONS: u32 = 4096;

/// By which the bell is known among the slots.
const BELL: u64 = u64::MAX;

/// `enum fuse_uring_cmd`.
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// A ring of one thread, which carries slots of any number of connections. With each slot comes a `T`.
///
/// It can do nothing but this: commands to devices, and a wait for a bell.
pub struct Ring<T> {
    ring: IoUring<squeue::Entry128>,
    /// What the kernel has, by the number that it tells us with a completion.
    held: Vec<Option<Held<T>>>,
    free: Vec<usize>,
    bell: Option<OwnedFd>,
}

/// A slot that the kernel has. Its memory and its device stay as long.
struct Held<T> {
    slot: Slot,
    device: Arc<OwnedFd>,
    with: T,
}

/// What a ring tells.
#[derive(Debug)]
pub enum Event<T> {
    /// The bell was rung.
    Bell,
    /// A slot has a request.
    Request(Slot, T),
    /// The kernel gave a slot back without one.
    ///
    /// `ENOENT` if it knows of no request that the answer would be for; `ENOTCONN` or `ECONNABORTED` when the
    /// connection has ended.
    Refused(Slot, T, io::Error),
}

impl<T> std::fmt::Debug for Ring<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("held", &(self.held.len() - self.free.len())).finish_non_exhaustive()
    }
}

impl<T> Ring<T> {
    /// A ring that works once a thread has [enabled](Ring::enable) it.
    ///
    /// # Errors
    /// `ENOSYS`, `EPERM` where the kernel has no io_uring or this process may not use it; `EINVAL` before Linux 6.1.
    pub fn create() -> io::Result<Self> {
        let ring = IoUring::<squeue::Entry128>::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_clamp()
            .setup_cqsize(COMPLETIONS)
            .build(COMMANDS)?;
        let allowed = [opcode::UringCmd80::CODE, opcode::PollAdd::CODE].map(Restriction::sqe_op);
        ring.submitter().register_restrictions(&mut { allowed })?;
        Ok(Self { ring, held: Vec::new(), free: Vec::new(), bell: None })
    }

    /// Makes it the ring of the calling thread, which waits for `bell` to be readable as well.
    pub fn enable(&mut self, bell: OwnedFd) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()?;
        self.bell = Some(bell);
        self.listen()
    }

    fn listen(&mut self) -> io::Result<()> {
        let Some(bell) = &self.bell else { return Ok(()) };
        let events = u32::try_from(libc::POLLIN).expect("a small positive number");
        let entry = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), events).multi(true).build();
        self.push(entry.user_data(BELL).into())
    }

    /// Gives the kernel a new slot of a connection, to put a request there.
    pub fn register(&mut self, device: Arc<OwnedFd>, mut slot: Slot, with: T) -> io::Result<()> {
        slot.say(Content::Nothing);
        let vectors = slot.vectors().expose_provenance() as u64;
        self.command(REGISTER, Some(vectors), Held { slot, device, with })
    }

    /// Hands in the answer in a slot, and with it the slot.
    pub fn commit(&mut self, device: Arc<OwnedFd>, slot: Slot, with: T) -> io::Result<()> {
        self.command(COMMIT_AND_FETCH, None, Held { slot, device, with })
    }

    fn command(&mut self, what: u32, vectors: Option<u64>, held: Held<T>) -> io::Result<()> {
        // `struct fuse_uring_cmd_req`: flags, number, queue.
        let mut words = [0; 80];
        words[8..16].copy_from_slice(&held.slot.unique().to_ne_bytes());
        words[16..18].copy_from_slice(&held.slot.queue().to_ne_bytes());
        let fd = types::Fd(held.device.as_raw_fd());
        let mut entry = opcode::UringCmd80::new(fd, what).cmd(words).addr(vectors).build();
        if vectors.is_some() {
            set_len(&mut entry, 2);
        }
        let number = self.free.pop().unwrap_or(self.held.len());
        if number == self.held.len() {
            self.held.push(None);
        }
        self.held[number] = Some(held);
        self.push(entry.user_data(number as u64))
    }

    fn push(&mut self, entry: squeue::Entry128) -> io::Result<()> {
        while self.ring.submission().is_full() {
            match self.ring.submit() {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        // SAFETY: what the entry refers to is the descriptor of a device or of the bell, and memory of a slot; all
        // of them are in `self` until the entry has completed.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    /// Hands everything to the kernel and waits until there is an [event](Ring::event).
    pub fn wait(&mut self) -> io::Result<()> {
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            // Too many completions: they are taken now.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// What happened, if anything is left to tell.
    pub fn event(&mut self) -> io::Result<Option<Event<T>>> {
        let Some(entry) = self.ring.completion().next() else { return Ok(None) };
        if entry.user_data() == BELL {
            if !cqueue::more(entry.flags()) {
                self.listen()?;
            }
            return Ok(Some(Event::Bell));
        }
        let number = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
        let held = self.held.get_mut(number).and_then(Option::take);
        let Some(Held { slot, with, .. }) = held else { return Err(io::Error::other("the kernel gave back nothing")) };
        self.free.push(number);
        if entry.result() == 0 {
            slot.say(Content::Request);
            return Ok(Some(Event::Request(slot, with)));
        }
        Ok(Some(Event::Refused(slot, with, io::Error::from_raw_os_error(-entry.result()))))
    }

    /// What the kernel has, each with its queue.
    pub fn held(&self) -> impl Iterator<Item = (u16, &T)> {
        self.held.iter().flatten().map(|held| (held.slot.queue(), &held.with))
    }
}

/// Sets the length in an entry, which the crate has no way for with these commands.
fn set_len(entry: &mut squeue::Entry128, len: u32) {
    /// Where `struct io_uring_sqe` has it.
    const AT_LEN: usize = 24;
    const _: () = assert!(size_of::<squeue::Entry128>() == 128);
    // SAFETY: the entry is `struct io_uring_sqe` as the kernel knows it, of 128 bytes, in which a u32 is there.
    unsafe { std::ptr::from_mut(entry).cast::<u8>().add(AT_LEN).cast::<u32>().write(len) };
}
