//! What this host does for guests that arrive from other hosts.
//!
//! The VM process of an arriving guest records the commit itself; the ledger keeps the answer for
//! the time after the guest has moved on or ended. An attempt that it knows is never begun again.
//!
//! A guest that runs without all its pages needs its source: the answer *needs* is given only while
//! its process lives, and *gone* from the moment on at which it does not.

use crate::host::Host;
use crate::ledger::Note;
use crate::machine::Described;
use crate::refusal::Refusal;
use crate::registry::Hold;
use limosa_carrier::{Demanded, Guest, TargetHost};
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::target::TargetOutcome;
use limosa_engine::wire::Start;
use std::sync::Arc;

/// A host as other hosts see it.
pub struct Arrivals(pub Arc<Host>);

impl TargetHost for Arrivals {
    fn create(&self, id: MigrationId, start: &Start) -> Result<Arc<dyn Guest>, String> {
        let host = &self.0;
        host.check_not_ending().map_err(|refusal| refusal.message)?;
        if host.ledger().look_up(id).is_some() {
            return Err("this migration has ended before: start a new one".to_owned());
        }
        let Described {
            name,
            differences,
            new_disks,
            macs,
        } = host.machines().describe(start)?;
        if !differences.is_empty() {
            return Err(differences.join("; "));
        }
        let is_free = host.registry().check_macs(&macs);
        is_free.map_err(|refusal| refusal.message)?;
        // Of as many pages as the machine has, which was just checked.
        let demanded = Demanded::decode(&start.demanded, start.memory_pages)
            .map_err(|error| error.to_string())?;
        host.registry()
            .reserve(&name)
            .map_err(|refusal| refusal.message)?;
        let made = host.new_disks().make(id, &new_disks).and_then(|()| {
            let machines = host.machines();
            machines.receive(&name, id, start, host.on_end(&name))
        });
        match made {
            Ok(machine) => {
                let guest = machine.guest();
                tracing::info!(migration_id = %id, vm = %name, pid = machine.pid(), "a guest arrives");
                host.registry().fill(&name, machine, Hold::Arriving { id });
                host.records().keep(&name, &demanded);
                Ok(guest)
            }
            Err(reason) => {
                host.new_disks().remove(id);
                host.registry().remove(&name);
                // The operator at the source reads it.
                Err(Refusal::failed(reason).message)
            }
        }
    }

    fn differences(&self, start: &Start) -> Vec<String> {
        let host = &self.0;
        let described = match host.machines().describe(start) {
            Ok(described) => described,
            Err(reason) => return vec![reason],
        };
        let registry = host.registry();
        let name = registry.check_free(&described.name).err();
        let macs = registry.check_macs(&described.macs).err();
        let taken = name.into_iter().chain(macs);
        let taken = taken.map(|refusal| refusal.message);
        described.differences.into_iter().chain(taken).collect()
    }

    fn running(&self, id: MigrationId, is_filling: bool) {
        // Until now the VM process alone remembered it; from here on the ledger does, too, so that
        // the answer outlives the guest's stay.
        if let Err(error) = self.0.ledger().note_running(id, is_filling) {
            tracing::warn!(migration_id = %id, %error, "an arrival could not be noted in the ledger");
        }
        self.0.new_disks().keep(id);
        self.hold(
            id,
            if is_filling {
                Hold::Filling { id }
            } else {
                Hold::Here { arrived: Some(id) }
            },
        );
    }

    fn filled(&self, id: MigrationId, asked_for: Demanded) {
        if let Err(error) = self.0.ledger().note_running(id, false) {
            tracing::warn!(migration_id = %id, %error, "it could not be noted in the ledger that all pages are here");
        }
        self.record(id, &asked_for);
        self.hold(id, Hold::Here { arrived: Some(id) });
    }

    fn finished(&self, id: MigrationId, outcome: &TargetOutcome) {
        match outcome {
            TargetOutcome::Completed => self.hold(id, Hold::Here { arrived: None }),
            // With pages missing it stays what it is: whatever ended the session brought none.
            TargetOutcome::Unconfirmed if self.is_filling(id) => {}
            TargetOutcome::Unconfirmed => self.hold(id, Hold::Here { arrived: Some(id) }),
            TargetOutcome::Lost { reason } => {
                tracing::warn!(migration_id = %id, reason, "a guest is lost before all its pages had come");
                self.lose(id, reason);
            }
            TargetOutcome::Dropped { reason } => {
                tracing::info!(migration_id = %id, reason, "a guest did not arrive");
                self.drop_arrival(id);
            }
        }
    }

