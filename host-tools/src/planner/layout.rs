//! How the extents of an image suit a device, and what would suit it better.

use forebay_storage::layers::DeviceProfile;

use super::Candidate;
use crate::settings::Layout;
use crate::trace::Head;

/// Reads that reach less of the bandwidth are worth a word.
const POOR: f64 = 0.75;
/// A share of the pool that is worth a word.
const MUCH: f64 = 0.08;

/// How reads of the size that `candidate` makes suit `device`.
#[must_use]
pub fn layout(head: &Head, candidate: &Candidate, device: &DeviceProfile) -> Layout {
    let pieces = candidate.room.pieces;
    let (mut lengths, mut count) = (0u64, 0u64);
    for layer in &head.layers {
        lengths += u64::from(layer.units) * layer.bytes(0, layer.levels);
        count += u64::from(layer.units) * if pieces > 1 { u64::from(layer.levels) } else { 1 };
    }
    let piece = lengths as f64 / count.max(1) as f64;
    let slot_waste = 1.0 - piece / candidate.room.slot_len.max(1) as f64;
    let Some(read_bytes) = Some(candidate.prediction).filter(|p| p.reads_per_token > 0.0).map(|p| p.read_bytes())
    else {
        return Layout { pieces, slot_waste, read_efficiency: 1.0, ..Layout::default() };
    };
    // A layer's reads go out together, the next layer's only once they are computed.
    let layers = head.layers.iter().filter(|layer| layer.experts).count().max(1) as f64;
    let together = (candidate.prediction.reads_per_token / layers).max(1.0);
    let transfer = read_bytes / device.bandwidth as f64;
    let latency = device.latency_ns as f64 * 1e-9;
    let command = (device.command_interval_ns() as f64 * 1e-9).max(latency / f64::from(device.queue_depth.max(1)));
    let time = latency + transfer + (together - 1.0) * transfer.max(command);
    let read_efficiency = together * transfer / time;
    let mut advice = Vec::new();
    if read_efficiency < POOR {
        let levels = head.layers.iter().map(|layer| layer.levels).max().unwrap_or(1);
        let what = match pieces > 1 || levels < 2 {
            true => "larger units, or a device of less latency, would make more of it",
            false => "latency, not bandwidth, is what reads wait for",
        };
        advice.push(format!(
            "reads of {:.0} KiB, {together:.1} at once, reach {:.0} % of the device's bandwidth: {what}",
            read_bytes / 1024.0,
            100.0 * read_efficiency
        ));
    }
    if slot_waste > MUCH {
        let what = match pieces > 1 {
            true => "a larger --group makes levels more alike in length",
            false => "units of one length would fill it",
        };
        advice
            .push(format!("{:.0} % of the pool's bytes are empty, because pieces differ: {what}", 100.0 * slot_waste));
    }
    Layout { pieces, read_bytes, read_efficiency, slot_waste, advice }
}
