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
    /// Of a byte of a unit: its checksum is not told apart.
    pub unit_byte_s: f64,
}

impl Costs {
    /// A token's computing time `token_s`, all units resident, shared out by the bytes that each part reads.
    /// `resident` are the bytes of each layer's own tensors, `outside` those of the tensors that no layer has.
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
        }
    }
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
    /// Seconds of a token all of whose experts have to be read.
    pub worst_token_s: f64,
}

/// The device and the engine's clock.
struct Machine<'p> {
    device: &'p DeviceProfile,
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
            self.stalled += until - self.now;
            self.now = until;
        }
    }

    fn layer(&mut self, work: &Work, layer_s: f64, unit_byte_s: f64) {
        if work.ahead_bytes > 0 {
            // Begun while the layer before computed.
            let due = self.read(self.now, work.ahead_bytes as f64);
            self.now += layer_s;
            self.wait(due);
        } else {
            self.now += layer_s;
        }
        let unit_s = work.used_bytes as f64 / f64::from(work.units.max(1)) * unit_byte_s;
        let Counts { misses, reads, bytes, .. } = work.counts;
        let mut due: Vec<f64> = Vec::with_capacity(reads as usize);
        for i in 0..reads as usize {
            let at = i.checked_sub(self.depth).map_or(self.now, |before| due[before].max(self.now));
            due.push(self.read(at, bytes as f64 / reads as f64));
        }
        self.now += (u64::from(work.units).saturating_sub(misses)) as f64 * unit_s;
        for miss in 1..=misses {
            if let Some(last) = (miss * reads).div_ceil(misses).checked_sub(1) {
                self.wait(due[last as usize]);
            }
            self.now += unit_s;
        }
    }
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
        depth: depth.min(device.queue_depth.into()).max(1),
        now: 0.0,
        next_command: 0.0,
        bus_free: 0.0,
        stalled: 0.0,
    };
    let pass = |machine: &mut Machine<'_>, works: &[Work]| {
        for (work, layer_s) in works.iter().zip(&costs.layer_s) {
            machine.layer(work, *layer_s, costs.unit_byte_s);
        }
        machine.now += costs.token_s;
    };
    let mut run = machine();
    let mut tokens = 0u32;
    let mut sum = Counts::default();
    let mut experts = Counts::default();
    for (works, _) in replay.passes.iter().zip(&replay.tokens).skip(from).filter(|(_, tokens)| **tokens == 1) {
        pass(&mut run, works);
        tokens += 1;
        for (work, layer) in works.iter().zip(&head.layers) {
            sum.add(&work.counts);
            sum.bytes += work.ahead_bytes;
            if layer.experts {
                experts.add(&work.counts);
            }
        }
    }
    let worst: Vec<Work> = head
        .layers
        .iter()
        .map(|layer| {
            let (units, bytes) = (u64::from(layer.top_k), layer.bytes(0, layer.levels));
            let misses = if layer.experts { units } else { 0 };
            let counts = Counts { hits: units - misses, misses, reads: misses, bytes: misses * bytes };
            Work { units: units as u32, used_bytes: units * bytes, counts, ahead_bytes: 0 }
        })
        .collect();
    let mut slowest = machine();
    pass(&mut slowest, &worst);
    let per_token = |n: u64| n as f64 / f64::from(tokens.max(1));
    Prediction {
        tok_s: if run.now > 0.0 { f64::from(tokens) / run.now } else { 0.0 },
        bytes_per_token: per_token(sum.bytes),
        reads_per_token: per_token(sum.reads),
        hit_rate: experts.hit_rate(),
        stall_share: if run.now > 0.0 { run.stalled / run.now } else { 0.0 },
        worst_token_s: slowest.now,
    }
}
