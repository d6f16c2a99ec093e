//! The beginning of an encrypted connection: both sides show who they are, and agree on keys.
//!
//! ```text
//!  source: hello ──────────────▶ target
//!          ◀───── hello, certificate     the source checks the name that its operator gave
//!          certificate ────────▶         the target checks who vouches for it
//!          ◀───────────── a record without content: welcome
//! ```
//!
//! In TLS 1.3 who dials is done before its own certificate has been looked at. So it waits for one
//! more word, or hears here why it is not wanted, and its operator is told.
//!
//! Nothing of the other side is looked at before its certificate was found good, but for its first
//! bytes: a host that does not speak TLS at all is told so in words.

use super::Channel;
use super::records::{self, NextKeys};
use crate::credentials::{Credentials, describe};
use limosa_engine::wire::{MAGIC, PREAMBLE_BYTES};
use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::pki_types::ServerName;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, UnbufferedStatus};
use rustls::{AlertDescription, ExtractedSecrets, SupportedCipherSuite};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that a handshake may bring before it makes progress: certificates take a few thousand.
const HANDSHAKE_BYTES_MAX: usize = 64 << 10;
/// Steps that a handshake may take: each is a message, or a reason to wait for one.
const STEPS_MAX: usize = 1000;
/// First bytes of a record that begins a handshake: its type, and the version's upper half.
const HELLO: [u8; 2] = [22, 3];

/// Why there is no encrypted connection, in words for the operator.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    /// The other side sent what no TLS begins with.
    #[error("the other side does not speak TLS: start it with --tls, or this one without")]
    PeerIsPlain,
    /// Certificate of the other side.
    #[error("the certificate of the other side is refused: {0}")]
    Certificate(String),
    /// The other side has none.
    #[error("the other side showed no certificate")]
    NoCertificate,
    /// It says what it does not like.
    #[error("{0}")]
    Alert(String),
    /// The connection broke.
    #[error("the TLS handshake broke: {}", in_words(.0))]
    Broken(#[from] io::Error),
    /// Anything else.
    #[error("the TLS handshake failed: {0}")]
    Failed(String),
}

fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => {
            "the other side closed the connection; does it run with --tls?".to_owned()
        }
        _ => crate::connection::in_words(error),
    }
}

impl From<rustls::Error> for HandshakeError {
    fn from(error: rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(reason) => Self::Certificate(describe(&reason)),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::AlertReceived(alert) => Self::Alert(alert_words(alert)),
            error => Self::Failed(error.to_string()),
        }
    }
}

/// What the other side says before it closes an encrypted connection.
pub(super) fn alert(alert: AlertDescription) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, alert_words(alert))
}

fn alert_words(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let why = match alert {
        A::UnknownCA | A::DecryptError => {
            "it was signed by another authority than the one it trusts"
        }
        A::CertificateExpired => "it has expired, or one of the two clocks is wrong",
        A::CertificateRequired => "there is none",
        A::BadCertificate => "it is not for the name or address that was given, or it is broken",
        A::UnsupportedCertificate | A::CertificateUnknown | A::CertificateRevoked => {
            "it is not acceptable there"
        }
        other => return format!("the other side ended the TLS connection ({other:?})"),
    };
    format!("the other side refused the certificate of this host: {why}")
}

/// True if a connection that should be plain begins like an encrypted one.
pub(crate) fn is_hello(begin: &[u8; PREAMBLE_BYTES]) -> bool {
    begin.starts_with(&HELLO)
}

/// Makes a connection that was dialled an encrypted one, to the host of this name.
pub(crate) fn connect(
    socket: TcpStream,
    name: ServerName<'static>,
    credentials: &Credentials,
    limit: Duration,
) -> Result<Channel, HandshakeError> {
    let until = Instant::now() + limit;
    let side = UnbufferedClientConnection::new(Arc::clone(&credentials.client), name)?;
    let (mut opener, sealer) = shake_hands(side, &socket, until)?;
    wait_until(&socket, until)?;
    opener
        .wait_for_empty(&socket)
        .map_err(|error| match error.kind() {
            io::ErrorKind::ConnectionAborted => HandshakeError::Alert(error.to_string()),
            _ => HandshakeError::Broken(error),
        })?;
    socket.set_read_timeout(None)?;
    Ok(Channel::new(socket, Some((opener, sealer))))
}

/// Makes a connection that was accepted an encrypted one, if the other side is to be believed. With an
/// error the socket comes back, to say farewell.
pub(crate) fn accept(
    socket: TcpStream,
    credentials: &Credentials,
    limit: Duration,
) -> Result<Channel, (HandshakeError, TcpStream)> {
    let until = Instant::now() + limit;
    let shaken = UnbufferedServerConnection::new(Arc::clone(&credentials.server))
        .map_err(HandshakeError::from)
        .and_then(|side| shake_hands(side, &socket, until));
    let welcomed = shaken.and_then(|(opener, mut sealer)| {
        sealer.send_empty(&socket)?;
        Ok((opener, sealer))
    });
    match welcomed {
        Ok(halves) => Ok(Channel::new(socket, Some(halves))),
        Err(error) => Err((error, socket)),
    }
}

/// One side of a handshake.
trait Side {
    type Data: Send + 'static;
    fn process<'a>(&'a mut self, incoming: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data>;
    fn has_more_to_say(&self) -> bool;
    fn finish(self) -> Result<Finished, rustls::Error>;
    /// True if the other side's first bytes can be no TLS.
    fn is_plain(begin: &[u8]) -> bool;
}

