//! Which moves the demo makes, in which order.

use limosa_engine::policy::Mode;
use limosa_lab::schedule::next_random;

/// The modes of all moves: each mode there and back, in turn, `repeat` times over.
pub(crate) fn in_turn(modes: &[Mode], repeat: u32) -> Vec<Mode> {
    (0..repeat)
        .flat_map(|_| modes.iter().flat_map(|&mode| [mode, mode]))
        .collect()
}

/// The modes of so many moves, mixed by a seed.
pub(crate) fn mixed(modes: &[Mode], moves: u32, seed: u64) -> Vec<Mode> {
    let mut state = seed;
    (0..moves)
        .filter_map(|_| {
            let index = next_random(&mut state) % modes.len().max(1) as u64;
            modes.get(index as usize).copied()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: [Mode; 2] = [Mode::StopAndCopy, Mode::PreCopy];

    fn check(modes: &[Mode], expect: &str) {
        let initials: String = modes
            .iter()
            .map(|mode| if *mode == Mode::PreCopy { 'p' } else { 's' })
            .collect();
        assert_eq!(initials, expect);
    }

    #[test]
    fn modes_take_turns_there_and_back() {
        check(&in_turn(&TWO, 1), "sspp");
        check(&in_turn(&[Mode::PreCopy], 2), "pppp");
        check(&in_turn(&[], 2), "");
        check(&in_turn(&TWO, 0), "");
        assert_eq!(in_turn(&Mode::ALL, 1).len(), 12);
    }

    #[test]
    fn a_seed_always_mixes_alike() {
        check(&mixed(&TWO, 24, 7), "psspspsspppssssspppspppp");
        check(&mixed(&[], 5, 1), "");
    }
}
