//! Small operators: every back-end against the definition, and what each operator means.

use super::{Rng, assert_same, fastest};
use crate::arch::{FORCED, Float, Kernels};
use crate::attention::{KvFormat, KvShape, attention, attention_scratch, store_keys, store_values};
use crate::exec::{Backend, Exec, Serial};
use crate::ops;

fn data(rng: &mut Rng, n: usize, nasty: bool) -> Vec<f32> {
    (0..n).map(|_| if nasty { rng.nasty() } else { 4.0 * rng.normal() }).collect()
}

#[test]
fn every_back_end_gives_the_definition() {
    let mut rng = Rng::new(10);
    let scalar = Backend::scalar().kernels();
    for n in (0..70).chain([127, 128, 500, 2048, 2049]) {
        for nasty in [false, true] {
            let (x, y) = (data(&mut rng, n, nasty), data(&mut rng, n, nasty));
            for backend in Backend::all() {
                let k = backend.kernels();
                let what = (backend, n, nasty);
                assert_same(&[k.dot(&x, &y)], &[scalar.dot(&x, &y)], ("dot", what));
                let pair = |f: &dyn Fn(&dyn crate::arch::Kernels, &mut [f32])| {
                    let (mut a, mut b) = (x.clone(), x.clone());
                    f(k, &mut a);
                    f(scalar, &mut b);
                    (a, b)
                };
                let (a, b) = pair(&|k, out| k.rms_norm(&x, &y, 1e-5, out));
                assert_same(&a, &b, ("rms_norm", what));
                let (a, b) = pair(&|k, out| k.softmax(out));
                assert_same(&a, &b, ("softmax", what));
                let (a, b) = pair(&|k, out| k.silu_mul(out, &y));
                assert_same(&a, &b, ("silu_mul", what));
                let (a, b) = pair(&|k, out| k.add(out, &y));
                assert_same(&a, &b, ("add", what));
                let (a, b) = pair(&|k, out| k.add_scaled(out, &y, 0.3));
                assert_same(&a, &b, ("add_scaled", what));
                let (a, b) = pair(&|k, out| k.scale(out, 0.3));
                assert_same(&a, &b, ("scale", what));
            }
        }
    }
}

#[test]
fn reading_reads_every_word() {
    let mut rng = Rng::new(13);
    for n in (0..40).chain([255, 256, 257, 1000, 4099]) {
        let bytes: Vec<u8> = (0..n).map(|_| rng.next() as u8).collect();
        let want = bytes.as_chunks::<8>().0.iter().fold(0, |parity, word| parity ^ u64::from_ne_bytes(*word));
        assert!(Backend::all().all(|backend| backend.read_only(&bytes) == want), "{n}");
    }
}

/// A back-end whose every operator leaves a mark.
struct Marked;

const MARK: f32 = 42.0;

impl Kernels for Marked {
    fn name(&self) -> &'static str {
        "marked"
    }
    fn dot_rows(&self, _: Float, _: &[u8], _: &[f32], out: &mut [f32]) {
        out.fill(MARK);
    }
    fn widen(&self, _: Float, _: &[u8], out: &mut [f32]) {
        out.fill(MARK);
    }
    fn scores(&self, _: &[f32], _: &[f32], _: f32, scores: &mut [f32], _: usize) {
        scores.fill(MARK);
    }
    fn mix(&self, _: &[f32], _: usize, _: &[f32], _: usize, out: &mut [f32]) {
        out.fill(MARK);
    }
    fn store_f16(&self, _: &[f32], out: &mut [u8]) {
        out.fill(42);
    }
    fn dot(&self, _: &[f32], _: &[f32]) -> f32 {
        MARK
    }
    fn rms_norm(&self, _: &[f32], _: &[f32], _: f32, out: &mut [f32]) {
        out.fill(MARK);
    }
    fn softmax(&self, x: &mut [f32]) {
        x.fill(MARK);
    }
    fn silu_mul(&self, gate: &mut [f32], _: &[f32]) {
        gate.fill(MARK);
    }
    fn add(&self, acc: &mut [f32], _: &[f32]) {
        acc.fill(MARK);
    }
    fn add_scaled(&self, acc: &mut [f32], _: &[f32], _: f32) {
        acc.fill(MARK);
    }
    fn scale(&self, x: &mut [f32], _: f32) {
        x.fill(MARK);
    }
}

