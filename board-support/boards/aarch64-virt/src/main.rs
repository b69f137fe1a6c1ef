//! QEMU's AArch64 `virt` machine: PL011 console, virtio-mmio disk, CFI flash.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;
use core::panic::PanicInfo;
use core::ptr::NonNull;

use arm_pl011_uart::{DataBits, LineConfig, PL011Registers, Parity, StopBits, Uart, UniqueMmioPointer};
use embedded_io::Write;
use forebay_board::aarch64::boot;
use forebay_board::aarch64::pages::{Level1, Level2, Region};
use forebay_board::aarch64::smp::{ManyCores, Psci};
use forebay_board::aarch64::{Processor, clock};
use forebay_board::board::{ArenaMemory, Board, run};
use forebay_board::stack::Stack;
use forebay_board::{flash, semihost, virtio};
use static_cell::ConstStaticCell;

/// The memory that the model lives in: with the stacks, less than a third of the bundled model's image.
const ARENA: usize = 2640 << 10;

const UART: usize = 0x0900_0000;
const UART_CLOCK: u32 = 24_000_000;
const BAUD: u32 = 115_200;
const VIRTIO: usize = 0x0a00_0000;
const VIRTIO_STRIDE: usize = 0x200;
const VIRTIO_SLOTS: usize = 32;
/// The second flash bank; the first is firmware's.
const FLASH: usize = 0x0400_0000;
const FLASH_LEN: usize = 64 << 20;

static ARENA_MEMORY: ConstStaticCell<ArenaMemory<ARENA>> = ConstStaticCell::new(ArenaMemory::new());

static LOW: Level2 =
    Level2::new(0, &[Region::flash(0x0400_0000..0x0800_0000), Region::device(0x0800_0000..0x1000_0000)]);
static RAM: Level2 = Level2::new(0x4000_0000, &[Region::memory(0x4020_0000..0x4100_0000)]);
/// The boot code loads this.
#[unsafe(no_mangle)]
static PAGE_TABLE: Level1 = Level1::new([Some(&LOW), Some(&RAM), None, None]);

fn console() -> Uart<'static> {
    let registers = NonNull::new(UART as *mut PL011Registers).expect("not null");
    // SAFETY: the PL011 of this machine, mapped as device memory; one console at a time writes to it: main's, or that
    // of the panic that ended main.
    Uart::new(unsafe { UniqueMmioPointer::new(registers) })
}

#[unsafe(no_mangle)]
extern "C" fn board_main(level: u64, _: usize) -> ! {
    // SAFETY: the linker script keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    let mut console = console();
    let config = LineConfig { data_bits: DataBits::Bits8, parity: Parity::None, stop_bits: StopBits::One };
    // Turns the FIFOs on. The divisor of these two numbers is a valid one.
    let _ = console.enable(config, BAUD, UART_CLOCK);
    let mut line = [MaybeUninit::uninit(); 2048];
    let board = Board {
        name: "aarch64-virt",
        processor: &Processor { entered: level },
        console: &mut console,
        clock: clock(),
        command_line: semihost::command_line(&mut line),
        arena: &mut ARENA_MEMORY.take().0,
        stack,
        // SAFETY: this machine's virtio-mmio slots, mapped as device memory and used here only.
        disk: unsafe { virtio::first_disk(VIRTIO, VIRTIO_STRIDE, VIRTIO_SLOTS) },
        // SAFETY: this machine's second flash bank, mapped read-only; nothing programs it.
        flash: unsafe { flash::mapped(FLASH, FLASH_LEN) },
        cores: &ManyCores(Psci { entered: level }),
    };
    semihost::exit(run(board))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(console(), "\n{info}");
    semihost::exit(101)
}
