//! The vector extension for the small operators. Elements are independent of one another here, or summed in the 16
//! partial sums of the definition, so registers of any length give the same bits.

use super::rvv::Rvv;
use crate::reference::float::{PARTIALS, fold};
use crate::reference::{math, quant};
use core::arch::asm;

/// `asm!` with the vector extension and all vector registers.
macro_rules! float_asm {
    ([$($text:expr),* $(,)?] $($operands:tt)*) => {
        asm!(
            ".option push", ".option arch, +v", $($text,)* ".option pop",
            $($operands)*
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
            out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
            out("v22") _, out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _,
            out("v29") _, out("v30") _, out("v31") _,
            options(nostack)
        )
    };
}

/// The constants of [`math::exp`] in the order in which [`exp`] has them in registers.
#[allow(clippy::excessive_precision)]
static EXP: [f32; 13] = [
    89.0,
    -104.0,
    core::f32::consts::LOG2_E,
    math::ROUND,
    0.693_359_375,
    -2.121_944_40e-4,
    1.987_569_15e-4,
    1.398_199_95e-3,
    8.333_451_9e-3,
    4.166_579_6e-2,
    1.666_666_55e-1,
    5.000_000_1e-1,
    1.0,
];

/// Loads [`EXP`] from `{exp}` into fa0 to fa7 and ft2 to ft6.
macro_rules! exp_constants {
    () => {
        "flw fa0, 0({exp})
         flw fa1, 4({exp})
         flw fa2, 8({exp})
         flw fa3, 12({exp})
         flw fa4, 16({exp})
         flw fa5, 20({exp})
         flw fa6, 24({exp})
         flw fa7, 28({exp})
         flw ft2, 32({exp})
         flw ft3, 36({exp})
         flw ft4, 40({exp})
         flw ft5, 44({exp})
         flw ft6, 48({exp})"
    };
}

/// e to the power of v8 (4 registers), step by step as [`math::exp`]; uses v0 and v12 to v27.
macro_rules! exp {
    () => {
        "vfmin.vf v12, v8, fa0
         vfmax.vf v12, v12, fa1
         vfmul.vf v16, v12, fa2
         vfadd.vf v16, v16, fa3
         vsub.vx v16, v16, {round}
         vfcvt.f.x.v v20, v16
         vfmul.vf v24, v20, fa4
         vfsub.vv v12, v12, v24
         vfmul.vf v24, v20, fa5
         vfsub.vv v12, v12, v24
         vfmul.vf v20, v12, fa6
         vfadd.vf v20, v20, fa7
         vfmul.vv v20, v20, v12
         vfadd.vf v20, v20, ft2
         vfmul.vv v20, v20, v12
         vfadd.vf v20, v20, ft3
         vfmul.vv v20, v20, v12
         vfadd.vf v20, v20, ft4
         vfmul.vv v20, v20, v12
         vfadd.vf v20, v20, ft5
         vfmul.vv v24, v12, v12
         vfmul.vv v20, v20, v24
         vfadd.vv v20, v20, v12
         vfadd.vf v20, v20, ft6
         vsra.vi v12, v16, 1
         vsub.vv v16, v16, v12
         vadd.vx v12, v12, {bias}
         vsll.vi v12, v12, 23
         vfmul.vv v20, v20, v12
         vadd.vx v16, v16, {bias}
         vsll.vi v16, v16, 23
         vfmul.vv v20, v20, v16
         vmfne.vv v0, v8, v8
         vmerge.vvm v8, v20, v8, v0"
    };
}

/// Runs the text on as many elements at a time as 4 registers hold, and moves the pointers on.
macro_rules! elementwise {
    ($n:expr, [$($head:expr),*], [$($text:expr),* $(,)?], [$($next:expr),*] $($operands:tt)*) => {
        if $n > 0 {
            // SAFETY: the proof; every pointer heads `n` elements, of which there is one.
            unsafe {
                float_asm!(
                    [
                        $($head,)*
                        "2:",
                        "vsetvli {step}, {n}, e32, m4, ta, ma",
                        $($text,)*
                        "sub {n}, {n}, {step}",
                        "slli {step}, {step}, 2",
                        $($next,)*
                        "bnez {n}, 2b",
                    ]
                    n = inout(reg) $n => _,
                    step = out(reg) _,
                    $($operands)*
                );
            }
        }
    };
}

