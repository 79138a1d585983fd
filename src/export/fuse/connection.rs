use std::borrow::Cow;
use std::fmt;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, RwLock};
use std::time::{Duration, Instant};

use zerocopy::{Immutable, IntoBytes};

use super::duty::Duty;
use super::interrupts::Interrupts;
use super::negotiation::{Negotiated, Reaction, flag, negotiate};
use super::read::Buffers;
use super::reply::{self, Listing, XattrOut, no_entry, opened};
use super::wire::{InitIn, NodeId, Question, Request, WireError};
use super::{Tree, TreeError, read};
use crate::base::Chain;
use crate::export::limiter::Limiter;
use crate::sys::faultpoint;
use crate::sys::fuse::Device;
use crate::sys::requestlog::{RequestLog, Slot};
use crate::telemetry::{Backend, Telemetry};

/// Most bytes of one listing. The kernel asks for a page, or since Linux 6.16 for more.
const MAX_LISTING: u32 = 1 << 20;

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
        buffers: Arc<Buffers>,
        signals: Arc<AtomicBool>,
    ) -> Self {
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
            Ok(request) if request.question.wants_answer() => request,
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
        match request.question {
            Question::Init(offered) => self.agree(duty, &offered),
            Question::Read { offset, size } => read::read(self, duty, request.node, (offset, size), request.pid),
            _ => self.answer(duty, &request),
        }
    }

    /// Answers what needs no waiting.
    fn answer(&self, duty: Duty, request: &Request<'_>) {
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
            Question::Init(_) | Question::Read { .. } | Question::Forget(_) | Question::Interrupt { .. } => {
                unreachable!("answered elsewhere, or not at all")
            }
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
        let mut whole = vec![0; reply::HEAD];
        let mut listing = Listing::new(&mut whole, size.min(MAX_LISTING) as usize);
        let mut is_cut_off = false;
        let listed = self.tree.list(node, from, with_nodes, &mut |listed, node| {
            let fits = if with_nodes { listing.add_node(node, listed) } else { listing.add(listed) };
            is_cut_off = !fits;
            if fits { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        match listed {
            Err(error) => self.fail(duty, &error),
            // No name at all would be the end of the directory.
            Ok(()) if is_cut_off && whole.len() == reply::HEAD => duty.fail(libc::EINVAL),
            Ok(()) => duty.answer_in_place(&mut whole),
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

    fn agree(&self, duty: Duty, offered: &InitIn) {
        let mut state = self.state.lock().unwrap();
        if state.agreed.is_some() {
            return duty.fail(libc::EPROTO);
        }
        match negotiate(offered, self.tree.wishes()) {
            Reaction::Agree(out, negotiated) => {
                state.agreed = Some(negotiated);
                drop(state);
                duty.answer(&out);
                tracing::debug!(?negotiated, "connected");
            }
            Reaction::AskAgain(out) => return duty.answer(&out),
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
