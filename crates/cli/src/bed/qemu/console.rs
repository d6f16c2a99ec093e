//! Hears the beats that a guest under QEMU sends over its console, as [`crate::bed::observer`] hears
//! those of limosa's guests.
//!
//! A zero byte is a beat, anything else is text. The guest has written its report before it beats,
//! so the report is read at once, then the clock: as with a datagram, a stamp is late by what the
//! way took, and never early. Whenever the report has new stalls they are kept, so none is pushed
//! out of the guest's tables unseen.

use crate::bed::beats::{Beat, Beats};
use crate::bed::observer;
use crate::bed::qemu::guest_memory::GuestMemory;
use crate::bed::stalls::Stall;
use anyhow::Context;
use limosa_engine::Timestamp;
use limosa_micro_abi::port::CONSOLE_BEAT;
use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Beats that are kept: ten minutes of them, which is longer than any sensible move.
const BEATS_MAX: usize = 600_000;
/// Stalls that are kept: ten a millisecond over a minute.
const STALLS_MAX: usize = 600_000;
/// Text that is kept, for a guest that complains.
const TEXT_BYTES_MAX: usize = 8 << 10;

/// What was heard from all QEMUs of a bed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Heard(Arc<Mutex<Content>>);

#[derive(Debug, Default)]
struct Content {
    beats: VecDeque<Beat>,
    stalls: VecDeque<Stall>,
    text: String,
}

impl Heard {
    /// The beats that were stamped at or after `from`.
    pub(crate) fn since(&self, from: Timestamp) -> Beats {
        let content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let beats = content.beats.iter();
        Beats::new(beats.filter(|beat| beat.stamped >= from).copied().collect())
    }

    /// All stalls since the last call.
    pub(crate) fn take_stalls(&self) -> Vec<Stall> {
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        content.stalls.drain(..).collect()
    }

    /// What guests have written.
    pub(crate) fn text(&self) -> String {
        let content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        content.text.clone()
    }

    fn hear(&self, bytes: &[u8], memory: &GuestMemory, stalls_seen: &mut u64) {
        let report = bytes.contains(&CONSOLE_BEAT).then(|| memory.report());
        let moment = observer::now();
        let mut content = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = bytes.iter().filter(|byte| **byte != CONSOLE_BEAT);
        let room = TEXT_BYTES_MAX.saturating_sub(content.text.len());
        content
            .text
            .extend(text.take(room).map(|byte| char::from(*byte)));
        let Some(report) = report.flatten() else {
            return;
        };
        push(
            &mut content.beats,
            BEATS_MAX,
            Beat {
                arrived: moment,
                stamped: moment,
                guest_tsc: report.beat_tsc,
                work: report.work,
            },
        );
        let new = report.stall_total.saturating_sub(*stalls_seen);
        *stalls_seen = report.stall_total;
        let held = report.recent_stalls().count() as u64;
        let old = usize::try_from(held.saturating_sub(new)).unwrap_or(usize::MAX);
        for stall in report.recent_stalls().skip(old) {
            let stall = Stall {
                start_tsc: stall.start_tsc,
                length_tsc: stall.length_tsc,
            };
            push(&mut content.stalls, STALLS_MAX, stall);
        }
    }
}

fn push<T>(queue: &mut VecDeque<T>, max: usize, item: T) {
    if queue.len() >= max {
        queue.pop_front();
    }
    queue.push_back(item);
}

/// The console of one QEMU; its thread ends with that process.
#[derive(Debug)]
pub(crate) struct Console(Option<JoinHandle<()>>);

impl Console {
    /// Begins to listen.
    pub(crate) fn start(
        stream: UnixStream,
        memory: GuestMemory,
        heard: &Heard,
    ) -> anyhow::Result<Self> {
        let heard = heard.clone();
        let thread = thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || listen(stream, &memory, &heard))
            .context("cannot start a thread")?;
        Ok(Self(Some(thread)))
    }

    /// Waits for the thread; to be called when the process has ended.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.0.take()
            && thread.join().is_err()
        {
            tracing::error!("the console of a QEMU panicked");
        }
    }
}

fn listen(mut stream: UnixStream, memory: &GuestMemory, heard: &Heard) {
    let mut bytes = [0; 4096];
    let mut stalls_seen = 0;
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => heard.hear(&bytes[..count], memory, &mut stalls_seen),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "a console ended");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_micro_abi::{Report, memory_map, report};
    use std::io::Write;

    /// A guest whose memory is ours.
    fn memory(words: &[u64]) -> GuestMemory {
        let start = words.as_ptr().addr() as u64 - memory_map::report_address(0);
        GuestMemory::open(std::process::id(), start).unwrap()
    }

    #[test]
    fn a_beat_is_read_with_its_report_and_text_is_kept_apart() {
        let mut words = vec![0u64; size_of::<Report>() / 8];
        words[0] = Report::MAGIC;
        words[1] = u64::from(limosa_micro_abi::ABI_VERSION);
        words[3] = 7000;
        words[4] = 50;
        words[12] = 1;
        words[13] = 1;
        (words[14], words[15]) = (6000, 900);
        assert_eq!(report::STALLS_RING, 64);
        let heard = Heard::default();
        let mut seen = 0;
        let before = observer::now();
        heard.hear(b"bad \0arg", &memory(&words), &mut seen);
        heard.hear(b"ument", &memory(&words), &mut seen);
        heard.hear(b"\0\0", &memory(&words), &mut seen);
        assert_eq!(heard.text(), "bad argument");
        let beats = heard.since(before);
        assert_eq!(beats.between(before, observer::now()).len(), 2);
        let stall = Stall {
            start_tsc: 6000,
            length_tsc: 900,
        };
        assert_eq!(heard.take_stalls(), [stall]);
        assert!(heard.take_stalls().is_empty());
    }

    #[test]
    fn a_guest_without_a_report_has_no_beats() {
        let words = vec![0u64; size_of::<Report>() / 8];
        let heard = Heard::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut console = Console::start(ours, memory(&words), &heard).unwrap();
        theirs.write_all(b"\0x\0").unwrap();
        drop(theirs);
        console.join();
        assert_eq!(heard.text(), "x");
        let all = heard.since(Timestamp::from_nanos(0));
        assert!(
            all.between(Timestamp::from_nanos(0), observer::now())
                .is_empty()
        );
    }
}
