//! Text for the monitor's log.

use core::fmt::{self, Write};

use limosa_micro_abi::port::EXIT_BAD_ARGUMENTS;

use crate::port;

/// Writes text byte by byte; it cannot fail.
pub(crate) struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(port::console);
        Ok(())
    }
}

/// Writes one line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    // A formatter of our own types can only fail if the console does, and it cannot.
    Console.write_fmt(text).unwrap_or_default();
    port::console(b'\n');
}

/// Says what cannot be used and ends the virtual machine.
pub fn refuse(what: fmt::Arguments<'_>) -> ! {
    line(what);
    port::exit(EXIT_BAD_ARGUMENTS)
}
