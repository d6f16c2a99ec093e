//! What happens without a request: taking up what an earlier daemon left, and looking around.

use super::Host;
use crate::ledger::Note;
use crate::machine::{Activity, Machine};
use crate::registry::{Adoption, Hold, Slot, Vm, adoption};
use crate::state_dir::VmName;
use anyhow::Context;
use limosa_carrier::{
    Compression, Demanded, Guest, Listener, MigrateRequest, Migration, PushOrder,
};
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::policy::{Limits, Mode};
use std::collections::BTreeSet;
use std::sync::Arc;

impl Host {
    /// Takes up the VM processes that an earlier daemon left.
    ///
    /// # Errors
    /// The state directory cannot be read.
    pub fn adopt_all(&self) -> anyhow::Result<()> {
        let mut silent = BTreeSet::new();
        for name in self.state.vm_names()? {
            if let Err(reason) = self.adopt(&name) {
                tracing::error!(vm = %name, reason, "a VM that was left here cannot be taken up");
                silent.insert(name);
            }
        }
        if silent.is_empty() {
            self.remove_new_disks()
                .context("cannot go through the notes of new disks")?;
        }
        self.take_up_departures(&silent)
            .context("cannot go through the notes of departures")
    }

    /// Removes what an earlier daemon had made for guests that did not get to run here.
    fn remove_new_disks(&self) -> std::io::Result<()> {
        for id in self.new_disks.all()? {
            let is_here = self.registry().arrival(id).is_some();
            let has_run = matches!(
                self.ledger().look_up(id),
                Some(Note::Ran | Note::Filling | Note::Gone)
            );
            if is_here || has_run {
                self.new_disks.keep(id);
            } else {
                self.new_disks.remove(id);
            }
        }
        Ok(())
    }

    fn adopt(&self, name: &VmName) -> Result<(), String> {
        let Some(machine) = self.machines.attach(name, self.on_end(name))? else {
            tracing::info!(vm = %name, "removed the socket of a VM that is gone");
            return Ok(());
        };
        let look = machine.look().map_err(|error| error.to_string())?;
        let adoption = adoption(&look.phase);
        tracing::info!(vm = %name, pid = machine.pid(), phase = %look.phase, ?adoption, "found");
        if adoption == Adoption::Discard {
            machine.kill();
            return Ok(());
        }
        if adoption == Adoption::TakeBack {
            machine
                .guest()
                .record(&Phase::Running)
                .map_err(|error| error.to_string())?;
        }
        let is_filling = machine.misses_pages();
        if let Adoption::Resident { arrived: Some(id) } = adoption {
            // Its daemon may have died between the guest's first instruction and this note, or
            // between its last missing page and that one.
            self.ledger()
                .note_running(id, is_filling)
                .map_err(|error| error.to_string())?;
        }
        let hold = match &adoption {
            Adoption::Resident { arrived: Some(id) } if is_filling => Hold::Filling { id: *id },
            Adoption::Resident { arrived } => Hold::Here { arrived: *arrived },
            Adoption::TakeBack | Adoption::Discard => Hold::Here { arrived: None },
            Adoption::Resolve { id, .. } => Hold::Leaving { id: Some(*id) },
        };
        let mut registry = self.registry();
        registry.reserve(name).map_err(|refusal| refusal.message)?;
        registry.fill(name, Arc::clone(&machine), hold);
        drop(registry);
        if let Adoption::Resolve { id, peer } = adoption {
            let request = self.departures.look_up(id).map_or_else(
                || MigrateRequest {
                    id,
                    peer: peer.clone(),
                    // All that is missing comes: nobody knows who would ask for it.
                    mode: Mode::PostCopy,
                    limits: Limits::default(),
                    streams: Limits::default().streams.connections(),
                    verify: false,
                    copy_disks: false,
                    link: None,
                    compression: Compression::Auto,
                    push_order: PushOrder::default(),
                    demanded: Demanded::default(),
                    credentials: self.credentials.clone(),
                },
                |departure| departure.request(id, self.credentials.clone()),
            );
            let on_finish = self.on_finish(name);
            let migration = Migration::recover(machine.guest(), request, on_finish)
                .map_err(|error| error.to_string())?;
            let tracker = machine.shape().dirty_tracker;
            self.migrations_lock()
                .insert(migration, name.to_string(), peer, tracker);
        }
        Ok(())
    }

