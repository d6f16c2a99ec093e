//! KVM: the machine's side. A vCPU is in [`vcpu`].
//!
//! State is read and written as the bytes of KVM's own structures, whose layout is a stable
//! interface of the kernel: a part has a kind and a size, and what is in it is nobody's business
//! here. So nothing is lost that this file does not know, and a save is one copy by the kernel into
//! its final place.
//!
//! Memory: one slot a region; the memory lives as long as the machine. Which pages the guest writes is
//! noticed by the tracker that the machine was made with ([`crate::dirty`]). Whoever copies a page
//! clears it first.
//!
//! Deliberately absent: split interrupt controllers, nested virtualisation.

mod doorbell;
mod interrupt;
pub(crate) mod request;
pub(crate) mod slots;
pub mod vcpu;

use crate::bitmap::SharedBitmap;
use crate::dirty::device::DeviceWrites;
use crate::dirty::{
    DirtyLog, DirtyRings, DirtyTracker, RING_BYTES_WANTED, RingTracker, TrackerKind, WriteProtect,
};
use crate::memory::{self, GuestView, HoldOff, Reclaim, SharedMemory};
use kvm_bindings as abi;
use kvm_ioctls::{Cap, VmFd};
use limosa_pages::PageRange;
use slots::Slots;
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

pub use doorbell::Doorbell;
pub use interrupt::InterruptLine;
pub use request::{VcpuPart, VmPart};
pub use slots::Region;
pub use vcpu::{Exit, Kicker, Vcpu};

/// The structures in which a vCPU's CPUID table, general and special registers are written.
pub use kvm_bindings::{kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs};

/// Pages in a word of the dirty log; slots begin and end at multiples of it.
const LOG_ALIGNMENT: u64 = 64;

/// Most entries of a CPUID table that KVM takes.
pub const CPUID_ENTRIES_MAX: usize = abi::KVM_MAX_CPUID_ENTRIES;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM to use.
    #[error(
        "cannot open /dev/kvm: load the kvm module, or let this user read and write the device"
    )]
    Unavailable {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel lacks something that we need.
    #[error("this kernel's KVM lacks {what}")]
    Lacks {
        /// The capability.
        what: &'static str,
    },
    /// A call failed.
    #[error("KVM cannot {what}")]
    Call {
        /// What was asked.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Turns the error number of a call into an error that says what was tried.
fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call {
        what,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// The host's KVM.
#[derive(Debug)]
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// There is none, or it may not be opened.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| KvmError::Unavailable {
            source: io::Error::from_raw_os_error(error.errno()),
        })?;
        vcpu::permit_large_vector_state();
        Ok(Self(kvm))
    }

    /// The CPUID table that this host can offer.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn supported_cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let table = self
            .0
            .get_supported_cpuid(CPUID_ENTRIES_MAX)
            .map_err(failed("tell the CPU's features"))?;
        Ok(table.as_slice().to_vec())
    }

    /// The model-specific registers that hold state.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn state_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .0
            .get_msr_index_list()
            .map_err(failed("list the model-specific registers"))?;
        Ok(list.as_slice().to_vec())
    }

    /// True if a guest's time stamp counter can run at a rate other than the host's.
    pub fn scales_tsc(&self) -> bool {
        self.0.check_extension(Cap::TscControl)
    }

    /// True if a local interrupt controller can interrupt at a count of the time stamp counter. KVM
    /// says so apart from the CPUID table, since it is the interrupt controller's.
    pub fn has_tsc_deadline(&self) -> bool {
        self.0.check_extension(Cap::TscDeadlineTimer)
    }

    /// Makes a machine without memory and vCPUs, whose writes that tracker will notice.
    ///
    /// # Errors
    /// KVM refuses or lacks what the tracker needs.
    pub fn create_vm(&self, tracker: TrackerKind) -> Result<Vm, KvmError> {
        let vm = self
            .create_bare_vm()
            .map_err(failed("make a virtual machine"))?;
        let mut rings = None;
        let tracker: Box<dyn DirtyTracker> = match tracker {
            TrackerKind::Bitmap => {
                clear_log_manually(&vm)?;
                Box::new(DirtyLog)
            }
            TrackerKind::Ring => {
                let shared = Arc::new(DirtyRings::new(enable_rings(&vm)?));
                rings = Some(Arc::clone(&shared));
                Box::new(RingTracker(shared))
            }
            TrackerKind::WriteProtect => Box::new(WriteProtect::new()?),
        };
        if vm.check_extension_raw(u64::from(abi::KVM_CAP_SREGS2)) <= 0 {
            return Err(KvmError::Lacks {
                what: "page directory pointers as state (Linux 5.14 has them)",
            });
        }
        let features = Features {
            xsave_bytes: vm
                .check_extension_raw(u64::from(abi::KVM_CAP_XSAVE2))
                .try_into()
                .unwrap_or(0),
        };
        Ok(Vm {
            slots: Slots::none(Arc::new(vm)),
            features,
            rings,
            tracker,
            is_tracking: false,
            device_writes: None,
            reclaim: None,
        })
    }

    /// KVM gives up when something interrupts the thread, be it only that a ring of io_uring(7) which it once
    /// made is gone. Whatever interrupts is over after some attempts.
    fn create_bare_vm(&self) -> Result<VmFd, kvm_ioctls::Error> {
        const ATTEMPTS: u32 = 10;
        let mut last = self.0.create_vm();
        for _ in 1..ATTEMPTS {
            match last {
                Err(error) if error.errno() == libc::EINTR => last = self.0.create_vm(),
                other => return other,
            }
        }
        last
    }
}