#[test]
fn operators_use_the_back_end_that_they_are_given() {
    let exec = &Exec { backend: Backend::of(&Marked), workers: &Serial };
    let marked = |f: &dyn Fn(&mut [f32])| {
        let mut out = [0.0; 2];
        f(&mut out);
        assert_eq!(out, [MARK; 2]);
    };
    let x = &[1.0, 2.0];
    marked(&|out| out.fill(ops::dot(exec, x, x)));
    marked(&|out| ops::rms_norm(exec, x, x, 1e-5, out));
    marked(&|out| ops::softmax(exec, out));
    marked(&|out| ops::silu_mul(exec, out, x));
    marked(&|out| ops::add(exec, out, x));
    marked(&|out| ops::add_scaled(exec, out, x, 2.0));
    marked(&|out| ops::scale(exec, out, 2.0));
    let shape = KvShape { kv_heads: 1, head_dim: 2, capacity: 1 };
    let cache = &mut vec![0; shape.bytes(KvFormat::F16)];
    store_values(exec, KvFormat::F16, &shape, cache, 0, x);
    assert_eq!(cache[..4], [42; 4]);
    cache.fill(0);
    store_keys(exec, KvFormat::F16, &shape, cache, 0, x);
    assert_eq!((&cache[..2], &cache[2..32], &cache[32..34]), (&[42; 2][..], &[0; 30][..], &[42; 2][..]));
    let scratch = &mut vec![0.0; attention_scratch(&shape, 1, 1, 1)];
    let cache = &vec![0; shape.bytes(KvFormat::F16)];
    attention(exec, KvFormat::F16, &shape, cache, cache, x, 1, 1, 0, 0, 1.0, scratch, &mut [0.0; 2]);
    assert!(scratch.iter().filter(|x| **x == MARK).count() > 32);
}

/// A gate that is not above zero makes zero, of whatever; NaN shows.
#[test]
fn relu_hides_what_it_gates() {
    let mut gate = [2.0, 0.0, -0.0, -3.0, f32::NEG_INFINITY, -1.0, 1.0, f32::NAN, f32::MIN_POSITIVE];
    let up = [-1.5, f32::NAN, 1.0, f32::INFINITY, 1.0, -1.0, f32::NAN, 0.0, 2.0];
    ops::gate_mul(&fastest(), ops::Activation::Relu, &mut gate, &up);
    assert_eq!(gate.map(f32::to_bits)[..6], [-3.0f32, 0.0, 0.0, 0.0, 0.0, 0.0].map(f32::to_bits));
    assert!(gate[6].is_nan() && gate[7].is_nan() && gate[8] == 2.0 * f32::MIN_POSITIVE);
}

/// CI builds this once with `FOREBAY_BACKEND`.
#[test]
fn the_build_or_the_cpu_chooses() {
    let fastest = if cfg!(target_arch = "x86_64") {
        Backend::all().filter(|b| b.name() != "swar").last()
    } else {
        Backend::all().last()
    };
    let want = FORCED.or(fastest.map(|backend| backend.name()));
    assert_eq!(Some(Backend::detect().name()), want);
}

/// Some fixed bits, so that a change of the definition cannot go unseen.
#[test]
fn the_definition_stays() {
    let x: Vec<f32> = (0..100).map(|i| (i as f32 - 50.0) * 0.37).collect();
    let hash = |x: &[f32]| x.iter().fold(0u32, |h, v| h.rotate_left(5).wrapping_mul(0x9e37_79b1) ^ v.to_bits());
    let exps: Vec<f32> = x.iter().map(|&v| ops::exp(v)).collect();
    let mut soft = x.clone();
    ops::softmax(&fastest(), &mut soft);
    let mut norm = vec![0.0; 100];
    ops::rms_norm(&fastest(), &x, &exps, 1e-6, &mut norm);
    let mut silu = x.clone();
    ops::silu_mul(&fastest(), &mut silu, &soft);
    let (mut cos, mut sin) = (vec![0.0; 100], vec![0.0; 100]);
    ops::rope_tables(1234, &exps, 1.1, &mut cos, &mut sin);
    let hashes = [hash(&exps), hash(&soft), hash(&norm), hash(&silu), hash(&cos), hash(&sin)];
    assert_eq!(hashes, [74930956, 3092466891, 4012696876, 1735201009, 2173164154, 785295931]);
}

