//! Pages from memory to a socket and back without a copy in this process: the kernel is told the
//! addresses.

use super::SharedMemory;
use limosa_pages::PageRange;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Most buffers that the kernel takes in one call.
const BUFFERS_MAX: usize = 1024;

impl SharedMemory {
    /// Sends headers, each followed by the pages that belong to it, in order and completely, in as
    /// few calls as the kernel allows.
    ///
    /// # Errors
    /// A range is not within the memory, the peer is gone, or a time-out of the socket has passed;
    /// some bytes may then have been sent.
    pub fn send_parts<const N: usize>(
        &self,
        socket: &impl AsFd,
        parts: &[([u8; N], Option<PageRange>)],
    ) -> io::Result<()> {
        let mut buffers = Vec::with_capacity(parts.len() * 2);
        for (header, pages) in parts {
            buffers.push(buffer(header.as_ptr().cast_mut(), N));
            if let Some(range) = pages {
                let len = usize::try_from(range.bytes().get())
                    .map_err(|_| io::ErrorKind::InvalidInput)?;
                buffers.push(buffer(
                    self.mapping.at(range.first.file_offset(), len)?,
                    len,
                ));
            }
        }
        let mut rest = buffers.as_mut_slice();
        loop {
            let empty = rest.iter().take_while(|buffer| buffer.iov_len == 0).count();
            rest = &mut rest[empty..];
            if rest.is_empty() {
                return Ok(());
            }
            let sent = send(socket, &mut rest[..])?;
            advance(&mut rest, sent);
        }
    }

    /// Receives `len` bytes from a socket into the memory at `offset`.
    ///
    /// # Errors
    /// The place is not within the memory, the peer is gone (`UnexpectedEof`), or a time-out of the
    /// socket has passed; some bytes may then have been written.
    pub fn receive(&self, socket: &impl AsFd, offset: u64, len: usize) -> io::Result<()> {
        let start = self.mapping.at(offset, len)?;
        let mut done = 0;
        while done < len {
            // SAFETY: the rest of the range is valid for writing, as `at` checked. The guest may
            // access it meanwhile: bytes have no invalid values.
            let received = unsafe {
                libc::recv(
                    socket.as_fd().as_raw_fd(),
                    start.add(done).cast(),
                    len - done,
                    libc::MSG_WAITALL,
                )
            };
            match usize::try_from(received) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(received) => done += received,
                Err(_) => retry_if_interrupted()?,
            }
        }
        Ok(())
    }
}

const fn buffer(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}

/// One call; how many bytes the kernel took.
fn send(socket: &impl AsFd, buffers: &mut [libc::iovec]) -> io::Result<usize> {
    let count = buffers.len().min(BUFFERS_MAX);
    // SAFETY: a message header without name, control data and flags is all zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = buffers.as_mut_ptr();
    message.msg_iovlen = count;
    loop {
        // SAFETY: every buffer is valid for reading: headers are borrowed by the caller, pages lie
        // within the mapping. The guest may write pages meanwhile; the kernel copies bytes.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_fd().as_raw_fd(),
                &raw const message,
                libc::MSG_NOSIGNAL,
            )
        };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry_if_interrupted()?,
        }
    }
}

/// Drops `sent` bytes from the front of the buffers.
fn advance(buffers: &mut &mut [libc::iovec], mut sent: usize) {
    let mut rest = std::mem::take(buffers);
    while let Some(first) = rest.first_mut() {
        if sent < first.iov_len {
            // SAFETY: `sent` bytes lie within the buffer.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(sent) }.cast();
            first.iov_len -= sent;
            break;
        }
        sent -= first.iov_len;
        rest = &mut rest[1..];
    }
    *buffers = rest;
}

fn retry_if_interrupted() -> io::Result<()> {
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PageKind;
    use limosa_pages::{ByteCount, PAGE_SIZE, PageCount, Pfn};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::thread;

    #[test]
    fn parts_arrive_in_order_over_a_narrow_socket() {
        const PAGES: u64 = 3000;
        let size = ByteCount::new(PAGES * PAGE_SIZE);
        let source = SharedMemory::create(size, PageKind::Small).unwrap();
        for page in 0..PAGES {
            source
                .write_at(page * PAGE_SIZE + page % 4096, &page.to_le_bytes()[..1])
                .unwrap();
        }
        let (from, mut to) = UnixStream::pair().unwrap();
        crate::socket::set_send_buffer(&from, 8 << 10).unwrap();
        let target = SharedMemory::create(size, PageKind::Small).unwrap();
        let parts: Vec<([u8; 3], Option<PageRange>)> = (0..PAGES)
            .map(|page| {
                let range = PageRange::new(Pfn::new(page), PageCount::new(1));
                ([page as u8; 3], (page % 7 != 0).then_some(range))
            })
            .collect();
        thread::scope(|scope| {
            scope.spawn(|| source.send_parts(&from, &parts).unwrap());
            for (page, (header, content)) in (0..).zip(&parts) {
                let mut received = [0; 3];
                to.read_exact(&mut received).unwrap();
                assert_eq!(received, *header);
                if content.is_some() {
                    target.receive(&to, page * PAGE_SIZE, 4096).unwrap();
                    assert_eq!(target.hash(Pfn::new(page)), source.hash(Pfn::new(page)));
                }
            }
        });
    }

    #[test]
    fn a_lost_peer_and_a_bad_range_are_errors() {
        let memory = SharedMemory::create(ByteCount::new(2 * PAGE_SIZE), PageKind::Small).unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let beyond = PageRange::new(Pfn::new(1), PageCount::new(2));
        assert!(memory.send_parts(&near, &[([0; 1], Some(beyond))]).is_err());
        assert!(memory.receive(&near, PAGE_SIZE, 4097).is_err());
        memory.send_parts::<1>(&near, &[]).unwrap();
        drop(far);
        let lost = memory.receive(&near, 0, 1).unwrap_err();
        assert_eq!(lost.kind(), io::ErrorKind::UnexpectedEof);
        let broken = memory.send_parts(&near, &[([0; 1], None)]).unwrap_err();
        assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe);
    }
}
