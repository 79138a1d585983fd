//! What one host may be asked, whoever asks it: so many requests at once, so many bytes a second, and nothing
//! for as long as it said that it wants to be left alone.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;

use super::{Clock, Rate, SendError, Slot, Slots, retry_after};
use crate::base::Class;

/// How long everybody leaves a host alone that asked for it, before somebody looks again. A read whose own request
/// was answered so keeps to what the host said, however long that is.
const LONGEST_REST: Duration = Duration::from_secs(30);

/// Limits of what one host is asked. Without any, it may be asked everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HostLimits {
    /// Requests at once, readers before prefetch; `None` for any number.
    pub concurrency: Option<usize>,
    /// Bytes of bodies per second; `None` for as many as come.
    pub bandwidth: Option<u64>,
}

/// The limits of one host, and what of them is in use. Whoever asks the host has the same one.
#[derive(Debug)]
pub struct HostPace {
    slots: Option<Slots>,
    rate: Option<Rate>,
    /// Until when the host wants to be left alone.
    rests: Mutex<Option<Instant>>,
    clock: Clock,
}

impl HostPace {
    /// A host of which nobody has asked anything yet.
    pub fn new(limits: HostLimits, clock: Clock) -> Self {
        let rate = limits.bandwidth.map(|bytes| Rate::new(bytes, clock.clone()));
        Self { slots: limits.concurrency.map(Slots::new), rate, rests: Mutex::default(), clock }
    }

    /// Until when the host wants to be left alone, if it does.
    pub fn rests(&self) -> Option<Instant> {
        self.rests.lock().unwrap().filter(|until| *until > self.clock.now())
    }

    /// Whether there is anything that its users may have to wait for.
    pub fn is_limited(&self) -> bool {
        self.slots.is_some() || self.rate.is_some()
    }

    /// Waits for the turn of one request.
    ///
    /// # Errors
    /// It did not come before `until`, or the host wants to be left alone.
    pub async fn enter(self: &Arc<Self>, class: Class, until: Instant) -> Result<Passage, SendError> {
        self.ensure_awake()?;
        let slot = match &self.slots {
            Some(slots) => {
                let slot = self.clock.timeout_at(until, slots.take(class)).await.map_err(|_| SendError::Late)?;
                // Whoever was before may have been told to stay away.
                self.ensure_awake()?;
                Some(slot)
            }
            None => None,
        };
        Ok(Passage { pace: Arc::clone(self), class, _slot: slot })
    }

    fn ensure_awake(&self) -> Result<(), SendError> {
        match self.rests() {
            Some(until) => Err(SendError::Resting(until.saturating_duration_since(self.clock.now()))),
            None => Ok(()),
        }
    }
}

/// The right to one request, held until the body of its answer has been read.
#[derive(Debug)]
pub struct Passage {
    pace: Arc<HostPace>,
    class: Class,
    _slot: Option<Slot>,
}

impl Passage {
    /// Notes what the head of the answer says about asking again: with 429 or 503, and with `Retry-After`, that
    /// nobody should for so long.
    pub fn answered(&self, status: u16, headers: &HeaderMap) {
        let Some(pause) = retry_after(headers).filter(|_| matches!(status, 429 | 503)) else { return };
        let until = self.pace.clock.now() + pause.min(LONGEST_REST);
        let mut rests = self.pace.rests.lock().unwrap();
        *rests = Some(rests.map_or(until, |known| known.max(until)));
    }

