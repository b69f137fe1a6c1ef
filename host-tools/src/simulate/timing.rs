//! How long replayed tokens take on a machine and a device.

use forebay_storage::layers::DeviceProfile;

use super::{Counts, Replay, Work};
use crate::trace::Head;

/// What computing takes, seconds.
#[derive(Clone, PartialEq, Debug)]
pub struct Costs {
    /// Of each layer without its units: the operator, norms and router.
    pub layer_s: Vec<f64>,
    /// Of the embedding, the final norm, the output head and whatever the caller does between tokens.
    pub token_s: f64,
    /// Of a byte of a unit that is computed with.
    pub unit_byte_s: f64,
    /// Of a byte of a unit that is read: its checksum, and what the store does with it.
    pub read_byte_s: f64,
    /// From the moment a read has finished to the moment a waiting thread goes on.
    pub wake_s: f64,
}

impl Costs {
    /// A token's computing time `token_s`, all units resident, shared out by the bytes that each part reads.
    /// `resident` are the bytes of each layer's own tensors, `outside` those of the tensors that no layer has. Reading
    /// costs nothing yet.
    #[must_use]
    pub fn share(head: &Head, resident: &[u64], outside: u64, token_s: f64) -> Self {
        let used = |layer: &crate::trace::Layer| u64::from(layer.top_k) * layer.bytes(0, layer.levels);
        let units: u64 = head.layers.iter().map(used).sum();
        let all = (units + resident.iter().sum::<u64>() + outside) as f64;
        let byte_s = token_s / all.max(1.0);
        Self {
            layer_s: resident.iter().map(|bytes| *bytes as f64 * byte_s).collect(),
            token_s: outside as f64 * byte_s,
            unit_byte_s: byte_s,
            read_byte_s: 0.0,
            wake_s: 0.0,
        }
    }
}

/// What computing takes, as measured.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct MeasuredCosts {
    /// Seconds of a token with everything resident.
    pub token_s: f64,
    /// Seconds of computing that a byte read costs.
    pub read_byte_s: f64,
    /// Seconds from the end of a read to the moment a waiting thread goes on.
    pub wake_s: f64,
}

/// What is foreseen.
#[derive(Clone, Copy, PartialEq, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct Prediction {
    /// Tokens a second.
    pub tok_s: f64,
    /// Bytes of units read for a token.
    pub bytes_per_token: f64,
    /// Reads for a token.
    pub reads_per_token: f64,
    /// Share of experts' uses for which nothing was read.
    pub hit_rate: f64,
    /// Share of the time that is spent waiting for the device.
    pub stall_share: f64,
    /// Seconds of the slowest of the trace's tokens if everything that it uses had to be read.
    pub worst_token_s: f64,
    /// Bytes that such a token reads.
    pub worst_token_bytes: u64,
}

impl Prediction {
    /// Bytes of the mean read; 0 if there are none.
    #[must_use]
    pub fn read_bytes(&self) -> f64 {
        if self.reads_per_token > 0.0 { self.bytes_per_token / self.reads_per_token } else { 0.0 }
    }
}

/// The device and the engine's clock.
struct Machine<'p> {
    device: &'p DeviceProfile,
    costs: &'p Costs,
    depth: usize,
    now: f64,
    next_command: f64,
    bus_free: f64,
    stalled: f64,
}

