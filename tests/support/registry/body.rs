//! Bodies that end, or do not, in other ways than promised.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::Frame;
use rafsd::net::Clock;

use super::record::Record;
use super::wire::Line;

/// How much is handed on at once.
const PIECE: usize = 16 << 10;

/// Times the connection is given the chance to send what it has before it breaks.
const FLUSHES: u32 = 3;

/// How a body comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Whole,
    /// Closed after so many bytes.
    Cut(usize),
    /// Reset after so many bytes.
    Reset(usize),
    /// Silent after so many bytes.
    Stall(usize),
    /// One byte, a second later another.
    Trickle,
}

/// A request at work: the time does not move while there is one, unless it waits for just that.
pub(super) struct Ticket {
    record: Arc<Record>,
    works: bool,
}

impl Ticket {
    pub(super) fn new(record: &Arc<Record>) -> Self {
        record.begin();
        Self { record: Arc::clone(record), works: true }
    }

    /// From now on it waits for the time to pass, or for ever.
    pub(super) fn rest(&mut self) {
        if std::mem::take(&mut self.works) {
            self.record.end();
        }
    }

    pub(super) fn resume(&mut self) {
        if !std::mem::replace(&mut self.works, true) {
            self.record.begin();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.rest();
    }
}

/// A body on its way.
pub(super) struct Pouring {
    pub(super) bytes: Bytes,
    pub(super) ending: Ending,
    pub(super) clock: Clock,
    pub(super) line: Line,
    pub(super) ticket: Ticket,
    /// Where the bytes are counted.
    pub(super) place: usize,
    sent: usize,
    flushes: u32,
    pause: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Pouring {
    pub(super) fn new(bytes: Bytes, ending: Ending, clock: Clock, line: Line, ticket: Ticket, place: usize) -> Self {
        Self { bytes, ending, clock, line, ticket, place, sent: 0, flushes: 0, pause: None }
    }

    /// Bytes that go out before something else happens.
    fn goal(&self) -> usize {
        match self.ending {
            Ending::Whole | Ending::Trickle => self.bytes.len(),
            Ending::Cut(after) | Ending::Reset(after) | Ending::Stall(after) => after.min(self.bytes.len()),
        }
    }

    fn piece(&mut self, most: usize) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let end = (self.sent + most).min(self.goal());
        let piece = self.bytes.slice(self.sent..end);
        self.ticket.record.sent(self.place, piece.len());
        self.sent = end;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn break_off(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if self.flushes < FLUSHES {
            self.flushes += 1;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        if matches!(self.ending, Ending::Reset(_)) {
            self.line.reset_at_end();
        }
        Poll::Ready(Some(Err(io::ErrorKind::ConnectionAborted.into())))
    }
}

impl http_body::Body for Pouring {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = self.get_mut();
        if this.sent < this.goal() {
            if this.ending != Ending::Trickle {
                return this.piece(PIECE);
            }
            if this.sent > 0 {
                let clock = this.clock.clone();
                let pause = this
                    .pause
                    .get_or_insert_with(|| Box::pin(async move { clock.sleep(Duration::from_secs(1)).await }));
                this.ticket.rest();
                std::task::ready!(pause.as_mut().poll(cx));
                this.pause = None;
                this.ticket.resume();
            }
            return this.piece(1);
        }
        match this.ending {
            Ending::Whole | Ending::Trickle => Poll::Ready(None),
            Ending::Cut(_) | Ending::Reset(_) => this.break_off(cx),
            Ending::Stall(_) => {
                this.ticket.rest();
                Poll::Pending
            }
        }
    }
}
