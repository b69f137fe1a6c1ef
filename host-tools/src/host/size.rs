//! Numbers of bytes as people write them.

use std::str::FromStr;

/// A number of bytes, and how it was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Size {
    /// Bytes.
    pub bytes: u64,
    /// As it was written.
    pub text: String,
}

/// Units, longest first. As everywhere: `MB` is 10^6; `MiB`, and `M` alone, 2^20.
const UNITS: [(&str, u64); 13] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("K", 1 << 10),
    ("M", 1 << 20),
    ("G", 1 << 30),
    ("T", 1 << 40),
    ("B", 1),
];

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no size; expected bytes, or a number with a unit such as 64M, 2G, 512KiB");
        let trimmed = text.trim();
        let unit = UNITS.iter().find(|(unit, _)| {
            trimmed.len() >= unit.len()
                && trimmed.is_char_boundary(trimmed.len() - unit.len())
                && trimmed[trimmed.len() - unit.len()..].eq_ignore_ascii_case(unit)
        });
        let (number, scale) =
            unit.map_or((trimmed, 1), |(unit, scale)| (&trimmed[..trimmed.len() - unit.len()], *scale));
        let number = number.trim();
        let bytes = match number.parse::<u64>() {
            Ok(whole) => whole.checked_mul(scale).ok_or_else(wrong)?,
            Err(_) => {
                let value = number.parse::<f64>().map_err(|_| wrong())? * scale as f64;
                if !(0.0..1e18).contains(&value) {
                    return Err(wrong());
                }
                value as u64
            }
        };
        Ok(Self { bytes, text: text.to_owned() })
    }
}

/// Bytes in the binary unit that suits them.
pub fn bytes_text(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", value / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.2} MiB", value / 1_048_576.0),
        _ => format!("{:.2} GiB", value / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let bytes = |text: &str| text.parse::<Size>().map(|size| size.bytes).ok();
        assert_eq!(bytes("4096"), Some(4096));
        assert_eq!(bytes("64M"), Some(64 << 20));
        assert_eq!(bytes("64m"), Some(64 << 20));
        assert_eq!(bytes("2G"), Some(2 << 30));
        assert_eq!(bytes("512KiB"), Some(512 << 10));
        assert_eq!(bytes("1.5 MiB"), Some(3 << 19));
        assert_eq!(bytes("10MB"), Some(10_000_000));
        for wrong in ["", "M", "-1", "5X", "1e99", "nan", "99999999999999T", "µ"] {
            assert_eq!(bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(bytes_text(1023), "1023 B");
        assert_eq!(bytes_text(1536), "1.5 KiB");
        assert_eq!(bytes_text(5 << 20), "5.00 MiB");
        assert_eq!(bytes_text(3 << 30), "3.00 GiB");
    }
}
