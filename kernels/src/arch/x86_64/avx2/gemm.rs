//! The product of a row block with many tokens. A piece of K is brought to one byte a weight once, whatever the
//! fields, and multiplied with all tokens before the next piece: four tokens and 16 rows at a time, so that sums,
//! weights and activations stay in registers.

use super::{broadcast, load, loads};
use crate::activations::{Acts, TokenActs};
use crate::reference::quant::QuantBlock;
use crate::weights::ROW_BLOCK;
use core::arch::x86_64::*;
use core::mem::MaybeUninit;

/// Most K brought to bytes at a time: 20 KiB, which a first-level cache holds beside the activations of a tile.
const K_PIECE: usize = 640;
/// Most groups in a piece.
const GROUPS: usize = K_PIECE / 32;
/// Tokens whose sums are kept while K is walked through: 8 KiB.
const TOKENS: usize = 64;
/// Fewest tokens that bringing the weights to bytes pays for.
pub(super) const MIN_TOKENS: usize = 4;

#[repr(align(64))]
struct Scratch {
    /// `[K/4][32 rows][4 K]`.
    codes: MaybeUninit<[u8; ROW_BLOCK * K_PIECE]>,
    /// Of each group 32 scales and, if affine, 32 minima.
    scales: MaybeUninit<[f32; 2 * ROW_BLOCK * GROUPS]>,
}

/// A piece of K of a row block, ready for the products.
struct Piece {
    /// `[K/4][32 rows][4 K]`: unsigned codes, or signed bytes.
    codes: *const u8,
    /// As in [`Scratch`].
    scales: *const f32,
    /// K per group.
    len: usize,
    groups: usize,
    affine: bool,
    signed: bool,
    /// Unsigned codes only: K that sums of 16 bits can hold, and how many such runs a group has.
    run: usize,
    runs: usize,
    /// What sums are multiplied by, and what is added for each activation.
    double: i32,
    offset: i32,
}

/// What the groups of a piece need to know about a token.
#[derive(Clone, Copy)]
struct Token {
    codes: *const u8,
    /// Half of the scales.
    halves: [f32; GROUPS],
    /// Scale times sum of the codes.
    sums: [f32; GROUPS],
    /// What completes the integer sums.
    offsets: [i32; GROUPS],
}

impl Token {
    #[inline(always)]
    fn new(acts: &TokenActs<'_>, first: usize, piece: &Piece) -> Self {
        let range = first..first + piece.groups;
        let codes = acts.codes[range.start * piece.len..range.end * piece.len].as_ptr();
        let (scales, sums) = (&acts.scales()[range.clone()], &acts.sums()[range]);
        let mut token = Self { codes, halves: [0.0; GROUPS], sums: [0.0; GROUPS], offsets: [0; GROUPS] };
        let outputs = token.halves.iter_mut().zip(&mut token.sums).zip(&mut token.offsets);
        for ((scale, sum), ((half, product), offset)) in scales.iter().zip(sums).zip(outputs) {
            let (scale, sum) = (f32::from_ne_bytes(*scale), i32::from_ne_bytes(*sum));
            (*half, *product, *offset) = (0.5 * scale, scale * sum as f32, piece.offset * sum);
        }
        token
    }
}

