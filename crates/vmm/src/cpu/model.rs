//! CPU models: fixed sets of features, so that unlike hosts can exchange guests.
//!
//! The levels are those of the x86-64 psABI (System V ABI, AMD64 supplement, section 3.1.1, "x86-64-v2" to
//! "x86-64-v4"), which say what programs may use. To them come what a kernel expects around it and all
//! processors of the level have ([`SYSTEM`]), and KVM's own offers, as far as kernels since 5.11 make them.
//!
//! A host offers a model completely or not at all. What a model leaves out the guest does not see, with
//! three consequences: no bits for mitigations of speculation, no performance counters, and a vendor that
//! stays, for a guest cannot go from one vendor's processors to another's.

use super::{CpuidLeaf, EAX, EBX, ECX, EDX, HYPERVISOR, TSC_DEADLINE_TIMER, missing_bits};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// What processor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum CpuModel {
    /// All that the host offers: fastest, and at home only on hosts that offer as much.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// SSE4.2 and `popcnt`: processors since 2009.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// AVX2, FMA and bit manipulation: since 2013 to 2015.
    #[serde(rename = "x86-64-v3")]
    V3,
    /// AVX-512: since 2017 to 2022.
    #[serde(rename = "x86-64-v4")]
    V4,
}

impl CpuModel {
    /// All of them, the richest first.
    pub const ALL: [Self; 4] = [Self::Host, Self::V4, Self::V3, Self::V2];

    /// As an operator writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
            Self::V4 => "x86-64-v4",
        }
    }

    /// What a guest of this model sees, out of what a host offers; features that the host lacks are
    /// lacking in it.
    pub(crate) fn select(self, offered: &[CpuidLeaf]) -> Vec<CpuidLeaf> {
        if self == Self::Host {
            return offered.to_vec();
        }
        let kept = offered.iter().filter(|leaf| self.keeps(leaf));
        kept.map(|leaf| self.cut(*leaf, offered)).collect()
    }

    /// What of it a host that offers this lacks, in words; nothing if it has all.
    pub(crate) fn missing(self, offered: &[CpuidLeaf]) -> Vec<String> {
        missing_bits(&self.required(), offered)
    }

    /// What a host has to offer for this model, as a table that has nothing else.
    fn required(self) -> Vec<CpuidLeaf> {
        let places = [(0x1, 0), (0x7, 0), (0xd, 0), (0xd, 1), (0x8000_0001, 0)];
        let leaf = |(function, index)| CpuidLeaf {
            function,
            index,
            flags: 0,
            registers: self.features(function, index),
        };
        match self {
            Self::Host => Vec::new(),
            Self::V2 | Self::V3 | Self::V4 => places.map(leaf).to_vec(),
        }
    }

    /// The bits that it has of a register of features.
    fn features(self, function: u32, index: u32) -> [u32; 4] {
        let mut registers = [0; 4];
        for &(level, of, at, register, bits) in FEATURES.iter().chain(&SYSTEM) {
            if self >= level && (of, at) == (function, index) {
                registers[register] |= bits;
            }
        }
        registers
    }

    /// Whether it has a leaf at all.
    fn keeps(self, leaf: &CpuidLeaf) -> bool {
        match leaf.function {
            0x0 | 0x1 | 0x2 | 0x4 | 0x6 | 0xb | 0x4000_0000 | 0x4000_0001 => true,
            0x7 => leaf.index == 0,
            0xd if leaf.index < 2 => true,
            // Where a part of the extended state is: for the parts that it has.
            0xd => self.features(0xd, 0)[EAX] & 1u32.checked_shl(leaf.index).unwrap_or(0) != 0,
            0x8000_0000..=0x8000_0008 => true,
            _ => false,
        }
    }

    fn cut(self, mut leaf: CpuidLeaf, offered: &[CpuidLeaf]) -> CpuidLeaf {
        let has = self.features(leaf.function, leaf.index);
        let registers = &mut leaf.registers;
        match (leaf.function, leaf.index) {
            (0x0, _) => registers[EAX] = registers[EAX].min(LAST_LEAF),
            (0x8000_0000, _) => registers[EAX] = registers[EAX].min(LAST_EXTENDED_LEAF),
            (0x1, _) => {
                registers[ECX] &= has[ECX] | HYPERVISOR | TSC_DEADLINE_TIMER;
                registers[EDX] &= has[EDX];
            }
            (0x6, _) => *registers = [registers[EAX] & TIMER_NEVER_STOPS, 0, 0, 0],
            (0x7, _) => *registers = [0, registers[EBX] & has[EBX], 0, 0],
            (0xd, 0) => {
                let parts = registers[EAX] & has[EAX];
                let bytes = self.state_bytes(offered);
                *registers = [parts, 0, if parts == 0 { 0 } else { bytes }, 0];
            }
            (0xd, 1) => *registers = [registers[EAX] & has[EAX], 0, 0, 0],
            (0x4000_0001, _) => registers[EAX] &= PARAVIRTUAL,
            (0x8000_0001, _) => {
                registers[ECX] &= has[ECX];
                // AMD's processors repeat the old features here.
                registers[EDX] &= has[EDX] | REPEATED;
            }
            (0x8000_0007, _) => *registers = [0; 4],
            (0x8000_0008, _) => {
                let width = (registers[EAX] & 0xff).min(PHYSICAL_BITS);
                *registers = [VIRTUAL_BITS << 8 | width, 0, 0, 0];
            }
            _ => {}
        }
        leaf
    }

    /// Bytes of the extended state with all parts that it has.
    fn state_bytes(self, offered: &[CpuidLeaf]) -> u32 {
        let parts = offered.iter().filter(|leaf| leaf.function == 0xd);
        let parts = parts.filter(|leaf| leaf.index >= 2 && self.keeps(leaf));
        let end = |leaf: &CpuidLeaf| leaf.registers[EAX].saturating_add(leaf.registers[EBX]);
        parts.map(end).max().unwrap_or(0).max(LEGACY_STATE_BYTES)
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut all = Self::ALL.into_iter();
        let found = all.find(|model| model.name() == text);
        found.ok_or_else(|| {
            format!("no CPU model {text:?}: there are host, x86-64-v2, x86-64-v3, x86-64-v4")
        })
    }
}

