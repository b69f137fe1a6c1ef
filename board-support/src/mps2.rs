//! What Arm's MPS2 boards have on their FPGA: the CMSDK's UARTs, and a counter.
//!
//! Sources: Arm's "Cortex-M System Design Kit Technical Reference Manual" (APB UART) and Application Note AN386 (memory
//! map, FPGA system control).

use core::convert::Infallible;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use cortex_m::interrupt::InterruptNumber;
use cortex_m::peripheral::NVIC;
use cortex_m::{asm, interrupt};
use embedded_io::{ErrorType, Read, ReadReady, Write};
use safe_mmio::fields::{ReadPure, ReadPureWrite, ReadWrite};
use safe_mmio::{UniqueMmioPointer, field, field_shared};

use crate::app::Clock;

/// Registers of a UART.
#[derive(Debug)]
#[repr(C)]
struct UartRegisters {
    data: ReadWrite<u32>,
    state: ReadPure<u32>,
    control: ReadPureWrite<u32>,
    interrupt: ReadPureWrite<u32>,
    divisor: ReadPureWrite<u32>,
}

const SENDING: u32 = 1 << 0;
const RECEIVED: u32 = 1 << 1;
/// Sends and receives, and asks for attention when a byte has come.
const ON: u32 = 0b1011;
/// The receiver's interrupt in the register that shows and clears interrupts.
const RECEIVER: u32 = 1 << 1;

/// Number of a UART's receive interrupt.
#[derive(Clone, Copy, Debug)]
struct Receive(u16);

// SAFETY: the number is what it is; `Uart::new`'s caller promises that it is the UART's.
unsafe impl InterruptNumber for Receive {
    fn number(self) -> u16 {
        self.0
    }
}

/// A UART as a console.
#[derive(Debug)]
pub struct Uart {
    registers: UniqueMmioPointer<'static, UartRegisters>,
    receive: Receive,
}

impl Uart {
    /// Switches the UART at `base` on. `clock_hertz` is its input clock, `receive` the number of its receive interrupt.
    ///
    /// # Safety
    /// At `base`, which is not 0, is such a UART, which nobody else uses while this value lives.
    pub unsafe fn new(base: usize, receive: u16, clock_hertz: u32, baud: u32) -> Self {
        let registers = core::ptr::with_exposed_provenance_mut(base);
        // SAFETY: the caller's promise.
        let registers = unsafe { UniqueMmioPointer::new(NonNull::new_unchecked(registers)) };
        let mut uart = Self { registers, receive: Receive(receive) };
        // The least divisor is 16.
        field!(uart.registers, divisor).write((clock_hertz / baud.max(1)).max(16));
        field!(uart.registers, control).write(ON);
        // Whatever it still holds was not meant for this program. QEMU looks for input anew when the register is read,
        // and not when the receiver is switched on.
        field!(uart.registers, data).read();
        uart
    }

    fn state(&self) -> u32 {
        field_shared!(self.registers, state).read()
    }

    /// Sleeps until a byte has come. The interrupt wakes the core and is never taken: it is on only here, where PRIMASK
    /// holds it back.
    fn sleep(&mut self) {
        interrupt::disable();
        field!(self.registers, interrupt).write(RECEIVER);
        NVIC::unpend(self.receive);
        // SAFETY: PRIMASK is set until the interrupt is off again, so that no handler runs.
        unsafe { NVIC::unmask(self.receive) };
        if self.state() & RECEIVED == 0 {
            asm::wfi();
        }
        NVIC::mask(self.receive);
        // SAFETY: no interrupt is on outside of this function.
        unsafe { interrupt::enable() };
    }
}

impl ErrorType for Uart {
    type Error = Infallible;
}

impl Write for Uart {
    fn write(&mut self, buf: &[u8]) -> Result<usize, Infallible> {
        let Some(&byte) = buf.first() else { return Ok(0) };
        while self.state() & SENDING != 0 {
            core::hint::spin_loop();
        }
        field!(self.registers, data).write(byte.into());
        Ok(1)
    }

    fn flush(&mut self) -> Result<(), Infallible> {
        Ok(())
    }
}

impl Read for Uart {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, Infallible> {
        let Some(place) = buf.first_mut() else { return Ok(0) };
        while self.state() & RECEIVED == 0 {
            self.sleep();
        }
        *place = field!(self.registers, data).read() as u8;
        Ok(1)
    }
}

impl ReadReady for Uart {
    fn read_ready(&mut self) -> Result<bool, Infallible> {
        Ok(self.state() & RECEIVED != 0)
    }
}

/// Where the FPGA's registers are.
const FPGA: usize = 0x4002_8000;
const COUNTER: usize = FPGA + 0x18;
const PRESCALE: usize = FPGA + 0x1c;
const HERTZ: u32 = 1_000_000;

/// The FPGA's counter, at 1 MHz. It has 32 bits, and is counted on here: somebody must look every 71 minutes.
///
/// # Safety
/// The program runs on an MPS2 board whose FPGA's clock has `clock_hertz`, and nobody else sets the counter.
pub unsafe fn clock(clock_hertz: u32) -> Clock {
    let prescale = core::ptr::with_exposed_provenance_mut::<u32>(PRESCALE);
    // SAFETY: the caller's promise.
    unsafe { prescale.write_volatile(clock_hertz / HERTZ - 1) };
    Clock { now, hertz: HERTZ.into() }
}

fn now() -> u64 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    static WRAPS: AtomicU32 = AtomicU32::new(0);
    // SAFETY: whoever has a clock has promised that the counter is there; reading it has no effect.
    let count = unsafe { core::ptr::with_exposed_provenance::<u32>(COUNTER).read_volatile() };
    // One core without interrupts: nobody comes between.
    let wraps = WRAPS.load(Ordering::Relaxed) + u32::from(count < LAST.load(Ordering::Relaxed));
    LAST.store(count, Ordering::Relaxed);
    WRAPS.store(wraps, Ordering::Relaxed);
    u64::from(wraps) << 32 | u64::from(count)
}
