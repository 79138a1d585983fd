//! Blobs from programs that other people wrote: nginx as a static server and as a cache, squid as a forward proxy,
//! Debian's docker-registry behind them. What is not installed is said, and its tests pass.

mod support;

#[allow(dead_code, reason = "made for the kernel cases, which mount what is in it")]
#[path = "../kernel-tests/cases/dockerregistry.rs"]
mod dockerregistry;

use std::collections::HashSet;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use rafsd::base::{BlobId, ByteRange, Class};
use rafsd::codec::sha256;
use rafsd::net::{Clock, RetryPolicy, Timekeeper};
use rafsd::source::{BlobSource, Network, NetworkOptions, ReadCtx, SourceError};
use rafsd::telemetry::Telemetry;

use dockerregistry::DockerRegistry;
use support::servers::nginx::{Nginx, Setup};
use support::servers::squid::{PEER, Squid, knows_passwords};
use support::servers::{are_here, wait_until};

/// The repository of all tests.
const REPOSITORY: &str = "team/app";

/// How long a read may take: longer than all leaps of one test together.
const PATIENCE: Duration = Duration::from_secs(300);

/// A blob that no two ranges of are alike.
struct Blob {
    id: BlobId,
    body: Vec<u8>,
}

impl Blob {
    fn new(len: usize) -> Self {
        let mut body = vec![0; len];
        blake3::Hasher::new().update(&len.to_le_bytes()).finalize_xof().fill(&mut body);
        Self { id: sha256(&body).to_string().parse().unwrap(), body }
    }

    /// Where a registry has it.
    fn path(&self) -> String {
        format!("v2/{REPOSITORY}/blobs/sha256:{}", self.id)
    }

    /// Reads `start..end` from `source`, which must be right.
    async fn try_read(&self, source: &dyn BlobSource, start: usize, end: usize) -> Result<(), SourceError> {
        let range = ByteRange::new(start as u64, end as u64).unwrap();
        let got = source.read(&self.id, range, ctx()).await?;
        assert!(got == self.body[start..end], "{range}");
        Ok(())
    }

    async fn read(&self, source: &dyn BlobSource, start: usize, end: usize) {
        self.try_read(source, start, end).await.unwrap();
    }

    /// Everything that can be asked of a source that has it.
    async fn check(&self, source: &dyn BlobSource) {
        let len = self.body.len();
        assert_eq!(source.len(&self.id, ctx()).await.unwrap(), len as u64);
        for (start, end) in [(0, 1), (0, len), (len / 3, 2 * len / 3), (len - 1, len)] {
            self.read(source, start, end).await;
        }
        let mut body = Vec::new();
        let whole = ByteRange::new(0, len as u64).unwrap();
        let mut take = |piece: bytes::Bytes| body.extend_from_slice(&piece);
        source.stream(&self.id, whole, ctx(), &mut take).await.unwrap();
        assert!(body == self.body, "the stream");

        let behind = ByteRange::new(len as u64 - 1, len as u64 + 9).unwrap();
        let error = source.read(&self.id, behind, ctx()).await.unwrap_err();
        assert!(matches!(error, SourceError::OutOfRange { len: told, .. } if told == len as u64), "{error}");
        let missing = "0".repeat(64).parse().unwrap();
        let range = ByteRange::new(0, 9).unwrap();
        let error = source.read(&missing, range, ctx()).await.unwrap_err();
        assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    }
}

fn ctx() -> ReadCtx {
    ReadCtx::new(Class::OnDemand, Instant::now() + PATIENCE)
}

/// The system's time, from which a test may leap ahead: what has to happen "5 s later" happens at once.
#[derive(Clone, Default)]
struct Leaping(Arc<Mutex<Duration>>);

impl Leaping {
    fn leap(&self, by: Duration) {
        *self.0.lock().unwrap() += by;
    }
}

impl Timekeeper for Leaping {
    fn now(&self) -> Instant {
        Instant::now() + *self.0.lock().unwrap()
    }

    fn wall(&self) -> SystemTime {
        SystemTime::now() + *self.0.lock().unwrap()
    }

    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let left = at.saturating_duration_since(self.now());
        Box::pin(tokio::time::sleep(left))
    }
}

