//! Values survive: from every type, through every encoding, at every offset.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;

use forebay::convert::{ConvertOptions, Tally, WeightChoice};
use forebay::inspect::inspect;
use forebay::neurons::{LayerNeurons, NeuronPlan};
use forebay::source::{DType, dequantise};
use forebay_kernels::weights::{Encoding, Fields, Group};
use forebay_runtime::model::ModelError;
use forebay_runtime::model::record::{NO_LAYER, RECORD_VERSION, Role};
use forebay_storage::image::SectionKind;

use crate::support::*;

fn floats(weights: WeightChoice) -> ConvertOptions {
    ConvertOptions { weights: Some(weights), ..ConvertOptions::default() }
}

/// Checks every tensor of the image against the small Llama's own values, seen through `stored`.
fn check_llama(image: &Image, tensors: &Tensors, same: impl Fn(&[f32], &[f32], &str)) {
    for (role, name) in [
        (Role::Embedding, "model.embed_tokens.weight"),
        (Role::OutputHead, "lm_head.weight"),
        (Role::FinalNorm, "model.norm.weight"),
    ] {
        same(&image.tensor(NO_LAYER, role).unwrap().1, &tensors[name].values(), name);
    }
    for l in 0..LAYERS {
        let source = |name: &str| tensors[&format!("model.layers.{l}.{name}")].values();
        for (role, name) in [
            (Role::OperatorNorm, "input_layernorm.weight"),
            (Role::FfnNorm, "post_attention_layernorm.weight"),
            (Role::Query, "self_attn.q_proj.weight"),
            (Role::Key, "self_attn.k_proj.weight"),
            (Role::Value, "self_attn.v_proj.weight"),
            (Role::AttentionOut, "self_attn.o_proj.weight"),
            (Role::QueryBias, "self_attn.q_proj.bias"),
            (Role::KeyBias, "self_attn.k_proj.bias"),
            (Role::ValueBias, "self_attn.v_proj.bias"),
            (Role::AttentionOutBias, "self_attn.o_proj.bias"),
            (Role::DownBias, "mlp.down_proj.bias"),
        ] {
            same(&image.tensor(l as u16, role).unwrap().1, &source(name), name);
        }
        let layer = image.layer(l);
        let (units, unit_width) = (layer.units, layer.unit_width);
        assert!(units * unit_width >= WIDTH && (units - 1) * unit_width < WIDTH);
        for (role, name) in [(Role::GateBias, "mlp.gate_proj.bias"), (Role::UpBias, "mlp.up_proj.bias")] {
            let stored = image.tensor(l as u16, role).unwrap().1;
            same(&stored[..WIDTH], &source(name), name);
            assert_eq!(stored[WIDTH..], vec![0.0; units * unit_width - WIDTH]);
        }
        let (mut gate, mut up, mut down) = (Vec::new(), Vec::new(), vec![Vec::new(); HIDDEN]);
        for u in 0..units {
            let unit = image.unit(l, u, layer.unit.levels());
            gate.extend(matrix_values(&unit.gate));
            up.extend(matrix_values(&unit.up));
            for (row, part) in down.iter_mut().zip(matrix_values(&unit.down).chunks_exact(unit_width)) {
                row.extend_from_slice(part);
            }
        }
        for (mut found, name) in [(gate, "mlp.gate_proj.weight"), (up, "mlp.up_proj.weight")] {
            let padding = found.split_off(WIDTH * HIDDEN);
            assert!(padding.iter().all(|x| *x == 0.0), "neurons that do not exist are zero");
            same(&found, &source(name), name);
        }
        let down: Vec<f32> = down.iter().flat_map(|row| row[..WIDTH].to_vec()).collect();
        same(&down, &source("mlp.down_proj.weight"), "mlp.down_proj.weight");
    }
}

#[test]
fn floats_are_kept_bit_by_bit() {
    let folder = Folder::new();
    let exact = |a: &[f32], b: &[f32], name: &str| {
        assert_eq!(
            a.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            b.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            "{name}"
        );
    };
    type Make = fn(&[usize], &[f32]) -> Tensor;
    let cases: [(Make, WeightChoice, Encoding); 3] = [
        (Tensor::f32, WeightChoice::F32, Encoding::F32),
        (Tensor::bf16, WeightChoice::F16, Encoding::Bf16),
        (Tensor::f16, WeightChoice::F16, Encoding::F16),
    ];
    for (i, (make, weights, encoding)) in cases.into_iter().enumerate() {
        for (page, unit_width) in [(4096, None), (512, Some(64)), (16384, Some(WIDTH as u32))] {
            let tensors = llama_tensors(make);
            let path = folder.join(&format!("{i}"));
            write_folder(&path, &llama_config(), &tensors);
            let options = ConvertOptions { page, unit_width, ..floats(weights) };
            let report = quietly(&path, &folder.join("out.fby"), &options).unwrap();
            let image = Image::open(&folder.join("out.fby"));
            assert_eq!(image.superblock.page(), page);
            assert_eq!(report.image_len, image.bytes.len() as u64);
            assert_eq!(image.layer(0).unit.gate.encoding, encoding);
            assert_eq!(image.tensor(0, Role::Query).unwrap().0.encoding, encoding);
            if let Some(width) = unit_width {
                assert_eq!(image.layer(0).unit_width, width as usize);
            }
            check_llama(&image, &tensors, exact);
            assert!(report.encodings.values().all(|t: &Tally| t.squared_error == 0.0));
        }
    }
}

