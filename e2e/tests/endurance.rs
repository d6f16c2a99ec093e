//! Many moves there and back: nothing breaks and nothing grows.
//!
//! `LIMOSA_E2E_MOVES` says how many; the seed of the modes is printed and can be given as
//! `LIMOSA_E2E_SEED`.

use limosa_e2e::cases::Places;
use limosa_e2e::pair::move_whole;
use limosa_e2e::resources::Resources;
use limosa_e2e::{Pair, VM, guest, has_kvm};
use limosa_engine::policy::Mode;
use std::time::Instant;

/// Moves if nothing is said.
const MOVES: u64 = 20;
/// The moves after which everything that daemons make only once has been made.
const MOVES_UNTIL_WARM: u64 = 4;

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
            // Both have been source and target of both modes by then, as good as certainly.
            warm = Some([Resources::of(&pair.a), Resources::of(&pair.b)]);
        }
        let report = move_whole(VM, from, to, mode(seed, number));
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

/// The mode of a move: each of the first four comes once for each host, the rest is mixed.
fn mode(seed: u64, number: u64) -> Mode {
    if number < MOVES_UNTIL_WARM {
        return Mode::ALL[usize::from(number >= 2)];
    }
    // One step of splitmix64.
    let mut bits = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Mode::ALL[usize::from(bits >> 63 == 1)]
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {text}")),
    )
}
