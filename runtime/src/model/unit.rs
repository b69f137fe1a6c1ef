//! The layout of one streamed unit: an expert, or a cluster of a dense layer's neurons.

use forebay_kernels::weights::{MAX_FIELDS, MatrixRef, MatrixShape, REGION_ALIGN};
use zerocopy::little_endian::F32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Gate, up and down of one unit, and how their regions lie in the unit's extent.
///
/// Level 0 holds, for gate, up and down in turn, the scales and the most significant field; level `i` holds
/// field `i` of those that have one. Every level is padded to the page, so the first `n` levels are one aligned
/// read that is a valid unit of lower precision. All precisions share the scales; where there is more than one, level
/// 0 begins with a [`UnitHead`], whose gains fit each of the lower ones to the weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct UnitShape {
    /// [unit width, hidden].
    pub gate: MatrixShape,
    /// [unit width, hidden].
    pub up: MatrixShape,
    /// [hidden, unit width].
    pub down: MatrixShape,
}

/// Most levels of a unit.
pub const MAX_LEVELS: usize = MAX_FIELDS;

/// What level 0 of a unit of several levels begins with. 64 bytes.
#[derive(Clone, Copy, PartialEq, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct UnitHead {
    /// `gains[n - 1]`: what gate, up and down are multiplied by when `n` levels are computed with and the matrix has
    /// more; 1 where there is no such precision.
    pub gains: [[F32; 3]; MAX_LEVELS - 1],
    /// Zero.
    pub reserved: [u8; 28],
}

impl Default for UnitHead {
    /// Gains of 1.
    fn default() -> Self {
        Self { gains: [[F32::new(1.0); 3]; MAX_LEVELS - 1], reserved: [0; 28] }
    }
}

const _: () = assert!(size_of::<UnitHead>() == REGION_ALIGN);

/// Views of a unit's three matrices.
#[derive(Clone, Copy, Debug)]
pub struct UnitRef<'a> {
    /// Gate projection.
    pub gate: MatrixRef<'a>,
    /// Up projection.
    pub up: MatrixRef<'a>,
    /// Down projection.
    pub down: MatrixRef<'a>,
}

impl UnitShape {
    /// The matrices in storage order.
    pub const fn matrices(&self) -> [MatrixShape; 3] {
        [self.gate, self.up, self.down]
    }

    /// Levels of the extent: the most that any of the three matrices has.
    pub fn levels(&self) -> usize {
        self.matrices().iter().map(MatrixShape::levels).max().unwrap_or(1)
    }

    /// Bytes of one level before padding.
    fn level_payload(&self, level: usize) -> u64 {
        let scales = |m: &MatrixShape| if level == 0 { m.scale_bytes() } else { 0 };
        self.head_len(level) + self.matrices().iter().map(|m| scales(m) + m.field_bytes(level)).sum::<u64>()
    }

    /// Bytes before the first matrix's part of a level.
    fn head_len(&self, level: usize) -> u64 {
        if level == 0 && self.levels() > 1 { size_of::<UnitHead>() as u64 } else { 0 }
    }

    /// Bytes of one level in the extent: a multiple of `page`.
    pub fn level_len(&self, level: usize, page: u32) -> u64 {
        self.level_payload(level).next_multiple_of(page.into())
    }

    /// Bytes of the first `levels` levels.
    pub fn prefix_len(&self, levels: usize, page: u32) -> u64 {
        (0..levels).map(|level| self.level_len(level, page)).sum()
    }

    /// Byte range, from the start of the extent, of matrix `m`'s scales (`field` None) or of one of its fields.
    pub fn region(&self, m: usize, field: Option<usize>, page: u32) -> core::ops::Range<u64> {
        let level = field.unwrap_or(0);
        let matrices = self.matrices();
        let mut at = self.prefix_len(level, page) + self.head_len(level);
        for earlier in &matrices[..m] {
            at += earlier.field_bytes(level) + if level == 0 { earlier.scale_bytes() } else { 0 };
        }
        match field {
            None => at..at + matrices[m].scale_bytes(),
            Some(_) => {
                at += if level == 0 { matrices[m].scale_bytes() } else { 0 };
                at..at + matrices[m].field_bytes(level)
            }
        }
    }