#[test]
fn quantised_values_are_as_near_as_reported() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    let tensors = llama_tensors(Tensor::f32);
    // Uniform numbers: the relative error of b bits is about 2^-b at best.
    for (weights, bound) in [
        (WeightChoice::Q8, 0.006),
        (WeightChoice::Q4, 0.08),
        (WeightChoice::Q3, 0.15),
        (WeightChoice::Q2, 0.28),
        (WeightChoice::Q1, 0.55),
        (WeightChoice::Ternary, 0.4),
    ] {
        for group in [Group::G32, Group::G64, Group::G128] {
            for affine in [false, true] {
                let options = ConvertOptions { group: Some(group), affine: Some(affine), ..floats(weights) };
                let report = quietly(&path, &folder.join("out.fby"), &options).unwrap();
                let image = Image::open(&folder.join("out.fby"));
                let (mut error, mut count) = (0.0f64, 0u64);
                let sum = std::cell::RefCell::new((&mut error, &mut count));
                check_llama(&image, &tensors, |a, b, name| {
                    let e: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                    let power: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
                    assert!(
                        (e / power).sqrt() < bound,
                        "{weights:?} {group:?} {affine} {name}: {}",
                        (e / power).sqrt()
                    );
                    let mut sum = sum.borrow_mut();
                    *sum.0 += e;
                    *sum.1 += b.len() as u64;
                });
                let reported: f64 = report.encodings.values().map(|t| t.squared_error).sum();
                assert_eq!(report.encodings.values().map(|t| t.weights).sum::<u64>(), count);
                assert!((reported - error).abs() <= 1e-4 * error, "{weights:?}: reported {reported}, found {error}");
                let Encoding::Quant(q) = image.layer(0).unit.up.encoding else { panic!("not quantised") };
                assert_eq!(
                    (q.group, q.affine),
                    (group, affine && !matches!(weights, WeightChoice::Q8 | WeightChoice::Ternary))
                );
            }
        }
    }
}

/// Weights that are -s, 0 and s keep their values, from floats and from GGML's blocks.
#[test]
fn ternary_weights_are_kept() {
    let folder = Folder::new();
    let ternary = |shape: &[usize], x: &[f32]| {
        let values: Vec<f32> = x.iter().map(|x| 0.046875 * (1.5 * x).round()).collect();
        Tensor::f32(shape, &values)
    };
    let tensors = llama_tensors(ternary);
    write_folder(&folder.join("hf"), &llama_config(), &tensors);
    for group in [Group::G32, Group::G128] {
        let options = ConvertOptions { group: Some(group), ..floats(WeightChoice::Ternary) };
        quietly(&folder.join("hf"), &folder.join("out.fby"), &options).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        check_llama(&image, &tensors, |a, b, name| match name {
            // These have 8 bits.
            "model.embed_tokens.weight" | "lm_head.weight" => (),
            _ => assert_eq!(a, b, "{name}"),
        });
    }

    let mut tensors = Tensors::new();
    for (name, kind, bytes) in [
        ("attn_q", 35, 66),
        ("attn_k", 35, 66),
        ("attn_v", 34, 54),
        ("attn_output", 34, 54),
        ("ffn_gate", 35, 66),
        ("ffn_up", 34, 54),
        ("ffn_down", 35, 66),
    ] {
        let name = format!("blk.0.{name}.weight");
        tensors.insert(name.clone(), Tensor::ternary(&[256, 256], kind, bytes, &name));
    }
    tensors.insert("token_embd.weight".into(), Tensor::blocks(&[40, 256], 8, 32, 34, "e"));
    for name in ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"] {
        tensors.insert(name.into(), Tensor::f32(&[256], &numbers(name, 256)));
    }
    let metadata = [
        ("general.architecture", Meta::Text("llama")),
        ("llama.block_count", Meta::U32(1)),
        ("llama.context_length", Meta::U32(64)),
        ("llama.embedding_length", Meta::U32(256)),
        ("llama.feed_forward_length", Meta::U32(256)),
        ("llama.attention.head_count", Meta::U32(2)),
        ("llama.attention.head_count_kv", Meta::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
    ];
    fs::write(folder.join("t.gguf"), gguf(&metadata, &tensors)).unwrap();
    let report = quietly(&folder.join("t.gguf"), &folder.join("out.fby"), &ConvertOptions::default()).unwrap();
    assert_eq!(report.encodings["ternary group 128"].squared_error, 0.0);
    assert_eq!(report.encodings["ternary group 128"].weights, 7 * 256 * 256);
    let image = Image::open(&folder.join("out.fby"));
    let values = |name: &str| tensors[&format!("blk.0.{name}.weight")].values();
    assert_eq!(image.tensor(0, Role::AttentionOut).unwrap().1, values("attn_output"));
    assert_eq!(image.tensor(0, Role::Value).unwrap().1, values("attn_v"));
    let up: Vec<f32> = (0..image.layer(0).units).flat_map(|u| matrix_values(&image.unit(0, u, 1).up)).collect();
    assert_eq!(up, values("ffn_up"));
}

