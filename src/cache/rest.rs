//! How a data file lay when the last one who wrote to it let go of it.
//!
//! Nobody looks at present bytes again when a blob is taken into use: there may be many gigabytes. But
//! whoever changes a file changes its change time, which cannot be set to what it was. So that time is noted
//! beside the file when it is let go in order, and if it is another one when the file is taken up again, each unit is
//! checked once more before it is used, and until then is not present ([`super::ledger::Ledger::reclaim`]).
//!
//! The note goes before the file is written to again. After a crash there is none, and nothing is known; so it is
//! if it cannot be written or read. It is as fine as the file system's time: a change within the same tick as the last
//! write is not noticed. It is never synced: should a power cut bring an old one back, that costs a check and
//! nothing else.

use std::path::PathBuf;
use std::sync::Arc;

use super::disk::{Disk, FileFacts};

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
        let new = self.dir.join("rest.new");
        let write = || {
            let changed = self.disk.facts(&self.dir.join("data"))?.changed;
            self.disk.create(&new)?.write_at(format!("{changed}\n").as_bytes(), 0)?;
            self.disk.rename(&new, &self.path())
        };
        if let Err(error) = write() {
            tracing::debug!(dir = %self.dir.display(), %error, "how a cache file lies could not be noted");
            let _ = self.disk.remove(&new);
            self.end();
        }
    }

    /// Removes the note: somebody is about to write to the file.
    pub(super) fn end(&self) {
        // One that stays is out of date with the first write, which costs a check at most.
        let _ = self.disk.remove(&self.path());
    }

    /// Whether the file, which is now as in `facts`, is known to have been changed since it was let go.
    pub(super) fn is_disturbed(&self, facts: &FileFacts) -> bool {
        let note = self.disk.read(&self.path()).ok().and_then(|note| String::from_utf8(note).ok());
        note.and_then(|note| note.strip_suffix('\n')?.parse().ok()).is_some_and(|noted: u64| noted != facts.changed)
    }
}
