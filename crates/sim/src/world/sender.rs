//! The senders of the push streams.
//!
//! A sender of a push stream reads a few pages at a moment, hands them to the wire, waits until the
//! wire took them, reads the next: while the guest goes on writing. In the bulk round it looks up
//! which pages exist when it reads, which is after their clear: a page that came into being between
//! the harvest and the clear is in no harvest, and its dirty bit is gone.

use super::{Event, World};
use crate::fault::WorldFault;
use crate::link::{Frame, PUSH};
use limosa_engine::source::{Piece, SentPiece, SourceEvent};
use limosa_pages::{ByteCount, PageCount, PageRange, Pfn};
use std::collections::VecDeque;

/// Something that a sender has to do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    Piece(Piece),
    Barrier(u32),
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
            let sender = &mut source.senders[stream];
            match sender.orders.front().copied() {
                None => return,
                Some(Order::Barrier(round)) => {
                    sender.orders.pop_front();
                    self.transmit(connection, PUSH + stream, Frame::Barrier(round));
                }
                Some(Order::Piece(piece)) => {
                    let from = sender.cursor.unwrap_or(piece.range.first.get());
                    if self.send_batch(job, stream, connection, piece, from) {
                        return;
                    }
                    let sender = &mut self.sources[job].senders[stream];
                    sender.orders.pop_front();
                    sender.cursor = None;
                    let sent = core::mem::take(&mut sender.tally);
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
    }

    /// Reads and sends the next few pages of a piece from page `from` on; false when none is left.
    fn send_batch(
        &mut self,
        job: usize,
        stream: usize,
        connection: usize,
        piece: Piece,
        from: u64,
    ) -> bool {
        let end = piece.range.end().get();
        let vm = self.sources[job].vm;
        self.catch_up(vm);
        let looks_up_now =
            self.sources[job].is_bulk && !self.is_planted(WorldFault::HolesBeforeClear);
        let memory = &self.vms[vm].memory;
        let source = &mut self.sources[job];
        let set = if looks_up_now {
            memory.exists()
        } else {
            &source.set
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
        let sender = &mut source.senders[stream];
        sender.cursor = Some(stop);
        sender.is_awake = true;
        sender.tally.pages = sender.tally.pages.saturating_add(range.count);
        sender.tally.bytes = sender.tally.bytes.saturating_add(ByteCount::new(bytes));
        let resent = source.sent_before.count_range(range);
        sender.tally.resent = sender.tally.resent.saturating_add(resent);
        if is_zero {
            sender.tally.zero_pages = sender.tally.zero_pages.saturating_add(range.count);
        }
        source.sent_before.insert_range(range);
        source.pages_carried += range.count.get();
        source.bytes_carried += bytes;
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