#[test]
fn a_prefix_of_levels_is_a_coarser_unit() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    for widths in [[2, 2, 0, 0], [2, 1, 1, 0], [1, 1, 1, 1], [4, 0, 0, 0]] {
        let fields = Fields::new(widths).unwrap();
        let options = ConvertOptions { unit_fields: Some(fields), ..floats(WeightChoice::Q4) };
        quietly(&path, &folder.join("out.fby"), &options).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        let whole = numbers("model.layers.1.mlp.up_proj.weight", WIDTH * HIDDEN);
        let mut last = f64::INFINITY;
        for levels in 1..=fields.count() {
            let unit = image.unit(1, 0, levels);
            let error: f64 = matrix_values(&unit.up).iter().zip(&whole).map(|(a, b)| f64::from(a - b).powi(2)).sum();
            assert!(error < 0.6 * last, "{widths:?}: {levels} levels: {error}, before {last}");
            last = error;
        }
    }
}

/// The gain of a prefix is the least squares fit of its values to the source's weights, whoever chose the codes.
#[test]
fn gains_fit_the_weights() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    let source = numbers("model.layers.1.mlp.up_proj.weight", WIDTH * HIDDEN);
    for (affine, widths) in [(false, [2, 2, 0, 0]), (true, [2, 2, 0, 0]), (false, [1, 1, 1, 1])] {
        let options = ConvertOptions {
            unit_fields: Fields::new(widths),
            affine: Some(affine),
            unit_width: Some(64),
            ..floats(WeightChoice::Q4)
        };
        quietly(&path, &folder.join("out.fby"), &options).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        for unit in 0..2 {
            let weights = &source[unit * 64 * HIDDEN..][..64 * HIDDEN];
            let whole = image.unit(1, unit, Fields::new(widths).unwrap().count()).up;
            assert_eq!(whole.gain(), 1.0);
            for levels in 1..whole.fields().len() {
                let prefix = image.unit(1, unit, levels).up;
                let values = matrix_values(&prefix.with_gain(1.0));
                let (mut xv, mut vv) = (0.0, 0.0);
                for (x, v) in weights.iter().zip(&values) {
                    xv += f64::from(*x) * f64::from(*v);
                    vv += f64::from(*v) * f64::from(*v);
                }
                let want = xv / vv;
                assert!(
                    (f64::from(prefix.gain()) - want).abs() < 1e-5,
                    "{affine} {widths:?}: {} {want}",
                    prefix.gain()
                );
                assert!(want != 1.0);
            }
        }
    }
}

#[test]
fn units_may_have_an_encoding_of_their_own() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    for (weights, units, bits) in [(WeightChoice::F32, WeightChoice::Q2, 2), (WeightChoice::Q4, WeightChoice::Q8, 8)] {
        let options = ConvertOptions { unit_weights: Some(units), ..floats(weights) };
        quietly(&path, &folder.join("out.fby"), &options).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        let of = |encoding| match encoding {
            Encoding::Quant(q) => q.fields.bits(),
            _ => 32,
        };
        assert_eq!(of(image.layer(0).unit.gate.encoding), bits);
        let residents = if weights == WeightChoice::Q4 { 4 } else { 32 };
        assert_eq!(of(image.tensor(0, Role::Query).unwrap().0.encoding), residents);
        let label = image.model().record().weights_label;
        assert!(String::from_utf8_lossy(&label).contains(units.name()));
    }
    // Fields that no weights are cut into.
    let options = ConvertOptions { unit_fields: Fields::new([1, 1, 1, 1]), ..floats(WeightChoice::Q2) };
    let error = quietly(&path, &folder.join("out.fby"), &options).unwrap_err().to_string();
    assert!(error.contains("4 bits"), "{error}");
}

