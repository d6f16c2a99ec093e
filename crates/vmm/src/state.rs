//! The state of a machine as it travels: a list of typed, versioned sections.
//!
//! ```text
//! header    "LIMOSTAT" · version u16 · zero u16 · number of sections u32
//! section   name (32 bytes, zero-padded ASCII) · instance u16 · version u16 · length u32 ·
//!           checksum u64 (XXH3 of the bytes, seeded with that of the 40 bytes before it) · bytes
//! ```
//!
//! All numbers are little-endian. A receiver takes exactly the kinds and versions that it knows
//! ([`Kind`]): a section that it does not know is an error with its name, since a machine with part
//! of its state is a broken machine. A new layout gets a new version.
//!
//! Invariants: nothing is allocated by a length that was not checked against the bytes that are
//! there; parsing never panics on foreign bytes.

use crate::answer::SectionInfo;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

const MAGIC: [u8; 8] = *b"LIMOSTAT";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 16;
const NAME_BYTES: usize = 32;
/// Bytes of a section's header before its checksum.
const CHECKED_BYTES: usize = NAME_BYTES + 8;
const SECTION_HEADER_BYTES: usize = CHECKED_BYTES + 8;

/// Largest section: vector state with everything that processors have today takes 11 KiB.
pub const SECTION_BYTES_MAX: usize = 1 << 20;
/// Most sections: 8 vCPUs have about 100.
pub const SECTIONS_MAX: usize = 1024;
/// Largest state.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// What machine it is, to be compared with the one that is to take the state.
    Machine,
    /// The clock that paravirtualised guests read.
    Clock,
    /// The micro guest's ports: commands and heartbeats.
    Micro,
    /// The serial line of a PC's console.
    Serial,
    /// The real-time clock of a PC.
    RealTimeClock,
    /// A virtio device: registers, queues, and what is its own.
    Virtio,
    /// The interval timer.
    Timer,
    /// An interrupt controller of the machine.
    InterruptController,
    /// Whether a vCPU runs, halts or waits.
    RunState,
    /// General registers.
    Registers,
    /// Segment and control registers.
    SpecialRegisters,
    /// Floating point and vector registers.
    Vectors,
    /// Which of those are enabled.
    VectorControl,
    /// Debug registers.
    DebugRegisters,
    /// The local interrupt controller.
    LocalInterruptController,
    /// The time stamp counter.
    TimeStampCounter,
    /// The features that the guest sees.
    Cpuid,
    /// Model-specific registers.
    Msrs,
    /// Exceptions and interrupts under way.
    Events,
    /// A vCPU's own micro guest ports.
    Ports,
}

/// Every kind, its name, and the version that is written and read.
const KINDS: [(Kind, &str, u16); 20] = [
    (Kind::Machine, "machine", 1),
    (Kind::Clock, "clock", 1),
    (Kind::Micro, "micro", 1),
    (Kind::Serial, "serial", 1),
    (Kind::RealTimeClock, "real-time-clock", 1),
    (Kind::Virtio, "virtio", 1),
    (Kind::Timer, "timer", 1),
    (Kind::InterruptController, "interrupt-controller", 1),
    (Kind::RunState, "vcpu.run-state", 1),
    (Kind::Registers, "vcpu.registers", 1),
    (Kind::SpecialRegisters, "vcpu.special-registers", 1),
    (Kind::Vectors, "vcpu.vectors", 1),
    (Kind::VectorControl, "vcpu.vector-control", 1),
    (Kind::DebugRegisters, "vcpu.debug-registers", 1),
    (
        Kind::LocalInterruptController,
        "vcpu.interrupt-controller",
        1,
    ),
    (Kind::TimeStampCounter, "vcpu.time-stamp-counter", 1),
    (Kind::Cpuid, "vcpu.cpuid", 1),
    (Kind::Msrs, "vcpu.msrs", 1),
    (Kind::Events, "vcpu.events", 1),
    (Kind::Ports, "vcpu.micro-ports", 1),
];

impl Kind {
    /// Its name.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The version of its layout.
    pub fn version(self) -> u16 {
        self.row().2
    }

    fn row(self) -> &'static (Self, &'static str, u16) {
        KINDS
            .iter()
            .find(|row| row.0 == self)
            .expect("every kind is in the table")
    }
}