#[target_feature(enable = "avx2,f16c")]
pub(super) fn quant_block(block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
    let len = block.quant.group.len();
    let signed = block.quant.fields.bits() == 8;
    let (double, offset) = block.doubled_and_offset();
    let bits = u32::from(block.quant.fields.bits()) - block.dropped;
    // A 16-bit lane gets two products of every 4 K: at most 15 * 127 each for 4 bits, 7 * 127, 3 * 127, 127.
    let run = if signed { 0 } else { len.min([0, 128, 128, 64, 32][bits as usize]) };
    let runs = len.checked_div(run).unwrap_or(0);
    let mut scratch = Scratch { codes: MaybeUninit::uninit(), scales: MaybeUninit::uninit() };
    // Pieces of equal length.
    let step = block.groups.div_ceil(block.groups.div_ceil(K_PIECE / len).max(1)).max(1);
    for first_token in (0..acts.tokens()).step_by(TOKENS) {
        let tokens = TOKENS.min(acts.tokens() - first_token);
        let mut totals = [[0.0f32; ROW_BLOCK]; TOKENS];
        for first in (0..block.groups).step_by(step) {
            let groups = step.min(block.groups - first);
            convert_scales(block, first, groups, scratch.scales.as_mut_ptr().cast());
            let codes = if signed {
                let bytes = len * ROW_BLOCK;
                block.fields[0][first * bytes..(first + groups) * bytes].as_ptr()
            } else {
                unpack(block, first, groups, scratch.codes.as_mut_ptr().cast());
                scratch.codes.as_ptr().cast()
            };
            let scales = scratch.scales.as_ptr().cast();
            let affine = block.quant.affine;
            let piece = Piece { codes, scales, len, groups, affine, signed, run, runs, double, offset };
            let mut tiles = totals[..tokens].chunks_mut(4).zip((first_token..).step_by(4));
            tiles.by_ref().for_each(|(totals, at)| {
                let token = |t: usize| Token::new(&acts.token(at + t), first, &piece);
                // SAFETY: the caller's features; the piece's codes and scales have just been written or checked, each
                // token has as many codes.
                unsafe {
                    match totals {
                        [a] => tile::<1, 4>(&piece, [token(0)], [a]),
                        [a, b] => tile::<2, 4>(&piece, [token(0), token(1)], [a, b]),
                        [a, b, c] => tile::<3, 2>(&piece, [token(0), token(1), token(2)], [a, b, c]),
                        [a, b, c, d] => {
                            tile::<4, 2>(&piece, [token(0), token(1), token(2), token(3)], [a, b, c, d]);
                        }
                        _ => {}
                    }
                }
            });
        }
        for (t, total) in totals[..tokens].iter().enumerate() {
            put(first_token + t, total);
        }
    }
}

/// Writes the scales and minima of `groups` groups as f32.
#[target_feature(enable = "avx2,f16c")]
fn convert_scales(block: &QuantBlock<'_>, first: usize, groups: usize, out: *mut f32) {
    let per = ROW_BLOCK * if block.quant.affine { 2 } else { 1 };
    assert!(groups <= GROUPS);
    let stored = &block.scales[2 * first * per..2 * (first + groups) * per];
    for (i, eight) in stored.as_chunks::<16>().0.iter().enumerate() {
        // SAFETY: `eight` has 16 bytes; `out` has room for `GROUPS` groups of up to 64.
        unsafe { _mm256_storeu_ps(out.add(8 * i), _mm256_cvtph_ps(_mm_loadu_si128(eight.as_ptr().cast()))) };
    }
}

/// Writes `groups` groups' codes as bytes, `[K/4][32 rows][4 K]`.
#[target_feature(enable = "avx2")]
fn unpack(block: &QuantBlock<'_>, first: usize, groups: usize, out: *mut u8) {
    let len = block.quant.group.len();
    assert!(groups * len <= K_PIECE);
    for level in 0..block.levels {
        let (width, below) = block.field(level);
        let bytes = len * ROW_BLOCK * usize::from(width) / 8;
        let field = block.fields[level][first * bytes..(first + groups) * bytes].as_chunks::<128>().0;
        // SAFETY: `field` has `groups * len` K, for which `out` has room, 32 bytes each; when a further level is
        // added the first has been written.
        unsafe {
            match (width, level) {
                (4, 0) => unpack_wide::<4, true>(field, below, out),
                (4, _) => unpack_wide::<4, false>(field, below, out),
                (2, 0) => unpack_wide::<2, true>(field, below, out),
                (2, _) => unpack_wide::<2, false>(field, below, out),
                (_, 0) => unpack_bits::<true>(field, below, out),
                _ => unpack_bits::<false>(field, below, out),
            }
        }
    }
}

/// Writes a vector of codes, or adds it to those of the levels before.
///
/// # Safety
/// `out` heads 32 writable bytes, which have been written unless `FIRST`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn emit<const FIRST: bool>(out: *mut u8, codes: __m256i) {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = if FIRST { codes } else { _mm256_or_si256(codes, load(out)) };
        _mm256_storeu_si256(out.cast(), codes);
    }
}

