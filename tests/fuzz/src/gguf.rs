//! The header of a GGUF file: whatever the bytes are, parsing does not panic, and what is accepted lies in the file.

use std::collections::HashSet;
use std::io::Cursor;

use forebay::gguf::parse;

/// Takes `data` as a GGUF file: once as it is, and once with magic and version put right.
pub fn run(data: &[u8]) {
    check(data);
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend_from_slice(data.get(8..).unwrap_or_default());
    check(&file);
}

/// Returns whether the header is valid.
pub fn check(file: &[u8]) -> bool {
    let Ok(header) = parse(Cursor::new(file)) else { return false };
    let mut names = HashSet::new();
    for tensor in &header.tensors {
        assert!(names.insert(&tensor.name), "names are unique");
        assert!(tensor.dims.iter().all(|&n| n > 0));
        let elements: u64 = tensor.dims.iter().product();
        assert_eq!(tensor.len, elements / tensor.kind.block * tensor.kind.bytes);
        assert!(tensor.offset + tensor.len <= file.len() as u64, "the data is in the file");
    }
    for (key, _) in &header.metadata {
        assert!(header.get(key).is_some());
    }
    true
}
