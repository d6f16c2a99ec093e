//! Machines without a guest, for the tests of those who deal with machines.

use super::{Activity, Described, Look, Machine, Machines, OnEnd, Shape};
use crate::api::{CommandKind, GuestReport, SectionInfo, VmSpec};
use crate::refusal::Refusal;
use crate::state_dir::VmName;
use limosa_carrier::{CommitError, Guest, GuestError, Running, Saved};
use limosa_engine::Timestamp;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Writers;
use limosa_engine::throttle::Throttle;
use limosa_engine::wire::Start;
use limosa_os::dirty::TrackerKind;
use limosa_os::userfault::PageInstaller;
use limosa_os::{PageKind, SharedMemory};
use limosa_pages::{ByteCount, PageRange, PageSet};
use limosa_vmm::answer::{BalloonInfo, GuestMemory};
use limosa_vmm::config::devices::Mac;
use limosa_vmm::cpu::CpuModel;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A machine that remembers what it was told.
pub struct FakeMachine {
    pid: u32,
    guest: Arc<FakeGuest>,
    misses_pages: AtomicBool,
    ended: Mutex<Option<String>>,
    balloon: Mutex<Option<BalloonInfo>>,
    pub macs: Mutex<Vec<Mac>>,
}

/// The guest of one: it has a phase and nothing else.
pub struct FakeGuest {
    phase: Mutex<Phase>,
    memory: Arc<SharedMemory>,
    is_gone: AtomicBool,
}

impl FakeMachine {
    pub fn new(pid: u32, phase: Phase) -> Arc<Self> {
        let memory = SharedMemory::create(ByteCount::new(2 << 20), PageKind::Small).unwrap();
        let guest = FakeGuest {
            phase: Mutex::new(phase),
            memory: Arc::new(memory),
            is_gone: AtomicBool::new(false),
        };
        Arc::new(Self {
            pid,
            guest: Arc::new(guest),
            misses_pages: AtomicBool::new(false),
            ended: Mutex::new(None),
            balloon: Mutex::new(None),
            macs: Mutex::default(),
        })
    }

    /// Has a guest with that much memory, all of it free, and a driver for its balloon.
    pub fn have_balloon(&self, total: ByteCount) {
        *self.balloon.lock().unwrap() = Some(BalloonInfo {
            has_driver: true,
            target: ByteCount::new(0),
            held: ByteCount::new(0),
            reclaimed: ByteCount::new(0),
            memory: Some(GuestMemory {
                total: Some(total),
                free: Some(total),
                available: None,
            }),
            tellings: 0,
        });
    }

    /// What its balloon is to hold.
    pub fn balloon_target(&self) -> ByteCount {
        self.balloon
            .lock()
            .unwrap()
            .map_or(ByteCount::new(0), |info| info.target)
    }

    /// Its guest gives up 16 MiB more whenever somebody looks, and tells what is free.
    fn step_balloon(&self) -> Option<BalloonInfo> {
        const STEP: u64 = 16 << 20;
        let mut balloon = self.balloon.lock().unwrap();
        let info = balloon.as_mut()?;
        let held = info.target.get().min(info.held.get() + STEP);
        let memory = info.memory.as_mut()?;
        memory.free = Some(ByteCount::new(memory.total?.get() - held));
        info.held = ByteCount::new(held);
        info.tellings += 1;
        Some(*info)
    }

    /// Its page faults are armed, as a restarted daemon finds it.
    pub fn miss_pages(&self) {
        self.misses_pages.store(true, Ordering::SeqCst);
    }

    pub fn phase(&self) -> Phase {
        self.guest.phase.lock().unwrap().clone()
    }

    /// Its process ends, and nobody has noticed yet.
    pub fn die(&self) {
        self.guest.is_gone.store(true, Ordering::SeqCst);
    }

    pub fn end(&self, reason: &str) {
        self.die();
        *self.ended.lock().unwrap() = Some(reason.to_owned());
    }
}

impl Machine for FakeMachine {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn shape(&self) -> Shape {
        Shape {
            memory_bytes: 2 << 20,
            vcpus: 1,
            huge_pages: false,
            dirty_tracker: TrackerKind::default(),
            cpu: CpuModel::default(),
        }
    }

    fn macs(&self) -> Vec<Mac> {
        self.macs.lock().unwrap().clone()
    }

    fn guest(&self) -> Arc<dyn Guest> {
        Arc::clone(&self.guest) as Arc<dyn Guest>
    }

