//! Conversations without a template engine: the CHAT TURNS section holds what a chat template puts between the turns.
//!
//! The converter renders the model's own template and cuts these texts out of what it gives, so that a conversation of
//! user and assistant in turn, with or without a system text, is what the template would have made of it.

use core::ops::Range;
use core::str;

/// Version of the section that this code reads.
pub const VERSION: u16 = 1;
/// Texts in a section.
pub const TEXTS: usize = 5;
/// Bytes before the texts.
pub const HEADER: usize = 4 + 4 * TEXTS;

/// What stands between the turns of a conversation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turns<'a> {
    /// Before the first user turn of a conversation without a system text.
    pub first: &'a str,
    /// Before the system text.
    pub system: &'a str,
    /// Between the system text and the first user turn.
    pub after_system: &'a str,
    /// Between a user turn and its answer.
    pub answer: &'a str,
    /// Between an answer and the next user turn.
    pub next: &'a str,
}

/// Why a section is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum TurnsError {
    /// It is of a version that this program does not read.
    #[error("chat turns: version {0} is not supported")]
    Version(u16),
    /// Its lengths contradict its size.
    #[error("chat turns: the section's lengths do not add up")]
    Lengths,
    /// A text is not UTF-8.
    #[error("chat turns: text {0} is not UTF-8")]
    Text(usize),
}

impl<'a> Turns<'a> {
    /// Reads a section.
    pub fn parse(section: &'a [u8]) -> Result<Self, TurnsError> {
        let (header, texts) = section.split_at_checked(HEADER).ok_or(TurnsError::Lengths)?;
        let version = u16::from_le_bytes([header[0], header[1]]);
        if version != VERSION {
            return Err(TurnsError::Version(version));
        }
        let mut parsed = [""; TEXTS];
        let mut rest = texts;
        for (index, (text, len)) in parsed.iter_mut().zip(header[4..].chunks_exact(4)).enumerate() {
            let len = len.iter().rev().fold(0u32, |len, byte| len << 8 | u32::from(*byte));
            let len = usize::try_from(len).map_err(|_| TurnsError::Lengths)?;
            let (bytes, after) = rest.split_at_checked(len).ok_or(TurnsError::Lengths)?;
            *text = str::from_utf8(bytes).map_err(|_| TurnsError::Text(index))?;
            rest = after;
        }
        if !rest.is_empty() {
            return Err(TurnsError::Lengths);
        }
        let [first, system, after_system, answer, next] = parsed;
        Ok(Self { first, system, after_system, answer, next })
    }

    /// The texts in the section's order.
    pub fn texts(&self) -> [&'a str; TEXTS] {
        [self.first, self.system, self.after_system, self.answer, self.next]
    }

    /// Most bytes that stand around one user turn, a system text of `system` bytes included.
    pub fn longest(&self, system: usize) -> usize {
        let before = self.first.len().max(self.system.len() + system + self.after_system.len());
        before.max(self.next.len()) + self.answer.len()
    }

    /// The texts around a user turn: what comes before it, in up to three parts, and what comes after.
    ///
    /// `system` is the system text of a conversation, which counts only for its first turn.
    pub fn around<'t>(&'t self, first: bool, system: Option<&'t str>) -> ([&'t str; 3], &'t str) {
        let before = match (first, system) {
            (false, _) => [self.next, "", ""],
            (true, None) => [self.first, "", ""],
            (true, Some(text)) => [self.system, text, self.after_system],
        };
        (before, self.answer)
    }
}

/// The header of a section with `texts`; the texts follow in this order.
pub fn header(texts: &[&str; TEXTS]) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..2].copy_from_slice(&VERSION.to_le_bytes());
    for (text, index) in texts.iter().zip(0..) {
        let at: Range<usize> = 4 + 4 * index..8 + 4 * index;
        out[at].copy_from_slice(&(text.len() as u32).to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use heapless::Vec;

    use super::*;

    const TURNS: Turns<'_> =
        Turns { first: "<s>[", system: "<s>{", after_system: "}[", answer: "]", next: "</s>\n[é" };

    fn section(turns: &Turns<'_>) -> Vec<u8, 128> {
        let texts = turns.texts();
        let mut bytes = Vec::from_slice(&header(&texts)).unwrap();
        texts.iter().for_each(|text| bytes.extend_from_slice(text.as_bytes()).unwrap());
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Turns::parse(&section(&TURNS)), Ok(TURNS));
        let none = Turns { first: "", system: "", after_system: "", answer: "", next: "" };
        assert_eq!(Turns::parse(&section(&none)), Ok(none));
        assert_eq!(TURNS.longest(10), 4 + 10 + 2 + 1);
        assert_eq!(TURNS.around(true, Some("S")), (["<s>{", "S", "}["], "]"));
        assert_eq!(TURNS.around(false, Some("S")), (["</s>\n[é", "", ""], "]"));
    }

    #[test]
    fn broken_sections_are_refused() {
        let whole = section(&TURNS);
        for len in 0..whole.len() {
            assert_eq!(Turns::parse(&whole[..len]), Err(TurnsError::Lengths), "{len} bytes");
        }
        let changed = |at: usize, byte: u8| {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            Turns::parse(&bytes).err()
        };
        assert_eq!(changed(0, 2), Some(TurnsError::Version(2)));
        assert_eq!(changed(7, 0xff), Some(TurnsError::Lengths));
        assert_eq!(changed(whole.len() - 1, b'x'), Some(TurnsError::Text(4)));
        let mut longer = whole.clone();
        longer.push(0).unwrap();
        assert_eq!(Turns::parse(&longer), Err(TurnsError::Lengths));
    }
}
