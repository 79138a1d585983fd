//! Blob sources over HTTP against a server that misbehaves on request, plain and over TLS.

mod support;

#[path = "source/limits.rs"]
mod limits;
#[path = "source/tls.rs"]
mod tls;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rafsd::base::{BlobId, ByteRange, Class};
use rafsd::net::server::{BlobServer, Fault, ServerOptions};
use rafsd::net::{ClientOptions, RetryPolicy};
use rafsd::source::{BlobSource, OpenError, ReadCtx, SourceError, Tiers, http};
use tls::{Authority, TlsFront};

/// Several pieces of a body, and no multiple of anything.
const BLOB_LEN: usize = 700_001;

/// A part of blob `a` that needs more than one piece.
const MIDDLE: ByteRange = ByteRange::new(1000, 300_000).expect("ordered");

/// Three attempts, almost without pauses.
const QUICK: RetryPolicy =
    RetryPolicy { attempts: 3, first_delay: Duration::from_millis(2), max_delay: Duration::from_millis(4) };

/// A server for a directory with the blobs `a` and `empty`.
struct Origin {
    server: BlobServer,
    bytes: Vec<u8>,
    _dir: tempfile::TempDir,
}

impl Origin {
    fn start() -> Self {
        Self::with(ServerOptions::default())
    }

    fn with(options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random(42);
        let bytes: Vec<u8> = (0..BLOB_LEN).map(|_| random.next().to_le_bytes()[3]).collect();
        std::fs::write(dir.path().join("a"), &bytes).unwrap();
        std::fs::write(dir.path().join("empty"), "").unwrap();
        let server = BlobServer::start(dir.path(), options).unwrap();
        Self { server, bytes, _dir: dir }
    }

    /// An origin whose every answer has this fault.
    fn faulty(fault: Fault) -> Self {
        let origin = Self::start();
        origin.server.set_fault(fault);
        origin
    }

    fn source(&self) -> Tiers {
        source(&self.server.url())
    }

    fn requests(&self) -> u64 {
        self.server.stats().requests
    }

    fn expected(&self, range: ByteRange) -> &[u8] {
        &self.bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
    }
}

/// The linear congruential generator of Knuth's MMIX; its high bits are good enough here.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 16
    }

    fn range(&mut self, len: usize) -> ByteRange {
        let len = len as u64;
        let (a, b) = (self.next() % len, self.next() % len);
        ByteRange::new(a.min(b), a.max(b) + 1).unwrap()
    }
}

fn source(url: &str) -> Tiers {
    http(url, &ClientOptions::default(), QUICK).unwrap()
}

fn within(time: Duration) -> ReadCtx {
    ReadCtx::new(Class::OnDemand, Instant::now() + time)
}

fn patient() -> ReadCtx {
    within(Duration::from_secs(60))
}

fn a() -> BlobId {
    "a".parse().unwrap()
}

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

async fn read_middle(source: &Tiers) -> Result<Vec<u8>, SourceError> {
    source.read(&a(), MIDDLE, patient()).await.map(Vec::from)
}

/// Streams the middle of blob `a`; what came, whatever the end.
async fn stream_middle(source: &Tiers) -> (Vec<u8>, Result<(), SourceError>) {
    let mut came = Vec::new();
    let outcome = source.stream(&a(), MIDDLE, patient(), &mut |piece| came.extend_from_slice(&piece)).await;
    (came, outcome)
}

#[tokio::test]
async fn a_stream_goes_on_where_it_broke_off() {
    let origin = Origin::start();
    origin.server.set_faults(|request| match request.number {
        0 => Fault::Status { code: 503, retry_after: None },
        1 | 2 => Fault::Cut { after: 100_000 },
        _ => Fault::None,
    });

    let (came, outcome) = stream_middle(&origin.source()).await;

    outcome.unwrap();
    assert!(came == origin.expected(MIDDLE), "the bytes, each once and in order");
    let asked: Vec<_> = origin.server.stats().log.iter().filter_map(|served| served.range).collect();
    assert_eq!(asked, [MIDDLE, MIDDLE, range(101_000, 300_000), range(201_000, 300_000)]);
}

