//! Mounts that nobody looked after: the daemon and both keepers died.
//!
//! From the moment the last of them ended, the kernel let every reader through: what was missing
//! read as zeros, and stays in the page cache as zeros. Nothing can undo what was read, so such a
//! mount is ended, and loudly. One whose blobs were complete needed nobody and stays. One over FUSE has shown
//! nobody anything wrong, but what was not in memory fails for good: it is ended too.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::records::RecordId;
use super::unserved::Unserved;
use super::{Daemon, DaemonError};
use crate::export::WatchId;
use crate::image::Image;
use crate::sys::files::inode_id;
use crate::sys::loopdev;
use crate::sys::mount::{MountInfo, detach, mount_table};

impl Daemon {
    /// Ends the mounts of an earlier daemon, of which nobody has kept anything. To be called after
    /// what was kept was taken over, and before anything is mounted.
    pub(super) fn end_unkept_mounts(&self) -> Result<(), DaemonError> {
        let start = |what| move |cause| DaemonError::Start { what, cause };
        let living = self.watch.living().map_err(start("the watch on mounts"))?;
        let kept = |mount: &MountInfo| {
            living.iter().any(|watch| mount.device == format!("{}:{}", watch.device.0, watch.device.1))
        };
        let bootstraps = self.options.cache.join("bootstraps");
        let table = mount_table().map_err(|cause| DaemonError::Start { what: "a look at the mount table", cause })?;
        let cut_off = self.end_cut_off_mounts(&living, &table)?;
        let ours = |mount: &MountInfo| {
            if mount.fs_type != "erofs" || kept(mount) || cut_off.contains(&mount.target) {
                return None;
            }
            let source = Path::new(&mount.source);
            let bootstrap = loopdev::backing_file(source).unwrap_or_else(|| source.to_owned());
            bootstrap.starts_with(&bootstraps).then_some(bootstrap)
        };
        let mut poisoned = self.forget_the_unkept(&living)?;
        for (mount, bootstrap) in table.iter().filter_map(|mount| Some((mount, ours(mount)?))) {
            let incomplete = self.incomplete_blobs(&bootstrap);
            let dir = mount.target.display();
            if incomplete.is_empty() {
                tracing::info!(%dir, "a mount of an earlier daemon is complete and stays as it is");
                continue;
            }
            tracing::error!(
                %dir,
                "the daemon and its keepers were killed while this image was incomplete: whatever read it since may have \
                 read zeros; it is unmounted, restart what uses it"
            );
            self.watch_stray(&mount.target);
            if let Err(error) = self.options.sandbox.outside(|| detach(&mount.target)) {
                tracing::error!(%dir, %error, "it cannot be unmounted");
            }
            poisoned.extend(incomplete);
        }
        if !poisoned.is_empty() {
            self.deny_strays(&poisoned)?;
        }
        Ok(())
    }

    /// Ends mounts whose FUSE connection nobody has kept, and gives their places.
    fn end_cut_off_mounts(
        &self,
        living: &HashSet<WatchId>,
        table: &[MountInfo],
    ) -> Result<HashSet<PathBuf>, DaemonError> {
        let records = self.records.load();
        let records = records.map_err(|cause| DaemonError::Start { what: "the records of served images", cause })?;
        let is_kind = |mount: &MountInfo| mount.fs_type == "erofs" || mount.fs_type == "fuse.rafsd";
        let gone = records.into_iter().filter_map(|(_, record)| record.ok()).filter_map(|record| {
            record.fuse?;
            let watch = record.superblock.map(WatchId::from).filter(|watch| !living.contains(watch))?;
            let device = format!("{}:{}", watch.device.0, watch.device.1);
            // The number alone may be another daemon's by now.
            let is_there = |mount: &MountInfo| Some(&mount.target) == record.dir.as_ref() && mount.device == device;
            table.iter().any(|mount| is_kind(mount) && is_there(mount)).then_some(device)
        });
        let devices: HashSet<_> = gone.collect();
        let is_ours = |mount: &&MountInfo| devices.contains(&mount.device) && is_kind(mount);
        let mut ended = HashSet::new();
        for mount in table.iter().filter(is_ours) {
            let dir = mount.target.display();
            tracing::error!(%dir, "the daemon and its keepers were killed, and reads of this image fail since; it is unmounted");
            self.watch_stray(&mount.target);
            if let Err(error) = self.options.sandbox.outside(|| detach(&mount.target)) {
                tracing::error!(%dir, %error, "it cannot be unmounted");
            }
            ended.insert(mount.target.clone());
        }
        Ok(ended)
    }

