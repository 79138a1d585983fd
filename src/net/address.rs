//! Where a server may send us.
//!
//! A registry that redirects is believed as far as the public network goes. It may not make this host
//! ask its own services, its neighbours or the metadata service of its cloud, unless the registry itself
//! lives among them.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};

use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::ClientOptions;

/// Finds the addresses of hosts in another way than the system does. What it finds is judged like anything else.
pub trait Names: Send + Sync + fmt::Debug {
    /// The addresses of `host`; port 0 stands for that of the URL.
    fn lookup(&self, host: &str) -> Lookup;
}

/// An owned future, so that [`Names`] can be made into an object.
pub type Lookup = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// What kind of network an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zone {
    /// Anybody's.
    Public,
    /// This very host.
    Loopback,
    /// An organisation's own: RFC 1918, RFC 4193, RFC 6598.
    Private,
    /// The link, where clouds put their metadata services; multicast, reserved, unspecified.
    Special,
}

impl Zone {
    /// Where `address` lies; an IPv6 form of an IPv4 address lies where that does.
    pub(super) fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => Self::of_v4(address),
            IpAddr::V6(address) => match embedded(address) {
                Some(inner) => Self::of_v4(inner),
                None => Self::of_v6(address),
            },
        }
    }

    fn of_v4(address: Ipv4Addr) -> Self {
        let [a, b, c, _] = address.octets();
        match (a, b, c) {
            (127, ..) => Self::Loopback,
            // The metadata service of one cloud hides among the shared addresses of RFC 6598.
            (100, 100, 100) => Self::Special,
            (10, ..) | (172, 16..=31, _) | (192, 168, _) | (100, 64..=127, _) => Self::Private,
            // RFC 6890: this network, link-local, protocol assignments, benchmarking, documentation,
            // and everything from multicast on.
            (0 | 224.., ..) | (169, 254, _) | (192, 0, 0) | (198, 18..=19, _) => Self::Special,
            (192, 0, 2) | (198, 51, 100) | (203, 0, 113) => Self::Special,
            // The wire server of another one.
            (168, 63, 129) => Self::Special,
            _ => Self::Public,
        }
    }

    fn of_v6(address: Ipv6Addr) -> Self {
        let first = address.segments()[0];
        match first {
            _ if address.is_loopback() => Self::Loopback,
            // RFC 4193; the metadata service of one cloud is among them too.
            _ if address.segments()[..2] == [0xfd00, 0x0ec2] => Self::Special,
            0xfc00..=0xfdff => Self::Private,
            // Global unicast is 2000::/3; of it 2001:db8::/32 is for documents.
            _ if address.segments()[..2] == [0x2001, 0x0db8] => Self::Special,
            0x2000..=0x3fff => Self::Public,
            _ => Self::Special,
        }
    }
}

/// The IPv4 address inside mapped, compatible, translated (RFC 6052) and 6to4 addresses.
fn embedded(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let from = |high: u16, low: u16| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low));
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(from(high, low)),
        [0x2002, high, low, ..] => Some(from(high, low)),
        _ => None,
    }
}

/// The address in the host part of an URL, if it is one and no name.
fn literal(url: &Url) -> Option<IpAddr> {
    url.host_str()?.trim_matches(['[', ']']).parse().ok()
}

/// Names that mean what their addresses are refused for, wherever they are resolved.
fn named(host: &str) -> Option<Zone> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    match host.as_str() {
        "localhost" => Some(Zone::Loopback),
        "metadata.google.internal" | "metadata" | "instance-data" => Some(Zone::Special),
        _ if host.ends_with(".localhost") => Some(Zone::Loopback),
        _ => None,
    }
}

/// Whether a host is one where clouds tell their own machines who they are, or another that serves its link only.
pub(crate) fn is_special(host: &str) -> bool {
    let address = host.trim_matches(['[', ']']).parse().ok();
    address.map(Zone::of).or_else(|| named(host)) == Some(Zone::Special)
}

/// Whether two addresses have one server behind them, as far as an URL tells.
pub(super) fn same_origin(a: &Url, b: &Url) -> bool {
    (a.scheme(), a.host_str(), a.port_or_known_default()) == (b.scheme(), b.host_str(), b.port_or_known_default())
}

