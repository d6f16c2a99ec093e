//! Following a migration to its end: progress on a terminal, plain lines elsewhere, and Ctrl-C.
//!
//! The daemon carries the migration, so nothing here can break it: the first Ctrl-C asks for an
//! abort, the second only leaves.

use crate::output::{Output, count, time};
use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use limosa_engine::source::Stage;
use limosa_host::api::{ErrorKind, MigrationInfo, ThrottleInfo, ThrottleKind, milliseconds};
use limosa_host::client::Client;
use limosa_pages::{ByteCount, BytesPerSecond, PAGE_SIZE};
use signal_hook::consts::SIGINT;
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Time between two looks: fast enough for the eye, slow enough to cost a guest nothing.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Time after which a speed can be told.
const SPEED_AFTER: Duration = Duration::from_millis(250);
/// Time after which it is measured anew.
const SPEED_WINDOW: Duration = Duration::from_secs(5);
/// Time between two lines about a round that takes long, where there is no bar.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Follows migrations of one daemon.
pub(crate) struct Follower {
    client: Client,
    output: Output,
    interrupts: Arc<AtomicUsize>,
}

impl Follower {
    /// From now on Ctrl-C is counted and does not end the program.
    pub(crate) fn new(client: Client, output: Output) -> Result<Self> {
        let interrupts = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&interrupts);
        let mut signals = signal_hook::iterator::Signals::new([SIGINT])?;
        std::thread::Builder::new()
            .name("interrupts".to_owned())
            .spawn(move || {
                for _ in signals.forever() {
                    counter.fetch_add(1, Ordering::SeqCst);
                }
            })?;
        Ok(Self {
            client,
            output,
            interrupts,
        })
    }

    /// The daemon.
    pub(crate) const fn client(&self) -> &Client {
        &self.client
    }

    /// Where answers go.
    pub(crate) const fn output(&self) -> Output {
        self.output
    }

    /// Shows a migration until it is over. `owns` says whether it was started by this command: then
    /// Ctrl-C aborts it, otherwise it only ends the showing, and a guest that runs at the target and
    /// whose pages are left here by its mode has come as far as was asked for.
    ///
    /// # Errors
    /// It did not complete, or it was left.
    pub(crate) fn follow(&self, id: &str, owns: bool) -> Result<()> {
        let mut display = Display::new(self.output);
        let mut speedometer = Speedometer::default();
        let mut abort_asked = false;
        loop {
            let info = self.client.wait(id, LOOK_EVERY)?;
            if info.stage == Stage::Finished {
                display.finish();
                return self.conclude(&info);
            }
            if owns && info.stage == Stage::Serving && !info.mode.pushes() {
                display.finish();
                return self.output.answer(&info, residue_line);
            }
            display.show(&speedometer.complete(&info, Instant::now()))?;
            match self.interrupts.load(Ordering::SeqCst) {
                0 => {}
                1 if owns && !abort_asked => {
                    abort_asked = true;
                    display.say(&self.abort(id)?);
                }
                1 if owns => {}
                _ => {
                    display.finish();
                    bail!(
                        "left alone: the migration of {} goes on ('limosa status {} --follow')",
                        info.vm,
                        info.vm
                    );
                }
            }
        }
    }

    fn abort(&self, id: &str) -> Result<String> {
        match self.client.abort(id) {
            Ok(()) => Ok("aborting (Ctrl-C again leaves it alone)".to_owned()),
            Err(error) if error.kind() == Some(ErrorKind::Conflict) => Ok(format!(
                "{error}: waiting for its end (Ctrl-C again leaves it alone)"
            )),
            Err(error) => Err(error.into()),
        }
    }

    fn conclude(&self, info: &MigrationInfo) -> Result<()> {
        let has_completed = info.report.outcome.as_deref() == Some("completed");
        if self.output.json {
            Output::json_line(info)?;
        } else if has_completed {
            crate::output::print(&outcome_line(info))?;
        }
        if info.report.digest_equal == Some(false) {
            bail!(
                "memory or state of {} differ between the two hosts: do not trust this guest",
                info.vm
            );
        }
        if has_completed {
            return Ok(());
        }
        bail!("{}", outcome_line(info))
    }
}

