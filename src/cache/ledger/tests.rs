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
    let copy = DurableCopy { file: Box::new(BitsFile(world.clone())), identity: identity(), names: None, rest: None };
    let words = vec![0; crate::cache::presence::words_for(UNITS)];
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
    let copy = DurableCopy { file: Box::new(BitsFile(world.clone())), identity: identity(), names: None, rest: None };
    let mut words = vec![0; crate::cache::presence::words_for(UNITS)];
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
