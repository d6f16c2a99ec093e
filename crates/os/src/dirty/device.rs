//! Pages that devices have written: trackers see what the guest's processors write, and a device
//! writes through the VM process's own mapping.
//!
//! A device writes first and notes then. So a write is either noted when a harvest looks, or it is
//! told by a later one; the last harvest comes when devices rest.

use super::seen::Seen;
use crate::bitmap::SharedBitmap;
use limosa_pages::{PAGE_SIZE, PageCount, PageRange, Pfn};
use std::sync::Arc;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// The notes of all devices of a machine.
#[derive(Debug)]
pub struct DeviceWrites(Seen);

impl DeviceWrites {
    /// Nothing noted yet, for a memory of that size.
    pub fn nothing(pages: PageCount) -> Self {
        Self(Seen::nothing(pages))
    }

    /// Notes bytes of the memory file as written. Those beyond the memory are none.
    fn note(&self, offset: u64, bytes: u64) {
        let (first, end) = (
            offset / PAGE_SIZE,
            offset.saturating_add(bytes).div_ceil(PAGE_SIZE),
        );
        if first < end {
            let pages = PageCount::new(end - first);
            self.0.add(PageRange::new(Pfn::new(first), pages));
        }
    }

    pub(crate) fn add_to(&self, bitmap: &SharedBitmap) {
        self.0.add_to(bitmap);
    }

    pub(crate) fn forget(&self, harvested: &SharedBitmap, range: PageRange) {
        self.0.forget(harvested, range);
    }

    pub(crate) fn forget_all(&self) {
        self.0.forget_all();
    }
}

/// Where the crates of rust-vmm note what they write to one part of the memory.
#[derive(Clone, Debug)]
pub struct PartNotes {
    pub(crate) writes: Arc<DeviceWrites>,
    /// Where in the memory file the part begins.
    pub(crate) offset: u64,
}

/// The same for a slice of that part.
#[derive(Clone, Copy, Debug)]
pub struct SliceNotes<'a> {
    writes: &'a DeviceWrites,
    offset: u64,
}

impl<'a> WithBitmapSlice<'a> for PartNotes {
    type S = SliceNotes<'a>;
}

impl Bitmap for PartNotes {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> SliceNotes<'_> {
        SliceNotes {
            writes: &self.writes,
            offset: self.offset + offset as u64,
        }
    }
}

impl WithBitmapSlice<'_> for SliceNotes<'_> {
    type S = Self;
}

impl BitmapSlice for SliceNotes<'_> {}

impl Bitmap for SliceNotes<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.writes.note(self.offset + offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.offset + offset as u64) / PAGE_SIZE;
        self.writes.0.contains(Pfn::new(page))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            offset: self.offset + offset as u64,
            ..*self
        }
    }
}
