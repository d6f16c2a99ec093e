//! Doorbells of devices: the guest rings one by a write to an address without memory, and a thread that
//! waits for it wakes up, without the vCPU's thread having a hand in it (`KVM_IOEVENTFD`).

use super::{KvmError, Vm, failed};
use kvm_ioctls::IoEventAddress;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Rings until somebody has heard it.
#[derive(Debug)]
pub struct Doorbell(EventFd);

impl Doorbell {
    /// One that no guest rings.
    ///
    /// # Errors
    /// There is no descriptor for it.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }

    /// Rings it, from any thread.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ring(&self) -> io::Result<()> {
        self.0.write(1)
    }

    /// Hears it: false if it has not been rung.
    pub fn hear(&self) -> bool {
        self.0.read().is_ok()
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl Vm {
    /// What the guest rings by writing the 32-bit `value` to that address, at which it has no memory.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn doorbell(&self, address: u64, value: u32) -> Result<Doorbell, KvmError> {
        let bell = Doorbell::new().map_err(|source| KvmError::Call {
            what: "make a doorbell",
            source,
        })?;
        self.slots
            .vm
            .register_ioevent(&bell.0, &IoEventAddress::Mmio(address), value)
            .map_err(failed("connect a doorbell"))?;
        Ok(bell)
    }
}