#[tokio::test]
async fn what_a_stream_brought_before_it_failed_is_sound() {
    for (fault, kind) in [
        (Fault::Cut { after: 0 }, "failed to serve"),
        (Fault::Surplus { bytes: 1 }, "more than the"),
        (Fault::Status { code: 404, retry_after: None }, "is not at"),
    ] {
        let origin = Origin::faulty(fault.clone());
        let (came, outcome) = stream_middle(&origin.source()).await;
        let text = outcome.unwrap_err().to_string();
        assert!(text.contains(kind), "{fault:?}: {text}");
        assert!(origin.expected(MIDDLE).starts_with(&came), "{fault:?}");
    }
}

#[tokio::test]
async fn random_ranges_are_the_bytes_of_the_file() {
    let origin = Origin::start();
    let source = origin.source();
    let mut random = Random(7);

    for _ in 0..100 {
        let range = random.range(BLOB_LEN);
        let bytes = source.read(&a(), range, patient()).await.unwrap();
        assert!(bytes == origin.expected(range), "{range}");
    }
    assert_eq!(origin.requests(), 100);
}

#[tokio::test]
async fn many_readers_at_once_get_their_own_bytes() {
    let origin = Origin::start();
    let source = Arc::new(origin.source());
    let mut random = Random(8);

    let readers: Vec<_> = (0..64)
        .map(|_| {
            let (source, range) = (Arc::clone(&source), random.range(BLOB_LEN));
            tokio::spawn(async move { (range, source.read(&a(), range, patient()).await) })
        })
        .collect();

    for reader in readers {
        let (range, bytes) = reader.await.unwrap();
        assert!(bytes.unwrap() == origin.expected(range), "{range}");
    }
}

#[tokio::test]
async fn an_empty_range_is_empty_and_asks_nobody() {
    let origin = Origin::start();

    let bytes = origin.source().read(&a(), range(5, 5), patient()).await.unwrap();

    assert!(bytes.is_empty());
    assert_eq!(origin.requests(), 0);
}

/// What becomes of a read from an origin with this fault, in a word, and the requests it takes.
async fn outcome(fault: Fault) -> (&'static str, u64) {
    let origin = Origin::faulty(fault);
    let kind = match read_middle(&origin.source()).await {
        Ok(bytes) if bytes == origin.expected(MIDDLE) => "exact",
        Ok(_) => "wrong bytes",
        Err(SourceError::NotFound { .. }) => "not found",
        Err(SourceError::Refused { .. }) => "refused",
        Err(SourceError::OutOfRange { .. }) => "out of range",
        Err(SourceError::NoRanges { .. }) => "no ranges",
        Err(SourceError::Untrusted { .. }) => "untrusted",
        Err(SourceError::Unauthorized { .. }) => "unauthorized",
        Err(SourceError::Unavailable { .. }) => "unavailable",
        Err(SourceError::Deadline { .. }) => "deadline",
        Err(SourceError::Io { .. }) => "io",
    };
    (kind, origin.requests())
}

#[tokio::test]
async fn every_fault_is_told_apart_and_only_transient_ones_are_repeated() {
    let status = |code| Fault::Status { code, retry_after: None };
    let every_attempt = u64::from(QUICK.attempts);
    for (fault, kind, requests) in [
        (Fault::None, "exact", 1),
        (status(500), "unavailable", every_attempt),
        (status(503), "unavailable", every_attempt),
        (status(429), "unavailable", every_attempt),
        (Fault::Cut { after: 0 }, "unavailable", every_attempt),
        // What came counts, and is not asked for again.
        (Fault::Cut { after: 298_999 }, "exact", 2),
        (Fault::Cut { after: 80_000 }, "exact", 4),
        (Fault::Reset { after: 10 }, "unavailable", every_attempt),
        (status(401), "refused", 1),
        (status(403), "refused", 1),
        (status(404), "not found", 1),
        (status(410), "not found", 1),
        (status(204), "no ranges", 1),
        (status(304), "no ranges", 1),
        (Fault::IgnoreRange, "no ranges", 1),
        (Fault::WrongContentRange, "no ranges", 1),
        (Fault::Encoded, "no ranges", 1),
        (Fault::Surplus { bytes: 1 }, "no ranges", 1),
        (Fault::Surplus { bytes: 0 }, "exact", 1),
        (Fault::Redirect { location: "/a".into() }, "untrusted", 6),
    ] {
        assert_eq!(outcome(fault.clone()).await, (kind, requests), "{fault:?}");
    }
}

#[tokio::test]
async fn a_server_that_floods_is_cut_off() {
    let origin = Origin::faulty(Fault::Surplus { bytes: 1 << 40 });

    let error = read_middle(&origin.source()).await.unwrap_err();

    assert!(matches!(error, SourceError::NoRanges { .. }), "{error}");
}

