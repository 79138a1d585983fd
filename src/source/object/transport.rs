//! How requests to buckets get there: through this program's own client.

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use reqwest::Client;
use reqwest::header::HeaderMap;

use crate::net::{SendError, is_special, sorted};

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
            if !self.metadata && request.uri().host().is_some_and(is_special) {
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

/// What `cause` tells, if it comes from the network, in words that hold no secret.
pub(super) fn network_error(cause: &(dyn Error + 'static)) -> Option<SendError> {
    if let Some(refused) = cause.downcast_ref::<NoInstance>() {
        return Some(SendError::Transport(refused.to_string()));
    }
    // The crate has taken the address out of it.
    cause.downcast_ref().map(sorted)
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
            assert!(is_special(host), "{host}");
        }
        for host in ["s3.amazonaws.com", "10.0.0.1", "127.0.0.1", "[::1]", "metadata.example", "[fd00::1]"] {
            assert!(!is_special(host), "{host}");
        }
    }
}
