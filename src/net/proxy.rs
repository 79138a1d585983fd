//! A forward proxy in front of a host, which may fall ill.
//!
//! Nobody waits for an examination: a request finds out how the proxy was, and has it examined by somebody else when that
//! is long ago. A proxy that nobody uses is therefore never asked. Without an address to ask, failed requests
//! tell. Whether the host is asked without an ill proxy is the operator's decision; if not, every request goes
//! through it or fails.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::{Client, Method, Request, RequestBuilder, Response, Url};

use super::Clock;

/// How a proxy is watched.
#[derive(Clone, Debug)]
pub struct ProxyOptions {
    /// Asked by `GET`, directly; an answer below 400 means that the proxy is well.
    pub ping: Option<Url>,
    /// How long a finding counts.
    pub check_interval: Duration,
    /// Longest wait for an answer to an examination.
    pub ping_timeout: Duration,
    /// Whether the host is asked directly while the proxy is ill.
    pub fallback: bool,
}

impl Default for ProxyOptions {
    /// nydusd's: 5 s, with fallback.
    fn default() -> Self {
        let seconds = Duration::from_secs(5);
        Self { ping: None, check_interval: seconds, ping_timeout: seconds, fallback: true }
    }
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Through,
    Around,
}

/// A client that goes through a proxy, and perhaps around it. Cheap to clone. Needs a tokio runtime.
#[derive(Clone, Debug)]
pub struct Proxied(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    through: Client,
    /// There is none where nobody may go around.
    around: Option<Client>,
    options: ProxyOptions,
    clock: Clock,
    health: Mutex<Health>,
}

#[derive(Debug)]
struct Health {
    well: bool,
    /// When that was found; `None` for never.
    found: Option<Instant>,
    examined_now: bool,
}

impl Proxied {
    /// `through` uses the proxy for everything, `around` for nothing.
    pub fn new(through: Client, around: Client, options: ProxyOptions, clock: Clock) -> Self {
        let around = (options.fallback || options.ping.is_some()).then_some(around);
        let health = Mutex::new(Health { well: true, found: None, examined_now: false });
        Self(Arc::new(Shared { through, around, options, clock, health }))
    }

    /// A request to be filled in, for [`Proxied::execute`].
    pub fn request(&self, method: Method, url: Url) -> RequestBuilder {
        self.0.through.request(method, url)
    }

    /// Sends a request the way that is open, and says which it was.
    ///
    /// # Errors
    /// It failed there. With fallback, a request that did not reach its proxy has also gone around.
    pub async fn execute(&self, request: Request) -> (Way, Result<Response, reqwest::Error>) {
        let Shared { through, around, options, .. } = &*self.0;
        let around = around.as_ref().filter(|_| options.fallback);
        if self.way() == Way::Around
            && let Some(around) = around
        {
            return (Way::Around, around.execute(request).await);
        }
        let again = around.and_then(|around| Some((around, request.try_clone()?)));
        match (through.execute(request).await, again) {
            (Err(error), again) if error.is_connect() => {
                self.found(false);
                match again {
                    Some((around, request)) => (Way::Around, around.execute(request).await),
                    None => (Way::Through, Err(error)),
                }
            }
            (outcome, _) => (Way::Through, outcome),
        }
    }

    /// The way that is open by what is known, and has it looked at again if that is old.
    pub fn way(&self) -> Way {
        let Shared { options, clock, .. } = &*self.0;
        let mut health = self.0.health.lock().unwrap();
        let now = clock.now();
        let old = health.found.is_none_or(|found| now.saturating_duration_since(found) >= options.check_interval);
        if old && !health.examined_now {
            match &options.ping {
                Some(ping) => {
                    health.examined_now = true;
                    tokio::spawn(self.clone().examine(ping.clone()));
                }
                // The next request finds out.
                None => health.well = true,
            }
        }
        if health.well || !options.fallback { Way::Through } else { Way::Around }
    }

    /// A request got no answer for as long as anybody waits. Whose fault that is cannot be told; where the proxy may be
    /// left out, the next ones go around it until it is looked at again.
    pub(super) fn was_silent(&self) {
        if self.way() == Way::Through {
            self.found(false);
        }
    }

    async fn examine(self, ping: Url) {
        let Shared { around, options, clock, .. } = &*self.0;
        let Some(client) = around else { return };
        let until = clock.now() + options.ping_timeout;
        let answer = clock.timeout_at(until, client.get(ping).send()).await;
        let well = answer.is_ok_and(|answer| answer.is_ok_and(|answer| answer.status().as_u16() < 400));
        self.found(well);
    }

