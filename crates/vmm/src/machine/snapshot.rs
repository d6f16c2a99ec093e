//! The machine's own sections, and a whole state taken apart.

use super::MachineError;
use super::time::shown_at;
use super::vcpu_state::VcpuState;
use crate::board::Board;
use crate::config::{Platform, VmConfig};
use crate::state::{Kind, Section, StateError, Writer, parse};
use limosa_os::kvm::{Vm, VmPart};

const MACHINE_BYTES: usize = 16;
const CONTROLLERS: [u8; 3] = [0, 1, 2];

/// Writes the sections that are the machine's, not a vCPU's.
#[derive(Debug)]
pub(super) struct MachineSections<'a> {
    vm: &'a Vm,
    config: &'a VmConfig,
    writer: Writer,
}

impl<'a> MachineSections<'a> {
    pub(super) fn new(vm: &'a Vm, config: &'a VmConfig) -> Self {
        Self {
            vm,
            config,
            writer: Writer::with_capacity(4 << 10),
        }
    }

    /// `stopped_at` is when the guest stopped: the clock is that of the stop.
    pub(super) fn save(&mut self, board: &Board, stopped_at: u64) -> Result<(), MachineError> {
        let writer = &mut self.writer;
        writer.write(Kind::Machine, 0, &identity(self.config));
        let clock = shown_at(self.vm, stopped_at)?;
        writer.write(Kind::Clock, 0, &clock.to_le_bytes());
        board.save(writer);
        if self.config.irqchip {
            let vm = self.vm;
            writer.fill(Kind::Timer, 0, VmPart::Timer.bytes(), |place| {
                vm.read_part(VmPart::Timer, place)
            })?;
            for index in CONTROLLERS {
                let part = VmPart::InterruptController(index);
                writer.fill(
                    Kind::InterruptController,
                    u16::from(index),
                    part.bytes(),
                    |place| vm.read_part(part, place),
                )?;
            }
        }
        Ok(())
    }

    pub(super) fn into_writer(self) -> Writer {
        self.writer
    }
}

/// What has to be the same at both ends.
fn identity(config: &VmConfig) -> [u8; MACHINE_BYTES] {
    let mut bytes = [0; MACHINE_BYTES];
    bytes[..8].copy_from_slice(&config.memory.get().to_le_bytes());
    bytes[8] = config.vcpus;
    bytes[9] = u8::from(config.irqchip);
    bytes[10] = u8::from(config.platform == Platform::Pc);
    bytes
}

/// A state, checked as far as that is possible without KVM.
#[derive(Debug)]
pub(super) struct MachineState<'a> {
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) clock_nanos: u64,
    board: Vec<Section<'a>>,
    parts: Vec<(VmPart, Section<'a>)>,
}

impl<'a> MachineState<'a> {
    pub(super) fn parse(
        state: &'a [u8],
        config: &VmConfig,
        board: &Board,
    ) -> Result<Self, StateError> {
        let sections = parse(state)?;
        let find = |kind: Kind, instance: u16| {
            sections
                .iter()
                .find(|section| (section.kind, section.instance) == (kind, instance))
                .copied()
                .ok_or(StateError::Missing {
                    name: kind.name(),
                    instance,
                })
        };
        let machine = find(Kind::Machine, 0)?;
        if machine.bytes != identity(config) {
            return Err(machine
                .content("it is of another kind of machine, or one with other memory, vCPUs or interrupt controllers"));
        }
        let clock = find(Kind::Clock, 0)?;
        let clock_bytes: [u8; 8] = clock
            .bytes
            .try_into()
            .map_err(|_| clock.content("it has another size"))?;
        let parts = if config.irqchip {
            controllers(find)?
        } else {
            Vec::new()
        };
        if let Some(section) = sections
            .iter()
            .find(|section| !has_place(section, config, board))
        {
            return Err(StateError::NoPlace {
                name: section.kind.name(),
                instance: section.instance,
            });
        }
        let khz = config.tsc_khz.expect("set when the machine was made");
        let vcpus = (0..u16::from(config.vcpus))
            .map(|index| VcpuState::find(&sections, index, config.irqchip, khz))
            .collect::<Result<_, _>>()?;
        let clock_nanos = u64::from_le_bytes(clock_bytes);
        Ok(Self {
            vcpus,
            clock_nanos,
            board: board
                .sections()
                .into_iter()
                .map(|(kind, instance)| find(kind, instance))
                .collect::<Result<_, _>>()?,
            parts,
        })
    }

    /// Gives the machine's own parts their state, after the vCPUs have theirs.
    pub(super) fn load(&self, vm: &Vm, board: &Board) -> Result<(), MachineError> {
        board.load(&self.board)?;
        for (part, section) in &self.parts {
            vm.write_part(*part, section.bytes)?;
        }
        Ok(())
    }
}

/// The sections of the timer and of the interrupt controllers.
fn controllers<'a>(
    find: impl Fn(Kind, u16) -> Result<Section<'a>, StateError>,
) -> Result<Vec<(VmPart, Section<'a>)>, StateError> {
    let mut parts = vec![(VmPart::Timer, find(Kind::Timer, 0)?)];
    for index in CONTROLLERS {
        let section = find(Kind::InterruptController, u16::from(index))?;
        // The bytes say which controller they are for; KVM would believe them.
        if section.bytes.first() != Some(&index) {
            return Err(section.content("it is of another controller"));
        }
        parts.push((VmPart::InterruptController(index), section));
    }
    let has_other_size =
        |(part, section): &&(VmPart, Section<'a>)| section.bytes.len() != part.bytes();
    match parts.iter().find(has_other_size) {
        None => Ok(parts),
        Some((part, section)) => Err(section.content(format!(
            "it has {} bytes, not {}",
            section.bytes.len(),
            part.bytes()
        ))),
    }
}

/// Whether the machine has what a section is of.
fn has_place(section: &Section<'_>, config: &VmConfig, board: &Board) -> bool {
    match section.kind {
        Kind::Machine | Kind::Clock => section.instance == 0,
        Kind::Micro | Kind::Serial | Kind::RealTimeClock | Kind::Virtio => {
            board.sections().contains(&(section.kind, section.instance))
        }
        Kind::Timer => config.irqchip && section.instance == 0,
        Kind::InterruptController => config.irqchip && section.instance < 3,
        Kind::LocalInterruptController => {
            config.irqchip && section.instance < u16::from(config.vcpus)
        }
        _ => section.instance < u16::from(config.vcpus),
    }
}
