//! What this host does for guests that arrive from other hosts.
//!
//! The VM process of an arriving guest records the commit itself; the ledger keeps the answer for
//! the time after the guest has moved on or ended. An attempt that it knows is never begun again.

use crate::host::Host;
use crate::refusal::Refusal;
use crate::registry::Hold;
use limosa_carrier::{Guest, TargetHost};
use limosa_engine::handover::{MigrationId, Phase, Resolution};
use limosa_engine::target::TargetOutcome;
use limosa_engine::wire::Start;
use std::sync::Arc;

/// A host as other hosts see it.
pub struct Arrivals(pub Arc<Host>);

impl TargetHost for Arrivals {
    fn create(&self, id: MigrationId, start: &Start) -> Result<Arc<dyn Guest>, String> {
        let host = &self.0;
        if host.ledger().look_up(id).is_some() {
            return Err("this migration has ended before: start a new one".to_owned());
        }
        let described = host.machines().describe(start)?;
        let name = described.name;
        host.registry()
            .reserve(&name)
            .map_err(|refusal| refusal.message)?;
        match host
            .machines()
            .receive(&name, id, start, host.on_end(&name))
        {
            Ok(machine) => {
                let guest = machine.guest();
                tracing::info!(migration_id = %id, vm = %name, pid = machine.pid(), "a guest arrives");
                host.registry().fill(&name, machine, Hold::Arriving { id });
                Ok(guest)
            }
            Err(reason) => {
                host.registry().remove(&name);
                // The operator at the source reads it.
                Err(Refusal::failed(reason).message)
            }
        }
    }

    fn running(&self, id: MigrationId) {
        // Until now the VM process alone remembered it; from here on the ledger does, too, so that
        // the answer outlives the guest's stay.
        if let Err(error) = self.0.ledger().note_running(id) {
            tracing::warn!(migration_id = %id, %error, "an arrival could not be noted in the ledger");
        }
        self.hold(id, Hold::Here { arrived: Some(id) });
    }

    fn finished(&self, id: MigrationId, outcome: &TargetOutcome) {
        match outcome {
            TargetOutcome::Completed => self.hold(id, Hold::Here { arrived: None }),
            TargetOutcome::Unconfirmed => self.hold(id, Hold::Here { arrived: Some(id) }),
            TargetOutcome::Dropped { reason } => {
                tracing::info!(migration_id = %id, reason, "a guest did not arrive");
                self.drop_arrival(id);
            }
        }
    }

    fn resolve(&self, id: MigrationId) -> Resolution {
        let ran_here = self
            .0
            .registry()
            .arrival(id)
            .is_some_and(|(_, vm)| matches!(vm.hold, Hold::Here { .. }));
        if ran_here {
            return Resolution::Runs;
        }
        self.0.ledger().resolve(id)
    }

    fn confirmed(&self, id: MigrationId) {
        let arrival = self
            .0
            .registry()
            .arrival(id)
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

    /// Forgets a guest that never ran here, and ends what was made for it.
    fn drop_arrival(&self, id: MigrationId) {
        let host = &self.0;
        let Some((name, machine)) = host.registry().take_arrival(id) else {
            return;
        };
        machine.kill();
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
    use crate::state_dir::StateDir;
    use limosa_engine::policy::Mode;
    use limosa_pages::PageCount;

    const ONE: MigrationId = MigrationId(1);
    const TWO: MigrationId = MigrationId(2);

    fn arrivals() -> (Arrivals, Arc<FakeMachines>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let machines = Arc::new(FakeMachines::default());
        let ledger = Ledger::open(&state.ledger()).unwrap();
        let host = Host::new(state, Box::new(Arc::clone(&machines)), ledger);
        (Arrivals(host), machines, dir)
    }

    fn start(name: &str) -> Start {
        Start {
            mode: Mode::PreCopy,
            memory_pages: PageCount::new(512),
            streams: 1,
            verify: false,
            vm: name.as_bytes().to_vec(),
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
        arrivals.running(ONE);
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
        arrivals.running(ONE);
        assert_eq!(states(&arrivals), [("web".to_owned(), VmState::Ended)]);
        arrivals.0.stop("web", false).unwrap();
        assert_eq!(states(&arrivals), []);
    }
}
