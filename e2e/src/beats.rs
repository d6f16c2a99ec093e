//! Who runs the guest, seen from outside: the heartbeats of its VM processes.
//!
//! A VM process sends a datagram each time that its guest beats, about a thousand times a second. It
//! says which process that is; the port does not, since another process may be given it later. The
//! order of arrival is the order of the beats, and the rule of the handover can be read off: each
//! process runs the guest for one stretch of time, and the stretches do not overlap.

use crate::wait;
use limosa_host::Heartbeat;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How often the receiver looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A stretch of beats of one VM process that no other one interrupts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// Process id of the VM process.
    pub process: u32,
    /// How many.
    pub beats: u64,
    /// When the first came.
    pub first: Instant,
    /// When the last came.
    pub last: Instant,
}

/// Listens to the heartbeats of one guest.
#[derive(Debug)]
pub struct Beats {
    address: SocketAddr,
    turns: Arc<Mutex<Vec<Turn>>>,
    ends: Arc<AtomicBool>,
    receiver: Option<JoinHandle<()>>,
}

impl Beats {
    /// Begins to listen.
    ///
    /// # Panics
    /// If the kernel gives no socket or thread.
    pub fn listen() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        socket
            .set_read_timeout(Some(LOOK_EVERY))
            .expect("a time-out above zero");
        let address = socket.local_addr().expect("a bound socket has an address");
        let turns = Arc::new(Mutex::new(Vec::new()));
        let ends = Arc::new(AtomicBool::new(false));
        let (noted, over) = (Arc::clone(&turns), Arc::clone(&ends));
        let receiver = thread::spawn(move || {
            let mut bytes = [0; 2048];
            while !over.load(Ordering::SeqCst) {
                let Ok(length) = socket.recv(&mut bytes) else {
                    continue;
                };
                let beat = Heartbeat::decode(&bytes[..length]).expect("a heartbeat");
                note(
                    &mut noted.lock().unwrap_or_else(PoisonError::into_inner),
                    beat.process,
                );
            }
        });
        Self {
            address,
            turns,
            ends,
            receiver: Some(receiver),
        }
    }

    /// Where VM processes are to send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The turns so far.
    pub fn turns(&self) -> Vec<Turn> {
        self.turns
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until some more beats have come, so that what runs now has shown itself, and checks
    /// that no VM process ran the guest after another one had begun to.
    ///
    /// # Panics
    /// If one did, or if nothing beats.
    #[track_caller]
    pub fn assert_one_at_a_time(&self) -> Vec<Turn> {
        let count = |turns: &[Turn]| turns.iter().map(|turn| turn.beats).sum::<u64>();
        let before = count(&self.turns());
        wait::until_true("the guest beats", || count(&self.turns()) > before + 20);
        let turns = self.turns();
        for (index, turn) in turns.iter().enumerate() {
            let again = turns[..index]
                .iter()
                .any(|earlier| earlier.process == turn.process);
            assert!(
                !again,
                "two VM processes ran the guest in turns: {turns:#?}"
            );
        }
        turns
    }

    /// Forgets all turns: another guest begins.
    pub fn clear(&self) {
        self.turns
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

impl Drop for Beats {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        if let Some(receiver) = self.receiver.take() {
            receiver.join().expect("the receiver does not panic");
        }
    }
}

fn note(turns: &mut Vec<Turn>, process: u32) {
    let now = Instant::now();
    match turns.last_mut() {
        Some(turn) if turn.process == process => {
            turn.beats += 1;
            turn.last = now;
        }
        _ => turns.push(Turn {
            process,
            beats: 1,
            first: now,
            last: now,
        }),
    }
}
