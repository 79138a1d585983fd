//! One connection: requests in, replies out, until one side has had enough.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::spawn_blocking;

use super::reply::{Ending, Reply};
use super::wire::{self, Head, MAX_HEAD, Method};
use super::{Fault, Request, Served, Shared};
use crate::base::{BlobId, ByteRange, ByteRate, Paid};

/// Bytes read from disk and written to the socket at a time when nothing slows the server down.
const CHUNK: u64 = 256 << 10;

/// Pieces per second of a slowed-down body: small enough that a reader sees a steady trickle, and that
/// what one connection puts on the link does not hold up the others for long.
const PIECES_PER_SECOND: u64 = 1000;

/// How far a body may be behind its link, through timers that are late, and still catch up.
const SLACK: Duration = Duration::from_millis(20);

/// Answers requests on `stream` until the client leaves, or a fault ends the connection.
pub(super) async fn serve(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut inbox = Vec::new();
    while let Some(head) = next_head(&mut stream, &mut inbox).await? {
        let head = match wire::parse_head(&head) {
            Ok(head) => head,
            Err(bad) => return stream.write_all(Reply::empty(bad.0).head(true).as_bytes()).await,
        };
        if !answer(&mut stream, &shared, &head).await? || head.close {
            break;
        }
    }
    Ok(())
}

/// The next request head, without its empty line. Bytes behind it stay in `inbox`.
async fn next_head(stream: &mut TcpStream, inbox: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    const END: &[u8] = b"\r\n\r\n";
    loop {
        if let Some(at) = inbox.windows(END.len()).position(|window| window == END) {
            let mut head: Vec<u8> = inbox.drain(..at + END.len()).collect();
            head.truncate(at);
            return Ok(Some(head));
        }
        if inbox.len() > MAX_HEAD || stream.read_buf(inbox).await? == 0 {
            return Ok(None);
        }
    }
}

/// Answers one request; says whether the connection can carry another.
async fn answer(stream: &mut TcpStream, shared: &Shared, head: &Head) -> io::Result<bool> {
    let file = open(shared, &head.name).await;
    let len = file.as_ref().map(|(_, len)| *len);
    let request = Request {
        number: shared.number(),
        blob: head.name.clone(),
        head_only: head.method == Method::Head,
        range: head.asked.and_then(|asked| asked.within(len.unwrap_or(u64::MAX))),
    };
    let fault = shared.fault(&request);
    let reply = Reply::new(&head.name, len, head.asked, &fault);
    shared.log(Served { blob: request.blob, head_only: request.head_only, range: request.range, status: reply.status });
    if !shared.delay.is_zero() {
        tokio::time::sleep(shared.delay).await;
    }
    if matches!(fault, Fault::StallHead) {
        return std::future::pending().await;
    }
    stream.write_all(reply.head(head.close).as_bytes()).await?;
    if let (Method::Get, Some((file, _))) = (head.method, file) {
        send_body(stream, shared, file, &reply).await?;
    }
    Ok(!reply.closes())
}

/// Sends the body and brings it to its ending.
async fn send_body(stream: &mut TcpStream, shared: &Shared, file: Arc<File>, reply: &Reply) -> io::Result<()> {
    let body = match reply.ending {
        Ending::Whole | Ending::Surplus(_) => reply.body,
        Ending::Cut(after) | Ending::Reset(after) | Ending::Stall(after) => {
            reply.body.clamp_end(reply.body.start().saturating_add(after))
        }
    };
    let piece = shared.pace.as_ref().map_or(CHUNK, Pace::piece);
    let mut at = body.start();
    let mut passed = Instant::now();
    while at < body.end() {
        let part = ByteRange::at(at, piece).unwrap_or(body).clamp_end(body.end());
        let mut bytes = read(Arc::clone(&file), part).await?;
        let flipped = reply.flip.and_then(|offset| usize::try_from(offset.checked_sub(at)?).ok());
        if let Some(byte) = flipped.and_then(|index| bytes.get_mut(index)) {
            *byte = !*byte;
        }
        if let Some(pace) = &shared.pace {
            // The link was not idle since the last piece, however late this one comes.
            let from = Instant::now().checked_sub(SLACK).map_or(passed, |late| passed.max(late));
            passed = pace.reserve(part.len(), from);
            tokio::time::sleep_until(passed.into()).await;
        }
        stream.write_all(&bytes).await?;
        shared.sent(part.len());
        at = part.end();
    }
    match reply.ending {
        Ending::Whole | Ending::Cut(_) => Ok(()),
        Ending::Surplus(bytes) => tokio::io::copy(&mut tokio::io::repeat(0).take(bytes), stream).await.map(|_| ()),
        Ending::Reset(_) => stream.set_zero_linger(),
        Ending::Stall(_) => std::future::pending().await,
    }
}

/// Opens the regular file called `name`, with its length. Everything else is "not there": a name
/// that is not a blob id could lead out of the directory.
async fn open(shared: &Shared, name: &str) -> Option<(Arc<File>, u64)> {
    let id: BlobId = name.parse().ok()?;
    let path: PathBuf = shared.dir.join(id.as_str());
    let opened = spawn_blocking(move || {
        // Not blocking: opening a pipe would otherwise wait for its writer.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let metadata = file.metadata()?;
        Ok::<_, io::Error>(metadata.is_file().then(|| (Arc::new(file), metadata.len())))
    });
    opened.await.ok()?.ok()?
}

async fn read(file: Arc<File>, part: ByteRange) -> io::Result<Vec<u8>> {
    let len = usize::try_from(part.len()).map_err(io::Error::other)?;
    let read = spawn_blocking(move || {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, part.start())?;
        Ok(bytes)
    });
    read.await.map_err(io::Error::other)?
}

/// A link of limited bandwidth, shared by all connections.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    /// Everything that was put on it so far.
    carried: std::sync::Mutex<Paid>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, carried: std::sync::Mutex::default() }
    }

    /// Bytes to put on the link at a time.
    fn piece(&self) -> u64 {
        (self.bytes_per_second / PIECES_PER_SECOND).clamp(1, CHUNK)
    }

    /// Puts `bytes` on the link; returns when the last of them has passed.
    fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        self.carried.lock().unwrap().charge(ByteRate::new(self.bytes_per_second), bytes, now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_share_the_bandwidth_of_the_link() {
        let pace = Pace::new(1000);
        let start = Instant::now();

        assert_eq!(pace.reserve(500, start), start + Duration::from_millis(500));
        assert_eq!(pace.reserve(500, start), start + Duration::from_millis(1000));
    }

    #[test]
    fn an_idle_link_saves_up_nothing() {
        let pace = Pace::new(1000);
        let start = Instant::now();
        pace.reserve(1, start);

        let later = start + Duration::from_secs(9);
        assert_eq!(pace.reserve(1000, later), later + Duration::from_secs(1));
    }
}
