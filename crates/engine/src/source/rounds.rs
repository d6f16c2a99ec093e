//! One round: which pieces are cleared when, and which stream sends them.
//!
//! ```text
//!  live    clear a piece, then send it; barriers; confirmed      the guest runs here
//!  last    send; barriers; confirmed by Prepared                 nobody runs
//!  stale   tell what the target does not have; barriers          either of these
//!  push    send what is still missing; no barriers               the guest runs there
//! ```
//!
//! Invariant: in a live round a piece is given to a stream only after the world said that its
//! dirty log was cleared. What the guest writes after the clear is found by the next harvest; what
//! it wrote before is in the copy. The last round has nothing to clear: nobody writes.
//!
//! Clears run ahead of the streams by a small window, so that their round trips to the VM process
//! hide behind the copying, yet a page is cleared just before it is sent: the longer the gap, the
//! more pages are dirtied twice.

use super::SourceFault;
use super::event::{Piece, SentPiece, SourceAction, SourceConfig};
use crate::report::RoundReport;
use crate::time::Timestamp;
use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use limosa_pages::{PageCount, PageRange, Pfn};

/// Pages that one piece aims at: 8 MiB keep a stream busy for milliseconds, and are little enough
/// that pieces spread evenly over the streams.
const PIECE_PAGES: u64 = 2048;
/// Longest range of a piece, in pages: clearing it holds KVM's lock for well below a millisecond.
const PIECE_RANGE_MAX: u64 = 16_384;
/// Pages of a piece that is only told, in a range as long: at most 16 KiB on the wire, and few pieces while the guest
/// is paused.
const TOLD_PAGES: u64 = 131_072;
/// Pieces that a stream may have waiting: one being sent and one to go on with.
const QUEUED_MAX: u32 = 2;

/// Something that a round wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Clear(Piece),
    Send { piece: Piece, stream: u8 },
    Stale { piece: Piece, stream: u8 },
    First { stream: u8, round: u32 },
    Push { piece: Piece, stream: u8 },
    Barrier { stream: u8, round: u32, streams: u8 },
}

/// What a round does with its pieces; see the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Live,
    Last,
    Stale,
    Push,
}

impl Kind {
    /// Pages to send of a piece, about, and its longest range.
    const fn piece_max(self) -> (u64, u64) {
        match self {
            Self::Stale => (TOLD_PAGES, TOLD_PAGES),
            Self::Live | Self::Last | Self::Push => (PIECE_PAGES, PIECE_RANGE_MAX),
        }
    }
}

impl Step {
    pub(super) const fn into_action(self) -> SourceAction {
        match self {
            Self::Clear(piece) => SourceAction::Clear(piece),
            Self::Send { piece, stream } => SourceAction::SendPiece { piece, stream },
            Self::Stale { piece, stream } => SourceAction::SendStale { piece, stream },
            Self::First { stream, round } => SourceAction::SendFirst { round, stream },
            Self::Push { piece, stream } => SourceAction::Push { piece, stream },
            Self::Barrier {
                stream,
                round,
                streams,
            } => SourceAction::SendBarrier {
                stream,
                round,
                streams,
            },
        }
    }
}

/// A round in progress.
#[derive(Debug)]
pub(super) struct Round {
    number: u32,
    started: Timestamp,
    /// Pages that the harvest found.
    planned: PageCount,
    waiting: VecDeque<Piece>,
    clearing: usize,
    ready: VecDeque<Piece>,
    /// Pieces that are ready and not to be sent for now.
    held: VecDeque<Piece>,
    /// Pieces given to each stream that is open and not yet reported as sent.
    queued: Vec<u32>,
    /// So many streams are given pieces, the first ones; at other times of the round it may have been
    /// another number.
    in_use: u8,
    barriers_out: bool,
    kind: Kind,
    clear_late: bool,
    fewer_barriers: bool,
    late: VecDeque<Piece>,
    done: RoundReport,
}

impl Round {
    /// A round that goes out while the guest runs. Round 0 clears every page, existing or not:
    /// what comes into being later must be seen.
    pub(super) fn live(number: u32, dirty: &[u32], config: &SourceConfig, now: Timestamp) -> Self {
        let pieces = cut(number, dirty, config, number == 0, Kind::Live);
        Self::new(number, dirty, config, now, pieces, Kind::Live)
    }

    /// A pass that tells what is not at the target. In the last one, the guest being paused, the
    /// pages that its vCPUs need first go along.
    pub(super) fn stale(
        number: u32,
        dirty: &[u32],
        config: &SourceConfig,
        now: Timestamp,
        is_last: bool,
    ) -> Self {
        let mut round = Self::ready(number, dirty, config, now, Kind::Stale);
        if is_last {
            round.ready.push_front(Piece::first_needed(number));
        }
        round
    }

