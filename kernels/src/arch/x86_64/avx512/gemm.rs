//! The product of a row block with many tokens. A piece of K is decoded once, to one byte a weight or, for a single
//! field of 1 bit, to the places where subset sums are looked up, and multiplied with all tokens before the next piece:
//! eight tokens and 32 rows at a time, so that sums stay in registers.

use super::{broadcast, halves, indices, load, rows_to_lanes};
use crate::activations::{Acts, TokenActs};
use crate::reference::quant::QuantBlock;
use crate::weights::{MAX_FIELDS, ROW_BLOCK};
use core::arch::x86_64::*;
use core::mem::MaybeUninit;

/// Most K decoded at a time: 20 KiB, which a first-level cache holds beside the activations of a tile.
const K_PIECE: usize = 640;
/// Most groups in a piece, and whole vectors of them.
const GROUPS: usize = K_PIECE / 32;
const PADDED: usize = GROUPS.next_multiple_of(16);
/// Tokens whose sums are kept while K is walked through: 8 KiB.
const TOKENS: usize = 64;
/// Most tokens that are multiplied together.
const TILE: usize = 8;
/// Fewest tokens that decoding pays for.
pub(super) const MIN_TOKENS: usize = 4;

#[repr(align(64))]
struct Scratch {
    /// The [`Piece`]'s.
    codes: MaybeUninit<[u8; ROW_BLOCK * K_PIECE]>,
    /// Of each group 32 scales and, if affine, 32 minima.
    scales: MaybeUninit<[f32; 2 * ROW_BLOCK * GROUPS]>,
}

/// A decoded piece of K of a row block.
struct Piece {
    /// Bytes: `[K/4][32 rows][4 K]`, so many times the code that sums need no factor; 128 more than the code if it is
    /// signed. Look-ups: `[K/32][half][low or high bits][16 rows][4 tables]`.
    codes: *const u8,
    /// As in [`Scratch`].
    scales: *const f32,
    /// K per group.
    len: usize,
    groups: usize,
    affine: bool,
    /// What is added for each unit of an activation, before and after the sums of signed codes are doubled.
    seed: i32,
    offset: i32,
    /// What an entry of a table counts.
    entry: i32,
}

/// Kinds of [`Piece`].
const UNSIGNED: u8 = 0;
const SIGNED: u8 = 1;
const LOOK_UP: u8 = 2;

/// What the groups of a piece need to know about `T` tokens.
#[repr(align(64))]
struct Tokens<const T: usize> {
    /// Codes or, for look-ups, tables.
    acts: [*const u8; T],
    /// Half of the scales.
    halves: MaybeUninit<[[f32; PADDED]; T]>,
    /// Scale times sum of the codes, if affine.
    products: MaybeUninit<[[f32; PADDED]; T]>,
    /// What sums start from.
    seeds: MaybeUninit<[[i32; PADDED]; T]>,
    /// What is added to doubled sums of signed codes.
    offsets: MaybeUninit<[[i32; PADDED]; T]>,
}

impl<const T: usize> Tokens<T> {
    /// Prepares token `t` for the piece whose first group is `first`.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn fill<const KIND: u8>(&mut self, t: usize, acts: &TokenActs<'_>, first: usize, piece: &Piece) {
        let range = first..first + piece.groups;
        let (from, to) = (range.start * piece.len, range.end * piece.len);
        self.acts[t] = if KIND == LOOK_UP { &acts.tables[4 * from..4 * to] } else { &acts.codes[from..to] }.as_ptr();
        let (scales, sums) = (&acts.scales()[range.clone()], &acts.sums()[range.clone()]);
        let lows: &[[u8; 4]] = if KIND == LOOK_UP { &acts.lows()[range] } else { &[] };
        assert!(t < T && piece.groups <= GROUPS);
        let (seed, offset, entry) =
            (_mm512_set1_epi32(piece.seed), _mm512_set1_epi32(piece.offset), _mm512_set1_epi32(piece.entry));
        for at in (0..piece.groups).step_by(16) {
            let mask = (0xffff_u32 >> (16 - (piece.groups - at).min(16))) as u16;
            // SAFETY: the mask ends with the last of the groups, of which there are as many scales, sums and (for
            // look-ups) sums of the negative ones; row `t` of the outputs has room for 16 from `at` on.
            unsafe {
                let scale = _mm512_maskz_loadu_ps(mask, scales.as_ptr().add(at).cast());
                let sum = _mm512_maskz_loadu_epi32(mask, sums.as_ptr().add(at).cast());
                let place = t * PADDED + at;
                let half = _mm512_mul_ps(scale, _mm512_set1_ps(0.5));
                _mm512_store_ps(self.halves.as_mut_ptr().cast::<f32>().add(place), half);
                if piece.affine {
                    let product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum));
                    _mm512_store_ps(self.products.as_mut_ptr().cast::<f32>().add(place), product);
                }
                let mut seeds = _mm512_mullo_epi32(sum, seed);
                if KIND == LOOK_UP {
                    let low = _mm512_maskz_loadu_epi32(mask, lows.as_ptr().add(at).cast());
                    seeds = _mm512_add_epi32(seeds, _mm512_mullo_epi32(low, entry));
                }
                _mm512_store_epi32(self.seeds.as_mut_ptr().cast::<i32>().add(place), seeds);
                if KIND == SIGNED {
                    let offsets = _mm512_mullo_epi32(sum, offset);
                    _mm512_store_epi32(self.offsets.as_mut_ptr().cast::<i32>().add(place), offsets);
                }
            }
        }
    }
}

