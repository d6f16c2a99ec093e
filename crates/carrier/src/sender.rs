//! A push stream at the source: pages of the round's set, read as they are now, onto one socket.
//!
//! One thread a stream. It is handed pieces whose dirty log was cleared and sends, of each, the
//! pages that belong to the round; zero pages go as ranges without content. Holes of the memory
//! file are never read: a page that was never touched is zero at the target anyway.
//!
//! Where that is quicker, pages go in a coding ([`coding`]); otherwise the kernel is given their place
//! in the guest's memory, and they are copied nowhere else, unless they have to be encrypted.
//!
//! For a guest that runs at the target it sends what is not sent yet: a page is taken out of that
//! set, which the pull stream shares, just before it is read, so that it goes once. These batches
//! are small, and so is the socket's buffer: what somebody waits for comes through between them.

mod disk_pages;

use crate::bucket::Bucket;
use crate::channel::Writer;
use crate::coding::{self, Coder};
use crate::demanded::Demanded;
use crate::disks::Disks;
use crate::missing;
use crate::modesty::be_modest;
use crate::pace::Pace;
use crate::push_order::{Chooser, PushOrder};
use crate::source::MigrateRequest;
use crate::wire_meter::WireMeter;
use limosa_engine::source::{Piece, SentPiece};
use limosa_engine::wire::{PUSH_HEADER_BYTES, PUSH_PAGES_MAX, PushHeader};
use limosa_os::disk::DiskBuffer;
use limosa_os::memory::ExistingPages;
use limosa_os::{SharedMemory, thread_nanos};
use limosa_pages::{ByteCount, PageCount, PageRange, PageSet, Pfn};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Pages pushed at once while others may be waited for: 128 KiB pass a link of 10 Gbit/s in a tenth
/// of a millisecond.
const PUSH_PAGES: u64 = 32;
/// The socket's buffer then: what is in it goes before any page that is asked for meanwhile. Less than
/// a few segments of the loopback (64 KiB) would wait for delayed acknowledgements.
const PUSH_BUFFER_BYTES: usize = 384 << 10;

/// Shorter holes are told among the pages around them.
const HOLE_MIN: PageCount = PageCount::new(512);

/// Coded bytes that wait to be written, at most about so many.
const CODED_BYTES_MAX: usize = 256 << 10;

/// What a stream is told to do, in order.
#[derive(Debug)]
pub(crate) enum Order {
    /// Send the pages of `set` within the piece. With `skip_holes`, only those that exist.
    Piece {
        piece: Piece,
        set: Arc<PageSet>,
        skip_holes: bool,
    },
    /// Tell which pages of `set` within the piece are missing at the target.
    Stale { piece: Piece, set: Arc<PageSet> },
    /// Send these pages, which the vCPUs need first.
    First { round: u32, pages: Arc<Vec<Pfn>> },
    /// Send what is unsent within the piece.
    Push { piece: Piece },
    /// All of this round that goes by this stream has been sent.
    Barrier { round: u32, streams: u8 },
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
    /// A disk could not be read.
    Unreadable {
        error: io::Error,
    },
}

/// Why a stream sends nothing more.
#[derive(Debug)]
enum SendError {
    Broken(io::Error),
    Disk(io::Error),
}

impl From<io::Error> for SendError {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// How pages are sent, as far as an operator chooses.
#[derive(Clone, Debug)]
pub(crate) struct Manner {
    /// Whether they are coded.
    pub(crate) compression: coding::Compression,
    /// In which order missing ones are pushed.
    pub(crate) push_order: PushOrder,
    /// What earlier moves have recorded for that.
    pub(crate) demanded: Arc<Demanded>,
}

impl Manner {
    /// As asked for.
    pub(crate) fn of(request: &MigrateRequest) -> Self {
        Self {
            compression: request.compression,
            push_order: request.push_order,
            demanded: Arc::new(request.demanded.clone()),
        }
    }

    fn chooser(&self) -> Chooser {
        Chooser::new(self.push_order, Arc::clone(&self.demanded))
    }
}

/// What all streams of a migration share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<SharedMemory>,
    /// What of it exists: nothing takes pages away while a guest is being moved.
    pub(crate) existing: ExistingPages,
    /// Disks that are copied along.
    pub(crate) disks: Disks,
    /// Pages that were sent at least once.
    pub(crate) ever_sent: Mutex<PageSet>,
    /// The pages that are unsent by the present connections.
    unsent: Mutex<Arc<Unsent>>,
    /// The memory is frozen and pulls may be answered.
    pub(crate) is_serving: AtomicBool,
    /// Pages handed to the kernel so far, in all rounds: progress within a piece.
    pub(crate) pages_out: AtomicU64,
    /// Those of them that were asked for.
    pub(crate) pulled_out: AtomicU64,
    /// Bytes of push streams that the target's kernel has, of all connections.
    acknowledged: AtomicU64,
    limit: Arc<Bucket>,
    link: Arc<Bucket>,
    pub(crate) coding: coding::Shared,
}

