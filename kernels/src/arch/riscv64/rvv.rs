//! The vector extension, RVV 1.0, for vector registers of 128 bits and more.
//!
//! Its intrinsics are not stable, so whole loops are written out; values cannot stay in vector registers between two
//! of them. Vector lengths are those of the layouts (32 rows, 16 partial sums), which register groups of 128-bit
//! registers hold, so longer registers change no result.

use super::operators;
use crate::activations::{ActSpec, Acts, TokenMut};
use crate::arch::{Float, Kernels};
use crate::reference::attention::POSITIONS;
use crate::reference::float::{PARTIALS, fold};
use crate::reference::quant::{self, QuantBlock};
use crate::weights::ROW_BLOCK;
use core::arch::asm;
#[cfg(not(all(any(test, feature = "std"), target_os = "linux")))]
use core::sync::atomic::{AtomicBool, Ordering};

/// Proof that the CPU has the vector extension.
pub(crate) struct Rvv(());

impl Rvv {
    /// Asks the kernel.
    #[cfg(all(any(test, feature = "std"), target_os = "linux"))]
    fn new() -> Option<Self> {
        /// Key of the entry of the auxiliary vector that has a bit for every single-letter extension.
        const AT_HWCAP: u64 = 16;
        const V: u64 = 1 << (b'V' - b'A');
        static AVAILABLE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        let available = AVAILABLE.get_or_init(|| {
            let auxv = std::fs::read("/proc/self/auxv").unwrap_or_default();
            let words = auxv.as_chunks::<8>().0.as_chunks::<2>().0.iter();
            words.map(|entry| entry.map(u64::from_ne_bytes)).any(|[key, value]| key == AT_HWCAP && value & V != 0)
        });
        available.then_some(Self(()))
    }
    /// The build decides, or who called [`assume_vectors`].
    #[cfg(not(all(any(test, feature = "std"), target_os = "linux")))]
    fn new() -> Option<Self> {
        (cfg!(target_feature = "v") || ASSUMED.load(Ordering::Relaxed)).then_some(Self(()))
    }
}

/// Set by [`assume_vectors`].
#[cfg(not(all(any(test, feature = "std"), target_os = "linux")))]
static ASSUMED: AtomicBool = AtomicBool::new(false);

/// Tells the kernels of a program on the bare machine, which has nobody to ask, that the processor has the vector
/// extension. Call it before a back-end is chosen.
///
/// # Safety
/// Every hart that will compute has the extension, version 1.0, with registers of at least 128 bits, and has switched it
/// on.
#[cfg(not(all(any(test, feature = "std"), target_os = "linux")))]
pub unsafe fn assume_vectors() {
    ASSUMED.store(true, Ordering::Relaxed);
}

/// The back-end, if this CPU (with `std`, on Linux) or this build (else) has the extension.
pub(crate) fn get() -> Option<&'static dyn Kernels> {
    Rvv::new().map(|_| &Rvv(()) as &'static dyn Kernels)
}

impl Kernels for Rvv {
    fn name(&self) -> &'static str {
        "rvv"
    }
    fn quantise(&self, spec: ActSpec, x: &[f32], out: TokenMut<'_>) {
        let group = |limit, x: &[f32], codes: &mut [u8]| operators::quantise_group(self, limit, x, codes);
        quant::quantise_with(spec, x, out, group, quant::tables_of);
    }
    fn quant_tile(&self, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
        quant_tile(self, block, acts, first, out);
    }
    fn dot_rows(&self, format: Float, rows: &[u8], x: &[f32], out: &mut [f32]) {
        for (row, out) in rows.chunks_exact(format.bytes() * x.len()).zip(out) {
            // SAFETY: `row` has `x.len()` elements.
            *out = unsafe { dot(self, format, row.as_ptr(), x) };
        }
    }
    fn widen(&self, format: Float, stored: &[u8], out: &mut [f32]) {
        widen(self, format, stored, out);
    }
    fn scores(&self, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
        self::scores(self, keys, q, scale, scores, stride);
    }
    fn mix(&self, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
        mix(self, values, dim, weights, stride, out);
    }
    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        let n = a.len().min(b.len());
        // SAFETY: `a` has `n` elements.
        unsafe { dot(self, Float::F32, a.as_ptr().cast(), &b[..n]) }
    }
    fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        operators::rms_norm(self, self.dot(x, x), x, weight, eps, out);
    }
    fn softmax(&self, x: &mut [f32]) {
        operators::softmax(self, x);
    }
    fn silu_mul(&self, gate: &mut [f32], up: &[f32]) {
        operators::silu_mul(self, gate, up);
    }
    fn add(&self, acc: &mut [f32], x: &[f32]) {
        operators::add(self, acc, x);
    }
    fn add_scaled(&self, acc: &mut [f32], x: &[f32], w: f32) {
        operators::add_scaled(self, acc, x, w);
    }
    fn scale(&self, x: &mut [f32], s: f32) {
        operators::scale(self, x, s);
    }
}

