//! A small static file server with ranges, for the demo, the tests and the benches.
//!
//! It serves the files of one directory as `GET` and `HEAD /NAME`, streaming from disk, and keeps
//! a log of who asked for what. It is written on the socket rather than on an HTTP library because
//! half of its duty is to break the protocol on request: bodies shorter than announced, resets,
//! answers that never come, headers that lie. See [`Fault`].
//!
//! ```no_run
//! # use rafsd::net::server::{BlobServer, Fault, ServerOptions};
//! let server = BlobServer::start("/srv/blobs", ServerOptions::default())?;
//! server.set_fault(Fault::Cut { after: 1000 });
//! println!("{} served {:?}", server.url(), server.stats());
//! # std::io::Result::Ok(())
//! ```

mod connection;
mod reply;
mod wire;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{fmt, io, thread};

use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::base::ByteRange;

/// Log entries kept; later requests are only counted. Bounds the memory of a long demo.
const LOG_LIMIT: usize = 1 << 16;

/// Pause after a failed `accept`, as when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What a server does to a request instead of answering it properly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: a proper answer.
    #[default]
    None,
    /// Answers with this status and no body, optionally with `Retry-After` in seconds.
    Status { code: u16, retry_after: Option<u32> },
    /// Answers 307 with this `Location`.
    Redirect { location: String },
    /// Announces the whole body and closes the connection after this many bytes of it.
    Cut { after: u64 },
    /// Announces the whole body and resets the connection after this many bytes of it.
    Reset { after: u64 },
    /// Announces the whole body and sends nothing after this many bytes of it, for ever.
    Stall { after: u64 },
    /// Takes the request and never answers.
    StallHead,
    /// Answers a ranged request with 200 and the whole file.
    IgnoreRange,
    /// Claims in `Content-Range` to send bytes one further on than it does.
    WrongContentRange,
    /// Announces no length and sends this many zero bytes after the body.
    Surplus { bytes: u64 },
    /// Claims that the body is compressed.
    Encoded,
    /// Inverts the byte at this offset of the named file, in whichever range it is sent.
    FlipByte { blob: String, offset: u64 },
}

/// What a [`FaultScript`] gets to see of a request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Counts all requests to this server, from 0.
    pub number: u64,
    /// The file asked for.
    pub blob: String,
    /// Whether it is a `HEAD` request.
    pub head_only: bool,
    /// The bytes asked for, if a valid range was given.
    pub range: Option<ByteRange>,
}

/// Decides for each request how it is treated. Runs on the server's thread and must not block.
pub type FaultScript = Arc<dyn Fn(&Request) -> Fault + Send + Sync>;

/// One line of a server's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    /// The file asked for.
    pub blob: String,
    /// Whether it was a `HEAD` request.
    pub head_only: bool,
    /// The bytes asked for; `None` if there was no range, or not one the file could satisfy.
    pub range: Option<ByteRange>,
    /// The status that was answered, or would have been.
    pub status: u16,
}

/// What a server has done so far.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Requests understood, whatever the answer.
    pub requests: u64,
    /// Bytes of bodies written to sockets.
    pub bytes_sent: u64,
    /// The first 65536 requests, in the order of their arrival.
    pub log: Vec<Served>,
}

impl Stats {
    /// How often each range of each file was asked for, `HEAD` requests left out.
    pub fn fetches(&self) -> HashMap<(&str, Option<ByteRange>), usize> {
        let mut fetches = HashMap::new();
        for served in self.log.iter().filter(|served| !served.head_only) {
            *fetches.entry((served.blob.as_str(), served.range)).or_default() += 1;
        }
        fetches
    }
}

/// How a [`BlobServer`] listens and behaves.
#[derive(Clone)]
pub struct ServerOptions {
    /// Address to listen on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Waited before each answer: the round trip of a distant registry.
    pub delay: Duration,
    /// Bandwidth of the link, shared by all connections; `None` is unlimited.
    pub bytes_per_second: Option<u64>,
    /// Faults from the start; see [`BlobServer::set_fault`] for later ones.
    pub faults: FaultScript,
}

impl Default for ServerOptions {
    /// An honest, fast server on a free port of the loopback address.
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            delay: Duration::ZERO,
            bytes_per_second: None,
            faults: Arc::new(|_| Fault::None),
        }
    }
}

impl fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerOptions")
            .field("listen", &self.listen)
            .field("delay", &self.delay)
            .field("bytes_per_second", &self.bytes_per_second)
            .finish_non_exhaustive()
    }
}

