//! Puts a guest into empty memory and says with which registers it starts: a micro guest
//! ([`micro`]), or a stock Linux kernel ([`linux`], [`pvh`]).

pub(crate) mod elf;
pub(crate) mod linux;
pub(crate) mod micro;
pub(crate) mod pvh;

use elf::ElfError;
use limosa_micro_abi::ArgsError;
use limosa_os::kvm::{kvm_segment, kvm_sregs};
use std::io;

/// Why a guest cannot be put into memory.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is not one of a micro guest.
    #[error(transparent)]
    Elf(#[from] ElfError),
    /// The arguments do not fit.
    #[error(transparent)]
    Args(#[from] ArgsError),
    /// The kernel, its initial file system or its command line cannot be used.
    #[error(transparent)]
    Linux(#[from] linux::LinuxError),
    /// Writing the memory failed.
    #[error("cannot write the guest's memory")]
    Memory(#[from] io::Error),
}

/// How the vCPUs start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// All at the first instruction of a micro guest.
    Micro {
        /// Its address.
        entry: u64,
    },
    /// The first one at the 64-bit entry of a kernel, which starts the others.
    Linux {
        /// Its address.
        entry: u64,
    },
    /// The same at a PVH entry, in 32-bit mode.
    Pvh {
        /// Its address.
        entry: u64,
    },
}

/// A task state segment that is in use.
const BUSY_TSS: u8 = 11;

/// For how wide addresses code is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

/// Flat segments over all addresses, for such code at that privilege level.
fn set_flat_segments(
    registers: &mut kvm_sregs,
    (code, data): (u16, u16),
    privilege: u8,
    width: Width,
) {
    const CODE: u8 = 11;
    const DATA: u8 = 3;
    let flat = |selector, kind, long| kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        dpl: privilege,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    };
    let data = flat(data, DATA, 0);
    registers.cs = flat(code, CODE, u8::from(width == Width::Bits64));
    (
        registers.ss,
        registers.ds,
        registers.es,
        registers.fs,
        registers.gs,
    ) = (data, data, data, data, data);
}
