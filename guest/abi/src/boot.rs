//! What the monitor tells the guest before its first instruction.

use core::mem::{offset_of, size_of};

#[cfg(feature = "bytes")]
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::memory_map::DEVICES_MAX;
use crate::{ABI_VERSION, ARGS_BYTES_MAX, PAGE_BYTES, VCPUS_MAX};

/// Boot information, one page at [`memory_map::BOOT_INFO`](crate::memory_map::BOOT_INFO); its
/// address is in `rdi` of every vCPU at the entry.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "bytes",
    derive(FromBytes, IntoBytes, Immutable, KnownLayout)
)]
#[repr(C)]
pub struct BootInfo {
    /// [`BootInfo::MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// How many vCPUs enter; their indexes are 0 to this minus one.
    pub vcpu_count: u32,
    /// Rate of the time stamp counter, in kHz.
    pub tsc_khz: u64,
    /// Size of the guest's memory; virtual addresses from zero to this are usable.
    pub memory_bytes: u64,
    /// First address behind the image that the guest may use as it likes, a multiple of 2 MiB.
    pub heap_start: u64,
    /// How many bytes of `args` count.
    pub args_len: u32,
    /// How many devices it has, at [`memory_map::DEVICES`](crate::memory_map::DEVICES).
    pub device_count: u32,
    /// Arguments: text of the form `key=value key=value`.
    pub args: [u8; ARGS_BYTES_MAX],
}

/// Why arguments cannot be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArgsError {
    /// The text has more bytes than fit.
    TooLong {
        /// Bytes of the text.
        bytes: usize,
    },
}

impl core::fmt::Display for ArgsError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::TooLong { bytes } => write!(
                f,
                "guest arguments have {bytes} bytes, at most {ARGS_BYTES_MAX} fit"
            ),
        }
    }
}

impl core::error::Error for ArgsError {}

impl BootInfo {
    /// Marks a filled page: "LIMOSABI" in memory order.
    pub const MAGIC: u64 = u64::from_le_bytes(*b"LIMOSABI");

    /// Boot information of this version of the contract.
    ///
    /// # Errors
    /// If the arguments do not fit.
    pub fn new(
        vcpu_count: u32,
        tsc_khz: u64,
        memory_bytes: u64,
        heap_start: u64,
        arguments: &str,
    ) -> Result<Self, ArgsError> {
        let bytes = arguments.len();
        let mut args = [0; ARGS_BYTES_MAX];
        args.get_mut(..bytes)
            .ok_or(ArgsError::TooLong { bytes })?
            .copy_from_slice(arguments.as_bytes());
        Ok(Self {
            magic: Self::MAGIC,
            abi_version: ABI_VERSION,
            vcpu_count,
            tsc_khz,
            memory_bytes,
            heap_start,
            args_len: bytes as u32,
            device_count: 0,
            args,
        })
    }

    /// The bytes of the page, as they lie in the guest's memory.
    #[cfg(feature = "bytes")]
    #[must_use]
    pub fn page_bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// The same for a guest with so many devices.
    #[must_use]
    pub const fn with_devices(mut self, count: u32) -> Self {
        self.device_count = count;
        self
    }

    /// Whether a guest of this version can start from it.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.magic == Self::MAGIC
            && self.abi_version == ABI_VERSION
            && self.device_count <= DEVICES_MAX
            && (1..=VCPUS_MAX).contains(&self.vcpu_count)
            && self.tsc_khz > 0
            && self.heap_start <= self.memory_bytes
    }

    /// The arguments, if they are text.
    #[must_use]
    pub fn arguments(&self) -> Option<&str> {
        let bytes = self.args.get(..self.args_len as usize)?;
        core::str::from_utf8(bytes).ok()
    }
}

const _: () = assert!(size_of::<BootInfo>() == 48 + ARGS_BYTES_MAX);
const _: () = assert!(size_of::<BootInfo>() as u64 <= PAGE_BYTES);
const _: () = assert!(offset_of!(BootInfo, abi_version) == 8);
const _: () = assert!(offset_of!(BootInfo, vcpu_count) == 12);
const _: () = assert!(offset_of!(BootInfo, tsc_khz) == 16);
const _: () = assert!(offset_of!(BootInfo, memory_bytes) == 24);
const _: () = assert!(offset_of!(BootInfo, heap_start) == 32);
const _: () = assert!(offset_of!(BootInfo, args_len) == 40);
const _: () = assert!(offset_of!(BootInfo, device_count) == 44);
const _: () = assert!(offset_of!(BootInfo, args) == 48);

#[cfg(all(test, feature = "bytes"))]
mod tests {
    use super::*;

    #[test]
    fn arguments_survive() {
        let boot = BootInfo::new(2, 2_600_000, 1 << 30, 4 << 20, "ws=1M rate=max").unwrap();
        let again = BootInfo::read_from_bytes(boot.as_bytes()).unwrap();
        assert!(again.is_usable());
        assert_eq!(again.arguments(), Some("ws=1M rate=max"));
    }

    #[test]
    fn bad_boot_information_is_seen() {
        let long = [b'x'; ARGS_BYTES_MAX + 1];
        assert_eq!(
            BootInfo::new(1, 1, 1, 1, core::str::from_utf8(&long).unwrap()),
            Err(ArgsError::TooLong { bytes: 2049 })
        );
        let mut boot = BootInfo::new(1, 1, 1, 1, "").unwrap();
        boot.args_len = u32::MAX;
        assert_eq!(boot.arguments(), None);
        boot.vcpu_count = 9;
        assert!(!boot.is_usable());
        let boot = BootInfo::new(1, 1, 1, 1, "").unwrap();
        assert!(boot.clone().with_devices(8).is_usable());
        assert!(!boot.with_devices(9).is_usable());
    }
}
