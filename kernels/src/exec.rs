//! Who computes: the instruction set ([`Backend`]) and the cores ([`Workers`]).
//!
//! Neither choice changes a bit of any result.

use crate::arch::{self, Kernels};
use core::fmt;

#[cfg(all(
    target_arch = "riscv64",
    target_feature = "d",
    not(all(any(test, feature = "std"), target_os = "linux"))
))]
pub use crate::arch::riscv64::rvv::assume_vectors;

/// A fixed set of cores that run one job together.
pub trait Workers: Sync {
    /// Number of workers, at least 1.
    fn count(&self) -> usize;
    /// Runs `job(i)` once for every `i` in `0..count()` and returns when all have finished.
    ///
    /// An implementation that skips or repeats an `i` gives wrong results, never undefined behaviour: the
    /// kernels check that no part of an output is handed out twice.
    fn run(&self, job: &(dyn Fn(usize) + Sync));
}

/// One worker: the caller.
#[derive(Clone, Copy, Debug, Default)]
pub struct Serial;

impl Workers for Serial {
    fn count(&self) -> usize {
        1
    }
    fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        job(0);
    }
}

/// Proof that this CPU can run one implementation of the kernels.
#[derive(Clone, Copy)]
pub struct Backend(&'static dyn Kernels);

impl Backend {
    /// The definition itself, on every CPU.
    pub fn scalar() -> Self {
        Self(&arch::Scalar)
    }
    /// The fastest back-end of this CPU, or the one that the build was made for by the environment's
    /// `FOREBAY_BACKEND=NAME` (the scalar one where this CPU has not that one).
    ///
    /// With feature `std` the CPU is asked (on RISC-V through Linux), and so it is on AArch64 without an operating
    /// system. Otherwise the target features of the build decide, and on RISC-V what the program has said by
    /// `assume_vectors`.
    pub fn detect() -> Self {
        let best = Self(arch::best());
        #[cfg(feature = "log")]
        log::debug!("back-end {}", best.name());
        #[cfg(feature = "defmt")]
        defmt::debug!("back-end {}", best.name());
        best
    }
    /// The back-end called `name`, if this CPU has it.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::all().find(|backend| backend.name() == name)
    }
    /// The back-ends of this CPU, slowest first.
    pub fn all() -> impl Iterator<Item = Self> {
        arch::backends().map(Self)
    }
    /// Name as reports print it: `scalar`, `avx2`, `avx512`, `neon`, `dotprod`, `swar` or `rvv`.
    pub fn name(&self) -> &'static str {
        self.0.name()
    }
    /// Reads every byte, with nothing to slow the loads down, and returns the exclusive or of all whole 64-bit words:
    /// the time that no product of these bytes can beat. For benchmarks.
    pub fn read_only(&self, bytes: &[u8]) -> u64 {
        self.0.read_only(bytes)
    }
    #[cfg(test)]
    pub(crate) fn of(kernels: &'static dyn Kernels) -> Self {
        Self(kernels)
    }
    pub(crate) fn kernels(&self) -> &'static dyn Kernels {
        self.0
    }
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Backend").field(&self.name()).finish()
    }
}

/// Everything an operator needs to know about the machine.
#[derive(Clone, Copy)]
pub struct Exec<'w> {
    /// Instruction set.
    pub backend: Backend,
    /// Cores.
    pub workers: &'w dyn Workers,
}

impl fmt::Debug for Exec<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exec").field("backend", &self.backend).field("workers", &self.workers.count()).finish()
    }
}
