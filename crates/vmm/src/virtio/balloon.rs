//! A balloon (virtio 1.2, section 5.5): memory that the guest gives up.
//!
//! It does so in two ways. Asked by its owner, its driver fills the balloon with pages that nobody else in
//! the guest can use then. And by itself it reports pages that are free, which it may use again at any time.
//! Both kinds become holes of the memory, so that the host has room for others and a move has less to carry;
//! when that is not the moment for it ([`limosa_os::memory::Reclaim`]), the driver is answered and the pages stay.
//!
//! The driver tells how much memory is free, once at its start and then whenever somebody has asked: by
//! keeping its buffer until then the device has nothing to save of it.
//!
//! Queues: filled, emptied, statistics if agreed on, reports. Where the reports' queue is depends on who
//! counts: Linux leaves out the queue of a feature that was not agreed on, the standard does not. So all
//! behind the statistics are theirs.
//!
//! Deliberately absent: hints about free pages while a guest is moved (`ARCHITECTURE.md` says why). What it has
//! reported before is not sent either.

use super::device::{Device, Ring, Served};
use super::places::Places;
use crate::answer::{BalloonInfo, GuestMemory};
use limosa_os::memory::{GuestView, Reclaim};
use limosa_pages::{ByteCount, PAGE_SIZE, PageCount};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Error as QueueError;

/// Features: statistics; pages that are taken back when memory is short, without a word; reports.
const STATISTICS_FEATURE: u32 = 1;
const DEFLATE_FEATURE: u32 = 2;
const REPORTS_FEATURE: u32 = 5;
/// Statistics: free, total and available memory.
const FREE: u16 = 4;
const TOTAL: u16 = 5;
const AVAILABLE: u16 = 6;
const FILLED: usize = 0;
const EMPTIED: usize = 1;
pub(super) const STATISTICS: usize = 2;
/// Most page numbers that one request may hold; Linux sends 256.
const NUMBERS_MAX: usize = 4096;
const NUMBER_BYTES: usize = 4;
/// Most statistics that are read; the standard knows ten, and each has ten bytes.
const STATISTICS_MAX: usize = 32;
const STATISTIC_BYTES: usize = 10;
/// Most pieces of a chain; Linux reports 32 at a time.
const PIECES_MAX: usize = QUEUE_SIZE as usize;
const QUEUE_SIZE: u16 = 128;

/// What a balloon is to hold, and what is known of its guest. Whoever asks waits for no request.
#[derive(Debug, Default)]
pub(super) struct Ledger(Mutex<Entries>);

#[derive(Debug, Default)]
struct Entries {
    target: PageCount,
    /// It is to hold so much at least while the guest is moved.
    lent: PageCount,
    /// The driver says that so much is in the balloon.
    held: PageCount,
    /// Since this machine was made here.
    reclaimed: PageCount,
    memory: Option<GuestMemory>,
    /// How often it was told.
    tellings: u64,
    is_there: bool,
    /// Somebody wants the statistics anew.
    is_asked: bool,
}

impl Entries {
    fn wanted(&self) -> PageCount {
        self.target.max(self.lent)
    }
}

impl Ledger {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_target(&self, target: PageCount) {
        self.entries().target = target;
    }

    /// The guest gives up so much at least until it has been moved.
    pub(super) fn lend(&self, least: PageCount) {
        self.entries().lent = least;
    }

    /// Wants the statistics anew.
    pub(super) fn ask(&self) {
        self.entries().is_asked = true;
    }

    /// What is known.
    pub(super) fn look(&self) -> BalloonInfo {
        let entries = self.entries();
        BalloonInfo {
            has_driver: entries.is_there,
            target: entries.wanted().bytes(),
            held: entries.held.bytes(),
            reclaimed: entries.reclaimed.bytes(),
            memory: entries.memory,
            tellings: entries.tellings,
        }
    }
}

/// A balloon as the guest has it.
#[derive(Debug)]
pub(super) struct Balloon {
    ledger: Arc<Ledger>,
    reclaim: Arc<Reclaim>,
    /// What the driver has taken.
    features: u64,
    /// The statistics that are queued were read.
    is_read: bool,
}

/// What of it moves.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    target: u64,
    lent: u64,
    held: u64,
}

impl Balloon {
    pub(super) fn new(ledger: Arc<Ledger>, reclaim: Arc<Reclaim>) -> Self {
        Self {
            ledger,
            reclaim,
            features: 0,
            is_read: false,
        }
    }

    const fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Takes these bytes of the guest's memory. What cannot be taken stays, which does no harm.
    fn take(&self, start: u64, bytes: u64) {
        match self.reclaim.take(start, bytes) {
            Ok(taken) => {
                let mut entries = self.ledger.entries();
                entries.reclaimed = entries.reclaimed.saturating_add(taken);
            }
            Err(error) => tracing::warn!(%error, "what the guest gives up stays in its memory"),
        }
    }

