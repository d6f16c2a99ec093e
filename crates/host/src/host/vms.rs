//! Requests about virtual machines: make, list, look into, end.

use super::{ABORT_MAX, Host, parse_name};
use crate::api::{BalloonInfo, CommandKind, GuestReport, SectionInfo, VmInfo, VmSpec, VmState};
use crate::machine::{Activity, Machine, OnEnd};
use crate::refusal::Refusal;
use crate::registry::{Hold, Slot, Vm};
use crate::state_dir::VmName;
use limosa_carrier::{GuestError, Listener, Migration};
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::source::Stage;
use limosa_pages::{ByteCount, PageCount};
use limosa_vmm::answer;
use limosa_vmm::config::PC_VCPUS_MAX;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a new guest is watched for a quick death before it counts as started.
const FIRST_SIGN_MAX: Duration = Duration::from_millis(500);

impl Host {
    /// All virtual machines.
    pub fn vms(&self) -> Vec<VmInfo> {
        let slots: Vec<(VmName, Slot)> = self
            .registry()
            .iter()
            .map(|(name, slot)| (name.clone(), slot.clone()))
            .collect();
        slots
            .iter()
            .filter_map(|(name, slot)| self.vm_info(name, slot))
            .collect()
    }

    /// One virtual machine.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn vm(&self, name: &str) -> Result<VmInfo, Refusal> {
        let name = parse_name(name)?;
        let slot = self.registry().get(&name)?.clone();
        self.vm_info(&name, &slot).ok_or_else(|| {
            Refusal::conflict(format!(
                "VM '{name}' is being started or stopped right now: try again"
            ))
        })
    }

    fn vm_info(&self, name: &VmName, slot: &Slot) -> Option<VmInfo> {
        let (shape, ended, vm) = match slot {
            Slot::Reserved => return None,
            Slot::Ended { shape, reason } => (*shape, Some(reason.clone()), None),
            Slot::Alive(vm) => (vm.machine.shape(), None, Some(vm)),
        };
        let mut info = VmInfo {
            name: name.to_string(),
            state: VmState::Ended,
            phase: "ended".to_owned(),
            pid: vm.map_or(0, |vm| vm.machine.pid()),
            memory_bytes: shape.memory_bytes,
            vcpus: shape.vcpus,
            huge_pages: shape.huge_pages,
            dirty_tracker: shape.dirty_tracker,
            dirty_tracker_means: shape.dirty_tracker.consequence().to_owned(),
            cpu: shape.cpu,
            work: None,
            errors: None,
            missing_pages: 0,
            residual_dependency: None,
            balloon: None,
            migration: None,
            ended,
            socket: self.state.vm_socket(name).display().to_string(),
            log: self.state.vm_log(name).display().to_string(),
        };
        if let Some(vm) = vm {
            self.tell_hold(&mut info, vm);
            let report = vm.machine.report();
            if !report.vcpus.is_empty() {
                info.work = Some(report.vcpus.iter().map(|vcpu| vcpu.work).sum());
                info.errors = Some(report.vcpus.iter().map(|vcpu| vcpu.errors).sum());
            }
        }
        Some(info)
    }

    /// Fills in what goes on with a virtual machine. One that a migration holds is not asked: the
    /// request would stand in the migration's way.
    fn tell_hold(&self, info: &mut VmInfo, vm: &Vm) {
        match vm.hold {
            Hold::Here { arrived } => {
                info.migration = arrived.map(|id| id.to_string());
                tell_look(info, &*vm.machine);
            }
            Hold::Filling { id } => {
                info.migration = Some(id.to_string());
                tell_look(info, &*vm.machine);
                self.tell_residue(info, id, &*vm.machine);
            }
            Hold::Leaving { id } => {
                info.migration = id.map(|id| id.to_string());
                info.state = VmState::Migrating;
                info.phase = "migrating".to_owned();
                let running = id.and_then(|id| self.migrations_lock().running(id).ok()?);
                let Some(migration) = running else { return };
                let status = migration.status();
                if let Some(reason) = status.unresolved {
                    info.state = VmState::Unresolved;
                    info.phase = reason;
                } else if status.stage == Stage::Serving {
                    let unsent = pages(status.unsent_pages.get());
                    info.phase = format!("runs at the target and still needs {unsent} from here");
                }
            }
            Hold::Arriving { id } => {
                info.migration = Some(id.to_string());
                info.state = VmState::Arriving;
                info.phase = Phase::Preparing { id }.to_string();
            }
        }
    }

    /// Fills in what a guest misses that runs without all its pages, and where that is.
    fn tell_residue(&self, info: &mut VmInfo, id: MigrationId, machine: &dyn Machine) {
        let incoming = self.peers.get().map(Listener::incoming).unwrap_or_default();
        let session = incoming.into_iter().find(|status| status.id == id);
        info.missing_pages = match &session {
            Some(status) => status.missing_pages,
            None => machine
                .guest()
                .installer()
                .map_or(0, |installer| installer.missing_count().get()),
        };
        let missing = pages(info.missing_pages);
        let is_connected = session.as_ref().is_some_and(|status| status.is_connected);
        let place = match session.as_ref().and_then(|status| status.from) {
            Some(from) if is_connected => format!("at its source, {}", from.ip()),
            Some(from) => format!("at its source, {}, which is not connected", from.ip()),
            None => "at its source, which has not come back yet".to_owned(),
        };
        let stuck = session.and_then(|status| status.stuck);
        let stuck = stuck.map_or_else(String::new, |stuck| format!(", and {stuck}"));
        info.residual_dependency = Some(format!(
            "running with residual dependency: {missing} are still {place}{stuck}"
        ));
    }

    /// Makes a virtual machine and starts it.
    ///
    /// # Errors
    /// The request is wrong, the host cannot, or the guest gave up at once.
    pub fn run(&self, spec: &VmSpec) -> Result<VmInfo, Refusal> {
        let name = VmName::new(&spec.name).map_err(Refusal::bad_request)?;
        if !(1..=PC_VCPUS_MAX).contains(&spec.vcpus) {
            return Err(Refusal::bad_request(format!(
                "{} vCPUs are not possible: give 1 to {PC_VCPUS_MAX}",
                spec.vcpus
            )));
        }
        check_observer(spec.observer.as_deref())?;
        self.registry().reserve(&name)?;
        self.records.forget(&name);
        match self.boot(&name, spec) {
            Ok(machine) => {
                tracing::info!(vm = %name, pid = machine.pid(), "started");
                self.registry()
                    .fill(&name, machine, Hold::Here { arrived: None });
                self.vm(name.as_str())
            }
            Err(refusal) => {
                self.registry().remove(&name);
                Err(refusal)
            }
        }
    }

    fn boot(&self, name: &VmName, spec: &VmSpec) -> Result<Arc<dyn Machine>, Refusal> {
        let log = self.state.vm_log(name);
        let said_before = log.metadata().map_or(0, |log| log.len());
        let machine = self.machines.boot(name, spec, self.on_end(name))?;
        let is_free = self.registry().check_macs(&machine.macs());
        let run = |()| {
            let run = machine.run();
            run.map_err(|error| Refusal::failed(format!("the guest cannot start: {error}")))
        };
        let started = is_free.and_then(run).and_then(|()| {
            first_sign(&*machine).map_err(|how| {
                let words = last_words(&log, said_before).unwrap_or(how);
                Refusal::bad_request(format!("VM '{name}' ended at once: {words}"))
            })
        });
        if let Err(refusal) = started {
            machine.kill();
            return Err(refusal);
        }
        Ok(machine)
    }

    /// What a VM process that ends tells the registry.
    pub(crate) fn on_end(&self, name: &VmName) -> OnEnd {
        let (me, name) = (self.me.clone(), name.clone());
        Box::new(move |pid, reason| {
            if let Some(host) = me.upgrade()
                && host.registry().process_ended(&name, pid, reason)
            {
                tracing::warn!(vm = %name, pid, reason, "a VM has ended by itself");
            }
        })
    }

    /// Ends a virtual machine, or removes one that ended.
    ///
    /// # Errors
    /// There is none, a migration holds it, or its process does not end.
    pub fn stop(&self, name: &str, force: bool) -> Result<(), Refusal> {
        let name = parse_name(name)?;
        if !matches!(self.registry().get(&name)?, Slot::Ended { .. }) {
            self.free(&name, force)?;
        }
        let slot = self.registry().begin_removal(&name)?;
        let Slot::Alive(vm) = &slot else {
            // A process that died left its socket.
            drop(fs::remove_file(self.state.vm_socket(&name)));
            self.give_up_asking(&name);
            self.records.forget(&name);
            self.registry().remove(&name);
            return Ok(());
        };
        let is_lost = self.tell_source_of_stop(vm.hold);
        if let Err(error) = vm.machine.stop() {
            if !force && !is_lost && vm.machine.ended().is_none() {
                self.registry().put_back(&name, slot);
                return Err(Refusal::failed(format!(
                    "VM '{name}' does not stop ({error}): 'limosa stop --force {name}' kills it"
                )));
            }
            vm.machine.kill();
        }
        self.records.forget(&name);
        self.registry().remove(&name);
        tracing::info!(vm = %name, "stopped");
        Ok(())
    }

    /// Before a guest that misses pages is stopped: its source learns why it needs no more. True if it does.
    fn tell_source_of_stop(&self, hold: Hold) -> bool {
        let Hold::Filling { id } = hold else {
            return false;
        };
        let reason = "it was stopped at the target before all its pages were there";
        let peers = self.peers.get();
        peers.is_some_and(|peers| peers.give_up(id, reason))
    }

    /// Sees to it that no migration holds a virtual machine.
    fn free(&self, name: &VmName, force: bool) -> Result<(), Refusal> {
        let hold = self.registry().alive(name)?.hold;
        let id = match hold {
            Hold::Leaving { id: Some(id) } => id,
            Hold::Filling { .. } => return Ok(()),
            _ => return self.registry().resident(name).map(drop),
        };
        let running = self.migrations_lock().running(id)?;
        let serves = |migration: &Arc<Migration>| migration.status().stage == Stage::Serving;
        if running.as_ref().is_some_and(serves) {
            return Err(Refusal::conflict(format!(
                "VM '{name}' runs at the target and needs pages from here: 'limosa drain {name}' sends \
                 them, then nothing of it is left here"
            )));
        }
        if !force {
            return self.registry().resident(name).map(drop);
        }
        let Some(migration) = running else {
            return Ok(());
        };
        if migration.abort().is_ok() {
            migration.wait(ABORT_MAX);
            return self.registry().resident(name).map(drop);
        }
        // Handed over, and nobody answers: the operator decides that it is lost here.
        if let Slot::Alive(vm) = self.registry().get(name)?.clone() {
            vm.machine.kill();
        }
        migration.wait(ABORT_MAX);
        Ok(())
    }

    /// The parts of the state of a virtual machine.
    ///
    /// # Errors
    /// It is not resident, or its process does not answer.
    pub fn inspect(&self, name: &str) -> Result<Vec<SectionInfo>, Refusal> {
        let name = parse_name(name)?;
        let machine = self.registry().resident(&name)?;
        machine.sections().map_err(|error| silent(&name, &error))
    }

    /// Has a guest give up memory, or take it back, and tells how it stands at the beginning.
    ///
    /// # Errors
    /// It is not resident, has no balloon, or that is too much.
    pub fn set_balloon(&self, name: &str, target_bytes: u64) -> Result<VmInfo, Refusal> {
        let parsed = parse_name(name)?;
        let machine = self.registry().resident(&parsed)?;
        let set = machine.set_balloon(target_bytes);
        set.map_err(|error| Refusal::bad_request(error.to_string()))?;
        self.vm(name)
    }

    /// What a micro guest says about itself.
    ///
    /// # Errors
    /// There is no such virtual machine.
    pub fn guest(&self, name: &str) -> Result<GuestReport, Refusal> {
        let name = parse_name(name)?;
        let machine = Arc::clone(&self.registry().alive(&name)?.machine);
        Ok(machine.report())
    }

    /// Gives a micro guest a command.
    ///
    /// # Errors
    /// There is no such virtual machine, or its process does not answer.
    pub fn command(&self, name: &str, kind: CommandKind) -> Result<(), Refusal> {
        let name = parse_name(name)?;
        let machine = Arc::clone(&self.registry().alive(&name)?.machine);
        machine.command(kind).map_err(|error| silent(&name, &error))
    }
}

