use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::negotiation::Negotiated;
use super::read::Buffers;
use super::ring::Lanes;
use super::wire::REQUEST_BUFFER;
use super::{Connection, Transport, Tree, interrupts};
use crate::export::pulse::Pulse;
use crate::sys::fuse::Device;
use crate::sys::sandbox::Sandbox;
use crate::telemetry::{Backend, Telemetry};

/// Requests of one connection that a thread answers before it looks at the others.
const REQUESTS_AT_ONCE: usize = 64;

/// How many threads a request wakes. With one, a lone reader of small files on a host of two processors, both of which
/// sleep in between, gets less than half as far; what the others cost is little, and paid by processors that had nothing
/// to do or were awake.
const WOKEN: usize = 4;

/// By which the pulse is known among the connections, whose numbers start behind it.
const PULSE: u64 = 0;

/// All connections, and what the threads share that read their requests.
///
/// Each thread waits for all of them, and a request wakes some of them, one of whom gets it: with luck the one
/// on the processor whose reader goes to sleep now, who need not wake another processor for it. That a slow disk or
/// a long listing holds up one thread only comes with it.
pub struct Fuse {
    /// Each tells of every request, to one of the threads that wait by it.
    epolls: Vec<Epoll>,
    /// How many threads have begun.
    begun: AtomicUsize,
    pulse: Pulse,
    connections: RwLock<HashMap<u64, Arc<Connection>>>,
    last: AtomicU64,
    buffers: Arc<Buffers>,
    /// Set when readers were sent a signal and may have to be let go.
    signals: Arc<AtomicBool>,
    telemetry: Telemetry,
    /// What carries requests over io_uring, once it is there.
    lanes: OnceLock<Arc<Lanes>>,
    /// Whether new connections are to use them.
    prefers_lanes: AtomicBool,
}

/// Names a connection of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Number(u64);

/// A connection that a server reads. Dropping it leaves it read; see [`Connected::close`].
#[derive(Debug)]
pub struct Connected {
    server: Arc<Fuse>,
    number: Number,
    connection: Arc<Connection>,
}

impl fmt::Debug for Fuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fuse").field("connections", &self.connections.read().unwrap().len()).finish_non_exhaustive()
    }
}

impl Connected {
    /// The connection.
    pub fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// How requests come, and why this way where io_uring is wanted.
    pub fn transport(&self) -> (Transport, Option<&'static str>) {
        self.connection.transport()
    }

    /// Reads it no more and lets go of the device. If nobody else holds that, the connection ends: whoever
    /// uses the mount gets `ENOTCONN`.
    pub fn close(self) {
        self.server.forget(self.number.0);
    }
}

impl Fuse {
    /// A server without connections, whose reads `telemetry` counts.
    pub fn new(telemetry: Telemetry) -> io::Result<Arc<Self>> {
        let pulse = Pulse::new()?;
        let epoll = |_| {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            epoll.add(&pulse, EpollEvent::new(EpollFlags::EPOLLIN, PULSE))?;
            Ok(epoll)
        };
        let epolls = (0..WOKEN).map(epoll).collect::<io::Result<_>>()?;
        Ok(Arc::new(Self {
            epolls,
            begun: AtomicUsize::new(0),
            pulse,
            connections: RwLock::default(),
            last: AtomicU64::new(PULSE),
            buffers: Arc::default(),
            signals: Arc::default(),
            telemetry,
            lanes: OnceLock::new(),
            prefers_lanes: AtomicBool::new(false),
        }))
    }

    /// Threads that a server is well served with. Not one for each processor of a large host: they wait for
    /// no network, only for the disk, and so many reads of that are under way at once.
    pub fn threads() -> usize {
        std::thread::available_parallelism().map_or(WOKEN, std::num::NonZero::get).clamp(WOKEN, 2 * WOKEN)
    }

    /// Answers what comes through `device`, a mounted one, from `tree`, and counts its reads as those of
    /// `backend`.
    pub fn connect(self: &Arc<Self>, device: Device, tree: Arc<dyn Tree>, backend: Backend) -> io::Result<Connected> {
        self.begin(self.connection(device, tree, backend, None, None))
    }

    /// Has threads that carry requests over io_uring, from now on. With `for_new`, those of new connections too,
    /// where the kernel offers it.
    pub fn use_lanes(&self, lanes: Arc<Lanes>, for_new: bool) {
        // The first stay: connections depend on them.
        let _ = self.lanes.set(lanes);
        self.prefers_lanes.fetch_or(for_new, Ordering::Relaxed);
    }

    /// The same threads, if new connections are to use them.
    pub(super) fn lanes_for_new(&self) -> Option<&Arc<Lanes>> {
        self.lanes().filter(|_| self.prefers_lanes.load(Ordering::Relaxed))
    }

    /// The threads that carry requests over io_uring, if there are any.
    pub fn lanes(&self) -> Option<&Arc<Lanes>> {
        self.lanes.get()
    }

