//! Migrations away from this host: the running ones, and the reports of past ones.
//!
//! A migration that is over gives up its engine and journal at the next look and leaves its last
//! status, so that a daemon that has moved thousands of guests is no bigger than one that moved
//! one.

use crate::api::{MigrationInfo, Report, ThrottleInfo, milliseconds};
use crate::refusal::Refusal;
use limosa_carrier::Migration;
use limosa_engine::handover::MigrationId;
use limosa_os::dirty::TrackerKind;
use limosa_pages::BytesPerSecond;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Reports that are kept.
const PAST_MAX: usize = 256;

/// The migrations away from this host, oldest first.
#[derive(Default)]
pub struct Migrations {
    records: VecDeque<Record>,
}

struct Record {
    id: MigrationId,
    vm: String,
    to: String,
    tracker: TrackerKind,
    progress: Progress,
}

enum Progress {
    Running(Arc<Migration>),
    Past(Box<MigrationInfo>),
}

impl Migrations {
    /// Adds one that has just been started, of a machine with that tracker.
    pub fn insert(
        &mut self,
        migration: Arc<Migration>,
        vm: String,
        to: String,
        tracker: TrackerKind,
    ) {
        self.settle();
        let id = migration.id();
        self.records.push_back(Record {
            id,
            vm,
            to,
            tracker,
            progress: Progress::Running(migration),
        });
        while self.records.len() > PAST_MAX {
            let oldest = self
                .records
                .iter()
                .position(|record| matches!(record.progress, Progress::Past(_)));
            let Some(oldest) = oldest else { break };
            self.records.remove(oldest);
        }
    }

    /// Lets go of everything but the last status of those that are over.
    pub fn settle(&mut self) {
        for record in &mut self.records {
            if let Progress::Running(migration) = &record.progress
                && migration.wait(Duration::ZERO).is_some()
            {
                let info = record.info_of(migration);
                record.progress = Progress::Past(Box::new(info));
            }
        }
    }

    /// All of them.
    pub fn list(&mut self) -> Vec<MigrationInfo> {
        self.settle();
        self.records.iter().map(Record::info).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// It is not known.
    pub fn info(&mut self, id: MigrationId) -> Result<MigrationInfo, Refusal> {
        self.settle();
        self.find(id).map(Record::info)
    }

    /// The handle of one that runs; `None` if it is over.
    ///
    /// # Errors
    /// It is not known.
    pub fn running(&self, id: MigrationId) -> Result<Option<Arc<Migration>>, Refusal> {
        self.find(id).map(|record| match &record.progress {
            Progress::Running(migration) => Some(Arc::clone(migration)),
            Progress::Past(_) => None,
        })
    }

    /// Handles of all that run.
    pub fn all_running(&mut self) -> Vec<Arc<Migration>> {
        self.settle();
        let running = self
            .records
            .iter()
            .filter_map(|record| match &record.progress {
                Progress::Running(migration) => Some(Arc::clone(migration)),
                Progress::Past(_) => None,
            });
        running.collect()
    }

    fn find(&self, id: MigrationId) -> Result<&Record, Refusal> {
        self.records
            .iter()
            .find(|record| record.id == id)
            .ok_or_else(|| {
                Refusal::not_found(format!(
                    "no migration {id} from this host: 'limosa status' shows the last {PAST_MAX}"
                ))
            })
    }
}

impl Record {
    fn info(&self) -> MigrationInfo {
        match &self.progress {
            Progress::Running(migration) => self.info_of(migration),
            Progress::Past(info) => (**info).clone(),
        }
    }

    fn info_of(&self, migration: &Migration) -> MigrationInfo {
        info(migration, &self.vm, &self.to, self.tracker)
    }
}

/// A status as the interface tells it.
fn info(migration: &Migration, vm: &str, to: &str, tracker: TrackerKind) -> MigrationInfo {
    let status = migration.status();
    MigrationInfo {
        id: status.id.to_string(),
        vm: vm.to_owned(),
        to: to.to_owned(),
        encrypted: migration.is_encrypted(),
        mode: status.mode,
        stage: status.stage,
        round: status.round,
        round_pages: status.round_pages.get(),
        round_sent_pages: status.round_sent_pages.get(),
        remaining_pages: status.remaining_pages.get(),
        deferred_pages: status.deferred_pages.get(),
        unsent_pages: status.unsent_pages.get(),
        dirty_pages_per_s: status.dirty_rate,
        throttle: status.throttle.map(ThrottleInfo::from),
        streams_in_use: status.streams_in_use,
        streams_open: status.streams_open,
        bandwidth: status.bandwidth.map(BytesPerSecond::get),
        predicted_downtime_ms: status.predicted_downtime.map(milliseconds),
        elapsed_ms: milliseconds(status.elapsed),
        time_left_ms: status.time_left.map(milliseconds),
        unresolved: status.unresolved,
        dirty_tracker: tracker,
        limits: status.limits.into(),
        report: Report::from(&status.report),
    }
}
