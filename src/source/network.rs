//! Everything remote that one process asks: one endpoint, one set of tokens and one judgement of health for each
//! server of a registry, whoever asks it and however many images come from there.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use reqwest::Url;

use super::aligned::Aligned;
use super::counted::Counted;
use super::{
    BlobSource, HttpUpstream, LocalDisk, LocalSource, ObjectUpstream, OpenError, Tier, Tiers, Upstream, WholeSource,
};
use crate::net::auth::{Keychain, Nobody, TokenOptions, Tokens};
use crate::net::hosts::{self, HostConfig, LimitTables, ProxyUse, Registries, RegistryHosts};
use crate::net::proxy::ProxyOptions;
use crate::net::{
    ClientOptions, Clock, Endpoint, EndpointOptions, Health, HostLimits, HostPace, Proxy, RetryPolicy, canonical,
};
use crate::telemetry::Telemetry;

/// How the network is used.
#[derive(Clone, Debug)]
pub struct NetworkOptions {
    /// Patience and trust, where a host has no settings of its own.
    pub client: ClientOptions,
    /// When to ask again.
    pub policy: RetryPolicy,
    /// Directory of `hosts.toml` files, in containerd's form; it need not exist.
    pub hosts_dir: PathBuf,
    /// Hosts of registries that go before those of the directory.
    pub registries: Registries,
    /// What hosts may be asked, whatever they are.
    pub limits: LimitTables,
    /// Who we are to registries.
    pub keychain: Arc<dyn Keychain>,
    /// The time.
    pub clock: Clock,
}

impl Default for NetworkOptions {
    /// Containerd's directory of hosts, no credentials.
    fn default() -> Self {
        Self {
            client: ClientOptions::default(),
            policy: RetryPolicy::default(),
            hosts_dir: hosts::DEFAULT_DIR.into(),
            registries: Registries::default(),
            limits: LimitTables::default(),
            keychain: Arc::new(Nobody),
            clock: Clock::default(),
        }
    }
}

/// The servers of one registry, in the order in which they are asked.
#[derive(Debug)]
pub struct Registry {
    hosts: RegistryHosts,
    /// The files that the servers' clients were made with.
    files: Vec<Stamp>,
    servers: Vec<Server>,
}

/// A file as it was once. Certificates are renewed in their place, under the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp {
    path: PathBuf,
    /// Number, length and time of change; `None` if it could not be looked at.
    facts: Option<(u64, u64, SystemTime)>,
}

impl Stamp {
    fn of(path: &Path) -> Self {
        let facts = fs::metadata(path).and_then(|meta| Ok((meta.ino(), meta.len(), meta.modified()?)));
        Self { path: path.to_owned(), facts: facts.ok() }
    }
}

/// What sources of some places are made with. A source that was made with an equal one is as good as a new one.
#[derive(Clone, Debug)]
pub struct Grounds {
    registries: Vec<Arc<Registry>>,
    ca: Option<Stamp>,
}

impl PartialEq for Grounds {
    fn eq(&self, other: &Self) -> bool {
        let is_same = |(one, other): (&Arc<Registry>, &Arc<Registry>)| Arc::ptr_eq(one, other);
        self.ca == other.ca
            && self.registries.len() == other.registries.len()
            && self.registries.iter().zip(&other.registries).all(is_same)
    }
}

/// One server of a registry.
#[derive(Debug)]
pub struct Server {
    /// Its settings.
    pub config: HostConfig,
    /// How it is asked.
    pub endpoint: Arc<Endpoint>,
    /// How it has been doing.
    pub health: Arc<Health>,
}

impl Registry {
    /// All of them, mirrors first and the registry's own last. Not empty.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }
}

/// Hosts whose limits are kept although nobody asks them any more.
const MOST_HOSTS: usize = 1024;

/// The name of a registry, and what who asks for it trusts besides.
type Asked = (String, Option<PathBuf>);

/// Opens sources, and keeps what they share.
#[derive(Debug, Default)]
pub struct Network {
    options: NetworkOptions,
    telemetry: Telemetry,
    registries: Mutex<HashMap<Asked, Arc<Registry>>>,
    /// By host and port, and by the limits that they were found with: those of registries may change.
    paces: Mutex<HashMap<(String, HostLimits), Arc<HostPace>>>,
}

