//! A machine's memory as KVM sees it.

use super::{KvmError, LOG_ALIGNMENT, failed};
use crate::memory::SharedMemory;
use kvm_bindings as abi;
use kvm_ioctls::VmFd;
use limosa_pages::{Gpa, PageCount, PageRange, Pfn};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

/// Guest-physical memory that is one run of the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub start: Gpa,
    /// Which pages of the file it shows.
    pub pages: PageRange,
}

/// One slot a region, over the whole life of the machine.
pub(crate) struct Slots {
    pub(super) vm: Arc<VmFd>,
    regions: Vec<Region>,
    /// Keeps the memory mapped as long as KVM may write it.
    memory: Option<Arc<SharedMemory>>,
}

impl Slots {
    pub(super) const fn none(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            regions: Vec::new(),
            memory: None,
        }
    }

    /// Gives the machine its memory: [`super::Vm::set_memory`].
    pub(super) fn fill(
        &mut self,
        memory: Arc<SharedMemory>,
        regions: &[Region],
    ) -> Result<(), KvmError> {
        assert!(self.memory.is_none(), "a machine gets its memory once");
        let mut next = Pfn::new(0);
        for region in regions {
            assert!(region.pages.first == next, "regions are dense in the file");
            assert!(
                region.pages.count.get().is_multiple_of(LOG_ALIGNMENT),
                "regions are whole words of the log"
            );
            next = region.pages.end();
        }
        assert!(
            next.get() <= memory.page_count().get(),
            "regions lie within the memory"
        );
        self.memory = Some(memory);
        self.regions = regions.to_vec();
        self.set(0)
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    pub(crate) fn page_count(&self) -> PageCount {
        self.memory().page_count()
    }

    /// Address and size of the memory in this process.
    pub(crate) fn place(&self) -> (u64, u64) {
        let memory = self.memory();
        let base = memory.host_address(0, 0).expect("a mapping has a start");
        (base, memory.size().get())
    }

    pub(crate) fn descriptor(&self) -> RawFd {
        self.vm.as_raw_fd()
    }

    pub(crate) fn borrowed(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }

    pub(super) fn memory(&self) -> &Arc<SharedMemory> {
        self.memory
            .as_ref()
            .expect("asked after the memory was set")
    }

    /// Tells KVM about all slots, with these flags.
    pub(crate) fn set(&self, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in (0..).zip(&self.regions) {
            let bytes = region.pages.bytes().get();
            let len = usize::try_from(bytes).expect("mapped here");
            let host = self
                .memory()
                .host_address(region.pages.first.file_offset(), len)
                .expect("checked when set");
            let description = abi::kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start.get(),
                memory_size: bytes,
                userspace_addr: host,
            };
            // SAFETY: the range is mapped, and stays so as long as the machine, which owns a
            // reference to it; nobody in this process holds a Rust reference into it.
            unsafe { self.vm.set_user_memory_region(description) }
                .map_err(failed("use the guest's memory"))?;
        }
        Ok(())
    }
}
