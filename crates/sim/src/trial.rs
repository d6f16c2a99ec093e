//! A trial: one seed becomes a guest, a link, a schedule of faults and a few migrations, and either
//! every rule holds or the trial says which one did not.
//!
//! A trial has two parts. In the first, one or two migrations run while things go wrong. When the
//! last fault has healed, everything must come to rest within a bound of virtual time. In the
//! second, nothing goes wrong, and the guest, if no fault killed it, must move there and back.

use crate::checker::{Rule, Violation};
use crate::fault::{Deed, Fault, Planted, Trigger};
use crate::guest::Habits;
use crate::link::LinkProfile;
use crate::random::Random;
use crate::workload::Workload;
use crate::world::{World, WorldConfig};
use core::time::Duration;
use limosa_engine::Timestamp;
use limosa_engine::deferral::Deferral;
use limosa_engine::handover::MigrationId;
use limosa_engine::policy::{Limits, Mode};
use limosa_engine::report::{MigrationReport, Outcome};
use limosa_engine::source::SourceConfig;
use limosa_engine::streams::Streams;
use limosa_engine::throttle::Throttling;
use limosa_pages::{BytesPerSecond, PageCount};

/// A healed world must be at rest after this time: the engines' silence and stall limits (10 s and
/// 30 s) one after the other, and the copying of a small guest at the lowest limit.
const REST_WITHIN: Duration = Duration::from_secs(120);
/// Steps after which a trial is going round in circles; the longest sound one takes a tenth.
const STEPS_MAX: u64 = 400_000;
/// Guests whose rounds are cut into so many pieces that all streams have some of them and others wait.
/// Not where all of it is missed page by page: that takes too many steps.
const LARGE_PER_MILLE: u64 = 30;
/// Migrations in the first part.
const FAULTY_MIGRATIONS_MAX: usize = 3;

/// What to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// The technique of every migration.
    pub mode: Mode,
    /// Of all dice.
    pub seed: u64,
    /// Whether things go wrong.
    pub has_faults: bool,
    /// A fault of limosa's own to be caught.
    pub planted: Option<Planted>,
    /// Whether every journal is replayed at the end.
    pub replays: bool,
    /// Whether every step is told on standard error.
    pub traces: bool,
}

impl Trial {
    /// With faults, without planted ones, quietly.
    pub const fn new(mode: Mode, seed: u64) -> Self {
        Self {
            mode,
            seed,
            has_faults: true,
            planted: None,
            replays: seed.is_multiple_of(16),
            traces: false,
        }
    }

    /// Runs it.
    ///
    /// # Errors
    /// The first rule that was broken.
    pub fn run(&self) -> Result<Summary, Violation> {
        let mut random = Random::new(self.seed ^ 0x6c69_6d6f_7361);
        let plan = Plan::draw(self, &mut random);
        let mut world = World::new(plan.world);
        let mut course = Course {
            trial: self,
            plan,
            random,
            migrations: 0,
        };
        course.first_part(&mut world)?;
        course.second_part(&mut world)?;
        if self.replays {
            world.check_journals();
            course.broken(&world)?;
        }
        Ok(Summary {
            steps: world.steps,
            deeds: world.deeds,
            virtual_time: world.now.since(Timestamp::ZERO),
            journal_hash: world.journal_hash(),
            reports: world
                .sources
                .iter()
                .map(|job| job.report().clone())
                .collect(),
            faults: world.faults.len(),
        })
    }
}

/// What a trial that broke no rule came to.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Events of the world.
    pub steps: u64,
    /// Deeds of daemons and VM processes.
    pub deeds: u32,
    /// How long it took there.
    pub virtual_time: Duration,
    /// Over all journals.
    pub journal_hash: u64,
    /// Of all migrations, recoveries included.
    pub reports: Vec<MigrationReport>,
    /// How many faults were scheduled.
    pub faults: usize,
}

/// What the dice made of a seed.
struct Plan {
    world: WorldConfig,
    streams: u8,
    verify: bool,
    limits: Limits,
    faults: Vec<Fault>,
}

