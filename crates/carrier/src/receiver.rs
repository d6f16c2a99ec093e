//! A push stream at the target: pages from one socket straight into the guest's memory.
//!
//! One thread a stream. Until the guest's state is loaded nobody else touches that memory, so the
//! pages are received in place; scattered ones go through a small buffer that saves system calls, and
//! runs for which nothing was there through one from which the file is written ([`Gathered`]).
//! From then on the memory is the guest's: after [`Shared::seal`] nothing is installed any more,
//! whatever a peer sends; after [`Shared::serve`] pages are received into a buffer of the stream and
//! put in by the installer, at most once and never over what the guest wrote.

mod disk_pages;
mod gathered;

use crate::channel::Reader;
use crate::digest::PageHashes;
use crate::disks::Disks;
use crate::faults::{Faults, Way};
use crate::missing;
use crate::modesty::be_modest;
use gathered::Gathered;
use limosa_engine::wire::{
    CODED_LENGTH_BYTES, Coding, PUSH_HEADER_BYTES, PushHeader, WireError, bits_bytes,
    check_coded_length,
};
use limosa_os::SharedMemory;
use limosa_os::disk::DiskBuffer;
use limosa_os::userfault::InstallError;
use limosa_pages::codec::{CodecError, delta, lz4, zstd};
use limosa_pages::{PAGE_SIZE_USIZE, PageCount, PageRange, PageSet};
use std::io::{self, Read};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes read ahead: many headers with their scattered pages in one system call.
const BUFFER_BYTES: usize = 128 << 10;

/// Fewer pages are not worth the way over a buffer.
const DETOUR_PAGES_MIN: PageCount = PageCount::new(16);

/// More zero pages are not worth being written among others.
const ZEROS_GATHERED_MAX: PageCount = PageCount::new(64);

/// What a stream reports.
#[derive(Debug)]
pub(crate) enum Report {
    Barrier {
        stream: u8,
        round: u32,
        streams: u8,
    },
    Broken {
        reason: String,
    },
    /// Nothing is missing any more.
    Filled,
    /// A page could not be put under the guest, or onto a disk.
    NotInstalled {
        reason: String,
    },
}

/// Whose the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Owner {
    /// The streams': pages are written in place.
    Streams,
    /// The guest's, which misses pages.
    Filling,
    /// The guest's alone.
    Guest,
}

/// What holds for whoever writes the memory file.
#[derive(Debug, Default)]
struct Writing {
    /// Pages are missing, which must not come into being beside others.
    is_any_missing: bool,
}

/// What all streams of an arriving guest share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<SharedMemory>,
    /// Disks that are copied along.
    disks: Arc<Disks>,
    /// Pages with content. A zero page that was never there needs no work.
    pub(crate) filled: Mutex<PageSet>,
    /// With verification: the hash of each page as installed.
    pub(crate) hashes: Option<PageHashes>,
    /// What puts pages under a guest that runs; `None` if none ever will be.
    pub(crate) faults: Option<Arc<Faults>>,
    pub(crate) pages_received: AtomicU64,
    pub(crate) bytes_received: AtomicU64,
    owner: AtomicU8,
    /// Held while pages are written into the memory file: the kernel lets one at a time do it, and
    /// has the others spin.
    writing: Mutex<Writing>,
}

impl Shared {
    pub(crate) fn new(
        memory: Arc<SharedMemory>,
        disks: Arc<Disks>,
        verify: bool,
        faults: Option<Arc<Faults>>,
    ) -> Self {
        let pages = disks.pages();
        memory.make_single_pages();
        Self {
            memory,
            disks,
            filled: Mutex::new(PageSet::empty(pages)),
            hashes: verify.then(|| PageHashes::new(pages)),
            faults,
            pages_received: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            owner: AtomicU8::new(Owner::Streams as u8),
            writing: Mutex::default(),
        }
    }

