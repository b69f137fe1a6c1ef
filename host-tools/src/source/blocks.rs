//! Element types of source tensors, and their exact values.
//!
//! The block formats are GGML's (`ggml-common.h` and `ggml-quants.c` of github.com/ggml-org/ggml), computed in
//! binary32 in the order GGML computes them, so that every value is the one llama.cpp sees.

use half::{bf16, f16};

/// Element type of a source tensor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[expect(missing_docs, reason = "the names of the formats themselves")]
pub enum DType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Tq1,
    Tq2,
}

impl DType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Tq1,
        Self::Tq2,
    ];

    /// Name in GGUF and safetensors.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Tq1 => "TQ1_0",
            Self::Tq2 => "TQ2_0",
        }
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Elements a block; 1 for floats.
    pub const fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            _ => 256,
        }
    }

    /// Bytes a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Tq1 => 54,
            Self::Tq2 => 66,
        }
    }
}

/// The half-precision number at `at`.
pub(crate) fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Decodes `raw`, whole blocks of `dtype`, into `out`.
///
/// `out` has one element for every element of `raw`.
pub fn dequantise(dtype: DType, raw: &[u8], out: &mut [f32]) {
    debug_assert_eq!(raw.len() / dtype.bytes() * dtype.block(), out.len());
    let blocks = raw.chunks_exact(dtype.bytes()).zip(out.chunks_exact_mut(dtype.block()));
    match dtype {
        DType::F32 => blocks.for_each(|(b, y)| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::F16 => blocks.for_each(|(b, y)| y[0] = half_at(b, 0).to_f32()),
        DType::Bf16 => blocks.for_each(|(b, y)| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        DType::Q4_0 => blocks.for_each(|(b, y)| q4(b, 2, -8.0, 0.0, y)),
        DType::Q4_1 => blocks.for_each(|(b, y)| q4(b, 4, 0.0, half_at(b, 2).to_f32(), y)),
        DType::Q5_0 => blocks.for_each(|(b, y)| q5(b, 2, -16.0, 0.0, y)),
        DType::Q5_1 => blocks.for_each(|(b, y)| q5(b, 4, 0.0, half_at(b, 2).to_f32(), y)),
        DType::Q8_0 => blocks.for_each(|(b, y)| {
            let d = half_at(b, 0).to_f32();
            for (y, &q) in y.iter_mut().zip(&b[2..]) {
                *y = d * f32::from(q as i8);
            }
        }),
        DType::Q2K => blocks.for_each(|(b, y)| q2_k(b, y)),
        DType::Q3K => blocks.for_each(|(b, y)| q3_k(b, y)),
        DType::Q4K => blocks.for_each(|(b, y)| q45_k(b, None, &b[16..], y)),
        DType::Q5K => blocks.for_each(|(b, y)| q45_k(b, Some(&b[16..48]), &b[48..], y)),
        DType::Q6K => blocks.for_each(|(b, y)| q6_k(b, y)),
        DType::Tq1 => blocks.for_each(|(b, y)| tq1(b, y)),
        DType::Tq2 => blocks.for_each(|(b, y)| tq2(b, y)),
    }
}

fn q4(b: &[u8], codes: usize, zero: f32, minimum: f32, y: &mut [f32]) {
    let d = half_at(b, 0).to_f32();
    for j in 0..16 {
        let q = b[codes + j];
        y[j] = (f32::from(q & 15) + zero) * d + minimum;
        y[j + 16] = (f32::from(q >> 4) + zero) * d + minimum;
    }
}

fn q5(b: &[u8], high: usize, zero: f32, minimum: f32, y: &mut [f32]) {
    let d = half_at(b, 0).to_f32();
    let bits = u32::from_le_bytes([b[high], b[high + 1], b[high + 2], b[high + 3]]);
    for j in 0..16 {
        let q = b[high + 4 + j];
        let low = q & 15 | ((bits >> j & 1) << 4) as u8;
        let top = q >> 4 | ((bits >> (j + 16) & 1) << 4) as u8;
        y[j] = (f32::from(low) + zero) * d + minimum;
        y[j + 16] = (f32::from(top) + zero) * d + minimum;
    }
}

fn q2_k(b: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(b, 80).to_f32(), half_at(b, 82).to_f32());
    for (i, y) in y.iter_mut().enumerate() {
        let (half, shift, l) = (i / 128, i % 128 / 32 * 2, i % 32);
        let scale = b[i / 16];
        let code = b[16 + half * 32 + l] >> shift & 3;
        *y = d * f32::from(scale & 15) * f32::from(code) - dmin * f32::from(scale >> 4);
    }
}

fn q3_k(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 108).to_f32();
    let packed = &b[96..108];
    for (i, y) in y.iter_mut().enumerate() {
        let (half, shift, l) = (i / 128, i % 128 / 32 * 2, i % 32);
        let s = i / 16;
        // Sixteen 6-bit scales: the low nibbles in 8 bytes, the high pairs in 4.
        let low = packed[s % 8] >> (s / 8 * 4) & 15;
        let high = packed[8 + s % 4] >> (s / 4 * 2) & 3;
        let scale = i32::from(low | high << 4) - 32;
        let code = i32::from(b[32 + half * 32 + l] >> shift & 3);
        let borrow = if b[l] >> (half * 4 + shift / 2) & 1 == 1 { 0 } else { 4 };
        *y = d * scale as f32 * (code - borrow) as f32;
    }
}