/// A number of a token's group in every lane.
///
/// # Safety
/// `numbers` of token `t` have been prepared for `group`, and both are in range.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn number<const T: usize>(numbers: &MaybeUninit<[[f32; PADDED]; T]>, t: usize, group: usize) -> __m512 {
    // SAFETY: the caller's promise.
    _mm512_set1_ps(unsafe { numbers.as_ptr().cast::<f32>().add(t * PADDED + group).read() })
}

/// The same for integers.
///
/// # Safety
/// As for [`number`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn integer<const T: usize>(numbers: &MaybeUninit<[[i32; PADDED]; T]>, t: usize, group: usize) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { numbers.as_ptr().cast::<i32>().add(t * PADDED + group).read() })
}

/// The regions of the next piece, of which the caches shall have a group's part for every group of this one.
struct Ahead {
    /// Where the scales and the fields of the next piece begin, and bytes of a group.
    regions: [(*const u8, usize); 1 + MAX_FIELDS],
    count: usize,
}

impl Ahead {
    fn new(block: &QuantBlock<'_>, next: usize) -> Self {
        let mut ahead = Self { regions: [(core::ptr::null(), 0); 1 + MAX_FIELDS], count: 1 + block.levels };
        let bytes = 2 * ROW_BLOCK * if block.quant.affine { 2 } else { 1 };
        // After the last piece of a row block comes the first one of the next.
        ahead.regions[0] = (block.scales.as_ptr().wrapping_add(next * bytes), bytes);
        for level in 0..block.levels {
            let bytes = block.quant.group.len() * ROW_BLOCK * usize::from(block.field(level).0) / 8;
            ahead.regions[1 + level] = (block.fields[level].as_ptr().wrapping_add(next * bytes), bytes);
        }
        ahead
    }
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn prefetch(&self, group: usize) {
        for (region, bytes) in &self.regions[..self.count] {
            for at in (0..*bytes).step_by(64) {
                _mm_prefetch::<_MM_HINT_T1>(region.wrapping_add(group * bytes + at).cast());
            }
        }
    }
}

#[target_feature(enable = "avx512vnni,avx512vbmi")]
pub(super) fn quant_block(block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
    match block.quant.fields.widths()[..block.levels] {
        [8] => pieces::<SIGNED>(block, acts, put),
        [1] => pieces::<LOOK_UP>(block, acts, put),
        _ => pieces::<UNSIGNED>(block, acts, put),
    }
}

