//! The way of a read: at once if everything is there, else when the fill completes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use super::connection::Connection;
use super::duty::Duty;
use super::interrupts::Waiting;
use super::negotiation::MAX_READ;
use super::reply::HEAD;
use super::wire::NodeId;
use super::{Piece, TreeError};
use crate::base::{BLOCK, ByteRange, Chain, Class};
use crate::cache::{FillError, Request};
use crate::export::Backing;
use crate::export::limiter::Told;
use crate::telemetry::{Answer, WaitingRead};

/// Memory for answers to reads and for listings, used again and again: fresh memory would have to be zeroed each time.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Vec<Box<[u8]>>>);

/// Most buffers that are kept while nobody uses them.
const MOST_IDLE: usize = 8;

/// Room for the head of an answer and the longest read.
const BUFFER: usize = HEAD + MAX_READ as usize;

/// A buffer on loan.
pub(super) struct Loan<'a> {
    from: &'a Buffers,
    /// Of [`BUFFER`] bytes, with whatever the last one left in them.
    pub(super) bytes: Box<[u8]>,
}

impl Buffers {
    pub(super) fn lend(&self) -> Loan<'_> {
        let idle = self.0.lock().unwrap().pop();
        Loan { from: self, bytes: idle.unwrap_or_else(|| vec![0; BUFFER].into_boxed_slice()) }
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let mut idle = self.from.0.lock().unwrap();
        if idle.len() < MOST_IDLE {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}

/// Answers a read of `node`, or has it answered when its data has come. `pid` asked.
pub(super) fn read(connection: &Arc<Connection>, duty: Duty, node: NodeId, (offset, size): (u64, u32), pid: u32) {
    let telemetry = &connection.telemetry;
    let range = ByteRange::at(offset, size.into()).filter(|_| size <= MAX_READ);
    let Some(range) = range else {
        // Not the kernel: it was told what the longest read is.
        telemetry.note_answer(connection.backend, Answer::Denied, duty.is_old());
        return duty.fail(libc::EINVAL);
    };
    let missing = match missing(connection, node, range) {
        Ok(missing) => missing,
        // No reader: we asked ourselves.
        Err(error @ TreeError::Probed) => return connection.fail(duty, &error),
        Err(error) => {
            telemetry.note_answer(connection.backend, Answer::Denied, duty.is_old());
            return connection.fail(duty, &error);
        }
    };
    let wanted = Wanted { connection: connection.clone(), unique: duty.unique(), node, range, pid };
    if missing.is_empty() {
        let is_old = duty.is_old();
        let answer = wanted.answer(duty, None);
        return telemetry.note_answer(connection.backend, answer.unwrap_or(Answer::AtOnce), is_old);
    }
    let is_old = duty.is_old();
    let request = Request::for_bytes(telemetry.next_request(), Class::OnDemand);
    let waiting = telemetry.waiting_read(connection.backend, request.asked()).adopted(is_old);
    let together = Arc::new(Together {
        wanted,
        request: request.clone(),
        failed: OnceLock::new(),
        owed: Mutex::new(Some((duty, waiting))),
    });
    connection.interrupts.enter(together.wanted.unique, pid, is_old, &together);
    for (device, decoded) in missing {
        Share { together: together.clone(), device, decoded, is_again: false, is_settled: false }.ask();
    }
}

/// A range of a device that is not there yet.
type Missing = (Arc<dyn Backing>, ByteRange);

/// What of the read is not there yet.
fn missing(connection: &Connection, node: NodeId, range: ByteRange) -> Result<Vec<Missing>, TreeError> {
    let mut missing = Vec::new();
    connection.tree.pieces(node, range, &mut |piece| {
        if let Piece::Device(device, decoded) = piece {
            let wanted = in_blocks(device, decoded);
            if device.present(wanted) {
                device.touched(wanted);
            } else {
                missing.push((device.clone(), wanted));
            }
        }
    })?;
    Ok(missing)
}

/// Whole blocks, as the other backends ask for them.
fn in_blocks(device: &Arc<dyn Backing>, decoded: ByteRange) -> ByteRange {
    decoded.align_out(BLOCK).filter(|blocks| blocks.end() <= device.decoded_len()).unwrap_or(decoded)
}

/// What a reader waits for.
struct Wanted {
    connection: Arc<Connection>,
    unique: u64,
    node: NodeId,
    range: ByteRange,
    pid: u32,
}

impl Wanted {
    /// Answers with bytes that are all there, or were given to the request. Tells what the reader was told if it was an
    /// error.
    fn answer(&self, duty: Duty, request: Option<&Request>) -> Option<Answer> {
        let Self { connection, node, range, .. } = self;
        let mut duty = duty;
        let mut lent = None;
        let room = match duty.room() {
            Some(room) => room,
            None => &mut lent.insert(connection.buffers.lend()).bytes[HEAD..],
        };
        let mut end = 0;
        let mut outcome = Ok(());
        let walked = connection.tree.pieces(*node, *range, &mut |piece| {
            if outcome.is_ok() {
                outcome = copy(piece, request, room, &mut end);
            }
        });
        if let Err(error) = walked {
            connection.fail(duty, &error);
            return Some(Answer::Denied);
        }
        if let Err(error) = outcome {
            if let Some(held_back) = connection.log.admit(Instant::now()) {
                tracing::error!(%error, held_back, "cannot read the cache");
            }
            duty.fail(libc::EIO);
            return Some(Answer::Denied);
        }
        match lent {
            Some(mut buffer) => duty.answer_in_place(&mut buffer.bytes[..HEAD + end]),
            None => duty.answer_in_room(end),
        }
        None
    }

