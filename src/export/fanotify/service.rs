use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::permission::{Desk, Permission};
use crate::base::{BLOCK, ByteRange, Chain, Class};
use crate::cache::{FillError, Request};
use crate::export::limiter::{Limiter, Told};
use crate::export::pulse::Pulse;
use crate::export::{AttachError, Backing, Custody};
use crate::sys::fanotify::{Answer, Event, Group};
use crate::sys::faultpoint;
use crate::sys::files::{InodeId, inode_id};
use crate::sys::journal::Journal;
use crate::sys::process::descriptor_limit;
use crate::telemetry::{Answer as Answered, Backend, Reads, Telemetry};

/// Most events that wait for data at once, whatever the limit of descriptors.
const MOST_WAITING: usize = 16 << 10;

/// Longest range of one event that is served, in bytes: far above any read-ahead window.
const MAX_RANGE: u64 = 64 << 20;

/// How long the event thread waits when as many events wait for data as may.
const FULL: Duration = Duration::from_millis(5);

/// The one pre-content group and the devices marked in it.
pub struct Fanotify {
    pub(super) desk: Arc<Desk>,
    custody: Arc<dyn Custody>,
    /// Most events that wait for data at once. More wait in the kernel, which costs no descriptors.
    capacity: usize,
    pulse: Pulse,
    /// Read by the event thread for every event, written only when a device comes or goes.
    pub(super) marked: RwLock<HashMap<InodeId, Arc<Marked>>>,
    /// Serialises changes of marks; never taken by the event thread.
    changing: Mutex<()>,
    /// See [`Fanotify::keep_marks`].
    keeps_marks: AtomicBool,
    /// Held while an image is attached: two probes of one device would take each other's events.
    pub(super) attaching: Mutex<()>,
    pub(super) telemetry: Telemetry,
    /// For what concerns no device.
    log: Limiter,
}

/// A device with its mark.
pub(super) struct Marked {
    id: InodeId,
    pub(super) device: Arc<dyn Backing>,
    path: PathBuf,
    /// Opened before the mark; names the inode to the kernel.
    file: Arc<File>,
    users: Mutex<usize>,
    pub(super) is_marked: AtomicBool,
    /// Set while this process itself reads a cold byte to see whether events arrive.
    probing: AtomicBool,
    probe_seen: AtomicBool,
    log: Limiter,
}

/// An event that this process has to answer.
struct Taken {
    permission: Permission,
    file: InodeId,
    range: ByteRange,
    pid: i32,
}

/// One mount's share in a marked device. Releasing the last share takes the mark away.
///
/// Merely dropping it does not: a process that unwinds or exits while its mounts live on must
/// leave their readers asking, not reading holes.
#[must_use]
pub(super) struct MarkHold {
    service: Arc<Fanotify>,
    marked: Arc<Marked>,
}

impl fmt::Debug for Fanotify {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fanotify").field("desk", &self.desk).finish_non_exhaustive()
    }
}

impl fmt::Debug for MarkHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MarkHold").field(&self.marked.path).finish()
    }
}

impl Fanotify {
    /// A service over `group`, whose events are written down in `journal` and whose reads `telemetry`
    /// counts. The files of devices are in the hands of `custody` as long as they are marked.
    pub fn new(
        group: Group,
        journal: Journal,
        custody: Arc<dyn Custody>,
        telemetry: Telemetry,
    ) -> io::Result<Arc<Self>> {
        // Half of all descriptors, so that there are enough left for images and sources.
        let capacity = usize::try_from(descriptor_limit()? / 2).unwrap_or(MOST_WAITING).min(MOST_WAITING);
        Ok(Arc::new(Self {
            desk: Arc::new(Desk { group, journal, frozen: RwLock::new(false) }),
            custody,
            capacity,
            pulse: Pulse::new()?,
            marked: RwLock::default(),
            changing: Mutex::default(),
            keeps_marks: AtomicBool::new(false),
            attaching: Mutex::default(),
            telemetry,
            log: Limiter::new(),
        }))
    }

