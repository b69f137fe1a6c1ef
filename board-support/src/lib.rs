//! What Forebay's boards share.
//!
//! A board is a thin binary under `boards/`: it names its addresses and its memory, and hands console, clock,
//! devices and arena to [`board::run`]. `docs/porting.md` walks through one.
//!
//! | module | |
//! |---|---|
//! | [`board`] | from a booted machine to an exit status |
//! | [`app`] | the application: open an image, plan, generate, report |
//! | [`serve`] | the application as a service: lines over the console, answers token by token |
//! | [`console`] | lines with echo and editing over a UART |
//! | [`options`] | the words of a command line |
//! | [`meter`] | a store's reads, counted |
//! | [`virtio`] | a block store over virtio-blk |
//! | [`sd`] | a block store over an SD card |
//! | [`flash`] | memory-mapped flash |
//! | [`status`] | how a run ended |
//! | [`cores`] | further cores as workers of the kernels |
//! | [`bcm2835`] | the Raspberry Pi's mailbox and pins |
//! | `mps2` | UART and counter of Arm's MPS2 boards (Cortex-M targets) |
//! | [`spi_nor`] | a block store over a SPI NOR chip |
//! | [`stack`] | how much of the stack was used |
//! | `aarch64` | boot code, page tables, exceptions, clock, critical section (on that target) |
//! | `armv7m` | vectors, faults that report (on that target) |
//! | `riscv64` | traps, stack guard, clock (on that target) |
//!
//! Nothing here allocates: no global allocator is linked.
#![no_std]

#[cfg(all(target_os = "none", target_arch = "aarch64"))]
pub mod aarch64;
pub mod app;
#[cfg(all(target_os = "none", target_arch = "arm"))]
pub mod armv7m;
pub mod bcm2835;
pub mod board;
pub mod console;
pub mod cores;
pub mod flash;
pub mod meter;
#[cfg(all(target_os = "none", target_arch = "arm"))]
pub mod mps2;
pub mod options;
#[cfg(all(target_os = "none", target_arch = "riscv64"))]
pub mod riscv64;
pub mod sd;
#[cfg(all(target_os = "none", any(target_arch = "aarch64", target_arch = "arm", target_arch = "riscv64")))]
pub mod semihost;
pub mod serve;
pub mod spi_nor;
pub mod stack;
pub mod status;
pub mod virtio;