    /// From now on no page is installed.
    pub(crate) fn seal(&self) {
        self.owner.store(Owner::Guest as u8, Ordering::SeqCst);
    }

    /// From now on pages are put under a guest that runs, or will.
    pub(crate) fn serve(&self) {
        self.owner.store(Owner::Filling as u8, Ordering::SeqCst);
    }

    /// True while the guest runs, or will, and pages are put under it.
    pub(crate) fn is_filling(&self) -> bool {
        self.owner() == Owner::Filling
    }

    fn owner(&self) -> Owner {
        match self.owner.load(Ordering::SeqCst) {
            0 => Owner::Streams,
            1 => Owner::Filling,
            _ => Owner::Guest,
        }
    }

    /// Writes fresh pages, into the memory file where that is the fastest way and makes no others
    /// that matter.
    fn write_fresh(&self, range: PageRange, content: &[u8]) -> io::Result<()> {
        let offset = range.first.file_offset();
        // Of less than half a huge page, most would be zeros.
        let is_worth_it = |unit: PageCount| range.count.get() * 2 >= unit.get();
        if let Some(unit) = self.memory.write_unit().filter(|&unit| is_worth_it(unit)) {
            let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            if unit == PageCount::new(1) || !writing.is_any_missing {
                return self.memory.write_file_at(offset, content);
            }
        }
        self.memory.write_at(offset, content)
    }

    /// From here on pages are missing. Whatever is being written into the file is there when this
    /// returns.
    fn expect_missing(&self) {
        let mut writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        writing.is_any_missing = true;
    }

    /// A header of a stream, about pages of memory or of one disk.
    pub(crate) fn decode(&self, bytes: &[u8; PUSH_HEADER_BYTES]) -> Result<PushHeader, WireError> {
        let header = PushHeader::decode(bytes, self.disks.pages())?;
        if let Some(range) = header.range() {
            self.disks.check(range)?;
        }
        Ok(header)
    }

