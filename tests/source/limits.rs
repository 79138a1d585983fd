//! What one host may be asked, by a plain server, a bucket and a registry that are all this one host.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rafsd::base::{ByteRange, Class};
use rafsd::net::hosts::LimitTables;
use rafsd::source::{BlobSource, Network, NetworkOptions, ReadCtx, SourceError};
use rafsd::telemetry::Telemetry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::support::clock::{Bustle, Driver, QUIET, VirtualClock, until_quiet};

/// Length of the one blob, which is at every path.
const LEN: u64 = 1 << 20;

/// How the host is named in a source, and what its paths begin with then.
const KINDS: [(&str, &str); 3] = [("plain", "/blobs/"), ("bucket", "/b/"), ("registry", "/v2/repo/blobs/")];

/// A host with three kinds of places.
struct Host {
    address: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Paths that were asked for, in order.
    asked: Mutex<Vec<String>>,
    /// Requests that are being answered, and the most that ever were.
    open: AtomicUsize,
    most: AtomicUsize,
    steps: AtomicU64,
    /// What the next requests are told instead of bytes: a status and `Retry-After`.
    refusals: Mutex<VecDeque<(u16, u32)>>,
    /// Where answers wait to be let go.
    gate: Option<Semaphore>,
}

impl Bustle for Shared {
    fn busy(&self) -> bool {
        self.open.load(Ordering::SeqCst) > 0
    }

    fn steps(&self) -> u64 {
        self.steps.load(Ordering::SeqCst)
    }
}

impl Host {
    async fn start(gate: Option<Semaphore>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared { gate, ..Shared::default() });
        let serving = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&serving)));
            }
        });
        Self { address, shared }
    }

    fn asked(&self) -> Vec<String> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Who asks it under these limits.
    fn network(&self, limits: &str, time: &VirtualClock) -> Network {
        let text = format!("[\"{}\"]\n{limits}\n", self.address);
        let tables = toml::de::DeTable::parse(&text).unwrap();
        let (limits, wrong) = LimitTables::read(tables.get_ref(), &text);
        assert_eq!(wrong, []);
        let options = NetworkOptions {
            hosts_dir: "/nonexistent".into(),
            limits,
            clock: time.clock(),
            ..NetworkOptions::default()
        };
        Network::new(options, Telemetry::default())
    }

    /// The three places as sources, under these limits of the host.
    fn sources(&self, limits: &str, time: &VirtualClock) -> [Arc<dyn BlobSource>; 3] {
        let network = self.network(limits, time);
        let address = &self.address;
        let specs = [
            format!("http://{address}/blobs"),
            format!("s3://b/?endpoint=http://{address}&anonymous=true&region=r"),
            format!("docker://{address}/repo"),
        ];
        specs.map(|spec| network.open(&[spec], None).unwrap())
    }
}

/// Answers one request.
async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    shared.asked.lock().unwrap().push(head.split(' ').nth(1).unwrap().to_owned());
    let open = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
    shared.most.fetch_max(open, Ordering::SeqCst);
    if let Some(gate) = &shared.gate {
        gate.acquire().await.unwrap().forget();
    }
    let refusal = shared.refusals.lock().unwrap().pop_front();
    let answer = match refusal {
        Some((status, seconds)) => {
            format!("HTTP/1.1 {status} x\r\nRetry-After: {seconds}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .into_bytes()
        }
        None => part(&head),
    };
    // Before the last byte: whoever has it may ask again at once.
    shared.open.fetch_sub(1, Ordering::SeqCst);
    let written = stream.write_all(&answer).await;
    shared.steps.fetch_add(1, Ordering::SeqCst);
    written
}

fn byte(at: u64) -> u8 {
    (at % 251) as u8
}

fn part(head: &str) -> Vec<u8> {
    let line = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("range: bytes=").map(str::to_owned));
    let line = line.expect("a range is asked for");
    let (first, last) = line.split_once('-').unwrap();
    let (first, last): (u64, u64) = (first.parse().unwrap(), last.parse().unwrap());
    let len = last - first + 1;
    let mut answer = format!(
        "HTTP/1.1 206 x\r\nContent-Range: bytes {first}-{last}/{LEN}\r\nContent-Length: {len}\r\nETag: \"a\"\r\n\
         Last-Modified: Tue, 15 Nov 1994 12:45:26 GMT\r\nConnection: close\r\n\r\n"
    )
    .into_bytes();
    answer.extend((first..=last).map(byte));
    answer
}

/// Reads so many bytes of the blob, and checks them.
async fn read(source: &Arc<dyn BlobSource>, len: u64, until: Instant) -> Result<(), SourceError> {
    let range = ByteRange::new(1000, 1000 + len).unwrap();
    let bytes = source.read(&"ab".parse().unwrap(), range, ReadCtx::new(Class::OnDemand, until)).await?;
    assert!(bytes.iter().copied().eq((1000..1000 + len).map(byte)), "wrong bytes");
    Ok(())
}

/// A time that a read has.
fn deadline(time: &VirtualClock) -> Instant {
    Instant::now() + time.elapsed() + Duration::from_secs(60)
}

