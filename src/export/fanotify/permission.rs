use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::sys::fanotify::{Answer, Group};

/// Takes answers to events: the kernel, or a test in its place.
pub(super) trait Respond: fmt::Debug + Send + Sync {
    /// As [`Group::answer`].
    fn respond(&self, file: BorrowedFd<'_>, answer: Answer) -> io::Result<()>;
}

impl Respond for Group {
    fn respond(&self, file: BorrowedFd<'_>, answer: Answer) -> io::Result<()> {
        self.answer(file, answer)
    }
}

/// The duty to answer one reader. Dropping it, as a panic would, denies with `EIO`.
#[derive(Debug)]
pub(super) struct Permission {
    group: Arc<dyn Respond>,
    /// The event's descriptor: names the event, and pins the file until it is answered.
    file: Option<OwnedFd>,
}

impl Permission {
    pub(super) fn new(group: Arc<dyn Respond>, file: OwnedFd) -> Self {
        Self { group, file: Some(file) }
    }

    /// The file that the reader reads.
    pub(super) fn file(&self) -> &OwnedFd {
        self.file.as_ref().expect("present until answered")
    }

    /// Answers the reader.
    pub(super) fn answer(mut self, answer: Answer) {
        self.give(answer);
    }

    fn give(&mut self, answer: Answer) {
        let Some(file) = self.file.take() else { return };
        match self.group.respond(file.as_fd(), answer) {
            Ok(()) => {}
            // The reader was killed while it waited.
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => {}
            Err(e) => give_up(&*self.group, &file, &e),
        }
    }
}

/// The kernel did not take an answer; a plain denial is the last thing it could still take.
fn give_up(group: &dyn Respond, file: &OwnedFd, error: &io::Error) {
    tracing::error!(%error, "the kernel did not take an answer; denying the reader");
    if let Err(error) = group.respond(file.as_fd(), Answer::Deny(libc::EIO)) {
        tracing::error!(%error, "a reader stays blocked");
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        self.give(Answer::Deny(libc::EIO));
    }
}