/// What one daemon would ask through, with its own memory of who is well.
struct Asker {
    hosts: tempfile::TempDir,
    network: Network,
    telemetry: Telemetry,
    time: Leaping,
}

impl Asker {
    fn new() -> Self {
        let (hosts, time, telemetry) = (tempfile::tempdir().unwrap(), Leaping::default(), Telemetry::default());
        let options = NetworkOptions {
            hosts_dir: hosts.path().to_owned(),
            clock: Clock::kept_by(Arc::new(time.clone())),
            // What is refused at once stays so for the whole test.
            policy: RetryPolicy { attempts: 3, ..RetryPolicy::default() },
            ..NetworkOptions::default()
        };
        Self { network: Network::new(options, telemetry.clone()), hosts, telemetry, time }
    }

    /// The same, with a `hosts.toml` for the registry at `host`.
    fn with_hosts(host: &str, text: &str) -> Self {
        let asker = Self::new();
        let dir = asker.hosts.path().join(host.replace(':', "_") + "_");
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("hosts.toml"), text).unwrap();
        asker
    }

    fn open(&self, specs: &[String], ca: Option<&Path>) -> Arc<dyn BlobSource> {
        self.network.open(specs, ca).unwrap()
    }

    fn repository(&self, host: &str) -> Arc<dyn BlobSource> {
        self.open(&[format!("docker://{host}/{REPOSITORY}")], None)
    }

    /// How often a source that consists of one place was asked again.
    fn retries(&self, source: &dyn BlobSource) -> u64 {
        self.telemetry.place(&source.describe()).retries.get()
    }
}

/// An nginx that looks like a registry to those who want blobs by their digest.
fn static_registry(blob: &Blob, secure: bool) -> Nginx {
    Nginx::start(&Setup { secure, files: vec![(blob.path(), blob.body.clone())], ..Setup::default() })
}

async fn reads_at_once(blob: &Blob, source: &dyn BlobSource, readers: usize) {
    let part = blob.body.len() / readers;
    let reads = (0..readers).map(|reader| blob.read(source, reader * part, (reader + 1) * part));
    futures(reads).await;
}