/// Why bytes are no state that can be loaded.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// They do not begin like one.
    #[error("this is no machine state, or one of another version")]
    NotState,
    /// More than any machine has.
    #[error("a state of {bytes} bytes in {sections} sections is larger than any machine's")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// How many sections it says it has.
        sections: u32,
    },
    /// They end too early.
    #[error("the state is cut off in section {index}")]
    CutOff {
        /// Where.
        index: u32,
    },
    /// They go on after the last section.
    #[error("{bytes} bytes follow the last section of the state")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// A name that is no name.
    #[error("section {index} of the state has no proper name")]
    Name {
        /// Where.
        index: u32,
    },
    /// Bytes were changed on the way.
    #[error("section {name} {instance} of the state is damaged")]
    Damaged {
        /// Which.
        name: String,
        /// Of which vCPU or device.
        instance: u16,
    },
    /// A section that this version does not know.
    #[error("the state has a section {name} that this version of limosa does not know")]
    UnknownSection {
        /// Its name.
        name: String,
    },
    /// A known section in an unknown layout.
    #[error(
        "section {name} of the state has version {version}, this version of limosa knows {known}"
    )]
    UnknownVersion {
        /// Which.
        name: &'static str,
        /// What it has.
        version: u16,
        /// What is known.
        known: u16,
    },
    /// The same section twice.
    #[error("the state has section {name} {instance} twice")]
    Twice {
        /// Which.
        name: &'static str,
        /// Of which vCPU or device.
        instance: u16,
    },
    /// A section that the machine needs is not there.
    #[error("the state lacks section {name} {instance}")]
    Missing {
        /// Which.
        name: &'static str,
        /// Of which vCPU or device.
        instance: u16,
    },
    /// A section of something that the machine has not.
    #[error("the state has section {name} {instance}, for which this machine has no place")]
    NoPlace {
        /// Which.
        name: &'static str,
        /// Of which vCPU or device.
        instance: u16,
    },
    /// A section of the wrong size or with content that makes no sense.
    #[error("section {name} {instance} of the state cannot be: {why}")]
    Content {
        /// Which.
        name: &'static str,
        /// Of which vCPU or device.
        instance: u16,
        /// What is wrong with it.
        why: String,
    },
}

/// Writes sections one after the other. Several writers can work at once and be joined.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    count: u32,
}

impl Writer {
    /// A writer with room for that many bytes.
    pub fn with_capacity(bytes: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(bytes),
            count: 0,
        }
    }

    /// Appends a section of `len` bytes that `fill` writes in place.
    ///
    /// # Errors
    /// Those of `fill`; the section is then not there.
    ///
    /// # Panics
    /// If the section is larger than any may be.
    pub fn fill<E>(
        &mut self,
        kind: Kind,
        instance: u16,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(len <= SECTION_BYTES_MAX, "our own sections are small");
        let header = self.bytes.len();
        let start = header + SECTION_HEADER_BYTES;
        self.bytes.resize(start + len, 0);
        if let Err(error) = fill(&mut self.bytes[start..]) {
            self.bytes.truncate(header);
            return Err(error);
        }
        let (name, version) = (kind.name().as_bytes(), kind.version());
        let place = &mut self.bytes[header..];
        place[..name.len()].copy_from_slice(name);
        place[NAME_BYTES..NAME_BYTES + 2].copy_from_slice(&instance.to_le_bytes());
        place[NAME_BYTES + 2..NAME_BYTES + 4].copy_from_slice(&version.to_le_bytes());
        let length = u32::try_from(len).expect("checked above");
        place[NAME_BYTES + 4..CHECKED_BYTES].copy_from_slice(&length.to_le_bytes());
        let sum = checksum(&place[..CHECKED_BYTES], &place[SECTION_HEADER_BYTES..]);
        place[CHECKED_BYTES..SECTION_HEADER_BYTES].copy_from_slice(&sum.to_le_bytes());
        self.count += 1;
        Ok(())
    }

    /// Appends a section with these bytes.
    pub fn write(&mut self, kind: Kind, instance: u16, bytes: &[u8]) {
        let copy = |place: &mut [u8]| {
            place.copy_from_slice(bytes);
            Ok::<(), std::convert::Infallible>(())
        };
        let Ok(()) = self.fill(kind, instance, bytes.len(), copy);
    }

    /// The state of all these writers' sections, in order.
    pub fn join(writers: &[Self]) -> Vec<u8> {
        let len = writers
            .iter()
            .map(|writer| writer.bytes.len())
            .sum::<usize>();
        let count: u32 = writers.iter().map(|writer| writer.count).sum();
        let mut state = Vec::with_capacity(HEADER_BYTES + len);
        state.extend(MAGIC);
        state.extend(VERSION.to_le_bytes());
        state.extend([0; 2]);
        state.extend(count.to_le_bytes());
        writers
            .iter()
            .for_each(|writer| state.extend(&writer.bytes));
        state
    }
}