/// A field of 2 or 4 bits. Every 128 bytes hold 4 K `8 / WIDTH` times, in order from the lowest bits on.
///
/// # Safety
/// `out` heads `8 / WIDTH` times the bytes of `field`; written before unless `FIRST`.
#[target_feature(enable = "avx2")]
unsafe fn unpack_wide<const WIDTH: i32, const FIRST: bool>(field: &[[u8; 128]], below: u32, mut out: *mut u8) {
    let mask = _mm256_set1_epi8((1 << WIDTH) - 1);
    let below = _mm_cvtsi32_si128(below as i32);
    for bytes in field {
        for v in 0..4 {
            // SAFETY: `bytes` has 128 bytes; `out` by the caller's promise.
            unsafe {
                let mut codes = load(bytes.as_ptr().add(32 * v));
                for i in 0..8 / WIDTH as usize {
                    // The mask leaves the upper bits free, so that a shift of 16-bit lanes stays inside the byte.
                    let code = _mm256_sll_epi16(_mm256_and_si256(codes, mask), below);
                    emit::<FIRST>(out.add(128 * i + 32 * v), code);
                    codes = _mm256_srli_epi16::<WIDTH>(codes);
                }
            }
        }
        out = out.wrapping_add(128 * (8 / WIDTH as usize));
    }
}

/// A field of 1 bit: every 128 bytes hold 32 K, byte `64 * half + 16t + r` the 8 K from `8t` on of row `r`.
///
/// # Safety
/// `out` heads 8 times the bytes of `field`; written before unless `FIRST`.
#[target_feature(enable = "avx2")]
unsafe fn unpack_bits<const FIRST: bool>(field: &[[u8; 128]], below: u32, mut out: *mut u8) {
    // Four copies of each of the rows 0..4 in the low lane, 4..8 in the high one; then rows 8..16.
    let low =
        _mm256_set_epi64x(0x0707_0707_0606_0606, 0x0505_0505_0404_0404, 0x0303_0303_0202_0202, 0x0101_0101_0000_0000);
    let rows = [low, _mm256_add_epi8(low, _mm256_set1_epi8(8))];
    let masks = [_mm256_set1_epi32(0x0804_0201), _mm256_set1_epi32(0x8040_2010_u32 as i32)];
    let weight = _mm256_set1_epi8(1 << below);
    for bytes in field {
        for half in 0..2 {
            for t in 0..4 {
                // SAFETY: `bytes` has 128 bytes; `out` by the caller's promise.
                unsafe {
                    let eights =
                        _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().add(64 * half + 16 * t).cast()));
                    for (v, rows) in rows.iter().enumerate() {
                        let copies = _mm256_shuffle_epi8(eights, *rows);
                        for (i, mask) in masks.iter().enumerate() {
                            let set = _mm256_cmpeq_epi8(_mm256_and_si256(copies, *mask), *mask);
                            let at = 128 * (2 * t + i) + 64 * half + 32 * v;
                            emit::<FIRST>(out.add(at), _mm256_and_si256(set, weight));
                        }
                    }
                }
            }
        }
        out = out.wrapping_add(1024);
    }
}

/// Integer sums of `V` vectors of 8 rows for each of `T` tokens.
type Sums<const T: usize, const V: usize> = [[__m256i; V]; T];