    /// Takes pages whose numbers the driver has written.
    fn fill(&self, mut from: Places, memory: &GuestView) -> Result<(), QueueError> {
        let len = usize::try_from(from.bytes()).unwrap_or(usize::MAX);
        if len > NUMBERS_MAX * NUMBER_BYTES {
            return Err(QueueError::InvalidChain);
        }
        let mut bytes = vec![0; len];
        let read = from.read(memory, &mut bytes);
        read.map_err(|_| QueueError::InvalidChain)?;
        let number = |word: &[u8; NUMBER_BYTES]| u64::from(u32::from_le_bytes(*word));
        let mut numbers: Vec<u64> = bytes.as_chunks().0.iter().map(number).collect();
        numbers.sort_unstable();
        for run in numbers.chunk_by(|page, next| next - page <= 1) {
            if let [first, .., last] | [first @ last] = run {
                self.take(first * PAGE_SIZE, (last + 1 - first) * PAGE_SIZE);
            }
        }
        Ok(())
    }

    /// Reads the driver's statistics once, and gives the buffer back when somebody wants new ones.
    fn count(&mut self, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        if !self.is_read {
            let [mut from, _] = Places::of(chain, ring.memory, PIECES_MAX)?;
            let len = usize::try_from(from.bytes()).unwrap_or(usize::MAX);
            let mut bytes = vec![0; len.min(STATISTICS_MAX * STATISTIC_BYTES)];
            let read = from.read(ring.memory, &mut bytes);
            read.map_err(|_| QueueError::InvalidChain)?;
            let mut entries = self.ledger.entries();
            entries.memory = Some(statistics(&bytes));
            entries.tellings += 1;
            drop(entries);
            self.is_read = true;
        }
        if std::mem::take(&mut self.ledger.entries().is_asked) {
            self.is_read = false;
            ring.finish(head, 0)?;
            return Ok(Served::Request);
        }
        ring.put_back(1);
        Ok(Served::NoInput)
    }
}

/// Reads what a driver tells of its guest's memory. What it does not tell is not known.
fn statistics(bytes: &[u8]) -> GuestMemory {
    let mut memory = GuestMemory::default();
    for statistic in bytes.as_chunks::<STATISTIC_BYTES>().0 {
        let [low, high, value @ ..] = *statistic;
        let value = Some(ByteCount::new(u64::from_le_bytes(value)));
        match u16::from_le_bytes([low, high]) {
            FREE => memory.free = value,
            TOTAL => memory.total = value,
            AVAILABLE => memory.available = value,
            _ => {}
        }
    }
    memory
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        let always = 1 << STATISTICS_FEATURE | 1 << DEFLATE_FEATURE;
        if self.reclaim.is_possible() {
            always | 1 << REPORTS_FEATURE
        } else {
            always
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; 5]
    }

    /// `struct virtio_balloon_config`: pages wanted and pages held.
    fn configuration(&self) -> Vec<u8> {
        let entries = self.ledger.entries();
        let word = |pages: PageCount| u32::try_from(pages.get()).unwrap_or(u32::MAX).to_le_bytes();
        [word(entries.wanted()), word(entries.held)].concat()
    }

    /// The driver says how many pages it holds.
    fn configure(&mut self, offset: u32, value: u32) {
        if offset == 4 {
            self.ledger.entries().held = PageCount::new(value.into());
        }
    }

    fn begin(&mut self, features: u64) {
        self.features = features;
        self.is_read = false;
        self.ledger.entries().is_there = true;
    }

    fn reset(&mut self) {
        self.features = 0;
        self.is_read = false;
        let mut entries = self.ledger.entries();
        entries.is_there = false;
        entries.held = PageCount::ZERO;
        entries.memory = None;
    }

    fn serve(&mut self, queue: usize, ring: &mut Ring<'_>) -> Result<Served, QueueError> {
        if queue == STATISTICS && self.has(STATISTICS_FEATURE) {
            return self.count(ring);
        }
        let Some(chain) = ring.next()? else {
            return Ok(Served::RingEmpty);
        };
        let head = chain.head_index();
        let [from, into] = Places::of(chain, ring.memory, PIECES_MAX)?;
        match queue {
            FILLED => self.fill(from, ring.memory)?,
            // What is taken back comes into being when the guest touches it.
            EMPTIED => {}
            _ => into
                .pieces()
                .for_each(|(start, bytes)| self.take(start.0, bytes.into())),
        }
        ring.finish(head, 0)?;
        Ok(Served::Request)
    }

    /// What it gave up for the move it may have back.
    fn arrive(&mut self) -> bool {
        std::mem::take(&mut self.ledger.entries().lent) > PageCount::ZERO
    }

    fn save(&self) -> Vec<u8> {
        let Self {
            ledger,
            // The memory's own.
            reclaim: _,
            // A part of the registers.
            features: _,
            // The buffer is queued still, and read again.
            is_read: _,
        } = self;
        let entries = ledger.entries();
        let saved = Saved {
            target: entries.target.get(),
            lent: entries.lent.get(),
            held: entries.held.get(),
        };
        postcard::to_extend(&saved, Vec::new()).expect("a state can always be written")
    }

    fn load(&mut self, bytes: &[u8]) -> Result<(), String> {
        let Ok((saved, [])) = postcard::take_from_bytes::<Saved>(bytes) else {
            return Err("it is no balloon's".to_owned());
        };
        let mut entries = self.ledger.entries();
        entries.target = PageCount::new(saved.target);
        entries.lent = PageCount::new(saved.lent);
        entries.held = PageCount::new(saved.held);
        Ok(())
    }
}
