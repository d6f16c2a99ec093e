//! Requests about migrations away from this host: start, watch, steer, abort.

use super::{Host, parse_name, shrinking};
use crate::api::{LimitsPatch, MigrateBody, MigrationInfo, ResolveWord};
use crate::departures::Departure;
use crate::refusal::Refusal;
use crate::registry::{Hold, Vm};
use crate::state_dir::VmName;
use limosa_carrier::{MigrateRequest, Migration, StartError, draw_id};
use limosa_engine::handover::{MigrationId, Phase};
use limosa_engine::policy::Limits;
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::source::Fence;
use limosa_engine::streams::Streams;
use limosa_pages::BytesPerSecond;
use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

/// Longest long poll of a client.
const WAIT_MAX: Duration = Duration::from_secs(10);

impl Host {
    /// Starts to move a virtual machine away.
    ///
    /// # Errors
    /// The request is wrong, or the virtual machine is not resident.
    pub fn migrate(&self, name: &str, body: &MigrateBody) -> Result<MigrationId, Refusal> {
        let name = parse_name(name)?;
        let limits = body.limits().map_err(Refusal::bad_request)?;
        self.check_peer(&body.to, body.insecure)?;
        self.check_not_ending()?;
        let vm = self.registry().begin_leaving(&name)?;
        let started = self
            .confirm(&vm)
            .and_then(|()| shrinking::shrink_if(body.balloon, &*vm.machine))
            .and_then(|()| self.start(&name, &vm, body, limits));
        let migration = match started {
            Ok(migration) => migration,
            Err(refusal) => {
                shrinking::give_back(&*vm.machine);
                self.registry().hold(&name, vm.hold);
                return Err(refusal);
            }
        };
        let id = migration.id();
        self.registry().leaving_as(&name, id);
        tracing::info!(migration_id = %id, vm = %name, to = body.to, mode = %body.mode, "migration started");
        let tracker = vm.machine.shape().dirty_tracker;
        let begun = Arc::clone(&migration);
        self.migrations_lock()
            .insert(migration, name.to_string(), body.to.clone(), tracker);
        // To shrink the guest takes seconds, in which the daemon may have been told to end.
        if self.check_not_ending().is_err() && begun.abort().is_ok() {
            tracing::info!(migration_id = %id, "the daemon is about to end: it is aborted");
        }
        Ok(id)
    }

    /// A guest whose arrival was never confirmed is at home here all the same once the ledger can
    /// answer for it; only then may it go on.
    fn confirm(&self, vm: &Vm) -> Result<(), Refusal> {
        let Hold::Here { arrived: Some(id) } = vm.hold else {
            return Ok(());
        };
        self.ledger()
            .note_running(id, false)
            .map_err(|error| Refusal::failed(error.to_string()))?;
        let recorded = vm.machine.guest().record(&Phase::Running);
        recorded.map_err(|error| Refusal::failed(format!("the VM does not answer: {error}")))
    }

    fn start(
        &self,
        name: &VmName,
        vm: &Vm,
        body: &MigrateBody,
        limits: Limits,
    ) -> Result<Arc<Migration>, Refusal> {
        let id = draw_id().map_err(|error| Refusal::failed(error.to_string()))?;
        let request = MigrateRequest {
            id,
            peer: body.to.clone(),
            mode: body.mode,
            limits,
            streams: limits.streams.connections(),
            verify: body.verify,
            copy_disks: body.copy_disks,
            link: body.link.map(BytesPerSecond::new),
            compression: body.compress,
            push_order: body.push_order,
            demanded: self
                .records
                .of(name, vm.machine.guest().memory().page_count()),
            credentials: self.credentials.clone(),
        };
        let departure = Departure::new(name, vm.machine.shape(), &request);
        self.departures.note(id, &departure).map_err(|error| {
            Refusal::failed(format!("the migration cannot be noted on disk: {error}"))
        })?;
        let journal = self.state.next_journal(name);
        Migration::start(
            vm.machine.guest(),
            request,
            Some(journal),
            self.on_finish(name),
        )
        .inspect_err(|_| self.departures.forget(id))
        .map_err(|error| match error {
            StartError::Streams(_) | StartError::TooSlow(_) | StartError::Disks(_) => {
                Refusal::bad_request(error.to_string())
            }
            StartError::Guest(_) | StartError::System(_) => Refusal::failed(error.to_string()),
        })
    }