/// With a guest that runs at the target: pages that it misses and that were not sent since. The
/// streams of one generation share it. Each generation has its own, or a stream that does not know
/// yet that its connection broke would take pages away from its successor.
#[derive(Debug)]
pub(crate) struct Unsent {
    pages: Mutex<PageSet>,
    chooser: Mutex<Chooser>,
    has_begun: AtomicBool,
}

/// Starts the thread of stream `index`. It ends when the sender of orders is dropped or the socket
/// breaks.
pub(crate) fn start(
    index: u8,
    writer: Writer,
    shared: Arc<Shared>,
    report: impl Fn(Report) + Send + 'static,
) -> io::Result<Sender<Order>> {
    let (orders, inbox) = channel();
    thread::Builder::new()
        .name(format!("push-{index}"))
        .spawn(move || {
            be_modest();
            let unsent = shared.unsent();
            let mut stream = PushStream {
                index,
                writer,
                shared,
                unsent,
                coder: Coder::new(),
                meter: WireMeter::default(),
                pace: Pace::new(),
                acknowledged: 0,
                disk_buffer: None,
            };
            match stream.run(&inbox, &report) {
                Ok(()) => {}
                Err(SendError::Broken(error)) => report(Report::Broken {
                    stream: index,
                    error,
                }),
                Err(SendError::Disk(error)) => report(Report::Unreadable { error }),
            }
        })?;
    Ok(orders)
}

#[derive(Debug)]
struct PushStream {
    index: u8,
    writer: Writer,
    shared: Arc<Shared>,
    unsent: Arc<Unsent>,
    coder: Coder,
    meter: WireMeter,
    /// For pages that are pushed while others are waited for.
    pace: Pace,
    acknowledged: u64,
    /// Once a disk was read.
    disk_buffer: Option<DiskBuffer>,
}

impl PushStream {
    fn run(&mut self, inbox: &Receiver<Order>, report: &impl Fn(Report)) -> Result<(), SendError> {
        while let Some(order) = self.next(inbox) {
            match order {
                Order::Piece {
                    piece,
                    set,
                    skip_holes,
                } => {
                    let sent = if self.shared.disks.reaches(piece.range) {
                        self.send_disk_piece(piece, &set, skip_holes)?
                    } else {
                        self.send_piece(piece, &set, skip_holes)?
                    };
                    report(Report::Sent {
                        piece,
                        stream: self.index,
                        sent,
                    });
                }
                Order::Stale { piece, set } => {
                    let sent = self.send_stale(piece, &set)?;
                    report(Report::Sent {
                        piece,
                        stream: self.index,
                        sent,
                    });
                }
                Order::First { round, pages } => {
                    let sent = self.send_first(&pages)?;
                    report(Report::Sent {
                        piece: Piece::first_needed(round),
                        stream: self.index,
                        sent,
                    });
                }
                Order::Push { piece } => {
                    self.writer.set_send_buffer(PUSH_BUFFER_BYTES)?;
                    if let Some(rate) = self.pace.begin() {
                        self.writer.set_send_rate(rate)?;
                    }
                    let sent = self.push(piece)?;
                    report(Report::Sent {
                        piece,
                        stream: self.index,
                        sent,
                    });
                }
                Order::Barrier { round, streams } => {
                    self.shared.settle();
                    let barrier = PushHeader::Barrier { round, streams };
                    self.writer.write_all(&barrier.encode())?;
                }
            }
        }
        Ok(())
    }

    /// The next order; `None` if there will be no more.
    fn next(&mut self, inbox: &Receiver<Order>) -> Option<Order> {
        inbox.try_recv().ok().or_else(|| {
            self.meter.rest();
            self.pace.rest();
            inbox.recv().ok()
        })
    }