    /// Takes the records of superblocks away that nobody has kept, and gives the directories of their
    /// devices that are not complete: what is out of the tree may have files open on them.
    fn forget_the_unkept(&self, living: &HashSet<WatchId>) -> Result<BTreeSet<String>, DaemonError> {
        let mut incomplete = BTreeSet::new();
        let records = self.records.load();
        for (id, record) in
            records.map_err(|cause| DaemonError::Start { what: "the records of served images", cause })?
        {
            let is_kept = match &record {
                // It may belong to any superblock that lives.
                Err(_) => !living.is_empty(),
                Ok(record) => match record.superblock {
                    Some(superblock) => living.contains(&superblock.into()),
                    None => self.is_registered(id),
                },
            };
            if is_kept {
                continue;
            }
            // Over FUSE, what is missing has failed.
            let open = record.ok().filter(|record| record.fuse.is_none());
            let directories = open.into_iter().flat_map(|record| record.devices).map(|device| device.directory);
            incomplete.extend(directories.filter(|name| !self.store.is_complete(name)));
            self.forget(id);
        }
        Ok(incomplete)
    }

    fn is_registered(&self, id: RecordId) -> bool {
        self.state.lock().unwrap().registered.values().any(|(_, record)| *record == id)
    }

    /// Counts a superblock as in use until it has gone: it may have files open.
    fn watch_stray(&self, target: &Path) {
        let watched = File::open(target).and_then(|root| self.watch.add(&root));
        match watched {
            Ok(watch) => {
                let why = format!(
                    "the daemon and its keepers were killed; it was unmounted from {}, and somebody has files of it open",
                    target.display()
                );
                self.leave_unserved(Unserved { watch, record: None, dir: None, uses: None, why });
            }
            Err(error) => tracing::warn!(%error, dir = %target.display(), "cannot learn when it has gone"),
        }
    }

    /// Directories of blobs of an image that are not complete on disk, as far as can be told; of an
    /// image that cannot be read, all there are.
    fn incomplete_blobs(&self, bootstrap: &Path) -> Vec<String> {
        let names = self.store.directories();
        let Ok(image) = Image::open(bootstrap) else { return names };
        let blobs: BTreeSet<_> = image.devices().iter().map(|device| device.blob.to_string()).collect();
        let of_image = |name: &String| blobs.contains(name.split('.').next().unwrap_or_default());
        names.into_iter().filter(of_image).filter(|name| !self.store.is_complete(name)).collect()
    }

    /// Files that were open on ended mounts still lead to holes. Marked again, reads of them are
    /// denied, as those of every file that no image is known for; what was read as zeros is dropped.
    /// Images that are mounted from now on get a file of their own: one that is marked already cannot
    /// be opened for writing any more without asking ourselves.
    fn deny_strays(&self, directories: &BTreeSet<String>) -> Result<(), DaemonError> {
        let service = self.backends.fanotify(&self.keepers)?;
        for name in directories {
            let path = self.store.data_path(name);
            let guarded = File::open(&path).and_then(|file| {
                if service.guard(inode_id(&file)?, file.as_fd())? { fs::remove_file(&path) } else { Ok(()) }
            });
            if let Err(error) = guarded {
                tracing::error!(path = %path.display(), %error, "open files on an unmounted image still read zeros");
            }
        }
        let drop_caches = || fs::write("/proc/sys/vm/drop_caches", "1");
        if let Err(error) = self.options.sandbox.outside(drop_caches) {
            tracing::error!(%error, "zeros may still be in the page cache of open files");
        }
        Ok(())
    }
}
