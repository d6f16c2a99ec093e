//! Puts a stock Linux kernel into empty memory, as a boot loader would.
//!
//! The kernel is a bzImage, or an ELF file, for which see [`super::pvh`]. A bzImage is entered in 64-bit
//! mode (`Documentation/arch/x86/boot.rst` of Linux, *64-bit boot protocol*): flat segments, the first
//! 4 GiB mapped as they are, `rsi` at the zero page, which says what memory there is and where command
//! line, initial file system and ACPI tables lie.
//!
//! ```text
//!    0x500  segment descriptors      0x7000  zero page       0x9000  page tables
//!  0x20000  command line            0xe0000  ACPI tables    1 MiB    kernel
//!                                   0xffff0  reset
//!  the initial file system lies as high as the kernel and the memory below the hole permit
//! ```

use super::{Start, Width, pvh};
use crate::acpi;
use crate::board::pc;
use crate::layout;
use limosa_os::kvm::{kvm_regs, kvm_segment, kvm_sregs};
use limosa_os::memory::GuestView;
use limosa_pages::{ByteCount, Gpa};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::{self, KernelLoader};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress};

/// Longest command line, the zero at its end included: what kernels for x86 take.
pub const CMDLINE_BYTES_MAX: usize = 2048;

const GDT: u64 = 0x500;
/// What the kernel is told lies here.
pub(super) const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const ROOT_TABLE: u64 = 0x9000;
const UPPER_TABLE: u64 = 0xa000;
const FIRST_TABLE: u64 = 0xb000;
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Where the memory ends that a kernel may use as it likes below 640 KiB.
const LOW_END: u64 = 0x9_fc00;
const KERNEL: u64 = 0x10_0000;
/// Where a PC begins. A kernel that was not started by EFI goes back to there, in real mode, when it reboots on
/// reduced hardware, and does not ask the tables by which register that is done.
const FIRMWARE: u64 = 0xf_fff0;
/// What it finds there: `mov al,value; mov dx,port; out dx,al`, and `hlt` for ever.
const RESET_CODE: [u8; 9] = {
    let [low, high] = pc::port::RESET.to_le_bytes();
    [
        0xb0,
        pc::RESET_VALUE,
        0xba,
        low,
        high,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
};
const GIBIBYTE: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// The first instruction in 64-bit mode, from where the kernel was loaded.
const ENTRY_64: u64 = 0x200;

pub(super) const CODE_SELECTOR: u16 = 0x10;
pub(super) const DATA_SELECTOR: u16 = 0x18;
pub(super) const TSS_SELECTOR: u16 = 0x20;

/// Present and writable.
const TABLE_ENTRY: u64 = 0b11;
/// The same, and large.
const PAGE_ENTRY: u64 = TABLE_ENTRY | 1 << 7;

pub(super) const CR0_PROTECTED: u64 = 1;
pub(super) const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_LARGE_ADDRESSES: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// A boot loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `xloadflags`: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// The boot protocol that has it.
const VERSION_64: u16 = 0x20c;

/// Model-specific registers with other values than at reset: string instructions are fast, and memory
/// without a range register is cached and written back.
pub(crate) const MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, 1 << 11 | 6)];

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum LinuxError {
    /// It is no bzImage that can be entered in 64-bit mode.
    #[error(
        "the kernel {0}: give a bzImage, such as /boot/vmlinuz of a distribution for x86-64, or a vmlinux"
    )]
    Kernel(String),
    /// It does not fit.
    #[error("the kernel needs memory up to {needed}, the guest has {memory}: give it more memory")]
    KernelMemory {
        /// Where the kernel ends when it has unpacked itself.
        needed: ByteCount,
        /// The guest's.
        memory: ByteCount,
    },
    /// The initial file system does not fit behind the kernel.
    #[error("the initrd of {bytes} does not fit beside the kernel: give the guest more memory")]
    InitrdMemory {
        /// Its size.
        bytes: ByteCount,
    },
    /// The initial file system is empty, or cannot be read.
    #[error("the initrd cannot be read: {0}")]
    Initrd(String),
    /// The command line is too long, or not plain text.
    #[error(
        "the kernel's command line has {bytes} bytes: it takes at most {} without zero bytes and line feeds",
        CMDLINE_BYTES_MAX - 1
    )]
    Cmdline {
        /// Its length.
        bytes: usize,
    },
    /// Memory could not be written.
    #[error("cannot write the guest's memory: {0}")]
    Write(String),
}