#[test]
fn rope_rotates_pairs_and_leaves_the_rest() {
    let mut rng = Rng::new(11);
    let inv_freq: Vec<f32> = (0..8).map(|i| 10000f32.powf(-f32::from(i as u8) / 8.0)).collect();
    let (mut cos, mut sin) = ([0.0; 8], [0.0; 8]);
    ops::rope_tables(77, &inv_freq, 1.0, &mut cos, &mut sin);
    let x = rng.normals(20);
    let mut y = x.clone();
    ops::rope(&mut y, &cos, &sin);
    for i in 0..8 {
        let angle = f64::from(77.0 * inv_freq[i]);
        let (a, b) = (f64::from(x[i]), f64::from(x[i + 8]));
        assert!((f64::from(y[i]) - (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
        assert!((f64::from(y[i + 8]) - (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
    }
    assert_same(&y[16..], &x[16..], "rest");
}

#[test]
fn short_conv_is_a_causal_convolution() {
    let mut rng = Rng::new(12);
    for taps in 1..6 {
        let (hidden, tokens) = (7, 9);
        let bcx = rng.normals(tokens * 3 * hidden);
        let (weight, bias) = (rng.normals(hidden * taps), rng.normals(hidden));
        let value = |t: usize, c: usize| f64::from(bcx[t * 3 * hidden + c]) * f64::from(bcx[(t * 3 + 2) * hidden + c]);
        for bias in [None, Some(&bias[..])] {
            let mut state = vec![0.0; (taps - 1) * hidden];
            let mut out = vec![0.0; tokens * hidden];
            ops::short_conv(&bcx, &weight, bias, &mut state, tokens, hidden, taps, &mut out);
            for t in 0..tokens {
                for c in 0..hidden {
                    let mut want = bias.map_or(0.0, |b| f64::from(b[c]));
                    for tap in 0..taps {
                        if t + tap + 1 >= taps {
                            want += f64::from(weight[c * taps + tap]) * value(t + tap + 1 - taps, c);
                        }
                    }
                    want *= f64::from(bcx[(t * 3 + 1) * hidden + c]);
                    assert!((f64::from(out[t * hidden + c]) - want).abs() < 1e-5 * (1.0 + want.abs()));
                }
            }
            for tap in 0..taps - 1 {
                for c in 0..hidden {
                    let want = value(tokens + 1 + tap - taps, c);
                    assert!((f64::from(state[tap * hidden + c]) - want).abs() < 1e-6 * (1.0 + want.abs()));
                }
            }
            // One token at a time gives the same bits.
            let mut state2 = vec![0.0; (taps - 1) * hidden];
            for (t, want) in out.chunks(hidden).enumerate() {
                let mut one = vec![0.0; hidden];
                let bcx = &bcx[t * 3 * hidden..(t + 1) * 3 * hidden];
                ops::short_conv(bcx, &weight, bias, &mut state2, 1, hidden, taps, &mut one);
                assert_same(&one, want, "token");
            }
            assert_same(&state2, &state, "state");
        }
    }
}

#[test]
fn argmax_takes_the_first_and_skips_nan() {
    assert_eq!(ops::argmax(&[]), 0);
    assert_eq!(ops::argmax(&[f32::NAN, f32::NAN]), 0);
    assert_eq!(ops::argmax(&[f32::NAN, f32::NEG_INFINITY]), 1);
    assert_eq!(ops::argmax(&[1.0, 3.0, f32::NAN, 3.0]), 1);
    assert_eq!(ops::argmax(&[-0.0, 0.0]), 0);
}

#[test]
fn non_finite_is_found_anywhere() {
    for n in 1..40 {
        for at in 0..n {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = vec![f32::MAX; n];
                assert!(!ops::has_non_finite(&x));
                x[at] = bad;
                assert!(ops::has_non_finite(&x));
            }
        }
    }
}

#[test]
fn softmax_of_special_values() {
    let mut x = [0.0, f32::NEG_INFINITY, 0.0];
    ops::softmax(&fastest(), &mut x);
    assert_eq!(x, [0.5, 0.0, 0.5]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = [0.0, bad, 1.0];
        ops::softmax(&fastest(), &mut x);
        assert!(x.iter().all(|v| v.is_nan()));
    }
    let mut x = [f32::NEG_INFINITY; 3];
    ops::softmax(&fastest(), &mut x);
    assert!(x.iter().all(|v| v.is_nan()));
    ops::softmax(&fastest(), &mut []);
}
