//! What pages take on the wire: raw, compressed, or as the difference to what was sent before.
//!
//! ```text
//!  run of pages ─▶ worth coding? ─ no ─▶ raw, from the guest's memory, without a copy
//!                      │ yes
//!                      ▼ private copy
//!                  delta ─▶ lz4 or zstd ─▶ raw, from the copy: for each page the first that is shorter
//! ```
//!
//! Coding costs processor time and saves bytes. Each stream measures what a byte costs it on the wire
//! ([`WireMeter`]), and what a byte costs it in each coding, and codes where that comes cheaper together: on a
//! fast link nothing is coded, on a slow one all that shrinks is, by LZ4 or, where the wire is slower still,
//! by zstd. What is not in use is tried on a few pages now and then, so that a link that becomes slower, or
//! content that becomes simpler, is noticed; and so is sending pages as they are, since coded ones seldom
//! fill a wire and show that it has become faster.
//!
//! [`WireMeter`]: crate::wire_meter::WireMeter
//!
//! Invariant: the version of a page that [`Versions`] keeps is what the target has in its place. A
//! page that goes any other way is taken out.

use crate::wire_meter::Passed;
use limosa_engine::report::Coded;
use limosa_engine::wire::{CODED_LENGTH_BYTES, Coding, PUSH_HEADER_BYTES, PushHeader};
use limosa_os::SharedMemory;
use limosa_pages::codec::{delta, lz4, zstd};
use limosa_pages::{ByteCount, PAGE_SIZE_USIZE, PageCount, PageRange, Pfn};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whether pages are coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// Where it is quicker.
    #[default]
    Auto,
    /// Whatever shrinks.
    On,
    /// Nothing.
    Off,
    /// By LZ4 alone, what shrinks.
    Lz4,
    /// By zstd alone, what shrinks.
    Zstd,
    /// As differences alone, where those are shorter.
    Delta,
}

impl Compression {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Auto,
        Self::On,
        Self::Off,
        Self::Lz4,
        Self::Zstd,
        Self::Delta,
    ];

    /// As it is written in commands and files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Delta => "delta",
        }
    }

    /// Whether a page may go as the difference to what was sent before.
    const fn takes_deltas(self) -> bool {
        matches!(self, Self::Auto | Self::On | Self::Delta)
    }
}

/// Memory that versions of pages may take at the source. `[Cully08]` keeps as many, 8192.
const VERSIONS_BYTES: usize = 32 << 20;
/// Parts of the versions with a lock each, so that streams seldom meet.
const SHARDS: usize = 16;
/// A difference of this many bytes or more is no gain over compressing the page: three quarters of
/// it. `[Deshpande11]`
const DELTA_BYTES_MAX: usize = PAGE_SIZE_USIZE / 4 * 3;
/// Pages that are coded to see what that costs.
const PROBE_PAGES: u64 = 8;
/// Pages that go raw between two probes: less than a percent of the work.
const PROBE_EVERY: u64 = 2048;
/// Pages that are coded in the way that is not in use, to see what that costs.
const TRIAL_PAGES: u64 = 32;
/// Pages that go coded before others go as they are, to see what the wire takes; twice as many each time, up to
/// the other number.
const RAW_EVERY: u64 = 1024;
const RAW_EVERY_MAX: u64 = 65_536;
/// Samples of the wire that have come when this was seen: the first one may be of coded pages still.
const RAW_SAMPLES: u32 = 2;
/// Fewer bytes tell nothing of a wire of which nothing is known.
const FIRST_BYTES_MIN: u64 = 64 << 10;
/// What coding, or another way of it, has to win to be worth its noise.
const WORTH: f64 = 0.9;
/// A sample counts as at most so many times what was expected: a thread that lost its processor in a
/// probe of some microseconds says nothing about coding, and a machine that stood still nothing about the wire.
const SURPRISE_MAX: f64 = 2.0;

/// What all streams of a migration share about coding.
#[derive(Debug)]
pub(crate) struct Shared {
    compression: AtomicU8,
    versions: Versions,
}

