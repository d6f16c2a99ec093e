//! Where in a guest's memory a request lies.
//!
//! The descriptors of a chain are read once, when the request begins. Its driver could change them while
//! the request is under way, and what was checked would not be what is used.

use limosa_os::memory::GuestView;
use std::collections::VecDeque;
use std::io;
use virtio_queue::{DescriptorChain, Error as QueueError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Pieces of a guest's memory, used up from the front.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// None is empty, all are memory.
    pieces: VecDeque<(GuestAddress, u32)>,
    bytes: u64,
}

impl Places {
    /// What the driver has written for the device, and where it wants something written.
    ///
    /// # Errors
    /// A piece is not in the guest's memory, there are more than `pieces_max`, or the chain has no end.
    pub(super) fn of(
        chain: DescriptorChain<&GuestView>,
        memory: &GuestView,
        pieces_max: usize,
    ) -> Result<[Self; 2], QueueError> {
        let mut both = <[Self; 2]>::default();
        let mut goes_on = false;
        for (index, descriptor) in chain.enumerate() {
            let (address, len) = (descriptor.addr(), descriptor.len());
            goes_on = descriptor.has_next();
            let is_there = len == 0 || memory.check_range(address, len as usize);
            if index >= pieces_max || !is_there {
                return Err(QueueError::InvalidChain);
            }
            if len > 0 {
                let places = &mut both[usize::from(descriptor.is_write_only())];
                places.pieces.push_back((address, len));
                places.bytes += u64::from(len);
            }
        }
        if goes_on {
            return Err(QueueError::InvalidChain);
        }
        Ok(both)
    }

    /// What is left of them.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Their addresses and lengths.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.pieces.iter().copied()
    }

    /// Takes the last byte away; `None` if there is none.
    pub(super) fn take_last(&mut self) -> Option<GuestAddress> {
        let (address, len) = self.pieces.pop_back()?;
        if len > 1 {
            self.pieces.push_back((address, len - 1));
        }
        self.bytes -= 1;
        Some(GuestAddress(address.0 + u64::from(len - 1)))
    }

    /// Copies the next bytes out of the guest's memory.
    ///
    /// # Errors
    /// There are fewer.
    pub(super) fn read(&mut self, memory: &GuestView, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let (address, len) = self.next(into.len())?;
            let (now, later) = into.split_at_mut(len);
            memory.read_slice(now, address).map_err(io::Error::other)?;
            into = later;
        }
        Ok(())
    }

    /// Copies bytes to where the guest wants the next ones.
    ///
    /// # Errors
    /// There is no room for them.
    pub(super) fn write(&mut self, memory: &GuestView, mut from: &[u8]) -> io::Result<()> {
        while !from.is_empty() {
            let (address, len) = self.next(from.len())?;
            let (now, later) = from.split_at(len);
            memory.write_slice(now, address).map_err(io::Error::other)?;
            from = later;
        }
        Ok(())
    }

    /// Uses up at most so many bytes in one piece.
    fn next(&mut self, wanted: usize) -> io::Result<(GuestAddress, usize)> {
        let front = self.pieces.front_mut();
        let piece = front.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (address, len) = *piece;
        let taken = u32::try_from(wanted).unwrap_or(u32::MAX).min(len);
        if taken == len {
            self.pieces.pop_front();
        } else {
            *piece = (GuestAddress(address.0 + u64::from(taken)), len - taken);
        }
        self.bytes -= u64::from(taken);
        Ok((address, taken as usize))
    }
}
