//! What a program said, for a while.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// Keys that are remembered. When there are more, all go.
const MOST: usize = 1024;

/// Values by key, each with its end. Whoever asks for a key that somebody is finding out waits for that;
/// other keys do not.
pub(super) struct Remembered<K, V>(Mutex<HashMap<K, Slot<V>>>);

type Slot<V> = Arc<Mutex<Option<(V, Instant)>>>;

impl<K: Eq + Hash, V: Clone> Remembered<K, V> {
    /// What is known of `key` at `now`, or what `find` says, until when it says so; `None` for not at all.
    pub(super) fn get<E>(
        &self,
        key: K,
        now: Instant,
        find: impl FnOnce() -> Result<(V, Option<Instant>), E>,
    ) -> Result<V, E> {
        let slot = {
            let mut slots = self.0.lock().unwrap();
            if slots.len() >= MOST && !slots.contains_key(&key) {
                slots.clear();
            }
            slots.entry(key).or_default().clone()
        };
        let mut slot = slot.lock().unwrap();
        if let Some((value, ends)) = &*slot
            && now < *ends
        {
            return Ok(value.clone());
        }
        *slot = None;
        let (value, ends) = find()?;
        *slot = ends.map(|ends| (value.clone(), ends));
        Ok(value)
    }

    /// Forgets what is known where `is_bad` says so. Passes over what is being found out: that is new.
    pub(super) fn forget(&self, is_bad: impl Fn(&V) -> bool) {
        let slots: Vec<_> = self.0.lock().unwrap().values().cloned().collect();
        for slot in slots {
            if let Ok(mut slot) = slot.try_lock() {
                slot.take_if(|(value, _)| is_bad(value));
            }
        }
    }
}

impl<K, V> Default for Remembered<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K, V> fmt::Debug for Remembered<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Remembered(..)")
    }
}
