//! The seam to virtual machines: what the registry asks of one, whoever runs it.
//!
//! Implemented by [`process`] for VM processes of this program, and by plain values in the tests
//! of the registry. What a migration asks is the carrier's [`Guest`]; this is the rest.

#[cfg(test)]
pub mod fake;
pub mod process;

use crate::api::{CommandKind, GuestReport, SectionInfo, VmSpec};
use crate::new_disks::NewDisk;
use crate::refusal::Refusal;
use crate::state_dir::VmName;
use limosa_carrier::{Guest, GuestError};
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::wire::Start;
use limosa_os::dirty::TrackerKind;
use limosa_vmm::answer::BalloonInfo;
use limosa_vmm::config::devices::Mac;
use limosa_vmm::cpu::CpuModel;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// The size of a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Guest memory.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// 2 MiB pages.
    pub huge_pages: bool,
    /// Who notices which pages are written.
    #[serde(default)]
    pub dirty_tracker: TrackerKind,
    /// What processor its guest sees.
    #[serde(default)]
    pub cpu: CpuModel,
}

/// What a VM process says when it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// Its phase record.
    pub phase: Phase,
    /// What the vCPUs do.
    pub activity: Activity,
    /// What the guest has given up of its memory; `None` if it has no balloon.
    pub balloon: Option<BalloonInfo>,
}

/// What the vCPUs of a virtual machine do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activity {
    /// They run.
    Running,
    /// They stand, and can run again.
    Paused,
    /// The guest is over.
    Ended {
        /// How, in one line.
        reason: String,
    },
}

/// A virtual machine.
pub trait Machine: Send + Sync {
    /// Process id.
    fn pid(&self) -> u32;

    /// Its size.
    fn shape(&self) -> Shape;

    /// The addresses of its network interfaces.
    fn macs(&self) -> Vec<Mac>;

    /// For a migration.
    fn guest(&self) -> Arc<dyn Guest>;

    /// How it is.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn look(&self) -> Result<Look, GuestError>;

    /// Whether its page faults are served by its daemon, which is so while pages of it may be
    /// missing. Says what was so when the process was made or found, and what happened to it since.
    fn misses_pages(&self) -> bool;

    /// Starts a guest that was booted.
    ///
    /// # Errors
    /// The VM process does not answer, or its phase forbids it.
    fn run(&self) -> Result<(), GuestError>;

    /// The parts of its state.
    ///
    /// # Errors
    /// The VM process does not answer, or the state cannot be saved.
    fn sections(&self) -> Result<Vec<SectionInfo>, GuestError>;

    /// What a micro guest says about itself, read from its memory: the VM process is not asked.
    fn report(&self) -> GuestReport;

    /// Gives a micro guest a command.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn command(&self, kind: CommandKind) -> Result<(), GuestError>;

    /// Has the guest give up so many bytes of its memory, or take back what is above.
    ///
    /// # Errors
    /// It cannot, that is too much, or the VM process does not answer.
    fn set_balloon(&self, target_bytes: u64) -> Result<(), GuestError>;

    /// Has the guest give up so many bytes at least until it has been moved; zero ends that.
    ///
    /// # Errors
    /// As [`Machine::set_balloon`].
    fn lend_balloon(&self, least_bytes: u64) -> Result<(), GuestError>;

    /// Ends it in order.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn stop(&self) -> Result<(), GuestError>;

    /// Kills the VM process, whatever it does. Its name must not have been given away yet.
    fn kill(&self);

    /// How the VM process ended, once it has.
    fn ended(&self) -> Option<String>;
}

/// Called once when a VM process has ended, from a thread of its own: process id, and how.
pub type OnEnd = Box<dyn FnOnce(u32, &str) + Send>;

/// A virtual machine that another host describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: VmName,
    /// All that is in the way of it, each in one line; nothing if this host can make it.
    pub differences: Vec<String>,
    /// Disks that it brings along, and that have to be made before it is.
    pub new_disks: Vec<NewDisk>,
    /// The addresses of its network interfaces.
    pub macs: Vec<Mac>,
}

/// Makes and finds virtual machines.
pub trait Machines: Send + Sync {
    /// Makes one with its program loaded, not running yet.
    ///
    /// # Errors
    /// What is wrong with the request or the host.
    fn boot(
        &self,
        name: &VmName,
        spec: &VmSpec,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, Refusal>;

    /// Reads what a source wants to send here.
    ///
    /// # Errors
    /// It is not understood.
    fn describe(&self, start: &Start) -> Result<Described, String>;

    /// Makes an empty one that waits for the state of attempt `id`.
    ///
    /// # Errors
    /// The host cannot make it.
    fn receive(
        &self,
        name: &VmName,
        id: MigrationId,
        start: &Start,
        on_end: OnEnd,
    ) -> Result<Arc<dyn Machine>, String>;

    /// Takes up one that an earlier daemon left; `None` if its process is gone.
    ///
    /// # Errors
    /// There is a process, but it does not answer.
    fn attach(&self, name: &VmName, on_end: OnEnd) -> Result<Option<Arc<dyn Machine>>, String>;
}