    fn look(&self) -> Result<Look, GuestError> {
        match self.ended() {
            Some(reason) => Err(GuestError(reason)),
            None => Ok(Look {
                phase: self.phase(),
                activity: Activity::Running,
                balloon: self.step_balloon(),
            }),
        }
    }

    fn misses_pages(&self) -> bool {
        self.misses_pages.load(Ordering::SeqCst)
    }

    fn run(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn sections(&self) -> Result<Vec<SectionInfo>, GuestError> {
        Ok(Vec::new())
    }

    fn report(&self) -> GuestReport {
        GuestReport {
            tsc_khz: 0,
            vcpus: Vec::new(),
        }
    }

    fn command(&self, _: CommandKind) -> Result<(), GuestError> {
        Ok(())
    }

    fn set_balloon(&self, _: u64) -> Result<(), GuestError> {
        Err(GuestError("a fake has no balloon".to_owned()))
    }

    fn lend_balloon(&self, least_bytes: u64) -> Result<(), GuestError> {
        if let Some(balloon) = &mut *self.balloon.lock().unwrap() {
            balloon.target = ByteCount::new(least_bytes);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), GuestError> {
        self.end("stopped");
        Ok(())
    }

    fn kill(&self) {
        self.end("killed");
    }

    fn ended(&self) -> Option<String> {
        self.ended.lock().unwrap().clone()
    }
}

impl Guest for FakeGuest {
    fn description(&self) -> Result<Vec<u8>, GuestError> {
        Ok(Vec::new())
    }

    fn memory(&self) -> Arc<SharedMemory> {
        Arc::clone(&self.memory)
    }

    fn start_tracking(&self) -> Result<(), GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn stop_tracking(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn throttle(&self, _: Option<Throttle>) -> Result<(), GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn harvest(&self, _: &mut PageSet) -> Result<Writers, GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn harvests_freely(&self) -> bool {
        true
    }

    fn clear(&self, _: PageRange, _: Vec<PageRange>) -> Result<(), GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn rehearse(&self) -> Result<Saved, GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn pause_and_save(&self, _: Option<PageSet>) -> Result<Saved, GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn resume(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn record(&self, phase: &Phase) -> Result<(), GuestError> {
        let mut own = self.phase.lock().unwrap();
        own.check(phase)
            .map_err(|error| GuestError(error.to_string()))?;
        *own = phase.clone();
        Ok(())
    }

    fn load(&self, _: &[u8], _: bool) -> Result<Duration, GuestError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn installer(&self) -> Option<Arc<PageInstaller>> {
        None
    }

    fn disarm(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }

    fn commit_and_run(
        &self,
        _: MigrationId,
        _: Timestamp,
        _: bool,
    ) -> Result<Running, CommitError> {
        unreachable!("no migration of a fake gets so far")
    }

    fn stop(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// Makes fakes, and finds those that a test has left.
#[derive(Default)]
pub struct FakeMachines {
    pub left: HashMap<String, Arc<FakeMachine>>,
    pub made: Mutex<Vec<Arc<FakeMachine>>>,
    /// Addresses of those that are described.
    pub macs: Mutex<Vec<Mac>>,
}

impl FakeMachines {
    fn make(&self, phase: Phase) -> Arc<dyn Machine> {
        let mut made = self.made.lock().unwrap();
        let machine = FakeMachine::new(1000 + u32::try_from(made.len()).unwrap(), phase);
        made.push(Arc::clone(&machine));
        machine
    }
}

impl Machines for Arc<FakeMachines> {
    fn boot(&self, _: &VmName, _: &VmSpec, _: OnEnd) -> Result<Arc<dyn Machine>, Refusal> {
        Ok(self.make(Phase::Running))
    }

    /// The description is the name.
    fn describe(&self, start: &Start) -> Result<Described, String> {
        let name = VmName::new(&String::from_utf8_lossy(&start.vm))?;
        let differences = Vec::new();
        Ok(Described {
            name,
            differences,
            new_disks: Vec::new(),
            macs: self.macs.lock().unwrap().clone(),
        })
    }

    fn receive(
        &self,
        _: &VmName,
        id: MigrationId,
        _: &Start,
        _: OnEnd,
    ) -> Result<Arc<dyn Machine>, String> {
        Ok(self.make(Phase::Preparing { id }))
    }

    fn attach(&self, name: &VmName, _: OnEnd) -> Result<Option<Arc<dyn Machine>>, String> {
        let left = self.left.get(name.as_str()).map(Arc::clone);
        Ok(left.map(|machine| machine as Arc<dyn Machine>))
    }
}
