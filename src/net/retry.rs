//! Whether and when to ask again.

use std::time::{Duration, Instant};

use reqwest::header::{DATE, HeaderMap, RETRY_AFTER};

use crate::base::Fault;

/// How often a request is made and how the pauses between attempts grow.
///
/// Policy as data: it holds no clock and no state, so one value serves every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Attempts altogether, the first one included. 0 means the same as 1.
    pub attempts: u32,
    /// Pause after the first failure, before jitter; doubled after each further one.
    pub first_delay: Duration,
    /// Longest pause the policy chooses by itself.
    pub max_delay: Duration,
}

impl Default for RetryPolicy {
    /// 6 attempts within at most 3.1 s of pauses: a restarted proxy, not an outage.
    fn default() -> Self {
        Self { attempts: 6, first_delay: Duration::from_millis(100), max_delay: Duration::from_secs(5) }
    }
}

/// What is known when an attempt has failed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attempt {
    /// Attempts that have failed so far, this one included.
    pub failed: u32,
    /// Spreads the pauses of requests that fail together. The same seed gives the same pauses.
    pub seed: u64,
    /// Pause the server asked for.
    pub retry_after: Option<Duration>,
}

impl RetryPolicy {
    /// The pause before the next attempt, or `None` if there should be none: the fault will not go
    /// away, the attempts are used up, or the pause would last until the deadline.
    ///
    /// The pause is half to all of what the policy says, and never shorter than the server asked.
    pub fn next(&self, attempt: Attempt, fault: Fault, now: Instant, deadline: Instant) -> Option<Duration> {
        match fault {
            Fault::Transient => {}
            Fault::Permanent | Fault::Corrupt | Fault::Cancelled => return None,
        }
        if attempt.failed >= self.attempts {
            return None;
        }
        let doublings = attempt.failed.saturating_sub(1).min(31);
        let full = self.first_delay.saturating_mul(1 << doublings).min(self.max_delay);
        let pause = jittered(full, attempt).max(attempt.retry_after.unwrap_or_default());
        (pause < deadline.saturating_duration_since(now)).then_some(pause)
    }
}

/// The pause that an answer asks for, in seconds or until a date. The server's own clock is the one that the date
/// is by, which may be wrong as long as it says what time it has.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| Some(headers.get(name)?.to_str().ok()?.trim());
    let value = text(RETRY_AFTER)?;
    // Digits only: the parser of numbers would also take a sign.
    if value.bytes().all(|b| b.is_ascii_digit()) {
        // What does not fit is for ever.
        return (!value.is_empty()).then(|| Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let until = httpdate::parse_http_date(value).ok()?;
    until.duration_since(httpdate::parse_http_date(text(DATE)?).ok()?).ok()
}

/// Half of `full`, and a share of the other half that depends on seed and attempt.
fn jittered(full: Duration, attempt: Attempt) -> Duration {
    // Never fails: 16 bits fit into 32.
    let share = u32::try_from(scramble(attempt.seed ^ u64::from(attempt.failed)) >> 48).unwrap_or(0);
    let half = full / 2;
    half + half.saturating_mul(share) / (1 << 16)
}

/// The finalizer of splitmix64: every input bit reaches every output bit.
fn scramble(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: RetryPolicy =
        RetryPolicy { attempts: 4, first_delay: Duration::from_millis(100), max_delay: Duration::from_millis(300) };
    const HOUR: Duration = Duration::from_secs(3600);

    fn pause(attempt: Attempt, left: Duration) -> Option<Duration> {
        let now = Instant::now();
        POLICY.next(attempt, Fault::Transient, now, now + left)
    }

    fn failed(failed: u32, seed: u64) -> Attempt {
        Attempt { failed, seed, retry_after: None }
    }

    #[test]
    fn what_is_asked_for_in_seconds_may_be_more_than_fits() {
        let asked = |text: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]));
        assert_eq!(asked("7"), Some(Duration::from_secs(7)));
        assert_eq!(asked("99999999999999999999"), Some(Duration::from_secs(u64::MAX)));
        assert_eq!((asked(""), asked("-1"), asked("1.5")), (None, None, None));
    }

    #[test]
    fn pauses_double_up_to_the_limit_and_then_end() {
        for (count, full) in [(1, 100), (2, 200), (3, 300)] {
            let pause = pause(failed(count, 7), HOUR).expect("another attempt");
            let full = Duration::from_millis(full);
            assert!((full / 2..=full).contains(&pause), "{pause:?} after {count} failures");
        }
        assert_eq!(pause(failed(4, 7), HOUR), None);
    }

    #[test]
    fn jitter_differs_between_seeds_and_repeats_with_them() {
        let pauses: Vec<_> = (0..8).map(|seed| pause(failed(1, seed), HOUR)).collect();
        let again: Vec<_> = (0..8).map(|seed| pause(failed(1, seed), HOUR)).collect();

        assert_eq!(pauses, again);
        assert!(pauses.iter().any(|pause| *pause != pauses[0]), "{pauses:?}");
    }

    #[test]
    fn only_transient_faults_are_worth_another_attempt() {
        let now = Instant::now();
        for fault in [Fault::Permanent, Fault::Corrupt, Fault::Cancelled] {
            assert_eq!(POLICY.next(failed(1, 0), fault, now, now + HOUR), None, "{fault:?}");
        }
    }

    #[test]
    fn servers_may_ask_for_more_patience_but_not_beyond_the_deadline() {
        let asked = |seconds| Attempt { failed: 1, seed: 0, retry_after: Some(Duration::from_secs(seconds)) };

        assert_eq!(pause(asked(30), HOUR), Some(Duration::from_secs(30)));
        assert_eq!(pause(asked(30), Duration::from_secs(30)), None);
        assert!(pause(asked(0), HOUR).expect("another attempt") >= Duration::from_millis(50));
    }

    #[test]
    fn a_virtual_clock_sees_the_deadline_kept() {
        let start = Instant::now();
        let deadline = start + Duration::from_millis(200);
        let eager = RetryPolicy { attempts: u32::MAX, ..POLICY };

        let mut now = start;
        let mut count = 0;
        while let Some(pause) = eager.next(failed(count + 1, 3), Fault::Transient, now, deadline) {
            now += pause;
            count += 1;
        }

        assert!(now < deadline);
        assert!((1..=3).contains(&count), "{count}");
    }

    #[test]
    fn huge_settings_do_not_overflow() {
        let policy = RetryPolicy { attempts: u32::MAX, first_delay: Duration::MAX, max_delay: Duration::MAX };
        let now = Instant::now();

        assert_eq!(policy.next(failed(u32::MAX - 1, u64::MAX), Fault::Transient, now, now + HOUR), None);
    }
}
