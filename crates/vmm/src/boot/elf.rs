//! A strict reader of ELF images for micro guests.
//!
//! Only what the start protocol allows: 64-bit little-endian x86-64 executables at fixed addresses,
//! without a dynamic linker, whose segments lie where guests lie, within the memory, and do not
//! overlap. Everything else is refused with what is wrong, before memory is written.

use limosa_micro_abi::memory_map::IMAGE_START;
use limosa_pages::ByteCount;
use std::ops::Range;

/// Most program headers that are looked at; a linker makes about ten.
const HEADERS_MAX: usize = 64;
const FILE_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;

/// Why an image cannot be started.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// No ELF at all.
    #[error("this is no ELF file")]
    NotElf,
    /// The file ends within something that it says it has.
    #[error("the ELF file is cut off: its {what} are missing")]
    CutOff {
        /// What is missing.
        what: &'static str,
    },
    /// Right format, wrong kind.
    #[error("the ELF file is {found}, a micro guest is {wanted}")]
    Kind {
        /// What it is.
        found: String,
        /// What it has to be.
        wanted: &'static str,
    },
    /// Too many or too few program headers, or of another size.
    #[error("the ELF file has {count} program headers of {bytes} bytes, it takes 1 to 64 of 56")]
    Headers {
        /// How many.
        count: u16,
        /// Their size.
        bytes: u16,
    },
    /// A segment that says two things.
    #[error("the segment at {address:#x} has {file_bytes} bytes in the file and {bytes} in memory")]
    SegmentSize {
        /// Where it goes.
        address: u64,
        /// Bytes in the file.
        file_bytes: u64,
        /// Bytes in memory.
        bytes: u64,
    },
    /// A segment where no image may be.
    #[error(
        "the segment at {address:#x} lies outside of what an image may use, {IMAGE_START:#x} upwards"
    )]
    Outside {
        /// Where it goes.
        address: u64,
    },
    /// Two segments at one place.
    #[error("the segments at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// The lower one.
        first: u64,
        /// The higher one.
        second: u64,
    },
    /// Nothing to load.
    #[error("the ELF file has nothing to load")]
    Nothing,
    /// The entry is not in code.
    #[error("the entry at {entry:#x} is in no executable segment")]
    Entry {
        /// Where it is.
        entry: u64,
    },
    /// The guest has too little memory for it.
    #[error("the image ends at {end:#x}, beyond the guest's memory: give it at least {needed}")]
    TooLittleMemory {
        /// Where the image ends.
        end: u64,
        /// How much memory would do.
        needed: ByteCount,
    },
}

/// An image that can be loaded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Address of the first instruction.
    pub(crate) entry: u64,
    /// Where the last segment ends (exclusive).
    pub(crate) end: u64,
    /// What to load, ascending.
    pub(crate) segments: Vec<Segment>,
}

/// A part of an image. Bytes of memory behind those in the file are zero.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where it goes.
    pub(crate) address: u64,
    /// Which bytes of the file.
    pub(crate) file: Range<usize>,
    end: u64,
    is_executable: bool,
}

impl Image {
    /// Reads an image for a guest with `memory`.
    pub(crate) fn parse(elf: &[u8], memory: ByteCount) -> Result<Self, ElfError> {
        let entry = check_file_header(elf)?;
        let mut segments = read_segments(elf)?;
        segments.sort_by_key(|segment| segment.address);
        if let Some(pair) = segments
            .windows(2)
            .find(|pair| pair[0].end > pair[1].address)
        {
            return Err(ElfError::Overlap {
                first: pair[0].address,
                second: pair[1].address,
            });
        }
        let end = segments.last().ok_or(ElfError::Nothing)?.end;
        if end > memory.get() {
            let needed = crate::config::VmConfig::memory_for(end);
            return Err(ElfError::TooLittleMemory { end, needed });
        }
        let is_code = |segment: &Segment| {
            segment.is_executable && (segment.address..segment.end).contains(&entry)
        };
        if !segments.iter().any(is_code) {
            return Err(ElfError::Entry { entry });
        }
        Ok(Self {
            entry,
            end,
            segments,
        })
    }
}

