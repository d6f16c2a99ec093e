//! The thread of one vCPU: waits for an order, carries it out, answers.
//!
//! While the guest runs, the thread looks at nothing but its exits and the flag that says *halt*. An
//! access to a port is completed by the next entry, so a vCPU that is to halt with one pending
//! enters once more with the flag set that lets it return before the next instruction.

use super::MachineError;
use super::pace::Pace;
use super::seat::Shared;
use super::time::ClockPair;
use super::vcpu_state::{self, Fixed, Resume, SavedVcpu, VcpuState};
use crate::answer::{ExitReason, RefusedMsr};
use crate::board::{AfterOut, Answer, Ports, Wake};
use crate::boot::{Start, linux, micro, pvh};
use crate::protocol::in_one_line;
use limosa_micro_abi::port::{WAIT_LOOK_AGAIN, WAIT_TIME_OVER};
use limosa_os::kvm::{Exit, KvmError, Vcpu, VcpuPart, kvm_regs, kvm_sregs};
use limosa_os::thread::{self as os_thread, ThreadId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// Most entries that complete one access: a 64-byte access to memory that is not there takes eight.
const COMPLETIONS_MAX: u32 = 64;

/// What a vCPU thread is told.
#[derive(Debug)]
pub(super) enum Order {
    /// Say which thread it is.
    Name,
    /// Take the registers of the guest's first instruction.
    Boot(Start),
    /// Save.
    Save,
    /// Take this state.
    Load(Box<VcpuState>),
    /// Run until halted; after a load, with clocks that went on. Not answered: it is seen that the
    /// vCPU has entered the guest.
    Run(Option<StartAt>),
    /// End the thread.
    End,
}

/// When the guest stopped elsewhere, in terms of this host's clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartAt {
    pub(super) stopped_at: u64,
    pub(super) pair: ClockPair,
}

/// What it answers.
#[derive(Debug)]
pub(super) enum Reply {
    Name(ThreadId),
    Done(Result<(), MachineError>),
    Saved(Result<SavedVcpu, MachineError>),
    Loaded(Result<Vec<RefusedMsr>, MachineError>),
}

impl Reply {
    pub(super) fn into_name(self) -> ThreadId {
        match self {
            Self::Name(id) => id,
            other => unreachable!("a vCPU thread answered with {other:?}"),
        }
    }

    pub(super) fn into_done(self) -> Result<(), MachineError> {
        match self {
            Self::Done(result) => result,
            other => unreachable!("a vCPU thread answered with {other:?}"),
        }
    }

    pub(super) fn into_saved(self) -> Result<SavedVcpu, MachineError> {
        match self {
            Self::Saved(result) => result,
            other => unreachable!("a vCPU thread answered with {other:?}"),
        }
    }

    pub(super) fn into_loaded(self) -> Result<Vec<RefusedMsr>, MachineError> {
        match self {
            Self::Loaded(result) => result,
            other => unreachable!("a vCPU thread answered with {other:?}"),
        }
    }
}

/// What the thread of a vCPU owns.
#[derive(Debug)]
pub(super) struct VcpuThread {
    pub(super) index: u8,
    pub(super) vcpu: Vcpu,
    pub(super) ports: Ports,
    pub(super) shared: Arc<Shared>,
    pub(super) fixed: Fixed,
    pub(super) resume: Resume,
}

/// How a run ended.
struct Stop {
    /// When the vCPU had executed its last instruction.
    at: u64,
    /// Whether an access is complete, so that the vCPU can be saved.
    is_complete: bool,
}

