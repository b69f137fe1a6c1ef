//! Raspberry Pi 3 and 4, with one kernel8.img: PL011 on pins 14 and 15, SD card, four cores.
#![no_std]
#![no_main]

mod pi;

use core::mem::MaybeUninit;
use core::panic::PanicInfo;

use arm_pl011_uart::{DataBits, LineConfig, Parity, StopBits};
use embedded_io::Write;
use fdt::Fdt;
use forebay_board::aarch64::exceptions::semihosting_answers;
use forebay_board::aarch64::pages::{Level1, Level2, Region};
use forebay_board::aarch64::smp::{ManyCores, SpinTable};
use forebay_board::aarch64::{Processor, boot, cache, clock};
use forebay_board::bcm2835::{ClockId, Function, Gpio, Mailbox};
use forebay_board::board::{Board, run};
use forebay_board::sd::Slots;
use forebay_board::sd::controller::{MmioRegisters, Wiring};
use forebay_board::semihost;
use forebay_board::stack::Stack;
use heapless::Vec;
use pi::Pi;

/// Most memory that the model lives in; the firmware may leave less.
const ARENA: usize = 936 << 20;
/// The end of the memory that is mapped: what the firmware leaves to the processor ends below on both boards.
const MEMORY_END: usize = 0x3b00_0000;
/// The cores wait for words from here on.
const SPIN_TABLE: usize = 0xd8;
const BAUD: u32 = 115_200;
/// What the firmware sets the UART's clock to unless config.txt says otherwise.
const UART_CLOCK: u32 = 48_000_000;
/// Longest command line.
const LINE: usize = 2048;

/// The first gigabyte of either board: memory, and the peripherals of the Pi 3, which are the Pi 4's video memory.
static LOW: Level2 = Level2::new(
    0,
    &[
        Region::memory(0..0x20_0000),
        Region::memory(0x40_0000..MEMORY_END as u64),
        Region::device(0x3f00_0000..0x4000_0000),
    ],
);
/// The peripherals of the Pi 4.
static HIGH: Level2 = Level2::new(0xc000_0000, &[Region::device(0xfe00_0000..0xff00_0000)]);
/// The boot code loads this.
#[unsafe(no_mangle)]
static PAGE_TABLE: Level1 = Level1::new([Some(&LOW), None, None, Some(&HIGH)]);

/// Pins 14 and 15 to the PL011 alone, at the firmware's clock.
fn set_up_console(pi: Pi, gpio: &mut Gpio, mailbox: &mut Mailbox) {
    // The firmware has the PL011 talk to the Bluetooth chip.
    gpio.select(32..=33, Function::Input);
    gpio.select(14..=15, Function::Alt0);
    match pi {
        Pi::Three => gpio.no_pulls_bcm2837(3 << 14, &clock()),
        Pi::Four => gpio.no_pulls_bcm2711(3 << 14),
    }
    let line = LineConfig { data_bits: DataBits::Bits8, parity: Parity::None, stop_bits: StopBits::One };
    let rate = mailbox.clock_rate(ClockId::Uart).unwrap_or(UART_CLOCK);
    // A clock that is too slow for the baud rate leaves the firmware's settings.
    let _ = pi.console().enable(line, BAUD, rate);
}

/// The slots that may hold the card.
fn slots(pi: Pi, gpio: &mut Gpio, mailbox: &mut Mailbox) -> Slots {
    let mut slots = Vec::new();
    let mut add = |offset: usize, clock: ClockId, slow_writes| {
        // SAFETY: a controller of this board, mapped as device memory and used here only.
        let registers = unsafe { MmioRegisters::new(pi.peripherals() + offset) };
        let base_clock = mailbox.clock_rate(clock).unwrap_or(0);
        // There is room for two.
        let _ = slots.push((registers, Wiring { base_clock, dma: None, slow_writes }));
    };
    match pi {
        Pi::Three => {
            // The firmware gives the card to another controller, and this one to the wireless chip.
            gpio.select(34..=39, Function::Input);
            gpio.select(48..=53, Function::Alt3);
        }
        Pi::Four => add(0x34_0000, ClockId::Emmc2, false),
    }
    // On a Pi 4 this one has the wireless chip; in QEMU it has the card.
    add(0x30_0000, ClockId::Emmc, true);
    Slots(slots)
}

