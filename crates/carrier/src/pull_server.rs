//! The pull stream at the source: pages that somebody waits for.
//!
//! One thread, before all others: it reads a request, reads the pages from the frozen memory, writes
//! the answer. Whatever is asked for is answered, even if it was pushed before: the push may be in a
//! buffer, or lost with an earlier connection. After a reconnection the target first says all that it
//! misses, which becomes the set of unsent pages.

use crate::channel::Channel;
use crate::disks;
use crate::missing;
use crate::sender::{Shared, Unsent};
use limosa_engine::wire::{PUSH_HEADER_BYTES, PullHeader, PushHeader, WireError, bits_bytes};
use limosa_os::disk::DiskBuffer;
use limosa_os::thread::ThreadId;
use limosa_pages::{PageRange, PageSet};
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

/// How much sooner the control stream may say why the target refuses this one, too: it was dialled first,
/// and its reason is the better one.
const REFUSAL_MAX: Duration = Duration::from_millis(500);

/// What the stream reports.
#[derive(Debug)]
pub(crate) enum Report {
    /// The target has said all that it misses; that is unsent now.
    Reconciled(PageSet),
    /// It broke.
    Broken { reason: String },
}

#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("the pull stream broke: {}", crate::connection::in_words(.0))]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("the target asked for pages before the switch")]
    Early,
}

/// Starts the thread; it ends with the connection.
pub(crate) fn start(
    channel: Channel,
    shared: Arc<Shared>,
    report: impl Fn(Report) + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new()
        .name("pull".to_owned())
        .spawn(move || {
            if let Err(error) = ThreadId::current().set_urgent(true) {
                tracing::debug!(%error, "page faults of the target may be answered late");
            }
            let mut server = PullServer {
                missing: PageSet::empty(shared.disks.pages()),
                unsent: shared.unsent(),
                disk_buffer: None,
                channel,
                shared,
            };
            if let Err(error) = server.run(&report) {
                report(Report::Broken {
                    reason: error.to_string(),
                });
            }
        })?;
    Ok(())
}

struct PullServer {
    channel: Channel,
    shared: Arc<Shared>,
    unsent: Arc<Unsent>,
    missing: PageSet,
    /// Once a disk was read.
    disk_buffer: Option<DiskBuffer>,
}

impl PullServer {
    fn run(&mut self, report: &impl Fn(Report)) -> Result<(), ServeError> {
        let pages = self.shared.disks.pages();
        loop {
            let mut header = [0; PUSH_HEADER_BYTES];
            if let Err(error) = self.channel.reader.read_exact(&mut header) {
                // A target that needs no pulls closes this stream with the others, before the rest.
                let is_needed = self.shared.is_serving.load(Ordering::SeqCst);
                return if is_needed { Err(error.into()) } else { Ok(()) };
            }
            let header = PullHeader::decode(&header, pages);
            if header.is_err() && !self.shared.is_serving.load(Ordering::SeqCst) {
                thread::sleep(REFUSAL_MAX);
            }
            let header = header?;
            if !self.shared.is_serving.load(Ordering::SeqCst) {
                return Err(ServeError::Early);
            }
            match header {
                PullHeader::Want(range) => self.answer(range)?,
                PullHeader::Missing(range) => self.missing.insert_range(range),
                PullHeader::MissingBits(range) => {
                    let mut bits = vec![0; bits_bytes(range)];
                    self.channel.reader.read_exact(&mut bits)?;
                    for run in missing::decode(range, &bits) {
                        self.missing.insert_range(run);
                    }
                }
                PullHeader::MissingEnd => {
                    let missing = std::mem::replace(&mut self.missing, PageSet::empty(pages));
                    self.unsent.lock().clone_from(&missing);
                    report(Report::Reconciled(missing));
                }
            }
        }
    }

    fn answer(&mut self, range: PageRange) -> io::Result<()> {
        self.unsent.asked_for(range);
        let shared = Arc::clone(&self.shared);
        for part in shared.disks.split(range) {
            if shared.disks.reaches(part) {
                self.answer_from_disk(part)?;
            } else {
                self.answer_from_memory(part)?;
            }
        }
        Ok(())
    }

    fn answer_from_disk(&mut self, range: PageRange) -> io::Result<()> {
        let mut buffer = self.disk_buffer.take().unwrap_or_else(disks::buffer);
        let content = self.shared.disks.read(range, &mut buffer)?;
        let mut bytes = Vec::new();
        for header in content.headers() {
            bytes.extend_from_slice(&header.encode());
            if let PushHeader::Pages(part) = header {
                bytes.extend_from_slice(content.of(part));
            }
        }
        self.disk_buffer = Some(buffer);
        self.shared.take_first(bytes.len() as u64);
        self.channel.writer.write_all(&bytes)?;
        self.count(range);
        Ok(())
    }

    fn answer_from_memory(&mut self, range: PageRange) -> io::Result<()> {
        let parts: Vec<([u8; PUSH_HEADER_BYTES], Option<PageRange>)> = self
            .shared
            .parts(range)?
            .0
            .into_iter()
            .map(|part| match part {
                PushHeader::Pages(range) => (part.encode(), Some(range)),
                _ => (part.encode(), None),
            })
            .collect();
        let bytes = parts.iter().fold(0, |sum, (header, pages)| {
            sum + header.len() as u64 + pages.map_or(0, |range| range.bytes().get())
        });
        self.shared.take_first(bytes);
        self.channel
            .writer
            .send_parts(&self.shared.memory, &parts)?;
        self.count(range);
        Ok(())
    }

    fn count(&self, range: PageRange) {
        let pages = range.count.get();
        self.shared.pages_out.fetch_add(pages, Ordering::Relaxed);
        self.shared.pulled_out.fetch_add(pages, Ordering::Release);
    }
}
