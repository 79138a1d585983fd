//! The HTTP client, built one way.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Certificate, Client, ClientBuilder, Url, redirect};

/// How this program introduces itself.
const USER_AGENT: &str = concat!("rafsd/", env!("CARGO_PKG_VERSION"));

/// How patient a client is and whom it trusts.
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
}

impl Default for ClientOptions {
    /// 5 s to connect, 10 s of silence, 5 redirects, the system's authorities.
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            max_redirects: 5,
            extra_ca_pem: Vec::new(),
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

/// Builds a client for requests to `base` and wherever it redirects to.
///
/// Answers are never decompressed, and a redirect never leads from https to http. Proxies named in
/// the environment are used, except for a `base` on this very host.
///
/// # Errors
/// An extra CA cannot be used, or `base` is https and no authority is trusted at all.
pub fn client(options: &ClientOptions, base: &Url) -> Result<Client, ClientError> {
    install_tls();
    let authorities = authorities(&options.extra_ca_pem)?;
    let build = |tls: &dyn Fn(ClientBuilder) -> ClientBuilder| {
        let mut builder = Client::builder()
            .user_agent(USER_AGENT)
            .default_headers(HeaderMap::from_iter([(ACCEPT_ENCODING, HeaderValue::from_static("identity"))]))
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.idle_timeout)
            // The referrer of a signed URL would hand its signature to the next host.
            .referer(false)
            .redirect(redirects(options.max_redirects));
        if is_loopback(base) {
            builder = builder.no_proxy();
        }
        tls(builder).build()
    };
    match build(&|builder| builder.tls_certs_merge(authorities.clone())) {
        Ok(client) => Ok(client),
        // Without a single root the TLS library refuses to start. Plain HTTP does not need it.
        Err(_) if authorities.is_empty() => {
            let rootless = build(&|builder| builder.tls_certs_only([])).map_err(|e| ClientError::Setup(Arc::new(e)))?;
            if base.scheme() == "https" { Err(ClientError::NoRoots) } else { Ok(rootless) }
        }
        Err(error) => Err(ClientError::Setup(Arc::new(error))),
    }
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

/// Why a redirect is not followed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum BadRedirect {
    #[error("redirected more than {0} times")]
    TooMany(usize),
    #[error("redirected from https to {0}")]
    Downgrade(String),
}

fn redirects(max: usize) -> redirect::Policy {
    redirect::Policy::custom(move |attempt| match judge(attempt.previous(), attempt.url(), max) {
        Ok(()) => attempt.follow(),
        Err(bad) => attempt.error(bad),
    })
}

/// Whether a chain of requests, oldest first, may go on to `next`.
fn judge(previous: &[Url], next: &Url, max: usize) -> Result<(), BadRedirect> {
    if previous.len() > max {
        return Err(BadRedirect::TooMany(max));
    }
    if previous.last().is_some_and(|from| from.scheme() == "https") && next.scheme() != "https" {
        return Err(BadRedirect::Downgrade(next.scheme().to_owned()));
    }
    Ok(())
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
    fn redirects_may_upgrade_but_never_downgrade() {
        let (plain, secure) = (url("http://a/x"), url("https://a/x"));

        assert_eq!(judge(std::slice::from_ref(&plain), &secure, 5), Ok(()));
        assert_eq!(judge(std::slice::from_ref(&plain), &plain, 5), Ok(()));
        assert_eq!(judge(&[plain.clone(), secure], &plain, 5), Err(BadRedirect::Downgrade("http".into())));
    }

    #[test]
    fn redirects_are_counted() {
        let chain = vec![url("http://a/"); 3];

        assert_eq!(judge(&chain[..2], &chain[0], 2), Ok(()));
        assert_eq!(judge(&chain, &chain[0], 2), Err(BadRedirect::TooMany(2)));
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
