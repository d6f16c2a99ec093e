//! The senders of the push streams.
//!
//! A sender of a push stream reads a few pages at a moment, hands them to the wire, waits until the
//! wire took them, reads the next: while the guest goes on writing. In the bulk round it looks up
//! which pages exist when it reads, which is after their clear: a page that came into being between
//! the harvest and the clear is in no harvest, and its dirty bit is gone.

use super::{Event, SourceJob, World};
use crate::fault::WorldFault;
use crate::link::{Frame, PUSH};
use limosa_engine::source::{Piece, SentPiece, SourceEvent, Stage};
use limosa_pages::{ByteCount, PageCount, PageRange, Pfn};
use std::collections::VecDeque;

/// Something that a sender has to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Piece(Piece),
    /// Of a round, and by how many streams that goes.
    Barrier(u32, u8),
    /// What the target does not have.
    Stale(Piece),
    /// What the vCPUs need first, in this round.
    First(u32),
    /// What is missing and was not sent.
    Push(Piece),
}

impl Order {
    /// The piece to be reported as sent; a barrier is none.
    const fn piece(self) -> Option<Piece> {
        match self {
            Self::Barrier(..) => None,
            Self::Piece(piece) | Self::Stale(piece) | Self::Push(piece) => Some(piece),
            Self::First(round) => Some(Piece::first_needed(round)),
        }
    }
}

/// The sender of one push stream.
#[derive(Debug, Default)]
pub(super) struct Sender {
    pub(super) orders: VecDeque<Order>,
    is_awake: bool,
    /// The next page of the piece in work.
    pub(super) cursor: Option<u64>,
    tally: SentPiece,
}

impl Sender {
    /// Forgets everything: what was sent for a piece that will not be reported.
    pub(super) fn drop_orders(&mut self) -> SentPiece {
        self.orders.clear();
        self.cursor = None;
        core::mem::take(&mut self.tally)
    }
}

impl SourceJob {
    /// A sender has handed the pages of `range` to the wire.
    fn count_sent(&mut self, stream: usize, range: PageRange, is_zero: bool, bytes: u64) {
        let sender = &mut self.senders[stream];
        sender.cursor = Some(range.end().get());
        sender.is_awake = true;
        sender.tally.pages = sender.tally.pages.saturating_add(range.count);
        sender.tally.bytes = sender.tally.bytes.saturating_add(ByteCount::new(bytes));
        let resent = self.sent_before.count_range(range);
        sender.tally.resent = sender.tally.resent.saturating_add(resent);
        if is_zero {
            sender.tally.zero_pages = sender.tally.zero_pages.saturating_add(range.count);
        }
        self.sent_before.insert_range(range);
        self.serving.owed.remove_range(range);
        self.pages_carried += range.count.get();
        self.bytes_carried += bytes;
    }
}

impl World {
    pub(super) fn order(&mut self, job: usize, stream: u8, order: Order) {
        let stream = usize::from(stream);
        let sender = &mut self.sources[job].senders[stream];
        sender.orders.push_back(order);
        if !sender.is_awake {
            sender.is_awake = true;
            let delay = self.random.micros(1, 10);
            self.schedule(
                delay,
                Event::Send {
                    source: job,
                    stream,
                },
            );
        }
    }

    /// A sender goes on: reads the next pages, or ends its piece.
    pub(crate) fn send_on(&mut self, job: usize, stream: usize) {
        self.sources[job].senders[stream].is_awake = false;
        loop {
            let source = &mut self.sources[job];
            let Some(connection) = source.connection else {
                return;
            };
            if !source.is_at_work() || self.connections[connection].channels[PUSH + stream].is_cut {
                // The socket's buffer is full and nobody empties it.
                return;
            }
            let Some(order) = source.senders[stream].orders.front().copied() else {
                return;
            };
            match order {
                Order::Barrier(round, streams) => {
                    self.transmit(connection, PUSH + stream, Frame::Barrier(round, streams));
                }
                Order::Stale(piece) => self.send_stale(job, stream, connection, piece),
                order if self.send_batch(job, stream, connection, order) => return,
                _ => {}
            }
            let sender = &mut self.sources[job].senders[stream];
            sender.orders.pop_front();
            sender.cursor = None;
            let sent = core::mem::take(&mut sender.tally);
            if let Some(piece) = order.piece() {
                let source = &mut self.sources[job];
                if source.engine.machine().stage() == Stage::Releasing {
                    // All pages have come another way, and nobody counts these any more.
                    source.pages_unfinished += sent.pages.get();
                    source.bytes_unfinished += sent.bytes.get();
                    continue;
                }
                let stream = u8::try_from(stream).expect("streams are counted in a u8");
                self.tell_source(
                    job,
                    SourceEvent::Sent {
                        piece,
                        stream,
                        sent,
                    },
                );
            }
        }
    }

    /// Tells which pages of a piece the target does not have.
    fn send_stale(&mut self, job: usize, stream: usize, connection: usize, piece: Piece) {
        let source = &mut self.sources[job];
        let ranges: Vec<PageRange> = source.set.runs_in(piece.range).collect();
        let frame = Frame::Stale(ranges);
        source.bytes_carried += frame.bytes();
        source.senders[stream].tally.bytes = ByteCount::new(frame.bytes());
        self.transmit(connection, PUSH + stream, frame);
    }

    /// Reads and sends the next few pages of an order; false when none is left.
    fn send_batch(&mut self, job: usize, stream: usize, connection: usize, order: Order) -> bool {
        let range = match order {
            Order::Piece(piece) | Order::Push(piece) => piece.range,
            _ => PageRange::new(Pfn::new(0), self.config.habits.memory),
        };
        let end = range.end().get();
        let cursor = self.sources[job].senders[stream].cursor;
        let from = cursor.unwrap_or(range.first.get());
        let vm = self.sources[job].vm;
        self.catch_up(vm);
        let looks_up_now =
            self.sources[job].is_bulk && !self.is_planted(WorldFault::HolesBeforeClear);
        let keeps_old = self.is_planted(WorldFault::PulledPageOld);
        let memory = &self.vms[vm].memory;
        let source = &mut self.sources[job];
        let set = match order {
            Order::Push(_) => &source.serving.owed,
            Order::First(_) => &source.serving.first,
            _ if looks_up_now => memory.exists(),
            _ => &source.set,
        };
        let rest = PageRange::new(Pfn::new(from), PageCount::new(end - from));
        let Some(run) = set.runs_in(rest).next() else {
            return false;
        };
        let first = run.first.get();
        let last = run.end().get().min(first + self.config.batch_max);
        let is_zero = memory.read(first) == 0;
        let stop = (first + 1..last)
            .find(|&page| (memory.read(page) == 0) != is_zero)
            .unwrap_or(last);
        let range = PageRange::new(Pfn::new(first), PageCount::new(stop - first));
        let frame = if is_zero {
            Frame::Zeros(range)
        } else {
            let content = range.iter().map(|page| memory.read(page.get())).collect();
            Frame::Pages { first, content }
        };
        let bytes = frame.bytes();
        if keeps_old {
            for page in range.iter() {
                let content = memory.read(page.get());
                source
                    .serving
                    .sent_first
                    .entry(page.get())
                    .or_insert(content);
            }
        }
        source.count_sent(stream, range, is_zero, bytes);
        let limit = source.limit;
        let done = self.link.occupy(self.now, bytes, limit);
        self.transmit_at(connection, PUSH + stream, frame, done);
        self.schedule_at(
            done,
            Event::Send {
                source: job,
                stream,
            },
        );
        true
    }
}
