//! A push stream at the target: pages from one socket straight into the guest's memory.
//!
//! One thread a stream. Until the guest's state is loaded nobody else touches that memory, so the
//! pages are received in place; scattered ones go through a small buffer that saves system calls.
//! Once [`Shared::seal`] was called nothing is installed any more, whatever a peer sends.

use crate::digest::PageHashes;
use limosa_engine::wire::{PUSH_HEADER_BYTES, PushHeader, WireError};
use limosa_os::SharedMemory;
use limosa_pages::{PAGE_SIZE_USIZE, PageCount, PageRange, PageSet};
use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Bytes read ahead: many headers with their scattered pages in one system call.
const BUFFER_BYTES: usize = 128 << 10;

/// What a stream reports.
#[derive(Debug)]
pub(crate) enum Report {
    Barrier { stream: u8, round: u32 },
    Broken { reason: String },
}

/// What all streams of an arriving guest share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) memory: Arc<SharedMemory>,
    /// Pages with content. A zero page that was never there needs no work.
    pub(crate) filled: Mutex<PageSet>,
    /// With verification: the hash of each page as installed.
    pub(crate) hashes: Option<PageHashes>,
    pub(crate) pages_received: AtomicU64,
    pub(crate) bytes_received: AtomicU64,
    sealed: AtomicBool,
}

impl Shared {
    pub(crate) fn new(memory: Arc<SharedMemory>, pages: PageCount, verify: bool) -> Self {
        Self {
            memory,
            filled: Mutex::new(PageSet::empty(pages)),
            hashes: verify.then(|| PageHashes::new(pages)),
            pages_received: AtomicU64::new(0),
            bytes_received: AtomicU64::new(0),
            sealed: AtomicBool::new(false),
        }
    }

    /// From now on no page is installed.
    pub(crate) fn seal(&self) {
        self.sealed.store(true, Ordering::SeqCst);
    }
}

/// Starts the thread of stream `index`; it ends with the connection.
pub(crate) fn start(
    index: u8,
    socket: TcpStream,
    shared: Arc<Shared>,
    report: impl Fn(Report) + Send + 'static,
) -> io::Result<()> {
    // Between rounds a stream may be silent for long; the control stream watches the peer.
    socket.set_read_timeout(None)?;
    thread::Builder::new()
        .name(format!("receive-{index}"))
        .spawn(move || {
            let mut stream = PushStream {
                index,
                socket,
                shared,
                buffer: vec![0; BUFFER_BYTES],
                start: 0,
                end: 0,
            };
            let error = match stream.run(&report) {
                Ok(()) => return,
                Err(error) => error,
            };
            // Whoever sealed the memory closes the streams, too: that is no news.
            if !stream.shared.sealed.load(Ordering::SeqCst) {
                report(Report::Broken {
                    reason: error.to_string(),
                });
            }
        })?;
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error("a page stream broke: {0}")]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the source sent pages after the last round")]
    Late,
}

#[derive(Debug)]
struct PushStream {
    index: u8,
    socket: TcpStream,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl PushStream {
    fn run(&mut self, report: &impl Fn(Report)) -> Result<(), ReceiveError> {
        let memory = self.shared.memory.page_count();
        loop {
            let header = PushHeader::decode(&self.read_header()?, memory)?;
            if self.shared.sealed.load(Ordering::SeqCst) {
                return Err(ReceiveError::Late);
            }
            match header {
                PushHeader::Pages(range) => self.install(range)?,
                PushHeader::Zeros(range) => self.install_zeros(range)?,
                PushHeader::Barrier { round } => report(Report::Barrier {
                    stream: self.index,
                    round,
                }),
            }
        }
    }

    fn read_header(&mut self) -> io::Result<[u8; PUSH_HEADER_BYTES]> {
        while self.end - self.start < PUSH_HEADER_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
            let read = self.socket.read(&mut self.buffer[self.end..])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.end += read;
        }
        let mut header = [0; PUSH_HEADER_BYTES];
        header.copy_from_slice(&self.buffer[self.start..self.start + PUSH_HEADER_BYTES]);
        self.start += PUSH_HEADER_BYTES;
        self.count(PageCount::ZERO, PUSH_HEADER_BYTES as u64);
        Ok(header)
    }

    /// Puts the content of `range` in place: first what was read ahead, the rest without a detour.
    fn install(&mut self, range: PageRange) -> io::Result<()> {
        let offset = range.first.file_offset();
        let length = usize::try_from(range.bytes().get()).expect("limited by the header");
        let ahead = length.min(self.end - self.start);
        self.shared
            .memory
            .write_at(offset, &self.buffer[self.start..self.start + ahead])?;
        self.start += ahead;
        if ahead < length {
            self.shared
                .memory
                .receive(&self.socket, offset + ahead as u64, length - ahead)?;
        }
        self.shared
            .filled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert_range(range);
        if let Some(hashes) = &self.shared.hashes {
            range
                .iter()
                .for_each(|page| hashes.set(page, &self.shared.memory));
        }
        self.count(range.count, range.bytes().get());
        Ok(())
    }

    fn install_zeros(&self, range: PageRange) -> io::Result<()> {
        let stale: Vec<PageRange> = {
            let mut filled = self
                .shared
                .filled
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
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
        self.count(range.count, 0);
        Ok(())
    }

    fn count(&self, pages: PageCount, bytes: u64) {
        self.shared
            .pages_received
            .fetch_add(pages.get(), Ordering::Relaxed);
        self.shared
            .bytes_received
            .fetch_add(bytes, Ordering::Relaxed);
    }
}
