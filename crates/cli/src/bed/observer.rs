//! Hears the guest's heartbeats, whichever host runs it.
//!
//! A UDP socket on the loopback receives a datagram from the VM process at each heartbeat. A thread
//! stamps it with the monotonic clock of this machine and keeps it. A datagram that is not a
//! heartbeat of our guest is ignored. The series is bounded: the oldest beats are dropped.
//!
//! Where each host has a network of its own, each has a loopback, and there is a socket on both of them, with the
//! same port: the VM process knows one address, whichever host it is on.
//!
//! The observer cannot tell a guest that stands still from an observer that was not scheduled, so
//! its gap is at least the true one. The guest's own clock has the last word.

use crate::bed::beats::{Beat, Beats};
use anyhow::Context;
use limosa_clients::Lan;
use limosa_engine::Timestamp;
use limosa_host::Heartbeat;
use rustix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Beats that are kept: ten minutes of them, which is longer than any sensible move.
const BEATS_MAX: usize = 600_000;
/// How late the thread notices that it shall end.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Room in the kernel for beats while the observer is not scheduled, at about 1 KiB each.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// This moment on the clock that all stamps of one machine share.
pub(crate) fn now() -> Timestamp {
    let time = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    Timestamp::from_nanos(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

#[derive(Debug, Default)]
struct Shared {
    beats: Mutex<VecDeque<Beat>>,
    ends: AtomicBool,
}

/// Sockets and their threads, which end with this value.
#[derive(Debug)]
pub(crate) struct Observer {
    address: SocketAddr,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Observer {
    /// Begins to listen for the heartbeats of the guest `vm`.
    pub(crate) fn start(vm: &str) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("cannot open a UDP socket")?;
        Self::listening(vm, vec![socket])
    }

    /// The same on both hosts of a network.
    pub(crate) fn on_both(vm: &str, lan: &Lan) -> anyhow::Result<Self> {
        let first = lan.in_host(0, || UdpSocket::bind("127.0.0.1:0"));
        let first = first.context("cannot open a UDP socket")?;
        let address = first
            .local_addr()
            .context("the UDP socket has no address")?;
        // Nobody else is there.
        let second = lan.in_host(1, || UdpSocket::bind(address));
        let second = second.context("cannot open a UDP socket of the same port")?;
        Self::listening(vm, vec![first, second])
    }

    /// On these sockets, which have one address.
    fn listening(vm: &str, sockets: Vec<UdpSocket>) -> anyhow::Result<Self> {
        let address = sockets[0]
            .local_addr()
            .context("the UDP socket has no address")?;
        let mut this = Self {
            address,
            shared: Arc::new(Shared::default()),
            threads: Vec::new(),
        };
        for socket in sockets {
            socket
                .set_read_timeout(Some(LOOK_EVERY))
                .context("cannot set a timeout on the UDP socket")?;
            // Less room than wished for only means that a long absence loses beats.
            if let Err(error) =
                rustix::net::sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER_BYTES)
            {
                tracing::debug!(%error, "the receive buffer stays as it is");
            }
            let (theirs, vm) = (Arc::clone(&this.shared), vm.to_owned());
            let thread = std::thread::Builder::new()
                .name("observer".to_owned())
                .spawn(move || listen(&socket, &vm, &theirs))
                .context("cannot start a thread")?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    /// Where the beats go.
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The beats that were stamped at or after `from`.
    pub(crate) fn since(&self, from: Timestamp) -> Beats {
        let beats = self
            .shared
            .beats
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let recent = beats.iter().rev().take_while(|beat| beat.stamped >= from);
        Beats::new(recent.copied().collect())
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("the observer panicked");
            }
        }
    }
}

fn listen(socket: &UdpSocket, vm: &str, shared: &Shared) {
    let mut datagram = [0; 2048];
    while !shared.ends.load(Ordering::Relaxed) {
        let length = match socket.recv(&mut datagram) {
            Ok(length) => length,
            Err(error) if is_pause(&error) => continue,
            Err(error) => {
                tracing::error!(%error, "the observer's socket failed");
                return;
            }
        };
        let arrived = now();
        let Some(beat) = read_beat(&datagram[..length], vm, arrived) else {
            continue;
        };
        let mut beats = shared.beats.lock().unwrap_or_else(PoisonError::into_inner);
        if beats.len() >= BEATS_MAX {
            beats.pop_front();
        }
        beats.push_back(beat);
    }
}

fn is_pause(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
    )
}

/// The beat in a datagram, if it is one of the guest `vm`.
fn read_beat(datagram: &[u8], vm: &str, arrived: Timestamp) -> Option<Beat> {
    let heartbeat = Heartbeat::decode(datagram).filter(|heartbeat| heartbeat.name == vm)?;
    Some(Beat {
        arrived,
        stamped: heartbeat.sent_at,
        guest_tsc: heartbeat.guest_tsc,
        work: heartbeat.work,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_beats_of_the_guest_are_heard() {
        let heartbeat = Heartbeat {
            name: "demo".to_owned(),
            host: "a".to_owned(),
            process: 1,
            sequence: 3,
            guest_tsc: 2600,
            work: 50,
            errors: 0,
            sent_at: Timestamp::from_nanos(1000),
        };
        let datagram = heartbeat.encode();
        let arrived = Timestamp::from_nanos(1100);
        let expect = Beat {
            arrived,
            stamped: Timestamp::from_nanos(1000),
            guest_tsc: 2600,
            work: 50,
        };
        assert_eq!(read_beat(&datagram, "demo", arrived), Some(expect));
        assert_eq!(read_beat(&datagram, "web", arrived), None);
        assert_eq!(read_beat(b"hello", "demo", arrived), None);
    }
}
