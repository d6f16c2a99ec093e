//! Blows at random moments: processes killed, links cut or silent, in random modes.
//!
//! Whatever is struck whenever, at the end the guest runs in exactly one place with whole memory, or
//! is stated to be lost where that is the truth. `LIMOSA_E2E_KILLS` says how many blows,
//! `LIMOSA_E2E_SEED` the first seed: blow `n` has the seed plus `n`, which each failure prints, so that
//! one blow can be repeated with `LIMOSA_E2E_KILLS=1`. The moment is drawn, not the schedule of
//! the machine: a repeated blow strikes near the same place.
//!
//! Two thousand take a quarter of an hour on two cores: pairs of daemons are used again, and so are guests that
//! survive.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{assert_gone, drain};
use limosa_e2e::strike::{Victim, assert_lost};
use limosa_e2e::{Daemon, Link, Pair, VM, guest, has_kvm, process, wait};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{MigrateBody, VmInfo, VmState};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Blows if nothing is said: two of each kind, about.
const BLOWS: u64 = 16;
/// Pairs of daemons at once: most of the time each waits for something.
const PAIRS: usize = 3;
/// Violations after which the rest is not worth its time.
const VIOLATIONS_MAX: usize = 8;
/// A rate at which a guest of ten megabytes moves in a fifth of a second.
const RATE: u64 = 50_000_000;
/// The longest migration under it that copies once, or runs the guest at the target first.
const ONCE_MS: u64 = 450;
/// The longest one that copies in rounds.
const ROUNDS_MS: u64 = 1500;
/// The longest that something stays dead, cut or silent.
const REPAIR_WITHIN_MS: u64 = 400;
/// By when everything is decided: reconnections, questions and time-outs included.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    Kill(Victim),
    Cut,
    Silence,
}

impl Blow {
    const ALL: [Self; 8] = [
        Self::Kill(Victim::TargetDaemon),
        Self::Kill(Victim::TargetVm),
        Self::Kill(Victim::SourceDaemon),
        Self::Kill(Victim::SourceVm),
        Self::Kill(Victim::BothDaemons),
        Self::Kill(Victim::SourceHost),
        Self::Cut,
        Self::Silence,
    ];
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(victim) => victim.fmt(f),
            Self::Cut => f.write_str("link cut"),
            Self::Silence => f.write_str("link silent"),
        }
    }
}

/// Where the guest is at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// Where it was.
    Stayed,
    /// At the target.
    Moved,
    /// Nowhere: the process that had it was killed.
    Lost,
}

/// One blow, from its seed.
#[derive(Clone, Copy, Debug)]
struct Plan {
    seed: u64,
    mode: Mode,
    blow: Blow,
    after: Duration,
    repair_after: Duration,
}

impl Plan {
    fn from_seed(seed: u64) -> Self {
        let mut state = seed;
        let mut draw = |below: u64| {
            // splitmix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (bits ^ (bits >> 31)) % below
        };
        let mut index = |count: usize| usize::try_from(draw(count as u64)).expect("small");
        let mode = Mode::ALL[index(Mode::ALL.len())];
        let blow = Blow::ALL[index(Blow::ALL.len())];
        let within_ms = if mode.copies_live() {
            ROUNDS_MS
        } else {
            ONCE_MS
        };
        Self {
            seed,
            mode,
            blow,
            after: Duration::from_micros(draw(within_ms * 1000)),
            repair_after: Duration::from_micros(draw(REPAIR_WITHIN_MS * 1000)),
        }
    }

    fn body(&self, address: String) -> MigrateBody {
        let mut body = MigrateBody::new(address, self.mode);
        body.verify = self.seed.is_multiple_of(2);
        body.bandwidth_max = Some(RATE);
        if matches!(self.mode, Mode::Hybrid | Mode::Auto) {
            // So that something is left to switch for.
            body.downtime_max_ms = Some(0.01);
        }
        body
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "LIMOSA_E2E_SEED={}: {}, {} after {:.1?}",
            self.seed, self.mode, self.blow, self.after
        )
    }
}

/// Two daemons with a link each, and which of them has the guest.
struct Arena {
    pair: Pair,
    to_a: Link,
    to_b: Link,
    is_at_a: bool,
}

impl Arena {
    fn new() -> Self {
        let pair = Pair::start();
        let (to_a, to_b) = (
            Link::to(pair.a.peer_address()),
            Link::to(pair.b.peer_address()),
        );
        let arena = Self {
            pair,
            to_a,
            to_b,
            is_at_a: true,
        };
        arena.boot();
        arena
    }

    fn boot(&self) {
        let mut spec = guest::writer(VM, "ws=8M rate=20000 touch=2M");
        spec.memory_bytes = 32 << 20;
        self.pair.boot(spec);
    }

