//! What has come is decoded, checked, written and published; or lent, where the disk has no room for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::FillError;
use super::core::Core;
use super::lent::LentUnit;
use super::room::Need;
use super::sink::Scratch;
use super::stats::count;
use super::store::is_full;
use super::window::Led;
use crate::base::{Class, RequestId};
use crate::blob::{Decoder, Unit, UnitIndex};
use crate::source::Verdict;
use crate::sys::faultpoint;

impl Core {
    /// Decodes, checks, writes and publishes the units of one stored range one by one, and tells
    /// everyone who waits. `asked`, by whom and when, as in [`Window`].
    pub(super) fn land(
        self: &Arc<Self>,
        group: Vec<Led>,
        asked: (Option<Instant>, RequestId),
        stored: &[u8],
        scratch: &mut Scratch,
    ) {
        let mut decoder = self.first.decoder();
        // What one of them wants without a file, others come back for.
        let lends = group.iter().any(|led| led.lead.urgency().takes_bytes());
        let damaged: Vec<Led> =
            group.into_iter().filter_map(|led| self.land_one(led, lends, stored, &mut decoder, scratch)).collect();
        if !damaged.is_empty() {
            self.refetch(damaged, asked);
        }
    }

    /// The same for one unit; gives it back if its bytes are damaged and it deserves another try.
    pub(super) fn land_one(
        &self,
        led: Led,
        lends: bool,
        stored: &[u8],
        decoder: &mut Decoder,
        scratch: &mut Scratch,
    ) -> Option<Led> {
        if self.is_closed() {
            return None;
        }
        let (index, unit) = (led.lead.unit(), led.unit);
        let room = scratch.room(usize::try_from(unit.blocks().len()).expect("a unit has at most 16 MiB"));
        faultpoint::reach("fetched");
        let outcome = match decoder.decode(self.first.key(), &unit, stored, room) {
            Err(_) if led.wrong + 1 < self.sources.tries() => return Some(led),
            Err(cause) => Err(self.corrupt(index, &unit, cause)),
            Ok(()) if lends && self.has_no_room(&unit) => {
                Err(FillError::NoSpace { blob: self.blob().clone(), unit: index })
            }
            Ok(()) => self.land_checked(index, &unit, room).map_err(|cause| self.unwritten(index, cause)),
        };
        if led.wrong > 0 && outcome.is_ok() {
            self.sources.judged(self.blob(), unit.stored, Verdict::Right);
        }
        match outcome {
            Ok(_) => {
                self.note_filled(&unit, led.lead.urgency().class());
                led.lead.finish(&Ok(()));
            }
            Err(error @ FillError::NoSpace { .. }) if lends => self.lend(led, room, error),
            Err(error) => {
                self.counters.failed();
                led.lead.finish(&Err(error));
            }
        }
        self.flush_if_full();
        // Who waited has been answered: it is the one who writes that waits for the disk.
        self.engine.sync_in_time(unit.blocks().len());
        None
    }

    /// Whether it is known already that the disk has no room for a unit.
    fn has_no_room(&self, unit: &Unit) -> bool {
        let space = &self.engine.space;
        space.room.is_short() && !space.has_room(Need::of([unit.blocks().len()]))
    }

    /// Gives a checked unit that the disk has no room for to who can take it, and keeps it for who comes next.
    fn lend(&self, led: Led, blocks: &[u8], error: FillError) {
        let lent = LentUnit { device: self.id, unit: led.lead.unit(), blocks: led.unit.blocks(), bytes: blocks.into() };
        count(&self.engine.counters.lent_units, 1);
        self.engine.lent.keep(lent.clone());
        if self.is_closed() {
            self.engine.lent.forget(self.id);
        }
        led.lead.finish_lent(&lent, error);
    }

    /// Writes checked blocks and publishes them. Where the disk is full, tries again while nobody asks
    /// it for room, then waits until what nobody uses has gone, and tries once more.
    pub(super) fn land_checked(&self, index: UnitIndex, unit: &Unit, blocks: &[u8]) -> io::Result<bool> {
        let (space, bytes) = (&self.engine.space, blocks.len() as u64);
        let again = || space.room.undisturbed(|| self.ledger.land(index, unit, blocks));
        let mut outcome = self.ledger.land(index, unit, blocks);
        if outcome.as_ref().is_err_and(is_full) {
            outcome = again();
        }
        if outcome.as_ref().is_err_and(is_full) {
            count(&self.engine.counters.refused_writes, 1);
            if space.make_room(bytes) {
                outcome = again();
            }
        }
        if outcome.as_ref().is_err_and(is_full) {
            if !space.room.is_short() {
                tracing::warn!(blob = %self.blob(), "the disk of the cache is full, and everything on it is in use");
            }
            space.room.refused(bytes, Instant::now());
        }
        let fresh = outcome?;
        if fresh {
            space.landed(bytes);
            if space.room.written(bytes) {
                self.engine.lent.clear();
            }
        }
        Ok(fresh)
    }

    /// Has the device made durable at once if nothing is missing any more.
    pub(super) fn flush_if_full(&self) {
        if self.ledger.presence.count() >= self.completeness.needed.load(Ordering::Acquire) {
            self.engine.flusher.kick();
        }
    }

    pub(super) fn note_filled(&self, unit: &Unit, class: Class) {
        self.counters.filled.fetch_add(1, Ordering::Relaxed);
        let fills = &self.engine.telemetry.fills;
        fills.filled.at(class).inc();
        fills.filled_bytes.at(class).add(unit.decoded.len());
    }
}
