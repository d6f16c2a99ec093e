//! How many of the open push streams are given pieces: what the operator said, or the law of
//! [`crate::streams`], which is told what pieces take while the guest runs, on either side.
//!
//! While the guest is paused nothing is tried: a number that pays less would make the pause longer.

use super::{SentPiece, Source, SourceAction, State};
use crate::streams::Streams;
use crate::time::Timestamp;
use alloc::vec::Vec;

impl Source {
    /// How many push streams are given pieces now, of those that are open.
    pub fn streams_in_use(&self) -> u8 {
        let number = self.config.limits.streams.number();
        number.map_or_else(
            || self.climber.in_use(),
            |number| number.min(self.config.streams),
        )
    }

    /// Push streams that are open, or will be on the next connection.
    pub const fn streams_open(&self) -> u8 {
        self.config.streams
    }

    /// Goes on from the number in use, if that is left to the law now.
    pub(super) fn restart_climber(&mut self, before: Streams, in_use: u8) {
        let is_auto = |streams: Streams| streams.number().is_none();
        if is_auto(self.config.limits.streams) && !is_auto(before) {
            self.climber.restart(in_use);
        }
    }

    /// A piece was sent, and what comes next was given out: whether other streams pay, and what they
    /// are given then.
    pub(super) fn weigh_streams(&mut self, now: Timestamp, sent: SentPiece) -> Vec<SourceAction> {
        let is_tried = matches!(self.state, State::Rounds | State::Serving)
            && self.config.limits.streams.number().is_none();
        let Some(round) = self.round.as_ref().filter(|_| is_tried) else {
            self.climber.interrupt();
            return Vec::new();
        };
        let content = sent.pages.saturating_sub(sent.zero_pages);
        // Pieces that are mostly zero pages take the time of reading memory.
        let is_telling = round.keeps_busy() && content >= sent.zero_pages;
        let before = self.climber.in_use();
        self.climber.sent(now, content.bytes(), is_telling);
        if self.climber.in_use() == before {
            return Vec::new();
        }
        self.next_pieces()
    }
}

#[cfg(test)]
mod tests;
