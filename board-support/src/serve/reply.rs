//! How answers are put: for a person at a terminal, or as lines of JSON for a program.

use core::fmt::{self, Arguments, Write as _};

use embedded_io::Write;

use crate::app::say;

/// Writes text as the content of a JSON string (RFC 8259, section 7).
struct Escaped<'c, C>(&'c mut C);

impl<C: Write> Escaped<'_, C> {
    fn put(&mut self, bytes: &[u8]) -> fmt::Result {
        self.0.write_all(bytes).map_err(|_| fmt::Error)
    }
}

impl<C: Write> fmt::Write for Escaped<'_, C> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const HEXADECIMAL: &[u8; 16] = b"0123456789abcdef";
        let special = |c: char| matches!(c, '"' | '\\' | '\0'..='\x1f' | '\x7f');
        let mut rest = text;
        while let Some(at) = rest.find(special) {
            let (plain, from) = rest.split_at_checked(at).ok_or(fmt::Error)?;
            let (escaped, after) = from.split_at_checked(1).ok_or(fmt::Error)?;
            self.put(plain.as_bytes())?;
            match escaped {
                "\"" => self.put(b"\\\"")?,
                "\\" => self.put(b"\\\\")?,
                "\n" => self.put(b"\\n")?,
                control => {
                    let byte = control.bytes().next().unwrap_or_default();
                    let digit = |value: u8| HEXADECIMAL.get(usize::from(value)).copied().unwrap_or_default();
                    self.put(&[b'\\', b'u', b'0', b'0', digit(byte >> 4), digit(byte & 15)])?;
                }
            }
            rest = after;
        }
        self.put(rest.as_bytes())
    }
}

/// The way back to whoever sent a line.
pub struct Reply<'c, C> {
    pub console: &'c mut C,
    /// Every line is a JSON object, and what is received is not sent back.
    pub json: bool,
}

impl<C: Write> Reply<'_, C> {
    /// A line of text under `key` in JSON, after `prefix` otherwise.
    fn text(&mut self, key: &str, prefix: &str, text: Arguments<'_>) {
        if !self.json {
            say!(self.console, "{prefix}{text}");
            return;
        }
        let _ = write!(self.console, "{{\"{key}\":\"");
        let _ = Escaped(self.console).write_fmt(text);
        say!(self.console, "\"}}");
    }

    /// Something worth knowing.
    pub fn info(&mut self, text: Arguments<'_>) {
        self.text("info", "", text);
    }

    /// A line was not done.
    pub fn error(&mut self, text: Arguments<'_>) {
        self.text("error", "error: ", text);
    }

    /// The program is about to end because of a failure, which is said once more behind this.
    pub fn fatal(&mut self, text: Arguments<'_>) {
        if self.json {
            self.text("fatal", "", text);
        } else {
            say!(self.console, "");
        }
    }

    /// A generated token, and the text that became complete with it: `text` hands its parts over.
    pub fn token(&mut self, id: u32, text: impl FnOnce(&mut dyn FnMut(&str))) {
        if !self.json {
            text(&mut |part| {
                let _ = self.console.write_all(part.as_bytes());
            });
            return;
        }
        let _ = write!(self.console, "{{\"token\":{id},\"text\":\"");
        text(&mut |part| {
            let _ = Escaped(self.console).write_str(part);
        });
        say!(self.console, "\"}}");
    }

    /// Text without a token: the rest of a character that was not completed.
    pub fn rest(&mut self, text: &str) {
        if !self.json {
            let _ = self.console.write_all(text.as_bytes());
        } else if !text.is_empty() {
            self.text("text", "", format_args!("{text}"));
        }
    }

    /// An object of JSON under `key`, written by its content.
    pub fn object(&mut self, key: &str, content: Arguments<'_>) {
        say!(self.console, "{{\"{key}\":{{{content}}}}}");
    }
}

/// An option as JSON.
pub struct OrNull<T>(pub Option<T>);

impl<T: fmt::Display> fmt::Display for OrNull<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("null"),
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::String;

    use super::*;

    fn said(json: bool, say: impl FnOnce(&mut Reply<'_, &mut [u8]>)) -> String {
        let mut bytes = [0; 256];
        let mut console = &mut bytes[..];
        say(&mut Reply { console: &mut console, json });
        let left = console.len();
        String::from_utf8(bytes[..256 - left].to_vec()).unwrap()
    }

    #[test]
    fn json_is_escaped() {
        let text = "a\"b\\c\nd\r\x1b\x7f\0é😀";
        let escaped = r#"a\"b\\c\nd\u000d\u001b\u007f\u0000é😀"#;
        let info = said(true, |reply| reply.info(format_args!("{text}")));
        assert_eq!(info, std::format!("{{\"info\":\"{escaped}\"}}\n"));
        let token = said(true, |reply| {
            reply.token(7, |emit| {
                emit("a\"");
                emit("b");
            });
        });
        assert_eq!(token, "{\"token\":7,\"text\":\"a\\\"b\"}\n");
        assert_eq!(said(true, |reply| reply.rest("")), "");
        assert_eq!(said(true, |reply| reply.rest("\u{fffd}")), "{\"text\":\"\u{fffd}\"}\n");
    }

    #[test]
    fn people_get_text() {
        assert_eq!(said(false, |reply| reply.error(format_args!("no {}", 1))), "error: no 1\n");
        assert_eq!(said(false, |reply| reply.token(7, |emit| emit("a\"\n"))), "a\"\n");
        assert_eq!(std::format!("{} {}", OrNull(Some(3)), OrNull::<u32>(None)), "3 null");
    }
}
