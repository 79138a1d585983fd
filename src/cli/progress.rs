//! A progress bar on standard error, for a person who waits. Silent when nobody can see it.

use std::cell::Cell;
use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::build::Progress;

/// Bytes done of bytes to do, or a spinner where the end is not known. Removed when dropped.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    entries: Cell<u64>,
}

impl Bar {
    /// A bar with this verb in front; hidden unless standard error is a terminal.
    pub fn on_terminal(verb: &'static str) -> Self {
        let visible = std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target).with_prefix(verb);
        bar.set_style(style("{spinner} {prefix} {bytes} ({bytes_per_sec}), {msg}"));
        Self { bar, entries: Cell::new(0) }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).expect("the templates of this file are sound")
}

impl Progress for Bar {
    fn wants_total(&self) -> bool {
        !self.bar.is_hidden()
    }

    fn total(&self, _entries: u64, bytes: u64) {
        self.bar.set_length(bytes);
        self.bar.set_style(style("{prefix} {wide_bar} {bytes}/{total_bytes} ({bytes_per_sec}), {msg}"));
    }

    fn advance(&self, entries: u64, bytes: u64) {
        if self.bar.is_hidden() {
            return;
        }
        self.entries.set(self.entries.get() + entries);
        // A message is a new string; once in a while is often enough.
        if entries > 0 && self.entries.get().is_multiple_of(64) {
            self.bar.set_message(format!("{} entries", self.entries.get()));
        }
        self.bar.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