#[tokio::test]
async fn a_flipped_byte_is_delivered_as_it_came() {
    let origin = Origin::faulty(Fault::FlipByte { blob: "a".into(), offset: 270_000 });

    let bytes = read_middle(&origin.source()).await.unwrap();

    let expected = origin.expected(MIDDLE);
    let wrong: Vec<_> = (0..bytes.len()).filter(|&i| bytes[i] != expected[i]).collect();
    assert_eq!(wrong, [269_000]);
}

#[tokio::test]
async fn a_stalling_server_is_given_up_at_the_deadline() {
    for fault in [Fault::StallHead, Fault::Stall { after: 0 }, Fault::Stall { after: 100_000 }] {
        let origin = Origin::faulty(fault.clone());
        let source = origin.source();
        let start = Instant::now();

        let error = source.read(&a(), MIDDLE, within(Duration::from_millis(200))).await.unwrap_err();

        let took = start.elapsed();
        assert!(matches!(error, SourceError::Deadline { range: MIDDLE, .. }), "{fault:?}: {error}");
        assert!((200..4000).contains(&took.as_millis()), "{fault:?}: {took:?}");
    }
}

#[tokio::test]
async fn a_trickle_is_given_up_at_the_deadline_too() {
    let origin = Origin::with(ServerOptions { bytes_per_second: Some(10_000), ..ServerOptions::default() });
    let source = origin.source();
    let start = Instant::now();

    let error = source.read(&a(), MIDDLE, within(Duration::from_millis(200))).await.unwrap_err();

    let (took, sent) = (start.elapsed(), origin.server.stats().bytes_sent);
    assert!(matches!(error, SourceError::Deadline { .. }), "{error}");
    assert!((200..4000).contains(&took.as_millis()), "{took:?}");
    assert!((1..20_000).contains(&sent), "{sent}");
}

#[tokio::test]
async fn a_silent_connection_is_left_for_another_one() {
    let origin = Origin::start();
    origin.server.set_faults(|request| match request.number {
        0 => Fault::Stall { after: 5000 },
        1 => Fault::StallHead,
        _ => Fault::None,
    });
    let options = ClientOptions { idle_timeout: Duration::from_millis(300), ..ClientOptions::default() };
    let source = http(&origin.server.url(), &options, QUICK).unwrap();

    let bytes = read_middle(&source).await.unwrap();

    assert!(bytes == origin.expected(MIDDLE));
    assert_eq!(origin.requests(), 3);
}

#[tokio::test]
async fn a_read_survives_two_busy_answers() {
    let origin = Origin::start();
    origin.server.set_faults(|request| match request.number {
        0 | 1 => Fault::Status { code: 503, retry_after: Some(0) },
        _ => Fault::None,
    });

    let bytes = read_middle(&origin.source()).await.unwrap();

    assert!(bytes == origin.expected(MIDDLE));
    let log: Vec<_> = origin.server.stats().log.iter().map(|served| (served.status, served.range)).collect();
    assert_eq!(log, [(503, Some(MIDDLE)), (503, Some(MIDDLE)), (206, Some(MIDDLE))]);
}

