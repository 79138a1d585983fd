//! Buckets against moto, an S3 server from PyPI in a process of its own. Where it is not installed
//! (`pip install 'moto[server]'`), the case says so and passes.

use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rafsd::base::{ByteRange, Class};
use rafsd::net::{ClientOptions, Clock, client};
use rafsd::source::{ObjectUpstream, ReadCtx, SourceError, Upstream};

/// A server that ends with the test.
struct Moto {
    child: Child,
    url: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    fn start() -> Option<Self> {
        let found = Command::new("python3").args(["-c", "import moto.server"]).stderr(Stdio::null()).status();
        if !found.is_ok_and(|status| status.success()) {
            eprintln!("skipped: python3 has no moto.server (pip install 'moto[server]')");
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new("python3")
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moto = Self { child, url: format!("http://127.0.0.1:{port}") };
        let until = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "moto did not start");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(moto)
    }
}

#[tokio::test]
async fn blobs_of_a_bucket_are_read_by_ranges() {
    let Some(moto) = Moto::start() else { return };
    let base = moto.url.parse().unwrap();
    let http = client(&ClientOptions::default(), &base).unwrap();
    let body: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    for (path, body) in [("bucket", Vec::new()), ("bucket/images/pre-blob", body.clone())] {
        let put = http.put(format!("{}/{path}", moto.url)).body(body).send().await.unwrap();
        assert!(put.status().is_success(), "{path}: {}", put.status());
    }
    let dir = tempfile::tempdir().unwrap();
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "aws_access_key_id = A\naws_secret_access_key = hunter2\n").unwrap();
    let spec = format!("s3://bucket/images/pre-?endpoint={}&region=us-east-1&credentials={}", moto.url, keys.display());
    let upstream = ObjectUpstream::new(&spec, &ClientOptions::default(), Clock::default()).unwrap();
    let (blob, missing) = ("blob".parse().unwrap(), "missing".parse().unwrap());
    let ctx = ReadCtx::new(Class::OnDemand, Instant::now() + Duration::from_secs(60));

    assert_eq!(upstream.len(&blob, ctx).await.unwrap(), 3_000_000);
    for (start, end) in [(0, 1), (0, 3_000_000), (1_234_567, 2_345_678), (2_999_999, 3_000_000)] {
        let mut read = Vec::new();
        let range = ByteRange::new(start, end).unwrap();
        upstream.pour(&blob, range, ctx, &mut |piece| read.extend_from_slice(&piece)).await.unwrap();
        let (start, end) = (usize::try_from(start).unwrap(), usize::try_from(end).unwrap());
        assert!(read == body[start..end], "{range}");
    }
    let mut none = |_| panic!("nothing is handed on");
    let range = ByteRange::new(0, 1).unwrap();
    let error = upstream.pour(&missing, range, ctx, &mut none).await.unwrap_err().error;
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    let range = ByteRange::new(3_000_000, 3_000_010).unwrap();
    let error = upstream.pour(&blob, range, ctx, &mut none).await.unwrap_err().error;
    assert!(!matches!(error, SourceError::Unavailable { .. } | SourceError::NotFound { .. }), "{error}");
}