/// The words for this program in the kernel's command line of a device tree: what stands behind ` -- `. The firmware
/// puts words of its own in front.
fn words_of_tree(address: usize) -> Option<&'static str> {
    const MAGIC: [u8; 4] = 0xd00d_feed_u32.to_be_bytes();
    let mapped = (0x40_0000..MEMORY_END - 8).contains(&address) || (8..0x20_0000).contains(&address);
    if !mapped || !address.is_multiple_of(8) {
        return None;
    }
    let tree = core::ptr::with_exposed_provenance::<u8>(address);
    // SAFETY: mapped memory; whatever it holds are bytes.
    if unsafe { tree.cast::<[u8; 4]>().read() } != MAGIC {
        return None;
    }
    // SAFETY: there is a device tree, and nothing changes it before the arena is used.
    let tree = unsafe { Fdt::from_ptr(tree) }.ok()?;
    tree.chosen().bootargs()?.split_once(" -- ").map(|(_, words)| words)
}

/// The command line: a debugger's or an emulator's, or the device tree's.
fn command_line(buf: &mut [MaybeUninit<u8>; LINE], semihosting: bool, tree: usize) -> &str {
    if semihosting {
        return semihost::command_line(buf);
    }
    // The arena will lie over the tree.
    let words = words_of_tree(tree).unwrap_or("");
    if words.len() > LINE {
        return "";
    }
    for (to, from) in buf.iter_mut().zip(words.bytes()) {
        to.write(from);
    }
    // SAFETY: as many bytes were written.
    let bytes = unsafe { buf[..words.len()].assume_init_ref() };
    core::str::from_utf8(bytes).unwrap_or("")
}

#[unsafe(no_mangle)]
extern "C" fn board_main(level: u64, tree: usize) -> ! {
    // Without a known board there is no console to tell it to.
    let Some(pi) = Pi::identify() else { sleep() };
    // SAFETY: the linker script keeps this memory for the stack.
    let stack = unsafe { Stack::paint(boot::stack()) };
    // SAFETY: this board's mailbox, mapped as device memory and used here only.
    let mut mailbox = unsafe { Mailbox::new(pi.peripherals(), clock(), cache::flush) };
    // SAFETY: this board's pins, mapped as device memory and used here only.
    let mut gpio = unsafe { Gpio::new(pi.peripherals()) };
    set_up_console(pi, &mut gpio, &mut mailbox);
    let semihosting = semihosting_answers();
    let mut line = [MaybeUninit::uninit(); LINE];
    let memory_end = mailbox.memory_end().unwrap_or(MEMORY_END).min(MEMORY_END);
    // SAFETY: the firmware leaves memory up to its end to this program, and nothing else lies behind the image.
    let memory = unsafe { boot::free_memory(memory_end) };
    let arena = memory.len().min(ARENA);
    let board = Board {
        name: pi.name(),
        processor: &Processor { entered: level },
        console: &mut pi.console(),
        clock: clock(),
        command_line: command_line(&mut line, semihosting, tree),
        arena: &mut memory[..arena],
        stack,
        disk: Some(slots(pi, &mut gpio, &mut mailbox)),
        flash: &[],
        // SAFETY: the firmware's spin table, mapped; only waiting cores read it.
        cores: &ManyCores(unsafe { SpinTable::new(SPIN_TABLE) }),
    };
    let status = run(board);
    exit(pi, semihosting, status)
}

/// Ends an emulation with a status; a real board says it and sleeps.
fn exit(pi: Pi, semihosting: bool, status: u8) -> ! {
    if semihosting {
        semihost::exit(status);
    }
    let _ = writeln!(pi.console(), "status {status}; halted");
    sleep()
}

fn sleep() -> ! {
    loop {
        aarch64_cpu::asm::wfi();
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let Some(pi) = Pi::identify() else { sleep() };
    let _ = writeln!(pi.console(), "\n{info}");
    exit(pi, semihosting_answers(), 101)
}
