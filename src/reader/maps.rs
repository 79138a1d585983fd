//! From a row of the blob table to a unit map: the blob's own tables and the image's digests.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};

use crate::base::{BlobId, Class};
use crate::blob::{BlobKind, BlobTables, TablesError, UnitMap};
use crate::image::{Device, Image};
use crate::source::{BlobSource, ReadCtx, SourceError, Verdict};

/// Places that are asked for tables.
const MOST_PLACES: usize = 8;

/// Blobs whose tables are asked for at once.
const AT_ONCE: usize = 8;

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
        let map = tables.with_digests(map, image.chunk_records().iter())?;
        Ok(Self { map, kind: tables.kind() })
    }
}

/// What `tables` say, which came as `stored`. Where that cannot be, another place is asked, if `source` has more than one: one
/// that lies must not keep an image from being mounted. Blocks; runs its fetches on `runtime`.
pub fn mapped(
    tables: &BlobTables,
    stored: &[u8],
    image: &Image,
    source: &dyn BlobSource,
    runtime: &tokio::runtime::Handle,
) -> Result<Mapped, MapError> {
    let (blob, range) = (tables.home(), tables.stored());
    let others = if range.is_empty() { 0 } else { source.places().min(MOST_PLACES).saturating_sub(1) };
    let mut mapped = Mapped::new(tables, stored, image);
    for _ in 0..others {
        let Err(error) = mapped else { break };
        source.judged(blob, range, Verdict::Wrong);
        // What the first one sent says more than that others have nothing.
        let Some(Ok(again)) = fetch([tables], source, runtime).next() else { return Err(error.into()) };
        mapped = Mapped::new(tables, &again, image);
        if mapped.is_ok() {
            source.judged(blob, range, Verdict::Right);
        }
    }
    Ok(mapped?)
}

/// The stored bytes of the tables of several blobs, in their order, up to eight of them asked for at the same time and in
/// memory: an image of many layers need not wait for one after the other. Each takes up to 30 seconds. Blocks; runs its
/// fetches on `runtime`.
pub fn fetch<'a>(
    tables: impl IntoIterator<Item = &'a BlobTables> + 'a,
    source: &'a dyn BlobSource,
    runtime: &'a tokio::runtime::Handle,
) -> impl Iterator<Item = Result<Bytes, MapError>> + 'a {
    let one = move |tables: &'a BlobTables| async move {
        if tables.stored().is_empty() {
            return Ok(Bytes::new());
        }
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + DEADLINE);
        let fetched = source.read(tables.home(), tables.stored(), ctx).await;
        fetched.map_err(|cause| MapError::Fetch { blob: tables.home().clone(), cause })
    };
    let mut fetched = Box::pin(stream::iter(tables.into_iter().map(one)).buffered(AT_ONCE));
    std::iter::from_fn(move || runtime.block_on(fetched.next()))
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
    tables.with_digests(saved.without_digests(), image.chunk_records().iter()).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tokio::sync::Barrier;

    use super::*;
    use crate::base::ByteRange;
    use crate::build::{BuildSpec, Source, build};
    use crate::source::BoxFuture;

    /// Answers nobody before so many have asked.
    struct Together(Barrier);

    impl BlobSource for Together {
        fn len<'a>(&'a self, _: &'a BlobId, _: ReadCtx) -> BoxFuture<'a, Result<u64, SourceError>> {
            unreachable!("an image says where tables are")
        }

        fn read<'a>(
            &'a self,
            _: &'a BlobId,
            stored: ByteRange,
            _: ReadCtx,
        ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
            Box::pin(async move {
                self.0.wait().await;
                Ok(vec![7; usize::try_from(stored.len()).unwrap()].into())
            })
        }

        fn describe(&self) -> String {
            "a test".into()
        }
    }

    #[test]
    fn tables_of_several_blobs_are_asked_for_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("source");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("a"), "a").unwrap();
        build(BuildSpec::new(Source::open(&from).unwrap(), dir.path()), &()).unwrap();
        let image = crate::reader::bootstrap::open(&dir.path().join("bootstrap")).unwrap();
        let tables = BlobTables::new(&image.devices()[0].entry).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let source = Together(Barrier::new(AT_ONCE));

        let fetched = fetch(std::iter::repeat_n(&tables, 2 * AT_ONCE), &source, runtime.handle());

        let lens: Vec<_> = fetched.map(|stored| stored.unwrap().len() as u64).collect();
        assert_eq!(lens, vec![tables.stored().len(); 2 * AT_ONCE]);
        assert!(!tables.stored().is_empty());
    }
}
