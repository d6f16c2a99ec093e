//! The image that QEMU boots: a guest program, the code that a PVH loader enters, and between them
//! everything that limosa's own monitor would have written to the guest's memory.
//!
//! The same program sees the same addresses, arguments and ports either way. QEMU's memory has the
//! same hole as limosa's, and the page tables hide it in the same way. `limosa_micro_abi::pvh` says
//! what lies where; accessed and dirty bits are set from the start, so that the processor never
//! writes to the tables.

use anyhow::{Context, ensure};
use limosa_micro_abi::memory_map::IMAGE_START;
use limosa_micro_abi::{BootInfo, PAGE_BYTES, pvh};

/// Where memory below the hole ends: QEMU's microvm has up to 3 GiB there.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// Where the rest of it begins.
pub(crate) const HOLE_END: u64 = 4 << 30;

const FILE_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const LOAD: u32 = 1;
const NOTE: u32 = 4;

const TABLE_BYTES: u64 = PAGE_BYTES;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
const GIBIBYTE: u64 = 1 << 30;
/// Present, writable, for user mode, accessed.
const TABLE_ENTRY: u64 = 0b10_0111;
/// The same, dirty, and large.
const PAGE_ENTRY: u64 = TABLE_ENTRY | 1 << 6 | 1 << 7;

/// The segment itself, its I/O bitmap for all ports, and the byte of ones that ends it.
const TSS_BYTES: u64 = TSS_HEAD_BYTES + 8192 + 1;
const TSS_HEAD_BYTES: u64 = 104;
/// Where the segment says at which offset the bitmap begins.
const TSS_BITMAP_FIELD: u64 = 102;

/// The note of a PVH kernel [PVH]: owner, type, and the address to enter.
const NOTE_OWNER: &[u8; 4] = b"Xen\0";
const NOTE_ENTRY: u32 = 18;

/// A part of the image: where it goes, and its bytes; memory behind them is zero.
struct Segment<'a> {
    address: u64,
    bytes: &'a [u8],
    memory_bytes: u64,
}

/// Puts it together for a guest with so much memory and these arguments.
///
/// # Errors
/// The program is not one of ours, or the arguments do not fit.
pub(crate) fn compose(
    program: &[u8],
    memory_bytes: u64,
    tsc_khz: u32,
    arguments: &str,
) -> anyhow::Result<Vec<u8>> {
    ensure!(
        word(program, 24) == Some(IMAGE_START),
        "the guest's entry is not where its image begins"
    );
    ensure!(
        tables_end(memory_bytes) <= pvh::END,
        "a guest of QEMU has room for the page tables of less memory"
    );
    let boot = BootInfo::new(1, u64::from(tsc_khz), memory_bytes, pvh::END, arguments)?;
    let state = machine_state(&boot, memory_bytes);
    let mut segments = loaded(program).context("the guest program is no sound image")?;
    for segment in &segments {
        let end = segment.address.checked_add(segment.memory_bytes);
        ensure!(
            segment.address >= IMAGE_START && end.is_some_and(|end| end <= pvh::START),
            "the guest program is too large to be booted by QEMU"
        );
    }
    segments.extend(loaded(limosa_micro::PVH).context("the boot code is no sound image")?);
    segments.push(Segment {
        address: pvh::GDT,
        bytes: &state,
        memory_bytes: state.len() as u64,
    });
    Ok(elf(&segments))
}

