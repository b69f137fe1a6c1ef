//! CRC-32C (Castagnoli, RFC 3720 appendix B.4), the container's checksum.

#[cfg(not(feature = "std"))]
use crc::{CRC_32_ISCSI, Crc, Digest, Table};

/// Sixteen bytes a step: 16 KiB of constant tables.
#[cfg(not(feature = "std"))]
static CASTAGNOLI: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

/// CRC-32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    let mut digest = Crc32c::new();
    digest.update(bytes);
    digest.finish()
}

/// CRC-32C of bytes that come in pieces: by the processor's own instruction where there is a std to ask whether it has
/// one, else from tables.
#[derive(Clone)]
pub struct Crc32c(#[cfg(feature = "std")] u32, #[cfg(not(feature = "std"))] Digest<'static, u32, Table<16>>);

impl Crc32c {
    /// The digest of no bytes.
    #[must_use]
    pub fn new() -> Self {
        #[cfg(feature = "std")]
        return Self(0);
        #[cfg(not(feature = "std"))]
        Self(CASTAGNOLI.digest())
    }

    /// Appends `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        #[cfg(feature = "std")]
        {
            self.0 = crc32c::crc32c_append(self.0, bytes);
        }
        #[cfg(not(feature = "std"))]
        self.0.update(bytes);
    }

    /// The CRC of everything appended.
    #[must_use]
    pub fn finish(self) -> u32 {
        #[cfg(feature = "std")]
        return self.0;
        #[cfg(not(feature = "std"))]
        self.0.finalize()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

impl core::fmt::Debug for Crc32c {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Crc32c({:#010x})", self.clone().finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_vectors() {
        // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }

    #[test]
    fn pieces_equal_the_whole() {
        let bytes: [u8; 100] = core::array::from_fn(|i| (i * 7) as u8);
        for cut in 0..=bytes.len() {
            let mut digest = Crc32c::new();
            digest.update(&bytes[..cut]);
            digest.update(&bytes[cut..]);
            assert_eq!(digest.finish(), crc32c(&bytes));
        }
    }
}