    fn hosts(&self) -> (&Daemon, &Daemon) {
        let Pair { a, b, .. } = &self.pair;
        if self.is_at_a { (a, b) } else { (b, a) }
    }

    fn hosts_mut(&mut self) -> (&mut Daemon, &mut Daemon) {
        let Pair { a, b, .. } = &mut self.pair;
        if self.is_at_a { (a, b) } else { (b, a) }
    }

    fn link(&self) -> &Link {
        if self.is_at_a { &self.to_b } else { &self.to_a }
    }

    /// Carries out a plan. Gives the end, whether the blow met anything, and how long it took to
    /// settle.
    fn run(&mut self, plan: &Plan) -> (End, bool, Duration) {
        self.pair.beats.clear();
        let id = {
            let (from, _) = self.hosts();
            let body = plan.body(self.link().address());
            from.client().migrate(VM, &body).expect("it is accepted")
        };
        thread::sleep(plan.after);
        let hits = self.strike(plan);
        let struck = Instant::now();
        let end = self.settle(&id);
        let took = struck.elapsed();
        self.check(plan, &id, end, hits);
        self.check_guest(end);
        (end, hits, took)
    }

    /// Strikes, and repairs after a while. Gives whether there was what was to be struck.
    fn strike(&mut self, plan: &Plan) -> bool {
        let repair = || thread::sleep(plan.repair_after);
        match plan.blow {
            Blow::Cut => {
                self.link().cut();
                repair();
                self.link().mend();
                true
            }
            Blow::Silence => {
                self.link().stand();
                repair();
                self.link().mend();
                true
            }
            Blow::Kill(victim) => {
                let (from, to) = self.hosts_mut();
                match victim {
                    Victim::TargetVm => kill_vm(to),
                    Victim::SourceVm => kill_vm(from),
                    Victim::TargetDaemon => {
                        to.kill();
                        repair();
                        to.restart();
                        true
                    }
                    Victim::SourceDaemon => {
                        from.kill();
                        repair();
                        from.restart();
                        true
                    }
                    Victim::BothDaemons => {
                        from.kill();
                        to.kill();
                        repair();
                        if plan.seed.is_multiple_of(2) {
                            from.restart();
                            to.restart();
                        } else {
                            to.restart();
                            from.restart();
                        }
                        true
                    }
                    Victim::SourceHost => {
                        let hits = kill_vm(from);
                        from.kill();
                        repair();
                        from.restart();
                        hits
                    }
                }
            }
        }
    }

    /// Waits until it is decided where the guest is, with the drain that only an operator orders.
    fn settle(&self, id: &str) -> End {
        let (from, to) = self.hosts();
        let mut seen = String::new();
        let end = wait::poll(SETTLE_MAX, || {
            let here = from.client().vm(VM).ok();
            let there = to.client().vm(VM).ok();
            let migration = from.client().migration(id).ok();
            seen = format!("source {here:?}, target {there:?}, migration {migration:?}");
            if let Some(info) = &migration {
                if info.stage == Stage::Serving && info.mode == Mode::Demand {
                    drain(from, id);
                }
                if info.stage != Stage::Finished {
                    return None;
                }
            }
            let is_alive = |vm: &VmInfo| vm.state != VmState::Ended;
            match (here, there) {
                (Some(vm), None) if vm.state == VmState::Running && vm.phase == "running" => {
                    Some(End::Stayed)
                }
                (None, Some(vm)) if vm.state == VmState::Running && vm.missing_pages == 0 => {
                    Some(End::Moved)
                }
                (here, there) if !here.iter().chain(&there).any(is_alive) => Some(End::Lost),
                _ => None,
            }
        });
        end.unwrap_or_else(|| panic!("not decided within {SETTLE_MAX:?}: {seen}"))
    }

    /// What may be the end of which blow.
    fn check(&self, plan: &Plan, id: &str, end: End, hits: bool) {
        let allowed: &[End] = match plan.blow {
            Blow::Kill(Victim::TargetVm) if hits => &[End::Stayed, End::Lost],
            Blow::Kill(Victim::SourceVm) if hits => &[End::Moved, End::Lost],
            Blow::Kill(Victim::SourceHost) if hits => &[End::Moved, End::Lost],
            // Shorter than anybody's patience.
            Blow::Silence => &[End::Moved],
            _ => &[End::Stayed, End::Moved],
        };
        let (from, _) = self.hosts();
        let migration = from.client().migration(id).ok();
        assert!(
            allowed.contains(&end),
            "{end:?} is no end of this: {migration:?}"
        );
        let Some(info) = migration else { return };
        let outcome = info.report.outcome.as_deref();
        match end {
            End::Stayed => assert_eq!(outcome, Some("failed"), "{info:?}"),
            End::Moved => assert_eq!(outcome, Some("completed"), "{info:?}"),
            // Killed when it had just moved, it is lost where it was.
            End::Lost if outcome == Some("completed") => {
                assert_eq!(plan.blow, Blow::Kill(Victim::TargetVm), "{info:?}");
            }
            End::Lost => assert_lost(&info.report),
        }
        assert_ne!(info.report.digest_equal, Some(false), "{info:?}");
    }

