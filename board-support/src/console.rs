//! The console as somebody sits at it: lines in, with echo and editing, and text out.
//!
//! Nothing here allocates, blocks except in [`Input::line`], or panics on what comes in.

use embedded_io::{ErrorType, Read, ReadReady, Write};

/// What an application talks over: a UART.
///
/// `read` may block; it is called after `read_ready` said yes, or when there is nothing to do but wait.
pub trait Console: Read + ReadReady + Write {}

impl<C: Read + ReadReady + Write> Console for C {}

/// A console that ends lines as terminals want it: with a carriage return.
#[derive(Debug)]
pub struct Terminal<'c, C>(pub &'c mut C);

impl<C: ErrorType> ErrorType for Terminal<'_, C> {
    type Error = C::Error;
}

impl<C: Write> Write for Terminal<'_, C> {
    fn write(&mut self, buf: &[u8]) -> Result<usize, C::Error> {
        match buf.iter().position(|byte| *byte == b'\n') {
            Some(0) => {
                self.0.write_all(b"\r\n")?;
                Ok(1)
            }
            Some(end) => self.0.write(buf.get(..end).unwrap_or(buf)),
            None => self.0.write(buf),
        }
    }

    fn flush(&mut self) -> Result<(), C::Error> {
        self.0.flush()
    }
}

impl<C: Read> Read for Terminal<'_, C> {
    fn read(&mut self, buf: &mut [u8]) -> Result<usize, C::Error> {
        self.0.read(buf)
    }
}

impl<C: ReadReady> ReadReady for Terminal<'_, C> {
    fn read_ready(&mut self) -> Result<bool, C::Error> {
        self.0.read_ready()
    }
}

/// Ctrl-C.
const INTERRUPT: u8 = 0x03;
const BELL: u8 = 0x07;
const BACKSPACE: u8 = 0x08;
/// Ctrl-U.
const ERASE_LINE: u8 = 0x15;
const ESCAPE: u8 = 0x1b;
const DELETE: u8 = 0x7f;

/// Why a line is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LineError {
    /// Ctrl-C: there is no line.
    #[error("interrupted")]
    Interrupted,
    /// It has more bytes than there is room for.
    #[error("the line is longer than {0} bytes: it was not taken")]
    TooLong(usize),
    /// The UART says that bytes were lost or damaged on the way.
    #[error("the serial line lost or damaged bytes: the line was not taken; wait for the prompt before you send one")]
    Lost,
    /// It is not text.
    #[error("the line is not UTF-8: it was not taken")]
    NotText,
}

/// A key that is made of several bytes, such as an arrow, is being left out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Escape {
    No,
    Begun,
    Sequence,
}

/// What a byte did to the line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Took {
    Nothing,
    Byte,
    /// Erased as many characters.
    Erased(usize),
    Refused,
    End,
    Interrupt,
}

/// The line that is being typed.
#[derive(Debug)]
pub struct Input<'b> {
    buf: &'b mut [u8],
    len: usize,
    /// Bytes were refused for want of room.
    too_long: bool,
    lost: bool,
    escape: Escape,
    /// The last byte was a carriage return: a line feed after it belongs to it.
    after_return: bool,
}

impl<'b> Input<'b> {
    /// Lines of at most as many bytes as `buf` has.
    pub fn new(buf: &'b mut [u8]) -> Self {
        Self { buf, len: 0, too_long: false, lost: false, escape: Escape::No, after_return: false }
    }

    /// Longest line, in bytes.
    pub fn room(&self) -> usize {
        self.buf.len()
    }

