//! Units that are said to be in a file which others have changed since.
//!
//! Nobody believes them, and they are not present; but on disk they stay said to be there until somebody has looked, so
//! that a crash in between loses nothing.

use std::collections::BTreeSet;

use super::presence::Presence;
use crate::base::sync::Mutex;
use crate::blob::UnitIndex;

pub(super) struct Claims {
    open: Presence,
    /// Those that were not what they should be, until what came in their place is durable.
    spoilt: Mutex<BTreeSet<UnitIndex>>,
}

/// What was claimed at one moment.
pub(super) struct View {
    words: Vec<u64>,
    spoilt: BTreeSet<UnitIndex>,
}

impl Claims {
    /// `words` are the units that are claimed; it may be empty if none is.
    pub(super) fn new(words: &[u64]) -> Self {
        Self { open: Presence::new(words), spoilt: Mutex::default() }
    }

    /// Whether nobody has looked yet at some of them.
    pub(super) fn any(&self) -> bool {
        self.open.count() > 0
    }

    pub(super) fn has(&self, unit: UnitIndex) -> bool {
        self.any() && self.open.get(unit)
    }

    /// Somebody has looked at `unit`. One that is sound must be present by now.
    pub(super) fn settle(&self, unit: UnitIndex, is_sound: bool) {
        self.open.withdraw_one(unit);
        if !is_sound {
            // Not before the claim has gone: a view that knows of it must not hold the claim.
            self.spoilt.lock().unwrap().insert(unit);
        }
    }

    pub(super) fn view(&self) -> View {
        // In this order: what is spoilt in it is not claimed.
        let spoilt = self.spoilt();
        View { words: if self.any() { self.open.snapshot() } else { Vec::new() }, spoilt }
    }

    /// Those that were not what they should be, of which nothing durable has taken the place.
    pub(super) fn spoilt(&self) -> BTreeSet<UnitIndex> {
        self.spoilt.lock().unwrap().clone()
    }

    /// What was spoilt in `view` has been replaced on disk, or is absent there.
    pub(super) fn forget_spoilt(&self, view: &View) {
        self.spoilt.lock().unwrap().retain(|unit| !view.spoilt.contains(unit));
    }
}

impl View {
    /// Adds what is claimed to `words`.
    pub(super) fn add_to(&self, words: &mut [u64]) {
        words.iter_mut().zip(&self.words).for_each(|(word, claimed)| *word |= claimed);
    }
}
