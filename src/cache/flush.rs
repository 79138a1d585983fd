use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::core::Core;
use super::pool::join_others;

/// The thread that makes presence durable a little later, so that readers never wait for a disk.
pub(super) struct Flusher {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    devices: Vec<Weak<Core>>,
    /// Somebody does not want to wait for the next turn.
    kicked: bool,
    stopped: bool,
}

impl Flusher {
    pub(super) fn start(every: Duration) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let thread = std::thread::Builder::new().name("flush-0".to_owned());
        let thread = thread.spawn({
            let shared = Arc::clone(&shared);
            move || {
                while let Some(devices) = shared.next_turn(every) {
                    devices.iter().filter_map(Weak::upgrade).for_each(|device| device.flush_and_log());
                }
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Flushes `device` from now on, until it is dropped.
    pub(super) fn watch(&self, device: Weak<Core>) {
        let mut state = self.shared.state.lock().unwrap();
        state.devices.retain(|device| device.strong_count() > 0);
        state.devices.push(device);
    }

    /// Flushes all of them on this thread.
    pub(super) fn flush_now(&self) {
        let devices = self.shared.state.lock().unwrap().devices.clone();
        devices.iter().filter_map(Weak::upgrade).for_each(|device| device.flush_and_log());
    }

    /// Does the next turn at once.
    pub(super) fn kick(&self) {
        self.shared.state.lock().unwrap().kicked = true;
        self.shared.wake.notify_one();
    }
}

impl Shared {
    /// Waits for the next turn; `None` at the end.
    fn next_turn(&self, every: Duration) -> Option<Vec<Weak<Core>>> {
        let due = Instant::now() + every;
        let mut state = self.state.lock().unwrap();
        while !state.stopped && !state.kicked {
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self.wake.wait_timeout(state, left).unwrap().0;
        }
        state.kicked = false;
        (!state.stopped).then(|| state.devices.clone())
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).stopped = true;
        self.shared.wake.notify_one();
        join_others(self.thread.take());
    }
}