/// From which model on, function, index, register, bits.
type Features = (CpuModel, u32, u32, usize, u32);

/// Bits with these numbers.
const fn bits(numbers: &[u32]) -> u32 {
    let mut sum = 0;
    let mut at = 0;
    while at < numbers.len() {
        sum |= 1 << numbers[at];
        at += 1;
    }
    sum
}

/// What programs may use, by the psABI.
const FEATURES: [Features; 8] = [
    // sse3, ssse3, cx16, sse4.1, sse4.2, popcnt
    (CpuModel::V2, 0x1, 0, ECX, bits(&[0, 9, 13, 19, 20, 23])),
    // fpu, cx8, cmov, mmx, fxsr, sse, sse2
    (CpuModel::V2, 0x1, 0, EDX, bits(&[0, 8, 15, 23, 24, 25, 26])),
    // lahf_lm
    (CpuModel::V2, 0x8000_0001, 0, ECX, bits(&[0])),
    // fma, movbe, xsave, avx, f16c
    (CpuModel::V3, 0x1, 0, ECX, bits(&[12, 22, 26, 28, 29])),
    // bmi1, avx2, bmi2
    (CpuModel::V3, 0x7, 0, EBX, bits(&[3, 5, 8])),
    // lzcnt
    (CpuModel::V3, 0x8000_0001, 0, ECX, bits(&[5])),
    // avx512f, avx512dq, avx512cd, avx512bw, avx512vl
    (CpuModel::V4, 0x7, 0, EBX, bits(&[16, 17, 28, 30, 31])),
    // The registers of AVX-512
    (CpuModel::V4, 0xd, 0, EAX, bits(&[5, 6, 7])),
];

/// What a kernel expects around that.
const SYSTEM: [Features; 9] = [
    // x2apic
    (CpuModel::V2, 0x1, 0, ECX, bits(&[21])),
    // de, pse, tsc, msr, pae, mce, apic, sep, mtrr, pge, mca, pat, pse36, clflush
    (
        CpuModel::V2,
        0x1,
        0,
        EDX,
        bits(&[2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17, 19]),
    ),
    // syscall, nx, rdtscp, lm
    (CpuModel::V2, 0x8000_0001, 0, EDX, bits(&[11, 20, 27, 29])),
    // pclmulqdq, aes, rdrand
    (CpuModel::V3, 0x1, 0, ECX, bits(&[1, 25, 30])),
    // fsgsbase, smep
    (CpuModel::V3, 0x7, 0, EBX, bits(&[0, 7])),
    // The registers of the old unit, SSE and AVX
    (CpuModel::V3, 0xd, 0, EAX, bits(&[0, 1, 2])),
    // xsaveopt
    (CpuModel::V3, 0xd, 1, EAX, bits(&[0])),
    // erms, smap
    (CpuModel::V4, 0x7, 0, EBX, bits(&[9, 20])),
    // xsavec, xgetbv1
    (CpuModel::V4, 0xd, 1, EAX, bits(&[1, 2])),
];

