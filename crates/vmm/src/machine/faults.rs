//! A machine whose pages arrive while it runs: its gate and the record of what is missing.
//!
//! Both live in the VM process and not with the daemon, so that a guest whose daemon has died waits at
//! its next missing page instead of reading zeros, and the next daemon knows what has arrived.

use super::{Machine, MachineError};
use limosa_os::SharedBitmap;
use limosa_os::SharedMemory;
use limosa_os::bitmap::BitmapError;
use limosa_os::memory::HoldOff;
use limosa_os::userfault::{FaultGate, GateError};
use limosa_pages::PageCount;
use std::sync::Arc;

/// What the daemon borrows to put pages in.
#[derive(Debug)]
pub struct HeldFaults {
    /// Holds back whoever touches a page that is not there.
    pub gate: FaultGate,
    /// Which pages are missing; written by the daemon.
    pub missing: SharedBitmap,
}

/// Why faults are not held back.
#[derive(Debug, thiserror::Error)]
enum ArmError {
    #[error(transparent)]
    Gate(#[from] GateError),
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

impl HeldFaults {
    fn new(memory: &Arc<SharedMemory>) -> Result<Self, ArmError> {
        let missing = SharedBitmap::create_writable(memory.page_count())?;
        let gate = FaultGate::open(memory)?;
        Ok(Self { gate, missing })
    }
}

impl Machine {
    /// Holds back every access to a page that is not there, from now on. Where that is not possible,
    /// [`Machine::faults`] says why, and the machine can be used as it is.
    pub fn arm(&mut self) {
        let reclaim = self.vm.reclaim();
        reclaim.hold_off(HoldOff::MissingPages, true);
        self.faults = HeldFaults::new(&self.memory).map_err(|error| {
            let why = crate::protocol::in_one_line(&error);
            tracing::warn!(why, "the guest cannot run before its memory is complete");
            why
        });
    }

    /// What holds accesses back, or why nothing does.
    ///
    /// # Errors
    /// Nothing does.
    pub fn faults(&self) -> Result<&HeldFaults, &str> {
        self.faults.as_ref().map_err(String::as_str)
    }

    /// How many pages are missing, of memory and disks; `None` if nothing is held back.
    pub fn missing(&self) -> Option<PageCount> {
        let held = self.faults.as_ref().ok()?;
        let on_disks = self.board.devices().missing_on_disks().count();
        Some(held.missing.count().saturating_add(on_disks))
    }

    /// Takes out of the guest's sight what something has touched while pages were being marked as
    /// missing. To be called before it runs with pages missing.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn hide_pages(&self) -> Result<(), MachineError> {
        match &self.faults {
            Ok(held) => Ok(held.gate.unmap_pages()?),
            Err(_) => Ok(()),
        }
    }

    /// Holds nobody back any more; a page that has not arrived would read as zeros. May be repeated.
    ///
    /// # Errors
    /// Pages of disks are missing, or the kernel refuses.
    pub fn disarm(&mut self) -> Result<(), MachineError> {
        let on_disks = self.board.devices().missing_on_disks().count();
        if on_disks > PageCount::ZERO {
            return Err(MachineError::MissingOnDisks(on_disks));
        }
        let complete = Err("its memory is complete".to_owned());
        match std::mem::replace(&mut self.faults, complete) {
            Ok(held) => held.gate.close()?,
            Err(why) => self.faults = Err(why),
        }
        let reclaim = self.vm.reclaim();
        reclaim.hold_off(HoldOff::MissingPages, false);
        Ok(())
    }
}
