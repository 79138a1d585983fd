//! Images that a tool reads: found, opened, and read on a runtime of their own.
//!
//! An image is a file, or in a registry. Registries are asked as the daemon asks them, by the same code, settings and
//! credentials, but without a daemon and its cache.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;

use super::serve;
use super::settings::settings_for_tools;
use crate::daemon::remote::{self, FETCH_LAYER, LOOK_UP};
use crate::image::Image;
use crate::net::{ClientOptions, RetryPolicy};
use crate::oci::{self, Platform, Reference, Resolved};
use crate::reader::bootstrap::Found;
use crate::reader::{Files, LoadError, bootstrap};
use crate::source::{self, BlobSource, Network, NetworkOptions, OnThisHost};
use crate::sys;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::Telemetry;

/// How registries are asked.
#[derive(Debug, clap::Args)]
pub(super) struct RegistryArgs {
    /// For which machine, as OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, where an image in a registry comes for
    /// several [default: this one]
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,

    /// PEM file with a certificate authority to trust besides the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,

    /// Config file of the daemon, which says how registries are asked [default: /etc/rafsd/config.toml, if it is there]
    #[arg(long, value_name = "FILE", env = "RAFSD_CONFIG")]
    config: Option<PathBuf>,
}

/// Where the blobs of an image are.
#[derive(Debug, clap::Args)]
pub(super) struct BlobsArgs {
    /// Where the blobs are: a directory, the http(s) URL below which each has its id as name, or
    /// docker://HOST/REPOSITORY; if not given, where the image is: its repository, or blobs/ beside the file, or else
    /// the directory that the file is in
    ///
    /// Secrets in a URL, such as a password or a signature, can be seen in the process list by
    /// every user of this host while this command runs.
    #[arg(long, value_name = "DIR|URL")]
    blobs: Option<String>,

    #[command(flatten)]
    registry: RegistryArgs,
}

/// An image with its blobs. Not for use inside a runtime: its reads block.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) files: Files,
    /// Outlives the files, which fetch on it.
    _runtime: Runtime,
}

/// A bootstrap, and where it was found.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) found: Found,
    pub(super) origin: Origin,
}

/// Where a bootstrap was found.
#[derive(Debug)]
pub(super) enum Origin {
    File(PathBuf),
    Registry(Box<Network>, Box<Resolved>),
}

impl RegistryArgs {
    /// The bootstrap of the image that is called `image`.
    pub(super) fn find(&self, image: &Path, runtime: &Runtime) -> anyhow::Result<Place> {
        let Some(reference) = reference(image)? else {
            if self.platform.is_some() {
                bail!("--platform is about images in registries; {} is a file", image.display());
            }
            return Ok(Place { found: bootstrap::find(image, None)?, origin: Origin::File(image.to_owned()) });
        };
        let network = self.network()?;
        let (repository, ca) = (reference.repository(), self.ca.as_deref());
        let fetch = remote::endpoints(&network, repository.host(), ca, Instant::now() + LOOK_UP)?;
        let registry = oci::Registry::new(&fetch, repository);
        let resolved = runtime.block_on(oci::resolve(&registry, &reference, self.platform.as_ref()))?;
        let fetch = remote::endpoints(&network, repository.host(), ca, Instant::now() + FETCH_LAYER)?;
        let dir = std::env::temp_dir();
        let scratch = remote::scratch(&dir).with_context(|| format!("cannot write to {}", dir.display()))?;
        let bytes = runtime.block_on(remote::bootstrap(&fetch, &resolved, scratch))?;
        let found = bootstrap::of_bytes(bytes, Path::new(&reference.to_string()))?;
        Ok(Place { found, origin: Origin::Registry(Box::new(network), Box::new(resolved)) })
    }

    /// The image that is called `image`.
    pub(super) fn image(&self, image: &Path) -> anyhow::Result<Image> {
        parse(self.find(image, &runtime()?)?.found, image)
    }

    /// Registries as the daemon asks them.
    fn network(&self) -> anyhow::Result<Network> {
        let settings = settings_for_tools(self.config.as_deref())?;
        let credentials = serve::credentials(&settings, &Sandbox::off())?;
        let options = NetworkOptions {
            hosts_dir: settings.hosts_dir,
            registries: settings.registries,
            limits: settings.host_limits,
            keychain: credentials.keychain(),
            ..NetworkOptions::default()
        };
        Ok(Network::new(options, Telemetry::default()))
    }
}

