use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use zerocopy::{Immutable, IntoBytes};

use super::anchor::Held;
use super::duty::Duty;
use super::interrupts::Interrupts;
use super::negotiation::{Negotiated, Reaction, flag, negotiate};
use super::read::Buffers;
use super::reply::{self, Listing, ReplyHead, XattrOut, no_entry, opened};
use super::ring::{Lanes, Side};
use super::wire::{InitIn, NodeId, Question, Request, WireError};
use super::{Transport, Tree, TreeError, Wishes, read};
use crate::base::Chain;
use crate::export::limiter::Limiter;
use crate::sys::faultpoint;
use crate::sys::fuse::Device;
use crate::sys::fuseslots;
use crate::sys::requestlog::{RequestLog, Slot};
use crate::sys::sandbox::Sandbox;
use crate::telemetry::{Backend, Telemetry};

/// What the kernel calls a user whom it does not want to name: with mapped owners it names none.
const NOBODY_NAMED: u32 = u32::MAX;

/// One mounted tree: the device through which the kernel asks about it, and what answers.
pub struct Connection {
    device: Device,
    pub(super) tree: Arc<dyn Tree>,
    pub(super) backend: Backend,
    pub(super) telemetry: Telemetry,
    pub(super) buffers: Arc<Buffers>,
    pub(super) log: Limiter,
    state: Mutex<State>,
    changed: Condvar,
    /// Set when a successor is to give the answers. Held for reading while one is given.
    frozen: RwLock<bool>,
    /// Requests that were read and not answered.
    waiting: AtomicUsize,
    pub(super) interrupts: Interrupts,
    /// Where they are written down, if the kernel does not send them again to a successor.
    requests: OnceLock<Arc<RequestLog>>,
    /// Whether requests are wanted over io_uring; the slots for them until that is settled; and what belongs to them
    /// once it is agreed upon.
    wants_ring: bool,
    slots: Mutex<Option<(Side, Vec<fuseslots::Slot>)>>,
    ring: OnceLock<Side>,
    /// Whether the slots have all that was asked, and nobody here answers any more.
    plugged: AtomicBool,
    numbers: OnceLock<(u32, u32)>,
}

/// What is known of a request that a process which died had taken: where it is written down, if it had to wait.
#[derive(Debug)]
pub(super) struct Before {
    pub(super) slot: Option<Slot>,
}

#[derive(Debug, Default)]
struct State {
    agreed: Option<Negotiated>,
    /// Why there will be no agreement.
    refused: bool,
    ended: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("device", &self.device).field("state", &self.state).finish_non_exhaustive()
    }
}

impl Connection {
    pub(super) fn new(
        device: Device,
        tree: Arc<dyn Tree>,
        agreed: Option<Negotiated>,
        (backend, telemetry): (Backend, Telemetry),
        (buffers, signals): (Arc<Buffers>, Arc<AtomicBool>),
        lanes: Option<Arc<Lanes>>,
    ) -> Self {
        // Here, because the threads that shake hands may not make any.
        let slots = lanes.as_ref().map(Lanes::memory).transpose().unwrap_or_else(|error| {
            tracing::error!(%error, "there is no memory for requests over io_uring");
            None
        });
        Self {
            device,
            tree,
            backend,
            telemetry,
            buffers,
            log: Limiter::new(),
            state: Mutex::new(State { agreed, ..State::default() }),
            changed: Condvar::new(),
            frozen: RwLock::new(false),
            waiting: AtomicUsize::new(0),
            interrupts: Interrupts::new(signals),
            requests: OnceLock::new(),
            wants_ring: lanes.is_some(),
            slots: Mutex::new(slots),
            ring: OnceLock::new(),
            plugged: AtomicBool::new(false),
            numbers: OnceLock::new(),
        }
    }

