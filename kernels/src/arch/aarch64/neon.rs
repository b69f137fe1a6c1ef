//! NEON: lanes own output rows.
//!
//! A vector of codes is four rows of four K. How they are multiplied is [`Dot`]'s: by widening multiplications here,
//! by `sdot` in [`super::dotprod`]. Fields of 1 bit look subset sums up with `tbl`. NEON is part of every target that
//! compiles this file, so its instructions need no proof; the operators without a kernel of their own are the
//! definition, which the compiler vectorises for it.
#![allow(clippy::needless_range_loop, reason = "row vectors and tokens index several arrays at once")]

use super::attention;
use crate::activations::{ActSpec, Acts, TokenActs, TokenMut};
use crate::arch::{Float, Kernels, TILE};
use crate::reference::quant::{self, QuantBlock, table_slot};
use crate::weights::ROW_BLOCK;
use core::arch::aarch64::*;
use core::arch::asm;

/// The plain NEON back-end.
#[derive(Clone, Copy)]
pub(crate) struct Neon;

pub(crate) fn get() -> Option<&'static dyn Kernels> {
    Some(&Neon)
}

/// Dot products of four signed bytes for each of four rows.
pub(super) trait Dot: Copy {
    /// Running sums of four rows.
    type Sum: Copy;
    /// Calls of [`Dot::dot`] that a sum survives with codes of up to 15 and activations of up to 127.
    const SAFE_STEPS: usize;
    /// Whether a sum also survives a whole group of codes times 16.
    const WIDE: bool;
    fn zero(self) -> Self::Sum;
    /// Adds `w[4r + t] * q[4 * LANE + t]` to row r's sum.
    fn dot<const LANE: i32>(self, sum: Self::Sum, w: int8x16_t, q: int8x16_t) -> Self::Sum;
    /// The same for weights of 8 bits.
    fn dot8<const LANE: i32>(self, sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t;
    /// The four rows' sums.
    fn rows(self, sum: Self::Sum) -> int32x4_t;
}

impl Dot for Neon {
    /// 16 lanes of 16 bits, one per product.
    type Sum = (int16x8_t, int16x8_t);
    /// 17 * 15 * 127 < 2^15.
    const SAFE_STEPS: usize = 17;
    const WIDE: bool = false;
    #[inline(always)]
    fn zero(self) -> Self::Sum {
        // SAFETY: NEON is there.
        unsafe { (vdupq_n_s16(0), vdupq_n_s16(0)) }
    }
    #[inline(always)]
    fn dot<const LANE: i32>(self, (low, high): Self::Sum, w: int8x16_t, q: int8x16_t) -> Self::Sum {
        // SAFETY: NEON is there.
        unsafe {
            let q = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(q)));
            (vmlal_s8(low, vget_low_s8(w), vget_low_s8(q)), vmlal_high_s8(high, w, q))
        }
    }
    /// Two products fit 16 bits: 2 * 128 * 127 < 2^15.
    #[inline(always)]
    fn dot8<const LANE: i32>(self, sum: int32x4_t, w: int8x16_t, q: int8x16_t) -> int32x4_t {
        // SAFETY: NEON is there.
        unsafe {
            let q = vreinterpretq_s8_s32(vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(q)));
            vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(q)), vmull_high_s8(w, q)))
        }
    }
    #[inline(always)]
    fn rows(self, (low, high): Self::Sum) -> int32x4_t {
        // SAFETY: NEON is there.
        unsafe { vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)) }
    }
}

impl Kernels for Neon {
    fn name(&self) -> &'static str {
        "neon"
    }
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        quantise(spec, x, out);
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        quant_tile(*self, block, acts, first, out);
    }
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        dot_rows(format, rows, x, out);
    }
    fn widen(&self, format: Float, stored: &[u8], out: &mut [f32]) {
        attention::widen(format, stored, out);
    }
    fn scores(&self, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
        attention::scores(keys, q, scale, scores, stride);
    }
    fn mix(&self, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
        attention::mix(values, dim, weights, stride, out);
    }
}

#[inline(always)]
pub(super) fn zero() -> int32x4_t {
    // SAFETY: NEON is there.
    unsafe { vdupq_n_s32(0) }
}

