//! The HTTP client, built one way.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use reqwest::dns::Resolve;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, ClientBuilder, Identity, Url, redirect};

use super::Names;
use crate::base::Secret;

/// How this program introduces itself.
const USER_AGENT: &str = concat!("rafsd/", env!("CARGO_PKG_VERSION"));

/// How patient a client is, whom it trusts, and who it is.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Longest time to connect, TLS included.
    pub connect_timeout: Duration,
    /// Longest silence in the middle of an answer, or before it.
    pub idle_timeout: Duration,
    /// Redirects followed for one request.
    pub max_redirects: usize,
    /// PEM files with authorities to trust besides the system's.
    pub extra_ca_pem: Vec<PathBuf>,
    /// Certificate to show to servers that ask for one.
    pub identity: Option<IdentityFiles>,
    /// Believe whoever answers for this server. Never for servers that it redirects to.
    pub skip_verify: bool,
    /// How the network is reached.
    pub proxy: Proxy,
    /// Names whose addresses are known without asking; port 0 stands for that of the URL.
    pub resolve: Vec<(String, SocketAddr)>,
    /// Who knows the addresses of all other names; `None` for the system.
    pub names: Option<Arc<dyn Names>>,
}

/// A client certificate and its key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentityFiles {
    /// The certificate, with those that lead to its authority.
    pub cert: PathBuf,
    /// Its key, unless that is in the same file.
    pub key: Option<PathBuf>,
}

/// How the network is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Proxy {
    /// As the environment says (`HTTPS_PROXY` and others); directly for a server on this very host.
    #[default]
    Environment,
    /// By no proxy at all.
    Direct,
    /// Through this one, always. The address may hold a login.
    Through(Secret),
}

impl Proxy {
    /// Names of the hosts that may be asked to pass something on.
    pub(super) fn hosts(&self) -> Vec<String> {
        let host = |address: &str| {
            let address = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
            Url::parse(&address).ok()?.host_str().map(ToOwned::to_owned)
        };
        match self {
            Self::Direct => Vec::new(),
            Self::Through(address) => host(address.expose()).into_iter().collect(),
            Self::Environment => {
                let names = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
                names.into_iter().filter_map(|name| host(&std::env::var(name).ok()?)).collect()
            }
        }
    }
}

impl Default for ClientOptions {
    /// 5 s to connect, 10 s of silence, 5 redirects, the system's authorities and proxies.
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            max_redirects: 5,
            extra_ca_pem: Vec::new(),
            identity: None,
            skip_verify: false,
            proxy: Proxy::Environment,
            resolve: Vec::new(),
            names: None,
        }
    }
}

/// Why no client could be built.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// A file of extra authorities cannot be read.
    #[error("cannot read CA file {}", path.display())]
    CaFile {
        path: PathBuf,
        #[source]
        cause: Arc<io::Error>,
    },
    /// A file of extra authorities holds no certificate.
    #[error("no PEM certificate in CA file {}", path.display())]
    NoCertificate { path: PathBuf },
    /// A file of the client certificate cannot be read.
    #[error("cannot read the client certificate or key in {}", path.display())]
    IdentityFile {
        path: PathBuf,
        #[source]
        cause: Arc<io::Error>,
    },
    /// A client certificate and its key are not of use.
    #[error("{} is no PEM client certificate with its key", path.display())]
    BadIdentity { path: PathBuf },
    /// What should go into a header cannot.
    #[error("the value of header {name} cannot be sent")]
    BadHeader { name: String },
    /// The address of a proxy is malformed. It is not repeated here: it may hold a secret.
    #[error("the address of the proxy is not a valid URL")]
    BadProxy,
    /// An https address was given and there is nobody to trust.
    #[error("no trusted certificates on this system; install ca-certificates or give a CA file")]
    NoRoots,
    /// The TLS library or the client refused its settings, such as an unusable CA certificate.
    #[error("cannot set up the HTTP client")]
    Setup(#[source] Arc<reqwest::Error>),
}

