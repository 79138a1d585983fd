//! Sources by the name they have in messages.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::{Counter, Family, Outcome};
use crate::base::Class;

/// Most sources that are told apart. One node may see thousands of image repositories, and whoever
/// collects metrics pays for each name; what comes later is counted together.
const MOST: usize = 256;

/// What later sources are counted as.
const OTHER: &str = "other";

/// What one source was asked, and how it went.
#[derive(Debug, Default)]
pub struct Place {
    /// Reads, by class and by how they ended.
    pub reads: Family<Class, Family<Outcome, Counter>>,
    /// Stored bytes that came.
    pub bytes: Family<Class, Counter>,
    /// Attempts after the first.
    pub retries: Counter,
    /// Second requests beside a first that was slow.
    pub hedges: Counter,
    /// Ranges of which it alone had brought wrong bytes, when another place had brought right ones.
    pub wrong: Counter,
    failing: AtomicBool,
    last_failure: Mutex<Option<Failure>>,
}

/// Something that went wrong, as it is told to people.
#[derive(Clone, Debug)]
pub struct Failure {
    /// When.
    pub at: Instant,
    /// What, with its causes and without secrets.
    pub text: String,
}

impl Place {
    /// Whether the last read that ended by itself failed.
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// The failure that was met last, however long ago.
    pub fn last_failure(&self) -> Option<Failure> {
        self.last_failure.lock().unwrap().clone()
    }

    /// Notes that a read went well.
    pub fn worked(&self) {
        self.failing.store(false, Ordering::Relaxed);
    }

    /// Notes that a read failed.
    pub fn failed(&self, text: String) {
        *self.last_failure.lock().unwrap() = Some(Failure { at: Instant::now(), text });
        self.failing.store(true, Ordering::Relaxed);
    }
}

/// All sources that were ever opened. Never forgets one: its counters must not go back.
#[derive(Debug, Default)]
pub(super) struct Places(Mutex<BTreeMap<String, Arc<Place>>>);

impl Places {
    pub(super) fn enter(&self, name: &str) -> Arc<Place> {
        let mut places = self.0.lock().unwrap();
        let name = if places.len() >= MOST && !places.contains_key(name) { OTHER } else { name };
        places.entry(name.to_owned()).or_default().clone()
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<Place>> {
        self.0.lock().unwrap().get(name).cloned()
    }

    pub(super) fn all(&self) -> Vec<(String, Arc<Place>)> {
        self.0.lock().unwrap().iter().map(|(name, place)| (name.clone(), place.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_place_and_the_number_of_places_is_bounded() {
        let places = Places::default();
        for number in 0..MOST * 2 {
            places.enter(&format!("http://h/{number}")).retries.inc();
        }

        assert!(Arc::ptr_eq(&places.enter("http://h/0"), &places.enter("http://h/0")));
        let all = places.all();
        assert_eq!(all.len(), MOST + 1);
        let other = &all.iter().find(|(name, _)| name == OTHER).unwrap().1;
        assert_eq!(other.retries.get(), MOST as u64);
        assert_eq!(all.iter().map(|(_, place)| place.retries.get()).sum::<u64>(), 2 * MOST as u64);
    }

    #[test]
    fn a_failure_is_remembered_after_the_source_works_again() {
        let place = Place::default();
        place.failed("gone".to_owned());
        assert!(place.is_failing());
        place.worked();
        assert!(!place.is_failing());
        assert_eq!(place.last_failure().unwrap().text, "gone");
    }
}