#[tokio::test]
async fn requests_of_all_kinds_share_the_places_that_a_host_has() {
    let (host, time) = (Host::start(Some(Semaphore::new(0))).await, VirtualClock::new());
    let sources = host.sources("concurrency = 2", &time);
    let reads: Vec<_> = (0..4)
        .flat_map(|_| sources.clone())
        .map(|source| {
            let until = deadline(&time);
            tokio::spawn(async move { read(&source, 5000, until).await })
        })
        .collect();

    for left in (1..=reads.len()).rev() {
        while host.shared.open.load(Ordering::SeqCst) < left.min(2) {
            tokio::task::yield_now().await;
        }
        // Whoever was let in too early has time to show it.
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        host.shared.gate.as_ref().unwrap().add_permits(1);
        let before = host.asked().len();
        while left > 2 && host.asked().len() == before {
            tokio::task::yield_now().await;
        }
    }
    for read in reads {
        read.await.unwrap().unwrap();
    }

    assert_eq!(host.shared.most.load(Ordering::SeqCst), 2);
    for (kind, path) in KINDS {
        assert_eq!(host.asked().iter().filter(|asked| asked.starts_with(path)).count(), 4, "{kind}");
    }
}

#[tokio::test]
async fn bytes_of_all_kinds_come_at_the_rate_of_the_host() {
    let (host, time) = (Host::start(None).await, VirtualClock::new());
    let _driver = Driver::start(&time, Arc::clone(&host.shared) as Arc<dyn Bustle>, QUIET);
    let sources = host.sources("bandwidth = \"100KiB\"", &time);
    let reads: Vec<_> = sources
        .into_iter()
        .map(|source| {
            let until = deadline(&time);
            tokio::spawn(async move { read(&source, 200 << 10, until).await })
        })
        .collect();
    for read in reads {
        read.await.unwrap().unwrap();
    }

    // Six seconds' worth, of which a tenth of a second's comes at once.
    let took = time.elapsed();
    assert!((Duration::from_millis(5900)..Duration::from_millis(7000)).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_host_that_told_one_to_stay_away_is_left_alone_by_all() {
    for (first, (kind, _)) in KINDS.iter().enumerate() {
        for status in [429, 503] {
            let (host, time) = (Host::start(None).await, VirtualClock::new());
            let sources = host.sources("concurrency = 8", &time);
            host.shared.refusals.lock().unwrap().push_back((status, 7));
            let (source, until) = (Arc::clone(&sources[first]), deadline(&time));
            let told = tokio::spawn(async move { read(&source, 5000, until).await });
            while host.shared.steps() == 0 {
                tokio::task::yield_now().await;
            }
            // It has been told, and sleeps.
            until_quiet(&time, &*host.shared, QUIET).await;
            let driver = Driver::start(&time, Arc::clone(&host.shared) as Arc<dyn Bustle>, QUIET);

            let others: Vec<_> = sources
                .into_iter()
                .map(|source| {
                    let (until, time) = (deadline(&time), time.clone());
                    tokio::spawn(async move { read(&source, 5000, until).await.map(|()| time.elapsed()) })
                })
                .collect();
            told.await.unwrap().unwrap();
            for other in others {
                let at = other.await.unwrap().unwrap();
                assert!(at >= Duration::from_secs(7), "after {status} to {kind} another one asked after {at:?}");
            }

            assert_eq!(host.asked().len(), 5, "one that was refused, and one for each read: {:?}", host.asked());
            drop(driver);
        }
    }
}

#[tokio::test]
async fn who_cannot_wait_for_the_end_of_a_pause_is_told_at_once() {
    let (host, time) = (Host::start(None).await, VirtualClock::new());
    let sources = host.sources("concurrency = 8", &time);
    host.shared.refusals.lock().unwrap().push_back((503, 3600));
    // Nobody moves the time.
    let soon = time.clock().now() + Duration::from_secs(20);
    for source in &sources {
        let error = read(source, 5000, soon).await.unwrap_err();
        assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    }
    assert_eq!(host.asked().len(), 1, "the others did not have to ask");

    time.advance(Duration::from_secs(30));

    read(&sources[2], 5000, deadline(&time)).await.unwrap();
}

#[tokio::test]
async fn who_waits_too_long_for_a_place_is_late_and_takes_none() {
    let (host, time) = (Host::start(Some(Semaphore::new(0))).await, VirtualClock::new());
    let [plain, bucket, registry] = host.sources("concurrency = 1", &time);
    let until = deadline(&time);
    let first = tokio::spawn(async move { read(&plain, 5000, until).await });
    while host.asked().is_empty() {
        tokio::task::yield_now().await;
    }
    for source in [bucket, registry] {
        let error = read(&source, 5000, time.clock().now()).await.unwrap_err();
        assert!(matches!(error, SourceError::Deadline { .. }), "{error}");
    }

    host.shared.gate.as_ref().unwrap().add_permits(1);

    first.await.unwrap().unwrap();
    assert_eq!(host.asked().len(), 1);
}

#[tokio::test]
async fn who_waits_for_a_limit_is_not_taken_for_slow() {
    for (limits, others) in [("concurrency = 1", 0), ("", 1)] {
        let (host, other) = (Host::start(Some(Semaphore::new(0))).await, Host::start(None).await);
        let time = VirtualClock::new();
        let places = [&host, &other].map(|host| format!("http://{}/blobs", host.address));
        let source = host.network(limits, &time).open(&places, None).unwrap();
        let until = deadline(&time);
        let asked = tokio::spawn(async move { read(&source, 5000, until).await });
        while host.asked().is_empty() {
            tokio::task::yield_now().await;
        }
        until_quiet(&time, &*other.shared, QUIET).await;
        time.advance(Duration::from_secs(4));
        if others == 0 {
            // Time for something to happen that must not.
            until_quiet(&time, &*other.shared, QUIET).await;
            host.shared.gate.as_ref().unwrap().add_permits(1);
        }

        asked.await.unwrap().unwrap();
        assert_eq!(other.asked().len(), others, "{limits:?}");
    }
}
