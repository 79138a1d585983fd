//! How requests to one server leave this host: as its client does it, or by a proxy that is watched.

use reqwest::{Client, Method, Request, RequestBuilder, Response, Url};

use super::proxy::{Proxied, ProxyOptions};
use super::{ClientError, ClientOptions, Clock, Proxy};

/// Cheap to clone; clones are one.
#[derive(Clone, Debug)]
pub(super) enum Outlet {
    Plain(Client),
    Proxied(Proxied),
}

impl Outlet {
    /// One with the clients that `build` makes. With `proxy`, the one of `options` is watched and perhaps gone around.
    pub(super) fn new(
        options: &ClientOptions,
        proxy: Option<&ProxyOptions>,
        clock: &Clock,
        build: &dyn Fn(&ClientOptions) -> Result<Client, ClientError>,
    ) -> Result<Self, ClientError> {
        let through = build(options)?;
        let Some(proxy) = proxy else { return Ok(Self::Plain(through)) };
        let around = build(&ClientOptions { proxy: Proxy::Direct, ..options.clone() })?;
        Ok(Self::Proxied(Proxied::new(through, around, proxy.clone(), clock.clone())))
    }

    /// A request to be filled in, for [`Outlet::execute`]. A login in `url` becomes a header of it.
    pub(super) fn request(&self, method: Method, url: Url) -> RequestBuilder {
        match self {
            Self::Plain(client) => client.request(method, url),
            Self::Proxied(proxied) => proxied.request(method, url),
        }
    }

    pub(super) async fn execute(&self, request: Request) -> Result<Response, reqwest::Error> {
        match self {
            Self::Plain(client) => client.execute(request).await,
            Self::Proxied(proxied) => proxied.execute(request).await.1,
        }
    }

    /// Nobody answered for as long as anybody waits.
    pub(super) fn was_silent(&self) {
        if let Self::Proxied(proxied) = self {
            proxied.was_silent();
        }
    }
}
