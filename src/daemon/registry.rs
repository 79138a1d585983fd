//! Explains where a reference leads and how it would be mounted here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{DocumentReport, LayerReport, ResolveReport, ResolveRequest};
use super::asker::Asker;
use super::lookup::reference_of;
use super::{Daemon, DaemonError};
use crate::oci::document::{Parsed, annotation};
use crate::oci::{How, Layout, Link, Resolved, Role, Shape};

/// How long finding out who we are may take.
const LOGIN: Duration = Duration::from_secs(30);

impl Daemon {
    /// Where a reference leads, and how it would be mounted here. That it cannot be mounted is no error. Blocks.
    pub fn resolve(&self, request: &ResolveRequest, asker: &Asker) -> Result<ResolveReport, DaemonError> {
        let _errand = Arc::clone(&self.errands);
        let spec = &request.image;
        let reference = reference_of(spec)?;
        let platform = spec.wanted_platform()?;
        let resolved = self.resolve_now(spec, &reference, platform.as_ref(), asker)?;
        let backend = self.backends.choose(request.backend);
        let problem = match (resolved.image(), &backend) {
            (Ok(image), Ok(_)) if image.layout == Layout::External && spec.blobs.is_empty() => {
                Some("the registry has only its bootstrap; unless no file of it has data, say where its blobs are with --blobs".to_owned())
            }
            (Ok(_), Ok(_)) => None,
            (Err(error), _) => Some(error.to_string()),
            (Ok(_), Err(error)) => Some(error.to_string()),
        };
        let (kind, layout, rafs_version) = match &resolved.shape {
            Shape::Rafs(image) => {
                ("a RAFS image".to_owned(), Some(image.layout.name().to_owned()), image.version.clone())
            }
            Shape::Foreign(foreign) => (foreign.what().to_owned(), None, None),
        };
        let (backend, why) = backend.map_or((None, None), |(kind, why)| (Some(kind), Some(why)));
        Ok(ResolveReport {
            reference: reference.to_string(),
            documents: resolved.links.iter().map(document).collect(),
            manifest: resolved.manifest_digest.to_string(),
            layers: layers(&resolved),
            kind,
            layout,
            rafs_version,
            problem,
            sources: self.origins.addresses(spec).map_err(DaemonError::SourceSpec)?,
            login: self.runtime.block_on(self.origins.login(reference.repository(), Instant::now() + LOGIN)),
            backend,
            why,
        })
    }
}

fn document(link: &Link) -> DocumentReport {
    let parsed = Parsed::parse(link.text.as_bytes(), link.content_type.as_deref());
    let kind = if matches!(parsed, Ok(Parsed::Index(_))) { "index" } else { "manifest" };
    let how = match link.how {
        How::Named => "named",
        How::Listed => "listed",
        How::Marked => "marked",
        How::Refers => "refers",
    };
    DocumentReport {
        how: how.to_owned(),
        kind: kind.to_owned(),
        digest: link.digest.clone(),
        bytes: link.text.len() as u64,
        platform: link.platform.clone(),
    }
}

fn layers(resolved: &Resolved) -> Vec<LayerReport> {
    let layers = resolved.manifest.layers.iter().enumerate();
    let report = |(at, layer): (usize, &crate::oci::document::Descriptor)| LayerReport {
        role: Role::of(&resolved.manifest, at, &resolved.shape).name().to_owned(),
        digest: layer.digest.clone(),
        media_type: layer.media_type.clone(),
        bytes: layer.size,
        about: layer.annotations.get(annotation::REF).cloned(),
    };
    layers.map(report).collect()
}