    /// A connection that nobody reads yet. With `agreed` it is one that another process had: there is no
    /// handshake. With `lanes` its requests come over io_uring if the kernel offers that.
    pub(super) fn connection(
        &self,
        device: Device,
        tree: Arc<dyn Tree>,
        backend: Backend,
        agreed: Option<Negotiated>,
        lanes: Option<Arc<Lanes>>,
    ) -> Arc<Connection> {
        let counted = (backend, self.telemetry.clone());
        let shared = (self.buffers.clone(), self.signals.clone());
        Arc::new(Connection::new(device, tree, agreed, counted, shared, lanes))
    }

    /// Begins to read a connection.
    pub(super) fn begin(self: &Arc<Self>, connection: Arc<Connection>) -> io::Result<Connected> {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        // In the table first: whoever is woken must find it.
        self.connections.write().unwrap().insert(number, connection.clone());
        let mut added = self.epolls.iter().map(|epoll| epoll.add(connection.device(), interest(number)));
        if let Err(errno) = added.try_for_each(|added| added) {
            self.forget(number);
            return Err(errno.into());
        }
        Ok(Connected { server: self.clone(), number: Number(number), connection })
    }

    /// Reads and answers requests until [`Fuse::stop`]. Several threads may call this; they wait for nothing
    /// but requests and the disk.
    pub fn run(&self) -> io::Result<()> {
        let epoll = &self.epolls[self.begun.fetch_add(1, Ordering::Relaxed) % self.epolls.len()];
        // Written to, so that the kernel finds the pages there: if it did not while this process is being
        // killed, it would fail the request that it is about to give.
        let mut buffer = vec![0; REQUEST_BUFFER];
        buffer.fill(std::hint::black_box(1));
        loop {
            // One at a time: the others are for the other threads.
            let mut events = [EpollEvent::empty()];
            let timeout = if self.look_at_the_signalled() {
                EpollTimeout::try_from(interrupts::PERIOD).unwrap_or(EpollTimeout::ZERO)
            } else {
                EpollTimeout::NONE
            };
            match epoll.wait(&mut events, timeout) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(errno) => return Err(errno.into()),
            }
            match events[0].data() {
                PULSE => {
                    if self.pulse.beat() {
                        // The next thread is to hear it as well.
                        self.pulse.stop();
                        return Ok(());
                    }
                }
                number => self.serve(number, &mut buffer, epoll),
            }
        }
    }

    /// Lets readers go that are being killed. Tells whether to look again.
    fn look_at_the_signalled(&self) -> bool {
        if self.signals.swap(false, Ordering::AcqRel) {
            self.connections().iter().for_each(|connection| connection.interrupts.look());
        }
        self.signals.load(Ordering::Acquire)
    }

    /// Ends [`Fuse::run`] on all threads. What the kernel asks then waits until somebody reads it.
    pub fn stop(&self) {
        self.pulse.stop();
    }

    /// Makes connections over io_uring ready for a successor, as far as that can be done, and ends the threads that
    /// carry them. To be called when nobody reads devices any more. Blocks.
    pub fn stop_lanes(&self, sandbox: &Sandbox) {
        let Some(lanes) = self.lanes.get() else { return };
        for connection in self.connections() {
            connection.plug(sandbox);
        }
        lanes.stop();
    }

    /// Whether one of the threads comes round within this time. Blocks.
    pub fn is_responsive(&self, within: Duration) -> bool {
        self.pulse.is_felt(within) && self.lanes.get().is_none_or(|lanes| lanes.are_responsive(within))
    }

    /// All connections.
    pub fn connections(&self) -> Vec<Arc<Connection>> {
        self.connections.read().unwrap().values().cloned().collect()
    }

    /// Answers what one connection asks now.
    fn serve(&self, number: u64, buffer: &mut [u8], epoll: &Epoll) {
        let connection = self.connections.read().unwrap().get(&number).cloned();
        let Some(connection) = connection else { return };
        for _ in 0..REQUESTS_AT_ONCE {
            match connection.serve_one(buffer) {
                Ok(0) => return self.end(number, &connection),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => match error.raw_os_error() {
                    // Withdrawn while it was read.
                    Some(libc::EINTR | libc::ENOENT) => {}
                    Some(libc::ENODEV | libc::ECONNABORTED | libc::ECONNRESET) => {
                        return self.end(number, &connection);
                    }
                    _ => tracing::error!(%error, "a request of the kernel was lost"),
                },
            }
        }
        // There may be more, of which nobody would be woken again.
        let _ = epoll.modify(connection.device(), &mut interest(number));
    }

    fn end(&self, number: u64, connection: &Connection) {
        tracing::debug!("a connection has ended");
        connection.end();
        self.forget(number);
    }

    fn forget(&self, number: u64) {
        if let Some(connection) = self.connections.write().unwrap().remove(&number) {
            for epoll in &self.epolls {
                let _ = epoll.delete(connection.device());
            }
        }
    }
}

/// Told once of each arrival, to one thread.
fn interest(number: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, number)
}
