//! Disks of a machine, for whoever copies them.

use super::{VmError, VmHandle};
use crate::protocol::Request;
use limosa_os::SharedBitmap;
use limosa_os::disk::Disk;
use limosa_os::disk::missing::MissingThere;
use limosa_pages::{PageCount, PageSet};
use std::io;
use std::os::fd::AsFd;

/// Where what is written to disks is harvested to.
#[derive(Debug)]
pub(super) struct DiskWrites {
    /// The word of a set in which its first bit is.
    first_word: usize,
    bitmap: SharedBitmap,
}

/// The disks of a machine.
#[derive(Debug)]
pub struct LentDisks {
    /// In their order.
    pub disks: Vec<Disk>,
    /// What of them has not come yet: the guest's device waits for it.
    pub missing: MissingThere,
}

impl VmHandle {
    /// Opens its disks, in their order: the very files that it has open. From now on what the guest writes to
    /// them is followed as what it writes to its memory is, by the numbers of [`crate::config::VmConfig::numbering`].
    ///
    /// # Errors
    /// It has none, or they cannot be opened.
    pub fn disks(&self, is_read_only: bool) -> Result<LentDisks, VmError> {
        let frame = self.exchange(&Request::LendDisks, &[])?;
        let numbering = self.lent().config.numbering();
        let numbering = numbering.ok_or_else(|| self.foreign())?;
        let mut descriptors = frame.descriptors.into_iter();
        let mut next = || descriptors.next().ok_or_else(|| self.foreign());
        let (bitmap, missing, asked) = (next()?, next()?, next()?);
        let first = numbering.disks().first().ok_or_else(|| self.foreign())?;
        let missing = MissingThere::new(&numbering, missing, asked)?;
        let disks = descriptors
            .map(|file| Disk::open_again(file.as_fd(), is_read_only))
            .collect::<io::Result<Vec<_>>>()
            .map_err(VmError::Disk)?;
        let sizes = disks.iter().map(Disk::bytes);
        let expected = self.lent().config.disks.iter();
        if !sizes.map(Some).eq(expected.map(|disk| disk.bytes)) {
            return Err(self.foreign());
        }
        let pages = numbering.end().get() - first.first.get();
        let writes = DiskWrites {
            first_word: usize::try_from(first.first.get() / 64).expect("a set holds it"),
            bitmap: SharedBitmap::open(bitmap, PageCount::new(pages))?,
        };
        // Whoever asks again is lent the same.
        drop(self.disk_writes.set(writes));
        Ok(LentDisks { disks, missing })
    }

    /// Copies what was harvested last.
    pub(super) fn copy_log(&self, into: &mut PageSet) {
        let (memory, log) = (self.memory().page_count(), &self.lent().bitmap);
        if into.capacity() == memory {
            return log.copy_to(into);
        }
        let disks = self.disk_writes.get().expect("its disks are followed");
        let first_page = disks.first_word as u64 * 64;
        assert_eq!(
            into.capacity().get(),
            first_page + disks.bitmap.page_count().get(),
            "a set of this machine"
        );
        into.fill_words(|index| match index.checked_sub(disks.first_word) {
            Some(index) => disks.bitmap.load(index),
            None => log.load(index),
        });
    }
}
