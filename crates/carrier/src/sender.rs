//! A push stream at the source: pages of the round's set, read as they are now, onto one socket.
//!
//! One thread a stream. It is handed pieces whose dirty log was cleared and sends, of each, the
//! pages that belong to the round; zero pages go as ranges without content. Holes of the memory
//! file are never read: a page that was never touched is zero at the target anyway.

use crate::bucket::Bucket;
use limosa_engine::source::{Piece, SentPiece};
use limosa_engine::wire::{PUSH_HEADER_BYTES, PUSH_PAGES_MAX, PushHeader};
use limosa_os::SharedMemory;
use limosa_pages::{ByteCount, PageCount, PageRange, PageSet, Pfn};
use std::io::{self, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// What a stream is told to do, in order.
#[derive(Debug)]
pub(crate) enum Order {
    /// Send the pages of `set` within the piece. With `skip_holes`, only those that exist.
    Piece {
        piece: Piece,
        set: Arc<PageSet>,
        skip_holes: bool,
    },
    /// All of this round that goes by this stream has been sent.
    Barrier { round: u32 },
}

/// What a stream reports.
#[derive(Debug)]
pub(crate) enum Report {
    Sent {
        piece: Piece,
        stream: u8,
        sent: SentPiece,
    },
    Broken {
        stream: u8,
        error: io::Error,
    },
}

/// What all streams of a migration share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<SharedMemory>,
    /// Pages that were sent at least once.
    pub(crate) ever_sent: Mutex<PageSet>,
    /// Pages handed to the kernel so far, in all rounds: progress within a piece.
    pub(crate) pages_out: AtomicU64,
    pub(crate) limit: Arc<Bucket>,
    pub(crate) link: Arc<Bucket>,
}

/// Starts the thread of stream `index`. It ends when the sender of orders is dropped or the socket
/// breaks.
pub(crate) fn start(
    index: u8,
    socket: TcpStream,
    shared: Arc<Shared>,
    report: impl Fn(Report) + Send + 'static,
) -> io::Result<Sender<Order>> {
    let (orders, inbox) = channel();
    thread::Builder::new()
        .name(format!("push-{index}"))
        .spawn(move || {
            let mut stream = PushStream {
                index,
                socket,
                shared,
            };
            if let Err(error) = stream.run(&inbox, &report) {
                report(Report::Broken {
                    stream: index,
                    error,
                });
            }
        })?;
    Ok(orders)
}

#[derive(Debug)]
struct PushStream {
    index: u8,
    socket: TcpStream,
    shared: Arc<Shared>,
}

impl PushStream {
    fn run(&mut self, inbox: &Receiver<Order>, report: &impl Fn(Report)) -> io::Result<()> {
        while let Ok(order) = inbox.recv() {
            match order {
                Order::Piece {
                    piece,
                    set,
                    skip_holes,
                } => {
                    let sent = self.send_piece(piece, &set, skip_holes)?;
                    report(Report::Sent {
                        piece,
                        stream: self.index,
                        sent,
                    });
                }
                Order::Barrier { round } => {
                    self.socket
                        .write_all(&PushHeader::Barrier { round }.encode())?;
                }
            }
        }
        Ok(())
    }

    fn send_piece(&self, piece: Piece, set: &PageSet, skip_holes: bool) -> io::Result<SentPiece> {
        let runs = self.runs(piece.range, set, skip_holes)?;
        let mut sent = SentPiece {
            resent: self.mark(&runs),
            ..SentPiece::default()
        };
        let mut batch = Batch::default();
        for run in runs {
            for part in split_by_content(run, |page| self.shared.memory.is_zero(page)) {
                let zero = matches!(part, PushHeader::Zeros(_));
                if let PushHeader::Zeros(range) | PushHeader::Pages(range) = part {
                    sent.pages = sent.pages.saturating_add(range.count);
                    if zero {
                        sent.zero_pages = sent.zero_pages.saturating_add(range.count);
                    }
                }
                batch.push(part);
                if batch.is_full() {
                    self.flush(&mut batch, &mut sent)?;
                }
            }
        }
        self.flush(&mut batch, &mut sent)?;
        Ok(sent)
    }

    /// The runs of pages to send: members of the set, without holes if asked.
    fn runs(
        &self,
        range: PageRange,
        set: &PageSet,
        skip_holes: bool,
    ) -> io::Result<Vec<PageRange>> {
        if !skip_holes {
            return Ok(set.runs_in(range).collect());
        }
        let mut runs = Vec::new();
        for extent in self.shared.memory.data_extents(range)? {
            runs.extend(set.runs_in(extent));
        }
        Ok(runs)
    }

