//! `limosa console`: the terminal of whoever asks becomes that of the guest.

use anyhow::{Context, Result};
use clap::ValueEnum;
use limosa_host::api::{ConsoleLine, VmInfo};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Read, Stdin, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

/// Ctrl-], as in telnet: what guests seldom need.
const LEAVE: u8 = 0x1d;
const CHUNK_BYTES: usize = 4096;

/// A terminal that passes every key on, until this is dropped.
struct Raw {
    stdin: Stdin,
    before: Termios,
}

impl Raw {
    /// `None` if the standard input is no terminal.
    fn enter() -> Result<Option<Self>> {
        let stdin = io::stdin();
        let Ok(before) = tcgetattr(&stdin) else {
            return Ok(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("cannot set the terminal")?;
        Ok(Some(Self { stdin, before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.stdin, OptionalActions::Now, &self.before) {
            eprintln!("the terminal stays as it is: {error}; 'reset' helps");
        }
    }
}

/// Which line of a guest's console.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Line {
    /// The serial line
    #[value(name = "ttyS0")]
    Serial,
    /// The virtio console
    #[value(name = "hvc0")]
    Virtio,
}

impl From<Line> for ConsoleLine {
    fn from(line: Line) -> Self {
        match line {
            Line::Serial => Self::Serial,
            Line::Virtio => Self::Virtio,
        }
    }
}

/// Shows a line of a guest's console, and types what is typed here.
pub(crate) fn show(vm: &VmInfo, line: Line) -> Result<()> {
    let connection = UnixStream::connect(vm.console_socket(line.into())).with_context(|| {
        format!(
            "no console of {} is served: it is a micro guest, or does not run here",
            vm.name
        )
    })?;
    let raw = Raw::enter()?;
    if raw.is_some() {
        eprint!("{}: Ctrl-] leaves\r\n", vm.name);
    }
    let keyboard = connection.try_clone().context("cannot type")?;
    thread::spawn(move || type_in(&keyboard));
    // Whoever ends us gets the terminal back as it was.
    let ended = connection.try_clone().context("cannot leave")?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    thread::spawn(move || {
        if signals.forever().next().is_some() {
            leave(&ended);
        }
    });
    let shown = copy(&connection, &mut io::stdout());
    drop(raw);
    if io::stdout().write_all(b"\n").is_err() {
        return Ok(());
    }
    shown.context("the console is lost")
}

/// Passes on what is typed here. Leaving ends the connection, and so what is shown; the end of a file
/// that is typed does not.
fn type_in(mut guest: &UnixStream) {
    let mut bytes = [0; CHUNK_BYTES];
    loop {
        let read = io::stdin().read(&mut bytes).unwrap_or(0);
        if read == 0 {
            return;
        }
        let typed = &bytes[..read];
        let leaves = typed.iter().position(|&byte| byte == LEAVE);
        let is_sent = guest.write_all(&typed[..leaves.unwrap_or(read)]).is_ok();
        if leaves.is_some() || !is_sent {
            leave(guest);
            return;
        }
    }
}

fn leave(guest: &UnixStream) {
    // If that fails, it has ended.
    let _is_ended = guest.shutdown(Shutdown::Both).is_ok();
}

/// Shows bytes as they come, to the end.
fn copy(mut from: &UnixStream, to: &mut impl Write) -> io::Result<()> {
    let mut bytes = [0; CHUNK_BYTES];
    loop {
        match from.read(&mut bytes)? {
            0 => return Ok(()),
            read => to.write_all(&bytes[..read]).and_then(|()| to.flush())?,
        }
    }
}
