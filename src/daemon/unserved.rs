//! Mounts that a predecessor left and that cannot be served: their cold reads fail. Who asks is told of them, until
//! they have been unmounted.
//!
//! What is present of them is read all the same. The kernel asks about each read of a file that is not complete, and
//! what is in a file says the store, whatever became of the image that reads it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::api::UnservedReport;
use super::blobfs::Shown;
use super::records::{Record, RecordId};
use super::{Daemon, DaemonError};
use crate::base::{Chain, Digest};
use crate::cache::KeptBootstrap;
use crate::export::fanotify::{Caretaking, Fanotify};
use crate::export::{Backing, WatchId};
use crate::source::AbsentSource;
use crate::sys::files::{InodeId, inode_id_at};
use crate::sys::mount::mount_table;

/// A superblock that lives and is not served.
#[derive(Debug)]
pub(super) struct Unserved {
    pub(super) watch: WatchId,
    /// What is left of its record, to be taken away with it.
    pub(super) record: Option<RecordId>,
    /// Where it is mounted, if it is and that is known.
    pub(super) dir: Option<PathBuf>,
    /// What it may read; `None` if that is unknown, so that it may be anything.
    pub(super) uses: Option<Uses>,
    /// Why, in one line.
    pub(super) why: String,
}

/// What a mount may read of the cache.
#[derive(Debug)]
pub(super) struct Uses {
    /// Directories of the store. What is in the kernel's own cache, the kernel tells.
    directories: BTreeSet<String>,
    _bootstraps: Vec<KeptBootstrap>,
}

impl Daemon {
    /// Takes note of a superblock that lives and cannot be served.
    pub(super) fn leave_unserved(&self, unserved: Unserved) {
        if unserved.uses.is_none() {
            tracing::warn!(
                why = unserved.why,
                "nothing is evicted from the cache until a mount has gone that is not served, and of which nobody knows what it reads"
            );
        }
        self.watch.adopt(unserved.watch);
        self.state.lock().unwrap().unserved.push(unserved);
    }

    /// The same for one that no record tells of.
    pub(super) fn leave_stranger(&self, watch: WatchId) {
        let device = format!("{}:{}", watch.device.0, watch.device.1);
        let mounts = mount_table().unwrap_or_default();
        let dir = mounts.into_iter().find(|mount| mount.device == device).map(|mount| mount.target);
        self.leave_unserved(Unserved {
            watch,
            record: None,
            dir,
            uses: None,
            why: "its record cannot be read".to_owned(),
        });
    }

    /// What the image of a record may read, if the record makes sense.
    pub(super) fn uses_of(&self, record: &Record) -> Option<Uses> {
        let further = record.blobfs.iter().flat_map(Shown::further_devices);
        let images: Vec<_> = std::iter::once((record.key.as_str(), record.devices.as_slice())).chain(further).collect();
        let keys = images.iter().map(|(key, _)| Digest::from_hex(key)).collect::<Option<Vec<_>>>()?;
        let bootstraps = self.store.shelves().bootstraps();
        Some(Uses {
            directories: images
                .iter()
                .flat_map(|(_, devices)| *devices)
                .map(|device| device.directory.clone())
                .collect(),
            _bootstraps: keys.into_iter().map(|key| bootstraps.keep_known(key)).collect(),
        })
    }

    /// The directories of all blobs that mounts may read which are not served; `None` if it may be any.
    fn reserved(&self) -> Option<BTreeSet<String>> {
        let state = self.state.lock().unwrap();
        let each: Option<Vec<_>> = state.unserved.iter().map(|it| Some(it.uses.as_ref()?.directories.iter())).collect();
        Some(each?.into_iter().flatten().cloned().collect())
    }

    /// Lets blobs go that nobody uses and no mount may use that is not served.
    pub(super) fn say_uses_are_known(&self) {
        if let Some(reserved) = self.reserved() {
            self.store.reserve(reserved);
            self.store.say_uses_are_known();
        }
    }

    /// Answers for files that a dead daemon had marked, as far as mounts may read them that are not served: what is present
    /// is read, what is missing is denied, or comes with another image that has the blob. Gives the files of which the
    /// store does not know what is in them.
    pub(super) fn serve_what_is_present(
        &self,
        fanotify: &Arc<Fanotify>,
        files: &BTreeMap<InodeId, OwnedFd>,
    ) -> BTreeSet<InodeId> {
        let here = |name: String| Some((inode_id_at(&self.store.data_path(&name)).ok()?, name));
        let names: HashMap<_, _> = self.store.directories().into_iter().filter_map(here).collect();
        let reserved = self.reserved();
        // Of one that is served now it is not known how long.
        fanotify.keep_marks(reserved.is_none());
        let reserved = reserved.unwrap_or_default();
        let (mut caretakings, mut unknown) = (Vec::new(), BTreeSet::new());
        for (id, file) in files {
            // One that has no name any more was put aside before.
            let Some(name) = names.get(id) else { continue };
            if fanotify.serves(*id) {
                caretakings.extend(reserved.contains(name).then(|| fanotify.share_care_of(*id)).flatten());
                continue;
            }
            match self.take_care_of(fanotify, name, file) {
                Ok(caretaking) => caretakings.push(caretaking),
                Err(error) => {
                    tracing::error!(error = %Chain(&error), "nothing can be read of a blob that an image uses which is not served");
                    unknown.insert(*id);
                }
            }
        }
        self.state.lock().unwrap().caretakings.extend(caretakings);
        unknown
    }

    fn take_care_of(&self, fanotify: &Arc<Fanotify>, name: &str, file: &OwnedFd) -> Result<Caretaking, DaemonError> {
        let unusable = |cause| DaemonError::Io { path: self.store.data_path(name), cause };
        let file = File::from(file.try_clone().map_err(unusable)?);
        let nowhere =
            Arc::new(AbsentSource::because("the image that reads it is not served; unmount it and mount it again"));
        let device = self.store.adopt(name, file, nowhere)?;
        Ok(fanotify.take_care_of(&(device as Arc<dyn Backing>))?)
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
            return self.say_uses_are_known();
        }
        // The marks that were kept for them go as well, and blobs may.
        let caretakings = std::mem::take(&mut self.state.lock().unwrap().caretakings);
        caretakings.into_iter().for_each(Caretaking::release);
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