pub(super) fn quantise(spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
    quant::quantise_with(spec, x, out, quant::quantise_group, tables_of);
}

/// The eight tables of 32 activations; returns the sum of the negative ones. An entry is the sum over its four
/// activations q of max(q, 0) if the subset has it, else of max(-q, 0).
#[inline(always)]
fn tables_of(q: &[u8; 32], tables: &mut [u8; 128]) -> i32 {
    /// Byte e of choice i: i if bit i of e is set, else 16 + i.
    const CHOICES: [[u8; 16]; 4] = {
        let mut choices = [[0; 16]; 4];
        let mut i = 0;
        while i < 64 {
            choices[i / 16][i % 16] = (i / 16 + if (i % 16) >> (i / 16) & 1 == 1 { 0 } else { 16 }) as u8;
            i += 1;
        }
        choices
    };
    let mut low = 0;
    // SAFETY: NEON is there. All loads and stores are of 16 bytes of an array that has them: 16 * half and
    // 16 * table_slot are at most 16 and 112.
    unsafe {
        for half in 0..2 {
            let q = vld1q_s8(q.as_ptr().add(16 * half).cast());
            let positive = vreinterpretq_u8_s8(vmaxq_s8(q, vdupq_n_s8(0)));
            let negative = vreinterpretq_u8_s8(vmaxq_s8(vnegq_s8(q), vdupq_n_s8(0)));
            low -= i32::from(vaddlvq_u8(negative));
            for j in 0..4 {
                let mut sum = vdupq_n_u8(0);
                for choice in &CHOICES {
                    let choice = vaddq_u8(vld1q_u8(choice.as_ptr()), vdupq_n_u8(4 * j as u8));
                    sum = vaddq_u8(sum, vqtbl2q_u8(uint8x16x2_t(positive, negative), choice));
                }
                vst1q_u8(tables.as_mut_ptr().add(16 * table_slot(4 * half + j)), sum);
            }
        }
    }
    low
}

#[inline(always)]
pub(super) fn quant_tile<D: Dot>(
    dot: D,
    block: &QuantBlock<'_>,
    acts: &Acts<'_>,
    first: usize,
    out: &mut [[f32; ROW_BLOCK]],
) {
    const { assert!(TILE == 4) };
    match out {
        [a] => tile::<D, 1, 8>(dot, block, [acts.token(first)], [a]),
        [a, b] => tile::<D, 2, 4>(dot, block, [acts.token(first), acts.token(first + 1)], [a, b]),
        [a, b, c] => tile::<D, 3, 4>(dot, block, core::array::from_fn(|t| acts.token(first + t)), [a, b, c]),
        [a, b, c, d] => tile::<D, 4, 4>(dot, block, core::array::from_fn(|t| acts.token(first + t)), [a, b, c, d]),
        _ => quant::quant_tile(block, acts, first, out),
    }
}

/// Integer sums of 4 rows a vector: `V` vectors of rows for each of `T` tokens.
type Sums<const T: usize, const V: usize> = [[int32x4_t; V]; T];

