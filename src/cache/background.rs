use std::sync::{Arc, Mutex};

use super::core::Core;
use super::prefetch::{Prefetch, Want};

/// The prefetch of what is missing of one device, for who does not care how it goes.
#[derive(Debug, Default)]
pub(super) struct Background(Mutex<Option<Prefetch>>);

impl Background {
    /// Starts it, unless it is under way.
    pub(super) fn start(&self, core: &Arc<Core>, wants: &[Want], rest: bool) {
        let mut prefetch = self.0.lock().unwrap();
        if prefetch.as_ref().is_none_or(Prefetch::has_ended) {
            *prefetch = Some(Prefetch::start_cores(&core.engine, std::slice::from_ref(core), wants, rest));
        }
    }

    pub(super) fn stop(&self) {
        *self.0.lock().unwrap() = None;
    }
}