/// Q4_K, and Q5_K with its fifth bits in `high`.
fn q45_k(b: &[u8], high: Option<&[u8]>, low: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(b, 0).to_f32(), half_at(b, 2).to_f32());
    let s = &b[4..16];
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = if j < 4 {
            (s[j] & 63, s[j + 4] & 63)
        } else {
            (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
        };
        let (scale, minimum) = (d * f32::from(scale), dmin * f32::from(minimum));
        for (l, y) in y.iter_mut().enumerate() {
            let nibble = low[j / 2 * 32 + l] >> (j % 2 * 4) & 15;
            let fifth = high.map_or(0, |h| h[l] >> j & 1);
            *y = scale * f32::from(nibble | fifth << 4) - minimum;
        }
    }
}

fn q6_k(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 208).to_f32();
    for (i, y) in y.iter_mut().enumerate() {
        let (half, part, l) = (i / 128, i % 128 / 32, i % 32);
        let low = b[half * 64 + part % 2 * 32 + l] >> (part / 2 * 4) & 15;
        let high = b[128 + half * 32 + l] >> (part * 2) & 3;
        let scale = b[192 + i / 16] as i8;
        *y = d * f32::from(scale) * f32::from((low | high << 4) as i8 - 32);
    }
}

/// TQ1_0: five ternary digits a byte, in 32 and then 16 bytes, and four in the last 4. A byte is the digits' fraction of
/// 3^5 in 256ths, rounded up, so that the leading digit is the upper part of three times it.
fn tq1(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 52).to_f32();
    let (first, rest) = y.split_at_mut(160);
    let (second, last) = rest.split_at_mut(80);
    for (bytes, y) in [(&b[..32], first), (&b[32..48], second), (&b[48..52], last)] {
        for (digit, y) in y.chunks_exact_mut(bytes.len()).enumerate() {
            for (y, byte) in y.iter_mut().zip(bytes) {
                let shifted = byte.wrapping_mul(3u8.pow(digit as u32));
                *y = (f32::from(((u16::from(shifted) * 3) >> 8) as u8) - 1.0) * d;
            }
        }
    }
}

/// TQ2_0: four ternary digits a byte.
fn tq2(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 64).to_f32();
    for (i, y) in y.iter_mut().enumerate() {
        let code = b[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
        *y = (f32::from(code) - 1.0) * d;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packed as `quantize_row_tq1_0_ref` and `quantize_row_tq2_0_ref` of GGML pack them.
    #[test]
    fn ternary_blocks_hold_their_digits() {
        let mut state = 7u32;
        let trits: [u8; 256] = core::array::from_fn(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8 % 3
        });
        let d = f16::from_f32(0.37);
        let mut one = Vec::new();
        for (at, bytes, digits) in [(0, 32, 5), (160, 16, 5), (240, 4, 4)] {
            for m in 0..bytes {
                let mut q = (0..digits).fold(0u16, |q, n| 3 * q + u16::from(trits[at + n * bytes + m]));
                if digits == 4 {
                    q *= 3;
                }
                one.push(((q * 256).div_ceil(243)) as u8);
            }
        }
        let mut two = vec![0; 64];
        for (i, trit) in trits.iter().enumerate() {
            two[i / 128 * 32 + i % 32] |= trit << (i % 128 / 32 * 2);
        }
        for (dtype, mut block) in [(DType::Tq1, one), (DType::Tq2, two)] {
            block.extend(d.to_le_bytes());
            assert_eq!(block.len(), dtype.bytes());
            let mut values = [0.0; 256];
            dequantise(dtype, &block, &mut values);
            for (value, trit) in values.iter().zip(trits) {
                assert_eq!(*value, (f32::from(trit) - 1.0) * d.to_f32(), "{dtype:?}");
            }
        }
    }
}
