//! Which of several places brought which bytes lately, and whose were wrong.
//!
//! Only who decodes knows whether bytes are right, and does so after they were handed on. So it is remembered for a while
//! who brought them: a place that brought wrong ones is not asked for them again where another can be. That they were its
//! fault is known when another one has brought right ones; an image may be wrong itself.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::base::{BlobId, ByteRange};

/// Pieces, and wrong ranges, that are remembered. More than run at once.
const MOST: usize = 512;

/// Pieces that are still growing are among so many latest ones.
const GROWING: usize = 32;

/// Remembers by the numbers of places.
#[derive(Debug, Default)]
pub(super) struct Trail(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// In the order in which they came.
    brought: VecDeque<Piece>,
    wrong: VecDeque<Wrong>,
}

#[derive(Debug)]
struct Piece {
    blob: BlobId,
    range: ByteRange,
    place: usize,
}

/// A range that was wrong, at least once.
#[derive(Debug)]
struct Wrong {
    blob: BlobId,
    range: ByteRange,
    /// Who brought any of it.
    places: Vec<usize>,
    /// Who brought all of it.
    alone: Vec<usize>,
}

impl Trail {
    /// `place` brought this.
    pub(super) fn brought(&self, place: usize, blob: &BlobId, range: ByteRange) {
        let mut state = self.0.lock().unwrap();
        let goes_on =
            |piece: &&mut Piece| piece.place == place && piece.range.end() == range.start() && piece.blob == *blob;
        if let Some(piece) = state.brought.iter_mut().rev().take(GROWING).find(goes_on) {
            piece.range = piece.range.hull(range);
            return;
        }
        push(&mut state.brought, Piece { blob: blob.clone(), range, place });
    }

    /// The bytes that came last of `range` were wrong.
    pub(super) fn was_wrong(&self, blob: &BlobId, range: ByteRange) {
        let mut state = self.0.lock().unwrap();
        let places = state.bringers(blob, range);
        if places.is_empty() {
            return;
        }
        let alone: Vec<_> = if places.len() == 1 { places.clone() } else { Vec::new() };
        match state.wrong.iter_mut().find(|wrong| wrong.range == range && wrong.blob == *blob) {
            Some(known) => {
                add(&mut known.places, places);
                add(&mut known.alone, alone);
            }
            None => push(&mut state.wrong, Wrong { blob: blob.clone(), range, places, alone }),
        }
    }

    /// The bytes that came last of `range`, which was wrong before, are right: gives whose fault that was.
    pub(super) fn was_right(&self, blob: &BlobId, range: ByteRange) -> Vec<usize> {
        let mut state = self.0.lock().unwrap();
        let right = state.bringers(blob, range);
        let Some(at) = state.wrong.iter().position(|wrong| wrong.range == range && wrong.blob == *blob) else {
            return Vec::new();
        };
        let mut liars = state.wrong.remove(at).map(|wrong| wrong.alone).unwrap_or_default();
        liars.retain(|place| !right.contains(place));
        liars
    }

    /// Who brought wrong bytes of anything in `range`.
    pub(super) fn distrusted(&self, blob: &BlobId, range: ByteRange) -> Vec<usize> {
        let state = self.0.lock().unwrap();
        let mut places = Vec::new();
        for wrong in state.wrong.iter().filter(|wrong| wrong.range.overlaps(range) && wrong.blob == *blob) {
            add(&mut places, wrong.places.clone());
        }
        places
    }
}

impl State {
    /// Who brought `range` the last time.
    fn bringers(&self, blob: &BlobId, range: ByteRange) -> Vec<usize> {
        let (mut places, mut left) = (Vec::new(), range.len());
        for piece in self.brought.iter().rev().filter(|piece| piece.blob == *blob) {
            let start = piece.range.start().max(range.start());
            let common = piece.range.end().min(range.end()).saturating_sub(start);
            if common > 0 && left > 0 {
                add(&mut places, vec![piece.place]);
                left = left.saturating_sub(common);
            }
        }
        places
    }
}

fn add(places: &mut Vec<usize>, more: Vec<usize>) {
    let new: Vec<_> = more.into_iter().filter(|place| !places.contains(place)).collect();
    places.extend(new);
}

/// The oldest goes.
fn push<T>(queue: &mut VecDeque<T>, one: T) {
    if queue.len() >= MOST {
        queue.pop_front();
    }
    queue.push_back(one);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    fn blob() -> BlobId {
        "ab".parse().unwrap()
    }

    #[test]
    fn who_brought_wrong_bytes_is_distrusted_for_them_and_blamed_when_others_were_right() {
        let trail = Trail::default();
        trail.brought(0, &blob(), range(0, 60));
        trail.brought(0, &blob(), range(60, 100));
        trail.was_wrong(&blob(), range(20, 80));
        assert_eq!(trail.distrusted(&blob(), range(79, 81)), [0]);
        assert!(trail.distrusted(&blob(), range(80, 100)).is_empty());
        assert!(trail.distrusted(&"cd".parse().unwrap(), range(20, 80)).is_empty());

        trail.brought(1, &blob(), range(20, 80));
        trail.was_wrong(&blob(), range(20, 80));
        assert_eq!(trail.distrusted(&blob(), range(0, 100)), [0, 1]);
        trail.brought(2, &blob(), range(20, 80));
        assert_eq!(trail.was_right(&blob(), range(20, 80)), [0, 1]);
        assert!(trail.distrusted(&blob(), range(0, 100)).is_empty());
        assert!(trail.was_right(&blob(), range(20, 80)).is_empty(), "told once");
    }

    #[test]
    fn of_two_who_brought_one_range_neither_is_blamed_nor_asked_again() {
        let trail = Trail::default();
        trail.brought(0, &blob(), range(0, 50));
        trail.brought(1, &blob(), range(50, 100));
        trail.was_wrong(&blob(), range(0, 100));
        assert_eq!(trail.distrusted(&blob(), range(0, 1)), [1, 0]);
        trail.brought(2, &blob(), range(0, 100));
        assert!(trail.was_right(&blob(), range(0, 100)).is_empty());
    }

    #[test]
    fn who_is_right_in_the_end_is_not_to_blame() {
        let trail = Trail::default();
        for _ in 0..2 {
            trail.brought(0, &blob(), range(0, 100));
            trail.was_wrong(&blob(), range(0, 100));
        }
        trail.brought(0, &blob(), range(0, 100));
        assert!(trail.was_right(&blob(), range(0, 100)).is_empty());
    }

    #[test]
    fn only_the_latest_are_remembered() {
        let trail = Trail::default();
        for at in 0..3 * MOST as u64 {
            trail.brought(0, &blob(), range(2 * at, 2 * at + 1));
            trail.was_wrong(&blob(), range(2 * at, 2 * at + 1));
        }
        let state = trail.0.lock().unwrap();
        assert_eq!((state.brought.len(), state.wrong.len()), (MOST, MOST));
    }
}