impl From<vm_memory::GuestMemoryError> for LinuxError {
    fn from(error: vm_memory::GuestMemoryError) -> Self {
        Self::Write(error.to_string())
    }
}

/// What is booted.
#[derive(Debug)]
pub struct LinuxImage {
    /// The bzImage, or an ELF file with a PVH entry.
    pub kernel: File,
    /// The initial file system.
    pub initrd: Option<File>,
    /// What the kernel is told.
    pub cmdline: String,
}

/// Checks a command line.
///
/// # Errors
/// It is too long, or has bytes that end it.
fn check_cmdline(cmdline: &str) -> Result<(), LinuxError> {
    let bytes = cmdline.len();
    if bytes >= CMDLINE_BYTES_MAX || cmdline.contains(['\0', '\n']) {
        return Err(LinuxError::Cmdline { bytes });
    }
    Ok(())
}

/// Writes everything that a kernel finds in its memory; how it is entered.
pub(crate) fn fill_memory(
    view: &GuestView,
    memory: ByteCount,
    image: &mut LinuxImage,
    tables: &[u8],
) -> Result<Start, LinuxError> {
    check_cmdline(&image.cmdline)?;
    let start = if pvh::is_elf(&image.kernel)? {
        let entry = pvh::fill_memory(view, memory, image)?;
        Start::Pvh { entry }
    } else {
        let entry = fill_for_bzimage(view, memory, image)?;
        Start::Linux { entry }
    };
    view.write_slice(tables, GuestAddress(acpi::START))?;
    view.write_slice(&RESET_CODE, GuestAddress(FIRMWARE))?;
    Ok(start)
}

/// The same for a bzImage, but for the tables; the address of its first instruction.
fn fill_for_bzimage(
    view: &GuestView,
    memory: ByteCount,
    image: &mut LinuxImage,
) -> Result<u64, LinuxError> {
    let header = load_kernel(view, memory, &mut image.kernel)?;
    let mut zero_page = boot_params {
        hdr: header,
        ..Default::default()
    };
    if let Some(initrd) = &mut image.initrd {
        let within = unpacked_end(&header)..u64::from(header.initrd_addr_max) + 1;
        let (start, bytes) = load_initrd(view, memory, within, initrd)?;
        (zero_page.hdr.ramdisk_image, zero_page.hdr.ramdisk_size) = (start, bytes);
    }
    let bytes = write_cmdline(view, &image.cmdline)?;
    zero_page.hdr.type_of_loader = LOADER_UNDEFINED;
    zero_page.hdr.cmd_line_ptr = u32::try_from(CMDLINE).expect("a low address");
    zero_page.hdr.cmdline_size = bytes;
    zero_page.acpi_rsdp_addr = acpi::START;
    write_map(&mut zero_page, memory);
    view.write_obj(zero_page, GuestAddress(ZERO_PAGE))?;
    write_page_tables(view)?;
    for (selector, descriptor) in [
        (CODE_SELECTOR, 0x00af_9b00_0000_ffff_u64),
        (DATA_SELECTOR, 0x00cf_9300_0000_ffff),
        (TSS_SELECTOR, 0x008f_8b00_0000_ffff),
    ] {
        view.write_obj(descriptor, GuestAddress(GDT + u64::from(selector)))?;
    }
    Ok(KERNEL + ENTRY_64)
}

/// Writes the command line to [`CMDLINE`]; its size with the zero at its end.
pub(super) fn write_cmdline(view: &GuestView, cmdline: &str) -> Result<u32, LinuxError> {
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    view.write_slice(&bytes, GuestAddress(CMDLINE))?;
    Ok(u32::try_from(bytes.len()).expect("checked before"))
}

/// Where the memory below the hole ends.
pub(super) fn low_memory(memory: ByteCount) -> u64 {
    memory.get().min(layout::HOLE_START)
}

