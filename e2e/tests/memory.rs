//! What daemons need in memory for a guest whose pages are missing.
//!
//! `LIMOSA_E2E_BIG=1` takes a guest of 4 GiB, which this machine then has twice, instead of 256 MiB.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{assert_completed, assert_is_at, body, drain, end, until_stage};
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use std::fmt;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Between two looks at the daemons.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How long a guest on demand is left alone.
const ON_DEMAND: Duration = Duration::from_secs(2);

/// What one process has of its own.
#[derive(Clone, Copy, Debug, Default)]
struct Own {
    anonymous: u64,
    page_tables: u64,
}

impl Own {
    fn of(daemon: &Daemon) -> Self {
        let path = format!("/proc/{}/status", daemon.pid());
        let status = fs::read_to_string(path).expect("a daemon that runs");
        let bytes = |field: &str| {
            let line = status.lines().find(|line| line.starts_with(field));
            let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
            number.expect("the kernel gives kilobytes") * 1024
        };
        Self {
            anonymous: bytes("RssAnon:"),
            page_tables: bytes("VmPTE:"),
        }
    }

    const fn sum(self) -> u64 {
        self.anonymous + self.page_tables
    }

    fn raise(&mut self, other: Self) {
        self.anonymous = self.anonymous.max(other.anonymous);
        self.page_tables = self.page_tables.max(other.page_tables);
    }
}

impl fmt::Display for Own {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / MIB as f64;
        let (anonymous, page_tables) = (mib(self.anonymous), mib(self.page_tables));
        write!(f, "{anonymous:.1} + {page_tables:.1} MiB")
    }
}

#[test]
fn a_guest_without_its_pages_needs_little_of_its_daemons() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let is_big = std::env::var("LIMOSA_E2E_BIG").is_ok_and(|value| value == "1");
    let (memory, args) = if is_big {
        (4096 * MIB, "ws=256M rate=20000 touch=3328M")
    } else {
        (256 * MIB, "ws=32M rate=20000 touch=176M")
    };
    let pair = Pair::start();
    let idle = [Own::of(&pair.a), Own::of(&pair.b)];
    let mut spec = guest::writer(VM, args);
    (spec.memory_bytes, spec.vcpus) = (memory, 2);
    pair.boot(spec);
    // There and back, so that each host is in both roles; demand leaves the pages missing for longer.
    for (from, to, mode) in [
        (&pair.a, &pair.b, Mode::PostCopy),
        (&pair.b, &pair.a, Mode::Demand),
    ] {
        let mut body = body(to, mode);
        // Pages are missing for seconds, and the samples are many.
        body.bandwidth_max = Some(memory / 4);
        let id = from.client().migrate(VM, &body).expect("it is accepted");
        let mut most = watch(&pair, from, &id);
        let report = end(from, &id);
        assert_completed(&report);
        assert_eq!(report.digest_equal, Some(true), "{report:?}");
        assert_is_at(VM, to, from);
        let last = [Own::of(&pair.a), Own::of(&pair.b)];
        for (most, last) in most.iter_mut().zip(last) {
            most.raise(last);
        }
        println!(
            "{mode}: over after {:.0} ms, {:?} pages pulled, {:?} pushed, latencies {:?}",
            report.total_ms,
            report.pulled_pages,
            report.pushed_before_need,
            report.fault_latency_us,
        );
        println!(
            "{mode}: idle {}, {}; at most {}, {}; at the end {}, {}",
            idle[0], idle[1], most[0], most[1], last[0], last[1],
        );
        let beyond = |(most, idle): (&Own, &Own)| most.sum().saturating_sub(idle.sum());
        let beyond: u64 = most.iter().zip(&idle).map(beyond).sum();
        let allowed = 64 * MIB + memory / 256;
        assert!(
            beyond <= allowed,
            "both daemons have {beyond} bytes more than idle ones, allowed are {allowed}"
        );
    }
}

/// The most that each daemon has while the guest misses pages. One on demand is drained after a while.
fn watch(pair: &Pair, from: &Daemon, id: &str) -> [Own; 2] {
    let stages = [Stage::Serving, Stage::Releasing, Stage::Finished];
    until_stage(from, id, &stages);
    let mut most = [Own::default(); 2];
    let (mut samples, begun) = (0, Instant::now());
    let mut info = from.client().migration(id).expect("it is known");
    while info.stage == Stage::Serving {
        for (most, daemon) in most.iter_mut().zip([&pair.a, &pair.b]) {
            most.raise(Own::of(daemon));
        }
        samples += 1;
        if info.mode == Mode::Demand && begun.elapsed() > ON_DEMAND {
            drain(from, id);
        }
        thread::sleep(LOOK_EVERY);
        info = from.client().migration(id).expect("it is known");
    }
    println!("{samples} samples in {:.1?}", begun.elapsed());
    assert!(samples > 20, "{samples} samples are too few");
    most
}