/// Checks the first header; the entry.
fn check_file_header(elf: &[u8]) -> Result<u64, ElfError> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const X86_64: u16 = 62;
    let kind = |found: String, wanted| Err(ElfError::Kind { found, wanted });
    if !elf.starts_with(b"\x7fELF") {
        return Err(ElfError::NotElf);
    }
    if elf.len() < FILE_HEADER_BYTES {
        return Err(ElfError::CutOff {
            what: "first headers",
        });
    }
    if elf[4] != CLASS_64 {
        return kind("not a 64-bit one".to_owned(), "a 64-bit one");
    }
    if elf[5] != LITTLE_ENDIAN {
        return kind("not little-endian".to_owned(), "little-endian");
    }
    let machine = half(elf, 18);
    if machine != X86_64 {
        return kind(format!("for machine {machine}"), "for x86-64 (62)");
    }
    match half(elf, 16) {
        2 => Ok(word(elf, 24)),
        1 => kind(
            "a relocatable object".to_owned(),
            "a static executable at a fixed address",
        ),
        3 => kind(
            "position independent".to_owned(),
            "a static executable at a fixed address",
        ),
        other => kind(
            format!("of type {other}"),
            "a static executable at a fixed address",
        ),
    }
}

fn read_segments(elf: &[u8]) -> Result<Vec<Segment>, ElfError> {
    const LOAD: u32 = 1;
    const DYNAMIC: u32 = 2;
    const INTERPRETER: u32 = 3;
    let (bytes, count) = (half(elf, 54), half(elf, 56));
    if usize::from(bytes) != PROGRAM_HEADER_BYTES
        || !(1..=HEADERS_MAX).contains(&usize::from(count))
    {
        return Err(ElfError::Headers { count, bytes });
    }
    let headers = usize::try_from(word(elf, 32))
        .ok()
        .and_then(|start| {
            elf.get(start..start.checked_add(usize::from(count) * PROGRAM_HEADER_BYTES)?)
        })
        .ok_or(ElfError::CutOff {
            what: "program headers",
        })?;
    let mut segments = Vec::new();
    for header in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        match u32::from(half(header, 0)) | u32::from(half(header, 2)) << 16 {
            LOAD => segments.extend(read_segment(elf, header)?),
            DYNAMIC | INTERPRETER => {
                let found = "dynamically linked".to_owned();
                return Err(ElfError::Kind {
                    found,
                    wanted: "a static executable at a fixed address",
                });
            }
            _ => {}
        }
    }
    Ok(segments)
}