/// What one endpoint's redirects may reach. Cheap to clone; clones share what is learned.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    /// Where the endpoint itself lives: known from its address, or once its name has been resolved.
    home: Arc<OnceLock<Zone>>,
    /// The endpoint's own host. A proxy's is asked for by the same client.
    own: Arc<str>,
    /// Names of proxies, which the operator chose.
    proxies: Arc<[String]>,
    /// Names that the operator gave addresses to. They are taken at their word.
    fixed: Arc<[(String, SocketAddr)]>,
    /// Hosts that the operator allows, wherever they are.
    allowed: Arc<[String]>,
    /// Who knows addresses; `None` for the system.
    names: Option<Arc<dyn Names>>,
}

impl Bounds {
    /// The bounds of an endpoint at `base`.
    pub(super) fn of(base: &Url, client: &ClientOptions, allowed: &[String]) -> Self {
        let (fixed, names) = (client.resolve.as_slice().into(), client.names.clone());
        let host = base.host_str().unwrap_or_default();
        let (own, proxies) = (host.into(), client.proxy.hosts().into());
        let bounds = Self { home: Arc::default(), own, proxies, fixed, allowed: allowed.into(), names };
        if bounds.fixed_address(host).is_some() {
            bounds.learn(Zone::Public);
        } else if let Some(zone) = literal(base).map(Zone::of).or_else(|| named(host)) {
            bounds.learn(zone);
        }
        bounds
    }

    fn learn(&self, zone: Zone) {
        // Whoever comes second says the same, or moved since; the first decides.
        let _ = self.home.set(zone);
    }

    /// Where the endpoint lives; the strictest reading while nobody knows.
    fn home(&self) -> Zone {
        self.home.get().copied().unwrap_or(Zone::Public)
    }

    fn permits(&self, zone: Zone) -> bool {
        zone == Zone::Public || (zone == self.home() && zone != Zone::Special)
    }

    fn fixed_address(&self, host: &str) -> Option<SocketAddr> {
        self.fixed.iter().find(|(name, _)| name.eq_ignore_ascii_case(host)).map(|(_, address)| *address)
    }

