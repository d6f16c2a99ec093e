//! One move without faults, measured: what `demo` shows on a machine without KVM.
//!
//! The engines are the real ones and the figures are those of virtual time: they say what the
//! algorithm does with this guest on this link, not what this computer can do.

use crate::guest::Habits;
use crate::link::LinkProfile;
use crate::workload::Workload;
use crate::world::{World, WorldConfig};
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::handover::MigrationId;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::MigrationReport;
use limosa_engine::source::SourceConfig;
use limosa_pages::{BytesPerSecond, PAGE_SIZE, PageCount};

/// Pages over which dirty counts are given, as a real daemon counts them: 2 MiB.
const CHUNK: PageCount = PageCount::new(512);
/// The guest runs this long before the move and after it.
const AROUND: Duration = Duration::from_secs(1);
/// Pages that a sender reads at one moment.
const BATCH: u64 = 64;
/// Bytes of state beside the registers: what one vCPU and a few devices take.
const STATE_FILLER: usize = 16 << 10;
/// A rate that counts as the former one.
const FULL_SPEED_PERCENT: u32 = 90;
/// So long after the switch a move on demand is drained.
const DRAIN_AFTER: Duration = Duration::from_millis(200);
/// Over this time a rate is taken.
const RATE_WINDOW: Duration = Duration::from_millis(1);

/// A guest, a link and a technique.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// The technique.
    pub mode: Mode,
    /// Size of the guest.
    pub memory: PageCount,
    /// Pages that exist when the move begins; the rest are holes.
    pub touched: PageCount,
    /// Which pages it writes.
    pub workload: Workload,
    /// How many it writes a second; 0 is none.
    pub rate: u64,
    /// The link.
    pub link: LinkProfile,
    /// Whether it is known which vCPU dirties how much, as the dirty rings tell it.
    pub counts_vcpus: bool,
    /// Push streams.
    pub streams: u8,
    /// What the operator allows.
    pub limits: Limits,
    /// Compare digests after the switch.
    pub verify: bool,
    /// Of all dice.
    pub seed: u64,
}

impl Default for Scenario {
    /// 256 MiB of which 64 MiB are written at 20,000 pages a second, over 10 Gbit/s.
    fn default() -> Self {
        let memory = PageCount::new((256 << 20) / PAGE_SIZE);
        Self {
            mode: Mode::PreCopy,
            memory,
            touched: memory,
            workload: Workload::Uniform {
                working_set: PageCount::new((64 << 20) / PAGE_SIZE),
            },
            rate: 20_000,
            link: LinkProfile {
                rate: BytesPerSecond::new(1_000_000_000),
                delay: Duration::from_micros(100),
                jitter: Duration::from_micros(20),
            },
            counts_vcpus: false,
            streams: 2,
            limits: Limits::default(),
            verify: true,
            seed: 1,
        }
    }
}

/// What a move came to.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulatedMove {
    /// As the source's engine tells it.
    pub report: MigrationReport,
    /// How long the guest stood at the switch, by true (virtual) time.
    pub guest_gap: Duration,
    /// The longest time for which it stood, from the begin of the move to a second after its end.
    pub worst_stall: Duration,
    /// From the guest's stop until it writes at nine tenths of its former rate again.
    pub resume: Duration,
    /// How long it stood at pages that had not come, all together.
    pub stalled_at_pages: Duration,
    /// Page writes a second before the move.
    pub writes_before: f64,
    /// During it.
    pub writes_during: f64,
    /// After it.
    pub writes_after: f64,
    /// Stale reads of the guest, and other broken rules.
    pub integrity_errors: u64,
}

