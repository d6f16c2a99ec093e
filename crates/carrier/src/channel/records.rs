//! The records of an encrypted connection, one direction each: [`Sealer`] makes them, [`Opener`] takes
//! them apart. [RFC8446 §5]
//!
//! `rustls` shakes hands and then gives the keys away, with the very functions that it seals and opens
//! records by; what is done here is to lay records side by side, so that one system call takes many,
//! and to count them: a key is replaced before it has sealed more than is safe [RFC8446 §5.5].
//!
//! ```text
//!  out:     header│sealed … │header│sealed … │            one write
//!  buffer:  ─ used ─│content│ header│sealed … │head─free─   one read brings several
//! ```
//!
//! Invariant: no sequence number is used twice with a key; each goes up before its record can be seen
//! by anybody. A record longer than the standard allows is an error before it is waited for.

use limosa_os::SharedMemory;
use limosa_pages::PageRange;
use rustls::crypto::cipher::{
    InboundOpaqueMessage, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
};
use rustls::kernel::KernelConnection;
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ExtractedSecrets, ProtocolVersion,
    Tls13CipherSuite,
};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes before the sealed part of a record: type, version, length.
const HEADER_BYTES: usize = 5;
/// Content of a full record.
const CONTENT_BYTES_MAX: usize = 16 << 10;
/// Sealed part of a record: content, its type, padding, tag.
const SEALED_BYTES_MAX: usize = CONTENT_BYTES_MAX + 256;
/// Sealed bytes that one system call takes, more or less: enough to make it cheap, little enough to
/// stay in the processor's cache on the way from one step to the next.
const OUT_BYTES: usize = 256 << 10;
/// What one system call may bring: as much, and room for the record that it tears.
const BUFFER_BYTES: usize = OUT_BYTES + HEADER_BYTES + SEALED_BYTES_MAX;
/// Message by which one side says that it seals with the next key from now on, and asks for nothing.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
/// The same, asking the other side to do so, too.
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

/// What the two halves share, and hardly ever touch: how to get the next keys.
pub(super) struct Keys {
    suite: &'static Tls13CipherSuite,
    next: Mutex<Box<dyn NextKeys>>,
    /// The other side asked for a new key.
    is_update_due: AtomicBool,
}

/// A key, and the number of the first record that it seals.
type NextKey = Result<(u64, ConnectionTrafficSecrets), rustls::Error>;

/// Derives keys; a connection as `rustls` leaves it behind.
pub(super) trait NextKeys: Send {
    fn sending(&mut self) -> NextKey;
    fn receiving(&mut self) -> NextKey;
}

impl<Data: Send> NextKeys for KernelConnection<Data> {
    fn sending(&mut self) -> NextKey {
        self.update_tx_secret()
    }

    fn receiving(&mut self) -> NextKey {
        self.update_rx_secret()
    }
}

/// What came behind the handshake.
pub(super) struct Received<'a> {
    pub(super) opened: &'a [u8],
    pub(super) sealed: &'a [u8],
}

/// Takes keys apart into what seals and what opens.
pub(super) fn halves(
    suite: &'static Tls13CipherSuite,
    secrets: ExtractedSecrets,
    next: Box<dyn NextKeys>,
    received: Received<'_>,
) -> io::Result<(Opener, Sealer)> {
    let keys = Arc::new(Keys {
        suite,
        next: Mutex::new(next),
        is_update_due: AtomicBool::new(false),
    });
    let ExtractedSecrets { tx, rx } = secrets;
    let opener = Opener::new(Arc::clone(&keys), rx, received)?;
    Ok((opener, Sealer::new(keys, tx)?))
}

impl Keys {
    fn encrypter(
        &self,
        secrets: ConnectionTrafficSecrets,
    ) -> io::Result<Box<dyn MessageEncrypter>> {
        let (key, iv) = key_and_iv(secrets)?;
        Ok(self.suite.aead_alg.encrypter(key, iv))
    }

    fn decrypter(
        &self,
        secrets: ConnectionTrafficSecrets,
    ) -> io::Result<Box<dyn MessageDecrypter>> {
        let (key, iv) = key_and_iv(secrets)?;
        Ok(self.suite.aead_alg.decrypter(key, iv))
    }

    fn next(
        &self,
        of: fn(&mut dyn NextKeys) -> NextKey,
    ) -> io::Result<(u64, ConnectionTrafficSecrets)> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        of(&mut **next).map_err(invalid)
    }
}

type KeyAndIv = (rustls::crypto::cipher::AeadKey, rustls::crypto::cipher::Iv);

fn key_and_iv(secrets: ConnectionTrafficSecrets) -> io::Result<KeyAndIv> {
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn invalid(error: impl fmt::Display) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the encrypted connection is damaged ({error})"),
    )
}

