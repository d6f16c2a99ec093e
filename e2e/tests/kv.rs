//! A guest that keeps values for clients, moved by every technique while they work, and put back once: each
//! connection lives on, no count is lost or made twice, every value is the one that was written.

use limosa_clients::lan::{self, GUEST, Lan, LanError, TAP};
use limosa_clients::redis::{Answer, Connection};
use limosa_e2e::daemon::Place;
use limosa_e2e::loads::{Done, Load};
use limosa_e2e::pair::{assert_is_at, body, end, move_with, until_stage};
use limosa_e2e::{Daemon, VM, guest, has_kvm, skip, wait};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::{MigrateBody, NetworkSpec, VmSpec};
use std::time::Duration;

const PORT: u16 = 6379;
/// Of the link between the hosts: 1 Gbit/s.
const LINK: u64 = 125_000_000;
/// Longest that an answer may take, whatever is moved meanwhile.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const MODES: [Mode; 6] = [
    Mode::PreCopy,
    Mode::PostCopy,
    Mode::Hybrid,
    Mode::StopAndCopy,
    Mode::Demand,
    Mode::Auto,
];
/// Bytes a second by which the little that the guest has takes seconds.
const SLOW: u64 = 200_000;
/// Clients that count, and one that each of them counts with.
const SHARED: &str = "shared";

fn spec() -> VmSpec {
    VmSpec {
        micro: Some("kv".to_owned()),
        networks: vec![NetworkSpec {
            tap: TAP.to_owned(),
            mac: None,
        }],
        ..guest::writer(VM, &format!("ip={GUEST}"))
    }
}

/// Where a daemon runs on the first host, or on the second.
fn place(lan: &Lan, index: usize) -> Place {
    Place {
        namespace: lan.host(index).to_owned(),
        address: lan::HOSTS[index].to_owned(),
        tap: TAP.to_owned(),
    }
}

fn connect(lan: &Lan) -> Connection {
    let stream = wait::until("the guest listens", || lan.connect(PORT).ok());
    Connection::new(stream, ANSWER_MAX).expect("a connection")
}

/// Clients of a guest: of each kind two.
struct Loads {
    closed: Vec<Load>,
    open: Vec<Load>,
}

impl Loads {
    fn start(lan: &Lan) -> Self {
        let names = ["one", "two"];
        let closed = |name: &str| Load::closed(connect(lan), name, &format!("own-{name}"));
        let period = Duration::from_millis(2);
        Self {
            closed: names.map(closed).into(),
            open: names
                .map(|_| Load::open(connect(lan), SHARED, period))
                .into(),
        }
    }

    /// Ends them; every count of each counter was answered once, and in order.
    fn end(self) -> Vec<(&'static str, i64)> {
        let mut last = Vec::new();
        for (load, counter) in self.closed.into_iter().zip(["own-one", "own-two"]) {
            let done = load.end();
            println!(
                "closed: {} answers, longest {:?}",
                done.answered, done.longest
            );
            last.push((counter, check_complete(done.counts)));
        }
        let open: Vec<Done> = self.open.into_iter().map(Load::end).collect();
        for done in &open {
            println!(
                "open: {} answers, longest {:?}",
                done.answered, done.longest
            );
            assert!(done.counts.is_sorted(), "answers come in order");
        }
        let mut shared: Vec<i64> = open.into_iter().flat_map(|done| done.counts).collect();
        shared.sort_unstable();
        last.push((SHARED, check_complete(shared)));
        last
    }
}

/// Counted from one, none left out and none twice; the last one.
fn check_complete(counts: Vec<i64>) -> i64 {
    for (found, expected) in counts.iter().zip(1..) {
        assert_eq!(*found, expected, "a count is lost, or was made twice");
    }
    assert!(counts.len() > 100, "there was work: {}", counts.len());
    *counts.last().expect("there are some")
}

fn over_the_lan(to: &Daemon, mode: Mode) -> MigrateBody {
    MigrateBody {
        insecure: true,
        ..body(to, mode)
    }
}

/// Pauses the guest for a move, and lets it run on where it was.
fn abort_in_the_pause(from: &Daemon, to: &Daemon) {
    let body = MigrateBody {
        bandwidth_max: Some(SLOW),
        ..over_the_lan(to, Mode::StopAndCopy)
    };
    let id = from.client().migrate(VM, &body).expect("it is accepted");
    until_stage(from, &id, &[Stage::Paused]);
    from.client().abort(&id).expect("an abort in time");
    let report = end(from, &id);
    assert_eq!(report.outcome.as_deref(), Some("aborted"), "{report:?}");
    assert_is_at(VM, from, to);
}

#[test]
fn clients_keep_their_connections_and_every_count() {
    if !has_kvm() {
        return;
    }
    let lan = match Lan::make("e2e", Some(LINK)) {
        Ok(lan) => lan,
        Err(error @ LanError::Forbidden { .. }) => return skip(&error.to_string()),
        Err(error) => panic!("{error}"),
    };
    let hosts = [0, 1].map(|index| Daemon::start_at(&place(&lan, index)));
    let [a, b] = &hosts;
    guest::boot(a, &spec());
    let loads = Loads::start(&lan);
    abort_in_the_pause(a, b);
    for mode in MODES {
        for (from, to) in [(a, b), (b, a)] {
            let report = move_with(VM, from, to, &over_the_lan(to, mode));
            println!(
                "{mode:?}: downtime {:?} ms",
                report.downtime_ms.map(|downtime| downtime.total)
            );
        }
    }
    // Those that came after the moves are of the same store.
    let mut late = connect(&lan);
    for (counter, last) in loads.end() {
        let value = late.ask(&[b"GET", counter.as_bytes()]).expect("an answer");
        assert_eq!(value, Answer::Value(Some(last.to_string().into_bytes())));
    }
    let keys = late.ask(&[b"DBSIZE"]).expect("an answer");
    assert_eq!(keys, Answer::Number(103));
    guest::assert_whole(a, VM);
}