/// Tells from outside how fast pages go where the engine does not: it measures whole rounds, the first one is the
/// longest, and after the switch there are none.
#[derive(Default)]
struct Speedometer {
    /// What is looked at (is it after the switch, and which round), the pages that had gone when that began, and when
    /// it did.
    since: Option<((bool, u32), u64, Instant)>,
    rate: Option<BytesPerSecond>,
}

impl Speedometer {
    /// The same migration with bandwidth and time left filled in, if they can be told.
    fn complete(&mut self, info: &MigrationInfo, now: Instant) -> MigrationInfo {
        let mut info = info.clone();
        let is_serving = info.stage == Stage::Serving;
        let (what, gone) = ((is_serving, info.round), extent(&info).0);
        let (before, from, since) = *self.since.get_or_insert((what, gone, now));
        if before != what || gone < from {
            *self = Self::default();
            return info;
        }
        let elapsed = now.saturating_duration_since(since);
        if elapsed > SPEED_AFTER {
            let bytes = ByteCount::new((gone - from).saturating_mul(PAGE_SIZE));
            let measured = BytesPerSecond::measured(bytes, elapsed);
            self.rate = measured.filter(|rate| rate.get() > 0);
        }
        if elapsed > SPEED_WINDOW {
            self.since = Some((what, gone, now));
        }
        if let Some(rate) = self.rate.filter(|_| info.bandwidth.is_none()) {
            info.bandwidth = Some(rate.get());
            let left = if is_serving {
                info.unsent_pages
            } else {
                info.remaining_pages
            };
            let left = ByteCount::new(left.saturating_mul(PAGE_SIZE));
            info.time_left_ms = rate.time_for(left).map(milliseconds);
        }
        info
    }
}

/// Progress, in the form that suits where it goes.
enum Display {
    Bar(ProgressBar),
    Lines(Changes),
    Json(Changes),
}

/// Says when a line is worth printing: at a new stage or round, and every now and then.
#[derive(Default)]
struct Changes(Option<(Stage, u32, Instant)>);

impl Changes {
    fn is_news(&mut self, info: &MigrationInfo) -> bool {
        let is_known = self.0.is_some_and(|(stage, round, told)| {
            (stage, round) == (info.stage, info.round) && told.elapsed() < TELL_EVERY
        });
        if !is_known {
            self.0 = Some((info.stage, info.round, Instant::now()));
        }
        !is_known
    }
}

impl Display {
    fn new(output: Output) -> Self {
        if output.json {
            return Self::Json(Changes::default());
        }
        if !std::io::stderr().is_terminal() {
            return Self::Lines(Changes::default());
        }
        let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{prefix:<9} [{bar:24}] {percent:>3}%  {wide_msg}");
        bar.set_style(
            style
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        Self::Bar(bar)
    }

    fn show(&mut self, info: &MigrationInfo) -> Result<()> {
        match self {
            Self::Bar(bar) => {
                let (done, all) = extent(info);
                bar.set_length(all.max(1));
                bar.set_position(done);
                bar.set_prefix(headline(info));
                bar.set_message(numbers(info));
            }
            Self::Lines(changes) => {
                if changes.is_news(info) {
                    eprintln!("{}: {}", headline(info), numbers(info));
                }
            }
            Self::Json(changes) => {
                if changes.is_news(info) {
                    Output::json_line(info)?;
                }
            }
        }
        Ok(())
    }

    fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Self::Lines(_) | Self::Json(_) => eprintln!("{text}"),
        }
    }

    fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// The name of a stage.
pub(crate) const fn stage_name(stage: Stage) -> &'static str {
    match stage {
        Stage::Preparing => "preparing",
        Stage::Copying => "copying",
        Stage::Paused => "paused",
        Stage::Committed => "committed",
        Stage::Serving => "serving",
        Stage::Unresolved => "unresolved",
        Stage::Releasing => "releasing",
        Stage::Returning => "returning",
        Stage::Finished => "finished",
    }
}

pub(crate) fn headline(info: &MigrationInfo) -> String {
    match info.stage {
        Stage::Copying => format!("round {}", info.round),
        stage => stage_name(stage).to_owned(),
    }
}

