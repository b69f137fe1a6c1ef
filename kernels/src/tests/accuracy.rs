//! The scalar functions against binary64.

use super::{Rng, fastest, nmse};
use crate::ops;
use crate::pack::f16;
use crate::reference::float::f16_to_f32;

/// Error in units in the last place of the result.
fn ulps(got: f32, want: f64) -> f64 {
    let rounded = want as f32;
    if rounded.is_infinite() || got == rounded {
        return if got == rounded { 0.0 } else { f64::INFINITY };
    }
    let unit =
        f64::from(f32::from_bits((rounded.abs().to_bits() & 0x7f80_0000).max(1 << 23))) * f64::from(f32::EPSILON);
    (f64::from(got) - want).abs() / unit
}

#[test]
fn exp_is_within_two_ulps_everywhere() {
    let mut worst = 0.0f64;
    for bits in (0..0xff80_0000u32).step_by(977) {
        let x = f32::from_bits(bits);
        if x.is_nan() {
            continue;
        }
        let error = ulps(ops::exp(x), f64::from(x).exp());
        assert!(error < 2.0, "exp({x:e}): {error}");
        worst = worst.max(error);
    }
    for i in -1_100_000..900_000 {
        let x = i as f32 * 1e-4;
        let error = ulps(ops::exp(x), f64::from(x).exp());
        assert!(error < 2.0, "exp({x:e}): {error}");
    }
    assert!(worst > 0.3, "the measure sees errors");
}

#[test]
fn exp_saturates_and_keeps_nan() {
    assert_eq!(ops::exp(0.0), 1.0);
    assert_eq!(ops::exp(-0.0), 1.0);
    assert_eq!(ops::exp(88.72284), f64::from(88.72284f32).exp() as f32);
    assert_eq!(ops::exp(88.8), f32::INFINITY);
    assert_eq!(ops::exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(ops::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(ops::exp(-104.5), 0.0);
    assert!(ops::exp(-103.2) > 0.0, "the smallest subnormal is reached");
    assert!(ops::exp(f32::NAN).is_nan());
}

#[test]
fn sigmoid_and_silu_are_accurate() {
    for i in -200_000..200_000 {
        let x = i as f32 * 5e-4;
        let want = 1.0 / (1.0 + (-f64::from(x)).exp());
        let got = ops::sigmoid(x);
        // Beyond e^88 the denominator overflows and the result is 0 instead of a subnormal.
        assert!((f64::from(got) - want).abs() <= 4e-7 * want + 2e-38, "sigmoid({x}) = {got}, {want}");
        let mut gate = [x];
        ops::silu_mul(&fastest(), &mut gate, &[1.5]);
        let want = f64::from(x) * want * 1.5;
        assert!((f64::from(gate[0]) - want).abs() <= 6e-7 * want.abs() + 1e-35);
    }
}

#[test]
fn softmax_is_accurate() {
    let mut rng = Rng::new(20);
    for n in [1, 2, 15, 16, 17, 1000, 5000] {
        let x: Vec<f32> = (0..n).map(|_| 5.0 * rng.normal()).collect();
        let max = x.iter().cloned().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = x.iter().map(|&v| (f64::from(v) - f64::from(max)).exp()).collect();
        let sum: f64 = e.iter().sum();
        let mut got = x.clone();
        ops::softmax(&fastest(), &mut got);
        let want: Vec<f64> = e.iter().map(|e| e / sum).collect();
        assert!(nmse(&got, &want) < 1e-12);
        assert!((got.iter().map(|&p| f64::from(p)).sum::<f64>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn rms_norm_and_dot_are_accurate() {
    let mut rng = Rng::new(21);
    for n in [1, 15, 100, 2048] {
        let (x, w) = (rng.normals(n), rng.normals(n));
        let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n as f64;
        let want: Vec<f64> =
            x.iter().zip(&w).map(|(&x, &w)| f64::from(x) / (mean + 1e-5).sqrt() * f64::from(w)).collect();
        let mut got = vec![0.0; n];
        ops::rms_norm(&fastest(), &x, &w, 1e-5, &mut got);
        assert!(nmse(&got, &want) < 1e-12);
        let want: f64 = x.iter().zip(&w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
        assert!((f64::from(ops::dot(&fastest(), &x, &w)) - want).abs() < 1e-5 * (n as f64).sqrt());
    }
}

#[test]
fn rope_tables_are_accurate() {
    for pos in [0u32, 1, 2, 1000, 131_071] {
        let inv_freq: Vec<f32> = (0..64).map(|i| 1e6f32.powf(-(i as f32) / 64.0)).collect();
        let (mut cos, mut sin) = (vec![0.0; 64], vec![0.0; 64]);
        ops::rope_tables(pos, &inv_freq, 1.25, &mut cos, &mut sin);
        for i in 0..64 {
            let angle = f64::from(pos as f32 * inv_freq[i]);
            assert!((f64::from(cos[i]) - 1.25 * angle.cos()).abs() < 2e-7);
            assert!((f64::from(sin[i]) - 1.25 * angle.sin()).abs() < 2e-7);
        }
    }
}

#[test]
fn binary16_converts_exactly() {
    for bits in 0..=u16::MAX {
        let (got, want) = (f16_to_f32(bits), f16::from_bits(bits).to_f32());
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:04x}");
    }
}
