use std::io;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::Connection;
use super::reply::{self, ReplyHead};
use super::wire::RESENT;
use crate::sys::faultpoint;
use crate::sys::fuseslots;
use crate::sys::requestlog::{RequestLog, Slot};

/// The duty to answer one request. Dropping it, as a panic would, answers with `EIO`.
///
/// Once the connection is [frozen](Connection::freeze) nobody is answered here: the request is left to a
/// successor.
#[derive(Debug)]
pub(super) struct Duty {
    connection: Arc<Connection>,
    unique: u64,
    is_open: bool,
    /// Whether a process that died had taken the request.
    is_old: bool,
    /// Where a successor would find it, if the kernel does not send it again.
    slot: Option<Slot>,
    /// Where it lies, if it came over a ring. The answer goes there.
    ring: Option<fuseslots::Slot>,
}

impl Duty {
    pub(super) fn new(connection: Arc<Connection>, unique: u64) -> Self {
        Self { connection, unique, is_open: true, is_old: unique & RESENT != 0, slot: None, ring: None }
    }

    /// That of a request which a process that died had taken, and perhaps written down.
    pub(super) fn old(connection: Arc<Connection>, unique: u64, slot: Option<Slot>) -> Self {
        Self { connection, unique, is_open: true, is_old: true, slot, ring: None }
    }

    /// That of a request which lies in a slot of a ring.
    pub(super) fn in_slot(connection: Arc<Connection>, slot: fuseslots::Slot, is_old: bool) -> Self {
        Self { connection, unique: slot.unique(), is_open: true, is_old, slot: None, ring: Some(slot) }
    }

    /// Room for the body of the answer, where there is some at the place that it goes to.
    pub(super) fn room(&mut self) -> Option<&mut [u8]> {
        self.ring.as_mut().map(fuseslots::Slot::room)
    }

    /// Answers with the first `len` bytes of the [room](Duty::room).
    pub(super) fn answer_in_room(mut self, len: usize) {
        self.give_slot(reply::head(self.unique, len), len);
    }

    /// Has the request, which `bytes` are, written down until it is answered. `false` if there is no room.
    pub(super) fn write_down(&mut self, log: &RequestLog, bytes: &[u8]) -> bool {
        self.slot = self.slot.take().or_else(|| log.write(bytes));
        self.slot.is_some()
    }

    /// What the kernel calls the request.
    pub(super) fn unique(&self) -> u64 {
        self.unique
    }

    /// Whether a process that died had taken it: the kernel has sent it again, or it was written down.
    pub(super) fn is_old(&self) -> bool {
        self.is_old
    }

    /// Answers with `body`.
    pub(super) fn answer(mut self, body: &(impl IntoBytes + zerocopy::Immutable + ?Sized)) {
        let body = body.as_bytes();
        let head = reply::head(self.unique, body.len());
        let mut whole = Vec::with_capacity(reply::HEAD + body.len());
        whole.extend_from_slice(head.as_bytes());
        whole.extend_from_slice(body);
        self.give(&whole);
    }

    /// Answers with what lies in `whole` behind room for the head.
    pub(super) fn answer_in_place(mut self, whole: &mut [u8]) {
        let head = reply::head(self.unique, whole.len() - reply::HEAD);
        whole[..reply::HEAD].copy_from_slice(head.as_bytes());
        self.give(whole);
    }

    /// Answers with an error.
    pub(super) fn fail(mut self, errno: i32) {
        self.give(reply::failure(self.unique, errno).as_bytes());
    }

    /// Gives the slot up, with an answer whose body of `len` bytes is in it.
    fn give_slot(&mut self, head: ReplyHead, len: usize) {
        self.is_open = false;
        if let Some(slot) = self.ring.take() {
            self.connection.commit(slot, head, len);
        }
    }

    fn give_to_slot(&mut self, answer: &[u8]) {
        let Ok((head, body)) = ReplyHead::read_from_prefix(answer) else { return };
        let room = self.room().and_then(|room| room.get_mut(..body.len()));
        match room {
            Some(room) => room.copy_from_slice(body),
            None => {
                tracing::error!(len = body.len(), "an answer is longer than its slot; failing its reader");
                return self.give_slot(reply::failure(self.unique, libc::EIO), 0);
            }
        }
        self.give_slot(head, body.len());
    }

    fn give(&mut self, answer: &[u8]) {
        if self.ring.is_some() {
            return self.give_to_slot(answer);
        }
        self.is_open = false;
        self.deliver(answer);
        faultpoint::reach("answered");
        // What is left to a successor must stay to be found.
        if let Some(slot) = self.slot.take().filter(|_| !self.connection.is_frozen())
            && let Some(log) = self.connection.log_of_requests()
        {
            log.strike_out(slot);
        }
    }

    fn deliver(&self, answer: &[u8]) {
        let Err(error) = self.connection.write(answer) else { return };
        if is_over(&error) {
            return;
        }
        tracing::error!(%error, "the kernel did not take an answer; failing its reader");
        if let Err(error) = self.connection.write(reply::failure(self.unique, libc::EIO).as_bytes())
            && !is_over(&error)
        {
            tracing::error!(%error, "a reader stays blocked");
        }
    }
}

/// Whether nobody waits for the answer any more: the reader was killed, or the connection has ended.
fn is_over(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ECONNABORTED | libc::EPERM))
}

impl Drop for Duty {
    fn drop(&mut self) {
        if self.is_open {
            self.give(reply::failure(self.unique, libc::EIO).as_bytes());
        }
        self.connection.note_end();
    }
}
