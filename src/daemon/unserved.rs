//! Mounts that a predecessor left and that cannot be served: their cold reads fail. Who asks is told of them, until
//! they have been unmounted.

use std::path::PathBuf;

use super::Daemon;
use super::api::UnservedReport;
use super::records::RecordId;
use crate::export::WatchId;
use crate::sys::mount::mount_table;

/// A superblock that lives and is not served.
#[derive(Debug)]
pub(super) struct Unserved {
    pub(super) watch: WatchId,
    /// What is left of its record, to be taken away with it.
    pub(super) record: Option<RecordId>,
    /// Where it is mounted, if it is and that is known.
    pub(super) dir: Option<PathBuf>,
    /// Why, in one line.
    pub(super) why: String,
}

impl Daemon {
    /// Takes note of a superblock that lives and cannot be served.
    pub(super) fn leave_unserved(&self, unserved: Unserved) {
        tracing::warn!(
            why = unserved.why,
            "nothing is evicted from the cache until a mount has gone that is not served"
        );
        self.watch.adopt(unserved.watch);
        self.state.lock().unwrap().unserved.push(unserved);
    }

    /// The same for one that no record tells of.
    pub(super) fn leave_stranger(&self, watch: WatchId) {
        let device = format!("{}:{}", watch.device.0, watch.device.1);
        let mounts = mount_table().unwrap_or_default();
        let dir = mounts.into_iter().find(|mount| mount.device == device).map(|mount| mount.target);
        self.leave_unserved(Unserved { watch, record: None, dir, why: "its record cannot be read".to_owned() });
    }

    /// Lets go of those that have gone, with all that was kept for them.
    pub(super) fn bury_the_unserved(&self) {
        let gone: Vec<_> = {
            let mut state = self.state.lock().unwrap();
            state.unserved.extract_if(.., |it| !self.watch.is_alive(it.watch)).collect()
        };
        if gone.is_empty() {
            return;
        }
        gone.into_iter().filter_map(|it| it.record).for_each(|record| self.forget(record));
        if !self.state.lock().unwrap().unserved.is_empty() {
            return;
        }
        // The marks that were kept for them go as well, and blobs may.
        if let (Some(fanotify), _) = self.backends.services() {
            fanotify.keep_marks(false);
        }
        self.records.remove_unreadable();
        self.say_uses_are_known();
    }

    /// Those that are left.
    pub(super) fn unserved(&self) -> Vec<UnservedReport> {
        let state = self.state.lock().unwrap();
        state.unserved.iter().map(|it| UnservedReport { dir: it.dir.clone(), why: it.why.clone() }).collect()
    }
}
