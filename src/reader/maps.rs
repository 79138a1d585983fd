//! From a row of the blob table to a unit map: the blob's own tables and the image's digests.

use std::time::{Duration, Instant};

use crate::base::{BlobId, Class};
use crate::blob::{BlobKind, BlobTables, TablesError, UnitMap};
use crate::image::{Device, Image};
use crate::source::{BlobSource, ReadCtx, SourceError};

/// How long the tables of a blob may take to arrive.
const DEADLINE: Duration = Duration::from_secs(30);

/// Why there is no map of a blob.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The tables cannot be used.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The tables did not come.
    #[error("cannot fetch the tables of blob {blob}")]
    Fetch {
        blob: BlobId,
        #[source]
        cause: SourceError,
    },
}

/// What the tables of a blob say.
#[derive(Clone, Debug)]
pub struct Mapped {
    /// Where the units are, and what they must be.
    pub map: UnitMap,
    pub kind: BlobKind,
}

impl Mapped {
    /// What `tables` say, whose bytes are `stored`, and what `image` says about the same chunks.
    pub fn new(tables: &BlobTables, stored: &[u8], image: &Image) -> Result<Self, TablesError> {
        let map = tables.geometry(stored)?;
        let map = tables.with_digests(&map, image.chunk_records().iter())?;
        Ok(Self { map, kind: tables.kind() })
    }
}

/// The unit map of one device of `image`: fetches the blob's tables, which takes up to 30 seconds,
/// and adds the digests that the image names. Blocks; runs its fetch on `runtime`.
pub fn map(
    device: &Device,
    image: &Image,
    source: &dyn BlobSource,
    runtime: &tokio::runtime::Handle,
) -> Result<Mapped, MapError> {
    let tables = BlobTables::new(&device.entry)?;
    let stored = if tables.stored().is_empty() {
        bytes::Bytes::new()
    } else {
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + DEADLINE);
        let fetched = runtime.block_on(source.read(tables.home(), tables.stored(), ctx));
        fetched.map_err(|cause| MapError::Fetch { blob: tables.home().clone(), cause })?
    };
    Ok(Mapped::new(&tables, &stored, image)?)
}

/// The same from a map that was made before, with the digests of this image and no other's; `None`
/// if it does not fit.
pub fn renew(saved: &UnitMap, device: &Device, image: &Image) -> Option<UnitMap> {
    let tables = BlobTables::new(&device.entry).ok()?;
    if saved.decoded_len() != tables.decoded_len() || saved.key() != tables.key() {
        return None;
    }
    // The image itself says everything of a listed blob. Of a gzip layer a file says it that the image chooses, and a
    // false way in that another image chose must not enter here.
    if matches!(tables.kind(), BlobKind::Listed | BlobKind::Zran) {
        return None;
    }
    // Digests that other images named are their business: a false one must not enter here.
    tables.with_digests(&saved.without_digests(), image.chunk_records().iter()).ok()
}
