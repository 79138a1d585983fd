//! Which blobs go when room is wanted: the whole decision, and no I/O.
//!
//! Whole blobs only, the least recently used first. Whatever is held, because a mounted image uses
//! it, somebody pinned it or its use is not known, is not even looked at.

use std::time::Duration;

/// One thing in the cache that takes room: a blob's directory, a copy of a bootstrap, or what the kernel keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lot {
    /// The name it has in its directory.
    pub(super) name: String,
    pub(super) kind: LotKind,
    /// Bytes that it really takes on disk.
    pub(super) bytes: u64,
    /// When it was last taken into use or let go, in seconds since 1970.
    pub(super) last_used: u64,
    /// Whether it must stay.
    pub(super) held: bool,
}

/// What kind of thing takes the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub enum LotKind {
    /// A blob's decoded bytes and what is known about them.
    Blob,
    /// A copy of a bootstrap.
    Bootstrap,
    /// An object in the kernel's own cache, a blob or a bootstrap.
    Kernel,
}

/// How much is to go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Bytes that should be gone; lots go one after the other until they are.
    pub excess: u64,
    /// Only what was used last longer ago than this.
    pub idle_for: Option<Duration>,
    /// Seconds since 1970, to tell how long ago that was.
    pub now: u64,
}

/// The lots to remove, in order: the fewest of the least recently used that bring what is wanted,
/// or all that may go if that is not enough.
pub(super) fn victims(lots: &[Lot], wanted: Wanted) -> Vec<&Lot> {
    // A time in the future is a clock that was put back, not a long absence.
    let idle = |lot: &Lot| wanted.now.saturating_sub(lot.last_used);
    let long_idle = |lot: &&Lot| wanted.idle_for.is_none_or(|most| idle(lot) > most.as_secs());
    let mut order: Vec<&Lot> = lots.iter().filter(|lot| !lot.held).filter(long_idle).collect();
    order.sort_by(|a, b| (a.last_used, a.kind, &a.name).cmp(&(b.last_used, b.kind, &b.name)));
    let mut freed = 0;
    order
        .into_iter()
        .take_while(|lot| {
            let more = freed < wanted.excess;
            freed += lot.bytes;
            more
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lot(name: &str, bytes: u64, last_used: u64, held: bool) -> Lot {
        Lot { name: name.to_owned(), kind: LotKind::Blob, bytes, last_used, held }
    }

    fn names(lots: &[Lot], wanted: Wanted) -> String {
        victims(lots, wanted).into_iter().map(|lot| lot.name.as_str()).collect()
    }

    #[test]
    fn the_least_recently_used_go_until_it_is_enough() {
        let lots = [lot("a", 10, 30, false), lot("b", 10, 10, false), lot("c", 10, 20, true), lot("d", 10, 25, false)];
        for (excess, gone) in [(0, ""), (1, "b"), (10, "b"), (11, "bd"), (21, "bda"), (u64::MAX, "bda")] {
            assert_eq!(names(&lots, Wanted { excess, ..Wanted::default() }), gone, "{excess} bytes");
        }
    }

    #[test]
    fn what_was_used_lately_stays_when_only_the_idle_may_go() {
        let lots = [lot("a", 1, 100, false), lot("b", 1, 50, false), lot("c", 1, 900, false)];
        for (idle, gone) in [(0, "ba"), (49, "ba"), (50, "b"), (99, "b"), (100, "")] {
            let wanted = Wanted { excess: u64::MAX, idle_for: Some(Duration::from_secs(idle)), now: 150 };
            assert_eq!(names(&lots, wanted), gone, "idle for more than {idle} s");
        }
    }

    proptest! {
        #[test]
        fn nothing_held_goes_nothing_goes_early_and_nothing_goes_needlessly(
            raw in proptest::collection::vec((0u64..100, 0u64..20, any::<bool>()), 0..40),
            excess in 0u64..3000,
        ) {
            let make = |(number, &(bytes, used, held)): (usize, &(u64, u64, bool))| lot(&format!("{number:02}"), bytes, used, held);
            let lots: Vec<Lot> = raw.iter().enumerate().map(make).collect();
            let gone = victims(&lots, Wanted { excess, ..Wanted::default() });

            prop_assert!(gone.iter().all(|lot| !lot.held));
            // Everything that stays and might have gone was used later than everything that goes.
            let newest = gone.iter().map(|lot| lot.last_used).max();
            let stays = |lot: &&Lot| !lot.held && !gone.iter().any(|other| other.name == lot.name);
            prop_assert!(lots.iter().filter(stays).all(|lot| newest.is_none_or(|newest| lot.last_used >= newest)));
            // Without the last one it would not have been enough.
            let freed: u64 = gone.iter().map(|lot| lot.bytes).sum();
            prop_assert!(gone.last().is_none_or(|last| freed - last.bytes < excess));
            // And if it was not enough, nothing is left to go.
            let left = lots.iter().filter(stays).count();
            prop_assert!(freed >= excess || left == 0, "{} of {} bytes, {} left", freed, excess, left);
        }
    }
}
