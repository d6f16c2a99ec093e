//! Puts a micro guest into empty memory and says with which registers it starts.
//!
//! The guest runs at privilege level 3 in 64-bit mode from its first instruction: everything that
//! would need a kernel is made here. Page tables with 2 MiB pages map the memory file densely from
//! address zero, so that the hole in the physical addresses is not seen; a task state segment with
//! an all-zero bitmap (and I/O privilege level 3) permits ports; there are no interrupts. Registers of
//! devices, if there are any, are mapped behind all memory. The areas are those of the start protocol.
//!
//! Accessed and dirty bits of the tables are set from the start, so that the processor never writes
//! them and the tables never count as dirty.

use super::BootError;
use super::Width;
use super::elf::Image;
use crate::config::devices::DEVICES_MAX;
use crate::layout;
use crate::virtio;
use limosa_micro_abi::{BootInfo, memory_map};
use limosa_os::SharedMemory;
use limosa_os::kvm::{kvm_regs, kvm_segment, kvm_sregs};
use std::io;
use zerocopy::IntoBytes;

const TSS: u64 = memory_map::MONITOR_START;
/// The segment itself, its I/O bitmap for all ports, and the byte of ones that ends it.
const TSS_BYTES: u64 = TSS_HEAD_BYTES + 8192 + 1;
const TSS_HEAD_BYTES: u64 = 104;
/// Where the segment says at which offset the bitmap begins.
const TSS_BITMAP_FIELD: u64 = 102;
const GDT: u64 = TSS + 0x3000;
const GDT_BYTES: u16 = 0x50;
const TABLE_BYTES: u64 = 4096;
const ENTRIES: u64 = 512;
const ROOT_TABLE: u64 = GDT + TABLE_BYTES;
const UPPER_TABLE: u64 = ROOT_TABLE + TABLE_BYTES;
const FIRST_TABLE: u64 = UPPER_TABLE + TABLE_BYTES;
/// Behind those of the largest memory: the one for devices.
const DEVICE_TABLE: u64 = FIRST_TABLE + crate::config::MEMORY_MAX.get() / GIBIBYTE * TABLE_BYTES;
const LARGE_PAGE: u64 = 2 << 20;
const GIBIBYTE: u64 = 1 << 30;

/// Present, writable, for user mode, accessed.
const TABLE_ENTRY: u64 = 0b10_0111;
/// The same, dirty, and large.
const PAGE_ENTRY: u64 = TABLE_ENTRY | 1 << 6 | 1 << 7;

/// The same for registers: each access goes there.
const DEVICE_ENTRY: u64 = PAGE_ENTRY | 1 << 3 | 1 << 4;

const CODE_SELECTOR: u16 = 0x33;
const DATA_SELECTOR: u16 = 0x2b;
const TSS_SELECTOR: u16 = 0x40;

/// Protected mode, monitored coprocessor, extension type, numeric errors, write protection,
/// alignment mask, paging.
const CR0: u64 = 0x8005_0033;
/// Large addresses, and vector instructions with their exceptions.
const CR4: u64 = 0x620;
/// System calls, long mode enabled and active.
const EFER: u64 = 0x501;
/// The bit that is always one, and I/O privilege level 3.
const RFLAGS: u64 = 0x3002;

/// What a guest is told about its machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) vcpus: u8,
    pub(crate) devices: u16,
    pub(crate) tsc_khz: u32,
}