impl VcpuThread {
    /// Carries out orders until the last one.
    pub(super) fn serve(
        mut self,
        orders: &Receiver<(u64, Order)>,
        replies: &Sender<(u64, u8, Reply)>,
        entered_at: &AtomicU64,
    ) {
        if let Err(error) = os_thread::set_precise_waits() {
            tracing::warn!(%error, "waits of the guest will be imprecise");
        }
        // Threads inherit their share of the processor, and whoever started this one may have more.
        if let Err(error) = ThreadId::current().set_nice(0) {
            tracing::warn!(%error, "the guest gets another share of the processor than it should");
        }
        let mut stop = Stop {
            at: limosa_os::monotonic_nanos(),
            is_complete: true,
        };
        while let Ok((ticket, order)) = orders.recv() {
            let is_save = matches!(order, Order::Save);
            let reply = match order {
                Order::Name => Reply::Name(ThreadId::current()),
                Order::Boot(start) => Reply::Done(self.boot(start).map_err(MachineError::from)),
                Order::Save => Reply::Saved(self.save(&stop)),
                Order::Load(state) => Reply::Loaded(self.load(*state)),
                Order::Run(at) => {
                    if let Err(error) = self.prepare(at) {
                        self.fail(in_one_line(&error));
                    }
                    // The guest itself is as urgent as everything else. Here too, since its owner
                    // may have made the thread urgent when it had saved already.
                    be_ordinary();
                    stop = self.run(entered_at);
                    continue;
                }
                Order::End => return,
            };
            if replies.send((ticket, self.index, reply)).is_err() {
                return;
            }
            if is_save {
                be_ordinary();
            }
        }
    }

    fn boot(&self, start: Start) -> Result<(), KvmError> {
        match start {
            Start::Micro { entry } => self.boot_micro(entry),
            // KVM lets the others wait for the start signal of the first one.
            Start::Linux { .. } | Start::Pvh { .. } if self.index > 0 => Ok(()),
            Start::Linux { entry } => {
                self.boot_kernel(linux::set_special_registers, &linux::registers(entry))
            }
            Start::Pvh { entry } => {
                self.boot_kernel(pvh::set_special_registers, &pvh::registers(entry))
            }
        }
    }

    fn boot_kernel(
        &self,
        set_special: fn(&mut kvm_sregs),
        registers: &kvm_regs,
    ) -> Result<(), KvmError> {
        let mut special = self.vcpu.special_registers()?;
        set_special(&mut special);
        self.vcpu.set_special_registers(&special)?;
        let part = VcpuPart::InterruptController;
        let mut controller = vec![0; self.vcpu.part_bytes(part)];
        self.vcpu.read_part(part, &mut controller)?;
        linux::set_local_lines(&mut controller);
        self.vcpu.write_part(part, &controller)?;
        self.vcpu.write_msrs(&linux::MSRS)?;
        self.vcpu.set_registers(registers)
    }

    fn boot_micro(&self, entry: u64) -> Result<(), KvmError> {
        let mut special = self.vcpu.special_registers()?;
        micro::set_special_registers(&mut special);
        self.vcpu.set_special_registers(&special)?;
        if self.fixed.has_irqchip {
            // With interrupt controllers, KVM lets all but the first one wait for a start signal.
            let runnable = 0u32.to_le_bytes();
            self.vcpu.write_part(VcpuPart::RunState, &runnable)?;
        }
        self.vcpu
            .set_registers(&micro::registers(entry, self.index))
    }

    fn save(&self, stop: &Stop) -> Result<SavedVcpu, MachineError> {
        if !stop.is_complete {
            return Err(MachineError::Endless { vcpu: self.index });
        }
        vcpu_state::save(self.index, &self.vcpu, &self.ports, &self.fixed, stop.at)
    }

    fn load(&mut self, state: VcpuState) -> Result<Vec<RefusedMsr>, MachineError> {
        state.load(
            self.index,
            &self.vcpu,
            &mut self.ports,
            &mut self.fixed,
            &mut self.resume,
        )
    }

    fn prepare(&mut self, at: Option<StartAt>) -> Result<(), KvmError> {
        match at {
            Some(at) => self
                .resume
                .apply(&self.vcpu, &self.fixed, at.stopped_at, at.pair),
            None => Ok(()),
        }
    }

