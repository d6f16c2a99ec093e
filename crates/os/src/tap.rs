//! Network interfaces of the host whose other end is a guest (tap devices, `Documentation/networking/
//! tuntap.rst` of Linux).
//!
//! A packet is read or written at once, behind a header of [`HEADER_BYTES`] that says what the receiver
//! still has to do: compute a checksum, cut a large packet into segments.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes before each packet: `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;
/// Longest name of an interface, the zero at its end not included.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;

/// A tap device that is open. Reads and writes do not wait.
#[derive(Debug)]
pub struct Tap(File);

/// What a guest takes that its host need not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets without a checksum.
    pub checksum: bool,
    /// Large segments of TCP over IPv4; needs `checksum`.
    pub segments_v4: bool,
    /// Large segments of TCP over IPv6; needs `checksum`.
    pub segments_v6: bool,
}

impl Tap {
    /// Opens the interface with that name, which has to be there.
    ///
    /// # Errors
    /// It is not there, is no tap device, somebody else has it open, or this process may not.
    pub fn open(name: &str) -> io::Result<Self> {
        if !Path::new("/sys/class/net").join(name).exists() {
            // The kernel would make one, which nothing on this host is connected to.
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!(
                    "there is no such interface: make it by 'ip tuntap add dev {name} mode tap vnet_hdr'"
                ),
            ));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        // SAFETY: a structure of numbers, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let bytes = name.as_bytes();
        if bytes.len() > NAME_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (place, &byte) in request.ifr_name.iter_mut().zip(bytes) {
            *place = byte.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).expect("fits 16 bits");
        // SAFETY: the request reads and writes the structure that its argument points at.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        let header = libc::c_int::try_from(HEADER_BYTES).expect("small");
        // SAFETY: the request reads a number where its argument points at.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })?;
        let tap = Self(file);
        tap.set_offloads(Offloads::default())?;
        Ok(tap)
    }

    /// Says what the guest takes.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        const CHECKSUM: libc::c_uint = 1;
        const SEGMENTS_V4: libc::c_uint = 2;
        const SEGMENTS_V6: libc::c_uint = 4;
        let flags = [
            (offloads.checksum, CHECKSUM),
            (offloads.checksum && offloads.segments_v4, SEGMENTS_V4),
            (offloads.checksum && offloads.segments_v6, SEGMENTS_V6),
        ];
        let flags = flags
            .iter()
            .filter(|(is_on, _)| *is_on)
            .fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: the request takes a number.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETOFFLOAD, flags) })
    }

    /// Reads a packet with its header; `None` if none is there.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn read(&self, into: &mut [u8]) -> io::Result<Option<usize>> {
        match (&self.0).read(into) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a packet with its header into the host's network.
    ///
    /// # Errors
    /// The host does not take it: it is malformed, or the interface is down.
    pub fn write(&self, packet: &[u8]) -> io::Result<()> {
        // A packet is taken whole or not at all.
        (&self.0).write(packet).map(|_| ())
    }
}

/// Somebody else has opened it, or what behaves as one: a packet a read, a packet a write.
impl From<OwnedFd> for Tap {
    fn from(descriptor: OwnedFd) -> Self {
        Self(File::from(descriptor))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_not_made() {
        let error = Tap::open("limosa-no-tap").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(
            error
                .to_string()
                .contains("ip tuntap add dev limosa-no-tap")
        );
    }
}
