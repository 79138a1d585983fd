use std::collections::VecDeque;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::device::Core;
use super::{FillError, is_needed};
use crate::base::{Class, Fault};
use crate::blob::UnitIndex;

/// Fetching of everything that is missing of one device, when nobody else wants the line.
///
/// Everything it fetches is prefetch, a few windows at a time, so readers overtake it in every
/// queue and memory stays bounded.
#[derive(Debug, Default)]
pub(super) struct Background(Mutex<Option<JoinHandle<()>>>);

/// Batches on their way at once: one arriving, one queued behind it.
const BATCHES: usize = 2;

/// Most units of one batch. Each costs memory beside its stored bytes, and a hostile image could
/// claim millions of one byte each.
const BATCH_UNITS: UnitIndex = 4096;

/// Pauses between attempts while the source cannot be reached.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Background {
    pub(super) fn start(&self, core: &Arc<Core>) {
        let mut task = self.0.lock().unwrap();
        if task.as_ref().is_none_or(JoinHandle::is_finished) {
            *task = Some(core.engine.runtime.spawn(complete(Arc::downgrade(core))));
        }
    }

    pub(super) fn stop(&self) {
        if let Some(task) = self.0.lock().unwrap().take() {
            task.abort();
        }
    }
}

/// Passes over the device until a pass meets no transient fault.
async fn complete(core: Weak<Core>) {
    let mut pause = FIRST_PAUSE;
    while pass(&core).await == Pass::Interrupted {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// Everything was tried, or the rest will not come either.
    Done,
    /// The source went away; another pass may get further.
    Interrupted,
}

type Outcome = oneshot::Receiver<Result<(), FillError>>;

/// Asks for every absent unit once, in order.
async fn pass(core: &Weak<Core>) -> Pass {
    let mut cursor = 0;
    let mut batches: VecDeque<Outcome> = VecDeque::new();
    loop {
        while batches.len() < BATCHES
            && let Some(batch) = core.upgrade().and_then(|core| next_batch(&core, &mut cursor))
        {
            batches.push_back(batch);
        }
        let Some(batch) = batches.pop_front() else { return Pass::Done };
        match batch.await.unwrap_or(Err(FillError::Cancelled)) {
            Ok(()) => {}
            // There is room again when somebody makes room, not when we wait.
            Err(FillError::NoSpace { .. }) => return Pass::Done,
            Err(error) => match error.fault() {
                // One bad unit does not spoil the others.
                Fault::Corrupt => {}
                Fault::Transient => return Pass::Interrupted,
                Fault::Permanent | Fault::Cancelled => return Pass::Done,
            },
        }
    }
}

/// Asks for the next run of absent units, as much as fills the prefetch slots once.
fn next_batch(core: &Arc<Core>, cursor: &mut UnitIndex) -> Option<Outcome> {
    let map = core.map();
    let options = &core.engine.options;
    let most = options.prefetch_window.saturating_mul(options.fetches(Class::Prefetch) as u64);
    let wanted =
        |index: UnitIndex| map.get(index).is_some_and(|unit| is_needed(unit) && !core.ledger.presence.get(index));
    let first = (*cursor..map.count()).find(|&index| wanted(index))?;
    let mut stored = 0;
    let mut end = first;
    while wanted(end) && stored < most && end - first < BATCH_UNITS {
        let unit = &map.units()[end as usize];
        let comes_along = end > first && unit.shares_with(&map.units()[end as usize - 1]);
        stored += if comes_along { 0 } else { unit.stored.len() };
        end += 1;
    }
    *cursor = end;
    let (tx, rx) = oneshot::channel();
    // Nobody listens any more when the task was stopped.
    core.fill(first..end, Class::Prefetch, Box::new(move |outcome| drop(tx.send(outcome))));
    Some(rx)
}
