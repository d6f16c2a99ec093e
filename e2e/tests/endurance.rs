//! Many moves there and back in all modes: nothing breaks and nothing grows.
//!
//! A guest on demand works for a while without its pages and is then drained.
//!
//! `LIMOSA_E2E_MOVES` says how many; the seed of the modes is printed and can be given as
//! `LIMOSA_E2E_SEED`.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::{assert_completed, assert_is_at, begin, end, move_whole, until_stage};
use limosa_e2e::resources::Resources;
use limosa_e2e::{Daemon, Pair, VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use limosa_engine::source::Stage;
use limosa_host::api::Report;
use std::time::Instant;

/// Moves if nothing is said.
const MOVES: u64 = 30;
/// The moves after which everything that daemons make only once has been made: each mode once there
/// and once back.
const MOVES_UNTIL_WARM: u64 = 2 * Mode::ALL.len() as u64;

#[test]
fn moves_there_and_back_leave_nothing_behind() {
    if !has_kvm() {
        return;
    }
    let _places = Places::all();
    let moves = number("LIMOSA_E2E_MOVES").unwrap_or(MOVES);
    let seed = number("LIMOSA_E2E_SEED").unwrap_or(7);
    println!("{moves} moves, seed {seed}");
    let pair = Pair::start();
    let mut spec = guest::writer(VM, "ws=8M rate=20000 pattern=zipf touch=4M");
    spec.vcpus = 2;
    pair.boot(spec);
    let mut warm = None;
    let mut downtimes = Vec::new();
    let begun = Instant::now();
    for number in 0..moves {
        let (from, to) = if number % 2 == 0 {
            (&pair.a, &pair.b)
        } else {
            (&pair.b, &pair.a)
        };
        if number == MOVES_UNTIL_WARM {
            // Both have been source and target of every mode.
            warm = Some([Resources::of(&pair.a), Resources::of(&pair.b)]);
        }
        let mode = mode(seed, number);
        let report = if mode == Mode::Demand {
            move_on_demand(from, to)
        } else {
            move_whole(VM, from, to, mode)
        };
        downtimes.push(report.downtime_ms.expect("it was completed").total);
    }
    downtimes.sort_by(f64::total_cmp);
    let turns = pair.beats.assert_one_at_a_time();
    assert_eq!(turns.len() as u64, moves + 1, "each move is one turn");
    let after = [Resources::of(&pair.a), Resources::of(&pair.b)];
    println!(
        "{moves} moves in {:.1?}, downtimes {:.1} to {:.1} ms, median {:.1} ms",
        begun.elapsed(),
        downtimes[0],
        downtimes[downtimes.len() - 1],
        downtimes[downtimes.len() / 2],
    );
    println!("before {warm:?}, after {after:?}");
    let Some([a, b]) = warm else { return };
    a.assert_not_grown(&pair.a);
    b.assert_not_grown(&pair.b);
}

/// Moves the guest, lets it work without its pages, and drains it.
fn move_on_demand(from: &Daemon, to: &Daemon) -> Report {
    let id = begin(from, to, Mode::Demand);
    until_stage(from, &id, &[Stage::Serving]);
    guest::assert_works(to, VM);
    let report = end(from, &id);
    assert_completed(&report);
    assert_eq!(report.digest_equal, Some(true), "{report:?}");
    assert!(report.pulled_pages > Some(0), "{report:?}");
    assert_is_at(VM, to, from);
    report
}

/// The mode of a move: at first each comes once for each host, the rest is mixed.
fn mode(seed: u64, number: u64) -> Mode {
    let at = |index: u64| {
        let count = Mode::ALL.len() as u64;
        Mode::ALL[usize::try_from(index % count).expect("a few modes")]
    };
    if number < MOVES_UNTIL_WARM {
        return at(number / 2);
    }
    // One step of splitmix64.
    let mut bits = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    at(bits ^ (bits >> 31))
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}
