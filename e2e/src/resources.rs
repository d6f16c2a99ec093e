//! What a daemon holds: descriptors, threads, anonymous memory, children that have ended.

use crate::daemon::Daemon;
use crate::{process, wait};
use std::time::Duration;

/// How long a daemon may take to give back what it used: idle threads of its pools end after ten
/// seconds, connections that say nothing after five.
const SETTLE_MAX: Duration = Duration::from_secs(20);
/// Anonymous memory that a daemon may keep: the allocator's arenas of threads that have ended,
/// reports of past migrations.
const MEMORY_SLACK: u64 = 6 << 20;

/// What a daemon holds at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Open descriptors.
    pub fds: u64,
    /// Threads.
    pub threads: u64,
    /// Anonymous memory in bytes.
    pub anonymous_bytes: u64,
}

impl Resources {
    /// What `daemon` holds now.
    ///
    /// # Panics
    /// If it does not answer.
    pub fn of(daemon: &Daemon) -> Self {
        let info = daemon.client().host().expect("a daemon that answers");
        Self {
            fds: info.open_fds,
            threads: info.threads,
            anonymous_bytes: info.anonymous_bytes,
        }
    }

    /// Waits until `daemon` holds no more than this, but for a little memory.
    ///
    /// # Panics
    /// If it keeps more.
    #[track_caller]
    pub fn assert_not_grown(&self, daemon: &Daemon) {
        let mut last = Self::of(daemon);
        let mut zombies = Vec::new();
        let settled = wait::poll(SETTLE_MAX, || {
            last = Self::of(daemon);
            zombies = process::zombies_of(daemon.pid());
            let is_back = last.fds <= self.fds
                && last.threads <= self.threads
                && last.anonymous_bytes <= self.anonymous_bytes + MEMORY_SLACK
                && zombies.is_empty();
            is_back.then_some(())
        });
        assert!(
            settled.is_some(),
            "a daemon holds more than before: {self:?}, now {last:?}, ended children {zombies:?}"
        );
    }
}
