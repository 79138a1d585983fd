//! How often a second request may be sent beside one that is slow.

use std::sync::Mutex;

/// How many second requests may be sent: one for twenty first ones, and a few in a row.
#[derive(Debug)]
pub(super) struct HedgeBudget(Mutex<u32>);

impl HedgeBudget {
    /// Twentieths that one hedge costs.
    const COST: u32 = 20;
    const MOST: u32 = 10 * Self::COST;

    pub(super) fn new() -> Self {
        Self(Mutex::new(Self::COST))
    }

    /// A first request was sent.
    pub(super) fn earn(&self) {
        let mut left = self.0.lock().unwrap();
        *left = (*left + 1).min(Self::MOST);
    }

    /// Whether a second one may be.
    pub(super) fn spend(&self) -> bool {
        let mut left = self.0.lock().unwrap();
        let rest = left.checked_sub(Self::COST);
        rest.is_some_and(|rest| {
            *left = rest;
            true
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_requests_are_one_in_twenty_at_most() {
        let budget = HedgeBudget::new();
        let sent = (0..2000).filter(|_| {
            budget.earn();
            budget.spend()
        });
        assert_eq!(sent.count(), 101);
    }
}
