//! Socket options that the standard library does not offer.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Asks for a send buffer of about `bytes`. A small one keeps what is queued behind it young.
///
/// # Errors
/// It is no socket.
pub fn set_send_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    set_buffer(socket, libc::SO_SNDBUF, bytes)
}

/// Asks for a receive buffer of about `bytes`.
///
/// # Errors
/// It is no socket.
pub fn set_receive_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    set_buffer(socket, libc::SO_RCVBUF, bytes)
}

/// Gives a TCP connection up when what was sent has not been acknowledged for `limit`, or the peer has
/// not read for so long. Without it the kernel tries for a quarter of an hour (`TCP_USER_TIMEOUT`,
/// RFC 5482).
///
/// # Errors
/// It is no TCP socket.
pub fn set_unacknowledged_max(socket: &impl AsFd, limit: Duration) -> io::Result<()> {
    let milliseconds = limit.as_millis().try_into().unwrap_or(usize::MAX);
    set_number(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_USER_TIMEOUT,
        milliseconds,
    )
}

/// Sends no faster than so many bytes a second, or, with `None`, as fast as it goes
/// (`SO_MAX_PACING_RATE`, socket(7)): the kernel spaces the segments, so that a full send buffer holds its
/// writer back. It goes on spacing them by its own estimate when the limit is taken away.
///
/// # Errors
/// It is no socket.
pub fn set_send_rate(socket: &impl AsFd, bytes_per_second: Option<u64>) -> io::Result<()> {
    // Eight bytes are read since Linux 4.20; all ones mean no limit.
    let rate = bytes_per_second.unwrap_or(u64::MAX);
    set_option(
        socket,
        libc::SOL_SOCKET,
        libc::SO_MAX_PACING_RATE,
        rate.to_ne_bytes(),
    )
}

/// Sends as soon as the peer has room, without spacing segments by an estimate of the way: Reno, which every
/// kernel has and everybody may ask for (`TCP_CONGESTION`, tcp(7)). For ways on which nothing gets lost.
///
/// # Errors
/// It is no TCP socket.
pub fn set_reno(socket: &impl AsFd) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_CONGESTION, *b"reno")
}

/// What the kernel knows about a TCP connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpStatus {
    /// Bytes that the peer has acknowledged since the connection was made, which itself counts as one.
    pub acknowledged: u64,
    /// Bytes that were written and have not been sent for the first time.
    pub unsent: u64,
    /// How long in all the send buffer was what limited it: everything in it was on its way.
    pub buffer_limited: Duration,
    /// From a segment to its acknowledgement, smoothed.
    pub round_trip: Duration,
    /// The shortest that it took in the last five minutes.
    pub round_trip_min: Duration,
}

/// Asks for it (`TCP_INFO`, tcp(7)).
///
/// # Errors
/// It is no TCP socket.
pub fn tcp_status(socket: &impl AsFd) -> io::Result<TcpStatus> {
    // SAFETY: a structure of numbers, for which zeros are values and all others, too; what an older kernel does
    // not know stays zero.
    let info: libc::tcp_info = unsafe {
        option(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            std::mem::zeroed(),
        )
    }?;
    let microseconds = |number: u32| Duration::from_micros(number.into());
    let buffer_limited = Duration::from_micros(info.tcpi_sndbuf_limited);
    Ok(TcpStatus {
        acknowledged: info.tcpi_bytes_acked,
        unsent: info.tcpi_notsent_bytes.into(),
        buffer_limited,
        round_trip: microseconds(info.tcpi_rtt),
        round_trip_min: microseconds(info.tcpi_min_rtt),
    })
}

/// Sleeps until so many bytes are there to be read, or as many as the receive buffer takes, or the
/// connection has ended, or the time given is over. One wake-up instead of one for each segment
/// (`SO_RCVLOWAT`, socket(7)).
///
/// Nobody else may wait for this socket meanwhile: who waits for fewer bytes would sleep on although
/// they came. For the same reason a read that finds less than it wants must not sleep before the mark
/// is down again, so it is taken down before this returns.
///
/// # Errors
/// It is no socket.
pub fn wait_for_bytes(socket: &impl AsFd, bytes: usize, limit: Option<Duration>) -> io::Result<()> {
    let set_mark = |bytes| set_number(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes);
    let limit = limit.map(|limit| u32::try_from(limit.as_millis()).unwrap_or(u32::MAX));
    set_mark(bytes.max(1))?;
    let waited = wait_readable([Some(socket)], limit);
    set_mark(1)?;
    waited.map(|_| ())
}

fn set_buffer(socket: &impl AsFd, option: libc::c_int, bytes: usize) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, option, bytes)
}

fn set_number(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: usize,
) -> io::Result<()> {
    let value = libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX);
    set_option(socket, level, option, value.to_ne_bytes())
}

fn set_option<const N: usize>(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: [u8; N],
) -> io::Result<()> {
    // SAFETY: the option takes a value, whose address and size are given.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            N as libc::socklen_t,
        )
    } != 0;
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Reads an option; `value` is what it has where the kernel writes nothing.
///
/// # Safety
/// Whatever the kernel writes into a `T` for this option is a valid one.
unsafe fn option<T>(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    mut value: T,
) -> io::Result<T> {
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: at most `len` bytes of the value are written.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    } != 0;
    if failed {
        Err(io::Error::last_os_error())
    } else {
        Ok(value)
    }
}

