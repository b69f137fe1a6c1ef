//! NumPy's array file, version 1.0.

use std::io::{self, Write};

/// Writes the head of an array of little-endian `f32` with `rows` rows of `cols`.
pub fn write_header(out: &mut impl Write, rows: usize, cols: usize) -> io::Result<()> {
    const PREFIX: usize = 10;
    const ALIGN: usize = 64;
    let mut dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    // Spaces and a line feed bring the data to a multiple of 64.
    let len = (PREFIX + dict.len() + 1).next_multiple_of(ALIGN) - PREFIX;
    while dict.len() + 1 < len {
        dict.push(' ');
    }
    dict.push('\n');
    out.write_all(b"\x93NUMPY\x01\x00")?;
    out.write_all(&(dict.len() as u16).to_le_bytes())?;
    out.write_all(dict.as_bytes())
}

/// Writes values after the head.
pub fn write_values(out: &mut impl Write, values: &[f32]) -> io::Result<()> {
    values.iter().try_for_each(|value| out.write_all(&value.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_is_aligned() {
        for shape in [(1, 1), (12, 4096), (1_000_000, 151_936)] {
            let mut out = Vec::new();
            write_header(&mut out, shape.0, shape.1).unwrap();
            assert_eq!(out.len() % 64, 0);
            assert_eq!(usize::from(u16::from_le_bytes([out[8], out[9]])) + 10, out.len());
            assert_eq!(out.last(), Some(&b'\n'));
            let head = String::from_utf8_lossy(&out[10..]).into_owned();
            assert!(head.contains(&format!("({}, {})", shape.0, shape.1)), "{head}");
        }
    }
}