impl Plan {
    fn draw(trial: &Trial, random: &mut Random) -> Self {
        let mut stream_dice = Random::new(trial.seed ^ 0x73_7472_6561_6d73);
        let memory = draw_memory(random);
        let may_be_large = !matches!(trial.mode, Mode::Demand | Mode::PostCopy);
        let is_large = may_be_large && stream_dice.per_mille(LARGE_PER_MILLE);
        let memory = if is_large {
            PageCount::new(stream_dice.between(10_000, 24_000))
        } else {
            memory
        };
        let streams = u8::try_from(random.between(1, 4)).expect("small");
        // Dice of their own, so that an older seed still means what it meant.
        let mut dice = Random::new(trial.seed ^ 0x6661_756c_7473);
        let faults = if trial.has_faults {
            let mut faults = draw_faults(trial.mode, random);
            draw_more_faults(trial.mode, &mut dice, &mut faults);
            faults
        } else {
            Vec::new()
        };
        let mut world = draw_world(trial, memory, random, &mut dice);
        let verify = random.per_mille(400);
        let mut limits = draw_limits(random);
        let mut more_dice = Random::new(trial.seed ^ 0x7468_726f_7474_6c65);
        world.counts_vcpus = more_dice.per_mille(500);
        limits.throttle = *more_dice.pick(&Throttling::ALL);
        let mut faults = faults;
        draw_changes_of_streams(trial, is_large, &mut stream_dice, &mut limits, &mut faults);
        let mut deferral_dice = Random::new(trial.seed ^ 0x6465_6665_7272_616c);
        limits.defer = *deferral_dice.pick(&Deferral::ALL);
        Self {
            world,
            streams,
            verify,
            limits,
            faults,
        }
    }
}

/// Mostly small guests, since steps cost time; now and then one that is cut into several pieces.
fn draw_memory(random: &mut Random) -> PageCount {
    PageCount::new(match random.below(20) {
        0..12 => random.between(1, 200),
        12..18 => random.between(200, 900),
        _ => random.between(2100, 5000),
    })
}

fn draw_world(
    trial: &Trial,
    memory: PageCount,
    random: &mut Random,
    dice: &mut Random,
) -> WorldConfig {
    let working_set = PageCount::new(random.between(1, memory.get()));
    let workload = match random.below(6) {
        0 => Workload::Idle,
        1 => Workload::Sequential { working_set },
        2 => Workload::Zipf { working_set },
        3 => Workload::Phases { working_set },
        _ => Workload::Uniform { working_set },
    };
    let jitter = *random.pick(&[0, 20, 200, 3000]);
    let link = LinkProfile {
        rate: BytesPerSecond::new(*random.pick(&[40, 120, 500, 2000]) * 1_000_000),
        delay: random.micros(10, 500),
        jitter: Duration::from_micros(jitter),
    };
    let clock_offset = match random.below(3) {
        0 => 0,
        1 => i64::try_from(random.below(4_000_000_000)).expect("small"),
        _ => i64::try_from(random.below(1 << 50)).expect("small"),
    };
    WorldConfig {
        habits: Habits {
            memory,
            workload,
            rate: *random.pick(&[300, 3000, 20_000, 60_000]),
            writes_per_mille: *random.pick(&[50, 500, 900]),
            sleeps: true,
        },
        touched: PageCount::new(random.between(0, memory.get())),
        link,
        clock_offset,
        batch_max: *random.pick(&[4, 16, 64]),
        state_filler: 8,
        hiccups_per_mille: if trial.has_faults {
            *random.pick(&[0, 10, 10, 100])
        } else {
            0
        },
        can_fault: trial.mode.needs_faults() || dice.per_mille(900),
        counts_vcpus: false,
        first_per_mille: *dice.pick(&[0, 500, 1000]),
        drain_after: dice.micros(500, 40_000),
        planted: trial.planted,
        seed: random.next(),
        traces: trial.traces,
    }
}

fn draw_limits(random: &mut Random) -> Limits {
    Limits {
        downtime_max: random.micros(500, 20_000),
        bandwidth_max: random
            .per_mille(200)
            .then(|| BytesPerSecond::new(random.between(20, 200) * 1_000_000)),
        deadline: random.per_mille(100).then(|| random.micros(1000, 300_000)),
        rounds_max: u32::try_from(random.between(1, 12)).expect("small"),
        throttle: Throttling::Off,
        streams: Streams::AUTO,
        defer: Deferral::Off,
    }
}

/// Of those that are open, which may be fewer.
fn draw_streams(most: u64, dice: &mut Random) -> Streams {
    let number = u8::try_from(dice.between(0, most)).expect("small");
    Streams::fixed(number).unwrap_or_default()
}