    pub(super) fn on_finish(&self, name: &VmName) -> Box<dyn FnOnce(&MigrationReport) + Send> {
        let (me, name) = (self.me.clone(), name.clone());
        Box::new(move |report| {
            let (Some(host), Some(outcome)) = (me.upgrade(), &report.outcome) else {
                return;
            };
            if *outcome == Outcome::Completed {
                // A VM process that was killed meanwhile left its socket; the name is still taken.
                drop(fs::remove_file(host.state.vm_socket(&name)));
                // It went along.
                host.records.forget(&name);
            }
            host.registry().left(&name, report.id, outcome);
            if let Ok(machine) = host.registry().resident(&name) {
                shrinking::give_back(&*machine);
            }
            host.departures.forget(report.id);
            tracing::info!(migration_id = %report.id, vm = %name, outcome = outcome.name(), "migration over");
        })
    }

    /// Without encryption, a peer beyond this machine needs the operator's word.
    pub(super) fn check_peer(&self, to: &str, insecure: bool) -> Result<(), Refusal> {
        let addresses: Vec<SocketAddr> = to
            .to_socket_addrs()
            .map_err(|error| {
                Refusal::bad_request(format!(
                    "{to:?} is not an address ({error}): give HOST:PORT"
                ))
            })?
            .collect();
        if let Some(own) = self.peer_address()
            && addresses.contains(&own)
        {
            return Err(Refusal::bad_request(format!(
                "{to} is this host itself: name another one"
            )));
        }
        let is_local = addresses.iter().all(|address| address.ip().is_loopback());
        if is_local || insecure || self.credentials.is_some() {
            return Ok(());
        }
        Err(Refusal::bad_request(format!(
            "{to} is another machine and the connection would not be encrypted: start both daemons \
             with --tls ('limosa cert' makes what they need), or use --insecure if the network is trusted"
        )))
    }

    /// All migrations away from here that are remembered.
    pub fn migrations(&self) -> Vec<MigrationInfo> {
        self.migrations_lock().list()
    }

    /// One migration, at once or when it is over, whichever `wait` allows.
    ///
    /// # Errors
    /// It is not known.
    pub fn migration(&self, id: &str, wait: Duration) -> Result<MigrationInfo, Refusal> {
        let id = parse_id(id)?;
        if !wait.is_zero() {
            let running = self.migrations_lock().running(id)?;
            running.map(|migration| migration.wait(wait.min(WAIT_MAX)));
        }
        self.migrations_lock().info(id)
    }

    /// Changes technique and limits of a running migration.
    ///
    /// # Errors
    /// It is not known or over, a limit is wrong, or the technique cannot become this one now; then
    /// nothing is changed.
    pub fn set(&self, id: &str, patch: &LimitsPatch) -> Result<MigrationInfo, Refusal> {
        let id = parse_id(id)?;
        let migration = self.running_migration(id)?;
        let before = migration.status().limits;
        let limits = patch.apply(before).map_err(Refusal::bad_request)?;
        check_streams(patch, migration.status().streams_open)?;
        if let Some(mode) = patch.mode {
            migration.set_mode(mode).map_err(|why| {
                Refusal::conflict(format!("the mode cannot become {mode} now: {why}"))
            })?;
            tracing::info!(migration_id = %id, %mode, "mode changed");
        }
        if let Some(compression) = patch.compress {
            migration.set_compression(compression);
            tracing::info!(migration_id = %id, compression = compression.name(), "compression changed");
        }
        if limits != before {
            migration.set(limits);
            tracing::info!(migration_id = %id, ?limits, "limits changed");
        }
        if let Some(mut departure) = self.departures.look_up(id) {
            departure.limits = limits;
            departure.mode = patch.mode.unwrap_or(departure.mode);
            if let Err(error) = self.departures.note(id, &departure) {
                tracing::warn!(migration_id = %id, %error, "a restarted daemon would not know of the change");
            }
        }
        let mut info = self.migrations_lock().info(id)?;
        // The engine takes them up with its next event.
        info.limits = limits.into();
        info.mode = patch.mode.unwrap_or(info.mode);
        Ok(info)
    }