impl Network {
    /// Connects to nobody yet. What sources are asked is counted in `telemetry`.
    pub fn new(options: NetworkOptions, telemetry: Telemetry) -> Self {
        Self { options, telemetry, registries: Mutex::default(), paces: Mutex::default() }
    }

    /// When to ask again.
    pub fn policy(&self) -> RetryPolicy {
        self.options.policy
    }

    /// Who we are to registries.
    pub fn keychain(&self) -> &Arc<dyn Keychain> {
        &self.options.keychain
    }

    /// The servers of `registry`, which is `HOST[:PORT]`, as its settings are at this moment; `ca` is trusted
    /// besides. As long as those and the files that they name do not change, everybody gets the same ones.
    ///
    /// # Errors
    /// The settings of a host are wrong, or a file that they name cannot be used.
    pub fn registry(&self, registry: &str, ca: Option<&Path>) -> Result<Arc<Registry>, OpenError> {
        let mut hosts = hosts::find(&self.options.registries, &self.options.hosts_dir, registry)?;
        if ca.is_some() && hosts == RegistryHosts::plain(registry)? {
            // Who names an authority means TLS, for a registry on this very host too.
            hosts.hosts.iter_mut().for_each(|host| host.base.set_scheme("https").unwrap_or_default());
        }
        let key = (registry.to_owned(), ca.map(Path::to_owned));
        // Before they are read: what changes meanwhile is seen the next time.
        let files: Vec<_> = hosts.hosts.iter().flat_map(HostConfig::files).chain(ca).map(Stamp::of).collect();
        let is_same = |known: &&Arc<Registry>, hosts: &_, files: &_| known.hosts == *hosts && known.files == *files;
        if let Some(known) = self.registries.lock().unwrap().get(&key).filter(|known| is_same(known, &hosts, &files)) {
            return Ok(Arc::clone(known));
        }
        let servers = hosts.hosts.iter().map(|config| self.server(registry, config, ca));
        let made = Arc::new(Registry { servers: servers.collect::<Result<_, _>>()?, hosts, files });
        let mut known = self.registries.lock().unwrap();
        match known.get(&key).filter(|known| is_same(known, &made.hosts, &made.files)) {
            // Somebody was faster, and images go by that one already.
            Some(other) => Ok(Arc::clone(other)),
            None => {
                known.insert(key, Arc::clone(&made));
                Ok(made)
            }
        }
    }

    fn server(&self, registry: &str, config: &HostConfig, ca: Option<&Path>) -> Result<Server, OpenError> {
        let clock = &self.options.clock;
        let client = self.client(config, ca);
        // Logins are for the registry by its name, and for a mirror by its own: one must not see the other's.
        let of = match config.namespace(registry) {
            None => registry.to_owned(),
            Some(_) => hosts::authority(&config.base),
        };
        let through = matches!(config.proxy, ProxyUse::Through(_));
        let proxy = through.then(|| ProxyOptions {
            ping: config.proxy_ping.clone(),
            fallback: config.proxy_fallback,
            ..ProxyOptions::default()
        });
        let options = TokenOptions {
            client: client.clone(),
            server: Some(config.base.clone()),
            hosts: config.redirects.clone(),
            proxy: proxy.clone(),
            ..TokenOptions::default()
        };
        let tokens = Tokens::new(of, Arc::clone(&self.options.keychain), options, clock.clone());
        let options = EndpointOptions {
            client,
            headers: config.headers.clone(),
            authorize: Some(Arc::new(tokens)),
            proxy,
            pace: Some(self.pace(&config.base, config.limits)),
            redirect_hosts: config.redirects.clone(),
        };
        let endpoint = Arc::new(Endpoint::new(&config.base, options, clock.clone())?);
        Ok(Server { config: config.clone(), endpoint, health: Arc::default() })
    }

