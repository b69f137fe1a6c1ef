//! The vector unit: found, switched on, and made known to the kernels.

use core::arch::asm;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use forebay_kernels::exec::assume_vectors;

/// The vector unit of the hart that boots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Vectors {
    /// There is none.
    None,
    /// It is on.
    On {
        /// Bits of a vector register.
        bits: usize,
    },
}

/// Whether the kernels may use vectors.
static USED: AtomicBool = AtomicBool::new(false);

/// Switches a further hart's unit on if the kernels use vectors. False if they do and it has none.
pub(super) fn join() -> bool {
    !USED.load(Ordering::Acquire) || (has_unit() && switch_on() >= LEAST)
}

/// Bytes of a vector register that the kernels need: fewer are an extension for embedded processors.
const LEAST: usize = 16;

/// Whether `misa` tells of a vector unit.
#[cfg(not(feature = "s-mode"))]
fn has_unit() -> bool {
    let misa: usize;
    // SAFETY: machine mode may read it. A hart may leave it zero: then nothing is known, and nothing is used.
    unsafe { asm!("csrr {misa}, misa", misa = out(reg) misa, options(nomem, nostack)) };
    misa >> (b'V' - b'A') & 1 == 1
}

/// Supervisor mode has no `misa`; [`Vectors::enable`] has looked at all harts in the device tree.
#[cfg(feature = "s-mode")]
fn has_unit() -> bool {
    true
}

/// The harts of a device tree, but for those that are disabled.
#[cfg(feature = "s-mode")]
pub(super) fn harts<'t>(tree: &'t fdt::Fdt<'t>) -> impl Iterator<Item = fdt::standard_nodes::Cpu<'t, 't>> {
    tree.cpus().filter(|cpu| cpu.property("status").is_none_or(|status| !status.value.starts_with(b"disabled")))
}

/// Whether a device tree gives a hart a vector unit.
#[cfg(feature = "s-mode")]
fn lists_unit(cpu: fdt::standard_nodes::Cpu<'_, '_>) -> bool {
    let property = |name| cpu.property(name).map_or(&[][..], |p| p.value);
    let listed = property("riscv,isa-extensions").split(|byte| *byte == 0).any(|name| name == b"v");
    // "rv64imafdcv_zicsr_...": letters up to the first underscore.
    let isa = property("riscv,isa").split(|byte| *byte == b'_').next().unwrap_or(&[]);
    listed || isa.get(4..).is_some_and(|letters| letters.contains(&b'v'))
}

/// Switches the unit on, on a hart that has one, and gives the bytes of a vector register.
fn switch_on() -> usize {
    let bytes: usize;
    // SAFETY: the hart has vectors, so its status register has the field VS, which is set to "initial"; nothing else
    // changes. 0xc22 is `vlenb`.
    unsafe {
        asm!(super::csr!("csrs   ", "status, {vs}"), vs = in(reg) 1usize << 9, options(nomem, nostack));
        asm!("csrr   {bytes}, 0xc22", bytes = out(reg) bytes, options(nomem, nostack));
    }
    bytes
}

impl fmt::Display for Vectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("no vectors"),
            Self::On { bits } => write!(f, "vectors of {bits} bits"),
        }
    }
}

impl Vectors {
    /// Switches the unit on if `misa` tells of one.
    #[cfg(not(feature = "s-mode"))]
    pub fn enable() -> Self {
        if has_unit() { Self::on() } else { Self::None }
    }

    /// Switches the unit on if the device tree gives one to every hart, because any may come to compute; supervisor mode
    /// has no `misa`.
    #[cfg(feature = "s-mode")]
    pub fn enable(tree: &fdt::Fdt<'_>) -> Self {
        if harts(tree).all(lists_unit) { Self::on() } else { Self::None }
    }

    fn on() -> Self {
        let bytes = switch_on();
        if bytes < LEAST {
            return Self::None;
        }
        USED.store(true, Ordering::Release);
        // SAFETY: the extension is there with at least 128 bits and was switched on; harts that compute beside this one
        // `join` before.
        unsafe { assume_vectors() };
        Self::On { bits: bytes * 8 }
    }
}