/// Moves a guest once. A function of the scenario: no clock, no thread.
///
/// # Panics
/// If more pages are touched than there are, or the engine refuses the configuration (no memory,
/// no streams).
pub fn run(scenario: &Scenario) -> SimulatedMove {
    assert!(scenario.touched <= scenario.memory, "touched beyond memory");
    let mut world = World::new(config(scenario));
    idle(&mut world, AROUND);
    let before = Counter::read(&world);
    // The first second warmed the guest up; its stall count begins with the move.
    world.stalls.worst = Duration::ZERO;
    let job = world.begin_migration(source_config(scenario), 0);
    let is_over = |world: &World| world.sources[job].outcome.is_some();
    while world.owner == 0 && !is_over(&world) && world.step() {}
    let gap = world.stalls.last;
    let writes_before = before.rate_since(&Counter::start(scenario.touched));
    // The guest may be fast again long before its move is over, or long after.
    let mut ended = None;
    let fast_after = speed_up(&mut world, writes_before, |world| {
        if ended.is_none() && is_over(world) {
            ended = Some(Counter::read(world));
        }
    });
    while !is_over(&world) && world.step() {}
    let ended = ended.unwrap_or_else(|| Counter::read(&world));
    let after = Counter::read(&world);
    idle(&mut world, AROUND);
    let last = Counter::read(&world);
    SimulatedMove {
        report: world.sources[job].report().clone(),
        guest_gap: gap,
        worst_stall: world.stalls.worst,
        resume: gap + fast_after,
        stalled_at_pages: world.stalls.at_pages,
        writes_before,
        writes_during: ended.rate_since(&before),
        writes_after: last.rate_since(&after),
        integrity_errors: world.guest.stale_reads + u64::from(world.violation.is_some()),
    }
}

/// Writes at a time.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    at: Timestamp,
    writes: u64,
}

impl Counter {
    /// At the guest's start, when booting had written `touched` pages.
    const fn start(touched: PageCount) -> Self {
        Self {
            at: Timestamp::ZERO,
            writes: touched.get(),
        }
    }

    fn read(world: &World) -> Self {
        Self {
            at: world.now,
            writes: world.guest.writes,
        }
    }

    fn rate_since(&self, earlier: &Self) -> f64 {
        let seconds = self.at.since(earlier.at).as_secs_f64();
        if seconds == 0.0 {
            return 0.0;
        }
        (self.writes - earlier.writes) as f64 / seconds
    }
}

/// Lets the world go on for a time.
fn idle(world: &mut World, length: Duration) {
    idle_looking(world, length, &mut |_| {});
}

fn idle_looking(world: &mut World, length: Duration, look: &mut impl FnMut(&World)) {
    let until = world.now.after(length);
    while world.next_at().is_some_and(|at| at <= until) {
        world.step();
        look(world);
    }
    world.pass_to(until);
}

/// Lets the world go on until the guest is at full speed: how long that took. Tells `look` after
/// every step.
fn speed_up(world: &mut World, former: f64, mut look: impl FnMut(&World)) -> Duration {
    let begun = world.now;
    let enough = former * f64::from(FULL_SPEED_PERCENT) / 100.0;
    loop {
        let before = Counter::read(world);
        idle_looking(world, RATE_WINDOW, &mut look);
        let is_fast = Counter::read(world).rate_since(&before) >= enough;
        if is_fast || world.now.since(begun) >= AROUND {
            return before.at.since(begun);
        }
    }
}

fn config(scenario: &Scenario) -> WorldConfig {
    WorldConfig {
        habits: Habits {
            memory: scenario.memory,
            workload: scenario.workload,
            rate: scenario.rate,
            writes_per_mille: 1000,
            sleeps: false,
        },
        touched: scenario.touched,
        link: scenario.link,
        clock_offset: 0,
        batch_max: BATCH,
        state_filler: STATE_FILLER,
        hiccups_per_mille: 0,
        can_fault: true,
        counts_vcpus: scenario.counts_vcpus,
        first_per_mille: 1000,
        drain_after: DRAIN_AFTER,
        planted: None,
        seed: scenario.seed,
        traces: false,
    }
}

fn source_config(scenario: &Scenario) -> SourceConfig {
    SourceConfig {
        id: MigrationId(u128::from(scenario.seed) + 1),
        peer: String::from("target"),
        mode: scenario.mode,
        limits: scenario.limits,
        streams: scenario.streams,
        memory: scenario.memory,
        disks: Vec::new(),
        chunk: CHUNK,
        verify: scenario.verify,
        vm: Vec::new(),
        demanded: Vec::new(),
        boot_id: 1,
    }
}
