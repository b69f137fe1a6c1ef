//! Hands disjoint columns of a `[rows][width]` output to the workers.

use crate::exec::Exec;
use core::marker::PhantomData;
use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

/// An output whose columns are cut into ranges of whole units, one for each part of a job.
pub(crate) struct Split<'a, T> {
    base: *mut T,
    width: usize,
    rows: usize,
    unit: usize,
    parts: usize,
    /// One bit per part, set when it is handed out: `Workers` is a safe trait, so an implementation that runs an
    /// index twice must not get the same part twice.
    taken: AtomicUsize,
    _out: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` that is cut into disjoint parts, each handed out once and used by one thread.
unsafe impl<T: Send> Sync for Split<'_, T> {}

/// A range of columns of every row of an output.
pub(crate) struct Columns<'a, T> {
    base: *mut T,
    width: usize,
    rows: usize,
    range: Range<usize>,
    _out: PhantomData<&'a mut [T]>,
}

impl<'a, T> Split<'a, T> {
    /// Cuts `out` (`[..][width]`) for `parts` parts, 1 to `usize::BITS` of them.
    pub fn new(out: &'a mut [T], width: usize, unit: usize, parts: usize) -> Self {
        assert!(width > 0 && unit > 0 && out.len().is_multiple_of(width), "out is [rows][width]");
        assert!((1..=usize::BITS as usize).contains(&parts), "too many parts");
        let rows = out.len() / width;
        Self { base: out.as_mut_ptr(), width, rows, unit, parts, taken: AtomicUsize::new(0), _out: PhantomData }
    }

    /// The columns of part `part`; `None` if it has none, or they have been handed out before.
    pub fn take(&self, part: usize) -> Option<Columns<'_, T>> {
        if part >= self.parts || self.taken.fetch_or(1 << part, Ordering::Relaxed) & 1 << part != 0 {
            return None;
        }
        let units = self.width.div_ceil(self.unit);
        let border = |part: usize| (part * units / self.parts * self.unit).min(self.width);
        let range = border(part)..border(part + 1);
        let columns = Columns { base: self.base, width: self.width, rows: self.rows, range, _out: PhantomData };
        (!columns.range.is_empty()).then_some(columns)
    }
}

impl<T> Columns<'_, T> {
    /// Which columns these are.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// `len` elements from the output's element `at` on, which are columns of one row.
    pub fn at(&mut self, at: usize, len: usize) -> &mut [T] {
        let start = at % self.width - self.range.start;
        &mut self.row(at / self.width)[start..start + len]
    }

    /// The columns of row `row`.
    pub fn row(&mut self, row: usize) -> &mut [T] {
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

/// Runs `job` for every part, on as many workers. There are no more parts than workers.
pub(crate) fn run_parts(exec: &Exec<'_>, parts: usize, job: &(dyn Fn(usize) + Sync)) {
    match parts {
        1 => job(0),
        _ => exec.workers.run(job),
    }
}
