//! Running a ranged read: units are decoded as their bytes arrive.
//!
//! Whoever waits for the first unit of a long read is answered when that has come, and what came before a
//! failure is used. A read of bulk prefetch also gives way: when a reader needs something that it will not bring within
//! a moment, the transfer is broken off and the rest goes back to the head of the queue, to be asked for again
//! when readers are quiet; what a reader waits for leaves the rest and is fetched for it alone. So a
//! read of prefetch may be long without holding anybody up.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::core::Core;
use super::fetch::{Slot, fail};
use super::intake::{Intake, Joined};
use super::window::Window;
use crate::base::Fault;
use crate::source::{BlobSource, ReadCtx, SourceError};

/// How a stream ended.
enum End {
    Whole,
    /// Readers need the link.
    GaveWay,
    /// Nobody wants it but readers who have joined.
    Abandoned,
    /// The device is gone.
    Cancelled,
    Failed(SourceError),
}

/// Runs one read and hands each unit to the pool when it has come. Dropping the task cancels the
/// waiters.
pub(super) async fn run(mut window: Window, slot: Slot) {
    window.start(Instant::now(), &slot.fetcher.telemetry);
    let (core, slot) = (Arc::clone(&window.core), Arc::new(slot));
    let jobs = Arc::clone(&slot.fetcher.jobs);
    let intake = Mutex::new(Intake::new(window, Arc::clone(&jobs), Arc::clone(&slot)));
    let end = pour(&core, &intake, &slot).await;
    let intake = intake.into_inner().expect("nothing panics while it is held");
    if matches!(end, End::Failed(_)) && !intake.is_whole() {
        intake.observe();
    }
    let Some(rest) = intake.rest() else { return slot.fetched() };
    match end {
        End::GaveWay => slot.fetcher.give_back(rest, false),
        End::Abandoned => slot.fetcher.give_back(rest, true),
        End::Failed(SourceError::OutOfRange { .. }) if rest.is_divisible() => core.split(rest),
        End::Failed(error) => fail(&jobs, rest, error),
        // What has come whole leaves no rest.
        End::Cancelled | End::Whole => drop(rest),
    }
    slot.fetched();
}

/// Pours the window's bytes into `intake`, from one source after the other, each going on where the
/// one before broke off. The failure is the one that leaves most hope.
async fn pour(core: &Arc<Core>, intake: &Mutex<Intake>, slot: &Slot) -> End {
    let mut sources = core.sources.all();
    let (mut deadline, is_divisible) = {
        let (intake, options) = (intake.lock().unwrap(), &slot.fetcher.options);
        // Where its bytes were damaged, another one's may not be.
        let turn = intake.wrong() % sources.len().max(1);
        sources.rotate_left(turn);
        let deadline = match intake.asked {
            Some(asked) => asked + options.deadline,
            None => Instant::now() + options.prefetch_deadline,
        };
        (deadline, intake.is_divisible)
    };
    let mut failure: Option<SourceError> = None;
    for (left, source) in (0..sources.len()).rev().zip(sources) {
        let error = match pour_from(&source, left == 0, core, intake, slot, &mut deadline).await {
            End::Failed(error) => error,
            end => return end,
        };
        match error.fault() {
            Fault::Cancelled => return End::Failed(error),
            // A range outside the blob says more about the image than about the source.
            Fault::Permanent if !matches!(error, SourceError::OutOfRange { .. }) => core.sources.demote(&source),
            Fault::Permanent | Fault::Transient | Fault::Corrupt => {}
        }
        if failure.as_ref().is_none_or(|known| hope(&error, is_divisible) > hope(known, is_divisible)) {
            failure = Some(error);
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    failure.map_or(End::Cancelled, End::Failed)
}

/// What can still be done after a failure: ask for the units one by one, or try again later.
fn hope(error: &SourceError, is_divisible: bool) -> u8 {
    match error {
        SourceError::OutOfRange { .. } if is_divisible => 2,
        error if error.fault() == Fault::Transient => 1,
        _ => 0,
    }
}

/// Asks one source for what is missing, for at most half of the time left unless it is the `last`.
async fn pour_from(
    source: &Arc<dyn BlobSource>,
    last: bool,
    core: &Arc<Core>,
    intake: &Mutex<Intake>,
    slot: &Slot,
    deadline: &mut Instant,
) -> End {
    let share = |deadline: Instant| {
        let now = Instant::now();
        if last { deadline } else { now + deadline.saturating_duration_since(now) / 2 }
    };
    let mut until = share(*deadline);
    let (missing, ctx) = {
        let intake = intake.lock().unwrap();
        (intake.missing(), ReadCtx { class: slot.class, deadline: until, request: intake.request })
    };
    core.counters.request();
    let mut take = |piece| intake.lock().unwrap().take(piece);
    let mut stream = source.stream(core.blob(), missing, ctx, &mut take);
    loop {
        tokio::select! {
            outcome = &mut stream => {
                return match outcome {
                    Err(error) => End::Failed(error),
                    Ok(()) => intake.lock().unwrap().verdict(source.describe()).map_or_else(End::Failed, |()| End::Whole),
                };
            }
            () = tokio::time::sleep_until(until.into()) => {
                return End::Failed(core.deadline_error(missing, source.describe()));
            }
            () = slot.signal.told.notified() => {
                if slot.signal.cancelled.load(Ordering::Acquire) {
                    return End::Cancelled;
                }
                if slot.signal.abandoned.load(Ordering::Acquire) {
                    return End::Abandoned;
                }
                if slot.signal.give_way.load(Ordering::Acquire) {
                    return End::GaveWay;
                }
                match intake.lock().unwrap().joined() {
                    Joined::Nobody => {}
                    Joined::TooFarAhead => return End::GaveWay,
                    Joined::Since(asked) => {
                        // From now on the patience of the reader counts.
                        *deadline = (*deadline).min(asked + slot.fetcher.options.deadline);
                        until = until.min(share(*deadline));
                    }
                }
            }
        }
    }
}