#[test]
fn the_head_may_have_an_encoding_of_its_own() {
    let folder = Folder::new();
    let tensors = llama_tensors(Tensor::f32);
    let path = llama_folder(&folder);
    for (head, bits, within) in [(None, 8, 0.005), (Some(WeightChoice::Q4), 4, 0.1), (Some(WeightChoice::Q2), 2, 0.5)] {
        let options = ConvertOptions { head_weights: head, ..floats(WeightChoice::Q4) };
        quietly(&path, &folder.join("out.fby"), &options).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        for (role, name) in [(Role::Embedding, "model.embed_tokens.weight"), (Role::OutputHead, "lm_head.weight")] {
            let (shape, stored) = image.tensor(NO_LAYER, role).unwrap();
            assert!(matches!(shape.encoding, Encoding::Quant(q) if q.fields.bits() == bits), "{name}: {shape:?}");
            let values = tensors[name].values();
            let error: f32 = stored.iter().zip(&values).map(|(a, b)| (a - b).powi(2)).sum();
            let all: f32 = values.iter().map(|x| x * x).sum();
            assert!((error / all).sqrt() < within, "{name} at {bits} bits: {}", (error / all).sqrt());
        }
        assert!(matches!(image.tensor(0, Role::Query).unwrap().0.encoding, Encoding::Quant(q) if q.fields.bits() == 4));
    }
}

#[test]
fn an_image_of_another_record_version_is_refused() {
    let folder = Folder::new();
    quietly(&llama_folder(&folder), &folder.join("out.fby"), &floats(WeightChoice::Q4)).unwrap();
    let image = Image::open(&folder.join("out.fby"));
    for version in [RECORD_VERSION - 1, RECORD_VERSION + 1] {
        let error = image.parse_as_version(version).unwrap_err();
        assert_eq!(error, ModelError::Version { found: version });
        assert!(error.to_string().contains("convert the model again"), "{error}");
    }
}

#[test]
fn both_spellings_and_any_number_of_threads_give_the_same_bytes() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    let image = |name: &str, threads| {
        let out = folder.join(name);
        quietly(&path, &out, &ConvertOptions { threads: Some(threads), ..ConvertOptions::default() }).unwrap();
        fs::read(out).unwrap()
    };
    let first = image("a.fby", 1);
    assert!(first == image("b.fby", 5));
    let mut config = llama_config();
    let object = config.as_object_mut().unwrap();
    object.remove("rope_parameters");
    object.remove("dtype");
    object.insert("rope_theta".into(), 10000.0.into());
    object.insert("rope_scaling".into(), serde_json::json!({"type": "linear", "factor": 2.0}));
    object.insert("torch_dtype".into(), "float32".into());
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    assert!(first == image("c.fby", 2));
}

#[test]
fn shards_are_one_model() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    let (whole, split) = (folder.join("whole.fby"), folder.join("split.fby"));
    quietly(&path, &whole, &floats(WeightChoice::F32)).unwrap();
    let tensors = llama_tensors(Tensor::f32);
    let (mut parts, mut map) = ([Tensors::new(), Tensors::new()], serde_json::Map::new());
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), format!("part-{}.safetensors", i % 2).into());
        parts[i % 2].insert(name, tensor);
    }
    for (i, part) in parts.iter().enumerate() {
        fs::write(path.join(format!("part-{i}.safetensors")), safetensors(part)).unwrap();
    }
    fs::remove_file(path.join("model.safetensors")).unwrap();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(path.join("model.safetensors.index.json"), index.to_string()).unwrap();
    quietly(&path, &split, &floats(WeightChoice::F32)).unwrap();
    assert!(fs::read(whole).unwrap() == fs::read(split).unwrap());
}

/// The small Llama as a GGUF file: rows of q and k in the order that llama.cpp's converter gives them.
fn llama_gguf(make: impl Fn(&str, &[usize], &[f32]) -> Tensor) -> (Vec<u8>, Tensors) {
    let mut tensors = Tensors::new();
    for (name, t) in llama_tensors(Tensor::f32) {
        let renamed = name
            .replace("model.embed_tokens", "token_embd")
            .replace("lm_head", "output")
            .replace("model.norm", "output_norm")
            .replace("model.layers", "blk")
            .replace("input_layernorm", "attn_norm")
            .replace("post_attention_layernorm", "ffn_norm")
            .replace("self_attn.o_proj", "attn_output")
            .replace("self_attn.", "attn_")
            .replace("mlp.", "ffn_")
            .replace("_proj", "");
        let mut values = t.values();
        if renamed.contains("attn_q.") || renamed.contains("attn_k.") {
            // reshape(heads, 2, dim / 2, n).swapaxes(1, 2), as in convert_hf_to_gguf.py
            let n = values.len() / t.shape[0];
            let old = values.clone();
            for head in 0..t.shape[0] / HEAD_DIM {
                for half in 0..2 {
                    for i in 0..HEAD_DIM / 2 {
                        let (to, from) = (head * HEAD_DIM + 2 * i + half, head * HEAD_DIM + half * HEAD_DIM / 2 + i);
                        values[to * n..(to + 1) * n].copy_from_slice(&old[from * n..(from + 1) * n]);
                    }
                }
            }
        }
        tensors.insert(renamed.clone(), make(&renamed, &t.shape, &values));
    }
    let metadata = [
        ("general.architecture", Meta::Text("llama")),
        ("general.name", Meta::Text("llama")),
        ("llama.block_count", Meta::U32(LAYERS as u32)),
        ("llama.context_length", Meta::U32(128)),
        ("llama.embedding_length", Meta::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Meta::U32(WIDTH as u32)),
        ("llama.attention.head_count", Meta::U32(HEADS as u32)),
        ("llama.attention.head_count_kv", Meta::U32(KV_HEADS as u32)),
        ("llama.attention.key_length", Meta::U32(HEAD_DIM as u32)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(10000.0)),
        ("llama.rope.scaling.type", Meta::Text("linear")),
        ("llama.rope.scaling.factor", Meta::F32(2.0)),
        ("tokenizer.ggml.model", Meta::Text("none")),
        ("tokenizer.chat_template", Meta::Text("{{ messages }}")),
    ];
    (gguf(&metadata, &tensors), tensors)
}

