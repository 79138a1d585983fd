//! Unmounting what this daemon has mounted, and nothing else: at a mount point somebody else may have done something
//! since.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};

use super::api::Unmounted;
use super::records::Record;
use super::served::Mounted;
use super::{Daemon, DaemonError};
use crate::export::{WatchId, fuse};
use crate::sys::descriptors::alone;
use crate::sys::files::file_system_of;
use crate::sys::fuse::FusermountError;
use crate::sys::mount::{detach, mount_table, unmount};

impl Daemon {
    /// Unmounts `dir`. Returns when the file system is gone, or after a moment if somebody else
    /// keeps it alive; it stays served until then. Blocks.
    pub fn unmount(&self, dir: &Path, lazy: bool) -> Result<Unmounted, DaemonError> {
        let real = self.superblock_at(dir).is_none().then(|| self.real_name(dir)).flatten();
        let dir = real.as_deref().unwrap_or(dir);
        let watch = self.superblock_at(dir).ok_or_else(|| DaemonError::NotMounted(dir.to_owned()))?;
        match whereabouts(dir, watch.device) {
            Whereabouts::OnTop => self.options.sandbox.outside(|| take_down(dir, lazy))?,
            Whereabouts::Beneath => return Err(DaemonError::Covered(dir.to_owned())),
            // Somebody has taken it out of the tree, or to another place.
            Whereabouts::Elsewhere => {}
        }
        self.prefetches.cancel(Some(dir));
        let until = Instant::now() + Duration::from_secs(2);
        while self.watch.is_alive(watch) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        self.let_linger(dir, watch);
        self.bury();
        Ok(Unmounted { still_served: self.watch.is_alive(watch) })
    }

    /// If somebody else has unmounted what is known as mounted at `dir`, and something keeps it alive, the place is
    /// free again.
    pub(super) fn note_taken_away(&self, dir: &Path) {
        let Some(watch) = self.superblock_at(dir) else { return };
        if matches!(whereabouts(dir, watch.device), Whereabouts::Elsewhere) {
            self.let_linger(dir, watch);
        }
    }

    /// What was mounted at `dir` has no place any more, and lives as long as somebody uses it.
    fn let_linger(&self, dir: &Path, watch: WatchId) {
        let mut state = self.state.lock().unwrap();
        // The watching thread may have been first, and somebody else may have mounted there since.
        let is_ours = |mounted: &Option<Mounted>| mounted.as_ref().is_some_and(|mounted| mounted.watch == watch);
        if state.mounts.get(dir).is_some_and(is_ours)
            && let Some(Some(mounted)) = state.mounts.remove(dir)
        {
            self.note_lingering(&mounted);
            state.lingering.push(mounted);
        }
        state.unserved.iter_mut().filter(|it| it.watch == watch).for_each(|it| it.dir = None);
    }

    /// What is mounted at `dir` as far as this daemon knows, served or not.
    fn superblock_at(&self, dir: &Path) -> Option<WatchId> {
        let state = self.state.lock().unwrap();
        let served = state.mounts.get(dir).and_then(Option::as_ref).map(|mounted| mounted.watch);
        let unserved = || state.unserved.iter().find(|it| it.dir.as_deref() == Some(dir)).map(|it| it.watch);
        served.or_else(unserved)
    }

    /// A successor must not take the mount point for ours any more.
    fn note_lingering(&self, mounted: &Mounted) {
        let change = |record| Record { lingering: true, ..record };
        if let Err(error) = self.records.change(mounted.record, change) {
            tracing::warn!(%error, "cannot write down that an image was unmounted");
        }
    }
}

/// Where a superblock is, seen from a mount point.
enum Whereabouts {
    OnTop,
    /// Something else is mounted over it.
    Beneath,
    Elsewhere,
}

/// Where the file system with the number `device` is. What is at `dir` may be another one's by now.
fn whereabouts(dir: &Path, device: (u32, u32)) -> Whereabouts {
    // On a thread without descriptors, because the file system may be our own.
    let look = || file_system_of(open(dir, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?);
    if alone(&[], look).is_ok_and(|found| found.is_ok_and(|found| found == device)) {
        return Whereabouts::OnTop;
    }
    let name = format!("{}:{}", device.0, device.1);
    let there = mount_table().unwrap_or_default().into_iter().filter(|mount| mount.target == dir);
    let devices: Vec<_> = there.map(|mount| mount.device).collect();
    match devices.last() {
        // One that nobody answers for does not say what it is.
        Some(top) if *top == name => Whereabouts::OnTop,
        Some(_) if devices.contains(&name) => Whereabouts::Beneath,
        _ => Whereabouts::Elsewhere,
    }
}

/// Unmounts what is at `dir`: by ourselves, or by the program that mounted it for who may not.
fn take_down(dir: &Path, lazy: bool) -> Result<(), DaemonError> {
    let outcome = if lazy { detach(dir) } else { unmount(dir) };
    match outcome {
        Err(cause) if cause.raw_os_error() == Some(libc::EPERM) => match fuse::unmount_unprivileged(dir, lazy) {
            Some(outcome) => {
                let refused = |error: FusermountError| io::Error::other(error.to_string());
                outcome.map_err(|error| DaemonError::Unmount { dir: dir.to_owned(), cause: refused(error) })
            }
            None => Err(DaemonError::Unmount { dir: dir.to_owned(), cause }),
        },
        outcome => outcome.map_err(|cause| DaemonError::Unmount { dir: dir.to_owned(), cause }),
    }
}
