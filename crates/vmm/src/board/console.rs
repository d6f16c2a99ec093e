//! What a guest prints, line by line into the log of the VM process.

/// The console of one guest.
#[derive(Debug)]
pub(super) struct Console {
    name: String,
    /// Longer lines are cut into several.
    line_bytes_max: usize,
    /// What was printed since the last line ended.
    pub(super) line: Vec<u8>,
}

impl Console {
    pub(super) fn new(name: &str, line_bytes_max: usize) -> Self {
        Self {
            name: name.to_owned(),
            line_bytes_max,
            line: Vec::new(),
        }
    }

    pub(super) fn print(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
            }
            if byte == b'\n' || self.line.len() >= self.line_bytes_max {
                let text = String::from_utf8_lossy(&self.line).into_owned();
                tracing::info!(vm = self.name, console = text, "the guest says");
                self.line.clear();
            }
        }
    }

    /// The same console, as it goes on behind what was printed elsewhere.
    pub(super) fn behind(&self, line: Vec<u8>) -> Self {
        Self {
            line,
            ..Self::new(&self.name, self.line_bytes_max)
        }
    }
}