/// Descriptors, task state segment, boot information and page tables, from [`pvh::GDT`] on.
fn machine_state(boot: &BootInfo, memory_bytes: u64) -> Vec<u8> {
    let gibibytes = memory_bytes.div_ceil(GIBIBYTE);
    let mut state = vec![0; (tables_end(memory_bytes) - pvh::GDT) as usize];
    let mut put = |address: u64, bytes: &[u8]| {
        let start = (address - pvh::GDT) as usize;
        state[start..start + bytes.len()].copy_from_slice(bytes);
    };
    let limit = TSS_BYTES - 1;
    // Base and limit of the task state segment are scattered over its descriptor: available, present.
    let task =
        limit & 0xffff | (pvh::TSS & 0xff_ffff) << 16 | 0x89 << 40 | (pvh::TSS >> 24 & 0xff) << 56;
    for (selector, descriptor) in [
        (pvh::KERNEL_CODE, 0x00af_9b00_0000_ffff),
        (pvh::KERNEL_DATA, 0x00cf_9300_0000_ffff),
        (pvh::USER_DATA & !7, 0x00cf_f300_0000_ffff),
        (pvh::USER_CODE & !7, 0x00af_fb00_0000_ffff),
        (pvh::TASK, task),
        (pvh::TASK + 8, pvh::TSS >> 32),
    ] {
        let descriptor: u64 = descriptor;
        put(pvh::GDT + u64::from(selector), &descriptor.to_le_bytes());
    }
    put(pvh::GDT_POINTER, &(pvh::GDT_BYTES - 1).to_le_bytes());
    put(pvh::GDT_POINTER + 2, &pvh::GDT.to_le_bytes());
    let bitmap = (TSS_HEAD_BYTES as u16).to_le_bytes();
    put(pvh::TSS + TSS_BITMAP_FIELD, &bitmap);
    put(pvh::TSS + TSS_BYTES - 1, &[0xff]);
    put(pvh::BOOT_INFO, boot.page_bytes());
    let upper = pvh::ROOT_TABLE + TABLE_BYTES;
    put(pvh::ROOT_TABLE, &(upper | TABLE_ENTRY).to_le_bytes());
    for gibibyte in 0..gibibytes {
        let table = upper + (1 + gibibyte) * TABLE_BYTES;
        put(upper + gibibyte * 8, &(table | TABLE_ENTRY).to_le_bytes());
        for entry in 0..ENTRIES {
            let address = gibibyte * GIBIBYTE + entry * LARGE_PAGE;
            if address < memory_bytes {
                let page = physical_address(address) | PAGE_ENTRY;
                put(table + entry * 8, &page.to_le_bytes());
            }
        }
    }
    state
}

/// Where the page tables for so much memory end.
const fn tables_end(memory_bytes: u64) -> u64 {
    pvh::ROOT_TABLE + (2 + memory_bytes.div_ceil(GIBIBYTE)) * TABLE_BYTES
}

/// Where QEMU has the byte that the guest sees at this address.
pub(crate) const fn physical_address(address: u64) -> u64 {
    if address < HOLE_START {
        address
    } else {
        address + (HOLE_END - HOLE_START)
    }
}

/// The parts of an image that are loaded; `None` if it is cut off.
fn loaded(elf: &[u8]) -> Option<Vec<Segment<'_>>> {
    let headers = usize::try_from(word(elf, 32)?).ok()?;
    let count = elf.get(56..58)?;
    let count = usize::from(u16::from_le_bytes([count[0], count[1]]));
    let mut segments = Vec::new();
    for index in 0..count {
        let at = headers.checked_add(index * PROGRAM_HEADER_BYTES)?;
        let header = elf.get(at..at.checked_add(PROGRAM_HEADER_BYTES)?)?;
        if word(header, 0)? as u32 != LOAD || word(header, 40)? == 0 {
            continue;
        }
        let start = usize::try_from(word(header, 8)?).ok()?;
        let len = usize::try_from(word(header, 32)?).ok()?;
        segments.push(Segment {
            address: word(header, 16)?,
            bytes: elf.get(start..start.checked_add(len)?)?,
            memory_bytes: word(header, 40)?,
        });
    }
    Some(segments)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