    /// Answers events until [`Fanotify::stop`]. The thread that calls this waits for nothing else:
    /// hits are answered at once, misses by whoever completes the fill.
    pub fn run(&self) -> io::Result<()> {
        loop {
            let Desk { group, journal, .. } = &*self.desk;
            let room = self.capacity.saturating_sub(journal.outstanding());
            let mut fds =
                [PollFd::new(self.pulse.as_fd(), PollFlags::POLLIN), PollFd::new(group.as_fd(), PollFlags::POLLIN)];
            let (fds, timeout) = if room > 0 {
                (&mut fds[..], PollTimeout::NONE)
            } else {
                (&mut fds[..1], PollTimeout::try_from(FULL).unwrap_or(PollTimeout::ZERO))
            };
            match poll(fds, timeout) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.pulse.beat() {
                return Ok(());
            }
            if room == 0 {
                continue;
            }
            match group.take(journal, room) {
                Ok(events) => self.handle_batch(events),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // It concerns one event, which the kernel has denied; the others must go on.
                Err(error) => tracing::error!(%error, "an event was lost and its reader denied"),
            }
        }
    }

    /// All events of a batch are written down before the first is worked on.
    fn handle_batch(&self, events: Vec<Event>) {
        faultpoint::reach("taken");
        let known: Vec<_> = events.into_iter().filter_map(|event| self.write_down(event)).collect();
        faultpoint::reach("written-down");
        self.desk.journal.clear_landing();
        for taken in known {
            // A bug met by one event must not leave every other reader of the host without answers.
            // The permission inside denies when unwinding drops it.
            if catch_unwind(AssertUnwindSafe(|| self.handle(taken))).is_err() {
                tracing::error!("an event could not be handled and its reader was denied");
            }
        }
    }

    /// Ends [`Fanotify::run`]. Readers of marked files then wait until the group is read again or
    /// closed.
    pub fn stop(&self) {
        self.pulse.stop();
    }

    /// Whether the thread that answers comes round within this time. Blocks.
    pub fn is_responsive(&self, within: Duration) -> bool {
        self.pulse.is_felt(within)
    }

    /// Events answered at once and events that had to wait for data, since the start.
    pub fn counts(&self) -> (u64, u64) {
        let reads = self.reads();
        let count = |answer| reads.answered.at(answer).get();
        let waiting = u64::try_from(reads.waiting.get()).unwrap_or(0);
        (count(Answered::AtOnce), count(Answered::Filled) + count(Answered::Denied) + waiting)
    }

    fn reads(&self) -> &Reads {
        self.telemetry.reads.at(Backend::Fanotify)
    }

    /// Makes a duty of an event, known to a successor. `None` if it was denied, or cannot be answered.
    fn write_down(&self, event: Event) -> Option<Taken> {
        if event.overflow {
            tracing::error!("the event queue ran over: reads went through unasked, data may be wrong");
            return None;
        }
        let file = match event.file {
            Ok(file) => file,
            Err(errno) => {
                tracing::error!(errno, "the kernel could not open the file of an event and denied its reader");
                return None;
            }
        };
        let permission = Permission::new(self.desk.clone(), file);
        let (Ok(file), Some(range)) = (inode_id(permission.file()), event.range) else {
            let request = self.telemetry.next_request().number();
            tracing::error!(request, pid = event.pid, "an event names no file or range; denied");
            self.deny(permission);
            return None;
        };
        if !self.desk.write_down(&permission, Some(file), range) {
            let request = self.telemetry.next_request().number();
            tracing::error!(request, "too many files are open in this process to write an event down; denied");
            self.deny(permission);
            return None;
        }
        Some(Taken { permission, file, range, pid: event.pid })
    }

    fn handle(&self, taken: Taken) {
        let Taken { permission, file, range, pid } = taken;
        let Some(marked) = self.marked.read().unwrap().get(&file).cloned() else {
            if let Some(held_back) = self.log.admit(Instant::now()) {
                let request = self.telemetry.next_request().number();
                tracing::error!(request, pid, held_back, "a file of no image that is served is read; denied");
            }
            return self.deny(permission);
        };
        if pid.cast_unsigned() == std::process::id() && marked.probing.load(Ordering::Acquire) {
            marked.probe_seen.store(true, Ordering::Release);
            return permission.answer(Answer::Deny(libc::EIO));
        }
        self.serve(marked, range, pid, permission);
    }