fn load_kernel(
    view: &GuestView,
    memory: ByteCount,
    kernel: &mut File,
) -> Result<setup_header, LinuxError> {
    let unreadable = |error: io::Error| LinuxError::Kernel(format!("cannot be read ({error})"));
    let bytes = kernel.seek(SeekFrom::End(0)).map_err(unreadable)?;
    let too_small = |needed: u64| LinuxError::KernelMemory {
        needed: ByteCount::new(needed),
        memory,
    };
    if KERNEL.saturating_add(bytes) > low_memory(memory) {
        return Err(too_small(KERNEL.saturating_add(bytes)));
    }
    let loaded = BzImage::load(view, Some(GuestAddress(KERNEL)), kernel, None);
    let header = match loaded {
        Ok(loaded) => loaded.setup_header.expect("a bzImage has a header"),
        Err(loader::Error::Bzimage(loader::bzimage::Error::InvalidBzImage)) => {
            return Err(LinuxError::Kernel("is no bzImage".to_owned()));
        }
        Err(error) => {
            return Err(LinuxError::Kernel(format!(
                "is cut off or damaged ({error})"
            )));
        }
    };
    if header.version < VERSION_64 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LinuxError::Kernel("has no 64-bit entry".to_owned()));
    }
    let needed = unpacked_end(&header);
    if needed > low_memory(memory) {
        return Err(too_small(needed));
    }
    Ok(header)
}

/// Where a kernel ends that has unpacked itself: where it prefers to be, and it needs that much there.
fn unpacked_end(header: &setup_header) -> u64 {
    u64::max(header.pref_address, KERNEL).saturating_add(u64::from(header.init_size))
}

/// Start and size of the initial file system, which lies as high as may be within these addresses.
pub(super) fn load_initrd(
    view: &GuestView,
    memory: ByteCount,
    within: Range<u64>,
    initrd: &mut File,
) -> Result<(u32, u32), LinuxError> {
    let unreadable = |error: io::Error| LinuxError::Initrd(error.to_string());
    let bytes = initrd.seek(SeekFrom::End(0)).map_err(unreadable)?;
    initrd.rewind().map_err(unreadable)?;
    if bytes == 0 {
        return Err(LinuxError::Initrd("it is empty".to_owned()));
    }
    let too_large = || LinuxError::InitrdMemory {
        bytes: ByteCount::new(bytes),
    };
    let end = low_memory(memory).min(within.end);
    let start = end.checked_sub(bytes).map(|start| start & !0xfff);
    let start = start
        .filter(|&start| start >= within.start)
        .ok_or_else(too_large)?;
    let count = usize::try_from(bytes).map_err(|_| too_large())?;
    view.read_exact_volatile_from(GuestAddress(start), initrd, count)
        .map_err(|error| LinuxError::Initrd(format!("it is cut off ({error})")))?;
    let both = u32::try_from(start).ok().zip(u32::try_from(bytes).ok());
    both.ok_or_else(too_large)
}

/// What memory there is: start, size, and what may be done with it.
pub(super) fn memory_map(memory: ByteCount) -> Vec<(u64, u64, u32)> {
    let mut entries = vec![
        (0, LOW_END, E820_RAM),
        (LOW_END, KERNEL - LOW_END, E820_RESERVED),
        (KERNEL, low_memory(memory) - KERNEL, E820_RAM),
    ];
    if let Some(above) = memory
        .get()
        .checked_sub(layout::HOLE_START)
        .filter(|&bytes| bytes > 0)
    {
        let start: Gpa = layout::physical_address(layout::HOLE_START);
        entries.push((start.get(), above, E820_RAM));
    }
    entries
}

fn write_map(zero_page: &mut boot_params, memory: ByteCount) {
    let entries = memory_map(memory);
    zero_page.e820_entries = u8::try_from(entries.len()).expect("a few");
    for (place, (addr, size, kind)) in zero_page.e820_table.iter_mut().zip(entries) {
        *place = boot_e820_entry {
            addr,
            size,
            r#type: kind,
        };
    }
}

