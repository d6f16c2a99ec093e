//! What ends a wait of a micro guest: the device's way to say that it has something, where no interrupt
//! controller is.
//!
//! A wake-up that comes while nobody waits ends the next wait before it begins. A guest that looks at its
//! devices and waits then has therefore seen everything, or does not sleep; one wake-up too many costs it a
//! second look.
//!
//! Nothing of it moves: devices that have interrupted their driver do so again when they are resumed.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

/// Ends waits of one vCPU.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    is_pending: AtomicBool,
    /// Who waits, once it has.
    sleeper: OnceLock<Thread>,
}

impl Wake {
    /// Ends the wait that there is, or the next one.
    pub(crate) fn pulse(&self) {
        // Whoever finds it set knows that it was, or will be, seen.
        if !self.is_pending.swap(true, Ordering::SeqCst)
            && let Some(sleeper) = self.sleeper.get()
        {
            sleeper.unpark();
        }
    }

    /// Says that this thread is going to wait; before it first looks whether it is to.
    pub(crate) fn attend(&self) {
        self.sleeper.get_or_init(thread::current);
    }

    /// Whether the wait is over, which is said once.
    pub(crate) fn take(&self) -> bool {
        self.is_pending.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    #[test]
    fn a_wake_up_that_comes_before_the_wait_ends_it_once() {
        let wake = Wake::default();
        wake.pulse();
        wake.pulse();
        wake.attend();
        assert!(wake.take());
        assert!(!wake.take());
    }

    #[test]
    fn no_wake_up_is_lost_between_a_look_and_a_wait() {
        const TURNS: u32 = 20_000;
        let wake = Arc::new(Wake::default());
        let (tell, told) = mpsc::channel();
        let waiting = Arc::clone(&wake);
        let sleeper = thread::spawn(move || {
            waiting.attend();
            for turn in 0..TURNS {
                while !waiting.take() {
                    thread::park();
                }
                tell.send(turn).unwrap();
            }
        });
        for turn in 0..TURNS {
            wake.pulse();
            assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(turn));
        }
        sleeper.join().unwrap();
    }
}