    /// What the host of `address` may be asked: the same for everybody who asks it. `own` are the limits that the table
    /// of a registry has for it.
    fn pace(&self, address: &Url, own: HostLimits) -> Arc<HostPace> {
        let tables = &self.options.limits;
        let limits =
            tables.of(address).unwrap_or_else(|| if own == HostLimits::default() { tables.of_all() } else { own });
        let (host, port) = (address.host_str().unwrap_or_default(), address.port_or_known_default().unwrap_or(0));
        let mut paces = self.paces.lock().unwrap();
        if paces.len() >= MOST_HOSTS {
            paces.retain(|_, pace| Arc::strong_count(pace) > 1);
        }
        let new = || Arc::new(HostPace::new(limits, self.options.clock.clone()));
        Arc::clone(paces.entry((format!("{host}:{port}"), limits)).or_insert_with(new))
    }

    fn client(&self, config: &HostConfig, ca: Option<&Path>) -> ClientOptions {
        let mut client = self.options.client.clone();
        client.extra_ca_pem.extend(ca.map(Path::to_owned));
        client.extra_ca_pem.extend(config.ca.iter().cloned());
        // Containerd tries all pairs; a client shows one.
        client.identity = config.clients.first().cloned();
        client.skip_verify = config.skip_verify;
        client.connect_timeout = config.dial_timeout.unwrap_or(client.connect_timeout).max(Duration::from_millis(1));
        client.proxy = match &config.proxy {
            ProxyUse::Environment => Proxy::Environment,
            ProxyUse::Direct => Proxy::Direct,
            ProxyUse::Through(address) => Proxy::Through(address.clone()),
        };
        client
    }

    /// The source that the places `specs` make, the first of which is asked first: directories, `http://`,
    /// `https://`, `s3://`, `oss://`, `gs://`, `az://`, `localdisk://`, or `docker://HOST/REPOSITORY` for the
    /// blobs of a repository. Connects to nobody yet. `ca` is a file of authorities that are trusted besides.
    ///
    /// # Errors
    /// One of them cannot be used, or there is none.
    pub fn open(&self, specs: &[String], ca: Option<&Path>) -> Result<Arc<dyn BlobSource>, OpenError> {
        let mut tiers = Vec::new();
        for spec in specs {
            tiers.extend(self.tiers(spec, ca)?);
        }
        let clock = self.options.clock.clone();
        match <[Tier; 1]>::try_from(tiers) {
            Ok([only]) => {
                let counts = self.telemetry.place(&only.upstream.describe());
                let inner = Tiers::new(vec![only], self.options.policy, clock).counting(Arc::clone(&counts));
                Ok(Arc::new(Counted { inner, place: counts }))
            }
            Err(tiers) if tiers.is_empty() => Err(OpenError::Nowhere),
            Err(mut tiers) => {
                for tier in &mut tiers {
                    tier.counts = Some(self.telemetry.place(&tier.upstream.describe()));
                }
                let counts = tiers.first().and_then(|tier| tier.counts.clone()).unwrap_or_default();
                Ok(Arc::new(Tiers::new(tiers, self.options.policy, clock).counting(counts)))
            }
        }
    }

