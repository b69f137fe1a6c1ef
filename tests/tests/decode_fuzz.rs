//! The body of the fuzz target `decode`, on chance's inputs with the stable compiler: whatever an image says, decoding
//! does not panic.

use proptest::prelude::*;

#[path = "../fuzz/src/decode.rs"]
mod fuzz;

#[test]
fn images_that_are_left_alone_give_logits() {
    for choice in 0..5 {
        for conditions in 0..16 {
            assert!(fuzz::run(&[choice, conditions & !1]), "image {choice}, conditions {conditions}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_edit_makes_decoding_panic(data in proptest::collection::vec(any::<u8>(), 8..40)) {
        fuzz::run(&data);
    }
}
