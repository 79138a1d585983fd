//! Sources that images share: a client for a server has threads of certificates and connections,
//! and a thousand images of one server need one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use super::api::ImageSpec;
use super::mounts::Options;
use super::remote;
use crate::net::auth::Login;
use crate::oci::{Endpoints, Repository};
use crate::source::{AbsentSource, BlobSource, Grounds, Network, NetworkOptions, OpenError};

/// What a source is opened from.
type Spec = (Vec<String>, Option<PathBuf>);

/// An open source, and what it was made with.
type Open = (Weak<dyn BlobSource>, Grounds);

/// Open sources. One stays open as long as an image uses it.
#[derive(Default)]
pub(super) struct Origins {
    open: Mutex<HashMap<Spec, Open>>,
    network: Network,
}

impl std::fmt::Debug for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Origins").finish_non_exhaustive()
    }
}

impl Options {
    /// How registries are reached.
    pub(super) fn network(&self) -> NetworkOptions {
        NetworkOptions {
            hosts_dir: self.hosts_dir.clone(),
            registries: self.registries.clone(),
            limits: self.host_limits.clone(),
            keychain: self.credentials.keychain(),
            ..NetworkOptions::default()
        }
    }
}

impl Origins {
    /// No source yet.
    pub(super) fn new(network: Network) -> Self {
        Self { network, ..Self::default() }
    }

    /// The source that `spec` names: one place, or several of which the first is asked first. Connects to nobody
    /// yet.
    pub(super) fn open(&self, spec: &ImageSpec) -> Result<Arc<dyn BlobSource>, OpenError> {
        let key = (spec.places(), spec.ca.clone());
        // A mirror may have been added, or a certificate renewed, since.
        let grounds = self.network.grounds(&key.0, spec.ca.as_deref())?;
        let open = self.open.lock().unwrap().get(&key).filter(|(_, made)| *made == grounds).cloned();
        if let Some(open) = open.and_then(|(source, _)| source.upgrade()) {
            return Ok(open);
        }
        let source = self.network.open(&key.0, spec.ca.as_deref())?;
        let mut open = self.open.lock().unwrap();
        open.retain(|_, (source, _)| source.strong_count() > 0);
        open.insert(key, (Arc::downgrade(&source), grounds));
        Ok(source)
    }

    /// The registry `host` and its mirrors, for questions that nobody waits for after `until`.
    pub(super) fn registry(&self, host: &str, ca: Option<&Path>, until: Instant) -> Result<Endpoints, OpenError> {
        remote::endpoints(&self.network, host, ca, until)
    }

    /// Where the blobs of `spec` would be fetched from, in order, without secrets.
    pub(super) fn addresses(&self, spec: &ImageSpec) -> Result<Vec<String>, OpenError> {
        self.network.addresses(&spec.places(), spec.ca.as_deref())
    }

    /// Who we are to the registry of `repository`, without secrets. Given up at `until`.
    pub(super) async fn login(&self, repository: &Repository, until: Instant) -> String {
        let (keychain, host, path) = (self.network.keychain(), repository.host(), repository.path());
        let login = tokio::time::timeout_at(until.into(), keychain.login(host, path)).await;
        let Ok(login) = login else { return "whoever a place of credentials says that does not answer".to_owned() };
        let who = match login {
            Ok(None) => return "nobody".to_owned(),
            Ok(Some(Login::Basic { user, .. })) => user,
            Ok(Some(Login::Identity(_) | Login::Bearer(_))) => "whoever a token says".to_owned(),
            Err(error) => return error.to_string(),
        };
        keychain.origin(host, path).map_or_else(|| who.clone(), |origin| format!("{who}, from {origin}"))
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
        assert!(origins.open.lock().unwrap().values().filter(|(source, _)| source.strong_count() > 0).count() == 0);
    }

    #[test]
    fn a_source_that_is_gone_fails_reads_and_nothing_else() {
        let spec = ImageSpec { bootstrap: Some("/b".into()), blobs: "/nowhere".into(), ..ImageSpec::default() };
        let source = Origins::default().open_or_absent(&spec);
        assert!(source.describe().contains("/nowhere"));
    }
}