    /// The pages that are still missing where the guest runs.
    pub(super) fn push(number: u32, dirty: &[u32], config: &SourceConfig, now: Timestamp) -> Self {
        Self::ready(number, dirty, config, now, Kind::Push)
    }

    /// The round that goes out while the guest is paused.
    pub(super) fn last(number: u32, dirty: &[u32], config: &SourceConfig, now: Timestamp) -> Self {
        Self::ready(number, dirty, config, now, Kind::Last)
    }

    /// A round whose pieces need nothing before they are sent.
    fn ready(
        number: u32,
        dirty: &[u32],
        config: &SourceConfig,
        now: Timestamp,
        kind: Kind,
    ) -> Self {
        let pieces = cut(number, dirty, config, false, kind);
        let mut round = Self::new(number, dirty, config, now, pieces, kind);
        round.ready = core::mem::take(&mut round.waiting);
        round
    }

    fn new(
        number: u32,
        dirty: &[u32],
        config: &SourceConfig,
        now: Timestamp,
        pieces: VecDeque<Piece>,
        kind: Kind,
    ) -> Self {
        Self {
            number,
            started: now,
            planned: PageCount::new(dirty.iter().map(|&count| u64::from(count)).sum()),
            waiting: pieces,
            clearing: 0,
            ready: VecDeque::new(),
            held: VecDeque::new(),
            queued: vec![0; usize::from(config.streams)],
            in_use: config.streams,
            barriers_out: false,
            kind,
            clear_late: false,
            fewer_barriers: false,
            late: VecDeque::new(),
            done: RoundReport::default(),
        }
    }

    /// Notes that so many hot pages are left out of it.
    pub(super) const fn without(mut self, deferred: PageCount) -> Self {
        self.done.deferred = deferred;
        self
    }

    /// Plants the faults that concern a round.
    pub(super) fn with_fault(mut self, fault: Option<SourceFault>) -> Self {
        if fault == Some(SourceFault::ClearAfterCopy) && self.kind == Kind::Live {
            self.clear_late = true;
            self.ready = core::mem::take(&mut self.waiting);
        }
        self.fewer_barriers = fault == Some(SourceFault::BarriersOfStreamsInUse);
        self
    }

    /// Everything that can be begun now, with so many streams. A stream that is none of them any more
    /// still sends what it was given.
    pub(super) fn advance(&mut self, in_use: u8) -> Vec<Step> {
        self.in_use = in_use.clamp(1, self.open());
        let mut steps = Vec::new();
        steps.extend(self.late.drain(..).map(Step::Clear));
        let window = usize::from(self.in_use) * 2 + 2;
        while self.clearing + self.ready.len() < window {
            let Some(piece) = self.waiting.pop_front() else {
                break;
            };
            self.clearing += 1;
            steps.push(Step::Clear(piece));
        }
        while let Some(stream) = self.free_stream() {
            let Some(piece) = self.ready.pop_front() else {
                break;
            };
            self.queued[usize::from(stream)] += 1;
            self.done.streams = self.done.streams.max(stream + 1);
            let round = self.number;
            steps.push(match self.kind {
                Kind::Stale if piece == Piece::first_needed(round) => Step::First { stream, round },
                Kind::Stale => Step::Stale { piece, stream },
                Kind::Push => Step::Push { piece, stream },
                Kind::Live | Kind::Last => Step::Send { piece, stream },
            });
        }
        let all_given = self.waiting.is_empty() && self.clearing == 0 && self.ready.is_empty();
        if all_given && !self.barriers_out {
            self.barriers_out = true;
            let round = self.number;
            // What is pushed is over when the target says that nothing is missing.
            if self.kind != Kind::Push {
                // One at least, or a round without pages would be heard of by nobody.
                let streams = if self.fewer_barriers {
                    self.in_use
                } else {
                    self.done.streams.max(1)
                };
                steps.extend((0..streams).map(|stream| Step::Barrier {
                    stream,
                    round,
                    streams,
                }));
            }
        }
        steps
    }

    /// The dirty log of `piece` was cleared.
    pub(super) fn cleared(&mut self, piece: Piece) {
        if self.clear_late || piece.round != self.number {
            return;
        }
        assert!(self.clearing > 0, "cleared without being asked");
        self.clearing -= 1;
        self.ready.push_back(piece);
    }

    /// `piece` was sent.
    pub(super) fn sent(&mut self, piece: Piece, stream: u8, sent: SentPiece) {
        if piece.round != self.number {
            return;
        }
        let queued = &mut self.queued[usize::from(stream)];
        assert!(*queued > 0, "sent without being asked");
        *queued -= 1;
        self.done.pages = self.done.pages.saturating_add(sent.pages);
        self.done.zero_pages = self.done.zero_pages.saturating_add(sent.zero_pages);
        self.done.resent = self.done.resent.saturating_add(sent.resent);
        self.done.bytes = self.done.bytes.saturating_add(sent.bytes);
        self.done.lz4.add(sent.lz4);
        self.done.zstd.add(sent.zstd);
        self.done.delta.add(sent.delta);
        if self.clear_late {
            self.late.push_back(piece);
        }
    }