/// The numbers of a migration in one line, those that are known.
pub(crate) fn numbers(info: &MigrationInfo) -> String {
    if let Some(reason) = &info.unresolved {
        return format!("{reason}; asking again");
    }
    if info.stage == Stage::Serving {
        return serving(info);
    }
    let mut parts = Vec::new();
    if info.round_pages > 0 {
        parts.push(format!("{} pages left", count(info.remaining_pages)));
    }
    if info.deferred_pages > 0 {
        parts.push(format!("{} hot ones left out", count(info.deferred_pages)));
    }
    if let Some(rate) = info.dirty_pages_per_s {
        parts.push(format!("guest writes {} pages/s", count(rate)));
    }
    if let Some(throttle) = &info.throttle {
        parts.push(how_slow(throttle));
    }
    if let Some(rate) = info.bandwidth {
        parts.push(BytesPerSecond::new(rate).to_string());
    }
    if let Some(downtime) = info.predicted_downtime_ms {
        parts.push(format!("downtime {} expected", time(downtime)));
    }
    if let Some(left) = info.time_left_ms {
        parts.push(format!("{} left", time(left)));
    }
    if parts.is_empty() {
        return format!("{} to {}", info.vm, info.to);
    }
    parts.join(", ")
}

/// How fast a guest may write.
pub(crate) fn how_slow(throttle: &ThrottleInfo) -> String {
    match throttle.kind {
        ThrottleKind::PerVcpu => {
            let quota = throttle.quota_pages_per_s.unwrap_or(0);
            format!("each vCPU at most {} pages/s", count(quota))
        }
        ThrottleKind::Equal => {
            let percent = throttle.share.unwrap_or(1.0) * 100.0;
            format!("all vCPUs equally at {percent:.0} % of the time")
        }
    }
}

/// What was done of the stage that the migration is in, and all of it, in pages.
pub(crate) fn extent(info: &MigrationInfo) -> (u64, u64) {
    if info.stage == Stage::Serving {
        let missing = info.report.missing_at_switch.max(info.unsent_pages);
        return (missing - info.unsent_pages, missing);
    }
    (
        info.round_sent_pages.min(info.round_pages),
        info.round_pages,
    )
}

/// How far a guest is that runs at the target and misses pages.
fn serving(info: &MigrationInfo) -> String {
    let what = if info.mode.pushes() {
        "pages left, pushed and on demand"
    } else {
        "pages left, which go only on demand"
    };
    let (sent, _) = extent(info);
    let mut text = format!(
        "{} runs at {}: {} {what}, {} sent since the switch",
        info.vm,
        info.to,
        count(info.unsent_pages),
        count(sent)
    );
    if let Some(left) = info.time_left_ms.filter(|_| info.mode.pushes()) {
        text.push_str(&format!(", {} left", time(left)));
    }
    text
}

/// How it stands with a guest that runs at the target and whose pages are left here.
pub(crate) fn residue_line(info: &MigrationInfo) -> String {
    let (vm, to) = (&info.vm, &info.to);
    let downtime = info.report.downtime_ms.map_or_else(String::new, |parts| {
        format!(", downtime {}", time(parts.total))
    });
    let left = ByteCount::new(info.unsent_pages.saturating_mul(PAGE_SIZE));
    format!(
        "{vm} runs at {to}{downtime}: running with residual dependency, {} pages ({left}) are still \
         here and go when they are needed; 'limosa drain {vm}' sends them and ends that",
        count(info.unsent_pages)
    )
}

fn rounds(number: usize) -> String {
    match number {
        1 => "1 round".to_owned(),
        more => format!("{more} rounds"),
    }
}

