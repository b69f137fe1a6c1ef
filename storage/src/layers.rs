//! Layers over another store: what they add is the same over a file, a device or memory.
//!
//! | layer | adds |
//! |---|---|
//! | [`Traced`] | a sink that sees every read start and finish |
//! | [`Throttled`] | the speed of a slower device |
//! | [`Faulty`] | errors, short reads, flipped bits, stuck reads, power loss |
//! | [`Reordered`] | a random order of completion |
//!
//! Each holds at most [`MAX_DEPTH`](crate::MAX_DEPTH) reads. What is random is drawn from a seed.

mod faulty;
mod profile;
mod reordered;
mod throttled;
mod traced;

pub use faulty::{FaultCounts, FaultError, FaultPlan, Faulty};
pub use profile::{DeviceProfile, ProfileError};
pub use reordered::Reordered;
#[cfg(feature = "std")]
pub use throttled::StdClock;
pub use throttled::{Clock, ManualClock, Throttled};
pub use traced::{TraceEvent, Traced};

/// SplitMix64 (Steele, Lea and Flood, 2014): one 64-bit word of state, good enough for choosing faults.
#[derive(Clone, Debug)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1; the bias is below 2^-32 for bounds below 2^32.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
