//! Maps that are known to be what their files say, so that they need not be read again.
//!
//! A map of a large blob has hundreds of thousands of units. Whoever mounts an image again brings
//! the very map that was settled before; then nothing has to be read, compared or written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::disk::FileFacts;
use crate::blob::UnitMap;

/// By directory: the file of the saved map, and the same map in memory while somebody has it.
#[derive(Debug, Default)]
pub(super) struct Settled(Mutex<HashMap<String, (FileFacts, Weak<UnitMap>)>>);

impl Settled {
    /// Whether `map` is what was saved in the directory `name`, whose file is now `file`.
    pub(super) fn holds(&self, name: &str, file: Option<FileFacts>, map: &Arc<UnitMap>) -> bool {
        let known = self.0.lock().unwrap();
        known.get(name).is_some_and(|(saved, settled)| {
            Some(*saved) == file && settled.upgrade().is_some_and(|settled| Arc::ptr_eq(&settled, map))
        })
    }

    /// Remembers that `file` in the directory `name` says what `map` does.
    pub(super) fn note(&self, name: &str, file: Option<FileFacts>, map: &Arc<UnitMap>) {
        let mut known = self.0.lock().unwrap();
        known.retain(|_, (_, settled)| settled.strong_count() > 0);
        match file {
            Some(file) => known.insert(name.to_owned(), (file, Arc::downgrade(map))),
            None => known.remove(name),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blob::Unit;

    #[test]
    fn only_the_very_map_over_the_very_file_is_known() {
        let file = |inode| Some(FileFacts { is_file: true, is_dir: false, len: 1, inode, born: 0, changed: 0 });
        let map = |byte| {
            let units = vec![Unit::plain(0, &[byte; 10]).unwrap()];
            Arc::new(UnitMap::new("blob".parse().unwrap(), 4096, units).unwrap())
        };
        let (settled, one, other) = (Settled::default(), map(1), map(2));
        assert!(!settled.holds("a", file(1), &one));

        settled.note("a", file(1), &one);
        assert!(settled.holds("a", file(1), &one));
        assert!(!settled.holds("a", file(2), &one), "somebody saved another one");
        assert!(!settled.holds("a", None, &one), "it is gone");
        assert!(!settled.holds("a", file(1), &other) && !settled.holds("b", file(1), &one));

        settled.note("a", None, &one);
        assert!(!settled.holds("a", file(1), &one));
    }
}