/// Seals what is sent.
pub(super) struct Sealer {
    keys: Arc<Keys>,
    encrypter: Box<dyn MessageEncrypter>,
    sequence: u64,
    /// Records that one key may seal.
    sequence_max: u64,
    /// Content of the record that is being filled, so far as it goes.
    content: Box<[u8]>,
    filled: usize,
    /// Sealed records.
    out: Vec<u8>,
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

impl Sealer {
    fn new(
        keys: Arc<Keys>,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
    ) -> io::Result<Self> {
        Ok(Self {
            encrypter: keys.encrypter(secrets)?,
            // One is left for the record that announces the next key.
            sequence_max: keys.suite.common.confidentiality_limit - 1,
            keys,
            sequence,
            content: vec![0; CONTENT_BYTES_MAX].into(),
            filled: 0,
            out: Vec::new(),
        })
    }

    /// Adds bytes; what fills is sealed, what is much is sent.
    pub(super) fn put(&mut self, socket: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = &mut self.content[self.filled..];
            let (now, later) = bytes.split_at(room.len().min(bytes.len()));
            room[..now.len()].copy_from_slice(now);
            bytes = later;
            self.filled += now.len();
            self.seal_if_full(socket)?;
        }
        Ok(())
    }

    /// The same with pages of a guest's memory, as they are now.
    pub(super) fn put_pages(
        &mut self,
        socket: &TcpStream,
        memory: &SharedMemory,
        range: PageRange,
    ) -> io::Result<()> {
        let mut offset = range.first.file_offset();
        let end = range.end().file_offset();
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let room = &mut self.content[self.filled..];
            let count = room.len().min(left);
            memory.read_at(offset, &mut room[..count])?;
            offset += count as u64;
            self.filled += count;
            self.seal_if_full(socket)?;
        }
        Ok(())
    }

    /// Seals and sends all that is left.
    pub(super) fn flush(&mut self, socket: &TcpStream) -> io::Result<()> {
        if self.filled > 0 {
            self.seal_content()?;
        }
        self.send(socket)
    }

    /// Sends a record without content, at once.
    pub(super) fn send_empty(&mut self, socket: &TcpStream) -> io::Result<()> {
        self.seal_content()?;
        self.send(socket)
    }

    fn seal_if_full(&mut self, socket: &TcpStream) -> io::Result<()> {
        if self.filled == CONTENT_BYTES_MAX {
            self.seal_content()?;
            if self.out.len() >= OUT_BYTES - SEALED_BYTES_MAX {
                self.send(socket)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, socket: &TcpStream) -> io::Result<()> {
        let sent = (&*socket).write_all(&self.out);
        self.out.clear();
        sent
    }

    fn seal_content(&mut self) -> io::Result<()> {
        let is_due = self.keys.is_update_due.swap(false, Ordering::SeqCst);
        if is_due || self.sequence >= self.sequence_max {
            self.seal(ContentType::Handshake, &KEY_UPDATE)?;
            let (sequence, secrets) = self.keys.next(|keys| keys.sending())?;
            self.encrypter = self.keys.encrypter(secrets)?;
            self.sequence = sequence;
        }
        let content = std::mem::take(&mut self.content);
        let filled = std::mem::take(&mut self.filled);
        let sealed = self.seal(ContentType::ApplicationData, &content[..filled]);
        self.content = content;
        sealed
    }

    fn seal(&mut self, typ: ContentType, content: &[u8]) -> io::Result<()> {
        let message = OutboundPlainMessage {
            typ,
            version: ProtocolVersion::TLSv1_3,
            payload: OutboundChunks::Single(content),
        };
        let sequence = self.sequence;
        self.sequence += 1;
        let sealed = self.encrypter.encrypt(message, sequence).map_err(invalid)?;
        self.out.extend_from_slice(&sealed.encode());
        Ok(())
    }

    /// Adds a record that asks the other side for a new key.
    #[cfg(test)]
    pub(super) fn ask_for_key_update(&mut self) {
        self.seal(ContentType::Handshake, &KEY_UPDATE_REQUESTED)
            .unwrap();
        let (sequence, secrets) = self.keys.next(|keys| keys.sending()).unwrap();
        self.encrypter = self.keys.encrypter(secrets).unwrap();
        self.sequence = sequence;
    }

    #[cfg(test)]
    pub(super) fn records_of_key(&self) -> u64 {
        self.sequence
    }

    #[cfg(test)]
    pub(super) fn limit_records_per_key(&mut self, records: u64) {
        self.sequence_max = records;
    }
}

/// Opens what was received.
pub(super) struct Opener {
    keys: Arc<Keys>,
    decrypter: Box<dyn MessageDecrypter>,
    sequence: u64,
    buffer: Vec<u8>,
    /// Opened and not consumed.
    content: Range<usize>,
    /// Received and not opened.
    sealed: Range<usize>,
    /// The other side has said that nothing follows.
    is_over: bool,
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

impl Opener {
    fn new(
        keys: Arc<Keys>,
        (sequence, secrets): (u64, ConnectionTrafficSecrets),
        Received { opened, sealed }: Received<'_>,
    ) -> io::Result<Self> {
        let mut buffer = vec![0; BUFFER_BYTES];
        let (middle, end) = (opened.len(), opened.len() + sealed.len());
        let start = buffer.get_mut(..end).ok_or_else(too_long)?;
        start[..middle].copy_from_slice(opened);
        start[middle..].copy_from_slice(sealed);
        Ok(Self {
            decrypter: keys.decrypter(secrets)?,
            keys,
            sequence,
            buffer,
            content: 0..middle,
            sealed: middle..end,
            is_over: false,
        })
    }

    /// What was opened and not consumed; waits for more if that is nothing. Empty only if the other
    /// side has said that nothing follows.
    pub(super) fn content(&mut self, socket: &TcpStream) -> io::Result<&[u8]> {
        while self.content.is_empty() && !self.is_over {
            self.open_one(socket)?;
        }
        Ok(&self.buffer[self.content.clone()])
    }

    /// Takes the first `count` bytes of the content away.
    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.content.len(), "there is so much");
        self.content.start += count;
    }

    /// Waits for the first record of the other side, which has no content.
    pub(super) fn wait_for_empty(&mut self, socket: &TcpStream) -> io::Result<()> {
        if self.content.is_empty() {
            self.open_one(socket)?;
            if self.content.is_empty() && !self.is_over {
                return Ok(());
            }
        }
        Err(invalid("no greeting came"))
    }

    /// Opens the next record, which may have no content.
    fn open_one(&mut self, socket: &TcpStream) -> io::Result<()> {
        debug_assert!(self.content.is_empty(), "consumed before more is opened");
        let length = loop {
            match self.next_length()? {
                Some(length) => break length,
                None => self.receive(socket)?,
            }
        };
        let body = self.sealed.start + HEADER_BYTES..self.sealed.start + length;
        self.sealed.start = body.end;
        let message = InboundOpaqueMessage::new(
            ContentType::ApplicationData,
            ProtocolVersion::TLSv1_2,
            &mut self.buffer[body.clone()],
        );
        let sequence = self.sequence;
        self.sequence = sequence.checked_add(1).ok_or_else(|| invalid("too much"))?;
        let plain = self.decrypter.decrypt(message, sequence).map_err(invalid)?;
        match plain.typ {
            ContentType::ApplicationData => {
                self.content = body.start..body.start + plain.payload.len();
            }
            ContentType::Alert => {
                let description = plain.payload.get(1).copied().ok_or_else(too_long)?;
                match AlertDescription::from(description) {
                    AlertDescription::CloseNotify => self.is_over = true,
                    alert => return Err(super::handshake::alert(alert)),
                }
            }
            ContentType::Handshake => {
                let is_asked = plain.payload == KEY_UPDATE_REQUESTED;
                if plain.payload != KEY_UPDATE && !is_asked {
                    return Err(invalid("an unknown message came"));
                }
                self.take_next_key(is_asked)?;
            }
            _ => return Err(invalid("an unknown record came")),
        }
        Ok(())
    }

    fn take_next_key(&mut self, is_asked: bool) -> io::Result<()> {
        let (sequence, secrets) = self.keys.next(|keys| keys.receiving())?;
        self.decrypter = self.keys.decrypter(secrets)?;
        self.sequence = sequence;
        if is_asked {
            self.keys.is_update_due.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Length of the next record with its header, once all of it is here.
    fn next_length(&self) -> io::Result<Option<usize>> {
        let sealed = &self.buffer[self.sealed.clone()];
        let Some(&[typ, _, _, high, low]) = sealed.first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes([high, low]));
        if typ != u8::from(ContentType::ApplicationData) {
            return Err(invalid("something that is not encrypted came"));
        }
        if length > SEALED_BYTES_MAX {
            return Err(too_long());
        }
        let length = HEADER_BYTES + length;
        Ok((sealed.len() >= length).then_some(length))
    }

    fn receive(&mut self, mut socket: &TcpStream) -> io::Result<()> {
        // What is left of a torn record goes to the front, and with it the room for the rest.
        if self.sealed.is_empty()
            || self.buffer.len() - self.sealed.start < HEADER_BYTES + SEALED_BYTES_MAX
        {
            self.buffer.copy_within(self.sealed.clone(), 0);
            self.sealed = 0..self.sealed.len();
        }
        self.content = 0..0;
        let received = socket.read(&mut self.buffer[self.sealed.end..])?;
        if received == 0 {
            // Without a goodbye, it may be cut off by anybody.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.sealed.end += received;
        Ok(())
    }
}

fn too_long() -> io::Error {
    invalid("a record is of no possible length")
}