fn draw_faults(mode: Mode, random: &mut Random) -> Vec<Fault> {
    let count = *random.pick(&[0, 1, 1, 2, 2, 3, 4, 5]);
    (0..count)
        .map(|_| Fault {
            trigger: draw_trigger(mode, random),
            deed: draw_deed(random),
            is_done: false,
        })
        .collect()
}

/// What can happen to a guest that runs before its pages are there, and what an operator may want.
fn draw_more_faults(mode: Mode, dice: &mut Random, faults: &mut Vec<Fault>) {
    let while_filling = match mode {
        Mode::StopAndCopy | Mode::PreCopy => 0,
        _ => *dice.pick(&[0, 0, 1, 1, 2, 3]),
    };
    let mut add = |trigger, deed| {
        faults.push(Fault {
            trigger,
            deed,
            is_done: false,
        });
    };
    for _ in 0..while_filling {
        let trigger = Trigger::NearCommit(dice.micros(0, 150_000));
        add(trigger, draw_deed(dice));
    }
    while dice.per_mille(150) {
        let trigger = draw_trigger(mode, dice);
        add(trigger, Deed::SetMode(*dice.pick(&Mode::ALL)));
    }
    while dice.per_mille(200) && while_filling > 0 {
        let trigger = Trigger::NearCommit(dice.micros(0, 150_000));
        let mode = *dice.pick(&[Mode::Demand, Mode::PostCopy]);
        add(trigger, Deed::SetMode(mode));
    }
    if dice.per_mille(40) {
        let host = usize::from(dice.per_mille(500));
        let trigger = draw_trigger(mode, dice);
        add(trigger, Deed::LoseHost { host });
    }
}

/// How many streams are used, at first and after each of an operator's words.
fn draw_changes_of_streams(
    trial: &Trial,
    is_large: bool,
    dice: &mut Random,
    limits: &mut Limits,
    faults: &mut Vec<Fault>,
) {
    let (often, most) = if is_large { (800, 2) } else { (300, 5) };
    limits.streams = draw_streams(most, dice);
    for fault in faults.iter_mut() {
        if let Deed::Set(limits) = &mut fault.deed {
            limits.streams = draw_streams(most, dice);
        }
    }
    while trial.has_faults && dice.per_mille(often) {
        let trigger = match dice.below(6) {
            0 | 1 => Trigger::NearCommit(dice.micros(0, 150_000)),
            2 | 3 => Trigger::NearPause(dice.micros(0, 100_000)),
            _ => draw_trigger(trial.mode, dice),
        };
        let limits = Limits {
            streams: draw_streams(most, dice),
            ..*limits
        };
        faults.push(Fault {
            trigger,
            deed: Deed::Set(limits),
            is_done: false,
        });
    }
}

fn draw_trigger(mode: Mode, random: &mut Random) -> Trigger {
    if random.per_mille(200) {
        return Trigger::At(Timestamp::from_nanos(random.below(80_000_000)));
    }
    if random.per_mille(300) {
        return Trigger::NearCommit(random.micros(0, 3000));
    }
    // A migration of one round takes 60 to 80 deeds; each further round some ten.
    let usual = if mode.copies_live() { 160 } else { 100 };
    let last = if random.per_mille(200) {
        2 * usual
    } else {
        usual
    };
    Trigger::AtDeed(u32::try_from(random.between(1, last)).expect("small"))
}

fn draw_deed(random: &mut Random) -> Deed {
    let host = usize::from(random.per_mille(500));
    let back = match random.below(3) {
        0 => random.micros(10, 2000),
        1 => random.micros(1000, 300_000),
        _ => random.micros(100_000, 14_000_000),
    };
    let is_silent = random.per_mille(400);
    match random.below(18) {
        0..5 => Deed::KillDaemon { host, back },
        5..7 => Deed::KillVm { host },
        7 => Deed::KillHost { host, back },
        8..11 => Deed::CutLink { back, is_silent },
        11 => Deed::CutStream {
            stream: u8::try_from(random.below(4)).expect("small"),
            is_silent,
        },
        12..14 => Deed::Stall { length: back },
        14 => Deed::Abort,
        15 => Deed::AbortAtTarget,
        16 => Deed::Set(draw_limits(random)),
        _ => Deed::RefuseCreate,
    }
}