    /// Views of the unit at a precision of `levels` levels, with their gains. `pieces[l]` is level `l`, [`Self::level_len`] bytes of the
    /// extent or more; levels need not lie side by side, and those from `levels` on are not looked at. `None` if
    /// `levels` is 0 or more than there are, a piece is missing or too short, or a gain is not finite.
    pub fn view<'a>(&self, levels: usize, page: u32, pieces: &[&'a [u8]]) -> Option<UnitRef<'a>> {
        let pieces = pieces.get(..levels).filter(|_| (1..=self.levels()).contains(&levels))?;
        let get = |m: usize, field: Option<usize>| {
            let level = field.unwrap_or(0);
            let (range, start) = (self.region(m, field, page), self.prefix_len(level, page));
            let within = |at: u64| usize::try_from(at.checked_sub(start)?).ok();
            pieces.get(level)?.get(within(range.start)?..within(range.end)?)
        };
        let head = match self.levels() {
            1 => UnitHead::default(),
            _ => UnitHead::read_from_prefix(pieces.first()?).ok()?.0,
        };
        let matrix = |m: usize| {
            let shape = self.matrices()[m];
            let mut fields: [&[u8]; MAX_FIELDS] = [&[]; MAX_FIELDS];
            let present = levels.min(shape.levels());
            for (level, field) in fields.iter_mut().enumerate().take(present) {
                *field = get(m, Some(level))?;
            }
            let gain = if present < shape.levels() { head.gains.get(levels - 1)?[m].get() } else { 1.0 };
            let matrix = MatrixRef::new(shape, get(m, None)?, &fields[..present])?;
            gain.is_finite().then(|| matrix.with_gain(gain))
        };
        Some(UnitRef { gate: matrix(0)?, up: matrix(1)?, down: matrix(2)? })
    }

    /// The levels of a unit whose bytes lie side by side in `bytes`, as [`Self::view`] takes them: the first
    /// `levels`, and nothing for the others. `None` if the bytes are too few.
    pub fn split<'a>(&self, levels: usize, page: u32, bytes: &'a [u8]) -> Option<[&'a [u8]; MAX_LEVELS]> {
        let mut pieces: [&[u8]; MAX_LEVELS] = [&[]; MAX_LEVELS];
        let mut rest = bytes;
        for (level, piece) in pieces.iter_mut().enumerate().take(levels) {
            (*piece, rest) = rest.split_at_checked(usize::try_from(self.level_len(level, page)).ok()?)?;
        }
        Some(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use forebay_kernels::matmul::row_to_f32;
    use forebay_kernels::weights::{Encoding, Fields, Group, Quant};

    const PAGE: u32 = 512;
    /// Bytes of [`unit`]'s extent.
    const LEN: usize = 4608;

    fn shape(rows: u32, cols: u32, widths: [u8; 4]) -> MatrixShape {
        let fields = Fields::new(widths).unwrap();
        let quant = Quant { fields, group: Group::G32, affine: false, zero_x2: 1 << fields.bits() };
        MatrixShape { rows, cols, encoding: Encoding::Quant(quant) }
    }

    /// Gate has four levels, up two, down one.
    fn unit() -> UnitShape {
        UnitShape {
            gate: shape(32, 64, [1, 1, 1, 1]),
            up: shape(32, 64, [2, 2, 0, 0]),
            down: shape(64, 32, [4, 0, 0, 0]),
        }
    }

    /// An extent of the unit: scales of 1, fields of `0x5a`, gains 2 to 10.
    fn extent(unit: &UnitShape) -> [u8; LEN] {
        assert_eq!(unit.prefix_len(unit.levels(), PAGE), LEN as u64);
        let mut bytes = [0; LEN];
        let mut head = UnitHead::default();
        head.gains.as_flattened_mut().iter_mut().zip(2u8..).for_each(|(gain, i)| gain.set(i.into()));
        bytes[..64].copy_from_slice(head.as_bytes());
        for (m, matrix) in unit.matrices().iter().enumerate() {
            let range = |r: core::ops::Range<u64>| r.start as usize..r.end as usize;
            bytes[range(unit.region(m, None, PAGE))].as_chunks_mut::<2>().0.fill([0x00, 0x3c]);
            for level in 0..matrix.levels() {
                bytes[range(unit.region(m, Some(level), PAGE))].fill(0x5a);
            }
        }
        bytes
    }

    fn first(matrix: &MatrixRef<'_>) -> f32 {
        let mut row = [0.0; 64];
        row_to_f32(matrix, 0, &mut row[..matrix.shape().cols as usize]);
        row[0]
    }

    #[test]
    fn levels_may_lie_apart() {
        let unit = unit();
        let bytes = extent(&unit);
        let together = unit.split(4, PAGE, &bytes).unwrap();
        assert!(together.iter().enumerate().all(|(l, piece)| piece.len() as u64 == unit.level_len(l, PAGE)));
        let mut buffers = [[0; LEN]; 4];
        let mut apart: [&[u8]; 4] = [&[]; 4];
        for ((buffer, from), piece) in buffers.iter_mut().zip(together).zip(&mut apart) {
            buffer[..from.len()].copy_from_slice(from);
            *piece = buffer;
        }
        for levels in 1..=4 {
            let [a, b] = [&together[..], &apart[..levels]].map(|pieces| unit.view(levels, PAGE, pieces).unwrap());
            for (a, b) in [(a.gate, b.gate), (a.up, b.up), (a.down, b.down)] {
                assert_eq!(a.scales(), b.scales());
                assert_eq!(a.fields(), b.fields());
                assert_eq!(a.gain(), b.gain());
            }
            assert_eq!([a.gate.fields().len(), a.up.fields().len()], [levels, levels.min(2)]);
        }
    }

    #[test]
    fn gains_are_of_what_is_missing() {
        let unit = unit();
        let bytes = extent(&unit);
        for (levels, want) in [(1, [2.0, 3.0, 1.0]), (2, [5.0, 1.0, 1.0]), (3, [8.0, 1.0, 1.0]), (4, [1.0; 3])] {
            let view = unit.view(levels, PAGE, &unit.split(levels, PAGE, &bytes).unwrap()).unwrap();
            assert_eq!([view.gate, view.up, view.down].map(|m| m.gain()), want);
        }
        // The top bits of the first code of `up` are 2, of 4 bits less 8: the middle of 0..=3 is 1.5.
        let view = unit.view(1, PAGE, &unit.split(1, PAGE, &bytes).unwrap()).unwrap();
        assert_eq!(first(&view.up), 3.0 * 1.5);
    }

    #[test]
    fn what_is_missing_or_wrong_gives_no_view() {
        let unit = unit();
        let mut bytes = extent(&unit);
        let pieces = unit.split(4, PAGE, &bytes).unwrap();
        assert!(unit.view(0, PAGE, &pieces).is_none());
        assert!(unit.view(5, PAGE, &pieces).is_none());
        assert!(unit.view(4, PAGE, &pieces[..3]).is_none());
        assert!(unit.view(2, PAGE, &[pieces[0], &pieces[1][..100]]).is_none());
        assert!(unit.view(1, PAGE, &[&[]]).is_none());
        assert!(unit.split(4, PAGE, &bytes[..bytes.len() - 1]).is_none());
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(unit.view(1, PAGE, &unit.split(1, PAGE, &bytes).unwrap()).is_none());
        assert!(unit.view(4, PAGE, &unit.split(4, PAGE, &bytes).unwrap()).is_some(), "that gain is not used");
    }

    #[test]
    fn a_unit_of_one_level_has_no_head() {
        let plain = shape(32, 32, [4, 0, 0, 0]);
        let unit = UnitShape { gate: plain, up: plain, down: plain };
        assert_eq!(unit.region(0, None, PAGE).start, 0);
        let bytes = [0; 2048];
        assert_eq!(unit.prefix_len(1, PAGE), bytes.len() as u64);
        assert_eq!(unit.view(1, PAGE, &[&bytes]).unwrap().gate.gain(), 1.0);
    }
}
