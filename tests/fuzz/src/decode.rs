//! Whole decoding of images that lie: tables and weights are edited, every checksum is made right again, and the image
//! is opened, planned and fed tokens. An error is an answer; a panic, a hang or a broken promise is not.

use std::path::Path;
use std::sync::OnceLock;

use forebay::convert::{ConvertOptions, WeightChoice};
use forebay_conformance::hostile::{parts, reseal};
use forebay_conformance::{Setup, arena_memory, arena_of, image_of, run_on};
use forebay_kernels::attention::KvFormat;
use forebay_storage::MemoryStore;

/// Bytes of one edit: part, place (2), kind, value (2).
const EDIT: usize = 6;
/// Numbers that are most often wrong.
const EDGES: [u32; 8] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff];
const TOKENS: [u32; 6] = [1, 201, 233, 49, 178, 5];

/// Images to begin with: every operator, router, encoding of weights and number of levels.
fn images() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let references = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find_map(|folder| {
            let found = folder.join("tests/fixtures/references");
            found.is_dir().then_some(found)
        });
        let references = references.expect("the repository's references");
        let cases = [
            ("lfm2moe", WeightChoice::Q4),
            ("lfm2moe", WeightChoice::F16),
            ("lfm2-convbias-L4-untied", WeightChoice::Q3),
            ("llama-yarn", WeightChoice::Q8),
            ("llama-gqa-untied", WeightChoice::Q1),
        ];
        let image = |(case, weights)| {
            let options =
                ConvertOptions { weights: Some(weights), unit_width: Some(32), page: 512, ..ConvertOptions::default() };
            image_of(&references.join(case), &options).expect("the reference converts")
        };
        cases.into_iter().map(image).collect()
    })
}

/// Takes `data` as the choice of an image, the conditions of a run, and edits. Returns whether logits came of it.
pub fn run(data: &[u8]) -> bool {
    let [choice, conditions, edits @ ..] = data else { return false };
    let images = images();
    let mut image = images[usize::from(*choice) % images.len()].clone();
    let mut parts = parts(&image);
    let tables = parts.iter().map(|(_, range)| range.end).max().unwrap_or(0);
    parts.push(("weights", tables.next_multiple_of(512)..image.len()));
    for edit in edits.chunks_exact(EDIT).take(32) {
        let range = parts[usize::from(edit[0]) % parts.len()].1.clone();
        let place = usize::from(u16::from_le_bytes([edit[1], edit[2]]));
        let at = range.start + place * (1 + (range.len() >> 16)) % range.len();
        let (value, word) = (edit[4], EDGES[usize::from(edit[4]) % EDGES.len()]);
        match edit[3] % 5 {
            0 => image[at] = value,
            1 => image[at] ^= 1 << (value % 8),
            2 => image[at] = image[at].wrapping_add(value),
            3 => put(&mut image, at / 4 * 4, &word.to_le_bytes()),
            _ => put(&mut image, at / 4 * 4, &u32::from_le_bytes([value, edit[5], 0, 0]).to_le_bytes()),
        }
    }
    reseal(&mut image);

    let arena = if conditions & 1 == 0 { 16 << 20 } else { 192 << 10 };
    let setup = Setup {
        batch: if conditions & 2 == 0 { 16 } else { 1 },
        kv: if conditions & 4 == 0 { KvFormat::F32 } else { KvFormat::F16 },
        backend: (conditions & 8 == 0).then_some("scalar"),
        queue_depth: 1 + usize::from(conditions >> 6),
        ..Setup::default()
    };
    let mut memory = arena_memory(arena);
    match run_on(&mut MemoryStore::new(&image), &arena_of(&mut memory, arena), &setup, &TOKENS) {
        Ok(run) => {
            assert!(run.logits.len() % TOKENS.len() == 0 && run.logits.iter().all(|x| x.is_finite()));
            true
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!message.is_empty() && !message.contains("internal error"), "{message}");
            false
        }
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}