/// Process number of the peer of a Unix socket, as the kernel knows it.
///
/// # Errors
/// It is not connected.
pub fn peer_pid(socket: &UnixStream) -> io::Result<u32> {
    let nobody = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    // SAFETY: a structure of numbers, for which all values are valid.
    let peer = unsafe { option(socket, libc::SOL_SOCKET, libc::SO_PEERCRED, nobody) }?;
    u32::try_from(peer.pid).map_err(|_| io::ErrorKind::NotFound.into())
}

/// Listens at `path` for this user only. A socket that a dead process left there is replaced; one
/// that somebody listens at is not.
///
/// # Errors
/// Somebody listens there, or the place cannot be written.
pub fn listen_privately(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Err(error);
            }
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        other => other?,
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Which of some descriptors have something to read or are closed. Waits until one has, or for the
/// time given.
///
/// # Errors
/// The kernel refuses.
pub fn wait_readable<const N: usize>(
    sources: [Option<&dyn AsFd>; N],
    milliseconds: Option<u32>,
) -> io::Result<[bool; N]> {
    let mut polled = sources.map(|source| libc::pollfd {
        fd: source.map_or(-1, |source| source.as_fd().as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let timeout = milliseconds.map_or(-1, |time| {
        libc::c_int::try_from(time).unwrap_or(libc::c_int::MAX)
    });
    // SAFETY: the array is valid for its length; descriptors are borrowed for the call.
    if unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, timeout) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(polled.map(|polled| polled.revents != 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    /// Two ends of a connection over the loopback.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn who_waits_for_bytes_is_woken_once_and_by_an_end() {
        let (mut near, mut far) = connection();
        let mut content = vec![0; 300_000];
        thread::scope(|scope| {
            scope.spawn(move || {
                for part in vec![7; 300_000].chunks(10_000) {
                    near.write_all(part).unwrap();
                }
                near.write_all(&[8]).unwrap();
            });
            wait_for_bytes(&far, content.len(), None).unwrap();
            // All of it is there, or as much as the kernel has room for: in no case one part after the other. Behind it
            // the mark is down again.
            let first = far.read(&mut content).unwrap();
            assert!(first > 20_000, "woken by {first} bytes");
            far.read_exact(&mut content[first..]).unwrap();
            assert!(content.iter().all(|&byte| byte == 7));
            far.read_exact(&mut content[..1]).unwrap();
            assert_eq!(content[0], 8);
            // The other end is closed by now or soon.
            wait_for_bytes(&far, 1 << 20, None).unwrap();
            assert_eq!(far.read(&mut content).unwrap(), 0);
        });
        let (_near, far) = connection();
        let short = Some(Duration::from_millis(1));
        wait_for_bytes(&far, 1, short).unwrap();
        assert!(wait_for_bytes(&std::fs::File::open("/").unwrap(), 1, short).is_err());
    }

    #[test]
    fn a_connection_tells_what_has_passed() {
        let (mut near, mut far) = connection();
        let before = tcp_status(&near).unwrap();
        near.write_all(&[7; 50_000]).unwrap();
        far.read_exact(&mut [0; 50_000]).unwrap();
        // What comes back acknowledges what came before it.
        far.write_all(&[1]).unwrap();
        near.read_exact(&mut [0]).unwrap();
        let after = tcp_status(&near).unwrap();
        assert_eq!(after.acknowledged - before.acknowledged, 50_000);
        assert_eq!(after.unsent, 0);
        assert!(after.round_trip >= after.round_trip_min);
        assert!(after.round_trip_min > Duration::ZERO);
        assert!(tcp_status(&std::fs::File::open("/").unwrap()).is_err());
    }

    #[test]
    fn a_rate_may_be_more_than_31_bits_or_none() {
        let (near, _far) = connection();
        // SAFETY: a number, for which all values are valid.
        let rate = || unsafe { option(&near, libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 0u64) };
        for limit in [Some(5_000_000_000), Some(4 << 20), None] {
            set_send_rate(&near, limit).unwrap();
            assert_eq!(rate().unwrap(), limit.unwrap_or(u64::MAX));
        }
    }

    #[test]
    fn reno_is_always_there() {
        let (near, _far) = connection();
        set_reno(&near).unwrap();
        // SAFETY: a name of bytes, for which all values are valid.
        let name = unsafe { option(&near, libc::IPPROTO_TCP, libc::TCP_CONGESTION, [0u8; 16]) };
        assert!(name.unwrap().starts_with(b"reno\0"));
        assert!(set_reno(&std::fs::File::open("/").unwrap()).is_err());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = listen_privately(&path).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            listen_privately(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        drop(first);
        let second = listen_privately(&path).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        let (server, _) = second.accept().unwrap();
        assert_eq!(peer_pid(&server).unwrap(), std::process::id());
        drop(client);
    }

    #[test]
    fn waiting_tells_who_is_ready() {
        let (mut near, far) = UnixStream::pair().unwrap();
        set_receive_buffer(&far, 64 << 10).unwrap();
        assert_eq!(
            wait_readable([Some(&far), None], Some(0)).unwrap(),
            [false, false]
        );
        near.write_all(b"x").unwrap();
        assert_eq!(
            wait_readable([None, Some(&far)], None).unwrap(),
            [false, true]
        );
    }
}