    /// What [`Network::open`] would make a source with at this moment.
    ///
    /// # Errors
    /// As there.
    pub fn grounds(&self, specs: &[String], ca: Option<&Path>) -> Result<Grounds, OpenError> {
        let scheme =
            |spec: &str| spec.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest.to_owned()));
        let mut registries = Vec::new();
        for (scheme, rest) in specs.iter().filter_map(|spec| scheme(spec)) {
            if scheme == "docker" {
                registries.push(self.registry(&host_and_repository(&rest)?.0, ca)?);
            }
        }
        Ok(Grounds { registries, ca: ca.map(Stamp::of) })
    }

    /// Where [`Network::open`] would fetch from, in order, without secrets.
    ///
    /// # Errors
    /// As there.
    pub fn addresses(&self, specs: &[String], ca: Option<&Path>) -> Result<Vec<String>, OpenError> {
        let mut addresses = Vec::new();
        for spec in specs {
            addresses.extend(self.tiers(spec, ca)?.iter().map(|tier| tier.upstream.describe()));
        }
        Ok(addresses)
    }

    fn tiers(&self, spec: &str, ca: Option<&Path>) -> Result<Vec<Tier>, OpenError> {
        let local = |source: Arc<dyn BlobSource>| Ok(vec![Tier::new(WholeSource::new(source))]);
        let Some((scheme, rest)) = spec.split_once("://") else { return local(Arc::new(LocalSource::new(spec)?)) };
        let mut client = self.options.client.clone();
        client.extra_ca_pem.extend(ca.map(Path::to_owned));
        match scheme.to_ascii_lowercase().as_str() {
            "file" => {
                let url = Url::parse(spec).map_err(|error| OpenError::Url { detail: error.to_string() })?;
                let dir = url.to_file_path();
                let dir = dir.map_err(|()| OpenError::Url { detail: "not a path on this host".into() })?;
                local(Arc::new(LocalSource::new(dir)?))
            }
            "localdisk" => local(Arc::new(LocalDisk::new(spec)?)),
            "docker" => self.repository(rest, ca),
            "s3" | "oss" | "gs" | "az" => {
                let bucket = ObjectUpstream::new(spec, &client, self.options.clock.clone())?;
                let pace = self.pace(bucket.address(), HostLimits::default());
                Ok(vec![Tier::new(bucket.at_pace(pace))])
            }
            _ => {
                // One that is no address is told of by whoever needs it.
                let address = Url::parse(spec).ok();
                let pace = address.map(|address| self.pace(&address, HostLimits::default()));
                let options = EndpointOptions { client, pace, ..EndpointOptions::default() };
                Ok(vec![Tier::new(HttpUpstream::new(spec, options, self.options.clock.clone())?)])
            }
        }
    }

    /// The blobs of `HOST[:PORT]/REPOSITORY` at all servers that may be asked for them.
    fn repository(&self, name: &str, ca: Option<&Path>) -> Result<Vec<Tier>, OpenError> {
        let (host, repository) = host_and_repository(name)?;
        let registry = self.registry(&host, ca)?;
        let servers = registry.servers().iter().filter(|server| server.config.pull);
        Ok(servers
            .map(|server| {
                let mut base = server.config.base.clone();
                if let Ok(mut path) = base.path_segments_mut() {
                    path.pop_if_empty().extend(repository.split('/'));
                }
                if let Some(namespace) = server.config.namespace(&host) {
                    base.query_pairs_mut().append_pair("ns", namespace);
                }
                let upstream = HttpUpstream::repository(Arc::clone(&server.endpoint), base, repository);
                let upstream: Arc<dyn Upstream> = Arc::new(upstream);
                let upstream = match server.config.align {
                    Some(bytes) => Arc::new(Aligned::new(upstream, bytes)),
                    None => upstream,
                };
                Tier { upstream, health: Arc::clone(&server.health), counts: None }
            })
            .collect())
    }
}