    /// Waits for a line, which may be changed in place. Carriage return, line feed or both end it; backspace and
    /// Ctrl-U erase, Ctrl-C gives it up. What is typed is sent back if `echo`; `console` is a
    /// [`Terminal`], or ends lines otherwise.
    pub fn line<C: Console>(&mut self, console: &mut C, echo: bool) -> Result<&mut str, LineError> {
        (self.len, self.too_long, self.lost, self.escape) = (0, false, false, Escape::No);
        loop {
            let mut byte = [0];
            // A UART that reports an error has taken the byte that it concerns.
            match console.read(&mut byte) {
                Ok(0) => continue,
                Ok(_) => {}
                Err(_) => {
                    self.lost = true;
                    continue;
                }
            }
            let took = self.take(byte[0]);
            if echo {
                // A console that fails has nobody to tell it to.
                let _ = match took {
                    Took::Nothing => Ok(()),
                    Took::Byte => console.write_all(&byte),
                    Took::Erased(count) => (0..count).try_for_each(|_| console.write_all(b"\x08 \x08")),
                    Took::Refused => console.write_all(&[BELL]),
                    Took::End => console.write_all(b"\n"),
                    Took::Interrupt => console.write_all(b"^C\n"),
                };
            }
            match took {
                Took::Interrupt => return Err(LineError::Interrupted),
                Took::End => break,
                _ => {}
            }
        }
        let room = self.buf.len();
        match core::str::from_utf8_mut(self.buf.get_mut(..self.len).unwrap_or_default()) {
            _ if self.too_long => Err(LineError::TooLong(room)),
            _ if self.lost => Err(LineError::Lost),
            line => line.map_err(|_| LineError::NotText),
        }
    }

    fn take(&mut self, byte: u8) -> Took {
        let after_return = core::mem::replace(&mut self.after_return, byte == b'\r');
        match (self.escape, byte) {
            (_, INTERRUPT) => return Took::Interrupt,
            (Escape::Begun, b'[' | b'O') => {
                self.escape = Escape::Sequence;
                return Took::Nothing;
            }
            // What comes before the last byte of a sequence: digits and signs.
            (Escape::Sequence, b' '..=b'?') => return Took::Nothing,
            (Escape::Sequence, b'@'..=b'~') => {
                self.escape = Escape::No;
                return Took::Nothing;
            }
            _ => self.escape = Escape::No,
        }
        match byte {
            b'\n' if after_return => Took::Nothing,
            b'\r' | b'\n' => Took::End,
            BACKSPACE | DELETE => Took::Erased(usize::from(self.erase())),
            ERASE_LINE => {
                let mut count = 0;
                while self.erase() {
                    count += 1;
                }
                self.too_long = false;
                Took::Erased(count)
            }
            ESCAPE => {
                self.escape = Escape::Begun;
                Took::Nothing
            }
            b'\t' | b' '.. => match self.buf.get_mut(self.len) {
                Some(place) => {
                    *place = byte;
                    self.len += 1;
                    Took::Byte
                }
                None => {
                    self.too_long = true;
                    Took::Refused
                }
            },
            _ => Took::Nothing,
        }
    }

    /// Takes the last character back, which may have several bytes.
    fn erase(&mut self) -> bool {
        let mut any = false;
        while let Some(len) = self.len.checked_sub(1) {
            let byte = self.buf.get(len).copied().unwrap_or_default();
            self.len = len;
            any = true;
            // Bytes of UTF-8 that continue a character.
            if byte & 0xc0 != 0x80 {
                break;
            }
        }
        any
    }
}

/// Looks at what has come while something else is being done. Only Ctrl-C counts; the rest is dropped and counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Overheard {
    /// Ctrl-C came.
    pub interrupted: bool,
    /// Other bytes that came, but for ends of lines.
    pub dropped: usize,
}