fn clear_log_manually(vm: &VmFd) -> Result<(), KvmError> {
    let wanted = abi::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi::KVM_DIRTY_LOG_INITIALLY_SET;
    let offered = vm.check_extension_raw(u64::from(abi::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    if offered & wanted.cast_signed() != wanted.cast_signed() {
        return Err(KvmError::Lacks {
            what: "the manually cleared dirty log (Linux 5.7 has it)",
        });
    }
    let capability = abi::kvm_enable_cap {
        cap: abi::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [u64::from(wanted), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&capability)
        .map_err(failed("clear the dirty log manually"))
}

/// Switches dirty rings on; how many bytes each has.
fn enable_rings(vm: &VmFd) -> Result<u32, KvmError> {
    // With ordered flags where there are any; on x86 the older ones are ordered, too.
    let both = [
        abi::KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        abi::KVM_CAP_DIRTY_LOG_RING,
    ];
    for cap in both {
        let offered = vm.check_extension_raw(u64::from(cap)).max(0).unsigned_abs();
        if offered == 0 {
            continue;
        }
        let bytes = offered.min(RING_BYTES_WANTED);
        let capability = abi::kvm_enable_cap {
            cap,
            args: [u64::from(bytes), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&capability)
            .map_err(failed("keep dirty pages in rings"))?;
        return Ok(bytes);
    }
    Err(KvmError::Lacks {
        what: "dirty rings (Linux 5.11 has them): use another dirty tracker",
    })
}

/// What of the interface this kernel has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    /// Size of the extended state, zero if only the old fixed size is known.
    pub(crate) xsave_bytes: usize,
}

/// A virtual machine.
pub struct Vm {
    slots: Slots,
    features: Features,
    /// What is full when a vCPU has to stop for it.
    rings: Option<Arc<DirtyRings>>,
    tracker: Box<dyn DirtyTracker>,
    is_tracking: bool,
    /// What devices write; there once the machine has its memory.
    device_writes: Option<Arc<DeviceWrites>>,
    /// Takes what the guest gives up; likewise.
    reclaim: Option<Arc<Reclaim>>,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("regions", &self.slots.regions())
            .field("tracker", &self.tracker)
            .field("is_tracking", &self.is_tracking)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Gives the machine its memory, once.
    ///
    /// # Errors
    /// KVM refuses.
    ///
    /// # Panics
    /// If it has memory, or a region is not within the memory, not a multiple of 64 pages, or not
    /// right behind its predecessor in the file.
    pub fn set_memory(
        &mut self,
        memory: Arc<SharedMemory>,
        regions: &[Region],
    ) -> Result<(), KvmError> {
        let writes = DeviceWrites::nothing(memory.page_count());
        self.device_writes = Some(Arc::new(writes));
        let reclaim = Reclaim::new(Arc::clone(&memory), regions);
        self.reclaim = Some(Arc::new(reclaim));
        self.slots.fill(memory, regions)
    }

    /// The memory as devices see it: what they write through it is told with what the guest writes.
    ///
    /// # Panics
    /// If the machine has no memory yet.
    pub fn view(&self) -> GuestView {
        let writes = self.device_writes.as_ref().expect("the machine has memory");
        memory::view(self.slots.memory(), self.slots.regions(), writes)
    }

    /// Takes pages that the guest gives up; nothing while writes are tracked.
    ///
    /// # Panics
    /// If the machine has no memory yet.
    pub const fn reclaim(&self) -> &Arc<Reclaim> {
        self.reclaim.as_ref().expect("the machine has memory")
    }

    /// Interrupt controllers and timer in the kernel, before the first vCPU.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_irqchip(&self) -> Result<(), KvmError> {
        /// Three pages at the end of the hole below 4 GiB, used on old Intel processors only.
        const TSS_ADDRESS: usize = 0xfffb_d000;
        self.slots
            .vm
            .set_tss_address(TSS_ADDRESS)
            .map_err(failed("place the task state segment"))?;
        self.slots
            .vm
            .create_irq_chip()
            .map_err(failed("make interrupt controllers"))?;
        let timer = abi::kvm_pit_config {
            flags: abi::KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.slots
            .vm
            .create_pit2(timer)
            .map_err(failed("make an interval timer"))
    }

    /// Makes the vCPU with that index.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, KvmError> {
        let vcpu = self
            .slots
            .vm
            .create_vcpu(u64::from(index))
            .map_err(failed("make a vCPU"))?;
        let rings = self.rings.as_ref().map(|rings| (rings, &self.slots.vm));
        Vcpu::new(vcpu, self.features, self.slots.vm.run_size(), rings)
    }

    /// Bytes of a part of the machine's state.
    pub const fn part_bytes(&self, part: VmPart) -> usize {
        part.bytes()
    }

    /// Reads a part of the machine's state into `into`, which has exactly its size.
    ///
    /// # Errors
    /// KVM refuses, for one because the machine has no such part.
    ///
    /// # Panics
    /// If the size differs.
    pub fn read_part(&self, part: VmPart, into: &mut [u8]) -> Result<(), KvmError> {
        assert_eq!(
            into.len(),
            part.bytes(),
            "a part is read into a place of its size"
        );
        part.prepare_read(into);
        // SAFETY: the request writes exactly as many bytes as the place has.
        check("read the machine's state", unsafe {
            libc::ioctl(
                self.slots.vm.as_raw_fd(),
                part.read_request(),
                into.as_mut_ptr(),
            )
        })
    }

    /// Writes a part of the machine's state from its bytes.
    ///
    /// # Errors
    /// KVM refuses the content, or the machine has no such part.
    ///
    /// # Panics
    /// If the size differs.
    pub fn write_part(&self, part: VmPart, from: &[u8]) -> Result<(), KvmError> {
        assert_eq!(
            from.len(),
            part.bytes(),
            "a part is written from a place of its size"
        );
        // SAFETY: the request reads exactly as many bytes as the place has.
        check("write the machine's state", unsafe {
            libc::ioctl(
                self.slots.vm.as_raw_fd(),
                part.write_request(),
                from.as_ptr(),
            )
        })
    }

    /// The clock that paravirtualised guests read, in nanoseconds.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn clock_nanos(&self) -> Result<u64, KvmError> {
        Ok(self
            .slots
            .vm
            .get_clock()
            .map_err(failed("read its clock"))?
            .clock)
    }

    /// Sets that clock.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_clock_nanos(&self, nanos: u64) -> Result<(), KvmError> {
        let clock = abi::kvm_clock_data {
            clock: nanos,
            ..Default::default()
        };
        self.slots
            .vm
            .set_clock(&clock)
            .map_err(failed("set its clock"))
    }

    /// Dirty tracking on: every page counts as dirty until it is cleared.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn start_tracking(&mut self) -> Result<(), KvmError> {
        if !self.is_tracking {
            self.hold_off(true);
            let started = self.tracker.start(&self.slots);
            self.hold_off(started.is_ok());
            started?;
            self.is_tracking = true;
        }
        Ok(())
    }

    /// Dirty tracking off; what was dirty is forgotten.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn stop_tracking(&mut self) -> Result<(), KvmError> {
        if self.is_tracking {
            self.tracker.stop(&self.slots)?;
            self.is_tracking = false;
            if let Some(writes) = &self.device_writes {
                writes.forget_all();
            }
            self.hold_off(false);
        }
        Ok(())
    }

    fn hold_off(&self, is_so: bool) {
        if let Some(reclaim) = &self.reclaim {
            reclaim.hold_off(HoldOff::Tracking, is_so);
        }
    }

    /// True while writes are noticed.
    pub const fn is_tracking(&self) -> bool {
        self.is_tracking
    }

    /// Pages that each vCPU has dirtied since tracking began, in their order; none where nobody counts.
    /// A page that is dirtied anew after it was protected again counts anew.
    pub fn dirtied(&self) -> Vec<u64> {
        let rings = self.rings.as_ref();
        rings.map_or_else(Vec::new, |rings| rings.all_dirtied())
    }

    /// Overwrites the bitmap with what was written since it was cleared.
    ///
    /// # Errors
    /// Tracking is off, or KVM refuses.
    ///
    /// # Panics
    /// If the bitmap is of another machine.
    pub fn read_dirty_pages(&self, bitmap: &SharedBitmap) -> Result<(), KvmError> {
        self.need_tracking("tell which pages were written while it does not look")?;
        self.tracker.harvest(&self.slots, bitmap)?;
        if let Some(writes) = &self.device_writes {
            writes.add_to(bitmap);
        }
        Ok(())
    }

    /// Clears, of the pages in `range`, those that are set in the bitmap, and tracks them anew.
    /// `range` begins at a multiple of 64 pages and ends at one or at the end of a region. Pages of it
    /// that are `kept` are taken out of the bitmap instead: they count as written until a later clear.
    ///
    /// # Errors
    /// Tracking is off, the range is no such one, what is kept is not within it, or KVM refuses.
    pub fn clear_dirty_pages(
        &self,
        bitmap: &SharedBitmap,
        range: PageRange,
        kept: &[PageRange],
    ) -> Result<(), KvmError> {
        self.need_tracking("track pages anew while it does not look")?;
        let (from, to) = (range.first.get(), range.end().get());
        let is_end = |region: &Region| region.pages.end().get() == to;
        let is_whole = from.is_multiple_of(LOG_ALIGNMENT)
            && (to.is_multiple_of(LOG_ALIGNMENT) || self.slots.regions().iter().any(is_end))
            && to <= self.slots.page_count().get();
        if !is_whole {
            return Err(KvmError::Call {
                what: "clear a part of the dirty log that is not whole words of it",
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        let is_inside = |run: &PageRange| {
            let first = run.first.get();
            (from..to).contains(&first) && run.count.get() <= to - first
        };
        if !kept.iter().all(is_inside) {
            return Err(KvmError::Call {
                what: "keep pages of the dirty log that are not in the part that is cleared",
                source: io::ErrorKind::InvalidInput.into(),
            });
        }
        for &run in kept {
            bitmap.take_range(run);
        }
        if let Some(writes) = &self.device_writes {
            writes.forget(bitmap, range);
        }
        self.tracker.clear(&self.slots, bitmap, range)
    }

    fn need_tracking(&self, what: &'static str) -> Result<(), KvmError> {
        if self.is_tracking {
            return Ok(());
        }
        Err(KvmError::Call {
            what,
            source: io::ErrorKind::InvalidInput.into(),
        })
    }
}

pub(crate) fn check(what: &'static str, result: libc::c_int) -> Result<(), KvmError> {
    if result < 0 {
        return Err(KvmError::Call {
            what,
            source: io::Error::last_os_error(),
        });
    }
    Ok(())
}
