//! Requests over io_uring (Linux 6.14): the threads that carry them.
//!
//! A request then comes through a slot of the queue of the processor that its reader runs on, and one call both
//! gives an answer and waits for the next request. A [`Lane`] is the thread of one processor, bound to it, with one
//! ring for the slots of all connections. It answers at once what is known. What has to wait goes on its own, as
//! with [`/dev/fuse`](crate::sys::fuse::DEVICE), and whoever completes it leaves the slot to the lane: only the
//! thread of a ring may use it.
//!
//! What the kernel drops and what interrupts readers still comes through the device, which is read as ever.
//!
//! A daemon that is killed ends such connections: a request that the kernel was about to put into a slot then is
//! failed, or given to nobody and kept (6.18 says `ECANCELED` to its reader), and no successor can do anything about
//! it. So no keeper has the device, and with the last process that has it the kernel fails all who wait. One that makes room in peace first [plugs](Lanes::plug) the connection: each lane has the kernel
//! ask it for nothing until no slot is left that a request could be on its way to. What is in the slots then is all there
//! is, and a successor answers it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::Connection;
use super::anchor::Held;
use super::wire::NodeId;
use crate::export::pulse::Pulse;
use crate::sys::fusering::{Event, Ring};
use crate::sys::fuseslots::{Content, Shape, Slot, SlotMemory};

/// Slots of each queue. When all wait for data, others who read on that processor wait with them.
const SLOTS: u16 = 32;

/// Least bytes of the longest read. Memory for it is there in each slot, though not used before the slot is.
const PAYLOAD: u32 = 256 << 10;

/// As long as the kernel makes a request: names are of up to 1024 bytes.
const REQUEST: usize = 16 << 10;

/// How long plugging may take: each step of it waits for nobody but the kernel.
const PATIENCE: Duration = Duration::from_secs(5);

/// Numbers of requests that we have the kernel make, from here on in steps of two. Its own start at nothing.
const OWN_NUMBERS: u64 = 1 << 62;

/// The lanes of all processors.
#[derive(Debug)]
pub struct Lanes {
    lanes: Vec<Arc<Lane>>,
    /// For each processor that there might be, its lane. One that is not there now shares that of another.
    of_queue: Vec<usize>,
    page: u32,
}

/// The thread of one processor.
#[derive(Debug)]
pub struct Lane {
    cpu: u16,
    pulse: Pulse,
    inbox: Mutex<Vec<Errand>>,
    thread: OnceLock<ThreadId>,
    /// Until the thread has it.
    ring: Mutex<Option<Ring<Arc<Connection>>>>,
    numbers: Arc<AtomicU64>,
}

/// What only the thread of a ring can do.
#[derive(Debug)]
enum Errand {
    /// Give the kernel a new slot.
    Register(Slot, Arc<Connection>),
    /// Hand an answer in.
    Commit(Slot, Arc<Connection>),
    /// Answer what a predecessor has left.
    Resume(Slot, Arc<Connection>),
    /// Leave the kernel no slot, by way of one of these files, and say whether that was possible.
    Plug(Arc<Connection>, Range<NodeId>, Sender<bool>),
}

/// Connections whose slots are left to a successor, or to nobody.
#[derive(Debug, Default)]
struct Plugged(Vec<Weak<Connection>>);

impl Plugged {
    fn add(&mut self, connection: &Arc<Connection>) {
        self.0.retain(|it| it.strong_count() > 0);
        self.0.push(Arc::downgrade(connection));
    }

    fn has(&self, connection: &Arc<Connection>) -> bool {
        self.0.iter().any(|it| std::ptr::eq(it.as_ptr(), Arc::as_ptr(connection)))
    }
}

/// The side of a connection that has to do with rings.
#[derive(Debug)]
pub(super) struct Side {
    lanes: Arc<Lanes>,
    memory: Arc<SlotMemory>,
}

