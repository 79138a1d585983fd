//! How one server has been doing: whether it is worth asking first, and how long it usually takes.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Failures one after the other after which a server is asked last.
const TRIPS: u32 = 2;

/// The first pause before a server that failed is tried again, doubled with each failed try.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest such pause: a mirror that is back is noticed within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Latencies that are remembered.
const SAMPLES: usize = 64;

/// Latencies below which nothing is said about what is usual.
const FEWEST: usize = 16;

/// A circuit breaker and the latest latencies. All images that are read from one server share one.
#[derive(Debug, Default)]
pub struct Health(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Failures since the last success.
    failed: u32,
    /// While the breaker is open: when the next probe is due.
    probe_at: Option<Instant>,
    /// Somebody is finding out.
    probing: bool,
    /// Until then it is asked last, whatever it does.
    barred: Option<Instant>,
    /// A ring of the latest times to the first byte.
    latencies: Vec<Duration>,
    next: usize,
}

/// Whether to ask a server in its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It works, as far as is known.
    Good,
    /// It failed repeatedly: ask others first.
    Bad,
    /// The same, and it is time that the caller finds out whether it is back, beside its read. It has to
    /// say [`Health::probed`] afterwards.
    Probe,
}

impl Health {
    /// How the server stands at `now`. Gives `Probe` to one caller only.
    pub fn standing(&self, now: Instant) -> Standing {
        let mut state = self.0.lock().unwrap();
        if state.barred.is_some_and(|until| now < until) {
            return Standing::Bad;
        }
        match state.probe_at {
            None => Standing::Good,
            Some(at) if at <= now && !state.probing => {
                state.probing = true;
                Standing::Probe
            }
            Some(_) => Standing::Bad,
        }
    }

    /// A request was answered properly.
    pub fn worked(&self) {
        let mut state = self.0.lock().unwrap();
        state.failed = 0;
        state.probe_at = None;
    }

    /// A request failed by a fault of the server.
    pub fn failed(&self, now: Instant) {
        let mut state = self.0.lock().unwrap();
        state.failed = state.failed.saturating_add(1);
        if state.failed >= TRIPS && state.probe_at.is_none_or(|at| at <= now) {
            let doublings = (state.failed - TRIPS).min(16);
            let pause = FIRST_PAUSE.saturating_mul(1 << doublings).min(LONGEST_PAUSE);
            state.probe_at = now.checked_add(pause);
        }
    }

    /// It does what no request finds out beforehand: ask it last for `time` from `now` on, also if it works.
    pub fn bar(&self, now: Instant, time: Duration) {
        let mut state = self.0.lock().unwrap();
        state.barred = state.barred.max(now.checked_add(time));
    }

    /// The probe has ended, or was given up.
    pub fn probed(&self) {
        self.0.lock().unwrap().probing = false;
    }

    /// The first byte of an answer came after `latency`.
    pub fn took(&self, latency: Duration) {
        let mut state = self.0.lock().unwrap();
        let at = state.next;
        if state.latencies.len() < SAMPLES {
            state.latencies.push(latency);
        } else {
            state.latencies[at] = latency;
        }
        state.next = (at + 1) % SAMPLES;
    }

    /// The time within which 95 of the latest 100 answers began; `None` while too few are known.
    pub fn usual(&self) -> Option<Duration> {
        let mut latencies = self.0.lock().unwrap().latencies.clone();
        if latencies.len() < FEWEST {
            return None;
        }
        latencies.sort_unstable();
        latencies.get(latencies.len() * 95 / 100).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_that_failed_twice_is_asked_last_until_a_probe_finds_it_back() {
        let (health, now) = (Health::default(), Instant::now());
        health.failed(now);
        assert_eq!(health.standing(now), Standing::Good);
        health.failed(now);
        assert_eq!(health.standing(now), Standing::Bad);
        assert_eq!(health.standing(now + SECOND), Standing::Probe);
        assert_eq!(health.standing(now + SECOND), Standing::Bad, "one probes, the others go on");
        health.probed();
        health.failed(now + SECOND);
        assert_eq!(health.standing(now + 2 * SECOND), Standing::Bad, "the pause has doubled");
        assert_eq!(health.standing(now + 3 * SECOND), Standing::Probe);
        health.worked();
        assert_eq!(health.standing(now), Standing::Good);
    }

    #[test]
    fn one_that_is_barred_is_asked_last_for_so_long_and_works_meanwhile() {
        let (health, now) = (Health::default(), Instant::now());
        health.bar(now, 2 * SECOND);
        health.bar(now, SECOND);
        health.worked();
        assert_eq!(health.standing(now + SECOND), Standing::Bad);
        assert_eq!(health.standing(now + 2 * SECOND), Standing::Good);
    }

    #[test]
    fn it_is_tried_again_for_ever() {
        let (health, mut now) = (Health::default(), Instant::now());
        health.failed(now);
        health.failed(now);
        for _ in 0..100 {
            now += LONGEST_PAUSE;
            assert_eq!(health.standing(now), Standing::Probe);
            health.probed();
            health.failed(now);
        }
    }

    #[test]
    fn what_is_usual_is_known_after_some_answers_and_changes_with_them() {
        let health = Health::default();
        (0..FEWEST - 1).for_each(|_| health.took(SECOND));
        assert_eq!(health.usual(), None);
        health.took(SECOND);
        assert_eq!(health.usual(), Some(SECOND));
        (0..SAMPLES).for_each(|_| health.took(2 * SECOND));
        assert_eq!(health.usual(), Some(2 * SECOND));
    }
}
