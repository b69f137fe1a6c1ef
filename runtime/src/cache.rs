//! Which unit holds which slot of the pool, and which gives way: the pool's bookkeeping, without its buffers.
//!
//! The engine's pool and the host's simulator use the same [`Directory`], so what the simulator counts is what a run
//! does. A unit is kept as one or more *pieces*: the whole of it, or its levels (bit-planes) apart, so that a unit
//! of low precision takes less room, is upgraded by reading the rest, and can give back the rest first.
//! Pieces are numbered `unit * pieces + piece`; units are numbered over all layers.
//!
//! What gives way: never a piece that must stay, nor one that others of its unit stand on. Of the rest, experts
//! first, by the policy; then units of dense layers, whose order of use is known, the one that is needed last.
//!
//! A share of the pool can be a fixed region ([`pinned_units`]): its units never give way once they are there.

#[cfg(doc)]
use crate::model::LayerShape;
use crate::plan::MIN_UNITS;

/// No slot, in the piece table; no piece, in the slot table.
const NONE: u32 = u32::MAX;
/// Share of the slots that S3-FIFO's small queue has: one in this many.
const S3_SMALL: usize = 10;
/// S3-FIFO counts uses up to this.
const S3_MOST: u8 = 3;
/// Tokens after which a use counts half to [`Eviction::Density`].
const HALF_LIFE: u32 = 128;
/// How many tokens of a unit's own the mean of all units counts as much as to [`Eviction::Density`].
const PRIOR: f32 = 32.0;

/// Weights of HOBBIT's cache score; they should sum to 1.
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Weights {
    /// Of how recently the unit was used.
    pub lru: f32,
    /// Of how often it was used.
    pub lfu: f32,
    /// Of how often it was used in full precision.
    pub lhu: f32,
    /// Of how soon its layer comes again.
    pub fld: f32,
}

/// What gives way among experts.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Eviction {
    /// The least recently used.
    #[default]
    Lru,
    /// The least often used, counts outliving the stay in the pool; of equals the least recently used.
    Lfu,
    /// HOBBIT (2411.01433, section 4.4): the least
    /// `lru*R/T + lfu*F/T + lhu*H/T + fld*(1 - ((l - l_now + L) mod L)/L)`, where `R` is the token of the last use,
    /// `F` and `H` the uses and those in full precision, `T` the present token.
    Hobbit(Weights),
    /// MoE-APEX: uses in full precision and lower ones by their cost, divided by the distance of the layer, and a
    /// bonus for what the previous token used.
    Apex,
    /// S3-FIFO (SOSP'23): a small and a main queue, and a memory of what left the small one.
    S3Fifo,
    /// The least hit density, after LHD (Beckmann and others, NSDI'18): the probability that the unit's layer will use it,
    /// divided by the layers until then. The probability is the share of the latest tokens that used the unit, mixed with
    /// whether the latest one did. Of few tokens little can be known: the share is drawn to the mean of all units, and
    /// for the pieces that only full precision needs to the mean of uses in full precision.
    Density(Density),
}

/// Parameters of [`Eviction::Density`].
#[derive(Clone, Copy, PartialEq, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Density {
    /// Weight of the latest token in the probability, 0 to 1.
    pub recent: f32,
    /// Layers that are added to every distance: the more, the less distances matter.
    pub offset: f32,
}

impl Eviction {
    /// HOBBIT's score with equal weights.
    pub const HOBBIT: Self = Self::Hobbit(Weights { lru: 0.25, lfu: 0.25, lhu: 0.25, fld: 0.25 });

    /// Hit density with parameters that suited the traces it was tried on (`docs/BENCHMARKS.md`, "Eviction").
    pub const DENSITY: Self = Self::Density(Density { recent: 0.1, offset: 2.0 });

    /// Every policy; HOBBIT's with equal weights, hit density with its usual parameters.
    pub const ALL: [Self; 6] = [Self::Lru, Self::Lfu, Self::HOBBIT, Self::Apex, Self::S3Fifo, Self::DENSITY];