/// Writes everything that a micro guest finds in its memory; the address of its first instruction.
pub(crate) fn fill_memory(
    memory: &SharedMemory,
    elf: &[u8],
    machine: Shape,
    args: &str,
) -> Result<u64, BootError> {
    let image = Image::parse(elf, memory.size())?;
    let size = memory.size().get();
    let heap = memory_map::heap_start(image.end).min(size);
    let (vcpus, khz) = (u32::from(machine.vcpus), u64::from(machine.tsc_khz));
    let boot = BootInfo::new(vcpus, khz, size, heap, args)?;
    let boot = boot.with_devices(u32::from(machine.devices));
    for segment in &image.segments {
        memory.write_at(segment.address, &elf[segment.file.clone()])?;
    }
    memory.write_at(memory_map::BOOT_INFO, boot.as_bytes())?;
    write_segments(memory)?;
    write_page_tables(memory)?;
    if machine.devices > 0 {
        map_devices(memory)?;
    }
    Ok(image.entry)
}

fn map_devices(memory: &SharedMemory) -> io::Result<()> {
    let upper = UPPER_TABLE + memory_map::DEVICES / GIBIBYTE * 8;
    memory.write_at(upper, &(DEVICE_TABLE | TABLE_ENTRY).to_le_bytes())?;
    memory.write_at(
        DEVICE_TABLE,
        &(virtio::FIRST_ADDRESS | DEVICE_ENTRY).to_le_bytes(),
    )
}

fn write_segments(memory: &SharedMemory) -> io::Result<()> {
    const CODE: u64 = 0x00af_fb00_0000_ffff;
    const DATA: u64 = 0x00cf_f300_0000_ffff;
    let bitmap = u16::try_from(TSS_HEAD_BYTES).expect("a small number");
    memory.write_at(TSS + TSS_BITMAP_FIELD, &bitmap.to_le_bytes())?;
    memory.write_at(TSS + TSS_BYTES - 1, &[0xff])?;
    // Base and limit of the task state segment are scattered over its descriptor: busy, present.
    let limit = TSS_BYTES - 1;
    let low = limit & 0xffff | (TSS & 0xff_ffff) << 16 | 0x8b << 40 | (TSS >> 24 & 0xff) << 56;
    for (selector, descriptor) in [
        (DATA_SELECTOR & !7, DATA),
        (CODE_SELECTOR & !7, CODE),
        (TSS_SELECTOR, low),
        (TSS_SELECTOR + 8, TSS >> 32),
    ] {
        memory.write_at(GDT + u64::from(selector), &descriptor.to_le_bytes())?;
    }
    Ok(())
}

fn write_page_tables(memory: &SharedMemory) -> io::Result<()> {
    let size = memory.size().get();
    memory.write_at(ROOT_TABLE, &(UPPER_TABLE | TABLE_ENTRY).to_le_bytes())?;
    for gibibyte in 0..size.div_ceil(GIBIBYTE) {
        let table = FIRST_TABLE + gibibyte * TABLE_BYTES;
        assert!(
            table + TABLE_BYTES <= memory_map::MONITOR_END,
            "limited memory has few tables"
        );
        memory.write_at(
            UPPER_TABLE + gibibyte * 8,
            &(table | TABLE_ENTRY).to_le_bytes(),
        )?;
        let entries: Vec<u8> = (0..ENTRIES)
            .map(|entry| gibibyte * GIBIBYTE + entry * LARGE_PAGE)
            .take_while(|&address| address < size)
            .flat_map(|address| {
                (layout::physical_address(address).get() | PAGE_ENTRY).to_le_bytes()
            })
            .collect();
        memory.write_at(table, &entries)?;
    }
    Ok(())
}

/// The general registers of a vCPU at its first instruction.
pub(crate) fn registers(entry: u64, vcpu: u8) -> kvm_regs {
    kvm_regs {
        rip: entry,
        rsp: memory_map::stack_top(u32::from(vcpu)),
        rdi: memory_map::BOOT_INFO,
        rsi: u64::from(vcpu),
        rflags: RFLAGS,
        ..Default::default()
    }
}

