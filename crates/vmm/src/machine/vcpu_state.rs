//! One vCPU's state: into sections and out of them.
//!
//! The order is part of the contract with KVM; each step says why it is where it is. It runs on the
//! vCPU's own thread, while no vCPU of the machine runs.

use super::MachineError;
use super::first_needed::Place;
use super::msrs::{self, KVM_CLOCKS, MsrPlan, TSC_DEADLINE};
use super::time::{ClockPair, SavedTsc, ticks};
use crate::answer::RefusedMsr;
use crate::board::Ports;
use crate::state::{Kind, Section, StateError, Writer};
use limosa_os::kvm::{KvmError, Vcpu, VcpuPart, kvm_cpuid_entry2};
use std::sync::Arc;

const LEAF_BYTES: usize = 28;
const MSR_BYTES: usize = 12;
const TSC_BYTES: usize = 16;
/// Most registers in a section; KVM has about 100.
const MSRS_MAX: usize = 1024;

/// What of a vCPU does not change.
#[derive(Debug)]
pub(super) struct Fixed {
    /// The features that its guest sees, as in the section.
    pub(super) cpuid: Vec<u8>,
    pub(super) has_irqchip: bool,
    pub(super) plan: Arc<MsrPlan>,
    pub(super) host_khz: u32,
    pub(super) guest_khz: u32,
    pub(super) is_scaled: bool,
}

/// What has to be done between a load and the first entry, when it is known how long the guest was
/// stopped.
#[derive(Debug, Default)]
pub(super) struct Resume {
    /// The time stamp counter at the stop; `None` once it was used.
    tsc: Option<u64>,
    /// When the local timer is to fire, if it is.
    deadline: u64,
    uses_kvm_clock: bool,
}

/// What a vCPU thread found when it saved.
#[derive(Debug)]
pub(super) struct SavedVcpu {
    pub(super) writer: Writer,
    pub(super) place: Place,
    pub(super) stopped_at: u64,
    pub(super) tsc: SavedTsc,
}

/// The sections of one vCPU, checked as far as that is possible without KVM.
#[derive(Debug)]
pub(super) struct VcpuState {
    parts: Vec<(VcpuPart, Vec<u8>)>,
    cpuid: Vec<u8>,
    msrs: Vec<(u32, u64)>,
    tsc: u64,
    ports: [u8; Ports::STATE_BYTES],
}

/// Saves a vCPU that has left the guest with nothing pending.
pub(super) fn save(
    index: u8,
    vcpu: &Vcpu,
    ports: &Ports,
    fixed: &Fixed,
    stopped_at: u64,
) -> Result<SavedVcpu, MachineError> {
    let instance = u16::from(index);
    let mut writer = Writer::with_capacity(16 << 10);
    let mut place_in_memory = Place::default();
    // Reading the run state first: it may deliver what is pending to the interrupt controller. Then the events:
    // KVM puts the address of a page fault that it has not delivered yet into CR2 when it tells of it.
    let others = parts(fixed.has_irqchip)
        .filter(|(_, part)| !matches!(part, VcpuPart::RunState | VcpuPart::Events));
    let first = [
        (Kind::RunState, VcpuPart::RunState),
        (Kind::Events, VcpuPart::Events),
    ];
    for (kind, part) in first.into_iter().chain(others) {
        writer.fill(kind, instance, vcpu.part_bytes(part), |place| {
            vcpu.read_part(part, place)?;
            place_in_memory.note(part, place);
            Ok::<(), KvmError>(())
        })?;
    }
    let tsc = read_tsc(vcpu, fixed)?;
    writer.write(Kind::Cpuid, instance, &fixed.cpuid);
    let mut registers = Vec::with_capacity(fixed.plan.saved.len());
    msrs::read(vcpu, &fixed.plan, &mut registers)?;
    writer.fill(Kind::Msrs, instance, registers.len() * MSR_BYTES, |place| {
        for (place, (index, value)) in place.chunks_exact_mut(MSR_BYTES).zip(registers) {
            place[..4].copy_from_slice(&index.to_le_bytes());
            place[4..].copy_from_slice(&value.to_le_bytes());
        }
        Ok::<(), KvmError>(())
    })?;
    writer.write(Kind::Ports, instance, &ports.save());
    Ok(SavedVcpu {
        writer,
        place: place_in_memory,
        stopped_at,
        tsc,
    })
}

/// The section of a vCPU's time stamp counter at the moment of the stop.
pub(super) fn tsc_section(index: u16, tsc: u64, khz: u32) -> Writer {
    let mut bytes = [0; TSC_BYTES];
    bytes[..8].copy_from_slice(&tsc.to_le_bytes());
    bytes[8..12].copy_from_slice(&khz.to_le_bytes());
    let mut writer = Writer::with_capacity(128);
    writer.write(Kind::TimeStampCounter, index, &bytes);
    writer
}