    fn send_piece(
        &mut self,
        piece: Piece,
        set: &PageSet,
        skip_holes: bool,
    ) -> io::Result<SentPiece> {
        let runs = self.runs(piece.range, set, skip_holes)?;
        let mut sent = SentPiece {
            resent: self.mark(&runs),
            ..SentPiece::default()
        };
        let mut batch = Batch::default();
        let memory = Arc::clone(&self.shared.memory);
        for run in runs {
            for part in split_by_content(run, |page| memory.is_zero(page)) {
                self.put(part, piece.round > 0, &mut batch, &mut sent)?;
                if batch.is_full() || self.coder.out.len() >= CODED_BYTES_MAX {
                    self.flush(&mut batch, &mut sent)?;
                }
            }
        }
        self.flush(&mut batch, &mut sent)?;
        Ok(sent)
    }

    /// Adds a part as it is, or coded. With `is_again`, its pages may have been sent before.
    fn put(
        &mut self,
        part: PushHeader,
        is_again: bool,
        batch: &mut Batch,
        sent: &mut SentPiece,
    ) -> io::Result<()> {
        sent.count(part);
        let shared = &self.shared;
        let PushHeader::Pages(range) = part else {
            if let PushHeader::Zeros(range) = part {
                shared.coding.forget(range);
            }
            batch.push(part);
            return Ok(());
        };
        let mut rest = range;
        while rest.count > PageCount::ZERO {
            let coded = self.coder.wanted(&shared.coding, rest);
            if coded == PageCount::ZERO {
                shared.coding.forget(rest);
                batch.push(PushHeader::Pages(rest));
                break;
            }
            let front = PageRange::new(rest.first, coded);
            let outcome = self
                .coder
                .encode(&shared.coding, &shared.memory, front, is_again)?;
            sent.lz4.add(outcome.lz4);
            sent.zstd.add(outcome.zstd);
            sent.delta.add(outcome.delta);
            batch.pages += coded.get();
            rest = coding::after(rest, coded);
        }
        Ok(())
    }

    fn send_stale(&mut self, piece: Piece, set: &PageSet) -> io::Result<SentPiece> {
        let mut bytes = Vec::new();
        // What the target has in their place it has no more.
        set.runs_in(piece.range)
            .for_each(|run| self.shared.coding.forget(run));
        for (header, bits) in missing::encode(set, piece.range) {
            bytes.extend_from_slice(&header.stale().encode());
            bytes.extend_from_slice(&bits);
        }
        let length = bytes.len() as u64;
        self.shared.take(length);
        self.writer.write_all(&bytes)?;
        Ok(SentPiece {
            bytes: ByteCount::new(length),
            ..SentPiece::default()
        })
    }

    fn send_first(&mut self, pages: &[Pfn]) -> io::Result<SentPiece> {
        let mut sent = SentPiece::default();
        let mut batch = Batch::default();
        for &page in pages {
            let range = PageRange::new(page, PageCount::new(1));
            self.add(range, &mut batch, &mut sent)?;
        }
        let runs: Vec<PageRange> = pages
            .iter()
            .map(|&page| PageRange::new(page, PageCount::new(1)))
            .collect();
        sent.resent = self.mark(&runs);
        self.flush(&mut batch, &mut sent)?;
        Ok(sent)
    }

    fn push(&mut self, piece: Piece) -> Result<SentPiece, SendError> {
        let mut sent = SentPiece::default();
        let mut batch = Batch::default();
        if self.unsent.is_first_push() {
            self.tell_holes(&mut sent)?;
        }
        // By another order than by address it may send what belongs to other pieces meanwhile: they
        // are the shorter for it, and all are empty in the end.
        while let Some(runs) = self.unsent.take(piece.range) {
            let again = self.mark(&runs);
            sent.resent = sent.resent.saturating_add(again);
            let shared = Arc::clone(&self.shared);
            for part in runs.into_iter().flat_map(|run| shared.disks.split(run)) {
                if shared.disks.reaches(part) {
                    self.add_disk_part(part, &mut batch, &mut sent)?;
                } else {
                    self.add(part, &mut batch, &mut sent)?;
                }
            }
            self.flush(&mut batch, &mut sent)?;
        }
        Ok(sent)
    }

    /// Tells the large holes of frozen memory, which are most of it where a guest has touched little, all at once and
    /// not piece by piece among what is pushed.
    fn tell_holes(&mut self, sent: &mut SentPiece) -> io::Result<()> {
        let memory = PageRange::new(Pfn::new(0), self.shared.memory.page_count());
        let existing = self.shared.existing.all()?;
        let existing = existing.widened(self.shared.disks.pages());
        let mut batch = Batch::default();
        for hole in self.unsent.take_holes(memory, &existing) {
            batch.push(PushHeader::Zeros(hole));
            batch.pages -= hole.count.get();
            if batch.is_full() {
                self.flush(&mut batch, sent)?;
            }
        }
        self.flush(&mut batch, sent)
    }

