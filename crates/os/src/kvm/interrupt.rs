//! Interrupt lines of a machine's controllers, to be raised from any thread.

use super::{KvmError, Vm, failed};
use std::io;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A line that goes up and down at once, as devices do whose interrupts are edges.
#[derive(Debug)]
pub struct InterruptLine(EventFd);

impl InterruptLine {
    /// Interrupts the guest once. Costs it no exit, and the caller one write.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pulse(&self) -> io::Result<()> {
        self.0.write(1)
    }

    /// Another handle of the same line.
    ///
    /// # Errors
    /// There is no descriptor for it.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl Vm {
    /// The line with that number, counted as the I/O interrupt controller does. After
    /// [`Vm::create_irqchip`].
    ///
    /// # Errors
    /// There are no interrupt controllers, or KVM refuses.
    pub fn interrupt_line(&self, number: u32) -> Result<InterruptLine, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(|source| KvmError::Call {
            what: "make an interrupt line",
            source,
        })?;
        self.slots
            .vm
            .register_irqfd(&event, number)
            .map_err(failed("connect an interrupt line"))?;
        Ok(InterruptLine(event))
    }
}