/// `acc += x`.
pub(super) fn add(_: &Rvv, acc: &mut [f32], x: &[f32]) {
    elementwise!(acc.len().min(x.len()), [],
        ["vle32.v v8, ({acc})", "vle32.v v12, ({x})", "vfadd.vv v8, v8, v12", "vse32.v v8, ({acc})"],
        ["add {acc}, {acc}, {step}", "add {x}, {x}, {step}"]
        acc = inout(reg) acc.as_mut_ptr() => _,
        x = inout(reg) x.as_ptr() => _,
    );
}

/// `acc += x * w`, not fused.
pub(super) fn add_scaled(_: &Rvv, acc: &mut [f32], x: &[f32], w: f32) {
    elementwise!(acc.len().min(x.len()), [],
        [
            "vle32.v v8, ({acc})", "vle32.v v12, ({x})", "vfmul.vf v12, v12, {w}", "vfadd.vv v8, v8, v12",
            "vse32.v v8, ({acc})",
        ],
        ["add {acc}, {acc}, {step}", "add {x}, {x}, {step}"]
        acc = inout(reg) acc.as_mut_ptr() => _,
        x = inout(reg) x.as_ptr() => _,
        w = in(freg) w,
    );
}

/// `x *= s`.
pub(super) fn scale(_: &Rvv, x: &mut [f32], s: f32) {
    elementwise!(x.len(), [],
        ["vle32.v v8, ({x})", "vfmul.vf v8, v8, {s}", "vse32.v v8, ({x})"],
        ["add {x}, {x}, {step}"]
        x = inout(reg) x.as_mut_ptr() => _,
        s = in(freg) s,
    );
}

/// `out = x * inverse * weight`.
fn scale_and_weigh(_: &Rvv, x: &[f32], inverse: f32, weight: &[f32], out: &mut [f32]) {
    elementwise!(out.len().min(x.len()).min(weight.len()), [],
        [
            "vle32.v v8, ({x})", "vle32.v v12, ({weight})", "vfmul.vf v8, v8, {inverse}", "vfmul.vv v8, v8, v12",
            "vse32.v v8, ({out})",
        ],
        ["add {x}, {x}, {step}", "add {weight}, {weight}, {step}", "add {out}, {out}, {step}"]
        x = inout(reg) x.as_ptr() => _,
        weight = inout(reg) weight.as_ptr() => _,
        out = inout(reg) out.as_mut_ptr() => _,
        inverse = in(freg) inverse,
    );
}

/// RMS norm; `square` is the inner product of `x` with itself.
pub(super) fn rms_norm(rvv: &Rvv, square: f32, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    scale_and_weigh(rvv, x, math::inverse_rms(square, x.len(), eps), weight, out);
}

/// `gate = gate / (1 + e^-gate) * up`.
pub(super) fn silu_mul(_: &Rvv, gate: &mut [f32], up: &[f32]) {
    elementwise!(gate.len().min(up.len()), [exp_constants!()],
        [
            "vle32.v v28, ({gate})",
            "vfneg.v v8, v28",
            exp!(),
            "vle32.v v12, ({up})",
            "vfadd.vf v8, v8, ft6",
            "vfdiv.vv v8, v28, v8",
            "vfmul.vv v8, v8, v12",
            "vse32.v v8, ({gate})",
        ],
        ["add {gate}, {gate}, {step}", "add {up}, {up}, {step}"]
        gate = inout(reg) gate.as_mut_ptr() => _,
        up = inout(reg) up.as_ptr() => _,
        exp = in(reg) EXP.as_ptr(),
        round = in(reg) math::ROUND.to_bits(),
        bias = in(reg) 127,
        out("fa0") _, out("fa1") _, out("fa2") _, out("fa3") _, out("fa4") _, out("fa5") _, out("fa6") _,
        out("fa7") _, out("ft2") _, out("ft3") _, out("ft4") _, out("ft5") _, out("ft6") _,
    );
}

/// The largest element, NaN aside; negative infinity if there is none.
fn max(_: &Rvv, x: &[f32]) -> f32 {
    let mut max = f32::NEG_INFINITY;
    elementwise!(x.len(), [],
        ["vle32.v v8, ({x})", "vfmv.s.f v4, {max}", "vfredmax.vs v4, v8, v4", "vfmv.f.s {max}, v4"],
        ["add {x}, {x}, {step}"]
        x = inout(reg) x.as_ptr() => _,
        max = inout(freg) max,
    );
    max
}

