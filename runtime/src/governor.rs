//! The governor of [`crate::policy::Loading::Deadline`]: from what tokens took to what the next one may read.
//!
//! It reads no clock: the driver tells it how long a token took, how much of that was waiting for the store, and what
//! was read. A token's time is modelled as computing plus reading, `t = c + bytes / rate`.

/// How much the latest token counts in what is known of computing and reading.
const GAIN: f64 = 0.25;
/// Share of the budget that is planned with: what is known of computing and reading is known from the past.
const PLANNED: f64 = 0.95;

/// What a token may read so that it keeps within its time.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Governor {
    budget_us: f64,
    /// Time of a token apart from waiting for reads.
    compute_us: f64,
    /// Bytes a microsecond; 0 until something was read.
    rate: f64,
    /// Tokens that took longer than the budget.
    late: u64,
    tokens: u64,
}

impl Governor {
    /// A governor for tokens of `budget_us` microseconds, on a device of about `rate` bytes a second; 0 if that is not
    /// known, and then the first token reads freely and tells.
    pub fn new(budget_us: f64, rate: f64) -> Self {
        Self { budget_us, compute_us: 0.0, rate: rate / 1e6, late: 0, tokens: 0 }
    }

    /// Bytes that the next token may read.
    pub fn allowance(&self) -> u64 {
        if self.rate <= 0.0 {
            return u64::MAX;
        }
        ((PLANNED * self.budget_us - self.compute_us).max(0.0) * self.rate) as u64
    }

    /// A token took `elapsed_us`, of which `waited_us` were spent waiting for reads of `bytes` in all.
    pub fn observe(&mut self, elapsed_us: f64, waited_us: f64, bytes: u64) {
        let blend = |known: f64, seen: f64| if known > 0.0 { known + GAIN * (seen - known) } else { seen };
        self.compute_us = blend(self.compute_us, (elapsed_us - waited_us).max(1.0));
        // Reads go on while something is computed, so a rate is at least what the whole time shows, and waiting alone
        // shows it only where there was any.
        if bytes > 0 && waited_us > 0.0 {
            self.rate = blend(self.rate, bytes as f64 / waited_us.max(1.0));
        }
        self.tokens += 1;
        self.late += u64::from(elapsed_us > self.budget_us);
    }

    /// Tokens that took longer than the budget, and all tokens.
    pub fn late(&self) -> (u64, u64) {
        (self.late, self.tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device of 100 bytes a microsecond, computing that takes 1 ms, tokens of 5 ms.
    #[test]
    fn it_comes_to_rest_within_the_budget() {
        for first in [0.0, 20e6, 500e6] {
            let mut governor = Governor::new(5_000.0, first);
            let mut took = 0.0;
            for _ in 0..60 {
                let bytes = governor.allowance().min(10_000_000);
                let waited = bytes as f64 / 100.0;
                took = 1_000.0 + waited;
                governor.observe(took, waited, bytes);
            }
            assert!((4_500.0..5_000.0).contains(&took), "a token takes {took} us of 5000");
            assert!(governor.late().0 < 30, "{:?}", governor.late());
        }
    }

    #[test]
    fn computing_alone_that_takes_too_long_leaves_nothing_to_read() {
        let mut governor = Governor::new(500.0, 100e6);
        governor.observe(1_000.0, 0.0, 0);
        assert_eq!(governor.allowance(), 0);
        assert_eq!(governor.late(), (1, 1));
    }
}
