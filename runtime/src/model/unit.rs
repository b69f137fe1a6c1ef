//! The layout of one streamed unit: an expert, or a cluster of a dense layer's neurons.

use forebay_kernels::weights::{MAX_FIELDS, MatrixRef, MatrixShape};

/// Gate, up and down of one unit, and how their regions lie in the unit's extent.
///
/// Level 0 holds, for gate, up and down in turn, the scales and the most significant field; level `i` holds
/// field `i` of those that have one. Every level is padded to the page, so the first `n` levels are one aligned
/// read that is a valid unit of lower precision.
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
        self.matrices().iter().map(|m| scales(m) + m.field_bytes(level)).sum()
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
        let mut at = self.prefix_len(level, page);
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

    /// Views of the unit at a precision of `levels` levels. `pieces[l]` is level `l`, [`Self::level_len`] bytes of the
    /// extent or more; levels need not lie side by side, and those from `levels` on are not looked at. `None` if
    /// `levels` is 0 or more than there are, or a piece is missing or too short.
    pub fn view<'a>(&self, levels: usize, page: u32, pieces: &[&'a [u8]]) -> Option<UnitRef<'a>> {
        let pieces = pieces.get(..levels).filter(|_| (1..=self.levels()).contains(&levels))?;
        let get = |m: usize, field: Option<usize>| {
            let level = field.unwrap_or(0);
            let (range, start) = (self.region(m, field, page), self.prefix_len(level, page));
            let within = |at: u64| usize::try_from(at.checked_sub(start)?).ok();
            pieces.get(level)?.get(within(range.start)?..within(range.end)?)
        };
        let matrix = |m: usize| {
            let shape = self.matrices()[m];
            let mut fields: [&[u8]; MAX_FIELDS] = [&[]; MAX_FIELDS];
            let present = levels.min(shape.levels());
            for (level, field) in fields.iter_mut().enumerate().take(present) {
                *field = get(m, Some(level))?;
            }
            MatrixRef::new(shape, get(m, None)?, &fields[..present])
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
