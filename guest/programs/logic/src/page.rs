//! A page that proves itself: it carries its number, its version, and a checksum of all 4096 bytes.
//!
//! Word 0 is the checksum (taken as zero while it is computed), word 1 the number, word 2 the
//! version; the others follow from number and version, so that two pages are never equal and no
//! page is ever sent as a copy of another. They are noise, or [`Content::Text`].
//!
//! The checksum runs in eight lanes of 64 bits. A lane rotates, takes a word by exclusive or, and
//! multiplies by an odd number; each step is a bijection of the lane, so **any change within a
//! single word is always seen**, and any other change with probability 1 - 2^-64. The rotation lets
//! the high bits, which a multiplication only moves out, come back in below.
//!
//! Writing computes the checksum in the pass that stores the words: a page costs about two passes
//! over 4 KiB, one to verify it and one to rewrite it.

use limosa_micro_abi::ErrorKind;

use crate::random::{GOLDEN, mix};

/// Words of a page.
pub const WORDS: usize = 512;

const LANES: usize = 8;
const MULTIPLIER: u64 = 0xd6e8_feb8_6659_fd93;
const ROTATION: u32 = 29;

/// One page of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C, align(4096))]
pub struct Page {
    words: [u64; WORDS],
}

/// What fills a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing that could be written shorter. All of it changes with each version.
    Noise,
    /// Words of few kinds, as in text: it shrinks to about a third. An eighth of it changes with each
    /// version.
    Text,
}

/// The words of a text.
const WORD_KINDS: usize = 64;

/// Rows of which one changes from version to version.
const ROWS_PER_CHANGE: u64 = 8;

/// A page, or a result, that is not what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of check failed.
    pub kind: ErrorKind,
    /// What had to be there.
    pub expected: u64,
    /// What was there.
    pub found: u64,
}

impl Page {
    /// A page of zeros.
    pub const ZERO: Self = Self { words: [0; WORDS] };

    /// Makes this the page of that number and version.
    #[inline]
    pub fn write(&mut self, number: u64, version: u64, content: Content) {
        match content {
            Content::Noise => self.write_noise(number, version),
            Content::Text => self.write_text(number, version),
        }
    }

    #[inline]
    fn write_noise(&mut self, number: u64, version: u64) {
        let mut next = mix(number ^ mix(version));
        let mut lanes = Lanes::START;
        let (rows, _) = self.words.as_chunks_mut::<LANES>();
        let (first, rows) = rows.split_first_mut().expect("a page has 64 rows");
        *first = [0, number, version, next, !next, number, version, next];
        lanes.absorb(first);
        for row in rows {
            for word in row.iter_mut() {
                next = next.wrapping_add(GOLDEN);
                *word = next;
            }
            lanes.absorb(row);
        }
        self.words[0] = lanes.finish();
    }

    fn write_text(&mut self, number: u64, version: u64) {
        let mut lanes = Lanes::START;
        let (rows, _) = self.words.as_chunks_mut::<LANES>();
        let (first, rows) = rows.split_first_mut().expect("a page has 64 rows");
        *first = [0, number, version, 0, 0, 0, 0, 0];
        lanes.absorb(first);
        for (row, words) in (0..).zip(rows) {
            let changes = version.wrapping_add(row) / ROWS_PER_CHANGE;
            let mut next = mix(number ^ mix(changes ^ row << 32));
            for word in words.iter_mut() {
                next = next.wrapping_add(GOLDEN);
                *word = mix(next >> (u64::BITS - WORD_KINDS.trailing_zeros()));
            }
            lanes.absorb(words);
        }
        self.words[0] = lanes.finish();
    }

    /// Whether this is the page of that number and version, every byte of it.
    ///
    /// # Errors
    /// What is wrong with it: bytes first, then number, then version.
    #[inline]
    pub fn verify(&self, number: u64, version: u64) -> Result<(), Fault> {
        let checksum = self.checksum();
        if checksum == self.words[0] && self.words[1] == number && self.words[2] == version {
            return Ok(());
        }
        Err(self.fault(checksum, number, version))
    }

    #[inline]
    fn checksum(&self) -> u64 {
        let (rows, _) = self.words.as_chunks::<LANES>();
        let (first, rows) = rows.split_first().expect("a page has 64 rows");
        let mut first = *first;
        first[0] = 0;
        let mut lanes = Lanes::START;
        lanes.absorb(&first);
        for row in rows {
            lanes.absorb(row);
        }
        lanes.finish()
    }

    #[cold]
    fn fault(&self, checksum: u64, number: u64, version: u64) -> Fault {
        let (kind, expected, found) = if self.words.iter().all(|&word| word == 0) {
            (ErrorKind::Empty, version, 0)
        } else if checksum != self.words[0] {
            (ErrorKind::Checksum, checksum, self.words[0])
        } else if number != self.words[1] {
            (ErrorKind::Number, number, self.words[1])
        } else {
            (ErrorKind::Version, version, self.words[2])
        };
        Fault {
            kind,
            expected,
            found,
        }
    }
}

