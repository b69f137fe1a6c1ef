//! Weight encodings and the one memory layout they share.
//!
//! A quantised matrix is stored as separate *regions*: first the scales, then one region per *field*. A
//! weight's unsigned code of `b` bits is cut into fields of 1, 2 or 4 bits, most significant first, so the
//! first `n` field regions together are a valid matrix of lower precision (a prefix of the bits). Weights of
//! 8 bits are one signed field.
//!
//! All regions share a blocking: [`ROW_BLOCK`] output rows at a time, the whole of K streamed once.
//!
//! ```text
//! scales  [row block][group][32 x f16 scale]([32 x f16 minimum] if affine)
//! field 8 [row block][K/4 ][half: rows 0-15, 16-31][byte 4r+t      = weight k+t, signed]
//! field 4 [row block][K/8 ][half][byte 4r+t: bits 4i..4i+4         = weight k+4i+t, i = 0..2]
//! field 2 [row block][K/16][half][byte 4r+t: bits 2i..2i+2         = weight k+4i+t, i = 0..4]
//! field 1 [row block][K/32][half][byte 16t+r: bit i                = weight k+8t+i, t = 0..4, i = 0..8]
//! ```
//!
//! Fields of 2, 4 and 8 bits put four consecutive K of one row in one 32-bit lane, which is what dot-product
//! instructions want; fields of 1 bit put 16 rows in consecutive bytes, which is what table look-ups want.
//! Rows are padded to [`ROW_BLOCK`] and K to the group; padding has code 0, scale 0 and minimum 0.
//! Float matrices are plain row-major, little-endian, unpadded.

/// Output rows per block of every quantised layout.
pub const ROW_BLOCK: usize = 32;
/// Alignment, in bytes, of every region of a matrix.
pub const REGION_ALIGN: usize = 64;
/// Most fields a code can be cut into.
pub const MAX_FIELDS: usize = 4;

/// Number of consecutive K that share one scale.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Group {
    /// 32 weights a scale, as in GGUF's Q4_0, Q4_1 and Q8_0.
    G32 = 5,
    /// 64 weights a scale.
    G64 = 6,
    /// 128 weights a scale.
    G128 = 7,
}

impl Group {
    /// Weights per group.
    #[allow(clippy::len_without_is_empty, reason = "a group is never empty")]
    pub const fn len(self) -> usize {
        1 << self as usize
    }
    /// The group of `len` weights, if there is one.
    pub const fn from_len(len: usize) -> Option<Self> {
        match len {
            32 => Some(Self::G32),
            64 => Some(Self::G64),
            128 => Some(Self::G128),
            _ => None,
        }
    }
}

/// How a weight's code is cut into fields, most significant first; unused entries are 0.
///
/// Valid: `[8]`, or up to four widths from {1, 2, 4} whose sum is 1 to 4.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Fields([u8; MAX_FIELDS]);

impl Fields {
    /// One signed field of 8 bits.
    pub const Q8: Self = Self([8, 0, 0, 0]);
    /// One field of 4 bits: the fastest form of weights that are always read whole.
    pub const NIBBLE: Self = Self([4, 0, 0, 0]);

    /// Checks the widths.
    pub const fn new(widths: [u8; MAX_FIELDS]) -> Option<Self> {
        if widths[0] == 8 && widths[1] == 0 && widths[2] == 0 && widths[3] == 0 {
            return Some(Self(widths));
        }
        let (mut sum, mut i, mut ended) = (0, 0, false);
        while i < MAX_FIELDS {
            match widths[i] {
                0 => ended = true,
                1 | 2 | 4 if !ended => sum += widths[i],
                _ => return None,
            }
            i += 1;
        }
        if sum >= 1 && sum <= 4 { Some(Self(widths)) } else { None }
    }
    /// The widths, most significant first.
    pub const fn widths(self) -> [u8; MAX_FIELDS] {
        self.0
    }
    /// Number of fields.
    pub const fn count(self) -> usize {
        let mut n = 0;
        while n < MAX_FIELDS && self.0[n] != 0 {
            n += 1;
        }
        n
    }
    /// Bits of the code.
    pub const fn bits(self) -> u8 {
        self.0[0] + self.0[1] + self.0[2] + self.0[3]
    }
}

/// A grouped integer encoding.
///
/// A weight is `scale * (code - zero_x2 / 2) + minimum`, `minimum` being 0 unless `affine`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Quant {
    /// How the code is cut.
    pub fields: Fields,
    /// Weights per scale.
    pub group: Group,
    /// Whether each group stores a minimum beside its scale.
    pub affine: bool,
    /// Twice the zero point (16 for Q4_0, 1 for a sign bit, 0 for affine and 8-bit weights).
    pub zero_x2: u8,
}

/// How the elements of a matrix are stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Encoding {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Grouped integers.
    Quant(Quant),
}

/// Rows (outputs), columns (inputs, K) and encoding of a matrix: all that its layout depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct MatrixShape {
    /// Output dimension.
    pub rows: u32,
    /// Input dimension.
    pub cols: u32,
    /// Element encoding.
    pub encoding: Encoding,
}

