//! The CPU that a guest sees: its CPUID table, and whether another host can offer the same.
//!
//! A machine is made with a table without anything that differs from vCPU to vCPU
//! ([`neutral_table`]); that table is part of the machine's description and moves with it. Each vCPU
//! gets its own from it. A host can take a machine if it offers every feature bit in it: checked
//! before anything is changed, so that the guest stays where it is.

mod model;

pub use model::CpuModel;

use crate::config::Platform;
use limosa_os::kvm::{Kvm, KvmError, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

/// Most leaves of a table. KVM takes 256.
pub const LEAVES_MAX: usize = limosa_os::kvm::CPUID_ENTRIES_MAX;

/// One entry of a CPUID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// The number that is asked for.
    pub function: u32,
    /// The second number, for functions that have one.
    pub index: u32,
    /// KVM's flags: whether `index` counts.
    pub flags: u32,
    /// The answer: EAX, EBX, ECX, EDX.
    pub registers: [u32; 4],
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The features that this host can offer, the same on each of its processors.
///
/// # Errors
/// KVM does not tell.
pub fn neutral_table(kvm: &Kvm) -> Result<Vec<CpuidLeaf>, KvmError> {
    let mut table: Vec<CpuidLeaf> = kvm
        .supported_cpuid()?
        .iter()
        .map(CpuidLeaf::from_kvm)
        .collect();
    for leaf in &mut table {
        let registers = &mut leaf.registers;
        match (leaf.function, leaf.index) {
            // Cache line size of CLFLUSH stays; number of the processor and of its siblings go. The
            // bits that mirror what the guest has switched on are KVM's to set.
            (0x1, _) => {
                registers[EBX] &= 0x0000_ff00;
                registers[ECX] = (registers[ECX] | HYPERVISOR) & !OSXSAVE;
            }
            (0x7, 0) => registers[ECX] &= !OSPKE,
            (0xb | 0x1f, _) => registers[EDX] = 0,
            // Of the state's size, the part that depends on what is switched on.
            (0xd, 0 | 1) => registers[EBX] = 0,
            (0x8000_001e, _) => *registers = [0; 4],
            _ => {}
        }
    }
    Ok(table)
}

/// What this host offers a machine on this platform: a PC also has what its interrupt controllers add.
///
/// # Errors
/// KVM does not tell.
pub fn machine_table(kvm: &Kvm, platform: Platform) -> Result<Vec<CpuidLeaf>, KvmError> {
    let mut table = neutral_table(kvm)?;
    if platform == Platform::Pc {
        for leaf in table.iter_mut().filter(|leaf| leaf.function == 0x1) {
            if kvm.has_tsc_deadline() {
                leaf.registers[ECX] |= TSC_DEADLINE_TIMER;
            }
        }
    }
    Ok(table)
}

const TSC_DEADLINE_TIMER: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const OSXSAVE: u32 = 1 << 27;
/// The count of logical processors counts.
const SEVERAL_PROCESSORS: u32 = 1 << 28;
const OSPKE: u32 = 1 << 4;

/// The table of one vCPU of a machine.
pub(crate) fn vcpu_table(neutral: &[CpuidLeaf], vcpu: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let id = u32::from(vcpu);
    let count = u32::from(vcpus);
    let width = count.next_power_of_two().trailing_zeros();
    let mut table: Vec<CpuidLeaf> = neutral.to_vec();
    for leaf in &mut table {
        let registers = &mut leaf.registers;
        match (leaf.function, leaf.index) {
            (0x1, _) => {
                registers[EBX] |= id << 24 | count << 16;
                if count > 1 {
                    registers[EDX] |= SEVERAL_PROCESSORS;
                }
            }
            // One thread a core, all cores in one package.
            (0xb | 0x1f, 0) => *registers = [0, 1, 0x100, id],
            (0xb | 0x1f, 1) => *registers = [width, count, 0x201, id],
            (0xb | 0x1f, level) => *registers = [0, 0, level & 0xff, id],
            (0x8000_001e, _) => *registers = [id, id, 0, 0],
            _ => {}
        }
    }
    table.into_iter().map(CpuidLeaf::to_kvm).collect()
}

/// What of `wanted` is not in `offered`, in words; empty if the host that offers it can run a guest
/// that sees the wanted table.
pub fn missing_features(wanted: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let mut missing = Vec::new();
    let vendor = |table| {
        let registers = registers(table, 0, 0);
        registers.map(|registers| [registers[EBX], registers[ECX], registers[EDX]])
    };
    if vendor(wanted) != vendor(offered) {
        missing.push("the processor's vendor".to_owned());
    }
    missing.extend(missing_bits(wanted, offered));
    let width = |table| registers(table, 0x8000_0008, 0).map_or(36, |leaf| leaf[EAX] & 0xff);
    if width(wanted) > width(offered) {
        missing.push(format!("physical addresses of {} bits", width(wanted)));
    }
    let state = |table| registers(table, 0xd, 0).map_or(0, |leaf| leaf[ECX]);
    if state(wanted) > state(offered) {
        missing.push(format!("an XSAVE area of {} bytes", state(wanted)));
    }
    missing
}

/// The features of `wanted` that are not in `offered`, by name.
fn missing_bits(wanted: &[CpuidLeaf], offered: &[CpuidLeaf]) -> Vec<String> {
    let mut missing = Vec::new();
    for &(function, index, register, ignored) in &FEATURE_REGISTERS {
        let bits = |table| {
            registers(table, function, index).map_or(0, |registers| registers[register]) & !ignored
        };
        let lacking = bits(wanted) & !bits(offered);
        missing.extend(
            (0..32)
                .filter(|bit| lacking >> bit & 1 == 1)
                .map(|bit| name(function, index, register, bit)),
        );
    }
    missing
}

/// The answer of a leaf, if the table has it.
fn registers(table: &[CpuidLeaf], function: u32, index: u32) -> Option<[u32; 4]> {
    let mut leaves = table.iter();
    leaves
        .find(|leaf| leaf.function == function && leaf.index == index)
        .map(|leaf| leaf.registers)
}

/// Registers whose bits are features: function, index, register, bits that are none.
const FEATURE_REGISTERS: [(u32, u32, usize, u32); 17] = [
    (0x1, 0, ECX, OSXSAVE | HYPERVISOR),
    (0x1, 0, EDX, 0),
    (0x7, 0, EBX, 0),
    (0x7, 0, ECX, OSPKE),
    (0x7, 0, EDX, 0),
    (0x7, 1, EAX, 0),
    (0x7, 1, EDX, 0),
    (0x7, 2, EDX, 0),
    (0xd, 0, EAX, 0),
    (0xd, 0, EDX, 0),
    (0xd, 1, EAX, 0),
    (0x4000_0001, 0, EAX, 0),
    (0x8000_0001, 0, ECX, 0),
    (0x8000_0001, 0, EDX, 0),
    (0x8000_0007, 0, EDX, 0),
    (0x8000_0008, 0, EBX, 0),
    (0x8000_0021, 0, EAX, 0),
];

/// Names of the bits that one meets most; others are named by their place.
const NAMES: [(u32, u32, usize, u32, &str); 48] = [
    (0x1, 0, ECX, 0, "sse3"),
    (0x1, 0, ECX, 1, "pclmulqdq"),
    (0x1, 0, ECX, 9, "ssse3"),
    (0x1, 0, ECX, 12, "fma"),
    (0x1, 0, ECX, 13, "cx16"),
    (0x1, 0, ECX, 17, "pcid"),
    (0x1, 0, ECX, 19, "sse4.1"),
    (0x1, 0, ECX, 20, "sse4.2"),
    (0x1, 0, ECX, 21, "x2apic"),
    (0x1, 0, ECX, 22, "movbe"),
    (0x1, 0, ECX, 23, "popcnt"),
    (0x1, 0, ECX, 24, "tsc_deadline_timer"),
    (0x1, 0, ECX, 25, "aes"),
    (0x1, 0, ECX, 26, "xsave"),
    (0x1, 0, ECX, 28, "avx"),
    (0x1, 0, ECX, 29, "f16c"),
    (0x1, 0, ECX, 30, "rdrand"),
    (0x7, 0, EBX, 0, "fsgsbase"),
    (0x7, 0, EBX, 3, "bmi1"),
    (0x7, 0, EBX, 5, "avx2"),
    (0x7, 0, EBX, 7, "smep"),
    (0x7, 0, EBX, 8, "bmi2"),
    (0x7, 0, EBX, 9, "erms"),
    (0x7, 0, EBX, 16, "avx512f"),
    (0x7, 0, EBX, 17, "avx512dq"),
    (0x7, 0, EBX, 18, "rdseed"),
    (0x7, 0, EBX, 19, "adx"),
    (0x7, 0, EBX, 20, "smap"),
    (0x7, 0, EBX, 28, "avx512cd"),
    (0x7, 0, EBX, 29, "sha_ni"),
    (0x7, 0, EBX, 30, "avx512bw"),
    (0x7, 0, EBX, 31, "avx512vl"),
    (0x7, 0, ECX, 2, "umip"),
    (0x7, 0, ECX, 3, "pku"),
    (0x7, 0, ECX, 9, "vaes"),
    (0x7, 0, ECX, 22, "rdpid"),
    (0x7, 0, EDX, 24, "amx_tile"),
    (0x7, 1, EAX, 5, "avx512_bf16"),
    (0xd, 0, EAX, 2, "avx state"),
    (0xd, 0, EAX, 5, "avx512 opmask state"),
    (0xd, 0, EAX, 6, "avx512 zmm0 state"),
    (0xd, 0, EAX, 7, "avx512 zmm16 state"),
    (0xd, 1, EAX, 0, "xsaveopt"),
    (0xd, 1, EAX, 1, "xsavec"),
    (0xd, 1, EAX, 2, "xgetbv1"),
    (0xd, 1, EAX, 3, "xsaves"),
    (0x8000_0001, 0, EDX, 27, "rdtscp"),
    (0x8000_0001, 0, ECX, 5, "lzcnt"),
];

fn name(function: u32, index: u32, register: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|&&(of, at, within, number, _)| {
        (of, at, within, number) == (function, index, register, bit)
    });
    match known {
        Some((.., name)) => (*name).to_owned(),
        None => {
            let register = ["eax", "ebx", "ecx", "edx"][register];
            format!("cpuid {function:#x}.{index} {register} bit {bit}")
        }
    }
}