impl Shared {
    pub(crate) fn new(compression: Compression) -> Self {
        Self {
            compression: AtomicU8::new(compression as u8),
            versions: Versions::new(VERSIONS_BYTES / PAGE_SIZE_USIZE),
        }
    }

    /// Changes what is coded from now on.
    pub(crate) fn set(&self, compression: Compression) {
        self.compression.store(compression as u8, Ordering::Relaxed);
    }

    pub(crate) fn compression(&self) -> Compression {
        let number = self.compression.load(Ordering::Relaxed);
        let known = Compression::ALL.into_iter();
        let mut same = known.filter(|compression| *compression as u8 == number);
        same.next().expect("only these are stored")
    }

    /// These pages are sent raw, or are not at the target any more.
    pub(crate) fn forget(&self, range: PageRange) {
        self.versions.forget(range);
    }
}

/// What one stream knows about costs, and its buffers.
#[derive(Debug)]
pub(crate) struct Coder {
    costs: Costs,
    content: Vec<u8>,
    zstd: zstd::Encoder,
    /// What is not told by differences is to be made shorter by this, in what is encoded next.
    packing: Option<Packing>,
    raw_since_probe: u64,
    coded_since_trial: u64,
    coded_since_raw: u64,
    raw_every: u64,
    /// Samples of the wire for which pages go as they are.
    raw_samples: u32,
    /// Headers and coded pages that wait to be written.
    pub(crate) out: Vec<u8>,
}

/// How pages are made shorter as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Lz4,
    Zstd,
}

impl Packing {
    const fn other(self) -> Self {
        match self {
            Self::Lz4 => Self::Zstd,
            Self::Zstd => Self::Lz4,
        }
    }

    const fn coding(self) -> Coding {
        match self {
            Self::Lz4 => Coding::Lz4,
            Self::Zstd => Coding::Zstd,
        }
    }
}

/// Moving averages of seconds a byte: what the wire takes, what handing it to the kernel costs, and the codings.
#[derive(Clone, Copy, Debug)]
struct Costs {
    wire: Option<f64>,
    sending: f64,
    lz4: Cost,
    zstd: Cost,
    preferred: Packing,
}

/// Seconds a byte, and what is left of one, differences on the way included; moving averages.
#[derive(Clone, Copy, Debug)]
struct Cost {
    coding: f64,
    ratio: f64,
}

/// What of a run of pages was coded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) lz4: Coded,
    pub(crate) zstd: Coded,
    pub(crate) delta: Coded,
}

impl Coder {
    pub(crate) fn new() -> Self {
        Self {
            costs: Costs {
                wire: None,
                // Until there is something better: what they do on common machines, and on common pages.
                sending: 1.0 / 2.5e9,
                lz4: Cost {
                    coding: 1.0 / 1e9,
                    ratio: 0.6,
                },
                zstd: Cost {
                    coding: 1.0 / 350e6,
                    ratio: 0.5,
                },
                preferred: Packing::Lz4,
            },
            content: Vec::new(),
            zstd: zstd::Encoder::new(),
            packing: None,
            raw_since_probe: PROBE_EVERY,
            coded_since_trial: PROBE_EVERY,
            coded_since_raw: 0,
            raw_every: RAW_EVERY,
            raw_samples: 0,
            out: Vec::new(),
        }
    }

    /// How many pages of the run, from its first on, are to be encoded next; none if all of it goes
    /// raw. Otherwise the rest has to be asked for anew.
    pub(crate) fn wanted(&mut self, shared: &Shared, range: PageRange) -> PageCount {
        let packing = match shared.compression() {
            Compression::Off => return PageCount::ZERO,
            Compression::Lz4 => Some(Packing::Lz4),
            Compression::Zstd => Some(Packing::Zstd),
            Compression::Delta => None,
            Compression::On => return self.coded(range.count),
            Compression::Auto if self.costs.is_worth() => return self.coded_mostly(range.count),
            Compression::Auto => return self.probed(range.count),
        };
        self.packing = packing;
        range.count
    }

