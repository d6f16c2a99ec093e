//! What a host does for its operator: one method a request, blocking, thread safe.
//!
//! Three locks, each held for moments: the registry, the migrations, the ledger. No request to a VM
//! process is made under one of them, and the end of a migration takes the registry's alone, since
//! whoever looks at migrations may be waiting for the one that ends.
//!
//! Deliberately absent: HTTP (see `http`), and what other hosts ask (see `arrivals`).

mod adoption;
mod bereft;
mod moves;
mod own_process;
mod preflight;
mod shrinking;
mod vms;

use crate::api::{HostInfo, IncomingInfo};
use crate::departures::Departures;
use crate::ledger::Ledger;
use crate::machine::Machines;
use crate::migrations::Migrations;
use crate::new_disks::NewDisks;
use crate::records::Records;
use crate::refusal::Refusal;
use crate::registry::Registry;
use crate::state_dir::{StateDir, VmName};
use limosa_carrier::{Credentials, IncomingStatus, Listener, Migration};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// How long a migration may take to come to its end after an abort.
const ABORT_MAX: Duration = Duration::from_secs(10);

/// A host.
pub struct Host {
    me: Weak<Self>,
    state: StateDir,
    machines: Box<dyn Machines>,
    registry: Mutex<Registry>,
    migrations: Mutex<Migrations>,
    ledger: Mutex<Ledger>,
    departures: Departures,
    records: Records,
    new_disks: NewDisks,
    credentials: Option<Arc<Credentials>>,
    peers: OnceLock<Listener>,
    is_ending: AtomicBool,
}

impl Host {
    /// A host without virtual machines. With `credentials` whatever it dials is encrypted.
    pub fn new(
        state: StateDir,
        machines: Box<dyn Machines>,
        ledger: Ledger,
        credentials: Option<Arc<Credentials>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            departures: Departures::new(state.departures()),
            records: Records::new(state.demanded()),
            new_disks: NewDisks::new(state.new_disks()),
            state,
            machines,
            registry: Mutex::default(),
            migrations: Mutex::default(),
            ledger: Mutex::new(ledger),
            credentials,
            peers: OnceLock::new(),
            is_ending: AtomicBool::new(false),
        })
    }

    /// Tells where other hosts reach this one. What an earlier daemon left must have been taken up
    /// before, since from now on others are answered.
    ///
    /// # Panics
    /// If it was told before.
    pub fn listens(&self, peers: Listener) {
        self.take_up_arrivals(&peers);
        assert!(self.peers.set(peers).is_ok(), "a host listens once");
    }

    /// What makes its virtual machines.
    pub fn machines(&self) -> &dyn Machines {
        &*self.machines
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What guests have asked for in earlier moves.
    pub(crate) const fn records(&self) -> &Records {
        &self.records
    }

    /// Disks that were made for guests that do not run here yet.
    pub(crate) const fn new_disks(&self) -> &NewDisks {
        &self.new_disks
    }

    fn migrations_lock(&self) -> MutexGuard<'_, Migrations> {
        self.migrations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn peer_address(&self) -> Option<SocketAddr> {
        self.peers.get().map(Listener::local_addr)
    }

    /// What it says about itself.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn info(&self) -> Result<HostInfo, Refusal> {
        let facts = own_process::facts()
            .map_err(|error| Refusal::failed(format!("cannot read /proc/self: {error}")))?;
        Ok(HostInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            peer_address: self
                .peer_address()
                .map_or_else(String::new, |address| address.to_string()),
            encrypted: self.credentials.is_some(),
            boot_id: facts.boot_id,
            state_dir: self.state.root().display().to_string(),
            open_fds: facts.open_fds,
            threads: facts.threads,
            anonymous_bytes: facts.anonymous_bytes,
            vms: self.registry().len() as u64,
        })
    }

    /// Migrations that arrive now.
    pub fn incoming(&self) -> Vec<IncomingInfo> {
        let incoming = self.peers.get().map(Listener::incoming).unwrap_or_default();
        let info = |status: IncomingStatus| IncomingInfo {
            id: status.id.to_string(),
            from: status.from.map(|from| from.to_string()),
            missing_pages: status.missing_pages,
            pages_received: status.pages_received,
            bytes_received: status.bytes_received,
            is_committed: status.is_committed,
            is_connected: status.is_connected,
            stuck: status.stuck,
        };
        incoming.into_iter().map(info).collect()
    }

    /// How many migrations, to this host or away from it, are not over.
    pub fn under_way(&self) -> usize {
        let leaving = self.migrations_lock().all_running().len();
        leaving + self.incoming().len()
    }

    /// No migration begins here any more.
    pub(crate) fn check_not_ending(&self) -> Result<(), Refusal> {
        if self.is_ending.load(Ordering::SeqCst) {
            return Err(Refusal::conflict(
                "this daemon is about to end: start another one on its state directory first",
            ));
        }
        Ok(())
    }

    /// Ends migrations that can still be ended and waits for the others, at most `patience`; how
    /// many are left then. Virtual machines stay.
    pub fn wind_down(&self, patience: Duration) -> usize {
        self.is_ending.store(true, Ordering::SeqCst);
        let until = Instant::now() + patience;
        let running = self.migrations_lock().all_running();
        for migration in &running {
            let id = migration.id();
            if migration.abort().is_ok() {
                continue;
            }
            tracing::info!(migration_id = %id, "too late to abort: waiting for its end");
            // Without an order to drain, pure demand paging would have none.
            let status = migration.status();
            if status.stage == Stage::Serving && !status.mode.pushes() {
                let drains = migration.set_mode(Mode::PostCopy);
                tracing::info!(migration_id = %id, ?drains, "its remaining pages are pushed");
            }
        }
        if let Some(peers) = self.peers.get() {
            for incoming in peers.incoming() {
                peers.abort(incoming.id);
            }
        }
        let is_left = |migration: &&Arc<Migration>| {
            migration
                .wait(until.saturating_duration_since(Instant::now()))
                .is_none()
        };
        let left = running.iter().filter(is_left).count();
        while !self.incoming().is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        left + self.incoming().len()
    }
}

fn parse_name(name: &str) -> Result<VmName, Refusal> {
    VmName::new(name).map_err(Refusal::bad_request)
}
