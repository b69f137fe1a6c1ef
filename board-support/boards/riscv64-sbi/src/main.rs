//! QEMU's RISC-V `virt` machine in supervisor mode: SBI console, virtio-mmio disk, CFI flash. OpenSBI or U-Boot
//! starts it, as on most boards with an application processor.
#![no_std]
#![no_main]

use core::panic::PanicInfo;

use embedded_io::Write;
use fdt::Fdt;
use forebay_board::app::Clock;
use forebay_board::board::{ArenaMemory, Board, run};
use forebay_board::riscv64::sbi::{self, DebugConsole};
use forebay_board::riscv64::smp::{Hsm, ManyHarts};
use forebay_board::riscv64::{Vectors, boot};
use forebay_board::stack::Stack;
use forebay_board::{flash, riscv64, virtio};
use static_cell::ConstStaticCell;

/// The memory that the model lives in: with the stacks, less than a third of the bundled model's image.
const ARENA: usize = 2648 << 10;

/// Ticks a second of the machine's timer.
const TIMER_HERTZ: u64 = 10_000_000;
const VIRTIO: usize = 0x1000_1000;
const VIRTIO_STRIDE: usize = 0x1000;
const VIRTIO_SLOTS: usize = 8;
/// The second flash bank; the first is firmware's.
const FLASH: usize = 0x2200_0000;
const FLASH_LEN: usize = 32 << 20;
const TEST_DEVICE: usize = 0x10_0000;

static ARENA_MEMORY: ConstStaticCell<ArenaMemory<ARENA>> = ConstStaticCell::new(ArenaMemory::new());

fn exit(status: u8) -> ! {
    if status == 0 {
        sbi::shut_down();
    }
    // The firmware's call carries no status; the test device, which the firmware leaves to supervisors, does.
    // SAFETY: the test device of this machine.
    unsafe { riscv64::finish(TEST_DEVICE, status) }
}

#[unsafe(no_mangle)]
extern "C" fn board_main(hart: usize, device_tree: usize) -> ! {
    // SAFETY: the memory map keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    // SAFETY: the firmware's second argument is the address of a device tree, which nothing changes.
    let tree = unsafe { Fdt::from_ptr(core::ptr::with_exposed_provenance(device_tree)) }.ok();
    let vectors = tree.as_ref().map_or(Vectors::None, |tree| Vectors::enable(tree));
    let clock = Clock { now: riscv64::time, hertz: TIMER_HERTZ };
    let board = Board {
        name: "riscv64-sbi",
        processor: &format_args!("RV64GC in supervisor mode, {vectors}"),
        console: &mut DebugConsole::default(),
        clock,
        command_line: tree.as_ref().and_then(|tree| tree.chosen().bootargs()).unwrap_or(""),
        arena: &mut ARENA_MEMORY.take().0,
        stack,
        // SAFETY: this machine's virtio-mmio slots, used here only.
        disk: unsafe { virtio::first_disk(VIRTIO, VIRTIO_STRIDE, VIRTIO_SLOTS) },
        // SAFETY: this machine's second flash bank; nothing programs it.
        flash: unsafe { flash::mapped(FLASH, FLASH_LEN) },
        cores: &ManyHarts { power: Hsm::of(tree.as_ref(), hart), clock },
    };
    exit(run(board))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(DebugConsole::default(), "\n{info}");
    exit(101)
}
