//! Every kind of fault that a registry, its storage, a mirror or a proxy can have, met by the first, a middle and the
//! last read of an image, by one reader and by 64 at once.
//!
//! Each cell says what becomes of the bytes or which error comes of it, how often was asked and how often again,
//! that the time it took is that of the policy, that 64 readers cost the server no byte more than one, that no secret
//! got to where it must not be, and that what failed works as soon as the fault is gone. No cell sleeps.

mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

#[path = "registry_faults/cell.rs"]
mod cell;
#[path = "registry_faults/crowd.rs"]
mod crowd;
#[path = "registry_faults/image.rs"]
mod image;
#[path = "registry_faults/row.rs"]
mod row;
#[path = "registry_faults/table.rs"]
mod table;

use image::UNITS;
use row::Row;
use support::secrets;

/// The read of the image that suffers.
const POSITIONS: [(&str, usize); 3] = [("first", 0), ("middle", UNITS / 2), ("last", UNITS - 1)];

const READERS: [usize; 2] = [1, 64];

/// Cells that run at once. They mostly wait for nothing to happen.
const AT_ONCE: usize = 4;

/// Runs all cells of some rows, each on a runtime of its own, and tells of all that fail.
fn run(rows: &[Row]) {
    let _watch = secrets::watch();
    let only = std::env::var("CELL").ok();
    let mut cells = Vec::new();
    for row in rows.iter().filter(|row| only.as_ref().is_none_or(|only| row.name.contains(only.as_str()))) {
        for (position, unit) in POSITIONS {
            cells.extend(READERS.map(|readers| (row, position, unit, readers)));
        }
    }
    let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((row, position, unit, readers)) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    if let Err(error) = runtime.block_on(Box::pin(cell::run(row, *unit, *readers))) {
                        let cell = format!("{}, {position} read, {readers} readers: {error}", row.name);
                        wrong.lock().unwrap().push(cell);
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {} cells:\n{}", wrong.len(), cells.len(), wrong.join("\n"));
}

#[test]
fn what_passes_by_itself_costs_a_pause() {
    run(&table::passing());
}

#[test]
fn what_does_not_pass_is_told_at_once_and_is_over_when_it_is_mended() {
    run(&table::lasting());
}

#[test]
fn redirects_are_followed_remembered_and_asked_for_again() {
    run(&table::redirected());
}

#[test]
fn a_bad_mirror_is_nobodys_problem() {
    run(&table::mirrored());
}

#[test]
fn a_proxy_is_the_only_way_or_one_of_two() {
    run(&table::proxied());
}

#[test]
fn logins_and_tokens_end_fail_and_are_renewed() {
    run(&table::guarded());
}

#[test]
fn each_kind_has_a_name_of_its_own_and_there_are_many() {
    let all = [
        table::passing(),
        table::lasting(),
        table::redirected(),
        table::mirrored(),
        table::proxied(),
        table::guarded(),
    ];
    let names: Vec<_> = all.iter().flatten().map(|row| row.name).collect();
    let distinct: std::collections::BTreeSet<_> = names.iter().collect();
    println!("{} kinds, {} cells", names.len(), names.len() * POSITIONS.len() * READERS.len());
    assert_eq!(distinct.len(), names.len());
    assert!(names.len() >= 150);
}