/// What a handshake leaves behind.
struct Finished {
    suite: SupportedCipherSuite,
    secrets: ExtractedSecrets,
    next: Box<dyn NextKeys>,
}

impl<Data: Send + 'static> From<(ExtractedSecrets, KernelConnection<Data>)> for Finished {
    fn from((secrets, next): (ExtractedSecrets, KernelConnection<Data>)) -> Self {
        Self {
            suite: next.negotiated_cipher_suite(),
            secrets,
            next: Box::new(next),
        }
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'a>(&'a mut self, incoming: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn has_more_to_say(&self) -> bool {
        self.wants_write()
    }

    fn finish(self) -> Result<Finished, rustls::Error> {
        Ok(self.dangerous_into_kernel_connection()?.into())
    }

    fn is_plain(begin: &[u8]) -> bool {
        // Types of records, as far as there are any.
        matches!(begin, [typ, version, ..] if !(20..=23).contains(typ) || *version != HELLO[1])
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'a>(&'a mut self, incoming: &'a mut [u8]) -> UnbufferedStatus<'a, 'a, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn has_more_to_say(&self) -> bool {
        self.wants_write()
    }

    fn finish(self) -> Result<Finished, rustls::Error> {
        Ok(self.dangerous_into_kernel_connection()?.into())
    }

    fn is_plain(begin: &[u8]) -> bool {
        begin.first() == MAGIC.first()
    }
}

type Halves = (records::Opener, records::Sealer);

/// What the state of a handshake asks for.
enum Step {
    GoOn,
    Receive,
    Done,
}

fn shake_hands<S: Side>(
    mut side: S,
    socket: &TcpStream,
    until: Instant,
) -> Result<Halves, HandshakeError> {
    let mut incoming = vec![0; HANDSHAKE_BYTES_MAX];
    let mut received = 0;
    let (mut outgoing, mut early) = (Vec::new(), Vec::new());
    let mut is_first = true;
    for _ in 0..STEPS_MAX {
        let UnbufferedStatus { discard, state } = side.process(&mut incoming[..received]);
        let step = match state {
            Ok(state) => take_step(state, socket, &mut outgoing, &mut early)?,
            Err(error) => {
                say_why(&mut side, socket, outgoing);
                return Err(error.into());
            }
        };
        incoming.copy_within(discard..received, 0);
        received -= discard;
        match step {
            Step::GoOn => {}
            Step::Receive => {
                wait_until(socket, until)?;
                let room = incoming.get_mut(received..).filter(|room| !room.is_empty());
                let room =
                    room.ok_or_else(|| HandshakeError::Failed("it is too long".to_owned()))?;
                let count = (&*socket).read(room)?;
                if count == 0 {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                received += count;
                if std::mem::take(&mut is_first) && S::is_plain(&incoming[..received]) {
                    return Err(HandshakeError::PeerIsPlain);
                }
            }
            Step::Done => {
                let Finished {
                    suite,
                    secrets,
                    next,
                } = side.finish()?;
                let suite = suite
                    .tls13()
                    .ok_or_else(|| HandshakeError::Failed("it is no TLS 1.3".to_owned()))?;
                let received = records::Received {
                    opened: &early,
                    sealed: &incoming[..received],
                };
                return Ok(records::halves(suite, secrets, next, received)?);
            }
        }
    }
    Err(HandshakeError::Failed("it does not end".to_owned()))
}

fn take_step<Data>(
    state: ConnectionState<'_, '_, Data>,
    socket: &TcpStream,
    outgoing: &mut Vec<u8>,
    early: &mut Vec<u8>,
) -> Result<Step, HandshakeError> {
    match state {
        ConnectionState::EncodeTlsData(mut message) => {
            encode(outgoing, |room| message.encode(room).ok());
            Ok(Step::GoOn)
        }
        ConnectionState::TransmitTlsData(transmit) => {
            (&*socket).write_all(outgoing)?;
            outgoing.clear();
            transmit.done();
            Ok(Step::GoOn)
        }
        ConnectionState::BlockedHandshake => Ok(Step::Receive),
        ConnectionState::WriteTraffic(_) => Ok(Step::Done),
        // It did not wait to be welcomed, but its certificate has been found good.
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                early.extend_from_slice(record?.payload);
            }
            Ok(Step::GoOn)
        }
        _ => Err(HandshakeError::Failed("the other side ended it".to_owned())),
    }
}

/// Appends a message of at most a record and its frame.
fn encode(outgoing: &mut Vec<u8>, message: impl FnOnce(&mut [u8]) -> Option<usize>) {
    const MESSAGE_BYTES_MAX: usize = 18 << 10;
    let at = outgoing.len();
    outgoing.resize(at + MESSAGE_BYTES_MAX, 0);
    let count = message(&mut outgoing[at..]).unwrap_or_default();
    outgoing.truncate(at + count);
}

/// Sends the alert of a handshake that has failed, as far as the other side listens.
fn say_why<S: Side>(side: &mut S, socket: &TcpStream, mut outgoing: Vec<u8>) {
    // Nothing that came is looked at again: as long as there is something to say, that comes first.
    while side.has_more_to_say() {
        let Ok(ConnectionState::EncodeTlsData(mut message)) = side.process(&mut []).state else {
            break;
        };
        encode(&mut outgoing, |room| message.encode(room).ok());
    }
    if let Err(error) = (&*socket).write_all(&outgoing) {
        tracing::debug!(%error, "a refused peer did not listen");
    }
}

/// The next read may take what is left of the time.
fn wait_until(socket: &TcpStream, until: Instant) -> io::Result<()> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    socket.set_read_timeout(Some(left))
}
