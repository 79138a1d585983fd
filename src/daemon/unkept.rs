//! Mounts that nobody looked after: the daemon and both keepers died.
//!
//! From the moment the last of them ended, the kernel let every reader through: what was missing
//! read as zeros, and stays in the page cache as zeros. Nothing can undo what was read, so such a
//! mount is ended, and loudly. One whose blobs were complete needed nobody and stays.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use super::{Daemon, DaemonError};
use crate::image::Image;
use crate::sys::files::inode_id;
use crate::sys::mount::{MountInfo, detach, mount_table};

impl Daemon {
    /// Ends the mounts of an earlier daemon, of which nobody has kept anything. To be called before
    /// anything is mounted.
    pub(super) fn end_unkept_mounts(&self) -> Result<(), DaemonError> {
        for (id, _) in self.records.load().unwrap_or_default() {
            self.records.remove(id);
        }
        let bootstraps = self.options.cache.join("bootstraps");
        let table = mount_table().map_err(|cause| DaemonError::Start { what: "a look at the mount table", cause })?;
        let ours = |mount: &&MountInfo| mount.fs_type == "erofs" && Path::new(&mount.source).starts_with(&bootstraps);
        let mut poisoned = BTreeSet::new();
        for mount in table.iter().filter(ours) {
            let incomplete = self.incomplete_blobs(Path::new(&mount.source));
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
                service.guard(inode_id(&file)?, file.as_fd())?;
                fs::remove_file(&path)
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
