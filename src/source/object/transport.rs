//! How requests to buckets get there: through this program's own client.

use std::error::Error;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use reqwest::Client;
use reqwest::header::HeaderMap;

/// The head of an answer, as it came.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
}

/// Travels with a request and brings the head of its answer back. Requests for credentials have none.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Arc<Mutex<Option<Head>>>);

impl Seen {
    pub(super) fn take(&self) -> Option<Head> {
        self.0.lock().unwrap().take()
    }
}

/// Sends what the crate has signed.
#[derive(Clone, Debug)]
pub(super) struct Transport {
    pub(super) client: Client,
    /// Whether the services may be asked that a cloud has for its own machines.
    pub(super) metadata: bool,
}

/// Nobody asked us to ask there.
#[derive(Debug, thiserror::Error)]
#[error("credentials of the machine were needed; say instance_credentials=true if they are to be used")]
struct NoInstance;

impl HttpConnector for Transport {
    fn connect(&self, _options: &object_store::ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl HttpService for Transport {
    fn call<'life0, 'async_trait>(
        &'life0 self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(async move {
            if !self.metadata && request.uri().host().is_some_and(is_metadata) {
                return Err(HttpError::new(HttpErrorKind::Unknown, NoInstance));
            }
            let seen = request.extensions().get::<Seen>().cloned();
            let response = HttpService::call(&self.client, request).await?;
            if let Some(Seen(head)) = seen {
                let (status, headers) = (response.status().as_u16(), response.headers().clone());
                *head.lock().unwrap() = Some(Head { status, headers });
            }
            Ok(response)
        })
    }
}

/// Whether a host is one where clouds tell their own machines who they are.
fn is_metadata(host: &str) -> bool {
    match host.trim_matches(['[', ']']).parse() {
        Ok(IpAddr::V4(ip)) => ip.is_link_local() || ip.octets() == [100, 100, 100, 200],
        Ok(IpAddr::V6(ip)) => ip.is_unicast_link_local() || ip.segments()[0] == 0xfd00 && ip.segments()[1] == 0x0ec2,
        Err(_) => {
            let host = host.trim_end_matches('.').to_ascii_lowercase();
            host == "metadata" || host == "metadata.google.internal"
        }
    }
}

/// What the network said, in words that hold no secret.
pub(super) struct Told {
    pub(super) detail: String,
    /// Whether the other side must not be believed; asking again would not change it.
    pub(super) untrusted: bool,
}

/// What `cause` tells, if it comes from the network.
pub(super) fn network_error(cause: &(dyn Error + 'static)) -> Option<Told> {
    if let Some(refused) = cause.downcast_ref::<NoInstance>() {
        return Some(Told { detail: refused.to_string(), untrusted: false });
    }
    // The crate has taken the address out of it.
    let error = cause.downcast_ref::<reqwest::Error>()?;
    let causes = || std::iter::successors(Some(error as &(dyn Error + 'static)), |&error| error.source());
    let certificate = causes().find_map(tls_error).is_some_and(|e| matches!(e, rustls::Error::InvalidCertificate(_)));
    let detail = causes().map(ToString::to_string).collect::<Vec<_>>().join(": ");
    Some(Told { detail, untrusted: certificate })
}

/// The error of the TLS library that `cause` is, or hides: one I/O error wraps another there, and neither lists it.
fn tls_error<'a>(cause: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    cause.downcast_ref().or_else(|| tls_error(cause.downcast_ref::<io::Error>()?.get_ref()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_for_a_clouds_own_machines_are_known() {
        for host in [
            "169.254.169.254",
            "169.254.170.2",
            "[fd00:ec2::254]",
            "metadata.google.internal",
            "METADATA",
            "100.100.100.200",
            "[fe80::1]",
        ] {
            assert!(is_metadata(host), "{host}");
        }
        for host in ["s3.amazonaws.com", "10.0.0.1", "127.0.0.1", "[::1]", "metadata.example", "[fd00::1]"] {
            assert!(!is_metadata(host), "{host}");
        }
    }
}