    /// Denies a reader that asked for nothing that could be fetched.
    pub(super) fn deny(&self, permission: Permission) {
        self.telemetry.note_answer(Backend::Fanotify, Answered::Denied, permission.is_adopted());
        permission.answer(Answer::Deny(libc::EIO));
    }

    /// With the lock on changes held.
    fn drop_if_unused(&self, marked: &Marked) {
        if *marked.users.lock().unwrap() == 0 && !self.keeps_marks.load(Ordering::Acquire) {
            self.unmark(marked);
            self.marked.write().unwrap().remove(&marked.id);
            self.custody.release(marked.id);
        }
    }

    /// Whether marks stay although no image that is known uses them: a superblock of which nobody
    /// knows what it reads lives on. When that ends, what nobody uses is let go.
    pub fn keep_marks(&self, keep: bool) {
        let _changing = self.changing.lock().unwrap();
        self.keeps_marks.store(keep, Ordering::Release);
        let all: Vec<_> = self.marked.read().unwrap().values().cloned().collect();
        all.iter().for_each(|marked| self.drop_if_unused(marked));
    }

    /// Whether an image that is known uses the file.
    pub fn serves(&self, id: InodeId) -> bool {
        self.marked.read().unwrap().contains_key(&id)
    }

    /// Takes the mark away from a file that a dead process had marked and no image uses.
    pub fn forget(&self, id: InodeId, file: impl AsFd) {
        let _changing = self.changing.lock().unwrap();
        if !self.marked.read().unwrap().contains_key(&id) {
            // It may not have come to marking it.
            let _ = self.desk.group.unmark(file.as_fd());
            self.custody.release(id);
        }
    }

    /// Answers nobody any more, so that whoever waits is left to a successor. Returns when no answer
    /// is under way.
    pub fn freeze(&self) {
        *self.desk.frozen.write().unwrap() = true;
    }

    /// Marks a file that no image is known for: whoever reads it is denied. Until it is forgotten, or
    /// an image that is known brings it.
    /// Tells whether it did.
    pub fn guard(&self, id: InodeId, file: BorrowedFd<'_>) -> io::Result<bool> {
        let _changing = self.changing.lock().unwrap();
        if self.marked.read().unwrap().contains_key(&id) {
            return Ok(false);
        }
        self.desk.group.mark(file).map(|()| true)
    }

    /// Events that wait for data.
    pub fn waiting(&self) -> usize {
        self.desk.journal.outstanding()
    }

    pub(super) fn serve(&self, marked: Arc<Marked>, range: ByteRange, pid: i32, permission: Permission) {
        let wanted = range.align_out(BLOCK).unwrap_or(range);
        if wanted.is_empty() || wanted.end() > marked.device.decoded_len() || wanted.len() > MAX_RANGE {
            // Not EROFS: it asks for what the image has, a read-ahead window at a time. A backup
            // of the cache must not fetch the image, nor see holes. Without a length it is somebody
            // who wants to cut the file off or to stretch it, by whatever descriptor; at the edge of no
            // page the kernel makes that a page, which looks like a read (`fsnotify_pre_content`).
            let request = self.telemetry.next_request().number();
            let path = marked.path.display();
            tracing::warn!(request, %path, pid, decoded = %wanted, "access to a cache file denied");
            return self.deny(permission);
        }
        if marked.device.present(wanted) {
            self.telemetry.note_answer(Backend::Fanotify, Answered::AtOnce, permission.is_adopted());
            permission.answer(Answer::Allow);
            return marked.device.touched(wanted);
        }
        let request = Request::new(self.telemetry.next_request(), Class::OnDemand);
        let waiting = self.telemetry.waiting_read(Backend::Fanotify, request.asked());
        let waiting = waiting.adopted(permission.is_adopted());
        let (asked, device) = (request.clone(), marked.device.clone());
        let there = device.clone();
        // A disk that failed in between may have taken it away again, and the kernel would read a hole.
        let lost = move || if there.present(wanted) { Ok(()) } else { Err(FillError::Lost { decoded: wanted }) };
        let done = Box::new(move |result: Result<(), FillError>| match result.and_then(|()| lost()) {
            Ok(()) => {
                permission.answer(Answer::Allow);
                waiting.answered(Answered::Filled);
            }
            Err(error) => {
                permission.answer(Answer::Deny(error.errno()));
                waiting.answered(Answered::Denied);
                marked.report(&error, wanted, pid, &asked);
            }
        });
        device.fill_for(request, wanted, done);
    }

