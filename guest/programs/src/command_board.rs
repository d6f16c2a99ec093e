//! Commands for all vCPUs, and what they tell each other about their ends.
//!
//! Only vCPU 0 hears the monitor. It writes each new command onto a ring that the others read, each
//! at its own pace, so that a command is not lost because somebody still works on the last one.

use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use limosa_micro_abi::{Command, CommandKind};

/// Commands that may be on their way. The monitor's user waits for a command to be done before the
/// next; who does not loses the oldest.
const RING: u32 = 16;

static WORDS: [AtomicU32; RING as usize] = [const { AtomicU32::new(0) }; RING as usize];
static WRITTEN: AtomicU32 = AtomicU32::new(0);
static FINISHED: AtomicU32 = AtomicU32::new(0);
static ERRORS_SEEN: AtomicBool = AtomicBool::new(false);

/// The writing end, for vCPU 0.
#[derive(Debug, Default)]
pub(crate) struct Announcer {
    sequence: u32,
}

impl Announcer {
    /// Passes on the answer to a heartbeat if it is a new command.
    pub(crate) fn hear(&mut self, word: u32) {
        let command = Command::from_word(word);
        if command.sequence == self.sequence {
            return;
        }
        self.sequence = command.sequence;
        if command.kind != CommandKind::None {
            let written = WRITTEN.load(Ordering::Relaxed);
            WORDS[(written % RING) as usize].store(word, Ordering::Relaxed);
            WRITTEN.store(written.wrapping_add(1), Ordering::Release);
        }
    }
}

/// The reading end of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Listener {
    read: u32,
}

impl Listener {
    /// The next command that this vCPU has not seen.
    #[inline]
    pub(crate) fn next(&mut self) -> Option<Command> {
        let written = WRITTEN.load(Ordering::Acquire);
        if written == self.read {
            return None;
        }
        if written.wrapping_sub(self.read) > RING {
            self.read = written.wrapping_sub(RING);
        }
        let word = WORDS[(self.read % RING) as usize].load(Ordering::Relaxed);
        self.read = self.read.wrapping_add(1);
        Some(Command::from_word(word))
    }
}

/// One vCPU has finished, and whether its checks had failed.
pub(crate) fn finish(errors: u64) {
    if errors > 0 {
        ERRORS_SEEN.store(true, Ordering::Relaxed);
    }
    FINISHED.fetch_add(1, Ordering::Release);
}

/// How many vCPUs have finished.
pub(crate) fn finished() -> u32 {
    FINISHED.load(Ordering::Acquire)
}

/// Whether a vCPU that has finished had seen errors.
pub(crate) fn errors_seen() -> bool {
    ERRORS_SEEN.load(Ordering::Relaxed)
}