/// Makes *ring* the process's TLS provider, unless there is one already. Cheap to call again.
///
/// [`client()`] calls it; whoever uses rustls on their own has to as well.
pub fn install_tls() {
    // An error says that a provider is installed, which is all that is wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// Builds a client for requests to `base`. It follows no redirects and decompresses nothing.
///
/// # Errors
/// A file of the options cannot be used, or `base` is https and no authority is trusted at all.
pub fn client(options: &ClientOptions, base: &Url) -> Result<Client, ClientError> {
    build(options, base, Ok)
}

/// The same for an endpoint: the server itself, with everything that `options` say.
pub(super) fn home(options: &ClientOptions, base: &Url, resolver: Arc<dyn Resolve>) -> Result<Client, ClientError> {
    let identity = options.identity.as_ref().map(identity).transpose()?;
    build(options, base, move |mut builder| {
        if let Some(identity) = identity.clone() {
            builder = builder.identity(identity);
        }
        if options.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        Ok(builder.dns_resolver(resolver.clone()))
    })
}

/// The same for where an endpoint redirects to: nothing that tells who we are, nobody believed blindly.
pub(super) fn foreign(options: &ClientOptions, base: &Url, resolver: Arc<dyn Resolve>) -> Result<Client, ClientError> {
    build(options, base, move |builder| Ok(builder.dns_resolver(resolver.clone())))
}

fn build(
    options: &ClientOptions,
    base: &Url,
    more: impl Fn(ClientBuilder) -> Result<ClientBuilder, ClientError>,
) -> Result<Client, ClientError> {
    install_tls();
    let authorities = authorities(&options.extra_ca_pem)?;
    let setup = |error| ClientError::Setup(Arc::new(error));
    let build = |tls: &dyn Fn(ClientBuilder) -> ClientBuilder| {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]))
            .connect_timeout(options.connect_timeout)
            // The referrer of a signed URL would hand its signature to the next host.
            .referer(false)
            .redirect(redirect::Policy::none());
        let builder = match &options.proxy {
            Proxy::Environment if is_loopback(base) => builder.no_proxy(),
            Proxy::Environment => builder,
            Proxy::Direct => builder.no_proxy(),
            Proxy::Through(address) => {
                builder.proxy(reqwest::Proxy::all(address.expose()).map_err(|_| ClientError::BadProxy)?)
            }
        };
        more(tls(builder))?.build().map_err(setup)
    };
    match build(&|builder| builder.tls_certs_merge(authorities.clone())) {
        Ok(client) => Ok(client),
        // Without a single root the TLS library refuses to start. Plain HTTP does not need it.
        Err(ClientError::Setup(_)) if authorities.is_empty() => {
            let rootless = build(&|builder| builder.tls_certs_only([]))?;
            if base.scheme() == "https" && !options.skip_verify { Err(ClientError::NoRoots) } else { Ok(rootless) }
        }
        Err(error) => Err(error),
    }
}

fn identity(files: &IdentityFiles) -> Result<Identity, ClientError> {
    let read = |path: &PathBuf| {
        fs::read(path).map_err(|cause| ClientError::IdentityFile { path: path.clone(), cause: Arc::new(cause) })
    };
    let mut pem = read(&files.cert)?;
    if let Some(key) = &files.key {
        pem.push(b'\n');
        pem.extend(read(key)?);
    }
    Identity::from_pem(&pem).map_err(|_| ClientError::BadIdentity { path: files.cert.clone() })
}

fn authorities(files: &[PathBuf]) -> Result<Vec<Certificate>, ClientError> {
    let mut all = Vec::new();
    for path in files {
        let pem = fs::read(path).map_err(|cause| ClientError::CaFile { path: path.clone(), cause: Arc::new(cause) })?;
        let certificates = Certificate::from_pem_bundle(&pem).unwrap_or_default();
        if certificates.is_empty() {
            return Err(ClientError::NoCertificate { path: path.clone() });
        }
        all.extend(certificates);
    }
    Ok(all)
}

fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn only_this_host_is_loopback() {
        for (text, loopback) in [
            ("http://127.0.0.1:80/", true),
            ("http://127.8.9.1/", true),
            ("http://[::1]:1/", true),
            ("https://localhost/", true),
            ("http://10.0.0.1/", false),
            ("http://localhost.example/", false),
        ] {
            assert_eq!(is_loopback(&url(text)), loopback, "{text}");
        }
    }

    #[test]
    fn unusable_ca_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, empty) = (dir.path().join("missing.pem"), dir.path().join("empty.pem"));
        fs::write(&empty, "not a certificate").unwrap();
        let error = |path: &PathBuf| {
            let options = ClientOptions { extra_ca_pem: vec![path.clone()], ..ClientOptions::default() };
            client(&options, &url("http://a/")).unwrap_err().to_string()
        };

        assert_eq!(error(&missing), format!("cannot read CA file {}", missing.display()));
        assert_eq!(error(&empty), format!("no PEM certificate in CA file {}", empty.display()));
    }
}
