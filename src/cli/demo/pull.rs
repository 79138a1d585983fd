//! What it would have cost to have everything first.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::stop::Stop;
use crate::base::Class;
use crate::blob::BlobTables;
use crate::build::BuildReport;
use crate::cache::{Store, StoreOptions};
use crate::net::{ClientOptions, RetryPolicy};
use crate::reader::bootstrap;
use crate::source::{self, ReadCtx};

/// The cost of a full pull.
#[derive(Debug, Serialize)]
pub(super) struct Pull {
    /// Stored bytes that travelled.
    pub(super) bytes: u64,
    /// Until everything was fetched, decoded, checked and written.
    pub(super) seconds: f64,
}

/// Fetches and unpacks the whole image from `url` into `dir`, as fast as this program can.
pub(super) fn everything(
    build: &BuildReport,
    url: &str,
    image: &Path,
    dir: &Path,
    runtime: &Handle,
    stop: &Stop,
) -> anyhow::Result<Pull> {
    let options = ClientOptions::default();
    let clock = Instant::now();
    let source = source::open(url, &options, RetryPolicy::default())?;
    let store_options = StoreOptions::default();
    let store = Store::open(dir, store_options.clone(), runtime.clone())?;
    let image = bootstrap::open(&image.join("bootstrap"))?;
    for device in image.devices() {
        let tables = BlobTables::new(&device.entry)?;
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + store_options.deadline);
        let stored = runtime.block_on(async {
            tokio::select! {
                stored = source.read(&device.blob, tables.stored(), ctx) => stored.map_err(anyhow::Error::from),
                () = stop.wait() => bail!("interrupted"),
            }
        })?;
        let map = tables.with_digests(tables.geometry(&stored)?, image.chunk_records().iter())?;
        let device = store.device(map, source.clone())?;
        let (tell, told) = oneshot::channel();
        device.on_complete(Box::new(move || {
            // Nobody listens any more when the demo was interrupted.
            let _ = tell.send(());
        }));
        device.complete_in_background();
        runtime.block_on(async {
            tokio::select! {
                told = told => told.context("the pull was cut short"),
                () = stop.wait() => bail!("interrupted"),
            }
        })?;
    }
    let seconds = clock.elapsed().as_secs_f64();
    drop(store);
    fs::remove_dir_all(dir)?;
    let bytes = build.blobs.iter().map(|blob| blob.stored_bytes).sum::<u64>() + build.bootstrap_bytes;
    Ok(Pull { bytes, seconds })
}