    fn resolve(&self, id: MigrationId) -> Resolution {
        let hold = self
            .0
            .registry()
            .arrival(id)
            .filter(|(_, vm)| vm.machine.ended().is_none())
            .map(|(_, vm)| vm.hold);
        let note = self.0.ledger().look_up(id);
        match hold {
            Some(Hold::Here { .. }) => Resolution::Runs,
            // All pages may have come just now.
            Some(Hold::Filling { .. }) if note != Some(Note::Ran) => Resolution::Needs,
            _ => self.0.ledger().resolve(id),
        }
    }

    fn confirmed(&self, id: MigrationId) {
        let arrival = self
            .0
            .registry()
            .arrival(id)
            // A source cannot be done with a guest that still needs it, whatever it says.
            .filter(|(_, vm)| matches!(vm.hold, Hold::Here { .. }))
            .map(|(_, vm)| Arc::clone(&vm.machine));
        let Some(machine) = arrival else { return };
        match machine.guest().record(&Phase::Running) {
            Ok(()) => self.hold(id, Hold::Here { arrived: None }),
            // It stays Arrived, which only means that its attempt is still remembered.
            Err(error) => {
                tracing::warn!(migration_id = %id, %error, "a confirmed arrival could not be recorded")
            }
        }
    }
}

impl Arrivals {
    fn hold(&self, id: MigrationId, hold: Hold) {
        let mut registry = self.0.registry();
        let Some(name) = registry.arrival(id).map(|(name, _)| name.clone()) else {
            return;
        };
        registry.hold(&name, hold);
        let ended = registry
            .alive(&name)
            .ok()
            .and_then(|vm| Some((vm.machine.pid(), vm.machine.ended()?)));
        // Its process may have ended while it was still arriving and the watcher let it be.
        if let Some((pid, reason)) = ended {
            registry.process_ended(&name, pid, &reason);
        }
    }

    /// Adds what the guest of `id` asked for here to what earlier moves have recorded.
    fn record(&self, id: MigrationId, asked_for: &Demanded) {
        let arrival = self
            .0
            .registry()
            .arrival(id)
            .map(|(name, vm)| (name.clone(), Arc::clone(&vm.machine)));
        let Some((name, machine)) = arrival else {
            return;
        };
        let memory = machine.guest().memory().page_count();
        let records = self.0.records();
        records.keep(&name, &asked_for.after(&records.of(&name, memory), memory));
    }

    fn is_filling(&self, id: MigrationId) -> bool {
        let registry = self.0.registry();
        let arrival = registry.arrival(id);
        arrival.is_some_and(|(_, vm)| matches!(vm.hold, Hold::Filling { .. }))
    }

    /// Remembers that the guest of `id` ended without all its pages, and ends what is left of it: its
    /// vCPUs would only wait for pages that never come.
    fn lose(&self, id: MigrationId, reason: &str) {
        if let Err(error) = self.0.ledger().note_gone(id) {
            tracing::warn!(migration_id = %id, %error, "a lost guest could not be noted in the ledger");
        }
        let lost = self.0.registry().lose_arrival(id, reason);
        if let Some(machine) = lost {
            machine.kill();
        }
    }

