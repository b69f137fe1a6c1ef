//! What SBI firmware offers a supervisor: a console, and switching off.

use embedded_io::{ErrorKind, ErrorType, Write};

/// The debug console (extension DBCN).
#[derive(Clone, Copy, Debug, Default)]
pub struct DebugConsole;

impl ErrorType for DebugConsole {
    type Error = ErrorKind;
}

impl Write for DebugConsole {
    fn write(&mut self, buf: &[u8]) -> Result<usize, ErrorKind> {
        if buf.is_empty() {
            return Ok(0);
        }
        // Addresses are physical: no translation is on.
        let written = sbi_rt::console_write(sbi_rt::Physical::new(buf.len(), buf.as_ptr().expose_provenance(), 0));
        match written.into_result() {
            Ok(0) => Err(ErrorKind::WriteZero),
            Ok(count) => Ok(count.min(buf.len())),
            Err(_) => Err(ErrorKind::Unsupported),
        }
    }

    fn flush(&mut self) -> Result<(), ErrorKind> {
        Ok(())
    }
}

/// Switches the machine off (extension SRST).
pub fn shut_down() -> ! {
    // The call returns only if the firmware cannot switch off; there is nothing left to do then.
    let _ = sbi_rt::system_reset(sbi_rt::Shutdown, sbi_rt::NoReason);
    loop {
        core::hint::spin_loop();
    }
}
