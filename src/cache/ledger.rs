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

use std::collections::BTreeSet;
use std::fs::File;
use std::io;

use super::bits::{self, Identity};
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
    /// Units that are said to be in the file, and that nobody has looked at since it was changed by others. Not present,
    /// but kept on disk until they have been.
    claims: Presence,
    /// Those of them that were not what they should be, until what came in their place is durable.
    spoilt: Mutex<BTreeSet<UnitIndex>>,
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
            claims: Presence::new(claimed),
            spoilt: Mutex::default(),
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
        self.has_claims() && self.claims.get(index)
    }

    fn has_claims(&self) -> bool {
        self.claims.count() > 0
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
        self.claims.withdraw_one(index);
        if !is_sound {
            // Not before the claim has gone: a flush that knows of it must not write the claim.
            self.spoilt.lock().unwrap().insert(index);
        }
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
            if let Some(rest) = durable.rest().filter(|_| !self.has_claims()) {
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
        let is_known = !self.dirty.load(Ordering::Acquire) && !self.has_claims();
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
        // In this order: what is looked at meanwhile is claimed or present, and what is spoilt is not claimed.
        let spoilt = self.spoilt.lock().unwrap().clone();
        let claims = self.has_claims().then(|| self.claims.snapshot());
        let mut words = self.presence.snapshot();
        words.iter_mut().zip(claims.iter().flatten()).for_each(|(word, claimed)| *word |= claimed);
        if let Err(error) = self.sink.sync() {
            let _nobody_lands = self.landing.write().unwrap();
            let mut keep = durable.words.clone();
            self.spoilt.lock().unwrap().iter().for_each(|&index| clear_bit(&mut keep, index));
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
        self.spoilt.lock().unwrap().retain(|index| !spoilt.contains(index));
        Ok(())
    }

    /// Whether every unit of `map` that can be checked is durable.
    pub(super) fn holds_all(&self, map: &UnitMap) -> bool {
        let durable = self.durable.lock().unwrap();
        let spoilt = self.spoilt.lock().unwrap();
        let is_there = |index| bit(&durable.words, index) && self.presence.get(index) && !spoilt.contains(&index);
        (0..).zip(map.units()).all(|(index, unit)| !super::is_needed(unit) || is_there(index))
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use std::collections::{BTreeSet, VecDeque};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::base::Digest;

    /// Spread over three pages of bits.
    const UNITS: UnitIndex = 9000;

    fn identity() -> Identity {
        Identity { layout: Digest([1; 32]), units: UNITS, inode: 2, born: 3 }
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// Write the bytes of a unit, not yet its bit.
        Write(UnitIndex),
        /// Publish all units written.
        Publish,
        Flush,
        /// The next data sync fails and what it should have written is lost.
        FailData,
        /// The next sync of the bits fails; what was written may or may not survive.
        FailBits,
    }

    /// A disk that loses power after a number of operations.
    struct World {
        script: VecDeque<Step>,
        /// Whether the next scripted write or publish happens during an operation of a flush.
        coins: VecDeque<bool>,
        operations_left: usize,
        ledger: Option<Arc<Ledger>>,
        written: BTreeSet<UnitIndex>,
        unsynced_units: BTreeSet<UnitIndex>,
        synced_units: BTreeSet<UnitIndex>,
        bits: Vec<u8>,
        unsynced_bits: Vec<(usize, Vec<u8>)>,
        fail_data: bool,
        fail_bits: bool,
    }

    type Shared = Arc<Mutex<World>>;

    fn apply(bits: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        let len = bits.len().max(at + bytes.len());
        bits.resize(len, 0);
        bits[at..at + bytes.len()].copy_from_slice(bytes);
    }

    impl World {
        /// One operation; `false` when the power is gone.
        fn tick(&mut self) -> bool {
            let on = self.operations_left > 0;
            self.operations_left = self.operations_left.saturating_sub(1);
            on
        }

        fn power(&mut self) -> io::Result<()> {
            if self.tick() { Ok(()) } else { Err(io::Error::other("no power")) }
        }

        fn write(&mut self, unit: UnitIndex) {
            if self.tick() {
                self.unsynced_units.insert(unit);
                self.written.insert(unit);
            }
        }

        fn publish(&mut self) {
            let ledger = self.ledger.clone().unwrap();
            for unit in std::mem::take(&mut self.written) {
                if self.tick() {
                    ledger.publish(unit);
                }
            }
        }

        /// What other threads do while a flush is in the middle of something.
        fn meanwhile(&mut self) {
            while self.coins.pop_front() == Some(true) {
                match self.script.front().copied() {
                    Some(Step::Write(unit)) => self.write(unit),
                    Some(Step::Publish) => self.publish(),
                    _ => return,
                }
                self.script.pop_front();
            }
        }
    }

    struct DataFile(Shared);

    impl Sink for DataFile {
        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            unreachable!("the script writes")
        }

        fn sync(&self) -> io::Result<()> {
            let mut world = self.0.lock().unwrap();
            world.meanwhile();
            world.power()?;
            if std::mem::take(&mut world.fail_data) {
                // The landing lock lets nobody write before such a sync and publish after it.
                world.publish();
                world.unsynced_units.clear();
                return Err(io::Error::other("medium error"));
            }
            let synced = std::mem::take(&mut world.unsynced_units);
            world.synced_units.extend(synced);
            world.meanwhile();
            Ok(())
        }
    }

    struct BitsFile(Shared);

    impl Sink for BitsFile {
        fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
            let mut world = self.0.lock().unwrap();
            world.meanwhile();
            world.power()?;
            world.unsynced_bits.push((usize::try_from(at).unwrap(), bytes.to_vec()));
            Ok(())
        }

        fn sync(&self) -> io::Result<()> {
            let mut world = self.0.lock().unwrap();
            world.meanwhile();
            world.power()?;
            if std::mem::take(&mut world.fail_bits) {
                return Err(io::Error::other("medium error"));
            }
            for (at, bytes) in std::mem::take(&mut world.unsynced_bits) {
                apply(&mut world.bits, at, &bytes);
            }
            Ok(())
        }
    }

    fn world(script: Vec<Step>, coins: Vec<bool>, operations: usize) -> (Shared, Arc<Ledger>) {
        let world = Arc::new(Mutex::new(World {
            script: script.into(),
            coins: coins.into(),
            operations_left: operations,
            ledger: None,
            written: BTreeSet::new(),
            unsynced_units: BTreeSet::new(),
            synced_units: BTreeSet::new(),
            bits: bits::empty(&identity()),
            unsynced_bits: Vec::new(),
            fail_data: false,
            fail_bits: false,
        }));
        let copy =
            DurableCopy { file: Box::new(BitsFile(world.clone())), identity: identity(), names: None, rest: None };
        let words = vec![0; super::super::presence::words_for(UNITS)];
        let ledger =
            Arc::new(Ledger::new(Box::new(DataFile(world.clone())), Found { words, is_disturbed: false }, Some(copy)));
        ledger.attach();
        world.lock().unwrap().ledger = Some(ledger.clone());
        (world, ledger)
    }

    fn play(world: &Shared, ledger: &Ledger) {
        loop {
            let mut now = world.lock().unwrap();
            let Some(step) = now.script.pop_front() else { break };
            match step {
                Step::Write(unit) => now.write(unit),
                Step::Publish => now.publish(),
                Step::FailData => now.fail_data = true,
                Step::FailBits => now.fail_bits = true,
                Step::Flush => {
                    drop(now);
                    // A failure is part of the script, and what it leaves behind is the test.
                    let _ = ledger.flush();
                }
            }
        }
        world.lock().unwrap().ledger = None;
    }

    /// The bits after a power cut: some unsynced pages made it, some half, some not.
    fn after_crash(world: &World, fates: &[u8]) -> Vec<u64> {
        let mut bits = world.bits.clone();
        for ((at, bytes), fate) in world.unsynced_bits.iter().zip(fates.iter().cycle()) {
            match fate % 3 {
                0 => {}
                1 => apply(&mut bits, *at, &bytes[..bytes.len() / 2]),
                _ => apply(&mut bits, *at, bytes),
            }
        }
        bits::read(&bits, &identity())
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (0..UNITS / 500).prop_map(|unit| Step::Write(unit * 500 + unit)),
            4 => Just(Step::Publish),
            3 => Just(Step::Flush),
            1 => Just(Step::FailData),
            1 => Just(Step::FailBits),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_bit_that_survives_a_crash_implies_synced_bytes(
            script in proptest::collection::vec(step(), 1..60),
            coins in proptest::collection::vec(any::<bool>(), 0..60),
            operations in 0usize..120,
            fates in proptest::collection::vec(any::<u8>(), 1..8),
        ) {
            let (world, ledger) = world(script, coins, operations);
            play(&world, &ledger);
            let world = world.lock().unwrap();
            let words = after_crash(&world, &fates);
            for unit in (0..UNITS).filter(|&unit| bit(&words, unit)) {
                prop_assert!(world.synced_units.contains(&unit), "unit {} is called present", unit);
            }
        }

        #[test]
        fn without_a_crash_everything_published_becomes_durable(
            script in proptest::collection::vec(step(), 1..60),
            coins in proptest::collection::vec(any::<bool>(), 0..60),
        ) {
            let script = script.into_iter().filter(|step| !matches!(step, Step::FailData | Step::FailBits));
            let writes: Vec<Step> = script.chain([Step::Publish, Step::Flush, Step::Flush]).collect();
            let wanted: BTreeSet<_> = writes.iter().filter_map(|s| if let Step::Write(u) = s { Some(*u) } else { None }).collect();
            let (world, ledger) = world(writes, coins, usize::MAX);
            play(&world, &ledger);
            let words = after_crash(&world.lock().unwrap(), &[0]);
            let durable: BTreeSet<_> = (0..UNITS).filter(|&unit| bit(&words, unit)).collect();
            prop_assert_eq!(durable, wanted);
        }
    }

    #[test]
    fn nothing_is_written_after_the_last_owner_left() {
        let (world, ledger) = world(vec![], vec![], usize::MAX);
        ledger.detach();
        ledger.publish(1);

        ledger.flush().unwrap();

        let mut world = world.lock().unwrap();
        assert_eq!((world.bits.len(), world.unsynced_bits.len()), (512, 0));
        world.ledger = None;
    }

    #[test]
    fn what_came_in_place_of_a_spoilt_unit_is_durable_when_it_was_synced_and_not_before() {
        let (world, _) = world(vec![], vec![], usize::MAX);
        let copy =
            DurableCopy { file: Box::new(BitsFile(world.clone())), identity: identity(), names: None, rest: None };
        let mut words = vec![0; super::super::presence::words_for(UNITS)];
        let nothing = words.clone();
        (words[0], words[1]) = (1 << 2 | 1 << 3, 1);
        bits::write_changed(&BitsFile(world.clone()), &identity(), &nothing, &words).unwrap();
        // Nothing can be read of it, which is as good as wrong bytes.
        let ledger = Ledger::new(Box::new(DataFile(world.clone())), Found { words, is_disturbed: true }, Some(copy));
        ledger.attach();
        let unit = |index: UnitIndex| Unit::plain(u64::from(index) * 4096, &[1; 4096]).unwrap();
        assert!(ledger.is_claimed(2) && !ledger.is_claimed(4) && ledger.presence.count() == 0);
        assert!(!ledger.reclaim(2, &unit(2), &mut [0; 4096]) && !ledger.is_claimed(2));
        ledger.publish(2);

        world.lock().unwrap().fail_data = true;
        assert!(matches!(ledger.flush(), Err(FlushError::Data(_))));
        assert!(!ledger.presence.get(2), "it was claimed, and that was wrong");
        ledger.publish(2);
        ledger.flush().unwrap();
        let bits = after_crash(&world.lock().unwrap(), &[0]);
        assert!(bit(&bits, 2) && bit(&bits, 3) && bit(&bits, 64), "claims stay until somebody looks");
        world.lock().unwrap().fail_data = true;
        ledger.publish(5);
        ledger.flush().unwrap_err();
        assert!(ledger.presence.get(2) && !ledger.presence.get(5));
        assert!(!ledger.reclaim(3, &unit(3), &mut [0; 4096]));
        ledger.flush().unwrap();
        assert!(!bit(&after_crash(&world.lock().unwrap(), &[0]), 3));
    }

    #[test]
    fn a_failed_sync_withdraws_what_is_not_durable_and_nothing_else() {
        let (world, ledger) = world(vec![], vec![], usize::MAX);
        let publish = |unit| {
            let mut world = world.lock().unwrap();
            world.write(unit);
            world.publish();
        };
        publish(1);
        ledger.flush().unwrap();
        publish(2);
        world.lock().unwrap().fail_data = true;

        assert!(matches!(ledger.flush(), Err(FlushError::Data(_))));

        assert!(ledger.presence.get(1) && !ledger.presence.get(2));
        publish(2);
        ledger.flush().unwrap();
        assert!(bit(&after_crash(&world.lock().unwrap(), &[0]), 2));
        world.lock().unwrap().ledger = None;
    }
}