/// An ELF with these segments and the note that makes it a PVH kernel.
fn elf(segments: &[Segment<'_>]) -> Vec<u8> {
    let mut note = Vec::new();
    for value in [NOTE_OWNER.len() as u32, 8, NOTE_ENTRY] {
        note.extend(value.to_le_bytes());
    }
    note.extend(NOTE_OWNER);
    note.extend(pvh::START.to_le_bytes());
    let count = segments.len() + 1;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(pvh::START.to_le_bytes());
    file.extend((FILE_HEADER_BYTES as u64).to_le_bytes());
    file.resize(52, 0);
    file.extend((FILE_HEADER_BYTES as u16).to_le_bytes());
    file.extend((PROGRAM_HEADER_BYTES as u16).to_le_bytes());
    file.extend((count as u16).to_le_bytes());
    file.resize(FILE_HEADER_BYTES, 0);
    let mut offset = (FILE_HEADER_BYTES + count * PROGRAM_HEADER_BYTES) as u64;
    let loads = segments
        .iter()
        .map(|one| (LOAD, one.address, one.bytes, one.memory_bytes));
    let parts: Vec<_> = loads
        .chain([(NOTE, 0, &note[..], note.len() as u64)])
        .collect();
    for (kind, address, bytes, memory_bytes) in &parts {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let len = bytes.len() as u64;
        for value in [offset, *address, *address, len, *memory_bytes, 4] {
            file.extend(value.to_le_bytes());
        }
        offset += len;
    }
    parts
        .iter()
        .for_each(|(_, _, bytes, _)| file.extend(*bytes));
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use limosa_micro_abi::memory_map;

    /// What the image puts at an address.
    fn at(image: &[u8], address: u64) -> u64 {
        let segments = loaded(image).unwrap();
        let segment = segments
            .iter()
            .find(|one| (one.address..one.address + one.memory_bytes).contains(&address));
        let segment = segment.unwrap();
        word(segment.bytes, (address - segment.address) as usize).unwrap()
    }

    /// Walks the tables as the processor does.
    fn translate(image: &[u8], address: u64) -> Option<u64> {
        let mut table = pvh::ROOT_TABLE;
        for level in [39, 30, 21] {
            let entry = at(image, table + (address >> level) % ENTRIES * 8);
            if entry & 1 == 0 {
                return None;
            }
            assert_eq!(entry & 0x27, 0x27, "for user mode and writable");
            table = entry & !0xfff;
        }
        Some(table | (address % LARGE_PAGE))
    }

    #[test]
    fn the_guest_sees_dense_memory_and_what_it_was_told() {
        const SIZE: u64 = (4 << 30) + LARGE_PAGE;
        let image = compose(limosa_micro::WRITER, SIZE, 1000, "ws=1M").unwrap();
        let check = |address, expect| assert_eq!(translate(&image, address), expect);
        check(0, Some(0));
        check(HOLE_START - 1, Some(HOLE_START - 1));
        check(HOLE_START, Some(HOLE_END));
        check(SIZE - 1, Some(SIZE - 1 + GIBIBYTE));
        check(SIZE, None);
        assert_eq!(at(&image, pvh::BOOT_INFO), BootInfo::MAGIC);
        assert_eq!(at(&image, pvh::BOOT_INFO + 24), SIZE);
        assert_eq!(at(&image, pvh::BOOT_INFO + 32), pvh::END);
        let program = word(limosa_micro::WRITER, 4096).unwrap();
        assert_eq!(at(&image, memory_map::IMAGE_START), program);
        assert_eq!(at(&image, pvh::START) as u16, 0xfcfa, "cli, cld");
        assert_eq!(at(&image, pvh::GDT), 0);
    }

    #[test]
    fn the_note_names_the_entry_and_nothing_overlaps() {
        let image = compose(limosa_micro::IDLE, 64 << 20, 1000, "").unwrap();
        let note = image.windows(20).find(|bytes| {
            bytes.starts_with(&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0])
                && &bytes[12..16] == NOTE_OWNER
        });
        assert!(note.is_some());
        let mut segments = loaded(&image).unwrap();
        segments.sort_by_key(|one| one.address);
        for pair in segments.windows(2) {
            assert!(pair[0].address + pair[0].memory_bytes <= pair[1].address);
        }
    }

    #[test]
    fn what_is_no_program_of_ours_is_refused() {
        let check = |program: &[u8], expect: &str| {
            let said = compose(program, 64 << 20, 1000, "").unwrap_err();
            assert_eq!(said.to_string(), expect);
        };
        check(b"", "the guest's entry is not where its image begins");
        let mut cut = limosa_micro::IDLE.to_vec();
        cut.truncate(200);
        check(&cut, "the guest program is no sound image");
        let mut large = limosa_micro::IDLE.to_vec();
        large[64 + 40 + 3] = 1;
        check(
            &large,
            "the guest program is too large to be booted by QEMU",
        );
        let long = "x".repeat(4000);
        assert!(compose(limosa_micro::IDLE, 64 << 20, 1000, &long).is_err());
        assert!(compose(limosa_micro::IDLE, 1 << 40, 1000, "").is_err());
    }
}
