//! Numbers and sizes of the KVM requests that read and write state as bytes.

use kvm_bindings as abi;

/// A part of a vCPU's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuPart {
    /// Whether it runs, halts, or waits to be started.
    RunState,
    /// General registers.
    Registers,
    /// Segments, control registers, page directory pointers.
    SpecialRegisters,
    /// Floating point and vector registers.
    Vectors,
    /// Which of those are enabled.
    VectorControl,
    /// Debug registers.
    DebugRegisters,
    /// The local interrupt controller, if the machine has interrupt controllers.
    InterruptController,
    /// Exceptions and interrupts under way.
    Events,
}

/// A part of the machine's state beside memory and vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmPart {
    /// The interval timer.
    Timer,
    /// An interrupt controller: 0 and 1 are the two of the PC, 2 is the I/O APIC.
    InterruptController(u8),
}

const KVM: u64 = 0xae;
const READ: u64 = 2;
const WRITE: u64 = 1;

const fn number<T>(direction: u64, number: u64) -> libc::Ioctl {
    (direction << 30 | (size_of::<T>() as u64) << 16 | KVM << 8 | number) as libc::Ioctl
}

pub(crate) const GET_DIRTY_LOG: libc::Ioctl = number::<abi::kvm_dirty_log>(WRITE, 0x42);
pub(crate) const CLEAR_DIRTY_LOG: libc::Ioctl =
    number::<abi::kvm_clear_dirty_log>(READ | WRITE, 0xc0);
/// Without an argument.
pub(crate) const RESET_DIRTY_RINGS: libc::Ioctl = (KVM << 8 | 0xc7) as libc::Ioctl;
pub(super) const SET_ATTRIBUTE: libc::Ioctl = number::<abi::kvm_device_attr>(WRITE, 0xe1);
pub(super) const GET_ATTRIBUTE: libc::Ioctl = number::<abi::kvm_device_attr>(WRITE, 0xe2);
pub(super) const HAS_ATTRIBUTE: libc::Ioctl = number::<abi::kvm_device_attr>(WRITE, 0xe3);

/// Requests and size of a part in its present or in its older form.
pub(super) struct Form {
    pub(super) read: libc::Ioctl,
    pub(super) write: libc::Ioctl,
    pub(super) bytes: usize,
}

const fn form<T>(read: u64, write: u64) -> Form {
    Form {
        read: number::<T>(READ, read),
        write: number::<T>(WRITE, write),
        bytes: size_of::<T>(),
    }
}

impl VcpuPart {
    pub(super) const fn form(self, features: super::Features) -> Form {
        match self {
            Self::RunState => form::<abi::kvm_mp_state>(0x98, 0x99),
            Self::Registers => form::<abi::kvm_regs>(0x81, 0x82),
            Self::SpecialRegisters => form::<abi::kvm_sregs2>(0xcc, 0xcd),
            // The size in the number is that of the old form; the kernel goes by what it told.
            Self::Vectors if features.xsave_bytes > 0 => Form {
                read: number::<abi::kvm_xsave>(READ, 0xcf),
                write: number::<abi::kvm_xsave>(WRITE, 0xa5),
                bytes: features.xsave_bytes,
            },
            Self::Vectors => form::<abi::kvm_xsave>(0xa4, 0xa5),
            Self::VectorControl => form::<abi::kvm_xcrs>(0xa6, 0xa7),
            Self::DebugRegisters => form::<abi::kvm_debugregs>(0xa1, 0xa2),
            Self::InterruptController => form::<abi::kvm_lapic_state>(0x8e, 0x8f),
            Self::Events => form::<abi::kvm_vcpu_events>(0x9f, 0xa0),
        }
    }
}

impl VmPart {
    /// Bytes of the part.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Timer => size_of::<abi::kvm_pit_state2>(),
            Self::InterruptController(_) => size_of::<abi::kvm_irqchip>(),
        }
    }

    pub(super) const fn read_request(self) -> libc::Ioctl {
        match self {
            Self::Timer => number::<abi::kvm_pit_state2>(READ, 0x9f),
            Self::InterruptController(_) => number::<abi::kvm_irqchip>(READ | WRITE, 0x62),
        }
    }

    pub(super) const fn write_request(self) -> libc::Ioctl {
        match self {
            Self::Timer => number::<abi::kvm_pit_state2>(WRITE, 0xa0),
            // The kernel's headers have it so, although it writes.
            Self::InterruptController(_) => number::<abi::kvm_irqchip>(READ, 0x63),
        }
    }

    /// Puts into `place` what the kernel has to know to read the part: which controller.
    pub(super) fn prepare_read(self, place: &mut [u8]) {
        place.fill(0);
        if let Self::InterruptController(index) = self {
            place[0] = index;
        }
    }
}
