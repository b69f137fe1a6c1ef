//! What a debugger or an emulator offers: a command line and an exit status. On hardware without either, these calls
//! trap; boards for such hardware do not use them.

use core::mem::MaybeUninit;

use semihosting::sys::arm_compat::sys_get_cmdline_uninit;

/// The command line without the program's name; empty if there is none or if it does not fit.
pub fn command_line(buf: &mut [MaybeUninit<u8>]) -> &str {
    let bytes: &[u8] = sys_get_cmdline_uninit(buf).map_or(&[], |bytes| bytes);
    let line = core::str::from_utf8(bytes).unwrap_or("");
    line.split_once(' ').map_or("", |(_program, words)| words)
}

/// Ends the emulation with this status.
pub fn exit(status: u8) -> ! {
    semihosting::process::exit(status.into())
}