/// How a migration ended, in one line.
pub(crate) fn outcome_line(info: &MigrationInfo) -> String {
    let report = &info.report;
    let (vm, to) = (&info.vm, &info.to);
    let reason = report.reason.as_deref().unwrap_or("no reason is known");
    match report.outcome.as_deref() {
        Some("completed") => {
            let downtime = report.downtime_ms.map_or_else(String::new, |parts| {
                format!(": downtime {}", time(parts.total))
            });
            let verified = if report.digest_equal == Some(true) {
                ", digests equal"
            } else {
                ""
            };
            let pulled = report.pulled_pages.map_or_else(String::new, |pulled| {
                format!(", {} pages pulled", count(pulled))
            });
            format!(
                "{vm} runs at {to}{downtime}, total {}, {}, {} sent{pulled}{verified}",
                time(report.total_ms),
                rounds(report.rounds.len()),
                ByteCount::new(report.wire_bytes)
            )
        }
        Some("aborted") => format!("the migration was aborted: {vm} runs on here"),
        Some("failed") => format!("the migration failed: {reason}; {vm} runs on here"),
        Some("guest-lost") => format!("{vm} is lost: {reason}"),
        _ => format!("the migration of {vm} has no outcome yet"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::tests::info;
    use limosa_engine::policy::Mode;

    #[test]
    fn progress_names_what_is_known() {
        let mut info = info("3f2a", "web");
        assert_eq!(headline(&info), "round 1");
        assert_eq!(
            numbers(&info),
            "750 pages left, guest writes 50,000 pages/s, 1.20 GiB/s, downtime 3.10 ms expected, 400 ms left"
        );
        info.unresolved = Some("no answer from 127.0.0.1:7071".to_owned());
        assert_eq!(
            numbers(&info),
            "no answer from 127.0.0.1:7071; asking again"
        );
    }

    #[test]
    fn a_guest_that_misses_pages_is_told_plainly() {
        let mut info = info("3f2a", "web");
        info.stage = Stage::Serving;
        info.mode = Mode::Demand;
        info.unsent_pages = 60_000;
        info.report.missing_at_switch = 65_536;
        assert_eq!(headline(&info), "serving");
        assert_eq!(extent(&info), (5536, 65_536));
        assert_eq!(
            numbers(&info),
            "web runs at 127.0.0.1:7071: 60,000 pages left, which go only on demand, 5,536 sent since \
             the switch"
        );
        assert_eq!(
            residue_line(&info),
            "web runs at 127.0.0.1:7071: running with residual dependency, 60,000 pages (234 MiB) are \
             still here and go when they are needed; 'limosa drain web' sends them and ends that"
        );
        info.mode = Mode::PostCopy;
        info.report.missing_at_switch = 0;
        assert_eq!(extent(&info), (0, 60_000));
        assert_eq!(
            numbers(&info),
            "web runs at 127.0.0.1:7071: 60,000 pages left, pushed and on demand, 0 sent since the \
             switch, 400 ms left"
        );
    }

    #[test]
    fn a_guest_that_gets_nothing_has_no_time_left() {
        let mut info = info("3f2a", "web");
        info.stage = Stage::Serving;
        info.bandwidth = None;
        info.time_left_ms = None;
        info.report.missing_at_switch = 65_536;
        let mut speedometer = Speedometer::default();
        let start = Instant::now();
        let mut check = |at_ms: u64, unsent: u64, expect: Option<f64>| {
            info.unsent_pages = unsent;
            let seen = speedometer.complete(&info, start + Duration::from_millis(at_ms));
            assert_eq!(seen.time_left_ms.map(f64::round), expect, "{at_ms} ms");
        };
        check(0, 60_000, None);
        check(200, 59_000, None);
        check(1000, 55_000, Some(11_000.0));
        check(5100, 55_000, Some(56_100.0));
        check(5200, 55_000, Some(56_100.0));
        check(5400, 55_000, None);
    }

    #[test]
    fn every_outcome_is_one_clear_line() {
        let mut info = info("3f2a", "web");
        let mut check = |outcome: &str, expect: &str| {
            info.report.outcome = Some(outcome.to_owned());
            info.report.reason = Some("the target refused: no memory".to_owned());
            assert_eq!(outcome_line(&info), expect);
        };
        check(
            "completed",
            "web runs at 127.0.0.1:7071, total 0 ms, 0 rounds, 256 MiB sent",
        );
        check("aborted", "the migration was aborted: web runs on here");
        check(
            "failed",
            "the migration failed: the target refused: no memory; web runs on here",
        );
        check("guest-lost", "web is lost: the target refused: no memory");
    }
}
