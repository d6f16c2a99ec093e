//! Puts a kernel in an ELF file into empty memory: a vmlinux, as builds of kernels leave it, or any other that
//! has a PVH entry (`xen/include/public/arch-x86/hvm/start_info.h`, *x86/HVM direct boot ABI* of Xen).
//!
//! Such a kernel is entered in 32-bit mode without paging, with `ebx` at a structure that says what memory
//! there is and where command line, initial file system and ACPI tables lie. What it is told is the same as
//! a bzImage is told, in another form.

use super::Width;
use super::linux::{
    self, CMDLINE, CODE_SELECTOR, CR0_EXTENSION_TYPE, CR0_PROTECTED, DATA_SELECTOR, LinuxError,
    LinuxImage, TSS_SELECTOR, ZERO_PAGE,
};
use crate::acpi;
use limosa_os::kvm::{kvm_regs, kvm_segment, kvm_sregs};
use limosa_os::memory::GuestView;
use limosa_pages::ByteCount;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

const START_INFO: u64 = ZERO_PAGE;
const MODULES: u64 = ZERO_PAGE + 0x100;
const MAP: u64 = ZERO_PAGE + 0x200;
/// "xEn3", with the highest bit of the E.
const MAGIC: u32 = 0x336e_c578;
/// The version that has a map of the memory.
const VERSION: u32 = 1;
/// Where a kernel may be put at the lowest: above what it is told.
const LOWEST: u64 = 0x10_0000;
/// The initial file system lies below 2 GiB, as old kernels want it.
const INITRD_END: u64 = 1 << 31;

/// Whether a file begins as ELF files do.
pub(super) fn is_elf(kernel: &File) -> Result<bool, LinuxError> {
    let mut magic = [0; 4];
    let read = kernel.read_at(&mut magic, 0);
    let read = read.map_err(|error| LinuxError::Kernel(format!("cannot be read ({error})")))?;
    Ok(read == magic.len() && magic == *b"\x7fELF")
}

/// Writes everything but the tables; the address of the first instruction.
pub(super) fn fill_memory(
    view: &GuestView,
    memory: ByteCount,
    image: &mut LinuxImage,
) -> Result<u64, LinuxError> {
    let lowest = Some(GuestAddress(LOWEST));
    let loaded = Elf::load(view, None, &mut image.kernel, lowest).map_err(|error| {
        use loader::elf::Error;
        LinuxError::Kernel(match error {
            loader::Error::Elf(Error::ReadKernelImage) => {
                format!("is cut off, or does not fit into {memory}")
            }
            error => format!("is an ELF file that cannot be loaded ({error})"),
        })
    })?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(LinuxError::Kernel(
            "is an ELF file without a PVH entry".to_owned(),
        ));
    };
    if loaded.kernel_end > linux::low_memory(memory) {
        return Err(LinuxError::KernelMemory {
            needed: ByteCount::new(loaded.kernel_end),
            memory,
        });
    }
    linux::write_cmdline(view, &image.cmdline)?;
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE,
        rsdp_paddr: acpi::START,
        memmap_paddr: MAP,
        ..Default::default()
    };
    if let Some(initrd) = &mut image.initrd {
        let (start, bytes) =
            linux::load_initrd(view, memory, loaded.kernel_end..INITRD_END, initrd)?;
        let module = hvm_modlist_entry {
            paddr: start.into(),
            size: bytes.into(),
            ..Default::default()
        };
        view.write_obj(module, GuestAddress(MODULES))?;
        (info.nr_modules, info.modlist_paddr) = (1, MODULES);
    }
    let mut place = MAP;
    for (addr, size, kind) in linux::memory_map(memory) {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: kind,
            reserved: 0,
        };
        view.write_obj(entry, GuestAddress(place))?;
        place += size_of::<hvm_memmap_table_entry>() as u64;
        info.memmap_entries += 1;
    }
    view.write_obj(info, GuestAddress(START_INFO))?;
    Ok(entry.0)
}

/// The general registers of the first vCPU at its first instruction.
pub(crate) fn registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rbx: START_INFO,
        rflags: 2,
        ..Default::default()
    }
}