/// Asks a VM process how it is.
fn tell_look(info: &mut VmInfo, machine: &dyn Machine) {
    match machine.look() {
        Ok(look) => {
            info.phase = look.phase.to_string();
            info.balloon = look.balloon.as_ref().map(balloon);
            info.state = match look.activity {
                Activity::Running => VmState::Running,
                Activity::Paused => VmState::Paused,
                Activity::Ended { .. } => VmState::Ended,
            };
            if let Activity::Ended { reason } = look.activity {
                info.ended = Some(reason);
            }
        }
        Err(error) => {
            info.ended = machine.ended();
            info.state = if info.ended.is_some() {
                VmState::Ended
            } else {
                VmState::Silent
            };
            info.phase = error.to_string();
        }
    }
}

fn balloon(info: &answer::BalloonInfo) -> BalloonInfo {
    let memory = info.memory.unwrap_or_default();
    let bytes = |count: Option<ByteCount>| count.map(ByteCount::get);
    BalloonInfo {
        has_driver: info.has_driver,
        target_bytes: info.target.get(),
        held_bytes: info.held.get(),
        reclaimed_bytes: info.reclaimed.get(),
        guest_total_bytes: bytes(memory.total),
        guest_free_bytes: bytes(memory.free),
        guest_available_bytes: bytes(memory.available),
    }
}