    /// As [`Coder::coded`], but now and then none of them, until the wire was seen with them.
    fn coded_mostly(&mut self, count: PageCount) -> PageCount {
        if self.coded_since_raw >= self.raw_every {
            self.coded_since_raw = 0;
            self.raw_every = RAW_EVERY_MAX.min(2 * self.raw_every);
            self.raw_samples = RAW_SAMPLES;
        }
        if self.raw_samples > 0 {
            return PageCount::ZERO;
        }
        let count = self.coded(count);
        self.coded_since_raw = self.coded_since_raw.saturating_add(count.get());
        count
    }

    /// All of them in the way that is cheaper, or a few in the other.
    fn coded(&mut self, count: PageCount) -> PageCount {
        self.packing = Some(self.costs.preferred);
        if self.costs.wire.is_none() || self.coded_since_trial < PROBE_EVERY {
            self.coded_since_trial = self.coded_since_trial.saturating_add(count.get());
            return count;
        }
        self.coded_since_trial = 0;
        self.packing = Some(self.costs.preferred.other());
        PageCount::new(TRIAL_PAGES.min(count.get()))
    }

    /// None of them, or a few in each way by turns.
    fn probed(&mut self, count: PageCount) -> PageCount {
        (self.coded_since_raw, self.raw_every, self.raw_samples) = (0, RAW_EVERY, 0);
        self.raw_since_probe = self.raw_since_probe.saturating_add(count.get());
        if self.costs.wire.is_none() || self.raw_since_probe <= PROBE_EVERY {
            return PageCount::ZERO;
        }
        self.raw_since_probe = 0;
        self.packing = Some(self.packing.map_or(Packing::Lz4, Packing::other));
        PageCount::new(PROBE_PAGES.min(count.get()))
    }

    /// So much has passed the wire.
    pub(crate) fn passed(&mut self, passed: Passed) {
        let is_raw = self.raw_samples > 0;
        self.raw_samples = self.raw_samples.saturating_sub(1);
        let cost = passed.cost();
        let Some(wire) = self.costs.wire else {
            let is_told = passed.is_full || passed.bytes >= FIRST_BYTES_MIN;
            self.costs.wire = is_told.then_some(cost);
            return;
        };
        let cost = cost.min(wire * SURPRISE_MAX);
        // Of a wire that had nothing to send meanwhile no more is known than that it takes no longer.
        if passed.is_full || cost <= wire {
            // What was tried for that alone counts in full.
            let is_tried = is_raw && cost < wire;
            let weight = if is_tried { 1.0 } else { weight(passed.bytes) };
            self.costs.wire = Some(wire + (cost - wire) * weight);
            self.costs.prefer();
        }
    }

    /// To hand `bytes` to the kernel took so much of a processor.
    pub(crate) fn sent(&mut self, bytes: u64, took: Duration) {
        let cost = took.as_secs_f64() / bytes.max(1) as f64;
        self.costs.sending += (cost - self.costs.sending) * weight(bytes);
    }

    /// Appends a run of pages to [`Coder::out`], each in the shortest form of those that
    /// [`Coder::wanted`] chose. With `is_again`, they were sent before, and may be sent once more.
    pub(crate) fn encode(
        &mut self,
        shared: &Shared,
        memory: &SharedMemory,
        range: PageRange,
        is_again: bool,
    ) -> io::Result<Outcome> {
        let began = Instant::now();
        let bytes = usize::try_from(range.bytes().get()).map_err(io::Error::other)?;
        let mut content = std::mem::take(&mut self.content);
        content.resize(bytes, 0);
        memory.read_at(range.first.file_offset(), &mut content)?;
        let outcome = self.encode_content(shared, &content, range, is_again, began);
        self.content = content;
        Ok(outcome)
    }