/// `asm!` with the vector extension, all vector registers and the constants of [`widen_f16`].
macro_rules! vector_asm {
    ([$($text:expr),* $(,)?] $($operands:tt)*) => {
        asm!(
            ".option push", ".option arch, +v", $($text,)* ".option pop",
            $($operands)*
            in("t0") 0x7f80_0000u32, in("ft0") f32::from_bits(0x7780_0000), in("ft1") 65536.0f32,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
            out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
            out("v22") _, out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _,
            out("v29") _, out("v30") _, out("v31") _,
            options(nostack)
        )
    };
}

/// Converts binary16 in v16 (2 registers) to binary32 in v8 (4 registers), as
/// [`f16_to_f32`](crate::reference::float::f16_to_f32) does; uses v0 and v4.
macro_rules! widen_f16 {
    () => {
        "vzext.vf2 v4, v16
         vsll.vi v8, v4, 17
         vsrl.vi v8, v8, 4
         vfmul.vf v8, v8, ft0
         vmfge.vf v0, v8, ft1
         vor.vx v8, v8, t0, v0.t
         vsrl.vi v4, v4, 15
         vsll.vi v4, v4, 31
         vor.vv v8, v8, v4"
    };
}

/// Adds the 16 sums in v16, shifted, to those at `sums`, and moves on by 16.
macro_rules! accumulate {
    () => {
        "vsll.vx v16, v16, {shift}
         vle32.v v20, ({sums})
         vadd.vv v16, v16, v20
         vse32.v v16, ({sums})
         addi {sums}, {sums}, 64"
    };
}

/// Brings four activations into every 32-bit lane of v24 (4 registers).
macro_rules! activations {
    () => {
        "lw {q4}, ({q})
         addi {q}, {q}, 4
         vsetivli zero, 16, e32, m4, ta, ma
         vmv.v.x v24, {q4}
         vsetvli zero, {n64}, e8, m4, ta, ma"
    };
}

/// Adds the 64 16-bit lanes in v0 (8 registers), four a row, to the sums of 16 rows.
macro_rules! fold_lanes {
    () => {
        concat!(
            "vsetvli zero, {n32}, e16, m4, ta, ma
             vnsrl.wi v16, v0, 0
             vnsrl.wi v20, v0, 16
             vwadd.vv v24, v16, v20
             vsetivli zero, 16, e32, m4, ta, ma
             vnsrl.wi v16, v24, 0
             vnsrl.wx v20, v24, {n32}
             vadd.vv v16, v16, v20\n",
            accumulate!()
        )
    };
}

/// A function that adds to `sums` the products of `4 * steps * PER` weights a row, `PER` of them a byte. A 16-bit
/// lane holds one of four sums of a row: v0 those of rows 0 to 15, v8 the others. The text multiplies the codes in
/// v16 and v20.
macro_rules! field {
    ($name:ident, [$($text:expr),*] $($operands:tt)*) => {
        /// # Safety
        /// `w` heads `128 * steps` bytes; `q` heads the activations and is 4-aligned; `steps` is not 0 and so small
        /// that a lane of 16 bits holds the sum of `steps * PER` products.
        unsafe fn $name(_: &Rvv, w: *const u8, q: *const u8, steps: usize, shift: u32, sums: &mut [i32; ROW_BLOCK]) {
            // SAFETY: the proof and the caller's promise; `sums` are two times 16.
            unsafe {
                vector_asm!(
                    [
                        "vsetvli zero, {n64}, e16, m8, ta, ma",
                        "vmv.v.i v0, 0",
                        "vmv.v.i v8, 0",
                        "vsetvli zero, {n64}, e8, m4, ta, ma",
                        "2:",
                        "vle8.v v16, ({w})",
                        "addi {w}, {w}, 64",
                        "vle8.v v20, ({w})",
                        "addi {w}, {w}, 64",
                        $($text,)*
                        "addi {steps}, {steps}, -1",
                        "bnez {steps}, 2b",
                        fold_lanes!(),
                        "vmv8r.v v0, v8",
                        fold_lanes!(),
                    ]
                    w = inout(reg) w => _,
                    q = inout(reg) q => _,
                    q4 = out(reg) _,
                    steps = inout(reg) steps => _,
                    sums = inout(reg) sums.as_mut_ptr() => _,
                    shift = in(reg) shift,
                    n32 = in(reg) 32,
                    n64 = in(reg) 64,
                    $($operands)*
                );
            }
        }
    };
}