#[test]
fn gguf_and_safetensors_give_the_same_model() {
    let folder = Folder::new();
    let (bytes, _) = llama_gguf(|_, shape, values| Tensor::f32(shape, values));
    fs::write(folder.join("llama.gguf"), bytes).unwrap();
    quietly(&llama_folder(&folder), &folder.join("a.fby"), &floats(WeightChoice::F32)).unwrap();
    quietly(&folder.join("llama.gguf"), &folder.join("b.fby"), &floats(WeightChoice::F32)).unwrap();
    let (a, b) = (Image::open(&folder.join("a.fby")), Image::open(&folder.join("b.fby")));
    // The GGUF file has a chat template, and metadata that say GGUF; the rest is the same to the byte.
    assert_eq!(b.section(SectionKind::ChatTemplate), Some(&b"{{ messages }}"[..]));
    assert_eq!(a.section(SectionKind::Model), b.section(SectionKind::Model));
    assert_eq!(a.section(SectionKind::Tensors), b.section(SectionKind::Tensors));
    check_llama(&b, &llama_tensors(Tensor::f32), |a, b, name| assert_eq!(a, b, "{name}"));
    let freq = |image: &Image| image.tensor(NO_LAYER, Role::RopeInvFreq).unwrap().1;
    assert_eq!(freq(&a), freq(&b));
    assert_eq!(freq(&a), [0.5, 0.05, 0.005, 0.0005]);
}

