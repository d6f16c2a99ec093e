//! Model-specific registers: which of them this kernel reads and takes, and what becomes of values
//! that it does not take.
//!
//! KVM lists registers that it then refuses to read or write, depending on CPU features and on what
//! the machine has; and it stops at the first refusal. So all are tried once when a machine is made.
//! A refused value matters only if it differs from what the register has anyway; then it is
//! reported, and is fatal if guests depend on the register.

use super::MachineError;
use crate::answer::RefusedMsr;
use limosa_os::kvm::{Kvm, KvmError, Vcpu};

/// The time stamp counter, which is no register to be copied: it goes on.
pub(super) const TSC: u32 = 0x10;
/// When the local timer fires. Written last, since it counts in the time stamp counter.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;
/// KVM's clock, in its old and new place. The lowest bit says that the guest uses it.
pub(super) const KVM_CLOCKS: [u32; 2] = [0x12, 0x4b56_4d01];

/// Registers without whose values a guest crashes or computes wrongly.
const ESSENTIAL: [std::ops::RangeInclusive<u32>; 9] = [
    0x174..=0x176,             // system calls of old programs
    0x277..=0x277,             // page attributes
    0x6a0..=0x6a8,             // shadow stacks
    0xda0..=0xda0,             // extended state of the supervisor
    0xc000_0080..=0xc000_0084, // long mode and system calls
    0xc000_0100..=0xc000_0103, // bases of segments, the processor's number
    0x11..=0x12,               // KVM's clock, old
    0x4b56_4d00..=0x4b56_4d02, // KVM's clock, page faults that a task waits for alone
    0x4b56_4d06..=0x4b56_4d07, // how it hears that such a page has come
];

/// What was found out when the machine was made.
#[derive(Debug)]
pub(super) struct MsrPlan {
    /// What to save, with [`TSC_DEADLINE`] last if there is one.
    pub(super) saved: Vec<u32>,
    /// Registers that do not even take the value that they have, with that value.
    unwritable: Vec<(u32, u64)>,
}

impl MsrPlan {
    /// Tries all registers on a fresh vCPU whose CPU features are set.
    pub(super) fn probe(kvm: &Kvm, vcpu: &Vcpu) -> Result<Self, KvmError> {
        let mut wanted: Vec<u32> = kvm
            .state_msrs()?
            .into_iter()
            .filter(|&index| index != TSC)
            .collect();
        wanted.sort_by_key(|&index| index == TSC_DEADLINE);
        let mut values = Vec::with_capacity(wanted.len());
        let mut rest = wanted.as_slice();
        while !rest.is_empty() {
            let done = vcpu.read_msrs(rest, &mut values)?;
            rest = rest.get(done + 1..).unwrap_or_default();
        }
        let mut unwritable = Vec::new();
        write_skipping(vcpu, &values, |register| unwritable.push(register))?;
        Ok(Self {
            saved: values.iter().map(|&(index, _)| index).collect(),
            unwritable,
        })
    }
}

impl MsrPlan {
    /// Those of the saved registers without which no guest goes on.
    pub(super) fn essential(&self) -> Vec<u32> {
        let saved = self.saved.iter().copied();
        saved.filter(|&msr| is_essential(msr)).collect()
    }
}

fn is_essential(msr: u32) -> bool {
    ESSENTIAL.iter().any(|range| range.contains(&msr))
}

/// Writes what KVM takes and tells the rest.
fn write_skipping(
    vcpu: &Vcpu,
    registers: &[(u32, u64)],
    mut refused: impl FnMut((u32, u64)),
) -> Result<(), KvmError> {
    let mut rest = registers;
    while !rest.is_empty() {
        let done = vcpu.write_msrs(rest)?;
        if let Some(&register) = rest.get(done) {
            refused(register);
        }
        rest = rest.get(done + 1..).unwrap_or_default();
    }
    Ok(())
}

/// Reads all that is saved. If something that was readable is refused now, that is an error.
pub(super) fn read(
    vcpu: &Vcpu,
    plan: &MsrPlan,
    into: &mut Vec<(u32, u64)>,
) -> Result<(), KvmError> {
    let done = vcpu.read_msrs(&plan.saved, into)?;
    if done < plan.saved.len() {
        return Err(KvmError::Lacks {
            what: "a model-specific register that it had when the machine was made",
        });
    }
    Ok(())
}

/// Gives a vCPU these values; the ones that were lost.
pub(super) fn write(
    index: u8,
    vcpu: &Vcpu,
    plan: &MsrPlan,
    registers: &[(u32, u64)],
) -> Result<Vec<RefusedMsr>, MachineError> {
    let fixed = |index: u32| {
        plan.unwritable
            .iter()
            .find(|fixed| fixed.0 == index)
            .map(|fixed| fixed.1)
    };
    let (known, writable): (Vec<_>, Vec<_>) = registers
        .iter()
        .copied()
        .partition(|&(index, _)| fixed(index).is_some());
    let mut lost: Vec<(u32, u64)> = known
        .into_iter()
        .filter(|&(index, value)| fixed(index) != Some(value))
        .collect();
    let mut refused = Vec::new();
    write_skipping(vcpu, &writable, |register| refused.push(register))?;
    for (index, value) in refused {
        let mut current = Vec::new();
        vcpu.read_msrs(&[index], &mut current)?;
        // A register that is not there at all has lost nothing if it was zero.
        if current.first().map_or(0, |register| register.1) != value {
            lost.push((index, value));
        }
    }
    if let Some(&(msr, value)) = lost.iter().find(|(msr, _)| is_essential(*msr)) {
        return Err(MachineError::LostMsr {
            vcpu: index,
            index: msr,
            value,
        });
    }
    Ok(lost
        .into_iter()
        .map(|(msr, value)| RefusedMsr {
            vcpu: index,
            index: msr,
            value,
        })
        .collect())
}