    /// The same for pages with that content, the work with which has `began`.
    pub(crate) fn encode_content(
        &mut self,
        shared: &Shared,
        content: &[u8],
        range: PageRange,
        is_again: bool,
        began: Instant,
    ) -> Outcome {
        let is_again = is_again && shared.compression().takes_deltas();
        if !is_again {
            shared.forget(range);
        }
        let before = self.out.len();
        let mut outcome = Outcome::default();
        let mut rest = range;
        while rest.count > PageCount::ZERO {
            let at = (rest.first.get() - range.first.get()) as usize * PAGE_SIZE_USIZE;
            let pages = &content[at..];
            let deltas = self.encode_deltas(shared, rest, pages, is_again);
            if deltas.pages > PageCount::ZERO {
                rest = after(rest, deltas.pages);
                outcome.delta.add(deltas);
                continue;
            }
            let (count, packed) = self.encode_others(shared, rest, pages, is_again);
            match self.packing {
                Some(Packing::Zstd) => outcome.zstd.add(packed),
                _ => outcome.lz4.add(packed),
            }
            rest = after(rest, count);
        }
        let ratio = (self.out.len() - before) as f64 / content.len() as f64;
        if let Some(packing) = self.packing {
            let bytes = content.len() as u64;
            self.costs.coded(packing, bytes, ratio, began.elapsed());
        }
        outcome
    }

    /// The pages at the front of the run of which the target has a version that is like them.
    fn encode_deltas(
        &mut self,
        shared: &Shared,
        range: PageRange,
        pages: &[u8],
        is_again: bool,
    ) -> Coded {
        let mut done = Coded::default();
        if !is_again {
            return done;
        }
        let header_at = self.out.len();
        self.out
            .resize(header_at + PUSH_HEADER_BYTES + CODED_LENGTH_BYTES, 0);
        let body_at = self.out.len();
        for (page, content) in range.iter().zip(pages.chunks_exact(PAGE_SIZE_USIZE)) {
            if !shared.versions.encode_delta(page, content, &mut self.out) {
                break;
            }
            done.pages = done.pages.saturating_add(PageCount::new(1));
        }
        if done.pages == PageCount::ZERO {
            self.out.truncate(header_at);
            return done;
        }
        done.bytes = ByteCount::new((self.out.len() - body_at) as u64);
        self.finish(
            header_at,
            PageRange::new(range.first, done.pages),
            Coding::Delta,
        );
        done
    }

    /// The pages before the next one of which the target has a version: compressed if that is
    /// shorter. How many these are, and what they took if they were.
    fn encode_others(
        &mut self,
        shared: &Shared,
        range: PageRange,
        pages: &[u8],
        is_again: bool,
    ) -> (PageCount, Coded) {
        let mut count = 0;
        for (page, content) in range.iter().zip(pages.chunks_exact(PAGE_SIZE_USIZE)) {
            // The first one has been found to have none that is like it.
            if count > 0 && is_again && shared.versions.has(page) {
                break;
            }
            if is_again {
                shared.versions.keep(page, content);
            }
            count += 1;
        }
        let range = PageRange::new(range.first, PageCount::new(count));
        let pages = &pages[..count as usize * PAGE_SIZE_USIZE];
        let header_at = self.out.len();
        self.out
            .resize(header_at + PUSH_HEADER_BYTES + CODED_LENGTH_BYTES, 0);
        let body_at = self.out.len();
        let is_shorter = match self.packing {
            Some(Packing::Lz4) => lz4::encode(pages, &mut self.out),
            Some(Packing::Zstd) => self.zstd.encode(pages, &mut self.out),
            None => false,
        };
        if let Some(packing) = self.packing.filter(|_| is_shorter) {
            let bytes = ByteCount::new((self.out.len() - body_at) as u64);
            self.finish(header_at, range, packing.coding());
            let pages = range.count;
            return (range.count, Coded { pages, bytes });
        }
        self.out.truncate(header_at);
        self.out
            .extend_from_slice(&PushHeader::Pages(range).encode());
        self.out.extend_from_slice(pages);
        (range.count, Coded::default())
    }

    /// Fills in the header and the length of what was appended behind them.
    fn finish(&mut self, header_at: usize, range: PageRange, coding: Coding) {
        let length_at = header_at + PUSH_HEADER_BYTES;
        let length = self.out.len() - length_at - CODED_LENGTH_BYTES;
        let length = u32::try_from(length).expect("shorter than its pages");
        self.out[header_at..length_at]
            .copy_from_slice(&PushHeader::Coded { range, coding }.encode());
        self.out[length_at..length_at + CODED_LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    }
}

impl Costs {
    fn is_worth(&self) -> bool {
        self.wire
            .is_some_and(|wire| self.with(self.preferred, wire) < WORTH * wire)
    }