    /// The name that options and reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::Hobbit(_) => "hobbit",
            Self::Apex => "apex",
            Self::S3Fifo => "s3fifo",
            Self::Density(_) => "density",
        }
    }

    /// The policy of a name, with the parameters that it has in [`Self::ALL`].
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name() == name)
    }
}

/// Where a piece is.
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

/// One slot's entry.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    piece: u32,
    layer: u16,
    ready: bool,
    /// S3-FIFO: whether it is in the main queue, and how often it was used there.
    main: bool,
    uses: u8,
    /// Read ahead and not used since.
    unused: bool,
    pinned: bool,
    /// When it was last used, or read; S3-FIFO: when it joined its queue.
    stamp: u64,
}

impl Default for Entry {
    fn default() -> Self {
        Self { piece: NONE, layer: 0, ready: false, main: false, uses: 0, unused: false, pinned: false, stamp: 0 }
    }
}

/// What is remembered of a unit, resident or not.
#[derive(Clone, Copy, Debug, Default)]
pub struct UnitUse {
    /// Token of the last use, counted from 1; 0 if there was none.
    last: u32,
    uses: u32,
    full: u32,
    /// Uses, and those in full precision, that count half after every [`HALF_LIFE`] tokens; as of `last`.
    fading: [f32; 2],
    /// S3-FIFO: number of the eviction from the small queue that it left by, counted from 1.
    left: u32,
}

/// What the caller knows when a slot is claimed.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// The piece that wants a slot.
    pub piece: u32,
    /// Its layer.
    pub layer: u16,
    /// The layer that is being computed.
    pub present: u16,
    /// Whether it is read before anything needs it.
    pub ahead: bool,
    /// Whether it is of a unit that never gives way; see [`pinned_units`].
    pub pinned: bool,
}

/// How many of a dense layer's `units` units are pinned, its first ones, where `share` of a pool of `slots` slots is a
/// fixed region: the hot region of PowerInfer-2's segmented cache (2406.06282). The model's dense layers, `dense` units
/// together, get what `hot` says ([`LayerShape::hot`]), or equal shares where it says nothing. A unit takes `pieces` slots;
/// room for [`MIN_UNITS`] units is always left.
///
/// A calibrated image has the clusters of a layer in the order of how often they matter, so the first ones are the hot
/// ones; where every token uses all of them, one is as good as another.
#[must_use]
pub fn pinned_units(units: usize, dense: usize, slots: usize, pieces: usize, share: f32, hot: &[u16]) -> usize {
    let (pieces, dense) = (pieces.max(1), dense.max(1));
    let room = (slots / pieces).saturating_sub(MIN_UNITS).min(dense);
    let room = ((slots as f64 * f64::from(share.clamp(0.0, 1.0))) as usize / pieces).min(room);
    // Between two steps of the table a layer's number grows evenly, so that all together never take more than the room.
    let (at, rest) = (room * hot.len() / dense, room * hot.len() % dense);
    let entry = |at: usize| at.checked_sub(1).and_then(|at| hot.get(at)).map_or(0, |n| usize::from(*n));
    let pinned = match hot.last() {
        Some(last) if *last > 0 => entry(at) + entry(at + 1).saturating_sub(entry(at)) * rest / dense,
        _ => units * room / dense,
    };
    pinned.min(units)
}

/// Which piece holds which slot.
#[derive(Debug)]
pub struct Directory<'a> {
    entries: &'a mut [Entry],
    /// Slot of each piece, or [`NONE`].
    of_piece: &'a mut [u32],
    units: &'a mut [UnitUse],
    pieces: u32,
    layers: u16,
    policy: Eviction,
    clock: u64,
    token: u32,
    /// Tokens, fading as uses do: what a unit's uses would be if every token used it.
    fading: f32,
    /// The sums of all units' fading uses.
    all: [f32; 2],
    /// Evictions from S3-FIFO's small queue.
    left: u32,
    wasted: u64,
}

/// What is left of a use after so many tokens: a half after [`HALF_LIFE`], and straight lines between the halvings.
fn faded(tokens: u32) -> f32 {
    let halvings = (tokens / HALF_LIFE).min(63);
    (1.0 - 0.5 * (tokens % HALF_LIFE) as f32 / HALF_LIFE as f32) / (1u64 << halvings) as f32
}