    /// Forgets a guest that never ran here, and ends what was made for it.
    fn drop_arrival(&self, id: MigrationId) {
        let host = &self.0;
        let Some((name, machine)) = host.registry().take_arrival(id) else {
            return;
        };
        machine.kill();
        host.new_disks().remove(id);
        host.records().forget(&name);
        host.registry().remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::VmState;
    use crate::ledger::Ledger;
    use crate::machine::Machine;
    use crate::machine::fake::FakeMachines;
    use crate::state_dir::{StateDir, VmName};
    use limosa_engine::policy::Mode;
    use limosa_pages::PageCount;
    use limosa_vmm::config::devices::Mac;

    const ONE: MigrationId = MigrationId(1);
    const TWO: MigrationId = MigrationId(2);

    fn arrivals() -> (Arrivals, Arc<FakeMachines>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let machines = Arc::new(FakeMachines::default());
        let ledger = Ledger::open(&state.ledger()).unwrap();
        let host = Host::new(state, Box::new(Arc::clone(&machines)), ledger, None);
        (Arrivals(host), machines, dir)
    }

    fn start(name: &str) -> Start {
        Start {
            mode: Mode::PreCopy,
            memory_pages: PageCount::new(512),
            streams: 1,
            verify: false,
            disks: Vec::new(),
            vm: name.as_bytes().to_vec(),
            demanded: Vec::new(),
        }
    }

    fn states(arrivals: &Arrivals) -> Vec<(String, VmState)> {
        arrivals
            .0
            .vms()
            .into_iter()
            .map(|vm| (vm.name, vm.state))
            .collect()
    }

    #[test]
    fn a_guest_that_arrives_is_at_home() {
        let (arrivals, machines, _dir) = arrivals();
        let guest = arrivals.create(ONE, &start("web")).unwrap();
        assert_eq!(states(&arrivals), [("web".to_owned(), VmState::Arriving)]);
        assert!(arrivals.0.inspect("web").is_err(), "it is not here yet");
        guest.record(&Phase::Arrived { id: ONE }).unwrap();
        arrivals.running(ONE, false);
        assert_eq!(states(&arrivals), [("web".to_owned(), VmState::Running)]);
        assert_eq!(
            arrivals.0.vm("web").unwrap().migration,
            Some(ONE.to_string())
        );
        assert_eq!(arrivals.resolve(ONE), Resolution::Runs);
        guest.record(&Phase::Running).unwrap();
        arrivals.finished(ONE, &TargetOutcome::Completed);
        assert_eq!(arrivals.0.vm("web").unwrap().migration, None);
        assert_eq!(machines.made.lock().unwrap()[0].ended(), None);
    }

    #[test]
    fn two_guests_do_not_have_the_same_address() {
        let (arrivals, machines, _dir) = arrivals();
        arrivals.create(ONE, &start("web")).map(drop).unwrap();
        let mac = Mac::of("web", 0);
        *machines.made.lock().unwrap()[0].macs.lock().unwrap() = vec![mac];
        *machines.macs.lock().unwrap() = vec![Mac::of("db", 0), mac];
        let expect = format!("the network address {mac} is that of VM 'web' on this host");
        let refused = arrivals.create(TWO, &start("db")).map(drop).unwrap_err();
        assert!(refused.starts_with(&expect), "{refused}");
        let differences = arrivals.differences(&start("db"));
        assert_eq!(differences.len(), 1);
        assert!(differences[0].starts_with(&expect), "{differences:?}");
        *machines.macs.lock().unwrap() = vec![Mac::of("db", 0)];
        arrivals.create(TWO, &start("db")).map(drop).unwrap();
    }

    #[test]
    fn a_guest_that_does_not_arrive_leaves_nothing() {
        let (arrivals, machines, _dir) = arrivals();
        arrivals.create(ONE, &start("web")).map(drop).unwrap();
        let refused = arrivals.create(TWO, &start("web")).map(drop).unwrap_err();
        assert!(refused.contains("a VM named 'web' exists"), "{refused}");
        arrivals.finished(
            ONE,
            &TargetOutcome::Dropped {
                reason: "aborted".to_owned(),
            },
        );
        assert_eq!(states(&arrivals), []);
        assert_eq!(
            machines.made.lock().unwrap()[0].ended().as_deref(),
            Some("killed")
        );
        arrivals.create(TWO, &start("web")).map(drop).unwrap();
    }

    #[test]
    fn a_guest_that_misses_pages_needs_its_source_until_it_has_them() {
        let (arrivals, machines, _dir) = arrivals();
        let guest = arrivals.create(ONE, &start("web")).unwrap();
        guest.record(&Phase::Arrived { id: ONE }).unwrap();
        arrivals.running(ONE, true);
        assert_eq!(states(&arrivals), [("web".to_owned(), VmState::Running)]);
        let told = arrivals.0.vm("web").unwrap().residual_dependency.unwrap();
        assert!(told.contains("running with residual dependency"), "{told}");
        assert_eq!(arrivals.resolve(ONE), Resolution::Needs);
        let refusal = arrivals.0.inspect("web").unwrap_err();
        assert!(refusal.message.contains("limosa drain web"), "{refusal}");
        arrivals.confirmed(ONE);
        assert_eq!(arrivals.resolve(ONE), Resolution::Needs, "not yet done");
        let phase = machines.made.lock().unwrap()[0].phase();
        assert_eq!(phase, Phase::Arrived { id: ONE });

        arrivals.filled(ONE, Demanded::default());
        assert_eq!(arrivals.resolve(ONE), Resolution::Runs);
        assert_eq!(arrivals.0.vm("web").unwrap().residual_dependency, None);
        arrivals.confirmed(ONE);
        assert_eq!(arrivals.0.vm("web").unwrap().migration, None);
    }

    #[test]
    fn a_guest_that_ends_without_its_pages_is_gone() {
        let (arrivals, machines, _dir) = arrivals();
        for (id, name) in [(ONE, "web"), (TWO, "db")] {
            arrivals.create(id, &start(name)).map(drop).unwrap();
            arrivals.running(id, true);
        }
        let made = |index: usize| Arc::clone(&machines.made.lock().unwrap()[index]);
        // Its process dies, and nobody has said so yet.
        made(0).end("the VM process was killed (SIGKILL)");
        assert_eq!(arrivals.resolve(ONE), Resolution::Gone);
        // Its source is lost: what is left of it is ended.
        let reason = "the operator said that its source is gone".to_owned();
        arrivals.finished(TWO, &TargetOutcome::Lost { reason });
        assert_eq!(arrivals.resolve(TWO), Resolution::Gone);
        assert_eq!(made(1).ended().as_deref(), Some("killed"));
        assert_eq!(states(&arrivals)[0], ("db".to_owned(), VmState::Ended));
        arrivals.0.stop("db", false).unwrap();
        // The end of a session brings no pages.
        arrivals
            .create(MigrationId(3), &start("calm"))
            .map(drop)
            .unwrap();
        arrivals.running(MigrationId(3), true);
        arrivals.finished(MigrationId(3), &TargetOutcome::Unconfirmed);
        assert_eq!(arrivals.resolve(MigrationId(3)), Resolution::Needs);
        arrivals.0.stop("calm", false).unwrap();
        assert_eq!(arrivals.resolve(MigrationId(3)), Resolution::Gone);
    }

    /// What is recorded of the guest that arrives as ONE, in words.
    fn recorded(arrivals: &Arrivals) -> Vec<(u64, u64)> {
        let name = VmName::new("web").unwrap();
        let demanded = arrivals.0.records().of(&name, PageCount::new(512));
        let runs = demanded.runs().iter();
        runs.map(|run| (run.first.get(), run.count.get())).collect()
    }

    #[test]
    fn what_a_guest_asks_for_is_kept_while_it_is_here() {
        let bytes = |numbers: &[u32]| -> Vec<u8> {
            let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
            numbers.collect()
        };
        let begin = |demanded: &[u32]| {
            let begun = arrivals();
            let start = Start {
                demanded: bytes(demanded),
                ..start("web")
            };
            let created = begun.0.create(ONE, &start).map(drop);
            (begun, created)
        };
        let ((arrivals, machines, _dir), created) = begin(&[7, 2, 100, 1]);
        created.unwrap();
        assert_eq!(recorded(&arrivals), [(7, 2), (100, 1)]);
        let arrived = Phase::Arrived { id: ONE };
        let guest = machines.made.lock().unwrap()[0].guest();
        guest.record(&arrived).unwrap();
        arrivals.running(ONE, true);
        let asked_for = bytes(&[100, 1, 200, 3]);
        let asked_for = Demanded::decode(&asked_for, PageCount::new(512)).unwrap();
        arrivals.filled(ONE, asked_for);
        assert_eq!(recorded(&arrivals), [(100, 1), (200, 3), (7, 2)]);
        arrivals.0.stop("web", false).unwrap();
        assert_eq!(recorded(&arrivals), []);

        let ((arrivals, ..), created) = begin(&[7, 2]);
        created.unwrap();
        let reason = "aborted".to_owned();
        arrivals.finished(ONE, &TargetOutcome::Dropped { reason });
        assert_eq!(recorded(&arrivals), []);

        let ((arrivals, ..), created) = begin(&[511, 2]);
        let refused = created.unwrap_err();
        assert!(refused.contains("is malformed"), "{refused}");
        assert_eq!(states(&arrivals), []);
    }

    #[test]
    fn a_barred_attempt_never_begins_again() {
        let (arrivals, _machines, _dir) = arrivals();
        assert_eq!(arrivals.resolve(ONE), Resolution::Barred);
        let refused = arrivals.create(ONE, &start("web")).map(drop).unwrap_err();
        assert!(refused.contains("has ended before"), "{refused}");
        assert_eq!(states(&arrivals), []);
    }

    #[test]
    fn a_name_that_is_no_file_name_is_refused() {
        let (arrivals, _machines, _dir) = arrivals();
        let refused = arrivals
            .create(ONE, &start("../web"))
            .map(drop)
            .unwrap_err();
        assert!(refused.contains("cannot name a VM"), "{refused}");
    }

    #[test]
    fn a_guest_that_dies_as_it_arrives_is_listed_as_ended() {
        let (arrivals, machines, _dir) = arrivals();
        arrivals.create(ONE, &start("web")).map(drop).unwrap();
        machines.made.lock().unwrap()[0].end("the VM process was killed (SIGKILL)");
        arrivals.running(ONE, false);
        assert_eq!(states(&arrivals), [("web".to_owned(), VmState::Ended)]);
        arrivals.0.stop("web", false).unwrap();
        assert_eq!(states(&arrivals), []);
    }
}