/// A table of CPU features as it is in a section.
pub(super) fn encode_cpuid(table: &[kvm_cpuid_entry2]) -> Vec<u8> {
    table
        .iter()
        .flat_map(|leaf| {
            [
                leaf.function,
                leaf.index,
                leaf.flags,
                leaf.eax,
                leaf.ebx,
                leaf.ecx,
                leaf.edx,
            ]
        })
        .flat_map(u32::to_le_bytes)
        .collect()
}

fn decode_cpuid(bytes: &[u8]) -> Vec<kvm_cpuid_entry2> {
    let word = |leaf: &[u8], at: usize| {
        u32::from_le_bytes(
            leaf[at * 4..at * 4 + 4]
                .try_into()
                .expect("four bytes are four bytes"),
        )
    };
    bytes
        .chunks_exact(LEAF_BYTES)
        .map(|leaf| kvm_cpuid_entry2 {
            function: word(leaf, 0),
            index: word(leaf, 1),
            flags: word(leaf, 2),
            eax: word(leaf, 3),
            ebx: word(leaf, 4),
            ecx: word(leaf, 5),
            edx: word(leaf, 6),
            ..Default::default()
        })
        .collect()
}

/// The parts that are bytes of KVM, in the order in which they are saved and loaded.
fn parts(has_irqchip: bool) -> impl Iterator<Item = (Kind, VcpuPart)> {
    [
        (Kind::RunState, VcpuPart::RunState),
        (Kind::Registers, VcpuPart::Registers),
        (Kind::SpecialRegisters, VcpuPart::SpecialRegisters),
        (Kind::Vectors, VcpuPart::Vectors),
        (Kind::VectorControl, VcpuPart::VectorControl),
        (Kind::DebugRegisters, VcpuPart::DebugRegisters),
        // After the special registers, which say where it is, and before the model-specific ones,
        // one of which arms its timer.
        (
            Kind::LocalInterruptController,
            VcpuPart::InterruptController,
        ),
        // After the general registers, whose writing drops exceptions.
        (Kind::Events, VcpuPart::Events),
    ]
    .into_iter()
    .filter(move |(_, part)| has_irqchip || *part != VcpuPart::InterruptController)
}

fn read_tsc(vcpu: &Vcpu, fixed: &Fixed) -> Result<SavedTsc, KvmError> {
    if !fixed.is_scaled
        && let Some(offset) = vcpu.tsc_offset()?
    {
        return Ok(SavedTsc::Offset(offset));
    }
    let mut value = Vec::with_capacity(1);
    vcpu.read_msrs(&[msrs::TSC], &mut value)?;
    let nanos = limosa_os::monotonic_nanos();
    let tsc = value.first().map_or(0, |register| register.1);
    Ok(SavedTsc::Value { tsc, nanos })
}