impl<'a> Directory<'a> {
    /// An empty directory: `entries`, one a slot; `of_piece`, one for each of `pieces` pieces of each unit; `units`, one
    /// a unit. The model has `layers` layers.
    pub fn new(
        entries: &'a mut [Entry],
        of_piece: &'a mut [u32],
        units: &'a mut [UnitUse],
        pieces: usize,
        layers: usize,
        policy: Eviction,
    ) -> Self {
        entries.fill(Entry::default());
        of_piece.fill(NONE);
        units.fill(UnitUse::default());
        Self {
            entries,
            of_piece,
            units,
            pieces: pieces.max(1) as u32,
            layers: layers.clamp(1, usize::from(u16::MAX)) as u16,
            policy,
            clock: 0,
            token: 0,
            fading: 0.0,
            all: [0.0; 2],
            left: 0,
            wasted: 0,
        }
    }

    /// Pieces of a unit.
    pub fn pieces(&self) -> u32 {
        self.pieces
    }

    /// Pieces that were read ahead and gave way unused.
    pub fn wasted(&self) -> u64 {
        self.wasted
    }

    /// The slot of a piece that is in the pool or on its way.
    pub fn slot(&self, piece: u32) -> Option<usize> {
        self.of_piece.get(piece as usize).copied().filter(|slot| *slot != NONE).map(|slot| slot as usize)
    }

    /// Where a piece is.
    pub fn residency(&self, piece: u32) -> Residency {
        match self.slot(piece).map(|slot| self.entries[slot].ready) {
            Some(true) => Residency::Resident,
            Some(false) => Residency::InFlight,
            None => Residency::Absent,
        }
    }

    /// How many of a unit's first pieces are resident, and how many are resident or on their way.
    pub fn held(&self, unit: u32) -> (u8, u8) {
        let first = unit * self.pieces;
        let leading = |good: &dyn Fn(Residency) -> bool| {
            (first..first + self.pieces).take_while(|piece| good(self.residency(*piece))).count() as u8
        };
        (leading(&|r| r == Residency::Resident), leading(&|r| r != Residency::Absent))
    }

    /// A token, or a batch of them, begins.
    pub fn begin_token(&mut self) {
        self.token = self.token.saturating_add(1);
        self.fading = self.fading * faded(1) + 1.0;
        self.all = self.all.map(|all| all * faded(1));
    }

    /// A unit's first `used` pieces are used; `full` if that is its full precision.
    pub fn touch(&mut self, unit: u32, used: u32, full: bool) {
        self.clock += 1;
        for piece in unit * self.pieces..unit * self.pieces + used.min(self.pieces) {
            if let Some(slot) = self.slot(piece) {
                let entry = &mut self.entries[slot];
                entry.unused = false;
                entry.uses = (entry.uses + 1).min(S3_MOST);
                if self.policy != Eviction::S3Fifo {
                    entry.stamp = self.clock;
                }
            }
        }
        if let Some(unit) = self.units.get_mut(unit as usize) {
            let left = faded(self.token.saturating_sub(unit.last));
            let one = [1.0, if full { 1.0 } else { 0.0 }];
            unit.fading = [unit.fading[0] * left + one[0], unit.fading[1] * left + one[1]];
            self.all = [self.all[0] + one[0], self.all[1] + one[1]];
            unit.last = self.token;
            unit.uses = unit.uses.saturating_add(1);
            unit.full = unit.full.saturating_add(full.into());
        }
    }

    /// A slot to read `claim.piece` into: a free one, or that of a piece which gives way; `None` if there is neither.
    ///
    /// Pieces of units for which `keep(layer, unit)` is true stay. `next_use(layer)` says in how many layers the units of
    /// a dense layer are used again; `None` for layers whose use is not certain.
    pub fn claim(
        &mut self,
        claim: Claim,
        keep: impl Fn(u16, u32) -> bool,
        next_use: impl Fn(u16) -> Option<usize>,
    ) -> Option<usize> {
        let slot = match self.entries.iter().position(|entry| entry.piece == NONE) {
            Some(free) => free,
            None => self.victim(claim.present, keep, next_use)?,
        };
        let unit = (claim.piece / self.pieces) as usize;
        self.evict(slot);
        self.clock += 1;
        let remembered = self.units.get(unit).is_some_and(|unit| {
            // The ghost queue is as long as the main one.
            unit.left != 0 && ((self.left - unit.left) as usize) < self.entries.len()
        });
        *self.of_piece.get_mut(claim.piece as usize)? = slot as u32;
        self.entries[slot] = Entry {
            piece: claim.piece,
            layer: claim.layer,
            main: remembered,
            unused: claim.ahead,
            pinned: claim.pinned,
            stamp: self.clock,
            ..Entry::default()
        };
        Some(slot)
    }

