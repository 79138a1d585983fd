//! A line to a server: a round trip and a bandwidth.
//!
//! A connection costs a round trip before its first byte passes. Then each direction takes half a round trip, and what
//! the server sends shares one bandwidth over all connections. Packets, their loss and the slow start of TCP are not
//! simulated.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

/// 200 Mbit/s.
pub(crate) const BANDWIDTH: f64 = 200e6 / 8.0;

/// What passes at once.
const PIECE: usize = 16 << 10;

/// Pieces on their way in one direction of a connection: more than a round trip of 20 ms and 200 Mbit/s holds.
const ON_ITS_WAY: usize = 64;

/// Longest queue in front of the line, in time: a router drops what does not fit, and TCP then sends less.
const QUEUE: Duration = Duration::from_millis(20);

/// How a line is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) round_trip: Duration,
    pub(crate) bytes_per_second: f64,
}

/// A line in operation, on a thread of its own, until it is dropped.
pub(crate) struct Line {
    /// The near end.
    pub(crate) address: SocketAddr,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl Line {
    pub(crate) fn to(server: SocketAddr, shape: Shape) -> std::io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("line".into()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = stopped => {}
                    _ = accept(listener, server, shape) => {}
                }
            });
        })?;
        Ok(Self { address, running: Some((stop, thread)) })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            let _ = stop.send(());
            let _ = thread.join();
        }
    }
}

/// When the line is free again.
type Free = Arc<Mutex<Instant>>;

async fn accept(listener: std::net::TcpListener, server: SocketAddr, shape: Shape) -> std::io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let free: Free = Arc::new(Mutex::new(Instant::now()));
    loop {
        let (near, _) = listener.accept().await?;
        tokio::spawn(connect(near, server, shape, Arc::clone(&free)));
    }
}

async fn connect(near: TcpStream, server: SocketAddr, shape: Shape, free: Free) -> std::io::Result<()> {
    let open = Instant::now() + shape.round_trip;
    let far = TcpStream::connect(server).await?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let (near, far) = (near.into_split(), far.into_split());
    let half = shape.round_trip / 2;
    let there = pass(near.0, far.1, move |_| open.max(Instant::now()) + half);
    let back = pass(far.0, near.1, move |len| {
        let mut free = free.lock().unwrap();
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let takes = Duration::from_secs_f64(len as f64 / shape.bytes_per_second);
        *free = (*free).max(Instant::now()) + takes;
        *free + half
    });
    // When one side has gone, what is on its way to it is lost.
    tokio::select! { _ = there => {}, _ = back => {} }
    Ok(())
}

/// Passes on what comes, each piece at the moment that `due` says when it is told its length.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    due: impl Fn(usize) -> Instant,
) -> std::io::Result<()> {
    let (send, mut sent) = mpsc::channel::<(Instant, Bytes)>(ON_ITS_WAY);
    let taking = async move {
        let mut buffer = BytesMut::with_capacity(PIECE);
        while from.read_buf(&mut buffer).await? > 0 {
            let piece = buffer.split().freeze();
            let at = due(piece.len());
            if send.send((at, piece)).await.is_err() {
                break;
            }
            tokio::time::sleep_until((at.checked_sub(QUEUE).unwrap_or(at)).into()).await;
            buffer.reserve(PIECE);
        }
        std::io::Result::Ok(())
    };
    let giving = async move {
        while let Some((at, piece)) = sent.recv().await {
            tokio::time::sleep_until(at.into()).await;
            to.write_all(&piece).await?;
        }
        std::io::Result::Ok(())
    };
    tokio::try_join!(taking, giving).map(|_| ())
}
