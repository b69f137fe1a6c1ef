//! The pool: a bounded set of slots that hold streamed units, whole or level by level.
//!
//! A slot owns its buffer. While a piece is being read the buffer belongs to the read. Which piece holds which slot,
//! and which gives way, is the [`Directory`]'s to say.

use crate::cache::{Claim, Directory, Residency};

/// A slot's buffer; `None` while it is with a read.
pub(crate) type Slot<'a> = Option<&'a mut [u8]>;

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool<'a> {
    slots: &'a mut [Slot<'a>],
    pub directory: Directory<'a>,
}

impl<'a> Pool<'a> {
    /// `slots` and the directory's entries are as many.
    pub fn new(slots: &'a mut [Slot<'a>], directory: Directory<'a>) -> Self {
        Self { slots, directory }
    }

    /// The bytes of a resident piece.
    pub fn get(&self, piece: u32) -> Option<&[u8]> {
        if self.directory.residency(piece) != Residency::Resident {
            return None;
        }
        self.slots.get(self.directory.slot(piece)?)?.as_deref()
    }

    /// A buffer to read `claim.piece` into; see [`Directory::claim`].
    pub fn claim(
        &mut self,
        claim: Claim,
        keep: impl Fn(u16, u32) -> bool,
        next_use: impl Fn(u16) -> Option<usize>,
    ) -> Option<&'a mut [u8]> {
        let slot = self.directory.claim(claim, keep, next_use)?;
        self.slots.get_mut(slot)?.take()
    }

    /// Takes a read's buffer back; see [`Directory::settle`]. `false` if no read of the piece was under way.
    pub fn settle(&mut self, piece: u32, buf: &'a mut [u8], good: bool) -> bool {
        let slot = self.directory.settle(piece, good).and_then(|slot| self.slots.get_mut(slot));
        if let Some(slot) = slot {
            *slot = Some(buf);
            return true;
        }
        false
    }
}