impl Machine<'_> {
    /// When a read of `len` bytes that is submitted at `at` is done.
    fn read(&mut self, at: f64, len: f64) -> f64 {
        let command = at.max(self.next_command);
        self.next_command = command + self.device.command_interval_ns() as f64 * 1e-9;
        let data = command + self.device.latency_ns as f64 * 1e-9;
        self.bus_free = data.max(self.bus_free) + len / self.device.bandwidth as f64;
        self.bus_free
    }

    fn wait(&mut self, until: f64) {
        if until > self.now {
            let until = until + self.costs.wake_s;
            self.stalled += until - self.now;
            self.now = until;
        }
    }

    fn layer(&mut self, work: &Work, layer_s: f64) {
        let Costs { unit_byte_s, read_byte_s, .. } = *self.costs;
        if work.ahead_bytes > 0 {
            // Begun while the layer before computed.
            let due = self.read(self.now, work.ahead_bytes as f64);
            self.now += layer_s;
            self.wait(due);
            self.now += work.ahead_bytes as f64 * read_byte_s;
        } else {
            self.now += layer_s;
        }
        let unit_s = work.used_bytes as f64 / f64::from(work.units.max(1)) * unit_byte_s;
        let Counts { misses, reads, bytes, .. } = work.counts;
        let read_bytes = bytes as f64 / reads.max(1) as f64;
        let mut due: Vec<f64> = Vec::with_capacity(reads as usize);
        for i in 0..reads as usize {
            let at = i.checked_sub(self.depth).map_or(self.now, |before| due[before].max(self.now));
            due.push(self.read(at, read_bytes));
        }
        self.now += (u64::from(work.units).saturating_sub(misses)) as f64 * unit_s;
        let mut taken = 0;
        for miss in 1..=misses {
            let last = (miss * reads).div_ceil(misses);
            if let Some(last) = last.checked_sub(1) {
                self.wait(due[last as usize]);
            }
            self.now += unit_s + (last - taken) as f64 * read_bytes * read_byte_s;
            taken = last;
        }
    }
}

/// The same work if nothing of it had been in the pool.
fn all_missed(work: &Work) -> Work {
    let units = u64::from(work.units);
    let counts = Counts { hits: 0, misses: units, reads: units, bytes: work.used_bytes };
    Work { counts, ahead_bytes: 0, ..*work }
}

/// What the single tokens of `replay` from pass `from` on take. At most `depth` reads are in flight at once.
#[must_use]
pub fn predict(
    head: &Head,
    replay: &Replay,
    from: usize,
    costs: &Costs,
    device: &DeviceProfile,
    depth: usize,
) -> Prediction {
    let machine = || Machine {
        device,
        costs,
        depth: depth.min(device.queue_depth.into()).max(1),
        now: 0.0,
        next_command: 0.0,
        bus_free: 0.0,
        stalled: 0.0,
    };
    let pass = |machine: &mut Machine<'_>, works: &[Work]| {
        for (work, layer_s) in works.iter().zip(&costs.layer_s) {
            machine.layer(work, *layer_s);
        }
        machine.now += costs.token_s;
    };
    let mut run = machine();
    let mut tokens = 0u32;
    let mut sum = Counts::default();
    let mut experts = Counts::default();
    let (mut worst_token_s, mut worst_token_bytes) = (0.0f64, 0);
    for (works, _) in replay.passes.iter().zip(&replay.tokens).skip(from).filter(|(_, tokens)| **tokens == 1) {
        pass(&mut run, works);
        tokens += 1;
        let missed: Vec<Work> = works.iter().map(all_missed).collect();
        let mut slowest = machine();
        pass(&mut slowest, &missed);
        worst_token_s = worst_token_s.max(slowest.now);
        worst_token_bytes = worst_token_bytes.max(missed.iter().map(|work| work.counts.bytes).sum());
        for (work, layer) in works.iter().zip(&head.layers) {
            sum.add(&work.counts);
            sum.bytes += work.ahead_bytes;
            if layer.experts {
                experts.add(&work.counts);
            }
        }
    }
    let per_token = |n: u64| n as f64 / f64::from(tokens.max(1));
    Prediction {
        tok_s: if run.now > 0.0 { f64::from(tokens) / run.now } else { 0.0 },
        bytes_per_token: per_token(sum.bytes),
        reads_per_token: per_token(sum.reads),
        hit_rate: experts.hit_rate(),
        stall_share: if run.now > 0.0 { run.stalled / run.now } else { 0.0 },
        worst_token_s,
        worst_token_bytes,
    }
}
