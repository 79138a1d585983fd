//! What the way from a reference to an image is for whoever goes it: the daemon, and tools that read an image without
//! one.
//!
//! The chain is manifest, bootstrap layer, bootstrap, blobs; each link is checked before anything looks into it.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::DaemonError;
use crate::base::Digest;
use crate::blob::BlobTables;
use crate::image::Image;
use crate::oci::bootstrap::{LayerError, MAX_LAYER, unpack};
use crate::oci::{self, Endpoints, OciError, Registry, Resolved};
use crate::source::{Network, OpenError};

/// How long finding out what a reference means may take.
pub const LOOK_UP: Duration = Duration::from_secs(30);

/// How long the question whether a tag still leads to what is known may take.
pub const CONFIRM: Duration = Duration::from_secs(10);

/// How long a layer with a bootstrap may take, of up to 512 MiB.
pub const FETCH_LAYER: Duration = Duration::from_secs(600);

/// The registry `host` of `network` and its mirrors, for questions that nobody waits for after `until`. `ca` is trusted
/// besides.
///
/// # Errors
/// The settings of a host are wrong, or a file that they name cannot be used.
pub fn endpoints(network: &Network, host: &str, ca: Option<&Path>, until: Instant) -> Result<Endpoints, OpenError> {
    let registry = network.registry(host, ca)?;
    let places = registry.servers().iter().map(|server| oci::Place {
        endpoint: Arc::clone(&server.endpoint),
        base: server.config.base.clone(),
        namespace: server.config.namespace(host).map(ToOwned::to_owned),
        resolves: server.config.resolve,
        pulls: server.config.pull,
        health: Arc::clone(&server.health),
    });
    Ok(Endpoints::new(host, places.collect(), network.policy(), until))
}

/// A file in `dir` that nobody else sees, and that goes with its descriptor.
///
/// # Errors
/// It cannot be made.
pub fn scratch(dir: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(dir)
}

/// The bootstrap of an image, out of its layer, which is kept in `scratch` and checked before anything looks into it.
/// Blocks while it unpacks: only for threads that may.
///
/// # Errors
/// It is no RAFS image, the layer cannot be had or is not what its digest says, or there is no bootstrap in it.
pub async fn bootstrap(fetch: &Endpoints, resolved: &Resolved, mut scratch: File) -> Result<Vec<u8>, OciError> {
    let reference = &resolved.reference;
    let unusable = |cause| OciError::Bootstrap { reference: reference.clone(), cause: Arc::new(cause) };
    let layer = &resolved.image()?.bootstrap;
    if layer.size > MAX_LAYER {
        return Err(unusable(LayerError::TooLong { size: layer.size }));
    }
    let mut take = |piece: &[u8]| scratch.write_all(piece);
    let registry = Registry::new(fetch, reference.repository());
    registry.blob(layer, "the bootstrap layer", &mut take).await?;
    scratch.seek(SeekFrom::Start(0)).map_err(|cause| unusable(LayerError::Scratch(cause)))?;
    unpack(scratch).map_err(unusable)
}

/// Every blob that `image` leads to is one that its manifest names.
///
/// # Errors
/// One is not, or cannot be used.
pub fn ensure_named(resolved: &Resolved, image: &Image) -> Result<(), DaemonError> {
    let named = &resolved.image()?.named;
    let is_named = |id: &str| Digest::from_hex(id).is_some_and(|digest| named.contains(&digest));
    for device in image.devices() {
        let tables = BlobTables::new(&device.entry).map_err(DaemonError::Tables)?;
        let own = device.blob.as_str();
        let wanted = [own, tables.home().as_str()];
        // Of a blob without tables of its own there is nothing to fetch from anywhere else.
        let stranger = wanted.into_iter().take(if tables.stored().is_empty() { 1 } else { 2 }).find(|id| !is_named(id));
        if let Some(blob) = stranger {
            return Err(OciError::Stranger { reference: resolved.reference.clone(), blob: blob.to_owned() }.into());
        }
    }
    Ok(())
}
