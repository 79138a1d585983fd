use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::permission::Permission;
use crate::base::{BLOCK, ByteRange, Chain, Class};
use crate::cache::FillError;
use crate::export::limiter::Limiter;
use crate::export::{AttachError, Backing};
use crate::sys::fanotify::{Answer, EVENT_BUFFER, Event, Group};
use crate::sys::files::{InodeId, inode_id};

/// Longest range of one event that is served, in bytes: far above any read-ahead window.
const MAX_RANGE: u64 = 64 << 20;

/// The one pre-content group and the devices marked in it.
pub struct Fanotify {
    group: Arc<Group>,
    stop: EventFd,
    /// Read by the event thread for every event, written only when a device comes or goes.
    marked: RwLock<HashMap<InodeId, Arc<Marked>>>,
    /// Serialises changes of marks; never taken by the event thread.
    changing: Mutex<()>,
    /// Held while an image is attached: two probes of one device would take each other's events.
    pub(super) attaching: Mutex<()>,
    /// Events answered at once, and events that waited for a fill.
    hits: AtomicU64,
    misses: AtomicU64,
}

/// A device with its mark.
struct Marked {
    id: InodeId,
    device: Arc<dyn Backing>,
    path: PathBuf,
    /// Opened before the mark; names the inode to the kernel.
    file: File,
    users: Mutex<usize>,
    is_marked: AtomicBool,
    /// Set while this process itself reads a cold byte to see whether events arrive.
    probing: AtomicBool,
    probe_seen: AtomicBool,
    log: Limiter,
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
        f.debug_struct("Fanotify").field("group", &self.group).finish_non_exhaustive()
    }
}

impl fmt::Debug for MarkHold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MarkHold").field(&self.marked.path).finish()
    }
}