/// Multiplies the lowest bits of the codes and shifts them out.
macro_rules! lowest {
    () => {
        concat!(
            activations!(),
            "
             vand.vi v28, v16, {mask}
             vwmacc.vv v0, v28, v24
             vsrl.vi v16, v16, {bits}
             vand.vi v28, v20, {mask}
             vwmacc.vv v8, v28, v24
             vsrl.vi v20, v20, {bits}"
        )
    };
}

field!(field8, [activations!(), "vwmacc.vv v0, v16, v24", "vwmacc.vv v8, v20, v24"]);
field!(field4, [lowest!(), lowest!()] bits = const 4, mask = const 15,);
field!(field2, [lowest!(), lowest!(), lowest!(), lowest!()] bits = const 2, mask = const 3,);

/// Looks 16 bytes of codes a half up: low nibbles in the table at `tables`, high ones in the table 64 bytes on.
macro_rules! look_up {
    () => {
        "vle8.v v8, ({tables})
         addi {next}, {tables}, 64
         addi {tables}, {tables}, 16
         vle8.v v9, ({next})
         vle8.v v10, ({w})
         addi {next}, {w}, 64
         addi {w}, {w}, 16
         vle8.v v11, ({next})
         vand.vi v12, v10, 15
         vand.vi v13, v11, 15
         vsrl.vi v10, v10, 4
         vsrl.vi v11, v11, 4
         vrgather.vv v14, v8, v12
         vrgather.vv v15, v8, v13
         vwaddu.wv v0, v0, v14
         vwaddu.wv v2, v2, v15
         vrgather.vv v14, v9, v10
         vrgather.vv v15, v9, v11
         vwaddu.wv v0, v0, v14
         vwaddu.wv v2, v2, v15"
    };
}

/// Adds to `sums` the products of `32 * steps` weights a row in a field of 1 bit, by looking subset sums of four
/// activations up. `low` is what the entries are short of. 16 bits hold a row's sum over 128 K: 32 * 252.
///
/// # Safety
/// `w` and `tables` head `128 * steps` bytes each; `steps` is 1 to 4.
unsafe fn field1(
    _: &Rvv,
    w: *const u8,
    tables: *const u8,
    low: i32,
    steps: usize,
    shift: u32,
    sums: &mut [i32; ROW_BLOCK],
) {
    // SAFETY: the proof and the caller's promise; `sums` are two times 16.
    unsafe {
        vector_asm!(
            [
                "vsetivli zero, 16, e16, m2, ta, ma",
                "vmv.v.i v0, 0",
                "vmv.v.i v2, 0",
                "vsetivli zero, 16, e8, m1, ta, ma",
                "2:",
                look_up!(),
                look_up!(),
                look_up!(),
                look_up!(),
                "addi {w}, {w}, 64",
                "addi {tables}, {tables}, 64",
                "addi {steps}, {steps}, -1",
                "bnez {steps}, 2b",
                "vsetivli zero, 16, e32, m4, ta, ma",
                "vzext.vf2 v16, v0",
                "vadd.vx v16, v16, {low}",
                accumulate!(),
                "vzext.vf2 v16, v2",
                "vadd.vx v16, v16, {low}",
                accumulate!(),
            ]
            w = inout(reg) w => _,
            tables = inout(reg) tables => _,
            next = out(reg) _,
            steps = inout(reg) steps => _,
            sums = inout(reg) sums.as_mut_ptr() => _,
            shift = in(reg) shift,
            low = in(reg) low,
        );
    }
}