impl BlobsArgs {
    /// The bootstrap of the image that is called `image`.
    pub(super) fn find(&self, image: &Path, runtime: &Runtime) -> anyhow::Result<Place> {
        self.registry.find(image, runtime)
    }

    /// Opens the image that is called `image` and the tables of its blobs.
    pub(super) fn open(&self, image: &Path) -> anyhow::Result<Opened> {
        let runtime = runtime()?;
        let Place { found, origin } = self.find(image, &runtime)?;
        let parsed = parse(found, image)?;
        self.admit(&origin, &parsed)?;
        let files = Files::of(parsed, self.source(&origin)?, runtime.handle().clone());
        Ok(Opened { files: files?, _runtime: runtime })
    }

    /// Fails if a file that is about to be written is one that is about to be read.
    pub(super) fn refuse_input(&self, place: &Path, bootstrap: &Path, image: &Image) -> anyhow::Result<()> {
        let Ok(place_id) = sys::files::inode_id_at(place) else { return Ok(()) };
        let place_of = match &self.blobs {
            Some(spec) => source::on_this_host(spec),
            None if matches!(reference(bootstrap), Ok(None)) => Some(OnThisHost::Directory(beside(bootstrap))),
            None => None,
        };
        let blobs = match place_of {
            Some(OnThisHost::Directory(dir)) => {
                image.devices().iter().map(|device| dir.join(device.blob.as_str())).collect()
            }
            Some(OnThisHost::File(file)) => vec![file],
            None => Vec::new(),
        };
        for input in blobs.into_iter().chain([bootstrap.to_owned()]) {
            if sys::files::inode_id_at(&input).is_ok_and(|id| id == place_id) {
                anyhow::bail!("{} is a part of the image that is read; write somewhere else", place.display());
            }
        }
        Ok(())
    }

    /// Where the blobs of an image are whose bootstrap is from `origin`.
    pub(super) fn source(&self, origin: &Origin) -> anyhow::Result<Arc<dyn BlobSource>> {
        let ca = self.registry.ca.as_deref();
        match (&self.blobs, origin) {
            (Some(spec), Origin::Registry(network, _)) => Ok(network.open(std::slice::from_ref(spec), ca)?),
            (Some(spec), Origin::File(_)) if Reference::is_meant(spec) => {
                Ok(self.registry.network()?.open(std::slice::from_ref(spec), ca)?)
            }
            (Some(spec), Origin::File(_)) => {
                let mut options = ClientOptions::default();
                options.extra_ca_pem.extend(self.registry.ca.clone());
                Ok(source::open(spec, &options, RetryPolicy::default())?)
            }
            (None, Origin::File(bootstrap)) => Ok(Arc::new(source::LocalSource::new(beside(bootstrap))?)),
            (None, Origin::Registry(network, resolved)) => {
                Ok(network.open(&[format!("docker://{}", resolved.reference.repository())], ca)?)
            }
        }
    }

    /// Fails if the bootstrap leads to blobs that the image's own manifest does not name, unless it was said that they
    /// are kept elsewhere.
    pub(super) fn admit(&self, origin: &Origin, image: &Image) -> anyhow::Result<()> {
        match origin {
            Origin::Registry(_, resolved) if self.blobs.is_none() => Ok(remote::ensure_named(resolved, image)?),
            _ => Ok(()),
        }
    }
}

/// The image in a registry that `image` names, if it is none in a file.
fn reference(image: &Path) -> anyhow::Result<Option<Reference>> {
    match image.to_str().filter(|text| Reference::is_meant(text)) {
        Some(text) => Ok(Some(text.parse()?)),
        None => Ok(None),
    }
}

/// The image in a bootstrap of the image that is called `image`.
fn parse(found: Found, image: &Path) -> anyhow::Result<Image> {
    let parsed = Image::parse(found.load()?.bytes);
    Ok(parsed.map_err(|cause| LoadError::Image { path: image.to_owned(), cause })?)
}

/// What reads of blobs run on.
pub(super) fn runtime() -> anyhow::Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.context("cannot start threads for reading")
}

/// Where the blobs of an image are if nobody says otherwise.
fn beside(bootstrap: &Path) -> PathBuf {
    let directory = bootstrap.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let blobs = directory.join("blobs");
    if blobs.is_dir() { blobs } else { directory.to_owned() }
}
