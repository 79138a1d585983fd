//! Answering readers whose events a dead process had taken.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::permission::Permission;
use super::service::{Fanotify, Marked};
use crate::base::{BLOCK, ByteRange, Class};
use crate::cache::Request;
use crate::sys::fanotify::Answer;
use crate::sys::faultpoint;
use crate::sys::journal::Outstanding;
use crate::telemetry::{Answer as Answered, Backend, WaitingRead};

/// Most devices that an event of an unknown file may be about before it is denied: the range is
/// fetched for each of them.
const MOST_CANDIDATES: usize = 16;

impl Fanotify {
    /// Takes on the events that a dead process had taken. After all images that it had mounted were
    /// [adopted](Fanotify::adopt), and before [`Fanotify::run`].
    ///
    /// Each comes with a descriptor of the event's number, which keeps the kernel from giving the
    /// number to a new event; `None` if the number is taken by something else here, in which case
    /// the reader is denied at once.
    ///
    /// `all_served` says that every file that is marked belongs to an image that was adopted.
    pub fn resume(&self, events: Vec<(Outstanding, Option<OwnedFd>)>, all_served: bool) {
        let journal = &self.desk.journal;
        let mut known = Vec::new();
        for (event, number) in events {
            let Some(number) = number else {
                tracing::warn!(number = event.number, "an event of the last daemon cannot be taken over; denied");
                self.telemetry.note_answer(Backend::Fanotify, Answered::Denied, true);
                let _ = self.desk.group.answer_number(event.number, Answer::Deny(libc::EIO));
                journal.clear(event.number);
                continue;
            };
            let permission = Permission::adopt(self.desk.clone(), number);
            let Some(range) = event.range else {
                self.deny(permission);
                continue;
            };
            if self.desk.write_down(&permission, event.file, range) {
                known.push((permission, event.file, range));
            } else {
                self.deny(permission);
            }
        }
        journal.clear_landing();
        faultpoint::reach("adopting");
        for (permission, file, range) in known {
            match file {
                Some(file) => {
                    let marked = self.marked.read().unwrap().get(&file).cloned();
                    // What is in no image any more has no reader whom a denial would hurt.
                    match marked {
                        Some(marked) => self.serve(marked, range, 0, permission),
                        None => self.deny(permission),
                    }
                }
                None if all_served => self.serve_unknown(range, permission),
                // It may be about a file that nobody fills.
                None => self.deny(permission),
            }
        }
    }

    /// Serves a reader of whom only the range is known: its event had come out of the kernel and
    /// was not looked at before the process died. Right is what is right for every file it can be.
    fn serve_unknown(&self, range: ByteRange, permission: Permission) {
        // Without a length it is no reader: somebody wants to change the length of a file.
        let wanted = range.align_out(BLOCK).filter(|wanted| !wanted.is_empty());
        let Some(wanted) = wanted else { return self.deny(permission) };
        let candidates: Vec<Arc<Marked>> = {
            let marked = self.marked.read().unwrap();
            let can_be =
                |it: &&Arc<Marked>| it.is_marked.load(Ordering::Acquire) && wanted.end() <= it.device.decoded_len();
            marked.values().filter(can_be).cloned().collect()
        };
        if candidates.is_empty() || candidates.len() > MOST_CANDIDATES {
            tracing::warn!(candidates = candidates.len(), "an event of the last daemon names no file; denied");
            return self.deny(permission);
        }
        let request = Request::new(self.telemetry.next_request(), Class::OnDemand);
        let open = AtomicUsize::new(candidates.len());
        let waiting = Some(self.telemetry.waiting_read(Backend::Fanotify, request.asked()).adopted(true));
        let together = Arc::new(Together { open, permission: Some(permission), waiting });
        for marked in candidates {
            let share = together.clone();
            let done = move |result: Result<(), _>| {
                if result.is_ok() {
                    share.open.fetch_sub(1, Ordering::AcqRel);
                }
            };
            marked.device.fill_for(request.clone(), wanted, Box::new(done));
        }
    }
}

/// One permission for several fills: given when all of them have succeeded.
struct Together {
    /// Fills that have not succeeded yet.
    open: AtomicUsize,
    permission: Option<Permission>,
    /// Counted as denied unless it is told otherwise.
    waiting: Option<WaitingRead>,
}

impl Drop for Together {
    fn drop(&mut self) {
        let permission = self.permission.take().filter(|_| self.open.load(Ordering::Acquire) == 0);
        // Else it was dropped, and denied, by the filter.
        if let Some(permission) = permission {
            permission.answer(Answer::Allow);
            if let Some(waiting) = self.waiting.take() {
                waiting.answered(Answered::Filled);
            }
        }
    }
}
