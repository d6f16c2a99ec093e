//! Requests that are about what a guest has beside memory and processors: devices, and the ports of a micro
//! guest.

use super::{VmError, VmHandle};
use crate::config::Platform;
use crate::process::command_number;
use crate::protocol::{Reply, Request};
use crate::state::STATE_BYTES_MAX;
use limosa_micro_abi::{CommandKind, PAGE_BYTES, Report, memory_map};
use limosa_pages::ByteCount;
use std::net::SocketAddr;

impl VmHandle {
    /// Sends heartbeats to somebody else, or to nobody.
    ///
    /// # Errors
    /// There is no socket for that address.
    pub fn set_observer(&self, address: Option<SocketAddr>) -> Result<(), VmError> {
        self.order(&Request::SetObserver { address })
    }

    /// What has come from outside for the guest, which was committed to another host and runs there; empty if
    /// that is nothing.
    ///
    /// # Errors
    /// The process does not answer, or the guest was not committed to another host.
    pub fn take_strays(&self) -> Result<Vec<u8>, VmError> {
        let frame = self.exchange(&Request::TakeStrays, &[])?;
        match frame.message {
            Reply::Done if frame.bytes.len() <= STATE_BYTES_MAX => Ok(frame.bytes),
            _ => Err(self.foreign()),
        }
    }

    /// Gives the guest what has come for it where it was before, as [`VmHandle::take_strays`] gave it there.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn give_strays(&self, strays: &[u8]) -> Result<(), VmError> {
        match self.exchange(&Request::GiveStrays, strays)?.message {
            Reply::Done => Ok(()),
            _ => Err(self.foreign()),
        }
    }

    /// Has the guest give up so much of its memory, in whole pages, or take back what is above. That takes
    /// it some time: [`Status::balloon`] tells.
    ///
    /// # Errors
    /// It has no balloon, that is all of its memory, or its memory is of huge pages.
    pub fn set_balloon(&self, target: ByteCount) -> Result<(), VmError> {
        self.order(&Request::SetBalloon { target })
    }

    /// Has the guest give up so much of its memory at least, until it has arrived on another host or this is
    /// called with zero, which does no harm to any guest.
    ///
    /// # Errors
    /// As [`VmHandle::set_balloon`].
    pub fn lend_balloon(&self, least: ByteCount) -> Result<(), VmError> {
        self.order(&Request::LendBalloon { least })
    }

    /// Tells a micro guest to do something; the command's number, which its reports show when it is
    /// done.
    ///
    /// # Errors
    /// The process does not answer.
    pub fn command(&self, kind: CommandKind) -> Result<u32, VmError> {
        match self.ask(&Request::Command {
            kind: command_number(kind),
        })? {
            Reply::Sequence(sequence) => Ok(sequence),
            _ => Err(self.foreign()),
        }
    }

    /// What the vCPUs of a micro guest say about themselves; `None` for one that has not begun, and nothing
    /// of another kind of guest. Read straight from the memory file, without stopping anything; one whose
    /// page is missing is `None`.
    ///
    /// # Panics
    /// If the process has no machine.
    pub fn guest_report(&self) -> Vec<Option<Report>> {
        let lent = self.lent();
        if lent.config.platform != Platform::Micro {
            return Vec::new();
        }
        let read = |vcpu: u8| {
            let mut page = [0; PAGE_BYTES as usize];
            lent.memory
                .read_file_at(memory_map::report_address(u32::from(vcpu)), &mut page)
                .ok()?;
            Report::parse(&page)
        };
        (0..lent.config.vcpus).map(read).collect()
    }
}
