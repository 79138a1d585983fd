//! What queued and running work on a device holds on to, and whether the device is complete.

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use super::background::Background;
use super::engine::Engine;
use super::guides::Guides;
use super::inflight::Inflight;
use super::ledger::{FlushError, Ledger};
use super::readahead::Streams;
use super::sources::Sources;
use super::stats::Counters;
use super::store::is_full;
use super::trace::Trace;
use super::twins::Twins;
use super::users::Users;
use crate::base::sync::{Mutex, RwLock};
use crate::base::{BlobId, ByteRange};
use crate::blob::{UnitIndex, UnitMap};

/// What queued and running work holds on to.
pub(super) struct Core {
    /// Unique within the engine.
    pub(super) id: u64,
    /// What was known when the device was opened. Blob, length, key and number of units never change;
    /// for where units lie there is [`Core::layout`].
    pub(super) first: Arc<UnitMap>,
    /// The same units with all that is known by now; another image may add checks, and to a listed
    /// map also units.
    pub(super) map: RwLock<Arc<UnitMap>>,
    pub(super) sources: Sources,
    pub(super) ledger: Arc<Ledger>,
    pub(super) inflight: Arc<Inflight>,
    /// The data file, if it is a store's.
    pub(super) data: Option<PathBuf>,
    pub(super) streams: Mutex<Streams>,
    pub(super) engine: Arc<Engine>,
    pub(super) counters: Counters,
    pub(super) completeness: Completeness,
    pub(super) background: Background,
    /// What lists say will be read soon.
    pub(super) guides: Guides,
    /// Under whose limits its readers are: the images that have it open.
    pub(super) users: OnceLock<Arc<Users>>,
    /// Whether anybody is in `traces`: asked for every read.
    pub(super) is_traced: AtomicBool,
    /// Who wants to know what is read, and which of its devices this is.
    pub(super) traces: Mutex<Vec<(Arc<Trace>, usize)>>,
    pub(super) closed: AtomicBool,
    /// The last flush failed; said once, not every two seconds.
    pub(super) flush_failed: AtomicBool,
}

/// Whether everything that can be present is, durably.
#[derive(Default)]
pub(super) struct Completeness {
    /// Units whose check is known.
    pub(super) needed: AtomicU32,
    pub(super) reached: AtomicBool,
    /// Whom to tell.
    pub(super) callbacks: Mutex<Vec<Box<dyn FnOnce() + Send>>>,
}

impl Core {
    /// As [`Device::is_complete_durable`].
    pub(super) fn is_complete_durable(&self) -> bool {
        self.completeness.reached.load(Ordering::Acquire)
    }

    /// Lets other devices copy from a device, if nothing is missing of it. Holds on to it for moments
    /// only: whoever closes a device wants the file closed.
    pub(super) fn offer(device: &Weak<Self>, twins: &Twins) {
        let complete = || device.upgrade().filter(|core| core.is_complete_durable());
        let Some((Some(data), map)) = complete().map(|core| (core.data.clone(), core.map())) else { return };
        twins.add(&data, &map);
        // In between another image may have made more of it wanted, of this device or the next.
        if complete().is_none() {
            twins.forget(&data);
        }
    }

    pub(super) fn blob(&self) -> &BlobId {
        self.first.blob()
    }

    /// The images that have it open.
    pub(super) fn users(&self) -> &Arc<Users> {
        self.users.get_or_init(Arc::default)
    }

    /// Where units lie. Takes no lock unless units may be added: presence is asked for every read.
    pub(super) fn layout(&self) -> Cow<'_, Arc<UnitMap>> {
        if self.first.is_listed() { Cow::Owned(self.map()) } else { Cow::Borrowed(&self.first) }
    }

    pub(super) fn map(&self) -> Arc<UnitMap> {
        Arc::clone(&self.map.read().unwrap())
    }

    pub(super) fn is_traced(&self) -> bool {
        self.is_traced.load(Ordering::Acquire)
    }

    /// A reader asked for this.
    pub(super) fn note_read(&self, decoded: ByteRange) {
        if self.is_traced() {
            self.traces.lock().unwrap().iter().for_each(|(trace, number)| trace.note(*number, decoded));
        }
    }

    /// The units that hold `decoded`, if there are units for all of it.
    pub(super) fn covering(&self, decoded: ByteRange) -> Option<Range<UnitIndex>> {
        self.layout().covering(decoded)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Takes over a map that was merged from the one before, so that all its units are where they were.
    pub(super) fn learn(&self, map: Arc<UnitMap>) {
        let (needed, _) = map.checkable();
        self.completeness.needed.store(needed, Ordering::Release);
        *self.map.write().unwrap() = map;
        self.note_completeness();
    }

    pub(super) fn flush(&self) -> Result<(), FlushError> {
        let outcome = self.ledger.flush();
        self.note_completeness();
        outcome
    }

    /// Flushes, for callers that have nobody to return an error to.
    pub(super) fn flush_and_log(&self) {
        match self.flush() {
            Ok(()) => self.flush_failed.store(false, Ordering::Relaxed),
            Err(FlushError::Data(cause) | FlushError::Bits(cause))
                if is_full(&cause) && self.engine.space.make_room(1) => {}
            Err(error) if !self.flush_failed.swap(true, Ordering::Relaxed) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(blob = %self.blob(), cause, "{error}");
            }
            Err(_) => {}
        }
    }

    pub(super) fn note_completeness(&self) {
        // Judged under the lock, or an old verdict could overwrite one about a newer map.
        let mut callbacks = self.completeness.callbacks.lock().unwrap();
        let map = self.map();
        let needed = self.completeness.needed.load(Ordering::Acquire);
        // Of a blob whose units nobody can check yet, nothing is there, whatever is missing.
        let enough = (needed > 0 || map.count() == 0) && self.ledger.presence.count() >= needed;
        let complete = enough && self.ledger.holds_all(&map);
        self.completeness.reached.store(complete, Ordering::Release);
        let due = if complete && !self.is_traced() { std::mem::take(&mut *callbacks) } else { Vec::new() };
        drop(callbacks);
        due.into_iter().for_each(|callback| callback());
    }
}