/// Reads one segment to load; `None` if it is empty.
fn read_segment(elf: &[u8], header: &[u8]) -> Result<Option<Segment>, ElfError> {
    const EXECUTABLE: u16 = 1;
    let (offset, address) = (word(header, 8), word(header, 16));
    let (file_bytes, bytes) = (word(header, 32), word(header, 40));
    if bytes == 0 && file_bytes == 0 {
        return Ok(None);
    }
    if file_bytes > bytes {
        return Err(ElfError::SegmentSize {
            address,
            file_bytes,
            bytes,
        });
    }
    let end = address
        .checked_add(bytes)
        .filter(|_| address >= IMAGE_START);
    let end = end.ok_or(ElfError::Outside { address })?;
    let file = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(file_bytes).ok())
        .and_then(|(start, len)| Some(start..start.checked_add(len)?))
        .filter(|file| file.end <= elf.len())
        .ok_or(ElfError::CutOff { what: "segments" })?;
    let is_executable = half(header, 4) & EXECUTABLE != 0;
    Ok(Some(Segment {
        address,
        file,
        end,
        is_executable,
    }))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(
        bytes[at..at + 8]
            .try_into()
            .expect("eight bytes are eight bytes"),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An image with these segments (address, bytes in the file, bytes in memory), all executable.
    pub(crate) fn image(entry: u64, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        elf.extend(entry.to_le_bytes());
        elf.extend(64u64.to_le_bytes());
        elf.resize(54, 0);
        elf.extend([56, 0, segments.len() as u8, 0]);
        elf.resize(64, 0);
        let mut offset = 64 + 56 * segments.len();
        for (address, content, bytes) in segments {
            elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
            for value in [
                offset as u64,
                *address,
                *address,
                content.len() as u64,
                *bytes,
                0x1000,
            ] {
                elf.extend(value.to_le_bytes());
            }
            offset += content.len();
        }
        segments
            .iter()
            .for_each(|(_, content, _)| elf.extend(*content));
        elf
    }

    fn sound() -> Vec<u8> {
        image(
            0x20_0000,
            &[(0x20_0000, b"code", 4), (0x20_1000, b"data", 0x2000)],
        )
    }

    fn check(change: impl FnOnce(&mut Vec<u8>), expect: &str) {
        let mut elf = sound();
        change(&mut elf);
        let result = Image::parse(&elf, ByteCount::new(4 << 20));
        assert_eq!(
            result.map_or_else(|error| error.to_string(), |_| "ok".to_owned()),
            expect
        );
    }

    #[test]
    fn a_sound_image_is_read() {
        let elf = sound();
        let image = Image::parse(&elf, ByteCount::new(4 << 20)).unwrap();
        assert_eq!((image.entry, image.end), (0x20_0000, 0x20_3000));
        assert_eq!(&elf[image.segments[1].file.clone()], b"data");
    }

    #[test]
    fn files_of_another_kind_are_refused_by_name() {
        let fixed = "a micro guest is a static executable at a fixed address";
        check(|_| {}, "ok");
        check(|elf| elf.clear(), "this is no ELF file");
        check(|elf| elf[0] = b'#', "this is no ELF file");
        check(
            |elf| elf.truncate(40),
            "the ELF file is cut off: its first headers are missing",
        );
        check(
            |elf| elf[4] = 1,
            "the ELF file is not a 64-bit one, a micro guest is a 64-bit one",
        );
        check(
            |elf| elf[5] = 2,
            "the ELF file is not little-endian, a micro guest is little-endian",
        );
        check(
            |elf| elf[18] = 183,
            "the ELF file is for machine 183, a micro guest is for x86-64 (62)",
        );
        check(
            |elf| elf[16] = 3,
            &format!("the ELF file is position independent, {fixed}"),
        );
        check(
            |elf| elf[16] = 4,
            &format!("the ELF file is of type 4, {fixed}"),
        );
        check(
            |elf| elf[64] = 3,
            &format!("the ELF file is dynamically linked, {fixed}"),
        );
    }

    #[test]
    fn bad_headers_and_segments_are_refused_by_name() {
        check(
            |elf| elf[56] = 0,
            "the ELF file has 0 program headers of 56 bytes, it takes 1 to 64 of 56",
        );
        check(
            |elf| elf[57] = 1,
            "the ELF file has 258 program headers of 56 bytes, it takes 1 to 64 of 56",
        );
        check(
            |elf| elf[39] = 255,
            "the ELF file is cut off: its program headers are missing",
        );
        check(
            |elf| elf.truncate(180),
            "the ELF file is cut off: its segments are missing",
        );
        check(
            |elf| elf[64 + 40] = 1,
            "the segment at 0x200000 has 4 bytes in the file and 1 in memory",
        );
        check(
            |elf| elf[64 + 18] = 0x10,
            "the segment at 0x100000 lies outside of what an image may use, 0x200000 upwards",
        );
        check(
            |elf| elf[64 + 40..64 + 48].fill(0xff),
            "the segment at 0x200000 lies outside of what an image may use, 0x200000 upwards",
        );
        check(
            |elf| elf[64 + 41] = 0x20,
            "the segments at 0x200000 and 0x201000 overlap",
        );
        check(
            |elf| elf[24] = 4,
            "the entry at 0x200004 is in no executable segment",
        );
        check(
            |elf| elf[64 + 56 + 43] = 1,
            "the image ends at 0x1203000, beyond the guest's memory: give it at least 20.0 MiB",
        );
        check(
            |elf| {
                elf[64] = 4;
                elf[64 + 56] = 4;
            },
            "the ELF file has nothing to load",
        );
    }

    #[test]
    fn foreign_bytes_do_not_panic() {
        let elf = sound();
        let mut seed = 7u64;
        for _ in 0..50_000 {
            let mut mutant = elf.clone();
            for _ in 0..4 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % mutant.len();
                mutant[at] = (seed >> 24) as u8;
            }
            if let Ok(image) = Image::parse(&mutant, ByteCount::new(4 << 20)) {
                assert!(image.end <= 4 << 20);
                assert!(
                    image
                        .segments
                        .iter()
                        .all(|segment| segment.file.end <= mutant.len())
                );
            }
        }
    }
}