    fn filled(&self) -> MutexGuard<'_, PageSet> {
        self.filled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn count(&self, pages: PageCount, bytes: u64) {
        self.pages_received
            .fetch_add(pages.get(), Ordering::Relaxed);
        self.bytes_received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Puts received pages under the guest and keeps their hashes; whether somebody asked for them
    /// makes no difference.
    pub(crate) fn put_in(
        &self,
        faults: &Faults,
        range: PageRange,
        content: &[u8],
        way: Way,
    ) -> Result<(), InstallError> {
        // Before they are visible: a guest that writes them must not be hashed.
        if let Some(hashes) = &self.hashes {
            for (page, content) in range.iter().zip(content.chunks(PAGE_SIZE_USIZE)) {
                hashes.set_content(page, content);
            }
        }
        self.count(range.count, range.bytes().get());
        faults.install(range, content, way)
    }

    /// The same for pages that are zero.
    pub(crate) fn put_zeros_in(
        &self,
        faults: &Faults,
        range: PageRange,
        way: Way,
    ) -> Result<(), InstallError> {
        if let Some(hashes) = &self.hashes {
            range.iter().for_each(|page| hashes.set_zero(page));
        }
        self.count(range.count, 0);
        faults.install_zeros(range, way)
    }
}

/// Starts the thread of stream `index`; it ends with the connection.
pub(crate) fn start(
    index: u8,
    reader: Reader,
    shared: Arc<Shared>,
    report: impl Fn(Report) + Send + 'static,
) -> io::Result<()> {
    // Between rounds a stream may be silent for long; the control stream watches the peer.
    reader.set_timeout(None)?;
    thread::Builder::new()
        .name(format!("receive-{index}"))
        .spawn(move || {
            be_modest();
            let mut stream = PushStream {
                index,
                reader,
                shared,
                buffer: vec![0; BUFFER_BYTES],
                gathered: Gathered::default(),
                content: Vec::new(),
                coded: Vec::new(),
                zstd: None,
                disk_buffer: None,
                unsafe_bytes: 0,
                is_among_runs: false,
                start: 0,
                end: 0,
            };
            let error = match stream.run(&report) {
                Ok(()) => return,
                Err(error) => error,
            };
            let reason = error.to_string();
            match error {
                ReceiveError::Install(_) | ReceiveError::Disk(_) => {
                    report(Report::NotInstalled { reason });
                }
                // Whoever sealed the memory closes the streams, too: that is no news.
                _ if stream.shared.owner() == Owner::Guest => {}
                _ => report(Report::Broken { reason }),
            }
        })?;
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error("a page stream broke: {}", crate::connection::in_words(.0))]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the source sent pages after the last round")]
    Late,
    #[error("the source spoke of missing pages, but page faults cannot be served here")]
    NoFaults,
    #[error("the source sent a difference to a page that is not here any more")]
    DeltaOfNothing,
    #[error(transparent)]
    Codec(#[from] CodecError),
    #[error("a disk cannot be written: {0}")]
    Disk(#[source] io::Error),
    #[error(transparent)]
    Install(#[from] InstallError),
}

fn content_length(range: PageRange) -> usize {
    usize::try_from(range.bytes().get()).expect("limited by the header")
}

/// Applies one difference after the other, each behind its length in two bytes.
pub(crate) fn decode_deltas(mut coded: &[u8], content: &mut [u8]) -> Result<(), CodecError> {
    for page in content.chunks_mut(PAGE_SIZE_USIZE) {
        let [low, high, rest @ ..] = coded else {
            return Err(CodecError::Malformed);
        };
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let (difference, after) = rest.split_at_checked(length).ok_or(CodecError::Malformed)?;
        delta::decode(difference, page)?;
        coded = after;
    }
    if coded.is_empty() {
        Ok(())
    } else {
        Err(CodecError::OtherLength)
    }
}

#[derive(Debug)]
struct PushStream {
    index: u8,
    reader: Reader,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    /// Fresh pages on their way into the memory file.
    gathered: Gathered,
    /// Pages on their way to the installer.
    content: Vec<u8>,
    /// The same before they were decoded.
    coded: Vec<u8>,
    /// Once a frame has come.
    zstd: Option<zstd::Decoder>,
    /// Once pages of a disk have come.
    disk_buffer: Option<DiskBuffer>,
    /// Written to disks since they were flushed.
    unsafe_bytes: u64,
    /// The last header announced a long run: what is read ahead of the next one would be copied once
    /// more.
    is_among_runs: bool,
    start: usize,
    end: usize,
}

impl PushStream {
    fn run(&mut self, report: &impl Fn(Report)) -> Result<(), ReceiveError> {
        loop {
            let header = self.read_header()?;
            let header = self.shared.decode(&header)?;
            self.is_among_runs =
                matches!(header, PushHeader::Pages(range) if range.count >= DETOUR_PAGES_MIN);
            if !self.continues(header) {
                self.write_gathered()?;
            }
            if let Some(range) = header
                .range()
                .filter(|&range| self.shared.disks.reaches(range))
            {
                self.take_disk_pages(header, range)?;
                self.report_filled(report)?;
                continue;
            }
            match (self.shared.owner(), header) {
                (Owner::Streams, PushHeader::Pages(range)) => self.install(range)?,
                (Owner::Streams, PushHeader::Zeros(range)) => self.install_zeros(range)?,
                (Owner::Streams, PushHeader::Stale(range)) => self.mark_missing(range)?,
                (Owner::Streams, PushHeader::StaleBits(range)) => self.mark_bits_missing(range)?,
                (Owner::Streams, PushHeader::Barrier { round, streams }) => {
                    self.flush_disks()?;
                    report(Report::Barrier {
                        stream: self.index,
                        round,
                        streams,
                    });
                }
                (
                    owner @ (Owner::Streams | Owner::Filling),
                    PushHeader::Coded { range, coding },
                ) => {
                    self.take_coded(owner, range, coding)?;
                }
                (Owner::Filling, PushHeader::Pages(range)) => self.put_in(range)?,
                (Owner::Filling, PushHeader::Zeros(range)) => {
                    self.shared
                        .put_zeros_in(self.faults()?, range, Way::Pushed)?;
                }
                _ => return Err(ReceiveError::Late),
            }
            self.report_filled(report)?;
        }
    }

    /// Tells when nothing is missing any more.
    fn report_filled(&self, report: &impl Fn(Report)) -> Result<(), ReceiveError> {
        if self.shared.owner() == Owner::Filling && self.faults()?.is_filled_now()? {
            report(Report::Filled);
        }
        Ok(())
    }

    fn faults(&self) -> Result<&Faults, ReceiveError> {
        self.shared.faults.as_deref().ok_or(ReceiveError::NoFaults)
    }

    /// The same for the pages of the range whose bits are set in the words that follow.
    fn mark_bits_missing(&mut self, range: PageRange) -> Result<(), ReceiveError> {
        let mut bits = vec![0; bits_bytes(range)];
        self.read(&mut bits)?;
        for run in missing::decode(range, &bits) {
            self.mark_missing(run)?;
        }
        Ok(())
    }

    fn mark_missing(&self, range: PageRange) -> Result<(), ReceiveError> {
        self.shared.expect_missing();
        self.faults()?.installer().mark_missing(range)?;
        Ok(())
    }

    /// Decodes pages into a buffer, and puts them where pages go now.
    fn take_coded(
        &mut self,
        owner: Owner,
        range: PageRange,
        coding: Coding,
    ) -> Result<(), ReceiveError> {
        let mut content = std::mem::take(&mut self.content);
        content.resize(content_length(range), 0);
        let length = match coding {
            Coding::Delta if owner == Owner::Streams => {
                let coded = self.read_coded(range)?;
                let offset = range.first.file_offset();
                self.shared.memory.read_at(offset, &mut content)?;
                decode_deltas(&self.coded, &mut content)?;
                coded
            }
            coding => self.decode(range, coding, &mut content)?,
        };
        if owner == Owner::Streams {
            self.install_content(range, &content)?;
            self.shared.count(range.count, length as u64);
        } else {
            self.shared
                .put_in(self.faults()?, range, &content, Way::Pushed)?;
        }
        self.content = content;
        Ok(())
    }

    /// Reads coded pages as they are; how many bytes they are.
    fn read_coded(&mut self, range: PageRange) -> Result<usize, ReceiveError> {
        let mut length = [0; CODED_LENGTH_BYTES];
        self.read(&mut length)?;
        let length = check_coded_length(length, range)?;
        let mut coded = std::mem::take(&mut self.coded);
        coded.resize(length, 0);
        self.read(&mut coded)?;
        self.coded = coded;
        Ok(length)
    }

    /// Reads and decodes pages that are no differences to others; how many bytes they were.
    fn decode(
        &mut self,
        range: PageRange,
        coding: Coding,
        content: &mut [u8],
    ) -> Result<usize, ReceiveError> {
        let length = self.read_coded(range)?;
        match coding {
            Coding::Lz4 => lz4::decode(&self.coded, content)?,
            Coding::Zstd => {
                let decoder = self.zstd.get_or_insert_default();
                decoder.decode(&self.coded, content)?;
            }
            Coding::Delta => return Err(ReceiveError::DeltaOfNothing),
        }
        Ok(length)
    }

    fn install_content(&mut self, range: PageRange, content: &[u8]) -> Result<(), ReceiveError> {
        if self.is_fresh(range) {
            self.gathered.append(range).copy_from_slice(content);
            return self.write_gathered_units();
        }
        let (memory, offset) = (&self.shared.memory, range.first.file_offset());
        memory.write_at(offset, content)?;
        self.note(range, content)
    }

    /// True if what this header announces may be gathered behind what is gathered already.
    fn continues(&self, header: PushHeader) -> bool {
        match header {
            PushHeader::Pages(range) | PushHeader::Coded { range, .. } => {
                self.gathered.is_continued_by(range)
            }
            PushHeader::Zeros(range) => self.gathered.is_empty() || self.gathers_zeros(range),
            _ => self.gathered.is_empty(),
        }
    }

    /// True if a few zero pages stand between others of a huge page, and are made along with them.
    fn gathers_zeros(&self, range: PageRange) -> bool {
        let Some(unit) = self.shared.memory.write_unit() else {
            return false;
        };
        let into_unit = self.gathered.range().end().get() % unit.get();
        range.count <= ZEROS_GATHERED_MAX
            && into_unit > 0
            && into_unit + range.count.get() <= unit.get()
            && self.gathered.is_continued_by(range)
            && self.is_fresh(range)
    }

    /// Writes what is gathered if it is worth no further wait.
    fn write_gathered_units(&mut self) -> Result<(), ReceiveError> {
        let unit = self.shared.memory.write_unit();
        if unit.is_none_or(|unit| self.gathered.ends_unit(unit)) {
            self.write_gathered()?;
        }
        Ok(())
    }

    fn write_gathered(&mut self) -> Result<(), ReceiveError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        // The barrier of the last round wrote what was gathered: this came behind it.
        if self.shared.owner() != Owner::Streams {
            return Err(ReceiveError::Late);
        }
        let (range, content) = (self.gathered.range(), self.gathered.content());
        self.shared.write_fresh(range, content)?;
        self.note(range, content)?;
        self.gathered.clear();
        Ok(())
    }

    /// These pages are in place.
    fn note(&self, range: PageRange, content: &[u8]) -> Result<(), ReceiveError> {
        self.shared.filled().insert_range(range);
        self.arrived_in_place(range)?;
        if let Some(hashes) = &self.shared.hashes {
            for (page, content) in range.iter().zip(content.chunks(PAGE_SIZE_USIZE)) {
                hashes.set_content(page, content);
            }
        }
        Ok(())
    }

    fn put_in(&mut self, range: PageRange) -> Result<(), ReceiveError> {
        let mut content = std::mem::take(&mut self.content);
        content.resize(content_length(range), 0);
        self.read(&mut content)?;
        self.shared
            .put_in(self.faults()?, range, &content, Way::Pushed)?;
        self.content = content;
        Ok(())
    }

    /// Reads exactly so much, first what was read ahead.
    fn read(&mut self, into: &mut [u8]) -> io::Result<()> {
        let ahead = into.len().min(self.end - self.start);
        into[..ahead].copy_from_slice(&self.buffer[self.start..self.start + ahead]);
        self.start += ahead;
        self.reader.read_content(&mut into[ahead..])
    }

    fn read_header(&mut self) -> io::Result<[u8; PUSH_HEADER_BYTES]> {
        while self.end - self.start < PUSH_HEADER_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let until = if self.is_among_runs {
                PUSH_HEADER_BYTES
            } else {
                self.buffer.len()
            };
            let read = self.reader.read(&mut self.buffer[self.end..until])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end += read;
        }
        let mut header = [0; PUSH_HEADER_BYTES];
        header.copy_from_slice(&self.buffer[self.start..self.start + PUSH_HEADER_BYTES]);
        self.start += PUSH_HEADER_BYTES;
        self.shared.count(PageCount::ZERO, PUSH_HEADER_BYTES as u64);
        Ok(header)
    }

    /// Puts the content of `range` in place: first what was read ahead, the rest without a detour,
    /// unless its pages have to be made.
    fn install(&mut self, range: PageRange) -> Result<(), ReceiveError> {
        if range.count >= DETOUR_PAGES_MIN && self.is_fresh(range) {
            let mut gathered = std::mem::take(&mut self.gathered);
            self.read(gathered.append(range))?;
            self.gathered = gathered;
            self.shared.count(range.count, range.bytes().get());
            return self.write_gathered_units();
        }
        let offset = range.first.file_offset();
        let length = content_length(range);
        let ahead = length.min(self.end - self.start);
        self.shared
            .memory
            .write_at(offset, &self.buffer[self.start..self.start + ahead])?;
        self.start += ahead;
        if ahead < length {
            let rest = offset + ahead as u64;
            self.reader
                .receive(&self.shared.memory, rest, length - ahead)?;
        }
        self.shared.filled().insert_range(range);
        self.arrived_in_place(range)?;
        if let Some(hashes) = &self.shared.hashes {
            range
                .iter()
                .for_each(|page| hashes.set(page, &self.shared.memory));
        }
        self.shared.count(range.count, range.bytes().get());
        Ok(())
    }

    /// True if nothing came for these pages before and they are best written into the file, which
    /// makes each without zeroing it first.
    fn is_fresh(&self, range: PageRange) -> bool {
        self.shared.memory.write_unit().is_some()
            && self.shared.filled().count_range(range) == PageCount::ZERO
    }

    fn arrived_in_place(&self, range: PageRange) -> Result<(), ReceiveError> {
        if let Some(faults) = &self.shared.faults {
            faults.installer().arrived_in_place(range)?;
        }
        Ok(())
    }

    fn install_zeros(&mut self, range: PageRange) -> Result<(), ReceiveError> {
        if !self.gathered.is_empty() {
            self.gathered.append(range).fill(0);
            self.shared.count(range.count, 0);
            return self.write_gathered_units();
        }
        let stale: Vec<PageRange> = {
            let mut filled = self.shared.filled();
            let stale = filled.runs_in(range).collect();
            filled.remove_range(range);
            stale
        };
        for page in stale.into_iter().flat_map(PageRange::iter) {
            self.shared
                .memory
                .write_at(page.file_offset(), &[0; PAGE_SIZE_USIZE])?;
            if let Some(hashes) = &self.shared.hashes {
                hashes.set(page, &self.shared.memory);
            }
        }
        self.arrived_in_place(range)?;
        self.shared.count(range.count, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::channel::Channel;
    use limosa_os::PageKind;
    use limosa_pages::Pfn;
    use std::net::{TcpListener, TcpStream};

    /// What a peer sends behind the last barrier waits for the end of its huge page; meanwhile the
    /// memory has become the guest's.
    #[test]
    fn what_was_gathered_too_late_is_not_written() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let size = PageCount::new(4).bytes();
        let memory = Arc::new(SharedMemory::create(size, PageKind::Small).unwrap());
        let shared = Arc::new(Shared::new(
            Arc::clone(&memory),
            Arc::new(Disks::none(memory.page_count())),
            false,
            None,
        ));
        let mut stream = PushStream {
            index: 0,
            reader: Channel::plain(socket).reader,
            shared: Arc::clone(&shared),
            buffer: Vec::new(),
            gathered: Gathered::default(),
            content: Vec::new(),
            coded: Vec::new(),
            zstd: None,
            disk_buffer: None,
            unsafe_bytes: 0,
            is_among_runs: false,
            start: 0,
            end: 0,
        };
        let range = |first| PageRange::new(Pfn::new(first), PageCount::new(1));
        stream.gathered.append(range(0)).fill(1);
        stream.write_gathered().unwrap();
        assert!(!memory.is_zero(Pfn::new(0)));
        for (page, become_the_guests) in [(1, Shared::serve as fn(&Shared)), (2, Shared::seal)] {
            stream.gathered.clear();
            stream.gathered.append(range(page)).fill(1);
            become_the_guests(&shared);
            let late = stream.write_gathered().unwrap_err();
            assert!(matches!(late, ReceiveError::Late), "{late}");
            assert!(memory.is_zero(Pfn::new(page)));
        }
    }
}