    /// Seconds for a byte from the guest's memory to the wire's other end. While the wire carries what was coded the
    /// next pages are, so the slower of the two counts.
    fn with(&self, packing: Packing, wire: f64) -> f64 {
        let Cost { coding, ratio } = *self.of(packing);
        (ratio * wire).max(coding + ratio * self.sending)
    }

    const fn of(&self, packing: Packing) -> &Cost {
        match packing {
            Packing::Lz4 => &self.lz4,
            Packing::Zstd => &self.zstd,
        }
    }

    /// Takes the other way of coding where that has become cheaper.
    fn prefer(&mut self) {
        let other = self.preferred.other();
        let is_cheaper = self
            .wire
            .is_some_and(|wire| self.with(other, wire) < WORTH * self.with(self.preferred, wire));
        if is_cheaper {
            self.preferred = other;
        }
    }

    fn coded(&mut self, packing: Packing, bytes: u64, ratio: f64, took: Duration) {
        let cost = match packing {
            Packing::Lz4 => &mut self.lz4,
            Packing::Zstd => &mut self.zstd,
        };
        let weight = (bytes as f64 / (256 << 10) as f64).clamp(0.05, 0.5);
        let coding = (took.as_secs_f64() / bytes as f64).min(cost.coding * SURPRISE_MAX);
        cost.coding += (coding - cost.coding) * weight;
        cost.ratio += (ratio - cost.ratio) * weight;
        self.prefer();
    }
}

/// Of a sample of so many bytes in a moving average: a little says little.
fn weight(bytes: u64) -> f64 {
    (bytes as f64 / (1 << 20) as f64).min(0.5)
}

/// What comes behind the first `count` pages of the range.
pub(crate) fn after(range: PageRange, count: PageCount) -> PageRange {
    PageRange::new(
        range.first.advance(count),
        range.count.saturating_sub(count),
    )
}

/// Versions of pages as the target has them.
#[derive(Debug)]
struct Versions {
    shards: Vec<Mutex<Shard>>,
    /// So that a migration that keeps none pays nothing for it.
    kept: AtomicU64,
    pages_max: usize,
}

#[derive(Debug, Default)]
struct Shard {
    pages: HashMap<Pfn, Box<[u8; PAGE_SIZE_USIZE]>>,
    turned_away: u32,
}

impl Versions {
    fn new(pages_max: usize) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            kept: AtomicU64::new(0),
            pages_max: pages_max / SHARDS,
        }
    }

    fn shard(&self, page: Pfn) -> MutexGuard<'_, Shard> {
        // Neighbours together: a run is looked up under one lock after the other.
        let shard = (page.get() / 64) as usize % SHARDS;
        self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, page: Pfn) -> bool {
        self.kept.load(Ordering::Relaxed) > 0 && self.shard(page).pages.contains_key(&page)
    }

    /// Appends the length of the difference and the difference itself, if there is a version that is
    /// like this one, which takes its place.
    fn encode_delta(&self, page: Pfn, content: &[u8], out: &mut Vec<u8>) -> bool {
        if self.kept.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let mut shard = self.shard(page);
        let Some(version) = shard.pages.get_mut(&page) else {
            return false;
        };
        let length_at = out.len();
        out.extend_from_slice(&[0; 2]);
        if !delta::encode(version.as_slice(), content, DELTA_BYTES_MAX, out) {
            out.truncate(length_at);
            return false;
        }
        let length = (out.len() - length_at - 2) as u16;
        out[length_at..length_at + 2].copy_from_slice(&length.to_le_bytes());
        version.copy_from_slice(content);
        true
    }

    /// Keeps a version. Where there is no room, one of eight takes the place of another: a working set
    /// larger than that keeps most of what it has, instead of losing each page before it comes again.
    fn keep(&self, page: Pfn, content: &[u8]) {
        let mut shard = self.shard(page);
        if let Some(version) = shard.pages.get_mut(&page) {
            version.copy_from_slice(content);
            return;
        }
        if shard.pages.len() >= self.pages_max {
            shard.turned_away += 1;
            if !shard.turned_away.is_multiple_of(8) {
                return;
            }
            let Some(other) = shard.pages.keys().next().copied() else {
                return;
            };
            let mut place = shard.pages.remove(&other).expect("it was found just now");
            place.copy_from_slice(content);
            shard.pages.insert(page, place);
            return;
        }
        let mut version = Box::new([0; PAGE_SIZE_USIZE]);
        version.copy_from_slice(content);
        shard.pages.insert(page, version);
        self.kept.fetch_add(1, Ordering::Relaxed);
    }

    fn forget(&self, range: PageRange) {
        if self.kept.load(Ordering::Relaxed) == 0 {
            return;
        }
        for page in range.iter() {
            if self.shard(page).pages.remove(&page).is_some() {
                self.kept.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire_meter::WireMeter;
    use limosa_engine::wire::check_coded_length;
    use limosa_os::PageKind;
    use limosa_os::socket::TcpStatus;

    const PAGES: u64 = 512;

    fn memory() -> SharedMemory {
        SharedMemory::create(PageCount::new(PAGES).bytes(), PageKind::Small).unwrap()
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(Pfn::new(first), PageCount::new(count))
    }

    /// Bytes that shrink, to `noise` places the same as before, and otherwise not.
    fn write(memory: &SharedMemory, page: u64, text: u8, noise: usize) {
        let mut content = [text; PAGE_SIZE_USIZE];
        let mut state = page + 1;
        for place in content.iter_mut().take(noise) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *place = (state >> 56) as u8;
        }
        memory
            .write_at(Pfn::new(page).file_offset(), &content)
            .unwrap();
    }

    /// What a target makes of it: the forms in which pages came.
    fn apply(mut out: &[u8], memory: &SharedMemory) -> String {
        let mut forms = Vec::new();
        while !out.is_empty() {
            let header = out[..PUSH_HEADER_BYTES].try_into().unwrap();
            out = &out[PUSH_HEADER_BYTES..];
            let header = PushHeader::decode(&header, memory.page_count()).unwrap();
            let (range, coding) = match header {
                PushHeader::Pages(range) => (range, None),
                PushHeader::Coded { range, coding } => (range, Some(coding)),
                other => panic!("{other:?}"),
            };
            let mut content = vec![0; range.bytes().get() as usize];
            let offset = range.first.file_offset();
            let length = match coding {
                None => content.len(),
                Some(_) => {
                    let length = out[..CODED_LENGTH_BYTES].try_into().unwrap();
                    out = &out[CODED_LENGTH_BYTES..];
                    check_coded_length(length, range).unwrap()
                }
            };
            let (bytes, rest) = out.split_at(length);
            match coding {
                None => content.copy_from_slice(bytes),
                Some(Coding::Lz4) => lz4::decode(bytes, &mut content).unwrap(),
                Some(Coding::Zstd) => zstd::Decoder::new().decode(bytes, &mut content).unwrap(),
                Some(Coding::Delta) => {
                    memory.read_at(offset, &mut content).unwrap();
                    crate::receiver::decode_deltas(bytes, &mut content).unwrap();
                }
            }
            memory.write_at(offset, &content).unwrap();
            out = rest;
            let form = coding.map_or("raw".to_owned(), |coding| format!("{coding:?}"));
            forms.push(format!(
                "{form} {}+{}",
                range.first.get(),
                range.count.get()
            ));
        }
        forms.join(", ").to_lowercase()
    }

    #[test]
    fn pages_go_in_the_shortest_form_and_arrive_as_they_were() {
        let (source, target) = (memory(), memory());
        let shared = Shared::new(Compression::On);
        let mut coder = Coder::new();
        let mut check = |range: PageRange, is_again: bool, expect: &str| {
            coder.out.clear();
            assert_eq!(coder.wanted(&shared, range), range.count);
            let outcome = coder.encode(&shared, &source, range, is_again).unwrap();
            let Outcome { lz4, zstd, delta } = outcome;
            let coded = lz4.pages.get() + zstd.pages.get() + delta.pages.get();
            assert!(coded <= range.count.get());
            let most = range.bytes().get() + range.count.get() * PUSH_HEADER_BYTES as u64;
            assert!(coder.out.len() as u64 <= most);
            assert_eq!(apply(&coder.out, &target), expect);
            for page in range.iter() {
                assert_eq!(source.hash(page), target.hash(page), "{page:?}");
            }
        };
        (0..8).for_each(|page| write(&source, page, 1, 0));
        (8..12).for_each(|page| write(&source, page, 0, PAGE_SIZE_USIZE));
        check(range(0, 8), false, "lz4 0+8");
        check(range(8, 4), false, "raw 8+4");
        // The second time they are kept, from the third time on they can be told by differences.
        check(range(0, 12), true, "lz4 0+12");
        write(&source, 3, 1, 40);
        write(&source, 9, 7, 100);
        check(range(0, 12), true, "delta 0+9, lz4 9+1, delta 10+2");
        write(&source, 9, 7, 120);
        check(range(9, 1), true, "delta 9+1");
        // What went another way is not there any more.
        shared.forget(range(0, 4));
        check(range(0, 6), true, "lz4 0+4, delta 4+2");
        // In one way alone; what goes without being kept is no version any more.
        shared.set(Compression::Zstd);
        check(range(0, 3), true, "zstd 0+3");
        check(range(9, 2), false, "zstd 9+2");
        shared.set(Compression::Delta);
        check(range(0, 6), true, "raw 0+3, delta 3+3");
        check(range(0, 6), true, "delta 0+6");
        shared.set(Compression::Lz4);
        check(range(0, 2), true, "lz4 0+2");
    }

    /// A mebibyte took so long, on a wire that was never idle.
    fn full(took: Duration) -> Passed {
        Passed {
            bytes: 1 << 20,
            took,
            is_full: true,
        }
    }

    #[test]
    fn a_slower_wire_takes_the_shorter_coding() {
        let shared = Shared::new(Compression::On);
        let mut coder = Coder::new();
        let all = range(0, 128);
        let mut learn = |wire: Duration| {
            // LZ4 leaves 60 % at 1 GB/s, zstd 20 % at 250 MB/s.
            for _ in 0..40 {
                coder.passed(full(wire));
                let mebibyte = 1 << 20;
                let took = Duration::from_millis(1);
                coder.costs.coded(Packing::Lz4, mebibyte, 0.6, took);
                coder.costs.coded(Packing::Zstd, mebibyte, 0.2, took * 4);
            }
            let mut trial = None;
            for _ in 0..2 * PROBE_EVERY / 128 {
                let count = coder.wanted(&shared, all).get();
                match coder.packing.unwrap() {
                    packing if packing == coder.costs.preferred => assert_eq!(count, 128),
                    packing => {
                        assert_eq!(count, TRIAL_PAGES);
                        trial = Some(packing);
                    }
                }
            }
            (coder.costs.preferred, trial.expect("the other is tried"))
        };
        // 1 GB a second: a mebibyte takes a little over 1 ms against 4.
        assert_eq!(
            learn(Duration::from_millis(1)),
            (Packing::Lz4, Packing::Zstd)
        );
        // 100 MB a second: 6 ms against a little over 4. Back it has to be a tenth cheaper.
        assert_eq!(
            learn(Duration::from_millis(10)),
            (Packing::Zstd, Packing::Lz4)
        );
        assert_eq!(
            learn(Duration::from_micros(6300)),
            (Packing::Zstd, Packing::Lz4)
        );
        assert_eq!(
            learn(Duration::from_millis(3)),
            (Packing::Lz4, Packing::Zstd)
        );
    }

    #[test]
    fn a_fast_wire_takes_pages_as_they_are() {
        let shared = Shared::new(Compression::Auto);
        let mut coder = Coder::new();
        let all = range(0, 128);
        let wanted = |coder: &mut Coder| coder.wanted(&shared, all).get();
        assert_eq!(wanted(&mut coder), 0, "nothing is known of the wire");
        coder.passed(full(Duration::from_micros(300)));
        assert_eq!(wanted(&mut coder), PROBE_PAGES, "the first look");
        let probes = (0..2 * PROBE_EVERY / 128)
            .map(|_| wanted(&mut coder))
            .sum::<u64>();
        assert!(
            (PROBE_PAGES..=2 * PROBE_PAGES).contains(&probes),
            "{probes}"
        );
        // 100 MB a second.
        (0..40).for_each(|_| coder.passed(full(Duration::from_millis(10))));
        assert_eq!(wanted(&mut coder), TRIAL_PAGES, "zstd is tried at first");
        assert_eq!(wanted(&mut coder), 128);
        // What does not shrink is not coded on any wire.
        for packing in [Packing::Lz4, Packing::Zstd] {
            let took = Duration::from_millis(1);
            (0..40).for_each(|_| coder.costs.coded(packing, 1 << 20, 1.0, took));
        }
        let mut tried = Vec::new();
        for _ in 0..4 * PROBE_EVERY / 128 {
            let count = wanted(&mut coder);
            assert!(count <= PROBE_PAGES);
            tried.extend(coder.packing.filter(|_| count > 0));
        }
        assert!(tried.windows(2).all(|pair| pair[0] != pair[1]), "{tried:?}");
        assert!(tried.len() >= 3, "{tried:?}");
        shared.set(Compression::On);
        assert_eq!(wanted(&mut coder), 128);
        shared.set(Compression::Off);
        assert_eq!(wanted(&mut coder), 0);
    }

    /// Pages of 65,536 that go coded over a wire of so many bytes a second. LZ4 makes a tenth of them at 2 GB/s.
    fn coded_over(rate: f64, coder: &mut Coder, meter: &mut WireMeter) -> u64 {
        let shared = Shared::new(Compression::Auto);
        let (mut now, mut sent, mut passed, mut coded) = (Instant::now(), 1.0, 1.0, 0);
        meter.rest();
        for _ in 0..65_536 / 128 {
            let before = now;
            let count = coder.wanted(&shared, range(0, 128)).get();
            coded += count;
            now += Duration::from_micros(2 * count);
            if count > 0 {
                let took = Duration::from_micros(500);
                coder.costs.coded(Packing::Lz4, 1 << 20, 0.1, took);
                coder.costs.coded(Packing::Zstd, 1 << 20, 0.1, took * 8);
            }
            // To hand it over takes time, too, and at most so much of it waits.
            now += Duration::from_micros(50);
            let room = (sent - passed - 4e5_f64).max(0.0) / rate;
            now += Duration::from_secs_f64(room);
            passed = f64::min(sent, passed + rate * (now - before).as_secs_f64());
            let status = TcpStatus {
                acknowledged: passed as u64,
                unsent: (sent - passed) as u64,
                ..TcpStatus::default()
            };
            if let Some(passed) = meter.look(now, &status, false) {
                coder.passed(passed);
            }
            let raw = (128 - count) as f64;
            sent += (raw + count as f64 / 10.0) * PAGE_SIZE_USIZE as f64;
        }
        coded
    }

    #[test]
    fn a_wire_that_becomes_faster_or_slower_is_noticed() {
        let (mut coder, mut meter) = (Coder::new(), WireMeter::default());
        let mut coded = |rate| coded_over(rate, &mut coder, &mut meter);
        assert!(coded(1e8) > 60_000);
        // Coded pages do not fill it, so that it takes a while.
        let first = coded(5e9);
        let second = coded(5e9);
        assert!(first < 60_000 && second < 1_000, "{first} {second}");
        let third = coded(1e8);
        assert!(third > 60_000, "{third}");
    }

    #[test]
    fn versions_take_no_more_than_their_share() {
        let versions = Versions::new(SHARDS * 2);
        let content = [1; PAGE_SIZE_USIZE];
        (0..PAGES * 64).for_each(|page| versions.keep(Pfn::new(page), &content));
        let kept: usize = (0..SHARDS as u64)
            .map(|shard| versions.shard(Pfn::new(shard * 64)).pages.len())
            .sum();
        assert_eq!(kept, SHARDS * 2);
        assert_eq!(versions.kept.load(Ordering::Relaxed), kept as u64);
        versions.forget(range(0, PAGES * 64));
        assert_eq!(versions.kept.load(Ordering::Relaxed), 0);
    }
}
