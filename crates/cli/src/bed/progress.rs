//! A line on the terminal that says how far the move is, and is gone when it is over.

use crate::follow::extent;
use limosa_engine::source::Stage;
use limosa_host::api::MigrationInfo;
use limosa_pages::BytesPerSecond;
use std::io::{self, IsTerminal, Write};

/// Characters of the bar.
const BAR_WIDTH: u64 = 24;

/// The line; nothing if standard error is not a terminal.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    title: &'a str,
    is_terminal: bool,
    is_shown: bool,
}

impl<'a> Progress<'a> {
    /// Nothing is shown yet; `title` will stand before the bar.
    pub(crate) fn new(title: &'a str) -> Self {
        Self {
            title,
            is_terminal: io::stderr().is_terminal(),
            is_shown: false,
        }
    }

    /// Whether anybody would see it.
    pub(crate) const fn is_visible(&self) -> bool {
        self.is_terminal
    }

    /// Shows where the move stands now.
    pub(crate) fn show(&mut self, info: &MigrationInfo) {
        if self.is_terminal {
            self.is_shown = true;
            print(&format!("\r{} {}\x1b[K", self.title, line(info)));
        }
    }

    /// Removes the line.
    pub(crate) fn clear(&mut self) {
        if self.is_shown {
            self.is_shown = false;
            print("\r\x1b[K");
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

fn print(text: &str) {
    let mut terminal = io::stderr();
    let printed = terminal
        .write_all(text.as_bytes())
        .and_then(|()| terminal.flush());
    if let Err(error) = printed {
        tracing::debug!(%error, "the progress line could not be printed");
    }
}

fn line(info: &MigrationInfo) -> String {
    let (sent, pages) = extent(info);
    let done = (sent * BAR_WIDTH).checked_div(pages).unwrap_or(0) as usize;
    let bar = "#".repeat(done) + &"-".repeat(BAR_WIDTH as usize - done);
    let what = if info.stage == Stage::Serving {
        "what the guest misses".to_owned()
    } else {
        format!("round {}", info.round)
    };
    let mut text = format!(
        "[{bar}] {} {what}: {sent} of {pages} pages",
        info.mode.name(),
    );
    if info.stage == Stage::Serving {
        return text;
    }
    if let Some(rate) = info.bandwidth {
        text.push_str(&format!(", {}", BytesPerSecond::new(rate)));
    }
    if let Some(rate) = info.dirty_pages_per_s {
        text.push_str(&format!(", {rate} dirtied a second"));
    }
    if let Some(downtime) = info.predicted_downtime_ms {
        text.push_str(&format!(", downtime {downtime:.1} ms if paused now"));
    }
    text
}
