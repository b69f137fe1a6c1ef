//! Arm's MPS2 board with application note AN386: a Cortex-M4F with 4 MiB of RAM, the image in memory that is only read.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;
use core::panic::PanicInfo;

use embedded_io::Write;
use forebay_board::armv7m::{Processor, boot, semihosting_answers};
use forebay_board::board::{ArenaMemory, Board, NoDisk, run};
use forebay_board::cores::OneCore;
use forebay_board::mps2::{Uart, clock};
use forebay_board::stack::Stack;
use forebay_board::{flash, semihost};
use static_cell::ConstStaticCell;

/// The memory that the model lives in; its weights stay in flash.
const ARENA: usize = 384 << 10;

/// Of the processor and of everything on the FPGA.
const CLOCK_HERTZ: u32 = 25_000_000;
const UART: usize = 0x4000_4000;
const UART_RECEIVE: u16 = 0;
const BAUD: u32 = 115_200;
/// The PSRAM, which stands for memory-mapped flash.
const FLASH: usize = 0x2100_0000;
const FLASH_LEN: usize = 16 << 20;

static ARENA_MEMORY: ConstStaticCell<ArenaMemory<ARENA>> = ConstStaticCell::new(ArenaMemory::new());

fn console() -> Uart {
    // SAFETY: UART 0 of this board; one console at a time writes to it: main's, or that of the panic that ended main.
    unsafe { Uart::new(UART, UART_RECEIVE, CLOCK_HERTZ, BAUD) }
}

/// Ends an emulation with a status; a real board says it and sleeps.
fn exit(status: u8) -> ! {
    if semihosting_answers() {
        semihost::exit(status);
    }
    let _ = writeln!(console(), "status {status}; halted");
    loop {
        core::hint::spin_loop();
    }
}

#[unsafe(no_mangle)]
extern "C" fn board_main() -> ! {
    // SAFETY: the linker script keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    let mut line = [MaybeUninit::uninit(); 1024];
    let board = Board {
        name: "mps2-an386",
        processor: &Processor,
        console: &mut console(),
        // SAFETY: this board's FPGA.
        clock: unsafe { clock(CLOCK_HERTZ) },
        command_line: if semihosting_answers() { semihost::command_line(&mut line) } else { "" },
        arena: &mut ARENA_MEMORY.take().0,
        stack,
        disk: None::<NoDisk>,
        // SAFETY: this board's PSRAM, which nobody writes to.
        flash: unsafe { flash::mapped(FLASH, FLASH_LEN) },
        cores: &OneCore,
    };
    exit(run(board))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(console(), "\n{info}");
    exit(101)
}
