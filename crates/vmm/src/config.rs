//! What machine it is: the settings with which one is made, and the description that travels.
//!
//! A description is the configuration of a machine that exists, with the CPU features and the clock
//! rate that its guest has seen. The host that is to take the machine makes an empty one from it, or
//! refuses, before the guest is touched.

pub mod devices;
mod host;

use crate::cpu::{self, CpuModel, CpuidLeaf};
use crate::virtio::DeviceError;
use devices::{DEVICES_MAX, DiskConfig, NetworkConfig};
use limosa_micro_abi::{ARGS_BYTES_MAX, VCPUS_MAX, memory_map};
use limosa_os::PageKind;
use limosa_os::dirty::TrackerKind;
use limosa_os::kvm::KvmError;
use limosa_pages::{ByteCount, Numbering};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Memory comes in steps of this: pages of the guest's page tables, and words of the dirty log.
pub const MEMORY_STEP: ByteCount = ByteCount::new(2 << 20);
/// Least memory: what is below the image, and the image.
pub const MEMORY_MIN: ByteCount = ByteCount::new(4 << 20);
/// Most memory: what the monitor's area has page tables for, rounded down.
pub const MEMORY_MAX: ByteCount = ByteCount::new(128 << 30);
/// Most vCPUs of a PC; of a micro guest [`VCPUS_MAX`].
pub const PC_VCPUS_MAX: u8 = 16;
/// Longest name of a machine.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest description: a table of 256 leaves takes at most 9 KiB.
pub const DESCRIPTION_BYTES_MAX: usize = 32 << 10;
/// Most registers that a guest depends on: there are some thirty.
const MSRS_MAX: usize = 64;
/// Marks a description, with its version as the last byte.
const MAGIC: [u8; 8] = *b"LIMOSVM\x05";
/// Clock rates within 250 ppm are the same: real clocks differ by that much from what they say.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a machine has beside memory and processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Platform {
    /// The ports of a micro guest, and the networks that it is given.
    #[default]
    Micro,
    /// What a stock kernel needs: interrupt controllers, a timer, a serial console, a real-time clock,
    /// ACPI; and the disks and networks that it is given.
    Pc,
}

/// A machine's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Its name, in messages and heartbeats.
    pub name: String,
    /// Its memory.
    pub memory: ByteCount,
    /// How many vCPUs it has.
    pub vcpus: u8,
    /// Whether huge pages back its memory.
    pub huge_pages: bool,
    /// Who notices which pages it writes, here and wherever it goes.
    pub dirty_tracker: TrackerKind,
    /// Whether it has interrupt controllers and a timer in the kernel. Micro guests need none.
    pub irqchip: bool,
    /// What it has beside memory and processors.
    pub platform: Platform,
    /// Its disks, in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Its network interfaces, likewise.
    pub networks: Vec<NetworkConfig>,
    /// Arguments of a micro guest.
    pub args: String,
    /// Where heartbeats are sent.
    pub observer: Option<SocketAddr>,
    /// What processor its guest sees.
    pub model: CpuModel,
    /// The features that its guest has seen; `None` to offer what the host has of its model.
    pub cpuid: Option<Vec<CpuidLeaf>>,
    /// Model-specific registers that its state has and no guest does without; none before it is made.
    pub msrs: Vec<u32>,
    /// The rate of its time stamp counter; `None` for the host's.
    pub tsc_khz: Option<u32>,
}