/// A trial under way.
struct Course<'a> {
    trial: &'a Trial,
    plan: Plan,
    random: Random,
    migrations: u128,
}

impl Course<'_> {
    /// Migrations while things go wrong, until everything is healed and at rest.
    fn first_part(&mut self, world: &mut World) -> Result<(), Violation> {
        world.arm(core::mem::take(&mut self.plan.faults));
        let warm_up = self.random.micros(10, 900);
        self.go_on(world, warm_up)?;
        for _ in 0..FAULTY_MIGRATIONS_MAX {
            if self.begin(world).is_none() {
                break;
            }
            self.come_to_rest(world)?;
            self.go_on(world, Duration::from_millis(2))?;
            if !world.is_armed() {
                break;
            }
        }
        world.disarm();
        self.come_to_rest(world)?;
        let healed = world.healed_at.since(world.now);
        self.go_on(world, healed)?;
        world.check_rest();
        self.broken(world)
    }

    /// There and back, with nothing in the way.
    fn second_part(&mut self, world: &mut World) -> Result<(), Violation> {
        for _ in 0..2 {
            let Some(job) = self.begin(world) else {
                return Ok(());
            };
            self.come_to_rest(world)?;
            if world.sources[job].outcome != Some(Outcome::Completed) {
                let outcome = &world.sources[job].outcome;
                let text = format!("a migration without faults ended with {outcome:?}");
                return Err(violation(Rule::NextMigration, text));
            }
            world.check_rest();
            self.broken(world)?;
        }
        Ok(())
    }

    /// Begins a migration of the guest from wherever it runs; `None` if it does not.
    fn begin(&mut self, world: &mut World) -> Option<usize> {
        let vm = world.vms.iter().position(|vm| vm.is_running)?;
        let host = world.vms[vm].host;
        // A guest that misses pages for ever does not move on.
        let is_stranded = world.vms[vm].memory.misses_pages();
        if is_stranded || !world.hosts[host].is_ready() || world.hosts[1 - host].is_lost {
            return None;
        }
        self.migrations += 1;
        let config = SourceConfig {
            id: MigrationId((u128::from(self.trial.seed) << 8) + self.migrations),
            peer: format!("host-{}", 1 - host),
            mode: self.trial.mode,
            limits: self.plan.limits,
            streams: self.plan.streams,
            memory: self.plan.world.habits.memory,
            disks: Vec::new(),
            chunk: PageCount::new(64),
            verify: self.plan.verify,
            vm: Vec::new(),
            demanded: Vec::new(),
            boot_id: world.hosts[host].boot_id,
        };
        Some(world.begin_migration(config, vm))
    }

    /// Lets the world go on until nobody has anything to do.
    fn come_to_rest(&mut self, world: &mut World) -> Result<(), Violation> {
        let begun = world.now;
        while world.is_anything_at_work() || !world.link.is_up {
            let bound = world.healed_at.max(begun).after(REST_WITHIN);
            let is_late = world.now > bound || world.steps > STEPS_MAX;
            if is_late || !world.step() {
                return Err(violation(Rule::Progress, at_work(world)));
            }
            self.broken(world)?;
        }
        Ok(())
    }

    fn go_on(&mut self, world: &mut World, length: Duration) -> Result<(), Violation> {
        let until = world.now.after(length);
        while world.next_at().is_some_and(|at| at <= until) {
            world.step();
            self.broken(world)?;
        }
        world.pass_to(until);
        Ok(())
    }

    fn broken(&self, world: &World) -> Result<(), Violation> {
        world.violation.clone().map_or(Ok(()), Err)
    }
}

fn violation(rule: Rule, text: String) -> Violation {
    Violation { rule, text }
}

/// Who is still at work, for a world that does not come to rest.
fn at_work(world: &World) -> String {
    let sources: Vec<_> = world
        .sources
        .iter()
        .filter(|job| job.is_at_work())
        .map(|job| job.engine.machine().stage())
        .collect();
    let targets = world.targets.iter().filter(|job| job.is_at_work()).count();
    let daemons = world
        .hosts
        .iter()
        .filter(|host| !host.is_ready() && !host.is_lost)
        .count();
    format!(
        "not at rest at {} after {} steps: sources {sources:?}, {targets} targets, {daemons} daemons",
        world.now, world.steps
    )
}