/// The first 4 GiB where they are.
fn write_page_tables(view: &GuestView) -> Result<(), LinuxError> {
    const GIBIBYTES: u64 = 4;
    view.write_obj(UPPER_TABLE | TABLE_ENTRY, GuestAddress(ROOT_TABLE))?;
    for gibibyte in 0..GIBIBYTES {
        let table = FIRST_TABLE + gibibyte * 4096;
        view.write_obj(
            table | TABLE_ENTRY,
            GuestAddress(UPPER_TABLE + gibibyte * 8),
        )?;
        let pages = (0..512).map(|entry| gibibyte * GIBIBYTE + entry * LARGE_PAGE);
        let entries: Vec<u8> = pages
            .flat_map(|page| (page | PAGE_ENTRY).to_le_bytes())
            .collect();
        view.write_slice(&entries, GuestAddress(table))?;
    }
    Ok(())
}

/// The general registers of the first vCPU at its first instruction.
pub(crate) fn registers(entry: u64) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsp: STACK_TOP,
        rbp: STACK_TOP,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    }
}

/// Makes the special registers of a fresh vCPU those with which a kernel is entered.
pub(crate) fn set_special_registers(registers: &mut kvm_sregs) {
    super::set_flat_segments(registers, (CODE_SELECTOR, DATA_SELECTOR), 0, Width::Bits64);
    registers.tr = kvm_segment {
        limit: 0xf_ffff,
        selector: TSS_SELECTOR,
        type_: super::BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    (registers.gdt.base, registers.gdt.limit) = (GDT, TSS_SELECTOR + 15);
    (registers.idt.base, registers.idt.limit) = (0, 0);
    registers.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE | CR0_PAGING;
    registers.cr3 = ROOT_TABLE;
    registers.cr4 = CR4_LARGE_ADDRESSES;
    registers.efer = EFER_LONG_MODE;
}

/// Makes a fresh local interrupt controller of the first vCPU what firmware leaves behind: the old
/// controllers reach it by its first line, the non-maskable interrupt comes by the second.
pub(crate) fn set_local_lines(controller: &mut [u8]) {
    const LINE_0: usize = 0x350;
    const LINE_1: usize = 0x360;
    const EXTERNAL: u32 = 7 << 8;
    const NON_MASKABLE: u32 = 4 << 8;
    for (at, mode) in [(LINE_0, EXTERNAL), (LINE_1, NON_MASKABLE)] {
        if let Some(place) = controller.get_mut(at..at + 4) {
            place.copy_from_slice(&mode.to_le_bytes());
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::ByteValued;

    const MEMORY: ByteCount = ByteCount::new(64 << 20);

    pub(in crate::boot) fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// A bzImage with no more than what a loader looks at, changed by `change`.
    fn kernel(code: &[u8], change: impl FnOnce(&mut setup_header)) -> File {
        let mut header = setup_header {
            setup_sects: 1,
            header: 0x5372_6448,
            version: 0x20f,
            loadflags: 1,
            xloadflags: XLF_KERNEL_64,
            pref_address: 0x100_0000,
            init_size: 1 << 20,
            initrd_addr_max: 0x7fff_ffff,
            ..Default::default()
        };
        change(&mut header);
        let mut image = vec![0; 1024 + 0x200];
        image[0x1f1..0x1f1 + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        image.extend(code);
        file(&image)
    }

    fn fill(memory: ByteCount, image: &mut LinuxImage) -> Result<(GuestView, Start), LinuxError> {
        let view = layout::empty_view(memory);
        let start = fill_memory(&view, memory, image, &acpi::tables(1, 0))?;
        Ok((view, start))
    }

    #[test]
    fn a_kernel_finds_all_that_it_looks_for() {
        let memory = ByteCount::new((3 << 30) + (6 << 20));
        let mut image = LinuxImage {
            kernel: kernel(b"code", |_| ()),
            initrd: Some(file(&[7; 5000])),
            cmdline: "console=ttyS0 quiet".to_owned(),
        };
        let (view, start) = fill(memory, &mut image).unwrap();
        let Start::Linux { entry } = start else {
            panic!("{start:?}");
        };
        assert_eq!(
            view.read_obj::<[u8; 4]>(GuestAddress(entry)).unwrap(),
            *b"code"
        );
        let reset: [u8; 9] = view.read_obj(GuestAddress(FIRMWARE)).unwrap();
        assert_eq!(reset, [0xb0, 1, 0xba, 0x02, 0x06, 0xee, 0xf4, 0xeb, 0xfd]);
        let zero_page: boot_params = view.read_obj(GuestAddress(ZERO_PAGE)).unwrap();
        let hdr = zero_page.hdr;
        let (start, bytes) = (hdr.ramdisk_image, hdr.ramdisk_size);
        assert_eq!((start, bytes), (0x7fff_e000, 5000));
        assert_eq!(
            view.read_obj::<u8>(GuestAddress(u64::from(start) + 4999))
                .unwrap(),
            7
        );
        let map: Vec<(u64, u64, u32)> = zero_page.e820_table[..usize::from(zero_page.e820_entries)]
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.r#type))
            .collect();
        let expect = [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, (3 << 30) - 0x10_0000, 1),
            (4 << 30, 6 << 20, 1),
        ];
        assert_eq!(map, expect);
        let mut cmdline = [0; 20];
        view.read_slice(&mut cmdline, GuestAddress(u64::from(hdr.cmd_line_ptr)))
            .unwrap();
        assert_eq!(&cmdline, b"console=ttyS0 quiet\0");
        let root = zero_page.acpi_rsdp_addr;
        assert_eq!(
            &view.read_obj::<[u8; 8]>(GuestAddress(root)).unwrap(),
            b"RSD PTR "
        );
        // The first 4 GiB are mapped where they are.
        let entry: u64 = view
            .read_obj(GuestAddress(FIRST_TABLE + 3 * 4096 + 511 * 8))
            .unwrap();
        assert_eq!(entry & !0xfff, (4 << 30) - LARGE_PAGE);
    }

    #[test]
    fn what_cannot_be_booted_is_refused_in_words() {
        let check = |kernel: File, initrd: Option<&[u8]>, cmdline: &str, expect: &str| {
            let mut image = LinuxImage {
                kernel,
                initrd: initrd.map(file),
                cmdline: cmdline.to_owned(),
            };
            let error = fill(MEMORY, &mut image).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(file(b"\x7fELF"), None, "", "give a bzImage");
        check(file(&[0; 4096]), None, "", "is no bzImage");
        check(
            kernel(b"", |header| header.setup_sects = 9),
            None,
            "",
            "is cut off or damaged",
        );
        check(
            kernel(b"", |header| header.xloadflags = 0),
            None,
            "",
            "has no 64-bit entry",
        );
        check(
            kernel(b"", |header| header.version = 0x20b),
            None,
            "",
            "has no 64-bit entry",
        );
        let large = |header: &mut setup_header| header.init_size = 60 << 20;
        check(
            kernel(b"", large),
            None,
            "",
            "needs memory up to 76.0 MiB, the guest has 64.0 MiB",
        );
        let boundless = |header: &mut setup_header| header.pref_address = u64::MAX;
        check(kernel(b"", boundless), None, "", "give it more memory");
        check(
            kernel(b"", |_| ()),
            Some(b""),
            "",
            "the initrd cannot be read: it is empty",
        );
        let initrd = vec![0; 50 << 20];
        check(
            kernel(b"", |_| ()),
            Some(&initrd),
            "",
            "the initrd of 50.0 MiB does not fit",
        );
        let long = "x".repeat(CMDLINE_BYTES_MAX);
        check(
            kernel(b"", |_| ()),
            None,
            &long,
            "has 2048 bytes: it takes at most 2047",
        );
        check(
            kernel(b"", |_| ()),
            None,
            "a\0b",
            "command line has 3 bytes",
        );
    }

    #[test]
    fn foreign_headers_do_not_panic() {
        for field in 0..size_of::<setup_header>() {
            let mut image = LinuxImage {
                kernel: kernel(b"", |header| header.as_mut_slice()[field] = 0xff),
                initrd: Some(file(b"initrd")),
                cmdline: String::new(),
            };
            // Whatever comes of it.
            let _answer = fill(MEMORY, &mut image);
        }
    }
}