    /// Notes that these pages are sent now; how many of them had been sent before.
    fn mark(&self, runs: &[PageRange]) -> PageCount {
        let mut ever = self
            .shared
            .ever_sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut again = PageCount::ZERO;
        for &run in runs {
            again = again.saturating_add(ever.count_range(run));
            ever.insert_range(run);
        }
        again
    }

    fn flush(&self, batch: &mut Batch, sent: &mut SentPiece) -> io::Result<()> {
        if batch.parts.is_empty() {
            return Ok(());
        }
        self.shared.limit.take(batch.bytes);
        self.shared.link.take(batch.bytes);
        self.shared.memory.send_parts(&self.socket, &batch.parts)?;
        sent.bytes = sent.bytes.saturating_add(ByteCount::new(batch.bytes));
        self.shared
            .pages_out
            .fetch_add(batch.pages, Ordering::Relaxed);
        *batch = Batch::default();
        Ok(())
    }
}

/// Headers and pages that leave with one system call.
#[derive(Debug, Default)]
struct Batch {
    parts: Vec<([u8; PUSH_HEADER_BYTES], Option<PageRange>)>,
    bytes: u64,
    pages: u64,
}

impl Batch {
    /// Parts in one call: two buffers each, and the kernel takes 1024.
    const PARTS_MAX: usize = 256;
    /// Bytes in one call: enough to make the call cheap, little enough to be shaped smoothly.
    const BYTES_MAX: u64 = 512 << 10;

    fn push(&mut self, header: PushHeader) {
        let pages = match header {
            PushHeader::Pages(range) => Some(range),
            PushHeader::Zeros(_) | PushHeader::Barrier { .. } => None,
        };
        if let PushHeader::Pages(range) | PushHeader::Zeros(range) = header {
            self.pages += range.count.get();
        }
        let content = pages.map_or(0, |range| range.bytes().get());
        self.bytes += PUSH_HEADER_BYTES as u64 + content;
        self.parts.push((header.encode(), pages));
    }

    const fn is_full(&self) -> bool {
        self.parts.len() >= Self::PARTS_MAX || self.bytes >= Self::BYTES_MAX
    }
}

/// Pages behind one header: what keeps a batch near its limit.
const PART_PAGES: u64 = 128;

/// Splits a run into headers: pages with content and ranges of zero pages, each within its limit.
fn split_by_content(
    run: PageRange,
    is_zero: impl Fn(Pfn) -> bool,
) -> impl Iterator<Item = PushHeader> {
    let end = run.end();
    let mut next = run.first;
    let mut known: Option<bool> = None;
    std::iter::from_fn(move || {
        if next == end {
            return None;
        }
        let first = next;
        let zero = known.take().unwrap_or_else(|| is_zero(first));
        let most = if zero {
            u64::from(u32::MAX)
        } else {
            PART_PAGES.min(u64::from(PUSH_PAGES_MAX))
        };
        next = first.advance(PageCount::new(1));
        while next != end && next.get() - first.get() < most {
            let next_is_zero = is_zero(next);
            if next_is_zero != zero {
                known = Some(next_is_zero);
                break;
            }
            next = next.advance(PageCount::new(1));
        }
        let range = PageRange::new(first, PageCount::new(next.get() - first.get()));
        Some(if zero {
            PushHeader::Zeros(range)
        } else {
            PushHeader::Pages(range)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(zeros: &[u64], pages: u64, expect: &str) {
        let run = PageRange::new(Pfn::new(0), PageCount::new(pages));
        let parts = split_by_content(run, |page| zeros.contains(&page.get()));
        let text: Vec<String> = parts
            .map(|part| match part {
                PushHeader::Pages(range) => format!("p{}+{}", range.first.get(), range.count.get()),
                PushHeader::Zeros(range) => format!("z{}+{}", range.first.get(), range.count.get()),
                PushHeader::Barrier { round } => format!("b{round}"),
            })
            .collect();
        assert_eq!(text.join(" "), expect);
    }

    #[test]
    fn runs_are_split_by_content_and_by_limit() {
        check(&[], 1, "p0+1");
        check(&[0, 1, 4], 6, "z0+2 p2+2 z4+1 p5+1");
        check(&[], 300, "p0+128 p128+128 p256+44");
        check(&(0..300).collect::<Vec<_>>(), 300, "z0+300");
    }
}
