//! Sources that images share: a client for a server has threads of certificates and connections,
//! and a thousand images of one server need one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use reqwest::Url;

use super::api::ImageSpec;
use crate::net::{ClientOptions, Clock, Endpoint, EndpointOptions, RetryPolicy};
use crate::oci::{Endpoints, InvalidReference, Reference, Repository};
use crate::source::{self, AbsentSource, BlobSource, HttpUpstream, OpenError, Tier, Tiers, WholeSource};
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

    /// The source that `spec` names: one place, or several of which the first is asked first. Connects to nobody
    /// yet.
    pub(super) fn open(&self, spec: &ImageSpec) -> Result<Arc<dyn BlobSource>, OpenError> {
        let key = (spec.places(), spec.ca.clone());
        if let Some(open) = self.open.lock().unwrap().get(&key).and_then(Weak::upgrade) {
            return Ok(open);
        }
        let source = self.open_all(&key.0, spec.ca.as_deref())?;
        let mut open = self.open.lock().unwrap();
        open.retain(|_, source| source.strong_count() > 0);
        open.insert(key, Arc::downgrade(&source));
        Ok(source)
    }

    fn open_all(&self, places: &[String], ca: Option<&Path>) -> Result<Arc<dyn BlobSource>, OpenError> {
        if let [place] = places
            && !Reference::is_meant(place)
        {
            return source::open_counted(place, &options(ca), RetryPolicy::default(), &self.telemetry);
        }
        let mut tiers = Vec::new();
        for place in places {
            if Reference::is_meant(place) {
                tiers.extend(self.repository(place, ca)?);
            } else {
                let source = source::open_counted(place, &options(ca), RetryPolicy::default(), &self.telemetry)?;
                tiers.push(Tier::new(WholeSource::new(source)));
            }
        }
        let tiers = Tiers::new(tiers, RetryPolicy::default(), Clock::default());
        let place = self.telemetry.place(&tiers.describe());
        Ok(source::counted(place.clone(), tiers.counting(place)))
    }

    /// The blobs of a repository, from the registry's mirrors first.
    fn repository(&self, place: &str, ca: Option<&Path>) -> Result<Vec<Tier>, OpenError> {
        let repository: Repository =
            place.parse().map_err(|error: InvalidReference| OpenError::Url { detail: error.to_string() })?;
        let path = repository.path();
        let tier = |endpoint: Arc<Endpoint>| {
            let base = endpoint.base().join(&format!("/v2/{path}"));
            let base = base.map_err(|error| OpenError::Url { detail: error.to_string() })?;
            Ok(Tier::new(HttpUpstream::repository(endpoint, base, path)))
        };
        self.endpoints(repository.host(), ca)?.into_iter().map(tier).collect()
    }

    /// The registry `host` and its mirrors, in the order in which they are asked.
    fn endpoints(&self, host: &str, ca: Option<&Path>) -> Result<Vec<Arc<Endpoint>>, OpenError> {
        let options = EndpointOptions { client: options(ca), ..EndpointOptions::default() };
        let base = Url::parse(&format!("http://{host}/")).map_err(|e| OpenError::Url { detail: e.to_string() })?;
        Ok(vec![Arc::new(Endpoint::new(&base, options, Clock::default())?)])
    }

    /// The registry `host` for questions that nobody waits for after `until`.
    pub(super) fn registry(&self, host: &str, ca: Option<&Path>, until: Instant) -> Result<Endpoints, OpenError> {
        Ok(Endpoints::new(host, self.endpoints(host, ca)?, RetryPolicy::default(), until))
    }

    /// Where the blobs of `spec` would be fetched from, in order, without secrets.
    pub(super) fn addresses(&self, spec: &ImageSpec) -> Result<Vec<String>, OpenError> {
        let mut addresses = Vec::new();
        for place in spec.places() {
            if Reference::is_meant(&place) {
                let tiers = self.repository(&place, spec.ca.as_deref())?;
                addresses.extend(tiers.iter().map(|tier| tier.upstream.describe()));
            } else {
                addresses.push(self.open_all(&[place], spec.ca.as_deref())?.describe());
            }
        }
        Ok(addresses)
    }

    /// Who we are to the registry of `repository`, without secrets.
    pub(super) async fn login(&self, repository: &Repository) -> String {
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

/// How servers are reached that nothing else is said about.
fn options(ca: Option<&Path>) -> ClientOptions {
    let mut options = ClientOptions::default();
    options.extra_ca_pem.extend(ca.map(Path::to_owned));
    options
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