/// Adds the products of a piece with `T` tokens to their totals, `V` vectors of 8 rows at a time.
///
/// # Safety
/// The piece's pointers head `groups * len` K of 32 bytes and the groups' scales, the tokens' as many codes.
#[target_feature(enable = "avx2")]
unsafe fn tile<const T: usize, const V: usize>(piece: &Piece, tokens: [Token; T], totals: [&mut [f32; ROW_BLOCK]; T]) {
    let double = _mm256_set1_epi16(piece.double as i16);
    let per = if piece.affine { 2 * ROW_BLOCK } else { ROW_BLOCK };
    for pass in 0..4 / V {
        for group in 0..piece.groups {
            let at = group * piece.len;
            // SAFETY: the caller's promise: the group lies inside the piece.
            let sums: Sums<T, V> = unsafe {
                let codes = piece.codes.add(at * ROW_BLOCK + 32 * V * pass);
                let mut q = [core::ptr::null(); T];
                for t in 0..T {
                    q[t] = tokens[t].codes.add(at);
                }
                if piece.signed {
                    signed(codes, q, piece.len, double)
                } else {
                    let mut sums = unsigned(codes, q, piece.run, double);
                    for run in 1..piece.runs {
                        for q in &mut q {
                            *q = q.add(piece.run);
                        }
                        let codes = codes.add(run * piece.run * ROW_BLOCK);
                        let more: Sums<T, V> = unsigned(codes, q, piece.run, double);
                        for (sum, more) in sums.as_flattened_mut().iter_mut().zip(more.as_flattened()) {
                            *sum = _mm256_add_epi32(*sum, *more);
                        }
                    }
                    sums
                }
            };
            // SAFETY: the caller's promise: 32 scales a group, then 32 minima if affine.
            let stored = unsafe { piece.scales.add(group * per + 8 * V * pass) };
            let mut scales = [_mm256_setzero_ps(); V];
            for v in 0..V {
                // SAFETY: as above.
                scales[v] = unsafe { _mm256_loadu_ps(stored.add(8 * v)) };
            }
            for t in 0..T {
                let half = _mm256_set1_ps(tokens[t].halves[group]);
                let offset = _mm256_set1_epi32(tokens[t].offsets[group]);
                let product = _mm256_set1_ps(tokens[t].sums[group]);
                for v in 0..V {
                    let j = _mm256_cvtepi32_ps(_mm256_add_epi32(sums[t][v], offset));
                    let row = (pass * V + v) * 8;
                    let total = totals[t][row..row + 8].as_ptr();
                    // SAFETY: 8 elements, from the slice above.
                    let total = unsafe { _mm256_loadu_ps(total) };
                    let mut total = _mm256_add_ps(total, _mm256_mul_ps(j, _mm256_mul_ps(scales[v], half)));
                    if piece.affine {
                        // SAFETY: as for the scales.
                        let minima = unsafe { _mm256_loadu_ps(stored.add(ROW_BLOCK + 8 * v)) };
                        total = _mm256_add_ps(total, _mm256_mul_ps(minima, product));
                    }
                    // SAFETY: as for the load.
                    unsafe { _mm256_storeu_ps(totals[t][row..row + 8].as_mut_ptr(), total) };
                }
            }
        }
    }
}

/// `double` times the products of `k` unsigned codes a row.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 4` of them, `q` head `k` codes; sums of 16 bits can hold as many.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unsigned<const T: usize, const V: usize>(
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    double: __m256i,
) -> Sums<T, V> {
    let mut partial = [[_mm256_setzero_si256(); V]; T];
    for at in (0..k).step_by(4) {
        // SAFETY: the caller's promise.
        let codes: [__m256i; V] = unsafe { loads(w) };
        for t in 0..T {
            // SAFETY: as above.
            let a = unsafe { broadcast(q[t].add(at)) };
            for v in 0..V {
                partial[t][v] = _mm256_add_epi16(partial[t][v], _mm256_maddubs_epi16(codes[v], a));
            }
        }
        w = w.wrapping_add(128);
    }
    for sums in partial.as_flattened_mut() {
        *sums = _mm256_madd_epi16(*sums, double);
    }
    partial
}

/// `double` times the products of `k` signed bytes a row: |w| * (q with w's sign), a pair being at most
/// 2 * 128 * 127.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 4` of them, `q` head `k` codes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn signed<const T: usize, const V: usize>(
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    double: __m256i,
) -> Sums<T, V> {
    let mut sums = [[_mm256_setzero_si256(); V]; T];
    for at in (0..k).step_by(4) {
        // SAFETY: the caller's promise.
        let weights: [__m256i; V] = unsafe { loads(w) };
        let mut magnitudes = weights;
        for magnitude in &mut magnitudes {
            *magnitude = _mm256_abs_epi8(*magnitude);
        }
        for t in 0..T {
            // SAFETY: the caller's promise: `at + 4 <= k`.
            let q = unsafe { broadcast(q[t].add(at)) };
            for v in 0..V {
                let a = _mm256_sign_epi8(q, weights[v]);
                let products = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitudes[v], a), double);
                sums[t][v] = _mm256_add_epi32(sums[t][v], products);
            }
        }
        w = w.wrapping_add(128);
    }
    sums
}