/// The products of a row block with `T` tokens, in passes of `V` (4 or 8) vectors of 4 rows.
#[inline(never)]
fn tile<D: Dot, const T: usize, const V: usize>(
    dot: D,
    block: &QuantBlock<'_>,
    acts: [TokenActs<'_>; T],
    out: [&mut [f32; ROW_BLOCK]; T],
) {
    const VECTORS: usize = ROW_BLOCK / 4;
    let len = block.quant.group.len();
    let groups = block.groups;
    let stored = if block.quant.affine { 2 } else { 1 };
    let (_, offset) = block.doubled_and_offset();
    // The lengths that the pointers below rely on.
    assert_eq!(block.scales.len(), groups * stored * 2 * ROW_BLOCK);
    for level in 0..block.levels {
        let (width, _) = block.field(level);
        assert_eq!(block.fields[level].len(), groups * len * ROW_BLOCK * usize::from(width) / 8);
        assert!(width != 1 || acts.iter().all(|acts| acts.tables.len() == 4 * groups * len));
    }
    assert!(acts.iter().all(|acts| acts.codes.len() == groups * len));

    // SAFETY: NEON is there.
    let mut total = [[unsafe { vdupq_n_f32(0.0) }; VECTORS]; T];
    for group in 0..groups {
        let codes: [*const u8; T] = core::array::from_fn(|t| acts[t].codes[group * len..].as_ptr());
        let scale: [f32; T] = core::array::from_fn(|t| acts[t].scale(group));
        let sum: [i32; T] = core::array::from_fn(|t| acts[t].sum(group));
        for pass in 0..VECTORS / V {
            let mut sums: Sums<T, V> = [[zero(); V]; T];
            for level in 0..block.levels {
                let (width, shift) = block.field(level);
                let bytes = len * ROW_BLOCK * usize::from(width) / 8;
                let field = &block.fields[level][group * bytes..(group + 1) * bytes];
                let field = field[pass * V * 16..].as_ptr();
                // SAFETY: `field` heads this pass's part of `len` K of a field of this width, `codes` head `len`
                // codes, and the tables (checked above to be there if a field is 1 bit wide) head 4 * `len` bytes.
                unsafe {
                    match width {
                        8 => field8(dot, field, codes, len, &mut sums),
                        4 => field_of::<D, 2, T, V>(dot, field, codes, len, shift, &mut sums),
                        2 => field_of::<D, 4, T, V>(dot, field, codes, len, shift, &mut sums),
                        _ => {
                            let tables = core::array::from_fn(|t| acts[t].tables[group * len * 4..].as_ptr());
                            let low = core::array::from_fn(|t| acts[t].low(group));
                            field1(field, tables, low, len, shift, &mut sums);
                        }
                    }
                }
            }
            for v in 0..V {
                let row = (pass * V + v) * 4;
                let at = &block.scales[2 * (group * stored * ROW_BLOCK + row)..];
                // SAFETY: 4 scales follow (checked above: 64 bytes per group and vector), then 4 minima 64 bytes on if
                // the encoding is affine. NEON is there.
                unsafe {
                    let scales = load_f16(at.as_ptr());
                    for t in 0..T {
                        let doubled = shifted(sums[t][v], 1 + block.dropped);
                        let j = vcvtq_f32_s32(vaddq_s32(doubled, vdupq_n_s32(offset * sum[t])));
                        let product = vmulq_f32(j, vmulq_n_f32(scales, 0.5 * scale[t]));
                        total[t][pass * V + v] = vaddq_f32(total[t][pass * V + v], product);
                    }
                    if block.quant.affine {
                        let minima = load_f16(at[2 * ROW_BLOCK..].as_ptr());
                        for t in 0..T {
                            let product = vmulq_n_f32(minima, scale[t] * sum[t] as f32);
                            total[t][pass * V + v] = vaddq_f32(total[t][pass * V + v], product);
                        }
                    }
                }
            }
        }
    }
    for (out, total) in out.into_iter().zip(total) {
        for (out, total) in out.as_chunks_mut::<4>().0.iter_mut().zip(total) {
            // SAFETY: `out` has 4 elements.
            unsafe { vst1q_f32(out.as_mut_ptr(), total) };
        }
    }
}

/// Four binary16 values.
///
/// # Safety
/// `p` heads 8 readable bytes.
#[inline(always)]
unsafe fn load_f16(p: *const u8) -> float32x4_t {
    let out: float32x4_t;
    // SAFETY: the caller's promise. The conversion is part of Armv8.0; its intrinsic needs the unstable type f16.
    unsafe {
        let halves = vld1_u8(p);
        asm!("fcvtl {out:v}.4s, {halves:v}.4h", out = out(vreg) out, halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags));
    }
    out
}

/// `x << by`: additions where they do, as shifts by a register and multiplications are slow on some cores.
#[inline(always)]
fn shifted(x: int32x4_t, by: u32) -> int32x4_t {
    // SAFETY: NEON is there.
    unsafe {
        match by {
            0 => x,
            1 => vaddq_s32(x, x),
            _ => vshlq_s32(x, vdupq_n_s32(by as i32)),
        }
    }
}

