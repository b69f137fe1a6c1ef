//! What SBI firmware offers a supervisor: a console, and switching off.

use embedded_io::{ErrorKind, ErrorType, Read, ReadReady, Write};

/// The debug console (extension DBCN).
#[derive(Clone, Copy, Debug, Default)]
pub struct DebugConsole {
    /// A byte that was taken by looking whether there is one.
    ahead: Option<u8>,
}

impl DebugConsole {
    fn take(&mut self) -> Result<Option<u8>, ErrorKind> {
        if let Some(byte) = self.ahead.take() {
            return Ok(Some(byte));
        }
        let mut byte = [0];
        // Addresses are physical: no translation is on.
        let place = sbi_rt::Physical::new(byte.len(), byte.as_mut_ptr().expose_provenance(), 0);
        let read = sbi_rt::console_read(place).into_result().map_err(|_| ErrorKind::Unsupported)?;
        // The firmware wrote the byte behind the compiler's back.
        Ok((read > 0).then(|| core::hint::black_box(byte)[0]))
    }
}

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

impl Read for DebugConsole {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, ErrorKind> {
        let Some(place) = buf.first_mut() else { return Ok(0) };
        *place = loop {
            if let Some(byte) = self.take()? {
                break byte;
            }
            core::hint::spin_loop();
        };
        Ok(1)
    }
}

impl ReadReady for DebugConsole {
    fn read_ready(&mut self) -> Result<bool, ErrorKind> {
        self.ahead = self.take()?;
        Ok(self.ahead.is_some())
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