    /// Makes sure that reads of `device` raise events, unless it is settled already.
    pub(super) fn mark(self: &Arc<Self>, device: &Arc<dyn Backing>) -> Result<MarkHold, AttachError> {
        let path = device.path().to_owned();
        let io = |cause| AttachError::Io { path: path.clone(), cause };
        let changing = self.changing.lock().unwrap();
        let file = device.file();
        let id = inode_id(&file).map_err(io)?;
        self.custody.hold(id, &file).map_err(AttachError::Unkept)?;
        let known = self.marked.read().unwrap().get(&id).cloned();
        let marked = known.unwrap_or_else(|| {
            Arc::new(Marked {
                id,
                device: device.clone(),
                path: path.clone(),
                file,
                users: Mutex::new(0),
                is_marked: AtomicBool::new(false),
                probing: AtomicBool::new(false),
                probe_seen: AtomicBool::new(false),
                log: Limiter::new(),
            })
        });
        // In the table before the mark: an event must find its device.
        self.marked.write().unwrap().insert(id, marked.clone());
        *marked.users.lock().unwrap() += 1;
        let hold = MarkHold { service: self.clone(), marked: marked.clone() };
        if marked.is_marked.load(Ordering::Acquire) {
            return Ok(hold);
        }
        if device.is_settled() {
            // A process that died just before it could do this itself.
            let _ = self.desk.group.unmark(marked.file.as_fd());
            return Ok(hold);
        }
        let outcome = self.desk.group.mark(marked.file.as_fd());
        marked.is_marked.store(outcome.is_ok(), Ordering::Release);
        // Both ways out below take the lock again: giving the share back, and a device that has
        // just settled and calls back at once.
        drop(changing);
        if let Err(cause) = outcome {
            hold.release();
            return Err(AttachError::Mark { path, cause });
        }
        self.unmark_when_settled(&marked);
        Ok(hold)
    }

    /// Another share in a device that is in the table.
    pub(super) fn share(self: &Arc<Self>, id: InodeId) -> Option<MarkHold> {
        let _changing = self.changing.lock().unwrap();
        let marked = self.marked.read().unwrap().get(&id).cloned()?;
        *marked.users.lock().unwrap() += 1;
        Some(MarkHold { service: Arc::clone(self), marked })
    }

    /// Not to be called with `changing` held: a device that is settled calls back at once.
    fn unmark_when_settled(self: &Arc<Self>, marked: &Arc<Marked>) {
        let (service, weak) = (Arc::downgrade(self), Arc::downgrade(marked));
        marked.device.when_settled(Box::new(move || settle(&service, &weak)));
    }

    fn unmark(&self, marked: &Marked) {
        if marked.is_marked.swap(false, Ordering::AcqRel)
            && let Err(error) = self.desk.group.unmark(marked.file.as_fd())
        {
            tracing::error!(path = %marked.path.display(), %error, "cannot take a mark away; reads stay slow");
        }
    }
}

/// The device needs us no more: from here on the kernel reads it alone, at native speed.
fn settle(service: &Weak<Fanotify>, marked: &Weak<Marked>) {
    let (Some(service), Some(marked)) = (service.upgrade(), marked.upgrade()) else { return };
    let changing = service.changing.lock().unwrap();
    // Since this was promised, another image may have made more of the blob reachable. Its mount
    // found the mark in place and relies on it.
    if !marked.device.is_settled() {
        drop(changing);
        return service.unmark_when_settled(&marked);
    }
    service.unmark(&marked);
    tracing::info!(path = %marked.path.display(), "complete and synced: the kernel reads it alone now");
}