/// Waits for all of them at once.
async fn futures(all: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut all: Vec<_> = all.map(Box::pin).collect();
    std::future::poll_fn(|cx| {
        all.retain_mut(|one| one.as_mut().poll(cx).is_pending());
        if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_serves_ranges_over_plain_http_and_over_tls_by_http_2() {
    if !are_here("nginx_serves_ranges_over_plain_http_and_over_tls_by_http_2", &["nginx"]) {
        return;
    }
    let blob = Blob::new(3_000_000);
    for (secure, protocol) in [(false, "HTTP/1.1"), (true, "HTTP/2.0")] {
        let files = vec![(format!("blobs/{}", blob.id), blob.body.clone())];
        let nginx = Nginx::start(&Setup { secure, files, ..Setup::default() });
        let asker = Asker::new();
        let ca = secure.then(|| nginx.ca());
        let source = asker.open(&[format!("{}/blobs", nginx.url())], ca.as_deref());

        blob.check(&*source).await;
        reads_at_once(&blob, &*source, 64).await;

        let seen = nginx.seen();
        let protocols: HashSet<_> = seen.iter().map(|seen| seen.protocol.as_str()).collect();
        assert_eq!(protocols, HashSet::from([protocol]));
        let connections: HashSet<_> = seen.iter().map(|seen| seen.connection).collect();
        assert!(!secure || connections.len() == 1, "HTTP/2 needs one connection for all: {connections:?}");
        assert_eq!(seen.iter().filter(|seen| seen.status == 206).count(), 4 + 1 + 1 + 64);
        assert_eq!(asker.retries(&*source), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_nginx_ends_are_no_fault_of_a_read() {
    if !are_here("connections_that_nginx_ends_are_no_fault_of_a_read", &["nginx"]) {
        return;
    }
    let blob = Blob::new(1_000_000);
    for secure in [false, true] {
        // Each 30th request is the last of its connection; by HTTP/2 that is a GOAWAY while others are on their way.
        let files = vec![(format!("blobs/{}", blob.id), blob.body.clone())];
        let http = "keepalive_requests 30;".to_owned();
        let mut nginx = Nginx::start(&Setup { secure, files, http, ..Setup::default() });
        let asker = Asker::new();
        let ca = secure.then(|| nginx.ca());
        let source = asker.open(&[format!("{}/blobs", nginx.url())], ca.as_deref());

        for _ in 0..5 {
            reads_at_once(&blob, &*source, 40).await;
        }
        // Seen on a busy host: one took a second try, as when a connection is reset before its announced end was read.
        let retries = asker.retries(&*source);
        assert!(retries <= 2, "TLS: {secure}: {retries} of 200");
        let answered = nginx.seen().iter().filter(|seen| seen.status == 206).count() as u64;
        assert!((200..=200 + retries).contains(&answered), "TLS: {secure}: {answered}");

        // And of connections that died with their server the next one notices nothing either.
        nginx.kill();
        nginx.start_again();
        reads_at_once(&blob, &*source, 40).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_nginx_that_ignores_ranges_or_knows_only_to_refuse_is_passed_over() {
    if !are_here("an_nginx_that_ignores_ranges_or_knows_only_to_refuse_is_passed_over", &["nginx"]) {
        return;
    }
    let blob = Blob::new(1_000_000);
    let origin = static_registry(&blob, false);
    for server in ["max_ranges 0;", "location /v2/ { return 503; }", "location /v2/ { deny all; }"] {
        let files = vec![(blob.path(), blob.body.clone())];
        let mirror = Nginx::start(&Setup { server: server.to_owned(), files, ..Setup::default() });
        let text = format!("server = \"{}\"\n[host.\"{}\"]\n", origin.url(), mirror.url());
        let asker = Asker::with_hosts(&origin.host(), &text);
        let source = asker.repository(&origin.host());

        let before = origin.seen().len();
        blob.read(&*source, 5000, 900_000).await;
        assert!(!mirror.seen().is_empty(), "{server}");
        assert_eq!(origin.seen().len(), before + 1, "{server}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_in_front_of_a_registry_asks_it_once_for_each_slice() {
    let test = "a_cache_in_front_of_a_registry_asks_it_once_for_each_slice";
    if !are_here(test, &["nginx", "docker-registry"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let blob = Blob::new(5 << 20 | 12345);
    let mut registry = started(dir.path(), &blob).await;
    let cache = Nginx::start(&Setup::cache(&format!("http://{}", registry.host()), "1m"));
    let text = format!(
        "server = \"http://{}\"\n[host.\"{}\"]\ncapabilities = [\"pull\"]\n[host.\"{}\".rafsd]\nalign = \"1MiB\"\n",
        registry.host(),
        cache.url(),
        cache.url()
    );
    let path = format!("/{}", blob.path());
    let asked = |registry: &DockerRegistry| {
        let answers = registry.answers().unwrap();
        let answers = answers.into_iter().filter(|answer| answer.path.starts_with(&path));
        answers.map(|answer| answer.bytes).collect::<Vec<_>>()
    };
    let before = asked(&registry).len();

    // Two daemons, the second of which has nothing of its own.
    for round in ["cold", "warm"] {
        let asker = Asker::with_hosts(&registry.host(), &text);
        let source = asker.repository(&registry.host());
        blob.check(&*source).await;
        reads_at_once(&blob, &*source, 32).await;
        let bytes: u64 = asked(&registry).iter().skip(before).sum();
        // The blob, and what says that there is nothing behind it or at another digest.
        assert!(bytes < blob.body.len() as u64 + 4096, "{round}: {bytes} bytes");
    }
    let hits = cache.seen().iter().filter(|seen| seen.cache.as_deref() == Some("HIT")).count();
    assert!(hits > 60, "{hits}");

    // What the cache has outlives the registry.
    registry.stop();
    let asker = Asker::with_hosts(&registry.host(), &text);
    reads_at_once(&blob, &*asker.repository(&registry.host()), 32).await;
}

/// A docker-registry that has `blob`.
async fn started(dir: &Path, blob: &Blob) -> DockerRegistry {
    let (dir, body) = (dir.to_owned(), blob.body.clone());
    // Whoever fills it brings a runtime of their own.
    let filled = std::thread::spawn(move || {
        let registry = DockerRegistry::start(&dir, false)?;
        registry.pusher()?.blob(REPOSITORY, &body)?;
        anyhow::Ok(registry)
    });
    filled.join().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_dies_is_left_out_and_found_back() {
    if !are_here("a_cache_that_dies_is_left_out_and_found_back", &["nginx"]) {
        return;
    }
    let blob = Blob::new(4 << 20);
    // It has the blob as a static server and as a registry.
    let files = vec![(format!("blobs/{}", blob.id), blob.body.clone()), (blob.path(), blob.body.clone())];
    let origin = Nginx::start(&Setup { files, ..Setup::default() });
    let mut cache = Nginx::start(&Setup::cache(&origin.url(), "256k"));
    // A place in front of the registry, without `hosts.toml`.
    let asker = Asker::new();
    let source =
        asker.open(&[format!("{}/blobs", cache.url()), format!("docker://{}/{REPOSITORY}", origin.host())], None);
    let asked_as_registry = || origin.seen().iter().filter(|seen| seen.path.starts_with("/v2/")).count();
    reads_at_once(&blob, &*source, 16).await;
    assert_eq!((cache.seen().len(), asked_as_registry()), (16, 0));

    cache.kill();
    reads_at_once(&blob, &*source, 16).await;
    assert_eq!((cache.seen().len(), asked_as_registry()), (16, 16));

    cache.start_again();
    // A probe is due by now, but somebody has to read for it, and does not wait for it.
    asker.time.leap(Duration::from_secs(31));
    let until = Instant::now() + Duration::from_secs(20);
    while !cache.seen()[16..].iter().any(|seen| seen.status == 206) {
        assert!(Instant::now() < until, "the cache is not used again: {:?}", cache.seen());
        blob.read(&*source, 0, 10).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Settings of a registry behind a proxy.
fn behind(origin: &Nginx, proxy: &str, more: &str) -> String {
    let ca = if origin.url().starts_with("https") { format!("ca = {:?}\n", origin.ca()) } else { String::new() };
    format!("server = \"{}\"\n{ca}[rafsd]\nproxy = \"{proxy}\"\n{more}\n", origin.url())
}

#[tokio::test(flavor = "multi_thread")]
async fn squid_passes_on_plain_requests_and_tunnels_for_tls() {
    if !are_here("squid_passes_on_plain_requests_and_tunnels_for_tls", &["nginx", "squid"]) {
        return;
    }
    let (blob, squid) = (Blob::new(2_000_000), Squid::start(None));
    for (secure, method, protocol) in [(false, "GET", "HTTP/1.1"), (true, "CONNECT", "HTTP/2.0")] {
        let origin = static_registry(&blob, secure);
        let asker = Asker::with_hosts(&origin.host(), &behind(&origin, &squid.url(), "proxy_fallback = false"));
        let source = asker.repository(&origin.host());

        blob.check(&*source).await;
        reads_at_once(&blob, &*source, 32).await;

        assert!(origin.seen().iter().all(|seen| seen.protocol == protocol), "{:?}", origin.seen());
        assert!(matches!(through(&origin), (39.., 0)), "{:?}", through(&origin));
        drop((source, asker));
        // Tunnels are told of when they end.
        let host = origin.host();
        let to_origin =
            || squid.passed().into_iter().filter(|passed| passed.target.contains(&host)).collect::<Vec<_>>();
        wait_until("squid told of its requests", || to_origin().iter().any(|passed| passed.method == method));
        assert!(secure || to_origin().iter().filter(|passed| passed.method == "GET").count() >= 32 + 6);
        assert!(!secure || to_origin().iter().all(|passed| passed.method == "CONNECT"), "{:?}", to_origin());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_squid_is_gone_around_and_used_again_when_it_is_back() {
    if !are_here("a_killed_squid_is_gone_around_and_used_again_when_it_is_back", &["nginx", "squid"]) {
        return;
    }
    let blob = Blob::new(1_000_000);
    for secure in [false, true] {
        for with_ping in [false, true] {
            let (origin, mut squid) = (static_registry(&blob, secure), Squid::start(None));
            let ping = if with_ping { format!("proxy_ping = {:?}", squid.ping()) } else { String::new() };
            let asker = Asker::with_hosts(&origin.host(), &behind(&origin, &squid.url(), &ping));
            let source = asker.repository(&origin.host());
            let what = format!("TLS: {secure}, ping: {with_ping}");
            blob.read(&*source, 0, 5000).await;

            squid.kill();
            reads_at_once(&blob, &*source, 16).await;
            assert_eq!(through(&origin), (1, 16), "{what}");

            squid.start_again();
            asker.time.leap(Duration::from_secs(6));
            // With an address to ask nobody waits until it was asked: the next ones profit.
            let until = Instant::now() + Duration::from_secs(20);
            while through(&origin).0 == 1 {
                assert!(Instant::now() < until, "squid is not used again; {what}");
                blob.read(&*source, 7, 99).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// How many requests an origin had by squid, and by others.
fn through(origin: &Nginx) -> (usize, usize) {
    let seen = origin.seen();
    let by_squid = seen.iter().filter(|seen| seen.peer == PEER).count();
    (by_squid, seen.len() - by_squid)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_fallback_no_socket_goes_to_the_origin_when_squid_is_dead() {
    if !are_here("without_fallback_no_socket_goes_to_the_origin_when_squid_is_dead", &["nginx", "squid"]) {
        return;
    }
    let blob = Blob::new(1_000_000);
    for with_ping in [false, true] {
        let (origin, mut squid) = (static_registry(&blob, false), Squid::start(None));
        let ping = if with_ping { format!("proxy_ping = {:?}\n", squid.ping()) } else { String::new() };
        let more = format!("proxy_fallback = false\n{ping}");
        let asker = Asker::with_hosts(&origin.host(), &behind(&origin, &squid.url(), &more));
        let source = asker.repository(&origin.host());
        blob.read(&*source, 0, 5000).await;

        squid.kill();
        let (accepts, requests) = (origin.accepts(), origin.seen().len());
        for at in 0..5 {
            let error = blob.try_read(&*source, at * 1000, at * 1000 + 9).await.unwrap_err();
            assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
            asker.time.leap(Duration::from_secs(6));
        }
        assert_eq!(origin.accepts(), accepts);
        assert_eq!(through(&origin), (requests, 0));

        squid.start_again();
        asker.time.leap(Duration::from_secs(31));
        reads_at_once(&blob, &*source, 16).await;
        assert_eq!(through(&origin), (requests + 16, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_squid_with_a_password_wants_it_and_the_origin_never_sees_it() {
    let test = "a_squid_with_a_password_wants_it_and_the_origin_never_sees_it";
    if !are_here(test, &["nginx", "squid"]) {
        return;
    }
    if !knows_passwords() {
        return support::skip(test, "squid's helper or htpasswd is missing");
    }
    let (blob, squid) = (Blob::new(500_000), Squid::start(Some(("alice", "hunter2"))));
    for secure in [false, true] {
        let origin = static_registry(&blob, secure);
        let known = squid.url().replace("http://", "http://alice:hunter2@");
        let asker = Asker::with_hosts(&origin.host(), &behind(&origin, &known, "proxy_fallback = false"));
        reads_at_once(&blob, &*asker.repository(&origin.host()), 8).await;
        assert_eq!(through(&origin), (8, 0));

        for (login, what) in [("", "nobody"), ("alice:wrong@", "somebody else")] {
            let wrong = squid.url().replace("http://", &format!("http://{login}"));
            let asker = Asker::with_hosts(&origin.host(), &behind(&origin, &wrong, "proxy_fallback = false"));
            let source = asker.repository(&origin.host());
            let error = blob.try_read(&*source, 0, 9).await.unwrap_err().to_string();
            let told = if secure { "proxy authorization required" } else { "407" };
            assert!(error.contains(told), "TLS: {secure}, {what}: {error}");
            assert!(!error.contains("wrong") && !error.contains("alice"), "{error}");
        }
        assert_eq!(origin.seen().len(), 8, "{:?}", origin.seen());
    }
}
