//! In which order the runs are made: each repeat has every cell once, in an order of its own.
//!
//! Whatever changes slowly on a machine, such as its temperature, its load or its free memory,
//! reaches all cells alike then, instead of being taken for a difference between them; this is a
//! randomised complete block design with the repeats as blocks. The order follows from the seed, so
//! that a run that is made later has the number that it would have had.

use crate::plan::Plan;

/// One run to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its place in the order, counted from 1.
    pub number: u32,
    /// The index of its cell in the plan.
    pub cell_index: usize,
    /// Which run of its cell it is, counted from 1.
    pub repeat: u32,
}

/// All runs of the plan in their order.
pub fn runs(plan: &Plan) -> Vec<Run> {
    let mut random = plan.seed;
    let mut runs = Vec::with_capacity(plan.runs());
    for repeat in 1..=plan.repeats {
        let mut cells: Vec<usize> = (0..plan.cells.len()).collect();
        shuffle(&mut cells, &mut random);
        for cell_index in cells {
            let number = u32::try_from(runs.len() + 1).expect("a plan's runs are limited");
            runs.push(Run {
                number,
                cell_index,
                repeat,
            });
        }
    }
    runs
}

/// Every order with the same chance, as far as a remainder of 64 random bits allows.
fn shuffle(items: &mut [usize], random: &mut u64) {
    for last in (1..items.len()).rev() {
        let chosen = next_random(random) % (last as u64 + 1);
        items.swap(last, chosen as usize);
    }
}

/// SplitMix64 [Steele14]: the same on every machine, and a seed of zero is as good as any.
pub fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(seed: u64) -> Plan {
        let text = format!(
            "question = 'q'\nseed = {seed}\nrepeats = 3\n[workloads.i]\nguest = 'idle'\n\
             [[matrix]]\ntechniques = ['auto']\nworkloads = ['i']\nmemory = ['64M']\n\
             streams = [1, 2, 3, 4, 5]"
        );
        Plan::parse(&text).unwrap()
    }

    fn check(seed: u64, expect: &str) {
        let runs = runs(&plan(seed));
        let order: Vec<String> = runs
            .chunks(5)
            .map(|block| block.iter().map(|run| run.cell_index.to_string()).collect())
            .collect();
        assert_eq!(order.join(" "), expect);
        for (index, block) in runs.chunks(5).enumerate() {
            assert!(block.iter().all(|run| run.repeat as usize == index + 1));
        }
        assert!((1..).zip(&runs).all(|(number, run)| run.number == number));
    }

    #[test]
    fn a_seed_gives_one_order_and_each_repeat_has_every_cell_once() {
        check(1, "21430 24301 13420");
        check(2, "13420 01234 31204");
        for seed in 0..50 {
            for block in runs(&plan(seed)).chunks(5) {
                let mut cells: Vec<usize> = block.iter().map(|run| run.cell_index).collect();
                cells.sort_unstable();
                assert_eq!(cells, [0, 1, 2, 3, 4], "seed {seed}");
            }
        }
    }
}