    fn evict(&mut self, slot: usize) {
        let entry = self.entries[slot];
        if entry.piece == NONE {
            return;
        }
        self.of_piece[entry.piece as usize] = NONE;
        self.wasted += u64::from(entry.unused);
        if self.policy == Eviction::S3Fifo && !entry.main {
            self.left = self.left.saturating_add(1);
            self.units[(entry.piece / self.pieces) as usize].left = self.left;
        }
        self.entries[slot] = Entry::default();
    }

    fn victim(
        &mut self,
        present: u16,
        keep: impl Fn(u16, u32) -> bool,
        next_use: impl Fn(u16) -> Option<usize>,
    ) -> Option<usize> {
        let may_go = |directory: &Self, entry: &Entry| {
            let (unit, piece) = (entry.piece / directory.pieces, entry.piece % directory.pieces);
            let stood_on = piece + 1 < directory.pieces && directory.slot(entry.piece + 1).is_some();
            entry.ready && !entry.pinned && !stood_on && !keep(entry.layer, unit)
        };
        if self.policy == Eviction::S3Fifo
            && let Some(slot) = self.s3_victim(|d, entry| next_use(entry.layer).is_none() && may_go(d, entry))
        {
            return Some(slot);
        }
        let mut worst: Option<(usize, (usize, f64))> = None;
        for (slot, entry) in self.entries.iter().enumerate().filter(|(_, entry)| may_go(self, entry)) {
            let expendable = match next_use(entry.layer) {
                None => (usize::MAX, -self.worth(entry, present)),
                Some(layers) => (layers, entry.stamp as f64),
            };
            if worst.is_none_or(|(_, worst)| expendable > worst) {
                worst = Some((slot, expendable));
            }
        }
        worst.map(|(slot, _)| slot)
    }

    /// What an expert's piece is worth under the policy.
    fn worth(&self, entry: &Entry, present: u16) -> f64 {
        let (unit, piece) = (entry.piece / self.pieces, entry.piece % self.pieces);
        let known = self.units[unit as usize];
        // A higher piece serves uses in full precision only.
        let uses = if piece == 0 { known.uses } else { known.full };
        let (layers, now) = (f64::from(self.layers), f64::from(self.token.max(1)));
        let ahead = f64::from((entry.layer + self.layers - present % self.layers) % self.layers);
        // Less than the least step of a count, so it decides only between equals.
        let recent = entry.stamp as f64 / (self.clock + 1) as f64;
        match self.policy {
            Eviction::Lru | Eviction::S3Fifo => entry.stamp as f64,
            Eviction::Lfu => f64::from(uses) + recent,
            Eviction::Hobbit(w) => {
                f64::from(w.lru) * f64::from(known.last) / now
                    + f64::from(w.lfu) * f64::from(uses) / now
                    + f64::from(w.lhu) * f64::from(known.full) / now
                    + f64::from(w.fld) * (1.0 - ahead / layers)
            }
            Eviction::Apex => {
                // A use in full precision costs all pieces to bring back, one in low precision a share of them.
                let low = f64::from(known.uses - known.full) / f64::from(self.pieces);
                let previous = known.last + 1 >= self.token;
                (f64::from(known.full) + low) / (ahead + 1.0) + if previous { now } else { 0.0 } + recent / now
            }
            Eviction::Density(Density { recent, offset }) => {
                let left = faded(self.token.saturating_sub(known.last));
                let tokens = self.fading.max(1.0);
                let kind = usize::from(piece > 0);
                let mean = self.all[kind] / (tokens * self.units.len() as f32);
                let share = (known.fading[kind] * left + PRIOR * mean) / (tokens + PRIOR);
                // The layers after the present one have not had the present token yet.
                let latest = self.token - u32::from(entry.layer > present).min(self.token);
                let again = if known.last >= latest && uses > 0 { 1.0 } else { 0.0 };
                let probability = recent * again + (1.0 - recent) * share;
                // What the present layer does not need waits for the next token.
                let distance = if ahead == 0.0 { layers } else { ahead };
                f64::from(probability) / (distance + f64::from(offset))
            }
        }
    }