/// Why requests do not come over io_uring.
#[derive(Debug, thiserror::Error)]
pub enum NoLanes {
    #[error("this kernel does not tell which processors there might be")]
    Processors(#[source] io::Error),
    #[error("this process may not use io_uring")]
    Ring(#[source] io::Error),
    #[error("this process may not run on processor {cpu}, where readers may")]
    Confined {
        cpu: u16,
        #[source]
        cause: io::Error,
    },
}

impl Lanes {
    /// A lane for each processor, whose [`Lane::run`] has to be called on a thread of its own. To be called outside
    /// of the sandbox, in which no ring can be made.
    ///
    /// # Errors
    /// If this process may not use io_uring, or not all processors.
    pub fn create() -> Result<Arc<Self>, NoLanes> {
        let processors = |name| {
            let path = format!("/sys/devices/system/cpu/{name}");
            let text = std::fs::read_to_string(path).map_err(NoLanes::Processors)?;
            numbers(&text).ok_or_else(|| NoLanes::Processors(io::ErrorKind::InvalidData.into()))
        };
        let (possible, online) = (processors("possible")?, processors("online")?);
        let queues = possible.iter().max().map_or(1, |last| usize::from(*last) + 1);
        ensure_everywhere(&online)?;
        let numbers = Arc::new(AtomicU64::new(OWN_NUMBERS));
        let lane = |cpu: &u16| {
            let ring = Ring::create().map_err(NoLanes::Ring)?;
            let pulse = Pulse::new().map_err(NoLanes::Ring)?;
            let (inbox, thread, ring) = (Mutex::default(), OnceLock::new(), Mutex::new(Some(ring)));
            Ok(Arc::new(Lane { cpu: *cpu, pulse, inbox, thread, ring, numbers: numbers.clone() }))
        };
        let lanes = online.iter().map(lane).collect::<Result<Vec<_>, _>>()?;
        let of = |queue: usize| online.iter().position(|cpu| usize::from(*cpu) == queue).unwrap_or(queue % lanes.len());
        let of_queue = (0..queues).map(of).collect();
        let page = u32::try_from(rustix::param::page_size()).unwrap_or(PAYLOAD);
        Ok(Arc::new(Self { lanes, of_queue, page }))
    }

    /// All lanes.
    pub fn lanes(&self) -> &[Arc<Lane>] {
        &self.lanes
    }

    /// Most pages of one request.
    pub(super) fn pages(&self) -> u16 {
        u16::try_from((PAYLOAD / self.page).max(1)).unwrap_or(1)
    }

    /// Memory for the slots of a new connection.
    pub(super) fn memory(self: &Arc<Self>) -> io::Result<(Side, Vec<Slot>)> {
        let queues = u16::try_from(self.of_queue.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let payload = u32::from(self.pages()) * self.page;
        let (memory, slots) = SlotMemory::create(Shape { queues, slots: SLOTS, payload })?;
        Ok((Side { lanes: self.clone(), memory }, slots))
    }

    /// The memory that a predecessor left of a connection, with its slots.
    ///
    /// # Errors
    /// If it was killed, or had another number of processors.
    pub(super) fn take_over(self: &Arc<Self>, fd: OwnedFd) -> io::Result<(Side, Vec<Slot>)> {
        let (memory, slots) = SlotMemory::take_over(fd)?;
        if usize::from(memory.shape().queues) != self.of_queue.len() {
            return Err(io::Error::other("the number of processors has changed"));
        }
        Ok((Side { lanes: self.clone(), memory }, slots))
    }

    /// The lane that a slot belongs to.
    fn of(&self, slot: &Slot) -> &Lane {
        &self.lanes[self.of_queue.get(usize::from(slot.queue())).copied().unwrap_or(0)]
    }

    /// Gives the kernel the slots of a new connection.
    pub(super) fn begin(&self, connection: &Arc<Connection>, slots: Vec<Slot>) {
        // The last queue last, and all of each lane at once: the kernel asks nothing before every queue has one.
        slots.into_iter().for_each(|slot| self.of(&slot).put(Errand::Register(slot, connection.clone())));
        self.lanes.iter().for_each(|lane| lane.pulse.ring());
    }

    /// Goes on with the slots of a connection that a predecessor has plugged.
    pub(super) fn resume(&self, connection: &Arc<Connection>, slots: Vec<Slot>) {
        for slot in slots {
            let connection = connection.clone();
            let lane = self.of(&slot);
            lane.put(match slot.content() {
                Content::Nothing => Errand::Register(slot, connection),
                Content::Request => Errand::Resume(slot, connection),
                Content::Answer => Errand::Commit(slot, connection),
            });
        }
        self.lanes.iter().for_each(|lane| lane.pulse.ring());
    }

    /// Leaves the kernel no slot of a connection, so that no request is failed when this process ends; what is in the
    /// slots is left there, for a successor. Nobody is answered any more. Blocks.
    ///
    /// False if that was not possible: then the connection has to end with this process.
    fn plug(&self, connection: &Arc<Connection>, nodes: &Range<NodeId>, memory: &SlotMemory) -> bool {
        let (tell, told) = channel();
        for lane in &self.lanes {
            lane.put(Errand::Plug(connection.clone(), nodes.clone(), tell.clone()));
            lane.pulse.ring();
        }
        drop(tell);
        let until = Instant::now() + PATIENCE;
        let is_told = || told.recv_timeout(until.saturating_duration_since(Instant::now())) == Ok(true);
        let is_whole = self.lanes.iter().all(|_| is_told());
        if is_whole {
            memory.say_whole();
        }
        is_whole
    }

    /// Whether all threads come round within this time. Blocks.
    pub(super) fn are_responsive(&self, within: Duration) -> bool {
        self.lanes.iter().all(|lane| lane.pulse.is_felt(within))
    }

    /// Ends all threads.
    pub(super) fn stop(&self) {
        self.lanes.iter().for_each(|lane| lane.pulse.stop());
    }
}

impl Side {
    /// Hands in an answer.
    pub(super) fn commit(&self, slot: Slot, connection: &Arc<Connection>) {
        let lane = self.lanes.of(&slot);
        lane.put(Errand::Commit(slot, connection.clone()));
        // The thread itself looks before it waits.
        if lane.thread.get() != Some(&std::thread::current().id()) {
            lane.pulse.ring();
        }
    }

    /// See [`Lanes::plug`].
    pub(super) fn plug(&self, connection: &Arc<Connection>, held: &Held) -> bool {
        self.lanes.plug(connection, &held.nodes, &self.memory)
    }

    pub(super) fn lanes(&self) -> &Arc<Lanes> {
        &self.lanes
    }

    /// The memory, for who keeps it.
    pub(super) fn held(&self) -> io::Result<Arc<OwnedFd>> {
        Ok(Arc::new(self.memory.as_fd().try_clone_to_owned()?))
    }
}

impl Lane {
    /// The number of its processor.
    pub fn cpu(&self) -> u16 {
        self.cpu
    }

    /// Binds the calling thread to its processor: a reader is answered by the one that it runs on, and readers
    /// elsewhere are not held up.
    pub fn bind(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        set.set(usize::from(self.cpu))?;
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }

    fn put(&self, errand: Errand) {
        self.inbox.lock().unwrap().push(errand);
    }

    /// Carries requests and answers until the lanes are stopped. To be called once.
    pub fn run(&self) -> io::Result<()> {
        let ring = self.ring.lock().unwrap().take();
        let mut ring = ring.ok_or_else(|| io::Error::other("the lane has a thread already"))?;
        ring.enable(self.pulse.as_fd().try_clone_to_owned()?)?;
        let _ = self.thread.set(std::thread::current().id());
        // Reaches over all pages, as with the device.
        let mut buffer = vec![1; REQUEST];
        let mut plugged = Plugged::default();
        loop {
            let errands = std::mem::take(&mut *self.inbox.lock().unwrap());
            for errand in errands {
                self.run_errand(&mut ring, errand, &mut plugged, &mut buffer)?;
            }
            // Those that came of the errands.
            if !self.inbox.lock().unwrap().is_empty() {
                continue;
            }
            ring.wait()?;
            if self.take_events(&mut ring, &plugged, &mut buffer)? {
                return Ok(());
            }
        }
    }

    fn run_errand(
        &self,
        ring: &mut Ring<Arc<Connection>>,
        errand: Errand,
        plugged: &mut Plugged,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        match errand {
            Errand::Register(slot, connection) => ring.register(connection.device().held(), slot, connection),
            // A successor hands it in.
            Errand::Commit(_, connection) if plugged.has(&connection) => Ok(()),
            Errand::Commit(slot, connection) => ring.commit(connection.device().held(), slot, connection),
            Errand::Resume(slot, connection) => {
                connection.handle_slot(slot, buffer, true);
                Ok(())
            }
            Errand::Plug(connection, nodes, tell) => {
                plugged.add(&connection);
                let is_whole = self.plug(ring, &connection, nodes, plugged, buffer)?;
                let _ = tell.send(is_whole);
                Ok(())
            }
        }
    }

    /// Has the kernel ask for nothing until it has no slot of our processor any more.
    fn plug(
        &self,
        ring: &mut Ring<Arc<Connection>>,
        connection: &Arc<Connection>,
        mut nodes: Range<NodeId>,
        plugged: &Plugged,
        buffer: &mut [u8],
    ) -> io::Result<bool> {
        let until = Instant::now() + PATIENCE;
        loop {
            let ours = |(queue, with): (u16, &Arc<Connection>)| queue == self.cpu && Arc::ptr_eq(with, connection);
            if !ring.held().any(ours) {
                return Ok(true);
            }
            if Instant::now() > until || nodes.is_empty() {
                return Ok(false);
            }
            let number = self.numbers.fetch_add(2, Ordering::Relaxed);
            match connection.device().nudge(nodes.start, number) {
                Ok(()) => {}
                // Not this one.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    nodes.start += 1;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "the kernel does not ask for nothing");
                    return Ok(false);
                }
            }
            ring.wait()?;
            if self.take_events(ring, plugged, buffer)? {
                return Ok(false);
            }
        }
    }

    /// Takes what the ring tells. True at the end.
    fn take_events(&self, ring: &mut Ring<Arc<Connection>>, plugged: &Plugged, buffer: &mut [u8]) -> io::Result<bool> {
        let mut is_over = false;
        while let Some(event) = ring.event()? {
            match event {
                Event::Bell => is_over |= self.pulse.beat(),
                // Left as it is.
                Event::Request(_, connection) if plugged.has(&connection) => {}
                Event::Request(slot, connection) => connection.handle_slot(slot, buffer, false),
                // Nobody waits for that answer, and there is a slot that the kernel does not have.
                Event::Refused(slot, connection, error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    ring.register(connection.device().held(), slot, connection)?;
                }
                Event::Refused(_, _, error) if is_end(&error) => {}
                Event::Refused(slot, _, error) => {
                    tracing::error!(%error, queue = slot.queue(), "the kernel does not take a slot");
                }
            }
        }
        Ok(is_over)
    }
}

/// Where the kernel's switch is. It counts for connections that begin while it is on.
const SWITCH: &str = "/sys/module/fuse/parameters/enable_uring";

/// Why new connections cannot be over io_uring here.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    #[error("this kernel has no FUSE over io_uring")]
    NotBuilt,
    #[error("it is built in and switched off: {SWITCH} is N")]
    Off,
    #[error(transparent)]
    Lanes(#[from] NoLanes),
}

impl Unavailable {
    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotBuilt => "load the fuse module, or use Linux 6.14 or later built with FUSE_IO_URING",
            Self::Off => {
                "write Y there, or boot with fuse.enable_uring=1, before mounting with the setting fuse_transport = \"io-uring\""
            }
            Self::Lanes(NoLanes::Confined { .. }) => "let the daemon run on all processors that are online",
            Self::Lanes(NoLanes::Ring(_)) => {
                "see the sysctl kernel.io_uring_disabled, and let the daemon call io_uring_setup (Linux 6.1 or later)"
            }
            Self::Lanes(NoLanes::Processors(_)) => "mount /sys",
        }
    }
}