/// A section as it was received, its checksum verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section<'a> {
    /// What it holds.
    pub kind: Kind,
    /// Of which vCPU, or which of several.
    pub instance: u16,
    /// The bytes.
    pub bytes: &'a [u8],
}

impl Section<'_> {
    /// An error about its content.
    pub(crate) fn content(&self, why: impl Into<String>) -> StateError {
        StateError::Content {
            name: self.kind.name(),
            instance: self.instance,
            why: why.into(),
        }
    }
}

/// Reads all sections; each is known, sound and there once.
///
/// # Errors
/// The first thing that is wrong.
pub fn parse(state: &[u8]) -> Result<Vec<Section<'_>>, StateError> {
    let mut sections: Vec<Section<'_>> = Vec::new();
    for raw in Raw::read_all(state)? {
        let row = KINDS.iter().find(|row| row.1 == raw.name);
        let Some(&(kind, name, known)) = row else {
            return Err(StateError::UnknownSection {
                name: raw.name.to_owned(),
            });
        };
        let (instance, version) = (raw.instance, raw.version);
        if version != known {
            return Err(StateError::UnknownVersion {
                name,
                version,
                known,
            });
        }
        if sections
            .iter()
            .any(|section| (section.kind, section.instance) == (kind, instance))
        {
            return Err(StateError::Twice { name, instance });
        }
        sections.push(Section {
            kind,
            instance,
            bytes: raw.bytes,
        });
    }
    Ok(sections)
}

/// Lists the sections, known or not.
///
/// # Errors
/// The bytes are no state or are damaged.
pub fn list(state: &[u8]) -> Result<Vec<SectionInfo>, StateError> {
    let info = |raw: &Raw<'_>| SectionInfo {
        name: raw.name.to_owned(),
        instance: raw.instance,
        version: raw.version,
        bytes: u32::try_from(raw.bytes.len()).expect("limited"),
    };
    Ok(Raw::read_all(state)?.iter().map(info).collect())
}

/// A section whose kind nobody has looked at.
struct Raw<'a> {
    name: &'a str,
    instance: u16,
    version: u16,
    bytes: &'a [u8],
}

impl<'a> Raw<'a> {
    fn read_all(state: &'a [u8]) -> Result<Vec<Self>, StateError> {
        let (header, mut rest) = state
            .split_at_checked(HEADER_BYTES)
            .ok_or(StateError::NotState)?;
        if header[..8] != MAGIC
            || header[8..12] != [VERSION.to_le_bytes()[0], VERSION.to_le_bytes()[1], 0, 0]
        {
            return Err(StateError::NotState);
        }
        let count = u32::from_le_bytes(header[12..].try_into().expect("four bytes are four bytes"));
        if state.len() > STATE_BYTES_MAX || count as usize > SECTIONS_MAX {
            return Err(StateError::TooLarge {
                bytes: state.len(),
                sections: count,
            });
        }
        let mut sections = Vec::new();
        for index in 0..count {
            let (section, behind) = Self::read(rest, index)?;
            sections.push(section);
            rest = behind;
        }
        if rest.is_empty() {
            Ok(sections)
        } else {
            Err(StateError::Trailing { bytes: rest.len() })
        }
    }

    fn read(bytes: &'a [u8], index: u32) -> Result<(Self, &'a [u8]), StateError> {
        let cut_off = StateError::CutOff { index };
        let Some((header, rest)) = bytes.split_at_checked(SECTION_HEADER_BYTES) else {
            return Err(cut_off);
        };
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let (instance, version) = (half(NAME_BYTES), half(NAME_BYTES + 2));
        let len = usize::from(half(NAME_BYTES + 4)) | usize::from(half(NAME_BYTES + 6)) << 16;
        let padded = &header[..NAME_BYTES];
        let end = padded
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(NAME_BYTES);
        let is_name = end > 0
            && padded[..end].iter().all(u8::is_ascii_graphic)
            && padded[end..].iter().all(|&byte| byte == 0);
        let name = std::str::from_utf8(&padded[..end]).ok().filter(|_| is_name);
        let name = name.ok_or(StateError::Name { index })?;
        if len > SECTION_BYTES_MAX || len > rest.len() {
            return Err(cut_off);
        }
        let (bytes, rest) = rest.split_at(len);
        let sum = u64::from_le_bytes(
            header[CHECKED_BYTES..]
                .try_into()
                .expect("eight bytes are eight bytes"),
        );
        if checksum(&header[..CHECKED_BYTES], bytes) != sum {
            return Err(StateError::Damaged {
                name: name.to_owned(),
                instance,
            });
        }
        Ok((
            Self {
                name,
                instance,
                version,
                bytes,
            },
            rest,
        ))
    }
}

