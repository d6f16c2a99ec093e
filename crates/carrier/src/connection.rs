//! Connections between two hosts: dialling, preambles, control frames.
//!
//! Control messages leave at once: one write a message and no Nagle. Whatever is read from a peer
//! has a limit and, during the handshake, a time-out.

use crate::bucket::Bucket;
use limosa_engine::wire::{ControlFrame, PREAMBLE_BYTES, Preamble, WireError};
use limosa_os::socket;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a connection, its preamble and the first answer may take.
pub(crate) const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// How long one control frame may take to be written: longer, and the peer has stopped reading.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// How long the kernel may wait for an acknowledgement: a stream that a middlebox has forgotten is
/// noticed even when nothing but a request for one page was sent on it. Longer than the engine waits
/// for pages to move, so that it decides where it can.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(40);
/// Longest frame that does not wait for its turn on an emulated link: all but states.
const SMALL_FRAME_BYTES: usize = 4 << 10;
/// Step by which the buffer for a frame grows, so that memory follows what arrived and not what
/// was announced.
const GROW_STEP: usize = 64 << 10;

/// Why a peer could not be reached or understood.
#[derive(Debug, thiserror::Error)]
pub enum Dial {
    /// The name does not resolve.
    #[error("{peer} is not an address: expected HOST:PORT")]
    Address {
        /// As given.
        peer: String,
        /// What the resolver said.
        #[source]
        source: io::Error,
    },
    /// Nobody answers.
    #[error("no limosa host answers at {peer} ({source}): is 'limosa host' running there?")]
    Unreachable {
        /// As given.
        peer: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The connection broke or was closed.
    #[error("the connection broke: {}", in_words(.0))]
    Broken(#[from] io::Error),
    /// The peer sent nonsense.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// What became of a connection, in words that need no knowledge of system calls.
pub(crate) fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the other side closed it".to_owned(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "the other side is gone".to_owned()
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the other side kept silent, or stopped reading, for too long".to_owned()
        }
        _ => error.to_string(),
    }
}

/// Connects and sends the preamble.
pub(crate) fn dial(peer: &str, preamble: Preamble) -> Result<TcpStream, Dial> {
    let unreachable = |source| Dial::Unreachable {
        peer: peer.to_owned(),
        source,
    };
    let addresses: Vec<SocketAddr> = peer
        .to_socket_addrs()
        .map_err(|source| Dial::Address {
            peer: peer.to_owned(),
            source,
        })?
        .collect();
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        match TcpStream::connect_timeout(&address, HANDSHAKE_MAX) {
            Ok(mut stream) => {
                prepare(&stream).map_err(unreachable)?;
                stream.write_all(&preamble.encode()).map_err(unreachable)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(unreachable(last))
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE_MAX))?;
    socket::set_unacknowledged_max(stream, UNACKNOWLEDGED_MAX)
}

/// Reads the preamble of a connection that was accepted.
pub(crate) fn read_preamble(stream: &mut TcpStream) -> Result<Preamble, ReadError> {
    prepare(stream)?;
    stream.set_read_timeout(Some(HANDSHAKE_MAX))?;
    let mut bytes = [0; PREAMBLE_BYTES];
    stream.read_exact(&mut bytes)?;
    Ok(Preamble::decode(&bytes)?)
}

/// Reads one frame. Memory is taken as bytes arrive, never as they are announced.
pub(crate) fn read_frame(stream: &mut impl Read) -> Result<ControlFrame, ReadError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let length = ControlFrame::check_length(prefix)?;
    let mut body = Vec::new();
    while body.len() < length {
        let from = body.len();
        body.resize(length.min(from + GROW_STEP), 0);
        stream.read_exact(&mut body[from..])?;
    }
    Ok(ControlFrame::decode(&body)?)
}

/// The writing half of a control stream.
#[derive(Debug)]
pub(crate) struct ControlWriter {
    stream: Mutex<TcpStream>,
    link: Arc<Bucket>,
}

impl ControlWriter {
    pub(crate) fn new(stream: TcpStream, link: Arc<Bucket>) -> Self {
        Self {
            stream: Mutex::new(stream),
            link,
        }
    }

    /// Writes one frame with one system call.
    pub(crate) fn send(&self, frame: &ControlFrame) -> io::Result<()> {
        let bytes = frame.encode();
        // What is small goes first: nobody waits long for it, and much waits for what it says.
        if bytes.len() <= SMALL_FRAME_BYTES {
            self.link.take_first(bytes.len() as u64);
        } else {
            self.link.take(bytes.len() as u64);
        }
        self.stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&bytes)
    }

    /// Ends the connection for both halves.
    pub(crate) fn close(&self) {
        close(&self.stream.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Ends a connection; one that is broken already needs no ending.
pub(crate) fn close(stream: &TcpStream) {
    if let Err(error) = stream.shutdown(Shutdown::Both) {
        tracing::trace!(%error, "closing a connection that is gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announced_length_takes_no_memory_before_bytes_arrive() {
        let mut bytes = (limosa_engine::wire::CONTROL_FRAME_BYTES_MAX as u32)
            .to_le_bytes()
            .to_vec();
        bytes.extend_from_slice(&[0; 100]);
        let result = read_frame(&mut bytes.as_slice());
        assert!(matches!(result, Err(ReadError::Broken(_))));
    }

    #[test]
    fn broken_connections_are_told_in_words() {
        let check = |kind: io::ErrorKind, expect: &str| {
            let error = ReadError::Broken(kind.into());
            assert_eq!(error.to_string(), format!("the connection broke: {expect}"));
        };
        check(io::ErrorKind::UnexpectedEof, "the other side closed it");
        check(io::ErrorKind::BrokenPipe, "the other side is gone");
        check(
            io::ErrorKind::WouldBlock,
            "the other side kept silent, or stopped reading, for too long",
        );
    }

    #[test]
    fn half_a_frame_is_an_error_and_no_frame() {
        let bytes = ControlFrame::Refuse {
            reason: "no".to_owned(),
        }
        .encode();
        for cut in 0..bytes.len() {
            assert!(read_frame(&mut &bytes[..cut]).is_err());
        }
    }
}