/// Why no machine can be made from a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The name is empty, too long, or has other characters than letters, digits, `.`, `_`, `-`.
    #[error(
        "a machine's name has 1 to {NAME_BYTES_MAX} letters, digits, dots, dashes or underscores"
    )]
    Name,
    /// The memory is too small, too large, or no multiple of 2 MiB.
    #[error(
        "memory of {memory} is not possible: it takes {MEMORY_MIN} to {MEMORY_MAX} in steps of {MEMORY_STEP}"
    )]
    Memory {
        /// What was asked for.
        memory: ByteCount,
    },
    /// Too few or too many vCPUs.
    #[error("{vcpus} vCPUs are not possible: such a machine has 1 to {most}")]
    Vcpus {
        /// How many.
        vcpus: u8,
        /// How many there may be.
        most: u32,
    },
    /// The arguments do not fit.
    #[error("guest arguments have {bytes} bytes, at most {ARGS_BYTES_MAX} fit")]
    Args {
        /// Their length.
        bytes: usize,
    },
    /// The CPU features are no table.
    #[error("the table of CPU features has {leaves} entries")]
    Cpuid {
        /// How many entries it has.
        leaves: usize,
    },
    /// A clock that stands still.
    #[error("a clock rate of 0 kHz is not possible")]
    Clock,
    /// A PC without interrupt controllers.
    #[error("a PC has interrupt controllers")]
    Platform,
    /// More devices than a machine has lines for.
    #[error("{count} disks and networks are too many: a machine has at most {DEVICES_MAX}")]
    Devices {
        /// How many.
        count: usize,
    },
    /// Disks of a micro guest.
    #[error("a micro guest has no disks")]
    NoDisks,
    /// A disk that other hosts could not find.
    #[error("'{path}' is no absolute path of a disk")]
    DiskPath {
        /// What was given.
        path: String,
    },
    /// A name that no interface can have.
    #[error("'{tap}' is no name of a network interface")]
    Tap {
        /// What was given.
        tap: String,
    },
    /// A disk, an interface or an address that two devices would share.
    #[error("'{name}' is given twice")]
    SameDevice {
        /// Which.
        name: String,
    },
    /// This host lacks a disk or an interface.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Write protection would track huge pages as a whole.
    #[error("huge pages are not tracked by write protection: use the bitmap or the ring")]
    Tracker,
    /// The bytes are no description.
    #[error("this is no description of a machine, or one of another version")]
    Description,
    /// This host's processor cannot stand in for the one that the guest has seen.
    #[error("this host's processor lacks {}", features.join(", "))]
    Features {
        /// What is missing.
        features: Vec<String>,
    },
    /// This host's processor is less than the model.
    #[error(
        "this host's processor lacks {} of CPU model {model}: choose a lower one, or host",
        features.join(", ")
    )]
    Model {
        /// What was asked for.
        model: CpuModel,
        /// What is missing.
        features: Vec<String>,
    },
    /// This host's KVM does not know registers that the guest depends on.
    #[error("this host's KVM lacks model-specific registers {registers:x?}")]
    Registers {
        /// Their numbers.
        registers: Vec<u32>,
    },
    /// More registers than any processor has.
    #[error("{count} model-specific registers are too many")]
    TooManyRegisters {
        /// How many.
        count: usize,
    },
    /// The clock runs at another rate and cannot be scaled.
    #[error(
        "the guest's clock runs at {wanted} kHz, this host's at {offered} kHz and cannot be scaled"
    )]
    ClockRate {
        /// The guest's.
        wanted: u32,
        /// The host's.
        offered: u32,
    },
    /// KVM does not tell what it offers.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl VmConfig {
    /// A machine with small pages and nothing special.
    pub fn new(name: &str, memory: ByteCount, vcpus: u8) -> Self {
        Self {
            name: name.to_owned(),
            memory,
            vcpus,
            huge_pages: false,
            dirty_tracker: TrackerKind::default(),
            irqchip: false,
            platform: Platform::Micro,
            disks: Vec::new(),
            networks: Vec::new(),
            args: String::new(),
            observer: None,
            model: CpuModel::default(),
            cpuid: None,
            msrs: Vec::new(),
            tsc_khz: None,
        }
    }

    /// How its pages are numbered, those of its disks behind those of its memory; `None` if a disk's size is
    /// not known yet, or they are too large.
    pub fn numbering(&self) -> Option<Numbering> {
        let sizes = self.disks.iter().map(|disk| disk.bytes);
        let sizes: Vec<u64> = sizes.collect::<Option<_>>()?;
        Numbering::new(
            self.memory.pages_ceil(),
            sizes.into_iter().map(ByteCount::new),
        )
    }

    /// Checks all limits.
    ///
    /// # Errors
    /// The first one that does not hold.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=NAME_BYTES_MAX).contains(&self.name.len()) || !self.name.bytes().all(is_plain) {
            return Err(ConfigError::Name);
        }
        let memory = self.memory;
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&memory)
            || !memory.get().is_multiple_of(MEMORY_STEP.get())
        {
            return Err(ConfigError::Memory { memory });
        }
        let most = match self.platform {
            Platform::Micro => VCPUS_MAX,
            Platform::Pc => u32::from(PC_VCPUS_MAX),
        };
        let vcpus = self.vcpus;
        if !(1..=most).contains(&u32::from(vcpus)) {
            return Err(ConfigError::Vcpus { vcpus, most });
        }
        if self.args.len() > ARGS_BYTES_MAX {
            return Err(ConfigError::Args {
                bytes: self.args.len(),
            });
        }
        if self.tsc_khz == Some(0) {
            return Err(ConfigError::Clock);
        }
        if self.platform == Platform::Pc && !self.irqchip {
            return Err(ConfigError::Platform);
        }
        devices::check(&self.disks, &self.networks)?;
        if self.platform == Platform::Micro && !self.disks.is_empty() {
            return Err(ConfigError::NoDisks);
        }
        if self.huge_pages && self.dirty_tracker == TrackerKind::WriteProtect {
            return Err(ConfigError::Tracker);
        }
        if self.msrs.len() > MSRS_MAX {
            let count = self.msrs.len();
            return Err(ConfigError::TooManyRegisters { count });
        }
        match &self.cpuid {
            Some(table) if !(1..=cpu::LEAVES_MAX).contains(&table.len()) => {
                Err(ConfigError::Cpuid {
                    leaves: table.len(),
                })
            }
            _ => Ok(()),
        }
    }

    /// The bytes that travel.
    ///
    /// # Panics
    /// If the configuration does not hold its limits.
    pub fn to_description(&self) -> Vec<u8> {
        let bytes = postcard::to_extend(self, MAGIC.to_vec())
            .expect("a configuration can always be written");
        assert!(
            bytes.len() <= DESCRIPTION_BYTES_MAX,
            "limits keep a description small"
        );
        bytes
    }

    /// Reads a description from a peer and checks its limits.
    ///
    /// # Errors
    /// It is none, or a limit does not hold.
    pub fn from_description(bytes: &[u8]) -> Result<Self, ConfigError> {
        let body = bytes
            .strip_prefix(&MAGIC)
            .filter(|_| bytes.len() <= DESCRIPTION_BYTES_MAX);
        let body = body.ok_or(ConfigError::Description)?;
        let (config, rest): (Self, _) =
            postcard::take_from_bytes(body).map_err(|_| ConfigError::Description)?;
        if !rest.is_empty() {
            return Err(ConfigError::Description);
        }
        config.check()?;
        Ok(config)
    }

    pub(crate) const fn page_kind(&self) -> PageKind {
        if self.huge_pages {
            PageKind::Huge
        } else {
            PageKind::Small
        }
    }

    /// The least memory that would hold `bytes`.
    pub(crate) const fn memory_for(bytes: u64) -> ByteCount {
        ByteCount::new(bytes.next_multiple_of(MEMORY_STEP.get()))
    }
}

