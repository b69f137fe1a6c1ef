//! `cargo +nightly fuzz run decode`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    forebay_fuzz::decode::run(data);
});
