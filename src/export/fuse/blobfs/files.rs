//! Files of the host that are open for whoever reads them, up to a small number.

use std::fs::File;
use std::sync::{Arc, Mutex};

use crate::export::fuse::wire::NodeId;

/// Most files that are open at once. One that was closed for another's sake is opened again when it is read.
const MOST: usize = 64;

/// The files, used last at the end.
#[derive(Debug, Default)]
pub(super) struct OpenFiles(Mutex<Vec<Open>>);

#[derive(Debug)]
struct Open {
    number: NodeId,
    file: Arc<File>,
    /// Openings that are known of and not closed.
    openings: u64,
}

impl OpenFiles {
    /// The file, if it is open.
    pub(super) fn get(&self, number: NodeId) -> Option<Arc<File>> {
        let mut files = self.0.lock().unwrap();
        let at = files.iter().position(|open| open.number == number)?;
        let open = files.remove(at);
        let file = open.file.clone();
        files.push(open);
        Some(file)
    }

    /// Keeps a file open, for one more who has opened it if `is_opening`. Gives what is used from now on.
    pub(super) fn keep(&self, number: NodeId, file: Arc<File>, is_opening: bool) -> Arc<File> {
        let mut files = self.0.lock().unwrap();
        let known = files.iter().position(|open| open.number == number).map(|at| files.remove(at));
        let mut open = known.unwrap_or(Open { number, file, openings: 0 });
        open.openings += u64::from(is_opening);
        let file = open.file.clone();
        files.push(open);
        // Closed behind the lock: the last closing of a file may take its time.
        let closed = (files.len() > MOST).then(|| files.remove(0));
        drop(files);
        drop(closed);
        file
    }

    /// One who had opened the file has closed it.
    pub(super) fn close(&self, number: NodeId) {
        let mut files = self.0.lock().unwrap();
        let Some(at) = files.iter().position(|open| open.number == number) else { return };
        files[at].openings = files[at].openings.saturating_sub(1);
        let closed = (files[at].openings == 0).then(|| files.remove(at));
        drop(files);
        drop(closed);
    }

    /// Nobody can ask for it any more.
    pub(super) fn forget(&self, number: NodeId) {
        let mut files = self.0.lock().unwrap();
        let at = files.iter().position(|open| open.number == number);
        let closed = at.map(|at| files.remove(at));
        drop(files);
        drop(closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_stays_open_until_the_last_who_opened_it_has_closed_it() {
        let (files, file) = (OpenFiles::default(), Arc::new(tempfile::tempfile().unwrap()));
        files.keep(1, file.clone(), true);
        let other = files.keep(1, Arc::new(tempfile::tempfile().unwrap()), true);
        assert!(Arc::ptr_eq(&other, &file), "one file for all");

        files.close(1);
        assert!(files.get(1).is_some());
        files.close(1);
        assert!(files.get(1).is_none());
        // Opened before this process was there.
        files.keep(2, file.clone(), false);
        files.close(2);
        assert!(files.get(2).is_none());
    }

    #[test]
    fn the_file_that_was_used_longest_ago_makes_room() {
        let (files, file) = (OpenFiles::default(), Arc::new(tempfile::tempfile().unwrap()));
        (0..MOST as u64).for_each(|number| drop(files.keep(number, file.clone(), true)));
        files.get(0);
        files.keep(1000, file.clone(), true);

        assert!(files.get(0).is_some() && files.get(1).is_none() && files.get(2).is_some());
        files.forget(1000);
        assert_eq!(files.0.lock().unwrap().len(), MOST - 1);
    }
}
