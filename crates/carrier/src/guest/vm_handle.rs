//! The guest of a VM process, over its socket.

use super::{CommitError, Guest, GuestError, Running, Saved};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_os::SharedMemory;
use limosa_os::dirty::TrackerKind;
use limosa_os::userfault::PageInstaller;
use limosa_pages::{PageRange, PageSet};
use limosa_vmm::answer::RunState;
use limosa_vmm::client::{LentDisks, VmError, VmHandle};
use std::sync::Arc;
use std::time::Duration;

impl From<VmError> for GuestError {
    /// The whole chain in one line, as it is sent to the other host.
    fn from(error: VmError) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        Self(text)
    }
}

impl From<limosa_vmm::answer::Saved> for Saved {
    fn from(saved: limosa_vmm::answer::Saved) -> Self {
        Self {
            state: saved.sections,
            stopped_first: saved.times.stopped_first,
            stopped_last: saved.times.stopped_last,
            harvested: saved.times.harvested,
            saved: saved.times.saved,
            dirty: saved.dirty,
            first_needed: saved.first_needed,
        }
    }
}

impl Guest for VmHandle {
    fn description(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.description())
    }

    fn memory(&self) -> Arc<SharedMemory> {
        Arc::clone(self.memory())
    }

    fn disks(&self, is_read_only: bool) -> Result<LentDisks, GuestError> {
        Ok(self.disks(is_read_only)?)
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        Ok(self.start_tracking()?)
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        Ok(self.stop_tracking()?)
    }

    fn throttle(&self, throttle: Option<Throttle>) -> Result<(), GuestError> {
        Ok(self.throttle(throttle)?)
    }

    fn harvest(&self, into: &mut PageSet) -> Result<Writers, GuestError> {
        Ok(self.harvest(into)?)
    }

    fn harvests_freely(&self) -> bool {
        self.dirty_tracker() == TrackerKind::Bitmap
    }

    fn clear(&self, range: PageRange, kept: Vec<PageRange>) -> Result<(), GuestError> {
        Ok(self.clear(range, kept)?)
    }

    fn rehearse(&self) -> Result<Saved, GuestError> {
        Ok(self.rehearse()?.into())
    }

    fn pause_and_save(&self, log: Option<PageSet>) -> Result<Saved, GuestError> {
        Ok(self.pause_and_save_into(log)?.into())
    }

    fn resume(&self) -> Result<(), GuestError> {
        match self.resume() {
            Ok(_) => Ok(()),
            // It lost us for a moment and has resumed by itself, as its record wants it.
            Err(_)
                if self
                    .status()
                    .is_ok_and(|status| status.run_state == RunState::Running) =>
            {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn record(&self, phase: &Phase) -> Result<(), GuestError> {
        Ok(self.record(phase)?)
    }

    fn load(&self, state: &[u8], is_rehearsal: bool) -> Result<Duration, GuestError> {
        Ok(self.load(state, is_rehearsal)?.took)
    }

    fn misses_disk_pages(&self) -> Result<bool, GuestError> {
        let all = self.status()?.missing;
        let of_memory = self.installer().map(|memory| memory.missing_count());
        Ok(all > of_memory)
    }

    fn installer(&self) -> Option<Arc<PageInstaller>> {
        self.installer()
    }

    fn disarm(&self) -> Result<(), GuestError> {
        Ok(self.disarm()?)
    }

    fn take_strays(&self) -> Result<Vec<u8>, GuestError> {
        Ok(self.take_strays()?)
    }

    fn give_strays(&self, strays: &[u8]) -> Result<(), GuestError> {
        Ok(self.give_strays(strays)?)
    }

    fn is_gone(&self) -> bool {
        self.is_gone()
    }

    fn commit_and_run(
        &self,
        id: MigrationId,
        stopped_at: Timestamp,
        keeps_faults: bool,
    ) -> Result<Running, CommitError> {
        match self.commit_and_run(id, stopped_at, keeps_faults) {
            Ok(running) => Ok(Running {
                first_instruction_at: running.last_entered_at,
            }),
            Err(error @ (VmError::Lost(_) | VmError::Foreign)) => {
                Err(CommitError::Unknown(error.into()))
            }
            Err(error) => Err(CommitError::Refused(error.into())),
        }
    }

    fn stop(&self) -> Result<(), GuestError> {
        Ok(self.stop()?)
    }
}
