//! Learns when a superblock is gone for good.
//!
//! A successful unmount says little: a container's mount namespace may hold a clone of the mount,
//! and an open file keeps a lazily unmounted tree alive. Letting go of a device then would show
//! its readers zeros. An inotify watch on the root does not pin the mount, and the kernel reports
//! `IN_UNMOUNT` for it exactly when the superblock is shut down, whoever unmounted it.

use std::collections::HashSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::fs::inotify;

use crate::sys::files::file_system_of;
use crate::sys::inotify::{Watched, each_watch};

/// Watches superblocks. One thread calls [`MountWatch::wait`]; any thread may add.
#[derive(Debug)]
pub struct MountWatch {
    instance: Arc<OwnedFd>,
    stop: EventFd,
    watched: Mutex<HashSet<WatchId>>,
}

/// Names one watched superblock, for every process that has the instance.
pub type WatchId = Watched;

impl MountWatch {
    /// Creates a watch on nothing.
    pub fn new() -> io::Result<Self> {
        Self::of(inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?)
    }

    /// Goes on with an instance of another process, which has ended. Nothing counts as watched until
    /// it is [adopted](MountWatch::adopt).
    pub fn of(instance: OwnedFd) -> io::Result<Self> {
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { instance: Arc::new(instance), stop, watched: Mutex::default() })
    }

    /// The instance, to be held by other processes as well.
    pub fn instance(&self) -> &Arc<OwnedFd> {
        &self.instance
    }

    /// Everything the instance watches, as the kernel says: superblocks that live.
    pub fn living(&self) -> io::Result<HashSet<WatchId>> {
        let mut living = HashSet::new();
        each_watch(self.instance.as_fd(), &mut |watched| {
            living.insert(watched);
        })?;
        Ok(living)
    }

    /// Counts `id`, which the instance watches already, from now on.
    pub fn adopt(&self, id: WatchId) {
        self.watched.lock().unwrap().insert(id);
    }

    /// Starts watching the superblock of `mount`, an open mount or its root. May ask the server of its file system.
    pub fn add(&self, mount: &impl AsFd) -> io::Result<WatchId> {
        let root = PathBuf::from(format!("/proc/thread-self/fd/{}", mount.as_fd().as_raw_fd()));
        let device = file_system_of(mount)?;
        // Some event must be asked for; attributes of a read-only root never change.
        let number = inotify::add_watch(&self.instance, &root, inotify::WatchFlags::ATTRIB)?;
        let id = Watched { number, device };
        self.watched.lock().unwrap().insert(id);
        Ok(id)
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
                PollFd::new(self.instance.as_fd(), PollFlags::POLLIN),
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
    fn gone(&self) -> io::Result<Vec<WatchId>> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.instance, &mut space);
        let ended = inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED;
        let mut gone = Vec::new();
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::AGAIN) => return Ok(gone),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            if event.events().intersects(ended) {
                let mut watched = self.watched.lock().unwrap();
                gone.extend(watched.extract_if(|id| id.number == event.wd()));
            }
        }
    }

    /// Ends [`MountWatch::wait`].
    pub fn stop(&self) {
        // The counter cannot overflow from a handful of stops, and a full one wakes as well.
        let _ = self.stop.write(1);
    }
}