    /// Adds frozen pages to a batch. Pages that never existed are told, but do not count as sent.
    fn add(&mut self, range: PageRange, batch: &mut Batch, sent: &mut SentPiece) -> io::Result<()> {
        let (parts, holes) = self.shared.parts(range)?;
        for part in parts {
            // What the target has of them, if anything, it was told to forget.
            self.put(part, false, batch, sent)?;
        }
        sent.pages = sent.pages.saturating_sub(holes);
        sent.zero_pages = sent.zero_pages.saturating_sub(holes);
        batch.pages -= holes.get();
        Ok(())
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
        for extent in self.shared.existing_in(range)? {
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

    fn flush(&mut self, batch: &mut Batch, sent: &mut SentPiece) -> io::Result<()> {
        let bytes = batch.bytes + self.coder.out.len() as u64;
        if bytes == 0 {
            return Ok(());
        }
        let waited = self.shared.take(bytes);
        self.look(waited)?;
        let began = thread_nanos();
        self.writer.send_parts(&self.shared.memory, &batch.parts)?;
        self.writer.write_all(&self.coder.out)?;
        self.coder.out.clear();
        let took = Duration::from_nanos(thread_nanos() - began);
        self.coder.sent(bytes, took);
        sent.bytes = sent.bytes.saturating_add(ByteCount::new(bytes));
        self.shared
            .pages_out
            .fetch_add(batch.pages, Ordering::Relaxed);
        *batch = Batch::default();
        Ok(())
    }

    /// Looks at the wire before the next bytes. With `waited`, these had to wait for earlier ones.
    fn look(&mut self, waited: bool) -> io::Result<()> {
        let (now, status) = (Instant::now(), self.writer.status()?);
        if let Some(passed) = self.meter.look(now, &status, waited) {
            self.coder.passed(passed);
        }
        let news = status.acknowledged.saturating_sub(self.acknowledged);
        self.acknowledged = status.acknowledged;
        let all = news + self.shared.acknowledged.fetch_add(news, Ordering::Relaxed);
        match self.pace.look(now, &status, all) {
            Some(rate) => self.writer.set_send_rate(rate),
            None => Ok(()),
        }
    }
}

impl Shared {
    pub(crate) fn new(
        memory: Arc<SharedMemory>,
        disks: Disks,
        is_serving: bool,
        limit: Arc<Bucket>,
        link: Arc<Bucket>,
        manner: &Manner,
    ) -> Self {
        Self {
            existing: ExistingPages::new(Arc::clone(&memory)),
            memory,
            ever_sent: Mutex::new(PageSet::empty(disks.pages())),
            unsent: Mutex::new(Arc::new(Unsent::new(disks.pages(), manner.chooser()))),
            is_serving: AtomicBool::new(is_serving),
            pages_out: AtomicU64::new(0),
            pulled_out: AtomicU64::new(0),
            acknowledged: AtomicU64::new(0),
            limit,
            link,
            coding: coding::Shared::new(manner.compression),
            disks,
        }
    }

    /// Takes `bytes` of what the operator and the emulated link let through, when it is their turn. Whether they
    /// had to wait.
    fn take(&self, bytes: u64) -> bool {
        let waited = self.limit.take(bytes);
        self.link.take(bytes) || waited
    }

    /// Waits until all that was taken has passed.
    fn settle(&self) {
        self.limit.settle();
        self.link.settle();
    }

    /// Takes them at once, for what somebody waits for.
    pub(crate) fn take_first(&self, bytes: u64) {
        self.limit.take_first(bytes);
        self.link.take_first(bytes);
    }

    /// The runs of pages of a piece that exist.
    fn existing_in(&self, range: PageRange) -> io::Result<Vec<PageRange>> {
        if self.disks.reaches(range) {
            self.disks.runs_in(range)
        } else {
            self.existing.runs_in(range)
        }
    }

    /// All pages that exist now, of memory and disks.
    pub(crate) fn all_existing(&self) -> io::Result<PageSet> {
        let mut all = self.existing.all()?.widened(self.disks.pages());
        for run in self.disks.runs()? {
            all.insert_range(run);
        }
        Ok(all)
    }

    /// Pages that went out without being asked for.
    pub(crate) fn pushed_out(&self) -> u64 {
        // Counted among the others first, so that the difference is none below zero.
        let pulled = self.pulled_out.load(Ordering::Acquire);
        self.pages_out.load(Ordering::Relaxed) - pulled
    }

    /// What to send for pages of frozen memory: content, or that they are zero; and how many of them
    /// never existed. Those are not read.
    pub(crate) fn parts(&self, range: PageRange) -> io::Result<(Vec<PushHeader>, PageCount)> {
        let extents = self.existing.runs_in(range)?;
        let existing = extents.iter().fold(PageCount::ZERO, |sum, extent| {
            sum.saturating_add(extent.count)
        });
        let exists = |page: Pfn| {
            let after = extents.partition_point(|extent| extent.first <= page);
            after > 0 && page < extents[after - 1].end()
        };
        let is_zero = |page| !exists(page) || self.memory.is_zero(page);
        let parts = split_by_content(range, is_zero).collect();
        Ok((parts, range.count.saturating_sub(existing)))
    }

    /// What is unsent by the present connections.
    pub(crate) fn unsent(&self) -> Arc<Unsent> {
        Arc::clone(&self.unsent.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Fresh connections begin: what earlier ones still take from their set is of no interest.
    pub(crate) fn renew_unsent(&self) {
        let chooser = self.unsent().chooser().renewed();
        let fresh = Arc::new(Unsent::new(self.disks.pages(), chooser));
        *self.unsent.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    }
}

impl Unsent {
    fn new(memory: PageCount, chooser: Chooser) -> Self {
        Self {
            pages: Mutex::new(PageSet::empty(memory)),
            chooser: Mutex::new(chooser),
            has_begun: AtomicBool::new(false),
        }
    }

    /// Access to the set.
    pub(crate) fn lock(&self) -> MutexGuard<'_, PageSet> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What chooses the next of them; locked after the set where both are.
    pub(crate) fn chooser(&self) -> MutexGuard<'_, Chooser> {
        self.chooser.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages were asked for and go now.
    pub(crate) fn asked_for(&self, range: PageRange) {
        self.lock().remove_range(range);
        self.chooser().asked_for(range);
    }

    /// True once: nothing has been pushed before.
    fn is_first_push(&self) -> bool {
        !self.has_begun.swap(true, Ordering::Relaxed)
    }

    /// Takes all long runs within `range` of which nothing exists.
    fn take_holes(&self, range: PageRange, existing: &PageSet) -> Vec<PageRange> {
        let mut unsent = self.lock();
        let mut absent = unsent.clone();
        absent.subtract(existing);
        let holes = absent.runs_in(range);
        let holes: Vec<PageRange> = holes.filter(|hole| hole.count >= HOLE_MIN).collect();
        holes.iter().for_each(|&hole| unsent.remove_range(hole));
        holes
    }

    /// Takes the next few pages while there are some within `range`.
    fn take(&self, range: PageRange) -> Option<Vec<PageRange>> {
        let mut unsent = self.lock();
        let max = PageCount::new(PUSH_PAGES);
        self.chooser().take(&mut unsent, range, max)
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
            _ => None,
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

trait Count {
    fn count(&mut self, part: PushHeader);
}

impl Count for SentPiece {
    fn count(&mut self, part: PushHeader) {
        if let PushHeader::Zeros(range) | PushHeader::Pages(range) = part {
            self.pages = self.pages.saturating_add(range.count);
            if matches!(part, PushHeader::Zeros(_)) {
                self.zero_pages = self.zero_pages.saturating_add(range.count);
            }
        }
    }
}

/// Pages behind one header: what keeps a batch near its limit.
const PART_PAGES: u64 = 128;

/// Splits a run into headers: pages with content and ranges of zero pages, each within its limit.
pub(crate) fn split_by_content(
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
                other => panic!("{other:?}"),
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

    #[test]
    fn long_holes_are_taken_at_once_and_short_ones_stay() {
        let (memory, all) = (PageCount::new(3000), PageCount::new(4000));
        let range =
            |first: u64, end: u64| PageRange::new(Pfn::new(first), PageCount::new(end - first));
        let unsent = Unsent::new(all, Chooser::new(PushOrder::Address, Arc::default()));
        unsent.lock().insert_range(range(0, 4000));
        // Somebody asked for it.
        unsent.lock().remove(Pfn::new(2400));
        let mut existing = PageSet::empty(all);
        existing.insert_range(range(600, 700));
        existing.insert_range(range(1211, 1212));
        assert!(unsent.is_first_push());
        let holes = unsent.take_holes(range(0, memory.get()), &existing);
        assert_eq!(holes, [range(0, 600), range(1212, 2400), range(2401, 3000)]);
        let left: Vec<PageRange> = unsent.lock().runs().collect();
        assert_eq!(left, [range(600, 1212), range(3000, 4000)]);
        assert!(!unsent.is_first_push());
    }
}