/// Adds the products of `k` weights a row in a field of `8 / PER` bits, `PER` being 2 or 4.
///
/// # Safety
/// `w` heads `V` vectors, `V` being a multiple of 4, in every 128 bytes of `k / (4 * PER)` of them; `q` head `k` bytes;
/// `k` is a multiple of 16, at most 128.
#[inline(always)]
unsafe fn field_of<D: Dot, const PER: usize, const T: usize, const V: usize>(
    dot: D,
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    /// K that are summed before the sums are widened: whole 16s that [`Dot::SAFE_STEPS`] allows.
    const fn span(safe_steps: usize) -> usize {
        safe_steps * 4 / 16 * 16
    }
    if PER == 4 && T == 1 && D::WIDE {
        // SAFETY: the caller's promise.
        return unsafe { in_place(dot, w, q[0], k, shift, &mut sums[0]) };
    }
    for start in (0..k).step_by(span(D::SAFE_STEPS)) {
        let mut partial = [[dot.zero(); V]; T];
        for at in (start..k.min(start + span(D::SAFE_STEPS))).step_by(16) {
            // SAFETY: the caller's promise. NEON is there.
            unsafe {
                let a: [int8x16_t; T] = core::array::from_fn(|t| vld1q_s8(q[t].add(at).cast()));
                let mask = vdupq_n_u8(0xff >> (8 - 8 / PER));
                for v in 0..V {
                    let codes = vld1q_u8(w.add(16 * v));
                    let fields = if PER == 2 {
                        let more = vld1q_u8(w.add(128 + 16 * v));
                        [vandq_u8(codes, mask), vshrq_n_u8::<4>(codes), vandq_u8(more, mask), vshrq_n_u8::<4>(more)]
                    } else {
                        let (second, third) = (vshrq_n_u8::<2>(codes), vshrq_n_u8::<4>(codes));
                        [vandq_u8(codes, mask), vandq_u8(second, mask), vandq_u8(third, mask), vshrq_n_u8::<6>(codes)]
                    };
                    let fields = fields.map(|field| vreinterpretq_s8_u8(field));
                    for t in 0..T {
                        let sum = dot.dot::<0>(partial[t][v], fields[0], a[t]);
                        let sum = dot.dot::<1>(sum, fields[1], a[t]);
                        let sum = dot.dot::<2>(sum, fields[2], a[t]);
                        partial[t][v] = dot.dot::<3>(sum, fields[3], a[t]);
                    }
                }
            }
            w = w.wrapping_add(if PER == 2 { 256 } else { 128 });
        }
        for t in 0..T {
            for v in 0..V {
                // SAFETY: NEON is there.
                sums[t][v] = unsafe { vaddq_s32(sums[t][v], shifted(dot.rows(partial[t][v]), shift)) };
            }
        }
    }
}

/// [`field_of`] 2 bits for one token: the codes in the middle of a byte are multiplied where they are, as 4 or 16 times
/// themselves, into sums of their own, which saves their shifts.
///
/// # Safety
/// As [`field_of`].
#[inline(always)]
unsafe fn in_place<D: Dot, const V: usize>(
    dot: D,
    w: *const u8,
    q: *const u8,
    k: usize,
    shift: u32,
    sums: &mut [int32x4_t; V],
) {
    for half in 0..V / 4 {
        let mut w = w.wrapping_add(64 * half);
        let mut partial = [[dot.zero(); 4]; 3];
        for at in (0..k).step_by(16) {
            // SAFETY: the caller's promise. NEON is there.
            unsafe {
                let a = vld1q_s8(q.add(at).cast());
                for v in 0..4 {
                    let codes = vld1q_u8(w.add(16 * v));
                    let fields = [
                        vandq_u8(codes, vdupq_n_u8(0x03)),
                        vandq_u8(codes, vdupq_n_u8(0x0c)),
                        vandq_u8(codes, vdupq_n_u8(0x30)),
                        vshrq_n_u8::<6>(codes),
                    ];
                    let fields = fields.map(|field| vreinterpretq_s8_u8(field));
                    let ones = dot.dot::<0>(partial[0][v], fields[0], a);
                    partial[1][v] = dot.dot::<1>(partial[1][v], fields[1], a);
                    partial[2][v] = dot.dot::<2>(partial[2][v], fields[2], a);
                    partial[0][v] = dot.dot::<3>(ones, fields[3], a);
                }
            }
            w = w.wrapping_add(128);
        }
        for v in 0..4 {
            // SAFETY: NEON is there.
            unsafe {
                let sum = vsraq_n_s32::<2>(dot.rows(partial[0][v]), dot.rows(partial[1][v]));
                let sum = vsraq_n_s32::<4>(sum, dot.rows(partial[2][v]));
                sums[4 * half + v] = vaddq_s32(sums[4 * half + v], shifted(sum, shift));
            }
        }
    }
}

