//! Heartbeats: what a running guest tells the world outside, about once a millisecond.
//!
//! One datagram a heartbeat, to an observer that may be gone: sending never waits and its failure is
//! nobody's business. The sequence number is part of the machine's state, so an observer sees one
//! row of numbers across all moves.

use limosa_engine::Timestamp;
use serde::{Deserialize, Serialize};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// Largest datagram: two names and seven numbers.
pub const HEARTBEAT_BYTES_MAX: usize = 512;

/// Marks a heartbeat, with its version as the last byte.
const MAGIC: [u8; 4] = *b"LHB\x02";

/// One heartbeat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The machine's name.
    pub name: String,
    /// What its host calls itself.
    pub host: String,
    /// Process id of the VM process that runs it there.
    pub process: u32,
    /// Number of the heartbeat, over all moves of the machine.
    pub sequence: u64,
    /// The guest's time stamp counter when it wrote its report.
    pub guest_tsc: u64,
    /// Work done by all vCPUs.
    pub work: u64,
    /// Failed checks of all vCPUs.
    pub errors: u64,
    /// When it was sent, on its host's clock.
    pub sent_at: Timestamp,
}

impl Heartbeat {
    /// Its datagram.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, MAGIC.to_vec()).expect("a heartbeat can always be written")
    }

    /// Reads a datagram; `None` if it is no heartbeat.
    pub fn decode(datagram: &[u8]) -> Option<Self> {
        let body = datagram
            .strip_prefix(&MAGIC)
            .filter(|_| datagram.len() <= HEARTBEAT_BYTES_MAX)?;
        postcard::from_bytes(body).ok()
    }
}

/// Where heartbeats go.
#[derive(Debug)]
pub(crate) struct Observer {
    socket: UdpSocket,
}

impl Observer {
    pub(crate) fn new(address: SocketAddr) -> io::Result<Self> {
        let any: SocketAddr = if address.is_ipv4() {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        };
        let socket = UdpSocket::bind(any)?;
        socket.set_nonblocking(true)?;
        socket.connect(address)?;
        Ok(Self { socket })
    }

    pub(crate) fn send(&self, heartbeat: &Heartbeat) {
        // An observer that has left or is slow misses beats; the guest does not wait for it.
        if let Err(error) = self.socket.send(&heartbeat.encode()) {
            tracing::trace!(%error, "heartbeat not sent");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_arrive() {
        let observer = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let sender = Observer::new(observer.local_addr().unwrap()).unwrap();
        let beat = Heartbeat {
            name: "x".repeat(64),
            host: "a".repeat(64),
            process: u32::MAX,
            sequence: u64::MAX,
            guest_tsc: 2,
            work: u64::MAX,
            errors: u64::MAX,
            sent_at: Timestamp::from_nanos(u64::MAX),
        };
        sender.send(&beat);
        let mut datagram = [0; HEARTBEAT_BYTES_MAX];
        let len = observer.recv(&mut datagram).unwrap();
        assert_eq!(Heartbeat::decode(&datagram[..len]), Some(beat));
        assert_eq!(Heartbeat::decode(b"LHB\x03"), None);
        assert_eq!(Heartbeat::decode(&[0xff; 60]), None);
        drop(observer);
        sender.send(&Heartbeat::decode(&datagram[..len]).unwrap());
        sender.send(&Heartbeat::decode(&datagram[..len]).unwrap());
    }
}
