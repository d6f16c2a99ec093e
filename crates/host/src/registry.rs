//! The virtual machines of a host by name, and what may be done to each right now.
//!
//! ```text
//!  reserve ─▶ Reserved ──▶ Here ◀──────────────┐ aborted, failed
//!                 │         │ └──▶ Leaving ────┤
//!                 │         │                  └─▶ gone (completed), Ended (lost)
//!                 └▶ Arriving ─▶ Here | Filling | gone
//!                           │      ▲       │
//!                           │      └───────┤ all pages are here
//!                           └───▶ Ended ◀──┘ ─▶ gone
//! ```
//!
//! A name is taken from the moment somebody begins to use it, so that two requests never make the
//! same one. Plain data: requests to VM processes are made by others, outside the registry's lock.

use crate::machine::{Machine, Shape};
use crate::refusal::Refusal;
use crate::state_dir::VmName;
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::report::Outcome;
use limosa_vmm::config::devices::Mac;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most virtual machines of a host: each takes a process, some threads and descriptors.
const VMS_MAX: usize = 1024;

/// All virtual machines of a host.
#[derive(Default)]
pub struct Registry {
    slots: BTreeMap<VmName, Slot>,
}

/// What a name stands for.
#[derive(Clone)]
pub enum Slot {
    /// Being made or ended right now.
    Reserved,
    /// A VM process.
    Alive(Vm),
    /// A VM process that ended by itself.
    Ended {
        /// What it had been.
        shape: Shape,
        /// How it ended, in one line.
        reason: String,
    },
}

/// A virtual machine that has a process.
#[derive(Clone)]
pub struct Vm {
    /// The process.
    pub machine: Arc<dyn Machine>,
    /// What goes on with it.
    pub hold: Hold,
}

/// What goes on with a virtual machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It is at home here.
    Here {
        /// The migration that brought it.
        arrived: Option<MigrationId>,
    },
    /// It runs here and misses pages that only its source has: it can be ended, and nothing else.
    Filling {
        /// The attempt.
        id: MigrationId,
    },
    /// A migration moves it away.
    Leaving {
        /// Known as soon as it has begun.
        id: Option<MigrationId>,
    },
    /// A migration brings it; it does not run here yet.
    Arriving {
        /// The attempt.
        id: MigrationId,
    },
}

/// What a restarted daemon does with a VM process that it finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Adoption {
    /// It is at home here.
    Resident {
        /// The migration that brought it and was not confirmed.
        arrived: Option<MigrationId>,
    },
    /// Its migration died with the daemon before the commit: the guest runs here, say so.
    TakeBack,
    /// Only the target knows where it runs: ask.
    Resolve {
        /// The attempt.
        id: MigrationId,
        /// Whom to ask.
        peer: String,
    },
    /// It never was a guest of this host.
    Discard,
}

/// Decides by the phase that a VM process has recorded.
pub fn adoption(phase: &Phase) -> Adoption {
    match phase {
        Phase::Running => Adoption::Resident { arrived: None },
        Phase::Arrived { id } => Adoption::Resident { arrived: Some(*id) },
        Phase::Offered { .. } => Adoption::TakeBack,
        Phase::Committed { id, peer } => Adoption::Resolve {
            id: *id,
            peer: peer.clone(),
        },
        Phase::Preparing { .. } => Adoption::Discard,
    }
}

impl Registry {
    /// Takes a name for a virtual machine that is about to be made.
    ///
    /// # Errors
    /// The name is taken, or there are too many.
    pub fn reserve(&mut self, name: &VmName) -> Result<(), Refusal> {
        self.check_free(name)?;
        self.slots.insert(name.clone(), Slot::Reserved);
        Ok(())
    }

