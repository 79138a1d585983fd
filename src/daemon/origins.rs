//! Sources that images share: a client for a server has threads of certificates and connections,
//! and a thousand images of one server need one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use super::api::ImageSpec;
use crate::net::{ClientOptions, RetryPolicy};
use crate::source::{self, AbsentSource, BlobSource, OpenError};
use crate::telemetry::Telemetry;

/// What a source is opened from.
type Spec = (Vec<String>, Option<PathBuf>);

/// Open sources. One stays open as long as an image uses it.
#[derive(Default)]
pub(super) struct Origins {
    open: Mutex<HashMap<Spec, Weak<dyn BlobSource>>>,
    telemetry: Telemetry,
}

impl std::fmt::Debug for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origins").finish_non_exhaustive()
    }
}

impl Origins {
    /// No source yet; `telemetry` counts what all of them are asked.
    pub(super) fn new(telemetry: Telemetry) -> Self {
        Self { telemetry, ..Self::default() }
    }

    /// The source that `spec` names. Connects to nobody yet.
    pub(super) fn open(&self, spec: &ImageSpec) -> Result<Arc<dyn BlobSource>, OpenError> {
        let key = (spec.places(), spec.ca.clone());
        if let Some(open) = self.open.lock().unwrap().get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let mut options = ClientOptions::default();
        options.extra_ca_pem.extend(spec.ca.clone());
        let source = source::open_counted(&key.0[0], &options, RetryPolicy::default(), &self.telemetry)?;
        let mut open = self.open.lock().unwrap();
        open.retain(|_, source| source.strong_count() > 0);
        open.insert(key, Arc::downgrade(&source));
        Ok(source)
    }

    /// The registry `host` and its mirrors, for questions that nobody waits for after `until`.
    pub(super) fn registry(
        &self,
        host: &str,
        ca: Option<&std::path::Path>,
        until: std::time::Instant,
    ) -> Result<crate::oci::Endpoints, OpenError> {
        use crate::net::{Endpoint, EndpointOptions};
        let mut options = EndpointOptions::default();
        options.client.extra_ca_pem.extend(ca.map(ToOwned::to_owned));
        let base =
            reqwest::Url::parse(&format!("http://{host}/")).map_err(|e| OpenError::Url { detail: e.to_string() })?;
        let endpoint = Endpoint::new(&base, options, crate::net::Clock::default())?;
        Ok(crate::oci::Endpoints::new(host, vec![Arc::new(endpoint)], RetryPolicy::default(), until))
    }

    /// Where the blobs of `spec` would be fetched from, in order.
    pub(super) fn addresses(&self, spec: &ImageSpec) -> Result<Vec<String>, OpenError> {
        Ok(vec![self.open(spec)?.describe()])
    }

    /// Who we are to the registry of `repository`, without secrets.
    pub(super) async fn login(&self, repository: &crate::oci::Repository) -> String {
        let _ = repository;
        "nobody".to_owned()
    }

    /// The same for an image that is mounted already: it goes on with what is present, and fails
    /// what is not, if the source is not to be had.
    pub(super) fn open_or_absent(&self, spec: &ImageSpec) -> Arc<dyn BlobSource> {
        self.open(spec).unwrap_or_else(|error| {
            tracing::error!(%error, "the source of a mounted image cannot be used; what is missing cannot be fetched");
            Arc::new(AbsentSource::new(error))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::api::PrefetchOrder;

    #[test]
    fn images_of_one_server_share_a_source_for_as_long_as_one_uses_it() {
        let spec = |blobs: &str| ImageSpec {
            bootstrap: Some("/b".into()),
            blobs: blobs.into(),
            prefetch: PrefetchOrder::None,
            ..ImageSpec::default()
        };
        let origins = Origins::default();
        crate::net::install_tls();
        let first = origins.open(&spec("http://127.0.0.1:9/a")).unwrap();
        assert!(Arc::ptr_eq(&first, &origins.open(&spec("http://127.0.0.1:9/a")).unwrap()));
        assert!(!Arc::ptr_eq(&first, &origins.open(&spec("http://127.0.0.1:9/b")).unwrap()));
        drop(first);
        origins.open(&spec("http://127.0.0.1:9/c")).unwrap();
        assert!(origins.open.lock().unwrap().values().filter(|source| source.strong_count() > 0).count() == 0);
    }

    #[test]
    fn a_source_that_is_gone_fails_reads_and_nothing_else() {
        let spec = ImageSpec { bootstrap: Some("/b".into()), blobs: "/nowhere".into(), ..ImageSpec::default() };
        let source = Origins::default().open_or_absent(&spec);
        assert!(source.describe().contains("/nowhere"));
    }
}
