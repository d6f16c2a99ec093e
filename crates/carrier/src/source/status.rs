//! Where a migration stands, in the numbers that an operator wants to see.

use limosa_engine::handover::MigrationId;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::MigrationReport;
use limosa_engine::source::{Source, Stage};
use limosa_engine::throttle::Throttle;
use limosa_pages::{BytesPerSecond, PageCount, PagesPerSecond};
use serde::Serialize;
use std::time::Duration;

/// A snapshot of a migration.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationStatus {
    /// The attempt.
    pub id: MigrationId,
    /// The technique.
    pub mode: Mode,
    /// How far it is.
    pub stage: Stage,
    /// The round that is being sent, from 0.
    pub round: u32,
    /// Pages of that round.
    pub round_pages: PageCount,
    /// Pages of it that were sent.
    pub round_sent_pages: PageCount,
    /// Pages of it that were not.
    pub remaining_pages: PageCount,
    /// Hot pages that it leaves out and the last round sends.
    pub deferred_pages: PageCount,
    /// Pages that the guest, which runs at the target, misses and that were not sent yet.
    pub unsent_pages: PageCount,
    /// Distinct pages a second that the guest dirtied during the last round.
    pub dirty_rate: Option<u64>,
    /// How fast the guest may write; `None` if as fast as it can.
    pub throttle: Option<Throttle>,
    /// Push streams that are given pages now.
    pub streams_in_use: u8,
    /// Push streams that are open, or will be on the next connection.
    pub streams_open: u8,
    /// Payload rate of the rounds as delivered, until the switch.
    pub bandwidth: Option<BytesPerSecond>,
    /// Downtime if the guest were paused now, until the switch.
    pub predicted_downtime: Option<Duration>,
    /// Since the request.
    pub elapsed: Duration,
    /// Time to send the rest of this round; what comes after depends on the guest.
    pub time_left: Option<Duration>,
    /// Why the outcome is not known, while it is not.
    pub unresolved: Option<String>,
    /// What is allowed now.
    pub limits: Limits,
    /// What is known so far.
    pub report: MigrationReport,
}

impl MigrationStatus {
    /// `pages_out` counts the pages handed to the kernel in all rounds: finer than the engine's
    /// count, which grows by pieces; `unsent` those that a guest at the target waits for.
    pub(super) fn of(
        source: &Source,
        (pages_out, unsent): (PageCount, PageCount),
        elapsed: Duration,
        unresolved: Option<String>,
    ) -> Self {
        let mut report = source.report().clone();
        if let Some(throttle) = &mut report.throttle {
            throttle.time = source.throttled_for(elapsed);
        }
        let progress = source.progress();
        let (round_pages, _) = source.round_progress();
        let round_sent_pages = pages_out
            .saturating_sub(report.pages_sent())
            .min(round_pages);
        let remaining_pages = round_pages.saturating_sub(round_sent_pages);
        let last = report.rounds.last();
        let dirty_rate =
            // What that round left out was dirty before.
            last.and_then(|last| {
                let dirtied = last.dirty_after.saturating_sub(last.deferred);
                PagesPerSecond::measured(dirtied, last.time)
            });
        // Of the next switch, and of rounds: afterwards there is neither.
        let is_copying = matches!(
            source.stage(),
            Stage::Preparing | Stage::Copying | Stage::Paused
        );
        let bandwidth = progress.bandwidth.filter(|_| is_copying);
        let predicted_downtime = progress.predicted_downtime().filter(|_| is_copying);
        let time_left = bandwidth.and_then(|rate| rate.time_for(remaining_pages.bytes()));
        Self {
            id: report.id,
            mode: source.mode(),
            stage: source.stage(),
            round: progress.rounds,
            round_pages,
            round_sent_pages,
            remaining_pages,
            deferred_pages: progress.deferred,
            unsent_pages: unsent,
            dirty_rate: dirty_rate.map(PagesPerSecond::get),
            throttle: source.throttle(),
            streams_in_use: source.streams_in_use(),
            streams_open: source.streams_open(),
            bandwidth,
            predicted_downtime,
            elapsed: if report.outcome.is_some() {
                report.eviction
            } else {
                elapsed
            },
            time_left,
            // A target that was asked and has answered leaves nothing open.
            unresolved: unresolved.filter(|_| source.stage() == Stage::Unresolved),
            limits: *source.limits(),
            report,
        }
    }
}