    /// Checks that a virtual machine of this name could be made.
    ///
    /// # Errors
    /// As [`Registry::reserve`].
    pub fn check_free(&self, name: &VmName) -> Result<(), Refusal> {
        match self.slots.get(name) {
            Some(Slot::Ended { .. }) => Err(Refusal::conflict(format!(
                "a VM named '{name}' has ended and is still listed: remove it with 'limosa stop {name}'"
            ))),
            Some(Slot::Reserved | Slot::Alive(_)) => Err(Refusal::conflict(format!(
                "a VM named '{name}' exists on this host: choose another name, or stop it first"
            ))),
            None if self.slots.len() >= VMS_MAX => Err(Refusal::failed(format!(
                "this host has {VMS_MAX} VMs already"
            ))),
            None => Ok(()),
        }
    }

    /// Checks that no virtual machine has one of these addresses: two with the same one on a network would take
    /// each other's packets.
    ///
    /// # Errors
    /// One has.
    pub fn check_macs(&self, macs: &[Mac]) -> Result<(), Refusal> {
        for (name, slot) in &self.slots {
            let Slot::Alive(vm) = slot else { continue };
            let taken = vm.machine.macs().into_iter().find(|mac| macs.contains(mac));
            if let Some(mac) = taken {
                return Err(Refusal::conflict(format!(
                    "the network address {mac} is that of VM '{name}' on this host: give another one by --net TAP,mac=ADDRESS"
                )));
            }
        }
        Ok(())
    }

    /// Fills a reserved name.
    ///
    /// # Panics
    /// If it was not reserved.
    pub fn fill(&mut self, name: &VmName, machine: Arc<dyn Machine>, hold: Hold) {
        let slot = self
            .slots
            .get_mut(name)
            .expect("a name is reserved before it is filled");
        assert!(matches!(slot, Slot::Reserved), "a name is filled once");
        *slot = Slot::Alive(Vm { machine, hold });
    }

    /// Lets go of a name.
    pub fn remove(&mut self, name: &VmName) {
        self.slots.remove(name);
    }

