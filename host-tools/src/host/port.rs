//! The other end of a board's console: a serial device, or an emulator's socket.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::termios::{self, ControlModes, OptionalActions, SpecialCodeIndex};

/// Both directions of a console.
pub struct Port {
    /// What comes from the board.
    pub reader: Box<dyn Read + Send>,
    /// What goes there.
    pub writer: Box<dyn Write + Send>,
}

/// Before an address of TCP.
const TCP: &str = "tcp:";

impl Port {
    /// Opens `name`: a serial device or pseudo-terminal, a Unix socket, or `tcp:HOST:PORT`.
    pub fn open(name: &str, baud: u32) -> Result<Self> {
        if let Some(address) = name.strip_prefix(TCP) {
            let stream = TcpStream::connect(address).with_context(|| {
                format!("connecting to {address}; QEMU listens there with -serial tcp:{address},server=on")
            })?;
            stream.set_nodelay(true)?;
            return Ok(Self { reader: Box::new(stream.try_clone()?), writer: Box::new(stream) });
        }
        let kind = std::fs::metadata(name)
            .with_context(|| format!("opening {name}; serial devices are called /dev/ttyUSB0, /dev/ttyACM0 or alike"))?
            .file_type();
        if kind.is_socket() {
            let stream = UnixStream::connect(name).with_context(|| format!("connecting to {name}"))?;
            return Ok(Self { reader: Box::new(stream.try_clone()?), writer: Box::new(stream) });
        }
        if !kind.is_char_device() {
            bail!("{name} is neither a serial device nor a socket");
        }
        let device = serial(name, baud)?;
        Ok(Self { reader: Box::new(device.try_clone()?), writer: Box::new(device) })
    }
}

/// A serial device at `baud`, 8 data bits, no parity, one stop bit, no flow control, for this process alone.
fn serial(name: &str, baud: u32) -> Result<File> {
    // Not blocking: opening would wait for a carrier.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open(name, flags, Mode::empty())
        .with_context(|| format!("opening {name}; another program may use it, or your user may not (group dialout)"))?;
    let mut settings = termios::tcgetattr(&device).with_context(|| format!("{name} is not a serial device"))?;
    settings.make_raw();
    settings.control_modes -= ControlModes::CRTSCTS | ControlModes::CSTOPB | ControlModes::PARENB;
    settings.control_modes |= ControlModes::CLOCAL | ControlModes::CREAD;
    // A read gives what there is, but at least one byte.
    settings.special_codes[SpecialCodeIndex::VMIN] = 1;
    settings.special_codes[SpecialCodeIndex::VTIME] = 0;
    settings.set_speed(baud).with_context(|| format!("{name} does not know a speed of {baud} baud"))?;
    termios::tcsetattr(&device, OptionalActions::Now, &settings)
        .with_context(|| format!("setting {name} to {baud} baud"))?;
    termios::ioctl_tiocexcl(&device).with_context(|| format!("taking {name} for this program alone"))?;
    let flags = rustix::fs::fcntl_getfl(&device)?;
    rustix::fs::fcntl_setfl(&device, flags - OFlags::NONBLOCK)?;
    Ok(File::from(device))
}