    fn found(&self, well: bool) {
        let mut health = self.0.health.lock().unwrap();
        if health.well != well {
            tracing::warn!(well, fallback = self.0.options.fallback, "the proxy changed its health");
        }
        *health = Health { well, found: Some(self.0.clock.now()), examined_now: false };
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener};
    use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst};

    use super::*;

    /// Answers every request with a status that may change, and counts them.
    #[derive(Clone)]
    struct Counter(SocketAddr, Arc<(AtomicU16, AtomicUsize)>);

    impl Counter {
        fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let shared = Arc::new((AtomicU16::new(200), AtomicUsize::new(0)));
            let counter = Self(listener.local_addr().unwrap(), shared.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    shared.1.fetch_add(1, SeqCst);
                    let _ = stream.read(&mut [0; 4096]);
                    let status = shared.0.load(SeqCst);
                    let _ = write!(stream, "HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
                }
            });
            counter
        }

        fn url(&self) -> Url {
            Url::parse(&format!("http://{}/", self.0)).unwrap()
        }

        fn seen(&self) -> usize {
            self.1.1.load(SeqCst)
        }
    }

    /// An address where nobody listens.
    fn nobody() -> Url {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Url::parse(&format!("http://{}/", listener.local_addr().unwrap())).unwrap()
    }

    fn proxied(proxy: &Url, options: ProxyOptions) -> Proxied {
        crate::net::install_tls();
        let through = Client::builder().proxy(reqwest::Proxy::all(proxy.clone()).unwrap()).build().unwrap();
        let around = Client::builder().no_proxy().build().unwrap();
        Proxied::new(through, around, options, Clock::default())
    }

    async fn ask(proxied: &Proxied, url: &Url) -> (Way, bool) {
        let (way, answer) = proxied.execute(Request::new(reqwest::Method::GET, url.clone())).await;
        (way, answer.is_ok())
    }

    #[tokio::test]
    async fn a_well_proxy_is_used_and_the_host_sees_nobody() {
        let (proxy, host) = (Counter::start(), Counter::start());
        let proxied = proxied(&proxy.url(), ProxyOptions::default());

        assert_eq!(ask(&proxied, &host.url()).await, (Way::Through, true));
        assert_eq!((proxy.seen(), host.seen()), (1, 0));
    }

    #[tokio::test]
    async fn without_fallback_no_socket_goes_elsewhere() {
        let host = Counter::start();
        let proxied = proxied(&nobody(), ProxyOptions { fallback: false, ..ProxyOptions::default() });

        for _ in 0..3 {
            assert_eq!(ask(&proxied, &host.url()).await, (Way::Through, false));
        }
        assert_eq!(host.seen(), 0);
    }

    #[tokio::test]
    async fn an_ill_proxy_without_fallback_is_used_all_the_same() {
        let (proxy, host) = (Counter::start(), Counter::start());
        let proxied = proxied(
            &proxy.url(),
            ProxyOptions {
                fallback: false,
                ping: Some(nobody()),
                check_interval: Duration::ZERO,
                ..ProxyOptions::default()
            },
        );
        proxied.clone().examine(nobody()).await;

        assert_eq!(ask(&proxied, &host.url()).await, (Way::Through, true));
        assert_eq!((proxy.seen(), host.seen()), (1, 0));
    }

    #[tokio::test]
    async fn a_dead_proxy_costs_no_request_and_is_left_alone_for_a_while() {
        let host = Counter::start();
        let options = ProxyOptions { check_interval: Duration::from_secs(3600), ..ProxyOptions::default() };
        let proxied = proxied(&nobody(), options);

        assert_eq!(ask(&proxied, &host.url()).await, (Way::Around, true));
        assert_eq!(proxied.way(), Way::Around);
        assert_eq!(ask(&proxied, &host.url()).await, (Way::Around, true));
        assert_eq!(host.seen(), 2);
    }

    #[tokio::test]
    async fn what_the_examination_finds_decides_the_way_and_nobody_waits_for_it() {
        let (proxy, ping) = (Counter::start(), Counter::start());
        let options = ProxyOptions {
            ping: Some(ping.url()),
            check_interval: Duration::from_secs(3600),
            ..ProxyOptions::default()
        };
        let proxied = proxied(&proxy.url(), options);

        ping.1.0.store(503, SeqCst);
        proxied.clone().examine(ping.url()).await;
        assert_eq!(proxied.way(), Way::Around);
        ping.1.0.store(200, SeqCst);
        proxied.clone().examine(ping.url()).await;
        assert_eq!(proxied.way(), Way::Through);
        assert_eq!(ping.seen(), 2, "what was found counts for an hour");
    }
}