/// The state of a checksum.
#[derive(Clone, Copy, Debug)]
pub struct Lanes([u64; LANES]);

impl Lanes {
    /// Before the first word.
    pub const START: Self = Self([
        0x243f_6a88_85a3_08d3,
        0x1319_8a2e_0370_7344,
        0xa409_3822_299f_31d0,
        0x082e_fa98_ec4e_6c89,
        0x4528_21e6_38d0_1377,
        0xbe54_66cf_34e9_0c6c,
        0xc0ac_29b7_c97c_50dd,
        0x3f84_d5b5_b547_0917,
    ]);

    /// Takes one word into each lane.
    #[inline]
    pub fn absorb(&mut self, row: &[u64; LANES]) {
        for (lane, &word) in self.0.iter_mut().zip(row) {
            *lane = (lane.rotate_left(ROTATION) ^ word).wrapping_mul(MULTIPLIER);
        }
    }

    /// The checksum of what was taken.
    #[inline]
    #[must_use]
    pub fn finish(self) -> u64 {
        let fold =
            |sum: u64, lane: u64| (sum.rotate_left(ROTATION) ^ lane).wrapping_mul(MULTIPLIER);
        mix(self.0.into_iter().fold(0, fold))
    }
}

const _: () = assert!(size_of::<Page>() == 4096);

#[cfg(test)]
mod tests {
    use super::*;
    use std::boxed::Box;
    use std::vec::Vec;

    fn page(number: u64, version: u64) -> Box<Page> {
        let mut page = Box::new(Page::ZERO);
        page.write(number, version, Content::Noise);
        page
    }

    #[test]
    fn a_text_has_few_words_and_an_eighth_of_it_changes() {
        let text = |version| {
            let mut page = Box::new(Page::ZERO);
            page.write(7, version, Content::Text);
            assert_eq!(page.verify(7, version), Ok(()));
            page
        };
        let (former, page) = (text(3), text(4));
        let kinds: std::collections::BTreeSet<u64> = page.words[LANES..].iter().copied().collect();
        assert!((32..=WORD_KINDS).contains(&kinds.len()), "{}", kinds.len());
        let pairs = former.words.chunks(LANES).zip(page.words.chunks(LANES));
        let changed = pairs.filter(|(former, page)| former != page).count();
        assert!((7..=9).contains(&changed), "{changed} rows of 64");
        assert!(page.verify(7, 3).is_err());
    }

    fn check(page: &Page, kind: ErrorKind, expected: u64, found: u64) {
        let fault = page.verify(7, 3).unwrap_err();
        assert_eq!(
            (fault.kind, fault.expected, fault.found),
            (kind, expected, found)
        );
    }

    #[test]
    fn a_written_page_verifies() {
        for (number, version) in [(0, 0), (1, 1), (7, 3), (u64::MAX, u64::MAX)] {
            assert_eq!(page(number, version).verify(number, version), Ok(()));
        }
    }

    #[test]
    fn wrong_pages_are_told_apart() {
        check(&Page::ZERO, ErrorKind::Empty, 3, 0);
        check(&page(8, 3), ErrorKind::Number, 7, 8);
        check(&page(7, 2), ErrorKind::Version, 3, 2);
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let mut page = page(7, 3);
        for word in 0..WORDS {
            for bit in 0..64 {
                page.words[word] ^= 1 << bit;
                let fault = page.verify(7, 3).unwrap_err();
                assert_eq!(fault.kind, ErrorKind::Checksum, "word {word} bit {bit}");
                page.words[word] ^= 1 << bit;
            }
        }
        assert_eq!(page.verify(7, 3), Ok(()));
    }

    #[test]
    fn pairs_of_top_bits_and_swapped_words_are_seen() {
        let sound = page(7, 3);
        let words: Vec<usize> = (3..WORDS).step_by(7).collect();
        for &one in &words {
            for &other in words.iter().filter(|&&other| other != one) {
                let mut page = sound.clone();
                page.words[one] ^= 1 << 63;
                page.words[other] ^= 1 << 63;
                assert!(page.verify(7, 3).is_err(), "top bits {one} and {other}");
                let mut page = sound.clone();
                page.words.swap(one, other);
                assert!(
                    page == sound || page.verify(7, 3).is_err(),
                    "words {one} and {other}"
                );
            }
        }
    }

    #[test]
    fn a_page_half_old_and_half_new_is_seen() {
        let (old, new) = (page(7, 2), page(7, 3));
        for split in (8..WORDS).step_by(8) {
            let mut torn = old.clone();
            torn.words[..split].copy_from_slice(&new.words[..split]);
            check_kind(&torn);
            let mut torn = new.clone();
            torn.words[8..split].copy_from_slice(&old.words[8..split]);
            assert!(split == 8 || torn.verify(7, 3).is_err());
        }
    }

    fn check_kind(page: &Page) {
        assert_eq!(page.verify(7, 3).unwrap_err().kind, ErrorKind::Checksum);
    }
}
