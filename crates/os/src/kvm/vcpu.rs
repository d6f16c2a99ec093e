//! One vCPU: running it, kicking it out of the guest, reading and writing its state.
//!
//! [`Vcpu`] belongs to the thread that runs it. Anyone may hold a [`Kicker`]: it sets the flag that
//! makes the next entry return at once, then interrupts the thread, so that a kick is never lost
//! between a look at a flag and the entry.
//!
//! An exit for a port or for memory-mapped I/O is completed by the *next* entry: state that is saved
//! before it would lose or repeat the access. So a pause enters once more with the flag set.

use super::request::{self, VcpuPart};
use super::{CPUID_ENTRIES_MAX, Features, KvmError, failed};
use crate::dirty::DirtyRings;
use crate::mapping::{Access, Mapping};
use crate::thread::ThreadId;
use kvm_bindings as abi;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Registers in one call: what KVM takes is 256.
const MSRS_PER_CALL: usize = 256;

/// Why a vCPU left the guest. Bytes are those of the access, to be taken or to be answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Exit<'a> {
    /// The guest reads a port.
    PortIn(u16, &'a mut [u8]),
    /// The guest writes a port.
    PortOut(u16, &'a [u8]),
    /// The guest reads an address without memory.
    MmioRead(u64, &'a mut [u8]),
    /// The guest writes one.
    MmioWrite(u64, &'a [u8]),
    /// It was kicked, or a signal came.
    Interrupted,
    /// Its dirty ring is nearly full: it goes on after [`Vcpu::empty_rings`].
    RingFull,
    /// The guest waits for an interrupt.
    Halted,
    /// The guest died of a fault in its fault handling (triple fault).
    Shutdown,
    /// KVM cannot go on.
    Failed(String),
}

/// A vCPU.
pub struct Vcpu {
    vcpu: VcpuFd,
    features: Features,
    page: Arc<RunPage>,
    /// The dirty rings of the machine, which all have to be emptied when this vCPU's is full.
    rings: Option<(Arc<DirtyRings>, Arc<VmFd>)>,
    /// Its place among them.
    ring: usize,
    has_tsc_offset: bool,
}

impl fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu")
            .field("has_tsc_offset", &self.has_tsc_offset)
            .finish_non_exhaustive()
    }
}

/// The first page of what KVM shares with us about a vCPU, in a mapping of our own.
#[derive(Debug)]
struct RunPage(Mapping);

impl RunPage {
    /// The flag that makes the next entry return at once.
    fn immediate_exit(&self) -> &AtomicU8 {
        let offset = std::mem::offset_of!(abi::kvm_run, immediate_exit);
        let flag = self.0.at(offset as u64, 1).expect("within the page");
        // SAFETY: the byte is valid as long as the mapping, and all of this process accesses it
        // atomically; the kernel reads it.
        unsafe { AtomicU8::from_ptr(flag) }
    }

    /// The number that goes with an exit of the kind *internal error*.
    fn internal_error(&self) -> u32 {
        let offset = std::mem::offset_of!(abi::kvm_run, __bindgen_anon_1);
        let number = self
            .0
            .at(offset as u64, 4)
            .expect("within the page")
            .cast::<u32>();
        // SAFETY: the word is valid and aligned: the page is, and the offset is a multiple of 8.
        unsafe { number.read_volatile() }
    }
}

/// Gets a vCPU out of the guest, from any thread.
#[derive(Clone, Debug)]
pub struct Kicker {
    page: Arc<RunPage>,
}

impl Kicker {
    /// Makes the running or next entry return, until [`Kicker::release`].
    pub fn kick(&self, thread: ThreadId) {
        self.hold();
        thread.interrupt();
    }

    /// Makes the next entry return at once, until [`Kicker::release`]. The vCPU's own thread needs
    /// no more than this.
    pub fn hold(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets the vCPU enter the guest again.
    pub fn release(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
    }
}

impl Vcpu {
    pub(super) fn new(
        vcpu: VcpuFd,
        features: Features,
        run_bytes: usize,
        rings: Option<(&Arc<DirtyRings>, &Arc<VmFd>)>,
    ) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is open as long as `vcpu`, which outlives the borrow.
        let file = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        let map = |source| KvmError::Call {
            what: "share a vCPU's run page",
            source,
        };
        let page = Mapping::new(file, run_bytes.min(4096), Access::ReadWrite, 0).map_err(map)?;
        let ring = rings.map(|(rings, _)| rings.add(file)).transpose()?;
        let mut vcpu = Self {
            vcpu,
            features,
            page: Arc::new(RunPage(page)),
            rings: rings.map(|(rings, vm)| (Arc::clone(rings), Arc::clone(vm))),
            ring: ring.unwrap_or(0),
            has_tsc_offset: false,
        };
        vcpu.has_tsc_offset = vcpu.tsc_attribute(request::HAS_ATTRIBUTE, &mut 0).is_ok();
        Ok(vcpu)
    }

    /// What gets it out of the guest.
    pub fn kicker(&self) -> Kicker {
        Kicker {
            page: Arc::clone(&self.page),
        }
    }

    /// Takes what is in the dirty rings, after [`Exit::RingFull`].
    ///
    /// # Errors
    /// KVM refuses.
    pub fn empty_rings(&self) -> Result<(), KvmError> {
        let Some((rings, vm)) = &self.rings else {
            return Ok(());
        };
        // SAFETY: the descriptor is open as long as `vm`, which outlives the borrow.
        rings.empty(unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) })
    }

    /// Pages that this vCPU has dirtied since tracking began; `None` if nobody counts them, or cannot
    /// be asked just now.
    pub fn dirtied(&self) -> Option<u64> {
        self.rings.as_ref()?.0.dirtied(self.ring)
    }

    /// Enters the guest and returns when it has to be left.
    pub fn run(&mut self) -> Exit<'_> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => Exit::PortIn(port, data),
            Ok(VcpuExit::IoOut(port, data)) => Exit::PortOut(port, data),
            Ok(VcpuExit::MmioRead(address, data)) => Exit::MmioRead(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::MmioWrite(address, data),
            Ok(VcpuExit::Hlt) => Exit::Halted,
            Ok(VcpuExit::Shutdown) => Exit::Shutdown,
            Ok(VcpuExit::Intr) => Exit::Interrupted,
            Ok(VcpuExit::InternalError) => Exit::Failed(format!(
                "KVM cannot emulate what the guest did (internal error {})",
                self.page.internal_error()
            )),
            Ok(VcpuExit::Unsupported(abi::KVM_EXIT_DIRTY_RING_FULL)) => Exit::RingFull,
            Ok(VcpuExit::SystemEvent(kind, _)) => Exit::Failed(format!("system event {kind}")),
            Ok(other) => Exit::Failed(format!("unexpected exit {other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
            Err(error) => {
                let error = io::Error::from_raw_os_error(error.errno());
                Exit::Failed(format!("KVM cannot run the vCPU: {error}"))
            }
        }
    }

    /// Sets the features that the guest sees. Before the first entry.
    ///
    /// # Errors
    /// KVM refuses the table.
    pub fn set_cpuid(&self, table: &[abi::kvm_cpuid_entry2]) -> Result<(), KvmError> {
        let too_long = |_| KvmError::Lacks {
            what: "room for so many CPUID entries",
        };
        let table = abi::CpuId::from_entries(table).map_err(too_long)?;
        self.vcpu
            .set_cpuid2(&table)
            .map_err(failed("set the guest's CPU features"))
    }

    /// The features that the guest sees.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn cpuid(&self) -> Result<Vec<abi::kvm_cpuid_entry2>, KvmError> {
        let table = self
            .vcpu
            .get_cpuid2(CPUID_ENTRIES_MAX)
            .map_err(failed("read the guest's CPU features"))?;
        Ok(table.as_slice().to_vec())
    }

    /// The general registers, to be filled in for the first instruction.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_registers(&self, registers: &abi::kvm_regs) -> Result<(), KvmError> {
        self.vcpu
            .set_regs(registers)
            .map_err(failed("set registers"))
    }

    /// The general registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn registers(&self) -> Result<abi::kvm_regs, KvmError> {
        self.vcpu.get_regs().map_err(failed("read registers"))
    }

    /// The special registers.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn special_registers(&self) -> Result<abi::kvm_sregs, KvmError> {
        self.vcpu
            .get_sregs()
            .map_err(failed("read special registers"))
    }

    /// Sets them.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_special_registers(&self, registers: &abi::kvm_sregs) -> Result<(), KvmError> {
        self.vcpu
            .set_sregs(registers)
            .map_err(failed("set special registers"))
    }

    /// Bytes of a part of its state on this host.
    pub fn part_bytes(&self, part: VcpuPart) -> usize {
        part.form(self.features).bytes
    }

    /// Reads a part of its state into `into`, which has exactly its size.
    ///
    /// # Errors
    /// KVM refuses, for one because there is no such part.
    ///
    /// # Panics
    /// If the size differs.
    pub fn read_part(&self, part: VcpuPart, into: &mut [u8]) -> Result<(), KvmError> {
        let form = part.form(self.features);
        assert_eq!(
            into.len(),
            form.bytes,
            "a part is read into a place of its size"
        );
        // SAFETY: the request writes exactly as many bytes as the place has; for the extended state
        // that is the size that this kernel told for this machine.
        super::check("read a vCPU's state", unsafe {
            libc::ioctl(self.vcpu.as_raw_fd(), form.read, into.as_mut_ptr())
        })
    }

    /// Writes a part of its state from its bytes.
    ///
    /// # Errors
    /// KVM refuses the content.
    ///
    /// # Panics
    /// If the size differs.
    pub fn write_part(&self, part: VcpuPart, from: &[u8]) -> Result<(), KvmError> {
        let form = part.form(self.features);
        assert_eq!(
            from.len(),
            form.bytes,
            "a part is written from a place of its size"
        );
        // SAFETY: the request reads exactly as many bytes as the place has.
        super::check("write a vCPU's state", unsafe {
            libc::ioctl(self.vcpu.as_raw_fd(), form.write, from.as_ptr())
        })
    }

    /// Appends the values of model-specific registers to `into`, in order, up to the first one that
    /// KVM refuses; how many there were.
    ///
    /// # Errors
    /// The call itself fails.
    pub fn read_msrs(
        &self,
        indices: &[u32],
        into: &mut Vec<(u32, u64)>,
    ) -> Result<usize, KvmError> {
        let mut done = 0;
        for chunk in indices.chunks(MSRS_PER_CALL) {
            let entries: Vec<_> = chunk
                .iter()
                .map(|&index| abi::kvm_msr_entry {
                    index,
                    ..Default::default()
                })
                .collect();
            let mut msrs = abi::Msrs::from_entries(&entries).expect("a chunk is small enough");
            let count = self
                .vcpu
                .get_msrs(&mut msrs)
                .map_err(failed("read model-specific registers"))?;
            into.extend(
                msrs.as_slice()[..count]
                    .iter()
                    .map(|entry| (entry.index, entry.data)),
            );
            done += count;
            if count < chunk.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Writes model-specific registers in order, up to the first one that KVM refuses; how many.
    ///
    /// # Errors
    /// The call itself fails.
    pub fn write_msrs(&self, registers: &[(u32, u64)]) -> Result<usize, KvmError> {
        let mut done = 0;
        for chunk in registers.chunks(MSRS_PER_CALL) {
            let entries: Vec<_> = chunk
                .iter()
                .map(|&(index, data)| abi::kvm_msr_entry {
                    index,
                    data,
                    ..Default::default()
                })
                .collect();
            let msrs = abi::Msrs::from_entries(&entries).expect("a chunk is small enough");
            let count = self
                .vcpu
                .set_msrs(&msrs)
                .map_err(failed("write model-specific registers"))?;
            done += count;
            if count < chunk.len() {
                break;
            }
        }
        Ok(done)
    }

    /// Rate of the guest's time stamp counter in kHz.
    ///
    /// # Errors
    /// KVM does not know it.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.vcpu
            .get_tsc_khz()
            .map_err(failed("tell the rate of the time stamp counter"))
    }

    /// Sets that rate.
    ///
    /// # Errors
    /// The host cannot scale.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), KvmError> {
        self.vcpu
            .set_tsc_khz(khz)
            .map_err(failed("set the rate of the time stamp counter"))
    }

    /// What is added to the host's time stamp counter to get the guest's; `None` on kernels that do
    /// not tell (before Linux 5.16).
    ///
    /// # Errors
    /// KVM refuses.
    pub fn tsc_offset(&self) -> Result<Option<u64>, KvmError> {
        let mut offset = 0;
        if !self.has_tsc_offset {
            return Ok(None);
        }
        self.tsc_attribute(request::GET_ATTRIBUTE, &mut offset)?;
        Ok(Some(offset))
    }

    /// Sets that offset; false on kernels that do not let one.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn set_tsc_offset(&self, mut offset: u64) -> Result<bool, KvmError> {
        if self.has_tsc_offset {
            self.tsc_attribute(request::SET_ATTRIBUTE, &mut offset)?;
        }
        Ok(self.has_tsc_offset)
    }

    /// Tells the guest that it was stopped, so that its watchdogs do not bark. Without effect on
    /// guests that do not use KVM's clock.
    pub fn note_pause(&self) {
        // Refused exactly when the guest does not use the clock, so there is nobody to be told.
        let _is_told = self.vcpu.kvmclock_ctrl().is_ok();
    }

    fn tsc_attribute(&self, request: libc::Ioctl, value: &mut u64) -> Result<(), KvmError> {
        let attribute = abi::kvm_device_attr {
            flags: 0,
            group: abi::KVM_VCPU_TSC_CTRL,
            attr: u64::from(abi::KVM_VCPU_TSC_OFFSET),
            addr: std::ptr::from_mut(value).expose_provenance() as u64,
        };
        // SAFETY: the request reads the structure and, at the address in it, reads or writes one
        // word, which `value` is.
        super::check("access the time stamp counter's offset", unsafe {
            libc::ioctl(self.vcpu.as_raw_fd(), request, &raw const attribute)
        })
    }
}

/// Asks the kernel to let guests use the vector state that is too large to be given to everyone
/// (AMX tiles). Must come before the first vCPU of the process and before the features are listed;
/// where it is refused, the features are not listed and nothing is lost.
pub(super) fn permit_large_vector_state() {
    const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_ulong = 0x1025;
    const TILE_DATA: libc::c_ulong = 18;
    // SAFETY: the call takes numbers only.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, TILE_DATA) };
}
