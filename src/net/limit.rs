//! Limits of what is asked of one server at once, and of the bytes that come from it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::Clock;
use crate::base::{ByteRate, Class, Paid};

/// Requests that may run at once. Whoever a reader waits for goes before all prefetch that waits.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Mutex<Queues>>);

#[derive(Debug)]
struct Queues {
    all: usize,
    free: usize,
    readers: VecDeque<oneshot::Sender<Slot>>,
    prefetch: VecDeque<oneshot::Sender<Slot>>,
}

/// The right to one request, given on when it is dropped.
#[derive(Debug)]
pub struct Slot {
    /// `None` once it has been given back.
    of: Option<Slots>,
}

impl Slots {
    /// So many at once; 0 means the same as 1.
    pub fn new(at_once: usize) -> Self {
        let queues =
            Queues { all: at_once.max(1), free: at_once.max(1), readers: VecDeque::new(), prefetch: VecDeque::new() };
        Self(Arc::new(Mutex::new(queues)))
    }

    /// Waits for a free one. Dropping the future gives up the place in the queue.
    pub async fn take(&self, class: Class) -> Slot {
        let turn = {
            let mut queues = self.0.lock().unwrap();
            // The last one is for readers, where there is more than one.
            let least = if class == Class::Prefetch && queues.all > 1 { 1 } else { 0 };
            if queues.free > least {
                queues.free -= 1;
                return Slot { of: Some(self.clone()) };
            }
            let (sender, turn) = oneshot::channel();
            match class {
                Class::OnDemand => queues.readers.push_back(sender),
                Class::Prefetch => queues.prefetch.push_back(sender),
            }
            turn
        };
        // The sender stays in the queue until it has sent, and the queue lives as long as `self`.
        turn.await.expect("a waiter is never forgotten")
    }

    fn next(&self) -> Option<oneshot::Sender<Slot>> {
        let mut queues = self.0.lock().unwrap();
        let is_last = queues.all > 1 && queues.free == 0;
        let next = match queues.readers.pop_front() {
            None if !is_last => queues.prefetch.pop_front(),
            reader => reader,
        };
        if next.is_none() {
            queues.free += 1;
        }
        next
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(slots) = self.of.take() else { return };
        while let Some(waiter) = slots.next() {
            match waiter.send(Slot { of: Some(slots.clone()) }) {
                Ok(()) => return,
                // Gone meanwhile; the slot that comes back must not be given on twice.
                Err(mut back) => back.of = None,
            }
        }
    }
}

/// Bytes a second. What readers wait for is counted with the rest, and waits only for what other readers have
/// taken, so that prefetch slows down and they do not.
#[derive(Debug)]
pub struct Rate {
    clock: Clock,
    rate: ByteRate,
    taken: Mutex<Taken>,
}

/// The bytes that have arrived.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    readers: Paid,
    all: Paid,
}

/// How much may come at once after a pause: a window of readers must not be cut in pieces.
const BURST: Duration = Duration::from_millis(100);

impl Rate {
    /// At most so many; 0 means the same as 1.
    pub fn new(bytes_per_second: u64, clock: Clock) -> Self {
        Self { clock, rate: ByteRate::new(bytes_per_second).with_burst(BURST), taken: Mutex::default() }
    }

    /// Counts bytes that have arrived, and waits until the next ones may. Not reading on meanwhile is what
    /// slows the server down.
    pub async fn pay(&self, bytes: u64, class: Class) {
        let until = self.charge(bytes, class);
        if until > self.clock.now() {
            self.clock.sleep_until(until).await;
        }
    }

    /// Counts them, and gives the moment from which the next ones may come.
    fn charge(&self, bytes: u64, class: Class) -> Instant {
        let now = self.clock.now();
        let mut taken = self.taken.lock().unwrap();
        let all = taken.all.charge(self.rate, bytes, now);
        match class {
            Class::Prefetch => all,
            Class::OnDemand => taken.readers.charge(self.rate, bytes, now),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::net::clock::Hand;

    /// Whether the future is done by now.
    fn poll<T>(future: &mut Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => Some(value),
            Poll::Pending => None,
        }
    }

    #[test]
    fn readers_go_before_prefetch_that_waits_longer() {
        let slots = Slots::new(1);
        let first = poll(&mut Box::pin(slots.take(Class::Prefetch))).expect("one is free");
        let mut prefetch = Box::pin(slots.take(Class::Prefetch));
        let mut reader = Box::pin(slots.take(Class::OnDemand));
        assert!(poll(&mut prefetch).is_none() && poll(&mut reader).is_none());

        drop(first);

        assert!(poll(&mut prefetch).is_none());
        let second = poll(&mut reader).expect("its turn");
        drop(second);
        assert!(poll(&mut prefetch).is_some());
    }

    #[test]
    fn prefetch_leaves_one_to_readers() {
        let slots = Slots::new(2);
        let first = poll(&mut Box::pin(slots.take(Class::Prefetch))).expect("one of two is free");
        let mut second = Box::pin(slots.take(Class::Prefetch));
        assert!(poll(&mut second).is_none());
        let reader = poll(&mut Box::pin(slots.take(Class::OnDemand))).expect("the last one is for readers");

        drop(first);
        assert!(poll(&mut second).is_none(), "it would be the last");
        drop(reader);
        assert!(poll(&mut second).is_some());
    }

    #[test]
    fn waiters_that_give_up_lose_no_slot() {
        let slots = Slots::new(1);
        let held = poll(&mut Box::pin(slots.take(Class::OnDemand))).expect("one is free");
        let mut early = Box::pin(slots.take(Class::OnDemand));
        let mut late = Box::pin(slots.take(Class::OnDemand));
        assert!(poll(&mut early).is_none() && poll(&mut late).is_none());

        drop(early);
        drop(held);
        // Given its turn, and gone before it has looked.
        drop(late);

        assert!(poll(&mut Box::pin(slots.take(Class::Prefetch))).is_some());
        assert_eq!(slots.0.lock().unwrap().free, 1);
    }

    #[test]
    fn bytes_come_at_the_rate_after_one_burst() {
        let hand = Hand::new();
        let rate = Rate::new(1000, hand.clock());
        let pass = |ms| hand.pass(Duration::from_millis(ms));
        pass(1000);

        assert!(poll(&mut Box::pin(rate.pay(100, Class::Prefetch))).is_some(), "a burst of 100 ms");
        let mut next = Box::pin(rate.pay(500, Class::Prefetch));
        assert!(poll(&mut next).is_none());
        pass(499);
        assert!(poll(&mut next).is_none());
        pass(1);
        assert!(poll(&mut next).is_some());
    }

    #[test]
    fn readers_do_not_pay_for_prefetch_and_prefetch_pays_for_them() {
        let hand = Hand::new();
        let rate = Rate::new(1000, hand.clock());
        hand.pass(Duration::from_secs(1));

        assert!(poll(&mut Box::pin(rate.pay(10_000, Class::Prefetch))).is_none());
        assert!(poll(&mut Box::pin(rate.pay(100, Class::OnDemand))).is_some());
        assert!(poll(&mut Box::pin(rate.pay(1, Class::OnDemand))).is_none());
        hand.pass(Duration::from_secs(10));
        assert!(poll(&mut Box::pin(rate.pay(0, Class::Prefetch))).is_none(), "101 bytes of readers are counted too");
    }
}
