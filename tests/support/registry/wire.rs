//! Connections that can be refused, ignored and reset.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::record::Record;

/// How a door treats people who knock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mood {
    Open,
    /// Nobody listens.
    Shut,
    /// Somebody listens and takes nobody.
    Deaf,
}

/// What a handler may do to the connection of its request.
#[derive(Clone, Debug, Default)]
pub(super) struct Line {
    reset: Arc<AtomicBool>,
    mute: Arc<AtomicBool>,
}

impl Line {
    /// Nothing goes out any more; the connection ends at the next attempt.
    pub(super) fn mute(&self) {
        self.mute.store(true, Ordering::SeqCst);
    }

    /// The connection will be reset, not closed, as soon as it is dropped.
    pub(super) fn reset_at_end(&self) {
        self.reset.store(true, Ordering::SeqCst);
    }
}

impl Connected<IncomingStream<'_, Doorway>> for Line {
    fn connect_info(stream: IncomingStream<'_, Doorway>) -> Self {
        stream.remote_addr().clone()
    }
}

/// A place to knock at whose mood changes.
pub(super) struct Doorway {
    address: SocketAddr,
    /// Keeps the port while nobody listens.
    _place: TcpSocket,
    listener: Option<TcpListener>,
    /// Connections that fill the queue of a deaf listener.
    crowd: Vec<TcpStream>,
    /// Those that were taken and still are, to be ended with the listener.
    taken: Vec<Weak<OwnedFd>>,
    mood: watch::Receiver<Mood>,
    is_open: bool,
    tls: Option<TlsAcceptor>,
    record: Arc<Record>,
}

impl Doorway {
    pub(super) fn new(mood: watch::Receiver<Mood>, tls: Option<TlsAcceptor>, record: Arc<Record>) -> Self {
        let place = bound("127.0.0.1:0".parse().expect("an address"));
        let address = place.local_addr().expect("bound");
        Self {
            address,
            _place: place,
            listener: None,
            crowd: Vec::new(),
            taken: Vec::new(),
            mood,
            is_open: false,
            tls,
            record,
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes the listener what the mood says. Whoever is connected is so no longer.
    pub(super) async fn obey(&mut self) {
        let mood = *self.mood.borrow_and_update();
        if mood == Mood::Open && self.is_open {
            return;
        }
        self.is_open = mood == Mood::Open;
        self.listener = None;
        self.crowd.clear();
        if mood != Mood::Open {
            for connection in self.taken.drain(..).filter_map(|it| it.upgrade()) {
                let _ = rustix::net::shutdown(&*connection, rustix::net::Shutdown::Both);
            }
        }
        match mood {
            Mood::Open => self.listener = Some(bound(self.address).listen(1024).expect("a free port")),
            Mood::Shut => {}
            Mood::Deaf => {
                // A queue of one, which is full; whoever knocks then is not even refused.
                self.listener = Some(bound(self.address).listen(0).expect("a free port"));
                self.crowd.push(TcpStream::connect(self.address).await.expect("room for one"));
            }
        }
    }
}

/// A socket with the address, which others may have as long as they do not listen.
fn bound(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_reuseaddr(true).expect("an option every socket has");
    for _ in 0..500 {
        match socket.bind(address) {
            Ok(()) => return socket,
            // A program that is being started has a closed listener until it runs.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => std::thread::sleep(Duration::from_millis(2)),
            Err(error) => panic!("cannot bind to {address}: {error}"),
        }
    }
    panic!("{address} is somebody else's");
}

impl Listener for Doorway {
    type Io = Wire;
    type Addr = Line;

    async fn accept(&mut self) -> (Wire, Line) {
        loop {
            let open = *self.mood.borrow() == Mood::Open;
            let accepted = async {
                match &self.listener {
                    Some(listener) if open => listener.accept().await,
                    _ => std::future::pending().await,
                }
            };
            let mut mood = self.mood.clone();
            tokio::select! {
                biased;
                changed = mood.changed() => {
                    if changed.is_err() {
                        std::future::pending::<()>().await;
                    }
                    self.obey().await;
                }
                accepted = accepted => {
                    let Ok((stream, _)) = accepted else { continue };
                    self.record.step();
                    let _ = stream.set_nodelay(true);
                    let Ok(handle) = stream.as_fd().try_clone_to_owned().map(Arc::new) else { continue };
                    self.taken.push(Arc::downgrade(&handle));
                    let line = Line::default();
                    let stream = match &self.tls {
                        None => Stream::Plain(stream),
                        Some(acceptor) => Stream::Shaking(Box::new(acceptor.accept(stream))),
                    };
                    return (Wire { stream, line: line.clone(), _handle: handle }, line);
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Line> {
        Ok(Line::default())
    }
}

enum Stream {
    Plain(TcpStream),
    /// The handshake is done by whoever reads first, so that it holds up nobody else.
    Shaking(Box<tokio_rustls::Accept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
}

/// One connection.
pub(super) struct Wire {
    stream: Stream,
    line: Line,
    /// Goes with the connection, which would stay open otherwise.
    _handle: Arc<OwnedFd>,
}

impl Wire {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut (dyn Both + 'static)>>> {
        if let Stream::Shaking(accept) = &mut self.stream {
            let done = std::task::ready!(Pin::new(accept.as_mut()).poll(cx))?;
            self.stream = Stream::Tls(Box::new(done));
        }
        Poll::Ready(match &mut self.stream {
            Stream::Plain(stream) => Ok(Pin::new(stream)),
            Stream::Tls(stream) => Ok(Pin::new(stream.as_mut())),
            Stream::Shaking(_) => Err(io::ErrorKind::InvalidInput.into()),
        })
    }
}

trait Both: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Both for T {}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.get_mut().poll_ready(cx))?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.line.mute.load(Ordering::SeqCst) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        std::task::ready!(self.get_mut().poll_ready(cx))?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        std::task::ready!(self.get_mut().poll_ready(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.line.reset.load(Ordering::SeqCst) {
            // A proper end would come before the reset.
            return Poll::Ready(Ok(()));
        }
        std::task::ready!(self.get_mut().poll_ready(cx))?.poll_shutdown(cx)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if self.line.reset.load(Ordering::SeqCst) {
            let stream = match &self.stream {
                Stream::Plain(stream) => Some(stream),
                Stream::Tls(stream) => Some(stream.get_ref().0),
                Stream::Shaking(accept) => accept.get_ref(),
            };
            let _ = stream.map(TcpStream::set_zero_linger);
        }
    }
}