#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi")]
fn pieces<const KIND: u8>(block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
    let len = block.quant.group.len();
    let (double, offset) = block.doubled_and_offset();
    let (seed, offset) = if KIND == SIGNED { (-128, offset) } else { (offset, 0) };
    let mut scratch = Scratch { codes: MaybeUninit::uninit(), scales: MaybeUninit::uninit() };
    // Pieces of equal length.
    let step = block.groups.div_ceil(block.groups.div_ceil(K_PIECE / len).max(1)).max(1);
    for first_token in (0..acts.tokens()).step_by(TOKENS) {
        let tokens = TOKENS.min(acts.tokens() - first_token);
        let mut totals = [[0.0f32; ROW_BLOCK]; TOKENS];
        for first in (0..block.groups).step_by(step) {
            let groups = step.min(block.groups - first);
            convert_scales(block, first, groups, scratch.scales.as_mut_ptr().cast());
            decode::<KIND>(block, first, groups, scratch.codes.as_mut_ptr().cast());
            let (codes, scales) = (scratch.codes.as_ptr().cast(), scratch.scales.as_ptr().cast());
            let affine = block.quant.affine;
            let piece = Piece { codes, scales, len, groups, affine, seed, offset, entry: double };
            let ahead = Ahead::new(block, first + groups);
            for (i, totals) in totals[..tokens].chunks_mut(TILE).enumerate() {
                let at = first_token + i * TILE;
                let ahead = if i == 0 { Some(&ahead) } else { None };
                // SAFETY: the piece's codes and scales have just been written.
                unsafe {
                    match totals.len() {
                        1 => tile::<KIND, 1>(&piece, ahead, acts, at, first, totals),
                        2 => tile::<KIND, 2>(&piece, ahead, acts, at, first, totals),
                        3 => tile::<KIND, 3>(&piece, ahead, acts, at, first, totals),
                        4 => tile::<KIND, 4>(&piece, ahead, acts, at, first, totals),
                        5 => tile::<KIND, 5>(&piece, ahead, acts, at, first, totals),
                        6 => tile::<KIND, 6>(&piece, ahead, acts, at, first, totals),
                        7 => tile::<KIND, 7>(&piece, ahead, acts, at, first, totals),
                        _ => tile::<KIND, TILE>(&piece, ahead, acts, at, first, totals),
                    }
                }
            }
        }
        for (t, total) in totals[..tokens].iter().enumerate() {
            put(first_token + t, total);
        }
    }
}

/// Writes the scales and minima of `groups` groups as f32.
#[target_feature(enable = "avx512f")]
fn convert_scales(block: &QuantBlock<'_>, first: usize, groups: usize, out: *mut f32) {
    let per = ROW_BLOCK * if block.quant.affine { 2 } else { 1 };
    assert!(groups <= GROUPS);
    let stored = &block.scales[2 * first * per..2 * (first + groups) * per];
    for (i, bytes) in stored.as_chunks::<64>().0.iter().enumerate() {
        // SAFETY: `bytes` are 64; `out` has room for `GROUPS` groups of up to 64.
        unsafe {
            let [low, high] = halves(bytes.as_ptr());
            _mm512_storeu_ps(out.add(32 * i), low);
            _mm512_storeu_ps(out.add(32 * i + 16), high);
        }
    }
}

/// Writes `groups` groups' codes in the form of [`Piece`].
#[target_feature(enable = "avx512vbmi")]
fn decode<const KIND: u8>(block: &QuantBlock<'_>, first: usize, groups: usize, out: *mut u8) {
    let len = block.quant.group.len();
    assert!(groups * len <= K_PIECE);
    let (double, _) = block.doubled_and_offset();
    for level in 0..block.levels {
        let (width, below) = block.field(level);
        let bytes = len * ROW_BLOCK * usize::from(width) / 8;
        let field = block.fields[level][first * bytes..(first + groups) * bytes].as_chunks::<128>().0;
        let shift = double.trailing_zeros() + below;
        // SAFETY: `field` has `groups * len` K, for which `out` has room, 32 bytes each; when a further level is
        // added the first has been written.
        unsafe {
            match (KIND, width, level) {
                (SIGNED, ..) => flip_signs(field, out),
                (LOOK_UP, ..) => look_ups(field, out),
                (_, 4, _) => unpack::<4, 2, true>(field, shift, out),
                (_, 2, 0) => unpack::<2, 4, true>(field, shift, out),
                (_, 2, _) => unpack::<2, 4, false>(field, shift, out),
                (_, _, 0) => unpack::<1, 8, true>(field, shift, out),
                _ => unpack::<1, 8, false>(field, shift, out),
            }
        }
    }
}

/// Signed bytes as unsigned ones.
///
/// # Safety
/// `out` heads the bytes of `field`.
#[target_feature(enable = "avx512f")]
unsafe fn flip_signs(field: &[[u8; 128]], out: *mut u8) {
    for (i, bytes) in field.as_flattened().as_chunks::<64>().0.iter().enumerate() {
        // SAFETY: `bytes` are 64; `out` by the caller's promise.
        unsafe {
            let flipped = _mm512_xor_si512(load(bytes.as_ptr()), _mm512_set1_epi8(i8::MIN));
            _mm512_storeu_si512(out.add(64 * i).cast(), flipped);
        }
    }
}

