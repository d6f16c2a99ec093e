//! Pages of disks from a push stream into the files that were made for them: written as they come before the
//! guest runs here, put in by the installer from then on.
//!
//! What a stream has written is on its disks before it tells of a barrier: a guest that was answered *this is
//! safe* at the source has it safe here when it runs.

use super::{Owner, PushStream, ReceiveError, content_length};
use crate::disks;
use crate::faults::Way;
use limosa_engine::wire::{Coding, PushHeader};
use limosa_pages::{PAGE_SIZE_USIZE, PageRange};

/// After so many bytes a stream waits until they are safe, so that it is not long before a barrier that the last
/// of them are, however lazy the disk.
const UNSAFE_BYTES_MAX: u64 = 64 << 20;

impl PushStream {
    /// Takes what is said about pages that are not those of the memory.
    pub(super) fn take_disk_pages(
        &mut self,
        header: PushHeader,
        range: PageRange,
    ) -> Result<(), ReceiveError> {
        match (self.shared.owner(), header) {
            (Owner::Streams, PushHeader::Zeros(_)) => self.zero_disk(range),
            (Owner::Filling, PushHeader::Zeros(_)) => {
                Ok(self
                    .shared
                    .put_zeros_in(self.faults()?, range, Way::Pushed)?)
            }
            (Owner::Streams, PushHeader::Stale(_)) => self.mark_missing(range),
            (Owner::Streams, PushHeader::StaleBits(_)) => self.mark_bits_missing(range),
            (owner @ (Owner::Streams | Owner::Filling), PushHeader::Pages(_)) => {
                self.take_content(owner, range, None)
            }
            (owner @ (Owner::Streams | Owner::Filling), PushHeader::Coded { coding, .. }) => {
                self.take_content(owner, range, Some(coding))
            }
            _ => Err(ReceiveError::Late),
        }
    }

    /// Takes the pages that follow.
    fn take_content(
        &mut self,
        owner: Owner,
        range: PageRange,
        coding: Option<Coding>,
    ) -> Result<(), ReceiveError> {
        let mut buffer = self.disk_buffer.take().unwrap_or_else(disks::buffer);
        let content = &mut buffer.bytes_mut()[..content_length(range)];
        let mut bytes = content.len();
        match coding {
            None => self.read(content)?,
            Some(coding) => bytes = self.decode(range, coding, content)?,
        }
        let shared = &self.shared;
        if shared.owner() != owner {
            return Err(ReceiveError::Late);
        }
        if owner == Owner::Filling {
            shared.put_in(self.faults()?, range, content, Way::Pushed)?;
            self.disk_buffer = Some(buffer);
            return Ok(());
        }
        shared.filled().insert_range(range);
        if let Some(hashes) = &shared.hashes {
            for (page, content) in range.iter().zip(content.chunks(PAGE_SIZE_USIZE)) {
                hashes.set_content(page, content);
            }
        }
        shared
            .disks
            .write(range, &mut buffer)
            .map_err(ReceiveError::Disk)?;
        self.arrived_in_place(range)?;
        shared.count(range.count, bytes as u64);
        self.disk_buffer = Some(buffer);
        self.unsafe_bytes += range.bytes().get();
        if self.unsafe_bytes >= UNSAFE_BYTES_MAX {
            self.flush_disks()?;
        }
        Ok(())
    }

    /// What was never written is zero already.
    fn zero_disk(&mut self, range: PageRange) -> Result<(), ReceiveError> {
        let shared = &self.shared;
        let stale: Vec<PageRange> = {
            let mut filled = shared.filled();
            let stale = filled.runs_in(range).collect();
            filled.remove_range(range);
            stale
        };
        for run in stale {
            shared.disks.zero(run).map_err(ReceiveError::Disk)?;
            if let Some(hashes) = &shared.hashes {
                run.iter().for_each(|page| hashes.set_zero(page));
            }
            self.unsafe_bytes += run.bytes().get();
        }
        self.arrived_in_place(range)?;
        self.shared.count(range.count, 0);
        Ok(())
    }

    /// Whatever this stream has written to disks is safe when this returns.
    pub(super) fn flush_disks(&mut self) -> Result<(), ReceiveError> {
        if std::mem::take(&mut self.unsafe_bytes) > 0 {
            self.shared.disks.flush().map_err(ReceiveError::Disk)?;
        }
        Ok(())
    }
}