/// `out += (double * sums + offset) as f32 * (scales * s)`, with scales in binary16.
fn add_scaled_sums(
    _: &Rvv,
    scales: &[u8; 2 * ROW_BLOCK],
    s: f32,
    sums: &[i32; ROW_BLOCK],
    double: i32,
    offset: i32,
    out: &mut [f32; ROW_BLOCK],
) {
    // SAFETY: the proof; 32 scales, sums and outputs are two times 16.
    unsafe {
        vector_asm!(
            [
                "2:",
                "vsetvli zero, {n32}, e8, m2, ta, ma",
                "vle8.v v16, ({scales})",
                "vsetivli zero, 16, e32, m4, ta, mu",
                widen_f16!(),
                "vfmul.vf v8, v8, {s}",
                "vle32.v v12, ({sums})",
                "vmul.vx v12, v12, {double}",
                "vadd.vx v12, v12, {offset}",
                "vfcvt.f.x.v v12, v12",
                "vfmul.vv v8, v12, v8",
                "vle32.v v20, ({out})",
                "vfadd.vv v20, v20, v8",
                "vse32.v v20, ({out})",
                "addi {scales}, {scales}, 32",
                "addi {sums}, {sums}, 64",
                "addi {out}, {out}, 64",
                "bne {out}, {end}, 2b",
            ]
            scales = inout(reg) scales.as_ptr() => _,
            sums = inout(reg) sums.as_ptr() => _,
            out = inout(reg) out.as_mut_ptr() => _,
            end = in(reg) out.as_ptr_range().end,
            s = in(freg) s,
            double = in(reg) double,
            offset = in(reg) offset,
            n32 = in(reg) 32,
        );
    }
}

fn quant_tile(rvv: &Rvv, block: &QuantBlock<'_>, acts: &Acts<'_>, first: usize, out: &mut [[f32; ROW_BLOCK]]) {
    let len = block.quant.group.len();
    let (double, offset) = block.doubled_and_offset();
    let stored = if block.quant.affine { 2 } else { 1 };
    let scales = block.scales.as_chunks::<{ 2 * ROW_BLOCK }>().0.chunks_exact(stored);
    // Activations are read by words, which not every CPU does at any address.
    let aligned = |t| acts.token(first + t).codes.as_ptr().cast::<i32>().is_aligned();
    if !(0..out.len()).all(aligned) {
        return quant::quant_tile(block, acts, first, out);
    }
    out.as_flattened_mut().fill(0.0);
    for (group, scales) in scales.enumerate().take(block.groups) {
        for (t, out) in out.iter_mut().enumerate() {
            let acts = acts.token(first + t);
            let q = &acts.codes[group * len..(group + 1) * len];
            let mut sums = [0; ROW_BLOCK];
            for level in 0..block.levels {
                let (width, shift) = block.field(level);
                let bytes = len * ROW_BLOCK * usize::from(width) / 8;
                let field = &block.fields[level][group * bytes..(group + 1) * bytes];
                if width == 1 {
                    let tables = &acts.tables[4 * group * len..4 * (group + 1) * len];
                    let low = acts.low(group);
                    // SAFETY: both have 4 bytes for each of `len` K, which is 32, 64 or 128.
                    unsafe { field1(rvv, field.as_ptr(), tables.as_ptr(), low, len / 32, shift, &mut sums) };
                    continue;
                }
                // What 16 bits hold: 16 * 15 * 127 or 2 * 128 * 127.
                let span = if width == 8 { 8 } else { 64 };
                let width = usize::from(width);
                for (field, q) in field.chunks(span * ROW_BLOCK * width / 8).zip(q.chunks(span)) {
                    let (w, q, steps) = (field.as_ptr(), q.as_ptr(), field.len() / 128);
                    // SAFETY: `field` has whole steps, since `len` is a multiple of 32, and `q` as many K; checked to
                    // be aligned above.
                    unsafe {
                        match width {
                            8 => field8(rvv, w, q, steps, shift, &mut sums),
                            4 => field4(rvv, w, q, steps, shift, &mut sums),
                            _ => field2(rvv, w, q, steps, shift, &mut sums),
                        }
                    }
                }
            }
            let (s, a) = (acts.scale(group), acts.sum(group));
            add_scaled_sums(rvv, &scales[0], 0.5 * s, &sums, double, offset * a, out);
            if let Some(minima) = scales.get(1) {
                // A sum of 1 for every row: `minimum * s_a` is the product.
                add_scaled_sums(rvv, minima, s * a as f32, &sums, 0, 1, out);
            }
        }
    }
}