/// Makes the special registers of a fresh vCPU those with which a kernel is entered: flat segments of 32
/// bits, no paging.
pub(crate) fn set_special_registers(registers: &mut kvm_sregs) {
    super::set_flat_segments(registers, (CODE_SELECTOR, DATA_SELECTOR), 0, Width::Bits32);
    registers.tr = kvm_segment {
        limit: 0x67,
        selector: TSS_SELECTOR,
        type_: super::BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    registers.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
    registers.cr4 = 0;
    registers.efer = 0;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::{ExitReason, RunState};
    use crate::boot::Start;
    use crate::boot::linux::tests::file;
    use crate::config::{Platform, VmConfig};
    use crate::layout;
    use crate::machine::Machine;
    use std::thread;
    use std::time::{Duration, Instant};

    const MEMORY: ByteCount = ByteCount::new(16 << 20);

    fn fill(kernel: &[u8], initrd: Option<&[u8]>) -> Result<(GuestView, Start), String> {
        let view = layout::empty_view(MEMORY);
        let mut image = LinuxImage {
            kernel: file(kernel),
            initrd: initrd.map(file),
            cmdline: "quiet".to_owned(),
        };
        let start = linux::fill_memory(&view, MEMORY, &mut image, b"tables");
        start
            .map(|start| (view, start))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_kernel_finds_all_that_it_looks_for() {
        let kernel = elf(0x20_0000, b"code", Some(0x20_0000));
        let (view, start) = fill(&kernel, Some(b"files")).unwrap();
        assert_eq!(start, Start::Pvh { entry: 0x20_0000 });
        let read = |address, count| {
            let mut bytes = vec![0; count];
            view.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        assert_eq!(read(0x20_0000, 4), b"code");
        assert_eq!(read(acpi::START, 6), b"tables");
        let info: hvm_start_info = view.read_obj(GuestAddress(START_INFO)).unwrap();
        assert_eq!((info.magic, info.version), (0x336e_c578, 1));
        assert_eq!(read(info.cmdline_paddr, 6), b"quiet\0");
        assert_eq!(info.rsdp_paddr, acpi::START);
        let module: hvm_modlist_entry = view.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!(read(module.paddr, 5), b"files");
        assert_eq!((info.nr_modules, module.size), (1, 5));
        assert_eq!(info.memmap_entries, 3);
        let last: hvm_memmap_table_entry =
            view.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
        assert_eq!((last.addr, last.size, last.type_), (1 << 20, 15 << 20, 1));
    }

    #[test]
    fn what_cannot_be_booted_is_refused_in_words() {
        let check = |kernel: &[u8], expect: &str| {
            let error = fill(kernel, None).unwrap_err();
            assert!(
                error.starts_with(&format!("the kernel {expect}")),
                "{error}"
            );
        };
        let whole = elf(0x20_0000, b"code", Some(0x20_0000));
        check(
            &elf(0x20_0000, b"code", None),
            "is an ELF file without a PVH entry",
        );
        check(
            &elf(64 << 20, b"code", Some(64 << 20)),
            "is cut off, or does not fit into 16.0 MiB",
        );
        check(&whole[..60], "is an ELF file that cannot be loaded");
        check(b"\x7fEL", "is no bzImage");
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            for kernel in [&changed[..], &whole[..at]] {
                let _is_taken = fill(kernel, None).is_ok();
            }
        }
    }

    /// Switches the machine off if `ebx` points at what it should, else resets it.
    const CODE: [u8; 19] = [
        0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, // cmp dword [ebx],336ec578h
        0x75, 0x07, // jne reset
        0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, // mov dx,600h; mov al,34h; out dx,al
        0xb0, 0xfe, 0xe6, 0x64, // reset: mov al,0feh; out 64h,al
    ];

    #[test]
    fn a_kernel_is_entered_in_32_bit_mode() {
        if let Err(error) = limosa_os::kvm::Kvm::open() {
            eprintln!("skipped: {error}");
            return;
        }
        let config = VmConfig {
            platform: Platform::Pc,
            irqchip: true,
            ..VmConfig::new("pvh", MEMORY, 2)
        };
        let mut machine = Machine::create(config, "here").unwrap();
        let mut image = LinuxImage {
            kernel: file(&elf(0x20_0000, &CODE, Some(0x20_0000))),
            initrd: None,
            cmdline: String::new(),
        };
        machine.boot_linux(&mut image).unwrap();
        machine.run().unwrap();
        let end = Instant::now() + Duration::from_secs(10);
        while machine.run_state() == RunState::Running && Instant::now() < end {
            thread::sleep(Duration::from_millis(1));
        }
        let off = RunState::Exited(ExitReason::PoweredOff);
        assert_eq!(machine.run_state(), off);
    }

    /// A kernel with one segment, and a note with its entry.
    fn elf(address: u64, code: &[u8], entry: Option<u32>) -> Vec<u8> {
        const HEADERS: u64 = 64;
        const NOTE: u64 = HEADERS + 2 * 56;
        const CODE: u64 = NOTE + 20;
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [address, HEADERS, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]);
        let mut header = |kind: u32, flags: u32, words: [u64; 6]| {
            bytes.extend(kind.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            words
                .iter()
                .for_each(|word| bytes.extend(word.to_le_bytes()));
        };
        let len = code.len() as u64;
        header(1, 5, [CODE, address, address, len, len, 1]);
        header(4, 4, [NOTE, 0, 0, 20, 20, 4]);
        // Name "Xen", its entry for 32 bits.
        let kind: u32 = if entry.is_some() { 18 } else { 1 };
        for word in [4, 4, kind] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(b"Xen\0");
        bytes.extend(entry.unwrap_or(0).to_le_bytes());
        bytes.extend(code);
        bytes
    }
}