impl CpuidLeaf {
    const fn from_kvm(entry: &kvm_cpuid_entry2) -> Self {
        Self {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }

    fn to_kvm(self) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function: self.function,
            index: self.index,
            flags: self.flags,
            eax: self.registers[EAX],
            ebx: self.registers[EBX],
            ecx: self.registers[ECX],
            edx: self.registers[EDX],
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf {
            function,
            index,
            flags: 0,
            registers,
        }
    }

    fn host() -> Vec<CpuidLeaf> {
        vec![
            leaf(0, 0, [16, 1, 2, 3]),
            leaf(1, 0, [0, 0, 1 << 28 | OSXSAVE, 1]),
            leaf(7, 0, [0, 1 << 5, 0, 0]),
            leaf(0xb, 0, [0, 0, 0, 0]),
            leaf(0xb, 1, [0, 0, 1, 0]),
            leaf(0x8000_0008, 0, [48, 0, 0, 0]),
        ]
    }

    fn check(change: impl FnOnce(&mut Vec<CpuidLeaf>), expect: &str) {
        let mut wanted = host();
        change(&mut wanted);
        assert_eq!(missing_features(&wanted, &host()).join(", "), expect);
    }

    #[test]
    fn missing_features_have_names() {
        check(|_| {}, "");
        check(|table| table[1].registers[ECX] = 0, "");
        check(|table| table[2].registers[EBX] |= 1 << 16, "avx512f");
        check(
            |table| table[2].registers[ECX] |= 1 << 30,
            "cpuid 0x7.0 ecx bit 30",
        );
        check(
            |table| table.push(leaf(0x7, 1, [1 << 5, 0, 0, 0])),
            "avx512_bf16",
        );
        check(
            |table| table[5].registers[EAX] = 52,
            "physical addresses of 52 bits",
        );
        check(
            |table| table[0].registers[ECX] = 9,
            "the processor's vendor",
        );
    }

    #[test]
    fn each_vcpu_has_its_own_number() {
        let table = vcpu_table(&host(), 2, 3);
        assert_eq!(table[1].ebx, 2 << 24 | 3 << 16);
        assert_eq!((table[3].ebx, table[3].edx), (1, 2));
        assert_eq!(
            (table[4].eax, table[4].ebx, table[4].ecx, table[4].edx),
            (2, 3, 0x201, 2)
        );
    }

    #[test]
    fn this_host_can_offer_what_it_offers() {
        let Ok(kvm) = Kvm::open() else {
            return println!("skipped: no /dev/kvm");
        };
        let table = neutral_table(&kvm).unwrap();
        assert_eq!(
            neutral_table(&kvm).unwrap(),
            table,
            "nothing in it depends on where it is asked"
        );
        assert_eq!(missing_features(&table, &table), Vec::<String>::new());
    }
}