/// Expands `$body!` with the text that loads `{n}` elements of a format, `{bytes}` bytes at `{row}`, as binary32 into
/// v8, and leaves a vector length of `{n}`.
macro_rules! by_format {
    ($format:expr, $body:ident) => {
        match $format {
            Float::F32 => $body!(
                "vsetvli zero, {bytes}, e8, m4, ta, ma
                 vle8.v v8, ({row})
                 vsetvli zero, {n}, e32, m4, tu, mu"
            ),
            Float::F16 => $body!(concat!(
                "vsetvli zero, {bytes}, e8, m2, ta, ma
                 vle8.v v16, ({row})
                 vsetvli zero, {n}, e32, m4, tu, mu\n",
                widen_f16!()
            )),
            Float::Bf16 => $body!(
                "vsetvli zero, {bytes}, e8, m2, ta, ma
                 vle8.v v16, ({row})
                 vsetvli zero, {n}, e32, m4, tu, mu
                 vzext.vf2 v8, v16
                 vsll.vi v8, v8, 16"
            ),
        }
    };
}

/// Inner product of a stored row with `x`.
///
/// # Safety
/// `row` heads `x.len()` elements.
unsafe fn dot(_: &Rvv, format: Float, row: *const u8, x: &[f32]) -> f32 {
    let mut partials = [0.0; PARTIALS];
    let mut add = |row: *const u8, x: &[f32], n: usize| {
        macro_rules! add {
            ($load:expr) => {
                // SAFETY: the proof; `row` heads `x.len()` elements, which are taken `n`, at most 16, at a time.
                unsafe {
                    vector_asm!(
                        [
                            "vsetivli zero, 16, e32, m4, ta, ma",
                            "vle32.v v24, ({partials})",
                            "2:",
                            $load,
                            "vle32.v v12, ({x})",
                            "vfmul.vv v8, v12, v8",
                            "vfadd.vv v24, v24, v8",
                            "add {row}, {row}, {bytes}",
                            "addi {x}, {x}, 64",
                            "bltu {x}, {end}, 2b",
                            "vsetivli zero, 16, e32, m4, ta, ma",
                            "vse32.v v24, ({partials})",
                        ]
                        row = inout(reg) row => _,
                        x = inout(reg) x.as_ptr() => _,
                        end = in(reg) x.as_ptr_range().end,
                        n = in(reg) n,
                        bytes = in(reg) n * format.bytes(),
                        partials = in(reg) partials.as_mut_ptr(),
                    );
                }
            };
        }
        by_format!(format, add);
    };
    let (whole, rest) = x.split_at(x.len() / PARTIALS * PARTIALS);
    if !whole.is_empty() {
        add(row, whole, PARTIALS);
    }
    if !rest.is_empty() {
        add(row.wrapping_add(whole.len() * format.bytes()), rest, rest.len());
    }
    fold(partials)
}

/// Converts stored elements.
fn widen(_: &Rvv, format: Float, stored: &[u8], out: &mut [f32]) {
    assert!(stored.len() >= format.bytes() * out.len());
    for (chunk, out) in out.chunks_mut(PARTIALS).enumerate() {
        let row = &stored[chunk * PARTIALS * format.bytes()..];
        macro_rules! copy {
            ($load:expr) => {
                // SAFETY: the proof; `row` and `out` head `n` elements, at most 16.
                unsafe {
                    vector_asm!(
                        [$load, "vse32.v v8, ({out})"]
                        row = in(reg) row.as_ptr(),
                        n = in(reg) out.len(),
                        bytes = in(reg) out.len() * format.bytes(),
                        out = in(reg) out.as_mut_ptr(),
                    );
                }
            };
        }
        by_format!(format, copy);
    }
}

/// Sums into `$sums` the partial sum `$i` of 16 positions; uses v8.
macro_rules! partial {
    ($i:literal, $sums:literal) => {
        concat!(
            "vmv.v.i ",
            $sums,
            ", 0
             addi {left}, {dim}, -",
            $i,
            "
             blez {left}, 3f
             addi {key}, {keys}, ",
            $i,
            " * 64
             addi {at}, {q}, ",
            $i,
            " * 4
             2:
             vle32.v v8, ({key})
             flw {element}, ({at})
             vfmul.vf v8, v8, {element}
             vfadd.vv ",
            $sums,
            ", ",
            $sums,
            ", v8
             addi {key}, {key}, 16 * 64
             addi {at}, {at}, 16 * 4
             addi {left}, {left}, -16
             bgtz {left}, 2b
             3:\n"
        )
    };
}