    /// Runs the guest until it is to halt and nothing is pending.
    fn run(&mut self, entered_at: &AtomicU64) -> Stop {
        let kicker = self.vcpu.kicker();
        let shared = Arc::clone(&self.shared);
        let mut pace = Pace::new(&shared);
        let mut stop = Stop {
            at: limosa_os::monotonic_nanos(),
            is_complete: true,
        };
        let mut completions = 0;
        entered_at.store(stop.at, Ordering::SeqCst);
        loop {
            let is_halting = self.shared.is_halting();
            if is_halting {
                if stop.is_complete || completions == COMPLETIONS_MAX {
                    return stop;
                }
                completions += 1;
                kicker.hold();
            } else {
                pace.before_entry(&self.vcpu);
            }
            let exit = self.vcpu.run();
            if !is_halting {
                stop.at = limosa_os::monotonic_nanos();
                pace.after_exit(stop.at);
            }
            stop.is_complete = false;
            match exit {
                Exit::Interrupted => {
                    stop.is_complete = true;
                    // Perhaps for another throttle. Who is to halt is told so before the kick, and
                    // sees that before the next entry.
                    kicker.release();
                }
                Exit::RingFull => {
                    stop.is_complete = true;
                    if let Err(error) = self.vcpu.empty_rings() {
                        self.fail(in_one_line(&error));
                        return stop;
                    }
                }
                Exit::PortIn(port, bytes) => {
                    let answer = match self.ports.read(port) {
                        Answer::Word(word) => word,
                        Answer::Wait(time) => {
                            wait(time, self.ports.wake(), &self.shared, &mut stop.at)
                        }
                    };
                    fill(bytes, answer);
                }
                Exit::PortOut(port, bytes) => {
                    if let AfterOut::End(reason) = self.ports.write(port, bytes) {
                        self.shared.end(reason);
                        return stop;
                    }
                }
                Exit::MmioRead(address, bytes) => self.ports.read_memory(address, bytes),
                Exit::MmioWrite(address, bytes) => self.ports.write_memory(address, bytes),
                end @ (Exit::Shutdown | Exit::Halted | Exit::Failed(_)) => {
                    shared.end(reason(end, self.index));
                    return stop;
                }
            }
        }
    }

    fn fail(&self, what: String) {
        self.shared.end(ExitReason::Failed {
            vcpu: self.index,
            what,
        });
    }
}

/// Why a machine ends whose vCPU left the guest for good.
fn reason(end: Exit<'_>, vcpu: u8) -> ExitReason {
    match end {
        Exit::Shutdown => ExitReason::TripleFault { vcpu },
        Exit::Halted => ExitReason::Halted { vcpu },
        Exit::Failed(what) => ExitReason::Failed { vcpu, what },
        other => unreachable!("{other:?} is no end"),
    }
}

fn be_ordinary() {
    if let Err(error) = ThreadId::current().set_urgent(false) {
        tracing::error!(%error, "a vCPU's thread stays urgent");
    }
}

/// Holds the vCPU until the time is over, a device has something for it, or it is to halt; the guest's
/// answer. A guest that waits has stopped when its wait was cut short.
fn wait(time: Duration, wake: Option<&Wake>, shared: &Shared, stopped_at: &mut u64) -> u32 {
    let end = Instant::now() + time;
    if let Some(wake) = wake {
        wake.attend();
    }
    loop {
        if shared.is_halting() {
            *stopped_at = limosa_os::monotonic_nanos();
            return WAIT_LOOK_AGAIN;
        }
        if wake.is_some_and(Wake::take) {
            return WAIT_LOOK_AGAIN;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return WAIT_TIME_OVER;
        }
        thread::park_timeout(left);
    }
}

/// Answers each element of a port read: one for `in`, several for its string form.
fn fill(bytes: &mut [u8], word: u32) {
    for element in bytes.chunks_mut(4) {
        let len = element.len();
        element.copy_from_slice(&word.to_le_bytes()[..len]);
    }
}