    /// Takes up the guests that run here without all their pages: their page faults wait, and so do
    /// their sources. Whoever comes before is sent away and comes again; what may be answered was
    /// settled when their processes were found.
    pub(super) fn take_up_arrivals(&self, peers: &Listener) {
        let filling: Vec<(VmName, MigrationId, Arc<dyn Guest>)> = self
            .registry()
            .iter()
            .filter_map(|(name, slot)| match slot {
                Slot::Alive(Vm {
                    machine,
                    hold: Hold::Filling { id },
                }) => Some((name.clone(), *id, machine.guest())),
                Slot::Alive(_) | Slot::Reserved | Slot::Ended { .. } => None,
            })
            .collect();
        for (name, id, guest) in filling {
            match peers.recover(id, guest) {
                Ok(()) => {
                    tracing::info!(migration_id = %id, vm = %name, "the guest waits for pages of its source");
                }
                Err(error) => {
                    tracing::error!(migration_id = %id, vm = %name, %error, "page faults of the guest are not served: it stands still");
                }
            }
        }
    }

    /// Looks after what nobody asks about: reports of ended migrations, guests that have ended.
    pub fn look_around(&self) {
        self.migrations_lock().settle();
        let residents: Vec<(VmName, Arc<dyn Machine>)> = self
            .registry()
            .iter()
            .filter_map(|(name, slot)| match slot {
                Slot::Alive(Vm {
                    machine,
                    hold: Hold::Here { .. } | Hold::Filling { .. },
                }) => Some((name.clone(), Arc::clone(machine))),
                Slot::Alive(_) | Slot::Reserved | Slot::Ended { .. } => None,
            })
            .collect();
        for (name, machine) in residents {
            if let Ok(look) = machine.look()
                && let Activity::Ended { reason } = look.activity
                && self.registry().process_ended(&name, machine.pid(), &reason)
            {
                tracing::info!(vm = %name, reason, "the guest has ended");
                machine.kill();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::api::VmState;
    use crate::arrivals::Arrivals;
    use crate::departures::{Departure, Departures};
    use crate::host::Host;
    use crate::ledger::Ledger;
    use crate::machine::Machine;
    use crate::machine::fake::{FakeMachine, FakeMachines};
    use crate::state_dir::StateDir;
    use limosa_carrier::TargetHost;
    use limosa_engine::handover::{MigrationId, Phase, Resolution};
    use limosa_engine::policy::{Limits, Mode};
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    /// Starts a host on a directory in which an earlier one left this ledger, these machines, and a
    /// socket without one.
    fn restarted(dir: &Path, ledger: &str, left: &[(&str, &Arc<FakeMachine>)]) -> Arc<Host> {
        let state = StateDir::open(dir).unwrap();
        fs::write(state.ledger(), ledger).unwrap();
        for name in left.iter().map(|(name, _)| *name).chain(["stale"]) {
            fs::write(dir.join(format!("vms/{name}.sock")), b"").unwrap();
        }
        let left = left
            .iter()
            .map(|(name, machine)| ((*name).to_owned(), Arc::clone(machine)))
            .collect();
        let machines = Arc::new(FakeMachines {
            left,
            ..FakeMachines::default()
        });
        let ledger = Ledger::open(&state.ledger()).unwrap();
        let host = Host::new(state, Box::new(machines), ledger, None);
        host.adopt_all().unwrap();
        host
    }

    /// Lets go of the state directory, which whoever tells a target of a loss looks into now and then.
    fn end(host: Arc<Host>) {
        let rest = Arc::downgrade(&host);
        drop(host);
        while rest.strong_count() > 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn a_restarted_host_acts_by_the_phase_of_what_it_finds() {
        let id = MigrationId;
        // Nobody listens on port 1 of the loopback: the outcome stays unknown.
        let committed = Phase::Committed {
            id: id(2),
            peer: "127.0.0.1:1".to_owned(),
        };
        let [running, offered, handed, preparing, arrived] = [
            Phase::Running,
            Phase::Offered { id: id(1) },
            committed.clone(),
            Phase::Preparing { id: id(3) },
            Phase::Arrived { id: id(4) },
        ]
        .map(|phase| FakeMachine::new(7, phase));
        let dir = tempfile::tempdir().unwrap();
        let left = [
            ("running", &running),
            ("offered", &offered),
            ("committed", &handed),
            ("preparing", &preparing),
            ("arrived", &arrived),
        ];
        let host = restarted(dir.path(), "", &left);

        assert_eq!(offered.phase(), Phase::Running, "it belongs here again");
        assert_eq!(handed.phase(), committed, "only the target can say");
        assert_eq!(preparing.ended().as_deref(), Some("killed"));
        let listed: Vec<(String, VmState)> = host
            .vms()
            .into_iter()
            .map(|vm| (vm.name, vm.state))
            .collect();
        let [first, ..] = &listed[..] else {
            panic!("nothing is listed")
        };
        assert_eq!(first.0, "arrived");
        let names: Vec<&str> = listed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["arrived", "committed", "offered", "running"]);
        for (name, state) in &listed {
            let is_held = matches!(state, VmState::Migrating | VmState::Unresolved);
            assert_eq!(is_held, name == "committed", "{name} {state:?}");
        }
        let unresolved = host.migration(&id(2).to_string(), Duration::ZERO).unwrap();
        assert_eq!(
            (unresolved.vm.as_str(), unresolved.to.as_str()),
            ("committed", "127.0.0.1:1")
        );
        assert!(host.inspect("committed").is_err(), "nobody may disturb it");

        let arrivals = Arrivals(Arc::clone(&host));
        assert_eq!(arrivals.resolve(id(4)), Resolution::Runs);
        assert_eq!(arrivals.resolve(id(3)), Resolution::Barred);
        arrivals.confirmed(id(4));
        assert_eq!(arrived.phase(), Phase::Running);
        host.stop("arrived", false).unwrap();
        assert_eq!(
            arrivals.resolve(id(4)),
            Resolution::Runs,
            "the answer outlives the guest"
        );
    }

    #[test]
    fn a_restarted_host_says_what_became_of_guests_that_were_leaving() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let departures = Departures::new(state.departures());
        drop(state);
        let here = FakeMachine::new(7, Phase::Offered { id: MigrationId(1) });
        for (id, vm) in [(1, "here"), (2, "gone")] {
            let departure = Departure {
                vm: vm.to_owned(),
                shape: here.shape(),
                // Nobody listens there.
                to: "127.0.0.1:1".to_owned(),
                mode: Mode::Demand,
                limits: Limits::default(),
                link: None,
                copy_disks: false,
                is_bereft: false,
            };
            departures.note(MigrationId(id), &departure).unwrap();
        }
        let noted = || -> Vec<(u128, bool)> {
            let all = departures.all().unwrap().into_iter();
            all.map(|(id, departure)| (id.0, departure.is_bereft))
                .collect()
        };
        let host = restarted(dir.path(), "", &[("here", &here)]);
        assert_eq!(here.phase(), Phase::Running, "its migration had not begun");
        let gone = host.vm("gone").unwrap();
        assert_eq!(gone.state, VmState::Ended);
        let how = gone.ended.unwrap();
        assert!(how.contains("has not said yet"), "{how}");
        assert_eq!(noted(), [(2, true)], "the target has to be told");

        // Still so after the next start, whoever has got the name.
        end(host);
        let next = FakeMachine::new(8, Phase::Running);
        let host = restarted(dir.path(), "", &[("gone", &next)]);
        assert_eq!(host.vm("gone").unwrap().state, VmState::Running);
        assert_eq!(noted(), [(2, true)]);
        end(host);
        let host = restarted(dir.path(), "", &[]);
        host.stop("gone", false).unwrap();
        assert_eq!(noted(), [], "the operator does not want to know any more");
    }

    #[test]
    fn a_restarted_host_keeps_the_source_of_a_guest_that_misses_pages() {
        let id = MigrationId;
        let [filling, filled] = [id(1), id(2)].map(|id| FakeMachine::new(7, Phase::Arrived { id }));
        filling.miss_pages();
        let dir = tempfile::tempdir().unwrap();
        // Of the third one nothing is left but this line.
        let noted = [id(2), id(3)].map(|id| format!("filling {id}\n")).concat();
        let host = restarted(
            dir.path(),
            &noted,
            &[("filling", &filling), ("filled", &filled)],
        );
        let arrivals = Arrivals(Arc::clone(&host));
        assert_eq!(arrivals.resolve(id(1)), Resolution::Needs);
        assert_eq!(arrivals.resolve(id(2)), Resolution::Runs);
        assert_eq!(arrivals.resolve(id(3)), Resolution::Gone);
        assert_eq!(arrivals.resolve(id(4)), Resolution::Barred);
        let refused = host.inspect("filling").unwrap_err();
        assert!(
            refused.message.contains("limosa drain filling"),
            "{refused}"
        );
        host.stop("filling", false).unwrap();
        assert_eq!(arrivals.resolve(id(1)), Resolution::Gone);
    }
}