/// Where the bytes of a field of 1 bit are looked up.
///
/// # Safety
/// `out` heads twice the bytes of `field`.
#[target_feature(enable = "avx512vbmi")]
unsafe fn look_ups(field: &[[u8; 128]], out: *mut u8) {
    for (i, bytes) in field.as_flattened().as_chunks::<64>().0.iter().enumerate() {
        // SAFETY: `bytes` are 64; `out` by the caller's promise.
        unsafe {
            let [first, second] = indices(load(bytes.as_ptr()));
            _mm512_storeu_si512(out.add(128 * i).cast(), first);
            _mm512_storeu_si512(out.add(128 * i + 64).cast(), second);
        }
    }
}

/// Writes a field of `WIDTH` bits, or adds it to those of the levels before, `2^shift` times its codes; a vector of
/// the field gives `PER` of bytes, 4 K each.
///
/// # Safety
/// `out` heads `PER` times the bytes of `field`; written before unless `FIRST`.
#[target_feature(enable = "avx512vbmi")]
unsafe fn unpack<const WIDTH: usize, const PER: usize, const FIRST: bool>(
    field: &[[u8; 128]],
    shift: u32,
    mut out: *mut u8,
) {
    const FIRST_AND_SECOND_OR_THIRD: i32 = 0xea;
    // Bit of a 64-bit lane from which on each of its bytes is taken, less the shift. With 1 bit a 32-bit lane is a row
    // and its bits are K, else a byte has every fourth K.
    let start = if WIDTH == 1 { 0x2322_2120_0302_0100 } else { 0x3830_2820_1810_0800 };
    let start = _mm512_sub_epi8(_mm512_set1_epi64(start), _mm512_set1_epi8(shift as i8));
    let step = if WIDTH == 1 { 4 } else { WIDTH };
    let mask = _mm512_set1_epi8((((1 << WIDTH) - 1) << shift) as i8);
    let mut places = [start; PER];
    for (i, place) in places.iter_mut().enumerate() {
        *place = _mm512_add_epi8(start, _mm512_set1_epi8((step * i) as i8));
    }
    for bytes in field {
        for v in 0..2 {
            // SAFETY: `bytes` are 128; `out` by the caller's promise.
            unsafe {
                let codes = load(bytes.as_ptr().add(64 * v));
                let codes = if WIDTH == 1 { rows_to_lanes(codes) } else { codes };
                for (i, place) in places.iter().enumerate() {
                    let out = out.add(128 * i + 64 * v);
                    let picked = _mm512_multishift_epi64_epi8(*place, codes);
                    let code = if FIRST {
                        _mm512_and_si512(picked, mask)
                    } else {
                        _mm512_ternarylogic_epi32::<FIRST_AND_SECOND_OR_THIRD>(picked, mask, load(out))
                    };
                    _mm512_storeu_si512(out.cast(), code);
                }
            }
        }
        out = out.wrapping_add(128 * PER);
    }
}

/// Integer sums of 16 rows a vector, for each of `T` tokens.
type Sums<const T: usize> = [[__m512i; 2]; T];