/// Adds the products of `k` signed 8-bit weights a row.
///
/// # Safety
/// `w` heads `V` vectors in every 128 bytes of `k / 4` of them; `q` head `k` bytes; `k` is a multiple of 16.
#[inline(always)]
unsafe fn field8<D: Dot, const T: usize, const V: usize>(
    dot: D,
    mut w: *const u8,
    q: [*const u8; T],
    k: usize,
    sums: &mut Sums<T, V>,
) {
    for at in (0..k).step_by(16) {
        // SAFETY: the caller's promise. NEON is there.
        unsafe {
            let a: [int8x16_t; T] = core::array::from_fn(|t| vld1q_s8(q[t].add(at).cast()));
            for v in 0..V {
                let w: [int8x16_t; 4] = core::array::from_fn(|step| vld1q_s8(w.add(128 * step + 16 * v).cast()));
                for t in 0..T {
                    let sum = dot.dot8::<0>(sums[t][v], w[0], a[t]);
                    let sum = dot.dot8::<1>(sum, w[1], a[t]);
                    let sum = dot.dot8::<2>(sum, w[2], a[t]);
                    sums[t][v] = dot.dot8::<3>(sum, w[3], a[t]);
                }
            }
        }
        w = w.wrapping_add(512);
    }
}

/// Adds the products of `k` weights a row in a field of 1 bit, by looking subset sums of four activations up. `low`
/// is what the entries of the `k` activations are short of.
///
/// # Safety
/// `w` heads `V` vectors, `V` being a multiple of 4, in every 128 bytes of `k / 32` of them; `tables` head `4 * k`
/// bytes; `k` is a multiple of 32.
#[inline(always)]
unsafe fn field1<const T: usize, const V: usize>(
    mut w: *const u8,
    tables: [*const u8; T],
    low: [i32; T],
    k: usize,
    shift: u32,
    sums: &mut Sums<T, V>,
) {
    // SAFETY: the caller's promise. NEON is there. A row's 16-bit sum over 128 K is at most 32 * 252.
    unsafe {
        // Four vectors of 32-bit sums are 16 rows: two vectors of 16-bit ones, kept as elements 2h and 2h + 1.
        let mut partial = [[vdupq_n_u16(0); V]; T];
        for at in (0..k).step_by(32) {
            for half in 0..V / 4 {
                for lane in 0..4 {
                    let codes = vld1q_u8(w.add(64 * half + 16 * lane));
                    let first = vandq_u8(codes, vdupq_n_u8(15));
                    let second = vshrq_n_u8::<4>(codes);
                    for t in 0..T {
                        let tables = tables[t].add(4 * at);
                        let a = vqtbl1q_u8(vld1q_u8(tables.add(16 * table_slot(2 * lane))), first);
                        let b = vqtbl1q_u8(vld1q_u8(tables.add(16 * table_slot(2 * lane + 1))), second);
                        let [rows0, rows8] = [partial[t][2 * half], partial[t][2 * half + 1]];
                        let both = vaddl_u8(vget_low_u8(a), vget_low_u8(b));
                        partial[t][2 * half] = vaddq_u16(rows0, both);
                        partial[t][2 * half + 1] = vaddq_u16(rows8, vaddl_high_u8(a, b));
                    }
                }
            }
            w = w.wrapping_add(128);
        }
        for t in 0..T {
            for v in 0..V {
                let eight = partial[t][v / 4 * 2 + v % 4 / 2];
                let four = if v % 2 == 0 { vget_low_u16(eight) } else { vget_high_u16(eight) };
                let sum = vaddq_s32(vreinterpretq_s32_u32(vmovl_u16(four)), vdupq_n_s32(low[t]));
                sums[t][v] = vmlaq_n_s32(sums[t][v], sum, 1 << shift);
            }
        }
    }
}

