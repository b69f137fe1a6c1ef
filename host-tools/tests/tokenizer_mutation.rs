//! Broken and hostile tokenizer sections: refused or harmless, never a panic or an endless loop.

mod tokenizer_support;

use forebay_runtime::tokenizer::{EncodeOptions, Tokenizer, TokenizerError, layout};
use tokenizer_support::*;

/// Uses everything that relies on what `parse` has checked.
fn exercise(tokenizer: &Tokenizer<'_>, random: &mut Random) {
    let text = text(random, &["<|im_end|>".to_owned(), "</s>".to_owned(), "  ".to_owned()]);
    let mut scratch = vec![0; Tokenizer::encode_scratch(text.len())];
    let mut ids = vec![0; 2 * text.len() + 2];
    for parse_special in [true, false] {
        let options = EncodeOptions { add_bos: true, parse_special };
        let len = tokenizer.encode(&text, options, &mut scratch, &mut ids).unwrap();
        assert!(ids[..len].iter().all(|&id| (id as usize) < tokenizer.vocab_len()));
        decode(tokenizer, &ids[..len], parse_special);
    }
    for _ in 0..20 {
        let id = random.next() as u32 >> random.below(32);
        let known = (id as usize) < tokenizer.vocab_len();
        assert_eq!(tokenizer.token_bytes(id).is_some(), known);
        tokenizer.is_special(id);
        tokenizer.is_eos(id);
    }
    tokenizer.token_id(text.as_bytes());
    assert!(tokenizer.eos_ids().all(|id| (id as usize) < tokenizer.vocab_len()));
}

#[test]
fn changed_bytes_never_cause_a_panic() {
    let (mut accepted, mut refused) = (0, 0);
    for (n, (section, fields)) in [
        (lfm2().section, layout::HEADER_LEN),
        (llama2_normalized().section, layout::HEADER_LEN),
        (llama3().section, layout::HEADER_LEN),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random(n as u64);
        for round in 0..6000 {
            let mut section = section.to_vec();
            for _ in 0..=random.below(4) {
                // Every third round aims at the header, where a byte changes most.
                let end = if round % 3 == 0 { fields } else { section.len() };
                let at = random.below(end);
                section[at] = match random.below(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => section[at] ^ 1 << random.below(8),
                    _ => random.next() as u8,
                };
            }
            match Tokenizer::parse(&section) {
                Ok(tokenizer) => {
                    accepted += 1;
                    exercise(&tokenizer, &mut random);
                }
                Err(_) => refused += 1,
            }
        }
    }
    // Both ways are really taken.
    assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
}

#[test]
fn every_shorter_section_is_refused() {
    let section = llama2().section;
    let mut random = Random(3);
    let lengths = (0..200).chain((0..300).map(|_| random.below(section.len())));
    for len in lengths.chain([section.len() - 1]) {
        let error = Tokenizer::parse(&section[..len]).unwrap_err();
        assert!(matches!(error, TokenizerError::Truncated { .. }), "{len}: {error}");
    }
    let mut longer = section.to_vec();
    longer.push(7);
    assert!(Tokenizer::parse(&longer).is_ok());
}

#[test]
fn rules_of_the_format_are_checked_one_by_one() {
    let section = lfm2().section;
    let refused = |at: usize, value: &[u8]| {
        let mut section = section.to_vec();
        section[at..at + value.len()].copy_from_slice(value);
        Tokenizer::parse(&section).unwrap_err()
    };
    assert_eq!(refused(0, b"X"), TokenizerError::Magic);
    assert_eq!(refused(4, &[9, 0]), TokenizerError::Version(9));
    let ff = [0xff; 4];
    for (at, value, table) in [
        (layout::AT_KIND, &[9][..], "kind"),
        (layout::AT_PRETOKENIZER, &[99], "pre-tokeniser"),
        (layout::AT_SPACE_PREFIX, &[9], "space prefix"),
        (layout::AT_ID_WIDTH, &[4], "id width"),
        (layout::AT_MERGE_WIDTH, &[1], "merge width"),
        (layout::AT_OFFSET_WIDTH, &[0], "offset width"),
        (layout::AT_FLAGS, &ff, "flags"),
        (layout::AT_TOTAL_LEN, &ff, "total length"),
        (layout::AT_VOCAB_LEN, &ff, "vocabulary length"),
        (layout::AT_ADDED_RAW_COUNT, &ff, "added tokens"),
        (layout::AT_BOS, &[0, 0, 0, 1], "bos"),
        (layout::AT_BOS, &ff, "bos"),
        (layout::AT_UNK, &[0, 0, 0, 1], "unk"),
        (layout::AT_RESERVED, &[1], "reserved"),
        (layout::HEADER_LEN, &[0, 0, 0, 1], "byte ids"),
        (layout::HEADER_LEN + 1024, &[0xff, 0xff], "token ends"),
    ] {
        match refused(at, value) {
            TokenizerError::Malformed { table: found, .. } => assert_eq!(found, table),
            error => panic!("{table}: {error}"),
        }
    }
}