/// The parts of `HOST[:PORT]/REPOSITORY`, the first as the one name of the registry.
fn host_and_repository(name: &str) -> Result<(String, &str), OpenError> {
    let is_sound = |(host, repository): &(&str, &str)| {
        // A login has no place there, and must not be repeated.
        let is_host = !host.is_empty() && !host.contains('@');
        let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        is_host && !repository.is_empty() && repository.chars().all(known) && !repository.contains("..")
    };
    let parts = name.split_once('/').filter(is_sound);
    let parts = parts.map(|(host, repository)| (canonical(host), repository));
    parts.ok_or(OpenError::Url { detail: "not of the form docker://HOST/REPOSITORY".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(network: &Network, specs: &[&str]) -> Result<String, OpenError> {
        let specs: Vec<_> = specs.iter().map(|&spec| spec.to_owned()).collect();
        network.open(&specs, None).map(|source| source.describe())
    }

    #[test]
    fn places_are_opened_by_their_form_and_asked_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let options = NetworkOptions { hosts_dir: dir.path().join("none"), ..NetworkOptions::default() };
        let network = Network::new(options, Telemetry::default());
        let path = dir.path().to_str().unwrap();

        assert_eq!(describe(&network, &[path]).unwrap(), path);
        assert_eq!(describe(&network, &[path, "http://h/x?sig=1"]).unwrap(), format!("{path}, http://h/x"));
        assert_eq!(describe(&network, &["docker://reg.example:5000/a/b"]).unwrap(), "https://reg.example:5000/v2/a/b");
        assert_eq!(
            describe(&network, &["docker://docker.io/library/x"]).unwrap(),
            "https://registry-1.docker.io/v2/library/x"
        );
        for name in ["index.docker.io", "Registry-1.docker.io"] {
            let source = describe(&network, &[&format!("docker://{name}/library/x")]).unwrap();
            assert_eq!(source, "https://registry-1.docker.io/v2/library/x", "{name}");
        }
        assert_eq!(host_and_repository("LOCALHOST:25510/a").unwrap(), ("localhost:25510".to_owned(), "a"));
        for bad in ["docker://host", "docker:///x", "docker://h/../x", "docker://h/X", "docker://h/a?b", "ftp://h/"] {
            assert!(describe(&network, &[bad]).is_err(), "{bad}");
        }
        assert!(matches!(describe(&network, &[]), Err(OpenError::Nowhere)));
    }

    #[test]
    fn mirrors_come_first_and_a_change_of_settings_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let options = NetworkOptions { hosts_dir: dir.path().to_owned(), ..NetworkOptions::default() };
        let network = Network::new(options, Telemetry::default());
        let before = network.registry("reg.example", None).unwrap();
        assert!(Arc::ptr_eq(&before, &network.registry("reg.example", None).unwrap()));

        std::fs::create_dir(dir.path().join("reg.example")).unwrap();
        let text = "server = \"https://reg.example\"\n[host.\"http://mirror.example\"]\n";
        std::fs::write(dir.path().join("reg.example/hosts.toml"), text).unwrap();
        let source = describe(&network, &["docker://reg.example/a"]).unwrap();
        assert_eq!(
            source,
            "http://mirror.example/v2/a?ns=reg.example, https://reg.example/v2/a".replace("?ns=reg.example", "")
        );
        assert!(!Arc::ptr_eq(&before, &network.registry("reg.example", None).unwrap()));
    }

    #[test]
    fn a_certificate_that_was_renewed_in_its_place_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let options = NetworkOptions { hosts_dir: dir.path().to_owned(), ..NetworkOptions::default() };
        let network = Network::new(options, Telemetry::default());
        let folder = dir.path().join("reg.example");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("hosts.toml"), "ca = \"ca.pem\"\nclient = [[\"me.cert\", \"me.key\"]]\n").unwrap();
        let renew = || {
            let made = rcgen::generate_simple_self_signed(["reg.example".to_owned()]).unwrap();
            let files = [
                ("ca.pem", made.cert.pem()),
                ("me.cert", made.cert.pem()),
                ("me.key", made.signing_key.serialize_pem()),
            ];
            for (name, text) in files {
                std::fs::write(folder.join(name), text).unwrap();
            }
        };
        let specs = ["docker://reg.example/a".to_owned()];
        let registry = || network.registry("reg.example", None).unwrap();
        let touch = |name: &str| {
            let file = std::fs::File::options().write(true).open(folder.join(name)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        };
        renew();
        let (before, grounds) = (registry(), network.grounds(&specs, None).unwrap());
        assert!(Arc::ptr_eq(&before, &registry()));
        assert!(grounds == network.grounds(&specs, None).unwrap());

        for name in ["ca.pem", "me.cert", "me.key"] {
            let before = registry();
            touch(name);
            assert!(!Arc::ptr_eq(&before, &registry()), "{name}");
        }
        assert!(grounds != network.grounds(&specs, None).unwrap());
        let ca = folder.join("ca.pem");
        let before = network.registry("reg.example", Some(&ca)).unwrap();
        assert!(Arc::ptr_eq(&before, &network.registry("reg.example", Some(&ca)).unwrap()));
        renew();
        assert!(!Arc::ptr_eq(&before, &network.registry("reg.example", Some(&ca)).unwrap()));
        std::fs::remove_file(&ca).unwrap();
        assert!(network.registry("reg.example", None).is_err(), "it is not forgotten that one was there");
    }
}