/// Adds the products of a piece, whose first group is `first`, with the `T` tokens from `at` on to their totals.
///
/// # Safety
/// The piece's pointers head `groups` groups.
#[target_feature(enable = "avx512vnni,avx512vbmi")]
unsafe fn tile<const KIND: u8, const T: usize>(
    piece: &Piece,
    ahead: Option<&Ahead>,
    acts: &Acts<'_>,
    at: usize,
    first: usize,
    totals: &mut [[f32; ROW_BLOCK]],
) {
    let mut tokens = Tokens {
        acts: [core::ptr::null(); T],
        halves: MaybeUninit::uninit(),
        products: MaybeUninit::uninit(),
        seeds: MaybeUninit::uninit(),
        offsets: MaybeUninit::uninit(),
    };
    for t in 0..T {
        tokens.fill::<KIND>(t, &acts.token(at + t), first, piece);
    }
    assert!(totals.len() == T);
    let per = if piece.affine { 2 * ROW_BLOCK } else { ROW_BLOCK };
    // Bytes of activations and of codes for one K.
    let (act_bytes, code_bytes) = if KIND == LOOK_UP { (4, 8) } else { (1, ROW_BLOCK) };
    for group in 0..piece.groups {
        if let Some(ahead) = ahead {
            ahead.prefetch(group);
        }
        let from = group * piece.len;
        let mut sums: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
        let mut a = [core::ptr::null(); T];
        for t in 0..T {
            a[t] = tokens.acts[t].wrapping_add(act_bytes * from);
            // SAFETY: `fill` has prepared this group of token `t`, here and below.
            sums[t] = [unsafe { integer(&tokens.seeds, t, group) }; 2];
        }
        let codes = piece.codes.wrapping_add(code_bytes * from);
        // SAFETY: the caller's promise; `fill` has checked that the tokens have as many activations.
        unsafe {
            if KIND == LOOK_UP {
                look_up(codes, a, piece.len, _mm512_set1_epi8(piece.entry as i8), &mut sums);
            } else {
                multiply(codes, a, piece.len, &mut sums);
            }
        }
        // SAFETY: the caller's promise: 32 scales a group, then 32 minima if affine.
        let stored = unsafe { piece.scales.add(group * per) };
        for v in 0..2 {
            // SAFETY: as above.
            let scales = unsafe { _mm512_loadu_ps(stored.add(16 * v)) };
            for t in 0..T {
                let mut j = sums[t][v];
                if KIND == SIGNED {
                    // SAFETY: as above.
                    j = _mm512_add_epi32(_mm512_slli_epi32::<1>(j), unsafe { integer(&tokens.offsets, t, group) });
                }
                // SAFETY: as above.
                let factor = _mm512_mul_ps(scales, unsafe { number(&tokens.halves, t, group) });
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(j), factor);
                let total = totals[t].as_chunks_mut::<16>().0[v].as_mut_ptr();
                // SAFETY: 16 elements.
                unsafe { _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product)) };
            }
        }
        if piece.affine {
            for v in 0..2 {
                // SAFETY: as for the scales.
                let minima = unsafe { _mm512_loadu_ps(stored.add(ROW_BLOCK + 16 * v)) };
                for t in 0..T {
                    // SAFETY: as above.
                    let product = _mm512_mul_ps(minima, unsafe { number(&tokens.products, t, group) });
                    let total = totals[t].as_chunks_mut::<16>().0[v].as_mut_ptr();
                    // SAFETY: 16 elements.
                    unsafe { _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), product)) };
                }
            }
        }
    }
}

/// Adds the products of `k` bytes a row.
///
/// # Safety
/// `w` heads `32 * k` bytes, `q` head `k` codes; `k` is a multiple of 4.
#[inline]
#[target_feature(enable = "avx512vnni")]
unsafe fn multiply<const T: usize>(mut w: *const u8, q: [*const u8; T], k: usize, sums: &mut Sums<T>) {
    for at in (0..k).step_by(4) {
        // SAFETY: the caller's promise.
        let codes = unsafe { [load(w), load(w.add(64))] };
        for t in 0..T {
            // SAFETY: as above.
            let a = unsafe { broadcast(q[t].add(at)) };
            for v in 0..2 {
                sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], codes[v], a);
            }
        }
        w = w.wrapping_add(128);
    }
}

/// Adds the entries of the tables of `k` activations, times `entry`.
///
/// # Safety
/// `w` heads `8 * k` bytes, `tables` head `4 * k`; `k` is a multiple of 32.
#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi")]
unsafe fn look_up<const T: usize>(
    mut w: *const u8,
    tables: [*const u8; T],
    k: usize,
    entry: __m512i,
    sums: &mut Sums<T>,
) {
    for at in (0..k).step_by(32) {
        // SAFETY: the caller's promise.
        let places = unsafe { [[load(w), load(w.add(64))], [load(w.add(128)), load(w.add(192))]] };
        for t in 0..T {
            // SAFETY: as above.
            let (even, odd) = unsafe { (load(tables[t].add(4 * at)), load(tables[t].add(4 * at + 64))) };
            for v in 0..2 {
                let sum = _mm512_dpbusd_epi32(sums[t][v], _mm512_permutexvar_epi8(places[v][0], even), entry);
                sums[t][v] = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(places[v][1], odd), entry);
            }
        }
        w = w.wrapping_add(256);
    }
}
