//! A table whose blocks give known results: what the compute program reads.
//!
//! Words follow from their place alone, and the known result of a block is computed from the rule,
//! not from memory, so memory that changed cannot agree with itself.

use limosa_micro_abi::ErrorKind;

use crate::page::{self, Fault, Lanes};
use crate::random::mix;

/// Words of a block: 64 KiB are long enough that reading them dominates a unit of work.
pub const BLOCK_WORDS: usize = 8192;

/// A block of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Block {
    words: [u64; BLOCK_WORDS],
}

impl Block {
    /// A block of zeros.
    pub const ZERO: Self = Self {
        words: [0; BLOCK_WORDS],
    };

    /// Writes the words of the block with that index in the table of that seed. `after_page` is
    /// called after each page: the first touch of memory takes long.
    pub fn fill(&mut self, seed: u64, index: u64, mut after_page: impl FnMut()) {
        let mut next = block_start(seed, index);
        for page in self.words.chunks_mut(page::WORDS) {
            for word in page {
                *word = mix(next);
                next = next.wrapping_add(1);
            }
            after_page();
        }
    }

    /// Computes the result of the block and compares it with the known one.
    ///
    /// # Errors
    /// If it is another one.
    pub fn verify(&self, known: u64) -> Result<(), Fault> {
        let mut lanes = Lanes::START;
        let (rows, _) = self.words.as_chunks();
        for row in rows {
            lanes.absorb(row);
        }
        let found = lanes.finish();
        if found == known {
            return Ok(());
        }
        Err(Fault {
            kind: ErrorKind::Result,
            expected: known,
            found,
        })
    }
}

/// The result that the block with that index must give, computed without reading it.
#[must_use]
pub fn known_result(seed: u64, index: u64) -> u64 {
    let start = block_start(seed, index);
    let mut lanes = Lanes::START;
    for row in 0..BLOCK_WORDS as u64 / 8 {
        lanes.absorb(&core::array::from_fn(|lane| {
            mix(start.wrapping_add(row * 8 + lane as u64))
        }));
    }
    lanes.finish()
}

const fn block_start(seed: u64, index: u64) -> u64 {
    mix(seed).wrapping_add(index.wrapping_mul(BLOCK_WORDS as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_give_their_known_results_and_no_other() {
        let mut block = std::boxed::Box::new(Block::ZERO);
        let mut pages = 0;
        block.fill(5, 9, || pages += 1);
        assert_eq!(pages, 16);
        let known = known_result(5, 9);
        assert_eq!(block.verify(known), Ok(()));
        assert!(block.verify(known_result(5, 8)).is_err());
        assert!(block.verify(known_result(4, 9)).is_err());
        block.words[8191] ^= 1 << 40;
        assert_eq!(block.verify(known).unwrap_err().kind, ErrorKind::Result);
    }
}