/// A running server on a thread of its own. Dropping it closes the socket and every connection
/// before it returns.
#[derive(Debug)]
pub struct BlobServer {
    address: SocketAddr,
    shared: Arc<Shared>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl BlobServer {
    /// Serves the regular files of `dir` whose names are valid blob ids.
    ///
    /// # Errors
    /// `dir` is not a directory, the address is taken, or the thread cannot be started.
    pub fn start(dir: impl Into<PathBuf>, options: ServerOptions) -> io::Result<Self> {
        let dir = dir.into();
        if !std::fs::metadata(&dir)?.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, dir.display().to_string()));
        }
        let listener = std::net::TcpListener::bind(options.listen)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            dir,
            delay: options.delay,
            pace: options.bytes_per_second.map(connection::Pace::new),
            faults: Mutex::new(options.faults),
            requests: AtomicU64::new(0),
            bytes_sent: AtomicU64::new(0),
            log: Mutex::default(),
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let run = {
            let shared = Arc::clone(&shared);
            move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        _ = accept(listener, shared) => {}
                    }
                });
            }
        };
        let thread = thread::Builder::new().name("blob-server".into()).spawn(run)?;
        Ok(Self { address, shared, running: Some((stop, thread)) })
    }

    /// Where the server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://ADDRESS:PORT`, without a slash at the end.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What has been asked and sent since the start or the last [`BlobServer::reset_stats`].
    pub fn stats(&self) -> Stats {
        Stats {
            requests: self.shared.requests.load(Ordering::Relaxed),
            bytes_sent: self.shared.bytes_sent.load(Ordering::Relaxed),
            log: self.shared.log.lock().unwrap().clone(),
        }
    }

    /// Forgets what was asked so far; requests are numbered from 0 again.
    pub fn reset_stats(&self) {
        self.shared.requests.store(0, Ordering::Relaxed);
        self.shared.bytes_sent.store(0, Ordering::Relaxed);
        self.shared.log.lock().unwrap().clear();
    }

    /// Treats every request from now on with `fault`.
    pub fn set_fault(&self, fault: Fault) {
        self.set_faults(move |_| fault.clone());
    }

    /// Treats every request from now on as `script` says.
    pub fn set_faults(&self, script: impl Fn(&Request) -> Fault + Send + Sync + 'static) {
        *self.shared.faults.lock().unwrap() = Arc::new(script);
    }

    /// Closes the socket and every connection, as dropping the server does.
    pub fn stop(self) {}
}

impl Drop for BlobServer {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

/// Takes connections until it is dropped; their tasks end with the runtime.
async fn accept(listener: std::net::TcpListener, shared: Arc<Shared>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        match listener.accept().await {
            // A broken connection is the client's to notice, and often what a test asked for.
            Ok((stream, _)) => drop(tokio::spawn(connection::serve(stream, Arc::clone(&shared)))),
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

/// What all connections of a server have in common.
struct Shared {
    dir: PathBuf,
    delay: Duration,
    pace: Option<connection::Pace>,
    faults: Mutex<FaultScript>,
    requests: AtomicU64,
    bytes_sent: AtomicU64,
    log: Mutex<Vec<Served>>,
}

impl Shared {
    /// Counts a request and returns how many came before it.
    fn number(&self) -> u64 {
        self.requests.fetch_add(1, Ordering::Relaxed)
    }

    fn fault(&self, request: &Request) -> Fault {
        let script = Arc::clone(&self.faults.lock().unwrap());
        script(request)
    }

    fn log(&self, served: Served) {
        let mut log = self.log.lock().unwrap();
        if log.len() < LOG_LIMIT {
            log.push(served);
        }
    }

    fn sent(&self, bytes: u64) {
        self.bytes_sent.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("dir", &self.dir).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;

    /// A server on a directory with the file `a`, which holds `0123456789`.
    fn server() -> (tempfile::TempDir, BlobServer) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("a"), "0123456789").unwrap();
        let server = BlobServer::start(dir.path().join("."), ServerOptions::default()).unwrap();
        (dir, server)
    }

    /// Everything the server says to `requests` until it closes the connection.
    fn talk(server: &BlobServer, requests: &str) -> String {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        let mut said = Vec::new();
        let _ = stream.read_to_end(&mut said);
        String::from_utf8(said).unwrap()
    }

    fn status(server: &BlobServer, target: &str) -> String {
        let said = talk(server, &format!("GET {target} HTTP/1.1\r\nConnection: close\r\n\r\n"));
        said.split(' ').nth(1).unwrap_or_default().to_owned()
    }

    #[test]
    fn only_regular_files_of_the_directory_are_served() {
        let (dir, server) = server();
        std::fs::write(dir.path().join(".hidden"), "x").unwrap();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();

        assert_eq!(status(&server, "/a"), "200");
        assert_eq!(status(&server, "/a?signature=x"), "200");
        for target in ["/", "/b", "/d", "/d/..", "/../a", "/%61", "/./a", "//a", "/.hidden", "/pipe", "/a/"] {
            assert_eq!(status(&server, target), "404", "{target}");
        }
        assert_eq!(status(&server, "a"), "400");
    }

    #[test]
    fn requests_sent_in_one_go_are_answered_in_order_and_logged() {
        let (_dir, server) = server();

        let said = talk(
            &server,
            "GET /a HTTP/1.1\r\nRange: bytes=2-4\r\n\r\nHEAD /a HTTP/1.1\r\n\r\n\
             GET /a HTTP/1.1\r\nRange: bytes=10-\r\nConnection: close\r\n\r\n",
        );

        let bodies: Vec<_> = said.split("HTTP/1.1 ").map(|reply| reply.rsplit("\r\n").next().unwrap()).collect();
        assert_eq!(bodies, ["", "234", "", ""]);
        let stats = server.stats();
        let log: Vec<_> = stats.log.iter().map(|served| (served.head_only, served.range, served.status)).collect();
        assert_eq!(log, [(false, ByteRange::new(2, 5), 206), (true, None, 200), (false, None, 416)]);
        assert_eq!((stats.requests, stats.bytes_sent), (3, 3));
        assert_eq!(stats.fetches().get(&("a", ByteRange::new(2, 5))), Some(&1));
    }

    #[test]
    fn endless_heads_end_the_connection() {
        let (_dir, server) = server();

        assert_eq!(talk(&server, &"x".repeat(wire::MAX_HEAD * 2)), "");
        assert_eq!(server.stats().requests, 0);
    }

    #[test]
    fn a_dropped_server_has_closed_its_socket_even_with_a_stalled_reader() {
        let (_dir, server) = server();
        server.set_fault(Fault::Stall { after: 3 });
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.write_all(b"GET /a HTTP/1.1\r\n\r\n").unwrap();
        stream.read_exact(&mut [0; 20]).unwrap();
        let address = server.address();

        drop(server);

        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
