//! The same image mounted by the kernel alone: what we are measured against.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rafsd::base::Class;
use rafsd::blob::BlobTables;
use rafsd::cache::{Store, StoreOptions};
use rafsd::image::Image;
use rafsd::net::{ClientOptions, RetryPolicy};
use rafsd::source::{self, ReadCtx};
use rafsd::sys::mount::{FsContext, unmount};
use rustix::mount::MountAttrFlags;

/// An EROFS mount over complete device files. Dropping it unmounts.
#[derive(Debug)]
pub(crate) struct Native {
    mnt: PathBuf,
}

impl Native {
    /// Unpacks the blobs of `image` below `dir`, which is made, and mounts them.
    pub(crate) fn mount(image: &Path, dir: &Path) -> anyhow::Result<Self> {
        let mnt = dir.join("mnt");
        fs::create_dir_all(&mnt)?;
        let bootstrap = dir.join("bootstrap");
        fs::copy(image.join("bootstrap"), &bootstrap)?;
        let devices = unpack(&bootstrap, &image.join("blobs"), &dir.join("store"))?;
        let context = FsContext::open("erofs")?;
        context.set_path("source", &bootstrap)?;
        for device in &devices {
            context.set_path("device", device)?;
        }
        context.mount(MountAttrFlags::empty())?.attach(&mnt)?;
        Ok(Self { mnt })
    }

    /// Where it is mounted.
    pub(crate) fn mnt(&self) -> &Path {
        &self.mnt
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.mnt) {
            eprintln!("side_by_side: cannot unmount {}: {error}", self.mnt.display());
        }
    }
}

/// Fills a store of our own from the directory of blobs; the paths of its device files.
///
/// By the same code that fills the daemon's, so that both files lie on the disk alike.
fn unpack(bootstrap: &Path, blobs: &Path, dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let blobs = blobs.to_str().context("the scratch directory has a strange name")?;
    let source = source::open(blobs, &ClientOptions::default(), RetryPolicy::default())?;
    fs::create_dir(dir)?;
    let store = Store::open(dir, StoreOptions::default(), runtime.handle().clone())?;
    let image = Image::open(bootstrap)?;
    let mut paths = Vec::new();
    for device in image.devices() {
        let tables = BlobTables::new(&device.entry)?;
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(30));
        let stored = runtime.block_on(source.read(&device.blob, tables.stored(), ctx))?;
        let map = tables.with_digests(tables.geometry(&stored)?, image.chunk_records().iter())?;
        let device = store.device(map, source.clone())?;
        let (tell, told) = mpsc::channel();
        device.on_complete(Box::new(move || {
            // The listener is below and outlives this.
            let _ = tell.send(());
        }));
        device.complete_in_background();
        told.recv().context("a device could not be completed")?;
        paths.push(device.data_path().context("a device of a store has a file")?.to_owned());
    }
    Ok(paths)
}
