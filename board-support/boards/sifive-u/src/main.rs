//! SiFive's HiFive Unleashed (FU540), QEMU's `sifive_u`, in machine mode: UART 0, the image in the SPI NOR flash on
//! QSPI 0.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;
use core::panic::PanicInfo;

use embedded_io::Write;
use forebay_board::app::Clock;
use forebay_board::board::{ArenaMemory, Board, run};
use forebay_board::riscv64::sifive::{Spi, Uart, clint_time};
use forebay_board::riscv64::smp::{Clint, ManyHarts};
use forebay_board::riscv64::{self, Vectors, boot};
use forebay_board::semihost;
use forebay_board::spi_nor::Flash;
use forebay_board::stack::Stack;
use static_cell::ConstStaticCell;

/// The memory that the model lives in: with the stacks, less than a third of the bundled model's image.
const ARENA: usize = 2648 << 10;

const CODE: usize = 0x8000_0000;
/// Ticks a second of the CLINT's timer.
const TIMER_HERTZ: u64 = 1_000_000;
const UART: usize = 0x1001_0000;
const QSPI: usize = 0x1004_0000;
/// 62.5 MHz from the bus clock of 500 MHz that firmware sets.
const QSPI_DIVISOR: u32 = 3;

static ARENA_MEMORY: ConstStaticCell<ArenaMemory<ARENA>> = ConstStaticCell::new(ArenaMemory::new());

fn console() -> Uart {
    // SAFETY: UART 0 of this machine; one console at a time writes to it: main's, or that of the panic that ended main.
    // Firmware has set its speed.
    unsafe { Uart::new(UART, 0, 0) }
}

#[unsafe(no_mangle)]
extern "C" fn board_main(hart: usize, _device_tree: usize) -> ! {
    riscv64::guard_stack(CODE);
    // SAFETY: the memory map keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    let mut line = [MaybeUninit::uninit(); 2048];
    let clock = Clock { now: clint_time, hertz: TIMER_HERTZ };
    let board = Board {
        name: "sifive-u",
        processor: &format_args!("RV64GC hart {hart} in machine mode, {}", Vectors::enable()),
        console: &mut console(),
        clock,
        command_line: semihost::command_line(&mut line),
        arena: &mut ARENA_MEMORY.take().0,
        stack,
        // SAFETY: QSPI 0 of this machine, used here only; the code runs from DRAM.
        disk: Some(Flash(unsafe { Spi::new(QSPI, 0, QSPI_DIVISOR) })),
        flash: &[],
        cores: &ManyHarts { power: Clint, clock },
    };
    semihost::exit(run(board))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(console(), "\n{info}");
    semihost::exit(101)
}