    fn is_allowed(&self, host: &str) -> bool {
        self.allowed.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    /// Whether the address in `url`, or a name whose meaning is no secret, is out of bounds. What other
    /// names mean is judged when they are resolved.
    pub(super) fn forbids(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        if self.is_allowed(host) || self.fixed_address(host).is_some() {
            return false;
        }
        literal(url).map(Zone::of).or_else(|| named(host)).is_some_and(|zone| !self.permits(zone))
    }

    /// Resolves names for requests to the endpoint itself, and learns where it lives.
    pub(super) fn home_resolver(&self) -> Arc<dyn Resolve> {
        Arc::new(Resolver { bounds: self.clone(), is_home: true })
    }

    /// Resolves names of hosts that the endpoint redirects to, to addresses within bounds only.
    pub(super) fn foreign_resolver(&self) -> Arc<dyn Resolve> {
        Arc::new(Resolver { bounds: self.clone(), is_home: false })
    }
}

/// A name of a host has only addresses that are out of bounds.
#[derive(Debug, thiserror::Error)]
#[error("{host} has only addresses of this host, its link or its own network, where nobody may be redirected to")]
pub(super) struct OutOfBounds {
    host: String,
}

/// Where a server is that has all these addresses: somewhere that is no network of this host, if one of them is.
fn strictest(found: &[SocketAddr]) -> Zone {
    let mut zones = found.iter().map(|address| Zone::of(address.ip()));
    let first = zones.next().unwrap_or(Zone::Public);
    if zones.all(|zone| zone == first) { first } else { Zone::Public }
}

struct Resolver {
    bounds: Bounds,
    is_home: bool,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (bounds, is_home, host) = (self.bounds.clone(), self.is_home, name.as_str().to_owned());
        Box::pin(async move {
            if let Some(address) = bounds.fixed_address(&host) {
                return Ok(Box::new(std::iter::once(address)) as Addrs);
            }
            let found: Vec<SocketAddr> = match &bounds.names {
                Some(names) => names.lookup(&host).await?,
                // Port 0 stands for the port of the URL.
                None => tokio::net::lookup_host((host.as_str(), 0)).await?.collect(),
            };
            if is_home || bounds.proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(&host)) {
                if host.eq_ignore_ascii_case(&bounds.own) {
                    bounds.learn(strictest(&found));
                }
                return Ok(Box::new(found.into_iter()) as Addrs);
            }
            let (all, is_allowed) = (found.len(), bounds.is_allowed(&host));
            let within: Vec<_> =
                found.into_iter().filter(|address| is_allowed || bounds.permits(Zone::of(address.ip()))).collect();
            if within.is_empty() && all > 0 {
                return Err(OutOfBounds { host }.into());
            }
            Ok(Box::new(within.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn addresses_lie_where_the_registries_of_addresses_say() {
        for (zone, addresses) in [
            (Zone::Loopback, &["127.0.0.1", "127.255.0.1", "::1", "::ffff:127.0.0.1"][..]),
            (Zone::Private, &["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "fd12::1"]),
            (Zone::Private, &["::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1"]),
            (
                Zone::Special,
                &["169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "fe80::1", "ff02::1", "::"],
            ),
            (
                Zone::Special,
                &["100.100.100.200", "168.63.129.16", "fd00:ec2::254", "192.0.2.1", "2001:db8::1", "198.18.0.1"],
            ),
            (Zone::Special, &["::ffff:169.254.169.254", "2002:a9fe:a9fe::1"]),
            (Zone::Public, &["8.8.8.8", "172.32.0.1", "192.169.0.1", "100.128.0.1", "2606:4700::1111", "169.253.1.1"]),
        ] {
            for address in addresses {
                assert_eq!(Zone::of(address.parse().unwrap()), zone, "{address}");
            }
        }
    }

    #[test]
    fn a_server_redirects_to_the_public_and_to_where_it_is_itself() {
        let targets =
            ["http://8.8.8.8/", "http://127.0.0.1/", "http://[::1]/", "http://10.0.0.9/", "http://localhost/"];
        for (base, permitted) in [
            ("https://8.8.4.4/", [true, false, false, false, false]),
            ("https://registry.example/", [true, false, false, false, false]),
            ("http://127.0.0.1:5000/", [true, true, true, false, true]),
            ("http://localhost:5000/", [true, true, true, false, true]),
            ("http://10.0.0.1/", [true, false, false, true, false]),
        ] {
            let bounds = Bounds::of(&url(base), &ClientOptions::default(), &[]);
            for (target, permitted) in targets.iter().zip(permitted) {
                assert_eq!(!bounds.forbids(&url(target)), permitted, "{base} to {target}");
            }
            for special in ["http://169.254.169.254/latest", "http://metadata.google.internal/", "http://0.0.0.0/"] {
                assert!(bounds.forbids(&url(special)), "{base} to {special}");
            }
        }
    }

    #[test]
    fn forms_that_hide_an_address_do_not_help() {
        let bounds = Bounds::of(&url("https://8.8.8.8/"), &ClientOptions::default(), &[]);
        for hidden in
            ["http://2130706433/", "http://0x7f.1/", "http://127.1/", "http://[::ffff:7f00:1]/", "http://LOCALHOST./"]
        {
            assert!(bounds.forbids(&url(hidden)), "{hidden}");
        }
    }

    #[test]
    fn the_operator_may_allow_a_host() {
        let bounds = Bounds::of(&url("https://8.8.8.8/"), &ClientOptions::default(), &["10.0.0.9".to_owned()]);

        assert!(!bounds.forbids(&url("http://10.0.0.9:9000/x")));
        assert!(bounds.forbids(&url("http://10.0.0.8:9000/x")));
    }

    #[tokio::test]
    async fn names_are_judged_when_they_are_resolved() {
        let fixed = [("storage.example".to_owned(), SocketAddr::from(([127, 0, 0, 1], 7)))];
        let client = ClientOptions { resolve: fixed.to_vec(), ..ClientOptions::default() };
        let bounds = Bounds::of(&url("https://8.8.8.8/"), &client, &[]);
        let resolve = |name: &str| bounds.foreign_resolver().resolve(name.parse().unwrap());

        let error = resolve("localhost").await.map(|_| ()).unwrap_err();
        assert!(error.downcast_ref::<OutOfBounds>().is_some(), "{error}");
        assert_eq!(resolve("storage.example").await.unwrap().next(), Some(fixed[0].1));

        let local = Bounds::of(&url("http://127.0.0.1/"), &ClientOptions::default(), &[]);
        assert!(local.foreign_resolver().resolve("localhost".parse().unwrap()).await.unwrap().next().is_some());
    }
}
