//! Bytes and open descriptors together over a Unix socket (`SCM_RIGHTS`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Most descriptors in one message: what our protocol needs, with room.
pub const DESCRIPTORS_MAX: usize = 16;

const CONTROL_BYTES: usize = 128;

/// Control data with the alignment that its headers need.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Sends some of `buffers` (as many bytes as the kernel takes; the count is answered), and with the
/// first of them the descriptors.
///
/// # Errors
/// The peer is gone or the socket's time-out has passed.
///
/// # Panics
/// With more than [`DESCRIPTORS_MAX`] descriptors.
pub fn send(
    socket: &UnixStream,
    buffers: &[&[u8]],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    assert!(
        descriptors.len() <= DESCRIPTORS_MAX,
        "too many descriptors for one message"
    );
    let mut vectors: Vec<libc::iovec> = buffers
        .iter()
        .map(|buffer| libc::iovec {
            iov_base: buffer.as_ptr().cast_mut().cast(),
            iov_len: buffer.len(),
        })
        .collect();
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: a message header that says nothing is all zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    if !descriptors.is_empty() {
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let bytes = u32::try_from(size_of_val(numbers.as_slice())).expect("a few numbers");
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer is large enough for one header with `DESCRIPTORS_MAX` numbers
        // (checked below by the kernel's own macro), aligned for it, and lives until the call.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(bytes) as usize;
            assert!(
                message.msg_controllen <= CONTROL_BYTES,
                "the numbers fit into the buffer"
            );
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            std::ptr::copy_nonoverlapping(
                numbers.as_ptr().cast::<u8>(),
                libc::CMSG_DATA(header),
                bytes as usize,
            );
        }
    }
    loop {
        // SAFETY: buffers, control data and descriptors live until the call returns.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) => return Ok(sent),
            Err(_) => retry_if_interrupted()?,
        }
    }
}

/// Receives up to `into.len()` bytes, and puts descriptors that came with them behind
/// `descriptors`. Zero bytes mean that the peer has closed.
///
/// # Errors
/// The connection is broken, the socket's time-out has passed, or the peer sent more descriptors
/// than [`DESCRIPTORS_MAX`].
pub fn receive(
    socket: &UnixStream,
    into: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    let mut control = Control([0; CONTROL_BYTES]);
    // SAFETY: a message header that says nothing is all zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    let received = loop {
        message.msg_controllen = CONTROL_BYTES;
        // SAFETY: the buffer and the control buffer are valid for writing until the call returns.
        let received =
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(received) {
            Ok(received) => break received,
            Err(_) => retry_if_interrupted()?,
        }
    };
    // SAFETY: the kernel has filled the control buffer, whose headers the macros walk within
    // `msg_controllen`; each number is a descriptor that it made for this process alone.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const message);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                let numbers = libc::CMSG_DATA(header).cast::<RawFd>();
                for index in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(numbers.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const message, header);
        }
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "too many descriptors in one message",
        ));
    }
    Ok(received)
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
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_arrive_with_their_bytes() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        assert_eq!(
            send(&near, &[b"he", b"llo"], &[file.as_fd(), near.as_fd()]).unwrap(),
            5
        );
        assert_eq!(send(&near, &[b"plain"], &[]).unwrap(), 5);
        let mut bytes = [0; 5];
        let mut descriptors = Vec::new();
        assert_eq!(receive(&far, &mut bytes, &mut descriptors).unwrap(), 5);
        assert_eq!((&bytes, descriptors.len()), (b"hello", 2));
        let mut same = File::from(descriptors.swap_remove(0));
        let mut content = String::new();
        same.rewind().unwrap();
        same.read_to_string(&mut content).unwrap();
        assert_eq!(content, "content");
        descriptors.clear();
        receive(&far, &mut bytes, &mut descriptors).unwrap();
        assert_eq!((&bytes, descriptors.len()), (b"plain", 0));
        drop(near);
        assert_eq!(receive(&far, &mut bytes, &mut descriptors).unwrap(), 0);
    }
}
