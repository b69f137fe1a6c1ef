//! Logits, greedy tokens and routing against software that is not ours, for every case whose architecture is
//! supported.

use std::path::{Path, PathBuf};

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::reference::{self, Reference, argmax, difference};
use forebay_conformance::{Run, Setup, fixtures, image_of, run, shared_references};

fn f32_options() -> ConvertOptions {
    ConvertOptions { weights: Some(WeightChoice::F32), ..ConvertOptions::default() }
}

/// Cases of the repository and, where they lie beside it, all others of the same families.
fn cases() -> Vec<PathBuf> {
    let folders = std::iter::once(fixtures()).chain(shared_references());
    let mut cases: Vec<PathBuf> = folders
        .flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()))
        .filter(|case| {
            let name = case.file_name().unwrap().to_string_lossy();
            case.join("refs.safetensors").is_file() && (name.starts_with("llama-") || name.starts_with("lfm2"))
        })
        .collect();
    cases.sort();
    assert!(cases.len() >= 10, "the repository's references are missing");
    cases
}

fn check(name: &str, run: &Run, want: &Reference, logits: &[f32]) {
    let vocab = logits.len() / want.tokens.len();
    let (worst, bound) = difference(&run.logits, logits);
    assert!(worst <= bound, "{name}: max |dlogit| {worst:e} > {bound:e}");
    println!("{name}: max |dlogit| {worst:.2e}, bound {bound:.2e}");
    // Row i scores token i + 1: from the prompt's last row on, the best one is the greedy continuation.
    for position in want.prompt_len - 1..want.tokens.len() - 1 {
        let row = &run.logits[position * vocab..][..vocab];
        assert_eq!(argmax(row), want.tokens[position + 1] as usize, "{name}: greedy token at {position}");
    }
}

#[test]
fn safetensors_as_f32_agree_with_transformers() {
    for case in cases() {
        let name = case.file_name().unwrap().to_string_lossy();
        let want = reference::load(&case).unwrap();
        let image = image_of(&case, &f32_options()).unwrap();
        let got = run(&image, &Setup::default(), &want.tokens).unwrap();
        check(&name, &got, &want, &want.logits);
        assert_eq!(got.choices.len(), want.routers.len(), "{name}: routed layers");
        for ((layer, choices), (want_layer, experts, weights)) in got.choices.iter().zip(&want.routers) {
            assert_eq!(layer, want_layer);
            let chosen: Vec<u32> = choices.iter().map(|c| c.unit.into()).collect();
            assert_eq!(&chosen, experts, "{name}: experts of layer {layer}");
            for (choice, weight) in choices.iter().zip(weights) {
                assert!((choice.weight - weight).abs() <= 1e-5, "{name}: {choice:?}, weight {weight}");
            }
        }
    }
}

/// The hub's older spelling of the same configuration gives the same image.
#[test]
fn legacy_configurations_mean_the_same() {
    for case in cases() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(case.join("config.legacy.json"), dir.path().join("config.json")).unwrap();
        std::fs::copy(case.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        let want = reference::load(&case).unwrap();
        let image = image_of(dir.path(), &f32_options()).unwrap();
        let got = run(&image, &Setup::default(), &want.tokens).unwrap();
        check(&format!("{} (legacy)", case.display()), &got, &want, &want.logits);
    }
}

/// A GGUF's weights, dequantised, are the values that llama.cpp computes with.
#[test]
fn gguf_agrees_with_llama_cpp() {
    let check_gguf = |dir: &Path, file: &str, logits: &[f32], want: &Reference| {
        let image = image_of(&dir.join(file), &f32_options()).unwrap();
        let got = run(&image, &Setup::default(), &want.tokens).unwrap();
        let (worst, bound) = difference(&got.logits, logits);
        assert!(worst <= bound, "{}/{file}: max |dlogit| {worst:e} > {bound:e}", dir.display());
    };
    let mut quantised = 0;
    for case in cases() {
        let want = reference::load(&case).unwrap();
        // llama.cpp's converter has no key for this case's routing (no bias, no normalisation, a factor).
        let expressible = !case.ends_with("lfm2moe-nonorm-scale-nobias");
        if expressible && case.join("model.f32.gguf").is_file() {
            check_gguf(&case, "model.f32.gguf", &want.logits, &want);
        }
        for quant in ["q8_0", "q4_0"] {
            let file = format!("model.{quant}.gguf");
            if case.join(&file).is_file() {
                let path = case.join("refs_gguf.safetensors");
                let logits = reference::tensor(&path, &format!("{quant}.dequant_f32_logits")).unwrap();
                check_gguf(&case, &file, &logits, &want);
                quantised += 1;
            }
        }
    }
    assert!(quantised >= 2, "no quantised GGUF was found");
}

/// Quantised activations leave the logits close to those of the same weights in f32.
#[test]
fn native_low_bit_products_stay_close() {
    let case = fixtures().join("lfm2moe");
    let want = reference::load(&case).unwrap();
    for quant in ["q8_0", "q4_0"] {
        let logits =
            reference::tensor(&case.join("refs_gguf.safetensors"), &format!("{quant}.dequant_f32_logits")).unwrap();
        let image = image_of(&case.join(format!("model.{quant}.gguf")), &ConvertOptions::default()).unwrap();
        let got = run(&image, &Setup::default(), &want.tokens).unwrap();
        let square = |(a, b): (&f32, &f32)| f64::from(a - b).powi(2);
        let rms = (got.logits.iter().zip(&logits).map(square).sum::<f64>() / logits.len() as f64).sqrt();
        // llama.cpp's 8-bit activations differ from f32 by 0.12 to 0.13 rms on this case; 7 bits have twice the step.
        let bound = if quant == "q8_0" { 0.2 } else { 0.4 };
        assert!(rms < bound, "{quant}: rms {rms}");
        assert!(rms > 0.0, "{quant}: activations were not quantised");
    }
}
