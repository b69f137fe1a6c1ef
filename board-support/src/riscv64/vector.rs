//! The vector unit: found, switched on, and made known to the kernels.

use core::arch::asm;
use core::fmt;

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
        let misa: usize;
        // SAFETY: machine mode may read it. A hart may leave it zero: then nothing is known, and nothing is used.
        unsafe { asm!("csrr {misa}, misa", misa = out(reg) misa, options(nomem, nostack)) };
        if misa >> (b'V' - b'A') & 1 == 1 { Self::on() } else { Self::None }
    }

    /// Switches the unit on if the device tree gives one to hart `hart`; supervisor mode has no `misa`.
    #[cfg(feature = "s-mode")]
    pub fn enable(tree: &fdt::Fdt<'_>, hart: usize) -> Self {
        let cpu = tree.cpus().find(|cpu| cpu.ids().first() == hart);
        let property = |name| cpu.and_then(|cpu| cpu.property(name)).map_or(&[][..], |p| p.value);
        let listed = property("riscv,isa-extensions").split(|byte| *byte == 0).any(|name| name == b"v");
        // "rv64imafdcv_zicsr_...": letters up to the first underscore.
        let isa = property("riscv,isa").split(|byte| *byte == b'_').next().unwrap_or(&[]);
        if listed || isa.get(4..).is_some_and(|letters| letters.contains(&b'v')) { Self::on() } else { Self::None }
    }

    fn on() -> Self {
        let bytes: usize;
        // SAFETY: the hart has vectors, so its status register has the field VS, which is set to "initial"; nothing else
        // changes. 0xc22 is `vlenb`.
        unsafe {
            asm!(super::csr!("csrs   ", "status, {vs}"), vs = in(reg) 1usize << 9, options(nomem, nostack));
            asm!("csrr   {bytes}, 0xc22", bytes = out(reg) bytes, options(nomem, nostack));
        }
        // Fewer bits are an extension for embedded processors, with which the kernels do not work.
        if bytes < 16 {
            return Self::None;
        }
        // SAFETY: the extension is there with at least 128 bits and was switched on; harts that compute beside this one
        // start by `switch_on`.
        unsafe { assume_vectors() };
        Self::On { bits: bytes * 8 }
    }
}