impl Fanotify {
    /// A service over `group`, with nothing marked yet.
    pub fn new(group: Arc<Group>) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            group,
            stop: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            marked: RwLock::default(),
            changing: Mutex::default(),
            attaching: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
        }))
    }

    /// Answers events until [`Fanotify::stop`]. The thread that calls this waits for nothing else:
    /// hits are answered at once, misses by whoever completes the fill.
    pub fn run(&self) -> io::Result<()> {
        let mut buffer = vec![0; EVENT_BUFFER];
        loop {
            let mut fds =
                [PollFd::new(self.group.as_fd(), PollFlags::POLLIN), PollFd::new(self.stop.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if self.stop.read().is_ok() {
                return Ok(());
            }
            match self.group.read(&mut buffer) {
                Ok(events) => events.into_iter().for_each(|event| self.handle_contained(event)),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                // It concerns one event, which the kernel has denied; the others must go on.
                Err(error) => tracing::error!(%error, "an event was lost and its reader denied"),
            }
        }
    }

    /// Ends [`Fanotify::run`]. Readers of marked files then wait until the group is read again or
    /// closed.
    pub fn stop(&self) {
        // The counter cannot overflow from a handful of stops, and a full one wakes as well.
        let _ = self.stop.write(1);
    }

    /// Events answered at once and events that had to wait for data, since the start.
    pub fn counts(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    fn handle_contained(&self, event: Event) {
        // A bug met by one event must not leave every other reader of the host without answers.
        // The permission inside denies when unwinding drops it.
        if catch_unwind(AssertUnwindSafe(|| self.handle(event))).is_err() {
            tracing::error!("an event could not be handled and its reader was denied");
        }
    }

    fn handle(&self, event: Event) {
        if event.overflow {
            tracing::error!("the event queue ran over: reads went through unasked, data may be wrong");
            return;
        }
        let file = match event.file {
            Ok(file) => file,
            Err(errno) => {
                tracing::error!(errno, "the kernel could not open the file of an event and denied its reader");
                return;
            }
        };
        let permission = Permission::new(self.group.clone(), file);
        let marked = inode_id(permission.file()).ok().and_then(|id| self.marked.read().unwrap().get(&id).cloned());
        let (Some(marked), Some(range)) = (marked, event.range) else {
            tracing::error!(pid = event.pid, "an event names no file or range of ours; denied");
            return permission.answer(Answer::Deny(libc::EIO));
        };
        if event.pid.cast_unsigned() == std::process::id() && marked.probing.load(Ordering::Acquire) {
            marked.probe_seen.store(true, Ordering::Release);
            return permission.answer(Answer::Deny(libc::EIO));
        }
        self.serve(marked, range, event.pid, permission);
    }

    fn serve(&self, marked: Arc<Marked>, range: ByteRange, pid: i32, permission: Permission) {
        let wanted = range.align_out(BLOCK).unwrap_or(range);
        if wanted.is_empty() || wanted.end() > marked.device.decoded_len() || wanted.len() > MAX_RANGE {
            // Not EROFS: it asks for what the image has, a read-ahead window at a time. A backup
            // of the cache must not fetch the image, nor see holes. Without a length it is somebody
            // who wants to cut the file off or to stretch it, by whatever descriptor.
            tracing::warn!(path = %marked.path.display(), pid, decoded = %wanted, "access to a cache file denied");
            return permission.answer(Answer::Deny(libc::EIO));
        }
        if marked.device.present(wanted) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            permission.answer(Answer::Allow);
            return marked.device.touched(wanted);
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let (asked, device) = (Instant::now(), marked.device.clone());
        let done = Box::new(move |result: Result<(), FillError>| match result {
            Ok(()) => permission.answer(Answer::Allow),
            Err(error) => {
                permission.answer(Answer::Deny(error.errno()));
                marked.report(&error, wanted, pid, asked);
            }
        });
        device.fill(wanted, Class::OnDemand, done);
    }

    /// Makes sure that reads of `device` raise events, unless it is settled already.
    pub(super) fn mark(self: &Arc<Self>, device: &Arc<dyn Backing>) -> Result<MarkHold, AttachError> {
        let path = device.path().to_owned();
        let io = |cause| AttachError::Io { path: path.clone(), cause };
        let changing = self.changing.lock().unwrap();
        let file = File::open(&path).map_err(io)?;
        let id = inode_id(&file).map_err(io)?;
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
        if marked.is_marked.load(Ordering::Acquire) || device.is_settled() {
            return Ok(hold);
        }
        let outcome = self.group.mark(marked.file.as_fd());
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

    /// Not to be called with `changing` held: a device that is settled calls back at once.
    fn unmark_when_settled(self: &Arc<Self>, marked: &Arc<Marked>) {
        let (service, weak) = (Arc::downgrade(self), Arc::downgrade(marked));
        marked.device.when_settled(Box::new(move || settle(&service, &weak)));
    }

    fn unmark(&self, marked: &Marked) {
        if marked.is_marked.swap(false, Ordering::AcqRel)
            && let Err(error) = self.group.unmark(marked.file.as_fd())
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
    fn report(&self, error: &FillError, range: ByteRange, pid: i32, asked: Instant) {
        if let Some(held_back) = self.log.admit(Instant::now()) {
            let ms = asked.elapsed().as_millis();
            let path = self.path.display();
            tracing::warn!(error = %Chain(error), device = %path, decoded = %range, pid, ms, held_back, "read denied");
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
        let mut users = self.marked.users.lock().unwrap();
        *users -= 1;
        if *users == 0 {
            self.service.unmark(&self.marked);
            self.service.marked.write().unwrap().remove(&self.marked.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Completion;

    /// A device that is settled when the test says so.
    struct Scripted {
        path: PathBuf,
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

        fn fill(&self, _: ByteRange, _: Class, done: Completion) {
            done(Err(FillError::Cancelled));
        }

        fn touched(&self, _: ByteRange) {}
    }

    impl Backing for Scripted {
        fn path(&self) -> &std::path::Path {
            &self.path
        }

        fn is_settled(&self) -> bool {
            self.settled.load(Ordering::Acquire)
        }

        fn when_settled(&self, then: Box<dyn FnOnce() + Send>) {
            self.waiting.lock().unwrap().push(then);
        }
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
        let service = Fanotify::new(Arc::new(group)).unwrap();
        let device = Arc::new(Scripted { path, settled: AtomicBool::new(false), waiting: Mutex::default() });
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