impl VcpuState {
    /// Picks the sections of one vCPU.
    pub(super) fn find(
        sections: &[Section<'_>],
        index: u16,
        has_irqchip: bool,
        khz: u32,
    ) -> Result<Self, StateError> {
        let find = |kind: Kind| {
            sections
                .iter()
                .find(|section| (section.kind, section.instance) == (kind, index))
                .ok_or(StateError::Missing {
                    name: kind.name(),
                    instance: index,
                })
        };
        let parts = parts(has_irqchip)
            .map(|(kind, part)| Ok((part, find(kind)?.bytes.to_vec())))
            .collect::<Result<_, StateError>>()?;
        let cpuid = find(Kind::Cpuid)?;
        let leaves = cpuid.bytes.len() / LEAF_BYTES;
        if !cpuid.bytes.len().is_multiple_of(LEAF_BYTES) || leaves > crate::cpu::LEAVES_MAX {
            return Err(cpuid.content("it is no table"));
        }
        let msrs = find(Kind::Msrs)?;
        if !msrs.bytes.len().is_multiple_of(MSR_BYTES) || msrs.bytes.len() / MSR_BYTES > MSRS_MAX {
            return Err(msrs.content("it is no list of registers"));
        }
        let registers = msrs.bytes.chunks_exact(MSR_BYTES).map(|register| {
            let (index, value) = register.split_at(4);
            let index = u32::from_le_bytes(index.try_into().expect("four bytes are four bytes"));
            (
                index,
                u64::from_le_bytes(value.try_into().expect("eight bytes are eight bytes")),
            )
        });
        let tsc = find(Kind::TimeStampCounter)?;
        let bytes: [u8; TSC_BYTES] = tsc
            .bytes
            .try_into()
            .map_err(|_| tsc.content("it has another size"))?;
        let counter =
            u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes are eight bytes"));
        let rate = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes are four bytes"));
        if rate != khz {
            return Err(tsc.content(format!(
                "it runs at {rate} kHz, the machine was made for {khz}"
            )));
        }
        let ports = find(Kind::Ports)?;
        Ok(Self {
            parts,
            cpuid: cpuid.bytes.to_vec(),
            msrs: registers.collect(),
            tsc: counter,
            ports: ports
                .bytes
                .try_into()
                .map_err(|_| ports.content("it has another size"))?,
        })
    }

    /// Gives a vCPU this state. What is lost on the way is answered.
    pub(super) fn load(
        mut self,
        index: u8,
        vcpu: &Vcpu,
        ports: &mut Ports,
        fixed: &mut Fixed,
        resume: &mut Resume,
    ) -> Result<Vec<RefusedMsr>, MachineError> {
        for (part, bytes) in &mut self.parts {
            fit(index, *part, bytes, vcpu.part_bytes(*part))?;
        }
        // First of all, since all else is checked against it. The machine was made for the same
        // table, so that this is only done if it was given another one at the source.
        if self.cpuid != fixed.cpuid {
            vcpu.set_cpuid(&decode_cpuid(&self.cpuid))?;
            fixed.cpuid = self.cpuid;
        }
        for (part, bytes) in self
            .parts
            .iter()
            .filter(|(part, _)| *part != VcpuPart::Events)
        {
            vcpu.write_part(*part, bytes)?;
        }
        let deadline = self
            .msrs
            .iter()
            .find(|(msr, _)| *msr == TSC_DEADLINE)
            .map_or(0, |msr| msr.1);
        let uses = |&(msr, value): &(u32, u64)| KVM_CLOCKS.contains(&msr) && value & 1 == 1;
        *resume = Resume {
            tsc: Some(self.tsc),
            deadline,
            uses_kvm_clock: self.msrs.iter().any(uses),
        };
        if deadline != 0 {
            // A deadline is a time of the guest's counter, which therefore has to be right already.
            let now = ClockPair::sample();
            resume.set_tsc(vcpu, fixed, now.nanos, now)?;
            resume.tsc = Some(self.tsc);
        }
        // The deadline is last in the list, as it was saved.
        let refused = msrs::write(index, vcpu, &fixed.plan, &self.msrs)?;
        // Events last of all, since writing other parts may change them.
        for (part, bytes) in self
            .parts
            .iter()
            .filter(|(part, _)| *part == VcpuPart::Events)
        {
            vcpu.write_part(*part, bytes)?;
        }
        ports.load(self.ports);
        Ok(refused)
    }
}

/// Makes a part from another host fit this one's size. Vector state is as large as the host's
/// largest; what is missing or too much has to be zero.
fn fit(index: u8, part: VcpuPart, bytes: &mut Vec<u8>, wanted: usize) -> Result<(), StateError> {
    let may_differ = part == VcpuPart::Vectors;
    let is_empty_behind = bytes
        .get(wanted..)
        .is_none_or(|rest| rest.iter().all(|&byte| byte == 0));
    if bytes.len() == wanted || may_differ && is_empty_behind {
        bytes.resize(wanted, 0);
        return Ok(());
    }
    let (kind, _) = parts(true)
        .find(|(_, of)| *of == part)
        .expect("every part has a kind");
    Err(StateError::Content {
        name: kind.name(),
        instance: u16::from(index),
        why: format!("it has {} bytes, this host has {wanted}", bytes.len()),
    })
}

impl Resume {
    /// Lets time go on: the guest was stopped at `stopped_at` and will run now.
    pub(super) fn apply(
        &mut self,
        vcpu: &Vcpu,
        fixed: &Fixed,
        stopped_at: u64,
        pair: ClockPair,
    ) -> Result<(), KvmError> {
        self.set_tsc(vcpu, fixed, stopped_at, pair)?;
        if self.deadline != 0 {
            vcpu.write_msrs(&[(TSC_DEADLINE, self.deadline)])?;
            self.deadline = 0;
        }
        if self.uses_kvm_clock {
            vcpu.note_pause();
        }
        Ok(())
    }

    fn set_tsc(
        &mut self,
        vcpu: &Vcpu,
        fixed: &Fixed,
        stopped_at: u64,
        pair: ClockPair,
    ) -> Result<(), KvmError> {
        let Some(stopped_tsc) = self.tsc.take() else {
            return Ok(());
        };
        let offset = stopped_tsc.wrapping_sub(pair.tsc_at(stopped_at, fixed.host_khz));
        if !fixed.is_scaled && vcpu.set_tsc_offset(offset)? {
            return Ok(());
        }
        // KVM makes counters that are written within a second of each other equal.
        let elapsed = i128::from(limosa_os::monotonic_nanos()) - i128::from(stopped_at);
        let now = stopped_tsc.wrapping_add_signed(ticks(elapsed, fixed.guest_khz));
        vcpu.write_msrs(&[(msrs::TSC, now)])?;
        Ok(())
    }
}