    /// Sends nothing more than what was begun.
    pub(super) fn stop(&mut self) {
        self.held.append(&mut self.ready);
    }

    /// Sends what was held back.
    pub(super) fn go_on(&mut self) {
        self.ready.append(&mut self.held);
    }

    /// True if it only told what is not at the target.
    pub(super) fn is_stale(&self) -> bool {
        self.kind == Kind::Stale
    }

    /// Pages planned and pages sent so far.
    pub(super) const fn progress(&self) -> (PageCount, PageCount) {
        (self.planned, self.done.pages)
    }

    /// True while a stream has a piece of which it has not said that it was sent.
    pub(super) fn has_pieces_out(&self) -> bool {
        self.queued.iter().any(|&queued| queued > 0)
    }

    /// True when every piece was sent, but for those that are held back.
    pub(super) fn all_sent(&self) -> bool {
        self.barriers_out && self.ready.is_empty() && !self.has_pieces_out()
    }

    /// True when round `number` is this one and was sent to its end.
    pub(super) fn is_complete(&self, number: u32) -> bool {
        number == self.number && self.all_sent()
    }

    /// What it came to, `now` that the target has it.
    pub(super) const fn report(&self, now: Timestamp) -> RoundReport {
        let mut report = self.done;
        report.time = now.since(self.started);
        report
    }

    /// True if every stream in use has something to send.
    pub(super) fn keeps_busy(&self) -> bool {
        let in_use = usize::from(self.in_use);
        self.queued.iter().take(in_use).all(|&queued| queued > 0)
    }

    fn open(&self) -> u8 {
        u8::try_from(self.queued.len()).expect("made from a u8")
    }

    /// The stream in use with the least to do, if it has room.
    fn free_stream(&self) -> Option<u8> {
        let streams = (0..self.in_use).zip(&self.queued);
        let (stream, &queued) = streams.min_by_key(|(_, queued)| **queued)?;
        (queued < QUEUED_MAX).then_some(stream)
    }
}

