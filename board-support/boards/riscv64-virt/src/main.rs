//! QEMU's RISC-V `virt` machine in machine mode: 16550 console, virtio-mmio disk, CFI flash.
#![no_std]
#![no_main]

use core::mem::MaybeUninit;
use core::panic::PanicInfo;
use core::ptr::NonNull;

use embedded_io::Write;
use forebay_board::app::Clock;
use forebay_board::board::{ArenaMemory, Board, run};
use forebay_board::riscv64::smp::{Clint, ManyHarts};
use forebay_board::riscv64::{Vectors, boot};
use forebay_board::stack::Stack;
use forebay_board::{flash, riscv64, semihost, virtio};
use static_cell::ConstStaticCell;
use uart_16550::backend::MmioBackend;
use uart_16550::{BaudRate, Config, Uart16550};

/// The memory that the model lives in: with the stacks, less than a third of the bundled model's image.
const ARENA: usize = 2648 << 10;

const CODE: usize = 0x8000_0000;
/// Ticks a second of the machine's timer.
const TIMER_HERTZ: u64 = 10_000_000;
const UART: usize = 0x1000_0000;
const VIRTIO: usize = 0x1000_1000;
const VIRTIO_STRIDE: usize = 0x1000;
const VIRTIO_SLOTS: usize = 8;
/// The second flash bank; the first is firmware's.
const FLASH: usize = 0x2200_0000;
const FLASH_LEN: usize = 32 << 20;
const TEST_DEVICE: usize = 0x10_0000;

static ARENA_MEMORY: ConstStaticCell<ArenaMemory<ARENA>> = ConstStaticCell::new(ArenaMemory::new());

fn console() -> Uart16550<MmioBackend> {
    let base = NonNull::new(UART as *mut u8).expect("not null");
    // SAFETY: the UART of this machine; one console at a time writes to it: main's, or that of the panic that ended
    // main.
    unsafe { Uart16550::new_mmio(base, 1) }.expect("a stride of 1 is valid")
}

fn exit(status: u8) -> ! {
    // SAFETY: the test device of this machine.
    unsafe { riscv64::finish(TEST_DEVICE, status) }
}

#[unsafe(no_mangle)]
extern "C" fn board_main(_hart: usize, _device_tree: usize) -> ! {
    riscv64::guard_stack(CODE);
    // SAFETY: the memory map keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    let mut console = console();
    // A console that does not come up has nobody to tell it to; the exit status still says how the run went.
    let _ = console.init(Config { baud_rate: BaudRate::Baud115200, ..Config::default() });
    let mut line = [MaybeUninit::uninit(); 2048];
    let clock = Clock { now: riscv64::time, hertz: TIMER_HERTZ };
    let board = Board {
        name: "riscv64-virt",
        processor: &format_args!("RV64GC in machine mode, {}", Vectors::enable()),
        console: &mut console,
        clock,
        command_line: semihost::command_line(&mut line),
        arena: &mut ARENA_MEMORY.take().0,
        stack,
        // SAFETY: this machine's virtio-mmio slots, used here only.
        disk: unsafe { virtio::first_disk(VIRTIO, VIRTIO_STRIDE, VIRTIO_SLOTS) },
        // SAFETY: this machine's second flash bank; nothing programs it.
        flash: unsafe { flash::mapped(FLASH, FLASH_LEN) },
        cores: &ManyHarts { power: Clint, clock },
    };
    exit(run(board))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(console(), "\n{info}");
    exit(101)
}
