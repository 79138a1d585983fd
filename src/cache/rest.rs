//! How a data file lay when the last one who wrote to it let go of it.
//!
//! Nobody looks at present bytes again when a blob is taken into use: there may be many gigabytes. But
//! whoever changes a file changes its change time, which cannot be set to what it was. So that time is noted
//! beside the file when it is let go in order, and if it is another one when the file is taken up again, what is
//! present is checked once more before anybody believes it.
//!
//! The note goes before the file is written to again. After a crash there is none, and nothing is known. It is
//! never synced: should a power cut leave an old one, or half of one, that costs a check and nothing else.

use std::path::PathBuf;
use std::sync::Arc;

use super::disk::{Disk, DiskFile, FileFacts};
use super::presence::{bit, clear_bit};
use super::verify::check_blocks;
use crate::blob::{Unit, UnitMap};

/// The note beside one data file.
pub(super) struct Rest {
    pub(super) dir: PathBuf,
    pub(super) disk: Arc<dyn Disk>,
}

impl Rest {
    fn path(&self) -> PathBuf {
        self.dir.join("rest")
    }

    /// Notes how the file lies: nobody of this process writes to it from now on.
    pub(super) fn begin(&self) {
        let write = || {
            let changed = self.disk.facts(&self.dir.join("data"))?.changed;
            self.disk.create(&self.path())?.write_at(format!("{changed}\n").as_bytes(), 0)
        };
        if let Err(error) = write() {
            tracing::debug!(dir = %self.dir.display(), %error, "how a cache file lies could not be noted");
        }
    }

    /// Removes the note: somebody is about to write to the file.
    pub(super) fn end(&self) {
        // One that stays is out of date with the first write, which costs a check at most.
        let _ = self.disk.remove(&self.path());
    }

    /// Whether the file, which is now as in `facts`, is known to have been changed since it was let go.
    pub(super) fn is_disturbed(&self, facts: &FileFacts) -> bool {
        let Ok(note) = self.disk.read(&self.path()) else { return false };
        let noted = std::str::from_utf8(&note).ok().and_then(|text| text.trim_end().parse().ok());
        noted != Some(facts.changed)
    }
}

/// Takes from `words` the units whose bytes in `data` are not what `map` says, or cannot be read. Reads all
/// that are present; tells how many it took.
pub(super) fn recheck(map: &UnitMap, words: &mut [u64], data: &dyn DiskFile) -> usize {
    let mut room = Vec::new();
    let mut taken = 0;
    for (index, unit) in (0..).zip(map.units()) {
        if bit(words, index) && !is_sound(unit, data, &mut room) {
            clear_bit(words, index);
            taken += 1;
        }
    }
    taken
}

fn is_sound(unit: &Unit, data: &dyn DiskFile, room: &mut Vec<u8>) -> bool {
    let blocks = unit.blocks();
    room.resize(usize::try_from(blocks.len()).expect("a unit has at most 16 MiB"), 0);
    data.read_at(room, blocks.start()).is_ok() && check_blocks(unit, room).is_ok()
}