    /// The guest is whole in one place and nothing of it in the other, or begins anew.
    fn check_guest(&mut self, end: End) {
        if end == End::Moved {
            self.is_at_a = !self.is_at_a;
        }
        let (here, there) = self.hosts();
        match end {
            End::Stayed | End::Moved => {
                assert_gone(VM, there);
                guest::assert_works(here, VM);
                guest::assert_whole(here, VM);
                let turns = self.pair.beats.assert_one_at_a_time();
                let expect = if end == End::Moved { 2 } else { 1 };
                assert_eq!(turns.len(), expect, "{turns:#?}");
            }
            End::Lost => {
                for daemon in [here, there] {
                    if daemon.client().vm(VM).is_ok() {
                        let stopped = daemon.client().stop(VM, false);
                        stopped.expect("an ended VM can be removed");
                    }
                    assert_gone(VM, daemon);
                }
                let turns = self.pair.beats.turns();
                assert!(turns.len() <= 2, "{turns:#?}");
                self.is_at_a = true;
                self.boot();
            }
        }
    }
}

/// Kills the VM process of a guest, if there is one.
fn kill_vm(daemon: &Daemon) -> bool {
    let vm = daemon.client().vm(VM).ok();
    let pid = vm.map_or(0, |vm| vm.pid);
    pid != 0 && process::try_kill(pid)
}

/// Ends by mode and blow.
#[derive(Default)]
struct Table {
    ends: BTreeMap<(&'static str, Blow), BTreeMap<End, u64>>,
    missed: u64,
    longest: BTreeMap<Blow, Duration>,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:14} {:21} stayed moved lost", "mode", "struck")?;
        for ((mode, blow), ends) in &self.ends {
            let count = |end| ends.get(&end).copied().unwrap_or(0);
            let blow = blow.to_string();
            let [stayed, moved, lost] = [End::Stayed, End::Moved, End::Lost].map(count);
            writeln!(f, "{mode:14} {blow:21} {stayed:6} {moved:5} {lost:4}")?;
        }
        writeln!(f, "{} blows found nobody to kill", self.missed)?;
        for (blow, took) in &self.longest {
            writeln!(f, "longest until decided, {blow}: {took:.2?}")?;
        }
        Ok(())
    }
}

#[test]
fn whatever_is_struck_whenever_the_guest_is_in_one_place() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let blows = number("LIMOSA_E2E_KILLS").unwrap_or(BLOWS);
    let seed = number("LIMOSA_E2E_SEED").unwrap_or(1);
    println!("{blows} blows, seed {seed}");
    let begun = Instant::now();
    let next = AtomicU64::new(0);
    let violations = AtomicUsize::new(0);
    let (table, failures) = (Mutex::new(Table::default()), Mutex::new(String::new()));
    let work = || {
        let mut arena = None;
        loop {
            let index = next.fetch_add(1, Ordering::SeqCst);
            if index >= blows || violations.load(Ordering::SeqCst) >= VIOLATIONS_MAX {
                return;
            }
            let plan = Plan::from_seed(seed.wrapping_add(index));
            let result = catch_unwind(AssertUnwindSafe(|| {
                // One that failed is not to be judged by what an earlier failure left.
                let mut fresh = arena.take().unwrap_or_else(Arena::new);
                let done = fresh.run(&plan);
                arena = Some(fresh);
                done
            }));
            match result {
                Ok((end, hits, took)) => {
                    println!("{plan}: {end:?}, decided after {took:.2?}");
                    let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
                    let ends = table.ends.entry((plan.mode.name(), plan.blow)).or_default();
                    *ends.entry(end).or_default() += 1;
                    table.missed += u64::from(!hits);
                    let longest = table.longest.entry(plan.blow).or_default();
                    *longest = (*longest).max(took);
                }
                Err(panic) => {
                    println!("{plan}: VIOLATED");
                    violations.fetch_add(1, Ordering::SeqCst);
                    let mut failures = failures.lock().unwrap_or_else(PoisonError::into_inner);
                    let text = text(&*panic);
                    writeln!(failures, "{plan}: {text}").expect("a string takes a line");
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..PAIRS {
            scope.spawn(work);
        }
    });
    let table = table.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{table}{blows} blows in {:.1?}", begun.elapsed());
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    assert!(failures.is_empty(), "violations:\n{failures}");
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without text")
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}
