use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, RwLock};

use crate::base::ByteRange;
use crate::sys::fanotify::{Answer, Group};
use crate::sys::faultpoint;
use crate::sys::files::InodeId;
use crate::sys::journal::Journal;

/// The group, and the memory of what was taken from it.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) group: Group,
    pub(super) journal: Journal,
    /// Set when a successor is to give the answers. Held for reading while one is given.
    pub(super) frozen: RwLock<bool>,
}

impl Desk {
    /// Writes an event down for a successor. `false` if there is no room for its number.
    pub(super) fn write_down(&self, permission: &Permission, file: Option<InodeId>, range: ByteRange) -> bool {
        self.journal.write(permission.file().as_raw_fd(), file, range)
    }
}

/// Takes answers to events: the desk, or a test in its place.
pub(super) trait Respond: fmt::Debug + Send + Sync {
    /// Gives the answer to the event that the number of `file` names, and forgets the event.
    fn respond(&self, file: BorrowedFd<'_>, answer: Answer);
}

impl Respond for Desk {
    fn respond(&self, file: BorrowedFd<'_>, answer: Answer) {
        let frozen = self.frozen.read().unwrap();
        if *frozen {
            return;
        }
        deliver(|answer| self.group.answer(file, answer), answer);
        faultpoint::reach("answered");
        // Before the number is free: the next event may have it.
        self.journal.clear(file.as_raw_fd());
    }
}

/// Brings an answer to the kernel. If it does not take it, a plain denial is the last thing it could
/// still take.
pub(super) fn deliver(kernel: impl Fn(Answer) -> io::Result<()>, answer: Answer) {
    match kernel(answer) {
        Ok(()) => {}
        // The reader was killed while it waited, or had its answer from a process that died.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
        Err(error) => {
            tracing::error!(%error, "the kernel did not take an answer; denying the reader");
            if let Err(error) = kernel(Answer::Deny(libc::EIO)) {
                tracing::error!(%error, "a reader stays blocked");
            }
        }
    }
}

/// The duty to answer one reader. Dropping it, as a panic would, denies with `EIO`.
#[derive(Debug)]
pub(super) struct Permission {
    desk: Arc<dyn Respond>,
    /// Its *number* names the event. Of an event that this process took, it is the file being read;
    /// of one that a dead process took, it only keeps the number from being given to another one.
    file: Option<OwnedFd>,
    is_adopted: bool,
}

impl Permission {
    pub(super) fn new(desk: Arc<dyn Respond>, file: OwnedFd) -> Self {
        Self { desk, file: Some(file), is_adopted: false }
    }

    /// The duty that a dead process had.
    pub(super) fn adopt(desk: Arc<dyn Respond>, number: OwnedFd) -> Self {
        Self { desk, file: Some(number), is_adopted: true }
    }

    /// Whether it was a dead process that took the event.
    pub(super) fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// The event's descriptor.
    pub(super) fn file(&self) -> &OwnedFd {
        self.file.as_ref().expect("present until answered")
    }

    /// Answers the reader.
    pub(super) fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        let Some(file) = self.file.take() else { return };
        self.desk.respond(file.as_fd(), answer);
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        self.give(Answer::Deny(libc::EIO));
    }
}