/// So many pages, and what they come to.
fn pages(number: u64) -> String {
    let pages = PageCount::new(number);
    format!("{pages} ({})", pages.bytes())
}

fn silent(name: &VmName, error: &GuestError) -> Refusal {
    Refusal::failed(format!("VM '{name}' does not do it: {error}"))
}

/// Heartbeats stay on this machine, whoever asks for them.
fn check_observer(observer: Option<&str>) -> Result<(), Refusal> {
    let Some(text) = observer else { return Ok(()) };
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Ok(()),
        Ok(_) => Err(Refusal::bad_request(format!(
            "the observer {text} is another machine: give an address of the loopback"
        ))),
        Err(_) => Err(Refusal::bad_request(format!(
            "{text:?} is not an observer: give IP:PORT"
        ))),
    }
}

/// Waits a moment for a guest that gives up at once, over its arguments for example: the operator
/// shall hear it as the answer to the request. Fails with how it ended.
fn first_sign(machine: &dyn Machine) -> Result<(), String> {
    let begun = Instant::now();
    let mut has_failed = false;
    while begun.elapsed() < FIRST_SIGN_MAX {
        let report = machine.report();
        if report
            .vcpus
            .iter()
            .any(|vcpu| vcpu.state == "ready" || vcpu.state == "done")
        {
            return Ok(());
        }
        // One that gave up still has to say why.
        has_failed |= report.vcpus.iter().any(|vcpu| vcpu.state == "failed");
        match machine.look() {
            Ok(look) => {
                if let Activity::Ended { reason } = look.activity {
                    return Err(reason);
                }
            }
            Err(error) => return Err(machine.ended().unwrap_or_else(|| error.to_string())),
        }
        thread::sleep(Duration::from_millis(5));
    }
    if has_failed {
        Err("the guest gave up".to_owned())
    } else {
        Ok(())
    }
}

