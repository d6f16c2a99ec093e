//! Where measured moves happen: two hosts and a guest, real or simulated.
//!
//! Two daemons on the loopback with a guest under KVM that proves its own memory, watched from
//! outside; or, without KVM, the same moves in the simulator; or, for comparison, the same guest under
//! QEMU. All give the same record of a move.
//!
//! Invariants: nothing outlives a bed, however it ends; a bed never changes from real to simulated.
//!
//! Deliberately absent: any way into the daemons but their control interface, and any measurement
//! that only the daemons could make.

mod beats;
mod clients;
mod growth;
mod guest_clock;
pub(crate) mod host_pages;
mod hosts;
mod interrupt;
mod loopback;
mod observation;
mod observer;
mod processors;
mod progress;
pub(crate) mod qemu;
mod simulated;
mod speed;
mod stalls;
mod warm;

pub(crate) use growth::Growth;
pub(crate) use interrupt::{Interrupt, Interrupted};

use limosa_engine::policy::Mode;
use limosa_lab::qemu::QemuWay;
use limosa_lab::record::{MoveRecord, Setup};
use limosa_lab::workload::Workload;
use loopback::Loopback;
use qemu::QemuBed;
use simulated::Simulated;
use std::fs::OpenOptions;
use std::io;
use std::path::Path;

/// Two hosts and a guest on the first of them.
pub(crate) enum Bed {
    /// Under KVM.
    Loopback(Box<Loopback>),
    /// A model of it.
    Simulated(Box<Simulated>),
    /// Under KVM, too, and moved by QEMU.
    Qemu(Box<QemuBed>),
}

impl Bed {
    /// Two daemons, and a guest that has touched its memory and works.
    ///
    /// # Errors
    /// One of them does not start, or somebody wants to end.
    pub(crate) fn real(setup: &Setup, interrupt: &Interrupt) -> anyhow::Result<Self> {
        let loopback = Loopback::start(setup, interrupt)?;
        Ok(Self::Loopback(Box::new(loopback)))
    }

    /// The same in the simulator.
    ///
    /// # Errors
    /// The simulator has no model of the guest.
    pub(crate) fn simulated(setup: &Setup, workload: &Workload) -> anyhow::Result<Self> {
        let simulated = Simulated::new(setup, workload)?;
        Ok(Self::Simulated(Box::new(simulated)))
    }

    /// Two QEMUs, and the same guest in one of them.
    ///
    /// # Errors
    /// One of them does not start, or somebody wants to end.
    pub(crate) fn qemu(
        setup: &Setup,
        way: QemuWay,
        program: &Path,
        interrupt: &Interrupt,
    ) -> anyhow::Result<Self> {
        let bed = QemuBed::start(setup, way, program, interrupt)?;
        Ok(Self::Qemu(Box::new(bed)))
    }

    /// The guest's speed over a second; `None` but between daemons.
    pub(crate) fn speed(&self) -> anyhow::Result<Option<f64>> {
        match self {
            Self::Loopback(loopback) => loopback.speed().map(Some),
            Self::Simulated(_) | Self::Qemu(_) => Ok(None),
        }
    }

    /// Moves the guest to the other host; `title` stands before the move's progress on a terminal.
    pub(crate) fn make_move(
        &mut self,
        number: u32,
        mode: Mode,
        title: &str,
    ) -> anyhow::Result<MoveRecord> {
        match self {
            Self::Loopback(loopback) => loopback.make_move(number, mode, title),
            Self::Simulated(simulated) => Ok(simulated.make_move(number, mode)),
            // Its variant is the mode.
            Self::Qemu(qemu) => qemu.make_move(number),
        }
    }

    /// What the daemons hold compared with what they held; `None` without any.
    pub(crate) fn growth(&self) -> anyhow::Result<Option<Growth>> {
        match self {
            Self::Loopback(loopback) => loopback.growth().map(Some),
            Self::Simulated(_) | Self::Qemu(_) => Ok(None),
        }
    }
}

/// Why KVM cannot be used here, and what to do; `None` if it can.
pub(crate) fn kvm_problem() -> Option<String> {
    problem_of(Path::new("/dev/kvm"))
}

fn problem_of(device: &Path) -> Option<String> {
    let error = OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .err()?;
    let device = device.display();
    Some(match error.kind() {
        io::ErrorKind::NotFound => format!(
            "there is no {device}: load a module (modprobe kvm_intel or kvm_amd), switch \
             virtualisation on in the firmware, or allow nested virtualisation for this machine"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{device} may not be opened: add yourself to its group (usermod -aG kvm USER) and log \
             in again"
        ),
        _ => format!("{device} cannot be opened ({error})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_explained() {
        let why = problem_of(Path::new("/nonexistent/kvm")).unwrap();
        assert!(why.contains("modprobe kvm_intel"), "{why}");
        assert_eq!(problem_of(Path::new("/dev/null")), None);
    }
}