/// Makes the special registers of a fresh vCPU those of a micro guest.
pub(crate) fn set_special_registers(registers: &mut kvm_sregs) {
    super::set_flat_segments(registers, (CODE_SELECTOR, DATA_SELECTOR), 3, Width::Bits64);
    registers.tr = kvm_segment {
        base: TSS,
        limit: u32::try_from(TSS_BYTES - 1).expect("a small number"),
        selector: TSS_SELECTOR,
        type_: super::BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    (registers.gdt.base, registers.gdt.limit) = (GDT, GDT_BYTES - 1);
    (registers.idt.base, registers.idt.limit) = (0, 0);
    (registers.cr0, registers.cr3, registers.cr4, registers.efer) = (CR0, ROOT_TABLE, CR4, EFER);
}

const _: () = assert!(TSS + TSS_BYTES <= GDT);
const _: () = assert!(DEVICE_TABLE + TABLE_BYTES <= memory_map::MONITOR_END);
// One entry of the upper table, and one large page, map all of them.
const _: () = assert!(memory_map::DEVICES.is_multiple_of(GIBIBYTE));
const _: () = assert!(memory_map::DEVICES >= crate::config::MEMORY_MAX.get());
const _: () = assert!(memory_map::DEVICES / GIBIBYTE < ENTRIES);
const _: () = assert!(virtio::FIRST_ADDRESS.is_multiple_of(LARGE_PAGE));
const _: () = assert!(memory_map::DEVICE_BYTES == virtio::WINDOW_BYTES as u64);
const _: () = assert!(DEVICES_MAX < memory_map::DEVICES_MAX as usize + 1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::elf::tests::image;
    use limosa_os::PageKind;
    use limosa_pages::ByteCount;

    /// Walks the tables as the processor does.
    fn translate(memory: &SharedMemory, address: u64) -> Option<u64> {
        let mut table = ROOT_TABLE;
        for level in [39, 30, 21] {
            let entry = memory
                .read_word(table + (address >> level) % ENTRIES * 8)
                .unwrap();
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0x27, 0x27, "for user mode and writable");
            table = entry & !0xfff;
        }
        Some(table | (address % LARGE_PAGE))
    }

    #[test]
    fn a_guest_sees_dense_memory() {
        const SIZE: u64 = (4 << 30) + LARGE_PAGE;
        let memory = SharedMemory::create(ByteCount::new(SIZE), PageKind::Small).unwrap();
        let elf = image(0x20_0000, &[(0x20_0000, b"code", 0x20_0001)]);
        let mut machine = Shape {
            vcpus: 2,
            devices: 0,
            tsc_khz: 1000,
        };
        let entry = fill_memory(&memory, &elf, machine, "a=b").unwrap();
        assert_eq!(entry, 0x20_0000);
        let check =
            |address: u64, expect: Option<u64>| assert_eq!(translate(&memory, address), expect);
        check(0, Some(0));
        check((3 << 30) - 1, Some((3 << 30) - 1));
        check(3 << 30, Some(4 << 30));
        check(SIZE - 1, Some(SIZE - 1 + GIBIBYTE));
        check(SIZE, None);
        check(memory_map::DEVICES, None);
        machine.devices = 2;
        fill_memory(&memory, &elf, machine, "a=b").unwrap();
        let second = memory_map::DEVICES + memory_map::DEVICE_BYTES;
        check(second + 4, Some(virtio::Place::of(1).address + 4));
        check(memory_map::DEVICES + LARGE_PAGE, None);
        let mut page = [0; 4096];
        memory.read_at(memory_map::BOOT_INFO, &mut page).unwrap();
        let (boot, _) = <BootInfo as zerocopy::FromBytes>::read_from_prefix(&page).unwrap();
        assert!(boot.is_usable());
        assert_eq!(boot.device_count, 2);
        assert_eq!(
            (boot.heap_start, boot.memory_bytes, boot.arguments()),
            (6 << 20, SIZE, Some("a=b"))
        );
        assert_eq!(
            memory.read_word(0x20_0000).unwrap(),
            u64::from(u32::from_le_bytes(*b"code"))
        );
    }
}
