//! The product of a row block with many tokens. A piece of K is decoded once, to one byte a weight or, for a single
//! field of 1 bit, to the places where subset sums are looked up, and multiplied with all tokens before the next piece:
//! up to seven tokens (look-ups: five) and 32 rows at a time, so that both the sums of a group and those over groups
//! stay in registers.

use super::{broadcast, halves, indices, load, rows_to_lanes};
use crate::activations::{Acts, TokenActs};
use crate::reference::quant::QuantBlock;
use crate::weights::{MAX_FIELDS, ROW_BLOCK};
use core::arch::x86_64::*;
use core::mem::MaybeUninit;
use core::ops::Range;

/// Most K decoded at a time: 20 KiB, which a first-level cache holds beside the activations of a tile.
const K_PIECE: usize = 640;
/// Most groups in a piece, and whole vectors of them.
const GROUPS: usize = K_PIECE / 32;
const PADDED: usize = GROUPS.next_multiple_of(16);
/// Tokens whose sums are kept while K is walked through: 8 KiB.
const TOKENS: usize = 64;
/// Most tokens that are multiplied together. Two vectors of integer sums and two of totals each leave four of the 32
/// registers for codes and activations; with eight tokens totals would be in memory, which costs a third of the speed.
const TILE: usize = 7;
/// The same for look-ups, which need nine registers more: for places, tables and entries.
const LOOK_UP_TILE: usize = 5;
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

/// What the next piece reads, which the tiles of this one ask for in equal shares.
struct Ahead {
    /// Where its scales begin, and bytes of a group.
    scales: (*const u8, usize),
    /// Where its fields begin, and their bytes.
    fields: [(*const u8, usize); MAX_FIELDS],
    groups: usize,
    /// Bytes of the fields that a tile asks for with each group, and with each step of a group.
    share: usize,
    step: usize,
}

impl Ahead {
    /// The piece of `groups` groups from `next` on; after the last piece of a row block comes the first one of the
    /// next. A group is multiplied in steps of `step` K.
    fn new(block: &QuantBlock<'_>, next: usize, groups: usize, tiles: usize, step: usize) -> Self {
        let bytes = 2 * ROW_BLOCK * if block.quant.affine { 2 } else { 1 };
        let scales = (block.scales.as_ptr().wrapping_add(next * bytes), bytes);
        let (mut fields, mut group) = ([(core::ptr::null(), 0); MAX_FIELDS], 0);
        for level in 0..block.levels {
            let bytes = block.quant.group.len() * ROW_BLOCK * usize::from(block.field(level).0) / 8;
            fields[level] = (block.fields[level].as_ptr().wrapping_add(next * bytes), bytes * groups);
            group += bytes;
        }
        let share = group.div_ceil(tiles);
        Self { scales, fields, groups, share, step: share.div_ceil(block.quant.group.len() / step) }
    }
    /// What tile `tile` asks for from on while it multiplies group `group`; the fields are taken one after another.
    #[inline]
    fn share(&self, tile: usize, group: usize) -> *const u8 {
        let mut at = (tile * self.groups + group) * self.share;
        for &(field, bytes) in &self.fields {
            if at < bytes {
                return field.wrapping_add(at);
            }
            at -= bytes;
        }
        self.scales.0
    }
    /// Asks for the scales of a group.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scales(&self, group: usize) {
        let (scales, bytes) = self.scales;
        let scales = scales.wrapping_add(group * bytes);
        prefetch(scales);
        prefetch(scales.wrapping_add(bytes - 64));
    }
}

/// Asks for a line.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(p: *const u8) {
    _mm_prefetch::<_MM_HINT_T0>(p.cast());
}