const fn align_up(n: u64, to: u64) -> u64 {
    n.div_ceil(to) * to
}

impl MatrixShape {
    /// Number of levels (field regions that can be read one after another); 1 for floats.
    pub const fn levels(&self) -> usize {
        match self.encoding {
            Encoding::Quant(q) => q.fields.count(),
            _ => 1,
        }
    }
    /// Groups along K; 0 for floats.
    pub const fn groups(&self) -> usize {
        match self.encoding {
            Encoding::Quant(q) => (self.cols as usize).div_ceil(q.group.len()),
            _ => 0,
        }
    }
    /// Row blocks; 0 for floats.
    pub const fn row_blocks(&self) -> usize {
        match self.encoding {
            Encoding::Quant(_) => (self.rows as usize).div_ceil(ROW_BLOCK),
            _ => 0,
        }
    }
    /// Bytes of the scale region, a multiple of [`REGION_ALIGN`]; 0 for floats.
    pub const fn scale_bytes(&self) -> u64 {
        match self.encoding {
            Encoding::Quant(q) => {
                let per = if q.affine { 4 } else { 2 };
                self.row_blocks() as u64 * self.groups() as u64 * (ROW_BLOCK as u64) * per
            }
            _ => 0,
        }
    }
    /// Bytes of level `level`'s field region, a multiple of [`REGION_ALIGN`]; for floats the data is level 0.
    /// A level that does not exist has 0 bytes.
    pub const fn field_bytes(&self, level: usize) -> u64 {
        match self.encoding {
            Encoding::Quant(q) => {
                if level >= MAX_FIELDS {
                    return 0;
                }
                let width = q.fields.widths()[level] as u64;
                let k = self.groups() as u64 * q.group.len() as u64;
                self.row_blocks() as u64 * (ROW_BLOCK as u64) * k * width / 8
            }
            Encoding::F32 if level == 0 => align_up(self.rows as u64 * self.cols as u64 * 4, REGION_ALIGN as u64),
            Encoding::F16 | Encoding::Bf16 if level == 0 => {
                align_up(self.rows as u64 * self.cols as u64 * 2, REGION_ALIGN as u64)
            }
            _ => 0,
        }
    }
    /// Bytes of the whole matrix with all levels.
    pub const fn bytes(&self) -> u64 {
        let mut sum = self.scale_bytes();
        let mut level = 0;
        while level < self.levels() {
            sum += self.field_bytes(level);
            level += 1;
        }
        sum
    }
}

/// A view of the regions of one matrix. `fields[..levels]` are present; computing with fewer levels than the
/// encoding has gives the lower-precision product. Every value, and so every product, is multiplied by the gain.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a> {
    shape: MatrixShape,
    scales: &'a [u8],
    fields: [&'a [u8]; MAX_FIELDS],
    levels: u8,
    gain: f32,
}

impl<'a> MatrixRef<'a> {
    /// Checks that the regions have the bytes that the shape asks for; `None` if not, or if there is no level.
    pub fn new(shape: MatrixShape, scales: &'a [u8], fields: &[&'a [u8]]) -> Option<Self> {
        if fields.is_empty() || fields.len() > shape.levels() || scales.len() as u64 != shape.scale_bytes() {
            return None;
        }
        let mut all: [&'a [u8]; MAX_FIELDS] = [&[]; MAX_FIELDS];
        for (level, region) in fields.iter().enumerate() {
            if region.len() as u64 != shape.field_bytes(level) {
                return None;
            }
            all[level] = region;
        }
        Some(Self { shape, scales, fields: all, levels: fields.len() as u8, gain: 1.0 })
    }
    /// A matrix whose regions follow one another in `bytes` (scales, then every field).
    pub fn from_contiguous(shape: MatrixShape, bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() as u64 != shape.bytes() {
            return None;
        }
        let (scales, mut rest) = bytes.split_at(shape.scale_bytes() as usize);
        let mut fields: [&'a [u8]; MAX_FIELDS] = [&[]; MAX_FIELDS];
        for (level, field) in fields.iter_mut().enumerate().take(shape.levels()) {
            (*field, rest) = rest.split_at(shape.field_bytes(level) as usize);
        }
        Self::new(shape, scales, &fields[..shape.levels()])
    }
    /// The same matrix with all values multiplied by `gain`. A prefix of a code stands for the middle of a range,
    /// but values crowd towards zero: their least squares fit is a little smaller than the middles.
    #[must_use]
    pub const fn with_gain(self, gain: f32) -> Self {
        Self { gain, ..self }
    }
    /// Shape and encoding.
    pub const fn shape(&self) -> MatrixShape {
        self.shape
    }
    /// What every value is multiplied by; 1 unless [`Self::with_gain`] says otherwise.
    pub const fn gain(&self) -> f32 {
        self.gain
    }
    /// The scale region.
    pub const fn scales(&self) -> &'a [u8] {
        self.scales
    }
    /// The field regions present, most significant first.
    pub fn fields(&self) -> &[&'a [u8]] {
        &self.fields[..self.levels as usize]
    }
}