/// Whether a byte may be in a name.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

/// True if two clock rates differ by no more than clocks do.
pub(crate) fn is_same_rate(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * TSC_TOLERANCE_PPM
}

// What is below the image fits into the least memory, and the page tables into their area.
const _: () = assert!(memory_map::IMAGE_START < MEMORY_MIN.get());

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> VmConfig {
        VmConfig::new("web-1.a_b", ByteCount::new(64 << 20), 2)
    }

    fn check(change: impl FnOnce(&mut VmConfig), expect: &str) {
        let mut config = config();
        change(&mut config);
        let text = config
            .check()
            .map_or_else(|error| error.to_string(), |()| "ok".to_owned());
        assert_eq!(text, expect);
    }

    #[test]
    fn limits_hold() {
        check(|_| {}, "ok");
        let name = "a machine's name has 1 to 64 letters, digits, dots, dashes or underscores";
        check(|config| config.name = String::new(), name);
        check(|config| config.name = "a/b".to_owned(), name);
        check(|config| config.name = "a".repeat(65), name);
        let memory = " is not possible: it takes 4.00 MiB to 128 GiB in steps of 2.00 MiB";
        for (bytes, shown) in [
            (2 << 20, "2.00 MiB"),
            (5 << 20, "5.00 MiB"),
            (129 << 30, "129 GiB"),
        ] {
            check(
                |config| config.memory = ByteCount::new(bytes),
                &format!("memory of {shown}{memory}"),
            );
        }
        check(
            |config| config.vcpus = 0,
            "0 vCPUs are not possible: such a machine has 1 to 8",
        );
        check(
            |config| config.vcpus = 9,
            "9 vCPUs are not possible: such a machine has 1 to 8",
        );
        check(
            |config| (config.vcpus, config.platform) = (17, Platform::Pc),
            "17 vCPUs are not possible: such a machine has 1 to 16",
        );
        check(
            |config| config.args = "x".repeat(2049),
            "guest arguments have 2049 bytes, at most 2048 fit",
        );
        check(
            |config| {
                config.disks = vec![DiskConfig {
                    path: "/a".to_owned(),
                    read_only: false,
                    bytes: None,
                }];
            },
            "a micro guest has no disks",
        );
        check(
            |config| config.tsc_khz = Some(0),
            "a clock rate of 0 kHz is not possible",
        );
        check(
            |config| {
                config.huge_pages = true;
                config.dirty_tracker = TrackerKind::WriteProtect;
            },
            "huge pages are not tracked by write protection: use the bitmap or the ring",
        );
        check(
            |config| config.cpuid = Some(Vec::new()),
            "the table of CPU features has 0 entries",
        );
    }

    #[test]
    fn descriptions_come_back_and_foreign_bytes_do_not_panic() {
        let mut config = config();
        config.cpuid = Some(vec![
            CpuidLeaf {
                function: 1,
                index: 2,
                flags: 3,
                registers: [u32::MAX; 4]
            };
            256
        ]);
        config.args = "x".repeat(ARGS_BYTES_MAX);
        config.msrs = vec![u32::MAX; MSRS_MAX];
        let bytes = config.to_description();
        assert_eq!(VmConfig::from_description(&bytes).unwrap(), config);
        for len in 0..bytes.len() {
            assert!(VmConfig::from_description(&bytes[..len]).is_err(), "{len}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(VmConfig::from_description(&longer).is_err());
        let mut seed = 0x1234_5678_u64;
        for _ in 0..20_000 {
            let mut mutant = bytes[..300].to_vec();
            for _ in 0..3 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (seed >> 33) as usize % 292 + 8;
                mutant[at] = (seed >> 24) as u8;
            }
            if let Ok(config) = VmConfig::from_description(&mutant) {
                config.check().unwrap();
            }
        }
    }

    #[test]
    fn clock_rates_within_the_tolerance_are_the_same() {
        assert!(is_same_rate(2_000_000, 2_000_500));
        assert!(!is_same_rate(2_000_000, 2_000_501));
    }
}
