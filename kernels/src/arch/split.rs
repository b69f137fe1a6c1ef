//! Hands disjoint columns of a `[tokens][width]` output to the workers.

use crate::exec::Exec;
use core::marker::PhantomData;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

/// A range of columns of every row of an output.
pub(crate) struct Columns<'a> {
    base: *mut f32,
    width: usize,
    rows: usize,
    range: Range<usize>,
    _out: PhantomData<&'a mut [f32]>,
}

impl Columns<'_> {
    /// The columns of row `row`.
    pub fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows, "row out of range");
        // SAFETY: `base` heads `rows * width` elements borrowed for the lifetime of `self`, the range lies inside
        // 0..width, no other `Columns` of the same output has a range that overlaps it, and `&mut self` makes this
        // the only slice from this one.
        unsafe {
            let start = self.base.add(row * self.width + self.range.start);
            core::slice::from_raw_parts_mut(start, self.range.len())
        }
    }
}

/// A pointer that the workers share; each touches its own elements only.
struct Shared(*mut f32);

impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

// SAFETY: it stands for a `&mut [f32]` that is cut into disjoint parts, each used by one thread; f32 is Send.
unsafe impl Sync for Shared {}

/// Cuts the `width` columns of `out` (`[..][width]`) into `parts` ranges of whole `unit`s, gives worker `i` the
/// `i`-th together with an equal share of `scratch`, and runs `job` on each. At most `usize::BITS` parts are made.
#[allow(clippy::type_complexity)]
pub(crate) fn split_columns(
    exec: &Exec<'_>,
    parts: usize,
    out: &mut [f32],
    width: usize,
    unit: usize,
    scratch: &mut [f32],
    job: &(dyn Fn(Range<usize>, &mut Columns<'_>, &mut [f32]) + Sync),
) {
    assert!(width > 0 && unit > 0 && out.len().is_multiple_of(width), "out is [rows][width]");
    let rows = out.len() / width;
    let units = width.div_ceil(unit);
    let parts = parts.min(exec.workers.count()).min(usize::BITS as usize).max(1);
    let share = scratch.len() / parts;
    let (base, shared) = (Shared(out.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    // One bit per part, set when it is handed out: `Workers` is a safe trait, so an implementation that runs an
    // index twice must not get the same part twice.
    let taken = AtomicUsize::new(0);
    let run = |part: usize| {
        if part >= parts || taken.fetch_or(1 << part, Ordering::Relaxed) & 1 << part != 0 {
            return;
        }
        let range = part * units / parts * unit..((part + 1) * units / parts * unit).min(width);
        if range.is_empty() {
            return;
        }
        let mut columns = Columns { base: base.get(), width, rows, range: range.clone(), _out: PhantomData };
        // SAFETY: `part < parts` and `share * parts <= scratch.len()`, so the share lies inside `scratch`; the bit in
        // `taken` makes this the only slice of it, and `scratch` is borrowed until all workers have returned.
        let scratch = unsafe { core::slice::from_raw_parts_mut(shared.get().add(part * share), share) };
        job(range, &mut columns, scratch);
    };
    if parts == 1 {
        run(0);
    } else {
        exec.workers.run(&run);
    }
}