    /// S3-FIFO: pieces used in the small queue move to the main one, those used in the main one go round again.
    fn s3_victim(&mut self, may_go: impl Fn(&Self, &Entry) -> bool) -> Option<usize> {
        let small = self.entries.iter().filter(|e| e.piece != NONE && !e.main).count();
        let prefer_small = small * S3_SMALL >= self.entries.len();
        for main in [!prefer_small, prefer_small] {
            // Each turn moves an entry on or uses up one of at most three uses: the bound is never reached.
            for _ in 0..self.entries.len() * (usize::from(S3_MOST) + 2) {
                let oldest = self.entries.iter().enumerate().filter(|(_, e)| e.main == main && may_go(self, e));
                let Some((slot, _)) = oldest.min_by_key(|(_, e)| e.stamp) else { break };
                let entry = &mut self.entries[slot];
                if entry.uses == 0 || (!main && entry.uses == 1) {
                    return Some(slot);
                }
                self.clock += 1;
                entry.stamp = self.clock;
                entry.uses = if main { entry.uses - 1 } else { 0 };
                entry.main = true;
            }
        }
        None
    }

    /// A read has finished: the piece is resident if `good`, else its slot is free again. Returns the slot, or `None` if
    /// no read of the piece was under way.
    pub fn settle(&mut self, piece: u32, good: bool) -> Option<usize> {
        let slot = self.slot(piece).filter(|slot| !self.entries[*slot].ready)?;
        if good {
            self.entries[slot].ready = true;
        } else {
            self.of_piece[piece as usize] = NONE;
            self.entries[slot] = Entry::default();
        }
        Some(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_fade() {
        assert_eq!([0, 64, 128, 256, 384].map(faded), [1.0, 0.75, 0.5, 0.25, 0.125]);
        assert!((0..2000).all(|tokens| faded(tokens + 1) < faded(tokens)));
        assert!(faded(u32::MAX) > 0.0);
    }

    /// Four layers of four units; two slots.
    fn victim(used: &[(u32, u32)], resident: [u32; 2], present: u16) -> u32 {
        let (mut entries, mut of_piece, mut units) = ([Entry::default(); 2], [0; 16], [UnitUse::default(); 16]);
        let mut directory = Directory::new(&mut entries, &mut of_piece, &mut units, 1, 4, Eviction::DENSITY);
        for piece in resident {
            let claim = Claim { piece, layer: (piece / 4) as u16, present: 0, ahead: false, pinned: false };
            directory.claim(claim, |_, _| false, |_| None).unwrap();
            directory.settle(piece, true);
        }
        for token in 1..=8 {
            directory.begin_token();
            used.iter().filter(|(_, at)| *at == token).for_each(|(unit, _)| directory.touch(*unit, 1, true));
        }
        let claim = Claim { piece: 15, layer: present, present, ahead: false, pinned: false };
        directory.claim(claim, |_, _| false, |_| None).unwrap();
        resident.into_iter().find(|piece| directory.slot(*piece).is_none()).unwrap()
    }

    #[test]
    fn what_is_pinned_stays_under_every_policy() {
        for policy in Eviction::ALL {
            let (mut entries, mut of_piece, mut units) = ([Entry::default(); 3], [0; 16], [UnitUse::default(); 16]);
            let mut directory = Directory::new(&mut entries, &mut of_piece, &mut units, 1, 4, policy);
            for piece in 0..16 {
                directory.begin_token();
                let claim = Claim { piece, layer: (piece / 4) as u16, present: 0, ahead: false, pinned: piece == 0 };
                assert!(directory.claim(claim, |_, _| false, |_| None).is_some(), "{}", policy.name());
                directory.settle(piece, true);
                // Everything else is used more often and later.
                (0..piece).for_each(|_| directory.touch(piece, 1, true));
                assert_eq!(directory.residency(0), Residency::Resident, "{}", policy.name());
            }
        }
    }

    #[test]
    fn a_fixed_region_leaves_room() {
        assert_eq!(pinned_units(48, 480, 100, 1, 0.5, &[]), 5);
        assert_eq!(pinned_units(48, 480, 100, 1, 0.0, &[]), 0);
        assert_eq!(pinned_units(48, 480, 100, 2, 0.5, &[]), 2);
        assert_eq!(pinned_units(48, 480, 10_000, 1, 1.0, &[]), 48);
        assert_eq!(pinned_units(0, 0, 100, 1, 1.0, &[]), 0);
        let equal: [&[u16]; 3] = [&[], &[0; 4], &[]];
        // Of 15 units, three of the hottest 3 are the last layer's, four of the hottest 7, and so on.
        for hot in [equal, [&[0, 2, 4, 7], &[0, 1, 2, 3], &[3, 4, 5, 5]]] {
            for slots in 2..40 {
                for pieces in 1..4 {
                    let each = [0, 1, 2].map(|l| pinned_units([7, 3, 5][l], 15, slots, pieces, 1.0, hot[l]));
                    let pinned: usize = each.iter().sum();
                    let fits = pinned == 0 || pinned * pieces + MIN_UNITS * pieces <= slots;
                    assert!(fits, "{slots} slots, {pieces} pieces: {each:?}");
                }
            }
        }
        assert_eq!(
            [0, 1, 2].map(|l| pinned_units(
                [7, 3, 5][l],
                15,
                10,
                1,
                1.0,
                [&[0, 2, 4, 7], &[0, 1, 2, 3], &[3, 4, 5, 5]][l]
            )),
            [2, 1, 4]
        );
    }

    #[test]
    fn density_knows_what_full_precision_needs_before_it_has_seen_much() {
        let (mut entries, mut of_piece, mut units) = ([Entry::default(); 3], [0; 32], [UnitUse::default(); 16]);
        let mut directory = Directory::new(&mut entries, &mut of_piece, &mut units, 2, 4, Eviction::DENSITY);
        let claim = |unit: u32, piece: u32| {
            let layer = (unit / 4) as u16;
            Claim { piece: 2 * unit + piece, layer, present: 0, ahead: false, pinned: false }
        };
        for (unit, piece) in [(12, 0), (12, 1), (13, 0)] {
            directory.claim(claim(unit, piece), |_, _| false, |_| None).unwrap();
            directory.settle(2 * unit + piece, true);
        }
        // In low precision units are used often, in full precision one was, once and long ago; unit 13 not yet.
        for token in 0..4 {
            directory.begin_token();
            directory.touch(12, 2, token == 0);
            (4..12).for_each(|unit| directory.touch(unit, 1, false));
        }
        directory.begin_token();
        directory.begin_token();
        directory.claim(claim(4, 0), |_, _| false, |_| None).unwrap();
        assert_eq!(directory.slot(2 * 12 + 1), None);
    }

    #[test]
    fn density_is_probability_over_distance() {
        // Used as often: the one whose layer comes later goes. From layer 0 on, layer 1 is next, layer 3 last.
        assert_eq!(victim(&[(4, 5), (12, 5)], [4, 12], 0), 12);
        assert_eq!(victim(&[(4, 5), (12, 5)], [4, 12], 2), 4);
        // What the present layer does not need waits longest.
        assert_eq!(victim(&[(0, 5), (12, 5)], [0, 12], 0), 0);
        // Of one layer, the one that is used less often goes, or the one that the latest token did not use.
        assert_eq!(victim(&[(4, 2), (4, 3), (5, 5)], [4, 5], 0), 5);
        assert_eq!(victim(&[(4, 6), (5, 7)], [4, 5], 0), 4);
        // Often enough outweighs far away.
        assert_eq!(victim(&[(12, 2), (12, 3), (12, 4), (12, 5), (4, 5)], [4, 12], 0), 4);
    }
}
