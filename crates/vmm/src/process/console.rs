//! Serves each line of a machine's console on a socket of its own, beside that of the process: what the guest
//! prints goes out, what comes in is typed. One watches a line at a time; who comes later takes over.
//!
//! On a thread of its own, so that nobody who watches holds up the daemon.

use crate::console::{ConsoleLine, Terminal};
use limosa_os::socket;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

/// How soon it is tried again to type what the guest has no room for, or is paused for, and to show what
/// its viewer has not read yet.
const AGAIN_MS: u32 = 5;
/// What is read at once.
const TYPED_BYTES: usize = 256;
/// What may wait to be typed; a guest that takes no input loses the rest.
const UNTYPED_BYTES_MAX: usize = 4096;

/// Where that line of the console is served of the process that listens at `socket`.
pub fn console_socket(socket: &Path, line: ConsoleLine) -> PathBuf {
    socket.with_extension(match line {
        ConsoleLine::Serial => "tty",
        ConsoleLine::Virtio => "hvc",
    })
}

/// All that a process listens at whose own socket is `socket`.
pub fn sockets_of(socket: &Path) -> impl Iterator<Item = PathBuf> {
    let lines = ConsoleLine::ALL.map(|line| console_socket(socket, line));
    [socket.to_owned()].into_iter().chain(lines)
}

/// Serves from now on, as long as the process lives.
pub(super) fn start(socket: &Path, line: ConsoleLine, terminal: Terminal) -> io::Result<()> {
    let listener = socket::listen_privately(&console_socket(socket, line))?;
    thread::Builder::new()
        .name("console".to_owned())
        .spawn(move || {
            if let Err(error) = serve(&listener, &terminal) {
                tracing::warn!(%error, "nobody can watch the console any more");
            }
        })?;
    Ok(())
}

/// The one who watches.
struct Viewer {
    connection: UnixStream,
    /// What is still to be shown to him.
    unshown: Vec<u8>,
    /// What he has typed and the guest has not taken.
    untyped: Vec<u8>,
}

fn serve(listener: &UnixListener, terminal: &Terminal) -> io::Result<()> {
    let bell = terminal.bell();
    let mut viewer: Option<Viewer> = None;
    loop {
        if let Some(one) = &mut viewer
            && !one.pass_on(terminal)
        {
            terminal.leave();
            viewer = None;
        }
        let has_more = |one: &Viewer| !one.unshown.is_empty() || !one.untyped.is_empty();
        let limit = viewer.as_ref().is_some_and(has_more).then_some(AGAIN_MS);
        let connection = viewer.as_ref().map(|one| &one.connection as &dyn AsFd);
        let sources = [Some(listener as &dyn AsFd), connection, Some(&*bell)];
        let [knocks, types, _] = socket::wait_readable(sources, limit)?;
        // What is unseen is asked for anyway.
        let _has_rung = bell.hear();
        if knocks {
            viewer = watch(listener, terminal);
        } else if types
            && let Some(one) = &mut viewer
            && !one.read()
        {
            terminal.leave();
            viewer = None;
        }
    }
}

/// Shows the console to whoever has come, from now on to him alone.
fn watch(listener: &UnixListener, terminal: &Terminal) -> Option<Viewer> {
    let accepted = listener.accept().and_then(|(connection, _)| {
        connection.set_nonblocking(true)?;
        Ok(connection)
    });
    let connection = accepted
        .inspect_err(|error| tracing::debug!(%error, "somebody could not watch"))
        .ok()?;
    terminal.watch();
    Some(Viewer {
        connection,
        unshown: Vec::new(),
        untyped: Vec::new(),
    })
}

impl Viewer {
    /// Types and shows what can be now; false if he has gone.
    fn pass_on(&mut self, terminal: &Terminal) -> bool {
        let taken = terminal.type_in(&self.untyped);
        self.untyped.drain(..taken);
        if self.unshown.is_empty() {
            self.unshown = terminal.unseen();
        }
        if self.unshown.is_empty() {
            return true;
        }
        match self.connection.write(&self.unshown) {
            Ok(shown) => {
                self.unshown.drain(..shown);
                true
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }

    /// Reads what he types; false if he has gone.
    fn read(&mut self) -> bool {
        let mut bytes = [0; TYPED_BYTES];
        match self.connection.read(&mut bytes) {
            Ok(0) => false,
            Ok(read) => {
                let room = UNTYPED_BYTES_MAX - self.untyped.len();
                self.untyped.extend(&bytes[..read.min(room)]);
                true
            }
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        }
    }
}