    /// The device, to be held by other processes as well.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What was agreed upon with the kernel, as soon as it is: `TimedOut` if that takes longer than `within`,
    /// which is when nobody reads the requests. Blocks.
    ///
    /// # Errors
    /// `Unsupported` if the kernel is too old, `NotConnected` if the connection has ended.
    pub fn negotiated(&self, within: Duration) -> io::Result<Negotiated> {
        let undecided = |state: &mut State| state.agreed.is_none() && !state.ended && !state.refused;
        let state = self.state.lock().unwrap();
        let (state, _) = self.changed.wait_timeout_while(state, within, undecided).unwrap();
        match *state {
            State { agreed: Some(agreed), .. } => Ok(agreed),
            State { refused: true, .. } => Err(io::ErrorKind::Unsupported.into()),
            State { ended: true, .. } => Err(io::ErrorKind::NotConnected.into()),
            State { .. } => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Whether the kernel has ended it: it was unmounted, or aborted.
    pub fn has_ended(&self) -> bool {
        self.state.lock().unwrap().ended
    }

    /// Requests that were read and are not answered.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Acquire)
    }

    /// Answers nobody any more, so that whoever waits is left to a successor. Returns when no answer is under
    /// way.
    pub fn freeze(&self) {
        *self.frozen.write().unwrap() = true;
    }

    /// Has requests written down from now on, for a successor.
    pub(super) fn write_down_in(&self, log: Arc<RequestLog>) {
        // There is one for the life of a connection.
        let _ = self.requests.set(log);
    }

    /// Where requests are written down, if they are.
    pub(super) fn log_of_requests(&self) -> Option<&Arc<RequestLog>> {
        self.requests.get()
    }

    /// Whether answers are left to a successor.
    pub(super) fn is_frozen(&self) -> bool {
        *self.frozen.read().unwrap()
    }

    /// Reads a request and sees to it that it is answered. `Ok(0)` at the end of a connection that is none of
    /// the kernel's.
    pub(super) fn serve_one(self: &Arc<Self>, buffer: &mut [u8]) -> io::Result<usize> {
        // Where the kernel has written it, until it is answered or written down.
        let (_landed, len) = match self.requests.get() {
            None => (None, self.device.read(buffer)?),
            Some(log) => {
                let (landed, len) = log.land(self.device.as_fd(), buffer)?;
                (Some(landed), len)
            }
        };
        faultpoint::reach("taken");
        if len > 0 {
            self.handle_contained(&buffer[..len], None);
        }
        Ok(len)
    }

    /// As [`Connection::handle`]: a bug met by one request must not stop the answers for every other reader.
    /// The duty inside fails the request when unwinding drops it.
    pub(super) fn handle_contained(self: &Arc<Self>, bytes: &[u8], before: Option<Before>) {
        if catch_unwind(AssertUnwindSafe(|| self.handle(bytes, before))).is_err() {
            tracing::error!("a request could not be handled and was failed");
        }
    }

    /// Gives an answer, unless that is left to a successor.
    pub(super) fn write(&self, answer: &[u8]) -> io::Result<()> {
        let frozen = self.frozen.read().unwrap();
        if *frozen { Ok(()) } else { self.device.write(answer) }
    }

    pub(super) fn note_end(&self) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn end(&self) {
        self.state.lock().unwrap().ended = true;
        self.changed.notify_all();
    }

    /// Has requests come through these slots.
    pub(super) fn go_on_over(&self, side: Side) {
        // There is one for the life of a connection.
        let _ = self.ring.set(side);
    }

    /// How requests come. If that is by the device although io_uring was wanted, also why.
    pub fn transport(&self) -> (Transport, Option<&'static str>) {
        let agreed = self.state.lock().unwrap().agreed;
        match agreed {
            Some(agreed) if agreed.over_io_uring() => (Transport::IoUring, None),
            Some(agreed) if self.wants_ring && agreed.offered & flag::OVER_IO_URING == 0 => {
                (Transport::Dev, Some("this kernel does not offer requests over io_uring, as `rafsd doctor` explains"))
            }
            _ if self.wants_ring => (Transport::Dev, Some("there was no memory for requests over io_uring")),
            _ => (Transport::Dev, None),
        }
    }

    /// Takes and answers nothing any more that comes over io_uring, so that this process may end, or let go of the
    /// device. Blocks.
    pub(super) fn plug(self: &Arc<Self>, sandbox: &Sandbox) {
        let Some(side) = self.ring.get() else { return };
        let is_whole = match Held::find(self, sandbox) {
            Ok(held) => side.plug(self, &held),
            Err(error) => {
                tracing::error!(%error, "a FUSE connection over io_uring cannot be left to another daemon, and ends with this one");
                false
            }
        };
        self.plugged.store(is_whole, Ordering::Release);
    }

    /// Device numbers of its file system, if it is to outlive this process.
    pub(super) fn numbers(&self) -> Option<(u32, u32)> {
        self.numbers.get().copied()
    }

    /// Sets them.
    pub(super) fn set_numbers(&self, numbers: (u32, u32)) {
        let _ = self.numbers.set(numbers);
    }

    /// What a successor needs of a connection over io_uring that was plugged: the device, and the memory of the
    /// slots. `None` of another, and if that failed.
    pub fn left_in_slots(&self) -> Option<io::Result<(Arc<OwnedFd>, Arc<OwnedFd>)>> {
        let side = self.ring.get().filter(|_| self.plugged.load(Ordering::Acquire))?;
        Some(side.held().map(|memory| (self.device.held(), memory)))
    }

    /// As [`Connection::handle_contained`], for the request in a slot. `is_old` if a predecessor had it.
    pub(super) fn handle_slot(self: &Arc<Self>, slot: fuseslots::Slot, buffer: &mut [u8], is_old: bool) {
        let len = slot.request(buffer);
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let duty = Duty::in_slot(self.clone(), slot, is_old);
        let handled = catch_unwind(AssertUnwindSafe(|| {
            match len.and_then(|len| Request::parse(&buffer[..len]).ok()) {
                Some(request) => self.begin_to_answer(duty, &request),
                // The kernel waits for an answer to everything that comes this way.
                None => duty.fail(libc::EINVAL),
            }
        }));
        if handled.is_err() {
            tracing::error!("a request could not be handled and was failed");
        }
    }

    /// Gives an answer to the request in a slot, whose body of `len` bytes is there, unless that is left to a
    /// successor.
    pub(super) fn commit(self: &Arc<Self>, mut slot: fuseslots::Slot, head: ReplyHead, len: usize) {
        let frozen = self.frozen.read().unwrap();
        if !*frozen && let Some(side) = self.ring.get() {
            let bytes: &[u8; reply::HEAD] = head.as_bytes().try_into().expect("as long as the record");
            slot.answer(bytes, u32::try_from(len).unwrap_or(0));
            side.commit(slot, self);
        }
    }

    fn duty(self: &Arc<Self>, unique: u64, before: Option<Before>) -> Duty {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        match before {
            None => Duty::new(self.clone(), unique),
            Some(Before { slot }) => Duty::old(self.clone(), unique, slot),
        }
    }

    /// Answers the request that `bytes` are, or sees to it that it is answered. `before` of one that a process
    /// which died had taken.
    pub(super) fn handle(self: &Arc<Self>, bytes: &[u8], before: Option<Before>) {
        let request = match Request::parse(bytes) {
            Ok(request) if request.question.wants_answer() => {
                faultpoint::reach(moment(&request.question));
                request
            }
            other => {
                let is_new = before.is_none();
                if let (Some(log), Some(Before { slot: Some(slot) })) = (self.requests.get(), before) {
                    log.strike_out(slot);
                }
                return match other {
                    Ok(Request { question: Question::Interrupt { unique }, .. }) => self.interrupts.signalled(unique),
                    // One that a dead process had taken may have been heeded: better one node too many is known.
                    Ok(Request { question: Question::Forget(forgotten), node, .. }) if is_new => {
                        forgotten.each(node, |node, told| self.tree.forget(node, told));
                    }
                    Ok(_) => {}
                    Err(error) => self.refuse(error),
                };
            }
        };
        let mut duty = self.duty(request.unique, before);
        // All else is answered before this returns.
        if let (Some(log), Question::Read { .. }) = (self.requests.get(), &request.question)
            && !duty.write_down(log, bytes)
        {
            tracing::error!("too many reads wait to write another one down; failed");
            return duty.fail(libc::EIO);
        }
        faultpoint::reach("written-down");
        self.begin_to_answer(duty, &request);
    }

    fn begin_to_answer(self: &Arc<Self>, duty: Duty, request: &Request<'_>) {
        match request.question {
            Question::Init(offered) => self.agree(duty, &offered),
            Question::Read { offset, size } => read::read(self, duty, request.node, (offset, size), request.pid),
            _ => self.answer(duty, request),
        }
    }

    /// Answers what needs no waiting.
    fn answer(self: &Arc<Self>, duty: Duty, request: &Request<'_>) {
        let (tree, node) = (&self.tree, request.node);
        match request.question {
            Question::Lookup(name) => {
                let found = tree.find(node, name);
                let absent = || no_entry(tree.trust_in_absence());
                self.settle(duty, found.map(|found| found.map_or_else(absent, |node| node.entry())));
            }
            Question::Attributes => self.settle(duty, tree.node(node).map(|node| node.attributes())),
            Question::Link => self.settle_bytes(duty, tree.link(node)),
            Question::Open => self.open(duty, node, flag::NO_OPEN_SUPPORT, false),
            Question::OpenDirectory => self.open(duty, node, flag::NO_OPENDIR_SUPPORT, true),
            Question::Release => {
                tree.close(node);
                duty.answer(&[0u8; 0]);
            }
            Question::Destroy => duty.answer(&[0u8; 0]),
            Question::List { from, size, with_nodes } => self.list(duty, node, from, (size, with_nodes)),
            Question::Statistics => duty.answer(&tree.statistics().answer()),
            Question::Xattr { name, size } => self.xattr(duty, tree.xattr(node, name), size),
            Question::Xattrs { size } => {
                let is_trusted = matches!(request.uid, 0 | NOBODY_NAMED);
                self.xattr(duty, tree.xattrs(node, is_trusted).map(Cow::from), size);
            }
            Question::Change => duty.fail(libc::EROFS),
            // The kernel remembers most of these, and does without.
            Question::Other { .. } => duty.fail(libc::ENOSYS),
            // Of these only an answer over a ring is taken, where the kernel does not tell them.
            Question::Forget(_) | Question::Interrupt { .. } => duty.fail(libc::ENOSYS),
            Question::Init(_) | Question::Read { .. } => unreachable!("answered elsewhere"),
        }
    }

    /// Where the kernel takes it, it is told once that opens need no asking; it keeps its caches then.
    fn open(&self, duty: Duty, node: NodeId, unasked: u64, is_directory: bool) {
        let flags = self.state.lock().unwrap().agreed.map_or(0, |agreed| agreed.flags);
        if flags & unasked != 0 {
            return duty.fail(libc::ENOSYS);
        }
        self.settle(duty, self.tree.open(node).map(|is_stable| opened(is_directory, is_stable)));
    }

    fn list(&self, duty: Duty, node: NodeId, from: u64, (size, with_nodes): (u32, bool)) {
        let mut lent = self.buffers.lend();
        let room = &mut lent.bytes[reply::HEAD..];
        let most = room.len().min(size as usize);
        let mut listing = Listing::new(&mut room[..most]);
        let mut is_cut_off = false;
        let listed = self.tree.list(node, from, with_nodes, &mut |listed, node| {
            let fits = if with_nodes { listing.add_node(node, listed) } else { listing.add(listed) };
            is_cut_off = !fits;
            if fits { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let len = listing.len();
        match listed {
            Err(error) => self.fail(duty, &error),
            // No name at all would be the end of the directory.
            Ok(()) if is_cut_off && len == 0 => duty.fail(libc::EINVAL),
            Ok(()) => duty.answer_in_place(&mut lent.bytes[..reply::HEAD + len]),
        }
    }

    fn xattr(&self, duty: Duty, value: Result<Cow<'_, [u8]>, TreeError>, size: u32) {
        let len = |value: &[u8]| u32::try_from(value.len()).unwrap_or(u32::MAX);
        match value {
            Ok(value) if size == 0 => duty.answer(&XattrOut { size: len(&value), padding: 0 }),
            Ok(value) if len(&value) > size => duty.fail(libc::ERANGE),
            value => self.settle_bytes(duty, value),
        }
    }

    fn settle<T: IntoBytes + Immutable>(&self, duty: Duty, answer: Result<T, TreeError>) {
        match answer {
            Ok(answer) => duty.answer(&answer),
            Err(error) => self.fail(duty, &error),
        }
    }

    fn settle_bytes(&self, duty: Duty, answer: Result<Cow<'_, [u8]>, TreeError>) {
        match answer {
            Ok(answer) => duty.answer(&*answer),
            Err(error) => self.fail(duty, &error),
        }
    }

    pub(super) fn fail(&self, duty: Duty, error: &TreeError) {
        if matches!(error, TreeError::Damaged(_))
            && let Some(held_back) = self.log.admit(Instant::now())
        {
            tracing::warn!(error = %Chain(error), held_back, "a question about the image cannot be answered");
        }
        duty.fail(error.errno());
    }

    fn agree(self: &Arc<Self>, duty: Duty, offered: &InitIn) {
        let mut state = self.state.lock().unwrap();
        if state.agreed.is_some() {
            return duty.fail(libc::EPROTO);
        }
        let slots = self.slots.lock().unwrap().take();
        let io_uring = slots.as_ref().map(|(side, _)| side.lanes().pages());
        match negotiate(offered, Wishes { io_uring, ..self.tree.wishes() }) {
            Reaction::Agree(out, negotiated) => {
                state.agreed = Some(negotiated);
                drop(state);
                // The kernel takes slots when it has the answer, and asks nothing before it has slots.
                duty.answer(&out);
                if let Some((side, slots)) = slots.filter(|_| negotiated.over_io_uring()) {
                    let lanes = side.lanes().clone();
                    self.go_on_over(side);
                    lanes.begin(self, slots);
                }
                tracing::debug!(?negotiated, "connected");
            }
            Reaction::AskAgain(out) => {
                *self.slots.lock().unwrap() = slots;
                return duty.answer(&out);
            }
            Reaction::Refuse => {
                state.refused = true;
                drop(state);
                tracing::error!(major = offered.major, minor = offered.minor, "this kernel's FUSE is too old");
                duty.fail(libc::EPROTO);
            }
        }
        self.changed.notify_all();
    }

    fn refuse(self: &Arc<Self>, error: WireError) {
        if let Some(held_back) = self.log.admit(Instant::now()) {
            tracing::warn!(%error, held_back, "a request makes no sense");
        }
        if let Some(unique) = error.owed_to() {
            self.duty(unique, None).fail(libc::EINVAL);
        }
    }
}

/// What fault points call the moment after a question was taken.
fn moment(question: &Question<'_>) -> &'static str {
    match question {
        Question::Lookup(_) => "asked-for-name",
        Question::Attributes => "asked-for-attributes",
        Question::Open => "asked-to-open",
        Question::OpenDirectory => "asked-to-open-directory",
        Question::Read { .. } => "asked-to-read",
        _ => "asked-otherwise",
    }
}