#[tokio::test]
async fn a_server_that_wants_a_pause_gets_it() {
    let origin = Origin::start();
    origin.server.set_faults(|request| match request.number {
        0 => Fault::Status { code: 429, retry_after: Some(1) },
        _ => Fault::None,
    });
    let start = Instant::now();

    read_middle(&origin.source()).await.unwrap();

    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_pause_longer_than_the_deadline_is_not_waited_for() {
    let origin = Origin::faulty(Fault::Status { code: 503, retry_after: Some(3600) });
    let start = Instant::now();

    let error = read_middle(&origin.source()).await.unwrap_err();

    let url = origin.server.url();
    assert_eq!(error.to_string(), format!("{url} failed to serve blob a: it answered with status 503"));
    assert_eq!(origin.requests(), 1);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn ranges_behind_the_end_are_told_with_the_length() {
    let origin = Origin::start();
    let source = origin.source();
    let len = BLOB_LEN as u64;
    for range in [range(len, len + 1), range(len - 1, len + 1), range(0, len + 1), range(u64::MAX - 1, u64::MAX)] {
        let error = source.read(&a(), range, patient()).await.unwrap_err();
        assert!(matches!(error, SourceError::OutOfRange { len: told, .. } if told == len), "{range}: {error}");
    }
}

#[tokio::test]
async fn a_416_without_the_length_is_looked_into() {
    let origin = Origin::start();
    let unexplained = Fault::Status { code: 416, retry_after: None };
    origin.server.set_faults(move |request| if request.head_only { Fault::None } else { unexplained.clone() });
    let source = origin.source();
    let len = BLOB_LEN as u64;

    let outside = source.read(&a(), range(len, len + 1), patient()).await.unwrap_err();
    let inside = source.read(&a(), MIDDLE, patient()).await.unwrap_err();

    assert!(matches!(outside, SourceError::OutOfRange { len: told, .. } if told == len), "{outside}");
    assert!(matches!(inside, SourceError::NoRanges { .. }), "{inside}");
}

#[tokio::test]
async fn a_server_without_ranges_can_still_serve_whole_blobs() {
    let origin = Origin::faulty(Fault::IgnoreRange);

    let bytes = origin.source().read(&a(), range(0, BLOB_LEN as u64), patient()).await.unwrap();

    assert!(bytes == origin.bytes);
}

#[tokio::test]
async fn lengths_come_from_the_head_or_from_the_first_byte() {
    let origin = Origin::start();
    let source = origin.source();
    let [empty, missing] = ["empty", "missing"].map(|name| name.parse::<BlobId>().unwrap());

    assert_eq!(source.len(&a(), patient()).await.unwrap(), BLOB_LEN as u64);
    assert_eq!(source.len(&empty, patient()).await.unwrap(), 0);
    let error = source.len(&missing, patient()).await.unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");

    let forbidden = Fault::Status { code: 403, retry_after: None };
    origin.server.set_faults(move |request| if request.head_only { forbidden.clone() } else { Fault::None });
    assert_eq!(source.len(&a(), patient()).await.unwrap(), BLOB_LEN as u64);
    assert_eq!(source.len(&empty, patient()).await.unwrap(), 0);
    let fetched = origin.server.stats().log.into_iter().filter(|served| !served.head_only);
    assert_eq!(fetched.map(|served| served.range).collect::<Vec<_>>(), [ByteRange::new(0, 1), None]);
}

#[tokio::test]
async fn redirects_keep_the_range() {
    let (front, origin) = (Origin::start(), Origin::start());
    front.server.set_fault(Fault::Redirect { location: format!("{}/a?signature=x", origin.server.url()) });

    let bytes = read_middle(&front.source()).await.unwrap();

    assert!(bytes == origin.expected(MIDDLE));
    assert_eq!(origin.server.stats().fetches().get(&("a", Some(MIDDLE))), Some(&1));
}

#[tokio::test]
async fn a_source_lives_through_an_outage() {
    let origin = Origin::start();
    let source = origin.source();

    for (fault, served) in [
        (Fault::None, true),
        (Fault::Reset { after: 1 }, false),
        (Fault::None, true),
        (Fault::StallHead, false),
        (Fault::None, true),
    ] {
        origin.server.set_fault(fault.clone());
        let patience = if served { Duration::from_secs(60) } else { Duration::from_millis(300) };
        let read = source.read(&a(), MIDDLE, within(patience)).await;
        assert_eq!(read.is_ok_and(|bytes| bytes == origin.expected(MIDDLE)), served, "{fault:?}");
    }

    origin.server.stop();
    let error = read_middle(&source).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
}

/// Takes one request, answers it with 403, and returns its head.
fn overhear(listener: &TcpListener) -> String {
    let (mut stream, _) = listener.accept().unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    stream.write_all(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").unwrap();
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn secrets_of_the_url_reach_the_server_and_no_message() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let source = source(&format!("http://user:hunter2@{address}/x?signature=hunter2"));
    let overheard = tokio::task::spawn_blocking(move || overhear(&listener));

    let refused = read_middle(&source).await.unwrap_err();
    let head = overheard.await.unwrap();
    let gone = read_middle(&source).await.unwrap_err();

    assert!(head.starts_with("GET /x/a?signature=hunter2 HTTP/1.1\r\n"), "{head}");
    for line in [
        "authorization: Basic dXNlcjpodW50ZXIy",
        "range: bytes=1000-299999",
        "accept-encoding: identity",
        concat!("user-agent: rafsd/", env!("CARGO_PKG_VERSION")),
    ] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{line} is not in {head}");
    }
    assert!(matches!(refused, SourceError::Refused { status: 403, .. }), "{refused}");
    assert!(matches!(gone, SourceError::Unavailable { .. }), "{gone}");
    for error in [refused, gone] {
        let shown = format!("{error} {error:?} {source:?} {}", source.describe());
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[tokio::test]
async fn a_server_known_to_the_given_authority_is_read_over_tls() {
    let (origin, authority) = (Origin::start(), Authority::new("known"));
    let front = TlsFront::start(&authority, "localhost", origin.server.address()).await;
    let source = http(&front.url(), &authority.trusted(), QUICK).unwrap();

    assert!(read_middle(&source).await.unwrap() == origin.expected(MIDDLE));
    assert_eq!(source.len(&a(), patient()).await.unwrap(), BLOB_LEN as u64);
}

#[tokio::test]
async fn a_server_nobody_vouches_for_gets_no_request() {
    let (origin, authority) = (Origin::start(), Authority::new("known"));
    let front = TlsFront::start(&authority, "localhost", origin.server.address()).await;
    let stranger = http(&front.url(), &Authority::new("another").trusted(), QUICK).unwrap();

    let error = read_middle(&stranger).await.unwrap_err();

    let url = front.url();
    assert_eq!(
        error.to_string(),
        format!("{url} cannot be trusted: its certificate is not signed by an authority trusted here")
    );
    assert_eq!((front.connections(), origin.requests()), (1, 0), "asking again could not help");
}

#[tokio::test]
async fn a_certificate_for_somebody_else_is_refused() {
    let (origin, authority) = (Origin::start(), Authority::new("known"));
    let front = TlsFront::start(&authority, "elsewhere.example", origin.server.address()).await;
    let source = http(&front.url(), &authority.trusted(), QUICK).unwrap();

    let error = read_middle(&source).await.unwrap_err();

    assert!(matches!(error, SourceError::Untrusted { .. }), "{error}");
    assert!(error.to_string().contains("not valid for name \"localhost\""), "{error}");
    assert_eq!(origin.requests(), 0);
}

#[tokio::test]
async fn nobody_is_led_from_https_to_http() {
    let (origin, plain, authority) = (Origin::start(), Origin::start(), Authority::new("known"));
    origin.server.set_fault(Fault::Redirect { location: format!("{}/a", plain.server.url()) });
    let front = TlsFront::start(&authority, "localhost", origin.server.address()).await;
    let source = http(&front.url(), &authority.trusted(), QUICK).unwrap();

    let error = read_middle(&source).await.unwrap_err();

    assert!(matches!(error, SourceError::Untrusted { .. }), "{error}");
    assert!(error.to_string().ends_with("it redirects from https to http"), "{error}");
    assert_eq!((origin.requests(), plain.requests()), (1, 0));
}

#[tokio::test]
async fn http_may_lead_to_https() {
    let (plain, origin, authority) = (Origin::start(), Origin::start(), Authority::new("known"));
    let front = TlsFront::start(&authority, "localhost", origin.server.address()).await;
    plain.server.set_fault(Fault::Redirect { location: format!("{}/a", front.url()) });
    let source = http(&plain.server.url(), &authority.trusted(), QUICK).unwrap();

    assert!(read_middle(&source).await.unwrap() == origin.expected(MIDDLE));
}

#[test]
fn a_host_without_certificates_is_told_what_to_install_and_only_for_https() {
    const NAME: &str = "a_host_without_certificates_is_told_what_to_install_and_only_for_https";
    const NOWHERE: &str = "/nonexistent";
    if std::env::var("SSL_CERT_DIR").as_deref() != Ok(NOWHERE) {
        // Trust roots come from the environment, so the test runs again in a process of its own.
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", NAME]).env("SSL_CERT_FILE", NOWHERE).env("SSL_CERT_DIR", NOWHERE);
        let run = again.output().unwrap();
        let said = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && said.contains("1 passed"), "{said}");
        return;
    }

    let open = |url: &str| http(url, &ClientOptions::default(), QUICK);
    let error = open("https://h/").unwrap_err();

    assert!(matches!(error, OpenError::Client(_)), "{error:?}");
    assert_eq!(error.to_string(), "no trusted certificates on this system; install ca-certificates or give a CA file");
    assert!(open("http://h/").is_ok());
    assert!(http("https://h/", &Authority::new("known").trusted(), QUICK).is_ok());
}
