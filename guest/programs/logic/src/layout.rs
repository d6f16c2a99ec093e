//! Which part of the heap belongs to which vCPU.
//!
//! ```text
//! heap start │ tables of vCPU 0, 1, … │ working set of vCPU 0, 1, … │ touched memory of 0, 1, … │
//! ```
//!
//! Everything begins at a page. The last vCPU also has what a division leaves over.

use core::fmt;
use core::ops::Range;

use limosa_micro_abi::PAGE_BYTES;

/// Units (pages or blocks) of a program, over all vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Units of the working set, at least one a vCPU.
    pub units: u64,
    /// Bytes of one unit, a multiple of a page.
    pub unit_bytes: u64,
    /// Bytes of the table entry that goes with a unit of the working set.
    pub entry_bytes: u64,
    /// Pages that are filled once.
    pub touched_pages: u64,
}

/// The part of one vCPU, as addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its table.
    pub table: Range<u64>,
    /// Its part of the working set.
    pub working_set: Range<u64>,
    /// Its part of the memory that is filled once.
    pub touched: Range<u64>,
    /// Index of its first unit among those of all vCPUs.
    pub first_unit: u64,
    /// How many units it has.
    pub units: u64,
}

/// Memory is too small for what the arguments ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooSmall {
    /// Bytes of guest memory that would do.
    pub needed: u64,
    /// Bytes that there are.
    pub memory: u64,
}

impl fmt::Display for TooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "what is asked needs {} bytes of guest memory, there are {}",
            self.needed, self.memory
        )
    }
}

impl Share {
    /// The share of one vCPU.
    ///
    /// # Errors
    /// If the heap has no room for all shares.
    ///
    /// # Panics
    /// If the index is not below the count.
    pub fn new(
        wanted: &Wanted,
        heap: Range<u64>,
        vcpu: u32,
        vcpu_count: u32,
    ) -> Result<Self, TooSmall> {
        assert!(vcpu < vcpu_count, "every share has its vCPU");
        let (vcpu, count) = (u64::from(vcpu), u64::from(vcpu_count));
        let entries_max = u128::from(wanted.units.div_ceil(count)) + u128::from(count);
        let table_bytes = page_ceil(entries_max * u128::from(wanted.entry_bytes));
        let tables = u128::from(heap.start);
        let working_set = tables + table_bytes * u128::from(count);
        let touched = working_set + u128::from(wanted.units) * u128::from(wanted.unit_bytes);
        let end = touched + u128::from(wanted.touched_pages) * u128::from(PAGE_BYTES);
        if end > u128::from(heap.end) {
            return Err(TooSmall {
                needed: u64::try_from(end).unwrap_or(u64::MAX),
                memory: heap.end,
            });
        }
        // From here on everything lies below the end of the heap, so 64 bits are enough.
        let units = split(wanted.units, vcpu, count);
        let pages = split(wanted.touched_pages, vcpu, count);
        let at = |start: u128, range: &Range<u64>, bytes: u64| {
            start as u64 + range.start * bytes..start as u64 + range.end * bytes
        };
        Ok(Self {
            table: at(tables, &(vcpu..vcpu + 1), table_bytes as u64),
            working_set: at(working_set, &units, wanted.unit_bytes),
            touched: at(touched, &pages, PAGE_BYTES),
            first_unit: units.start,
            units: units.end - units.start,
        })
    }
}

/// Cuts parts off the beginning of a heap. Each begins at a page.
#[derive(Clone, Debug)]
pub struct Cutter {
    rest: Range<u64>,
}

impl Cutter {
    /// Cuts this heap.
    #[must_use]
    pub const fn new(heap: Range<u64>) -> Self {
        Self { rest: heap }
    }

    /// The next part, of so many bytes.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn cut(&mut self, bytes: u64) -> Result<Range<u64>, TooSmall> {
        self.left(bytes)?;
        let start = self.rest.start;
        let end = start + bytes;
        self.rest.start = end.next_multiple_of(PAGE_BYTES).min(self.rest.end);
        Ok(start..end)
    }

    /// How much is left, if it is at least `bytes`.
    ///
    /// # Errors
    /// It is less.
    pub fn left(&self, bytes: u64) -> Result<u64, TooSmall> {
        let left = self.rest.end.saturating_sub(self.rest.start);
        if left < bytes {
            return Err(TooSmall {
                needed: self.rest.start.saturating_add(bytes),
                memory: self.rest.end,
            });
        }
        Ok(left)
    }
}

/// The part of `total` that belongs to one of `count`; the last one has the rest.
fn split(total: u64, index: u64, count: u64) -> Range<u64> {
    let each = total / count;
    let end = if index + 1 == count {
        total
    } else {
        each * (index + 1)
    };
    each * index..end
}

fn page_ceil(bytes: u128) -> u128 {
    bytes.next_multiple_of(u128::from(PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn wanted(units: u64, touched_pages: u64) -> Wanted {
        Wanted {
            units,
            unit_bytes: 4096,
            entry_bytes: 4,
            touched_pages,
        }
    }

    #[test]
    fn shares_are_disjoint_and_complete() {
        for count in 1..=8 {
            for units in [8, 9, 15, 1000, 65_536] {
                let shares: Vec<Share> = (0..count)
                    .map(|vcpu| {
                        Share::new(&wanted(units, 13), 0x40_0000..1 << 32, vcpu, count).unwrap()
                    })
                    .collect();
                assert_eq!(shares.iter().map(|share| share.units).sum::<u64>(), units);
                let mut ranges: Vec<Range<u64>> = shares
                    .iter()
                    .flat_map(|s| [s.table.clone(), s.working_set.clone(), s.touched.clone()])
                    .collect();
                ranges.sort_by_key(|range| (range.start, range.end));
                assert!(ranges.windows(2).all(|pair| pair[0].end <= pair[1].start));
                assert!(ranges.iter().all(|range| range.start % 4096 == 0));
                for share in &shares {
                    assert!(share.table.end - share.table.start >= share.units * 4);
                }
            }
        }
    }

    #[test]
    fn parts_are_cut_in_pages() {
        let mut cutter = Cutter::new(0x40_0000..0x40_4000);
        assert_eq!(cutter.cut(1), Ok(0x40_0000..0x40_0001));
        assert_eq!(cutter.cut(4097), Ok(0x40_1000..0x40_2001));
        assert_eq!(cutter.left(4096), Ok(4096));
        let too_small = Err(TooSmall {
            needed: 0x40_4001,
            memory: 0x40_4000,
        });
        assert_eq!(cutter.cut(4097), too_small);
        assert_eq!(cutter.cut(4095), Ok(0x40_3000..0x40_3fff));
        assert_eq!(cutter.left(0), Ok(0));
        assert!(cutter.cut(u64::MAX).is_err());
    }

    #[test]
    fn too_little_memory_is_refused() {
        let heap = 0x40_0000..0x80_0000;
        assert!(Share::new(&wanted(1022, 1), heap.clone(), 0, 1).is_ok());
        let refused = Share::new(&wanted(1022, 2), heap.clone(), 0, 1).unwrap_err();
        assert_eq!(refused.needed, 0x80_1000);
        assert!(Share::new(&wanted(u64::MAX, u64::MAX), heap, 0, 1).is_err());
    }
}