/// What a guest said last, from the log of its VM process behind `offset`.
fn last_words(log: &Path, offset: u64) -> Option<String> {
    const WORDS_BYTES_MAX: u64 = 64 << 10;
    let mut file = File::open(log).ok()?;
    file.seek(SeekFrom::Start(offset)).ok()?;
    let mut bytes = Vec::new();
    file.take(WORDS_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let line = text
        .lines()
        .filter_map(|line| line.split_once("console="))
        .next_back()?
        .1;
    let words = line.trim().trim_matches('"');
    Some(
        words
            .chars()
            .filter(|char| !char.is_control())
            .take(300)
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_of_a_guest_are_those_of_this_one() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let old = "INFO the guest says console=\"an older one\"\n";
        fs::write(&log, old).unwrap();
        let offset = old.len() as u64;
        assert_eq!(last_words(&log, offset), None);
        let new =
            "INFO made\nINFO the guest says vm=\"a\" console=\"ws=lots is no size\"\nINFO ends\n";
        fs::write(&log, old.to_owned() + new).unwrap();
        assert_eq!(
            last_words(&log, offset).as_deref(),
            Some("ws=lots is no size")
        );
    }

    #[test]
    fn heartbeats_stay_on_this_machine() {
        assert!(check_observer(None).is_ok());
        assert!(check_observer(Some("127.0.0.1:9")).is_ok());
        assert!(check_observer(Some("[::1]:9")).is_ok());
        assert!(check_observer(Some("192.0.2.1:9")).is_err());
        assert!(check_observer(Some("localhost")).is_err());
    }
}
