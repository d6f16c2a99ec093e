//! Connections between two hosts: dialling, preambles, control frames.
//!
//! Control messages leave at once: one write a message and no Nagle. Whatever is read from a peer
//! has a limit and, during the handshake, a time-out.
//!
//! With credentials a connection is encrypted before the first byte of the protocol; without them
//! nothing is.

use crate::bucket::Bucket;
use crate::channel::handshake::{self, HandshakeError};
use crate::channel::{Channel, Handle, Reader, Writer};
use crate::credentials::Credentials;
use limosa_engine::wire::{ControlFrame, PREAMBLE_BYTES, Preamble, WireError};
use limosa_os::socket;
use rustls::pki_types::ServerName;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a connection, its TLS handshake, its preamble and the first answer may take, each.
pub(crate) const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// How long one control frame may take to be written: longer, and the peer has stopped reading.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// How long the kernel may wait for an acknowledgement: a stream that a middlebox has forgotten is
/// noticed even when nothing but a request for one page was sent on it. Longer than the engine waits
/// for pages to move, so that it decides where it can.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(40);
/// Longest frame that does not wait for its turn on an emulated link: all but states.
const SMALL_FRAME_BYTES: usize = 4 << 10;
/// How long a peer that is sent away may take to read why, and how much it may say meanwhile.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
const FAREWELL_BYTES_MAX: usize = 64 << 10;
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
    /// Its name can be in no certificate.
    #[error("{peer} is no name that a certificate can be checked against")]
    Name {
        /// As given.
        peer: String,
    },
    /// Somebody answers, and one of the two does not believe the other.
    #[error("no encrypted connection to {peer}: {reason}")]
    Tls {
        /// As given.
        peer: String,
        /// In words.
        reason: String,
    },
}

/// Why a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// The connection broke or was closed.
    #[error("the connection broke: {}", in_words(.0))]
    Broken(#[from] io::Error),
    /// The peer would be encrypted, and this host is not.
    #[error("this host does not speak TLS: start it with --tls, or the other side without")]
    Encrypted,
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

/// Where connections go, and how.
#[derive(Clone, Debug)]
pub(crate) struct Dialler {
    /// The other daemon's address for hosts, `HOST:PORT`.
    pub(crate) peer: String,
    /// With these, every connection is encrypted.
    pub(crate) credentials: Option<Arc<Credentials>>,
}

impl Dialler {
    /// Connects and sends the preamble.
    pub(crate) fn dial(&self, preamble: Preamble) -> Result<Channel, Dial> {
        let peer = || self.peer.clone();
        let unreachable = |source| Dial::Unreachable {
            peer: peer(),
            source,
        };
        let socket = self.connect()?;
        prepare(&socket).map_err(unreachable)?;
        let mut channel = match &self.credentials {
            None => Channel::plain(socket),
            Some(credentials) => {
                let name = server_name(&self.peer).ok_or_else(|| Dial::Name { peer: peer() })?;
                handshake::connect(socket, name, credentials, HANDSHAKE_MAX).map_err(|error| {
                    Dial::Tls {
                        peer: peer(),
                        reason: error.to_string(),
                    }
                })?
            }
        };
        channel
            .writer
            .write_all(&preamble.encode())
            .map_err(unreachable)?;
        Ok(channel)
    }

    fn connect(&self) -> Result<TcpStream, Dial> {
        let addresses: Vec<SocketAddr> = self
            .peer
            .to_socket_addrs()
            .map_err(|source| Dial::Address {
                peer: self.peer.clone(),
                source,
            })?
            .collect();
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect_timeout(&address, HANDSHAKE_MAX) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(Dial::Unreachable {
            peer: self.peer.clone(),
            source: last,
        })
    }
}

/// The name in `HOST:PORT` that the other side's certificate has to be for.
fn server_name(peer: &str) -> Option<ServerName<'static>> {
    let (host, _) = peer.rsplit_once(':')?;
    let host = host.strip_prefix('[').unwrap_or(host);
    let host = host.strip_suffix(']').unwrap_or(host);
    ServerName::try_from(host.to_owned()).ok()
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(WRITE_MAX))?;
    socket::set_unacknowledged_max(stream, UNACKNOWLEDGED_MAX)?;
    if is_one_host(stream.local_addr()?.ip(), stream.peer_addr()?.ip()) {
        // A host that has BBR for its networks would measure the bandwidth of its own processors, and pace by it.
        socket::set_reno(stream)?;
    }
    Ok(())
}

/// Both ends of a connection are on this host: no wire lies between them.
fn is_one_host(here: IpAddr, there: IpAddr) -> bool {
    there.is_loopback() || there == here
}

/// Makes a socket that was accepted a connection: encrypted if this host has credentials, and the other
/// side then has some that are as good. A peer that is not served hears why, as far as it listens.
pub(crate) fn accept(
    socket: TcpStream,
    credentials: Option<&Credentials>,
) -> Result<Channel, HandshakeError> {
    prepare(&socket)?;
    let Some(credentials) = credentials else {
        return Ok(Channel::plain(socket));
    };
    handshake::accept(socket, credentials, HANDSHAKE_MAX).map_err(|(error, mut socket)| {
        if let HandshakeError::PeerIsPlain = error {
            let reason = "the other side speaks TLS only: start this host with --tls, too";
            let frame = ControlFrame::Refuse {
                reason: reason.to_owned(),
            };
            if let Err(error) = socket.write_all(&frame.encode()) {
                tracing::debug!(%error, "a refused peer did not listen");
            }
        }
        farewell(&socket);
        error
    })
}

/// Closes a socket so that what was written last arrives: a close with bytes unread would take it back.
pub(crate) fn farewell(mut socket: &TcpStream) {
    let until = Instant::now() + FAREWELL_MAX;
    let mut left = FAREWELL_BYTES_MAX;
    let mut bytes = [0; 1024];
    if socket.shutdown(Shutdown::Write).is_err() {
        return;
    }
    loop {
        let time = until.saturating_duration_since(Instant::now());
        if time.is_zero() || socket.set_read_timeout(Some(time)).is_err() {
            return;
        }
        match socket.read(&mut bytes) {
            Ok(count @ 1..) if count < left => left -= count,
            _ => return,
        }
    }
}

/// Reads the preamble of a connection that was accepted.
pub(crate) fn read_preamble(reader: &mut Reader) -> Result<Preamble, ReadError> {
    reader.set_timeout(Some(HANDSHAKE_MAX))?;
    let mut bytes = [0; PREAMBLE_BYTES];
    reader.read_exact(&mut bytes)?;
    if handshake::is_hello(&bytes) {
        return Err(ReadError::Encrypted);
    }
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
    writer: Mutex<Writer>,
    handle: Handle,
    link: Arc<Bucket>,
}

impl ControlWriter {
    pub(crate) fn new(writer: Writer, link: Arc<Bucket>) -> Self {
        Self {
            handle: writer.handle(),
            writer: Mutex::new(writer),
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
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&bytes)
    }

    /// Ends the connection for both halves.
    pub(crate) fn close(&self) {
        self.handle.close();
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
    fn two_ends_on_one_host_are_told_from_others() {
        let check = |here: &str, there: &str, expect| {
            let ends = (here.parse().unwrap(), there.parse().unwrap());
            assert_eq!(is_one_host(ends.0, ends.1), expect, "{here} {there}");
        };
        check("127.0.0.1", "127.9.8.7", true);
        check("::1", "::1", true);
        check("192.0.2.1", "192.0.2.1", true);
        check("192.0.2.1", "192.0.2.2", false);
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
