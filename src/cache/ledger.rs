//! A device file and the knowledge of what is in it, in memory and on disk.
//!
//! Order is everything. In memory: bytes, then bit. On disk: a flush takes a snapshot of the bits,
//! syncs the bytes, writes the bits, syncs the bits. So the durable copy may lag but never leads,
//! and after a crash unknown means absent. Before the first bits, the names of all files are synced:
//! a process that died may have left them new in memory and old on disk, and bits must not outlive
//! the file of checks they were won by.
//!
//! A failed sync may have lost pages that the kernel already calls clean, so every bit that is not
//! durable is withdrawn from memory as well. `landing` keeps a writer that straddles such a sync
//! from publishing afterwards.

use std::fs::File;
use std::io;

use super::bits::{self, Identity};
use super::claims::Claims;
use super::presence::{Presence, bit, clear_bit};
use super::rest::Rest;
use super::sink::{Sink, write_blocks};
use super::verify::check_blocks;
use crate::base::sync::atomic::{AtomicBool, Ordering};
use crate::base::sync::{Mutex, RwLock};
use crate::blob::{Unit, UnitIndex, UnitMap};
use crate::sys::faultpoint;

/// Why bits did not become durable.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The device file could not be synced; units not yet durable have become absent.
    #[error("the device file could not be synced; its newest units are absent again")]
    Data(#[source] io::Error),
    /// The presence file could not be written; the next flush tries again.
    #[error("the presence file could not be written")]
    Bits(#[source] io::Error),
}

/// One device file and its presence.
pub(super) struct Ledger {
    pub(super) presence: Presence,
    claims: Claims,
    sink: Box<dyn Sink>,
    /// Held for reading from write to publish, for writing while bits are withdrawn, and while the last device lets go.
    landing: RwLock<()>,
    /// Whether nobody uses the ledger, so that nothing more lands.
    is_let_go: AtomicBool,
    /// Whether anything was published since the last flush began.
    dirty: AtomicBool,
    durable: Mutex<Durable>,
}

/// The units in a file that is taken into use, on stable storage.
pub(super) struct Found {
    pub(super) words: Vec<u64>,
    /// Whether the file was changed since: each unit has to be looked at first.
    pub(super) is_disturbed: bool,
}

struct Durable {
    /// Bits that are on stable storage, and their bytes too; claims among them.
    words: Vec<u64>,
    /// The copy on disk; a foreign sink has none.
    copy: Option<DurableCopy>,
    /// Devices that use the ledger. Jobs may hold it a little longer, but without one of these
    /// the store may have another owner already, whose files are not ours to write.
    owners: usize,
}

/// Where bits are kept across restarts.
pub(super) struct DurableCopy {
    pub(super) file: Box<dyn Sink>,
    pub(super) identity: Identity,
    /// Makes the names of the files durable; `None` once bits are.
    pub(super) names: Option<Box<SyncNames>>,
    /// Where it is noted how the device file lies while nobody uses it.
    pub(super) rest: Option<Rest>,
}

pub(super) type SyncNames = dyn Fn() -> io::Result<()> + Send + Sync;

impl Durable {
    fn rest(&self) -> Option<&Rest> {
        self.copy.as_ref()?.rest.as_ref()
    }
}

impl DurableCopy {
    /// Writes the pages that differ and returns when they are on stable storage.
    fn write(&mut self, before: &[u64], after: &[u64]) -> io::Result<()> {
        if let Some(sync) = &self.names {
            sync()?;
            // Written when the file was made, and perhaps never synced, or in vain.
            self.file.write_at(&bits::empty(&self.identity), 0)?;
        }
        bits::write_changed(&*self.file, &self.identity, before, after)?;
        self.names = None;
        Ok(())
    }
}

impl Ledger {
    pub(super) fn new(sink: Box<dyn Sink>, there: Found, copy: Option<DurableCopy>) -> Self {
        let Found { words, is_disturbed } = there;
        let nothing = vec![0; words.len()];
        let (present, claimed) = if is_disturbed { (&*nothing, &*words) } else { (&*words, &[][..]) };
        Self {
            presence: Presence::new(present),
            claims: Claims::new(claimed),
            sink,
            landing: RwLock::new(()),
            is_let_go: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            durable: Mutex::new(Durable { words, copy, owners: 0 }),
        }
    }

    /// Writes the checked blocks of a unit and makes it present. Tells whether it was absent.
    pub(super) fn land(&self, index: UnitIndex, unit: &Unit, blocks: &[u8]) -> io::Result<bool> {
        let _landing = self.landing.read().unwrap();
        self.ensure_used()?;
        faultpoint::reach("decoded");
        write_blocks(&*self.sink, blocks, unit.blocks().start())?;
        faultpoint::reach("landed");
        let fresh = self.publish(index);
        faultpoint::reach("published");
        Ok(fresh)
    }

    /// The same for bytes that `fill` puts into the file by other means than writing them.
    pub(super) fn land_by(&self, index: UnitIndex, fill: impl FnOnce(&File) -> io::Result<()>) -> io::Result<bool> {
        let _landing = self.landing.read().unwrap();
        self.ensure_used()?;
        fill(self.file().ok_or(io::ErrorKind::Unsupported)?)?;
        Ok(self.publish(index))
    }

    /// Whether a unit may be in the file, and has to be looked at first.
    pub(super) fn is_claimed(&self, index: UnitIndex) -> bool {
        self.claims.has(index)
    }

    /// Looks at the bytes of a unit that may be in the file, in `room`, which is as long as its blocks, and makes it present if
    /// they are right.
    pub(super) fn reclaim(&self, index: UnitIndex, unit: &Unit, room: &mut [u8]) -> bool {
        let _landing = self.landing.read().unwrap();
        let read = self.ensure_used().and_then(|()| self.sink.read_at(room, unit.blocks().start()));
        let is_sound = read.is_ok() && check_blocks(unit, room).is_ok();
        if is_sound {
            self.publish(index);
        }
        self.claims.settle(index, is_sound);
        // What is not there must go from the disk as well.
        self.dirty.store(true, Ordering::Release);
        is_sound
    }

    /// The device file, opened before anybody could mark it: reads through it raise no events.
    pub(super) fn file(&self) -> Option<&File> {
        self.sink.file()
    }

    fn ensure_used(&self) -> io::Result<()> {
        let is_used = !self.is_let_go.load(Ordering::Acquire);
        is_used.then_some(()).ok_or_else(|| io::Error::other("nobody uses the blob any more"))
    }

    fn publish(&self, index: UnitIndex) -> bool {
        let fresh = self.presence.publish(index);
        self.dirty.store(true, Ordering::Release);
        fresh
    }

    /// Adds a device that uses the ledger.
    pub(super) fn attach(&self) {
        let mut durable = self.durable.lock().unwrap();
        if durable.owners == 0 {
            if let Some(rest) = durable.rest().filter(|_| !self.claims.any()) {
                rest.end();
            }
            self.is_let_go.store(false, Ordering::Release);
        }
        durable.owners += 1;
    }

    /// Removes one. After the last, nothing lands and no flush does anything.
    pub(super) fn detach(&self) {
        let mut durable = self.durable.lock().unwrap();
        durable.owners -= 1;
        if durable.owners > 0 {
            return;
        }
        let _nobody_lands = self.landing.write().unwrap();
        self.is_let_go.store(true, Ordering::Release);
        // What was written and could not be made durable is nothing to hold anybody to, and what nobody has looked at is
        // held to the old note.
        let is_known = !self.dirty.load(Ordering::Acquire) && !self.claims.any();
        if let Some(rest) = durable.rest().filter(|_| is_known) {
            rest.begin();
        }
    }

    /// Makes everything published before the call durable. Waits for the disk.
    pub(super) fn flush(&self) -> Result<(), FlushError> {
        let mut durable = self.durable.lock().unwrap();
        if durable.owners == 0 || !self.dirty.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        // In this order: what is looked at meanwhile is claimed or present.
        let claimed = self.claims.view();
        let mut words = self.presence.snapshot();
        claimed.add_to(&mut words);
        if let Err(error) = self.sink.sync() {
            let _nobody_lands = self.landing.write().unwrap();
            let mut keep = durable.words.clone();
            self.claims.spoilt().into_iter().for_each(|index| clear_bit(&mut keep, index));
            self.presence.withdraw(&keep);
            return Err(FlushError::Data(error));
        }
        faultpoint::reach("synced");
        let Durable { words: before, copy, .. } = &mut *durable;
        if let Some(copy) = copy
            && let Err(error) = copy.write(before, &words)
        {
            self.dirty.store(true, Ordering::Release);
            return Err(FlushError::Bits(error));
        }
        faultpoint::reach("flushed");
        durable.words = words;
        self.claims.forget_spoilt(&claimed);
        Ok(())
    }

    /// Whether every unit of `map` that can be checked is durable.
    pub(super) fn holds_all(&self, map: &UnitMap) -> bool {
        let durable = self.durable.lock().unwrap();
        let spoilt = self.claims.spoilt();
        let is_there = |index| bit(&durable.words, index) && self.presence.get(index) && !spoilt.contains(&index);
        (0..).zip(map.units()).all(|(index, unit)| !super::is_needed(unit) || is_there(index))
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