    fn report(&self, error: &FillError, decoded: ByteRange, asked: &Request) {
        if let Some(held_back) = self.connection.log.admit(Instant::now()) {
            let Told { request, class, queue_ms, service_ms } = Told::of(asked);
            let (node, range, pid) = (self.node, self.range, self.pid);
            tracing::warn!(
                request, error = %Chain(error), node, %range, %decoded, class, pid, queue_ms, service_ms, held_back,
                "read denied"
            );
        }
    }
}

/// Puts a piece at `end` of the answer. Bytes of a device are those of its file, if they are still there: a
/// disk that failed may have taken them away since they were found. A full one has never had them.
fn copy(piece: Piece<'_>, request: Option<&Request>, answer: &mut [u8], end: &mut usize) -> io::Result<()> {
    let len = match &piece {
        Piece::Zeros(len) => *len,
        Piece::Bytes(bytes) => bytes.len() as u64,
        Piece::Device(_, decoded) | Piece::File(_, decoded) => decoded.len(),
    };
    let too_long = || io::Error::other("more bytes than were asked for");
    let len = usize::try_from(len).map_err(|_| too_long())?;
    let rest = answer.get_mut(*end..).and_then(|rest| rest.get_mut(..len)).ok_or_else(too_long)?;
    match piece {
        Piece::Zeros(_) => rest.fill(0),
        Piece::Bytes(bytes) => rest.copy_from_slice(bytes),
        Piece::Device(device, decoded) if device.present(in_blocks(device, decoded)) => {
            device.file().read_exact_at(rest, decoded.start())?;
        }
        Piece::Device(device, decoded) => match request {
            Some(request) => device.read_given(request, decoded, rest)?,
            None => return Err(io::Error::other(format!("{decoded} of a device was lost"))),
        },
        Piece::File(file, range) => {
            *end += read_there(file, rest, range.start())?;
            return Ok(());
        }
    }
    *end += len;
    Ok(())
}

/// Reads what a file has there, which may be less than was asked for: its end.
fn read_there(file: &File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// One read over several fills: answered when all have come, failed with the first that does not.
struct Together {
    wanted: Wanted,
    request: Request,
    failed: OnceLock<(FillError, ByteRange)>,
    owed: Mutex<Option<(Duty, WaitingRead)>>,
}

/// The part of one fill in the answer. Dropping it unsettled fails the read.
struct Share {
    together: Arc<Together>,
    device: Arc<dyn Backing>,
    decoded: ByteRange,
    is_again: bool,
    is_settled: bool,
}

impl Share {
    fn ask(self) {
        let (device, request, decoded) = (self.device.clone(), self.together.request.clone(), self.decoded);
        device.fill_for(request, decoded, Box::new(move |outcome| self.settle(outcome)));
    }

    fn settle(mut self, outcome: Result<(), FillError>) {
        match outcome {
            // It may have joined others who need room, a moment after they were given up.
            Err(FillError::NoSpace { .. }) if !self.is_again => {
                self.is_again = true;
                return self.ask();
            }
            Err(error) => drop(self.together.failed.set((error, self.decoded))),
            Ok(()) => {}
        }
        self.is_settled = true;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if !self.is_settled {
            let _ = self.together.failed.set((FillError::Cancelled, self.together.wanted.range));
        }
    }
}

impl Waiting for Together {
    fn let_go(&self) {
        // Told nothing else, it counts as denied.
        if let Some((duty, _)) = self.owed.lock().unwrap().take() {
            duty.fail(libc::EINTR);
        }
    }
}

impl Drop for Together {
    /// When the last share has gone.
    fn drop(&mut self) {
        self.wanted.connection.interrupts.leave(self.wanted.unique);
        let owed = self.owed.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some((duty, waiting)) = owed.take() else { return };
        match self.failed.get() {
            None => waiting.answered(self.wanted.answer(duty, Some(&self.request)).unwrap_or(Answer::Filled)),
            Some((error, decoded)) => {
                duty.fail(error.errno());
                waiting.answered(Answer::Denied);
                self.wanted.report(error, *decoded, &self.request);
            }
        }
    }
}

impl fmt::Debug for Together {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Together").field("range", &self.wanted.range).finish_non_exhaustive()
    }
}
