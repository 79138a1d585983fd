//! A source as one place among several.

use std::sync::Arc;

use bytes::Bytes;

use super::{BlobSource, BoxFuture, Failure, ReadCtx, SourceError, Upstream};
use crate::base::{BlobId, ByteRange};

/// A directory, or any other source that does not fail for a moment only, as one of the places of a
/// [`super::Tiers`].
pub struct WholeSource(Arc<dyn BlobSource>);

impl WholeSource {
    /// `source` as a place.
    pub fn new(source: Arc<dyn BlobSource>) -> Self {
        Self(source)
    }
}

impl std::fmt::Debug for WholeSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WholeSource").field(&self.0.describe()).finish()
    }
}

impl Upstream for WholeSource {
    fn len<'a>(&'a self, blob: &'a BlobId, ctx: ReadCtx) -> BoxFuture<'a, Result<u64, Failure>> {
        Box::pin(async move { self.0.len(blob, ctx).await.map_err(Failure::from) })
    }

    fn pour<'a>(
        &'a self,
        blob: &'a BlobId,
        stored: ByteRange,
        ctx: ReadCtx,
        take: &'a mut (dyn FnMut(Bytes) + Send),
    ) -> BoxFuture<'a, Result<(), Failure>> {
        Box::pin(async move { self.0.stream(blob, stored, ctx, take).await.map_err(|error: SourceError| error.into()) })
    }

    fn describe(&self) -> String {
        self.0.describe()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::{HttpUpstream, LocalSource, Tier, Tiers};
    use super::*;
    use crate::base::Class;
    use crate::net::server::{BlobServer, ServerOptions};
    use crate::net::{Clock, EndpointOptions, RetryPolicy};

    #[tokio::test]
    async fn what_a_directory_lacks_comes_from_the_next_place() {
        let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(near.path().join("a"), "near").unwrap();
        std::fs::write(far.path().join("b"), "far away").unwrap();
        let server = BlobServer::start(far.path(), ServerOptions::default()).unwrap();
        let server = HttpUpstream::new(&server.url(), EndpointOptions::default(), Clock::default()).unwrap();
        let directory = WholeSource::new(Arc::new(LocalSource::new(near.path()).unwrap()));
        let tiers = Tiers::new(vec![Tier::new(directory), Tier::new(server)], RetryPolicy::default(), Clock::default());
        let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(20));
        let read =
            async |id: &str, len| tiers.read(&id.parse().unwrap(), ByteRange::new(0, len).unwrap(), ctx).await.unwrap();

        assert_eq!(read("a", 4).await, "near");
        assert_eq!(read("b", 8).await, "far away");
        assert_eq!(tiers.len(&"b".parse().unwrap(), ctx).await.unwrap(), 8);
    }
}