pub(super) const F32: u8 = Float::F32 as u8;
pub(super) const F16: u8 = Float::F16 as u8;
pub(super) const BF16: u8 = Float::Bf16 as u8;

/// Loads 4 elements of a stored format.
///
/// # Safety
/// `p` heads 4 readable elements.
#[inline(always)]
pub(super) unsafe fn load4<const FORMAT: u8>(p: *const u8) -> float32x4_t {
    // SAFETY: the caller's promise: 16 or 8 bytes. NEON is there.
    unsafe {
        match FORMAT {
            F32 => vreinterpretq_f32_u8(vld1q_u8(p)),
            F16 => load_f16(p),
            _ => vreinterpretq_f32_u32(vshll_n_u16::<16>(vreinterpret_u16_u8(vld1_u8(p)))),
        }
    }
}

pub(super) fn dot_rows(format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
    match format {
        Float::F32 => dot_rows_of::<F32>(4, rows, x, out),
        Float::F16 => dot_rows_of::<F16>(2, rows, x, out),
        Float::Bf16 => dot_rows_of::<BF16>(2, rows, x, out),
    }
}

#[inline(always)]
fn dot_rows_of<const FORMAT: u8>(bytes: usize, rows: &[u8], x: &[f32], out: &mut [f32]) {
    let stride = bytes * x.len();
    let (pairs, rest) = out.as_chunks_mut::<2>();
    let (pair_rows, rest_rows) = rows.split_at(pairs.len() * 2 * stride);
    for (rows, out) in pair_rows.chunks_exact(2 * stride).zip(pairs) {
        let (first, second) = rows.split_at(stride);
        *out = dots::<FORMAT, 2>(bytes, [first, second], x);
    }
    for (row, out) in rest_rows.chunks_exact(stride).zip(rest) {
        [*out] = dots::<FORMAT, 1>(bytes, [row], x);
    }
}

/// Inner products of `R` stored rows with `x`.
#[inline(always)]
fn dots<const FORMAT: u8, const R: usize>(bytes: usize, rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    assert!(rows.iter().all(|row| row.len() == bytes * x.len()));
    // SAFETY: NEON is there. Whole steps read 16 elements inside `x` and rows of equal length; the last, partial step
    // reads buffers of 16 elements.
    unsafe {
        let mut sums = [[vdupq_n_f32(0.0); 4]; R];
        let whole = x.len() / 16 * 16;
        for at in (0..whole).step_by(16) {
            for quarter in 0..4 {
                let at = at + 4 * quarter;
                let x = vld1q_f32(x.as_ptr().add(at));
                for r in 0..R {
                    let w = load4::<FORMAT>(rows[r].as_ptr().add(bytes * at));
                    sums[r][quarter] = vaddq_f32(sums[r][quarter], vmulq_f32(x, w));
                }
            }
        }
        if whole < x.len() {
            // Zeros in the missing places add +0 to sums that are never -0.
            let mut last = [0.0f32; 16];
            last[..x.len() - whole].copy_from_slice(&x[whole..]);
            for r in 0..R {
                let mut last_row = [0u8; 64];
                last_row[..rows[r].len() - bytes * whole].copy_from_slice(&rows[r][bytes * whole..]);
                for quarter in 0..4 {
                    let x = vld1q_f32(last.as_ptr().add(4 * quarter));
                    let w = load4::<FORMAT>(last_row.as_ptr().add(bytes * 4 * quarter));
                    sums[r][quarter] = vaddq_f32(sums[r][quarter], vmulq_f32(x, w));
                }
            }
        }
        sums.map(|[a, b, c, d]| {
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            let two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
            vget_lane_f32::<0>(two) + vget_lane_f32::<1>(two)
        })
    }
}
