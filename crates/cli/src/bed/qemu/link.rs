//! The emulated link between two QEMUs.
//!
//! QEMU limits its own rate, but only while the guest runs: what is left when it has stopped goes as
//! fast as the socket takes it, which on a loopback is many times as fast as the link. So the
//! sockets themselves are held to the rate by the kernel. They are QEMU's: they are found among its
//! descriptors by where they lead, and borrowed for the moment of setting it.

use anyhow::Context;
use limosa_os::socket::set_send_rate;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use std::collections::HashSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{OwnedFd, RawFd};

/// The connections of a source.
#[derive(Debug)]
pub(crate) struct Link {
    process: OwnedFd,
    descriptors: String,
    target: SocketAddr,
    bytes_per_second: u64,
    paced: HashSet<RawFd>,
}

impl Link {
    /// Of the process `pid`, whose connections to `target` have so much each.
    pub(crate) fn new(pid: u32, target: SocketAddr, bytes_per_second: u64) -> anyhow::Result<Self> {
        let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let process = process.context("QEMU has no process number")?;
        Ok(Self {
            process: pidfd_open(process, PidfdFlags::empty()).context("QEMU cannot be watched")?,
            descriptors: format!("/proc/{pid}/fd"),
            target,
            bytes_per_second,
            paced: HashSet::new(),
        })
    }

    /// Holds connections that are new to the rate; how many are held to it now.
    pub(crate) fn pace(&mut self) -> usize {
        for entry in fs::read_dir(&self.descriptors)
            .into_iter()
            .flatten()
            .flatten()
        {
            let number = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let Some(number) = number.filter(|number| !self.paced.contains(number)) else {
                continue;
            };
            let kind = fs::read_link(entry.path()).unwrap_or_default();
            if kind.to_string_lossy().starts_with("socket:") && self.pace_one(number) {
                self.paced.insert(number);
            }
        }
        self.paced.len()
    }

    /// Whether this one leads to the target and is held to the rate. What has been closed meanwhile
    /// is none.
    fn pace_one(&self, number: RawFd) -> bool {
        let Ok(socket) = pidfd_getfd(&self.process, number, PidfdGetfdFlags::empty()) else {
            return false;
        };
        let socket = TcpStream::from(socket);
        if socket.peer_addr().ok() != Some(self.target) {
            return false;
        }
        let set = set_send_rate(&socket, Some(self.bytes_per_second));
        set.inspect_err(|error| tracing::warn!(%error, "a connection has no rate"))
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;
    use std::time::{Duration, Instant};

    #[test]
    fn a_connection_to_the_target_is_held_to_the_rate() {
        const BYTES: usize = 6 << 20;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        let mut sender = TcpStream::connect(target).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let mut link = Link::new(std::process::id(), target, 20 << 20).unwrap();
        assert_eq!(link.pace(), 1);
        assert_eq!(link.pace(), 1);
        let begun = Instant::now();
        let thread = thread::spawn(move || {
            let mut bytes = vec![0; BYTES];
            receiver.read_exact(&mut bytes).unwrap();
        });
        sender.write_all(&vec![1; BYTES]).unwrap();
        thread.join().unwrap();
        assert!(begun.elapsed() > Duration::from_millis(150), "too fast");
    }
}
