//! The wish to end early, as everything in the demo that takes its time gets to see it.

use std::panic::resume_unwind;

use anyhow::bail;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::build::Progress;
use crate::cli::progress::Bar;

/// A flag that is set once.
#[derive(Debug)]
pub(super) struct Stop(watch::Sender<bool>);

impl Stop {
    pub(super) fn new() -> Self {
        Self(watch::Sender::new(false))
    }

    pub(super) fn set(&self) {
        self.0.send_replace(true);
    }

    pub(super) fn is_set(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when it is set.
    pub(super) async fn wait(&self) {
        // The sender is `self`, so the channel cannot close meanwhile.
        let _ = self.0.subscribe().wait_for(|set| *set).await;
    }

    /// An error if it is set: asked between the steps of the demo.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.is_set() {
            bail!("interrupted");
        }
        Ok(())
    }
}

/// A progress bar that ends the build when there is a wish to stop.
///
/// A build cannot be told to end, but it cleans up when it is unwound.
pub(super) struct Until<'a> {
    pub(super) stop: &'a Stop,
    pub(super) bar: Bar,
}

impl Progress for Until<'_> {
    fn wants_total(&self) -> bool {
        self.bar.wants_total()
    }

    fn total(&self, entries: u64, bytes: u64) {
        self.bar.total(entries, bytes);
    }

    fn advance(&self, entries: u64, bytes: u64) {
        if self.stop.is_set() {
            resume_unwind(Box::new("interrupted"));
        }
        self.bar.advance(entries, bytes);
    }
}

/// The signals that end the demo. Once they are listened to they never end the process by
/// themselves, so a second one does not disturb the cleaning up.
pub(super) struct Signals {
    hangup: Signal,
    interrupt: Signal,
    term: Signal,
}

impl Signals {
    /// Must be called on the runtime.
    pub(super) fn listen() -> std::io::Result<Self> {
        let [hangup, interrupt, term] = [SignalKind::hangup(), SignalKind::interrupt(), SignalKind::terminate()];
        Ok(Self { hangup: signal(hangup)?, interrupt: signal(interrupt)?, term: signal(term)? })
    }

    /// Waits for one. Gives the exit status that a shell reports for it.
    pub(super) async fn next(&mut self) -> u8 {
        let kind = tokio::select! {
            _ = self.hangup.recv() => SignalKind::hangup(),
            _ = self.interrupt.recv() => SignalKind::interrupt(),
            _ = self.term.recv() => SignalKind::terminate(),
        };
        // All three have numbers below 16.
        u8::try_from(128 + kind.as_raw_value()).unwrap_or(u8::MAX)
    }
}
