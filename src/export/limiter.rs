use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cache::Request;
use crate::telemetry::Label;

/// Lets a few lines through per period and counts the rest, so that a failing device does not
/// drown the log while thousands of readers fail on it.
#[derive(Debug)]
pub(super) struct Limiter {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    since: Option<Instant>,
    passed: u32,
    held_back: u64,
}

const PERIOD: Duration = Duration::from_secs(10);
const PER_PERIOD: u32 = 5;

impl Limiter {
    pub(super) const fn new() -> Self {
        Self { state: Mutex::new(State { since: None, passed: 0, held_back: 0 }) }
    }

    /// Whether a line may be written at `now`; if so, how many were held back since the last.
    pub(super) fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap();
        if state.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            state.since = Some(now);
            state.passed = 0;
        }
        if state.passed == PER_PERIOD {
            state.held_back += 1;
            return None;
        }
        state.passed += 1;
        Some(std::mem::take(&mut state.held_back))
    }
}

/// What the line about a failed read says of its request.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) request: u64,
    pub(super) class: &'static str,
    /// Until the fetch that it waited for began.
    pub(super) queue_ms: u64,
    /// Since then.
    pub(super) service_ms: u64,
}

impl Told {
    pub(super) fn of(request: &Request) -> Self {
        let (queue, service) = request.split();
        let millis = |of: Duration| u64::try_from(of.as_millis()).unwrap_or(u64::MAX);
        let (queue_ms, service_ms) = (millis(queue), millis(service));
        Self { request: request.id().number(), class: request.class().text(), queue_ms, service_ms }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_counted() {
        let (limiter, start) = (Limiter::new(), Instant::now());
        let passed = (0..100).filter(|_| limiter.admit(start).is_some()).count();
        assert_eq!(passed, 5);
        assert_eq!(limiter.admit(start + PERIOD), Some(95));
    }
}
