//! The newtypes: an index, a count and a size are different types.
//!
//! Arithmetic that could leave the type's range panics in every build, since it can only come from
//! our own mistake: numbers from a peer are checked before they become one of these.

use core::fmt;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// Bytes in a page: the unit of dirty tracking and of transfer, 4 KiB whatever backs the memory.
pub const PAGE_SIZE: u64 = 4096;
/// [`PAGE_SIZE`] for slices.
pub const PAGE_SIZE_USIZE: usize = 4096;

macro_rules! unit {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// Wraps a bare number.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The bare number.
            pub const fn get(self) -> u64 {
                self.0
            }
        }
    };
}

unit! {
    /// A guest-physical address, in bytes.
    Gpa
}
unit! {
    /// The index of a page in the guest's memory file. The file is dense: a hole in the guest's
    /// physical address space takes no indices.
    Pfn
}
unit! {
    /// A number of pages.
    PageCount
}
unit! {
    /// A number of bytes.
    ByteCount
}
unit! {
    /// A rate in bytes a second.
    BytesPerSecond
}
unit! {
    /// A rate in pages a second.
    PagesPerSecond
}

impl Pfn {
    /// Offset of the page in the memory file, in bytes.
    ///
    /// # Panics
    /// If the page lies beyond 2^64 bytes.
    pub const fn file_offset(self) -> u64 {
        self.0.strict_mul(PAGE_SIZE)
    }

    /// The page `count` further on.
    ///
    /// # Panics
    /// On overflow.
    pub const fn advance(self, count: PageCount) -> Self {
        Self(self.0.strict_add(count.0))
    }
}

impl PageCount {
    /// None.
    pub const ZERO: Self = Self(0);

    /// The pages' size.
    ///
    /// # Panics
    /// If that is 2^64 bytes or more.
    pub const fn bytes(self) -> ByteCount {
        ByteCount(self.0.strict_mul(PAGE_SIZE))
    }

    /// Sum that stops at the largest count instead of overflowing.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Difference that stops at zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl ByteCount {
    /// None.
    pub const ZERO: Self = Self(0);

    /// Sum that stops at the largest count instead of overflowing.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// Pages that hold this many bytes, rounded up.
    pub const fn pages_ceil(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_SIZE))
    }
}

impl BytesPerSecond {
    /// The rate at which `bytes` took `time`, rounded down; `None` when no time passed.
    pub fn measured(bytes: ByteCount, time: Duration) -> Option<Self> {
        a_second(bytes.0, time).map(Self)
    }

    /// Whole pages a second at this rate, rounded down.
    pub const fn pages(self) -> PagesPerSecond {
        PagesPerSecond(self.0 / PAGE_SIZE)
    }

    /// How long `bytes` take at this rate, rounded up to a nanosecond; `None` at a rate of zero.
    pub fn time_for(self, bytes: ByteCount) -> Option<Duration> {
        if self.0 == 0 {
            return None;
        }
        let nanos = (u128::from(bytes.0) * 1_000_000_000).div_ceil(u128::from(self.0));
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }
}

impl PagesPerSecond {
    /// The rate at which `pages` took `time`, rounded down; `None` when no time passed.
    pub fn measured(pages: PageCount, time: Duration) -> Option<Self> {
        a_second(pages.0, time).map(Self)
    }
}

/// What `amount` in `time` is in a second, rounded down; `None` when no time passed.
fn a_second(amount: u64, time: Duration) -> Option<u64> {
    let rate = (u128::from(amount) * 1_000_000_000).checked_div(time.as_nanos())?;
    Some(u64::try_from(rate).unwrap_or(u64::MAX))
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

impl fmt::Display for PageCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages", self.0)
    }
}

impl fmt::Display for PagesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages/s", self.0)
    }
}

impl fmt::Display for ByteCount {
    /// Three significant digits and a binary unit: `1.50 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        format_binary(f, self.0, "B")
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        format_binary(f, self.0, "B/s")
    }
}

/// Writes `value` with the largest binary prefix that keeps it at or above one.
fn format_binary(f: &mut fmt::Formatter<'_>, value: u64, unit: &str) -> fmt::Result {
    const PREFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let step = (value.checked_ilog2().unwrap_or(0) / 10).min(6);
    if step == 0 {
        return write!(f, "{value} {unit}");
    }
    let scaled = value as f64 / (1u64 << (10 * step)) as f64;
    let digits = if scaled < 10.0 {
        2
    } else if scaled < 100.0 {
        1
    } else {
        0
    };
    write!(f, "{scaled:.digits$} {}{unit}", PREFIXES[step as usize])
}

/// Consecutive pages of the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// The first page.
    pub first: Pfn,
    /// How many.
    pub count: PageCount,
}

impl PageRange {
    /// `count` pages from `first` on.
    pub const fn new(first: Pfn, count: PageCount) -> Self {
        Self { first, count }
    }

    /// The page after the last one.
    ///
    /// # Panics
    /// On overflow.
    pub const fn end(self) -> Pfn {
        self.first.advance(self.count)
    }

    /// The pages' size.
    pub const fn bytes(self) -> ByteCount {
        self.count.bytes()
    }

    /// Every page in ascending order.
    pub fn iter(self) -> impl Iterator<Item = Pfn> {
        (self.first.get()..self.end().get()).map(Pfn::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    fn check(value: ByteCount, expect: &str) {
        assert_eq!(format!("{value}"), expect);
    }

    #[test]
    fn sizes_read_well() {
        check(ByteCount::new(0), "0 B");
        check(ByteCount::new(1023), "1023 B");
        check(ByteCount::new(1536), "1.50 KiB");
        check(ByteCount::new(256 << 20), "256 MiB");
        check(ByteCount::new(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn rates_round_as_documented() {
        let rate = BytesPerSecond::measured(ByteCount::new(10), Duration::from_secs(3));
        assert_eq!(rate, Some(BytesPerSecond::new(3)));
        assert_eq!(
            BytesPerSecond::measured(ByteCount::new(10), Duration::ZERO),
            None
        );
        let time = BytesPerSecond::new(3).time_for(ByteCount::new(10));
        assert_eq!(time, Some(Duration::from_nanos(3_333_333_334)));
        assert_eq!(BytesPerSecond::new(0).time_for(ByteCount::new(1)), None);
        assert_eq!(BytesPerSecond::new(8191).pages(), PagesPerSecond::new(1));
        let pages = PagesPerSecond::measured(PageCount::new(10), Duration::from_secs(3));
        assert_eq!(pages, Some(PagesPerSecond::new(3)));
    }

    #[test]
    fn a_range_ends_after_its_last_page() {
        let range = PageRange::new(Pfn::new(3), PageCount::new(2));
        assert_eq!(
            range.iter().collect::<alloc::vec::Vec<_>>(),
            [Pfn::new(3), Pfn::new(4)]
        );
        assert_eq!(range.end(), Pfn::new(5));
    }
}
