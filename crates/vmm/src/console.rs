//! What a guest prints on a line of its console, and what is typed there.
//!
//! It goes line by line into the log of the VM process, as far as a guest may fill the disk of its host, and as it
//! comes to whoever watches.

use crate::allowance::Allowance;
use limosa_os::kvm::Doorbell;
use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What somebody sees who begins to watch: the last bytes, some screens full.
const RECENT_BYTES_MAX: usize = 16 << 10;
/// How far somebody may lag behind who watches.
const UNSEEN_BYTES_MAX: usize = 256 << 10;

/// Longest line that is noted as one in the log.
pub(crate) const LOG_LINE_BYTES_MAX: usize = 1024;

/// The lines on which a guest with a kernel can have its console, by the names that Linux has for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConsoleLine {
    /// `ttyS0`: the serial port, which works from the first instruction on.
    Serial,
    /// `hvc0`: the virtio console, which takes whole buffers instead of bytes.
    Virtio,
}

impl ConsoleLine {
    /// Each of them.
    pub const ALL: [Self; 2] = [Self::Serial, Self::Virtio];
}

/// A line as somebody sees it who watches and types.
#[derive(Clone, Debug)]
pub struct Terminal {
    screen: Arc<Screen>,
    keyboard: Arc<dyn Keyboard>,
}

/// Where what is typed goes.
pub(crate) trait Keyboard: fmt::Debug + Send + Sync {
    /// See [`Terminal::type_in`].
    fn type_in(&self, bytes: &[u8]) -> usize;
}

impl Terminal {
    pub(crate) fn new(screen: Arc<Screen>, keyboard: Arc<dyn Keyboard>) -> Self {
        Self { screen, keyboard }
    }

    /// Somebody begins to watch: what the guest printed of late is unseen, and all that it prints from now on.
    pub fn watch(&self) {
        self.screen.watch();
    }

    /// Nobody watches any more.
    pub fn leave(&self) {
        self.screen.leave();
    }

    /// Takes what is unseen. While nobody does for long, the oldest of it is lost.
    pub fn unseen(&self) -> Vec<u8> {
        self.screen.unseen()
    }

    /// Rings when something is unseen.
    pub fn bell(&self) -> Arc<Doorbell> {
        Arc::clone(&self.screen.bell)
    }

    /// Types; how many bytes the line has taken: it holds some only, and none while the guest is paused.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.keyboard.type_in(bytes)
    }
}

/// What is printed on one line of a guest's console.
#[derive(Debug)]
pub(crate) struct Console {
    name: String,
    /// Lines longer than that are cut into several in the log.
    line_bytes_max: usize,
    /// What was printed since the last line ended.
    pub(crate) line: Vec<u8>,
    /// Where it can be watched, if anywhere.
    screen: Option<Arc<Screen>>,
    allowance: Allowance,
}

/// What is there for the one who watches. The guest never waits for him.
#[derive(Debug)]
pub(crate) struct Screen {
    shown: Mutex<Shown>,
    bell: Arc<Doorbell>,
}

#[derive(Debug, Default)]
struct Shown {
    recent: VecDeque<u8>,
    unseen: VecDeque<u8>,
    is_watched: bool,
}

impl Screen {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            shown: Mutex::default(),
            bell: Arc::new(Doorbell::new()?),
        })
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let mut shown = self.shown();
        shown.is_watched = true;
        shown.unseen = shown.recent.clone();
        drop(shown);
        self.ring();
    }

    fn leave(&self) {
        let mut shown = self.shown();
        shown.is_watched = false;
        shown.unseen = VecDeque::new();
    }

    fn unseen(&self) -> Vec<u8> {
        std::mem::take(&mut self.shown().unseen).into()
    }

    /// Takes bytes as the guest printed them.
    fn show(&self, bytes: &[u8]) {
        let mut shown = self.shown();
        append(&mut shown.recent, bytes, RECENT_BYTES_MAX);
        if !shown.is_watched {
            return;
        }
        let was_seen = shown.unseen.is_empty();
        append(&mut shown.unseen, bytes, UNSEEN_BYTES_MAX);
        drop(shown);
        if was_seen {
            self.ring();
        }
    }

    fn ring(&self) {
        if let Err(error) = self.bell.ring() {
            tracing::warn!(%error, "who watches the console is not told of more");
        }
    }
}

/// Appends bytes and keeps as many as there is room for, the last ones.
fn append(to: &mut VecDeque<u8>, bytes: &[u8], most: usize) {
    to.extend(bytes);
    let surplus = to.len().saturating_sub(most);
    to.drain(..surplus);
}

impl Console {
    pub(crate) fn new(name: &str, line_bytes_max: usize) -> Self {
        Self {
            name: name.to_owned(),
            line_bytes_max,
            line: Vec::new(),
            screen: None,
            allowance: Allowance::new(),
        }
    }

    /// The same, and it can be watched there.
    pub(crate) fn shown_on(self, screen: Arc<Screen>) -> Self {
        Self {
            screen: Some(screen),
            ..self
        }
    }

    /// Shows bytes as they are to whoever watches. The log gets them by [`Console::print`].
    fn show(&self, bytes: &[u8]) {
        if let Some(screen) = &self.screen {
            screen.show(bytes);
        }
    }

    pub(crate) fn print(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= self.line_bytes_max {
                self.note();
            }
        }
    }

    /// Notes the line in the log, or leaves it out.
    fn note(&mut self) {
        let text = String::from_utf8_lossy(&self.line).into_owned();
        // The log has it with escapes, which are up to six bytes for one.
        let bytes = text.escape_debug().map(char::len_utf8).sum();
        if let Some(left_out) = self.allowance.spend(bytes) {
            if left_out > 0 {
                tracing::warn!(
                    vm = self.name,
                    lines = left_out,
                    "the guest says too much to be noted"
                );
            }
            tracing::info!(vm = self.name, console = text, "the guest says");
        }
        self.line.clear();
    }

    /// The same console, as it goes on behind what was printed elsewhere.
    pub(crate) fn behind(&self, line: Vec<u8>) -> Self {
        Self {
            name: self.name.clone(),
            line_bytes_max: self.line_bytes_max,
            line,
            screen: self.screen.clone(),
            allowance: self.allowance,
        }
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.show(bytes);
        // Terminals want both ends of a line, logs one.
        self.print(bytes.iter().copied().filter(|&byte| byte != b'\r'));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_watches_sees_the_last_of_it_and_all_that_follows() {
        let screen = Screen::new().unwrap();
        screen.show(&[b'x'; RECENT_BYTES_MAX]);
        screen.show(b"login: ");
        assert!(!screen.bell.hear() && screen.unseen().is_empty());
        screen.watch();
        for byte in b"root" {
            screen.show(&[*byte]);
        }
        assert!(screen.bell.hear());
        let seen = screen.unseen();
        assert_eq!(seen.len(), RECENT_BYTES_MAX + 4);
        assert!(seen.ends_with(b"xxlogin: root"));
        assert!(!screen.bell.hear());
        screen.show(b"!");
        assert!(screen.bell.hear());
        screen.leave();
        screen.show(b"unseen");
        assert!(screen.unseen().is_empty());
    }

    #[test]
    fn who_lags_behind_loses_the_oldest() {
        let screen = Screen::new().unwrap();
        screen.watch();
        for _ in 0..100 {
            screen.show(&[b'x'; 4096]);
        }
        screen.show(b"end");
        let seen = screen.unseen();
        assert_eq!(seen.len(), UNSEEN_BYTES_MAX);
        assert!(seen.ends_with(b"end"));
    }
}
