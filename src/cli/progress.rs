//! A progress bar on standard error, for a person who waits. Silent when nobody can see it.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::base::Plain;
use crate::build::Progress;
use crate::cache::PrefetchStats;

/// How often the daemon is asked how it stands.
const STEP: Duration = Duration::from_millis(100);

/// Bytes done of bytes to do, or a spinner where the end is not known. Removed when dropped.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    entries: Cell<u64>,
}

impl Bar {
    /// A bar with this verb in front; hidden unless standard error is a terminal.
    pub fn on_terminal(verb: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(None, on_terminal()).with_prefix(verb);
        bar.set_style(style("{spinner} {prefix} {bytes} ({bytes_per_sec}), {msg}"));
        Self { bar, entries: Cell::new(0) }
    }
}

/// Standard error if a person looks at it, else nothing.
fn on_terminal() -> ProgressDrawTarget {
    if io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

/// Shows how what the daemon fetches gets on, with `name` in front, until it ends or `until` comes, and what is in
/// its way. `stats` looks into a report, `next` asks for another one.
pub(super) async fn follow<R>(
    name: &str,
    mut report: R,
    until: Option<Instant>,
    stats: impl Fn(&R) -> &PrefetchStats,
    next: impl AsyncFn(&R) -> anyhow::Result<R>,
) -> anyhow::Result<R> {
    let bar =
        ProgressBar::with_draw_target(Some(stats(&report).bytes), on_terminal()).with_prefix(Plain(name).to_string());
    bar.set_style(style("{prefix} {wide_bar} {bytes}/{total_bytes} ({bytes_per_sec})"));
    let mut told = None;
    while !stats(&report).state.is_end() && until.is_none_or(|until| Instant::now() < until) {
        let now = stats(&report);
        bar.set_position(now.bytes_present);
        if now.trouble != told {
            told.clone_from(&now.trouble);
            if let Some(trouble) = &told {
                bar.suspend(|| drop(say!(io::stderr(), "rafsd: {trouble}; asking again")));
            }
        }
        tokio::time::sleep(STEP).await;
        report = next(&report).await?;
    }
    bar.finish_and_clear();
    Ok(report)
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