fn checksum(header: &[u8], bytes: &[u8]) -> u64 {
    xxh3_64_with_seed(bytes, xxh3_64(header))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut first = Writer::default();
        first.write(Kind::Machine, 0, b"machine");
        first.write(Kind::Clock, 0, &7u64.to_le_bytes());
        let mut second = Writer::with_capacity(100);
        second.write(Kind::Registers, 1, &[0xab; 144]);
        let failed = second.fill(Kind::Msrs, 1, 1000, |place| {
            place.fill(1);
            Err("no")
        });
        assert_eq!(failed, Err("no"));
        second.write(Kind::Msrs, 1, &[]);
        Writer::join(&[first, second])
    }

    fn check(change: impl FnOnce(&mut Vec<u8>), expect: &str) {
        let mut state = sample();
        change(&mut state);
        let text = match parse(&state) {
            Ok(sections) => sections
                .iter()
                .map(|section| {
                    format!(
                        "{} {} {}",
                        section.kind.name(),
                        section.instance,
                        section.bytes.len()
                    )
                })
                .collect::<Vec<_>>()
                .join(", "),
            Err(error) => error.to_string(),
        };
        assert_eq!(text, expect);
    }

    /// Rewrites the checksum of the first section.
    fn reseal(state: &mut [u8]) {
        let sum = checksum(&state[16..56], &state[64..71]);
        state[56..64].copy_from_slice(&sum.to_le_bytes());
    }

    #[test]
    fn sections_come_back_and_damage_has_a_name() {
        check(
            |_| {},
            "machine 0 7, clock 0 8, vcpu.registers 1 144, vcpu.msrs 1 0",
        );
        check(
            |state| state.clear(),
            "this is no machine state, or one of another version",
        );
        check(
            |state| state[8] = 2,
            "this is no machine state, or one of another version",
        );
        check(
            |state| state[15] = 1,
            "a state of 415 bytes in 16777220 sections is larger than any machine's"
                .replace("415", &sample().len().to_string())
                .as_str(),
        );
        check(|state| state[12] = 5, "the state is cut off in section 4");
        check(
            |state| state[12] = 3,
            "48 bytes follow the last section of the state",
        );
        check(
            |state| state.push(0),
            "1 bytes follow the last section of the state",
        );
        check(
            |state| state[66] ^= 1,
            "section machine 0 of the state is damaged",
        );
        check(
            |state| state[48] = 1,
            "section machine 1 of the state is damaged",
        );
        check(
            |state| state[16] = 0,
            "section 0 of the state has no proper name",
        );
        check(
            |state| state[40] = b'x',
            "section 0 of the state has no proper name",
        );
        check(
            |state| state[55] = 0xff,
            "the state is cut off in section 0",
        );
        check(
            |state| {
                state[16..23].copy_from_slice(b"machinx");
                reseal(state);
            },
            "the state has a section machinx that this version of limosa does not know",
        );
        check(
            |state| {
                state[50] = 9;
                reseal(state);
            },
            "section machine of the state has version 9, this version of limosa knows 1",
        );
        let mut twice = Writer::default();
        twice.write(Kind::Clock, 0, &[]);
        twice.write(Kind::Clock, 0, &[]);
        let error = parse(&Writer::join(&[twice])).unwrap_err();
        assert_eq!(error.to_string(), "the state has section clock 0 twice");
    }

    #[test]
    fn names_fit_and_are_unique() {
        for (kind, name, version) in KINDS {
            assert!(name.len() <= NAME_BYTES && name.is_ascii() && version > 0);
            assert_eq!(KINDS.iter().filter(|row| row.1 == name).count(), 1);
            assert_eq!((kind.name(), kind.version()), (name, version));
        }
    }

    #[test]
    fn foreign_bytes_do_not_panic() {
        let state = sample();
        for len in 0..state.len() {
            assert!(parse(&state[..len]).is_err());
        }
        let mut seed = 3u64;
        for _ in 0..50_000 {
            let mut mutant = state.clone();
            for _ in 0..2 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % mutant.len();
                mutant[at] = (seed >> 24) as u8;
            }
            assert!(parse(&mutant).is_err() || mutant == state);
        }
    }
}
