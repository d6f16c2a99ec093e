//! The seam to a guest: what a migration asks of a VM, whoever runs it.
//!
//! Implemented by the handle of a VM process, and by a plain thread that writes memory in this
//! crate's tests. All requests are answered in the order in which they were made.

mod vm_handle;

use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_os::SharedMemory;
use limosa_os::userfault::PageInstaller;
use limosa_pages::{PageRange, PageSet, Pfn};
pub use limosa_vmm::client::LentDisks;
use std::sync::Arc;
use std::time::Duration;

/// A request that a guest did not fulfil. The VM process may be gone.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestError(pub String);

/// Why a guest was not run after its commit.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// It has not run and never will: the VM process said so, or was gone before it was asked.
    #[error("{0}")]
    Refused(GuestError),
    /// The VM process was asked and did not answer: it may have run.
    #[error("{0}")]
    Unknown(GuestError),
}

/// A guest that is paused and saved.
#[derive(Debug)]
pub struct Saved {
    /// State sections.
    pub state: Vec<u8>,
    /// When the first vCPU left the guest.
    pub stopped_first: Timestamp,
    /// When the last one did.
    pub stopped_last: Timestamp,
    /// When the dirty log had been read.
    pub harvested: Timestamp,
    /// When everything was saved.
    pub saved: Timestamp,
    /// What the dirty log says, if it was asked for.
    pub dirty: Option<PageSet>,
    /// Pages that the vCPUs need at once when they go on: page tables, code, stack.
    pub first_needed: Vec<Pfn>,
}

/// A guest that runs.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// When its last vCPU entered the guest.
    pub first_instruction_at: Timestamp,
}

/// A guest with its memory lent out.
///
/// Contract: after [`Guest::pause_and_save`] returned, nothing writes the memory until the guest
/// is resumed. A page read after [`Guest::clear`] returned for it is at least as new as everything
/// that no later harvest reports.
pub trait Guest: Send + Sync {
    /// What machine it is, for the target; understood by the VMM.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn description(&self) -> Result<Vec<u8>, GuestError>;

    /// Its memory, mapped here.
    fn memory(&self) -> Arc<SharedMemory>;

    /// Its disks, opened here beside the guest that has them, to be read at the source or written at the
    /// target. From now on its dirty log tells what is written to them, too, see [`limosa_pages::Numbering`];
    /// and it waits for pages of them that are marked as missing.
    ///
    /// # Errors
    /// It has none, or they cannot be opened.
    fn disks(&self, _is_read_only: bool) -> Result<LentDisks, GuestError> {
        Err(GuestError("the guest has no disks".to_owned()))
    }

    /// Dirty tracking on: every page counts as dirty until it is cleared.
    ///
    /// # Errors
    /// The VM process does not answer, or KVM refuses.
    fn start_tracking(&self) -> Result<(), GuestError>;

    /// Dirty tracking off.
    ///
    /// # Errors
    /// As [`Guest::start_tracking`].
    fn stop_tracking(&self) -> Result<(), GuestError>;

    /// Slows its writers down from now on, or lets them go. [`Guest::stop_tracking`],
    /// [`Guest::pause_and_save`] and the loss of this handle let them go, too.
    ///
    /// # Errors
    /// As [`Guest::start_tracking`], or it cannot be done with its dirty tracker.
    fn throttle(&self, throttle: Option<Throttle>) -> Result<(), GuestError>;

    /// Reads the dirty log without clearing it; who wrote. The set is of the memory, or of that and the disks
    /// that [`Guest::disks`] gave.
    ///
    /// # Errors
    /// As [`Guest::start_tracking`].
    fn harvest(&self, into: &mut PageSet) -> Result<Writers, GuestError>;

    /// True if a harvest by itself does not slow the guest: what it finds is tracked anew when it is
    /// cleared, and not at once.
    fn harvests_freely(&self) -> bool;

    /// Clears the bits that the last harvest found within `range`, except those of the pages that are
    /// `kept`, and tracks these pages anew. What is kept is in every later harvest.
    ///
    /// # Errors
    /// As [`Guest::start_tracking`].
    fn clear(&self, range: PageRange, kept: Vec<PageRange>) -> Result<(), GuestError>;

    /// Pauses, saves and resumes.
    ///
    /// # Errors
    /// The VM process does not answer, or the state cannot be saved; the guest then runs on.
    fn rehearse(&self) -> Result<Saved, GuestError>;

    /// Pauses, saves, and reads the dirty log into a set if one is given: one request.
    ///
    /// # Errors
    /// As [`Guest::rehearse`].
    fn pause_and_save(&self, log: Option<PageSet>) -> Result<Saved, GuestError>;

    /// Runs the paused guest on.
    ///
    /// # Errors
    /// The recorded phase forbids it, or the VM process does not answer.
    fn resume(&self) -> Result<(), GuestError>;

    /// Records where the guest may run.
    ///
    /// # Errors
    /// The step is not a legal one, or the VM process does not answer.
    fn record(&self, phase: &Phase) -> Result<(), GuestError>;

    /// Loads a state into a guest that has not run.
    ///
    /// # Errors
    /// The state does not fit or is damaged; the guest cannot run then.
    fn load(&self, state: &[u8], is_rehearsal: bool) -> Result<Duration, GuestError>;

    /// Whether pages of its disks are missing.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn misses_disk_pages(&self) -> Result<bool, GuestError> {
        Ok(false)
    }

    /// What installs pages that come when the guest runs; `None` if its page faults cannot be
    /// served, or need not be any more.
    fn installer(&self) -> Option<Arc<PageInstaller>>;

    /// All pages are there: from now on page faults are the kernel's.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn disarm(&self) -> Result<(), GuestError>;

    /// True if the VM process has ended.
    fn is_gone(&self) -> bool;

    /// Records the commit and runs: one request. `stopped_at` is when the guest stopped at the
    /// source, on this host's clock. With `keeps_faults` its page faults are still reported.
    ///
    /// # Errors
    /// Whether it is certain that the guest has not run.
    fn commit_and_run(
        &self,
        id: MigrationId,
        stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> Result<Running, CommitError>;

    /// What has come from outside for the guest since it was committed to another host, for
    /// [`Guest::give_strays`] there; empty if that is nothing.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn take_strays(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    /// Gives the guest, which runs here, what has come for it where it was before.
    ///
    /// # Errors
    /// The VM process does not answer.
    fn give_strays(&self, _strays: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }

    /// Ends the VM process.
    ///
    /// # Errors
    /// It cannot be ended.
    fn stop(&self) -> Result<(), GuestError>;
}
