//! The power is cut at every operation, and everything that may be left is looked at.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rafsd::cache::{Fill, Store, fill_blocking};

use super::images::{Image, options, runtime};
use super::media::{Luck, Media};
use super::model::{Model, Op};
use super::rng::Rng;
use super::script::{Promise, Script};
use super::setting;

/// Steps of a script between two power cuts.
const STEPS: usize = 40;

/// Power cuts that one disk goes through, one after the other.
const GENERATIONS: usize = 3;

#[test]
fn no_power_cut_makes_a_wrong_byte_present_or_loses_what_was_durable() {
    cut_everywhere(true);
}

#[test]
fn nor_on_a_file_system_that_does_not_tell_new_files_from_old_ones() {
    cut_everywhere(false);
}

fn cut_everywhere(births: bool) {
    let (first, least) = (setting("RAFSD_SEED", 1), setting("RAFSD_POWER_CUTS", 8000));
    let root = tempfile::tempdir().expect("a directory for the lock");
    let (clock, mut tally, mut seed) = (Instant::now(), Tally::default(), first);
    while tally.cuts < least {
        if let Err(wrong) = one_history(seed, births, root.path(), &mut tally) {
            panic!("RAFSD_SEED={seed}, births {births}: {wrong}");
        }
        seed += 1;
    }
    println!("seeds {first}..{seed}, births {births}: {tally:?} in {:?}", clock.elapsed());
    assert!(tally.evicted > 0, "nothing was evicted: {tally:?}");
    assert!(tally.present > tally.cuts / 2, "hardly anything was present to be judged: {tally:?}");
}

#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    /// Units that were present after a cut.
    present: u64,
    /// Units that had to be present after a cut, and were.
    promised: u64,
    /// Blobs that went, or began to.
    evicted: u64,
}

/// A disk through several scripts, each ended by a power cut that leaves one of the disks looked at.
fn one_history(seed: u64, births: bool, root: &Path, tally: &mut Tally) -> Result<(), String> {
    let mut rng = Rng::new(seed);
    let mut disk = Model::new(births, root);
    for generation in 0..GENERATIONS {
        let mut media = Media::under(&disk);
        let mut script = Script::new(disk, root, Rng::new(rng.below(usize::MAX) as u64));
        script.run(STEPS).map_err(|wrong| format!("generation {generation}, power on: {wrong}"))?;
        let log = script.disk.log();
        // By a step, or by the store itself when a write was refused.
        let is_eviction = |op: &Op| matches!(op, Op::Rename { to, .. } if to.starts_with(".trash-"));
        let evictions: Vec<_> = (0..log.len()).filter(|&at| is_eviction(&log[at])).collect();
        tally.evicted += evictions.len() as u64;
        let goes_on = rng.below(log.len() + 1);
        let mut next = None;
        for at in 0..=log.len() {
            if at > 0 {
                media.follow(&log[at - 1]);
            }
            let luck = [None, None, Some(Luck::Nothing), Some(Luck::Mixed)][rng.below(4)];
            let mut chance = Rng::new(rng.below(usize::MAX) as u64);
            let left = || media.survivor(luck, &mut chance.clone());
            let promised = promises(&script, &evictions, at);
            look(&left(), root, &promised, &mut rng, tally).map_err(|wrong| {
                format!(
                    "generation {generation}, cut after operation {at} of {}, {luck:?}: {wrong}{}",
                    log.len(),
                    tail(&log[..at])
                )
            })?;
            if at == goes_on {
                chance = Rng::new(rng.below(usize::MAX) as u64);
                next = Some(media.survivor(None, &mut chance));
            }
        }
        disk = next.expect("one of the cuts");
    }
    Ok(())
}

/// What must be present after a cut at `at`; operations `evictions` of the log took a blob away.
fn promises<'s>(script: &'s Script<'_>, evictions: &[usize], at: usize) -> Vec<&'s Promise> {
    let meddled = script.meddled.iter().copied().filter(|&when| when <= at).max().unwrap_or(0);
    // Meddling takes several operations; the last of them is what is noted.
    let soon = script.meddled.iter().any(|&when| when > at && when <= at + 8);
    // What went was durable until it began to.
    let evicted = evictions.iter().copied().filter(|&when| when < at).max();
    let stays = |promise: &Promise| evicted.is_none_or(|when| promise.since > when && !promise.apart);
    let holds = |promise: &&Promise| promise.since <= at && promise.since >= meddled && stays(promise);
    script.promises.iter().filter(|promise| !soon && holds(promise)).collect()
}

/// Boots a machine with this disk, and believes nothing.
fn look(left: &Model, root: &Path, promised: &[&Promise], rng: &mut Rng, tally: &mut Tally) -> Result<(), String> {
    tally.cuts += 1;
    let store = Store::open_on(Arc::new(left.clone()), root, options(), runtime()).map_err(|e| e.to_string())?;
    let first = rng.below(3);
    let mut open = Vec::new();
    for which in (first..first + 3).map(|which| which % 3) {
        let image = &Image::all()[which];
        let device = store.device(image.map(), image.source()).map_err(|e| format!("mount of {}: {e}", image.name))?;
        image.judge(&device, left)?;
        let present = image.present(&device);
        tally.present += present.len() as u64;
        // Who comes first after a cut may take the common directory, if nobody's is left.
        for promise in promised.iter().filter(|promise| promise.image == which) {
            let lost: Vec<_> = promise.units.iter().filter(|unit| !present.contains(unit)).collect();
            if !lost.is_empty() {
                return Err(format!("image {} lost units {lost:?}, durable since {}", image.name, promise.since));
            }
            tally.promised += promise.units.len() as u64;
        }
        open.push((image, device));
    }
    if rng.below(8) == 0 {
        for (image, device) in &open {
            for unit in image.known.clone() {
                fill_blocking(&**device, image.range(unit))
                    .map_err(|e| format!("unit {unit} of {}: {e}", image.name))?;
            }
            image.judge(device, left)?;
            if !image.known.clone().all(|unit| device.present(image.range(unit))) {
                return Err(format!("image {} cannot be completed", image.name));
            }
        }
    }
    Ok(())
}

/// The last operations before a cut, for a failure's message; `RAFSD_OPERATIONS` of them.
fn tail(log: &[Op]) -> String {
    let most = usize::try_from(setting("RAFSD_OPERATIONS", 12)).expect("a small number");
    let last = log[log.len().saturating_sub(most)..].iter().map(|op| match op {
        Op::Write { node, at, bytes } => format!("\n  Write {{ node: {node}, at: {at}, len: {} }}", bytes.len()),
        other => format!("\n  {other:?}"),
    });
    last.collect()
}
