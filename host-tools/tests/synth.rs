//! Synthetic models: an image and a GGUF file of them are the same model, whatever the family.

use std::fs;

use forebay::arch::QkNorm;
use forebay::convert::{ConvertOptions, Silent, convert, convert_source};
use forebay::synth::{Options, SHAPES, Shape, Synthetic};
use forebay_storage::image::{SUPERBLOCK_SLOT, SectionKind, Superblock};

/// The shape of that name, as small as its family can be.
fn small(name: &str) -> Shape {
    let shape = Shape::by_name(name).unwrap();
    Shape {
        layers: shape.dense_layers + 2,
        hidden: 128,
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        attention: shape.attention.map(|_| &[1usize, 2][..]),
        dense_width: 64 * u64::from(shape.dense_layers > 0),
        experts: 8,
        top_k: 2,
        expert_width: 64,
        vocab: 512,
        context: 256,
        ..shape.clone()
    }
}

fn section(image: &[u8], kind: SectionKind) -> Vec<u8> {
    let superblock = Superblock::parse(&image[..2 * SUPERBLOCK_SLOT as usize], image.len() as u64).unwrap();
    let section = superblock.section(kind).unwrap();
    image[section.offset as usize..][..section.len as usize].to_vec()
}

#[test]
fn the_image_and_the_gguf_file_are_one_model() {
    let folder = tempfile::tempdir().unwrap();
    for shape in SHAPES {
        for eight_bits in [false, true] {
            let options = Options { eight_bits, skew: 0.7, locality: 0.4, ..Options::default() };
            let model = Synthetic::new(&small(shape.name), &options).unwrap();
            let [direct, gguf, over_gguf] =
                ["direct.fby", "model.gguf", "over-gguf.fby"].map(|name| folder.path().join(name));
            let options = ConvertOptions { name: Some("m".into()), ..ConvertOptions::default() };
            let report = convert_source(&model.source().unwrap(), &direct, &options, &mut Silent).unwrap();
            assert_eq!(report.layers, small(shape.name).layers, "{}", shape.name);
            model.write_gguf(&gguf, &mut Silent).unwrap();
            assert_eq!(fs::metadata(&gguf).unwrap().len(), model.gguf_len());
            convert(&gguf, &over_gguf, &options, &mut Silent).unwrap();
            // The extents' checksums stand for all weights.
            let (direct, over_gguf) = (fs::read(direct).unwrap(), fs::read(over_gguf).unwrap());
            assert!(direct == over_gguf, "{}", shape.name);
            // Codes are taken over as they are: nothing is lost.
            assert!(report.encodings.values().all(|tally| tally.squared_error == 0.0), "{}", shape.name);
        }
    }
}

#[test]
fn seeds_make_other_models_and_nothing_else_does() {
    let folder = tempfile::tempdir().unwrap();
    let extents = |name: &str, seed: u64, threads: usize| {
        let path = folder.path().join(name);
        let model = Synthetic::new(&small("olmoe-1b-7b"), &Options { seed, ..Options::default() }).unwrap();
        let options = ConvertOptions { threads: Some(threads), ..ConvertOptions::default() };
        convert_source(&model.source().unwrap(), &path, &options, &mut Silent).unwrap();
        section(&fs::read(path).unwrap(), SectionKind::Extents)
    };
    let first = extents("a", 1, 1);
    assert_eq!(first, extents("b", 1, 3));
    assert_ne!(first, extents("c", 2, 1));
}

#[test]
fn shapes_are_those_of_their_makers() {
    // Parameters in billions, from the models' cards.
    for (name, billions) in
        [("lfm2-8b-a1b", 8.3), ("olmoe-1b-7b", 6.9), ("qwen3-30b-a3b", 30.5), ("mixtral-8x7b", 46.7)]
    {
        let model = Synthetic::new(Shape::by_name(name).unwrap(), &Options::default()).unwrap();
        let count: u64 = model.source().unwrap().tensors.values().map(|t| t.shape.iter().product::<u64>()).sum();
        assert!((count as f64 / 1e9 - billions).abs() < 0.06, "{name}: {count}");
    }
    assert_eq!(Shape::by_name("olmoe-1b-7b").unwrap().qk_norm, QkNorm::Whole);
    assert!(Shape::by_name("lfm2-8b-a1b").unwrap().cut(2).is_err());
    assert_eq!(Shape::by_name("lfm2-8b-a1b").unwrap().cut(3).unwrap().layers, 3);
}

#[test]
fn a_sequence_stays_with_its_topic() {
    let shape = small("mixtral-8x7b");
    let model = Synthetic::new(&shape, &Options::default()).unwrap();
    let tokens = model.tokens(4000);
    assert!(tokens.iter().all(|t| u64::from(*t) < shape.vocab));
    let same = |a: u32, b: u32| u64::from(a) % forebay::synth::TOPICS == u64::from(b) % forebay::synth::TOPICS;
    let stays = tokens.windows(2).filter(|w| same(w[0], w[1])).count();
    assert!((3700..3990).contains(&stays), "{stays}");
}
