//! The expert pool: a bounded set of slots that hold streamed units.
//!
//! A slot owns its buffer. While a unit is being read the buffer belongs to the read; the slot remembers only
//! which unit it will hold. Dense layers' units are used in a known order, so of them the one that is needed last
//! gives way; experts come before them, the least recently used first.

/// No slot, in the unit table.
const NONE: u32 = u32::MAX;

/// State of a slot.
#[derive(Debug)]
enum State<'a> {
    /// Holds nothing.
    Free(&'a mut [u8]),
    /// Its buffer is with a read.
    Reading,
    /// Holds a checked unit.
    Ready(&'a mut [u8]),
}

/// One slot of the pool.
#[derive(Debug)]
pub struct Slot<'a> {
    state: State<'a>,
    unit: u32,
    last_use: u64,
}

/// Where a unit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Residency {
    /// Not in the pool.
    Absent,
    /// Being read.
    InFlight,
    /// Ready to be computed with.
    Resident,
}

/// The pool. Units are numbered over all layers.
#[derive(Debug)]
pub(crate) struct Pool<'a> {
    slots: &'a mut [Slot<'a>],
    /// Slot of each unit, or [`NONE`].
    of_unit: &'a mut [u32],
    clock: u64,
}

impl<'a> Slot<'a> {
    /// A free slot.
    pub(crate) fn new(buf: &'a mut [u8]) -> Self {
        Self { state: State::Free(buf), unit: NONE, last_use: 0 }
    }
}

impl<'a> Pool<'a> {
    pub fn new(slots: &'a mut [Slot<'a>], of_unit: &'a mut [u32]) -> Self {
        of_unit.fill(NONE);
        Self { slots, of_unit, clock: 0 }
    }

    fn slot(&self, unit: u32) -> Option<usize> {
        self.of_unit.get(unit as usize).copied().filter(|s| *s != NONE).map(|s| s as usize)
    }

    pub fn residency(&self, unit: u32) -> Residency {
        match self.slot(unit).map(|s| &self.slots[s].state) {
            Some(State::Ready(_)) => Residency::Resident,
            Some(State::Reading) => Residency::InFlight,
            _ => Residency::Absent,
        }
    }

    /// The bytes of a resident unit.
    pub fn get(&self, unit: u32) -> Option<&[u8]> {
        match &self.slots[self.slot(unit)?].state {
            State::Ready(buf) => Some(buf),
            _ => None,
        }
    }

    /// Marks a resident unit as used now.
    pub fn touch(&mut self, unit: u32) {
        self.clock += 1;
        if let Some(slot) = self.slot(unit) {
            self.slots[slot].last_use = self.clock;
        }
    }

    /// A buffer to read `unit` into: a free slot's, or that of a unit which gives way; `None` if there is neither.
    ///
    /// Units for which `keep` is true stay. `next_use` says in how many layers a unit is certainly used again,
    /// if that is certain: of those, the one whose use is farthest away gives way (Belady's rule), but first, least
    /// recently used first, those of which nothing is certain.
    pub fn claim(
        &mut self,
        unit: u32,
        keep: impl Fn(u32) -> bool,
        next_use: impl Fn(u32) -> Option<usize>,
    ) -> Option<&'a mut [u8]> {
        let mut victim = None;
        let mut worst = None;
        for (index, slot) in self.slots.iter().enumerate() {
            match slot.state {
                State::Free(_) => {
                    victim = Some(index);
                    break;
                }
                State::Ready(_) if !keep(slot.unit) => {
                    let expendable = match next_use(slot.unit) {
                        None => (usize::MAX, u64::MAX - slot.last_use),
                        Some(layers) => (layers, slot.last_use),
                    };
                    if worst.is_none_or(|worst| expendable > worst) {
                        (victim, worst) = (Some(index), Some(expendable));
                    }
                }
                _ => {}
            }
        }
        let index = victim?;
        let slot = &mut self.slots[index];
        if slot.unit != NONE {
            self.of_unit[slot.unit as usize] = NONE;
        }
        self.clock += 1;
        slot.unit = unit;
        slot.last_use = self.clock;
        *self.of_unit.get_mut(unit as usize)? = index as u32;
        match core::mem::replace(&mut slot.state, State::Reading) {
            State::Free(buf) | State::Ready(buf) => Some(buf),
            State::Reading => None,
        }
    }

    /// Takes a read's buffer back: the unit is resident if `good`, else the slot is free again.
    /// `false` if no read of the unit was under way.
    pub fn settle(&mut self, unit: u32, buf: &'a mut [u8], good: bool) -> bool {
        let Some(index) = self.slot(unit) else { return false };
        let slot = &mut self.slots[index];
        if !matches!(slot.state, State::Reading) {
            return false;
        }
        if good {
            slot.state = State::Ready(buf);
        } else {
            slot.state = State::Free(buf);
            slot.unit = NONE;
            self.of_unit[unit as usize] = NONE;
        }
        true
    }
}