#[test]
fn gguf_blocks_are_imported_without_loss() {
    let folder = Folder::new();
    // Rows of GGUF blocks are multiples of 32: an LFM2 of such sizes, whose q and k are not permuted.
    let (hidden, width, kv) = (64, 160, 32);
    for (kind, bytes, bits) in [(2, 18, 4), (3, 20, 4), (8, 34, 8)] {
        let mut tensors = Tensors::new();
        let mut matrix = |name: &str, rows, cols| {
            tensors.insert(name.into(), Tensor::blocks(&[rows, cols], kind, 32, bytes, name));
        };
        matrix("token_embd.weight", 96, hidden);
        matrix("blk.0.attn_q.weight", hidden, hidden);
        matrix("blk.0.attn_k.weight", kv, hidden);
        matrix("blk.0.attn_v.weight", kv, hidden);
        matrix("blk.0.attn_output.weight", hidden, hidden);
        matrix("blk.1.shortconv.in_proj.weight", 3 * hidden, hidden);
        matrix("blk.1.shortconv.out_proj.weight", hidden, hidden);
        for l in 0..2 {
            matrix(&format!("blk.{l}.ffn_gate.weight"), width, hidden);
            matrix(&format!("blk.{l}.ffn_up.weight"), width, hidden);
            matrix(&format!("blk.{l}.ffn_down.weight"), hidden, width);
        }
        let vectors =
            [("blk.0.attn_q_norm.weight", 16), ("blk.0.attn_k_norm.weight", 16), ("token_embd_norm.weight", 64)];
        let norms =
            ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"];
        for (name, n) in vectors.into_iter().chain(norms.map(|name| (name, hidden))) {
            tensors.insert(name.into(), Tensor::f32(&[n], &numbers(name, n)));
        }
        let taps = numbers("taps", hidden * 3);
        tensors.insert("blk.1.shortconv.conv.weight".into(), Tensor::f32(&[hidden, 3], &taps));
        let metadata = [
            ("general.architecture", Meta::Text("lfm2")),
            ("lfm2.block_count", Meta::U32(2)),
            ("lfm2.context_length", Meta::U32(64)),
            ("lfm2.embedding_length", Meta::U32(hidden as u32)),
            ("lfm2.feed_forward_length", Meta::U32(width as u32)),
            ("lfm2.attention.head_count", Meta::U32(4)),
            ("lfm2.attention.head_count_kv", Meta::I32s(vec![2, 0])),
            ("lfm2.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
            ("lfm2.rope.freq_base", Meta::F32(1e6)),
            ("lfm2.shortconv.l_cache", Meta::U32(3)),
        ];
        fs::write(folder.join("lfm2.gguf"), gguf(&metadata, &tensors)).unwrap();
        let report = quietly(&folder.join("lfm2.gguf"), &folder.join("out.fby"), &ConvertOptions::default()).unwrap();
        let image = Image::open(&folder.join("out.fby"));
        for (layer, role, name) in [
            (NO_LAYER, Role::Embedding, "token_embd.weight"),
            (0, Role::Query, "blk.0.attn_q.weight"),
            (0, Role::Value, "blk.0.attn_v.weight"),
            (1, Role::ConvIn, "blk.1.shortconv.in_proj.weight"),
            (1, Role::ConvTaps, "blk.1.shortconv.conv.weight"),
        ] {
            assert_eq!(image.tensor(layer, role).unwrap().1, tensors[name].values(), "{name}");
        }
        let layer = image.layer(1);
        assert_eq!((layer.units, layer.unit_width), (5, 32));
        let Encoding::Quant(q) = layer.unit.gate.encoding else { panic!("not quantised") };
        assert_eq!((q.fields.bits(), q.affine, q.group), (bits, kind == 3, Group::G32));
        let (up, down) = (tensors["blk.1.ffn_up.weight"].values(), tensors["blk.1.ffn_down.weight"].values());
        for u in 0..5 {
            let unit = image.unit(1, u, layer.unit.levels());
            assert_eq!(matrix_values(&unit.up), up[u * 32 * hidden..(u + 1) * 32 * hidden]);
            for (row, part) in matrix_values(&unit.down).chunks_exact(32).enumerate() {
                assert_eq!(part, &down[row * width + u * 32..][..32]);
            }
        }
        assert!(report.encodings.values().all(|t| t.squared_error == 0.0));
        assert!(image.tensor(NO_LAYER, Role::OutputHead).is_none());

        // Neurons that move in whole groups take their scales along; others do not.
        for (step, exact) in [(32, true), (1, false)] {
            let order: Vec<u32> = (0..width as u32 / step).rev().flat_map(|s| s * step..(s + 1) * step).collect();
            let neurons = LayerNeurons {
                order: order.clone(),
                gate: vec![0.0; 3 * hidden],
                bias: vec![0.0; 3],
                thresholds: vec![1.0, -1.0],
                uses: vec![0.75, 0.5, 0.25],
            };
            let layers = BTreeMap::from([(0, neurons.clone()), (1, neurons)]);
            let plan = NeuronPlan { width: 64, hidden: hidden as u32, layers };
            let options = ConvertOptions { neurons: Some(Arc::new(plan)), ..ConvertOptions::default() };
            let report = quietly(&folder.join("lfm2.gguf"), &folder.join("moved.fby"), &options).unwrap();
            assert_eq!(report.encodings.values().all(|t| t.squared_error == 0.0), exact, "steps of {step}");
            let image = Image::open(&folder.join("moved.fby"));
            // Of the six clusters of both layers the hottest are the first layer's first, then the second's.
            let hot = [0, 1].map(|l| image.layer(l).hot);
            assert_eq!((hot[0][2], hot[1][2], hot[0][7], hot[1][7]), (1, 0, 2, 1), "{hot:?}");
            assert_eq!((hot[0][15], hot[1][15]), (3, 3));
            for (u, order) in order.chunks(64).enumerate() {
                let unit = image.unit(1, u, image.layer(1).unit.levels());
                for (row, n) in matrix_values(&unit.up).chunks_exact(hidden).zip(order) {
                    assert_eq!(row, &up[*n as usize * hidden..][..hidden]);
                }
                for (row, part) in matrix_values(&unit.down).chunks_exact(64).enumerate().filter(|_| exact) {
                    let want: Vec<f32> = order.iter().map(|n| down[row * width + *n as usize]).collect();
                    assert_eq!(part[..want.len()], want);
                }
            }
        }
    }
}

#[test]
fn experts_are_units_in_both_formats() {
    let folder = Folder::new();
    let (hidden, width, experts) = (32, 32, 4);
    let config = serde_json::json!({
        "model_type": "lfm2_moe", "hidden_size": hidden, "intermediate_size": 64, "moe_intermediate_size": width,
        "num_hidden_layers": 2, "num_dense_layers": 1, "num_experts": experts, "num_experts_per_tok": 2,
        "layer_types": ["conv", "conv"], "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
        "max_position_embeddings": 64, "norm_eps": 1e-5, "conv_L_cache": 3, "conv_bias": false,
        "norm_topk_prob": true, "use_expert_bias": true, "routed_scaling_factor": 1.5, "tie_word_embeddings": true,
    });
    let metadata = [
        ("general.architecture", Meta::Text("lfm2moe")),
        ("general.name", Meta::Text("moe")),
        ("lfm2moe.block_count", Meta::U32(2)),
        ("lfm2moe.context_length", Meta::U32(64)),
        ("lfm2moe.embedding_length", Meta::U32(hidden as u32)),
        ("lfm2moe.feed_forward_length", Meta::U32(64)),
        ("lfm2moe.attention.head_count", Meta::U32(2)),
        ("lfm2moe.attention.head_count_kv", Meta::I32s(vec![0, 0])),
        ("lfm2moe.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("lfm2moe.expert_count", Meta::U32(experts as u32)),
        ("lfm2moe.expert_used_count", Meta::U32(2)),
        ("lfm2moe.expert_feed_forward_length", Meta::U32(width as u32)),
        ("lfm2moe.leading_dense_block_count", Meta::U32(1)),
        ("lfm2moe.expert_gating_func", Meta::U32(2)),
        ("lfm2moe.expert_weights_scale", Meta::F32(1.5)),
        ("lfm2moe.shortconv.l_cache", Meta::U32(3)),
    ];
    let (mut hf, mut gg) = (Tensors::new(), Tensors::new());
    let mut both = |hf_name: &str, gguf_name: &str, shape: &[usize], depthwise: bool| {
        let values = numbers(hf_name, shape.iter().product());
        let hf_shape = if depthwise { vec![shape[0], 1, shape[1]] } else { shape.to_vec() };
        hf.insert(hf_name.into(), Tensor::f32(&hf_shape, &values));
        gg.insert(gguf_name.into(), Tensor::f32(shape, &values));
    };
    both("model.embed_tokens.weight", "token_embd.weight", &[40, hidden], false);
    both("model.embedding_norm.weight", "token_embd_norm.weight", &[hidden], false);
    for l in 0..2 {
        let mut layer = |a: &str, b: &str, shape: &[usize]| {
            both(&format!("model.layers.{l}.{a}"), &format!("blk.{l}.{b}"), shape, a == "conv.conv.weight");
        };
        layer("operator_norm.weight", "attn_norm.weight", &[hidden]);
        layer("ffn_norm.weight", "ffn_norm.weight", &[hidden]);
        layer("conv.in_proj.weight", "shortconv.in_proj.weight", &[3 * hidden, hidden]);
        layer("conv.conv.weight", "shortconv.conv.weight", &[hidden, 3]);
        layer("conv.out_proj.weight", "shortconv.out_proj.weight", &[hidden, hidden]);
        if l == 0 {
            layer("feed_forward.w1.weight", "ffn_gate.weight", &[64, hidden]);
            layer("feed_forward.w3.weight", "ffn_up.weight", &[64, hidden]);
            layer("feed_forward.w2.weight", "ffn_down.weight", &[hidden, 64]);
        } else {
            layer("feed_forward.gate.weight", "ffn_gate_inp.weight", &[experts, hidden]);
            layer("feed_forward.expert_bias", "exp_probs_b.bias", &[experts]);
        }
    }
    for (w, name) in [("w1", "gate"), ("w3", "up"), ("w2", "down")] {
        let mut all = Vec::new();
        for e in 0..experts {
            let values = numbers(&format!("{w}{e}"), hidden * width);
            hf.insert(
                format!("model.layers.1.feed_forward.experts.{e}.{w}.weight"),
                Tensor::f32(&[width, hidden], &values),
            );
            all.extend(values);
        }
        gg.insert(format!("blk.1.ffn_{name}_exps.weight"), Tensor::f32(&[experts, width, hidden], &all));
    }
    write_folder(&folder.join("moe"), &config, &hf);
    fs::write(folder.join("moe.gguf"), gguf(&metadata, &gg)).unwrap();
    quietly(&folder.join("moe"), &folder.join("a.fby"), &floats(WeightChoice::F32)).unwrap();
    quietly(&folder.join("moe.gguf"), &folder.join("b.fby"), &floats(WeightChoice::F32)).unwrap();
    let (a, b) = (Image::open(&folder.join("a.fby")), Image::open(&folder.join("b.fby")));
    assert_eq!(a.section(SectionKind::Model), b.section(SectionKind::Model));
    // Same sizes, so everything behind the metadata lies at the same place.
    let data = a.model().group(NO_LAYER).0 as usize;
    assert!(a.bytes[data..] == b.bytes[data..]);
    let layer = a.layer(1);
    assert_eq!((layer.units, layer.top_k, layer.unit_width), (experts, 2, width));
    assert_eq!((layer.router_scale, layer.router_norm_eps, layer.normalise), (1.5, 1e-6, true));
    for e in 0..experts {
        let unit = a.unit(1, e, 1);
        assert_eq!(matrix_values(&unit.gate), numbers(&format!("w1{e}"), hidden * width));
        assert_eq!(matrix_values(&unit.up), numbers(&format!("w3{e}"), hidden * width));
        assert_eq!(matrix_values(&unit.down), numbers(&format!("w2{e}"), hidden * width));
    }
    assert_eq!(a.tensor(1, Role::RouterBias).unwrap().1, numbers("model.layers.1.feed_forward.expert_bias", experts));
    // At 4 bits the router stays in binary32.
    quietly(&folder.join("moe"), &folder.join("c.fby"), &ConvertOptions::default()).unwrap();
    let c = Image::open(&folder.join("c.fby"));
    assert_eq!(c.tensor(1, Role::RouterGate).unwrap().0.encoding, Encoding::F32);
    assert_eq!(c.tensor(1, Role::ConvIn).unwrap().0.levels(), 1);
    assert_eq!(c.layer(1).unit.levels(), 2);
}

#[test]
fn blocks_have_ggml_s_values() {
    // One row of each type from ggml_quantize_chunk, and what ggml's to_float makes of it.
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quant-blocks.safetensors");
    let bytes = fs::read(fixture).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for dtype in DType::ALL {
        if dtype == DType::F32 {
            continue;
        }
        let name = dtype.name().to_lowercase().replace("_k", "_K");
        let raw = file.tensor(&format!("{name}.raw")).unwrap();
        let expected = file.tensor(&format!("{name}.dequant")).unwrap();
        let expected: Vec<u32> =
            expected.data().chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let mut found = vec![0.0f32; expected.len()];
        dequantise(dtype, raw.data(), &mut found);
        let found: Vec<u32> = found.iter().map(|x| (x + 0.0).to_bits()).collect();
        let expected: Vec<u32> = expected.iter().map(|x| (f32::from_bits(*x) + 0.0).to_bits()).collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn inspection_says_what_is_there() {
    let folder = Folder::new();
    let path = llama_folder(&folder);
    let generation = serde_json::json!({"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05});
    fs::write(path.join("generation_config.json"), generation.to_string()).unwrap();
    let report = quietly(&path, &folder.join("out.fby"), &ConvertOptions::default()).unwrap();
    let found = inspect(&folder.join("out.fby")).unwrap();
    assert_eq!((found.model.name.as_str(), found.model.family.as_str()), ("llama", "llama"));
    assert_eq!((found.model.layers, found.model.hidden, found.model.vocab), (LAYERS, HIDDEN as u32, VOCAB as u32));
    assert_eq!((found.model.temperature, found.model.top_k, found.model.repetition_penalty), (0.7, 40, 1.0));
    assert_eq!(found.header.image_len, report.image_len);
    assert_eq!(found.units.count as usize, report.units);
    assert_eq!((found.units.bytes, found.resident.bytes), (report.unit_len, report.resident_len));
    assert_eq!(found.metadata.as_ref().unwrap()["source"]["format"], "safetensors");
    let text = found.to_string();
    for word in ["llama", "attention, 6/2 heads of 8", "dense", "q8 group 32", "extents"] {
        assert!(text.contains(word), "{word} is missing in:\n{text}");
    }
    serde_json::to_string(&found).unwrap();
    let mut bytes = fs::read(folder.join("out.fby")).unwrap();
    bytes[8192] ^= 1;
    fs::write(folder.join("bad.fby"), bytes).unwrap();
    let error = format!("{:#}", inspect(&folder.join("bad.fby")).unwrap_err());
    assert!(error.contains("bad.fby") && error.contains("checksum"), "{error}");
}

#[test]
fn the_bundled_model_has_its_tokenizer() {
    let folder = Folder::new();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tiny-lfm2moe");
    let report = quietly(model.as_ref(), &folder.join("out.fby"), &floats(WeightChoice::F16)).unwrap();
    assert_eq!((report.layers, report.units, report.tokenizer, report.chat_template), (8, 104, true, false));
    let image = Image::open(&folder.join("out.fby"));
    let section = image.section(SectionKind::Tokenizer).unwrap();
    let tokenizer = forebay_runtime::tokenizer::Tokenizer::parse(section).unwrap();
    assert_eq!(tokenizer.vocab_len(), 4096);
    // The same bytes whatever the folder's place, if the name is given.
    let options = ConvertOptions { name: Some("tiny-lfm2moe".into()), ..floats(WeightChoice::F16) };
    quietly(model.as_ref(), &folder.join("again.fby"), &options).unwrap();
    assert!(fs::read(folder.join("again.fby")).unwrap() == image.bytes);
}