impl Overheard {
    /// Takes everything that the console has.
    pub fn listen<C: Console>(&mut self, console: &mut C) {
        while console.read_ready().unwrap_or(false) {
            let mut byte = [0];
            match console.read(&mut byte) {
                Ok(1) if byte[0] == INTERRUPT => self.interrupted = true,
                // The line feed of the line that is being answered.
                Ok(1) if matches!(byte[0], b'\r' | b'\n') => {}
                Ok(0) => return,
                _ => self.dropped += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::VecDeque;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use super::*;

    /// A wire: bytes in, where `None` is one that was lost on the way, and bytes out.
    #[derive(Default)]
    struct Wire {
        come: VecDeque<Option<u8>>,
        gone: Vec<u8>,
    }

    impl Wire {
        fn of(bytes: &[u8]) -> Self {
            Self { come: bytes.iter().copied().map(Some).collect(), gone: Vec::new() }
        }
    }

    impl ErrorType for Wire {
        type Error = embedded_io::ErrorKind;
    }

    impl Write for Wire {
        fn write(&mut self, buf: &[u8]) -> Result<usize, Self::Error> {
            self.gone.extend(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> Result<(), Self::Error> {
            Ok(())
        }
    }

    impl Read for Wire {
        fn read(&mut self, buf: &mut [u8]) -> Result<usize, Self::Error> {
            buf[0] = self.come.pop_front().expect("something comes").ok_or(embedded_io::ErrorKind::Other)?;
            Ok(1)
        }
    }

    impl ReadReady for Wire {
        fn read_ready(&mut self) -> Result<bool, Self::Error> {
            Ok(!self.come.is_empty())
        }
    }

    /// The lines that bytes make, until they are used up.
    fn lines(bytes: &[u8]) -> (Vec<Result<String, LineError>>, String) {
        let (mut wire, mut buf) = (Wire::of(bytes), [0; 16]);
        let mut input = Input::new(&mut buf);
        let mut lines = Vec::new();
        while !wire.come.is_empty() {
            lines.push(input.line(&mut wire, true).map(|line| line.to_string()));
        }
        (lines, String::from_utf8_lossy(&wire.gone).into_owned())
    }

    fn text(line: &str) -> Result<String, LineError> {
        Ok(line.to_string())
    }

    #[test]
    fn lines_end_with_return_or_feed_or_both() {
        let (read, echo) = lines(b"one\rtwo\nthree\r\nfour\n\r\n\r\r");
        assert_eq!(read, ["one", "two", "three", "four", "", "", ""].map(text));
        assert_eq!(echo, "one\ntwo\nthree\nfour\n\n\n\n");
    }

    #[test]
    fn lines_are_edited() {
        let (read, echo) = lines("cat\u{8}r\u{7f}\u{7f}\u{7f}\u{7f}\u{7f}né\u{7f}o\r".as_bytes());
        assert_eq!(read, ["no"].map(text));
        assert!(echo.ends_with("né\u{8} \u{8}o\n"), "{echo:?}");
        assert_eq!(lines(b"wrong\x15right\r").0, ["right"].map(text));
        // Arrows, function keys and other control characters are left out.
        assert_eq!(lines(b"a\x1b[Db\x1bOPc\x1b[1;5Cd\x00\x01\x1bxe\r").0, ["abcdxe"].map(text));
        assert_eq!(lines(b"never\x03new\r").0, [Err(LineError::Interrupted), text("new")]);
    }

    #[test]
    fn what_is_no_line_is_refused_whole() {
        let (read, echo) = lines(b"0123456789abcdef\r0123456789abcdefg\rshort\r");
        assert_eq!(read, [text("0123456789abcdef"), Err(LineError::TooLong(16)), text("short")]);
        assert!(echo.contains("abcdef\u{7}\n"), "{echo:?}");
        assert_eq!(lines(b"\xc3(\rgood\r").0, [Err(LineError::NotText), text("good")]);
        let mut wire = Wire::of(b"ab\rcd\r");
        wire.come[1] = None;
        let mut buf = [0; 16];
        let mut input = Input::new(&mut buf);
        assert_eq!(input.line(&mut wire, true), Err(LineError::Lost));
        assert_eq!(input.line(&mut wire, false).as_deref(), Ok("cd"));
        assert_eq!(wire.gone, b"a\n");
    }

    #[test]
    fn only_an_interrupt_is_heard_meanwhile() {
        let mut wire = Wire::of(b"\nab");
        let mut heard = Overheard::default();
        heard.listen(&mut wire);
        assert_eq!(heard, Overheard { interrupted: false, dropped: 2 });
        wire.come.extend([Some(INTERRUPT), None]);
        heard.listen(&mut wire);
        assert_eq!(heard, Overheard { interrupted: true, dropped: 3 });
    }

    #[test]
    fn terminals_get_carriage_returns() {
        let mut wire = Wire::default();
        let mut terminal = Terminal(&mut wire);
        terminal.write_all(b"\na\nbc\n\n").unwrap();
        assert_eq!(wire.gone, b"\r\na\r\nbc\r\n\r\n");
    }

    /// Whatever comes, nothing panics, and an interrupt or an end is always found.
    #[test]
    fn noise_is_survived() {
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let byte = (state >> 24) as u8;
            if byte.is_multiple_of(5) { b"\r\n\x08\x7f\x15\x1b[\xc3"[usize::from(byte / 5) % 8] } else { byte }
        };
        let mut bytes: Vec<u8> = (0..100_000).map(|_| noise()).collect();
        bytes.push(b'\x1b');
        bytes.push(b'\r');
        assert!(lines(&bytes).0.len() > 1000);
    }
}