    /// What a name stands for.
    ///
    /// # Errors
    /// Nothing.
    pub fn get(&self, name: &VmName) -> Result<&Slot, Refusal> {
        self.slots.get(name).ok_or_else(|| {
            Refusal::not_found(format!(
                "no VM named '{name}' on this host: 'limosa list' shows them"
            ))
        })
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&VmName, &Slot)> {
        self.slots.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// How many of them have a process that has not ended.
    pub fn alive_count(&self) -> usize {
        let is_alive =
            |slot: &&Slot| matches!(slot, Slot::Alive(vm) if vm.machine.ended().is_none());
        self.slots.values().filter(is_alive).count()
    }

    /// The process of a name, whatever goes on with it.
    ///
    /// # Errors
    /// There is none.
    pub fn alive(&self, name: &VmName) -> Result<&Vm, Refusal> {
        match self.get(name)? {
            Slot::Alive(vm) => Ok(vm),
            Slot::Reserved => Err(Refusal::conflict(format!(
                "VM '{name}' is being started or stopped right now: try again"
            ))),
            Slot::Ended { reason, .. } => Err(Refusal::conflict(format!(
                "VM '{name}' has ended ({reason}): remove it with 'limosa stop {name}'"
            ))),
        }
    }

    /// The process of a virtual machine that is at home here and held by nothing.
    ///
    /// # Errors
    /// It is not so.
    pub fn resident(&self, name: &VmName) -> Result<Arc<dyn Machine>, Refusal> {
        let vm = self.alive(name)?;
        match vm.hold {
            Hold::Here { .. } => Ok(Arc::clone(&vm.machine)),
            Hold::Filling { .. } => Err(Refusal::conflict(format!(
                "VM '{name}' runs here with residual dependency: pages of it are still at its source, \
                 and without them it can be neither saved nor moved on; 'limosa drain {name}' at the \
                 source brings them, then try again"
            ))),
            Hold::Leaving { .. } => Err(Refusal::conflict(format!(
                "VM '{name}' is being migrated: wait, or 'limosa abort {name}' first"
            ))),
            Hold::Arriving { .. } => Err(Refusal::conflict(format!(
                "VM '{name}' is still arriving from another host: wait, or abort the migration there"
            ))),
        }
    }

    /// Takes a resident virtual machine for a migration.
    ///
    /// # Errors
    /// It is not resident.
    pub fn begin_leaving(&mut self, name: &VmName) -> Result<Vm, Refusal> {
        self.resident(name)?;
        let vm = self.alive_mut(name).expect("a resident VM has a process");
        let before = vm.clone();
        vm.hold = Hold::Leaving { id: None };
        Ok(before)
    }

    /// The migration that was begun has an id. Nothing changes if it is over already.
    pub fn leaving_as(&mut self, name: &VmName, id: MigrationId) {
        if let Some(vm) = self.alive_mut(name)
            && vm.hold == (Hold::Leaving { id: None })
        {
            vm.hold = Hold::Leaving { id: Some(id) };
        }
    }

    /// Tells what goes on with a virtual machine from now on, if its process is still there.
    pub fn hold(&mut self, name: &VmName, hold: Hold) {
        if let Some(vm) = self.alive_mut(name) {
            vm.hold = hold;
        }
    }

    /// Takes a virtual machine out of use to end it, unless a migration holds it; what it was comes
    /// back.
    ///
    /// # Errors
    /// There is nothing of this name, or it is held.
    pub fn begin_removal(&mut self, name: &VmName) -> Result<Slot, Refusal> {
        let slot = self.get(name)?.clone();
        let is_free = match &slot {
            Slot::Ended { .. } => true,
            Slot::Alive(vm) => {
                vm.machine.ended().is_some() || matches!(vm.hold, Hold::Filling { .. })
            }
            Slot::Reserved => false,
        };
        if !is_free {
            self.resident(name)?;
        }
        self.slots.insert(name.clone(), Slot::Reserved);
        Ok(slot)
    }

    /// Takes out the machine of an attempt that brought no guest, to end it.
    pub fn take_arrival(&mut self, id: MigrationId) -> Option<(VmName, Arc<dyn Machine>)> {
        let (name, vm) = self.arrival(id)?;
        if vm.hold != (Hold::Arriving { id }) {
            return None;
        }
        let taken = (name.clone(), Arc::clone(&vm.machine));
        self.slots.insert(taken.0.clone(), Slot::Reserved);
        Some(taken)
    }

    /// Puts back what [`Registry::begin_removal`] gave.
    pub fn put_back(&mut self, name: &VmName, slot: Slot) {
        self.slots.insert(name.clone(), slot);
    }

    /// The migration `id` away is over. Means nothing to a later machine of the same name.
    pub fn left(&mut self, name: &VmName, id: MigrationId, outcome: &Outcome) {
        let Some(vm) = self.alive_mut(name) else {
            return;
        };
        // A migration may be over before it was told to the registry which one it is.
        let holds = [Hold::Leaving { id: None }, Hold::Leaving { id: Some(id) }];
        if !holds.contains(&vm.hold) {
            return;
        }
        match outcome {
            Outcome::Completed => {
                self.slots.remove(name);
            }
            Outcome::Aborted | Outcome::Failed { .. } => match vm.machine.ended() {
                // Its process ended while the migration held it, and the watcher left it alone.
                Some(reason) => self.end(name, reason),
                None => vm.hold = Hold::Here { arrived: None },
            },
            // A process that only does not answer is not lost: it goes on by its record.
            Outcome::GuestLost { .. } if !vm.machine.guest().is_gone() => {
                vm.hold = Hold::Here { arrived: None };
            }
            Outcome::GuestLost { reason } => {
                let reason = vm.machine.ended().unwrap_or_else(|| reason.clone());
                self.end(name, reason);
            }
        }
    }

    /// The name of the virtual machine that attempt `id` brings or brought.
    pub fn arrival(&self, id: MigrationId) -> Option<(&VmName, &Vm)> {
        self.slots.iter().find_map(|(name, slot)| match slot {
            Slot::Alive(vm)
                if [
                    Hold::Arriving { id },
                    Hold::Filling { id },
                    Hold::Here { arrived: Some(id) },
                ]
                .contains(&vm.hold) =>
            {
                Some((name, vm))
            }
            Slot::Alive(_) | Slot::Reserved | Slot::Ended { .. } => None,
        })
    }

    /// The guest of attempt `id` is lost, since pages of it will never come: lists it as ended and
    /// gives its process, which may still be there.
    pub fn lose_arrival(&mut self, id: MigrationId, reason: &str) -> Option<Arc<dyn Machine>> {
        let (name, vm) = self.arrival(id)?;
        let (name, machine) = (name.clone(), Arc::clone(&vm.machine));
        self.end(&name, reason.to_owned());
        Some(machine)
    }

    /// The process `pid` of `name` has ended by itself: true if that is news.
    pub fn process_ended(&mut self, name: &VmName, pid: u32, reason: &str) -> bool {
        let Some(vm) = self.alive_mut(name) else {
            return false;
        };
        // A migration learns it by itself and decides what it means.
        let is_news =
            vm.machine.pid() == pid && matches!(vm.hold, Hold::Here { .. } | Hold::Filling { .. });
        if is_news {
            self.end(name, reason.to_owned());
        }
        is_news
    }

    /// Lists a virtual machine that ended while no daemon was here, unless its name is taken.
    pub fn list_ended(&mut self, name: &VmName, shape: Shape, reason: String) {
        let ended = Slot::Ended { shape, reason };
        self.slots.entry(name.clone()).or_insert(ended);
    }

    /// More is known about one that is listed as ended for `former` reason: why it ended, or with
    /// `None` that it did not, since it has moved.
    pub fn end_otherwise(&mut self, name: &VmName, former: &str, now: Option<String>) {
        let Some(Slot::Ended { reason, .. }) = self.slots.get_mut(name) else {
            return;
        };
        if reason != former {
            return;
        }
        match now {
            Some(now) => *reason = now,
            None => self.remove(name),
        }
    }

    /// Lists it as ended and lets go of its process, descriptors and memory.
    fn end(&mut self, name: &VmName, reason: String) {
        let Some(Slot::Alive(vm)) = self.slots.get(name) else {
            return;
        };
        let shape = vm.machine.shape();
        self.slots
            .insert(name.clone(), Slot::Ended { shape, reason });
    }

    fn alive_mut(&mut self, name: &VmName) -> Option<&mut Vm> {
        match self.slots.get_mut(name) {
            Some(Slot::Alive(vm)) => Some(vm),
            Some(Slot::Reserved | Slot::Ended { .. }) | None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::FakeMachine;

    const ID: MigrationId = MigrationId(1);

    fn name() -> VmName {
        VmName::new("web").unwrap()
    }

    fn registry() -> (Registry, Arc<FakeMachine>) {
        let machine = FakeMachine::new(7, Phase::Running);
        let mut registry = Registry::default();
        registry.reserve(&name()).unwrap();
        registry.fill(
            &name(),
            Arc::clone(&machine) as Arc<dyn Machine>,
            Hold::Here { arrived: None },
        );
        (registry, machine)
    }

    fn tell(registry: &Registry) -> String {
        match registry.get(&name()) {
            Err(_) => "gone".to_owned(),
            Ok(Slot::Reserved) => "reserved".to_owned(),
            Ok(Slot::Ended { reason, .. }) => format!("ended: {reason}"),
            Ok(Slot::Alive(vm)) => format!("{:?}", vm.hold),
        }
    }

    #[test]
    fn adoption_follows_from_the_phase() {
        let peer = "b:1".to_owned();
        let check =
            |phase: Phase, expect: Adoption| assert_eq!(adoption(&phase), expect, "{phase}");
        check(Phase::Running, Adoption::Resident { arrived: None });
        check(
            Phase::Arrived { id: ID },
            Adoption::Resident { arrived: Some(ID) },
        );
        check(Phase::Offered { id: ID }, Adoption::TakeBack);
        check(
            Phase::Committed {
                id: ID,
                peer: peer.clone(),
            },
            Adoption::Resolve { id: ID, peer },
        );
        check(Phase::Preparing { id: ID }, Adoption::Discard);
    }

    #[test]
    fn a_migration_away_ends_as_its_outcome_says() {
        let check_with = |is_gone: bool, outcome: Outcome, expect: &str| {
            let (mut registry, machine) = registry();
            if is_gone {
                machine.die();
            }
            registry.begin_leaving(&name()).unwrap();
            assert!(registry.begin_leaving(&name()).is_err(), "it leaves once");
            registry.leaving_as(&name(), ID);
            assert!(
                !registry.process_ended(&name(), 7, "released"),
                "the migration says what it means"
            );
            registry.left(&name(), MigrationId(2), &Outcome::Completed);
            registry.left(&name(), ID, &outcome);
            registry.leaving_as(&name(), ID);
            assert_eq!(tell(&registry), expect);
        };
        let check = |outcome, expect: &str| check_with(false, outcome, expect);
        let reason = || "it broke".to_owned();
        check(Outcome::Completed, "gone");
        check(Outcome::Aborted, "Here { arrived: None }");
        check(
            Outcome::Failed { reason: reason() },
            "Here { arrived: None }",
        );
        let lost = || Outcome::GuestLost { reason: reason() };
        check_with(true, lost(), "ended: it broke");
        // It did not answer, but it lives: nobody else has its name, and it may answer again.
        check_with(false, lost(), "Here { arrived: None }");
    }

    #[test]
    fn a_process_that_ends_is_noticed_once_and_by_its_own_number() {
        let (mut registry, _machine) = registry();
        assert!(
            !registry.process_ended(&name(), 8, "killed"),
            "another process of that name"
        );
        assert!(registry.process_ended(&name(), 7, "killed"));
        assert!(!registry.process_ended(&name(), 7, "killed"));
        assert_eq!(tell(&registry), "ended: killed");
        assert!(
            registry
                .reserve(&name())
                .unwrap_err()
                .message
                .contains("limosa stop web")
        );
    }

    #[test]
    fn a_machine_that_a_migration_holds_is_not_ended_unless_it_is_over() {
        let (mut registry, machine) = registry();
        registry.begin_leaving(&name()).unwrap();
        assert!(registry.begin_removal(&name()).is_err());
        machine.end("killed");
        registry.begin_removal(&name()).map(drop).unwrap();
        assert!(
            registry.begin_removal(&name()).is_err(),
            "it is being removed already"
        );
        registry.left(&name(), ID, &Outcome::Completed);
        assert_eq!(tell(&registry), "reserved");
    }

    #[test]
    fn a_guest_without_all_its_pages_can_only_be_ended() {
        let (mut registry, machine) = registry();
        registry.hold(&name(), Hold::Filling { id: ID });
        let refusal = registry.begin_leaving(&name()).map(drop).unwrap_err();
        assert!(refusal.message.contains("limosa drain web"), "{refusal}");
        assert!(registry.resident(&name()).is_err());
        let slot = registry.begin_removal(&name()).unwrap();
        registry.put_back(&name(), slot);
        assert_eq!(registry.arrival(ID).unwrap().0, &name());
        machine.end("killed");
        assert!(registry.process_ended(&name(), 7, "killed"));
        assert_eq!(tell(&registry), "ended: killed");
        assert!(registry.lose_arrival(ID, "too late").is_none());
    }

    #[test]
    fn a_process_that_ended_during_a_failed_migration_is_not_at_home() {
        let (mut registry, machine) = registry();
        registry.begin_leaving(&name()).unwrap();
        machine.end("killed");
        registry.left(&name(), ID, &Outcome::Aborted);
        assert_eq!(tell(&registry), "ended: killed");
    }
}
