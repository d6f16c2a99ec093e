//! A connection to another host, plain or encrypted, as two halves that live in different threads.
//!
//! Plain, a half is the socket: the same calls, and the kernel is told where pages are. Encrypted,
//! each half has the keys of its direction and nothing in common with the other, so that neither ever
//! waits for the other: pages are read into records, which are sealed and leave many at a time; what
//! comes is opened where it was received and copied once into place.
//!
//! Whoever has the socket may close it for both halves, from any thread and without a lock.
//!
//! Deliberately absent: a goodbye. Every stream of the protocol says itself when it is complete, and an
//! end before that is an error, whoever made it.

pub(crate) mod handshake;
mod records;

use limosa_os::SharedMemory;
use limosa_os::socket::{self, TcpStatus};
use limosa_pages::{BytesPerSecond, PageRange};
use records::{Opener, Sealer};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// Fewer bytes are not worth being waited for: they come in a segment or two.
const PART_MIN: usize = 64 << 10;
/// Bytes that are waited for: what a sender gives to the kernel at once.
const PART_MAX: usize = 512 << 10;

/// A connection, whole.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
}

/// What a connection can be closed by.
#[derive(Clone, Debug)]
pub(crate) struct Handle(Arc<TcpStream>);

/// The half that receives.
#[derive(Debug)]
pub(crate) struct Reader {
    socket: Arc<TcpStream>,
    opener: Option<Box<Opener>>,
}

/// The half that sends.
#[derive(Debug)]
pub(crate) struct Writer {
    socket: Arc<TcpStream>,
    sealer: Option<Box<Sealer>>,
}

impl Channel {
    /// A connection that is not encrypted.
    pub(crate) fn plain(socket: TcpStream) -> Self {
        Self::new(socket, None)
    }

    fn new(socket: TcpStream, keys: Option<(Opener, Sealer)>) -> Self {
        let socket = Arc::new(socket);
        let (opener, sealer) = keys.unzip();
        Self {
            reader: Reader {
                socket: Arc::clone(&socket),
                opener: opener.map(Box::new),
            },
            writer: Writer {
                socket,
                sealer: sealer.map(Box::new),
            },
        }
    }

    /// Closes it from elsewhere.
    pub(crate) fn handle(&self) -> Handle {
        self.reader.handle()
    }
}

impl Handle {
    /// Ends the connection for both halves; one that is broken already needs no ending.
    pub(crate) fn close(&self) {
        if let Err(error) = self.0.shutdown(Shutdown::Both) {
            tracing::trace!(%error, "closing a connection that is gone");
        }
    }
}

impl Reader {
    /// How long one read may wait.
    pub(crate) fn set_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(limit)
    }

    pub(crate) fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.socket))
    }

    pub(crate) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Fills `into` with bytes that are known to come.
    pub(crate) fn read_content(&mut self, into: &mut [u8]) -> io::Result<()> {
        if self.opener.is_some() {
            return self.read_exact(into);
        }
        let mut socket = &*self.socket;
        in_parts(socket, into.len(), |done, part| {
            socket.read_exact(&mut into[done..done + part])
        })
    }

    /// Receives `len` bytes into the memory at `offset`.
    pub(crate) fn receive(
        &mut self,
        memory: &SharedMemory,
        offset: u64,
        len: usize,
    ) -> io::Result<()> {
        let Some(opener) = &mut self.opener else {
            let socket = &*self.socket;
            return in_parts(socket, len, |done, part| {
                memory.receive(socket, offset + done as u64, part)
            });
        };
        let mut done = 0;
        while done < len {
            let content = opener.content(&self.socket)?;
            if content.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = content.len().min(len - done);
            memory.write_at(offset + done as u64, &content[..count])?;
            opener.consume(count);
            done += count;
        }
        Ok(())
    }
}

/// Reads `len` bytes that are known to come in parts, each when it is there as a whole: on a machine that
/// is busy with the move itself, and in one that is virtual itself, a wake-up costs more than the copy
/// of a segment. `read` gets the place and the length of a part.
fn in_parts(
    socket: &TcpStream,
    len: usize,
    mut read: impl FnMut(usize, usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        let part = (len - done).min(PART_MAX);
        if part >= PART_MIN {
            socket::wait_for_bytes(socket, part, socket.read_timeout()?)?;
        }
        read(done, part)?;
        done += part;
    }
    Ok(())
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(opener) = &mut self.opener else {
            return (&*self.socket).read(into);
        };
        let content = opener.content(&self.socket)?;
        let count = content.len().min(into.len());
        into[..count].copy_from_slice(&content[..count]);
        opener.consume(count);
        Ok(count)
    }
}

impl Writer {
    pub(crate) fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.socket))
    }

    /// Asks for a send buffer of about `bytes`.
    pub(crate) fn set_send_buffer(&self, bytes: usize) -> io::Result<()> {
        socket::set_send_buffer(&*self.socket, bytes)
    }

    /// What the kernel knows about the connection.
    pub(crate) fn status(&self) -> io::Result<TcpStatus> {
        socket::tcp_status(&*self.socket)
    }

    /// Sends no faster than this, or as fast as it goes.
    pub(crate) fn set_send_rate(&self, rate: Option<BytesPerSecond>) -> io::Result<()> {
        socket::set_send_rate(&*self.socket, rate.map(BytesPerSecond::get))
    }

    /// Sends headers, each followed by the pages that belong to it.
    pub(crate) fn send_parts<const N: usize>(
        &mut self,
        memory: &SharedMemory,
        parts: &[([u8; N], Option<PageRange>)],
    ) -> io::Result<()> {
        let Some(sealer) = &mut self.sealer else {
            return memory.send_parts(&*self.socket, parts);
        };
        for (header, pages) in parts {
            sealer.put(&self.socket, header)?;
            if let Some(range) = pages {
                sealer.put_pages(&self.socket, memory, *range)?;
            }
        }
        sealer.flush(&self.socket)
    }
}

/// All of a `write_all` leaves with it: nothing is held back.
impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(sealer) = &mut self.sealer else {
            return (&*self.socket).write(bytes);
        };
        sealer.put(&self.socket, bytes)?;
        sealer.flush(&self.socket)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
