use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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

/// The duty to answer one reader. Dropping it, as a panic would, denies with `EIO`.
#[derive(Debug)]
pub(super) struct Permission {
    desk: Arc<Desk>,
    /// Its *number* names the event. Of an event that this process took, it is the file being read;
    /// of one that a dead process took, it only keeps the number from being given to another one.
    file: Option<OwnedFd>,
    is_adopted: bool,
}

impl Permission {
    pub(super) fn new(desk: Arc<Desk>, file: OwnedFd) -> Self {
        Self { desk, file: Some(file), is_adopted: false }
    }

    /// The duty that a dead process had.
    pub(super) fn adopt(desk: Arc<Desk>, number: OwnedFd) -> Self {
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

    /// Writes it down for a successor. `false` if there is no room for its number.
    pub(super) fn write_down(&self, file: Option<InodeId>, range: ByteRange) -> bool {
        self.desk.journal.write(self.file().as_raw_fd(), file, range)
    }

    /// Answers the reader.
    pub(super) fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        let Some(file) = self.file.take() else { return };
        let frozen = self.desk.frozen.read().unwrap();
        if *frozen {
            return;
        }
        match self.desk.group.answer(file.as_fd(), answer) {
            Ok(()) => {}
            // The reader was killed while it waited, or had its answer from a process that died.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => give_up(&self.desk.group, &file, &e),
        }
        faultpoint::reach("answered");
        // Before the number is free: the next event may have it.
        self.desk.journal.clear(file.as_raw_fd());
    }
}

/// The kernel did not take an answer; a plain denial is the last thing it could still take.
fn give_up(group: &Group, file: &OwnedFd, error: &io::Error) {
    tracing::error!(%error, "the kernel did not take an answer; denying the reader");
    if let Err(error) = group.answer(file.as_fd(), Answer::Deny(libc::EIO)) {
        tracing::error!(%error, "a reader stays blocked");
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        self.give(Answer::Deny(libc::EIO));
    }
}