    /// Takes the operator's word for what cannot be found out: at the source how an unresolved
    /// migration ended, at the target that the source of a guest that misses pages is lost.
    ///
    /// # Errors
    /// The attempt is not known, or there is nothing to decide.
    pub fn resolve(&self, id: &str, word: ResolveWord) -> Result<(), Refusal> {
        let id = parse_id(id)?;
        let known = self.migrations_lock().running(id);
        if let Ok(Some(migration)) = known {
            let fence = match word {
                ResolveWord::RunsHere => Fence::RunsHere,
                ResolveWord::Gone => Fence::Gone,
            };
            migration.fence(fence).map_err(Refusal::conflict)?;
            tracing::warn!(migration_id = %id, ?word, "the operator decided the outcome");
            return Ok(());
        }
        let arrival = self
            .registry()
            .arrival(id)
            .map(|(name, vm)| (name.clone(), vm.hold));
        match (arrival, word) {
            (Some((name, Hold::Filling { .. })), ResolveWord::RunsHere) => {
                Err(Refusal::conflict(format!(
                    "VM '{name}' runs here already, but pages of it are still at its source and nowhere \
                     else: without them it cannot be whole; wait for the source, or give the guest up \
                     with --gone"
                )))
            }
            (Some((name, Hold::Filling { .. })), ResolveWord::Gone) => {
                self.give_up_arrival(id, &name)
            }
            (Some((name, _)), _) => Err(Refusal::conflict(format!(
                "VM '{name}' runs here with all its pages: there is nothing to decide"
            ))),
            // Over, or never known: which of them, the refusal says.
            (None, _) => known.and_then(|_| self.running_migration(id)).map(drop),
        }
    }

    /// The operator says that the source of a guest that misses pages will not come back.
    fn give_up_arrival(&self, id: MigrationId, name: &VmName) -> Result<(), Refusal> {
        let undecided = || {
            Refusal::conflict(format!(
                "VM '{name}' misses no pages any more, or nobody waits for them: nothing is decided"
            ))
        };
        let peers = self.peers.get().ok_or_else(undecided)?;
        let mut incoming = peers.incoming().into_iter();
        let source = incoming.find(|one| one.id == id && one.is_connected);
        if let Some(from) = source.and_then(|source| source.from) {
            return Err(Refusal::conflict(format!(
                "the source of VM '{name}', {from}, is connected and has what is missing: 'limosa \
                 drain {name}' there sends it, or 'limosa stop {name}' here ends the guest"
            )));
        }
        if !peers.give_up(id, "the operator said that its source will not come back") {
            return Err(undecided());
        }
        tracing::warn!(migration_id = %id, vm = %name, "the operator gave the guest up");
        Ok(())
    }

    /// Aborts a migration.
    ///
    /// # Errors
    /// It is not known, over, or too late.
    pub fn abort(&self, id: &str) -> Result<(), Refusal> {
        let id = parse_id(id)?;
        let migration = self.running_migration(id)?;
        migration
            .abort()
            .map_err(|error| Refusal::conflict(error.to_string()))?;
        tracing::info!(migration_id = %id, "abort asked for");
        Ok(())
    }

    fn running_migration(&self, id: MigrationId) -> Result<Arc<Migration>, Refusal> {
        self.migrations_lock()
            .running(id)?
            .ok_or_else(|| Refusal::conflict(format!("migration {id} is over")))
    }
}

/// How many streams can be used was settled when they were opened.
fn check_streams(patch: &LimitsPatch, open: u8) -> Result<(), Refusal> {
    match patch.streams.and_then(Streams::number) {
        Some(number) if number > open => Err(Refusal::bad_request(format!(
            "streams is {number}, and {open} are open: give 1 to {open}, or auto"
        ))),
        _ => Ok(()),
    }
}

fn parse_id(id: &str) -> Result<MigrationId, Refusal> {
    crate::api::parse_id(id).ok_or_else(|| {
        Refusal::bad_request(format!(
            "{id:?} is not a migration id: expected 32 hexadecimal digits"
        ))
    })
}