/// Adds two partial sums, or sums of them.
macro_rules! fold {
    ($sums:literal, $more:literal) => {
        concat!("vfadd.vv ", $sums, ", ", $sums, ", ", $more, "\n")
    };
}

/// The fold of the partial sums `$i`, `$i + 8`, `$i + 4` and `$i + 12`, which are given.
macro_rules! quarter {
    ($a:literal, $b:literal, $c:literal, $d:literal, $sums:literal, $second:literal, $third:literal) => {
        concat!(
            partial!($a, $sums),
            partial!($b, $second),
            fold!($sums, $second),
            partial!($c, $second),
            partial!($d, $third),
            fold!($second, $third),
            fold!($sums, $second)
        )
    };
}

/// The scores of 16 positions, for each head.
fn scores(_: &Rvv, keys: &[f32], q: &[f32], scale: f32, scores: &mut [f32], stride: usize) {
    const { assert!(POSITIONS == 16 && PARTIALS == 16) };
    let dim = keys.len() / POSITIONS;
    for (q, scores) in q.chunks_exact(dim).zip(scores.chunks_mut(stride)) {
        let scores = &mut scores[..POSITIONS];
        // SAFETY: the proof; `keys` are `dim` times 16, `q` has `dim` elements, and there are 16 scores.
        unsafe {
            vector_asm!(
                [
                    "vsetivli zero, 16, e32, m4, ta, ma",
                    quarter!(0, 8, 4, 12, "v16", "v20", "v24"),
                    quarter!(2, 10, 6, 14, "v20", "v24", "v28"),
                    fold!("v16", "v20"),
                    quarter!(1, 9, 5, 13, "v20", "v24", "v28"),
                    quarter!(3, 11, 7, 15, "v24", "v28", "v4"),
                    fold!("v20", "v24"),
                    fold!("v16", "v20"),
                    "vfmul.vf v16, v16, {scale}",
                    "vse32.v v16, ({scores})",
                ]
                keys = in(reg) keys.as_ptr(),
                q = in(reg) q.as_ptr(),
                dim = in(reg) dim,
                left = out(reg) _,
                key = out(reg) _,
                at = out(reg) _,
                element = out(freg) _,
                scale = in(freg) scale,
                scores = in(reg) scores.as_mut_ptr(),
            );
        }
    }
}

/// Adds the weighted values of some positions to each head's sums, 16 columns at a time.
fn mix(_: &Rvv, values: &[f32], dim: usize, weights: &[f32], stride: usize, out: &mut [f32]) {
    let positions = values.len() / dim;
    if positions == 0 {
        return;
    }
    for (out, weights) in out.chunks_exact_mut(dim).zip(weights.chunks(stride)) {
        let weights = &weights[..positions];
        for (chunk, out) in out.chunks_mut(PARTIALS).enumerate() {
            let value = &values[chunk * PARTIALS..];
            // SAFETY: the proof; `n` columns, at most 16, are inside each of `positions` values, of which there is at
            // least one.
            unsafe {
                vector_asm!(
                    [
                        "vsetvli zero, {n}, e32, m4, ta, ma",
                        "vle32.v v24, ({out})",
                        "2:",
                        "vle32.v v8, ({value})",
                        "flw {w}, ({weights})",
                        "vfmul.vf v8, v8, {w}",
                        "vfadd.vv v24, v24, v8",
                        "add {value}, {value}, {stride}",
                        "addi {weights}, {weights}, 4",
                        "bne {weights}, {end}, 2b",
                        "vse32.v v24, ({out})",
                    ]
                    value = inout(reg) value.as_ptr() => _,
                    weights = inout(reg) weights.as_ptr() => _,
                    w = out(freg) _,
                    end = in(reg) weights.as_ptr_range().end,
                    n = in(reg) out.len(),
                    stride = in(reg) 4 * dim,
                    out = in(reg) out.as_mut_ptr(),
                );
            }
        }
    }
}