/// The sum by 16 partial sums.
fn sum(_: &Rvv, x: &[f32]) -> f32 {
    let mut partials = [0.0; PARTIALS];
    if !x.is_empty() {
        // SAFETY: the proof; `x` heads `n` elements, of which there is one, taken at most 16 at a time.
        unsafe {
            float_asm!(
                [
                    "vsetivli zero, 16, e32, m4, ta, ma",
                    "vmv.v.i v24, 0",
                    "2:",
                    "li {step}, 16",
                    "bgeu {n}, {step}, 3f",
                    "mv {step}, {n}",
                    "3:",
                    "vsetvli zero, {step}, e32, m4, tu, ma",
                    "vle32.v v8, ({x})",
                    "vfadd.vv v24, v24, v8",
                    "sub {n}, {n}, {step}",
                    "addi {x}, {x}, 64",
                    "bnez {n}, 2b",
                    "vsetivli zero, 16, e32, m4, ta, ma",
                    "vse32.v v24, ({partials})",
                ]
                n = inout(reg) x.len() => _,
                step = out(reg) _,
                x = inout(reg) x.as_ptr() => _,
                partials = in(reg) partials.as_mut_ptr(),
            );
        }
    }
    fold(partials)
}

/// Softmax in place.
pub(super) fn softmax(rvv: &Rvv, x: &mut [f32]) {
    let max = max(rvv, x);
    elementwise!(x.len(), [exp_constants!()],
        ["vle32.v v8, ({x})", "vfsub.vf v8, v8, {max}", exp!(), "vse32.v v8, ({x})"],
        ["add {x}, {x}, {step}"]
        x = inout(reg) x.as_mut_ptr() => _,
        max = in(freg) max,
        exp = in(reg) EXP.as_ptr(),
        round = in(reg) math::ROUND.to_bits(),
        bias = in(reg) 127,
        out("fa0") _, out("fa1") _, out("fa2") _, out("fa3") _, out("fa4") _, out("fa5") _, out("fa6") _,
        out("fa7") _, out("ft2") _, out("ft3") _, out("ft4") _, out("ft5") _, out("ft6") _,
    );
    scale(rvv, x, 1.0 / sum(rvv, x));
}

/// Quantises one group; all of it, or what `x` has of it.
pub(super) fn quantise_group(_: &Rvv, limit: i32, x: &[f32], codes: &mut [u8]) -> (f32, i32) {
    let mut amax = 0u32;
    elementwise!(x.len(), [],
        ["vle32.v v8, ({x})", "vand.vx v8, v8, {mask}", "vmv.s.x v4, {max}", "vredmaxu.vs v4, v8, v4", "vmv.x.s {max}, v4"],
        ["add {x}, {x}, {step}"]
        x = inout(reg) x.as_ptr() => _,
        max = inout(reg) amax,
        mask = in(reg) 0x7fff_ffff,
    );
    let Some((scale, inverse)) = quant::scale_and_inverse(limit, amax) else {
        codes.fill(0);
        return (quant::scale_without_codes(amax), 0);
    };
    let mut total = 0;
    elementwise!(x.len().min(codes.len()), [],
        [
            "vle32.v v8, ({x})",
            "vfmul.vf v8, v8, {inverse}",
            "vfadd.vf v8, v8, {round}",
            "vsub.vx v8, v8, {bits}",
            "vmin.vx v8, v8, {limit}",
            "vmax.vx v8, v8, {least}",
            "vmv.s.x v4, {total}",
            "vredsum.vs v4, v8, v4",
            "vmv.x.s {total}, v4",
            "vsetvli zero, zero, e16, m2, ta, ma",
            "vnsrl.wi v12, v8, 0",
            "vsetvli zero, zero, e8, m1, ta, ma",
            "vnsrl.wi v16, v12, 0",
            "vse8.v v16, ({codes})",
            "add {codes}, {codes}, {step}",
        ],
        ["add {x}, {x}, {step}"]
        x = inout(reg) x.as_ptr() => _,
        codes = inout(reg) codes.as_mut_ptr() => _,
        inverse = in(freg) inverse,
        round = in(freg) math::ROUND,
        bits = in(reg) math::ROUND.to_bits(),
        limit = in(reg) limit,
        least = in(reg) -limit,
        total = inout(reg) total,
    );
    codes[x.len()..].fill(0);
    (scale, total)
}
