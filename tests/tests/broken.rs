//! Images that are damaged or lie: a clear error, never a panic, a hang, wrong logits or endless memory.

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::hostile::{parts, reseal};
use forebay_conformance::{Run, Setup, arena_memory, arena_of, fixtures, image_of, plan, run, run_mapped, run_on};
use forebay_runtime::model::record::{GATE_RELU, HOT_STEPS, LayerRecord, ModelRecord, ROUTER_NORMALISE};
use forebay_storage::MemoryStore;
use proptest::prelude::*;

const TOKENS: [u32; 5] = [1, 201, 233, 49, 178];

fn image(case: &str, weights: WeightChoice) -> Vec<u8> {
    let options =
        ConvertOptions { weights: Some(weights), unit_width: Some(32), page: 512, ..ConvertOptions::default() };
    image_of(&fixtures().join(case), &options).unwrap()
}

/// Runs with a bounded arena: what does not fit is refused by the plan.
fn bounded(image: &[u8]) -> anyhow::Result<Run> {
    const ARENA: u64 = 16 << 20;
    let mut memory = arena_memory(ARENA);
    let arena = arena_of(&mut memory, ARENA);
    run_on(&mut MemoryStore::new(image), &arena, &Setup::default(), &TOKENS)
}

#[test]
fn truncated_anywhere() {
    let image = image("lfm2moe", WeightChoice::Q4);
    let mut cuts: Vec<usize> =
        parts(&image).into_iter().flat_map(|(_, r)| [r.start, r.start + 1, r.end - 1, r.end]).collect();
    cuts.extend([0, 1, 63, 64, 4095, 4096, 8191, 8192, image.len() / 2, image.len() - 512, image.len() - 1]);
    for cut in cuts {
        for bounded in [bounded, bounded_mapped] {
            let error = bounded(&image[..cut.min(image.len() - 1)]).expect_err("a truncated image");
            let message = error.to_string();
            assert!(!message.contains("internal error"), "cut at {cut}: {message}");
        }
    }
}

/// The same of an image that is used where it lies.
fn bounded_mapped(image: &[u8]) -> anyhow::Result<Run> {
    run_mapped(image, &Setup { arena: Some(16 << 20), ..Setup::default() }, &TOKENS)
}

/// Whatever byte is flipped, the logits are right or there is an error that says where.
#[test]
fn flipped_bytes() {
    let image = image("lfm2moe", WeightChoice::Q4);
    let want = bounded(&image).unwrap();
    let mut positions: Vec<usize> = (0..256).collect();
    for (_, range) in parts(&image) {
        positions.extend(range.clone().step_by((range.len() / 60).max(1)));
    }
    positions.extend((8192..image.len()).step_by(997));
    let ways = [bounded, bounded_mapped];
    let mut errors = 0;
    for (at, bounded) in positions.into_iter().flat_map(|at| ways.map(|way| (at, way))) {
        let mut damaged = image.clone();
        damaged[at] ^= 0x10;
        match bounded(&damaged) {
            Ok(got) => assert!(
                got.logits.iter().zip(&want.logits).all(|(a, b)| a.to_bits() == b.to_bits()),
                "byte {at}: wrong logits"
            ),
            Err(error) => {
                errors += 1;
                assert!(!error.to_string().contains("internal error"), "byte {at}: {error}");
            }
        }
    }
    assert!(errors > 600, "only {errors} flips were noticed");
}

#[test]
fn a_flip_in_a_unit_names_it() {
    let image = image("lfm2moe", WeightChoice::Q4);
    let mut damaged = image.clone();
    let last = image.len() - 600;
    damaged[last] ^= 1;
    // The last extent is an expert of the last layer; feed tokens until it is chosen.
    let tokens: Vec<u32> = (0..60).map(|t| (t * 37 + 5) % 288).collect();
    let error = run(&damaged, &Setup::default(), &tokens).expect_err("a damaged expert").to_string();
    assert!(error.contains("of layer 4") && error.contains("checksum"), "{error}");
}

