//! Ctrl-C and the other polite ways to ask a program to end.
//!
//! The signals only raise a flag; whoever waits looks at it and gives up, so that everything that
//! was started is taken down the ordinary way, by the destructors of those who started it.

use anyhow::Context;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How late a flag is noticed at most.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The flag.
#[derive(Clone, Debug)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

/// Somebody asked the program to end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted: the virtual machine and both daemons were stopped")]
pub(crate) struct Interrupted;

impl Interrupt {
    /// From now on these signals no longer end the process at once.
    pub(crate) fn install() -> anyhow::Result<Self> {
        let raised = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            flag::register(signal, Arc::clone(&raised)).context("cannot handle signals")?;
        }
        Ok(Self(raised))
    }

    /// Gives up if the flag is raised.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) {
            Err(Interrupted)
        } else {
            Ok(())
        }
    }

    /// Sleeps, unless the flag is or gets raised.
    pub(crate) fn sleep(&self, duration: Duration) -> Result<(), Interrupted> {
        let end = Instant::now() + duration;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(LOOK_EVERY));
        }
    }
}