/// Whether new connections can be over io_uring here. Changes nothing.
pub fn availability() -> Result<(), Unavailable> {
    match std::fs::read_to_string(SWITCH) {
        Err(_) => Err(Unavailable::NotBuilt),
        Ok(text) if text.trim() != "Y" => Err(Unavailable::Off),
        Ok(_) => Ok(Lanes::create().map(drop)?),
    }
}

/// Whether the connection has ended, which is heard of elsewhere too.
fn is_end(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ECANCELED))
}

/// Fails if a thread of ours cannot be bound to each of these processors: then requests of those who read there
/// could neither be answered there nor be plugged.
fn ensure_everywhere(online: &[u16]) -> Result<(), NoLanes> {
    let probe = || -> Result<(), NoLanes> {
        for cpu in online {
            let mut set = CpuSet::new();
            let bound = set.set(usize::from(*cpu)).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
            bound.map_err(|errno| NoLanes::Confined { cpu: *cpu, cause: errno.into() })?;
        }
        Ok(())
    };
    // On a thread that is of no other use.
    std::thread::scope(|scope| scope.spawn(probe).join().unwrap_or(Ok(())))
}

/// The numbers in a list of the kernel's, such as `0-3,8`.
fn numbers(list: &str) -> Option<Vec<u16>> {
    let mut all = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
        all.extend(first..=last);
    }
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_understood() {
        assert_eq!(numbers("0\n"), Some(vec![0]));
        assert_eq!(numbers("0-3,8,10-11\n"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        for nonsense in ["", "a", "0-", "0--2", "3-1", "70000"] {
            assert_eq!(numbers(nonsense), None, "{nonsense}");
        }
    }
}