#[target_feature(enable = "avx512vnni,avx512vbmi,gfni")]
pub(super) fn quant_block(block: &QuantBlock<'_>, acts: &Acts<'_>, put: &mut dyn FnMut(usize, &[f32; ROW_BLOCK])) {
    match block.quant.fields.widths()[..block.levels] {
        [8] => pieces::<SIGNED>(block, acts, put),
        [1] => pieces::<LOOK_UP>(block, acts, put),
        _ => pieces::<UNSIGNED>(block, acts, put),
    }
}

#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi,gfni")]
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
            // Tiles of equal size, as far as possible.
            let tiles = tokens.div_ceil(if KIND == LOOK_UP { LOOK_UP_TILE } else { TILE });
            let ahead = Ahead::new(block, first + groups, groups, tiles, if KIND == LOOK_UP { 32 } else { 4 });
            for i in 0..tiles {
                let (from, to) = (i * tokens / tiles, (i + 1) * tokens / tiles);
                let (totals, at) = (&mut totals[from..to], first_token + from);
                let ahead = (&ahead, i);
                // SAFETY: the piece's codes and scales have just been written.
                unsafe {
                    match totals.len() {
                        1 => tile::<KIND, 1>(&piece, ahead, acts, at, first, totals),
                        2 => tile::<KIND, 2>(&piece, ahead, acts, at, first, totals),
                        3 => tile::<KIND, 3>(&piece, ahead, acts, at, first, totals),
                        4 => tile::<KIND, 4>(&piece, ahead, acts, at, first, totals),
                        5 => tile::<KIND, 5>(&piece, ahead, acts, at, first, totals),
                        6 => tile::<KIND, 6>(&piece, ahead, acts, at, first, totals),
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
#[target_feature(enable = "avx512vbmi,gfni")]
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
#[target_feature(enable = "avx512vbmi,gfni")]
unsafe fn unpack<const WIDTH: usize, const PER: usize, const FIRST: bool>(
    field: &[[u8; 128]],
    shift: u32,
    mut out: *mut u8,
) {
    const FIRST_AND_SECOND_OR_THIRD: i32 = 0xea;
    // With 1 bit a 32-bit lane is a row and its bits are K: `places` are, for each byte of a 64-bit lane, the bit from
    // which on it is taken, less the shift. Else a byte has every fourth K: `places` are bit matrices whose row 7 - i
    // says which bit of a byte becomes bit i of the code.
    let mask = _mm512_set1_epi8((((1 << WIDTH) - 1) << shift) as i8);
    let mut places = [_mm512_setzero_si512(); PER];
    for (i, place) in places.iter_mut().enumerate() {
        *place = if WIDTH == 1 {
            let start = _mm512_add_epi8(_mm512_set1_epi64(0x2322_2120_0302_0100), _mm512_set1_epi8((4 * i) as i8));
            _mm512_sub_epi8(start, _mm512_set1_epi8(shift as i8))
        } else {
            let rows = (0..WIDTH).map(|bit| 1u64 << (WIDTH * i + bit) << (8 * (7 - (bit + shift as usize))));
            _mm512_set1_epi64(rows.sum::<u64>() as i64)
        };
    }
    for bytes in field {
        for v in 0..2 {
            // SAFETY: `bytes` are 128; `out` by the caller's promise.
            unsafe {
                let codes = load(bytes.as_ptr().add(64 * v));
                let codes = if WIDTH == 1 { rows_to_lanes(codes) } else { codes };
                for (i, place) in places.iter().enumerate() {
                    let out = out.add(128 * i + 64 * v);
                    let code = match (WIDTH, FIRST) {
                        (1, true) => _mm512_and_si512(_mm512_multishift_epi64_epi8(*place, codes), mask),
                        (1, false) => _mm512_ternarylogic_epi32::<FIRST_AND_SECOND_OR_THIRD>(
                            _mm512_multishift_epi64_epi8(*place, codes),
                            mask,
                            load(out),
                        ),
                        (_, true) => _mm512_gf2p8affine_epi64_epi8::<0>(codes, *place),
                        (_, false) => _mm512_or_si512(_mm512_gf2p8affine_epi64_epi8::<0>(codes, *place), load(out)),
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
    ahead: (&Ahead, usize),
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
    let mut acc = [[_mm512_setzero_ps(); 2]; T];
    for t in 0..T {
        let halves = totals[t].as_chunks::<16>().0;
        // SAFETY: 16 elements each.
        acc[t] = unsafe { [_mm512_loadu_ps(halves[0].as_ptr()), _mm512_loadu_ps(halves[1].as_ptr())] };
    }
    let per = if piece.affine { 2 * ROW_BLOCK } else { ROW_BLOCK };
    // Bytes of codes for one K.
    let code_bytes = if KIND == LOOK_UP { 8 } else { ROW_BLOCK };
    let (ahead, share) = ahead;
    for group in 0..piece.groups {
        ahead.scales(group);
        let next = (ahead.share(share, group), ahead.step);
        let mut sums: Sums<T> = [[_mm512_setzero_si512(); 2]; T];
        for t in 0..T {
            // SAFETY: `fill` has prepared this group of token `t`, here and below.
            sums[t] = [unsafe { integer(&tokens.seeds, t, group) }; 2];
        }
        let from = group * piece.len;
        let codes = piece.codes.wrapping_add(code_bytes * from);
        let range = from..from + piece.len;
        // SAFETY: the caller's promise; `fill` has checked that the tokens have as many activations.
        unsafe {
            if KIND == LOOK_UP {
                look_up(codes, &tokens.acts, range, _mm512_set1_epi8(piece.entry as i8), next, &mut sums);
            } else {
                multiply(codes, &tokens.acts, range, next, &mut sums);
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
                acc[t][v] = _mm512_add_ps(acc[t][v], _mm512_mul_ps(_mm512_cvtepi32_ps(j), factor));
            }
        }
        if piece.affine {
            for v in 0..2 {
                // SAFETY: as for the scales.
                let minima = unsafe { _mm512_loadu_ps(stored.add(ROW_BLOCK + 16 * v)) };
                for t in 0..T {
                    // SAFETY: as above.
                    let product = _mm512_mul_ps(minima, unsafe { number(&tokens.products, t, group) });
                    acc[t][v] = _mm512_add_ps(acc[t][v], product);
                }
            }
        }
    }
    for t in 0..T {
        let halves = totals[t].as_chunks_mut::<16>().0;
        for v in 0..2 {
            // SAFETY: 16 elements.
            unsafe { _mm512_storeu_ps(halves[v].as_mut_ptr(), acc[t][v]) };
        }
    }
}

/// Adds the products of the K in `range`, a byte a row, and asks for the line at `next` and
/// those that follow it in steps.
///
/// # Safety
/// `w` heads 32 bytes for each K, `q` head `range.end` codes; a range has whole fours of K.
#[inline]
#[target_feature(enable = "avx512vnni")]
unsafe fn multiply<const T: usize>(
    mut w: *const u8,
    q: &[*const u8; T],
    range: Range<usize>,
    (mut next, step): (*const u8, usize),
    sums: &mut Sums<T>,
) {
    for at in range.step_by(4) {
        prefetch(next);
        next = next.wrapping_add(step);
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

/// Adds the entries of the tables of the K in `range`, times `entry`, and asks for the line at `next` and
/// those that follow it in steps.
///
/// # Safety
/// `w` heads 8 bytes for each K, `tables` head `4 * range.end`; a range has whole 32 of K.
#[inline]
#[target_feature(enable = "avx512vnni,avx512vbmi")]
unsafe fn look_up<const T: usize>(
    mut w: *const u8,
    tables: &[*const u8; T],
    range: Range<usize>,
    entry: __m512i,
    (mut next, step): (*const u8, usize),
    sums: &mut Sums<T>,
) {
    for at in range.step_by(32) {
        prefetch(next);
        next = next.wrapping_add(step);
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
