//! Readers that are killed while they wait.
//!
//! Who waits for an answer that we have begun to work on cannot leave before it comes, not even by SIGKILL. What
//! the kernel does is tell us that a signal came. Most signals are none of our business: a read of a file is not
//! interrupted by them. But when the reader is being killed, it is let go at once with `EINTR`, which nobody
//! sees; the fill goes on. Whether it is being killed tells the kernel's status of the thread, which has to be
//! looked at again as long as the read waits: one signal is told of, the first.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// How often threads that were sent a signal are looked at.
pub(super) const PERIOD: Duration = Duration::from_millis(100);

/// A read that waits, and can be let go.
pub(super) trait Waiting: Send + Sync {
    /// Lets the reader go, if it still waits.
    fn let_go(&self);
}

/// Most numbers that are remembered of reads which nobody has entered yet.
const MOST_EARLY: usize = 64;

/// The reads of one connection that wait for data.
#[derive(Default)]
pub(super) struct Interrupts {
    state: Mutex<State>,
    /// Set when some reader has to be looked at; shared by all connections of a server.
    any: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, Reader>,
    /// Told of before they were entered: another thread may be faster than the one that has the request. The
    /// kernel tells once, and no number is used again.
    early: VecDeque<u64>,
}

struct Reader {
    /// The thread that reads, in our namespace of processes; 0 if it is in none that we see.
    thread: u32,
    read: Weak<dyn Waiting>,
    /// Whether it was sent a signal.
    is_watched: bool,
}

impl std::fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interrupts").finish_non_exhaustive()
    }
}

impl Interrupts {
    /// No reads. `any` is set when one has to be looked at.
    pub(super) fn new(any: Arc<AtomicBool>) -> Self {
        Self { state: Mutex::default(), any }
    }

    /// A read waits, which the kernel calls `unique` and `thread` has asked for. Of an `old` one, which a dead
    /// process had taken, nobody knows whether it was sent a signal.
    pub(super) fn enter(&self, unique: u64, thread: u32, old: bool, read: &Arc<impl Waiting + 'static>) {
        let read: Arc<dyn Waiting> = read.clone();
        let mut state = self.state.lock().unwrap();
        let is_watched = old || state.early.contains(&unique);
        state.waiting.insert(unique, Reader { thread, read: Arc::downgrade(&read), is_watched });
        if is_watched {
            self.any.store(true, Ordering::Release);
        }
    }

    /// It waits no more.
    pub(super) fn leave(&self, unique: u64) {
        self.state.lock().unwrap().waiting.remove(&unique);
    }

    /// Whoever waits for `unique` was sent a signal.
    pub(super) fn signalled(&self, unique: u64) {
        let mut state = self.state.lock().unwrap();
        match state.waiting.get_mut(&unique) {
            Some(reader) => reader.is_watched = true,
            None => {
                state.early.truncate(MOST_EARLY - 1);
                state.early.push_front(unique);
            }
        }
        drop(state);
        self.look();
    }

    /// Lets go of those that are being killed. If there are others that were sent a signal, they have to be
    /// looked at again.
    pub(super) fn look(&self) {
        let mut killed = Vec::new();
        let mut is_left = false;
        let watched = |reader: &&Reader| reader.is_watched;
        let told: Vec<_> = {
            let state = self.state.lock().unwrap();
            state.waiting.values().filter(watched).map(|reader| (reader.thread, reader.read.clone())).collect()
        };
        for (thread, read) in told {
            match is_being_killed(thread) {
                true => killed.extend(read.upgrade()),
                false => is_left = true,
            }
        }
        if is_left {
            self.any.store(true, Ordering::Release);
        }
        // Outside the lock: whoever is let go leaves.
        killed.iter().for_each(|read| read.let_go());
    }
}

/// Whether SIGKILL waits for a thread to notice. One that has gone needs nothing any more.
fn is_being_killed(thread: u32) -> bool {
    thread != 0 && fs::read_to_string(format!("/proc/{thread}/status")).is_ok_and(|status| has_sigkill(&status))
}

fn has_sigkill(status: &str) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & SIGKILL != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Read(AtomicU32);

    impl Waiting for Read {
        fn let_go(&self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_pending_sigkill_is_told_from_other_signals() {
        assert!(has_sigkill("Name:\tcat\nSigQ:\t0/1\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"));
        assert!(has_sigkill("SigPnd:\t0000000000000101\n"));
        for other in ["SigPnd:\t0000000000000001\nShdPnd:\t0000000000000100\n", "SigPnd:\tnonsense\n", ""] {
            assert!(!has_sigkill(other), "{other:?}");
        }
    }

    #[test]
    fn a_reader_that_lives_on_waits_on_whatever_signal_it_got() {
        let (interrupts, read) = (Interrupts::default(), Arc::new(Read::default()));
        interrupts.enter(8, std::process::id(), false, &read);
        let has_to_look_again = || {
            interrupts.look();
            interrupts.any.swap(false, Ordering::Relaxed)
        };
        assert!(!has_to_look_again(), "nobody was sent a signal");

        interrupts.signalled(8);
        interrupts.signalled(9);

        assert!(has_to_look_again());
        assert_eq!(read.0.load(Ordering::Relaxed), 0);
        interrupts.leave(8);
        assert!(!has_to_look_again());

        interrupts.enter(9, std::process::id(), false, &read);
        assert!(has_to_look_again(), "the signal came before the read");
        interrupts.leave(9);
        interrupts.enter(10, std::process::id(), true, &read);
        assert!(has_to_look_again(), "of an old one nobody knows");
    }
}
