//! Learns when a superblock is gone for good.
//!
//! A successful unmount says little: a container's mount namespace may hold a clone of the mount,
//! and an open file keeps a lazily unmounted tree alive. Letting go of a device then would show
//! its readers zeros. An inotify watch on the root does not pin the mount, and the kernel reports
//! `IN_UNMOUNT` for it exactly when the superblock is shut down, whoever unmounted it.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::sys::mount::DetachedMount;

/// Watches superblocks. One thread calls [`MountWatch::wait`]; any thread may add.
#[derive(Debug)]
pub struct MountWatch {
    inotify: Inotify,
    stop: EventFd,
    watched: Mutex<HashSet<WatchId>>,
}

/// Names one watched superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(WatchDescriptor);

impl MountWatch {
    /// Creates a watch on nothing.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { inotify, stop, watched: Mutex::default() })
    }

    /// Starts watching the superblock of `mount`.
    pub fn add(&self, mount: &DetachedMount) -> io::Result<WatchId> {
        let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_fd().as_raw_fd()));
        self.add_path(&root)
    }

    /// Starts watching the superblock of what is mounted at `target`.
    pub fn add_path(&self, target: &Path) -> io::Result<WatchId> {
        // Some event must be asked for; attributes of a read-only root never change.
        let id = WatchId(self.inotify.add_watch(target, AddWatchFlags::IN_ATTRIB)?);
        self.watched.lock().unwrap().insert(id);
        Ok(id)
    }

    /// How many superblocks are still alive.
    pub fn alive(&self) -> usize {
        self.watched.lock().unwrap().len()
    }

    /// Whether the superblock is still alive.
    pub fn is_alive(&self, id: WatchId) -> bool {
        self.watched.lock().unwrap().contains(&id)
    }

    /// Sleeps until superblocks have gone and names them; `None` once [`MountWatch::stop`] was
    /// called.
    pub fn wait(&self) -> io::Result<Option<Vec<WatchId>>> {
        loop {
            let mut fds = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let gone = self.gone()?;
            if !gone.is_empty() {
                return Ok(Some(gone));
            }
            if self.stop.read().is_ok() {
                return Ok(None);
            }
        }
    }

    /// Names superblocks that have gone since the last look. Does not wait.
    pub fn gone(&self) -> io::Result<Vec<WatchId>> {
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EAGAIN) => return Ok(Vec::new()),
            Err(errno) => return Err(errno.into()),
        };
        let mut watched = self.watched.lock().unwrap();
        let ended = AddWatchFlags::IN_UNMOUNT | AddWatchFlags::IN_IGNORED;
        Ok(events
            .into_iter()
            .filter(|event| event.mask.intersects(ended))
            .map(|event| WatchId(event.wd))
            .filter(|id| watched.remove(id))
            .collect())
    }

    /// Becomes readable when [`MountWatch::gone`] has something to say.
    pub fn as_poll(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Ends [`MountWatch::wait`].
    pub fn stop(&self) {
        // The counter cannot overflow from a handful of stops, and a full one wakes as well.
        let _ = self.stop.write(1);
    }
}