    /// Counts bytes of the body, and waits until the next ones may come.
    ///
    /// # Errors
    /// That is not before `until`.
    pub async fn pay(&self, bytes: u64, until: Instant) -> Result<(), SendError> {
        match &self.pace.rate {
            Some(rate) => {
                let paid = rate.pay(bytes, self.class);
                self.pace.clock.timeout_at(until, paid).await.map_err(|_| SendError::Late)
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::task::{Context, Poll, Waker};

    use reqwest::header::{HeaderValue, RETRY_AFTER};

    use super::*;
    use crate::net::Timekeeper as _;
    use crate::net::clock::Hand;

    fn pace(limits: HostLimits) -> (Arc<HostPace>, Hand) {
        let hand = Hand::new();
        (Arc::new(HostPace::new(limits, hand.clock())), hand)
    }

    /// What comes of it now.
    fn poll<T>(future: Pin<&mut impl Future<Output = T>>) -> Option<T> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    fn enter(pace: &Arc<HostPace>, hand: &Hand) -> Option<Result<Passage, SendError>> {
        poll(pin!(pace.enter(Class::OnDemand, hand.now() + Duration::from_secs(60))))
    }

    fn asks_for(seconds: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_static(seconds))])
    }

    #[test]
    fn a_host_that_asks_for_it_is_left_alone_by_everybody() {
        let (pace, hand) = pace(HostLimits::default());
        let first = enter(&pace, &hand).unwrap().unwrap();
        first.answered(200, &asks_for("9"));
        first.answered(404, &asks_for("9"));
        first.answered(503, &HeaderMap::new());
        assert_eq!(pace.rests(), None);

        first.answered(429, &asks_for("7"));
        first.answered(503, &asks_for("2"));

        let resting = enter(&pace, &hand).unwrap().unwrap_err();
        assert_eq!(resting.retry_after(), Some(Duration::from_secs(7)), "{resting}");
        hand.pass(Duration::from_secs(6));
        assert!(enter(&pace, &hand).unwrap().is_err());
        hand.pass(Duration::from_secs(1));
        assert!(enter(&pace, &hand).unwrap().is_ok());
    }

    #[test]
    fn nobody_is_kept_from_looking_again_for_longer_than_is_sensible() {
        let (pace, hand) = pace(HostLimits::default());
        enter(&pace, &hand).unwrap().unwrap().answered(503, &asks_for("18446744073709551615"));
        hand.pass(Duration::from_secs(29));
        assert!(enter(&pace, &hand).unwrap().is_err());
        hand.pass(Duration::from_secs(1));
        assert!(enter(&pace, &hand).unwrap().is_ok());
    }

    #[test]
    fn whoever_stood_in_the_queue_hears_of_the_rest_too() {
        let (pace, hand) = pace(HostLimits { concurrency: Some(1), bandwidth: None });
        let first = enter(&pace, &hand).unwrap().unwrap();
        let mut second = pin!(pace.enter(Class::OnDemand, hand.now() + Duration::from_secs(60)));
        assert!(poll(second.as_mut()).is_none());

        first.answered(429, &asks_for("3"));
        drop(first);

        assert!(matches!(poll(second).unwrap(), Err(SendError::Resting(_))));
        hand.pass(Duration::from_secs(3));
        assert!(enter(&pace, &hand).unwrap().is_ok(), "its place is free again");
    }

    #[test]
    fn turns_and_bytes_are_waited_for_no_longer_than_they_are_wanted() {
        let (pace, hand) = pace(HostLimits { concurrency: Some(1), bandwidth: Some(1000) });
        let first = enter(&pace, &hand).unwrap().unwrap();
        let until = hand.now() + Duration::from_secs(5);
        let mut second = pin!(pace.enter(Class::OnDemand, until));
        let mut paid = pin!(first.pay(3100, until));
        let mut late = pin!(first.pay(3000, until));
        assert!(poll(second.as_mut()).is_none() && poll(paid.as_mut()).is_none() && poll(late.as_mut()).is_none());

        hand.pass(Duration::from_secs(3));
        assert!(poll(paid).unwrap().is_ok());
        hand.pass(Duration::from_secs(2));

        assert!(matches!(poll(late).unwrap(), Err(SendError::Late)));
        assert!(matches!(poll(second).unwrap(), Err(SendError::Late)));
    }
}