#[test]
fn nan_weights_are_reported() {
    for (case, part) in [("lfm2moe", 2usize), ("llama-gqa-untied", 3)] {
        let mut image = image(case, WeightChoice::F32);
        // From the end of the tables on, everything is weights: damage one in `part` of them.
        let start = parts(&image).iter().map(|(_, r)| r.end).max().unwrap().next_multiple_of(512);
        let at = start + (image.len() - start) / part / 4 * 4;
        image[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        reseal(&mut image);
        let tokens: Vec<u32> = (0..60).map(|t| (t * 37 + 5) % 288).collect();
        match run(&image, &Setup::default(), &tokens) {
            Err(error) => assert!(error.to_string().contains("not finite"), "{error}"),
            // A weight that these tokens never use.
            Ok(got) => assert!(got.logits.iter().all(|x| x.is_finite())),
        }
        let whole = start..image.len();
        image[whole].chunks_exact_mut(4).for_each(|w| w.copy_from_slice(&f32::NAN.to_le_bytes()));
        reseal(&mut image);
        let error = run(&image, &Setup::default(), &tokens).expect_err("only NaN").to_string();
        assert!(error.contains("not finite"), "{error}");
    }
}

/// A reader that knows nothing of a layer's flag must not compute as if it were not there.
#[test]
fn unknown_flags_of_layers_are_refused() {
    let image = image("llama-gqa-untied", WeightChoice::Q4);
    let model = parts(&image).into_iter().find(|(name, _)| *name == "MODEL").unwrap().1;
    // The second layer's, behind the model's record.
    let at = model.start + size_of::<ModelRecord>() + size_of::<LayerRecord>() + 2;
    for bit in 0..8 {
        let mut other = image.clone();
        other[at] |= 1 << bit;
        reseal(&mut other);
        match run(&other, &Setup::default(), &TOKENS) {
            Ok(_) => assert!([ROUTER_NORMALISE, GATE_RELU].contains(&(1 << bit)), "bit {bit} is not refused"),
            Err(error) => assert!(error.to_string().contains("layer 1: flags is"), "{error}"),
        }
    }
}

/// What is said to be hot is pinned: more than there is would leave the pool no room.
#[test]
fn hot_units_that_cannot_be_are_refused() {
    let image = image("llama-gqa-untied", WeightChoice::Q4);
    let model = parts(&image).into_iter().find(|(name, _)| *name == "MODEL").unwrap().1;
    let at = |layer: usize, step: usize| {
        model.start + size_of::<ModelRecord>() + layer * size_of::<LayerRecord>() + 96 + 2 * step
    };
    // Three layers of five units.
    let good = |image: &mut [u8]| {
        for (layer, step) in (0..3).flat_map(|layer| (0..HOT_STEPS).map(move |step| (layer, step))) {
            image[at(layer, step)] = (5 * (step + 1) / HOT_STEPS) as u8;
        }
    };
    type Change<'c> = dyn Fn(&mut [u8]) + 'c;
    let outcome = |change: &Change<'_>| {
        let mut other = image.clone();
        good(&mut other);
        change(&mut other);
        reseal(&mut other);
        run(&other, &Setup::default(), &TOKENS).map_err(|error| error.to_string())
    };
    assert!(outcome(&|_| ()).is_ok());
    let broken: [(&str, &Change<'_>); 5] = [
        ("layer 1: hot is 6", &|image| image[at(1, HOT_STEPS - 1)] = 6),
        ("layer 1: hot is 5", &|image| image[at(1, 3)] = 5),
        ("layer 2: hot is 773", &|image| image[at(2, HOT_STEPS - 1) + 1] = 3),
        ("model: hot is 10", &|image| (0..HOT_STEPS).for_each(|step| image[at(0, step)] = 0)),
        ("model: hot is 15", &|image| (0..HOT_STEPS).for_each(|step| (0..3).for_each(|l| image[at(l, step)] = 5))),
    ];
    for (message, change) in broken {
        let error = outcome(change).err();
        assert!(error.as_ref().is_some_and(|error| error.contains(message)), "{message}: {error:?}");
    }
}

#[test]
fn bad_tokens_and_full_contexts() {
    let image = image("llama-gqa-untied", WeightChoice::Q4);
    let error = run(&image, &Setup::default(), &[1, 288]).unwrap_err().to_string();
    assert!(error.contains("288"), "{error}");
    let setup = Setup { context: 4, ..Setup::default() };
    let error = run(&image, &setup, &TOKENS).unwrap_err().to_string();
    assert!(error.contains("context of 4"), "{error}");
    let error = plan(&image, &Setup { context: 1 << 20, ..Setup::default() }).unwrap_err().to_string();
    assert!(error.contains("1048576"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tables with wrong numbers and right checksums.
    #[test]
    fn lying_tables(
        case in 0usize..3,
        edits in proptest::collection::vec((0usize..4, any::<proptest::sample::Index>(), any::<u8>(), 0usize..4), 1..4),
    ) {
        static IMAGES: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        let images = IMAGES.get_or_init(|| {
            ["lfm2moe", "lfm2-convbias-L4-untied", "llama-yarn"].map(|c| image(c, WeightChoice::Q4)).into()
        });
        let mut image = images[case].clone();
        let parts = parts(&image);
        for (part, index, value, kind) in edits {
            let range = parts[part.min(parts.len() - 1)].1.clone();
            let range = range.start..range.end.min(range.start + 1024);
            let at = range.start + index.index(range.len());
            match kind {
                0 => image[at] = value,
                1 => image[at] ^= 1 << (value % 8),
                2 => image[at] = image[at].wrapping_add(1),
                _ => image[at] = [0, 0xff, 0x7f, 0x80][usize::from(value % 4)],
            }
        }
        reseal(&mut image);
        for result in [bounded(&image), bounded_mapped(&image)] {
            if let Err(error) = result {
                prop_assert!(!error.to_string().contains("internal error"), "{error}");
            }
        }
    }
}