impl Marked {
    fn report(&self, error: &FillError, range: ByteRange, pid: i32, asked: &Request) {
        if let Some(held_back) = self.log.admit(Instant::now()) {
            let path = self.path.display();
            let Told { request, class, queue_ms, service_ms } = Told::of(asked);
            tracing::warn!(
                request, error = %Chain(error), device = %path, decoded = %range, class, pid, queue_ms, service_ms,
                held_back, "read denied"
            );
        }
    }
}

impl MarkHold {
    /// Runs `read`, a read of a cold byte by this very process, and tells whether it raised an
    /// event. The event is denied, so the read fails and nothing is fetched.
    pub(super) fn expect_own_read(&self, read: impl FnOnce() -> io::Result<()>) -> bool {
        let marked = &self.marked;
        marked.probe_seen.store(false, Ordering::Release);
        marked.probing.store(true, Ordering::Release);
        let result = read();
        marked.probing.store(false, Ordering::Release);
        // Settled in between: nothing can be missing any more, so nothing can be missed.
        let seen = marked.probe_seen.load(Ordering::Acquire) && result.is_err();
        seen || marked.device.is_settled()
    }
}

impl MarkHold {
    /// Gives the share back. Only when nothing can read the device through the mount any more.
    pub(super) fn release(self) {
        let _changing = self.service.changing.lock().unwrap();
        *self.marked.users.lock().unwrap() -= 1;
        self.service.drop_if_unused(&self.marked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Completion;

    /// A device that is settled when the test says so.
    struct Scripted {
        path: PathBuf,
        file: Arc<File>,
        settled: AtomicBool,
        waiting: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
    }

    impl crate::cache::Fill for Scripted {
        fn decoded_len(&self) -> u64 {
            BLOCK
        }

        fn present(&self, _: ByteRange) -> bool {
            false
        }

        fn fill_for(&self, _: Request, _: ByteRange, done: Completion) {
            done(Err(FillError::Cancelled));
        }

        fn touched(&self, _: ByteRange) {}
    }

    impl Backing for Scripted {
        fn path(&self) -> &std::path::Path {
            &self.path
        }

        fn file(&self) -> Arc<File> {
            Arc::clone(&self.file)
        }

        fn is_settled(&self) -> bool {
            self.settled.load(Ordering::Acquire)
        }

        fn when_settled(&self, then: Box<dyn FnOnce() + Send>) {
            self.waiting.lock().unwrap().push(then);
        }
    }

    struct Nobody;

    impl Custody for Nobody {
        fn hold(&self, _: InodeId, _: &Arc<File>) -> io::Result<()> {
            Ok(())
        }

        fn release(&self, _: InodeId) {}
    }

    impl Scripted {
        fn tell(&self) {
            let waiting = std::mem::take(&mut *self.waiting.lock().unwrap());
            waiting.into_iter().for_each(|then| then());
        }
    }

    #[test]
    fn a_late_completion_leaves_the_mark_that_another_mount_relies_on() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("data");
        File::create(&path).unwrap().set_len(BLOCK).unwrap();
        let Ok(group) = Group::new() else { return eprintln!("skipped: no pre-content group can be made here") };
        let custody = Arc::new(Nobody);
        let service = Fanotify::new(group, Journal::create().unwrap(), custody, Telemetry::default()).unwrap();
        let file = Arc::new(File::open(&path).unwrap());
        let device = Arc::new(Scripted { path, file, settled: AtomicBool::new(false), waiting: Mutex::default() });
        let shared: Arc<dyn Backing> = device.clone();
        let first = match service.mark(&shared) {
            Err(AttachError::Mark { cause, .. }) => return eprintln!("skipped: no inode can be marked here: {cause}"),
            other => other.unwrap(),
        };

        // Complete, but before the news arrives another image makes more of the blob reachable.
        let second = service.mark(&shared).unwrap();
        device.tell();
        assert!(second.marked.is_marked.load(Ordering::Acquire), "the mark is needed");

        device.settled.store(true, Ordering::Release);
        device.tell();
        assert!(!second.marked.is_marked.load(Ordering::Acquire), "the promise was renewed, and kept");

        first.release();
        assert_eq!(service.marked.read().unwrap().len(), 1, "one mount still uses the device");
        second.release();
        assert!(service.marked.read().unwrap().is_empty());
    }
}