/// KVM's own offers that every kernel since 5.11 makes: its clock, asynchronous page faults, stolen time,
/// ends of interrupts, TLB flushes, interrupts of several processors, yielding (Linux,
/// `Documentation/virt/kvm/x86/cpuid.rst`).
const PARAVIRTUAL: u32 = bits(&[0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 24]);
/// Features of function 1 that AMD's processors repeat in 0x80000001.
const REPEATED: u32 = 0x0183_f3ff;
/// The local timer runs on in sleep.
const TIMER_NEVER_STOPS: u32 = 1 << 2;
const LAST_LEAF: u32 = 0xd;
const LAST_EXTENDED_LEAF: u32 = 0x8000_0008;
/// Widths of addresses: the least that processors of these levels have, and enough for the most memory.
const PHYSICAL_BITS: u32 = 39;
const VIRTUAL_BITS: u32 = 48;
/// Extended state without any part but the old ones: its area and its header.
const LEGACY_STATE_BYTES: u32 = 576;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::missing_features;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf {
            function,
            index,
            flags: 0,
            registers,
        }
    }

    /// A host that has everything, and more than any model.
    fn rich() -> Vec<CpuidLeaf> {
        vec![
            leaf(0x0, 0, [0x20, 1, 2, 3]),
            leaf(0x1, 0, [0x00a2_0f10, 0x800, u32::MAX, u32::MAX]),
            leaf(0x6, 0, [0x77, 2, 3, 4]),
            leaf(0x7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            leaf(0x7, 1, [u32::MAX; 4]),
            leaf(0xa, 0, [u32::MAX; 4]),
            leaf(0xd, 0, [0x6_02e7, 0, 11_008, 0]),
            leaf(0xd, 1, [0x1f, 0, 0x1800, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 5, [64, 832, 0, 0]),
            leaf(0xd, 7, [1024, 1408, 0, 0]),
            leaf(0xd, 18, [8192, 2816, 0, 0]),
            leaf(0x4000_0001, 0, [u32::MAX, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0028, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
            leaf(0x8000_0007, 0, [0, 0, 0, 0x100]),
            leaf(0x8000_0008, 0, [0x3934, u32::MAX, 0, 0]),
            leaf(0x8000_0021, 0, [u32::MAX; 4]),
        ]
    }

    fn registers(table: &[CpuidLeaf], function: u32, index: u32) -> Option<[u32; 4]> {
        let mut table = table.iter();
        table
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
            .map(|leaf| leaf.registers)
    }

    #[test]
    fn names_come_back() {
        for model in CpuModel::ALL {
            assert_eq!(model.name().parse(), Ok(model));
        }
        let error = "haswell".parse::<CpuModel>().unwrap_err();
        assert!(error.contains("there are host, x86-64-v2"), "{error}");
    }

    #[test]
    fn a_model_is_the_same_whatever_more_a_host_has() {
        for model in [CpuModel::V2, CpuModel::V3, CpuModel::V4] {
            let of_rich = model.select(&rich());
            let mut lean = rich();
            for leaf in &mut lean {
                let has = model.features(leaf.function, leaf.index);
                match (leaf.function, leaf.index) {
                    (0x1, _) => leaf.registers[ECX] = has[ECX] | HYPERVISOR | TSC_DEADLINE_TIMER,
                    (0x7, 0) => leaf.registers = [0, has[EBX], 0, 0],
                    (0xd, 0) => leaf.registers = [has[EAX], 0, 2432, 0],
                    (0xd, 1) => leaf.registers = [has[EAX], 0, 0, 0],
                    _ => {}
                }
            }
            lean.retain(|leaf| !matches!(leaf.function, 0xa | 0x8000_0021));
            assert_eq!(model.select(&lean), of_rich, "{model}");
            assert_eq!(missing_features(&of_rich, &lean), Vec::<String>::new());
        }
    }

    #[test]
    fn a_model_has_its_level_and_the_size_of_its_state() {
        for (model, avx2, avx512, state) in [
            (CpuModel::V2, false, false, [0, 0, 0, 0]),
            (CpuModel::V3, true, false, [7, 0, 832, 0]),
            (CpuModel::V4, true, true, [0xe7, 0, 2432, 0]),
        ] {
            let table = model.select(&rich());
            let features = registers(&table, 0x7, 0).unwrap();
            let has = |bit: u32| features[EBX] >> bit & 1 == 1;
            assert_eq!((has(5), has(16)), (avx2, avx512), "{model}");
            assert_eq!(registers(&table, 0xd, 0), Some(state), "{model}");
            assert_eq!(registers(&table, 0xd, 2).is_some(), avx2, "{model}");
            assert_eq!(registers(&table, 0xd, 18), None);
            assert_eq!(registers(&table, 0x8000_0008, 0), Some([0x3027, 0, 0, 0]));
        }
        assert_eq!(CpuModel::Host.select(&rich()), rich());
    }

    #[test]
    fn what_a_host_lacks_of_a_model_is_named() {
        let check = |model: CpuModel, change: fn(&mut CpuidLeaf), expect: &str| {
            let mut host = rich();
            host.iter_mut().for_each(change);
            assert_eq!(model.missing(&host).join(", "), expect, "{model}");
        };
        let no_avx2 = |leaf: &mut CpuidLeaf| {
            if leaf.function == 0x7 {
                leaf.registers[EBX] &= !(1 << 5 | 1 << 16);
            }
        };
        check(CpuModel::Host, no_avx2, "");
        check(CpuModel::V2, no_avx2, "");
        check(CpuModel::V3, no_avx2, "avx2");
        check(CpuModel::V4, no_avx2, "avx2, avx512f");
        check(CpuModel::V4, |_| {}, "");
    }
}