/// Cuts the guest's memory, and disks that are copied along, into pieces of a size that suits what is done with
/// them. A piece is of memory, or of one disk. With `everything`, chunks without a page to send
/// are in a piece too.
fn cut(
    round: u32,
    dirty: &[u32],
    config: &SourceConfig,
    everything: bool,
    kind: Kind,
) -> VecDeque<Piece> {
    let (pages_max, range_max) = kind.piece_max();
    let chunk = config.chunk.get();
    let numbering = config.numbering().expect("disks of a possible size");
    let is_disk = |first: u64| {
        numbering
            .disks()
            .iter()
            .any(|disk| disk.first.get() == first)
    };
    assert_eq!(
        dirty.len() as u64,
        numbering.end().get().div_ceil(chunk),
        "a count for each chunk"
    );
    let mut pieces = VecDeque::new();
    let mut open: Option<(u64, u64)> = None;
    let mut close = |open: &mut Option<(u64, u64)>, end: u64| {
        if let Some((first, _)) = open.take() {
            let first = Pfn::new(first);
            let part = numbering.part_of(first).expect("chunks begin with a page");
            let end = part.end().get().min(end);
            let range = PageRange::new(first, PageCount::new(end - first.get()));
            let index = u32::try_from(pieces.len()).expect("fewer pieces than chunks");
            pieces.push_back(Piece {
                round,
                index,
                range,
            });
        }
    };
    let mut start = 0;
    for &count in dirty {
        if let Some((first, pages)) = open {
            let is_full = pages + u64::from(count) > pages_max;
            if is_full || start + chunk - first > range_max || is_disk(start) {
                close(&mut open, start);
            }
        }
        match &mut open {
            Some((_, pages)) => *pages += u64::from(count),
            None if count > 0 || everything => open = Some((start, u64::from(count))),
            None => {}
        }
        start += chunk;
    }
    close(&mut open, start);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::CopiedDisk;
    use alloc::format;
    use alloc::string::String;
    use alloc::vec;
    use proptest::prelude::*;

    fn config(memory: u64, chunk: u64) -> SourceConfig {
        SourceConfig::sample(PageCount::new(memory), PageCount::new(chunk))
    }

    proptest! {
        #[test]
        fn pieces_cover_what_is_dirty_and_nothing_twice(
            dirty in prop::collection::vec(prop_oneof![Just(0u32), 0..=512u32], 1..200), tail in 1..=512u64, bulk in any::<bool>(),
            kind in prop_oneof![Just(Kind::Live), Just(Kind::Stale)],
        ) {
            let memory = (dirty.len() as u64 - 1) * 512 + tail;
            let pieces = cut(0, &dirty, &config(memory, 512), bulk, kind);
            let mut covered = 0;
            for piece in &pieces {
                prop_assert!(piece.range.first.get() >= covered);
                prop_assert!(piece.range.count.get() <= kind.piece_max().1);
                covered = piece.range.end().get();
                prop_assert!(covered <= memory);
            }
            for (index, &count) in (0u64..).zip(&dirty) {
                let inside = pieces.iter().any(|piece| {
                    piece.range.first.get() <= index * 512 && piece.range.end().get() >= ((index + 1) * 512).min(memory)
                });
                prop_assert!(inside || (count == 0 && !bulk));
            }
        }
    }

    #[test]
    fn a_piece_is_of_memory_or_of_one_disk() {
        let mut config = config(1000, 512);
        let disk = |pages: u64| CopiedDisk {
            size: PageCount::new(pages).bytes(),
            data: PageCount::new(pages).bytes(),
        };
        // They begin at 1024 and 1536, and end with 2 and 600 pages.
        config.disks = vec![disk(2), disk(600)];
        let text = |dirty: &[u32], everything| {
            let pieces = cut(0, dirty, &config, everything, Kind::Live);
            let pieces = pieces.iter().map(|piece| piece.range);
            let pieces = pieces.map(|range| format!("{}+{}", range.first.get(), range.count.get()));
            pieces.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(&[1, 1, 2, 9, 9], false), "0+1000 1024+2 1536+600");
        assert_eq!(text(&[0, 0, 0, 0, 0], true), "0+1000 1024+2 1536+600");
        assert_eq!(text(&[1, 0, 0, 0, 1], false), "0+1000 2048+88");
    }

    /// Carries a round out at once and tells its steps by their letters.
    fn steps(mut round: Round) -> String {
        let mut text = String::new();
        let mut queue: VecDeque<Step> = round.advance(2).into();
        while let Some(step) = queue.pop_front() {
            let (letter, done) = match step {
                Step::Clear(_) => ('c', None),
                Step::Send { piece, stream } => ('s', Some((piece, stream))),
                Step::Stale { piece, stream } => ('t', Some((piece, stream))),
                Step::First { stream, round } => ('f', Some((Piece::first_needed(round), stream))),
                Step::Push { piece, stream } => ('p', Some((piece, stream))),
                Step::Barrier { .. } => ('b', None),
            };
            text.push(letter);
            if let Some((piece, stream)) = done {
                round.sent(piece, stream, SentPiece::default());
            }
            queue.extend(round.advance(2));
        }
        assert!(round.is_complete(3));
        text
    }

    #[test]
    fn what_is_missing_is_told_behind_barriers_and_pushed_without() {
        let (dirty, large, now) = ([512; 600], config(600 * 512, 512), Timestamp::ZERO);
        assert_eq!(steps(Round::stale(3, &dirty, &large, now, false)), "tttbb");
        let (dirty, config) = ([512; 9], config(9 * 512, 512));
        assert_eq!(steps(Round::stale(3, &dirty, &config, now, false)), "tb");
        assert_eq!(steps(Round::stale(3, &[0; 9], &config, now, true)), "fb");
        assert_eq!(steps(Round::push(3, &dirty, &config, now)), "ppp");
    }

    #[test]
    fn what_is_held_back_is_pushed_when_it_goes_on() {
        let config = config(9 * 2048, 512);
        let mut round = Round::push(3, &[512; 36], &config, Timestamp::ZERO);
        let begun = round.advance(2);
        round.stop();
        assert!(round.advance(2).is_empty());
        round.go_on();
        for step in begun {
            if let Step::Push { piece, stream } = step {
                round.sent(piece, stream, SentPiece::default());
            }
        }
        assert_eq!(steps(round), "ppppp");
    }

    #[test]
    fn a_piece_is_cleared_before_it_is_sent_and_barriers_come_last() {
        let mut round = Round::live(0, &[512; 40], &config(40 * 512, 512), Timestamp::ZERO);
        let mut cleared = Vec::new();
        let mut sent = 0;
        let mut queue: VecDeque<Step> = round.advance(2).into();
        while let Some(step) = queue.pop_front() {
            match step {
                Step::Clear(piece) => {
                    cleared.push(piece.index);
                    round.cleared(piece);
                }
                Step::Send { piece, stream } => {
                    assert!(cleared.contains(&piece.index));
                    sent += 1;
                    round.sent(piece, stream, SentPiece::default());
                }
                Step::Barrier { round: number, .. } => assert_eq!((number, sent), (0, 10)),
                other => panic!("{other:?}"),
            }
            queue.extend(round.advance(2));
        }
        assert!(round.is_complete(0) && !round.is_complete(1));
    }
}
