use crate::base::Class;

/// Bytes of memory that fetched windows may hold at the same time.
///
/// Pure arithmetic: whoever owns it provides the lock and the queue. A refusal is never a wait.
#[derive(Debug)]
pub(super) struct Budget {
    total: u64,
    /// The part of `total` that only on-demand windows may use.
    reserve: u64,
    used: u64,
}

impl Budget {
    pub(super) fn new(total: u64, reserve: u64) -> Self {
        Self { total, reserve: reserve.min(total), used: 0 }
    }

    /// Takes `bytes` for a window of `class`, if there is room.
    ///
    /// A window larger than everything it may ever have still goes when it is alone; otherwise it
    /// would wait for ever.
    #[must_use]
    pub(super) fn try_take(&mut self, class: Class, bytes: u64) -> bool {
        let limit = match class {
            Class::OnDemand => self.total,
            Class::Prefetch => self.total - self.reserve,
        };
        let fits = self.used == 0 || self.used.saturating_add(bytes) <= limit;
        if fits {
            self.used += bytes;
        }
        fits
    }

    /// Gives back what [`Budget::try_take`] took.
    pub(super) fn give_back(&mut self, bytes: u64) {
        self.used = self.used.checked_sub(bytes).expect("only what was taken is given back");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetch_never_touches_the_reserve() {
        let mut budget = Budget::new(100, 40);

        assert!(budget.try_take(Class::Prefetch, 60));
        assert!(!budget.try_take(Class::Prefetch, 1));
        assert!(budget.try_take(Class::OnDemand, 40));
        assert!(!budget.try_take(Class::OnDemand, 1));

        budget.give_back(60);
        assert!(!budget.try_take(Class::Prefetch, 30), "40 of 60 are in use");
        assert!(budget.try_take(Class::Prefetch, 20));
    }

    #[test]
    fn a_window_larger_than_the_budget_goes_alone() {
        let mut budget = Budget::new(100, 40);

        assert!(budget.try_take(Class::Prefetch, 500));
        assert!(!budget.try_take(Class::OnDemand, 1));

        budget.give_back(500);
        assert!(budget.try_take(Class::OnDemand, 1));
        assert!(!budget.try_take(Class::OnDemand, 500));
    }
}
