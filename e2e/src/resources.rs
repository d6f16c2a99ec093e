//! What a daemon holds: descriptors, threads, anonymous memory, children that have ended.

use crate::daemon::Daemon;
use crate::{process, wait};
use std::time::Duration;

/// How long a daemon may take to give back what it used: connections that say nothing end after
/// five seconds, lost peers count as lost after ten.
const SETTLE_MAX: Duration = Duration::from_secs(20);
/// Anonymous memory that a daemon may keep: the allocator's arenas of threads that have ended, eight a
/// processor with up to half a megabyte each, and reports of past migrations.
const MEMORY_SLACK: u64 = 9 << 20;

/// Begin of the names of threads that answer requests: a pool with a limit, whose threads end when
/// they have had nothing to do for ten seconds, which they have while somebody looks.
const POOL: &str = "tokio-";

/// What a daemon holds at a moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Open descriptors.
    pub fds: u64,
    /// Names of threads, but for those of the pool.
    pub threads: Vec<String>,
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
        let mut threads = process::thread_names(daemon.pid());
        threads.retain(|name| !name.starts_with(POOL));
        threads.sort();
        Self {
            fds: info.open_fds,
            threads,
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
                && last.threads.len() <= self.threads.len()
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
