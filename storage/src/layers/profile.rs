//! How fast a storage device is.

use core::str::FromStr;

/// Speed of a device, as [`Throttled`](super::Throttled) models it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DeviceProfile {
    /// Bytes a second on the bus; at least 1.
    pub bandwidth: u64,
    /// From a command to its first byte, nanoseconds.
    pub latency_ns: u64,
    /// Commands a second; 0: no limit of its own.
    pub iops: u32,
    /// Reads the device works on at once; at least 1.
    pub queue_depth: u16,
}

/// Why a description of a device was not understood.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum ProfileError {
    /// Neither a known name nor `key=value` pairs.
    #[error("no device of that name, and not a list such as bw=400MB/s,lat=120us,iops=20k,qd=8")]
    UnknownDevice,
    /// A key other than bw, lat, iops, qd, or one that comes twice.
    #[error("keys are bw, lat, iops and qd, each once")]
    Key,
    /// A value that is not what its key takes.
    #[error("{key}: expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// What it takes.
        expected: &'static str,
    },
    /// There is no bandwidth.
    #[error("bw is missing")]
    NoBandwidth,
}

const MB: u64 = 1_000_000;

/// What is commonly reached for large reads on such a device, from the interfaces' standards (SD, JEDEC eMMC 5.1
/// and UFS, PCIe lanes, SPI clock times width) less their usual overhead, vendors' data sheets and published
/// benchmarks. They stand for a class: measure the device at hand for anything that matters.
const DEVICES: &[(&str, DeviceProfile)] = &[
    // Default-speed high-speed SD, 4 bits at 50 MHz: 25 MB/s on the wire.
    ("sd-hs", device(22 * MB, 600_000, 1_500, 1)),
    // UHS-I DDR50 (the Raspberry Pi 4's card slot): 50 MB/s on the wire; random reads as of an A1 card.
    ("pi4-sd", device(45 * MB, 350_000, 2_500, 1)),
    // UHS-I SDR104 (the Raspberry Pi 5's card slot): 104 MB/s on the wire.
    ("pi5-sd", device(88 * MB, 250_000, 4_000, 1)),
    // A SATA SSD behind a UASP bridge on the Raspberry Pi 4's USB 3.
    ("pi4-usb3-ssd", device(360 * MB, 180_000, 22_000, 8)),
    // PCIe 2.0, one lane: 500 MB/s on the wire.
    ("pi5-nvme", device(430 * MB, 90_000, 90_000, 32)),
    // PCIe 3.0, one lane: 985 MB/s on the wire.
    ("pi5-nvme-gen3", device(830 * MB, 85_000, 150_000, 32)),
    // eMMC 5.1 HS400: 400 MB/s on the wire.
    ("emmc-hs400", device(300 * MB, 180_000, 10_000, 1)),
    // UFS 3.1, two lanes of HS-G4.
    ("ufs-3.1", device(2_000 * MB, 110_000, 100_000, 32)),
    // UFS 4.0, two lanes of HS-G5; vendors announce 4,200 MB/s.
    ("ufs-4.0", device(4_000 * MB, 90_000, 150_000, 32)),
    // PCIe 3.0, four lanes.
    ("nvme-gen3", device(3_400 * MB, 80_000, 400_000, 64)),
    // PCIe 4.0, four lanes.
    ("nvme-gen4", device(7_000 * MB, 60_000, 900_000, 64)),
    // SPI NOR, one bit at 50 MHz; 40 clocks of command, address and dummy cycles.
    ("spi-nor", device(6_250_000, 800, 0, 1)),
    // Quad SPI NOR, four bits at 133 MHz.
    ("qspi-nor", device(66_500_000, 200, 0, 1)),
];

const fn device(bandwidth: u64, latency_ns: u64, iops: u32, queue_depth: u16) -> DeviceProfile {
    DeviceProfile { bandwidth, latency_ns, iops, queue_depth }
}

impl DeviceProfile {
    /// The device of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        DEVICES.iter().find(|(known, _)| *known == name).map(|&(_, profile)| profile)
    }

    /// Names that [`by_name`](Self::by_name) knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        DEVICES.iter().map(|(name, _)| *name)
    }

    /// Nanoseconds that `len` bytes take on the bus, rounded up.
    #[must_use]
    pub fn transfer_ns(&self, len: u64) -> u64 {
        let ns = (u128::from(len) * 1_000_000_000).div_ceil(u128::from(self.bandwidth.max(1)));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Least nanoseconds between two commands.
    #[must_use]
    pub fn command_interval_ns(&self) -> u64 {
        match self.iops {
            0 => 0,
            iops => 1_000_000_000_u64.div_ceil(iops.into()),
        }
    }
}

impl FromStr for DeviceProfile {
    type Err = ProfileError;

    /// A name, or `bw=400MB/s,lat=120us,iops=20k,qd=8`. Only `bw` is needed: the others are no latency, no limit of
    /// commands, and one read at once.
    fn from_str(text: &str) -> Result<Self, ProfileError> {
        if let Some(profile) = Self::by_name(text) {
            return Ok(profile);
        }
        let (mut bandwidth, mut latency, mut iops, mut depth) = (None, None, None, None);
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').ok_or(ProfileError::UnknownDevice)?;
            let (key, slot, units, max, expected): (_, &mut Option<u64>, &[(&str, f64)], f64, _) = match key.trim() {
                "bw" => ("bw", &mut bandwidth, RATES, 1e15, "a rate such as 400MB/s"),
                "lat" => ("lat", &mut latency, TIMES, 1e13, "a time such as 120us"),
                "iops" => ("iops", &mut iops, COUNTS, 4e9, "a count such as 20k"),
                "qd" => ("qd", &mut depth, ONE, 65_535.0, "a count from 1 to 65535"),
                _ => return Err(ProfileError::Key),
            };
            let number = quantity(value.trim(), units)
                .filter(|number| *number <= max && (key == "lat" || *number >= 1.0))
                .ok_or(ProfileError::Value { key, expected })?;
            if slot.replace(number as u64).is_some() {
                return Err(ProfileError::Key);
            }
        }
        Ok(Self {
            bandwidth: bandwidth.ok_or(ProfileError::NoBandwidth)?,
            latency_ns: latency.unwrap_or(0),
            iops: iops.unwrap_or(0) as u32,
            queue_depth: depth.unwrap_or(1) as u16,
        })
    }
}

const ONE: &[(&str, f64)] = &[("", 1.0)];
const COUNTS: &[(&str, f64)] = &[("k", 1e3), ("M", 1e6), ("", 1.0)];
const RATES: &[(&str, f64)] = &[
    ("KiB/s", 1024.0),
    ("MiB/s", 1024.0 * 1024.0),
    ("GiB/s", 1024.0 * 1024.0 * 1024.0),
    ("kB/s", 1e3),
    ("MB/s", 1e6),
    ("GB/s", 1e9),
    ("B/s", 1.0),
];
const TIMES: &[(&str, f64)] = &[("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)];

/// A number with one of the units, first match first; finite and not negative.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (number, scale) = units.iter().find_map(|&(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
    let value = number.trim().parse::<f64>().ok()? * scale;
    (value.is_finite() && value >= 0.0).then_some(value)
}
