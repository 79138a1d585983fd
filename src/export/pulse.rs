//! Waking a thread that waits for the kernel: to end it, or to hear that it is well.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};

/// Shared by one thread that serves and whoever asks about it.
#[derive(Debug)]
pub(super) struct Pulse {
    wake: EventFd,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct State {
    stopping: bool,
    /// Questions so far, and how many of them had been asked when the thread last came round.
    asked: u64,
    felt: u64,
}

impl Pulse {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { wake, state: Mutex::default(), answered: Condvar::new() })
    }

    /// Called by the thread each time it comes round. True when it is to end.
    pub(super) fn beat(&self) -> bool {
        if self.wake.read().is_err() {
            return false;
        }
        let mut state = self.state.lock().unwrap();
        state.felt = state.asked;
        self.answered.notify_all();
        state.stopping
    }

    /// Asks the thread to end.
    pub(super) fn stop(&self) {
        self.state.lock().unwrap().stopping = true;
        self.wake();
    }

    /// Asks the thread to come round and tells whether it does within this time.
    pub(super) fn is_felt(&self, within: Duration) -> bool {
        let mut state = self.state.lock().unwrap();
        state.asked += 1;
        let question = state.asked;
        self.wake();
        let waiting = |state: &mut State| state.felt < question;
        let (state, _) = self.answered.wait_timeout_while(state, within, waiting).unwrap();
        state.felt >= question
    }

    /// Has the thread come round.
    pub(super) fn ring(&self) {
        self.wake();
    }

    fn wake(&self) {
        // The counter cannot overflow from a handful of wakes, and a full one wakes as well.
        let _ = self.wake.write(1);
    }
}

impl AsFd for Pulse {
    /// Readable when the thread has to come round.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn a_thread_that_comes_round_is_felt_and_one_that_is_stuck_is_not() {
        let pulse = Arc::new(Pulse::new().unwrap());
        assert!(!pulse.is_felt(Duration::from_millis(20)), "nobody serves yet");

        let served = pulse.clone();
        let thread = std::thread::spawn(move || {
            loop {
                let _ = poll(&mut [PollFd::new(served.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
                if served.beat() {
                    return;
                }
            }
        });
        assert!((0..100).all(|_| pulse.is_felt(Duration::from_secs(20))));

        pulse.stop();
        thread.join().unwrap();
        assert!(!pulse.is_felt(Duration::from_millis(20)));
    }
}
